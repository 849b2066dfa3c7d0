"""What an inspection found, for a page to lay out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sd3core.data.manifest import flatten
from sd3core.words import GB, MB

WIDEST_VALUE = 200  # characters of a field that is shown


@dataclass(frozen=True)
class ShownRow:
    """One row of a shard. `words`: columns of a table; `picture`: (H, W, 3) uint8, as a sheet shows it, or why there is none."""

    key: str
    words: dict[str, str]
    picture: np.ndarray | str = ""


@dataclass
class Findings:
    """`facts` are what it says of itself, `tables` are columns by row under a heading, `notes` what could not be shown."""

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    rows: list[ShownRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shown_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    """Nested fields by their dotted names, as text of a bounded length."""
    shown = {key: value if isinstance(value, str) else repr(value) for key, value in flatten(dict(fields)).items()}
    return {key: text if len(text) <= WIDEST_VALUE else f"{text[:WIDEST_VALUE]}..." for key, text in shown.items()}


def shown_bytes(size: float) -> str:
    return f"{size / GB:,.2f} GB" if size >= GB else f"{size / MB:,.2f} MB"


def counts_table(counts: Mapping[str, int], what: str) -> list[dict[str, str]]:
    """The most frequent first."""
    return [{what: name, "rows": f"{count:,}"} for name, count in sorted(counts.items(), key=lambda item: -item[1])]
