"""The recipe's `export`: which checkpoint leaves, by which score it is chosen."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal

from pydantic import field_validator

from sd3core.recipe_section import Section
from sd3core.small_world.world import TASKS

LAST, BEST = "last", "best:"
# Name -> the metric in scores.json, and which way is better.
RANKING_SCORES: dict[str, tuple[str, Literal["lower", "higher"]]] = {
    "validation_loss": ("validation_loss", "lower"),
    "clip_score": ("clip_score", "higher"),
    "fid": ("clip_fid", "lower"),
    "shapes_bench": ("shapes_bench/overall", "higher"),
    **{f"shapes_bench/{task}": (f"shapes_bench/{task}", "higher") for task in TASKS},
}
PLAIN_SCORE = "validation_loss"  # where none is named


def unknown_score(name: str) -> str | None:
    """What is wrong with the name of a score to choose by, naming those there are; None where nothing is."""
    if name in RANKING_SCORES:
        return None
    near = get_close_matches(name, RANKING_SCORES, 1, cutoff=0.6)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"no score {name!r} chooses a checkpoint; {meant}there are: {', '.join(RANKING_SCORES)}"


class Export(Section):
    """Which checkpoint the stage `export` takes."""

    checkpoint: str = LAST  # last, or best:SCORE: of the last phase, by a score of RANKING_SCORES

    @property
    def score(self) -> str | None:
        """The score that chooses; None takes the last checkpoint."""
        return self.checkpoint.removeprefix(BEST) if self.checkpoint.startswith(BEST) else None

    @field_validator("checkpoint")
    @classmethod
    def _known(cls, chosen: str) -> str:
        if chosen == LAST:
            return chosen
        if not chosen.startswith(BEST):
            raise ValueError(f"{chosen!r} is neither {LAST} nor {BEST}SCORE, as {BEST}{PLAIN_SCORE}")
        if problem := unknown_score(chosen.removeprefix(BEST)):
            raise ValueError(problem)
        return chosen
