"""Ingest, towers, caption and encode with real Ray actors, real towers and the small world."""

from __future__ import annotations

import io
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from data_chain import run_chain, small_recipe
from in_process import without_ray
from PIL import Image
from safetensors.torch import load as load_tensors

from sd3core.buckets import bucket_sides, nearest_bucket
from sd3core.conditioning import TextFeatures
from sd3core.data.encoded_shards import caption_id
from sd3core.data.images import PixelRules, crop_to, to_model_range
from sd3core.data.loader import load_split
from sd3core.data.manifest import read_manifest
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.shards import read_samples, read_shard_index, read_table
from sd3core.data.store import open_store
from sd3core.data.stored_text import StoredText
from sd3core.progress import ignore_progress
from sd3core.small_world.captioner import caption_from_pixels
from sd3core.towers.artifact import fetch_towers
from sd3core.towers.autoencoder import load_autoencoder
from sd3core.towers.text_encoders import load_text_encoders
from workers import encode_bench
from workers.at_once import ShardsAtOnce
from workers.encode_bench import EncodeBench
from workers.encode_text import TOO_LONG, CaptionUse, TextWorker
from workers.ingest import ingest_stage
from workers.inputs import input_shards, shard_images
from workers.stage import NOTHING_TO_DO
from workers.towers import training_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
RULES = PixelRules(10**8)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, local_ray):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD3_HOME", str(tmp_path_factory.mktemp("home")))
        yield run_chain(small_recipe(), open_store(str(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="module")
def towers_folder(chain, tmp_path_factory):
    return fetch_towers(chain.store, chain.towers.manifest.folder, tmp_path_factory.mktemp("towers"))


def pictures(chain) -> dict[str, Image.Image]:
    shards = input_shards(read_manifest(chain.store, chain.raw.manifest.folder)).values()
    return {
        key: Image.open(io.BytesIO(data)).convert("RGB")
        for shard in shards
        for key, data in shard_images(chain.store, shard)
    }


def rows(chain, result, read=read_shard_index) -> list[dict]:
    manifest = read_manifest(chain.store, result.manifest.folder, result.manifest.digest)
    return [row for entry in manifest.shards for row in read(chain.store, manifest.folder, entry.stem).to_pylist()]


def test_what_a_folder_holds_that_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path, local_ray):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    good = ["good.png", "grey.png", "cmyk.jpg", "sub/good.png"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    for name, mode in zip(good, ("RGB", "L", "CMYK", "RGB"), strict=True):
        picture.convert(mode).save(folder / name)
    picture.save(folder / "film.gif", save_all=True, append_images=[picture.rotate(180)])
    for name in ("a", "b", "c", "d"):
        (folder / f"{name}.jpg").write_bytes(b"")
    for path in folder.rglob("*.*"):
        path.with_suffix(".txt").write_text("word " * 3_000 if path.name == "grey.png" else "a caption")
    recipe = small_recipe(
        "data.source=folder", f"data.folder={folder}", "caption.captioner=none", "data.rows_per_shard=3"
    )
    store = open_store(str(tmp_path / "store"))
    made = ingest_stage(recipe, store, ignore_progress)
    manifest = read_manifest(store, made.manifest.folder)
    rows = [
        row for entry in manifest.shards for row in read_shard_index(store, manifest.folder, entry.stem).to_pylist()
    ]
    assert sorted(row["source"] for row in rows) == sorted(good)
    held_out = sum(row["split"] == "held_out" for row in rows)
    assert made.reason == f"first run; 4 of 9 images used, {held_out} held out"
    assert made.warnings == [
        "1 image left out: animated, or several pictures in one file; save the one you want as a file of its own: film.gif",
        "4 images left out: empty file: a.jpg, b.jpg, c.jpg and 1 more",
        "1 caption cut at 2,000 characters (data.max_caption_chars): grey.png",
        "1 image: CMYK without a profile: the colours are a guess; save such images as RGB",
    ]
    again = ingest_stage(recipe, store, ignore_progress)
    assert again.skipped and again.warnings == made.warnings


def test_of_a_folder_that_changes_actors_make_the_new_rows_alone(tmp_path, local_ray, monkeypatch):
    """With real towers: what is taken over is what was there, to the byte."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    folder, store = tmp_path / "photos", open_store(str(tmp_path / "store"))
    folder.mkdir()
    rng = np.random.default_rng(0)

    def add(name: str) -> None:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture called {name}")

    for number in range(20):
        add(f"{number:02d}")
    recipe = small_recipe("data.source=folder", f"data.folder={folder}", "caption.captioner=none", "finetune=[]")

    def stored(chain) -> dict[tuple[str, str], bytes]:
        manifests = (read_manifest(store, result.manifest.folder) for result in chain.encoded.values())
        return {
            (manifest.stage, key): files["safetensors"]
            for manifest in manifests
            for entry in manifest.shards
            for key, files in read_samples(store.get(f"{manifest.folder}/{entry.stem}.tar"))
        }

    before = stored(run_chain(recipe, store))
    add("one more")
    (folder / "07.txt").write_text("another caption")
    changed = run_chain(recipe, store)
    assert changed.raw.reason.startswith("1 caption changed, 1 image added: ")
    assert "; 2 captions made, " in changed.encoded["text"].reason
    assert "; 1 image made, " in changed.encoded["latents.pretrain"].reason
    after = stored(changed)
    assert {key: after[key] for key in before.keys() & after.keys()} == {
        key: data for key, data in before.items() if key in after
    }
    assert len(after.keys() - before.keys()) == 3 and len(before.keys() - after.keys()) == 1


def test_every_stage_makes_its_shards_and_a_second_run_makes_nothing(chain):
    assert {r.stage: r.reason for r in chain.results} == dict.fromkeys(
        ["ingest", "towers", "caption", "text", "latents.pretrain", "latents.finetune.0"], "first run"
    )
    before = chain.store.list()
    again = run_chain(chain.recipe, chain.store)
    assert {r.reason for r in again.results} == {NOTHING_TO_DO}
    assert [r.manifest for r in again.results] == [r.manifest for r in chain.results]
    assert chain.store.list() == before


def test_a_changed_field_redoes_what_depends_on_it_and_says_why(chain):
    changed = run_chain(small_recipe("text.t5_tokens=12"), chain.store)
    assert {r.stage: r.reason for r in changed.results if not r.skipped} == {
        "text": "text.t5_tokens: 16 -> 12; 2 of 2 shards were missing"
    }
    one_phase = run_chain(small_recipe("finetune=[]", "run=other"), chain.store)
    assert all(r.skipped for r in one_phase.results)  # another run shares the bytes


def test_captions_come_from_the_pixels_alone(chain):
    captions = {row["key"]: row for row in rows(chain, chain.captions, read_table)}
    images = pictures(chain)
    assert captions.keys() == images.keys()
    for key, image in images.items():
        assert captions[key]["caption"] == caption_from_pixels(np.asarray(image))
        assert (captions[key]["model"], captions[key]["prompt"]) == ("small_world", "")


@pytest.mark.parametrize("stage", ["latents.pretrain", "latents.finetune.0"])
def test_cached_latents_are_those_of_live_encoding(chain, towers_folder, stage):
    autoencoder = load_autoencoder(towers_folder)
    phase = dict(chain.recipe.phases())[stage.removeprefix("latents.")]
    buckets = bucket_sides(phase.side_px, phase.aspect_ratios)
    images, splits = pictures(chain), {row["key"]: row["split"] for row in rows(chain, chain.raw)}
    index = {row["key"]: row for row in rows(chain, chain.encoded[stage])}
    assert index.keys() == images.keys()
    for key, image in images.items():
        side = nearest_bucket(image.width, image.height, buckets)
        pixels, crop = crop_to(image, *side)
        live = autoencoder.encode(to_model_range(pixels[None]))[0]  # in a batch of its own
        row = index[key]
        torch.testing.assert_close(stored_latent(chain, stage, key), live, rtol=0, atol=2e-4)
        assert (row["bucket"], row["split"]) == (f"{side[0]}x{side[1]}", splits[key])
        assert [row[f"crop_{s}"] for s in ("top", "left", "height", "width")] == [
            crop.top,
            crop.left,
            crop.height,
            crop.width,
        ]
    assert {row["bucket"] for row in index.values()} == {f"{height}x{width}" for height, width in buckets}


def stored_latent(chain, stage, key):
    manifest = read_manifest(chain.store, chain.encoded[stage].manifest.folder)
    for entry in manifest.shards:
        found = dict(read_samples(chain.store.get(f"{manifest.folder}/{entry.stem}.tar"))).get(key)
        if found:
            return load_tensors(found["safetensors"])["latent"]
    raise AssertionError(key)


def test_text_holds_each_caption_of_a_shard_once_and_both_kinds(chain, towers_folder):
    encoders = load_text_encoders(towers_folder, chain.recipe.text)
    original = {row["key"]: row["caption"] for row in rows(chain, chain.raw)}
    synthetic = {row["key"]: row["caption"] for row in rows(chain, chain.captions, read_table)}
    manifest = read_manifest(chain.store, chain.encoded["text"].manifest.folder)
    seen = set()
    for entry in manifest.shards:
        path = f"{manifest.folder}/{entry.stem}.tar"
        stored = list(read_samples(chain.store.get(path)))
        index = read_shard_index(chain.store, manifest.folder, entry.stem).to_pylist()
        assert [key for key, _ in stored] == list(dict.fromkeys(row["caption_id"] for row in index))
        for row in index:
            caption = {"original": original, "synthetic": synthetic}[row["kind"]][row["key"]]
            assert row["caption_id"] == caption_id(caption)
            # the range is one sample
            ((name, files),) = read_samples(chain.store.get_range(path, row["offset"], row["length"]))
            assert name == row["caption_id"] and files == dict(stored)[name]
            seen.add((row["key"], row["kind"]))
        live = encoders.encode([original[index[0]["key"]]])
        cached = from_bytes(chain, dict(stored)[index[0]["caption_id"]]["safetensors"])
        for field in ("clip_l", "clip_g", "t5", "clip_l_pooled", "clip_g_pooled"):
            # float16
            torch.testing.assert_close(getattr(cached, field).float(), getattr(live, field), rtol=2e-3, atol=2e-3)
        assert [index[0][f"{name}_len"] for name in ("clip_l", "clip_g", "t5")] == live.lengths[0].tolist()
    assert seen == {(key, kind) for key in original for kind in ("original", "synthetic")}
    null = from_bytes(chain, chain.store.get(f"{manifest.folder}/NULL.safetensors"))
    torch.testing.assert_close(null.t5.float(), encoders.null().t5, rtol=2e-3, atol=2e-3)


def from_bytes(chain, data) -> TextFeatures:
    text = chain.recipe.text
    return StoredText.from_bytes([data], clip_tokens=text.clip_tokens, t5_tokens=text.t5_tokens).features()


def test_the_training_loader_reads_what_encode_wrote(chain, tmp_path):
    manifests = [read_manifest(chain.store, chain.encoded[s].manifest.folder) for s in ("latents.finetune.0", "text")]
    text = chain.recipe.text
    cache = ShardCache(chain.store, tmp_path, 1e9)
    reader = ShardReader(chain.store, *manifests, cache, clip_tokens=text.clip_tokens, t5_tokens=text.t5_tokens)
    held_out = {row["key"] for row in rows(chain, chain.raw) if row["split"] == "held_out"}
    batches = list(load_split(reader, "held_out", 4))
    assert {key for batch in batches for key in batch.keys} == held_out and held_out
    assert all(len(batch.text) == len(batch.latent) for batch in batches)


def test_towers_learn_from_the_training_part_only(chain):
    shards = list(input_shards(read_manifest(chain.store, chain.raw.manifest.folder)).values())
    train = [row["caption"] for row in rows(chain, chain.raw) if row["split"] == "train"]
    assert [caption for _, caption in training_rows(chain.store, shards, 1_000, RULES)] == train
    some = [caption for _, caption in training_rows(chain.store, shards, 5, RULES)]
    assert len(some) == 5 and some[0] == train[0] and some[-1] == train[-1]


def test_a_finished_tower_is_not_made_again(chain):
    recipe, folder = chain.recipe, chain.towers.manifest.folder
    before = {e.path: chain.store.get(e.path) for e in chain.store.list(folder) if e.path.endswith("done.json")}
    chain.store.delete(f"{folder}/t5.done.json")
    result = run_chain(recipe, chain.store).towers
    assert (result.made, result.done_before, result.skipped) == (1, 4, False)
    assert result.reason == "1 of 5 towers was missing"
    after = {path: chain.store.get(path) for path in before}
    assert {path for path in before if before[path] != after[path]} <= {f"{folder}/t5.done.json"}


def test_text_that_does_not_fit_its_dtype_is_a_failed_row(chain, monkeypatch):
    worker = TextWorker(
        chain.store, chain.towers.manifest, chain.recipe.text, "float16", 4, "cpu", "fp32", ShardsAtOnce(1e9)
    )
    encode = worker.encoders.encode

    def too_large(captions):
        features = encode(captions)
        features.t5[[i for i, caption in enumerate(captions) if caption == "b"]] = 1e6
        return features

    monkeypatch.setattr(worker.encoders, "encode", too_large)
    failed, counts = [], Counter()
    uses = {"a": [CaptionUse("k1", "original")], "b": [CaptionUse("k1", "synthetic"), CaptionUse("k2", "original")]}
    with worker.at_once.shard("text") as turn:
        samples = list(worker._samples(uses, 2, failed, counts, turn))
        assert not counts
        long = {"red " * 60: [CaptionUse("k3", "original")]}
        assert len([*worker._samples(long, 1, [], counts, turn)]) == 1 and counts == {TOO_LONG: 1}
    assert [s.row["key"] for s in samples] == ["k1"]
    assert [(f.key, f.reason) for f in failed] == [
        ("k1", "synthetic caption: its features are not finite in float16"),
        ("k2", "original caption: its features are not finite in float16"),
    ]


def test_in_bf16_text_and_latents_are_others_by_little_and_stand_elsewhere(chain):
    recipe = small_recipe("encode.text_precision=bf16", "encode.latent_precision=bf16")
    made = run_chain(recipe, chain.store)
    assert made.towers.skipped and made.captions.skipped
    for name, part in made.encoded.items():
        exact = chain.encoded[name]
        assert part.folder != exact.folder and part.rows == exact.rows and part.made
        assert re.search("precision: .* -> bf16", part.reason)
    exact, other = (latents_of(of) for of in (chain, made))
    assert exact.keys() == other.keys()
    for key in exact:
        difference = (other[key] - exact[key]).norm() / exact[key].norm()
        assert 0 < difference < 0.05


def latents_of(chain) -> dict[str, torch.Tensor]:
    manifest = read_manifest(chain.store, chain.encoded["latents.pretrain"].manifest.folder)
    return {
        key: load_tensors(files["safetensors"])["latent"].float()
        for entry in manifest.shards
        for key, files in read_samples(chain.store.get(f"{manifest.folder}/{entry.stem}.tar"))
    }


def test_the_difference_of_bf16_is_measured_and_small(chain):
    found = encode_bench.measure_differences(chain.recipe, chain.store, chain.towers.manifest)
    assert list(found) == ["clip_l", "clip_g", "t5", "clip_l_pooled", "clip_g_pooled", "latents"]
    for name, of in found.items():
        assert 0.999 < of.least_cosine <= of.mean_cosine < 1, name
        assert 0 < of.mean_error <= of.most_error < 0.05, name


def test_the_bench_encodes_in_every_way_and_leaves_nothing(chain, monkeypatch):
    without_ray(monkeypatch, encode_bench)
    before, settings = chain.store.list(), EncodeBench(shards=4, rows=4, rounds=2)
    rounds = []
    found = encode_bench.measure_encoding(
        settings, chain.recipe, chain.store, chain.towers.manifest, rounds.append, lambda line: None
    )
    assert [rates.kind for rates in found] == ["text", "latents"] and rounds == [1, 2]
    for rates in found:
        *of_one, of_two = rates.rates.values()
        assert all(len(of_way) == 2 and min(of_way) > 0 for of_way in of_one) and rates.gain > 0
        assert all(map(math.isnan, of_two)) and math.isnan(rates.two_actors)  # all in this process: there is no second
    assert chain.store.list() == before


def test_every_object_of_the_chain_can_be_inspected(chain, towers_folder, tmp_path, monkeypatch, capsys):
    """Latents are shown as what the store's own autoencoder makes of them."""
    from flows.cli.console import PlainConsole
    from flows.cli.inspect import print_inspection, vae_of_store
    from sd3core.inspection import inspect_stored
    from sd3core.pictures import to_uint8

    latents = chain.encoded["latents.pretrain"].manifest.folder
    found = inspect_stored(chain.store.uri(latents), 4, vae_of_store)
    assert found.title == "latents: 32 rows in 2 shards" and not found.notes
    autoencoder, drawn = load_autoencoder(towers_folder), pictures(chain)
    for row in found.rows:
        crop = to_model_range(crop_to(drawn[row.key], 32, 32)[0][None])
        wanted = to_uint8(autoencoder.decode(autoencoder.encode(crop)))[0]
        assert np.abs(row.picture.astype(int) - wanted).max() <= 1
    monkeypatch.chdir(tmp_path)
    told = {}
    for result in chain.results:
        print_inspection(chain.store.uri(result.manifest.folder), 4, None, PlainConsole(width=200))
        told[result.stage] = capsys.readouterr().out
    assert "32 rows in 2 shards" in told["ingest"] and "captions encoded" not in told["ingest"]
    assert all(name in told["towers"] for name in ("vae", "clip_l", "judge"))
    assert "original" in told["text"] and "synthetic" in told["text"]
    (raw_sheet,) = tmp_path.glob("inspect-raw*.png")
    assert Image.open(raw_sheet).width == 4 * 192 + 3 * 8 and f"sheet  {raw_sheet.name}" in told["ingest"]
    assert inspect_stored(chain.store.uri("towers"), 4, vae_of_store).title == "a folder of folders"
