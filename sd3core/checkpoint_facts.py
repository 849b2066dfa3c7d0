"""What a checkpoint says about how it wants to be sampled from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from sd3core.checkpoint_record import CheckpointDone
from sd3core.errors import CheckpointError
from sd3core.formulation_names import canonical_name
from sd3core.recipe import Text, picture_shift
from sd3core.sample_settings import SampleSettings
from sd3core.specs import DONE_FILE

Null = Literal["zeros", "empty"]


@dataclass(frozen=True)
class CheckpointFacts:
    """Null convention, text lengths, size and formulation of the training it comes from, and the shift to be sampled at."""

    null: Null
    text: Text
    side_px: int
    shift: float
    digest: str  # of the checkpoint's content
    samples: int | None = None  # seen in training
    formulation: str = "rf"  # a name of sd3core.formulations: what the network predicts, and its path

    def __post_init__(self) -> None:
        """`null` is the one word on it: a recipe's text settings have the key too, and here it says the same."""
        object.__setattr__(self, "text", self.text.model_copy(update={"null": self.null}))

    def settings(self, **changes: Any) -> SampleSettings:
        """A square of the trained size."""
        return replace(SampleSettings(self.side_px, self.side_px, shift=self.shift), **changes)

    def to_extra(self) -> dict[str, Any]:
        """The facts as save_model's `extra`, from which a plain model folder is read again."""
        return {
            "null": self.null,
            "text": self.text.model_dump(mode="json", exclude={"null"}),
            "side_px": self.side_px,
            "shift": self.shift,
            "samples": self.samples,
            "formulation": self.formulation,
        }


class _Extra(BaseModel):
    """What a model folder's config.json says beside the sizes."""

    null: Null
    text: Text
    side_px: Annotated[int, Field(ge=16)]
    shift: Annotated[float, Field(gt=0)]
    samples: int | None = None
    formulation: Annotated[str, AfterValidator(canonical_name)] = "rf"


def checked_facts(fields: Mapping[str, Any], digest: str, split: int | None, where: str) -> CheckpointFacts:
    """From `CheckpointFacts.to_extra`'s fields, which are of a rectified-flow model where they name no formulation.

    split: where a model of three streams divides the context. Raises CheckpointError that names what is missing.
    """
    try:
        extra = _Extra.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(
            f"{where}: extra.{'.'.join(map(str, problem['loc']))}: {problem['msg']};"
            " save it with CheckpointFacts.to_extra()"
        ) from None
    if split not in (None, extra.text.clip_tokens):
        raise CheckpointError(
            f"{where}: extra.text.clip_tokens {extra.text.clip_tokens}, but the model's three streams divide at"
            f" {split} (model.clip_tokens); save it with that in CheckpointFacts.text"
        )
    return CheckpointFacts(**dict(extra), digest=digest)


def trained_facts(done: CheckpointDone, where: str) -> CheckpointFacts:
    """Of a training checkpoint, from its record alone. Raises CheckpointError where it holds no recipe."""
    if not done.recipe:
        raise CheckpointError(f"{where}: {DONE_FILE} holds no recipe, so its text lengths are unknown")
    trained = done.training
    fields = {
        "null": done.null,
        "text": done.recipe["text"],
        "side_px": trained["side_px"],
        "shift": picture_shift(done.recipe.get("evaluate", {}).get("shift"), trained["shift"]),
        "formulation": trained.get("formulation", "rf"),
        "samples": done.samples,
    }
    return checked_facts(fields, done.digest, done.config.get("clip_tokens"), where)
