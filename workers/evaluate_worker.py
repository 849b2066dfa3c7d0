"""Scores one part of a checkpoint at a time.

Towers and model are loaded once and kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch

from sd3core.checkpoint import read_training_checkpoint
from sd3core.comparison_grid import ComparedPicture, comparison_grid
from sd3core.conditioning import join_features
from sd3core.data.batch import Batch
from sd3core.data.compared_rows import compared_rows
from sd3core.data.images import PixelRules
from sd3core.data.kept_rows import KeptRows
from sd3core.data.loader import load_split
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.provenance import device_kind, provenance
from sd3core.data.records import record_bytes, sealed
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shard_reader import ShardReader
from sd3core.data.size_rule import SizeRule
from sd3core.data.split_rows import Row, read_row_crops, read_rows
from sd3core.data.store import open_store
from sd3core.generate import Draw, Generator, grid_columns
from sd3core.metrics import LeftOut, Score
from sd3core.metrics.clip_score import clip_score, image_embeddings
from sd3core.metrics.frechet import frechet_score
from sd3core.metrics.reference import reference_features
from sd3core.metrics.score import LEVELS
from sd3core.metrics.validation_loss import image_losses, level_losses, validation_loss
from sd3core.mmdit import use_lean_steps
from sd3core.pictures import encode_png, make_grid, thumbnail_jpeg
from sd3core.precision import PRECISION_DTYPES, has_bf16_arithmetic, resolve_precision
from sd3core.progress import Progress
from sd3core.recipe import Recipe
from sd3core.sample_settings import SampleSettings
from sd3core.small_world import shapes_bench
from sd3core.small_world.world import MIN_SIDE_PX
from sd3core.towers.artifact import fetch_towers
from sd3core.towers.autoencoder import load_autoencoder
from sd3core.towers.judge import Judge, load_judge
from sd3core.towers.text_encoders import load_text_encoders
from workers.caches import checked_here, shards_cache, towers_cache
from workers.evaluate_tasks import COMPARISON, EvaluationInputs, EvaluationTask

NO_CAPTIONS = "no image of the data set has a caption to draw from"


class EvaluationWorker:
    """EvaluationTask -> warnings. The part's JSON is written after its pictures, in the place of what was settled."""

    def __init__(self, store_url: str, recipe: Recipe, inputs: EvaluationInputs, device: str = "cpu") -> None:
        self.store, self.recipe, self.inputs, self.device = open_store(store_url), recipe, inputs, device
        self.device_has_bf16 = has_bf16_arithmetic(torch.device(device))
        self.progress: Progress | None = None  # of the part at hand
        self.towers = fetch_towers(self.store, inputs.towers, towers_cache())
        self.encoders = load_text_encoders(self.towers, recipe.text, device=device)
        self.autoencoder = load_autoencoder(self.towers, device=device)
        self._loaded: tuple[tuple[str, str, str], Generator] | None = None
        self._batches: dict[str, list[Batch]] = {}

    def __call__(self, task: EvaluationTask) -> list[str]:
        task = task.settled(resolve_precision(task.protocol["precision"], bf16=self.device_has_bf16))
        self.progress = None  # else a new part would first show the end of the one before
        parts = {
            "validation_loss": self._validate,
            "clip_and_fid": self._score_pictures,
            "comparison": self._compare_captions,
            "grid": self._draw_grid,
        }
        result = _Part()
        parts.get(task.protocol["kind"], self._shapes_bench)(task, result)
        fields = {"part": task.part, "phase": task.phase, "checkpoint": task.checkpoint, "weights": task.weights}
        made_by = provenance(device_kind(torch.device(self.device).type)).model_dump(mode="json", exclude_none=True)
        fields |= {"protocol": task.protocol, "precision": task.protocol["precision"], "made_by": made_by}
        fields |= {"device": torch.device(self.device).type}
        self.store.put_json(task.path, sealed(fields | result.to_dict()))
        return result.warnings

    @cached_property
    def judge(self) -> Judge:
        return load_judge(self.towers, self.device)

    @cached_property
    def raw(self) -> Manifest:
        return read_manifest(self.store, self.inputs.raw.folder, self.inputs.raw.digest)

    @cached_property
    def kept(self) -> KeptRows:
        return KeptRows.read(self.store, self.inputs.keep)

    def _generator(self, task: EvaluationTask) -> Generator:
        precision = task.protocol["precision"]
        key = (task.checkpoint, task.weights, precision)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the next one is loaded, so that only one is in memory
            stored = read_training_checkpoint(self.store, task.checkpoint)
            model = stored.model(task.weights).to(self.device, PRECISION_DTYPES[precision])
            use_lean_steps(model)
            generator = Generator(model, self.encoders, self.autoencoder, stored.done.null, stored.formulation)
            self._loaded = (key, generator)
        return self._loaded[1]

    def _sample(self, task: EvaluationTask, drawn: list[Draw], **changed: int) -> Sequence[np.ndarray]:
        """`changed`: settings that are not the protocol's."""

        def count(done: int, total: int) -> None:
            self.progress = Progress(done, total, "sampler steps")

        if not drawn:
            return []
        prompts, seeds = zip(*drawn, strict=True)
        return self._generator(task).sample(
            prompts,
            seeds,
            SampleSettings.from_dict(task.protocol["settings"] | changed),
            batch=self.recipe.evaluate.batch,
            on_step=count,
        )

    @torch.inference_mode()
    def _validate(self, task: EvaluationTask, result: _Part) -> None:
        generator = self._generator(task)
        model = generator.model
        losses = torch.zeros(0, len(LEVELS), dtype=torch.float64)
        for batch in self._held_out_batches(task.phase):
            condition = join_features(batch.text.features(self.device), context_dim=model.config.context_dim)
            x0 = batch.latent.to(self.device).float()
            velocity = generator.formulation.as_rectified_flow(lambda z, t, c=condition: model(z, t, *c))
            part = level_losses(velocity, x0, batch.sample_ids, task.protocol["seed"])
            losses = torch.cat([losses, part])
            self.progress = Progress(len(losses), task.protocol["images"], "images")
        result.add("validation_loss", validation_loss(losses))
        if len(losses):
            result.details["loss_by_level"] = dict(zip(map(str, LEVELS), losses.mean(dim=0).tolist(), strict=True))
            result.details["loss_by_image"] = image_losses(losses).tolist()  # of the same images for all checkpoints

    def _held_out_batches(self, phase: str) -> list[Batch]:
        """Kept for all checkpoints of a phase: they are few, and the shards that hold them are many."""
        if phase not in self._batches:
            evaluate, text = self.recipe.evaluate, self.recipe.text
            references = (self.inputs.latents[phase], self.inputs.text)
            manifests = (read_manifest(self.store, ref.folder, ref.digest) for ref in references)
            cache = ShardCache(self.store, shards_cache(), self.recipe.compute.cache_gb * 1e9)
            reader = ShardReader(self.store, *manifests, cache, clip_tokens=text.clip_tokens, t5_tokens=text.t5_tokens)
            self._batches[phase] = list(load_split(reader, "held_out", evaluate.batch, evaluate.validation_images))
        return self._batches[phase]

    def _score_pictures(self, task: EvaluationTask, result: _Part) -> None:
        """CLIP score and FID over pictures of held-out prompts, and the grid."""
        protocol = task.protocol
        rows = self._rows(task, "held_out", protocol["images"])
        scored = self._numbered([row.caption for row in rows], protocol["seed"])
        grid = self._grid_prompts(task)
        drawn = list(dict.fromkeys([*scored, *grid]))
        images = dict(zip(drawn, self._sample(task, drawn), strict=True))
        features = image_embeddings(self.judge, [images[pair] for pair in scored])
        texts = self.judge.text_features([prompt for prompt, _ in scored]).cpu().numpy() if scored else features
        rules, name = PixelRules.of(self.recipe.data), self.recipe.data.name
        reference = reference_features(
            self.store,
            name,
            self.raw,
            self.judge,
            protocol["reference"],
            rules,
            self._show_images,
            checked_here(),
            self.kept,
        )
        if reference.damaged:
            result.warnings.append(
                f"{self.store.uri(reference.damaged)} was damaged: the reference features are made again"
            )
        result.add("clip_score", clip_score(features, texts, reference.of([row.key for row in rows])))
        result.add("clip_fid", frechet_score(features, reference.features))
        result.details["reference_images"] = len(reference.features)
        self._write_grid(task, result, grid, [images[pair] for pair in grid])

    def _draw_grid(self, task: EvaluationTask, result: _Part) -> None:
        grid = self._grid_prompts(task)
        self._write_grid(task, result, grid, self._sample(task, grid))

    def _compare_captions(self, task: EvaluationTask, result: _Part) -> None:
        """Captions that the phase trained on and held-out ones, drawn beside the real pictures: the same for all checkpoints."""
        protocol, data = task.protocol, self.recipe.data
        reference = self.inputs.latents[task.phase]
        latents = read_manifest(self.store, reference.folder, reference.digest)
        held_out = bool(data.held_out_fraction)
        rows = compared_rows(self.store, self.raw, latents, protocol["each"], held_out=held_out, captioned=True)
        if not rows:
            result.left_out.append({"metric": "comparison", "reason": NO_CAPTIONS})
            return
        drawn = self._numbered([row.caption for _, row in rows], protocol["seed"])
        images = self._sample(task, drawn)
        sides = [image.shape[:2] for image in images]
        chosen = [row for _, row in rows]
        real = read_row_crops(self.store, self.raw, chosen, sides, PixelRules.of(data), checked_here())
        splits, captions = [split for split, _ in rows], [row.caption for row in chosen]
        pictures = [ComparedPicture(*row) for row in zip(splits, captions, images, real, strict=True)]
        more = {"splits": json.dumps(splits)}
        self._write_picture(task, result, COMPARISON, comparison_grid(pictures), drawn, more)

    def _shapes_bench(self, task: EvaluationTask, result: _Part) -> None:
        """Every prompt keeps its seeds, whichever of the prompts are taken. The pictures take the phase's sizes in turn."""
        protocol, name = task.protocol, task.part.removeprefix("bench-")
        sizes, copies = protocol["sizes"], protocol["images_per_prompt"]
        if not sizes:
            made = protocol["settings"]["height"]
            reason = f"its detector needs pictures of at least {MIN_SIDE_PX} px; this phase makes {made} px"
            result.left_out.append({"metric": "shapes_bench", "reason": reason})
            return
        prompts = shapes_bench.load_prompts(name)
        count = min(protocol["prompts_per_task"], len(prompts))
        chosen = [position * len(prompts) // count for position in range(count)]
        drawn = [
            (prompts[position], protocol["seed"] + position * copies + copy)
            for position in chosen
            for copy in range(copies)
        ]
        judged = {}
        for turn, (height, width) in enumerate(sizes):
            own = drawn[turn :: len(sizes)]
            images = self._sample(task, [(prompt.text, seed) for prompt, seed in own], height=height, width=width)
            judged[f"{height}x{width}"] = [
                (prompt, shapes_bench.judge(image, prompt)) for image, (prompt, _) in zip(images, own, strict=True)
            ]
        found = shapes_bench.score(chain.from_iterable(judged.values()))
        of_sizes = {size: asdict(shapes_bench.score(verdicts).all) for size, verdicts in judged.items()}
        result.add(f"shapes_bench/{name}", Score(found.all.right / found.all.pictures, found.all.pictures))
        result.details |= asdict(found) | {"sizes": of_sizes, "chance": shapes_bench.chance()[name]}

    def _grid_prompts(self, task: EvaluationTask) -> list[Draw]:
        """The small world's own grid; else captions of the held-out part, filled up from the training part."""
        count, seed = task.protocol["grid"], task.protocol["seed"]
        if self.recipe.data.source == "small_world":
            fixed = shapes_bench.GRID_PROMPTS
            count = min(count, len(fixed))
            return self._numbered([fixed[position * len(fixed) // count] for position in range(count)], seed)
        captions = self._captions(task, "held_out", count)
        return self._numbered(captions + self._captions(task, "train", count - len(captions)), seed)

    def _captions(self, task: EvaluationTask, split: Literal["held_out", "train"], limit: int) -> list[str]:
        return [row.caption for row in self._rows(task, split, limit)]

    def _rows(self, task: EvaluationTask, split: Literal["held_out", "train"], limit: int) -> list[Row]:
        """Of the images that are kept and that the phase takes."""
        if limit <= 0:
            return []
        sizes = SizeRule.of_dict(task.protocol)
        return read_rows(self.store, self.raw, split, limit, captioned=True, sizes=sizes, kept=self.kept)

    def _numbered(self, prompts: Sequence[str], seed: int) -> list[Draw]:
        return [(prompt, seed + position) for position, prompt in enumerate(prompts)]

    def _show_images(self, done: int, total: int) -> None:
        self.progress = Progress(done, total, "reference images")

    def _write_grid(self, task: EvaluationTask, result: _Part, drawn: list[Draw], images: Sequence[np.ndarray]) -> None:
        if not drawn:
            result.left_out.append({"metric": "grid", "reason": NO_CAPTIONS})
            return
        name = f"{images[0].shape[0]}x{images[0].shape[1]}"
        self._write_picture(task, result, name, make_grid(list(images), grid_columns(len(images))), drawn)

    def _write_picture(
        self,
        task: EvaluationTask,
        result: _Part,
        name: str,
        picture: np.ndarray,
        drawn: list[Draw],
        more: dict[str, str] | None = None,
    ) -> None:
        """As PNG with its settings and as a thumbnail. `more`: settings besides those of all pictures."""
        settings = {
            "prompts": json.dumps([prompt for prompt, _ in drawn], ensure_ascii=False),
            "seeds": json.dumps([seed for _, seed in drawn]),
            "settings": json.dumps(task.protocol["settings"], sort_keys=True),
            "checkpoint": self.store.uri(task.checkpoint),
            "weights": task.weights,
            "precision": task.protocol["precision"],
        } | (more or {})
        files = {f"{task.place}.png": encode_png(picture, settings), f"{task.place}.jpg": thumbnail_jpeg(picture)}
        for path, data in files.items():
            self.store.put(path, data)
        path, thumbnail = files
        records = {path: record_bytes(data).model_dump() for path, data in files.items()}
        result.pictures.append({"name": name, "path": path, "thumbnail": thumbnail, "files": records})


class _Part:
    """What one part found, as its JSON keeps it."""

    def __init__(self) -> None:
        self.scores: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.pictures: list[dict[str, Any]] = []
        self.warnings: list[str] = []  # of making it: no part of the record
        self.details: dict[str, Any] = {}

    def add(self, metric: str, score: Score | LeftOut) -> None:
        if isinstance(score, LeftOut):
            self.left_out.append({"metric": metric, "reason": score.reason})
        else:
            self.scores.append({"metric": metric, "value": score.value, "count": score.count} | score.beside)

    def to_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "left_out": self.left_out, "pictures": self.pictures, "details": self.details}
