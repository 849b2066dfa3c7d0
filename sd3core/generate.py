"""From prompts to pictures: checkpoint, towers and sampler put together once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sd3core.buckets import DOWNSAMPLING
from sd3core.checkpoint import Checkpoint, open_checkpoint
from sd3core.checkpoint_facts import Null
from sd3core.conditioning import ENCODERS, TextFeatures, join_features
from sd3core.errors import UserError
from sd3core.files.whole_output import atomic_output
from sd3core.formulations import find_formulation
from sd3core.mmdit import Backbone, use_lean_steps
from sd3core.pictures import encode_png, make_grid, to_uint8
from sd3core.precision import PRECISION_DTYPES
from sd3core.sample_settings import SampleSettings, Weights
from sd3core.sampling import SAMPLERS, solve
from sd3core.towers.artifact import check_vae_folder
from sd3core.towers.autoencoder import Autoencoder, load_autoencoder
from sd3core.towers.text_encoders import TextEncoders, load_text_encoders
from sd3core.words import cut_at_word

Pair = tuple[Tensor, Tensor]  # context (B, L, D), pooled (B, P)
Draw = tuple[str, int]  # prompt and seed
NOTE_CHARS = 200  # of the words or the prompt that a note names


class Generator:
    """Pictures from prompts. A picture's noise is a function of its seed alone, so batches may be cut in any way."""

    def __init__(
        self, model: Backbone, encoders: TextEncoders, autoencoder: Autoencoder, null: Null, formulation: str = "rf"
    ) -> None:
        wanted = (model.config.context_dim, model.config.pooled_dim)
        if encoders.widths != wanted:
            raise UserError(
                f"the model takes text of widths {wanted[0]} and {wanted[1]} (context, pooled), these text encoders give"
                f" {encoders.widths[0]} and {encoders.widths[1]}: name the towers that it was trained with"
            )
        channels = int(autoencoder.module.config.latent_channels)
        if channels != model.config.latent_channels:
            raise UserError(
                f"the model takes latents of {model.config.latent_channels} channels, this VAE's have {channels}: name the"
                " towers that it was trained with"
            )
        self.model = model.eval().requires_grad_(False)
        self.encoders, self.autoencoder, self.null = encoders, autoencoder, null
        self.formulation = find_formulation(formulation)

    @classmethod
    def load(
        cls,
        checkpoint: str | Checkpoint,
        towers: Path | str,
        *,
        weights: Weights | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Generator:
        """checkpoint: URL or path of a training checkpoint or a plain model folder, or one that is open. dtype: the
        transformer's; towers are fp32.
        """
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        facts = opened.facts
        check_vae_folder(towers, opened.config.latent_channels)  # before anything large is read
        encoders = load_text_encoders(towers, facts.text, device=device)
        autoencoder = load_autoencoder(towers, device=device)
        model = opened.model(weights).to(device, dtype)
        use_lean_steps(model)
        return cls(model, encoders, autoencoder, facts.null, facts.formulation)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        *,
        batch: int = 64,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """(n, height, width, 3) uint8, one picture for each prompt and its seed. on_step(steps done, steps in all)
        over all batches; the first call says 0 done.

        Raises UserError where the size does not fit the model, or prompts and seeds do not pair.
        """
        return np.concatenate([*self.batches(prompts, seeds, settings, batch=batch, on_step=on_step)])

    @torch.inference_mode()
    def batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        *,
        batch: int = 64,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """`sample`, each batch as soon as it is drawn."""
        self._check(prompts, seeds, settings)
        total = -(-len(prompts) // batch) * settings.num_steps
        if on_step is not None:
            on_step(0, total)
        for start in range(0, len(prompts), batch):
            done = start // batch * settings.num_steps

            def count(step: int, z: Tensor, done: int = done) -> None:
                if on_step is not None:
                    on_step(done + step + 1, total)

            rows = slice(start, start + batch)
            latent = self.latents(prompts[rows], seeds[rows], settings, count)
            yield to_uint8(self.autoencoder.decode(latent))

    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleSettings,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """(n, 16, height / 8, width / 8), normalised, float32."""
        config, device = self.model.config, next(self.model.parameters()).device
        shape = (config.latent_channels, settings.height // DOWNSAMPLING, settings.width // DOWNSAMPLING)
        own = [torch.Generator().manual_seed(seed) for seed in seeds]

        def fresh() -> Tensor:
            """Each picture's own next noise."""
            return torch.stack([torch.randn(shape, generator=generator) for generator in own]).to(device)

        cond, null = self.conditioning(prompts, settings.drop, settings.negative_prompt)
        formulation = self.formulation.shifted(settings.shift)
        predict = formulation.as_rectified_flow(_guided_in_one_batch(self.model, cond, null, settings.guidance_scale))
        start, sigmas = formulation.start(fresh()), formulation.sigmas(settings.num_steps, settings.schedule)
        return solve(settings.sampler, predict, start, sigmas, fresh=fresh, on_step=on_step)

    def conditioning(
        self, prompts: Sequence[str], drop: Sequence[str] = (), negative_prompt: str | None = None
    ) -> tuple[Pair, Pair]:
        """(context, pooled) of the prompts, and that of what guidance leads away from: the negative prompt, or
        "no prompt" as the checkpoint was trained with it. An encoder in `drop` says of both what it says of no prompt.
        """
        dim, null = self.model.config.context_dim, self._null_features
        features = self.encoders.encode(list(prompts), drop=drop)
        keep = torch.tensor([[name not in drop for name in ENCODERS]]).expand(len(prompts), -1)
        cond = join_features(features, keep, null, dim)
        if negative_prompt is None:
            return cond, join_features(features, torch.zeros_like(keep), null, dim)
        context, pooled = join_features(self.encoders.encode([negative_prompt], drop=drop), keep[:1], null, dim)
        return cond, (context.expand(len(prompts), -1, -1), pooled.expand(len(prompts), -1))

    @cached_property
    def _null_features(self) -> TextFeatures | None:
        return self.encoders.null() if self.null == "empty" else None

    def _check(self, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings) -> None:
        if not prompts or len(prompts) != len(seeds):
            raise UserError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one prompt and one seed for each"
            )
        unknown = sorted(set(settings.drop) - set(ENCODERS))
        if unknown:
            raise UserError(f"no encoder {unknown[0]!r} to drop; there are {', '.join(ENCODERS)}")
        if settings.sampler not in SAMPLERS:
            raise UserError(f"no sampler {settings.sampler!r}; there are {', '.join(SAMPLERS)}")
        if settings.negative_prompt is not None and settings.guidance_scale == 1:
            raise UserError("a negative prompt does nothing at guidance scale 1; take another scale, or leave it out")
        if settings.convention == "textbook" and not self.formulation.is_rectified_flow:
            raise UserError(
                f"schedule textbook is rectified flow's; {self.formulation.name} has one of its own: leave it out"
            )
        step = DOWNSAMPLING * self.model.config.patch_size
        largest = self.model.config.position_max * step
        for side, px in (("height", settings.height), ("width", settings.width)):
            if px % step or not step <= px <= largest:
                raise UserError(f"{side} {px} px: this model makes multiples of {step} px up to {largest}")


def _guided_in_one_batch(model: Backbone, cond: Pair, null: Pair, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """null + scale * (cond - null), as sampling.guided, with both halves in one forward pass."""
    if scale == 1:
        return lambda z, t: model(z, t, *cond)
    if scale == 0:
        return lambda z, t: model(z, t, *null)
    context, pooled = (torch.cat(both) for both in zip(cond, null, strict=True))

    def predict(z: Tensor, t: Tensor) -> Tensor:
        of_cond, of_null = model(z.repeat(2, 1, 1, 1), t.repeat(2), context, pooled).chunk(2)
        return of_null + scale * (of_cond - of_null)

    return predict


def sample_to_files(
    checkpoint: str,
    towers: Path | str,
    draws: Sequence[Draw],
    out: Path | str,
    *,
    columns: int | None = None,
    weights: Weights | None = None,
    precision: Literal["bf16", "fp32"] = "fp32",
    device: str = "cpu",
    batch: int = 64,
    on_step: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Path]:
    """Draws each prompt with its seed and writes OUT/00000.png ... and, of more than one, OUT/00000-grid.png, with the
    settings inside each file. Numbers go on after those of pictures that are there. -> paths, grid last. A batch's
    pictures are there as soon as it is drawn.

    columns: of the grid; None makes it square. on_note hears, before drawing, what a person should know of the prompts.
    `settings`: fields of SampleSettings; None takes the default, which for size and shift is the checkpoint's own.
    """
    out = Path(out)
    opened = open_checkpoint(checkpoint)
    chosen = opened.facts.settings(**{key: value for key, value in settings.items() if value is not None})
    out.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost where that cannot be
    generator = Generator.load(opened, towers, weights=weights, dtype=PRECISION_DTYPES[precision], device=device)
    prompts, seeds = [prompt for prompt, _ in draws], [seed for _, seed in draws]
    if on_note is not None:
        for note in prompt_notes(generator.encoders, [*prompts, chosen.negative_prompt or ""], chosen.drop):
            on_note(note)
    common = {
        "settings": json.dumps(chosen.to_dict(), sort_keys=True, ensure_ascii=False),
        "checkpoint": checkpoint,
        "formulation": generator.formulation.name,
        "precision": precision,
    }
    if taken := opened.weights_taken(weights):
        common["weights"] = taken
    first = 1 + max((int(path.stem) for path in out.glob("*.png") if path.stem.isdecimal()), default=-1)
    images: list[np.ndarray] = []
    paths: list[Path] = []
    for drawn in generator.batches(prompts, seeds, chosen, batch=batch, on_step=on_step):
        for image in drawn:
            prompt, seed = draws[len(images)]
            paths.append(out / f"{first + len(images):05d}.png")
            images.append(image)
            with atomic_output(paths[-1]) as path:
                path.write_bytes(encode_png(image, {"prompt": prompt, "seed": seed} | common))
    if len(images) == 1:
        return paths
    many = {"prompts": json.dumps(prompts, ensure_ascii=False), "seeds": json.dumps(seeds)}
    grid = out / f"{first:05d}-grid.png"
    with atomic_output(grid) as path:
        path.write_bytes(encode_png(make_grid(images, columns or grid_columns(len(images))), many | common))
    return [*paths, grid]


def prompt_notes(encoders: TextEncoders, prompts: Sequence[str], drop: Sequence[str]) -> Iterator[str]:
    """What of the prompts the encoders in use do not take in."""
    unknown = encoders.unknown_words(prompts, drop)
    if unknown:
        yield f"the text encoders do not know, only spell: {cut_at_word(', '.join(unknown), NOTE_CHARS)}"
    for prompt in encoders.too_long(prompts, drop):
        yield f"longer than all text encoders read, its end says nothing: {cut_at_word(prompt, NOTE_CHARS)}"


def grid_columns(count: int) -> int:
    """Columns of a grid as near to a square as may be, not higher than wide."""
    return max(1, math.ceil(math.sqrt(count)))
