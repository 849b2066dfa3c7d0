from __future__ import annotations

import hashlib
import io
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors

from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.data.encoded_shards import NULL_FILE, NULL_RECORD, pin_null, read_null_bytes
from sd3core.data.images import PixelRules
from sd3core.data.manifest import Manifest, ShardEntry, commit_manifest
from sd3core.data.shards import Sample, read_samples, read_shard_index, write_shard
from sd3core.data.size_rule import SizeRule
from sd3core.data.store import open_store
from sd3core.data.stored_text import StoredText
from sd3core.errors import DataError, RecipeError
from sd3core.progress import Progress
from sd3core.recipe import TOKENS_AT_MOST, Text
from sd3core.recipe_file import load_recipe
from workers import encode_latents
from workers.at_once import ShardsAtOnce
from workers.encode import LOAD_S, EncodeWorker, _with_enlarged_images, cut_advice
from workers.encode_latents import LatentsSource, LatentsWorker
from workers.encode_text import TOO_LONG, CaptionUse, TextSource, TextWorker
from workers.inputs import InputShard, map_ahead
from workers.shard_stage import ShardTask
from workers.stage import StageResult

BUCKETS = ((32, 32), (32, 48))


class MeanAutoencoder:
    """Each latent value is the mean of the picture; a picture that is all white has none."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode(self, images):
        self.batches.append(tuple(images.shape))
        mean = images.mean(dim=(1, 2, 3))
        mean = torch.where(mean > 0.99, torch.nan, mean)
        return mean[:, None, None, None].expand(-1, 16, images.shape[2] // 8, images.shape[3] // 8)


def worker(store, batch) -> LatentsWorker:
    made = LatentsWorker.__new__(LatentsWorker)  # without towers: the autoencoder is given
    made.store, made.batch, made.threads, made.rules = store, batch, 2, PixelRules(10**6)
    made.dtype, made.autoencoder, made.at_once = torch.float32, MeanAutoencoder(), ShardsAtOnce(1e9)
    return made


@pytest.fixture
def shard(tmp_path):
    store = open_store(str(tmp_path))
    sizes = [(40, 40), (60, 40), (50, 50), (96, 64), (33, 32)]
    files = {f"k{i}": picture(size, shade=20 * i) for i, size in enumerate(sizes)}
    files |= {"white": picture((40, 40), 255), "broken": b"no image"}
    samples = [Sample(key, {"png": data}, {"split": "train"}) for key, data in files.items()]
    record = write_shard(store, "raw", "00003.0123456789ab", samples, [], pa.schema([("split", pa.string())]))
    return store, InputShard("raw", record.stem, record.digest, record.rows, record.files[".index.parquet"])


def picture(size, shade):
    sink = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(sink, "PNG")
    return sink.getvalue()


def encode(store, raw, folder, batch):
    task = ShardTask(3, raw.digest[:12], folder, raw.rows, LatentsSource(raw, SizeRule(BUCKETS)))
    made = worker(store, batch)
    record = made(task).record
    stored = read_samples(store.get(f"{folder}/{task.stem}.tar"))
    latents = {key: load_tensors(files["safetensors"])["latent"] for key, files in stored}
    return record, latents, made


def test_batches_are_of_one_bucket_and_do_not_change_the_latents(shard):
    store, raw = shard
    record, latents, made = encode(store, raw, "a", batch=2)
    _, one_by_one, _ = encode(store, raw, "b", batch=1)
    assert all(shape[2:] in BUCKETS for shape in made.autoencoder.batches)
    assert max(shape[0] for shape in made.autoencoder.batches) == 2
    assert latents.keys() == one_by_one.keys() == {"k0", "k1", "k2", "k3", "k4"}
    for key in latents:
        torch.testing.assert_close(latents[key], one_by_one[key])
    index = {row["key"]: row["bucket"] for row in read_shard_index(store, "a", record.stem).to_pylist()}
    assert index == {"k0": "32x32", "k1": "32x48", "k2": "32x32", "k3": "32x48", "k4": "32x32"}
    assert record.extra == {"32x32": 3, "32x48": 2}
    assert made.at_once.progress == {} and made.at_once.held == 0


def test_rows_are_sorted_by_bucket_and_split_and_have_their_files_digest(shard, monkeypatch):
    """What is trained on of one bucket is one range; the held-out rows are counted beside all."""
    store, raw = shard
    keys, held_out = ["k0", "k1", "k2", "k3", "k4", "white", "broken"], {"k0": "held_out", "k1": "held_out"}
    monkeypatch.setattr(
        encode_latents,
        "read_input_index",
        lambda *_: pa.table({"key": keys, "split": [held_out.get(key, "train") for key in keys]}),
    )
    record, latents, _ = encode(store, raw, "a", batch=2)
    index = read_shard_index(store, "a", record.stem).to_pylist()
    assert [row["key"] for row in index] == list(latents) == ["k2", "k4", "k0", "k3", "k1"]
    assert record.extra == {"32x32": 3, "32x32 held out": 1, "32x48": 2, "32x48 held out": 1}
    for row in index:
        [(key, files)] = read_samples(store.get_range(f"a/{record.stem}.tar", row["offset"], row["length"]))
        assert key == row["key"] and hashlib.sha256(files["safetensors"]).digest() == row["sha256"]


def test_unreadable_pictures_and_non_finite_latents_are_failed_rows(shard):
    record, _, _ = encode(*shard, "a", batch=4)
    reasons = {row.key: row.reason for row in record.failed}
    assert reasons.keys() == {"white", "broken"}
    assert reasons["white"] == "its latent is not finite in torch.float32"


def test_where_a_filter_only_takes_rows_away_no_image_is_fetched(shard):
    store, raw = shard
    sizes = {"k0": (40, 40), "k1": (60, 40), "k2": (50, 50), "k3": (96, 64)}
    index = pa.table(
        {"key": [*sizes], "split": ["train"] * 4}
        | {side: [size[place] for size in sizes.values()] for place, side in enumerate(("width", "height"))}
    )
    _, before, _ = encode(store, raw, "a", batch=2)
    store.delete(f"raw/{raw.stem}.tar")
    source = LatentsSource(raw, SizeRule(BUCKETS))
    task = ShardTask(3, "0" * 12, "a", 4, source, earlier=(f"{raw.stem.partition('.')[0]}.{raw.digest[:12]}",))
    made = worker(store, batch=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_latents, "read_input_index", lambda *_: index)
        answer = made(task)
    assert (answer.copied, answer.made) == (4, 0) and not made.autoencoder.batches and made.at_once.held == 0
    stored = dict(read_samples(store.get(f"a/{task.stem}.tar")))
    assert [*stored] == ["k0", "k2", "k1", "k3"]
    for key, files in stored.items():
        torch.testing.assert_close(load_tensors(files["safetensors"])["latent"], before[key])


def test_an_image_for_which_there_was_no_memory_is_no_failed_row(shard, monkeypatch):
    store, raw = shard
    decode, calls = encode_latents.decode_image, []

    def third_fails(data, rules):
        calls.append(data)
        if len(calls) == 3:
            raise MemoryError
        return decode(data, rules)

    monkeypatch.setattr(encode_latents, "decode_image", third_fails)
    with pytest.raises(MemoryError, match="^while reading k[0-9]: out of memory"):
        encode(store, raw, "a", batch=2)
    assert not list(store.list("a"))
    record, _, _ = encode(store, raw, "a", batch=2)
    assert {row.key for row in record.failed} == {"white", "broken"} and record.rows == 5


def test_images_that_are_enlarged_are_counted_and_told_by_phase(tmp_path):
    store = open_store(str(tmp_path))
    sides = {"fits": (64, 96), "by_a_patch": (44, 33), "half": (20, 40), "third": (11, 40), "tenth": (3, 3)}
    samples = [Sample(key, {"png": picture(size, 9)}, {"split": "train"}) for key, size in sides.items()]
    made = write_shard(store, "raw", "00003.0123456789ab", samples, [], pa.schema([("split", pa.string())]))
    raw = InputShard("raw", made.stem, made.digest, made.rows, made.files[".index.parquet"])
    record, _, _ = encode(store, raw, "a", batch=4)
    names = [f"enlarged over {over} times" for over in ("1.1", "2", "4", "8")]
    assert [record.extra[name] for name in names] == [3, 2, 1, 1]  # 1.6, 2.9 and 10.7 times
    manifest = Manifest(stage="latents", spec="0", fields={}, inputs={}, folder="a", shards=[ShardEntry.of(record)])
    ref = commit_manifest(store, "a", manifest)
    result = StageResult("latents.pretrain", ref.path, ref.digest, True, "")
    (told,) = _with_enlarged_images(store, "pretrain (32 px)", result, "a mend").warnings
    assert told == (
        "pretrain (32 px): 3 of 5 images enlarged more than 1.1 times to fill their bucket, 2 of them more than 2 times,"
        " 1 of them more than 4 times, 1 of them more than 8 times; a mend"
    )


def test_a_phase_that_enlarges_nothing_says_nothing(shard):
    store, raw = shard
    record, _, _ = encode(store, raw, "a", batch=4)
    manifest = Manifest(stage="latents", spec="0", fields={}, inputs={}, folder="a", shards=[ShardEntry.of(record)])
    ref = commit_manifest(store, "a", manifest)
    result = StageResult("latents.pretrain", ref.path, ref.digest, True, "")
    assert _with_enlarged_images(store, "pretrain (32 px)", result, "a mend") is result


def test_a_raw_shard_that_is_not_its_manifests_is_refused(shard):
    store, raw = shard
    store.put(f"raw/{raw.stem}.tar", store.get(f"raw/{raw.stem}.tar") + bytes(512))
    with pytest.raises(DataError, match="not those of its manifest"):
        encode(store, raw, "a", batch=4)


def test_loading_shows_that_time_passes_until_it_has_taken_too_long(monkeypatch):
    made, now = EncodeWorker.__new__(EncodeWorker), [0.0]
    monkeypatch.setattr("workers.encode.time.monotonic", lambda: now[0])
    made.worker, made.waiting_since = None, 0.0
    shown = []
    for now[0] in (1.0, 50.0, LOAD_S, LOAD_S + 1):
        shown.append(made.progress)
    assert len(set(shown)) == 3 and shown[2] == shown[3]
    made._fetched(Progress(1, 2, "files"))  # a file has come: the time begins anew
    assert made.progress.note == "loading the encoders, 0 s"
    made.worker, made.at_once = SimpleNamespace(), ShardsAtOnce(1)
    with made.at_once.shard("text/0/00000") as turn:
        turn.advance(7)
        assert made.progress == {"text/0/00000": 7}


def test_map_ahead_keeps_order_bounds_the_lead_and_passes_errors_on():
    started = []

    def work(item):
        started.append(item)
        if item == 9:
            raise DataError("nine")
        return -item

    results = map_ahead(work, iter(range(10)), threads=2, ahead=3)
    assert next(results) == 0 and len(started) <= 4
    with pytest.raises(DataError, match="nine"):
        assert [next(results) for _ in range(8)] == list(np.arange(-1, -9, -1))
        list(results)


class WordEncoders:
    """An encoder token is a word; captions of more than three are cut."""

    tokens = dict.fromkeys(ENCODERS, 3)

    def encode(self, captions):
        lengths = torch.tensor([[min(len(caption.split()), 3)] * 3 for caption in captions])
        sequences = [torch.zeros(len(captions), 3, 4) for _ in ENCODERS]
        return TextFeatures(*sequences, torch.zeros(len(captions), 4), torch.zeros(len(captions), 4), lengths)

    def too_long(self, prompts):
        return [prompt for prompt in prompts if len(prompt.split()) > 3]


def test_long_captions_are_counted_by_the_images_that_have_one():
    """Three images share one, another's original and synthetic are both too long: four images, not three captions."""
    made = TextWorker.__new__(TextWorker)  # without towers: the encoders are given
    made.text, made.batch, made.dtype, made.encoders = Text(), 2, "float32", WordEncoders()
    uses = {
        "a b c d": [CaptionUse("k1", "original"), CaptionUse("k2", "original"), CaptionUse("k3", "synthetic")],
        "just three words": [CaptionUse("k3", "original")],
        "e f g h": [CaptionUse("k4", "original")],
        "i j k l m": [CaptionUse("k4", "synthetic")],
    }
    counts = Counter()
    with ShardsAtOnce(1).shard("text/0/00000") as turn:
        assert len(list(made._samples(uses, 4, [], counts, turn))) == 6 and counts == {TOO_LONG: 4}
        assert turn.among.progress == {"text/0/00000": 4}


