"""Sizes with fewer images than a batch join a near one before latents are made; what a run has encoded stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from counting_models import TOWERS, Seen, count_models
from data_chain import encode_all
from PIL import Image

from sd3core.buckets import bucket_name
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.store import Store, open_store
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.specs import DONE, MANIFEST
from workers import rare_sizes
from workers.encode import encode_phase
from workers.ingest import ingest_stage
from workers.inputs import InputShard
from workers.rare_sizes import latents_digest, own_merges
from workers.stage import NOTHING_TO_DO, StageResult

SETTINGS = [
    "data.source=folder", "data.name=rare", "data.rows_per_shard=64", "data.held_out_fraction=0",
    "caption.captioner=none", "encode.batch=8", "model.max_side_px=256", "finetune.0.side_px=256",
    "finetune.0.aspect_ratios=[1.0]", "finetune.0.global_batch=8",
    "finetune.0.buckets={multiple_px: 16, max_ratio: 1.1, min_area: 0.93}",
]  # fmt: skip
NAMES = {"256x240", "256x256", "240x256"}
MERGED = (
    "finetune.0: 3 images of sizes with fewer images than a batch of 8 cropped to the nearest size that has more, at most"
    " 6.2% more of each cut off (240x256 to 256x256 px)"
)


@dataclass
class Folder:
    """A folder of ten square images and three wide ones, which a recipe reads."""

    recipe: Recipe
    seen: Seen
    told: list[tuple[str, int]] = field(default_factory=list)  # what was told, and how many images were encoded by then

    def add(self, number: int, size: tuple[int, int]) -> None:
        path = f"{self.recipe.data.folder}/{number:03d}"
        Image.new("RGB", size, (number, 7, 7)).save(f"{path}.png")
        with open(f"{path}.txt", "w") as caption:
            caption.write(f"number {number}")

    def encode(self, store: Store, *overrides: str) -> tuple[int, StageResult, Manifest]:
        """How many images met the autoencoder, and the latents of the last phase."""
        self.seen.encoded = 0
        self.told.clear()
        recipe = load_recipe("tiny-test", [*SETTINGS, f"data.folder={self.recipe.data.folder}", *overrides])
        raw = ingest_stage(recipe, store, ignore_progress)
        tell = lambda note: self.told.append((note, self.seen.encoded))
        parts = encode_all(recipe, store, raw.manifest, None, TOWERS, tell=tell)
        made = parts[f"latents.{recipe.phases()[-1][0]}"]
        return self.seen.encoded, made, read_manifest(store, made.manifest.folder, made.manifest.digest)


def buckets(made: Manifest) -> dict[str, int]:
    return {name: made.buckets[name] for name in NAMES & made.buckets.keys()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    recipe = load_recipe("tiny-test", [*SETTINGS, f"data.folder={tmp_path}/images"])
    assert {bucket_name(side) for side in recipe.finetune[0].bucket_sides()} == NAMES
    made = Folder(recipe, count_models(monkeypatch, tmp_path))
    for number in range(13):
        made.add(number, (40, 40) if number < 10 else (64, 60))
    return made


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def test_a_rare_size_joins_its_neighbour_until_it_fills_a_batch(folder, store, tmp_path):
    """It is told before anything is encoded; when it fills one, its own images are encoded again and all others are copied."""
    count, result, made = folder.encode(store)
    assert (count, buckets(made)) == (2 * 13, {"256x256": 13})
    assert folder.told[0] == (MERGED, 0) and MERGED in result.warnings
    assert folder.encode(store)[0] == 0
    for number in range(13, 18):
        folder.add(number, (64, 60))
    count, _, made = folder.encode(store)
    assert (count, buckets(made)) == (5 + 8, {"256x256": 10, "240x256": 8}) and not folder.told
    count, _, anew = folder.encode(open_store(str(tmp_path / "other")))
    assert (count, anew.shards) == (2 * 18, made.shards)
    for number in (16, 17):
        (tmp_path / f"images/{number:03d}.png").unlink()
    count, _, made = folder.encode(store)
    assert (count, buckets(made)) == (3, {"256x256": 16})  # the first three stand in the first shard, cropped alike
    assert folder.encode(open_store(str(tmp_path / "third")))[2].shards == made.shards


def test_what_stands_of_the_same_images_stays_as_it_is(folder, store, monkeypatch):
    """As a version left it that merged nothing: neither the latents nor what was trained on them is made again unasked."""
    with monkeypatch.context() as before:
        before.setattr(rare_sizes, "merges_of", lambda *_: {})
        _, _, plain = folder.encode(store)
    assert buckets(plain) == {"256x256": 10, "240x256": 3}
    count, result, made = folder.encode(store)
    assert (count, made, result.reason, folder.told) == (0, plain, NOTHING_TO_DO, [])
    assert (
        "finetune.0: 3 images of sizes with fewer images than a batch of 8 stay as they were encoded, in buckets of their own;"
        " `--from-stage encode` would crop them to the nearest size that has more"
    ) in result.warnings
    count, _, merged = folder.encode(store, "run=another")  # which makes what it would make in any store
    assert (count, buckets(merged)) == (3, {"256x256": 13})
    assert folder.encode(store)[::2] == (0, plain)

    for entry in store.list(plain.folder):
        if entry.path.endswith((MANIFEST, DONE)):
            store.delete(entry.path)
    count, _, merged = folder.encode(store, "run=another")
    assert (count, buckets(merged)) == (13, {"256x256": 13})
    assert folder.encode(store)[2] == plain  # its run has noted it: what another one has made is nothing to it
    assert folder.encode(store, "run=another")[::2] == (0, merged)
    assert folder.encode(store)[::2] == (0, plain)


def test_when_images_come_sizes_are_judged_anew(folder, store, monkeypatch):
    """What was trained is trained again anyway."""
    with monkeypatch.context() as before:
        before.setattr(rare_sizes, "merges_of", lambda *_: {})
        folder.encode(store)
    folder.add(13, (40, 40))
    count, _, made = folder.encode(store)
    assert (count, buckets(made)) == (1 + 1 + 3, {"256x256": 14})


def test_phases_that_share_latents_have_the_first_ones_and_each_is_told_of_its_own_batch(folder, store):
    phase = folder.recipe.finetune[0]
    recipe = folder.recipe.model_copy(update={"finetune": (phase, phase.model_copy(update={"global_batch": 16}))})
    raw = ingest_stage(recipe, store, ignore_progress)
    parts, told = encode_all(recipe, store, raw.manifest, None, TOWERS), []
    first, second = (parts[f"latents.finetune.{number}"] for number in range(2))
    assert first.digest == second.digest and second.reason == NOTHING_TO_DO
    assert buckets(read_manifest(store, second.folder, second.digest)) == {"256x256": 13}
    assert [line for line in first.warnings if "batch" in line] == [MERGED]
    text = parts["text"].manifest
    again = encode_phase(recipe, store, "finetune.1", raw.manifest, text, TOWERS, ignore_progress, told.append)
    assert again.skipped and [line for line in again.warnings if "batch" in line] == told
    assert [line.partition(" (")[0] for line in told] == [
        MERGED.partition(" (")[0].replace("finetune.0", "finetune.1"),
        "finetune.1: 13 images in buckets with fewer images than a batch of 16",
    ]


def test_a_shard_is_named_by_the_merges_of_its_own_images_alone():
    """So that what stood before there were merges stands, and a bucket that changes its place moves no shard without its images."""
    square, wide, tall = (64, 64), (60, 64), (64, 60)
    raw = {number: InputShard("raw", f"{number:05d}", f"{number}" * 64, 9) for number in range(3)}

    def names(**merged: tuple[tuple[int, int], set[int]]) -> list[str]:
        sides = {"wide": wide, "tall": tall}
        by_side = {sides[name]: to for name, to in merged.items()}
        return [latents_digest(shard, own_merges(by_side, number)) for number, shard in raw.items()]

    plain = names()
    assert plain == [f"{number}" * 12 for number in range(3)]
    merged = names(wide=(square, {1, 2}))
    assert merged[0] == plain[0] and not {*merged[1:]} & {*plain}
    assert names(wide=(square, {1, 2}), tall=(square, set())) == merged
    assert not {*names(wide=(tall, {1, 2}))[1:]} & {*merged}
