"""DeepSpeed's sharding against plain torch: the same updates at every ZeRO stage, with accumulation and clipping, by both optimizers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from fake_training import MODEL, make_training
from rank_processes import run_ranks

from sd3core.mmdit import MMDiT
from sd3core.optim import orthogonalise
from workers.trainer import engine
from workers.trainer.checkpointing import load_start_weights
from workers.trainer.engine import ShardedTrainer

pytestmark = pytest.mark.slow
STEPS, RATE = 4, 1e-3
CASES = [(optimizer, stage) for optimizer in ("adamw", "muon") for stage in range(4)]


def _model() -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MODEL)
    for p in model.parameters():  # a fresh model gives zero whatever it is shown
        torch.nn.init.normal_(p, std=0.05)
    return model


def _batch(step: int):
    generator = torch.Generator().manual_seed(step)
    shapes = (8, 16, 8, 8), (8, 16, 8, 8), (8, 6, 24), (8, 16)
    x, target, context, pooled = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x, target, torch.rand(8, generator=generator), context, pooled


def _sharded(rank, world, cases):
    """{(optimizer, stage): (gradient norms, weights, EMA)}, gathered from all ranks' pieces."""
    engine.prepare(use_gpu=False)
    results = {}
    for optimizer, stage in cases:
        training = make_training(
            optimizer=optimizer,
            matrix_rate=3.0,
            zero_stage=stage,
            precision="fp32",
            grad_clip=0.3,
            micro_batch=2,
            activation_checkpointing=stage == 3,
        )
        model = _model()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = ShardedTrainer(model, training, rank, world)
        load_start_weights(start, trainer)
        norms = []
        for step in range(STEPS):
            mine = (z.chunk(world)[rank].split(2) for z in _batch(step))
            for x, target, t, context, pooled in zip(*mine, strict=True):
                trainer.backward((trainer(x, t, context, pooled) - target).square().mean())
                norm = trainer.step(RATE)
            norms.append(norm)
            trainer.update_ema(0.9)
        results[optimizer, stage] = norms, _gathered(trainer, "weights"), _gathered(trainer, "ema")
    return results


def _gathered(trainer: ShardedTrainer, kind: str):
    mine = [(p.parameter, p.start, p.values.detach().clone()) for p in trainer.pieces(own=True) if p.kind == kind]
    parts = [None] * trainer.world
    dist.all_gather_object(parts, mine)
    whole = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, shape in trainer.shapes.items()}
    for name, start, values in (entry for part in parts for entry in part):
        assert whole[name][start : start + len(values)].isnan().all()  # each element once
        whole[name][start : start + len(values)] = values
    return whole


def _settled(rank, world, able_ranks):
    """{precision asked: what this rank computes in}, where only some ranks' devices have arithmetic for bf16."""
    engine.prepare(use_gpu=False)
    engine.has_bf16_arithmetic = lambda device: rank in able_ranks
    device = torch.device("cpu")
    return {p: engine.settle_precision(make_training(precision=p), device).precision for p in ("auto", "bf16", "fp32")}


@pytest.mark.parametrize(("able_ranks", "auto"), [({0, 1}, "bf16"), ({0}, "fp32"), (set(), "fp32")])
def test_ranks_compute_alike_though_their_devices_differ(able_ranks, auto):
    assert run_ranks(2, _settled, able_ranks) == [{"auto": auto, "bf16": "bf16", "fp32": "fp32"}] * 2


class PlainMuon:
    """Muon on whole matrices, those of attention and MLP in the blocks; AdamW for the rest."""

    def __init__(self, model: MMDiT):
        in_blocks = [
            (name, p) for name, p in model.named_parameters() if name.startswith("joint_blocks.") and p.ndim == 2
        ]
        self.matrices = {name: p for name, p in in_blocks if "adaLN" not in name}
        rest = [p for name, p in model.named_parameters() if name not in self.matrices]
        self.adam = torch.optim.AdamW(rest, lr=RATE, weight_decay=0.0)
        self.averages = {name: torch.zeros_like(p) for name, p in self.matrices.items()}

    @torch.no_grad()
    def step(self) -> None:
        self.adam.step()
        for name, p in self.matrices.items():
            average = self.averages[name].mul_(0.9).add_(p.grad, alpha=0.1)
            stacked = 3 if "qkv" in name else 1
            for rows, part in zip(p.chunk(stacked), (0.1 * p.grad + 0.9 * average).chunk(stacked), strict=True):
                rows -= 3 * RATE * 0.2 * max(part.shape) ** 0.5 * orthogonalise(part)

    def zero_grad(self) -> None:
        for p in [*self.matrices.values(), *self.adam.param_groups[0]["params"]]:
            p.grad = None


def _plain(optimizer_of):
    model = _model()
    optimizer = optimizer_of(model)
    ema, norms = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    for step in range(STEPS):
        x, target, t, context, pooled = _batch(step)
        (model(x, t, context, pooled) - target).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
        ema = {name: 0.9 * ema[name] + 0.1 * p.detach() for name, p in model.named_parameters()}
    return norms, {name: p.detach().flatten() for name, p in model.named_parameters()}, ema


@pytest.fixture(scope="module")
def plain():
    return {
        "adamw": _plain(lambda model: torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)),
        "muon": _plain(PlainMuon),
    }


@pytest.fixture(scope="module")
def sharded():
    return run_ranks(2, _sharded, CASES)[0]


@pytest.mark.parametrize(("optimizer", "stage"), CASES)
def test_two_ranks_train_as_plain_torch(plain, sharded, optimizer, stage):
    norms, weights, ema = sharded[optimizer, stage]
    expected_norms, expected_weights, expected_ema = plain[optimizer]
    assert norms == pytest.approx(expected_norms, rel=1e-5) and min(norms) > 0.3  # so clipping is at work
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5)
        torch.testing.assert_close(ema[name], expected_ema[name].flatten(), rtol=0, atol=2e-5)
