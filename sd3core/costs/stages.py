"""What the stages cost: FLOPs by the recipe's numbers, hours by stated rates.

Rates are of one device. On a GPU they are assumed: training and drawing in bf16, the evaluation's towers in fp32, encoders and
captioner as the recipe says. On a CPU they are measured: no work here is faster than plain matrix products, so its hours are at
least these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3core.errors import UserError
from sd3core.files.tensor_files import TensorFiles
from sd3core.machine import matmul_flops_per_second
from sd3core.metrics.score import LEVELS
from sd3core.mmdit.flops import forward_flops
from sd3core.precision import CPU, PRECISION_DTYPES, has_bf16_arithmetic, resolve_precision
from sd3core.recipe import Precision, Recipe, Training
from sd3core.recipe_compute import GPU_STAGES, Compute
from sd3core.small_world.world import MIN_SIDE_PX, TASKS
from sd3core.specs import latents_part
from sd3core.towers.flops import TowerSizes, tower_sizes

GPU_BF16_TFLOPS = 400.0  # sustained: 40 % of an H100's 989
GPU_FP32_TFLOPS = 40.0  # 60 % of an H100's 67: what of the towers runs in fp32
GPU_BYTES_PER_S, CPU_BYTES_PER_S = 2e12, 2e10  # a captioner writes a token as fast as its weights are read
SMALL_CAPTIONS_PER_S = 200.0  # of an actor: mini's 406 rows/s on two
CAPTION_CONTEXT_TOKENS = 1_000  # of an image and the prompt, as many captioners have them
PROMPT_PLACES = 60  # prompts that ShapesBench has for a task
MILLION = 1_000_000


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one device, by number format."""

    fast: float  # bf16, or fp32 where the device has no arithmetic for it
    fp32: float
    bytes: float  # read from memory, bytes/s
    gpu: bool

    def of(self, precision: Precision) -> float:
        """`auto`: of an encoder, which takes bf16 on GPUs alone."""
        return self.fast if precision == "bf16" or (precision == "auto" and self.gpu) else self.fp32

    @classmethod
    def of_device(cls, gpu: bool, gpu_tflops: float = GPU_BF16_TFLOPS) -> Rates:
        """A CPU's are this machine's, measured now."""
        if gpu:
            return cls(gpu_tflops * 1e12, GPU_FP32_TFLOPS * 1e12, GPU_BYTES_PER_S, True)
        precision = resolve_precision("auto", bf16=has_bf16_arithmetic(CPU))
        return cls(
            *(matmul_flops_per_second(PRECISION_DTYPES[name], CPU) for name in (precision, "fp32")),
            CPU_BYTES_PER_S,
            False,
        )


@dataclass(frozen=True)
class PlannedRows:
    """The rows that data stages are planned for."""

    images: int
    captions: float  # of an image on average, a synthetic one among them
    phases: Mapping[str, int]  # how many of the images a phase takes

    @classmethod
    def of(
        cls, recipe: Recipe, images: int, originals: float = 1.0, taken: Mapping[str, float] | None = None
    ) -> PlannedRows:
        """`originals`: captions that an image comes with; `taken`: part of the images that a phase takes, where that is not all."""
        synthetic = 0 if recipe.caption.captioner == "none" else 1
        phases = {key: round(images * (taken or {}).get(key, 1.0)) for key, _ in recipe.phases()}
        return cls(images, originals + synthetic, phases)


@dataclass(frozen=True)
class StageCost:
    """`name`: as in stage notes, "text", "latents.pretrain", "evaluate". `hours`: of all devices together; None: not known."""

    name: str
    work: str
    flops: float
    hours: float | None
    devices: float
    rows: float  # that it goes through: images, captions, samples, pictures
    gpu: bool  # whether its devices are GPUs


def training_flops(recipe: Recipe, phase: Training) -> float:
    """FLOPs of one sample: forward, backward (twice that), and with activation checkpointing the forward once more."""
    height, width = max(phase.bucket_sides(), key=lambda side: side[0] * side[1])
    passes = 4 if phase.activation_checkpointing else 3
    return passes * _forward(recipe, phase, height, width)


