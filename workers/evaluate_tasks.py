"""Plans what is scored: each checkpoint's parts, with their protocols."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sd3core.data.manifest import ManifestRef
from sd3core.data.size_rule import SizeRule
from sd3core.metrics.reference import reference_fields
from sd3core.metrics.score import LEVELS
from sd3core.recipe import Recipe, Training
from sd3core.sample_settings import SampleSettings, Weights
from sd3core.small_world.world import MIN_SIDE_PX, TASKS
from sd3core.specs import FORMATS, evaluations_folder, fingerprint

ScoredPart = dict[str, Any]
COMPARISON = "captions"  # the part that draws training captions beside held-out ones
SCORED_WEIGHTS: dict[str, tuple[Weights, ...]] = {"both": ("ema", "live"), "ema": ("ema",)}


@dataclass(frozen=True)
class ScoredCheckpoint:
    """A finished checkpoint to be scored. `digest` names its content."""

    folder: str  # in the store
    samples: int
    digest: str


@dataclass(frozen=True)
class EvaluationInputs:
    """What scores are made from: the checkpoints of every phase, oldest first, pinned manifests, and the towers' folder."""

    checkpoints: dict[str, list[ScoredCheckpoint]]  # by phase key
    raw: ManifestRef
    text: ManifestRef
    latents: dict[str, ManifestRef]  # by phase key
    towers: str  # folder in the store
    tower_digests: dict[str, str]  # by tower
    keep: ManifestRef | None = None  # of a filter
    kept: dict[str, str] = field(default_factory=dict)  # which rows it keeps, as manifests name it; nothing where all
    sizes: dict[str, SizeRule] = field(
        default_factory=dict
    )  # by phase key, of those whose latents leave out small images


@dataclass(frozen=True)
class EvaluationTask:
    part: str  # "validation", "pictures", "captions", "bench-TASK", "grid-HxW"
    phase: str
    checkpoint: str  # folder in the store
    samples: int
    weights: Weights
    protocol: dict[str, Any]
    folder: str  # in the store
    digest: str  # of the checkpoint

    @property
    def place(self) -> str:
        """Path in the store, without an ending."""
        spec = fingerprint({"protocol": self.protocol, "checkpoint": self.digest})
        return f"{self.folder}/{self.part}.{spec}"

    def settled(self, precision: str) -> EvaluationTask:
        """The task in the precision that an actor computes in, as its protocol says and its part's path shows."""
        return replace(self, protocol=self.protocol | {"precision": precision})

    @property
    def path(self) -> str:
        return f"{self.place}.json"

    @property
    def title(self) -> str:
        return f"{self.phase} {self.samples:,} {self.weights} {self.part}"


def plan_tasks(recipe: Recipe, inputs: EvaluationInputs) -> list[EvaluationTask]:
    """Every part of every checkpoint, in the order of the table. A pure function of its arguments."""
    phases = dict(recipe.phases())
    tasks = []
    for phase, checkpoints in inputs.checkpoints.items():
        for checkpoint in checkpoints[-1:] if recipe.evaluate.checkpoints == "last" else checkpoints:
            last = checkpoint is checkpoints[-1]
            for weights in SCORED_WEIGHTS[recipe.evaluate.weights]:
                for part, protocol in _protocols(recipe, phase, phases[phase], inputs, last=last):
                    if (
                        part == COMPARISON and weights != "ema"
                    ):  # for looking at, which one kind of weights is enough for
                        continue
                    place = f"{evaluations_folder(recipe.run)}/{phase}/{checkpoint.samples:012d}-{weights}"
                    names = (part, phase, checkpoint.folder, checkpoint.samples, weights)
                    tasks.append(EvaluationTask(*names, protocol, place, checkpoint.digest))
    return tasks


def _protocols(
    recipe: Recipe, phase_key: str, phase: Training, inputs: EvaluationInputs, *, last: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, protocol): whatever a score depends on besides the checkpoint, so that equal fingerprints are comparable
    scores.
    """
    evaluate, towers, sizes = recipe.evaluate, inputs.tower_digests, inputs.sizes.get(phase_key)
    common = {
        "format": FORMATS["evaluations"],
        "precision": evaluate.precision,
        "seed": evaluate.seed,
        "raw": inputs.raw.digest,
    }
    common |= inputs.kept | (sizes.to_dict() if sizes else {})
    latents = inputs.latents[phase_key].digest
    yield (
        "validation",
        common
        | {
            "kind": "validation_loss",
            "levels": list(LEVELS),
            "images": evaluate.validation_images,
            "latents": latents,
            "text": inputs.text.digest,
        },
    )

    def sampled(height: int, width: int) -> dict[str, Any]:
        shift = evaluate.shift_for(phase)
        settings = SampleSettings(
            height, width, evaluate.num_steps, evaluate.guidance_scale, shift, sampler=evaluate.sampler
        )
        used = {name: towers[name] for name in ("vae", "clip_l", "clip_g", "t5")}
        return common | {"settings": settings.to_dict(), "towers": fingerprint(used)}

    square, all_sides = sampled(phase.side_px, phase.side_px), phase.bucket_sides()
    reference = reference_fields(
        inputs.raw, towers["judge"], phase.side_px, evaluate.reference_images, inputs.kept, sizes
    )
    yield (
        "pictures",
        square
        | {
            "kind": "clip_and_fid",
            "images": evaluate.scored_images,
            "grid": evaluate.grid_prompts,
            "reference": reference,
            "reference_set": fingerprint(reference),
        },
    )
    if evaluate.compared_captions:
        shown = {"kind": "comparison", "each": evaluate.compared_captions, "latents": latents}
        yield COMPARISON, square | shown
    per_task = evaluate.bench_prompts_per_task
    if not last and evaluate.earlier_bench_prompts_per_task is not None:
        per_task = evaluate.earlier_bench_prompts_per_task
    if recipe.data.source == "small_world" and per_task:
        readable = [sides for sides in all_sides if min(sides) >= MIN_SIDE_PX]
        for task in TASKS:
            shapes_bench = {
                "kind": "shapes_bench",
                "prompts_per_task": per_task,
                "images_per_prompt": evaluate.bench_images_per_prompt,
                "sizes": readable,  # (height, width); none: ShapesBench is left out
            }
            yield f"bench-{task}", square | shapes_bench
    for height, width in all_sides:
        if len(all_sides) > 1 and height != width and evaluate.bucket_grid_prompts:
            yield (
                f"grid-{height}x{width}",
                sampled(height, width) | {"kind": "grid", "grid": evaluate.bucket_grid_prompts},
            )
