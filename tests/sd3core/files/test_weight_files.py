"""Which of a folder's weights are taken: whole or in shards, in one precision or another, under one prefix or another.

What is refused says what to do, and that is done here.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from small_models import randomise, small_config
from test_convert import as_diffusers, assert_same, imported
from transformers import T5EncoderModel

from sd3core.checkpoint import load_model
from sd3core.checkpoint_formats import to_diffusers, to_single_file
from sd3core.errors import CheckpointError
from sd3core.exchange.convert import export_model, import_model
from sd3core.exchange.foreign_weights import open_foreign_weights
from sd3core.files.weight_files import find_weights
from sd3core.mmdit import MMDiT
from sd3core.recipe import Text
from sd3core.towers.autoencoder import load_autoencoder
from sd3core.towers.text_encoders import load_text_encoders

WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{WHOLE}.index.json"


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return randomise(MMDiT(small_config(depth=2, qk_norm="rms")))


@pytest.fixture
def two_sets(model, tmp_path) -> Path:
    """A folder with shards and an older whole file."""
    folder = tmp_path / "transformer"
    as_diffusers(model).save_pretrained(folder, max_shard_size="1MB")
    save_file({name: tensor + 1 for name, tensor in to_diffusers(model).items()}, folder / WHOLE)
    return folder


def refusal(path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as error, open_foreign_weights(path, **options):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_file_and_an_index_are_refused_and_either_may_be_named(model, two_sets, tmp_path):
    assert refusal(two_sets) == (
        f"{two_sets}: {INDEX} and {WHOLE} are both there and may differ; take one away, or name the one you mean"
    )
    assert_same(imported(two_sets / INDEX, tmp_path / "of-the-index"), model)
    other = imported(two_sets / WHOLE, tmp_path / "of-the-file")
    assert torch.equal(other.x_embedder.proj.bias, model.x_embedder.proj.bias + 1)
    (two_sets / WHOLE).unlink()
    assert_same(imported(two_sets, tmp_path / "taken-away"), model)


def test_a_pipeline_with_two_sets_is_refused_as_well(two_sets, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "are both there" in refusal(tmp_path)


@pytest.mark.parametrize("form", ["whole", "sharded"])
@pytest.mark.parametrize("beside", ["", "plain"])
def test_a_variant_is_taken_where_it_is_the_only_one(model, tmp_path, form, beside):
    """As diffusers writes it: NAME.fp16.safetensors, or NAME.fp16-00001-of-0000N with NAME.safetensors.index.fp16.json."""
    size = "1MB" if form == "sharded" else "1GB"
    as_diffusers(model).half().save_pretrained(tmp_path / "a", variant="fp16", max_shard_size=size)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) == (form == "sharded")
    if beside:
        as_diffusers(model).save_pretrained(tmp_path / "a", max_shard_size=size)
    found = imported(tmp_path / "a", tmp_path / "out")
    assert found.x_embedder.proj.bias.dtype == (torch.float32 if beside else torch.float16)
    assert torch.equal(found.x_embedder.proj.bias.half(), model.x_embedder.proj.bias.half())


def test_of_two_variants_one_must_be_named(model, tmp_path):
    for variant in ("fp16", "bf16"):
        as_diffusers(model).half().save_pretrained(tmp_path / "a", variant=variant)
    said = refusal(tmp_path / "a")
    assert (
        "diffusion_pytorch_model.bf16.safetensors and diffusion_pytorch_model.fp16.safetensors are both there" in said
    )
    imported(tmp_path / "a" / "diffusion_pytorch_model.fp16.safetensors", tmp_path / "out")


@pytest.mark.parametrize("form", ["whole", "index", "shards alone"])
def test_a_folder_as_accelerate_saves_it(model, tmp_path, form):
    """model.safetensors, or its shards, beside pickles of the optimizer: neither of this system nor of diffusers."""
    folder, state = tmp_path / "checkpoint-500", dict(model.state_dict())
    folder.mkdir()
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"\x80")
    if form == "whole":
        save_file(state, folder / "model.safetensors")
    else:
        files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
        if form == "index":
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert "one of several files of a model; name the folder" in refusal(
            folder / "model-00001-of-00002.safetensors"
        )
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert ("`sd3 import`" in str(error.value)) == (form != "shards alone")
    assert_same(imported(folder, tmp_path / "out"), model)
    export_model(str(tmp_path / "out"), tmp_path / "exported", "diffusers")
    if form == "shards alone":
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert "shards are missing beside model-00001-of-00002.safetensors; get the folder again" in refusal(folder)


PREFIXES = [
    "model.diffusion_model.", "transformer.", "model.", "net.", "diffusion_model.", "ema.", "ema_model.", "module.",
    "_orig_mod.", "base_model.model.", "module._orig_mod.", "state_dict.model.diffusion_model.", "odd-one.",
]  # fmt: skip


@pytest.mark.parametrize("names", ["released", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_are_found_under_any_one_prefix(model, tmp_path, prefix, names):
    """By what is there, strictly under the prefix; what is not under it is left aside and named."""
    own = model.state_dict() if names == "released" else to_diffusers(model)
    others = {"n_averaged": torch.zeros(1), "vae.encoder.conv_in.weight": torch.zeros(1)}
    save_file({prefix + name: tensor for name, tensor in own.items()} | others, tmp_path / "a.safetensors")
    with open_foreign_weights(tmp_path / "a.safetensors") as foreign:
        assert foreign.notes == (
            f"{tmp_path}/a.safetensors: left aside: the VAE and 1 tensor not under {prefix!r} (n_averaged)",
        )
    assert_same(imported(tmp_path / "a.safetensors", tmp_path / "out"), model)
    for change, problem in (
        ({f"{prefix}joint_blocks.0.odd.weight": torch.zeros(1)}, "1 tensor unknown"),
        ({f"{prefix}extra": torch.zeros(1)}, "1 tensor unknown"),
    ):
        state = {prefix + name: tensor for name, tensor in own.items()} | change
        if names == "released" or "joint" not in next(iter(change)):
            save_file(state, tmp_path / "b.safetensors")
            assert problem in refusal(tmp_path / "b.safetensors")
    gone = next(name for name in own if name.endswith("proj.weight") and "embed" not in name)
    save_file({prefix + name: tensor for name, tensor in own.items() if name != gone}, tmp_path / "c.safetensors")
    assert f"1 tensor missing: {prefix + gone!r}" in refusal(tmp_path / "c.safetensors")


def test_of_two_prefixes_one_must_be_named(model, tmp_path):
    """Live and averaged weights in one file, and released ones with LDM's nameless average beside them."""
    path, state = tmp_path / "a.safetensors", dict(model.state_dict())
    averaged = {f"ema.{name}": tensor + 1 for name, tensor in state.items()}
    save_file({f"model.{name}": tensor for name, tensor in state.items()} | averaged, path)
    assert refusal(path) == f"{path}: several sets of weights, under 'ema.', 'model.'; name one with --prefix"
    assert refusal(path, prefix="net.").endswith(
        "no SD3 transformer under --prefix 'net.', only under 'ema.', 'model.'"
    )
    for prefix, more in (("ema.", 1), ("model.", 0)):
        with open_foreign_weights(path, prefix=prefix) as foreign:
            assert "not under" in foreign.notes[0]
            import_model(foreign, str(tmp_path / prefix), {})
        found = load_model(tmp_path / prefix)
        assert torch.equal(found.x_embedder.proj.bias, model.x_embedder.proj.bias + more)
    save_file(to_single_file(model) | {"model_ema.diffusion_modeljoint_blocks0x": torch.zeros(1)}, path)
    assert_same(imported(path, tmp_path / "ldm"), model)