class LoudEncoders(WordEncoders):
    """Another vector for every word of a caption, and features that are NaN for a caption that says so."""

    def encode(self, captions):
        features = super().encode(captions)
        for name in ("clip_l", "clip_g", "t5", "clip_l_pooled", "clip_g_pooled"):
            part = getattr(features, name)
            part += torch.arange(part.numel()).reshape(part.shape) % 7 - 3.5
        features.t5[[caption == "nan" for caption in captions]] = float("nan")
        return features


@pytest.mark.parametrize("padding", ["reference", "trimmed"])
def test_captions_are_stored_in_8_bits_and_the_empty_string_in_16(tmp_path, padding):
    store = open_store(str(tmp_path))
    made = TextWorker.__new__(TextWorker)  # without towers: the encoders are given
    made.store, made.text, made.dtype, made.batch = store, Text(padding=padding), "int8", 4
    made.encoders, made.at_once = LoudEncoders(), ShardsAtOnce(1)
    made._captions = lambda source, counts: iter(
        [(CaptionUse("k1", "original"), "a b"), (CaptionUse("k2", "original"), "nan")]
    )
    task = ShardTask(0, "d" * 12, "text/0", rows=2)
    assert [row.key for row in made(task).record.failed] == ["k2"]
    [(_, files)] = read_samples(store.get(f"{task.folder}/{task.stem}.tar"))
    exact = made.encoders.encode(["a b"])
    exact = exact.trimmed() if padding == "trimmed" else exact
    for data, caption, dtype in (
        (files["safetensors"], "a b", torch.int8), (store.get(f"{task.folder}/{NULL_FILE}"), "", torch.float16),
    ):  # fmt: skip
        stored = StoredText.from_bytes([data], clip_tokens=3, t5_tokens=3)
        assert {stored.tensors[name].dtype for name in ENCODERS} == {dtype}
        if caption:
            assert torch.allclose(stored.features().t5, exact.t5, atol=3.5 / 127)
            assert stored.tensors["t5"].shape[1] == (3 if padding == "reference" else 2)


