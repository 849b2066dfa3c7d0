"""The towers stage: trains small stand-ins, or checks released weights.

Small ones learn from the raw data's training part.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sd3core.data.begun import begin
from sd3core.data.images import PixelRules, decode_image
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.files.local_paths import expanded
from sd3core.files.weight_files import DIFFUSERS_STEM, TRANSFORMERS_STEM, find_weights, is_index
from sd3core.progress import Progress, ProgressCallback, ProgressMeter
from sd3core.recipe import Recipe, ReleasedTowers, SmallTowers
from sd3core.specs import towers_fields, towers_folder
from sd3core.towers.artifact import (
    TOWER_FOLDERS,
    TowerEntry,
    commit_tower,
    commit_towers,
    damaged_towers,
    finished_towers,
    read_towers,
)
from workers.caches import checked_here
from workers.inputs import InputShard, input_shards, read_input_index, shard_images
from workers.pool import Outcome, PoolSettings, made_by, map_over_actors
from workers.ray_session import start_ray
from workers.stage import NOTHING_TO_DO, StageFailed, StageResult, reason_to_work, recall_stage, remember_stage

LONGEST_FIRST = ("vae", "judge", "clip_l", "clip_g", "t5")
LEFT_BEHIND = (".bin", ".msgpack", ".h5", ".onnx", ".md")  # other forms of the weights that lie in released folders


def towers_stage(recipe: Recipe, store: Store, raw: ManifestRef | None, report: ProgressCallback) -> StageResult:
    """Makes the towers that are not finished and commits their manifest. `raw` may be None where the towers are
    released.

    Towers are pinned: once made they stay, however the data set grows. A damaged one is made again, as it was. Raises
    StageFailed naming the towers that failed.
    """
    started = time.monotonic()
    folder, fields = towers_folder(recipe), towers_fields(recipe)
    begin(store, recipe.run, "towers", folder, fields | ({"raw": raw.digest} if raw else {}))
    note = recall_stage(store, recipe.run, "towers")
    finished = finished_towers(store, folder)
    damaged = damaged_towers(store, folder, finished, checked_here())
    missing = [name for name in LONGEST_FIRST if name not in finished or name in damaged]
    reason, manifest = NOTHING_TO_DO, None
    if not missing:
        manifest = _standing_manifest(store, folder)
    if manifest is None:
        reason = reason_to_work(note, folder, fields, len(missing), len(TOWER_FOLDERS), "tower")
        pinned = {name: finished[name] for name in damaged}
        outcomes = _make(recipe, store, raw, folder, missing, pinned, report) if missing else []
        manifest = commit_towers(store, folder, fields, made_by(outcomes, recipe.compute.for_stage("towers").actors))
    reference = ManifestRef(folder, manifest.digest)
    remember_stage(store, recipe.run, "towers", folder, reference.digest, fields)
    return StageResult(
        stage="towers",
        path=reference.path,
        digest=reference.digest,
        skipped=reason == NOTHING_TO_DO,
        reason=reason,
        seconds=time.monotonic() - started,
        done_before=len(finished) - len(damaged),
        made=len(missing),
        bytes=manifest.bytes,
        warnings=[f"{store.uri(folder)}/{path} was damaged: {name} is made again" for name, path in damaged.items()],
    )


def _standing_manifest(store: Store, folder: str):
    try:
        return read_towers(store, folder)
    except DataError:
        return None  # the towers are there: the manifest is written over them again


def _make(
    recipe: Recipe,
    store: Store,
    raw: ManifestRef | None,
    folder: str,
    missing: list[str],
    pinned: dict[str, TowerEntry],
    report: ProgressCallback,
) -> list[Outcome[str]]:
    """One tower is one task: with one thread each, the long VAE and the four others keep two cores busy."""
    small, released = recipe.towers.small, recipe.towers.released
    if small is not None:
        if raw is None:
            raise DataError("towers.small: the towers learn from the raw shards; run the ingest stage first")
        rows = input_shards(read_manifest(store, raw.folder, raw.digest))
        worker_class, steps = SmallTowerWorker, {name: getattr(small, name).steps for name in TOWER_FOLDERS}
        kwargs = {"small": small, "shards": list(rows.values()), "rules": PixelRules.of(recipe.data)}
        kwargs["seed"] = recipe.seed
    else:
        worker_class, steps = ReleasedTowerWorker, {name: 1 for name in TOWER_FOLDERS}
        kwargs = {"released": released}
    unit = "steps" if small is not None else "towers"
    tally = _Tally(ProgressMeter(sum(steps[name] for name in missing), unit, report), steps)
    with start_ray(recipe.compute):
        outcomes = map_over_actors(
            worker_class,
            {"store_url": store.url, "folder": folder, "pinned": pinned, **kwargs},
            missing,
            PoolSettings.of(recipe.compute.for_stage("towers")),
            tally.finished,
            tally.working,
            tally.tell,
        )
    failures = [f"{o.task} ({o.error}, {o.attempts} attempts)" for o in outcomes if o.error is not None]
    if failures:
        raise StageFailed(f"towers: {len(failures)} of {len(missing)} could not be made: {'; '.join(failures)}")
    return outcomes


class _Tally:
    """Training steps over all towers; a tower's own progress is scaled to its steps."""

    def __init__(self, meter: ProgressMeter, steps: dict[str, int]) -> None:
        self.meter, self.steps = meter, steps
        self.finished_steps = 0
        self.busy: dict[str, Progress] = {}

    def working(self, name: str, progress: Progress) -> None:
        self.busy[name] = progress
        self._show()

    def finished(self, outcome: Outcome[str], done: int, total: int) -> None:
        self.busy.pop(outcome.task, None)
        self.finished_steps += self.steps[outcome.task]
        self._show()

    def tell(self, warning: str) -> None:
        self._show(warning)

    def _show(self, warning: str = "") -> None:
        done = sum(self.steps[name] * p.done / max(p.total, 1) for name, p in self.busy.items())
        notes = [f"{name} {p.done}/{p.total}{' ' + p.note if p.note else ''}" for name, p in sorted(self.busy.items())]
        self.meter.update(self.finished_steps + int(done), "; ".join(notes), warning)


