"""The exported folder against diffusers itself: the pipeline is an independent implementation of everything but the
weights.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_generate import FACTS, write_checkpoint

from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.errors import CheckpointError, UserError
from sd3core.exchange.diffusers_folder import export_diffusers
from sd3core.generate import Generator
from sd3core.recipe import Text
from sd3core.sample_settings import SampleSettings

diffusers = pytest.importorskip("diffusers")
README_PROMPT = "a photo of a red apple on a wooden table"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def inside(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_the_pipeline_draws_the_picture_that_the_generator_draws(towers_folder, tmp_path):
    """Same negative embeddings, T5 length, sigmas, seed, fp32: within 2 of 255 levels at every pixel."""
    checkpoint = write_checkpoint(tmp_path / "model")
    folder = export_diffusers(checkpoint, towers_folder, tmp_path / "exported")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = Generator.load(checkpoint, towers_folder)
    settings = SampleSettings(48, 32, num_steps=5, guidance_scale=3.0, shift=FACTS.shift)
    prompt = "a red square on the left"
    _, (negative, negative_pooled) = generator.conditioning([prompt])
    theirs = pipe(
        prompt=prompt,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        max_sequence_length=FACTS.text.t5_tokens,
        height=48,
        width=32,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(11),
    ).images[0]
    ours = generator.sample([prompt], [11], settings)[0]
    assert ours.std() > 5
    assert np.abs(np.asarray(theirs).astype(int) - ours).max() <= 2


@pytest.mark.parametrize("null", ["zeros", "empty"])
@pytest.mark.parametrize("padding", ["reference", "trimmed"])
def test_the_readme_shows_the_call_that_fits(towers_folder, tmp_path, null, padding):
    """Its Python block is run as it stands, and must draw the generator's picture for each way to train."""
    text = Text(clip_tokens=12, t5_tokens=10, padding=padding)
    checkpoint = write_checkpoint(
        tmp_path / "model", CheckpointFacts(null, text, side_px=32, shift=1.5, digest="", samples=7)
    )
    folder = export_diffusers(checkpoint, towers_folder, tmp_path / "exported")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    with inside(folder):
        exec(compile(code, "README.md", "exec"), {})
        theirs = np.asarray(diffusers.utils.load_image("picture.png"))
    settings = SampleSettings(32, 32, num_steps=28, guidance_scale=5.0, shift=1.5)
    generator = Generator.load(checkpoint, towers_folder)
    ours = generator.sample([README_PROMPT], [0], settings)[0]
    assert np.abs(theirs.astype(int) - ours).max() <= 2
    other = Generator(
        generator.model, generator.encoders, generator.autoencoder, "empty" if null == "zeros" else "zeros"
    )
    assert np.abs(theirs.astype(int) - other.sample([README_PROMPT], [0], settings)[0]).max() > 2


def test_is_there_whole_or_not_at_all(towers_folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model")
    out = tmp_path / "deep" / "exported"
    incomplete = tmp_path / "towers"
    incomplete.mkdir()
    for name in ("text_encoder_3", "vae"):
        (incomplete / name).symlink_to(towers_folder / name)
    with pytest.raises(OSError):
        export_diffusers(checkpoint, incomplete, out)
    assert list(out.parent.iterdir()) == []
    export_diffusers(checkpoint, towers_folder, out)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [
            "README.md",
            "model_index.json",
            "scheduler",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "tokenizer",
            "tokenizer_2",
            "tokenizer_3",
            "transformer",
            "vae",
        ]
    )
    with pytest.raises(UserError, match="exists already"):
        export_diffusers(checkpoint, towers_folder, out)


