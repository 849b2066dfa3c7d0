"""The caption stage's tables: what the rules threw out, lengths, some captions."""

from __future__ import annotations

from sd3core.captions.counts import LENGTHS, THROWN_OUT, CaptionCounts
from sd3core.captions.repeated import read_repeated
from sd3core.captions.rules import REPEATED, RULES
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.shards import read_table
from sd3core.data.store import Store
from sd3core.recipe import Recipe
from sd3core.shown_text import shortened
from workers.stage import StageResult

CAPTIONS_SHOWN = 8
CELL_CHARS = 200

Table = list[dict[str, object]]


def caption_tables(recipe: Recipe, store: Store, result: StageResult) -> list[Table]:
    """Of a model: the share of each rule with an example, lengths in words and tokens; then the first captions that are kept."""
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    if not manifest.shards:
        return []
    counts = CaptionCounts.of(manifest.buckets)
    of_rules = [_rules(recipe, store, manifest, counts), _lengths(counts)] if recipe.caption.by_model else []
    return [*of_rules, _first_captions(store, manifest)]


def _rules(recipe: Recipe, store: Store, manifest: Manifest, counts: CaptionCounts) -> Table:
    kept = manifest.rows - sum(counts.thrown_out.values())
    rows = [_share_row("kept", kept, manifest.rows, f"{counts.shortened:,} of them up to their last whole sentence")]
    for rule, count in counts.thrown_out.items():
        rows.append(_share_row(f"thrown out: {RULES[rule]}", count, manifest.rows, _example(store, manifest, rule)))
    ref = ManifestRef(manifest.folder, manifest.digest)
    repeated = read_repeated(store, ref, recipe.caption.max_share)
    if repeated is not None and repeated.captions:
        first = next(iter(repeated.captions.values()))
        images = round(repeated.share * manifest.rows)
        example = f"{first.images / repeated.images:.2%} of the images: {shortened(first.text, CELL_CHARS)}"
        rows.append(_share_row(f"of the kept, thrown out: {RULES[REPEATED]}", images, manifest.rows, example))
    return rows


def _share_row(what: str, count: int, of: int, said: str) -> dict[str, object]:
    return {"synthetic captions": what, "images": f"{count:,}", "share": f"{count / max(of, 1):.2%}", "example": said}


def _example(store: Store, manifest: Manifest, rule: str) -> str:
    """What a model said that the rule threw out, from the first shard that counts any."""
    entry = next(shard for shard in manifest.shards if shard.buckets.get(f"{THROWN_OUT}{rule}"))
    rows = read_table(store, manifest.folder, entry.stem, entry.digest).to_pylist()
    row = next(row for row in rows if row["rule"] == rule)
    return f"{row['key']}: {shortened(row['said'], CELL_CHARS)!r}"


def _lengths(counts: CaptionCounts) -> Table:
    """A row a length that occurs."""
    return [
        {"length of what is kept": name, "captions by words": counts.words[name], "by tokens": counts.tokens[name]}
        for name in LENGTHS
        if counts.words[name] or counts.tokens[name]
    ]


def _first_captions(store: Store, manifest: Manifest) -> Table:
    first = manifest.shards[0]
    rows = read_table(store, manifest.folder, first.stem, first.digest).to_pylist()
    shown = [row for row in rows if row["caption"]][:CAPTIONS_SHOWN]
    return [
        {"key": row["key"], "synthetic caption": shortened(row["caption"], 3 * CELL_CHARS), "by": _author(row)}
        for row in shown
    ]


def _author(row: dict[str, object]) -> str:
    return f"{row['model']} {row['revision']}" if row.get("revision") else str(row["model"])