@pytest.mark.parametrize(("clip_tokens", "t5_tokens", "keys"), [
    (32, 32, ["t5_tokens", "clip_tokens"]),
    (77, 77, ["t5_tokens"]),
    (32, 512, ["clip_tokens"]),
    (77, 512, []),
])  # fmt: skip
def test_the_advice_on_long_captions_can_be_followed(clip_tokens, t5_tokens, keys):
    """Each key it names may be raised to what it names, as a recipe takes it."""
    advice = cut_advice(Text(clip_tokens=clip_tokens, t5_tokens=t5_tokens), "none")
    assert re.findall(r"text\.(\w+) \(up to (\d+)\)", advice) == [(key, str(TOKENS_AT_MOST[key])) for key in keys]
    for key in keys:
        changed = load_recipe("tiny-test", [f"text.{key}={TOKENS_AT_MOST[key]}"])
        assert getattr(changed.text, key) == TOKENS_AT_MOST[key]
        with pytest.raises(RecipeError):
            load_recipe("tiny-test", [f"text.{key}={TOKENS_AT_MOST[key] + 1}"])
    assert ("shorten the captions" in advice) == (not keys)
    assert "caption.max_new_tokens" in cut_advice(Text(), "vision_language_model")


def test_a_damaged_empty_string_is_named_taken_away_and_recorded_anew(tmp_path):
    """Its record stands beside it; one of an earlier version is recorded by the stage."""
    store, folder = open_store(str(tmp_path)), "text/0"
    store.put(f"{folder}/{NULL_FILE}", b"features")
    assert pin_null(store, folder) is None
    assert read_null_bytes(store, folder) == b"features" and store.get_json(f"{folder}/{NULL_RECORD}")["bytes"] == 8
    for damaged in (b"featurer", b"feat"):
        store.put(f"{folder}/{NULL_FILE}", damaged)
        with pytest.raises(DataError, match="NULL.safetensors: damaged.*run the encode stage: it is made again"):
            read_null_bytes(store, folder)
        assert pin_null(store, folder) == f"{folder}/{NULL_FILE}" and not store.exists(f"{folder}/{NULL_FILE}")
        store.put(f"{folder}/{NULL_FILE}", b"features")
        assert pin_null(store, folder) is None and read_null_bytes(store, folder) == b"features"


