"""File names, captions and recipe keys that would write to the terminal or into a page: from a folder on disk to what is shown."""

from __future__ import annotations

import io
import json
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

from flows import stage
from flows.cli.console import PlainConsole
from flows.ui import artifacts
from flows.ui.artifacts import StageReporter
from flows.ui.previews import _markdown
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.ingest_folder import FolderWorker
from sd3core.exchange.export_readme import readme
from sd3core.pictures import encode_png, read_settings
from sd3core.progress import Progress
from sd3core.recipe_file import load_recipe

NAMES = [
    b"a\x1b[31m\x1b]0;title\x07.jpg",
    b"b\n| x | y |\n# heading.jpg",
    b"![](http:__127.0.0.1_x.png) <script>`x`.jpg",
    "\u202egpj.exe.jpg".encode(),
    b"\xff\x9b2J.jpg",
    "c\u2028[bold red]:smile:[red].jpg".encode(),
]
HOSTILE = "\x1b\x07\x9b\u202e\u2028\x85"


@pytest.fixture
def rejected(tmp_path):
    """What ingest says of a folder of such names: the reject's own words, as they are stored."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes(b"not an image")
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    (folder / "good.txt").write_text("a \x1b[2Jcaption |\u202e")
    recipe = load_recipe(
        "tiny-test", ["data.source=folder", f"data.folder={folder}", "caption.captioner=none", "data.min_side_px=32"]
    )
    worker = FolderWorker(recipe.data, str(tmp_path / "store"), "raw", captions_needed=True)
    rows = [row for part in ListedFolder(recipe.data).slices() for row in worker(part).record.failed]
    assert len(rows) == len(NAMES)
    return [f"1 row left out: {row.reason}: {row.key}" for row in rows]


def is_shown(text: str) -> bool:
    return not set(text) & set(HOSTILE) and bool(text.encode())


def test_the_terminal_shows_them_in_one_line(rejected):
    screen = io.StringIO()
    console = PlainConsole(file=screen, force_terminal=True, width=500, color_system=None)
    for warning in rejected:
        console.print(f"warning: {warning}", soft_wrap=True)
    table = Table(box=None)
    table.add_column("why")
    for warning in rejected:
        table.add_row(warning)
    console.print(table)
    assert is_shown(screen.getvalue())
    assert len(screen.getvalue().splitlines()) == 2 * len(rejected) + 1
    assert screen.getvalue().count("[bold red]:smile:[red]") == 2 and "\\x1b[31m" in screen.getvalue()


def test_an_error_shows_them_in_one_line(sd3, tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    for name in NAMES:
        code, out, err = sd3("import", os.fsdecode(name), "out")
        assert (code, out) == (1, "") and is_shown(err) and err.count("\n") == 1
        code, _, err = sd3("plan", "-s", f"{os.fsdecode(name)}=1")
        assert code == 1 and is_shown(err) and err.count("\n") == 1
    (tmp_path / "r.yaml").write_text('"\\e[2J\\u202e": 1\nname: "\\e[2J"\n')
    assert is_shown(sd3("plan", "-r", str(tmp_path / "r.yaml"))[2])


def test_logs_and_the_progress_artifact_show_them(rejected, caplog):
    log = logging.getLogger("hostile")
    reporter = StageReporter("ingest", "00000000-0000-0000-0000-000000000000", log)
    with caplog.at_level(logging.WARNING):
        for warning in rejected:
            reporter.warn(warning)
            reporter(Progress(1, 2, "rows", note=warning, warning=warning))
    assert len(caplog.messages) == 2 * len(rejected) and all(map(is_shown, caplog.messages))
    assert all("\n" not in message for message in caplog.messages)
    _, described = reporter._progress()
    assert (
        is_shown(described)
        and described.split("\n") == described.splitlines()
        and len(described.splitlines()) == 1 + len(rejected)
    )


def test_pages_show_them_as_text(rejected, monkeypatch):
    """Rendered by an independent reader: as many cells, items and pictures as were meant, and nothing that they made."""
    from markdown_it import MarkdownIt

    made = {}
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda **fields: made.update(fields))
    table = [{"key": name, "synthetic caption": name} for name in rejected]
    artifacts.publish("caption", rejected[0], [table], rejected, {rejected[1]: b"\x89PNG"})
    assert is_shown(made["markdown"]) and is_shown(made["description"]) and "\n" not in made["description"]
    html = MarkdownIt("gfm-like", {"linkify": False}).render(made["markdown"])
    assert (html.count("<td>"), html.count("<li>"), html.count("<img")) == (2 * len(rejected), len(rejected), 1)
    assert html.count("<h2>") == 1 and "<h1" not in html and "<script" not in html and "<a " not in html
    preview = _markdown(
        np.zeros((4, 4, 3), np.uint8),
        [("training captions", rejected), ("held-out captions", rejected)],
        {"phase": "pretrain", "samples": 1, "weights": "ema", "num_steps": 1, "guidance_scale": 1.0},
        rejected[0],
    )
    html = MarkdownIt("gfm-like", {"linkify": False}).render(preview)
    assert (
        is_shown(preview)
        and (html.count("<li>"), html.count("<img")) == (2 * len(rejected), 1)
        and "<script" not in html
    )


def test_png_text_and_readmes_show_them(rejected):
    png = encode_png(
        np.zeros((4, 4, 3), np.uint8), {"prompt": rejected[0], "prompts": json.dumps(rejected, ensure_ascii=False)}
    )
    assert all(map(is_shown, read_settings(png).values()))
    assert json.loads(read_settings(png)["prompts"]) == rejected
    facts = SimpleNamespace(text=load_recipe("tiny-test").text, side_px=64, samples=1, null="zeros", shift=1.0)
    text = readme(facts, "s3://bucket/`x`\n# heading\x1b[2J", 8, 8)
    assert (
        is_shown(text)
        and "\n# heading" not in text
        and "Exported from `` s3://bucket/`x`\\n# heading\\x1b[2J ``, 1 samples" in text
    )


def test_a_run_is_called_by_what_can_be_shown(monkeypatch):
    parameters = {"recipe": "/x/\x1b[2J\u202e.yaml", "overrides": ["run=\x9b"]}
    monkeypatch.setattr(stage.runtime, "flow_run", SimpleNamespace(parameters=parameters, flow_name="pretrain"))
    monkeypatch.setattr(stage, "known_recipes", dict)
    assert is_shown(stage.run_name())
