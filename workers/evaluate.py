"""Evaluation: every checkpoint kept, live and EMA weights, scored in parts that are each done once.

A part is the unit of work and of resume: PART.<fingerprint>.json under runs/RUN/evaluations/PHASE/SAMPLES-WEIGHTS,
written after its pictures. The fingerprint covers the protocol and the checkpoint's digest (its job and its samples):
a changed setting or job makes a new part and nothing else. runs/RUN/evaluations/scores.json is a function of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sd3core.checkpoint import read_done
from sd3core.data.manifest import ManifestRef
from sd3core.data.store import Store, canonical_json
from sd3core.errors import UserError
from sd3core.metrics.held_out import reference_fields
from sd3core.metrics.validation_loss import LEVELS
from sd3core.progress import Progress, ProgressCallback, ProgressMeter
from sd3core.recipe import Recipe, Training
from sd3core.sample_settings import SampleSettings, Weights
from sd3core.small_world.detector import MIN_SIDE_PX
from sd3core.small_world.world import TASKS
from sd3core.specs import FORMATS, fingerprint
from sd3core.towers import read_towers
from workers.inputs import actor_device
from workers.pool import Outcome, PoolSettings, map_over_actors
from workers.ray_session import start_ray

SCORED_WEIGHTS: dict[str, tuple[Weights, ...]] = {"both": ("ema", "live"), "ema": ("ema",)}


class EvaluationFailed(UserError):
    """Parts that could not be made, after all others were."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What scores are made from besides checkpoints: pinned manifests, and the folder of the towers in the store."""

    raw: ManifestRef
    text: ManifestRef
    latents: dict[str, ManifestRef]  # by phase key
    towers: str


@dataclass(frozen=True)
class EvaluationTask:
    part: str  # "validation", "pictures", "bench-TASK", "grid-HxW"
    phase: str
    checkpoint: str  # folder in the store
    samples: int
    weights: Weights
    protocol: dict[str, Any]
    place: str  # path in the store, without an ending

    @property
    def path(self) -> str:
        return f"{self.place}.json"

    @property
    def title(self) -> str:
        return f"{self.phase} {self.samples:,} {self.weights} {self.part}"


