"""Finds out what stands at a URL: a shard, stage, checkpoint, table or folder."""

from __future__ import annotations

import math
from typing import Any

from sd3core.checkpoint_record import CONFIG_FILE
from sd3core.data.store import Store, open_store
from sd3core.errors import CheckpointError, DataError, UserError
from sd3core.inspection.findings import Findings, counts_table, shown_bytes, shown_fields
from sd3core.inspection.shards import VaeOf, inspect_manifest, inspect_shard, inspect_table, inspect_tar
from sd3core.specs import DONE, DONE_FILE, INDEX, MANIFEST, MANIFEST_COPY, TABLE, TAR

LISTED = 50  # folders or files of a folder that are named
LARGEST_RECORD = 200_000_000  # bytes: a manifest of a million shards


def inspect_stored(url: str, rows: int, vae_of: VaeOf) -> Findings:
    """`rows`: at most so many of a shard are shown. `vae_of`: opens the autoencoder by whose digest latents were made.

    Raises UserError where nothing stands there.
    """
    store = open_store(url.rstrip("/") or url)
    for name, inspect in ((MANIFEST, _of_manifest), (DONE_FILE, _of_checkpoint), (CONFIG_FILE, _of_checkpoint)):
        if store.exists(name):
            return inspect(store, name, rows, vae_of)
    parent, _, name = store.url.rpartition("/")
    if name and not parent.endswith(":/"):
        folder = open_store(parent)
        for stem in filter(None, (_stem_of(name, suffix) for suffix in (TAR, INDEX, DONE, TABLE, ""))):
            if folder.exists(f"{stem}{DONE}"):
                return inspect_shard(parent, stem, rows, vae_of, index=name.endswith(INDEX))
        if folder.exists(name):
            return _of_file(folder, name, rows, vae_of)
    return _of_folder(store)


def _stem_of(name: str, suffix: str) -> str:
    return name.removesuffix(suffix) if name.endswith(suffix) else ""


def _of_file(folder: Store, name: str, rows: int, vae_of: VaeOf) -> Findings:
    if name.startswith(MANIFEST_COPY):
        return _of_manifest(folder, name, rows, vae_of)
    if name == DONE_FILE or name == CONFIG_FILE:
        return _of_checkpoint(folder, name, rows, vae_of)
    if name.endswith(TAR):
        return inspect_tar(folder, name, rows)
    if name.endswith(TABLE):
        return inspect_table(folder, name, rows)
    if name.endswith(".json"):
        record = _record(folder, name)
        fields = record if isinstance(record, dict) else {"value": record}
        return Findings(f"{name}: a record", shown_fields(fields))
    raise UserError(f"{folder.uri(name)}: neither a shard (.tar, .parquet), a record (.json) nor a folder; name one")


def _record(store: Store, name: str) -> Any:
    if (size := store.size(name)) > LARGEST_RECORD:
        raise UserError(f"{store.uri(name)}: {shown_bytes(size)} of JSON is more than is read; name a shard")
    return store.get_json(name)


def _of_manifest(store: Store, name: str, rows: int, vae_of: VaeOf) -> Findings:
    record = _record(store, name)
    if not isinstance(record, dict):
        raise DataError(f"{store.uri(name)}: not a manifest; run the stage again that makes it")
    if "shards" in record:
        return inspect_manifest(store, name, record, rows, vae_of)
    fields = {key: value for key, value in record.items() if key not in ("towers", "files")}
    found = Findings(f"{record.get('stage', 'a stage')}: its manifest", shown_fields(fields))
    for tower, entry in sorted(record.get("towers", {}).items()):
        size = shown_bytes(sum(file["bytes"] for file in entry["files"].values()))
        training = ", ".join(f"{key} {value}" for key, value in shown_fields(entry.get("training", {})).items())
        row = {"tower": tower, "digest": entry["digest"][:12], "files": f"{len(entry['files'])}", "bytes": size}
        found.tables.setdefault("towers", []).append(row | {"training": training[:120]})
    if files := record.get("files"):
        found.tables["files"] = [
            {"file": path, "bytes": shown_bytes(file["bytes"])} for path, file in sorted(files.items())[:LISTED]
        ]
    return found


