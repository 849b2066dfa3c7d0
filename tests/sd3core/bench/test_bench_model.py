"""The bench compares equal things and counts right; how fast they are is not tested."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from flows.cli.commands import app
from sd3core.bench import model as bench_model
from sd3core.bench.measure import interleaved, median_ratio, peak_bytes_above_start, product_seconds
from sd3core.bench.model import (
    OURS,
    THEIRS,
    BenchInputs,
    ModelBench,
    TrainingStep,
    contenders,
    largest_difference,
    measure,
    velocities,
)
from sd3core.checkpoint_formats import to_diffusers
from sd3core.errors import UserError
from sd3core.mmdit import lean

TINY = ModelBench(
    depth=2, image_tokens=16, text_tokens=5, batch=2, context_dim=32, pooled_dim=16, sampling_steps=2, rounds=1
)
CPU = torch.device("cpu")


def test_every_round_goes_once_through_all_and_the_first_is_not_counted():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2, device=CPU)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_ratio_is_taken_within_rounds():
    assert median_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


def test_products_are_told_from_the_rest():
    a = torch.randn(256, 256)
    product_seconds(lambda: a @ a)  # the first profile of a process pays for its start
    one, rest = product_seconds(lambda: a @ a), product_seconds(lambda: [a.exp() for _ in range(50)])
    assert one > 0 and rest == 0


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    peak = peak_bytes_above_start(lambda: (x + 1) + (x + 2), CPU)  # two sums and the sum of both
    assert peak == pytest.approx(3 * x.nbytes, rel=0.01)
    # one after the other
    assert peak_bytes_above_start(lambda: ((x + 1), None)[1] or (x + 1), CPU) == pytest.approx(x.nbytes, rel=0.01)


@pytest.mark.parametrize("mode", bench_model.MODES)
def test_a_training_step_changes_both_models_alike(mode):
    pair = contenders(TINY)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    for contender in pair.values():
        contender.module.to(dtype)
    inputs = BenchInputs.draw(TINY, dtype)
    before = {name: value.float().clone() for name, value in pair[OURS].module.named_parameters()}
    for contender in pair.values():
        step = TrainingStep(contender, mode, inputs)
        step.adam.param_groups[0]["lr"] = 1e-2
        step()
    ours, theirs = to_diffusers(pair[OURS].module), pair[THEIRS].module.state_dict()
    changed = max((value - before[name]).abs().max() for name, value in pair[OURS].module.named_parameters())
    assert changed > 5e-3
    off = torch.cat([(ours[name].float() - theirs[name].float()).abs().flatten() for name in ours])
    # Adam's first step is the gradient's sign; bf16 may turn a few
    assert off.mean() < (1e-5 if mode == "fp32" else 1e-3)


@pytest.mark.parametrize("wrong", [1.0, torch.nan])
def test_unequal_models_are_not_compared(monkeypatch, wrong):
    assert largest_difference(velocities(contenders(TINY), BenchInputs.draw(TINY, torch.float32), "fp32")) < 1e-5
    pair = contenders(TINY)
    with torch.no_grad():
        pair[THEIRS].module.proj_out.bias += wrong
    monkeypatch.setattr(bench_model, "contenders", lambda bench: pair)
    with pytest.raises(UserError, match="velocities differ"):
        next(measure(TINY, ("fp32",)))


@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_speed_may_not_be_bought_with_precision(monkeypatch, mode):
    """What the lean forms lose to rounding is within the bound; a linear layer that is off by 2 % in bf16 is not."""
    monkeypatch.setattr(lean, "MIN_TOKENS", 1)
    errors = next(measure(TINY, (mode,))).velocity_errors
    assert 0 < errors[OURS] <= bench_model.ROUNDING * errors[THEIRS] < 0.05
    form = lean.modulated_linear

    def rough(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        in_bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        return (1.02 if in_bf16 else 1.0) * form(x, *others)

    monkeypatch.setattr(lean, "modulated_linear", rough)
    with pytest.raises(UserError, match=f"in {mode} this model's velocity is off by"):
        next(measure(TINY, (mode,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 3}, "must be even"), ({"image_tokens": 20}, "square number"), ({"rounds": 0}, "1")],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        ModelBench(**{"rounds": 1} | change)


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path):
    out = tmp_path / "figures.json"
    sizes = ["--depth", "1", "--image-tokens", "4", "--text-tokens", "3", "--batch", "2"]
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "model",
            *sizes,
            "--steps",
            "1",
            "--rounds",
            "1",
            "--mode",
            "fp32",
            "--device",
            "cpu",
            "--json",
            str(out),
        ],
    )
    assert done.exit_code == 0 and "training step" in done.output and "peak activation memory" in done.output
    (result,) = json.loads(out.read_text())["results"]
    assert result["mode"] == "fp32" and result["train_ratio"] > 0 and result["activation_bytes"][OURS] > 0
    assert 0 < result["train_fraction_of_matmul"][OURS] < 2
    assert 0 < result["train_product_seconds"][OURS]