@dataclass(frozen=True)
class EvaluationResult:
    """`scores` rows: checkpoint, phase, samples, weights, protocol, metric, value, count. `protocols`: readable, by
    fingerprint.

    `pictures`: phase, samples, weights, name, uri, thumbnail (paths in the store). `left_out`: which score, and why
    there is none. `bench`: a row for each task of ShapesBench with its tallies (all, seen, unseen,
    and by size, "HEIGHTxWIDTH") and chance.
    """

    path: str  # of scores.json
    digest: str
    scores: list[dict[str, Any]]
    bench: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    pictures: list[dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    made: int  # parts
    done_before: int
    seconds: float

    @property
    def skipped(self) -> bool:
        return self.made == 0


def evaluate_stage(
    recipe: Recipe,
    store: Store,
    checkpoints: dict[str, list[str]],
    inputs: EvaluationInputs,
    report: ProgressCallback,
) -> EvaluationResult:
    """checkpoints: phase key -> finished checkpoint folders of the store, oldest first.

    Raises EvaluationFailed naming the parts given up and why; the finished ones stay.
    """
    started = time.monotonic()
    tasks = plan_tasks(recipe, store, checkpoints, inputs)
    standing = {entry.path for entry in store.list(_folder(recipe))}
    missing = [task for task in tasks if task.path not in standing]
    meter = ProgressMeter(len(tasks), "parts", report, already_done=len(tasks) - len(missing))
    if missing:
        with start_ray(recipe.compute):
            _run_tasks(recipe, store, inputs, missing, meter)
    parts = [store.get_json(task.path) for task in tasks]
    path = f"{_folder(recipe)}/scores.json"
    summary = summarise(tasks, parts)
    data = canonical_json(summary | {"made_by": _makers(parts)})
    if not store.exists(path) or store.get(path) != data:
        store.put(path, data)
    seconds = time.monotonic() - started
    return EvaluationResult(
        path, fingerprint(summary), **summary, made=len(missing), done_before=meter.already_done, seconds=seconds
    )


def _run_tasks(
    recipe: Recipe, store: Store, inputs: EvaluationInputs, tasks: list[EvaluationTask], meter: ProgressMeter
) -> None:
    def ended(outcome: Outcome[EvaluationTask], done: int, total: int) -> None:
        state = "" if outcome.error is None else f" failed: {outcome.error}"
        meter.advance(note=f"{outcome.task.title}{state}")

    def working(task: EvaluationTask, progress: Progress) -> None:
        meter.update(meter.done, f"{task.title}: {progress.done}/{progress.total} {progress.unit}")

    def tell(warning: str) -> None:
        meter.update(meter.done, warning, warning)

    from workers.evaluate_parts import (
        EvaluationWorker,
    )  # here, so that a stage with nothing to do loads no models' libraries

    worker = {"store_url": store.url, "recipe": recipe, "inputs": inputs, "device": actor_device(recipe.compute)}
    outcomes = map_over_actors(EvaluationWorker, worker, tasks, PoolSettings.of(recipe.compute), ended, working, tell)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        named = "; ".join(f"{outcome.task.title}: {outcome.error}" for outcome in failed[:5])
        raise EvaluationFailed(
            f"{len(failed)} of {len(tasks)} parts could not be scored: {named}; run the stage again for these only"
        )


def plan_tasks(
    recipe: Recipe, store: Store, checkpoints: dict[str, list[str]], inputs: EvaluationInputs
) -> list[EvaluationTask]:
    """Every part of every checkpoint, in the order of the table. A pure function of its arguments and the manifests'
    digests.
    """
    phases = dict(recipe.phases())
    digests = read_towers(store, inputs.towers).digests
    tasks = []
    for phase, folders in checkpoints.items():
        chosen = folders[-1:] if recipe.evaluate.checkpoints == "last" else folders
        for folder in chosen:
            done = read_done(store, folder)
            for weights in SCORED_WEIGHTS[recipe.evaluate.weights]:
                for part, protocol in _protocols(
                    recipe, phase, phases[phase], inputs, digests, last=folder == folders[-1]
                ):
                    spec = fingerprint({"protocol": protocol, "checkpoint": done.digest})
                    place = f"{_folder(recipe)}/{phase}/{done.samples:012d}-{weights}/{part}.{spec}"
                    tasks.append(EvaluationTask(part, phase, folder, done.samples, weights, protocol, place))
    return tasks


def _protocols(
    recipe: Recipe, phase_key: str, phase: Training, inputs: EvaluationInputs, towers: dict[str, str], *, last: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, protocol): whatever a score depends on besides the checkpoint, so that equal fingerprints are comparable
    scores.
    """
    evaluate = recipe.evaluate
    common = {
        "format": FORMATS["evaluations"],
        "precision": evaluate.precision,
        "seed": evaluate.seed,
        "raw": inputs.raw.digest,
    }
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
    reference = reference_fields(inputs.raw, towers["judge"], phase.side_px, evaluate.reference_images)
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
    per_task = evaluate.bench_prompts_per_task
    if not last and evaluate.earlier_bench_prompts_per_task is not None:
        per_task = evaluate.earlier_bench_prompts_per_task
    if recipe.data.source == "small_world" and per_task:
        readable = [sides for sides in all_sides if min(sides) >= MIN_SIDE_PX]
        for task in TASKS:
            bench = {
                "kind": "shapes_bench",
                "prompts_per_task": per_task,
                "images_per_prompt": evaluate.bench_images_per_prompt,
                "sizes": readable,  # (height, width); none: the bench is left out
            }
            yield f"bench-{task}", square | bench
    for height, width in all_sides:
        if len(all_sides) > 1 and height != width and evaluate.bucket_grid_prompts:
            yield (
                f"grid-{height}x{width}",
                sampled(height, width) | {"kind": "grid", "grid": evaluate.bucket_grid_prompts},
            )


def summarise(tasks: Sequence[EvaluationTask], parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tables over all parts, and ShapesBench's overall: all six tasks of a checkpoint have a score or none has."""
    scores, left_out, pictures, bench_tasks, protocols = [], [], [], [], {}
    bench: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, part in zip(tasks, parts, strict=True):
        own = {"checkpoint": task.checkpoint, "phase": task.phase, "samples": task.samples, "weights": task.weights}
        protocol = fingerprint(task.protocol)
        protocols[protocol] = task.protocol
        scores += [own | {"protocol": protocol} | score for score in part["scores"]]
        left_out += [own | {"protocol": protocol} | missing for missing in part["left_out"]]
        pictures += [own | picture for picture in part["pictures"]]
        if task.part.startswith("bench-"):
            bench.setdefault((task.checkpoint, task.weights), []).extend(scores[len(scores) - len(part["scores"]) :])
            if part["scores"]:
                name = task.part.removeprefix("bench-")
                bench_tasks.append(own | {"task": name} | part["details"])
    for rows in bench.values():
        if rows:  # GenEval: the plain mean of the six
            overall = {
                "value": sum(row["value"] for row in rows) / len(rows),
                "count": sum(row["count"] for row in rows),
            }
            scores.append(rows[0] | {"metric": "shapes_bench/overall"} | overall)
    return {
        "scores": scores,
        "bench": bench_tasks,
        "left_out": left_out,
        "pictures": pictures,
        "protocols": protocols,
    }


def _makers(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the parts were made with, each once; every part's own stands in its record."""
    makers = [part["made_by"] for part in parts if "made_by" in part]
    return [maker for place, maker in enumerate(makers) if maker not in makers[:place]]


def _folder(recipe: Recipe) -> str:
    return f"runs/{recipe.run}/evaluations"
