"""What a checkpoint says about how it wants to be sampled from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from sd3core.checkpoint import CONFIG_FILE, DONE_FILE, MODEL_FILE, read_done
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError
from sd3core.formulation_names import unknown_formulation
from sd3core.recipe import Text
from sd3core.sample_settings import SampleSettings

Null = Literal["zeros", "empty"]


@dataclass(frozen=True)
class CheckpointFacts:
    """Null convention, text lengths, size, shift and formulation of the training it comes from."""

    null: Null
    text: Text
    side_px: int
    shift: float
    digest: str  # of the checkpoint's content
    samples: int | None = None  # seen in training
    formulation: str = "rf"  # a name of sd3core.formulations: what the network predicts, and its path

    def settings(self, **changes: Any) -> SampleSettings:
        """A square of the trained size at the trained shift."""
        return replace(SampleSettings(self.side_px, self.side_px, shift=self.shift), **changes)

    def to_extra(self) -> dict[str, Any]:
        """For save_model's `extra`, from which a plain model folder is read again."""
        return {
            "null": self.null,
            "text": self.text.model_dump(mode="json"),
            "side_px": self.side_px,
            "shift": self.shift,
            "samples": self.samples,
            "formulation": self.formulation,
        }


def read_facts(checkpoint: str) -> CheckpointFacts:
    """From a training checkpoint's DONE.json, or from the `extra` of a model folder's config.json, which is of a
    rectified-flow model where it names no formulation.

    Raises CheckpointError that names what is missing.
    """
    store = open_store(checkpoint)
    if store.exists(DONE_FILE):
        done = read_done(store, "")
        if done.recipe is None:
            raise CheckpointError(f"{store.url}: {DONE_FILE} holds no recipe, so its text lengths are unknown")
        fields = {"null": done.null, "text": done.recipe["text"], "side_px": done.training["side_px"]}
        fields |= {key: done.training[key] for key in ("shift", "formulation")} | {"samples": done.samples}
        digest = done.digest
    elif store.exists(CONFIG_FILE):
        config = store.get_json(CONFIG_FILE)
        fields, digest = config.get("extra", {}), config["files"][MODEL_FILE]["sha256"]
    else:
        raise CheckpointError(
            f"{store.url}: neither {CONFIG_FILE} (a model) nor {DONE_FILE} (a training checkpoint) is there"
        )
    try:
        text = Text.model_validate(fields["text"])
        formulation = fields.get("formulation", "rf")
        if problem := unknown_formulation(formulation):
            raise CheckpointError(f"{store.url}: {problem}")
        return CheckpointFacts(
            null=fields["null"],
            text=text,
            side_px=fields["side_px"],
            shift=fields["shift"],
            digest=digest,
            samples=fields.get("samples"),
            formulation=formulation,
        )
    except KeyError as error:
        raise CheckpointError(
            f"{store.url}: its config's extra does not say {error}; save it with CheckpointFacts.to_extra()"
        ) from None
    except ValidationError as error:
        raise CheckpointError(f"{store.url}: text: {error.errors()[0]['msg']}") from None
