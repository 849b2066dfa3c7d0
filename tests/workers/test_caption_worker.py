from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from vision_language_models import write_llava

from sd3core.captions.repeated import caption_hash
from sd3core.captions.rules import EMPTY, ONE_CHARACTER, REFUSING
from sd3core.captions.said import Said, caption_seed
from sd3core.data.images import PixelRules
from sd3core.data.kept_rows import KeepList
from sd3core.data.shards import Sample, read_shard_done, read_shard_index, read_table, write_shard, write_table
from sd3core.data.store import open_store
from sd3core.errors import DataError, StopStageError
from sd3core.model_identity import model_identity
from sd3core.recipe import Caption
from sd3core.small_world.scenes import draw_scene, render
from sd3core.specs import INDEX
from workers.caption import TOO_MANY_FAILED, TOO_MANY_USELESS, CaptionWorker
from workers.inputs import InputShard
from workers.shard_stage import ShardTask


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    write_llava(folder)
    return folder


def noise_images(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 30 + 8 * i, 3), dtype=np.uint8)) for i in range(count)]


def raw_shard(store, images: dict[str, bytes]):
    record = write_shard(
        store, "raw", "00000.0123456789ab", [Sample(key, {"png": data}) for key, data in images.items()], []
    )
    shard = InputShard("raw", record.stem, record.digest, record.rows)
    return ShardTask(0, record.digest[:12], "captions", record.rows, shard)


def png(image):
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


class Scripted:
    """A captioner that says what a function of the batch says."""

    def __init__(self, write) -> None:
        self.answer = write

    def prepare(self, images):
        return images

    def write(self, images, seeds):
        return self.answer(images)


def scripted_worker(store, patch, write, **settings) -> CaptionWorker:
    patch.setattr("workers.caption.load_captioner", lambda *_: Scripted(write))
    caption = Caption(
        captioner="vision_language_model", model="/models/vlm", **{"prompt": "Say.", "batch": 4} | settings
    )
    return CaptionWorker(store.url, caption, PixelRules(10**6), 1, 1e9, "cpu", "0123456789abcdef")


def test_model_prompt_and_revision_stand_with_each_caption_and_what_failed_is_named(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    images = noise_images(5)
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(images)} | {"broken": b"no image"})
    sizes = []

    def write(batch):
        sizes.append(len(batch))
        if any(image.width == images[2].width for image in batch):
            raise RuntimeError("the model\nfell over")
        return [Said("" if image.width == images[3].width else "a picture", tokens=3) for image in batch]

    record = scripted_worker(store, monkeypatch, write, batch=2)(task).record
    rows = read_table(store, "captions", task.stem).to_pylist()
    assert [row["key"] for row in rows] == ["k0", "k1", "k3", "k4"]
    kept = {"caption": "a picture", "rule": "", "said": None}
    thrown_out = {"caption": "", "rule": EMPTY, "said": ""}
    about = {"model": "/models/vlm", "prompt": "Say.", "revision": "0123456789ab", "seed": None, "tokens": 3}
    for row in rows:
        assert row == about | (thrown_out if row["key"] == "k3" else kept) | {"key": row["key"]}
    failed = {row.key: row.reason for row in read_shard_done(store, "captions", task.stem).failed}
    assert failed["k2"] == "captioner: the model fell over"
    assert failed.keys() == {"k2", "broken"} and record.rows == 4
    assert record.extra == {"thrown out: empty": 1, "tokens 1-7": 3, "words 1-7": 3}
    assert sizes == [2, 2, 1, 1, 1]  # the batch that failed was tried one by one


def test_where_a_filter_only_takes_rows_away_no_image_is_fetched(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(noise_images(3))})
    worker = scripted_worker(store, monkeypatch, lambda batch: [Said("a picture")] * len(batch))
    worker(task)
    keys = write_table(store, "keep", "00000.aaaaaaaaaaaa", pa.table({"key": ["k0", "k2"]}), [])
    left = replace(task.source, kept=KeepList("keep", keys.stem, keys.digest, keys.rows))
    store.delete(f"raw/{task.source.stem}.tar")
    made = worker(ShardTask(0, left.content, "captions", 2, left, earlier=(task.stem,)))
    assert (made.copied, made.made) == (2, 0) and worker.at_once.held == 0
    assert read_table(store, "captions", made.record.stem)["key"].to_pylist() == ["k0", "k2"]


def test_what_a_rule_changed_is_kept_as_the_model_said_it(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(noise_images(4))})
    said = iter(
        [Said("A cat. It s", 9, cut_off=True), Said("I'm sorry, I can't.", 5), Said("!!!!", 4), Said(" A dog.\n", 2)]
    )
    record = scripted_worker(store, monkeypatch, lambda batch: [next(said) for _ in batch])(task).record
    rows = read_table(store, "captions", task.stem).to_pylist()
    assert [(row["caption"], row["rule"], row["said"]) for row in rows] == [
        ("A cat.", "", "A cat. It s"),
        ("", REFUSING, "I'm sorry, I can't."),
        ("", ONE_CHARACTER, "!!!!"),
        ("A dog.", "", None),
    ]
    assert record.extra["shortened to whole sentences"] == 1
    index = read_shard_index(store, "captions", task.stem, record.files[INDEX])
    assert index["caption_hash"].to_pylist() == [caption_hash("A cat."), 0, 0, caption_hash("A dog.")]