class SmallTowerWorker:
    """Trains one small tower a call, and commits it. The pictures are read once, when the worker is loaded."""

    def __init__(
        self,
        store_url: str,
        folder: str,
        small: SmallTowers,
        shards: list[InputShard],
        rules: PixelRules,
        seed: int,
        pinned: dict[str, TowerEntry] | None = None,  # by name, of those that are made again
    ) -> None:
        self.store, self.folder, self.pinned = open_store(store_url), folder, pinned or {}
        self.small, self.seed = small, seed
        rows = list(training_rows(self.store, shards, small.images, rules))
        self.images = [image for image, _ in rows]
        self.captions = [caption for _, caption in rows]
        self.progress: Progress | None = None

    def __call__(self, name: str) -> TowerEntry:
        from sd3core.towers.training.make import make_small_tower  # here, so that the driver imports no diffusers

        self.progress = None
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"tower-{name}-") as scratch:
            figures = make_small_tower(
                name,
                self.small,
                self.images,
                self.captions,
                self.seed,
                Path(scratch),
                lambda p: setattr(self, "progress", p),
            )
            seconds = round(time.monotonic() - started, 1)
            figures |= {"seconds": seconds}
            pinned = self.pinned.get(name)
            return commit_tower(self.store, self.folder, name, Path(scratch), figures, pinned=pinned)


def training_rows(
    store: Store, shards: list[InputShard], at_most: int, rules: PixelRules
) -> Iterator[tuple[np.ndarray, str]]:
    """(uint8 (H, W, 3), first caption) of rows spread evenly over the training part; the held-out part is never read."""
    captions: dict[tuple[int, str], str] = {}
    for position, shard in enumerate(shards):
        columns = read_input_index(store, shard).select(["key", "caption", "split"]).to_pydict()
        for key, caption, split in zip(columns["key"], columns["caption"], columns["split"], strict=True):
            if split == "train":
                captions[position, key] = caption
    places = list(captions)
    chosen = {places[i] for i in np.linspace(0, len(places) - 1, min(at_most, len(places)), dtype=int)}
    for position in sorted({position for position, _ in chosen}):
        for key, data in shard_images(store, shards[position]):
            if (position, key) not in chosen:
                continue
            try:
                yield np.asarray(decode_image(data, rules)), captions[position, key]
            except DataError:
                continue  # ingest has named it already


