"""Prefect's UI in a real browser, on the pages of a real run: stages, progress, warnings, tables, pictures."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BATCH, FIRST, LAST, OVERRIDES, RUN, SLOW_STEPS, STAGES, Finished
from installation import RUN_ID, Installation
from playwright.sync_api import Locator, Page, expect, sync_playwright

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PAGE_MS = 30_000  # on busy cores the UI's scripts take their time
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory, installation) -> Iterator[Page]:
    """Of a browser whose user has typed the password in, as `sd3 ui` shows it."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "chromium is not installed (Debian: apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("SD3_REQUIRE_BROWSER") == "1" else pytest.skip(missing)
    expect.set_options(timeout=PAGE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=chromium,
            args=FLAGS,
            viewport={"width": 1200, "height": 900},
            reduced_motion="reduce",
        )
        browser.set_default_timeout(PAGE_MS)
        opened = browser.new_page()
        opened.goto(f"{installation.ui}/runs")
        asked = opened.locator("input[type=password]")
        asked.fill(
            re.search(r"^password: (\S+)$", installation.command("sd3", "ui", seconds=60), re.MULTILINE).group(1)
        )
        asked.press("Enter")
        expect(asked).to_have_count(0)
        yield opened
        browser.close()


@pytest.fixture(scope="module")
def run_id(resumed: Finished) -> str:
    return RUN_ID.search(resumed.printed).group(0)


@pytest.fixture(scope="module")
def stage_runs(installation: Installation, run_id: str) -> dict[str, str]:
    return installation.stage_runs(run_id)


def open_run(page: Page, installation: Installation, flow_run_id: str, tab: str) -> Locator:
    """The content of one tab of a run's page."""
    page.goto(f"{installation.ui}/runs/flow-run/{flow_run_id}")
    return open_tab(page, tab)


def open_tab(page: Page, tab: str) -> Locator:
    page.get_by_role("tablist").get_by_text(tab, exact=True).click()
    return page.get_by_role("tabpanel", name=tab)


def open_artifact(page: Page, installation: Installation, flow_run_id: str, key: str) -> Locator:
    """What an artifact shows below its description."""
    page.goto(f"{installation.ui}/artifacts/artifact/{installation.artifact(flow_run_id, key)['id']}")
    return page.get_by_role("tabpanel", name="Artifact").get_by_role("article")


def expect_pictures(shown: Locator) -> None:
    """At least one, and all of them drawn."""
    expect(shown.get_by_role("img").first).to_be_visible()
    for picture in shown.get_by_role("img").all():
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_a_stage_at_work_shows_its_progress(killed):
    """Read from the server while pretraining worked, just before its process was killed."""
    assert re.match(
        rf"\d+/{LAST} samples, [\d.,]+ samples/s, \d.* left, .*\bloss \d\.\d+", killed.shown["pretrain-progress"]
    )
    assert killed.shown["encode-progress"].startswith("192/192 rows")  # text, and latents of pretraining


@pytest.mark.kills
def test_the_pages_of_a_stage_at_work(installation, page, resumed):
    """A run of its own, looked at while it trains, then cancelled as the UI's button does."""
    run = installation.start("pipeline/tiny-test", [*OVERRIDES, SLOW_STEPS, "run=watched", "pretrain.samples=160000"])
    try:
        stage = installation.wait("pretraining", lambda: installation.stage_runs(run).get("pretrain"), seconds=120)
        artifacts = open_run(page, installation, stage, "Artifacts").get_by_role("link")
        done = re.compile(r"\d+/160000 samples, [\d.,]+ samples/s, .* left, .*loss \d")
        expect(artifacts.filter(has_text="pretrain-progress").filter(has_text=done)).to_be_visible(timeout=4 * PAGE_MS)
        expect(artifacts.filter(has_text="pretrain-loss")).to_be_visible(timeout=4 * PAGE_MS)
        expect_pictures(open_artifact(page, installation, stage, "pretrain-loss"))
        runs = open_run(page, installation, run, "Subflow Runs")
        expect(runs.get_by_text("Running", exact=True)).to_have_count(1)
    finally:
        installation.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
        installation.wait("its processes to end", installation.only_services_run, seconds=60)
        installation.command("sd3", "up", seconds=120)  # tells the server what became of the stage's run


def test_the_run_lists_its_stages_by_name_with_their_states(installation, page, run_id, stage_runs):
    runs = open_run(page, installation, run_id, "Subflow Runs")
    expect(page.get_by_role("banner").get_by_text("pipeline tiny-test")).to_be_visible()
    for stage in STAGES:
        expect(runs.get_by_role("link", name=f"{stage} tiny-test")).to_be_visible()
    expect(runs.get_by_text("Completed", exact=True)).to_have_count(len(STAGES))
    assert sorted(stage_runs) == sorted(STAGES)


def test_the_page_of_a_stage_says_what_it_did(installation, page, stage_runs):
    log = open_run(page, installation, stage_runs["pretrain"], "Logs")
    expect(log.get_by_text(re.compile(rf"pretrain done in .* s: went on from {FIRST:,} samples"))).to_be_visible()
    artifacts = open_tab(page, "Artifacts").get_by_role("link")
    for key, described in {
        "progress": f"{LAST}/{LAST} samples, ",
        "loss": f"after {LAST:,} samples",
        "pictures": ".png",
        "result": "pretrain: done",
    }.items():
        expect(artifacts.filter(has_text=f"pretrain-{key}").filter(has_text=described)).to_be_visible()


def test_warnings_stand_in_the_log_of_their_stage(installation, page, stage_runs):
    log = open_run(page, installation, stage_runs["evaluate"], "Logs")
    expect(log.get_by_text("clip_fid is left out").first).to_be_visible()
    expect(log.get_by_text("Warning", exact=True).first).to_be_visible()


@pytest.mark.parametrize("stage", ["ingest", "towers"])
def test_the_first_stages_end_with_a_table_and_pictures(installation, page, killed, stage):
    shown = open_artifact(page, installation, installation.stage_runs(killed.flow_run_id)[stage], f"{stage}-result")
    expect(shown.get_by_role("columnheader", name="MB")).to_be_visible()
    expect_pictures(shown)


def test_pretraining_ends_with_its_checkpoints_and_curve(installation, page, stage_runs):
    shown = open_artifact(page, installation, stage_runs["pretrain"], "pretrain-result")
    for samples in (FIRST, LAST):
        expect(shown.get_by_role("cell", name=f"{samples:,}", exact=True)).to_be_visible()
    expect_pictures(shown)


def test_the_loss_curve_is_a_picture_of_the_whole_phase_and_was_refreshed(installation, page, stage_runs):
    shown = open_artifact(page, installation, stage_runs["pretrain"], "pretrain-loss")
    expect(shown.get_by_role("heading", name=re.compile(rf"pretrain: loss .* after {LAST:,} samples"))).to_be_visible()
    expect_pictures(shown)
    artifact = installation.artifact(stage_runs["pretrain"], "pretrain-loss")
    assert artifact["created"] < artifact["updated"]


def test_pictures_of_the_training_with_their_captions_and_path(installation, page, stage_runs):
    shown = open_artifact(page, installation, stage_runs["pretrain"], "pretrain-pictures")
    expect(shown.get_by_role("heading", name=f"pretrain: pictures after {LAST:,} samples")).to_be_visible()
    expect_pictures(shown)
    expect(shown.get_by_role("listitem")).to_have_count(8)
    path = page.get_by_role("article").first.inner_text()
    assert path.startswith(f"{installation.store}/{RUN}/previews/pretrain-") and Path(path).is_file()


def test_the_first_pictures_came_long_before_the_end(installation, killed, resumed):
    """After 64 of 200 steps: the process was killed after a hundred."""
    folder = next((installation.store / RUN / "previews").glob(f"pretrain-*/{LAST:012d}.safetensors")).parent
    drawn = sorted(path.stem for path in folder.glob("*.safetensors"))
    assert drawn[0] == f"{64 * BATCH:012d}"


def test_evaluation_shows_scores_and_pictures(installation, page, resumed, stage_runs):
    shown = open_artifact(page, installation, stage_runs["evaluate"], "evaluate-result")
    for metric in ("validation_loss", "clip_score", "shapes_bench/overall", "seen combinations", "unseen", "chance"):
        expect(shown.get_by_role("columnheader", name=metric)).to_be_visible()
    score = next(row["value"] for row in resumed.summary["scores"] if row["metric"] == "validation_loss")
    expect(shown.get_by_role("cell", name=f"{score:.3f}").first).to_be_visible()
    expect_pictures(shown)


def test_the_terminal_named_the_first_picture_once(resumed):
    [said] = [line for line in resumed.printed.splitlines() if line.startswith("first pictures: ")]
    assert Path(said.removeprefix("first pictures: ")).is_file()


def test_the_terminal_prints_nothing_of_libraries(resumed):
    noise = re.compile(r"warn|traceback|deprecat|\bpid=|\.py:\d+|^\s*File ", re.IGNORECASE)
    assert not [line for line in resumed.printed.splitlines() if noise.search(line)]
