"""A store's disk that fills up while a run works, stage after stage: one line each time, nothing finished is lost, and with more
room the same command goes on.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OVERRIDES, STAGES
from installation import Installation, demo_command, finished_files

pytestmark = [pytest.mark.kills, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOM_KB = (100, 1_000, 2_000, 4_000, 7_000)  # the disk's size, each time the run has met its end


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_KB[0]}k", "none", tmp_path], check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_the_same_command_goes_on_with_more_room(installation: Installation, disk: Path):
    command = demo_command(f"store={disk}", "run=full", *OVERRIDES)
    stopped, kept = [], {}
    for room in (*ROOM_KB, 2**20):
        subprocess.run(["mount", "-o", f"remount,size={room}k", disk], check=True)
        code, printed = installation.ends(*command, seconds=420)
        assert "Traceback" not in printed
        now = finished_files(disk)
        assert {name: now.get(name) for name in kept} == kept
        kept = now
        if code == 0:
            break
        last = printed.splitlines()[-1]
        said = re.fullmatch(r"sd3: (\w+): .*No space left on device.*the same command goes on.*", last)
        assert code == 1 and said, printed
        stopped.append(said.group(1))
    assert code == 0 and len(set(stopped)) >= 3, stopped
    assert {"towers", "pretrain"} <= {*stopped}
    assert set(re.findall(r"^(\w+) +(?:done|skipped) ", printed, re.MULTILINE)) == {*STAGES}
