"""What `sd3 plan` says of real images that nobody has ingested: rows, reasons, sizes, captions, hours and money."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from source_files import parquet_of, tar_of
from typer.testing import CliRunner

from flows.cli.commands import app
from flows.cli.plan_rates import GivenRates
from flows.cli.plan_source import ingested_rows, planned_rows
from sd3core.costs.stages import stage_costs
from sd3core.data.manifest import Manifest, commit_manifest
from sd3core.data.source_look import UNITS_SAMPLED, look_at_source
from sd3core.data.store import open_store
from sd3core.errors import UserError
from sd3core.recipe_file import load_recipe
from sd3core.recipe_filter import Filter
from sd3core.specs import keep_folder, raw_folder


def jpeg(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(sink, "JPEG")
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Thirty images of use, two that are none, one without a caption, one too small."""
    made = tmp_path / "pictures"
    made.mkdir()
    for n in range(30):
        (made / f"{n}.jpg").write_bytes(jpeg(200, 100) if n % 3 == 0 else jpeg(80, 80))
        (made / f"{n}.txt").write_text("a thing of five words")
    for name in ("broken", "empty"):
        (made / f"{name}.jpg").write_bytes(b"" if name == "empty" else b"no image")
        (made / f"{name}.txt").write_text("words")
    (made / "bare.jpg").write_bytes(jpeg(80, 80))
    (made / "tiny.jpg").write_bytes(jpeg(20, 20))
    (made / "tiny.txt").write_text("words")
    return made


def plan(*arguments: str) -> str:
    printed = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert printed.exit_code == 0
    return printed.output


def test_a_folder_is_looked_at_and_nothing_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    said = plan("--recipe", "tiny-test", "--data", str(folder), "--set", "finetune.0.min_scale=1")
    assert "source: 34 rows, 30 of use (all 34 of them read)" in said
    assert said.count("left out, 2.9% of the rows") == 4 and "no caption" in said and "data.min_side_px" in said
    assert "captions: 1.00 an image, 5 / 5 / 5 words; 0.0% of the images have none" in said
    taken = re.search(r"^finetune.0 +(.+?) +(\d+) +([\d.]+)%$", said, re.MULTILINE)
    assert taken and (int(taken[2]), float(taken[3])) == (30, 0.0)
    assert re.search(r"^text, 1 caption\(s\) an image +[\d.]+ +30 ", said, re.MULTILINE)
    assert re.search(r"^pretrain +about 24 ", said, re.MULTILINE)  # a fifth is held out
    assert not list((tmp_path / "home").rglob("*.tar"))
    larger = plan("--recipe", "tiny-test", "--data", str(folder), "--set", "finetune.0.side_px=96")
    assert re.search(r"^finetune.0 .* 30 +0.0%$", larger, re.MULTILINE)
    strict = [f"--set=finetune.0.{field}" for field in ("side_px=96", "min_scale=1")]
    assert re.search(
        r"^finetune.0 .* 10 +66.7%$", plan("--recipe", "tiny-test", f"--data={folder}", *strict), re.MULTILINE
    )


def test_of_many_tars_a_few_are_read_and_the_rest_is_estimated(tmp_path):
    store = open_store(str(tmp_path))
    for number in range(4 * UNITS_SAMPLED):
        rows = [((f"{n}.jpg", jpeg(64, 64) if n else b"none"), (f"{n}.txt", b"two words")) for n in range(20)]
        store.put(f"in/{number:05d}.tar", tar_of(member for row in rows for member in row))
    recipe = load_recipe("tiny-test", ["data.source=webdataset", f"data.urls={tmp_path}/in/", "caption.captioner=none"])
    look = look_at_source(recipe.data, captions_needed=True)
    assert look.files == 4 * UNITS_SAMPLED and look.is_estimate and look.looked == 20 * UNITS_SAMPLED
    assert (
        abs(look.rows - 80 * UNITS_SAMPLED) <= 4 * UNITS_SAMPLED
        and abs(look.taken - 76 * UNITS_SAMPLED) <= 4 * UNITS_SAMPLED
    )
    assert sum(look.left_out.values()) == UNITS_SAMPLED and set(look.words) == {2}
    few = look_at_source(recipe.data, captions_needed=True, rows=25)
    assert few.looked == 25 and abs(few.rows - 80 * UNITS_SAMPLED) <= 24 * UNITS_SAMPLED


