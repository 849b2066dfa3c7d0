from __future__ import annotations

import pytest

from workers.stage_notes import StageNote, reason_to_work

NAMES = {"training": "pretrain", "init": "its starting checkpoint"}
BEFORE = {"training": {"learning_rate": 0.1}, "init": "0123456789ab", "text": "0123456789ab"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"learning_rate": 0.2}}, "pretrain.learning_rate: 0.1 -> 0.2"),
        ({"init": "ba9876543210"}, "its starting checkpoint changed"),
        ({"init": None}, "its starting checkpoint changed"),
        ({"text": "ba9876543210"}, "text changed"),
    ],
)
def test_a_field_is_called_as_a_reader_calls_it(change, said):
    note = StageNote(folder="f", digest="d", fields=BEFORE)
    assert reason_to_work(note, "g", BEFORE | change, 1, 1, "phase", NAMES) == said


def test_one_and_many():
    note = StageNote(folder="f", digest="d", fields={})
    assert reason_to_work(note, "f", {}, 1, 1, "phase") == "1 of 1 phase was missing"
    assert reason_to_work(note, "f", {}, 1, 4, "shard") == "1 of 4 shards was missing"
    assert reason_to_work(note, "f", {}, 2, 4, "shard") == "2 of 4 shards were missing"
