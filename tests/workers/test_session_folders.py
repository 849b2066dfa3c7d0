from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sd3core.errors import UserError
from workers import session_folders
from workers.session_folders import remove_dead_sessions, scratch_folder, sessions_folder

NAME = "session_2026-01-01_00-00-00_000001_"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(session_folders, "LONGEST_FOLDER", 200)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"sd3-{os.getuid()}" / "ray"
    folder.mkdir(parents=True)
    return folder


def test_what_dead_sessions_left_is_removed_and_nothing_else(root):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    names = [
        f"{NAME}{ended.pid}",
        f"scratch_{ended.pid}",
        f"{NAME}{os.getpid()}",
        f"scratch_{os.getpid()}",
        "scratch_x",
        "mine",
    ]
    for name in names:
        (root / name / "logs").mkdir(parents=True)
    (root / "session_latest").symlink_to(root / names[0])
    remove_dead_sessions()
    assert {path.name for path in root.iterdir()} == {*names[2:], "session_latest"}


def test_temporary_files_of_processes_that_are_started_inside_lie_in_the_sessions_folder(root, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    with scratch_folder() as scratch:
        asked = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert asked.stdout.strip() == str(scratch) == f"{root}/scratch_{os.getpid()}"
    assert os.environ["TMPDIR"] == "/var/tmp"


def test_sessions_lie_where_the_paths_of_sockets_are_short(root, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 40)
    assert str(sessions_folder()) == f"/tmp/sd3-{os.getuid()}/ray"


def test_no_other_user_can_enter_what_ray_lets_everyone_write_to(root):
    root.parent.chmod(0o777)
    assert sessions_folder() == root
    root.chmod(0o777)  # as Ray leaves it
    assert root.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("of", ["another user", "a link"])
def test_a_folder_that_somebody_else_has_put_there_is_not_used(root, monkeypatch, of):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (theirs := root / f"{NAME}{ended.pid}").mkdir()
    if of == "a link":
        root.parent.rename(root.parent.with_name("elsewhere"))
        root.parent.symlink_to(root.parent.with_name("elsewhere"))
    else:
        status = os.lstat(root.parent)
        another = os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])
        lstat = Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda path: another if path == root.parent else lstat(path))
    remove_dead_sessions()
    assert theirs.is_dir()
    for use in (sessions_folder, lambda: scratch_folder().__enter__()):
        with pytest.raises(UserError, match=f"^{root.parent}: not a folder of this user's; remove it, or set TMPDIR"):
            use()


def test_what_a_version_before_left_is_removed(root):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    (left := root.parent.with_name(f"sd3-ray-{os.getuid()}") / f"{NAME}{ended.pid}").mkdir(parents=True)
    remove_dead_sessions()
    assert not left.exists()
