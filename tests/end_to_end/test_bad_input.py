"""What a user can get wrong, through the real services: one line each, exit code 1, and the next command works."""

from __future__ import annotations

import pytest
from conftest import ended
from installation import demo_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_misspelt_deployment(installation):
    installation.enter()
    code, printed = installation.ends("prefect", "--no-prompt", "deployment", "run", "pretrain/tiny-tset")
    assert (code, printed.strip()) == (1, "Deployment 'pretrain/tiny-tset' not found!")


def test_a_misspelt_key_of_a_run_is_its_message(installation):
    run = installation.start("pretrain/tiny-test", ["pretrain.sampels=3"])
    installation.wait("the run to fail", lambda: ended(installation, run), seconds=120)
    state = installation.api("flow_runs/filter", flow_runs={"id": {"any_": [run]}})[0]["state"]
    assert state["type"] == "FAILED"
    assert state["message"].endswith("recipe tiny-test: unknown key pretrain.sampels; did you mean 'samples'?")


def test_an_empty_folder(installation, tmp_path):
    code, printed = installation.ends(*demo_command(), "--data", str(tmp_path))
    assert code == 1
    assert printed.startswith(f"sd3: DATA (--data) {tmp_path}: no image file in it (.avif ")
    assert printed.count("\n") == 1  # told before anything is started
    assert "Traceback" not in printed


def test_a_folder_whose_only_image_cannot_be_used(installation, tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_text("a red circle")
    code, printed = installation.ends(*demo_command(), "--data", str(tmp_path))
    assert code == 1
    assert printed.splitlines()[-1] == (
        f"sd3: ingest: data.folder {tmp_path}: no usable image (1 rejected: empty file); name another folder, or mend that"
        " (the same command goes on from there)"
    )
    assert "Traceback" not in printed


def test_a_store_that_cannot_be_reached(installation):
    """Told before a run is started."""
    code, printed = installation.ends(*demo_command("store=s3://bucket/x"))
    endpoint = installation.environment["AWS_ENDPOINT_URL"]
    assert code == 1 and printed.count("\n") == 1
    assert printed.startswith(f"sd3: s3://bucket/x: cannot be reached at {endpoint}; mend AWS_ENDPOINT_URL, or start")
