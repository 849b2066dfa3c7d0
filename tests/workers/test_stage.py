from __future__ import annotations

import pytest

from sd3core.data.begun import all_begun
from sd3core.data.store import open_store
from sd3core.errors import StoreError
from sd3core.recipe import Compute
from sd3core.recipe_file import load_recipe
from workers import shard_stage, towers
from workers.shard_stage import ShardStage, run_shard_stages
from workers.stage import StageNote, reason_to_work

NAMES = {"training": "pretrain", "init": "its starting checkpoint"}
BEFORE = {"training": {"learning_rate": 0.1}, "init": "0123456789ab", "text": "0123456789ab"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"learning_rate": 0.2}}, "pretrain.learning_rate: 0.1 -> 0.2"),
        ({"init": "ba9876543210"}, "its starting checkpoint changed"),
        ({"init": None}, "its starting checkpoint changed"),
        ({"text": "ba9876543210"}, "text changed"),
    ],
)
def test_a_field_is_called_as_a_reader_calls_it(change, said):
    note = StageNote(folder="f", digest="d", fields=BEFORE)
    assert reason_to_work(note, "g", BEFORE | change, 1, 1, "phase", NAMES) == said


def test_one_and_many():
    note = StageNote(folder="f", digest="d", fields={})
    assert reason_to_work(note, "f", {}, 1, 1, "phase") == "1 of 1 phase was missing"
    assert reason_to_work(note, "f", {}, 1, 4, "shard") == "1 of 4 shards was missing"
    assert reason_to_work(note, "f", {}, 2, 4, "shard") == "2 of 4 shards were missing"


def stop(*_, **__):
    raise StoreError("the process was killed here")


def test_a_stage_says_what_it_begins_before_it_looks_and_takes_it_back_at_its_end(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    stages = [
        ShardStage(
            f"latents.{phase}", "latents", f"datasets/d/latents/{phase}", {"vae": "b" * 64}, {"raw": "a" * 64}, ()
        )
        for phase in ("pretrain", "finetune.0")
    ]
    looked = []
    monkeypatch.setattr(shard_stage, "finished_stems", lambda store, folder: looked.append(len(all_begun(store))) or {})
    with monkeypatch.context() as killed, pytest.raises(StoreError):
        killed.setattr(shard_stage, "remember_stage", stop)
        run_shard_stages(store, "r", stages, object, {}, Compute(), lambda progress: None)
    assert looked == [2, 2] and {each.stage: each.folder for each in all_begun(store)} == {
        stage.name: stage.folder for stage in stages
    }
    assert all_begun(store)[0].record["fields"] == {"vae": "b" * 64, "inputs": {"raw": "a" * 64}}
    run_shard_stages(store, "r", stages, object, {}, Compute(), lambda progress: None)
    assert not all_begun(store) and len(store.list("runs/r/stages")) == 2


def test_towers_say_what_they_begin(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    monkeypatch.setattr(towers, "finished_towers", stop)
    with pytest.raises(StoreError):
        towers.towers_stage(load_recipe("tiny-test", []), store, None, lambda progress: None)
    (begun,) = all_begun(store)
    assert begun.stage == "towers" and begun.folder.startswith("towers/")
