"""Says what sets two specs apart: a format that rose, or the recipe."""

from __future__ import annotations

from typing import Any

from sd3core.data.manifest import flatten

# Names of numbers that only this software changes.
VERSION_KEYS = ("format", "world", "pixels", "slices", "rules", "formulation_version")


def format_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str] | None:
    """The numbers that a version of this software changed, as "format 1 -> 2"; [] for equal fields.

    None where a user's change alone would make the bytes again: a field has another value, or fields come or go while no
    version differs. A number that stands nowhere is 1.
    """
    before, after = flatten(old), flatten(new)
    keys = sorted(
        key
        for key in before.keys() | after.keys()
        if (key in before) != (key in after) or before.get(key) != after.get(key)
    )
    versions = [key for key in keys if key.rpartition(".")[2] in VERSION_KEYS]
    changed = [key for key in keys if key not in versions and key in before and key in after]
    if changed or (keys and not versions):
        return None
    return [f"{key} {before.get(key, 1)} -> {after.get(key, 1)}" for key in versions]
