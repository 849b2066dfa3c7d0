"""Learning rate, loss by timestep and the FLOP count, against closed forms."""

from __future__ import annotations

import pytest
import torch
from fake_training import make_job, make_training

from sd3core.mmdit import MMDiTConfig
from sd3core.mmdit.flops import forward_flops
from workers.trainer.metrics import StepLoss, flops_per_sample, learning_rate, peak_flops


def test_a_training_sample_costs_three_forwards():
    """The forward's own count is held to torch's in tests/sd3core/test_mmdit_flops.py."""
    config = MMDiTConfig.from_depth(3, context_dim=48, pooled_dim=40, position_max=8, position_side=8)
    assert flops_per_sample(config, image_tokens=24, text_tokens=10) == 3 * forward_flops(config, 24, 10)


def test_learning_rate_warms_up_and_falls():
    constant = make_training(samples=1000, warmup_samples=80, global_batch=8, learning_rate=1.0)
    assert learning_rate(constant, 0) == pytest.approx(8 / 88)
    assert learning_rate(constant, 72) == pytest.approx(80 / 88)
    assert learning_rate(constant, 80) == learning_rate(constant, 999) == 1.0
    cosine = constant.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 80) == 1.0
    assert learning_rate(cosine, 540) == pytest.approx(0.55)
    assert learning_rate(cosine, 1000) == pytest.approx(0.1)
    assert learning_rate(make_training(warmup_samples=0, learning_rate=1.0), 0) == 1.0


def test_loss_by_timestep():
    step_loss = StepLoss(torch.device("cpu"))
    step_loss.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.1, 1.0]))
    step_loss.add(torch.tensor([7.0]), torch.tensor([0.5]))
    assert step_loss.row() == {"loss": 4.0, "loss_by_t": [2.0, None, None, None, 7.0, None, None, 5.0]}


def test_peak_is_measured_where_no_vendor_declares_one():
    flops, source = peak_flops(torch.device("cpu"), torch.float32)
    assert source == "measured" and flops > 1e8


def test_checkpoint_steps_follow_the_samples(tmp_path):
    job = make_job(tmp_path, samples=100, global_batch=8, micro_batch=8, checkpoint_every_samples=20)
    assert job.total_steps == 13
    assert [step for step in range(1, 14) if job.is_checkpoint_step(step)] == [3, 5, 8, 10, 13]
