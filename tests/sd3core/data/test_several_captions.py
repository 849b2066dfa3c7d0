"""Of several captions of an image training draws one by (seed, epoch, sample); everything that takes one takes the first."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import small_shards as made

from sd3core.data.ingest import RAW_SCHEMA, captions_column, raw_sample
from sd3core.data.loader import BatchLoader, load_split
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.shards import read_samples, read_shard_index, sample_id, write_shard
from sd3core.data.training_plan import TrainingPlan
from sd3core.randomness import uniform
from sd3core.recipe import Data

SEED, GLOBAL_BATCH = 11, 12
DATA = Data(name="some", source="small_world")


def _reader(store, tmp_path, data_set) -> ShardReader:
    cache = ShardCache(store, tmp_path / "cache", 1e9)
    return ShardReader(store, *data_set, cache, clip_tokens=made.CLIP_TOKENS, t5_tokens=made.T5_TOKENS)


def _loader(reader, rank=0, world=1, original_fraction=0.5) -> BatchLoader:
    plan = TrainingPlan(reader.counts("train")[0], SEED, GLOBAL_BATCH, 3)
    return BatchLoader(reader, plan, original_fraction=original_fraction, seed=SEED, rank=rank, world=world)


def _captions(key: str) -> dict[str, list[str]]:
    """By kind, the first original one first."""
    captions = {kind: [caption] for kind, caption in made.captions_of(key).items()}
    if "original" in captions:
        captions["original"] += made.further_of(key)
    return captions


def _read(batch) -> list[tuple[str, int, str, int]]:
    """(key, epoch, kind, place) of the caption whose features each row of a batch has."""
    text, found = batch.text.features(), []
    for row, (key, epoch) in enumerate(zip(batch.keys, batch.epochs.tolist(), strict=True)):
        fits = [
            (key, epoch, kind, place)
            for kind, captions in _captions(key).items()
            for place, caption in enumerate(captions)
            if (text.t5[row] == made.features_of(caption).t5[0]).all()
        ]
        assert len(fits) == 1
        found += fits
    return found


@pytest.fixture
def reader(file_store, tmp_path):
    return _reader(file_store, tmp_path, made.write_data_set(file_store, several=True))


def test_half_are_original_and_of_these_each_as_often(reader):
    """Over 60 epochs, within four standard deviations of a fair draw."""
    loader, kinds, places = _loader(reader), Counter(), {2: Counter(), 4: Counter()}
    for step in range(60 * 84 // GLOBAL_BATCH):
        for key, _, kind, place in _read(loader.batch(step)):
            captions = _captions(key)
            if len(captions) == 2:
                kinds[kind] += 1
            if kind == "original" and len(captions[kind]) > 1:
                places[len(captions[kind])][place] += 1
    for counts, shares in [(kinds, 2), *((found, count) for count, found in places.items())]:
        draws = sum(counts.values())
        assert len(counts) == shares and draws > 500
        allowed = 4 * np.sqrt(draws * (1 / shares) * (1 - 1 / shares))
        assert all(abs(count - draws / shares) < allowed for count in counts.values())


@pytest.mark.parametrize("fraction, kind", [(1.0, "original"), (0.0, "synthetic")])
def test_one_kind_only_where_the_recipe_says_so(reader, fraction, kind):
    """Where an image has the other kind alone, that is taken, and of several originals each."""
    loader, places = _loader(reader, original_fraction=fraction), set()
    for step in range(20):
        for key, _, found, place in _read(loader.batch(step)):
            assert found == kind or kind not in _captions(key)
            places.add((found, place))
    assert {("original", 0), ("original", 1), ("original", 3)} <= places


def test_neither_ranks_nor_a_restart_change_a_draw(reader):
    whole = _loader(reader)
    drawn = [_read(whole.batch(step)) for step in range(12)]
    ranks = [_loader(reader, rank, 3) for rank in range(3)]
    for step in (7, 8, 2):
        assert [row for rank in ranks for row in _read(rank.batch(step))] == drawn[step]


def test_which_is_drawn_follows_from_seed_epoch_and_sample(reader):
    """The number that chooses between original and synthetic is the one it was before images had several."""
    loader = _loader(reader)
    for step in range(20):
        batch = loader.batch(step)
        kinds = uniform(SEED, batch.epochs, batch.sample_ids, "caption")
        for place, (key, _, kind, _) in enumerate(_read(batch)):
            assert batch.sample_ids[place] == sample_id(key)
            wanted = "original" if kinds[place] < 0.5 else "synthetic"
            assert kind == wanted or wanted not in _captions(key)


def test_draws_among_single_captions_are_those_of_before(file_store, tmp_path):
    """Golden: SHA-256 of all features of 8 batches, as the loader read them before images could have several captions."""
    loader, digest = _loader(_reader(file_store, tmp_path, made.write_data_set(file_store))), hashlib.sha256()
    for step in range(8):
        batch = loader.batch(step)
        digest.update(batch.text.features().t5.numpy().tobytes() + " ".join(batch.keys).encode())
    assert digest.hexdigest() == "22ad64a95df0bdb9c5c908bca6e3209c0b5b5d89fca1e3278dacae5af5751ef4"


def test_evaluation_takes_the_first(reader):
    rows = [row for batch in load_split(reader, "held_out", 8) for row in _read(batch)]
    assert rows and {place for *_, place in rows} == {0}
    assert {kind for key, _, kind, _ in rows if "original" in _captions(key)} == {"original"}
    shown = [(0, made.key_of(0, row)) for row in (1, 2, 8)]
    assert {row[2:] for batch in _loader(reader).samples(shown) for row in _read(batch)} == {("original", 0)}


def test_a_table_of_rows_says_more_only_where_a_row_has_more(file_store, tmp_path):
    """Machines keep what they have joined of data sets with one caption an image."""
    for several in (False, True):
        reader = _reader(file_store, tmp_path / str(several), made.write_data_set(file_store, several=several))
        rows = reader.rows(0)
        assert set(rows._further) == ({"original"} if several else set())
        row = rows.keys.index(made.key_of(0, 1)).as_py()
        places = {rows.place(row, "original", drawn) for drawn in (0.0, 0.3, 0.49, 0.5, 0.99)}
        assert len(places) == (2 if several else 1)


def test_a_raw_sample_keeps_all_captions_and_the_first_as_ever(file_store):
    def sample(key: str, *captions: str):
        return raw_sample(DATA, key, "png", b"picture", (3, 2), captions, "somewhere")

    about = {"caption": "one", "height": 2, "source": "somewhere", "width": 3}
    assert json.loads(sample("a", "one").files["json"]) == about
    assert json.loads(sample("a", "one", "two", "", "one").files["json"]) == about | {"captions": ["one", "two"]}
    assert (
        json.loads(sample("a", "").files["json"])["caption"] == json.loads(sample("a").files["json"])["caption"] == ""
    )

    samples = [sample("a", "one", "two"), sample("b"), sample("c", "three")]
    several = write_shard(file_store, "raw", "00000.0123456789ab", samples, [], RAW_SCHEMA)
    index = read_shard_index(file_store, "raw", several.stem)
    assert index["caption"].to_pylist() == ["one", "", "three"]
    assert captions_column(index) == [["one", "two"], [], ["three"]]

    one = write_shard(file_store, "raw", "00001.0123456789ab", samples[1:], [], RAW_SCHEMA)
    index = read_shard_index(file_store, "raw", one.stem)
    assert "captions" not in index.column_names and captions_column(index) == [[], ["three"]]
    assert dict(read_samples(file_store.get(f"raw/{one.stem}.tar"))).keys() == {"b", "c"}
