"""Ctrl-C in the terminal, as a terminal sends it: to the command and everything in its foreground."""

from __future__ import annotations

import re

import pytest
from conftest import DATA, FIRST, OVERRIDES, SLOW_STEPS, STAGES
from installation import FileState, Installation, demo_command, finished_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CANCELLED = (
    "sd3: the run is cancelled and its processes have ended; the same command goes on from there,"
    " `.venv/bin/sd3 down` stops the services"
)
SETTLES_SECONDS = 20  # Prefect's worker looks after a cancelled run with a process of its own


def states(installation: Installation, run: str) -> set[str]:
    """Of the pipeline's run and its stages."""
    found = installation.api("flow_runs/filter", flow_runs={"id": {"any_": [run]}})
    return {found[0]["state_type"], *installation.stages_of(run).values()}


@pytest.mark.parametrize("moment", ["$ prefect", "ingest: running"])
def test_before_and_in_the_first_stage(installation, moment):
    code, printed = installation.interrupted(demo_command("run=early", "data.name=early", "towers.name=early"), moment)
    assert (code, printed.splitlines()[-1]) == (130, CANCELLED), printed
    assert "Traceback" not in printed
    installation.wait("its processes to end", installation.only_services_run, SETTLES_SECONDS)
    assert not installation.running()


@pytest.mark.kills
def test_in_every_stage_that_takes_time(installation):
    """One run, stopped as each stage begins: what was finished stays as it is, and the same command brings it to its end."""
    command = demo_command("run=stages", "data.name=stages", "towers.name=stages", *OVERRIDES, SLOW_STEPS)
    kept: dict[str, FileState] = {}
    for stage in STAGES[:-1]:
        code, printed = installation.interrupted(command, f"{stage}: running")
        assert (code, printed.splitlines()[-1]) == (130, CANCELLED), printed
        assert "Traceback" not in printed
        installation.wait("its processes to end", installation.only_services_run, SETTLES_SECONDS)
        assert not installation.running()
        now = finished_files(installation.store)
        assert {name: now.get(name) for name in kept} == kept
        kept = now
    printed = installation.command(*command, seconds=420)
    assert set(re.findall(r"^(\w+) +(?:done|skipped) ", printed, re.MULTILINE)) == {*STAGES}
    now = finished_files(installation.store)
    assert {name: now.get(name) for name in kept} == kept


@pytest.mark.kills
def test_while_training_pressed_twice(installation, resumed):
    """Data and towers are those of the run before; its own first checkpoint stays."""
    before = installation.files(*DATA)
    checkpoints = installation.store / "runs/training/checkpoints/pretrain"
    code, printed = installation.interrupted(
        demo_command("run=training", *OVERRIDES, SLOW_STEPS),
        lambda: list(checkpoints.glob(f"*/{FIRST:012d}/DONE.json")),
        times=2,
    )
    assert (code, printed.splitlines()[-1]) == (130, CANCELLED), printed
    assert "Traceback" not in printed
    installation.wait("its processes to end", installation.only_services_run, SETTLES_SECONDS)
    assert states(installation, installation.run_id(printed)) == {"COMPLETED", "CANCELLED"}
    assert installation.files(*DATA) == before
    assert [path.parent.name for path in checkpoints.glob("*/*/DONE.json")] == [f"{FIRST:012d}"]


@pytest.mark.kills
def test_a_run_that_was_joined_goes_on(installation):
    """It was started elsewhere: here it only came into view."""
    run = installation.start("pipeline/tiny-test", ["run=joined", *OVERRIDES, SLOW_STEPS])
    code, printed = installation.interrupted(demo_command("run=joined", *OVERRIDES, SLOW_STEPS), "ingest: ")
    assert (code, printed.splitlines()[-1]) == (
        130,
        "sd3: the run goes on; the same command shows it again, `.venv/bin/sd3 down` ends it",
    ), printed
    assert run in printed and installation.running()
    installation.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})  # as the UI's Cancel does
    installation.wait("its processes to end", installation.only_services_run, 60)
    installation.command("sd3", "up", seconds=120)
    assert not installation.running()
