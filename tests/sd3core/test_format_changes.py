"""A version's change and a user's are told apart by the names of the numbers that only versions change."""

from __future__ import annotations

import pytest

from sd3core.format_changes import format_changes

OLD = {"format": 1, "training": {"samples": 96, "betas": [0.9, 0.999]}, "raw": "a"}


@pytest.mark.parametrize(
    "new, changes",
    [
        (OLD, []),
        (OLD | {"format": 2}, ["format 1 -> 2"]),
        (OLD | {"format": 2, "training": {"betas": [0.9, 0.999]}}, ["format 1 -> 2"]),  # a field left with the version
        (OLD | {"format": 2, "added": None}, ["format 1 -> 2"]),
        (OLD | {"pixels": 2, "world": 3}, ["pixels 1 -> 2", "world 1 -> 3"]),  # what stands nowhere is 1
        (OLD | {"training": OLD["training"] | {"formulation_version": 2}}, ["training.formulation_version 1 -> 2"]),
        (OLD | {"format": 2, "training": {"samples": 97, "betas": [0.9, 0.999]}}, None),  # a user's change besides
        (OLD | {"training": {"samples": 96, "betas": [0.9, 0.99]}}, None),
        (OLD | {"added": None}, None),  # no version says why
        (OLD | {"raw": "b"}, None),
    ],
)
def test_versions_and_users(new, changes):
    assert format_changes(OLD, new) == changes
    swapped = format_changes(new, OLD)
    assert (swapped is None) == (changes is None)
