"""The rows that stages show in the UI."""

from __future__ import annotations

from sd3core.data.manifest import read_manifest
from sd3core.data.store import Store
from sd3core.towers.artifact import read_towers
from workers.stage import StageResult


def shard_table(store: Store, results: dict[str, StageResult], rows_are: str = "rows") -> list[dict[str, object]]:
    """A row for each thing a stage makes: shards, what is in them, size, how many by bucket or split, what is left out."""
    rows = []
    for name, result in results.items():
        manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
        rows.append(
            {
                "what": name,
                "shards": len(manifest.shards),
                "made now": result.made,
                rows_are: f"{manifest.rows:,}",
                "MB": f"{manifest.bytes / 1e6:,.1f}",
                "by kind": ", ".join(f"{kind}: {count:,}" for kind, count in manifest.buckets.items()),
                "left out": ", ".join(f"{reason}: {count}" for reason, count in manifest.failed_reasons.items())
                or "none",
                "seconds": f"{result.seconds:.1f}",
            }
        )
    return rows


def towers_table(store: Store, result: StageResult) -> list[dict[str, object]]:
    """A row a tower: size, digest, and the last figures of its training where it was made here."""
    rows = []
    for name, tower in read_towers(store, result.manifest.folder, result.manifest.digest).towers.items():
        figures = ", ".join(f"{key} {value:.4g}" for key, value in tower.training.items() if isinstance(value, float))
        size = sum(file.bytes for file in tower.files.values())
        rows.append(
            {
                "tower": name,
                "MB": f"{size / 1e6:,.1f}",
                "digest": tower.digest[:12],
                "training": figures or "released weights",
            }
        )
    return rows
