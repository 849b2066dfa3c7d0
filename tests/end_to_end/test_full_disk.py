"""A store's disk that fills up while a run works, stage after stage: one line each time, nothing finished is lost, and with more
room the same command goes on. A checkpoint waits for the room.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FIRST, OVERRIDES, SLOW_STEPS, STAGES
from installation import FileState, Installation, demo_command, finished_files

pytestmark = [pytest.mark.kills, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOM_KB = {"ingest": 100, "towers": 1_000, "encode": 2_000}  # the disk's size at which the stage meets its end
ROOM_FOR_DATA_KB, ROOM_FOR_ALL_KB = 4_000, 2**20


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def resize(disk: Path, room_kb: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={room_kb}k", disk], check=True)


def test_the_same_command_goes_on_with_more_room(installation: Installation, disk: Path):
    command = demo_command(f"store={disk}", "run=full", *OVERRIDES, SLOW_STEPS)
    kept: dict[str, FileState] = {}
    for stage, room_kb in ROOM_KB.items():
        resize(disk, room_kb)
        code, printed = installation.ends(*command, seconds=420)
        last = printed.splitlines()[-1]
        assert code == 1 and re.match(
            f"sd3: {stage}: .*No space left on device; make room there, and the same command goes on", last
        ), printed
        assert "Traceback" not in printed
        now = finished_files(disk)
        assert {name: now.get(name) for name in kept} == kept
        kept = now

    resize(disk, ROOM_FOR_DATA_KB)
    waits = "the checkpoint waits, and is tried again in "
    code, printed = installation.disturbed(command, waits, lambda _: resize(disk, ROOM_FOR_ALL_KB), seconds=420)
    assert code == 0, printed
    assert set(re.findall(r"^(\w+) +(?:done|skipped) ", printed, re.MULTILINE)) == {*STAGES}
    assert "a rank was lost" not in printed
    now = finished_files(disk)
    assert {name: now.get(name) for name in kept} == kept
    assert (
        next(path.parent.name for path in sorted(disk.glob("runs/full/checkpoints/pretrain/*/*/DONE.json")))
        == f"{FIRST:012d}"
    )
