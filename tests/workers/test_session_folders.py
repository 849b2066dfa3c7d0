from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from workers.session_folders import remove_dead_sessions, scratch_folder, sessions_folder

NAME = "session_2026-01-01_00-00-00_000001_"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"sd3-ray-{os.getuid()}"
    folder.mkdir()
    return folder


def test_what_dead_sessions_left_is_removed_and_nothing_else(root):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = [f"{NAME}{ended.pid}", f"scratch_{ended.pid}", f"{NAME}{os.getpid()}", f"scratch_{os.getpid()}", "scratch_x", "mine"]
    for name in names:
        (root / name / "logs").mkdir(parents=True)
    (root / "session_latest").symlink_to(root / names[0])
    remove_dead_sessions()
    assert {path.name for path in root.iterdir()} == {*names[2:], "session_latest"}


def test_temporary_files_of_processes_that_are_started_inside_lie_in_the_sessions_folder(root, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    with scratch_folder() as scratch:
        asked = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"], capture_output=True, text=True, check=True
        )
    assert asked.stdout.strip() == str(scratch) == f"{root}/scratch_{os.getpid()}"
    assert os.environ["TMPDIR"] == "/var/tmp"


def test_sessions_lie_where_the_paths_of_sockets_are_short(root, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 40)
    assert str(sessions_folder()) == f"/tmp/sd3-ray-{os.getuid()}"
