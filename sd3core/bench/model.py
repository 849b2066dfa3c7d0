"""MM-DiT against diffusers' SD3Transformer2DModel, side by side.

Both have the same weights, inputs, optimizer and batch, in one process.

A training step is forward, backward and AdamW. Three ways to compute it:

fp32      weights, gradients and activations in fp32
bf16      weights and activations in bf16, an fp32 master copy that AdamW steps
autocast  fp32 weights, matmuls in bf16 under torch.autocast

Sampling is Euler steps with guidance, both halves in one batch. Before anything is timed, both models must give the
same velocity for the same input in fp32, and this model's may not lose more to the mode's rounding than diffusers'.
Peak memory is that of forward and backward above weights, gradients and optimizer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd3core.bench.measure import interleaved, median_ratio, peak_bytes_above_start, product_seconds
from sd3core.checkpoint_formats import diffusers_config, to_diffusers
from sd3core.errors import UserError
from sd3core.freed_memory import keep_freed_memory
from sd3core.machine import matmul_flops_per_second
from sd3core.mmdit import MMDiT, MMDiTConfig, use_lean_steps
from sd3core.mmdit.flops import forward_flops
from sd3core.precision import has_bf16_arithmetic
from sd3core.sampling import sample_euler, sigma_schedule

MODES = ("fp32", "bf16", "autocast")
OURS, THEIRS = "MM-DiT", "diffusers"
GUIDANCE_SCALE = 5.0
PARITY = 1e-3  # largest difference of the velocities in fp32 over their standard deviation
ROUNDING = 1.2  # times what diffusers' velocity loses to bf16: as much is this model allowed to lose

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (latent, t, context, pooled) -> velocity


@dataclass(frozen=True)
class ModelBench:
    """What is measured. Image tokens are those of a square latent, so their number is a square."""

    depth: int = 6
    image_tokens: int = 256
    text_tokens: int = 154
    batch: int = 4
    context_dim: int = 4096
    pooled_dim: int = 2048
    qk_norm: str | None = None
    sampling_steps: int = 4
    rounds: int = 7
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.image_tokens < 1 or math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise UserError(f"--image-tokens {self.image_tokens}: a square latent has a square number of them, as 256")
        if min(self.depth, self.text_tokens, self.sampling_steps, self.rounds) < 1:
            raise UserError("--depth, --text-tokens, --steps and --rounds must be at least 1")
        if self.batch < 2 or self.batch % 2:
            raise UserError(f"--batch {self.batch}: sampling takes half of it with guidance, so it must be even")

    def config(self) -> MMDiTConfig:
        side = math.isqrt(self.image_tokens)
        widths = {"context_dim": self.context_dim, "pooled_dim": self.pooled_dim, "qk_norm": self.qk_norm}
        return MMDiTConfig.from_depth(self.depth, position_base=side, position_side=side, position_max=side, **widths)


@dataclass(frozen=True)
class BenchInputs:
    latent: Tensor  # (B, 16, h, w)
    t: Tensor  # (B,)
    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P)
    target: Tensor  # (B, 16, h, w)

    @classmethod
    def draw(cls, bench: ModelBench, dtype: torch.dtype) -> BenchInputs:
        g = torch.Generator().manual_seed(0)
        side, n = 2 * math.isqrt(bench.image_tokens), bench.batch
        latent, target = torch.randn(2, n, 16, side, side, generator=g).to(bench.device, dtype)
        context = torch.randn(n, bench.text_tokens, bench.context_dim, generator=g).to(bench.device, dtype)
        pooled = torch.randn(n, bench.pooled_dim, generator=g).to(bench.device, dtype)
        return cls(latent, torch.rand(n, generator=g).to(bench.device), context, pooled, target)


@dataclass(frozen=True)
class Contender:
    module: nn.Module
    call: Call


def contenders(bench: ModelBench) -> dict[str, Contender]:
    """Both models with the same weights, in fp32. UserError where diffusers is not installed."""
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError:
        raise UserError(
            "sd3 bench model: diffusers, the yardstick, is not installed here: pip install diffusers"
        ) from None
    torch.manual_seed(0)
    ours = MMDiT(bench.config())
    with torch.no_grad():  # the start gives zero everywhere, and two zeros say nothing about parity
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = SD3Transformer2DModel(**diffusers_config(bench.config()))
    theirs.load_state_dict(to_diffusers(ours))
    ours, theirs = ours.to(bench.device), theirs.to(bench.device)
    use_lean_steps(ours)

    def call_theirs(latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return their_forward(latent, context, pooled, 1000 * t, return_dict=False)[0]

    our_forward: Any = torch.compile(ours) if bench.compile else ours
    their_forward: Any = torch.compile(theirs) if bench.compile else theirs
    return {OURS: Contender(ours, our_forward), THEIRS: Contender(theirs, call_theirs)}


@torch.no_grad()
def velocities(pair: dict[str, Contender], inputs: BenchInputs, mode: str) -> dict[str, Tensor]:
    """Each model's velocity for the same inputs, in fp32."""
    i = inputs
    with autocast_of(mode, i.latent.device):
        return {name: c.call(i.latent, i.t, i.context, i.pooled).float() for name, c in pair.items()}