def stage_costs(
    recipe: Recipe, rows: PlannedRows | None = None, gpu_tflops: float = GPU_BF16_TFLOPS
) -> list[StageCost]:
    """The stages' costs in their order. Of a source whose `rows` nobody has counted, data stages cost a million rows.

    `gpu_tflops`: sustained, in bf16.
    """
    sizes, compute, settings = tower_sizes(recipe), recipe.compute, recipe.encode
    if rows is None:
        rows = PlannedRows.of(recipe, recipe.data.images if recipe.data.source == "small_world" else MILLION)
    on_gpus = {stage: compute.for_stage(stage).gpus_per_actor > 0 for stage in GPU_STAGES}
    rates = {gpu: Rates.of_device(gpu, gpu_tflops) for gpu in {compute.gpus_per_rank > 0, *on_gpus.values()}}
    ranks = _Devices(rates[compute.gpus_per_rank > 0], compute.train_ranks * compute.gpus_per_rank or 1)
    on = {stage: _Devices(rates[gpu], _count(compute.for_stage(stage))) for stage, gpu in on_gpus.items()}
    costs = [_captioning(recipe, rows.images, on["caption"])] if recipe.caption.captioner != "none" else []
    captions = rows.images * rows.captions
    text = captions * sizes.text_flops(recipe.text.clip_tokens, recipe.text.t5_tokens)
    work = f"{rows.captions:.3g} x {rows.images:,} rows"
    costs.append(on["encode"].cost("text", work, captions, text, settings.text_precision))
    for key, phase in recipe.phases():
        height, width = max(phase.bucket_sides(), key=lambda side: side[0] * side[1])
        taken, name = rows.phases[key], latents_part(key)
        flops = taken * sizes.vae.encode_flops(height, width) * (2 if settings.flip else 1)
        costs.append(on["encode"].cost(name, f"{taken:,} rows", taken, flops, settings.latent_precision))
        samples = phase.total_steps * phase.global_batch
        flops = samples * training_flops(recipe, phase)
        costs.append(ranks.cost(key, f"{samples:,} samples", samples, flops, "bf16"))
    return [*costs, _evaluation(recipe, sizes, on["evaluate"])]


@dataclass(frozen=True)
class _Devices:
    """What a stage's actors or ranks run on."""

    rates: Rates
    count: float

    def cost(self, name: str, work: str, rows: float, flops: float, precision: Precision) -> StageCost:
        hours = flops / (self.rates.of(precision) * self.count) / 3600
        return StageCost(name, work, flops, hours, self.count, rows, self.rates.gpu)


def _count(compute: Compute) -> float:
    return compute.actors * compute.gpus_per_actor or 1


