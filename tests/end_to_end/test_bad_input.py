"""What a user can get wrong, through the real services: one line each, exit code 1, and the next command works."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import ended
from installation import demo_command
from PIL import Image

from sd3core.small_world.scenes import draw_scene, render

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


@pytest.mark.kills
def test_the_rest_of_a_folder_goes_on_to_the_end(installation, tmp_path):
    """Own images, some of which cannot be used, from the command to a picture from what was trained on them."""
    folder = tmp_path / "own images"
    (folder / "more").mkdir(parents=True)
    captions = {f"{index}.{kind}": f"picture {index}" for index, kind in enumerate(("jpg", "png", "webp", "bmp") * 10)}
    captions |= {"0.jpg": "ein roter Kreis \U0001f534\0, " + 2_000 * "wort ", "more/39.bmp": captions.pop("39.bmp")}
    for index, name in enumerate(captions):
        picture = render(draw_scene(5, index, side_px=96, aspect=(1.0, 4 / 3)[index % 2]))
        Image.fromarray(picture).save(folder / name)
    bad = {"empty.jpg": b"", "text.png": b"no image", "half.webp": (folder / "2.webp").read_bytes()[:200]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    first.save(folder / "moving.gif", save_all=True, append_images=[second])
    first.save(folder / "untold.jpg")
    for name in (*captions, *bad, "moving.gif"):
        (folder / name).with_suffix(".txt").write_text(captions.get(name, "a red square"))

    short = ("pretrain.samples=32", "pretrain.checkpoint_every_samples=32", "compute.actors=1")
    printed = installation.command(*demo_command(*short), "--data", str(folder), seconds=420)

    told = [
        line.removeprefix("warning: ingest: ") for line in printed.splitlines() if line.startswith("warning: ingest: ")
    ]
    endings = ("half.webp", "empty.jpg", "text.png", "moving.gif", "untold.jpg", "0.jpg")
    assert len(told) == len(endings) and all(any(line.endswith(name) for line in told) for name in endings), printed
    assert re.search(r"^ingest +done .* 40 of 45 images used", printed, re.MULTILINE), printed
    [command] = [line.removeprefix("sample") for line in printed.splitlines() if line.startswith("sample ")]
    installation.command(*shlex.split(command), "--out", str(tmp_path / "drawn"), "--steps", "2", seconds=180)
    assert list((tmp_path / "drawn").glob("*.png"))


def test_a_store_that_cannot_be_reached(installation):
    """Told before a run is started."""
    code, printed = installation.ends(*demo_command("store=s3://bucket/x"))
    endpoint = installation.environment["AWS_ENDPOINT_URL"]
    assert code == 1 and printed.count("\n") == 1
    assert printed.startswith(f"sd3: s3://bucket/x: cannot be reached at {endpoint}; mend AWS_ENDPOINT_URL, or start")
