"""The recipe's `filter`: which images are kept, by rules, scores and likeness."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from sd3core.recipe_section import Section

HASH_THRESHOLD = 0.985  # of the built-in hash: tuned by tests/sd3core/filters/test_planted_duplicates.py
ScoreName = Annotated[
    str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,30}$")
]  # becomes a column, and stands in reasons
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]  # RE2: no look-around, no back-references


class ScoreRule(Section):
    """A number that a model of transformers gives an image, and the bounds of those that are kept."""

    kind: Literal["label", "clip_head"]
    model: str  # local folder: an image classifier; for clip_head a CLIP
    label: str | None = None  # label: whose probability is the score, by its name in the model's config
    head: str | None = (
        None  # clip_head: a .safetensors file with weight (1, D) and bias (1,), on the normalised embedding
    )
    min: float | None = None
    max: float | None = None
    batch: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _whole(self) -> ScoreRule:
        wanted, other = ("label", "head") if self.kind == "label" else ("head", "label")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"kind {self.kind!r} takes {wanted}, and not {other}")
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both: nothing would be left out")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: everything would be left out")
        _check_path("model", self.model)
        _check_path("head", self.head)
        return self


class Duplicates(Section):
    """Near-duplicates, of which the first by its key is kept. Paper appendix E.2."""

    model: str | None = (
        None  # local folder of a vision model (CLIP, DINO) whose embeddings are compared; None: a built-in hash
    )
    threshold: float | None = Field(None, gt=0, lt=1)  # cosine from which two are alike; None: the built-in hash's own
    mirrored: bool = True  # the built-in hash: a mirrored picture is a duplicate too
    rows_per_cluster: int = Field(4_096, ge=16)  # on average; pictures are compared within their two nearest clusters
    most_clusters: int = Field(16_000, ge=1)  # the paper's number
    batch: int = Field(32, ge=1)  # of the model

    @model_validator(mode="after")
    def _threshold_of_a_model(self) -> Duplicates:
        if self.model is not None and self.threshold is None:
            raise ValueError("threshold must be given with a model: how near its duplicates are, only trying says")
        _check_path("model", self.model)
        return self

    @property
    def alike_from(self) -> float:
        return HASH_THRESHOLD if self.threshold is None else self.threshold


class Filter(Section):
    """Rules of captions are of the original ones: an image goes where one of its captions breaks a rule, and none breaks none."""

    min_side_px: int | None = Field(None, ge=1)
    min_aspect: float | None = Field(None, gt=0)  # width / height
    max_aspect: float | None = Field(None, gt=0)
    min_caption_chars: int | None = Field(None, ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    caption_requires: Pattern | None = None  # a regular expression (RE2) that is found in every caption that is kept
    caption_forbids: Pattern | None = None  # one that is found in none
    scores: dict[ScoreName, ScoreRule] = Field(default_factory=dict)
    duplicates: Duplicates | None = None

    @field_validator("caption_requires", "caption_forbids")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        import pyarrow as pa  # here: a recipe without a filter needs none
        import pyarrow.compute as pc

        try:
            pc.match_substring_regex(pa.array([""]), pattern or "x")
        except pa.ArrowInvalid as error:
            raise ValueError(f"{pattern!r} is no regular expression of RE2: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _keeps_something(self) -> Filter:
        for low, high in (("min_aspect", "max_aspect"), ("min_caption_chars", "max_caption_chars")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least:g} is above {high} {most:g}: everything would be left out")
        if self == Filter.model_construct(scores={}):
            raise ValueError("it has no rule; name one, or leave filter out")
        return self

    @property
    def measures(self) -> bool:
        """Whether images are looked at, and not only what their index says."""
        return bool(self.scores) or self.duplicates is not None

    @property
    def has_models(self) -> bool:
        """Whether a GPU is of use."""
        return bool(self.scores) or (self.duplicates is not None and self.duplicates.model is not None)


def _check_path(key: str, path: str | None) -> None:
    if path is not None and not path.startswith("/"):
        raise ValueError(f"{key} {path} is no whole path of this machine, and workers run in folders of their own")
