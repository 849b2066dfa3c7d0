"""The evaluate stage: scores checkpoints in parts that are each done once.

Every checkpoint kept is scored, with live and EMA weights.

A part is the unit of work and of resume: PART.<fingerprint>.json under runs/RUN/evaluations/PHASE/SAMPLES-WEIGHTS,
written after its pictures. The fingerprint covers the protocol and the checkpoint's digest (its job and its samples):
a changed setting or job makes a new part and nothing else. runs/RUN/evaluations/scores.json is a function of them.

With `precision: auto` each actor settles what it computes in, and the part stands under the protocol with that: scores in
bf16 and in fp32 are of two protocols. A part vouches for itself and for its pictures; a damaged one is made again.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sd3core.data.begun import begin, end
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.phase_images import phase_images
from sd3core.data.records import FileRecord, own_digest, record_bytes, sealed
from sd3core.data.store import Store, StoreDamaged, StoreNotFound, canonical_json
from sd3core.errors import DataError, UserError
from sd3core.metrics.frechet import ranks_nothing
from sd3core.progress import Progress, ProgressCallback, ProgressMeter
from sd3core.recipe import Recipe
from sd3core.small_world.world import TASKS
from sd3core.specs import evaluations_folder, fingerprint, references_folder, scores_path
from sd3core.words import counted, some
from workers.caches import checked_here
from workers.evaluate_rises import rising_losses, unlooked_phases
from workers.evaluate_tasks import EvaluationInputs, EvaluationTask, ScoredPart, plan_tasks
from workers.inputs import actor_device
from workers.pool import Outcome, PoolSettings, map_over_actors
from workers.ray_session import start_ray
from workers.stage import NOTHING_TO_DO, StageResult

PRECISIONS = ("bf16", "fp32")
PART_THREADS = 16


class EvaluationFailed(UserError):
    """Parts that could not be made, after all others were."""


def evaluate_stage(recipe: Recipe, store: Store, inputs: EvaluationInputs, report: ProgressCallback) -> StageResult:
    """Scores the checkpoints of `inputs`; the result names scores.json.

    Raises EvaluationFailed naming the parts given up and why; the finished ones stay.
    """
    started = time.monotonic()
    digests = {"raw": inputs.raw.digest, "text": inputs.text.digest}
    digests |= {key: ref.digest for key, ref in inputs.latents.items()}
    needs = [references_folder(recipe.data.name), inputs.towers]
    folders = {checkpoint.folder for found in inputs.checkpoints.values() for checkpoint in found}
    needs += sorted(folders)
    begin(store, recipe.run, "evaluate", evaluations_folder(recipe.run), digests, needs)
    tasks = plan_tasks(recipe, inputs)
    standing, warnings = _standing_parts(store, tasks, checked_here())
    missing = [task for task in tasks if not standing[task.place]]
    meter = ProgressMeter(len(tasks), "parts", report, already_done=len(tasks) - len(missing))
    made = len(missing)
    if missing or _to_be_of_one_precision(tasks, standing):
        with start_ray(recipe.compute):
            if missing:
                warnings += _run_tasks(recipe, store, inputs, missing, meter)
                standing, _ = _standing_parts(store, tasks, checked_here())
            if other := _to_be_of_one_precision(tasks, standing):  # also of a run that ended before it made them
                warnings.append(
                    f"actors settled bf16 and fp32: {counted(len(other), 'part')} scored in fp32 as well, so that"
                    " a checkpoint's scores are of one precision"
                )
                made += len(other)
                warnings += _run_tasks(recipe, store, inputs, other, meter)
                standing, _ = _standing_parts(store, tasks, checked_here())
    parts = _chosen(tasks, standing)
    others, damaged = _other_parts(recipe, store, folders, parts)
    parts += others
    warnings += damaged
    _fill_dimensions(store, inputs, [part for _, part in parts])
    path = scores_path(recipe.run)
    summary = summarise(parts) | {"shown": sorted({fingerprint(task.protocol) for task, _ in parts[: len(tasks)]})}
    if rising := rising_losses(parts, lambda phase: _images_of(recipe, store, inputs, phase)):
        summary["rising"] = rising
    if unlooked := unlooked_phases(parts[: len(tasks)]):
        warnings.append(
            f"{', '.join(unlooked)}: whether the validation loss rises is not looked at: an earlier version scored checkpoints"
            f" without the losses of single images; delete validation.*.json of them below {store.uri(evaluations_folder(recipe.run))},"
            " and they are scored again"
        )
    data = canonical_json(summary | {"made_by": _makers([part for _, part in parts])})
    if not store.exists(path) or store.get(path) != data:
        store.put(path, data)
    end(store, recipe.run, "evaluate", evaluations_folder(recipe.run))
    total = counted(made + meter.already_done, "part")
    return StageResult(
        "evaluate",
        path,
        fingerprint(summary),
        skipped=made == 0,
        reason=f"{made} of {total} not scored yet" if made else NOTHING_TO_DO,
        seconds=time.monotonic() - started,
        done_before=meter.already_done,
        made=made,
        notes=warnings,
    )


def _images_of(recipe: Recipe, store: Store, inputs: EvaluationInputs, phase: str) -> int | None:
    """None where nobody counted the rows without a caption, as of a phase that an earlier version trained."""
    try:
        return phase_images(store, inputs.latents[phase], inputs.text, dict(recipe.phases())[phase].global_batch)
    except DataError:
        return None


def all_scored(recipe: Recipe, store: Store, inputs: EvaluationInputs) -> bool:
    """Whether `evaluate_stage` has no part to make."""
    tasks = plan_tasks(recipe, inputs)
    standing, _ = _standing_parts(store, tasks, checked_here())
    return all(standing.values()) and not _to_be_of_one_precision(tasks, standing)


def _read_part(store: Store, path: str, checked: CheckedFiles) -> tuple[ScoredPart | None, str | None]:
    """(the part, None), or (None, the file of it that is damaged). One of an earlier version is sealed as it is found."""
    try:
        part = store.get_json(path)
        if "sha256" not in part:
            for picture in part["pictures"]:
                files = (picture["path"], picture["thumbnail"])
                picture["files"] = {file: record_bytes(store.get(file)).model_dump() for file in files}
            part = sealed(part)
            store.put_json(path, part)
        if part["sha256"] != own_digest(part):
            return None, path
        for file, record in (item for picture in part["pictures"] for item in picture["files"].items()):
            if not checked.holds(store, file, FileRecord.model_validate(record)):
                return None, file
    except (StoreNotFound, StoreDamaged, KeyError, ValueError, TypeError, AttributeError):
        return None, path
    return part, None


def _standing_parts(
    store: Store, tasks: Sequence[EvaluationTask], checked: CheckedFiles
) -> tuple[dict[str, dict[str, ScoredPart]], list[str]]:
    """The parts that stand, by task and precision; and a line for each task that has only a damaged one.

    An earlier version left `auto` in the protocol and what was settled beside it: such a part counts as what it is.
    """
    there = {entry.path for folder in {task.folder for task in tasks} for entry in store.list(folder)}
    wanted = [
        (task, variant.path)
        for task in tasks
        for variant in (task, *(task.settled(precision) for precision in PRECISIONS))
        if task.protocol["precision"] == "auto" or variant is task
        if variant.path in there
    ]
    with ThreadPoolExecutor(PART_THREADS) as threads:
        read = list(threads.map(lambda item: _read_part(store, item[1], checked), wanted))
    standing: dict[str, dict[str, ScoredPart]] = {task.place: {} for task in tasks}
    damaged = []
    for (task, _), (part, problem) in zip(wanted, read, strict=True):
        if part is not None:
            standing[task.place][part["precision"]] = part
        else:
            damaged.append((task, problem))
    again = [(task, problem) for task, problem in damaged if not standing[task.place]]
    return standing, [f"{store.uri(problem)} was damaged: {task.title} is scored again" for task, problem in again]


def _rows(tasks: Iterable[EvaluationTask]) -> dict[tuple[str, str], list[EvaluationTask]]:
    """The tasks of a table's row: a checkpoint and a kind of weights."""
    rows: dict[tuple[str, str], list[EvaluationTask]] = {}
    for task in tasks:
        rows.setdefault((task.checkpoint, task.weights), []).append(task)
    return rows


