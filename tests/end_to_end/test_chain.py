"""The whole chain through Prefect, Ray and DeepSpeed: killed, gone on with, repeated, changed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import BATCH, DATA, FEW_SCORES, FIRST, LAST, OVERRIDES, RUN, STAGES, STEPS, Finished, demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def rows_of(installation, phase: str) -> list[dict]:
    """The metrics of a phase, its checkpoints one after another."""
    found = sorted((installation.store / RUN / "checkpoints" / phase).glob("*/*/metrics.jsonl"))
    return [json.loads(line) for path in found for line in path.read_text().splitlines()]


def test_the_kill_came_in_the_middle_of_pretraining(killed):
    assert killed.checkpoints == [f"{FIRST:012d}"]
    assert [name for name, state in killed.stages.items() if state == "COMPLETED"] == [
        "ingest",
        "towers",
        "caption",
        "encode",
    ]
    latents = {name.split("/")[3] for name in killed.data if name.split("/")[2] == "latents"}
    assert len(latents) == 1  # of pretraining alone


def test_the_same_command_goes_on(installation, resumed):
    assert resumed.states == dict.fromkeys(STAGES[:4], "skipped") | dict.fromkeys(STAGES[4:], "done")
    assert resumed.reasons["pretrain"] == f"went on from {FIRST:,} samples"


def test_no_run_stays_running_for_ever(installation, killed, resumed):
    state = installation.api("flow_runs/filter", flow_runs={"id": {"any_": [killed.flow_run_id]}})[0]["state_type"]
    assert state in ("CRASHED", "FAILED")
    assert not installation.running()


@pytest.mark.parametrize("listing", ["deployment", "flow-run", "work-pool"])
def test_prefects_own_commands_list_what_is_there(installation, resumed, listing):
    installation.enter()
    assert installation.command("prefect", "--no-prompt", listing, "ls", seconds=60).strip()


def test_finished_shards_and_towers_are_not_redone(killed, resumed):
    assert {name: resumed.files.get(name) for name in killed.data} == killed.data
    added = {name for name in resumed.files if name.startswith(DATA)} - killed.data.keys()
    assert {name.split("/")[2] for name in added} == {"latents"}  # that fine-tuning takes


def test_every_step_was_trained_once(installation, resumed):
    rows = rows_of(installation, "pretrain")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["samples"] for row in rows] == [BATCH * step for step in range(1, STEPS + 1)]
    assert all(row["loss"] > 0 for row in rows)
    done = [
        json.loads(path.read_text())
        for path in sorted((installation.store / RUN / "checkpoints/pretrain").glob("*/*/DONE.json"))
    ]
    assert [(record["samples"], record["attempt"]) for record in done] == [(FIRST, 1), (LAST, 2)]


def test_the_summary_says_what_was_done(installation, resumed):
    assert [stage["name"] for stage in resumed.summary["stages"]] == STAGES
    for stage in resumed.summary["stages"]:
        assert {"name", "manifest", "digest", "seconds", "state", "reason"} <= stage.keys()
        assert Path(urlsplit(stage["manifest"]).path).is_file()
        assert stage["digest"] and stage["seconds"] >= 0
    assert all(
        {"checkpoint", "weights", "protocol", "metric", "value"} <= score.keys() for score in resumed.summary["scores"]
    )


def test_every_checkpoint_is_scored_with_live_and_ema_weights(resumed):
    scored = {(score["phase"], score["samples"], score["weights"]) for score in resumed.summary["scores"]}
    assert scored == {
        (phase, samples, weights)
        for phase, samples in (("pretrain", FIRST), ("pretrain", LAST), ("finetune.0", 32))
        for weights in ("ema", "live")
    }
    last = {score["metric"] for score in resumed.summary["scores"] if score["phase"] == "finetune.0"}
    assert {"validation_loss", "clip_score", "shapes_bench/overall"} <= last
    assert [
        row for row in resumed.summary["left_out"] if row["metric"] == "clip_fid" and row["reason"]
    ]  # 8 pictures are too few
    assert all(row["reason"] for row in resumed.summary["left_out"])


def test_every_checkpoint_draws_training_captions_beside_held_out_ones(resumed):
    compared = [picture for picture in resumed.summary["pictures"] if picture["name"] == "captions"]
    assert [(picture["phase"], picture["samples"]) for picture in compared] == [
        ("pretrain", FIRST), ("pretrain", LAST), ("finetune.0", 32)
    ]  # fmt: skip
    assert {picture["weights"] for picture in compared} == {"ema"}


def test_the_terminal_ends_with_scores_pictures_ui_and_a_command(installation, resumed, tmp_path):
    said = dict(
        line.split(maxsplit=1)
        for line in resumed.printed.splitlines()
        if line.startswith(("UI ", "export ", "summary ", "pictures ", "sample "))
    )
    [columns] = [line for line in resumed.printed.splitlines() if line.startswith("task ")]
    assert {"right", "seen combinations", "unseen", "chance"} < {*re.split(r"  +", columns.strip())}
    assert Path(said["summary"]) == installation.store / RUN / "summary.json"
    assert Path(said["pictures"].partition("  ")[0]).is_file()
    assert Path(said["export"], "model_index.json").is_file()
    address, password = said["UI"].split("  ")
    assert address == f"http://127.0.0.1:{installation.services['port']}"
    assert password == "(password: .venv/bin/sd3 ui)"  # the way to it: it must not stand in a log
    command = [*shlex.split(said["sample"]), "--out", str(tmp_path), "--steps", "2"]
    installation.command(*command, seconds=180)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}


def test_the_export_opens_with_diffusers(resumed):
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(urlsplit(resumed.summary["export"]).path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    negative = torch.zeros(1, 32, config.joint_attention_dim)
    picture = pipeline(
        prompt="a red circle",
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=torch.zeros(1, config.pooled_projection_dim),
        max_sequence_length=16,
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.size == (64, 64)
    assert len(set(picture.getdata())) > 1


@pytest.fixture(scope="module")
def repeated(installation, resumed) -> Finished:
    return demo(installation, OVERRIDES)


def test_a_finished_pipeline_ends_at_once_and_changes_nothing(resumed, repeated):
    assert repeated.states == dict.fromkeys(STAGES, "skipped")
    assert repeated.seconds < 60
    written = {name for name in repeated.files if repeated.files[name] != resumed.files.get(name)}
    assert written <= {f"{RUN}/summary.json"}
    assert repeated.files.keys() == resumed.files.keys()
    assert repeated.summary["scores"] == resumed.summary["scores"]


@pytest.fixture(scope="module")
def changed(installation, repeated) -> Finished:
    """Fewer text positions for the T5, and no more training than it takes to see that there was some."""
    short = ("pretrain.samples=32", "pretrain.checkpoint_every_samples=32")
    return demo(installation, (*OVERRIDES, *FEW_SCORES, *short, "text.t5_tokens=12", "compute.train_ranks=1"))


def test_a_changed_field_redoes_what_depends_on_it_and_says_why(repeated, changed):
    assert changed.states == dict.fromkeys(STAGES[:3], "skipped") | dict.fromkeys(STAGES[3:], "done")
    assert "text.t5_tokens: 16 -> 12" in changed.reasons["encode"]
    assert "text changed" in changed.reasons["pretrain"]
    assert "its starting checkpoint changed" in changed.reasons["finetune"]
    untouched = {
        name: state
        for name, state in repeated.files.items()
        if name.startswith((*DATA, f"{RUN}/checkpoints/", f"{RUN}/export/"))
    }
    assert {name: changed.files.get(name) for name in untouched} == untouched
    added = {name for name in changed.files if name.startswith(DATA) and name not in repeated.files}
    assert {name.split("/")[2] for name in added} == {"text"}  # latents serve as they are


def test_a_killed_flow_leaves_no_process(killed, repeated):
    assert not killed.left
    assert not [agent for agent in killed.agents if agent.is_running()]  # minutes later
