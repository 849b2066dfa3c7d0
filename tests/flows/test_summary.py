from __future__ import annotations

import io

import pytest
from rich.console import Console

from flows.cli.closing import print_summary
from flows.local.services import Services
from flows.summary import exported_folder, finished_runs, write_summary
from sd3core.data.store import open_store
from sd3core.recipe_file import load_recipe
from workers.evaluate_tasks import COMPARISON


def picture(phase: str, samples: int, name: str, weights: str = "ema") -> dict[str, object]:
    return {
        "phase": phase,
        "samples": samples,
        "name": name,
        "weights": weights,
        "path": f"{phase}-{samples}-{name}.png",
    }


def test_no_folder_is_named_that_the_export_stage_did_not_make(tmp_path):
    export = {"name": "export", "manifest": "file:///store/runs/x/export/0/MANIFEST.json"}
    assert exported_folder(load_recipe("tiny-test"), export) == "file:///store/runs/x/export/0"
    other = load_recipe("tiny-test", ["pretrain.formulation=v/cos", "finetune.0.formulation=v/cos"])
    checkpoint = {"name": "export", "manifest": "file:///store/runs/x/checkpoints/finetune.0/0/000000000032/DONE.json"}
    assert exported_folder(other, checkpoint) is None


def test_the_newest_pictures_of_each_phase_and_size_are_named_and_warnings_with_their_stage(tmp_path):
    pictures = [
        picture("pretrain", 8, "64x64"),
        picture("pretrain", 16, "64x64"),
        picture("pretrain", 16, "64x64", "live"),
        picture("finetune.0", 8, "96x96"),
        picture("finetune.0", 8, "112x80"),
        picture("finetune.0", 8, COMPARISON),
    ]
    lost = "pretrain: a rank was lost; went on from 3,000 samples"
    stage = {
        "name": "pretrain",
        "state": "skipped",
        "seconds": 0.0,
        "digest": "",
        "reason": "",
        "warnings": [lost, "x"],
    }
    summary = {"stages": [stage], "scores": [], "bench": [], "pictures": pictures, "export": "e"}
    out = io.StringIO()
    store = open_store(str(tmp_path))
    print_summary(summary, store, load_recipe("tiny-test"), Services(port=1), Console(file=out, width=200), ["sd3"])
    assert f"\n{lost}\npretrain: x\n" in out.getvalue()
    said = [line.removeprefix("pictures  ") for line in out.getvalue().splitlines() if line.startswith("pictures")]
    assert said == [
        f"{tmp_path}/pretrain-16-64x64.png  pretrain 64 px",
        f"{tmp_path}/finetune.0-8-96x96.png  finetune.0 96 px",
        f"{tmp_path}/finetune.0-8-112x80.png  finetune.0 112x80 px",
        f"{tmp_path}/finetune.0-8-captions.png  finetune.0 left: captions that it trained on, right: held-out ones; each drawn,"
        " then real",
    ]


def test_a_loss_that_rises_stands_in_the_summary(tmp_path):
    store, recipe = open_store(str(tmp_path)), load_recipe("tiny-test")
    tables = {name: [] for name in ("scores", "bench", "left_out", "pictures")}
    stages = [{"name": "export", "manifest": "file:///s/runs/tiny-test/export/0/MANIFEST.json"}]
    rising = [{"phase": "pretrain", "since": 8}]
    assert write_summary(store, recipe, stages, tables | {"rising": rising})["rising"] == rising
    assert write_summary(store, recipe, stages, tables)["rising"] == []  # also of scores of an earlier version


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_summary_hides_no_other_run(tmp_path, damage):
    store = open_store(str(tmp_path))
    store.put("runs/broken/summary.json", damage)
    store.put_json("runs/whole/summary.json", {"run": "whole", "recipe": "mini"})
    assert finished_runs(store) == {"whole": "mini"}
