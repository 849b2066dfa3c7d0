"""Writes a checkpoint as a folder that diffusers' SD3 pipeline opens.

StableDiffusion3Pipeline.from_pretrained reads it; a README says how.

    model_index.json  scheduler/  transformer/  vae/  text_encoder{,_2,_3}/  tokenizer{,_2,_3}/  README.md

The transformer's position table is stored with its weights, because diffusers' own constructor computes other
positions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sd3core.checkpoint import open_checkpoint
from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.records import FileRecord
from sd3core.errors import CheckpointError
from sd3core.exchange.convert import DtypeName, open_source, write_config, write_transformer
from sd3core.exchange.export_readme import readme
from sd3core.files.whole_output import atomic_output
from sd3core.mmdit import MMDiTConfig
from sd3core.sample_settings import Weights
from sd3core.specs import MANIFEST
from sd3core.towers.artifact import TOWER_FOLDERS

TEXT_TOWERS = {name: TOWER_FOLDERS[name] for name in ("clip_l", "clip_g", "t5")}  # folders of model and tokenizer


def export_diffusers(
    checkpoint: str,
    towers: Path | str,
    out: Path | str,
    *,
    weights: Weights | None = None,
    dtype: DtypeName = "float32",
    shift: float | None = None,
) -> Path:
    """Writes OUT, which must not exist yet, whole or not at all. Weights are the EMA where the checkpoint has both.

    shift: the scheduler's; None takes what the checkpoint says.

    Raises UserError where OUT exists, where diffusers cannot sample the checkpoint's formulation, or where these towers cannot
    be put together as diffusers puts them together.
    """
    out, towers = Path(out), Path(towers)
    opened = open_checkpoint(checkpoint)
    facts = opened.facts
    if shift is not None:
        facts = replace(facts, shift=shift)
    with open_source(opened, weights) as source, atomic_output(out) as folder:
        config = source.config
        _check_widths(towers, config)
        (folder / "transformer").mkdir(parents=True)
        write_transformer(folder / "transformer", source, dtype)
        _write_towers(folder, towers, facts)
        _write_scheduler(folder / "scheduler", facts)
        _write_index(folder)
        (folder / "README.md").write_text(readme(facts, checkpoint, config.context_dim, config.pooled_dim))
    return out


def check_exported(folder: Path, checked: CheckedFiles, part: str = "") -> None:
    """Raises CheckpointError naming a file below `part` of an exported folder that is not what its manifest says.

    A folder without a manifest of this system's export stage is another's: nothing is known of its bytes.
    """
    path = folder / MANIFEST
    if not path.is_file() or not (folder / "model_index.json").is_file():
        return
    try:
        manifest = json.loads(path.read_bytes())
        if manifest.get("stage") != "export":
            return
        records = {name: FileRecord.model_validate(record) for name, record in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path}: damaged; run the export stage again, or delete it to take the files as they are"
        ) from None
    for name, record in sorted(records.items()):
        if name.startswith(part) and not checked.is_whole(folder / name, record):
            raise CheckpointError(
                f"{folder / name}: damaged, not the file that was exported; run the export stage again"
            )


def _check_widths(towers: Path, config: MMDiTConfig) -> None:
    """diffusers pads the CLIPs to T5's width, and expects that to be the transformer's."""
    width = json.loads((towers / "text_encoder_3" / "config.json").read_text())["d_model"]
    if width != config.context_dim:
        raise CheckpointError(
            f"diffusers takes T5's width for the context's: T5 has {width}, the model {config.context_dim};"
            " this model cannot be exported, take a T5 as wide as both CLIPs together or wider"
        )


def _write_towers(folder: Path, towers: Path, facts: CheckpointFacts) -> None:
    from sd3core.towers.text_encoders import (
        load_tokenizer,  # loads transformers, which an export that stands does not need
    )

    for name in ("vae", *(model for model, _ in TEXT_TOWERS.values())):
        shutil.copytree(towers / name, folder / name, copy_function=shutil.copyfile)
    _make_projection_identity(folder / TEXT_TOWERS["clip_l"][0])
    tokens = {"clip_l": facts.text.clip_tokens, "clip_g": facts.text.clip_tokens, "t5": facts.text.t5_tokens}
    for name, (_, tokenizer_folder) in TEXT_TOWERS.items():
        tokenizer = load_tokenizer(towers / tokenizer_folder)
        tokenizer.model_max_length = tokens[name]  # the pipeline pads CLIP prompts to this
        tokenizer.save_pretrained(folder / tokenizer_folder)


def _make_projection_identity(folder: Path) -> None:
    """The pipeline reads CLIP-L's pooled vector behind the projection, SD3 was made with the one before it."""
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True, dtype="auto")
    identity = torch.eye(model.config.hidden_size)
    if torch.equal(model.text_projection.weight.float().cpu(), identity):
        return
    model.text_projection = torch.nn.Linear(*identity.shape, bias=False, dtype=model.dtype)
    model.text_projection.weight.data.copy_(identity)
    model.config.projection_dim = model.config.hidden_size
    shutil.rmtree(folder)
    model.save_pretrained(folder)


def _write_scheduler(folder: Path, facts: CheckpointFacts) -> None:
    folder.mkdir()
    fields = {"num_train_timesteps": 1000, "shift": facts.shift, "use_dynamic_shifting": False}
    write_config(folder / "scheduler_config.json", "FlowMatchEulerDiscreteScheduler", fields)


def _write_index(folder: Path) -> None:
    from sd3core.towers.text_encoders import load_tokenizer

    fields: dict[str, Any] = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name, (model_folder, tokenizer_folder) in TEXT_TOWERS.items():
        model_class = "T5EncoderModel" if name == "t5" else "CLIPTextModelWithProjection"
        fields[model_folder] = ["transformers", model_class]
        fields[tokenizer_folder] = ["transformers", type(load_tokenizer(folder / tokenizer_folder)).__name__]
    write_config(folder / "model_index.json", "StableDiffusion3Pipeline", fields)