def test_the_mends_of_what_is_refused_can_be_followed(model, tmp_path):
    folder = tmp_path / "transformer"
    as_diffusers(model).save_pretrained(folder)
    assert "name the folder that it is in" in refusal(folder / "config.json")
    imported(folder, tmp_path / "model")
    said = refusal(tmp_path / "model")
    assert "a model folder already; it is taken as it stands, `sd3 export` makes other formats of it" in said
    export_model(str(tmp_path / "model"), tmp_path / "other.safetensors", "single-file")
    with pytest.raises(
        CheckpointError, match="of a diffusers folder; `sd3 import FOLDER OUT` makes a model folder of it"
    ):
        load_model(folder)
    (folder / WHOLE).rename(folder / "own name.safetensors")
    (said,) = re.findall("name one of its files: (.*)", refusal(folder))
    imported(folder / said, tmp_path / "named")
    (folder / "own name.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / WHOLE).symlink_to(tmp_path / "elsewhere.safetensors")
    assert "copy the file there, or name it itself" in refusal(folder)
    imported(tmp_path / "elsewhere.safetensors", tmp_path / "itself")
    (folder / WHOLE).unlink()
    shutil.copy(tmp_path / "elsewhere.safetensors", folder / WHOLE)
    imported(folder, tmp_path / "copied")
    eighth = {name: t.to(torch.float8_e4m3fn) for name, t in model.state_dict().items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    assert "add --dtype to cast it" in refusal(tmp_path / "fp8.safetensors")
    imported(tmp_path / "fp8.safetensors", tmp_path / "cast", dtype="float32")
    for path in (tmp_path / "elsewhere.safetensors", tmp_path):
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(CheckpointError, match="`sd3 import` makes a model folder of another system's weights"):
            load_model(path)
        imported(path, tmp_path / f"again-{path.suffix}")


def test_towers_of_half_precision_alone_are_taken(towers_folder, tmp_path):
    """As released pipelines have them, whole and in shards; the same numbers as the plain files of those weights."""
    half, plain = tmp_path / "half", tmp_path / "plain"
    for folder, variant in ((half, "fp16"), (plain, None)):
        shutil.copytree(towers_folder, folder)
        for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            for path in (folder / part).glob("*.safetensors"):
                state = {name: tensor.half() for name, tensor in load_file(path).items()}
                path.unlink()
                save_file(
                    state, path.with_suffix(f".{variant}.safetensors" if variant else ".safetensors"), {"format": "pt"}
                )
    t5 = T5EncoderModel.from_pretrained(plain / "text_encoder_3", dtype=torch.float16)
    (half / "text_encoder_3" / "model.fp16.safetensors").unlink()
    t5.save_pretrained(half / "text_encoder_3", variant="fp16", max_shard_size="100KB")
    assert (half / "text_encoder_3" / "model.safetensors.index.fp16.json").is_file()
    text = Text(clip_tokens=16, t5_tokens=16)
    one, other = (load_text_encoders(folder, text).encode(["a red square"]) for folder in (half, plain))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("clip_l", "clip_g", "t5"))
    picture = torch.from_numpy(np.linspace(-1, 1, 3 * 32 * 32, dtype=np.float32)).view(1, 3, 32, 32)
    assert torch.equal(load_autoencoder(half).encode(picture), load_autoencoder(plain).encode(picture))


def test_towers_with_two_sets_of_weights_are_refused(towers_folder, tmp_path):
    """transformers would take the whole file, diffusers the shards."""
    shutil.copytree(towers_folder, tmp_path / "towers")
    for part, kind in (("text_encoder_3", T5EncoderModel), ("vae", AutoencoderKL)):
        folder = tmp_path / "towers" / part
        kept = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        kind.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        load = load_autoencoder if part == "vae" else lambda path: load_text_encoders(path, Text(clip_tokens=16))
        with pytest.raises(CheckpointError, match=r"index.json and .*\.safetensors are both there and may differ"):
            load(tmp_path / "towers")
        for name in kept:
            (folder / name).unlink()
        load(tmp_path / "towers")  # taken away


def test_an_index_that_names_the_whole_file_is_one_set(model, tmp_path):
    save_file(to_diffusers(model), tmp_path / WHOLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(to_diffusers(model), WHOLE)}))
    assert find_weights(tmp_path, ["diffusion_pytorch_model"]).name == INDEX
    assert_same(imported(tmp_path, tmp_path / "out"), model)
