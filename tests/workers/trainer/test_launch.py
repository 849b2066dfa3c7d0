"""What the driver does at a phase's end, without a Ray."""

from __future__ import annotations

from types import SimpleNamespace

from workers.trainer import launch


def test_a_placement_group_that_goes_while_it_is_looked_up_ends_nothing_else(monkeypatch):
    """Ray may remove it between the listing and the look: seen after a kill of one of its agents."""
    removed, killed = [], []

    def look_up(name):
        if name == "train-0":
            raise ValueError(f"Failed to look up placement group with name: {name}")
        return name

    states = {"train-0": "CREATED", "train-1": "CREATED", "train-2": "REMOVED", "another": "CREATED"}
    util = SimpleNamespace(
        placement_group_table=lambda: {name: {"name": name, "state": state} for name, state in states.items()},
        get_placement_group=look_up,
        remove_placement_group=removed.append,
    )
    fake = SimpleNamespace(wait=lambda refs, timeout: (refs, []), kill=killed.append, util=util)
    monkeypatch.setattr(launch, "ray", fake)
    launch._end("actor", "finished", "train")
    assert removed == ["train-1"] and killed == ["actor"]
