"""Batches hold the right latents with the right captions, at any world size and from any step; the rest is refused."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import small_shards as made
import torch

from sd3core.conditioning import TextFeatures
from sd3core.data.loader import BatchLoader, load_split
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
    plan = TrainingPlan(reader.table("train")[0], SEED, GLOBAL_BATCH)
    return BatchLoader(reader, plan, original_fraction=original_fraction, seed=SEED, rank=rank, world=world, **options)


def _assert_same(batch, other):
    assert batch.keys == other.keys and batch.bucket == other.bucket
    for one, two in zip(made.as_numbers(batch), made.as_numbers(other), strict=True):
        np.testing.assert_array_equal(one, two)


def _assert_right(batch, wanted):
    """Every row's latent is its key's and its text that of the caption `wanted(place)` names."""
    assert batch.latent.dtype == torch.float32 and len(batch.text) == len(batch.keys) == len(batch.latent)
    for place, key in enumerate(batch.keys):
        assert made.bucket_of(key) == batch.bucket and batch.sample_ids[place] == sample_id(key)
        torch.testing.assert_close(batch.latent[place], made.latent_of(key), rtol=0, atol=0)
        captions = made.captions_of(key)
        kind = wanted(place) if wanted(place) in captions else next(iter(captions))
        expected = made.features_of(captions[kind])
        for f in fields(TextFeatures):
            torch.testing.assert_close(getattr(batch.text, f.name)[place], getattr(expected, f.name)[0], rtol=0, atol=0)


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
    table, without = reader.table("train")
    train = {key for key in made.all_keys() if made.split_of(key) == "train"}
    assert without == sum(not made.captions_of(key) for key in train) > 0
    wanted = {key for key in train if made.captions_of(key)}
    assert len(table) == len(wanted)
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


def test_any_step_may_be_next(file_store, tmp_path):
    data_set = made.write_data_set(file_store)
    straight = _loader(_reader(file_store, data_set, tmp_path))
    batches = [straight.batch(step) for step in range(12)]
    jumping = _loader(_reader(file_store, data_set, tmp_path))
    for step in (7, 8, 3, 3, 11, 0):  # a resume, a roll-back, a repeat
        _assert_same(jumping.batch(step), batches[step])
    assert len(jumping._made) <= 4
    straight.close()
    jumping.close()


def test_the_next_batches_are_made_meanwhile(file_store, tmp_path):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    loader = _loader(reader)
    loader.batch(0)
    deadline = time.monotonic() + 10
    while not all(future.done() for future in loader._made.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(loader._made) == [1, 2, 3, 4] and all(future.done() for future in loader._made.values())


def test_a_shard_is_decoded_once_and_memory_is_bounded(file_store, tmp_path, monkeypatch):
    data_set = made.write_data_set(file_store)
    decoded = Counter()
    real = ShardReader._decode

    def counting(self, rows):
        decoded[rows.latents.number] += 1
        time.sleep(0.02)
        return real(self, rows)

    monkeypatch.setattr(ShardReader, "_decode", counting)
    reader = _reader(file_store, data_set, tmp_path)
    threads = [threading.Thread(target=reader.decoded, args=(n % 3,)) for n in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert decoded == {0: 1, 1: 1, 2: 1} and len(reader._decoded) == 3
    one = reader.decoded(0).bytes
    warned = []
    small = _reader(file_store, data_set, tmp_path, decoded_bytes=1.5 * one, warn=warned.append)
    for position in (0, 1, 2, 0):
        assert small.decoded(position).keys[0] == made.key_of(position, 0)
        assert len(small._decoded) == 1
    assert decoded[0] == 3 and decoded[1] == 2
    [warning] = warned
    assert warning.startswith(
        f"a step draws from {len(small.shards)} shards of {one / 1e9:.3g} GB, and compute.decoded_gb"
    )
    assert warning.endswith("set it to 0.1, or take fewer data.rows_per_shard")
    for position in range(len(small.shards)):
        reader.decoded(position)
    assert len(warned) == 1


def test_a_failure_while_fetching_ahead_does_not_stop_a_step(file_store, tmp_path, monkeypatch):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    real, started, go_on, attempts = reader._decode, threading.Event(), threading.Event(), []

    def fails_first(rows):
        attempts.append(rows)
        if len(attempts) == 1:
            started.set()
            go_on.wait(10)
            raise DataError("for a moment")
        return real(rows)

    monkeypatch.setattr(reader, "_decode", fails_first)
    with ThreadPoolExecutor(2) as threads:
        ahead = threads.submit(reader.decoded, 0)
        assert started.wait(10)
        waiting = threads.submit(reader.decoded, 0)  # joins the attempt that is under way
        time.sleep(0.05)
        assert len(attempts) == 1
        go_on.set()
        assert isinstance(ahead.exception(10), DataError)
        assert waiting.result(10).keys[0] == made.key_of(0, 0) and len(attempts) == 2


def test_a_batch_that_failed_ahead_is_made_again_when_it_is_needed(file_store, tmp_path, monkeypatch):
    reader = _reader(file_store, made.write_data_set(file_store), tmp_path)
    expected = _loader(reader, ahead=0).batch(2)
    loader, broken = _loader(reader), threading.Event()
    real = loader._make

    def make(step):
        if broken.is_set() and threading.current_thread() is not threading.main_thread():
            raise DataError("for a moment")
        return real(step)

    monkeypatch.setattr(loader, "_make", make)
    broken.set()
    with pytest.raises(DataError, match="for a moment"):
        loader.batch(0)  # asked for now, so it is told
    loader._made[2] = loader._threads.submit(make, 2)
    _assert_same(loader.batch(2), expected)


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
    assert len(reader._decoded) == 1


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
    assert (
        refused(latents, short)
        == "text: no text for 80 rows of latents, in shards 1, 2 (2 in all); run the encode stage again"
    )
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
        _reader(file_store, (latents, text), tmp_path)
    message = str(error.value)
    assert message.startswith("2 of 3 shards cannot be trained on: ") and "\n" not in message
    assert f"latents/{stems[0]}.index.parquet: its bytes are not those" in message
    assert f"text/{text.shards[2].stem}: its index is gone" in message


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_damaged_or_missing_tars_stop_training(store, data_set, tmp_path, kind):
    manifest = dict(zip(("latents", "text"), data_set, strict=True))[kind]
    path = f"{kind}/{manifest.shards[0].stem}.tar"
    good = store.get(path)
    for damage in (good[:600] + b"?" + good[601:], None):
        if damage is None:
            store.delete(path)
        else:
            store.put(path, damage)
        loader = _loader(_reader(store, data_set, tmp_path))
        with pytest.raises(
            DataError, match=f"{path}: its (bytes are not those of its manifest|manifest names it and it is gone)"
        ):
            [loader.batch(step) for step in range(10)]
    store.put(path, good)  # mended: the same loader goes on, a failure is not remembered
    assert [loader.batch(step) for step in range(10)]


def test_a_caption_that_the_tar_lacks_is_refused(file_store, tmp_path):
    latents, text = made.write_data_set(file_store)
    other = made.write_text(file_store, "elsewhere", 0, 10)
    first = text.shards[0]
    file_store.put(f"text/{first.stem}.tar", file_store.get(f"elsewhere/{other.stem}.tar"))
    lying = first.model_copy(update={"digest": other.digest})
    reader = _reader(file_store, (latents, text.model_copy(update={"shards": [lying, *text.shards[1:]]})), tmp_path)
    with pytest.raises(DataError, match="is in the index, not in the tar"):
        reader.decoded(0)