class ReleasedTowerWorker:
    """Loads one released tower with the class that will use it, and puts its files into the store."""

    def __init__(
        self, store_url: str, folder: str, released: ReleasedTowers, pinned: dict[str, TowerEntry] | None = None
    ) -> None:
        self.store, self.folder, self.pinned = open_store(store_url), folder, pinned or {}
        self.released = released
        self.progress: Progress | None = None

    def __call__(self, name: str) -> TowerEntry:
        with tempfile.TemporaryDirectory(prefix=f"tower-{name}-") as scratch:
            local = Path(scratch)
            sources = lay_out_released(name, self.released, local)
            origin = {"released": {part: str(path) for part, path in sources.items()}}
            show = lambda progress: setattr(self, "progress", progress)
            return commit_tower(self.store, self.folder, name, local, origin, show, self.pinned.get(name))


def lay_out_released(name: str, released: ReleasedTowers, local: Path) -> dict[str, Path]:
    """Checks that a released tower loads, and links its files into `local` as an artifact has them. Returns its
    folders.

    Raises DataError naming the recipe's key and the folder that is missing or cannot be loaded.
    """
    import torch
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, T5EncoderModel

    from sd3core.towers.autoencoder import load_autoencoder
    from sd3core.towers.text_encoders import load_model_folder, load_tokenizer

    model_folder = expanded(getattr(released, name))
    if not model_folder.is_dir():
        raise DataError(f"towers.released.{name} {str(model_folder)!r}: no such folder")
    sources = {}
    if name == "vae":
        load_autoencoder(model_folder)
        sources["vae"] = model_folder / "vae" if (model_folder / "vae").is_dir() else model_folder
    elif name == "judge":
        text_part, vision_part, tokenizer_part = TOWER_FOLDERS[name]
        clip = load_model_folder(CLIPModel, model_folder, torch.float32)
        sides = {
            text_part: (CLIPTextModelWithProjection, clip.config.text_config),
            vision_part: (CLIPVisionModelWithProjection, clip.config.vision_config),
        }
        for part, (side_class, config) in sides.items():
            config.projection_dim = clip.config.projection_dim  # a whole CLIP's parts may name another one
            side, weights = side_class(config), clip.state_dict()
            side.load_state_dict({key: weights[key] for key in side.state_dict()})
            side.save_pretrained(local / part)
            sources[part] = model_folder
        load_tokenizer(model_folder)
        _link(model_folder, local / tokenizer_part, weights=False)
        return sources
    else:
        model_part, tokenizer_part = TOWER_FOLDERS[name]
        tokenizer_folder = expanded(getattr(released, f"{name}_tokenizer"))
        load_model_folder(T5EncoderModel if name == "t5" else CLIPTextModelWithProjection, model_folder, torch.bfloat16)
        load_tokenizer(tokenizer_folder)
        sources |= {model_part: model_folder, tokenizer_part: tokenizer_folder}
    for part, source in sources.items():
        _link(source, local / part, weights="tokenizer" not in part)
    return sources


def _link(source: Path, target: Path, weights: bool) -> None:
    """Links to the plain files of a folder: one set of weights in safetensors, or none for a tokenizer.

    Where that is of another precision, it is called as the plain one, which every program looks for.
    """
    target.mkdir(parents=True)
    taken = find_weights(source, (DIFFUSERS_STEM, TRANSFORMERS_STEM)) if weights else None
    for path in sorted(source.iterdir()):
        left_behind = path.suffix in LEFT_BEHIND or path.suffix == ".safetensors" or is_index(path.name)
        if path.is_file() and not left_behind:
            (target / path.name).symlink_to(path.resolve())
    for name in (*taken.files, *filter(None, [taken.index])) if taken else ():
        plain = name if name != taken.name else name.replace(f".{taken.variant}.", ".") if taken.variant else name
        (target / plain).symlink_to((source / name).resolve())
