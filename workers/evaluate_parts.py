"""The evaluation worker: one part of one checkpoint's scores at a time, with towers and model loaded once and kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sd3core.autoencoder import load_autoencoder
from sd3core.checkpoint import load_model, read_done
from sd3core.conditioning import assemble
from sd3core.data.loader import load_split
from sd3core.data.manifest import Manifest, ManifestRef, read_manifest
from sd3core.data.store import open_store
from sd3core.generate import DTYPES, Generator, SampleSettings, grid_columns
from sd3core.metrics import LeftOut, Score
from sd3core.metrics.clip_score import Judge, clip_score, load_judge
from sd3core.metrics.frechet import frechet_score
from sd3core.metrics.held_out import read_rows, reference_features
from sd3core.metrics.validation_loss import LEVELS, level_losses, validation_loss
from sd3core.pictures import encode_png, make_grid, thumbnail_jpeg
from sd3core.progress import Progress
from sd3core.recipe import Recipe
from sd3core.small_world import shapes_bench
from sd3core.text_encoders import load_text_encoders
from sd3core.towers import fetch_towers


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
    weights: Literal["ema", "live"]
    protocol: dict[str, Any]
    place: str  # path in the store, without an ending

    @property
    def path(self) -> str:
        return f"{self.place}.json"

    @property
    def title(self) -> str:
        return f"{self.phase} {self.samples:,} {self.weights} {self.part}"

    def settings(self) -> SampleSettings:
        fields = {key: value for key, value in self.protocol["settings"].items() if key != "sampler"}
        return SampleSettings(**fields | {"drop": tuple(fields["drop"])})


class EvaluationWorker:
    """EvaluationTask -> path of the part's JSON, which is written after its pictures."""

    def __init__(self, store_url: str, recipe: Recipe, inputs: EvaluationInputs, device: str = "cpu") -> None:
        self.store, self.recipe, self.inputs, self.device = open_store(store_url), recipe, inputs, device
        self.progress = Progress(0, 0, "images")
        self._cache = tempfile.TemporaryDirectory(prefix="sd3-towers-")
        self.towers = fetch_towers(self.store, inputs.towers, Path(self._cache.name))
        self.encoders = load_text_encoders(self.towers, recipe.text, device=device)
        self.autoencoder = load_autoencoder(self.towers, device=device)
        self._loaded: tuple[tuple[str, str], Generator] | None = None

    def __call__(self, task: EvaluationTask) -> str:
        parts = {"validation_loss": self._validate, "clip_and_fid": self._score_pictures, "grid": self._draw_grid}
        result = _Part()
        parts.get(task.protocol["kind"], self._bench)(task, result)
        fields = {"part": task.part, "phase": task.phase, "checkpoint": task.checkpoint, "weights": task.weights}
        self.store.put_json(task.path, fields | {"protocol": task.protocol} | result.to_dict())
        return task.path

    @cached_property
    def judge(self) -> Judge:
        return load_judge(self.towers, self.device)

    @cached_property
    def raw(self) -> Manifest:
        return read_manifest(self.store, self.inputs.raw.folder, self.inputs.raw.digest)

    def _generator(self, task: EvaluationTask) -> Generator:
        key = (task.checkpoint, task.weights)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the next one is loaded, so that only one is in memory
            model = load_model(self.store.uri(task.checkpoint), task.weights).to(self.device, DTYPES[task.protocol["precision"]])
            null = read_done(self.store, task.checkpoint).null
            self._loaded = (key, Generator(model, self.encoders, self.autoencoder, null))
        return self._loaded[1]

    def _sample(self, task: EvaluationTask, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        def count(done: int, total: int) -> None:
            self.progress = Progress(done, total, "sampler steps")

        return self._generator(task).sample(
            prompts, seeds, task.settings(), batch=self.recipe.evaluate.batch, on_step=count
        )

    @torch.inference_mode()
    def _validate(self, task: EvaluationTask, result: _Part) -> None:
        model, limit = self._generator(task).model, task.protocol["images"]
        latents = self.inputs.latents[task.phase]
        manifests = (read_manifest(self.store, ref.folder, ref.digest) for ref in (latents, self.inputs.text))
        losses = torch.zeros(0, len(LEVELS), dtype=torch.float64)
        for batch in load_split(self.store, *manifests, "held_out"):
            take = min(limit - len(losses), len(batch.latent))
            if take <= 0:
                break
            context, pooled = assemble(batch.text.to(self.device), context_dim=model.config.context_dim)
            rows = slice(0, take)
            condition = (context[rows], pooled[rows])
            x0 = batch.latent[rows].to(self.device)
            part = level_losses(lambda z, t, c=condition: model(z, t, *c), x0, np.asarray(batch.sample_ids)[rows], task.protocol["seed"])
            losses = torch.cat([losses, part])
            self.progress = Progress(len(losses), limit, "images")
        result.add("validation_loss", validation_loss(losses))
        if len(losses):
            result.details["loss_by_level"] = dict(zip(map(str, LEVELS), losses.mean(dim=0).tolist(), strict=True))

    def _score_pictures(self, task: EvaluationTask, result: _Part) -> None:
        """CLIP score and FID over pictures of held-out prompts, the first of which are the grid."""
        protocol, seed = task.protocol, task.protocol["seed"]
        prompts = [row.caption for row in read_rows(self.store, self.raw, "held_out", protocol["images"], captioned=True)]
        scored = len(prompts)
        prompts += self._training_prompts(protocol["grid"] - scored)
        if not prompts:
            result.left_out.append({"metric": "grid", "reason": "no image of the data set has a caption to draw from"})
            return
        images = self._sample(task, prompts, range(seed, seed + len(prompts)))
        features = self.judge.image_features(images[:scored]) if scored else np.zeros((0, self.judge.dimensions))
        texts = self.judge.text_features(prompts[:scored]) if scored else features
        reference = reference_features(
            self.store, self.recipe.data.name, self.raw, self.judge, protocol["reference"], self.recipe.data.max_image_pixels, self._show_images
        )
        result.add("clip_score", clip_score(features, texts))
        result.add("clip_fid", frechet_score(features, reference))
        result.details["reference_images"] = len(reference)
        self._write_grid(task, result, images[: protocol["grid"]], prompts, seed)

    def _draw_grid(self, task: EvaluationTask, result: _Part) -> None:
        count, seed = task.protocol["grid"], task.protocol["seed"]
        prompts = [row.caption for row in read_rows(self.store, self.raw, "held_out", count, captioned=True)]
        prompts += self._training_prompts(count - len(prompts))
        if prompts:
            self._write_grid(task, result, self._sample(task, prompts, range(seed, seed + len(prompts))), prompts, seed)

    def _bench(self, task: EvaluationTask, result: _Part) -> None:
        """Every prompt keeps its seeds, whichever of the prompts are taken."""
        protocol, name = task.protocol, task.part.removeprefix("bench-")
        prompts, copies = shapes_bench.load_prompts(name), protocol["images_per_prompt"]
        count = min(protocol["prompts_per_task"], len(prompts))
        chosen = [position * len(prompts) // count for position in range(count)]
        repeated = [prompts[position] for position in chosen for _ in range(copies)]
        seeds = [protocol["seed"] + position * copies + copy for position in chosen for copy in range(copies)]
        images = self._sample(task, [prompt.text for prompt in repeated], seeds)
        right = [shapes_bench.judge(image, prompt) for image, prompt in zip(images, repeated, strict=True)]
        result.add(f"shapes_bench/{name}", Score(sum(right) / len(right), len(right)))

    def _training_prompts(self, count: int) -> list[str]:
        """For the grid of a data set whose held-out part has too few captions."""
        rows = read_rows(self.store, self.raw, "train", count, captioned=True) if count > 0 else []
        return [row.caption for row in rows]

    def _show_images(self, done: int, total: int) -> None:
        self.progress = Progress(done, total, "reference images")

    def _write_grid(self, task: EvaluationTask, result: _Part, images: np.ndarray, prompts: Sequence[str], seed: int) -> None:
        grid = make_grid(list(images), grid_columns(len(images)))
        settings = {
            "prompts": json.dumps(list(prompts[: len(images)]), ensure_ascii=False),
            "seeds": json.dumps([seed + i for i in range(len(images))]),
            "settings": json.dumps(task.protocol["settings"], sort_keys=True),
            "checkpoint": self.store.uri(task.checkpoint),
            "weights": task.weights,
            "precision": task.protocol["precision"],
        }
        self.store.put(f"{task.place}.png", encode_png(grid, settings))
        self.store.put(f"{task.place}.jpg", thumbnail_jpeg(grid))
        name = f"{images.shape[1]}x{images.shape[2]}"
        result.pictures.append({"name": name, "path": f"{task.place}.png", "thumbnail": f"{task.place}.jpg"})


class _Part:
    """What one part found, as its JSON keeps it."""

    def __init__(self) -> None:
        self.scores: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []
        self.pictures: list[dict[str, str]] = []
        self.details: dict[str, Any] = {}

    def add(self, metric: str, score: Score | LeftOut) -> None:
        if isinstance(score, LeftOut):
            self.left_out.append({"metric": metric, "reason": score.reason})
        else:
            self.scores.append({"metric": metric, "value": score.value, "count": score.count})

    def to_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "left_out": self.left_out, "pictures": self.pictures, "details": self.details}
