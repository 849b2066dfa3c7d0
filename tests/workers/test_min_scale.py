"""A phase takes images that fill their buckets; what a run has made before there was such a rule stays as it is."""

from __future__ import annotations

import io

import pytest
from counting_models import DIGESTS, TOWERS, count_models
from rich.console import Console
from test_rare_sizes import SETTINGS, Folder

from flows.cli.plan import print_rare_sizes
from flows.upstream import Upstream
from sd3core.data.manifest import read_manifest
from sd3core.data.size_rule import TOO_SMALL, SizeRule
from sd3core.data.split_rows import read_rows
from sd3core.data.store import open_store
from sd3core.errors import DataError, RecipeError
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from sd3core.small_world.scenes import scene_size
from workers import encode, rare_sizes
from workers.evaluate_tasks import EvaluationInputs, ScoredCheckpoint, plan_tasks
from workers.ingest import ingest_stage
from workers.stage import NOTHING_TO_DO, recall_stage

WHOLE = ("pretrain.min_scale=1", "finetune.0.min_scale=1", "finetune.0.side_px=64", "finetune.0.buckets=null")
HALF = (*WHOLE, "finetune.0.min_scale=0.5")
LEFT_OUT = (
    "finetune.0: 3 of 13 images left out, 0 of them held out: they do not fill their bucket (min_scale 1; a smaller one"
    " enlarges them)"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten images of 64 px, and three of 40 px, which fill pretraining's 32 px alone."""
    (tmp_path / "images").mkdir()
    made = Folder(
        load_recipe("tiny-test", [*SETTINGS, f"data.folder={tmp_path}/images"]), count_models(monkeypatch, tmp_path)
    )
    for number in range(13):
        made.add(number, (64, 70) if number < 10 else (40, 40))
    return made


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


def as_before(patch) -> None:
    """Latents are made, and noted, as by a version that had no such rule."""
    patch.setattr(rare_sizes, "SizeRule", lambda sides, *_: SizeRule(sides))
    patch.setattr(encode, "ShardStage", lambda *args, rules=None, **named: rare_stage(*args, **named), raising=True)


rare_stage = encode.ShardStage


def test_small_images_are_left_out_counted_and_told_before_anything_is_encoded(folder, store):
    count, result, made = folder.encode(store, *WHOLE)
    assert (count, made.rows, made.failed_reasons) == (13 + 10, 10, {TOO_SMALL: 3})
    assert folder.told[0] == (LEFT_OUT, 0) and LEFT_OUT in result.warnings
    (named,) = [line for line in result.warnings if TOO_SMALL in line]
    assert named.startswith("3 images left out: ") and all(f"0{number}" in named for number in (10, 11, 12))
    assert folder.encode(store, *WHOLE)[0] == 0


def test_another_scale_shows_the_autoencoder_only_what_comes_and_goes_back_to_the_same_shards(folder, store, tmp_path):
    _, _, whole = folder.encode(store, *WHOLE)
    count, _, half = folder.encode(store, *HALF)
    assert (count, half.rows, half.failed_reasons) == (3, 13, {})
    plain = folder.encode(open_store(str(tmp_path / "other")), *WHOLE, "finetune.0.min_scale=0")[2]
    assert half == plain  # where nothing is left out, bytes and names are those of a phase that takes all
    assert folder.encode(store, *WHOLE)[::2] == (0, whole)


def test_what_a_run_made_before_there_was_the_rule_stays_and_another_run_follows_the_rule(folder, store, monkeypatch):
    with monkeypatch.context() as before:
        as_before(before)
        _, _, plain = folder.encode(store, *WHOLE)
    assert plain.rows == 13 and plain.failed_reasons == {}
    count, result, made = folder.encode(store, *WHOLE)
    assert (count, made, result.reason) == (0, plain, NOTHING_TO_DO)
    told = [line for line in result.warnings if "enlarged" in line]
    assert told == [
        "finetune.0 (64 px): 3 of 13 images enlarged more than 1.1 times to fill their bucket; they stand from before there was"
        " finetune.0.min_scale, and `--from-stage encode` leaves them out"
    ]
    count, _, other = folder.encode(store, *WHOLE, "run=another")
    assert (count, other.rows) == (0, 10)  # all copied
    assert folder.encode(store, *WHOLE)[::2] == (0, plain)
    count, _, asked = folder.encode(
        store, *WHOLE, "finetune.0.min_scale=0.9"
    )  # which nobody has by default: it is asked for
    assert (count, asked.rows) == (0, 10) and asked.shards == other.shards
    folder.add(13, (64, 70))
    assert folder.encode(store, *WHOLE)[2].rows == 11  # other images: what was trained is trained again anyway


def test_latents_of_before_from_which_nothing_would_be_left_out_keep_name_bytes_and_note(folder, store, monkeypatch):
    small = (*WHOLE, "finetune.0.side_px=48", "finetune.0.min_scale=0.8")
    with monkeypatch.context() as before:
        as_before(before)
        _, result, plain = folder.encode(store, *small)
    count, again, made = folder.encode(store, *small)
    assert (count, made, again.digest) == (0, plain, result.digest)
    assert recall_stage(store, "tiny-test", "latents.finetune.0").fields["min_scale"] == 0.8


def test_latents_of_before_took_all_images_so_they_stay_where_a_recipe_takes_all(folder, store, monkeypatch):
    """Their rare sizes, too, which merging came after."""
    with monkeypatch.context() as before:
        as_before(before)
        before.setattr(rare_sizes, "merges_of", lambda *_: {})
        _, _, plain = folder.encode(store, "finetune.0.min_scale=0")
    assert "256x256" in plain.buckets and "256x240" in plain.buckets
    count, result, made = folder.encode(store, "finetune.0.min_scale=0")
    assert (count, made, result.reason) == (0, plain, NOTHING_TO_DO)


def test_a_phase_that_no_image_is_large_enough_for_says_so_before_anything_is_encoded(folder, store):
    with pytest.raises(DataError) as error:
        folder.encode(store, *WHOLE, "finetune.0.side_px=128")
    assert str(error.value) == (
        "finetune.0: no image is large enough for side_px 128, and none is enlarged beyond min_scale 1; lower"
        " finetune.0.side_px or finetune.0.min_scale"
    )
    assert folder.seen.encoded == 0


def test_phases_that_share_latents_share_the_scale():
    with pytest.raises(
        RecipeError, match="finetune.0.min_scale 0.5 differs from pretrain.min_scale 1, and both phases have"
    ):
        load_recipe("tiny-test", [*HALF, "finetune.0.side_px=32", "finetune.0.aspect_ratios=[1.0]"])


@pytest.mark.parametrize("name", ["mini", "small"])
def test_every_scene_of_the_shipped_small_worlds_fills_its_buckets(name):
    recipe = load_recipe(name)
    sizes = {scene_size(recipe.data.image_side_px, aspect) for aspect in recipe.data.aspect_ratios}
    for key, phase in recipe.phases():
        assert phase.min_scale == 1.0
        rule = SizeRule(tuple(phase.bucket_sides()), phase.min_scale)
        assert all(rule.takes(*size) for size in sizes), key


def test_scores_are_of_images_that_the_phase_takes_and_change_only_where_it_leaves_some_out(folder, store, monkeypatch):
    """Held-out prompts and reference images, by the protocol that names them."""
    overrides = [*SETTINGS, f"data.folder={folder.recipe.data.folder}", *WHOLE, "data.held_out_fraction=1.0"]
    folder.encode(store, *overrides)
    recipe = load_recipe("tiny-test", overrides)
    upstream = Upstream(recipe, store)
    monkeypatch.setattr(
        Upstream,
        "towers_manifest",
        type("Towers", (), {"digests": DIGESTS, "folder": TOWERS.folder, "digest": TOWERS.digest}),
    )
    assert upstream.sizes("pretrain") is None
    sizes = upstream.sizes("finetune.0")
    assert sizes == SizeRule(((64, 64),), 1.0)
    raw = read_manifest(store, upstream.raw.folder, upstream.raw.digest)
    everyone, taken = (read_rows(store, raw, "held_out", 99, sizes=rule) for rule in (None, sizes))
    assert len(everyone) == 13 and len(taken) == 10 and [row for row in everyone if row in taken] == taken

    checkpoint = ScoredCheckpoint("a", 8, "d")
    latents = {key: upstream.latents(key) for key in ("pretrain", "finetune.0")}
    inputs = EvaluationInputs(
        {key: [checkpoint] for key in latents}, upstream.raw, upstream.text, latents, TOWERS.folder, DIGESTS
    )
    plain = plan_tasks(recipe, inputs)
    ruled = plan_tasks(recipe, EvaluationInputs(**inputs.__dict__ | {"sizes": {"finetune.0": sizes}}))
    for before, after in zip(plain, ruled, strict=True):
        assert (before == after) == (before.phase == "pretrain"), before.title
        if after.part == "pictures" and after.phase == "finetune.0":
            assert SizeRule.of_dict(after.protocol) == SizeRule.of_dict(after.protocol["reference"]) == sizes


def test_a_plan_counts_what_each_phase_leaves_out_before_anything_is_encoded(folder, store):
    recipe = load_recipe("tiny-test", [*SETTINGS, f"data.folder={folder.recipe.data.folder}", *WHOLE])

    def printed() -> str:
        console = Console(file=io.StringIO(), width=200)
        print_rare_sizes(recipe, store, console)
        return console.file.getvalue().strip()

    assert "images too small for a phase, and sizes with fewer images than a batch, are told here when" in printed()
    ingest_stage(recipe, store, ignore_progress)
    before = [entry.path for entry in store.list("datasets")]
    assert printed() == LEFT_OUT
    assert folder.seen.encoded == 0 and [entry.path for entry in store.list("datasets")] == before


@pytest.mark.parametrize("before", [False, True])
def test_a_later_stage_alone_does_not_take_latents_of_another_scale_for_those_that_are_asked_for(
    folder, store, monkeypatch, before
):
    """Their fingerprint is the same: what leaves nothing out under either stands."""
    of_folder = [*SETTINGS, f"data.folder={folder.recipe.data.folder}"]
    towers = type("Towers", (), {"digests": DIGESTS, "folder": TOWERS.folder, "digest": TOWERS.digest})
    monkeypatch.setattr(Upstream, "towers_manifest", towers)
    with monkeypatch.context() as patch:
        if before:
            as_before(patch)
        folder.encode(store, *WHOLE)
    with_scale = lambda scale: Upstream(
        load_recipe("tiny-test", [*of_folder, *WHOLE, f"finetune.0.min_scale={scale}"]), store
    )
    assert with_scale(1).latents("finetune.0")
    with pytest.raises(DataError, match=r"finetune: what it made is by finetune.0.min_scale [01], not 0.5; "):
        with_scale(0.5).latents("finetune.0")
    if before:
        assert with_scale(0).latents("finetune.0") == with_scale(1).latents("finetune.0")
    else:  # all images fill pretraining's bucket
        smaller = load_recipe("tiny-test", [*of_folder, *WHOLE, "pretrain.min_scale=0.5"])
        assert Upstream(smaller, store).latents("pretrain")