def _forward(recipe: Recipe, phase: Training, height: int, width: int) -> float:
    text_tokens = recipe.text.clip_tokens + recipe.text.t5_tokens
    return forward_flops(recipe.model_config_for(phase), height * width // 256, text_tokens)


def _captioning(recipe: Recipe, rows: int, on: _Devices) -> StageCost:
    """A model reads image and prompt at the rate of its arithmetic, then writes token by token, its weights read once a batch."""
    caption, shown = recipe.caption, f"{rows:,} rows"
    if caption.captioner == "small_world":
        actors = recipe.compute.for_stage("caption").actors
        return StageCost("caption", shown, 0.0, rows / (SMALL_CAPTIONS_PER_S * actors) / 3600, actors, rows, gpu=False)
    if caption.captioner == "endpoint":
        return StageCost(
            "caption", f"{shown}; at the rate of {caption.endpoint}", 0.0, None, on.count, rows, on.rates.gpu
        )
    parameters = _parameters(caption.model)
    if parameters is None:
        return StageCost(
            "caption", f"{shown}; {caption.model} is not on this machine", 0.0, None, on.count, rows, on.rates.gpu
        )
    flops = 2.0 * parameters * (CAPTION_CONTEXT_TOKENS + caption.max_new_tokens) * rows
    rate = on.rates.of(caption.precision)
    weight_bytes = 4.0 if rate == on.rates.fp32 else 2.0
    written = weight_bytes * parameters * caption.max_new_tokens * rows / caption.batch / on.rates.bytes
    hours = (flops / rate + written) / on.count / 3600
    return StageCost("caption", shown, flops, hours, on.count, rows, on.rates.gpu)


def _parameters(folder: str | None) -> int | None:
    files = sorted(Path(folder or "").glob("*.safetensors")) if folder else []
    try:
        with TensorFiles(files) as tensors:
            return sum(info.elements for info in tensors.infos.values()) or None
    except (UserError, OSError):
        return None


def _evaluation(recipe: Recipe, sizes: TowerSizes, on: _Devices) -> StageCost:
    """Pictures drawn for scores, grids and ShapesBench, decoded and judged, and the validation loss at its levels."""
    evaluate = recipe.evaluate
    both = 2 if evaluate.weights == "both" else 1
    model = towers = 0.0
    drawn = 0
    for _, phase in recipe.phases():
        checkpoints = math.ceil(phase.total_steps * phase.global_batch / phase.checkpoint_every_samples)
        earlier = 0 if evaluate.checkpoints == "last" else checkpoints - 1
        square = _forward(recipe, phase, phase.side_px, phase.side_px)
        model += both * (earlier + 1) * evaluate.validation_images * len(LEVELS) * square
        compared = 2 * evaluate.compared_captions * (earlier + 1)  # of the averaged weights alone
        model += compared * _calls(recipe) * square
        towers += compared * sizes.vae.decode_flops(phase.side_px, phase.side_px)
        drawn += compared
        for last, scored in ((False, earlier), (True, 1)):
            for (height, width), count in _pictures(recipe, phase, last=last).items():
                pictures = both * scored * count
                model += pictures * _calls(recipe) * _forward(recipe, phase, height, width)
                towers += pictures * (sizes.vae.decode_flops(height, width) + sizes.judge.flops(sizes.judge_tokens))
                drawn += pictures
    hours = (model / on.rates.fast + towers / on.rates.fp32) / on.count / 3600
    return StageCost("evaluate", f"{drawn:,} pictures", model + towers, hours, on.count, drawn, on.rates.gpu)


def _calls(recipe: Recipe) -> int:
    """Calls of the network for a picture: guidance makes two of each, with and without the prompt."""
    evaluate = recipe.evaluate
    steps = 2 * evaluate.num_steps - 1 if evaluate.sampler == "heun" else evaluate.num_steps
    return steps * (1 if evaluate.guidance_scale in (0, 1) else 2)


def _pictures(recipe: Recipe, phase: Training, *, last: bool) -> dict[tuple[int, int], int]:
    """(height, width) -> pictures that one checkpoint's evaluation draws with one kind of weights."""
    evaluate, sides = recipe.evaluate, phase.bucket_sides()
    square = (phase.side_px, phase.side_px)
    counts = {square: evaluate.scored_images + evaluate.grid_prompts}
    for side in sides if len(sides) > 1 else []:
        if side[0] != side[1]:
            counts[side] = counts.get(side, 0) + evaluate.bucket_grid_prompts
    per_task = evaluate.bench_prompts_per_task
    if not last and evaluate.earlier_bench_prompts_per_task is not None:
        per_task = evaluate.earlier_bench_prompts_per_task
    readable = [side for side in sides if min(side) >= MIN_SIDE_PX]
    if recipe.data.source == "small_world" and readable:
        whole = len(TASKS) * min(per_task, PROMPT_PLACES) * evaluate.bench_images_per_prompt
        for turn, side in enumerate(readable):
            counts[side] = counts.get(side, 0) + len(range(turn, whole, len(readable)))
    return counts
