"""The filter stage and what follows it: which rows stay, what is looked at again, what a kill leaves."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from counting_models import TOWERS, Seen, count_models
from data_chain import encode_all
from in_process import without_ray
from PIL import Image

import workers.filter
import workers.filter_measures
from flows.ui.filter_page import funnel_table, left_out_pictures, rules_table
from sd3core.data.kept_rows import KeptRows
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.shards import read_shard_index, read_table
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.filters.row_rules import DUPLICATE, HAS_PATTERN, LEAKED, LONG_CAPTION, NOT_MEASURED, SHORT_SIDE, below
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.specs import DONE, DUPLICATES
from workers.caption import caption_stage
from workers.filter import filter_stage
from workers.ingest import ingest_stage
from workers.stage import NOTHING_TO_DO, StageFailed, StageResult

SETTINGS = [
    "data.source=folder", "data.name=filtered", "data.rows_per_shard=8", "data.held_out_fraction=0.25",
    "caption.captioner=vision_language_model", "caption.model=/model", "encode.batch=8",
]  # fmt: skip
DEDUPLICATE = "filter.duplicates={}"
IMAGES = 40
MADE = re.compile(r"/(measures|keep)/(?!.*PROVENANCE)")


@dataclass
class Run:
    """A folder of pictures of noise, of which some are copies of others, and the stages up to latents."""

    folder: str
    seen: Seen
    hashed: list[int] = field(default_factory=list)  # a picture each

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe("tiny-test", [*SETTINGS, f"data.folder={self.folder}", *overrides])

    def add(self, name: str, seed: int, size: tuple[int, int] = (64, 64), caption: str = "a picture") -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(f"{self.folder}/{name}.png")
        with open(f"{self.folder}/{name}.txt", "w") as file:
            file.write(caption)

    def filter(self, store: Store, *overrides: str) -> tuple[StageResult, Manifest]:
        self.hashed.clear()
        recipe = self.recipe(*overrides)
        raw = ingest_stage(recipe, store, ignore_progress)
        result = filter_stage(recipe, store, raw.manifest, ignore_progress)
        return result, read_manifest(store, result.manifest.folder, result.manifest.digest)

    def whole(self, store: Store, *overrides: str) -> tuple[tuple[int, int, int], dict[str, Manifest]]:
        """What the models were shown, and what stands of the stages after the filter."""
        self.hashed.clear()
        self.seen.captioned = self.seen.encoded = 0
        self.seen.texts.clear()
        recipe = self.recipe(*overrides)
        raw = ingest_stage(recipe, store, ignore_progress)
        filtered = filter_stage(recipe, store, raw.manifest, ignore_progress)
        keep = filtered.manifest if recipe.filter is not None else None
        captions = caption_stage(recipe, store, raw.manifest, ignore_progress, keep)
        parts = encode_all(recipe, store, raw.manifest, captions.manifest, TOWERS, keep=keep)
        made = {name: read_manifest(store, part.manifest.folder, part.manifest.digest) for name, part in parts.items()}
        made["captions"] = read_manifest(store, captions.manifest.folder, captions.digest)
        return self.seen.take(), made


def left_out(store: Store, keep: Manifest) -> dict[str, tuple[str, str | None]]:
    """Key -> reason and what it is a duplicate of."""
    found = {}
    for entry in keep.shards:
        told = read_shard_index(store, keep.folder, entry.stem, entry.index_digest).to_pylist()
        stay = read_table(store, keep.folder, entry.stem, entry.digest)["key"].to_pylist()
        assert stay == [row["key"] for row in told if row["reason"] is None] and entry.rows == len(stay)
        found |= {row["key"]: (row["reason"], row["duplicate_of"]) for row in told if row["reason"]}
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    made = Run(str(tmp_path / "images"), count_models(monkeypatch, tmp_path))
    without_ray(monkeypatch, workers.filter)
    hashing = workers.filter_measures.picture_hash
    monkeypatch.setattr(workers.filter_measures, "picture_hash", lambda image: made.hashed.append(1) or hashing(image))
    for number in range(IMAGES):
        made.add(f"{number:03d}", number, caption=f"picture {number}")
    return made


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def split_of(store: Store, run: Run) -> dict[str, str]:
    """By the key of each picture."""
    recipe = run.recipe()
    raw = ingest_stage(recipe, store, ignore_progress).manifest
    manifest = read_manifest(store, raw.folder, raw.digest)
    rows = [
        row for e in manifest.shards for row in read_shard_index(store, raw.folder, e.stem, e.index_digest).to_pylist()
    ]
    return {row["source"].rpartition("/")[2].removesuffix(".png"): (row["key"], row["split"]) for row in rows}


def test_rules_leave_out_by_the_first_that_is_broken_and_say_so(run, store):
    run.add("small", 100, (40, 64), "a caption that is much too long")
    run.add("long", 101, caption="a caption that is much too long")
    run.add("bad", 102, caption="buy now: a picture")
    rules = ["filter.min_side_px=50", "filter.max_caption_chars=20", "filter.caption_forbids=(?i)BUY"]
    result, keep = run.filter(store, *rules)
    reasons = sorted(reason for reason, _ in left_out(store, keep).values())
    assert reasons == sorted([SHORT_SIDE, LONG_CAPTION, HAS_PATTERN]) and keep.rows == IMAGES and not run.hashed
    assert any(f"1 image left out: {SHORT_SIDE}" in line for line in result.warnings)
    assert run.filter(store, *rules)[0].reason == NOTHING_TO_DO
    with pytest.raises(
        DataError, match="^filter: none of 43 images is kept .*shorter side below.*: 43.*loosen those rules"
    ):
        run.filter(store, "filter.min_side_px=500")


def test_of_near_duplicates_the_first_key_stays_and_none_is_held_out_of_what_is_trained_on(run, store):
    splits = {name: split for name, (_, split) in split_of(store, run).items()}
    train, held_out = ([name for name, split in splits.items() if split == which] for which in ("train", "held_out"))
    assert len(held_out) > 4
    for name in [*train[:6], *held_out[:4]]:
        run.add(f"copy-{name}", int(name), (80, 80))
        run.add(f"more-{name}", int(name), (96, 64))
    _, keep = run.filter(store, DEDUPLICATE)
    after = split_of(store, run)
    gone, groups = left_out(store, keep), {}
    for name, (key, split) in after.items():
        groups.setdefault(name[-3:], []).append((split == "held_out", key))
    expected = {}
    for members in groups.values():
        (first_held_out, first), *others = sorted(members)
        for is_held_out, key in others:
            expected[key] = (LEAKED if is_held_out and not first_held_out else DUPLICATE, first)
    assert gone == expected and len(expected) == 20 and {reason for reason, _ in gone.values()} == {LEAKED, DUPLICATE}
    assert keep.rows == IMAGES and len(run.hashed) == IMAGES + 20


def test_a_row_that_a_rule_leaves_out_is_nobodys_first(run, store):
    run.add("000-first", 7, (40, 40))
    keep = run.filter(store, DEDUPLICATE, "filter.min_side_px=50")[1]
    assert [reason for reason, _ in left_out(store, keep).values()] == [SHORT_SIDE]


def test_later_stages_take_rows_that_stay_and_a_threshold_shows_models_only_what_comes(run, store, tmp_path):
    for number in range(4):
        run.add(f"copy-{number}", number, (80, 80))
    run.add("small", 200, (48, 48))
    shown, whole = run.whole(store)
    assert shown[:2] == (45, 45)
    shown, kept = run.whole(store, DEDUPLICATE, "filter.min_side_px=50")
    assert shown == (0, 0, 0) and len(run.hashed) == 45  # all that stays was made before
    assert {name: made.rows for name, made in kept.items() if name.startswith("latents")} == {
        "latents.pretrain": 40,
        "latents.finetune.0": 40,
    }
    assert kept["captions"].rows == 40 and kept["captions"].inputs.keys() == {"raw", "keep"}
    assert kept["captions"].spec == whole["captions"].spec  # rows are no setting
    same = [(a.stem == b.stem) for a, b in zip(whole["captions"].shards, kept["captions"].shards, strict=True)]
    assert any(same) and not all(same)  # a shard that loses nothing keeps its name
    shown, more = run.whole(store, DEDUPLICATE)  # one comes back
    assert shown == (0, 0, 0) and not run.hashed and more["captions"].rows == 41
    other = open_store(str(tmp_path / "other"))
    shown, anew = run.whole(other, DEDUPLICATE)
    assert shown[:2] == (41, 41) and anew == more  # as if it had always been so
    assert run.whole(store)[1] == whole


def test_a_filter_that_leaves_nothing_out_changes_nothing(run, store):
    _, whole = run.whole(store)
    shown, kept = run.whole(store, DEDUPLICATE, "filter.max_aspect=9")
    assert shown == (0, 0, 0) and kept == whole


def test_a_row_more_is_hashed_alone_and_a_changed_one_too(run, store):
    run.filter(store, DEDUPLICATE)
    run.add("000", 500)
    run.add("new", 501)
    _, keep = run.filter(store, DEDUPLICATE)
    assert len(run.hashed) == 2 and keep.rows == IMAGES + 1


def test_a_kill_at_any_write_loses_nothing_and_shows_nothing_half(run, store, tmp_path, monkeypatch):
    """Every put of a whole run is the last one in turn; the same command then ends with the same bytes."""
    for number in range(3):
        run.add(f"copy-{number}", number, (80, 80))
    run.filter(store, DEDUPLICATE)
    files = lambda of: {e.path: of.get(e.path) for e in of.list("datasets") if MADE.search(e.path)}
    whole = files(store)

    class Killed(BaseException):
        pass

    kills = 0
    for last in range(0, 60, 3):
        victim = open_store(str(tmp_path / f"killed-{last}"))
        raw = ingest_stage(run.recipe(DEDUPLICATE), victim, ignore_progress)
        left = [last]
        put = type(victim).put

        def dying(self, path, data, left=left, put=put):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return put(self, path, data)

        with monkeypatch.context() as patch:
            patch.setattr(type(victim), "put", dying)
            try:
                filter_stage(run.recipe(DEDUPLICATE), victim, raw.manifest, ignore_progress)
            except Killed:
                kills += 1
        filter_stage(run.recipe(DEDUPLICATE), victim, raw.manifest, ignore_progress)
        assert files(victim) == whole
    assert kills >= 5


def test_a_damaged_record_or_part_is_found_again_and_a_damaged_list_is_refused(run, store):
    run.add("copy", 3, (80, 80))
    _, keep = run.filter(store, DEDUPLICATE)
    found = [entry.path for entry in store.list(keep.folder) if DUPLICATES in entry.path]
    assert len(found) == 2
    for path in found:
        before = store.get(path)
        store.delete(path)
        assert run.filter(store, DEDUPLICATE)[1] == keep and store.get(path) == before and not run.hashed
    (losing,) = [entry for entry in keep.shards if entry.failed]
    store.put(f"{keep.folder}/{losing.stem}.parquet", b"other")
    raw = ingest_stage(run.recipe(), store, ignore_progress).manifest
    shard = next(e for e in read_manifest(store, raw.folder).shards if e.number == losing.number)
    index = read_shard_index(store, raw.folder, shard.stem)
    with pytest.raises(DataError, match="its bytes are not those of its manifest"):
        KeptRows.of(keep).taken_of(store, losing.number, index)


def test_a_search_that_fails_says_so(run, store, monkeypatch):
    monkeypatch.setattr("workers.filter_keep.find_duplicates", lambda *_: (_ for _ in ()).throw(DataError("no room")))
    with pytest.raises(StageFailed, match="^filter: near-duplicates could not be looked for: no room"):
        run.filter(store, DEDUPLICATE)


def test_the_page_shows_the_funnel_the_rules_and_pictures(run, store):
    run.add("copy", 3, (80, 80))
    run.add("small", 200, (40, 40))
    overrides = [DEDUPLICATE, "filter.min_side_px=50"]
    result, keep = run.filter(store, *overrides)
    recipe = run.recipe(*overrides)
    table = funnel_table(store, result.manifest)
    assert [(row["what"], row["images"]) for row in table] == [
        ("images ingested", "42"),
        (next(iter(keep.failed_reasons)), "1"),
        (list(keep.failed_reasons)[1], "1"),
        ("images kept", "40"),
    ]
    assert table[0]["of all"] == "100.00%" and table[-1]["of all"] == "95.24%"
    rules = {row["rule"]: row["value"] for row in rules_table(recipe.filter)}
    assert rules["filter.min_side_px"] == "50" and rules["filter.duplicates.threshold"] == "0.985"
    assert rules["filter.duplicates.model"] == "built-in hash"
    raw = ingest_stage(recipe, store, ignore_progress).manifest
    pictures = left_out_pictures(recipe, store, raw, result.manifest)
    assert {says.partition(";")[0].removeprefix("left out: ") for says in pictures} == {*keep.failed_reasons}
    assert all(data.startswith(b"\xff\xd8") for data in pictures.values())
    assert len({hashlib.sha256(data).digest() for data in pictures.values()}) == 2


def test_a_damaged_part_is_named_with_its_mend(run, store):
    run.add("copy", 3, (80, 80))
    _, keep = run.filter(store, DEDUPLICATE)
    (part,) = [e.path for e in store.list(keep.folder) if DUPLICATES in e.path and e.path.endswith(".parquet")]
    store.put(part, store.get(part) + b"x")
    for entry in store.list(keep.folder):
        if entry.path.endswith(DONE):
            store.delete(entry.path)
    with pytest.raises(StageFailed, match="damaged; delete it and run the filter stage again"):
        run.filter(store, DEDUPLICATE)
    store.delete(part)
    assert run.filter(store, DEDUPLICATE)[1] == keep


class Scorer:
    """The mean brightness of each picture; of the darkest no number."""

    def __init__(self, *_: object) -> None:
        self.shown = 0

    def __call__(self, images) -> list[float]:
        self.shown += len(images)
        values = [float(np.asarray(image).mean()) for image in images]
        return [value if value > 20 else float("nan") for value in values]


def test_models_score_and_embed_each_image_once_and_thresholds_ask_none_again(run, store, monkeypatch):
    scorer = Scorer()
    embedded: list[int] = []

    def embedder(images) -> np.ndarray:
        embedded.append(len(images))
        return np.stack([np.asarray(image.resize((4, 4)), dtype=np.float16).ravel() - 128 for image in images])

    monkeypatch.setattr("sd3core.filters.scorers.load_scorer", lambda *_: scorer)
    monkeypatch.setattr("sd3core.filters.scorers.load_embedder", lambda *_: embedder)
    Image.new("RGB", (64, 64)).save(f"{run.folder}/black.png")
    run.add("copy", 3, (80, 80))
    score = "filter.scores.bright={kind: label, model: /m, label: x, min: 125}"
    model = "filter.duplicates={model: /clip, threshold: 0.99}"
    result, keep = run.filter(store, score, model)
    reasons = {reason for reason, _ in left_out(store, keep).values()}
    assert {below("bright"), NOT_MEASURED} <= reasons and not run.hashed
    assert scorer.shown == sum(embedded) == IMAGES + 2
    assert any("1 image left out: a score or its embedding is not finite" in line for line in result.warnings)
    entry = next(entry for entry in keep.shards if below("bright") in entry.failed)
    told = read_shard_index(store, keep.folder, entry.stem, entry.index_digest).to_pylist()
    assert all(row["score_bright"] < 125 for row in told if row["reason"] == below("bright"))
    _, looser = run.filter(store, score.replace("125", "21"), model)
    assert scorer.shown == IMAGES + 2 and looser.rows > keep.rows
    assert DUPLICATE in {reason for reason, _ in left_out(store, looser).values()}


def test_a_shard_of_which_nothing_can_be_measured_is_one_all_the_same(run, store, monkeypatch):
    monkeypatch.setattr("sd3core.filters.scorers.load_scorer", lambda *_: lambda images: [float("nan")] * len(images))
    with pytest.raises(DataError, match="^filter: none of 40 images is kept .*its scores are not finite: 40"):
        run.filter(store, DEDUPLICATE, "filter.scores.none={kind: label, model: /m, label: x, min: 0}")


def test_in_a_bucket_it_writes_what_it_writes_in_a_folder(run, store, s3_bucket):
    run.add("copy", 3, (80, 80))
    bucket = open_store(f"s3://{s3_bucket}/some/where")
    (_, here), (_, there) = run.filter(store, DEDUPLICATE), run.filter(bucket, DEDUPLICATE)
    assert here == there and here.rows == IMAGES
    files = lambda of: {entry.path: of.get(entry.path) for entry in of.list("datasets") if MADE.search(entry.path)}
    assert files(bucket) == files(store)
    assert run.filter(bucket, DEDUPLICATE)[0].reason == NOTHING_TO_DO


@pytest.mark.slow
def test_on_rays_actors_as_in_one_process(tmp_path, local_ray):
    """Measures, the search over all shards and the lists, each by workers of their own."""
    (tmp_path / "images").mkdir()
    run, store = Run(str(tmp_path / "images"), Seen()), open_store(str(tmp_path / "store"))
    for number in range(12):
        run.add(f"{number:03d}", number)
    run.add("copy", 3, (80, 80))
    overrides = [*SETTINGS, f"data.folder={run.folder}", "caption.captioner=none", DEDUPLICATE]
    recipe, said = load_recipe("tiny-test", overrides), []
    raw = ingest_stage(recipe, store, ignore_progress)
    result = filter_stage(recipe, store, raw.manifest, said.append)
    keep = read_manifest(store, result.manifest.folder, result.manifest.digest)
    assert keep.rows == 12 and [reason for reason, _ in left_out(store, keep).values()] in ([DUPLICATE], [LEAKED])
    assert {progress.unit for progress in said} == {"images"} and not result.skipped
    assert filter_stage(recipe, store, raw.manifest, ignore_progress).reason == NOTHING_TO_DO


def test_models_that_change_while_the_stage_runs_measure_nothing_under_the_others_name(run, store, monkeypatch):
    monkeypatch.setattr("sd3core.filters.scorers.load_embedder", lambda *_: pytest.fail("it was used"))
    monkeypatch.setattr(workers.filter_measures, "measured_by", lambda rules: {"feature": "of another model"})
    with pytest.raises(DataError, match="its models are not those that lay there when the stage began"):
        run.filter(store, "filter.duplicates={model: /clip, threshold: 0.99}")


def test_the_page_of_images_that_cannot_be_decoded_any_more_shows_the_others(run, store, monkeypatch):
    one_is_not_finite = lambda images: [float("nan"), *[1.0] * (len(images) - 1)]
    monkeypatch.setattr("sd3core.filters.scorers.load_scorer", lambda *_: one_is_not_finite)
    overrides = [DEDUPLICATE, "filter.scores.none={kind: label, model: /m, label: x, min: 0}"]
    result, keep = run.filter(store, *overrides)
    assert [*keep.failed_reasons] == [NOT_MEASURED]

    def broken(*_):
        raise DataError("000: it cannot be decoded")

    monkeypatch.setattr("sd3core.data.split_rows.decode_image", broken)
    recipe = run.recipe(*overrides)
    raw = ingest_stage(recipe, store, ignore_progress).manifest
    assert left_out_pictures(recipe, store, raw, result.manifest) == {}
