"""Chooses the best checkpoint of a phase by a named score.

It refuses where the scores do not say which that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3core.checkpoint_record import CheckpointRef
from sd3core.data.store import Store, StoreDamaged, StoreNotFound
from sd3core.errors import UserError
from sd3core.metrics.frechet import PICTURES_A_DIMENSION
from sd3core.recipe_export import RANKING_SCORES, unknown_score
from sd3core.specs import scores_path
from sd3core.words import counted

SCORE_THEM = "the stage evaluate scores them"


class NoBestCheckpoint(UserError):
    """The scores do not say which checkpoint is the best."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The chosen one, its figure and the last one's, and among how many it was chosen."""

    ref: CheckpointRef
    score: str
    value: float
    last: float
    among: int

    @property
    def line(self) -> str:
        """What it is, and what its figure is worth."""
        name = f"the checkpoint of {self.ref.samples:,} samples"
        if self.among == 1:
            return f"{name}, the only one, has {self.score} {self.value:.3f}"
        return (
            f"{name} is the best of {self.among} by {self.score} ({self.value:.3f}; the last one has {self.last:.3f}). It was chosen by"
            " this figure, on the same held-out images or prompts, so the figure flatters it: expect a little worse on others"
        )


def best_checkpoint(
    store: Store, run: str, phase: str, candidates: Sequence[CheckpointRef], score: str
) -> BestCheckpoint:
    """The best of a phase's checkpoints (oldest first) by one of RANKING_SCORES, of the averaged weights, as the run's
    scores.json has it by the protocol that the last evaluation showed.

    Raises NoBestCheckpoint, one line with the mend, for a score that there is not, that not all candidates have, that they have by
    different protocols, that ranks nothing, and for a tie.
    """
    if problem := unknown_score(score):
        raise NoBestCheckpoint(problem)
    try:
        scores = store.get_json(scores_path(run))
    except (StoreNotFound, StoreDamaged):
        raise NoBestCheckpoint(f"run {run}: no checkpoint is scored yet, so none is the best; {SCORE_THEM}") from None
    folders = {ref.folder for ref in candidates}
    metric, better = RANKING_SCORES[score]
    rows = {row["checkpoint"]: row for row in _shown(scores, "scores", folders) if row["metric"] == metric}
    if len(rows) < len(candidates):
        raise NoBestCheckpoint(_unscored(scores, phase, score, metric, folders, len(rows)))
    _check_comparable(phase, score, list(rows.values()))
    sign = 1 if better == "lower" else -1
    first, *others = sorted(candidates, key=lambda ref: sign * rows[ref.folder]["value"])
    value = rows[first.folder]["value"]
    tied = [ref for ref in others if rows[ref.folder]["value"] == value]
    if tied:
        named = " and ".join(f"{ref.samples:,}" for ref in (first, *tied))
        raise NoBestCheckpoint(
            f"{phase}: the checkpoints of {named} samples have the same {score}, {value:.3f}, so none is the best; choose by another"
            " score, or take the last"
        )
    return BestCheckpoint(first, score, value, rows[candidates[-1].folder]["value"], len(candidates))


def _shown(scores: Mapping[str, Any], table: str, folders: set[str]) -> list[dict[str, Any]]:
    """A table's rows of these checkpoints' averaged weights, by the protocols that are shown."""
    shown = scores.get("shown")
    return [
        row
        for row in scores[table]
        if row["checkpoint"] in folders and row["weights"] == "ema" and (shown is None or row["protocol"] in shown)
    ]


def _unscored(scores: Mapping[str, Any], phase: str, score: str, metric: str, folders: set[str], scored: int) -> str:
    reasons = {
        row["reason"] for row in _shown(scores, "left_out", folders) if metric.startswith(row["metric"].split("/")[0])
    }
    of = f"{scored} of {counted(len(folders), 'checkpoint')}"
    if reasons:
        return f"{phase}: {of} have a {score}, so none is the best by it: {'; '.join(sorted(reasons))}"
    return (
        f"{phase}: {of} have a {score}, so none is the best by it; {SCORE_THEM} where evaluate.checkpoints is all and the score is"
        " of this data"
    )


def _check_comparable(phase: str, score: str, rows: Sequence[dict[str, Any]]) -> None:
    marked = next((row for row in rows if row.get("ranks_nothing")), None)
    if marked:
        raise NoBestCheckpoint(
            f"{phase}: {score} ranks nothing here: {marked['count']:,} pictures for {marked['dimensions']:,} dimensions; raise"
            f" evaluate.scored_images to {PICTURES_A_DIMENSION * marked['dimensions']:,}, or choose by another score"
        )
    if len({row["protocol"] for row in rows}) > 1:
        counts = sorted({row["count"] for row in rows})
        differ = f" (of {' and '.join(f'{count:,}' for count in counts)})" if len(counts) > 1 else ""
        raise NoBestCheckpoint(
            f"{phase}: its checkpoints have {score} by different protocols{differ}, which cannot be compared; leave out"
            " evaluate.earlier_bench_prompts_per_task, evaluate in one precision, or choose by another score"
        )
