"""The export stage: a run's last checkpoint as a diffusers folder, made once."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.data.begun import begin
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.provenance import PROVENANCE_FILE, provenance, put_provenance
from sd3core.data.records import FileRecord, record_file
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.progress import Progress, ProgressCallback, ignore_progress
from sd3core.recipe import Recipe
from sd3core.specs import FORMATS, MANIFEST, exports_folder, fingerprint
from workers.stage import NOTHING_TO_DO, StageResult, remember_stage


def export_stage(
    recipe: Recipe,
    store: Store,
    checkpoint: str,
    facts: CheckpointFacts,
    towers: Path,
    tower_digests: dict[str, str],
    report: ProgressCallback = ignore_progress,
    *,
    checked: CheckedFiles | None = None,
    reread_towers: Callable[[], object] = lambda: None,
) -> StageResult:
    """The checkpoint folder `checkpoint` of the store, exported to runs/RUN/export/SPEC with its MANIFEST.json last.

    `facts` are what it says of itself. `towers` is the local copy, `tower_digests` the digests of its manifest; before it is
    copied `reread_towers` compares all of its bytes, which the export's own manifest will vouch for. Where a manifest stands
    and every file is as it says, nothing is made.
    """
    started = time.monotonic()
    report(Progress(0, 1, "folders"))
    fields = {
        "format": FORMATS["export"],
        "checkpoint": facts.digest,
        "towers": {name: tower_digests[name] for name in ("vae", "clip_l", "clip_g", "t5")},
        "diffusers": version("diffusers"),
    }
    shift = recipe.evaluate.shift_for(recipe.phases()[-1][1])
    if shift != facts.shift:  # the recipe's was changed after the checkpoint was written
        fields["shift"] = shift
    spec = fingerprint(fields)
    folder = exports_folder(recipe.run, spec)
    manifest_path = f"{folder}/{MANIFEST}"
    standing = {"stage": "export", "spec": spec, "fields": fields}
    begin(store, recipe.run, "export", folder, fields, [checkpoint])
    skipped, damaged = _look(store, folder, standing, checked)
    if not skipped:
        # here: a process that makes no export loads no torch
        from sd3core.exchange.diffusers_folder import export_diffusers

        reread_towers()
        with tempfile.TemporaryDirectory() as scratch:
            local = export_diffusers(store.uri(checkpoint), towers, Path(scratch) / "export", shift=shift)
            files = {}
            for path in sorted(p for p in local.rglob("*") if p.is_file()):
                name = path.relative_to(local).as_posix()
                store.put_file(f"{folder}/{name}", path)
                files[name] = record_file(path).model_dump()
        put_provenance(store, f"{folder}/{PROVENANCE_FILE}", provenance())
        store.put_json(manifest_path, standing | {"from": checkpoint, "files": files})
    digest = fingerprint(store.get_json(manifest_path))
    remember_stage(store, recipe.run, "export", folder, digest, fields)
    report(Progress(1, 1, "folders"))
    return StageResult(
        "export",
        manifest_path,
        digest,
        skipped=skipped,
        reason=NOTHING_TO_DO if skipped else f"from {checkpoint}",
        seconds=time.monotonic() - started,
        made=int(not skipped),
        notes=[f"{store.uri(damaged)} was damaged: the folder is made again"] if damaged else [],
    )


def _look(store: Store, folder: str, standing: dict[str, Any], checked: CheckedFiles | None) -> tuple[bool, str | None]:
    """(whether the export is there as its manifest says, the file that is not)."""
    checked = checked or CheckedFiles(Path(os.devnull))  # which keeps no notes
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = store.get_json(path)
        if manifest | standing != manifest:
            return False, path
        for name, record in sorted(manifest["files"].items()):
            if not checked.holds(store, f"{folder}/{name}", FileRecord.model_validate(record)):
                return False, f"{folder}/{name}"
    except StoreNotFound:
        return False, None
    except (StoreDamaged, KeyError, ValueError, TypeError, AttributeError):
        return False, path
    return True, None
