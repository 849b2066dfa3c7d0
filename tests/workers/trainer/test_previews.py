"""Pictures while a phase trains: when they are drawn, what is drawn, and that training does not notice."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_training import UNTIMED, FakeLoader, fake_loader, make_job
from rank_processes import run_ranks
from safetensors import safe_open

from sd3core import randomness
from sd3core.data.store import open_store
from sd3core.errors import StoreError
from sd3core.sampling import sample_dpmpp_2m_sde, sigma_schedule
from sd3core.training_checkpoint import assemble_weights
from workers.trainer import previews
from workers.trainer.job import PreviewCaption, PreviewSettings
from workers.trainer.loop import RankContext, train_rank
from workers.trainer.previews import Previews
from workers.trainer.standing_checkpoints import read_metrics

CPU = torch.device("cpu")
KEYS = ("image-3", "image-1", "image-4", "image-5")
SHOWN = PreviewSettings(
    captions=[
        PreviewCaption(shard=0, key=key, caption=f"caption of {key}", split=split)
        for key, split in zip(KEYS, ("train", "train", "held_out", "held_out"), strict=True)
    ],
    num_steps=3,
    guidance_scale=2.0,
    shift=1.5,
)


class Deskless:
    """Keeps what rank 0 tells."""

    def __init__(self):
        self.previews, self.warnings, self.losses = [], [], []

    def began(self, attempt, samples):
        pass

    def progress(self, samples, note, loss):
        self.losses += [] if loss is None else [samples]

    def preview(self, path):
        self.previews.append(path)

    def warn(self, message):
        self.warnings.append(message)


def _train_all(rank, world, jobs):
    previews.FIRST_STEP = 4  # the phases are short: drawn after 4, 8 and 12 steps
    told = []
    for job in jobs:
        told.append(Deskless())
        loader = fake_loader(job, rank, world)
        train_rank(job, RankContext(rank, world, CPU, threads=1), told[-1], lambda *_, loader=loader: loader)
    return told


def test_after_powers_of_two_and_at_the_end(tmp_path):
    job = make_job(tmp_path, previews=SHOWN, samples=8 * 700)
    drawn = Previews(job, None, None, CPU, None, None)
    assert [step for step in range(1, 701) if drawn.due(step)] == [64, 128, 256, 512, 700]
    never = Previews(make_job(tmp_path, samples=8 * 700), None, None, CPU, None, None)
    assert not any(never.due(step) for step in range(1, 701))


@pytest.mark.slow
def test_training_is_the_same_with_and_without_them(tmp_path):
    """Losses, gradients and weights bit by bit, on two ranks, at every ZeRO stage and with activation checkpointing."""
    kinds = [
        {"zero_stage": stage, "activation_checkpointing": stage in (1, 3), "micro_batch": 4} for stage in range(1, 4)
    ]
    kinds.append({"zero_stage": 0, "precision": "fp32"})
    with_them = [make_job(tmp_path / f"with-{i}", previews=SHOWN, **kind) for i, kind in enumerate(kinds)]
    without = [make_job(tmp_path / f"without-{i}", **kind) for i, kind in enumerate(kinds)]
    pairs = list(zip(with_them, without, strict=True))
    told = run_ranks(2, _train_all, [job for pair in pairs for job in pair])[0]
    for (job, calm), heard in zip(pairs, told[::2], strict=True):
        rows = [read_metrics(open_store(j.store), j.folder) for j in (job, calm)]
        ours, theirs = ([{k: v for k, v in row.items() if k not in UNTIMED} for row in part] for part in rows)
        assert ours == theirs and len(ours) == 12
        weights, others = (
            assemble_weights(open_store(j.store), f"{j.folder}/000000000096", "weights") for j in (job, calm)
        )
        assert all(torch.equal(weights[name], others[name]) for name in others)
        assert heard.warnings == [] and heard.losses == [row["samples"] for row in ours]  # each step once

        assert heard.previews == [f"{job.previews_folder}/{samples:012d}.safetensors" for samples in (32, 64, 96)]
        with safe_open(Path(job.store, heard.previews[-1]), "pt") as file:
            latents = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no mapping)
            captions, settings = (json.loads(file.metadata()[name]) for name in ("captions", "settings"))
            keys, splits = (json.loads(file.metadata()[name]) for name in ("keys", "splits"))
        assert [latent.shape for latent in latents] == [(16, 8, 8)] * 4 and all(x.isfinite().all() for x in latents)
        assert captions == [f"caption of {key}" for key in KEYS]
        assert (keys, splits) == (list(KEYS), ["train", "train", "held_out", "held_out"])
        assert settings["samples"] == 96 and settings["num_steps"] == 3
        assert not open_store(calm.store).list(calm.previews_folder)


def _draw_once(rank, world, job):
    """A velocity that is a function of the row alone: what is drawn must not depend on the ranks' shares."""
    batches = FakeLoader(8, rank, world).samples([(0, key) for key in KEYS])

    def model(z, t, context, pooled):
        calls.append(len(z))
        return z * t.view(-1, 1, 1, 1) + pooled.mean(dim=1).view(-1, 1, 1, 1)

    calls: list[int] = []
    return previews.draw_latents(model, job, batches, None, CPU), len(calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "calls_each"), [("heun", 2 * SHOWN.num_steps - 1), ("dpm++2m-sde", SHOWN.num_steps)]
)
def test_any_number_of_ranks_draws_the_same(tmp_path, sampler, calls_each):
    job = make_job(tmp_path, previews=SHOWN.model_copy(update={"sampler": sampler}))
    [(alone, _)] = run_ranks(1, _draw_once, job)
    several = run_ranks(3, _draw_once, job)
    assert {calls for _, calls in several} == {2 * 2 * calls_each}  # two batches, with and without caption
    for drawn, _ in several:
        assert drawn.keys() == alone.keys() and all(torch.equal(drawn[key], alone[key]) for key in alone)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_they_are_drawn_by_the_phases_formulation(tmp_path, alone):
    """Where v = 0, x0 = cos(angle) z and noise = sin(angle) z, so a step to another angle is cos(difference) z.

    The levels are shifted as the previews say, not as training is.
    """
    job = make_job(tmp_path, previews=SHOWN.model_copy(update={"shift": 2.0}), formulation="v/cos", shift=1.25)
    [batch, _] = FakeLoader(8, 0, 1).samples([(0, key) for key in KEYS])
    drawn = previews.draw_latents(lambda z, t, *_: torch.zeros_like(z), job, [batch], None, CPU)
    noise = randomness.normal(job.seed, 0, batch.sample_ids, "preview", batch.latent.shape[1:])
    angles = [math.atan(2 * math.tan(math.pi / 2 * t)) for t in (1 - 1e-12, 2 / 3, 1 / 3, 0)]
    kept = math.prod(math.cos(before - after) for before, after in pairwise(angles))
    for key, start in zip(batch.keys, noise, strict=True):
        torch.testing.assert_close(drawn[key], kept * torch.from_numpy(start), rtol=1e-4, atol=1e-5)


