"""Released weights as a towers artifact: checked, then taken into the store by digest."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sd3core.autoencoder import check_vae_config
from sd3core.data.store import Store
from sd3core.errors import DataError
from sd3core.progress import ProgressCallback, ignore_progress
from sd3core.recipe import ReleasedTowers
from sd3core.towers import TOWER_FOLDERS, TowersManifest, commit_tower, commit_towers, finished_towers

MODEL_TYPES = {
    "text_encoder": ("clip", "clip_text_model"),
    "text_encoder_2": ("clip", "clip_text_model"),
    "text_encoder_3": ("t5",),
    "judge_text": ("clip",),
    "judge_vision": ("clip",),
}


def commit_released_towers(
    store: Store,
    folder: str,
    fields: dict[str, Any],
    released: ReleasedTowers,
    report: ProgressCallback = ignore_progress,
) -> TowersManifest:
    """Checks folders of released weights and takes their files into the store under their digests.

    Raises DataError naming the folder and what is wrong with it. Only safetensors and JSON, text and tokenizer files are taken.
    """
    sources = {
        "vae": released.vae,
        "text_encoder": released.clip_l,
        "tokenizer": released.clip_l_tokenizer,
        "text_encoder_2": released.clip_g,
        "tokenizer_2": released.clip_g_tokenizer,
        "text_encoder_3": released.t5,
        "tokenizer_3": released.t5_tokenizer,
        "judge_text": released.judge,
        "judge_vision": released.judge,
        "judge_tokenizer": released.judge,
    }
    finished = finished_towers(store, folder)
    for name, parts in TOWER_FOLDERS.items():
        if name in finished:
            continue
        with tempfile.TemporaryDirectory(prefix=f"tower-{name}-") as scratch:
            for part in parts:
                check_released_folder(part, Path(sources[part]))
                _link_files(Path(sources[part]), Path(scratch) / part, weights="tokenizer" not in part)
            commit_tower(store, folder, name, Path(scratch), {}, report)
    return commit_towers(store, folder, fields)


def check_released_folder(part: str, source: Path) -> None:
    """Raises DataError where `source` cannot be what the artifact's folder `part` must hold."""
    if not source.is_dir():
        raise DataError(f"towers.released: {source} (for {part}) is not a folder")
    if "tokenizer" in part:
        if not any((source / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
            raise DataError(f"{source}: no tokenizer here (tokenizer.json, vocab.json or spiece.model)")
        return
    if not any(source.glob("*.safetensors")):
        raise DataError(
            f"{source}: no safetensors files; convert the weights with save_pretrained(safe_serialization=True)"
        )
    if part == "vae":
        check_vae_config(source)
        return
    config = source / "config.json"
    model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if model_type not in MODEL_TYPES[part]:
        raise DataError(
            f"{source}: model_type {model_type!r} in config.json; {part} needs {' or '.join(MODEL_TYPES[part])}"
        )


def _link_files(source: Path, target: Path, weights: bool) -> None:
    suffixes = {".json", ".txt", ".model", *({".safetensors"} if weights else ())}
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            (target / path.name).symlink_to(path.resolve())
