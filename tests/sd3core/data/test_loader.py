"""Batches hold the right latents with the right captions, at any world size and from any step; the rest is refused."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import fields
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import small_shards as made
import torch

from sd3core.conditioning import TextFeatures
from sd3core.data import shard_reader
from sd3core.data.encoded_shards import ENCODE_AGAIN
from sd3core.data.loader import FEWEST_AHEAD, MOST_AHEAD, BatchLoader, load_split
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.shards import sample_id
from sd3core.data.training_plan import TrainingPlan
from sd3core.errors import DataError
from sd3core.randomness import uniform

SEED, GLOBAL_BATCH = 11, 12


@pytest.fixture
def data_set(store):
    return made.write_data_set(store)


def _reader(store, data_set, tmp_path, max_bytes=1e9, **options) -> ShardReader:
    tokens = {"clip_tokens": made.CLIP_TOKENS, "t5_tokens": made.T5_TOKENS}
    return ShardReader(store, *data_set, ShardCache(store, tmp_path / "cache", max_bytes), **tokens | options)


def _loader(reader, rank=0, world=1, original_fraction=0.5, **options) -> BatchLoader:
    plan = TrainingPlan(reader.counts("train")[0], SEED, GLOBAL_BATCH, options.pop("piece_rows", 3))
    return BatchLoader(reader, plan, original_fraction=original_fraction, seed=SEED, rank=rank, world=world, **options)


def _assert_same(batch, other):
    assert batch.keys == other.keys and batch.bucket == other.bucket
    for one, two in zip(made.as_numbers(batch), made.as_numbers(other), strict=True):
        np.testing.assert_array_equal(one, two)


def _assert_right(batch, wanted):
    """Every row's latent is its key's and its text that of the caption `wanted(place)` names."""
    assert batch.latent.dtype == torch.float16 and len(batch.text) == len(batch.keys) == len(batch.latent)
    text = batch.text.features()
    for place, key in enumerate(batch.keys):
        assert made.bucket_of(key) == batch.bucket and batch.sample_ids[place] == sample_id(key)
        torch.testing.assert_close(batch.latent[place], made.latent_of(key), rtol=0, atol=0)
        captions = made.captions_of(key)
        kind = wanted(place) if wanted(place) in captions else next(iter(captions))
        expected = made.features_of(captions[kind])
        for f in fields(TextFeatures):
            torch.testing.assert_close(getattr(text, f.name)[place], getattr(expected, f.name)[0], rtol=0, atol=0)


def test_batches_hold_the_rows_and_the_drawn_captions(store, data_set, tmp_path):
    loader = _loader(_reader(store, data_set, tmp_path))
    kinds = Counter()
    for step in range(20):
        batch = loader.batch(step)
        draws = uniform(SEED, batch.epochs, batch.sample_ids, "caption")
        _assert_right(batch, lambda place: "original" if draws[place] < 0.5 else "synthetic")
        kinds.update((draws < 0.5).tolist())
    assert min(kinds.values()) > 80  # both are drawn


@pytest.mark.parametrize("fraction, kind", [(1.0, "original"), (0.0, "synthetic")])
def test_one_kind_only_where_the_fraction_says_so(store, data_set, tmp_path, fraction, kind):
    loader = _loader(_reader(store, data_set, tmp_path), original_fraction=fraction)
    for step in range(4):
        _assert_right(loader.batch(step), lambda place: kind)


def test_an_epoch_is_the_training_part_with_captions(file_store, tmp_path):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    counts, without = reader.counts("train")
    train = {key for key in made.all_keys() if made.split_of(key) == "train"}
    assert without == sum(not made.captions_of(key) for key in train) > 0
    wanted = {key for key in train if made.captions_of(key)}
    assert len(counts) == len(wanted)
    loader = _loader(reader)
    batches = [loader.batch(step) for step in range(20)]
    seen = Counter(
        key for batch in batches for key, epoch in zip(batch.keys, batch.epochs.tolist(), strict=True) if epoch == 0
    )
    assert seen == Counter(wanted)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_slices_of_the_same_global_batch(file_store, tmp_path, world):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    whole, ranks = _loader(reader), [_loader(reader, rank, world) for rank in range(world)]
    for step in (0, 1, 2, 9):
        batch, parts = whole.batch(step), [rank.batch(step) for rank in ranks]
        assert {part.bucket for part in parts} == {batch.bucket}
        for number, values in enumerate(made.as_numbers(batch)):
            np.testing.assert_array_equal(values, np.concatenate([made.as_numbers(part)[number] for part in parts]))
    with pytest.raises(DataError, match="global_batch 12 is not a multiple of 5 ranks"):
        _loader(reader, 0, 5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6])
def test_parts_of_a_step_are_its_slices(file_store, tmp_path, micro_batch):
    """Two ranks in parts of any size: bit by bit the rows of the whole step, whichever step is asked for next."""
    data_set = made.write_data_set(file_store)
    whole = _loader(_reader(file_store, data_set, tmp_path))
    ranks = [_loader(_reader(file_store, data_set, tmp_path), rank, 2, micro_batch=micro_batch) for rank in range(2)]
    for step in (0, 1, 2, 7, 3):
        batch = whole.batch(step)
        parts = [rank.batch(step, part) for rank in ranks for part in range(6 // micro_batch)]
        assert {len(part.keys) for part in parts} == {micro_batch} and {part.bucket for part in parts} == {batch.bucket}
        for number, values in enumerate(made.as_numbers(batch)):
            np.testing.assert_array_equal(values, np.concatenate([made.as_numbers(part)[number] for part in parts]))
    with pytest.raises(DataError, match="global_batch 12 is not a multiple of 2 ranks x micro_batch 4; change compute"):
        _loader(whole.reader, 0, 2, micro_batch=4)


def test_any_step_may_be_next(file_store, tmp_path):
    data_set = made.write_data_set(file_store)
    straight = _loader(_reader(file_store, data_set, tmp_path))
    batches = [straight.batch(step) for step in range(12)]
    jumping = _loader(_reader(file_store, data_set, tmp_path))
    for step in (7, 8, 3, 3, 11, 0):  # a resume, a roll-back, a repeat
        _assert_same(jumping.batch(step), batches[step])
    assert (
        len(jumping._made) <= MOST_AHEAD and len(jumping._waiting) <= 3 * GLOBAL_BATCH
    )  # nothing is left of steps left out
    straight.close()
    jumping.close()


def test_the_next_batches_are_made_meanwhile(file_store, tmp_path):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    loader = _loader(reader, ahead=4)
    loader.batch(0)
    deadline = time.monotonic() + 10
    while not all(future.done() for future in loader._made.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(loader._made) == [1, 2, 3, 4] and all(future.done() for future in loader._made.values())


class Counted:
    """Counts the rows that are read of the tars, and those that are packed into batches."""

    def __init__(self, monkeypatch) -> None:
        self.read, self.packed = Counter(), Counter()
        read, pack = ShardCache.read, shard_reader.pack_batch

        def counting(cache, rows, **options):
            self.read.update((row.path, row.offset) for row in rows)
            return read(cache, rows, **options)

        def packing(samples, *arguments, **options):
            self.packed.update(sample.key for sample in samples)
            return pack(samples, *arguments, **options)

        monkeypatch.setattr(ShardCache, "read", counting)
        monkeypatch.setattr(shard_reader, "pack_batch", packing)


@pytest.mark.parametrize("piece_rows", [1, 3, 100])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_every_row_trained_on_is_read_and_decoded_once_and_nothing_else(
    file_store, tmp_path, monkeypatch, piece_rows, world, micro_batch
):
    data_set, counted, steps = made.write_data_set(file_store), Counted(monkeypatch), 30
    trained = Counter()
    for rank in range(world):
        options = {"piece_rows": piece_rows, "steps": steps, "micro_batch": micro_batch}
        loader = _loader(_reader(file_store, data_set, tmp_path), rank, world, **options)
        for step, part in product(range(steps), range(loader.parts)):
            trained.update(loader.batch(step, part).keys)
        assert not loader._waiting  # nor is anything read for steps that never come
        loader.close()
    latents = Counter({place: count for place, count in counted.read.items() if place[0].startswith("latents")})
    assert latents.total() == steps * GLOBAL_BATCH and counted.packed == trained
    assert sorted(latents.values()) == sorted(trained.values())  # of each row as often as it was trained on
    assert counted.read.total() == 2 * steps * GLOBAL_BATCH  # a row's latent and one caption


def test_what_waits_and_what_is_ready_keeps_to_its_bytes(file_store, tmp_path):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    free = _loader(reader, piece_rows=100)
    batches = [free.batch(step) for step in range(12)]
    assert free.ahead == MOST_AHEAD and len(free._waiting) > GLOBAL_BATCH
    tight = _loader(reader, piece_rows=100, read_ahead_bytes=2 * 5 * reader.row_bytes)
    for step in range(12):
        _assert_same(tight.batch(step), batches[step])  # the same batches, by more requests
        assert tight.ahead == FEWEST_AHEAD and len(tight._waiting) <= 5
    free.close()
    tight.close()


def test_a_batch_that_failed_ahead_is_made_again_when_it_is_needed(file_store, tmp_path, monkeypatch):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    straight = _loader(reader, ahead=0)
    expected = [straight.batch(step) for step in range(4)]
    loader, broken, read = _loader(reader, ahead=2), threading.Event(), reader.read_units

    def breaking(*args):
        if broken.is_set():
            raise DataError("for a moment")
        return read(*args)

    monkeypatch.setattr(reader, "read_units", breaking)
    broken.set()
    with pytest.raises(DataError, match="for a moment"):
        loader.batch(0)  # asked for now, so it is told
    broken.clear()
    _assert_same(loader.batch(0), expected[0])
    broken.set()
    loader.batch(1)  # begins to make the fourth
    while not loader._made[3].done():
        time.sleep(0.01)
    assert isinstance(loader._made[3].exception(), DataError)
    broken.clear()
    _assert_same(loader.batch(2), expected[2])
    _assert_same(loader.batch(3), expected[3])


def test_held_out_part(store, data_set, tmp_path):
    reader = _reader(store, data_set, tmp_path)
    batches = list(load_split(reader, "held_out", 5))
    keys = [key for batch in batches for key in batch.keys]
    wanted = {key for key in made.all_keys() if made.split_of(key) == "held_out" and made.captions_of(key)}
    assert Counter(keys) == Counter(wanted) and max(len(batch.keys) for batch in batches) == 5
    for batch in batches:
        assert not batch.epochs.any()
        _assert_right(batch, lambda place: "original")
    loader = _loader(reader)
    assert not wanted & {key for step in range(30) for key in loader.batch(step).keys}
    few = [key for batch in load_split(reader, "held_out", 5, limit=7) for key in batch.keys]
    assert len(few) == 7 and set(few) < wanted
    assert few == [key for batch in load_split(reader, "held_out", 5, limit=7) for key in batch.keys]
    assert list(load_split(reader, "held_out", 5, limit=0)) == []


def test_few_held_out_rows_read_few_shards(file_store, tmp_path):
    reader = _reader(file_store, made.write_data_set(file_store, shards=6), tmp_path)
    assert sum(len(batch.keys) for batch in load_split(reader, "held_out", 4, limit=4)) == 4
    assert len(reader._open) == 1


@pytest.mark.parametrize("limit", [4, 20, None])
def test_held_out_rows_cost_at_most_twice_their_bytes(file_store, tmp_path, monkeypatch, limit):
    """Of the tars: rows to train on lie between those held out, and captions of both."""
    reader, read = _reader(file_store, made.write_data_set(file_store, shards=6), tmp_path), []
    get_range = file_store.get_range

    def counting(path, offset, length):
        assert path.endswith(".tar")
        read.append(length)
        return get_range(path, offset, length)

    monkeypatch.setattr(file_store, "get_range", counting)
    keys = [key for batch in load_split(reader, "held_out", 5, limit=limit) for key in batch.keys]
    assert limit is None or len(keys) == limit
    places = reader.find((int(key.split("-")[1]), key) for key in keys)
    wanted = set()  # a caption of several rows once
    for position, row, _ in places:
        rows = reader.rows(position)
        for file in ("latent", rows.caption_kind(row, "original")):
            wanted.add((position, file == "latent", rows.place(row, file)))
    needed = sum(length for _, _, (_, length, _) in wanted)
    assert needed <= sum(read) <= 2 * needed


def test_an_empty_shard_is_no_trouble(file_store, tmp_path):
    latents, text = made.write_data_set(file_store, shards=1)
    empty = [made.write_latents(file_store, "latents", 1, 0), made.write_text(file_store, "text", 1, 0)]
    data_set = [m.model_copy(update={"shards": [*m.shards, e]}) for m, e in zip((latents, text), empty, strict=True)]
    reader = _reader(file_store, data_set, tmp_path)
    assert len(_loader(reader).batch(3).keys) == GLOBAL_BATCH
    assert list(load_split(reader, "held_out", 5))


def test_manifests_that_do_not_line_up_are_refused(file_store, tmp_path):
    latents, text = made.write_data_set(file_store)

    def refused(latents, text, **options):
        with pytest.raises(DataError) as error:
            _reader(file_store, (latents, text), tmp_path, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    short = text.model_copy(update={"shards": text.shards[:1]})
    assert refused(latents, short) == f"text: no text for 80 rows of latents, in shards 1, 2 (2 in all); {ENCODE_AGAIN}"
    incomplete = latents.model_copy(update={"shards": latents.shards[1:]})
    assert "latents: no latents for" in refused(incomplete, text) and "in shards 0 (1 in all)" in refused(
        incomplete, text
    )
    assert "made from different raw shards" in refused(latents, text.model_copy(update={"inputs": {"raw": "s" * 64}}))
    assert refused(text, latents) == "text: a manifest of text, where one of latents is needed"
    assert "encoded with text.t5_tokens 6, 8 is asked for" in refused(latents, text, t5_tokens=8)


def test_damaged_indexes_are_named_together(file_store, tmp_path):
    latents, text = made.write_data_set(file_store)
    stems = [shard.stem for shard in latents.shards]
    index = file_store.get(f"latents/{stems[0]}.index.parquet")
    file_store.put(f"latents/{stems[0]}.index.parquet", index[:-1] + b"!")
    file_store.delete(f"text/{text.shards[2].stem}.index.parquet")
    with pytest.raises(DataError) as error:
        _reader(file_store, (latents, text), tmp_path).open(range(3))
    message = str(error.value)
    assert message.startswith("2 of 3 shards cannot be trained on: ") and "\n" not in message
    assert f"latents/{stems[0]}.index.parquet: its bytes are not those" in message
    assert f"text/{text.shards[2].stem}: its index is gone" in message


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_damaged_or_missing_tars_stop_training(store, data_set, tmp_path, kind):
    manifest = dict(zip(("latents", "text"), data_set, strict=True))[kind]
    path = f"{kind}/{manifest.shards[0].stem}.tar"
    good = store.get(path)
    damages = (good[:600] + b"?" + good[601:], good[: len(good) // 2], b"\0" * len(good), None)
    for number, damage in enumerate(damages):
        if damage is None:
            store.delete(path)
        else:
            store.put(path, damage)
        loader = _loader(_reader(store, data_set, tmp_path / str(number)))
        with pytest.raises(
            DataError, match=f"{path}: its (bytes are not those of its manifest|manifest names it and it is gone)"
        ):
            [loader.batch(step) for step in range(12)]
    store.put(path, good)  # mended: the same loader goes on, a failure is not remembered
    assert [loader.batch(step) for step in range(10)]


def test_a_manifest_with_more_rows_than_its_index_is_refused(file_store, tmp_path):
    latents, text = made.write_data_set(file_store)
    first = latents.shards[0]
    lying = first.model_copy(update={"buckets": first.buckets | {"64x48": first.buckets["64x48"] + 1}})
    text = text.model_copy(update={"shards": [s.model_copy(update={"buckets": {}}) for s in text.shards]})
    latents = latents.model_copy(update={"shards": [lying, *latents.shards[1:]]})
    with pytest.raises(DataError, match="its index has [0-9]+ rows of 64x48 px with a caption, its manifest more"):
        [_loader(_reader(file_store, (latents, text), tmp_path)).batch(step) for step in range(10)]


def test_an_index_of_an_earlier_version_is_refused(file_store, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "LATENTS_SCHEMA", pa.schema([*made.LATENTS_SCHEMA][:2]))
    data_set = made.write_data_set(file_store)
    with pytest.raises(DataError, match="its index is of an earlier version; run the stage again that makes it"):
        _reader(file_store, data_set, tmp_path).open([0])


def test_the_flipped_latent_is_taken_by_seed_epoch_and_sample_and_only_in_training(store, tmp_path):
    """In half of the epochs of an image that has one, at any world size; all others and the held-out part stay as they are."""
    reader = _reader(store, made.write_data_set(store, flips=True), tmp_path)
    taken, wholes = Counter(), []
    loader = _loader(reader)
    for step in range(120):
        batch = loader.batch(step)
        wholes.append(batch)
        wanted = uniform(SEED, batch.epochs, batch.sample_ids, "flip") < 0.5
        for place, key in enumerate(batch.keys):
            flipped = made.flipped_of(key) if wanted[place] else None
            expected = made.latent_of(key) if flipped is None else flipped
            torch.testing.assert_close(batch.latent[place], expected, rtol=0, atol=0)
            taken[flipped is not None, made.flipped_of(key) is not None] += 1
    loader.close()
    assert not taken[True, False]
    assert 0.4 < taken[True, True] / (taken[True, True] + taken[False, True]) < 0.6
    for rank in range(2):
        half = _loader(reader, rank=rank, world=2)
        part = half.batch(7)
        whole = wholes[7].latent[rank * GLOBAL_BATCH // 2 : (rank + 1) * GLOBAL_BATCH // 2]
        torch.testing.assert_close(part.latent, whole, rtol=0, atol=0)
        half.close()
    for batch in load_split(reader, "train", 8):
        for place, key in enumerate(batch.keys):
            torch.testing.assert_close(batch.latent[place], made.latent_of(key), rtol=0, atol=0)


def test_without_flips_no_number_is_drawn_for_them(store, data_set, tmp_path, monkeypatch):
    """The batches of data without are what they were, file by file and draw by draw."""
    monkeypatch.setattr("sd3core.data.loader.uniform", None)
    loader = _loader(_reader(store, data_set, tmp_path))
    assert loader.batch(0).keys
    loader.close()