def largest_difference(found: dict[str, Tensor]) -> float:
    """The largest difference of the two velocities, over their standard deviation."""
    ours, theirs = found.values()
    return float((ours - theirs).abs().max() / theirs.std())


def relative_errors(rounded: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """|rounded - exact| / |exact| of each model's velocity."""
    return {name: float((rounded[name] - v).norm() / v.norm()) for name, v in exact.items()}


def autocast_of(mode: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if mode == "autocast" else nullcontext()


class TrainingStep:
    """Forward, backward and AdamW of one model in one mode."""

    def __init__(self, contender: Contender, mode: str, inputs: BenchInputs):
        self.call, self.inputs, self.device = contender.call, inputs, inputs.latent.device
        self.weights = [p for p in contender.module.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.weights] if mode == "bf16" else self.weights
        self.mode = mode
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.grad = torch.zeros_like(master)
        self.adam = torch.optim.AdamW(self.masters, lr=1e-6, fused=True)

    def __call__(self) -> None:
        self.forward_backward()
        self.step()

    def forward_backward(self) -> None:
        for weight in self.weights:
            weight.grad = None  # as optimizers' zero_grad does: the backward pass gives its own, and adds to nothing
        self.accumulate()

    def accumulate(self) -> None:
        """Forward and backward on top of the gradients that are there, if any."""
        i = self.inputs
        with autocast_of(self.mode, self.device):
            velocity = self.call(i.latent, i.t, i.context, i.pooled)
        (velocity.float() - i.target.float()).square().mean().backward()

    def step(self) -> None:
        apart = self.masters is not self.weights
        if apart:
            torch._foreach_copy_([master.grad for master in self.masters], [weight.grad for weight in self.weights])
        self.adam.step()
        if apart:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)


def sampling(contender: Contender, inputs: BenchInputs, steps: int, mode: str) -> Callable[[], Tensor]:
    """Guided Euler steps of half as many pictures as the batch has rows, both halves in one forward."""
    noise, context, pooled = inputs.latent[: len(inputs.latent) // 2], inputs.context, inputs.pooled
    sigmas = sigma_schedule(steps, shift=3.0)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        z = z.to(noise.dtype)
        with autocast_of(mode, noise.device):
            cond, null = contender.call(z.repeat(2, 1, 1, 1), t.repeat(2), context, pooled).chunk(2)
        return null + GUIDANCE_SCALE * (cond - null)

    @torch.no_grad()
    def draw() -> Tensor:
        return sample_euler(predict, noise, sigmas)

    return draw


@dataclass(frozen=True)
class ModeResult:
    """One mode's figures: seconds are medians; ratios are diffusers over MM-DiT, so more is better for time."""

    mode: str
    velocity_errors: dict[str, float] | None  # relative, against the same model in fp32; None in fp32
    train_seconds: dict[str, float]
    train_ratio: float
    forward_backward_ratio: float
    train_product_seconds: dict[str, float] | None  # of it in matrix products; None on a GPU
    optimizer_seconds: dict[str, float]  # of it in AdamW and the copies from and to its fp32 master
    sample_seconds: dict[str, float]
    sample_ratio: float
    activation_bytes: dict[str, int]
    activation_ratio: float  # MM-DiT over diffusers: less is better
    matmul_flops_per_second: float
    train_fraction_of_matmul: dict[str, float]
    sample_fraction_of_matmul: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fast_modes(device: torch.device) -> tuple[str, ...]:
    """The modes that a device has arithmetic for. On a CPU without bf16 the two others would take an hour."""
    return MODES if has_bf16_arithmetic(device) else ("fp32",)


def measure(
    bench: ModelBench, modes: tuple[str, ...] = MODES, say: Callable[[str], None] = lambda line: None
) -> Iterator[ModeResult]:
    """One result a mode. UserError where the two models do not give the same velocity, or this one's loses more to rounding."""
    keep_freed_memory()  # as the trainer's ranks do: for both models alike
    device = torch.device(bench.device)
    for mode in modes:
        pair = contenders(bench)
        exact = velocities(pair, BenchInputs.draw(bench, torch.float32), "fp32")
        difference = largest_difference(exact)
        if not difference <= PARITY:  # nan too
            raise UserError(f"sd3 bench model: the two velocities differ by {difference:.1e}; nothing to compare")
        dtype = torch.bfloat16 if mode == "bf16" else torch.float32
        for contender in pair.values():
            nn.Module.to(contender.module, dtype)  # diffusers' own `to` warns that nothing of its list is kept in fp32
        inputs = BenchInputs.draw(bench, dtype)
        errors = None if mode == "fp32" else relative_errors(velocities(pair, inputs, mode), exact)
        if errors and not errors[OURS] <= ROUNDING * errors[THEIRS]:
            raise UserError(
                f"sd3 bench model: in {mode} this model's velocity is off by {errors[OURS]:.1e}, diffusers' by"
                f" {errors[THEIRS]:.1e}; its speed would be bought with precision"
            )
        yield _measure_mode(bench, mode, pair, inputs, errors, device, say)


def _measure_mode(
    bench: ModelBench,
    mode: str,
    pair: dict[str, Contender],
    inputs: BenchInputs,
    velocity_errors: dict[str, float] | None,
    device: torch.device,
    say: Callable[[str], None],
) -> ModeResult:
    def told(what: str) -> Callable[[int], None]:
        return lambda done: say(f"{mode}: {what}, round {done} of {bench.rounds}")

    matmul = matmul_flops_per_second(torch.float32 if mode == "fp32" else torch.bfloat16, device)
    draw = {name: sampling(contender, inputs, bench.sampling_steps, mode) for name, contender in pair.items()}
    drawn = interleaved(draw, bench.rounds, device, told("sampling"))

    train = {name: TrainingStep(contender, mode, inputs) for name, contender in pair.items()}
    trained = interleaved(train, bench.rounds, device, told("training"))
    halves = {name: step.forward_backward for name, step in train.items()}
    passes = interleaved(halves, bench.rounds, device, told("forward and backward"))
    stepped = interleaved({name: step.step for name, step in train.items()}, bench.rounds, device, told("optimizer"))
    # Gradients that are there before count as such, not as what forward and backward need besides.
    peaks = {name: peak_bytes_above_start(step.accumulate, device) for name, step in train.items()}

    products = {name: product_seconds(step) for name, step in train.items()} if device.type == "cpu" else None

    train_seconds, sample_seconds, optimizer_seconds = (
        {name: statistics.median(seconds) for name, seconds in taken.items()} for taken in (trained, drawn, stepped)
    )
    forward = forward_flops(bench.config(), bench.image_tokens, bench.text_tokens)
    return ModeResult(
        mode=mode,
        velocity_errors=velocity_errors,
        train_seconds=train_seconds,
        train_ratio=median_ratio(trained[THEIRS], trained[OURS]),
        forward_backward_ratio=median_ratio(passes[THEIRS], passes[OURS]),
        train_product_seconds=products,
        optimizer_seconds=optimizer_seconds,
        sample_seconds=sample_seconds,
        sample_ratio=median_ratio(drawn[THEIRS], drawn[OURS]),
        activation_bytes=peaks,
        activation_ratio=peaks[OURS] / peaks[THEIRS],
        matmul_flops_per_second=matmul,
        train_fraction_of_matmul={n: 3 * forward * bench.batch / s / matmul for n, s in train_seconds.items()},
        sample_fraction_of_matmul={
            n: forward * bench.batch * bench.sampling_steps / s / matmul for n, s in sample_seconds.items()
        },
    )
