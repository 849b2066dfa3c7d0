"""Images with several captions, of class folders and of tables, through the real ingest and encode stages with models that count."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from counting_models import TOWERS, count_models
from data_chain import encode_all
from PIL import Image

from sd3core.data.ingest_folder import FURTHER_ROWS
from sd3core.data.loader import BatchLoader
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.store import Store, open_store
from sd3core.data.training_plan import TrainingPlan
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from workers.ingest import ingest_stage
from workers.stage import StageResult

IMAGES = 40
LONG_AGO_S = 1_500_000_000


@pytest.fixture
def seen(monkeypatch, tmp_path):
    return count_models(monkeypatch, tmp_path)


def _image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), (shade % 256, shade // 256, 9)).save(path)


def _run(store: Store, *overrides: str) -> tuple[StageResult, ManifestRef, ManifestRef]:
    """The ingest stage's result, and the manifests of text and of pretraining's latents."""
    settings = ["data.name=some", "data.rows_per_shard=16", "caption.captioner=none", "data.held_out_fraction=0"]
    recipe = load_recipe("tiny-test", [*settings, *overrides])
    raw = ingest_stage(recipe, store, ignore_progress)
    parts = encode_all(recipe, store, raw.manifest, None, TOWERS)
    return raw, parts["text"].manifest, parts["latents.pretrain"].manifest


def test_every_caption_is_encoded_once_and_one_that_changed_alone(seen, tmp_path):
    folder, store = tmp_path / "images", open_store(str(tmp_path / "store"))
    rows = [{"file_name": f"{n}.png", "text": [f"first {n}", f"second {n}", "shared"]} for n in range(IMAGES)]
    for number in range(IMAGES):
        _image(folder / f"{number}.png", number)
    settings = ["data.source=folder", f"data.folder={folder}"]

    def run() -> tuple[StageResult, ManifestRef, ManifestRef]:
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return _run(store, *settings)

    raw, text, _ = run()
    shards = len(read_manifest(store, raw.manifest.folder).shards)
    assert shards > 2 and seen.take() == (0, IMAGES, 2 * IMAGES + shards)
    assert read_manifest(store, text.folder, text.digest).rows == 3 * IMAGES

    rows[5]["text"][1] = "another second 5"
    raw, text, latents = run()
    assert seen.take() == (0, 0, 1)
    assert raw.reason.startswith(f"1 caption changed: 1 of {shards} shards")

    drawn = _drawn_values(store, text, latents, tmp_path)
    assert drawn == {value for row in rows for value in map(_value, row["text"])}


def _value(caption: str) -> float:
    """What `CountingEncoders` makes of a caption."""
    return float(sum(caption.encode()) % 997)


def _drawn_values(store: Store, text: ManifestRef, latents: ManifestRef, cache: Path) -> set[float]:
    """The captions that 20 epochs of training draw, by their features."""
    manifests = [read_manifest(store, ref.folder, ref.digest) for ref in (latents, text)]
    tokens = manifests[1].fields["text"]
    reader = ShardReader(
        store,
        *manifests,
        ShardCache(store, cache / "cache", 1e9),
        clip_tokens=tokens["clip_tokens"],
        t5_tokens=tokens["t5_tokens"],
    )
    plan = TrainingPlan(reader.counts("train")[0], 0, 8)
    loader = BatchLoader(reader, plan, original_fraction=0.5, seed=0, rank=0, world=1)
    values: set[float] = set()
    for step in range(20 * IMAGES // 8):
        values |= {*loader.batch(step).text.features().clip_l_pooled[:, 0].tolist()}
    loader.close()
    return values


def test_a_class_whose_words_change_costs_its_own_captions(seen, tmp_path):
    folder, store, names = tmp_path / "images", open_store(str(tmp_path / "store")), tmp_path / "names.json"
    classes = {"n01": ["tench", "Tinca tinca"], "n02": ["hen"], "n03": ["ostrich"]}
    for number in range(IMAGES):
        # the first class is one image, so one shard has it
        name = "n01" if number == 0 else f"n0{2 + number % 2}"
        _image(folder / name / f"{number}.png", number)
    settings = ["data.source=folder", f"data.folder={folder}", f"data.class_names={names}"]
    settings.append("data.class_caption='a photo of a {class}'")
    names.write_text(json.dumps(classes))
    raw, text, _ = _run(store, *settings)
    shards = len(read_manifest(store, raw.manifest.folder).shards)
    assert seen.take() == (0, IMAGES, 2 + 2 * shards) and raw.rows == IMAGES
    assert read_manifest(store, text.folder, text.digest).rows == IMAGES + 1

    assert _run(store, *settings)[0].skipped and seen.take() == (0, 0, 0)
    names.write_text(json.dumps(classes | {"n01": ["tench", "doctor fish"], "n99": ["unused"]}))
    raw, *_ = _run(store, *settings)
    assert raw.reason.startswith(f"1 caption changed: 1 of {shards} shards") and seen.take() == (0, 0, 1)


def _table(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))
    os.utime(path, (LONG_AGO_S, LONG_AGO_S + len(rows)))


def test_a_table_of_which_one_caption_changes_makes_one_shard(seen, tmp_path, monkeypatch):
    """An unchanged table is skipped, and nothing is looked at by a worker."""
    folder, store = tmp_path / "images", open_store(str(tmp_path / "store"))
    for number in range(IMAGES):
        _image(folder / f"{number}.png", number)
        os.utime(folder / f"{number}.png", (LONG_AGO_S, LONG_AGO_S))
    rows = [{"image": f"{n}.png", "caption": f"number {n}"} for n in range(IMAGES)]
    rows += [{"image": str(folder / f"{n}.png"), "caption": [f"also {n}"]} for n in range(4)]
    rows += [{"image": "gone.png", "caption": "x"}, {"image": "0.png"}, {}]
    table = tmp_path / "tables" / "t.jsonl"
    table.parent.mkdir()
    _table(table, rows)
    settings = ["data.source=table", f"data.table={table}", f"data.folder={folder}"]

    raw, text, _ = _run(store, *settings)
    manifest = read_manifest(store, raw.manifest.folder)
    shards = len(manifest.shards)
    assert seen.take() == (0, IMAGES, IMAGES + 4)
    further, failed = manifest.buckets[FURTHER_ROWS], sum(manifest.failed_reasons.values())
    assert manifest.rows + further + failed == len(rows) and (further, failed) == (4, 3)
    assert f"{IMAGES} of {IMAGES + 3} images used, 0 held out, 4 more rows with captions of theirs" in raw.reason
    assert read_manifest(store, text.folder, text.digest).rows == IMAGES + 4

    with monkeypatch.context() as patch:
        patch.setattr("workers.ingest.FolderWorker.__call__", lambda *_: pytest.fail("a shard was looked at"))
        again = _run(store, *settings)[0]
    assert again.skipped and seen.take() == (0, 0, 0) and again.warnings == raw.warnings

    rows[7]["caption"] = "another and longer caption"
    _table(table, rows)
    raw, *_ = _run(store, *settings)
    assert raw.reason.startswith(f"1 caption changed: 1 of {shards} shards") and seen.take() == (0, 0, 1)
    _image(folder / "9.png", 999)
    raw, *_ = _run(store, *settings)
    assert raw.reason.startswith(f"1 image changed: 1 of {shards} shards") and seen.take() == (0, 1, 0)
