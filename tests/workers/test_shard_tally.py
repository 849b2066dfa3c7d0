"""What a stage at work tells of the shards that are finished, without actors."""

from __future__ import annotations

import time
from types import SimpleNamespace

from sd3core.data.shards import FailedRow
from sd3core.progress import ProgressMeter
from workers.pool import Outcome
from workers.shard_stage import TELL_AFTER_S, MadeShard, ShardTask, _Tally


def test_what_a_long_stage_leaves_out_is_told_once_a_reason_before_its_end_counts_it():
    """Of 300 shards the first minute tells nothing, then each reason is told once, with how many there were by then."""
    seen = []
    tally = _Tally(ProgressMeter(900, "images", seen.append), {"f": "image"})

    def ends(number: int, *reasons: str, seconds: float) -> None:
        tally.started = time.monotonic() - seconds
        record = MadeShard(SimpleNamespace(failed=[FailedRow(key="k", reason=reason) for reason in reasons]))
        tally.finished(Outcome(ShardTask(number, f"{number:012x}", "f", rows=3), record), number + 1, 300)

    for number in range(100):
        ends(number, "too small", "empty file", seconds=TELL_AFTER_S - 5)
    for number in range(100, 300):
        ends(number, "too small", *(["damaged"] if number >= 200 else []), seconds=TELL_AFTER_S + 5)
    assert [progress.warning for progress in seen if progress.warning] == [
        "so far 100 images left out: empty file; so far 101 images left out: too small",
        "so far 1 image left out: damaged",
    ]
    assert seen[-1].line().startswith("900/900 images")
