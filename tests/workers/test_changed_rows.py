"""A folder of 2,000 images that changes, through the real stages with models that count what they are shown."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from counting_models import TOWERS, count_models
from data_chain import encode_all
from PIL import Image

from sd3core.data.manifest import Manifest, ShardEntry, read_manifest
from sd3core.data.shards import parts_digest
from sd3core.data.slices import deal_slices
from sd3core.data.store import Store, open_store
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.ingest import ingest_stage
from workers.shard_stage import ShardStage, ShardTask, _with_earlier
from workers.stage import NOTHING_TO_DO, StageResult

IMAGES, ROWS_PER_SHARD = 2_000, 64


@pytest.fixture
def seen(monkeypatch, tmp_path):
    return count_models(monkeypatch, tmp_path)


@dataclass(frozen=True)
class Stages:
    raw: StageResult
    captions: StageResult
    text: StageResult
    latents: StageResult
    buckets: StageResult  # latents of the phase that has several

    def shards(self, store: Store) -> dict[str, dict[int, ShardEntry]]:
        """Of each stage what its shards hold, by number."""
        return {
            name: {
                entry.number: entry.model_copy(update={"stem": ""})
                for entry in read_manifest(store, result.manifest.folder, result.manifest.digest).shards
            }
            for name, result in vars(self).items()
        }


def run_stages(recipe: Recipe, store: Store) -> Stages:
    raw = ingest_stage(recipe, store, ignore_progress)
    captions = caption_stage(recipe, store, raw.manifest, ignore_progress)
    parts = encode_all(recipe, store, raw.manifest, captions.manifest, TOWERS)
    return Stages(raw, captions, parts["text"], parts["latents.pretrain"], parts["latents.finetune.0"])


def add_image(folder, name: str, shade: int) -> None:
    """A picture of its own, in one of two shapes, and its caption."""
    size = (40, 32) if shade % 2 else (32, 40)
    colour = (shade % 256, shade // 256 % 256, shade // 65536)
    Image.new("RGB", size, colour).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"number {shade}")


def folder_recipe(folder, *overrides: str) -> Recipe:
    settings = [
        "data.source=folder", f"data.folder={folder}", "data.name=changing", f"data.rows_per_shard={ROWS_PER_SHARD}",
        "caption.captioner=vision_language_model", "caption.model=/model", "caption.batch=16", "encode.batch=8",
    ]  # fmt: skip
    return load_recipe("tiny-test", [*settings, *overrides])


def folder_of_images(root: Path, images: int) -> tuple[Path, Recipe, Store]:
    """A folder of so many images, a recipe that reads it, and an empty store."""
    folder = root / "images"
    folder.mkdir()
    for number in range(images):
        add_image(folder, f"{number:05d}", number)
    return folder, folder_recipe(folder), open_store(str(root / "store"))


def changed_shards(before: dict, after: dict, stage: str) -> set[int]:
    old, new = before[stage], after[stage]
    return {number for number in old | new if old.get(number) != new.get(number)}


def test_only_new_or_changed_rows_meet_a_model(seen, tmp_path):
    folder, recipe, store = folder_of_images(tmp_path, IMAGES)
    stages = run_stages(recipe, store)
    assert seen.take() == (IMAGES, IMAGES, 2 * IMAGES)
    before = stages.shards(store)
    assert len(before["raw"]) > IMAGES / ROWS_PER_SHARD

    def after_change() -> tuple[dict[str, set[int]], Stages]:
        nonlocal before
        stages = run_stages(recipe, store)
        after = stages.shards(store)
        touched = {stage: changed_shards(before, after, stage) for stage in after}
        before = after
        return touched, stages

    touched, stages = after_change()
    assert seen.take() == (0, 0, 0) and not any(touched.values())
    assert {result.reason for result in vars(stages).values()} == {NOTHING_TO_DO}

    add_image(folder, "00000 sorts first", IMAGES)
    touched, stages = after_change()
    assert seen.take() == (1, 1, 2) and all(len(numbers) <= 3 for numbers in touched.values())
    assert "; 1 image made, " in stages.latents.reason and "taken over as they were" in stages.captions.reason

    (folder / "00007.txt").write_text("another caption")
    touched, stages = after_change()
    assert seen.take() == (0, 0, 1)
    assert len(touched["raw"]) == len(touched["text"]) == 1 and not touched["latents"] and not touched["captions"]

    for suffix in (".png", ".txt"):
        os.rename(folder / f"00011{suffix}", folder / f"renamed{suffix}")
    touched, _ = after_change()
    captioned, encoded, texts = seen.take()
    assert captioned <= 1 and encoded <= 1 and texts <= 2
    assert all(len(numbers) <= 4 for numbers in touched.values())  # two, and each may split or be put together

    Image.new("RGB", (32, 40), (1, 2, 3)).save(folder / "00013.png")
    after_change()
    assert seen.take() == (1, 1, 1)  # its own caption is as it was

    (folder / "00017.png").unlink()
    after_change()
    assert seen.take() == (0, 0, 0)

    for number in range(IMAGES // 10):
        add_image(folder, f"more {number:05d}", IMAGES + 1 + number)
    _, stages = after_change()
    assert seen.take() == (IMAGES // 10, IMAGES // 10, 2 * IMAGES // 10)
    total = IMAGES + 1 - 1 + IMAGES // 10
    assert {result.rows for result in (stages.raw, stages.captions, stages.latents)} == {total}
    assert stages.text.rows == 2 * total

    anew = run_stages(recipe, open_store(str(tmp_path / "another store")))
    assert anew.shards(open_store(str(tmp_path / "another store"))) == before  # whatever came before
    assert seen.take() == (total, total, 2 * total)


@pytest.mark.parametrize("harm", ["damaged", "gone", "cut short"])
def test_an_earlier_shard_that_is_damaged_is_told_and_its_rows_are_made_again(seen, tmp_path, harm):
    folder, recipe, store = folder_of_images(tmp_path, 20)
    stages = run_stages(recipe, store)
    seen.take()
    paths = []
    for latents in (stages.latents, stages.buckets):
        (stem,) = [entry.stem for entry in read_manifest(store, latents.manifest.folder).shards]
        paths.append(f"{latents.manifest.folder}/{stem}.tar")
        data = store.get(paths[-1])
        if harm == "gone":
            store.delete(paths[-1])
        else:
            store.put(paths[-1], data[:-700] if harm == "cut short" else b"X" + data[1:])
    add_image(folder, "one more", 20)
    again = run_stages(recipe, store)
    assert seen.take() == (1, 21, 2)
    for path, latents in zip(paths, (again.latents, again.buckets), strict=True):
        assert f"{store.uri(path)}: damaged or gone; what was to be taken from it is made again" in latents.warnings
    assert not [line for result in (again.text, again.captions) for line in result.warnings if "damaged" in line]
    assert read_manifest(store, again.latents.manifest.folder).rows == 21


def test_what_a_killed_run_had_made_is_taken_over_too(seen, tmp_path):
    """Its shards stand in no manifest; the rows of one that changed once more since are in it alone."""
    folder, recipe, store = folder_of_images(tmp_path, 10)
    first = run_stages(recipe, store)
    newest = {path: store.get(path) for path in (f"{r.manifest.folder}/MANIFEST.json" for r in vars(first).values())}
    for number in range(10, 15):
        add_image(folder, f"{number:05d}", number)
    run_stages(recipe, store)
    assert seen.take() == (15, 15, 30)
    for path, data in newest.items():
        store.put(path, data)
    add_image(folder, "00015", 15)
    run_stages(recipe, store)
    assert seen.take() == (1, 1, 2)


def test_a_drawn_world_that_grows_makes_its_new_scenes_alone(seen, tmp_path):
    """The last shard was not full; the bytes are those of a world that was as large from the start."""
    store, other = open_store(str(tmp_path / "store")), open_store(str(tmp_path / "other"))

    def recipe(images: int) -> Recipe:
        return load_recipe("tiny-test", [f"data.images={images}", "data.rows_per_shard=8"])

    run_stages(recipe(20), store)
    assert seen.take()[:2] == (20, 20)
    grown = run_stages(recipe(30), store)
    assert seen.take()[:2] == (10, 10)
    assert grown.shards(store) == run_stages(recipe(30), other).shards(other)


def test_planning_what_is_missing_of_100_000_shards_takes_seconds():
    """One image more: of all shards one is missing, and one earlier one may hold its rows; a tenth more: most split, and each half
    is told the one that it was part of.
    """
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 570_000, dtype=np.uint64)

    def stage(keys: np.ndarray) -> ShardStage:
        tasks = [
            ShardTask(number, parts_digest(np.sort(keys[places]).tobytes()), "f", len(places))
            for number, places in deal_slices(keys, 8).items()
        ]
        return ShardStage("text", "text", "f", {}, {}, tasks)

    before = stage(hashes)
    assert len(before.tasks) > 95_000
    entries = [ShardEntry(number=t.number, stem=t.stem, rows=t.rows, bytes=1, digest="0") for t in before.tasks]
    standing = Manifest(stage="text", spec="0", fields={}, inputs={}, folder="f", shards=entries)
    finished = dict.fromkeys(before.stems, 0.0)

    def planned(after: ShardStage) -> list[ShardTask]:
        started = time.process_time()
        missing = [task for task in after.tasks if task.stem not in finished]
        missing = _with_earlier(after, missing, standing, finished)
        assert time.process_time() - started < 20
        return missing

    one_more = planned(stage(np.append(hashes, np.uint64(12345))))
    assert len(one_more) <= 2 and all(len(task.earlier) == 1 for task in one_more)
    tenth_more = planned(stage(np.append(hashes, rng.integers(0, 2**64, 57_000, dtype=np.uint64))))
    assert len(tenth_more) > 40_000
    told = [len(task.earlier) for task in tenth_more]
    # None is where a half was empty before: all its rows are new.
    assert set(told) == {0, 1} and told.count(0) < 0.05 * len(told)
