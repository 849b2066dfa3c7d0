from __future__ import annotations

import subprocess
import sys

import pytest

from flows.cli import main
from sd3core.checkpoint import CheckpointDone


@pytest.fixture
def child():
    """A process that lives for as long as a test needs it."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def sd3(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd3", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else usage lines name `python -m pytest`
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def finish_checkpoint():
    """Writes the mark of a finished checkpoint of the recipe, without weights."""

    def finish(store, folder: str, recipe) -> None:
        done = CheckpointDone(
            samples=int(last) if (last := folder.rpartition("/")[2]).isdecimal() else 8,
            steps=1,
            attempt=1,
            optimizer_step=1,
            config={},
            training={},
            parameters={},
            files={},
            specs={},
            null=recipe.text.null,
            recipe=recipe.model_dump(mode="json"),
        )
        store.put_json(f"{folder}/DONE.json".lstrip("/"), done.model_dump(mode="json"))

    return finish