def _of_checkpoint(store: Store, name: str, rows: int, vae_of: VaeOf) -> Findings:
    """A training checkpoint or a model folder. Reference features have a DONE.json too, which is a record like any other."""
    from sd3core.checkpoint import TrainingCheckpoint, open_checkpoint  # loads torch

    if name == DONE_FILE and "parameters" not in (record := _record(store, name)):
        return Findings("features of a reference", shown_fields(record))
    checkpoint = open_checkpoint(store.url)
    trained = isinstance(checkpoint, TrainingCheckpoint)
    found = Findings("a training checkpoint" if trained else "a model", {"digest": checkpoint.digest})
    try:
        facts = checkpoint.facts
        found.facts |= shown_fields(
            {"samples": facts.samples, "formulation": facts.formulation, "shift": facts.shift}
            | {"side_px": facts.side_px, "no prompt is": facts.null, "text": facts.text.model_dump(exclude={"null"})}
        )
    except CheckpointError as error:
        found.notes.append(str(error))
    found.facts |= {f"model.{key}": text for key, text in shown_fields(checkpoint.config.to_dict()).items()}
    if trained:
        done = checkpoint.done
        found.title = f"a training checkpoint after {done.samples:,} samples, {done.steps:,} steps"
        found.facts |= {
            "parameters": f"{sum(map(math.prod, done.parameters.values())):,}",
            "weights": "live and their moving average (ema), with both Adam moments",
            "bytes": shown_bytes(sum(file.bytes for file in done.files.values())),
            "attempt": f"{done.attempt}",
        }
        found.facts |= {f"specs.{key}": value for key, value in sorted(done.specs.items())}
        found.facts |= {f"training.{key}": text for key, text in shown_fields(done.training).items()}
    else:
        from sd3core.checkpoint import model_shapes

        found.facts["parameters"] = f"{sum(map(math.prod, model_shapes(checkpoint.config).values())):,}"
    return found


def _of_folder(store: Store) -> Findings:
    """Folders and what is directly in this one; what lies deeper is not looked at."""
    folders = store.folders()
    if not folders:
        files = [entry for entry in store.list() if "/" not in entry.path]
        if not files:
            raise UserError(f"{store.url}: nothing stands there; name a stored object, its folder, or one above it")
        sizes = [{"file": entry.path, "bytes": shown_bytes(entry.size)} for entry in files[:LISTED]]
        kinds: dict[str, int] = {}
        for entry in files:
            ending = f".{entry.path.partition('.')[2]}" if "." in entry.path else "no ending"
            kinds[ending] = kinds.get(ending, 0) + 1
        tables = {"endings": counts_table(kinds, "ending")} if len(files) > LISTED else {}
        facts = {"files": f"{len(files):,}", "bytes": shown_bytes(sum(entry.size for entry in files))}
        return Findings("a folder of files", facts, {"files": sizes} | tables)
    said = [{"folder": name, "holds": _said_of(store, name)} for name in folders[:LISTED]]
    found = Findings("a folder of folders", {"folders": f"{len(folders):,}"}, {"folders": said})
    if len(folders) > LISTED:
        found.notes.append(f"the first {LISTED} of {len(folders):,} folders are named")
    return found


def _said_of(store: Store, name: str) -> str:
    if store.exists(f"{name}/{MANIFEST}"):
        return "a finished stage (MANIFEST.json)"
    if store.exists(f"{name}/{DONE_FILE}"):
        return "a checkpoint or features (DONE.json)"
    if store.exists(f"{name}/{CONFIG_FILE}"):
        return "a model (config.json)"
    inside = store.folders(name)
    return ", ".join(inside[:6]) + (" ..." if len(inside) > 6 else "")