def test_the_sdes_noise_is_drawn_anew_in_every_step(tmp_path, alone):
    job = make_job(tmp_path, previews=SHOWN.model_copy(update={"sampler": "dpm++2m-sde"}))
    [batch, _] = FakeLoader(8, 0, 1).samples([(0, key) for key in KEYS])
    drawn = previews.draw_latents(lambda z, t, *_: torch.zeros_like(z), job, [batch], None, CPU)
    draws = [
        torch.from_numpy(randomness.normal(job.seed, draw, batch.sample_ids, "preview", batch.latent.shape[1:]))
        for draw in range(SHOWN.num_steps)
    ]
    fresh = iter(draws[1:])
    sigmas = sigma_schedule(SHOWN.num_steps, shift=SHOWN.shift, convention="textbook")
    expected = sample_dpmpp_2m_sde(lambda z, t: torch.zeros_like(z), draws[0], sigmas, fresh=lambda: next(fresh))
    for key, latent in zip(batch.keys, expected, strict=True):
        torch.testing.assert_close(drawn[key], latent)


def _draw_without_a_store(rank, world, job):
    def read():
        raise StoreError("s3://bucket: cannot be reached")

    warnings = []
    drawn = Previews(job, open_store(job.store), None, CPU, read, warnings.append)
    return [drawn.draw(None, samples) for samples in (32, 64)], warnings


@pytest.mark.slow
def test_a_failure_is_one_warning_and_no_error(tmp_path):
    [(paths, warnings)] = run_ranks(1, _draw_without_a_store, make_job(tmp_path, previews=SHOWN))
    assert paths == [None, None]
    assert warnings == ["pictures while training: s3://bucket: cannot be reached"]