def test_a_seed_stands_with_a_caption_whose_words_were_drawn(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(noise_images(3))})
    seen = []

    def write(images, seeds):
        seen.extend(seeds)
        return [Said("a picture")] * len(images)

    worker = scripted_worker(store, monkeypatch, None, temperature=1.0, seed=3)
    monkeypatch.setattr(worker.writer.captioner, "write", write)
    worker(task)
    rows = read_table(store, "captions", task.stem).to_pylist()
    assert {row["key"]: row["seed"] for row in rows} == {f"k{i}": caption_seed(3, f"k{i}") for i in range(3)}
    assert sorted(seen) == sorted(row["seed"] for row in rows)


def test_batches_are_of_like_sizes_and_images_no_larger_than_said(tmp_path, monkeypatch):
    """Widths in turn 40 and 400: batches of four of the one and of the other; the table keeps the shard's order."""
    store = open_store(str(tmp_path))
    pictures = {f"k{i:02d}": png(Image.new("RGB", (40 if i % 2 else 400, 40))) for i in range(32)}
    task, batches = raw_shard(store, pictures), []

    def write(batch):
        batches.append([image.size for image in batch])
        return [Said(f"a picture {image.width} wide") for image in batch]

    scripted_worker(store, monkeypatch, write, image_side_px=200)(task)
    assert sorted(batches) == [[(40, 40)] * 4] * 4 + [[(200, 20)] * 4] * 4
    assert [row["key"] for row in read_table(store, "captions", task.stem).to_pylist()] == sorted(pictures)
    whole = batches.copy()
    batches.clear()
    small = scripted_worker(store, monkeypatch, write, image_side_px=200)
    small.writer.window = 4  # of an actor with little memory
    small(raw_shard(store, pictures))
    assert len(batches) == len(whole) and all(len(set(batch)) == 2 for batch in batches)


def test_a_model_that_writes_nothing_of_use_stops_the_stage_and_a_few_images_do_not(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    pictures = {f"k{i}": png(Image.new("RGB", (8, 8))) for i in range(TOO_MANY_USELESS)}
    write = lambda batch: [Said("!!!!!!!!")] * len(batch)
    with pytest.raises(
        StopStageError, match=r"^none of 64 captions of a shard is of use, the first, k0: '!!!!!!!!' \(one char"
    ):
        scripted_worker(store, monkeypatch, write)(raw_shard(store, pictures))
    assert not list(store.list("captions"))
    pictures.popitem()
    record = scripted_worker(store, monkeypatch, write)(raw_shard(store, pictures)).record
    assert record.extra == {"thrown out: one_character": 63}
    pictures["k"] = png(Image.new("RGB", (9, 9)))
    mixed = lambda batch: [Said("!!!!" if image.width == 8 else "I cannot describe it.") for image in batch]
    assert scripted_worker(store, monkeypatch, mixed)(raw_shard(store, pictures)).record.rows == 64, "some are refused"


def test_a_captioner_that_fails_on_every_image_is_an_error_and_no_shard(tmp_path, monkeypatch):
    """Else training would go on without captions, and only a warning would say so."""
    store = open_store(str(tmp_path))
    pictures = {f"k{i}": png(image) for i, image in enumerate(noise_images(TOO_MANY_FAILED))}

    def raising(error: Exception):
        def write(batch):
            raise error

        return scripted_worker(store, monkeypatch, write)

    with pytest.raises(DataError, match="^no image of 8 got a caption, the last: captioner: no such argument$"):
        raising(TypeError("no such argument"))(raw_shard(store, pictures))
    for error in (
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(24, "Too many open files"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        with pytest.raises(type(error)):  # not the image's fault: another worker tries
            raising(error)(raw_shard(store, {"one": png(noise_images(1)[0])}))
    assert not [entry for entry in store.list("captions")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_real_model_fills_a_shard(vlm_folder, tmp_path, precision):
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(noise_images(3))})
    caption = Caption(
        captioner="vision_language_model", model=str(vlm_folder), max_new_tokens=4, batch=2, precision=precision
    )
    identity = model_identity(vlm_folder, "caption.model")
    make = lambda identity: CaptionWorker(store.url, caption, PixelRules(10**6), 1, 1e9, "cpu", identity)
    record = make(identity)(task).record
    rows = read_table(store, "captions", task.stem).to_pylist()
    assert record.rows == 3 and not record.failed
    assert {(row["revision"], row["tokens"] <= 4) for row in rows} == {(identity[:12], True)}
    with pytest.raises(
        DataError, match="^caption.model .*: not the model that lies there where the stage was started$"
    ):
        make("another")


def test_the_drawn_worlds_captions_are_what_they_were(tmp_path):
    """Golden: its tables have no other columns, no index and no counts, so nobody's captions are made again."""
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(Image.fromarray(render(draw_scene(31, i)))) for i in range(5)})
    record = CaptionWorker(store.url, Caption(captioner="small_world", batch=2), PixelRules(10**6), 1, 1e9, "cpu")(
        task
    ).record
    assert record.files == {".parquet": "c8fd5e9251b58d9baec04358cc3d9b6148fd6b1c69b28a0cff8e28f25e31ebcc"}
    assert (record.rows, record.bytes, record.extra, record.failed) == (5, 1319, {}, [])
