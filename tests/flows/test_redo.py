"""`--from-stage` undoes its stage and those after it, and nothing else."""

from __future__ import annotations

import pytest

from flows.redo import forget_from
from sd3core import specs
from sd3core.data.store import open_store
from sd3core.errors import RecipeError
from sd3core.recipe_file import load_recipe
from sd3core.specs import captions_folder, raw_folder


@pytest.fixture
def finished(tmp_path):
    """A store with markers and bytes of some stages, as a finished run leaves them."""
    recipe, store = load_recipe("tiny-test"), open_store(str(tmp_path))
    raw, captions = raw_folder(recipe), captions_folder(recipe)
    for path in (
        f"{raw}/MANIFEST.json",
        f"{raw}/00000.0123456789ab.tar",
        f"{raw}/00000.0123456789ab.done.json",
        f"{captions}/MANIFEST.json",
        f"{captions}/00000.0123456789ab.parquet",
        f"{captions}/00000.0123456789ab.done.json",
        "runs/tiny-test/checkpoints/pretrain/aaaa/000000000096/DONE.json",
        "runs/tiny-test/checkpoints/pretrain/aaaa/000000000096/metrics.jsonl",
        "runs/tiny-test/evaluations/scores.json",
        "runs/tiny-test/export/bbbb/MANIFEST.json",
        "runs/other/checkpoints/pretrain/aaaa/000000000096/DONE.json",
    ):
        store.put(path, b"{}")
    return recipe, store


def paths(store) -> set[str]:
    return {entry.path for entry in store.list()}


def test_later_stages_are_undone_and_earlier_ones_stay(finished):
    recipe, store = finished
    before = paths(store)
    forget_from(recipe, store, "pretrain")
    assert before - paths(store) == {
        "runs/tiny-test/evaluations/scores.json",
        "runs/tiny-test/export/bbbb/MANIFEST.json",
    }


def test_of_training_scores_and_exports_only_those_of_these_settings_and_this_version_are_undone(
    tmp_path, write_records, train_today, rise
):
    rise("train")
    recipe, store = load_recipe("tiny-test"), open_store(str(tmp_path))
    write_records(store)
    ours = train_today(recipe, store)
    checkpoints = {
        "ours": ours[0],
        "of_other_settings": train_today(load_recipe("tiny-test", ["pretrain.learning_rate=0.1"]), store)[0],
        "of_the_version_before": store.get_json("runs/tiny-test/stages/pretrain.json")["folder"],
    }
    run, made = "runs/tiny-test", {}
    for name, folder in checkpoints.items():
        checkpoint = f"{folder}/{96:012d}"
        for number, since in ((specs.FORMATS["evaluations"], ""), (1, "_by_an_older_protocol")):
            part, fields = f"{run}/evaluations/pretrain/{name}{since}.0123456789ab.json", {"format": number}
            store.put_json(part, {"checkpoint": checkpoint, "protocol": fields})
            exported = f"{run}/export/{name}{since}/MANIFEST.json"
            store.put_json(exported, {"from": checkpoint, "fields": fields})
            made[name + since] = {part, exported}
    before = paths(store)
    forget_from(recipe, store, "pretrain")
    gone = before - paths(store)
    trained = {f"{ours[0]}/{96:012d}/DONE.json", f"{ours[1]}/{32:012d}/DONE.json"}
    assert gone == {*trained, *made["ours"], f"{run}/evaluations/scores.json"}


def test_only_markers_go(finished):
    recipe, store = finished
    forget_from(recipe, store, "ingest")
    left = paths(store)
    assert f"{raw_folder(recipe)}/00000.0123456789ab.tar" in left
    assert f"{captions_folder(recipe)}/00000.0123456789ab.parquet" in left
    assert "runs/other/checkpoints/pretrain/aaaa/000000000096/DONE.json" in left
    assert not [
        path for path in left if path.startswith("datasets/") and path.endswith((".done.json", "MANIFEST.json"))
    ]


def test_an_unknown_stage_names_those_that_are(finished):
    with pytest.raises(
        RecipeError, match=r"--from-stage 'train': did you mean 'pretrain'\? the stages are ingest, towers"
    ):
        forget_from(*finished, "train")