def _whole_in(row: list[EvaluationTask], standing: dict[str, dict[str, ScoredPart]]) -> list[str]:
    return [precision for precision in PRECISIONS if all(precision in standing[task.place] for task in row)]


def _to_be_of_one_precision(
    tasks: Sequence[EvaluationTask], standing: dict[str, dict[str, ScoredPart]]
) -> list[EvaluationTask]:
    """Parts to be made in fp32, which any device has, where a row's parts stand in bf16 and in fp32."""
    mixed = [row for row in _rows(tasks).values() if not _whole_in(row, standing)]
    return [task.settled("fp32") for row in mixed for task in row if "fp32" not in standing[task.place]]


def _chosen(
    tasks: Sequence[EvaluationTask], standing: dict[str, dict[str, ScoredPart]]
) -> list[tuple[EvaluationTask, ScoredPart]]:
    """The part of every task, a row's all in one precision: in that which most rows have."""
    whole = {key: _whole_in(row, standing) for key, row in _rows(tasks).items()}
    counts = Counter(precision for found in whole.values() for precision in found)
    chosen = []
    for task in tasks:
        precision = max(whole[task.checkpoint, task.weights], key=lambda name: (counts[name], name == "bf16"))
        chosen.append((task.settled(precision), standing[task.place][precision]))
    return chosen