@pytest.mark.parametrize("groups", [1, 3])
def test_of_a_parquet_whose_groups_are_not_read_whole_rows_are_estimated_all_the_same(groups, tmp_path):
    store, image = open_store(str(tmp_path)), jpeg(64, 64)
    for number in range(2):
        rows = [{"image": image + bytes([n % 256]), "caption": f"number {n}"} for n in range(600)]
        store.put(f"in/{number}.parquet", parquet_of(rows, group=600 // groups))
    recipe = load_recipe("tiny-test", ["data.source=parquet", f"data.urls={tmp_path}/in/", "caption.captioner=none"])
    look = look_at_source(recipe.data, captions_needed=True, rows=50)
    assert look.looked == 50 and abs(look.rows - 1_200) <= 24 and look.taken == look.rows


def test_a_source_that_is_not_there_is_said_and_the_rest_is_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    away = ["data.source=folder", f"data.folder={tmp_path}/away", "caption.captioner=none"]
    said = plan("--recipe", "tiny-test", *(f"--set={one}" for one in away))
    assert "the source was not looked at: data.folder" in said and "as the source has" in said


def test_hours_follow_given_rates_and_money_follows_gpu_hours():
    recipe = load_recipe("sd3-2b")
    assumed, given = stage_costs(recipe), GivenRates.read(None, 2.0, ["text=100", "pretrain=10"])
    costs = {cost.name: cost for cost in given.applied(assumed)}
    assert costs["text"].hours == pytest.approx(2e6 / (100 * costs["text"].devices) / 3600)
    assert costs["pretrain"].hours == pytest.approx(2_048_000_000 / (10 * 64) / 3600)
    assert given.price(costs["pretrain"]) == f"{2_048_000_000 / 10 / 3600 * 2:,.2f}"
    assert given.price(costs["caption"]) == "not known"
    faster = {cost.name: cost.hours for cost in stage_costs(recipe, gpu_tflops=800.0)}
    assert faster["pretrain"] == pytest.approx({c.name: c.hours for c in assumed}["pretrain"] / 2)
    with pytest.raises(UserError, match="--rate txt: no part of this plan; take one of caption, text"):
        GivenRates.read(None, None, ["txt=3"]).applied(assumed)
    for wrong in ("text", "text=", "text=0", "text=nan", "=3", "text=-1"):
        with pytest.raises(UserError, match="give NAME=ROWS_A_SECOND"):
            GivenRates.read(None, None, [wrong])


def test_a_table_is_looked_at_by_its_rows(folder, tmp_path):
    rows = [f"{n}.jpg,words of {n}" for n in range(30)] + ["0.jpg,other words", "gone.jpg,x", ",x"]
    (tmp_path / "t.csv").write_text("\n".join(["path,text", *rows]))
    settings = ["data.source=table", f"data.table={tmp_path}/t.csv", f"data.folder={folder}", "caption.captioner=none"]
    look = look_at_source(load_recipe("tiny-test", settings).data, captions_needed=True)
    assert (look.rows, look.looked, look.taken, look.is_estimate) == (33, 33, 30, False)
    assert sum(map(len, look.captions)) == 31 and sum(look.left_out.values()) == 2


def test_class_folders_a_table_and_a_mask_as_the_readme_shows_them(tmp_path, monkeypatch):
    """The commands of sd3core/data/image_files/README.md, one after the other; every line shown is printed."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[3] / "sd3core/data/image_files/README.md").read_text()
    lines = re.search(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ").splitlines()
    said, compared = "", 0
    for line in lines:
        if not line.startswith("$ "):
            assert line.strip() in said
            compared += 1
        elif line.startswith("$ .venv/bin/sd3 "):
            words = shlex.split(os.path.expandvars(line.removeprefix("$ .venv/bin/sd3 ")))
            printed = CliRunner().invoke(app, words, catch_exceptions=False)
            assert printed.exit_code == 0
            said = printed.output
        else:
            subprocess.run(line.removeprefix("$ "), shell=True, check=True)
    assert compared == 9


def test_what_a_filter_left_out_is_not_planned_for(tmp_path):
    store = open_store(str(tmp_path))
    recipe = load_recipe("tiny-test", ["data.source=folder", f"data.folder={tmp_path}", "caption.captioner=none"])
    filtered = recipe.model_copy(update={"filter": Filter(min_side_px=64)})
    shard = {"number": 0, "stem": "00000.0123456789ab", "bytes": 1, "digest": "0" * 64}

    def commit(stage: str, folder: str, inputs: dict[str, str], rows: int) -> str:
        made = {"stage": stage, "spec": "0", "fields": {}, "inputs": inputs, "folder": folder}
        return commit_manifest(store, folder, Manifest(**made, shards=[shard | {"rows": rows}])).digest

    raw = commit("raw", raw_folder(recipe), {}, 100)
    assert planned_rows(filtered, ingested_rows(filtered, store), None).images == 100  # it has not ended
    commit("keep", keep_folder(filtered), {"raw": raw}, 60)
    assert planned_rows(filtered, ingested_rows(filtered, store), None).images == 60
    assert planned_rows(recipe, ingested_rows(recipe, store), None).images == 100
