from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.cli import main
from flows.upstream import Upstream
from sd3core import specs
from sd3core.checkpoint_record import CheckpointDone
from sd3core.data.store import canonical_json

RECORDS = Path(__file__).parents[1] / "_written_before" / "tiny-test-records.json"


@pytest.fixture
def child():
    """A process that lives for as long as a test needs it."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    while not Path(
        f"/proc/{started.pid}/environ"
    ).read_bytes():  # the system shows it a moment after the program has begun
        time.sleep(0.01)
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


@pytest.fixture
def write_records():
    """Writes what an earlier version left of a run of tiny-test: manifests, done records, notes and scores, without their bytes."""

    def write(store) -> None:
        for path, value in json.loads(RECORDS.read_text()).items():
            data = canonical_json(value)
            store.put(path, data)
            if path.endswith("/MANIFEST.json"):
                digest = hashlib.sha256(data).hexdigest()
                store.put(path.replace("MANIFEST", f"MANIFEST.{digest[:12]}"), data)
        last = f"{store.get_json('runs/tiny-test/stages/finetune.0.json')['folder']}/{32:012d}"
        store.put_json("runs/tiny-test/export/0123456789ab/MANIFEST.json", {"from": last, "fields": {"format": 1}})

    return write


@pytest.fixture
def train_today(finish_checkpoint):
    """Finished checkpoints of every phase, by today's fields, on a store whose data stand. Their folders."""

    def train(recipe, store) -> list[str]:
        folders = []
        for key, _ in recipe.phases():
            inputs = Upstream(recipe, store).phase_inputs(key)
            folder = specs.checkpoints_folder(recipe, key, inputs.fields)
            finish_checkpoint(store, f"{folder}/{inputs.training.last_samples:012d}", recipe)
            folders.append(folder)
        return folders

    return train


@pytest.fixture
def rise(monkeypatch):
    """Only these formats rise above those of the records: of the others, those of today are of no interest here."""
    written = {"raw": 3, "towers": 1, "captions": 1, "text": 1, "latents": 1, "train": 1, "evaluations": 2}

    def raised(*kinds: str) -> None:
        for kind, number in written.items():
            monkeypatch.setitem(specs.FORMATS, kind, number + 5 * (kind in kinds))

    raised()
    return raised