def test_who_reads_the_empty_string_writes_nothing_and_takes_nothing_on_trust(tmp_path):
    """Many ranks read it at once, and what one of them finds may be damaged."""
    store, folder = open_store(str(tmp_path)), "text/0"
    store.put(f"{folder}/{NULL_FILE}", b"features")
    with pytest.raises(
        DataError, match="NULL.safetensors: an earlier version encoded it; run the encode stage: it writes NULL.json"
    ):
        read_null_bytes(store, folder)
    assert [entry.path for entry in store.list()] == [f"{folder}/{NULL_FILE}"]


def test_encoders_of_one_kind_are_loaded_at_a_time_and_nobody_passes_who_waits_for_others():
    """Text and latents in turn, from three threads: each kind's shards are together, and every one is made."""
    at_work, kinds, loads = [], [], []

    def load(kind):
        assert not at_work
        loads.append(kind)

        def make(task):
            at_work.append(kind)
            time.sleep(0.002)
            kinds.append(set(at_work))
            at_work.remove(kind)
            return task.number

        return make

    made = EncodeWorker("file:///nowhere", None, Text(), {}, 1, None, 1, "cpu", {}, 1e9)
    made.make = {source: (lambda source=source: load(source)) for source in (TextSource, LatentsSource)}
    sources = [TextSource(None, None), LatentsSource(None, SizeRule(()))]
    todo = [ShardTask(number, "0" * 12, "f", 1, sources[number // 4 % 2]) for number in range(24)]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(made, todo, timeout=30)) == list(range(24))
    assert all(len(together) == 1 for together in kinds) and 6 <= len(loads) <= 24