def _other_parts(
    recipe: Recipe,
    store: Store,
    known: set[str],
    shown: Sequence[tuple[EvaluationTask, ScoredPart]],
) -> tuple[list[tuple[EvaluationTask, ScoredPart]], list[str]]:
    """What stands of the checkpoints `known` (folders) by other protocols; and a line on those that are damaged, whose scores are left out."""
    seen = {_identity(task) for task, _ in shown}
    pattern = re.compile(
        re.escape(evaluations_folder(recipe.run)) + r"/[^/]+/(\d{12})-(?:ema|live)/[^/]+\.[0-9a-f]{12}\.json"
    )
    places = [
        match
        for match in (pattern.fullmatch(entry.path) for entry in store.list(evaluations_folder(recipe.run)))
        if match
    ]
    checked, others, damaged = checked_here(), [], []
    with ThreadPoolExecutor(PART_THREADS) as threads:
        read = threads.map(lambda match: _read_part(store, match[0], checked), places)
        for match, (part, problem) in zip(places, read, strict=True):
            if part is None:
                damaged.append(store.uri(problem))
                continue
            if part["checkpoint"] not in known:
                continue
            folder = match[0].rpartition("/")[0]
            names = (part["part"], part["phase"], part["checkpoint"], int(match[1]), part["weights"])
            task = EvaluationTask(*names, part["protocol"], folder, "").settled(part["precision"])
            if _identity(task) not in seen:
                seen.add(_identity(task))
                others.append((task, part))
    if not damaged:
        return others, []
    left_out = f"{counted(len(damaged), 'part')} by other settings damaged, whose scores are left out: {some(damaged, len(damaged))}"
    return others, [f"{left_out}; they are scored again with those settings, or delete their .json"]


def _identity(task: EvaluationTask) -> tuple[str, ...]:
    return task.checkpoint, task.weights, task.part, fingerprint(task.protocol)


def _fill_dimensions(store: Store, inputs: EvaluationInputs, parts: Sequence[ScoredPart]) -> None:
    """Adds the dimensions to Fréchet distances that an earlier version wrote without them."""
    scores = [score for part in parts for score in part["scores"] if score["metric"] == "clip_fid"]
    bare = [score for score in scores if "dimensions" not in score]
    if bare:
        config = json.loads(store.get(f"{inputs.towers}/judge_vision/config.json"))
        for score in bare:
            score["dimensions"] = config["projection_dim"]
            score["ranks_nothing"] = ranks_nothing(score["count"], config["projection_dim"])


