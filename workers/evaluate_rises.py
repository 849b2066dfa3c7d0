"""Finds the phases of a run whose validation loss has turned up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sd3core.metrics.rising_loss import Rise, find_rise, rise_line
from sd3core.specs import fingerprint
from workers.evaluate_tasks import EvaluationTask, ScoredPart

BY_IMAGE = "loss_by_image"  # in a part's details; absent where an earlier version scored it


def rising_losses(
    parts: Sequence[tuple[EvaluationTask, ScoredPart]], images: Callable[[str], int | None]
) -> list[dict[str, Any]]:
    """A row for each phase, of the averaged weights by one protocol, whose loss has turned up: as `Rise`, and what it means.

    `images`: phase -> how many it trains on, None where nobody knows; asked only of phases that have turned.
    """
    rows = []
    for (phase, protocol), curve in _curves(parts).items():
        measured = [part["details"].get(BY_IMAGE) for _, part in curve]
        if all(measured) and (rise := find_rise([task.samples for task, _ in curve], np.array(measured))):
            count = images(phase)
            row = {"phase": phase, "protocol": protocol, "precision": curve[0][1]["precision"], "images": count}
            rows.append(row | asdict(rise))
    return rows


def rise_lines(rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> list[str]:
    """The rows of the protocols that are shown, in words."""
    fields = Rise.__dataclass_fields__.keys()
    return [
        rise_line(row["phase"], Rise(**{name: row[name] for name in fields}), row["images"])
        for row in rows
        if row["protocol"] in shown
    ]


def unlooked_phases(parts: Sequence[tuple[EvaluationTask, ScoredPart]]) -> list[str]:
    """Phases of several scored checkpoints some of which an earlier version scored, without the losses of single images."""
    lacking = {
        phase
        for (phase, _), curve in _curves(parts).items()
        if len(curve) > 1 and not all(part["details"].get(BY_IMAGE) for _, part in curve)
    }
    return sorted(lacking)


def _curves(
    parts: Sequence[tuple[EvaluationTask, ScoredPart]],
) -> dict[tuple[str, str], list[tuple[EvaluationTask, ScoredPart]]]:
    """(phase, protocol) -> its parts of validation losses, EMA weights, fewest samples first.

    A protocol names the images, their order, the levels and the noise: what stands at one place is one measurement's.
    """
    curves: dict[tuple[str, str], list[tuple[EvaluationTask, ScoredPart]]] = {}
    for task, part in parts:
        if task.part == "validation" and task.weights == "ema" and part["scores"]:
            curves.setdefault((task.phase, fingerprint(task.protocol)), []).append((task, part))
    return {key: sorted(found, key=lambda pair: pair[0].samples) for key, found in curves.items()}
