from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from data_chain import small_recipe
from diffusers import AutoencoderKL
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from sd3core.data.store import open_store
from sd3core.errors import CheckpointError, DataError
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe, ReleasedTowers
from sd3core.towers.artifact import commit_towers, fetch_towers
from sd3core.towers.text_encoders import load_model_folder, load_text_encoders
from sd3core.towers.training.make import make_small_tower
from workers.stage import StageFailed
from workers.towers import ReleasedTowerWorker, lay_out_released, towers_stage

WORDS = ["a red circle", "two blue squares", "a green star above a white ring"]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> dict[str, str]:
    """Folders as they come from a hub: other file forms beside the weights, the judge as one CLIP."""
    root: Path = tmp_path_factory.mktemp("released")
    small = small_recipe().towers.small
    images = [
        torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)).numpy()
        for i in range(3)
    ]
    for name in ("vae", "clip_l", "clip_g", "t5"):
        make_small_tower(name, small, images, WORDS, 0, root)
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sides, "vocab_size": 512},
        vision_config={**sides, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(root / "judge")
    for path in (root / "tokenizer").iterdir():
        (root / "judge" / path.name).write_bytes(path.read_bytes())
    (root / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "text_encoder" / "model.fp16.safetensors").write_bytes(b"another precision")
    folders = {
        "vae": "vae",
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "t5": "text_encoder_3",
        "judge": "judge",
    }
    folders |= {"clip_l_tokenizer": "tokenizer", "clip_g_tokenizer": "tokenizer_2", "t5_tokenizer": "tokenizer_3"}
    return {key: str(root / folder) for key, folder in folders.items()}


def recipe_with(released: dict[str, str]) -> Recipe:
    fields = small_recipe("compute.actors=1").model_dump(mode="json")
    fields["towers"] = {"name": "released", "released": released}
    return Recipe.model_validate(fields)


def test_released_towers_are_checked_and_taken_over_in_one_precision(released, tmp_path):
    store = open_store(str(tmp_path / "store"))
    worker = ReleasedTowerWorker(store.url, "towers/r", ReleasedTowers(**released))
    for name in ("vae", "clip_l", "clip_g", "t5", "judge"):
        worker(name)
    manifest = commit_towers(store, "towers/r", {})
    assert not [
        path for tower in manifest.towers.values() for path in tower.files if path.endswith(".bin") or "fp16" in path
    ]
    local = fetch_towers(store, "towers/r", tmp_path / "cache")
    text = small_recipe().text
    features = load_text_encoders(local, text).encode(WORDS)
    assert features.t5.shape[:2] == (3, text.t5_tokens)
    whole = CLIPModel.from_pretrained(released["judge"]).state_dict()
    for part, side in (("judge_text", CLIPTextModelWithProjection), ("judge_vision", CLIPVisionModelWithProjection)):
        weights = load_model_folder(side, local / part, torch.float32).state_dict()
        assert all(torch.equal(weights[key], whole[key]) for key in weights)


def test_towers_that_are_there_in_half_precision_alone_are_called_as_the_plain_ones(released, tmp_path):
    """So that the stage's files are what every program looks for, also where they are in shards."""
    folders = dict(released)
    for name in ("vae", "clip_g", "t5"):
        folders[name] = str(shutil.copytree(released[name], tmp_path / name))
    vae, clip = Path(folders["vae"]), Path(folders["clip_g"])
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    (clip / "model.safetensors").rename(clip / "model.fp16.safetensors")
    (clip / "model.bf16.safetensors").symlink_to("model.fp16.safetensors")
    t5 = load_model_folder(T5EncoderModel, Path(folders["t5"]), torch.float16)
    (Path(folders["t5"]) / "model.safetensors").unlink()
    t5.save_pretrained(folders["t5"], variant="fp16", max_shard_size="100KB")
    with pytest.raises(CheckpointError, match="model.bf16.safetensors and model.fp16.safetensors are both there"):
        lay_out_released("clip_g", ReleasedTowers(**folders), tmp_path / "out")
    (clip / "model.bf16.safetensors").unlink()
    for name in ("vae", "clip_l", "clip_g", "t5"):
        lay_out_released(name, ReleasedTowers(**folders), tmp_path / "out")
    AutoencoderKL.from_pretrained(tmp_path / "out" / "vae", use_safetensors=True)
    for part, kind in (("text_encoder_2", CLIPTextModelWithProjection), ("text_encoder_3", T5EncoderModel)):
        _, info = kind.from_pretrained(tmp_path / "out" / part, use_safetensors=True, output_loading_info=True)
        assert not info["missing_keys"]
    assert not [path for path in (tmp_path / "out").rglob("*fp16*") if "-of-" not in path.name]


def test_a_folder_that_is_missing_or_wrong_names_its_key(released, tmp_path):
    store = open_store(str(tmp_path))
    with pytest.raises(DataError, match="towers.released.t5 '/nowhere': no such folder"):
        ReleasedTowerWorker(store.url, "towers/r", ReleasedTowers(**released | {"t5": "/nowhere"}))("t5")
    with pytest.raises(DataError, match="block_out_channels|AutoencoderKL"):
        ReleasedTowerWorker(store.url, "towers/r", ReleasedTowers(**released | {"vae": released["t5"]}))("vae")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_stage_names_the_tower_that_failed_and_keeps_the_others(released, tmp_path):
    store = open_store(str(tmp_path))
    with pytest.raises(StageFailed, match=r"towers: 1 of 5 could not be made: t5 \(towers.released.t5 '/nowhere'"):
        towers_stage(recipe_with(released | {"t5": "/nowhere"}), store, None, ignore_progress)
    result = towers_stage(recipe_with(released), store, None, ignore_progress)
    assert result.made == 5 and result.reason.startswith("first run")
    assert towers_stage(recipe_with(released), store, None, ignore_progress).skipped