def _run_tasks(
    recipe: Recipe, store: Store, inputs: EvaluationInputs, tasks: list[EvaluationTask], meter: ProgressMeter
) -> list[str]:
    """Makes the parts; returns what the workers warn of."""

    def ended(outcome: Outcome[EvaluationTask], done: int, total: int) -> None:
        state = "" if outcome.error is None else f" failed: {outcome.error}"
        meter.advance(note=f"{outcome.task.title}{state}")

    def working(task: EvaluationTask, progress: Progress) -> None:
        meter.update(meter.done, f"{task.title}: {progress.done}/{progress.total} {progress.unit}")

    def tell(warning: str) -> None:
        meter.update(meter.done, warning, warning)

    # here, so that a stage with nothing to do loads no models' libraries
    from workers.evaluate_worker import EvaluationWorker

    compute = recipe.compute.for_stage("evaluate")
    worker = {"store_url": store.url, "recipe": recipe, "inputs": inputs, "device": actor_device(compute)}
    outcomes = map_over_actors(EvaluationWorker, worker, tasks, PoolSettings.of(compute), ended, working, tell)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        named = "; ".join(f"{outcome.task.title}: {outcome.error}" for outcome in failed[:5])
        raise EvaluationFailed(
            f"{len(failed)} of {len(tasks)} parts could not be scored: {named}; run the stage again for these only"
        )
    return list(dict.fromkeys(warning for outcome in outcomes for warning in outcome.result))


def summarise(parts: Sequence[tuple[EvaluationTask, ScoredPart]]) -> dict[str, Any]:
    """The tables over all parts, as scores.json has them.

    `scores` rows: checkpoint, phase, samples, weights, protocol, precision, metric, value, count, and what a metric has
    beside it; ShapesBench's overall where all six tasks of a checkpoint by one protocol have a score. `protocols`:
    readable, by fingerprint. `pictures`: phase, samples, weights, name, uri, thumbnail (paths in the store). `left_out`:
    which score, and why there is none. `bench`: a row for each task of ShapesBench with its tallies (all, seen, unseen,
    and by size, "HEIGHTxWIDTH") and chance.
    """
    scores, left_out, pictures, shapes_bench_tasks, protocols = [], [], [], [], {}
    by_checkpoint: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for task, part in parts:
        protocol = fingerprint(task.protocol)
        own = {"checkpoint": task.checkpoint, "phase": task.phase, "samples": task.samples, "weights": task.weights}
        own |= {"protocol": protocol, "precision": part["precision"]}
        protocols[protocol] = task.protocol
        scores += [own | score for score in part["scores"]]
        left_out += [own | missing for missing in part["left_out"]]
        pictures += [own | picture for picture in part["pictures"]]
        if task.part.startswith("bench-") and part["scores"]:
            key = (task.checkpoint, task.weights, protocol)
            by_checkpoint.setdefault(key, []).extend(scores[len(scores) - len(part["scores"]) :])
            shapes_bench_tasks.append(own | {"task": task.part.removeprefix("bench-")} | part["details"])
    for rows in by_checkpoint.values():
        if len(rows) == len(TASKS):  # GenEval: the plain mean of the six
            overall = {
                "value": sum(row["value"] for row in rows) / len(rows),
                "count": sum(row["count"] for row in rows),
            }
            scores.append(rows[0] | {"metric": "shapes_bench/overall"} | overall)
    return {
        "scores": scores,
        "bench": shapes_bench_tasks,
        "left_out": left_out,
        "pictures": pictures,
        "protocols": protocols,
    }


def _makers(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the parts were made with, each once; every part's own stands in its record."""
    makers = [part["made_by"] for part in parts if "made_by" in part]
    return [maker for place, maker in enumerate(makers) if maker not in makers[:place]]