def test_a_formulation_that_the_pipeline_cannot_sample_is_refused(towers_folder, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", replace(FACTS, formulation="v/cos"))
    with pytest.raises(UserError) as caught:
        export_diffusers(checkpoint, towers_folder, tmp_path / "exported")
    reason = "diffusers' SD3 pipeline samples rectified flow only, not v/cos; sd3 sample draws from the checkpoint"
    assert str(caught.value) == f"file://{checkpoint}: {reason}" and not (tmp_path / "exported").exists()


def test_a_projection_of_clip_l_is_undone(towers_folder, tmp_path):
    """A released CLIP-L has a projection that SD3 does not use, but the pipeline would."""
    import shutil

    from transformers import CLIPTextModelWithProjection

    towers = tmp_path / "towers"
    shutil.copytree(towers_folder, towers)
    clip = CLIPTextModelWithProjection.from_pretrained(towers / "text_encoder")
    torch.nn.init.normal_(clip.text_projection.weight)
    clip.save_pretrained(towers / "text_encoder")
    folder = export_diffusers(write_checkpoint(tmp_path / "model"), towers, tmp_path / "exported")
    exported = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    assert torch.equal(exported.text_projection.weight, torch.eye(32))


def test_towers_that_diffusers_would_join_otherwise_are_refused(towers_folder, tmp_path):
    from sd3core.checkpoint import save_model
    from sd3core.mmdit import MMDiT, MMDiTConfig

    config = MMDiTConfig.from_depth(1, context_dim=96, pooled_dim=80, position_max=4)
    save_model(tmp_path / "model", MMDiT(config), replace(FACTS).to_extra())
    with pytest.raises(CheckpointError, match="T5 has 64, the model 96"):
        export_diffusers(str(tmp_path / "model"), towers_folder, tmp_path / "exported")


MODEL = "runs/tiny-test/model"


def export_model(recipe, store, *arguments, **options):
    """The stage, of the model folder MODEL of the store."""
    from sd3core.checkpoint import open_checkpoint
    from workers.export import export_stage

    return export_stage(recipe, store, MODEL, open_checkpoint(store.uri(MODEL)).facts, *arguments, **options)


def test_the_stage_writes_its_manifest_last_and_once(towers_folder, tmp_path):
    from sd3core.data.records import record_file
    from sd3core.data.store import open_store
    from sd3core.recipe_file import load_recipe

    store, recipe = open_store(str(tmp_path / "store")), load_recipe("tiny-test")
    write_checkpoint(tmp_path / "store" / "runs" / "tiny-test" / "model")
    digests = dict.fromkeys(("vae", "clip_l", "clip_g", "t5", "judge"), "0" * 64)
    exported = export_model(recipe, store, towers_folder, digests)
    assert not exported.skipped and exported.folder.startswith("runs/tiny-test/export/")
    manifest = store.get_json(f"{exported.folder}/MANIFEST.json")
    local = store.local_path(exported.folder)
    assert {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} == {
        *manifest["files"],
        "MANIFEST.json",
        "PROVENANCE.json",
    }
    assert all(record_file(local / name).model_dump() == record for name, record in manifest["files"].items())
    again = export_model(recipe, store, towers_folder, digests)
    assert again.skipped and again.digest == exported.digest
    other = export_model(recipe, store, towers_folder, digests | {"vae": "1" * 64})
    assert not other.skipped and other.folder != exported.folder


def test_the_scheduler_follows_a_shift_that_was_changed_after_training(towers_folder, tmp_path):
    from sd3core.data.store import open_store
    from sd3core.recipe_file import load_recipe

    store = open_store(str(tmp_path / "store"))
    write_checkpoint(tmp_path / "store" / "runs" / "tiny-test" / "model")
    digests = dict.fromkeys(("vae", "clip_l", "clip_g", "t5", "judge"), "0" * 64)
    folders = {}
    for shift in (2.5, 4.0):
        recipe = load_recipe("tiny-test", [f"evaluate.shift={shift}"])
        exported = export_model(recipe, store, towers_folder, digests)
        scheduler = store.get_json(f"{exported.folder}/scheduler/scheduler_config.json")
        assert scheduler["shift"] == shift and not exported.skipped
        folders[shift] = exported.folder
    assert len(set(folders.values())) == 2


def test_a_damaged_export_in_a_store_elsewhere_is_made_again(towers_folder, s3_bucket, tmp_path):
    """Also where its size is right; what stands is read once, not by every call."""
    from sd3core.data.checked_files import CheckedFiles
    from sd3core.data.store import open_store
    from sd3core.recipe_file import load_recipe

    store, model = open_store(f"s3://{s3_bucket}"), tmp_path / "model"
    write_checkpoint(model)
    for path in model.rglob("*"):
        if path.is_file():
            store.put_file(f"runs/tiny-test/model/{path.relative_to(model).as_posix()}", path)
    digests = dict.fromkeys(("vae", "clip_l", "clip_g", "t5", "judge"), "0" * 64)

    def export():
        checked = CheckedFiles(tmp_path / "checked")
        return export_model(load_recipe("tiny-test"), store, towers_folder, digests, checked=checked)

    path = f"{export().folder}/transformer/diffusion_pytorch_model.safetensors"
    assert export().skipped
    get_range, spans = store.get_range, []
    store.get_range = lambda *asked: spans.append(asked) or get_range(*asked)
    assert export().skipped and spans == []
    data = store.get(path)
    store.put(path, data[:-1] + bytes([data[-1] ^ 1]))
    again = export()
    assert (
        not again.skipped
        and again.notes == [f"{store.uri(path)} was damaged: the folder is made again"]
        and store.get(path) == data
    )
    assert export().skipped


@pytest.mark.parametrize("damage", ["a bit", "half of it", "gone", "its manifest"])
def test_a_damaged_export_is_named_and_made_again(towers_folder, tmp_path, damage):
    from sd3core.data.checked_files import CheckedFiles
    from sd3core.data.store import open_store
    from sd3core.exchange.diffusers_folder import check_exported
    from sd3core.recipe_file import load_recipe

    store, recipe = open_store(str(tmp_path / "store")), load_recipe("tiny-test")
    write_checkpoint(tmp_path / "store" / "runs" / "tiny-test" / "model")
    digests = dict.fromkeys(("vae", "clip_l", "clip_g", "t5", "judge"), "0" * 64)
    checked = CheckedFiles(tmp_path / "checked")

    def export():
        return export_model(recipe, store, towers_folder, digests, checked=checked)

    folder = export().folder
    local = store.local_path(folder)
    assert export().skipped and check_exported(local, checked) is None
    name = "MANIFEST.json" if damage == "its manifest" else "transformer/diffusion_pytorch_model.safetensors"
    data = (local / name).read_bytes()
    if damage == "gone":
        (local / name).unlink()
    elif damage == "a bit":
        (local / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        (local / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=name):
        check_exported(local, checked)
    again = export()
    assert not again.skipped and store.uri(f"{folder}/{name}") in again.notes[0] and (local / name).read_bytes() == data
    assert export().skipped
