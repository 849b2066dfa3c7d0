"""What a phase starts from: a checkpoint's weights, and QK-norm where the phase is the first to have it. Without DeepSpeed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_training import MODEL, FakeLoader, fake_loader, make_job

from sd3core.backbone_config import CONFIGS
from sd3core.checkpoint import save_model
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError
from sd3core.formulations import find_formulation
from sd3core.mmdit import DiTConfig, insert_qk_norm, make_model
from sd3core.training_checkpoint import Piece
from workers.trainer.loop import PhaseTraining, RankContext, draw_inputs
from workers.trainer.muon import matrices_in
from workers.trainer.start import start_weights

NORMED = dataclasses.replace(MODEL, qk_norm="rms")
CPU = torch.device("cpu")


def write_start(folder: Path):
    """A model folder without QK-norm whose queries and keys have an RMS of about 0.3."""
    torch.manual_seed(0)
    model = make_model(MODEL)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.05)
    save_model(folder, model)
    return model.requires_grad_(False)


def test_the_checkpoints_weights_and_which_are_new(tmp_path):
    model = write_start(tmp_path / "start")
    start = start_weights(make_job(tmp_path, model=NORMED, init=str(tmp_path / "start")))
    own = dict(model.named_parameters())
    assert start.new == start.weights.keys() - own.keys()
    assert len(start.new) == 8 and all(name.endswith((".ln_q.weight", ".ln_k.weight")) for name in start.new)
    assert all(torch.equal(start.weights[name], own[name]) for name in own)
    assert all((start.weights[name] == 1).all() for name in start.new)
    assert start_weights(make_job(tmp_path, model=NORMED)).new == frozenset()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            dataclasses.replace(MODEL, depth=1),
            r"joint_blocks.0.context_block.adaLN_modulation.1.bias is \(768,\) there and \(256,\) in",
        ),
        (dataclasses.replace(MODEL, num_heads=MODEL.num_heads * 2), f"num_heads is {MODEL.num_heads} there and"),
        (dataclasses.replace(MODEL, position_base=3), f"position_base is {MODEL.position_base} there and 3 in"),
        (dataclasses.replace(MODEL, context_dim=12), "context_embedder.weight is"),
        (
            DiTConfig.from_depth(2, context_dim=24, pooled_dim=16, position_base=4, position_max=8),
            "blocks.0.*is absent there and",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, model, message):
    write_start(tmp_path / "start")
    with pytest.raises(CheckpointError, match=f"^finetune.0 starts from .*start: {message}"):
        start_weights(make_job(tmp_path, phase="finetune.0", model=model, init=str(tmp_path / "start")))


def test_positions_that_cannot_be_made_anew_are_refused(tmp_path):
    model = make_model(MODEL)
    model.pos_embed += 0.1
    save_model(tmp_path / "start", model)
    with pytest.raises(CheckpointError, match="its position table follows no grid"):
        start_weights(make_job(tmp_path, init=(tmp_path / "start").as_uri()))


def test_weights_that_predict_another_thing_or_split_the_text_elsewhere_are_refused(tmp_path):
    model = make_model(MODEL)
    save_model(tmp_path / "noise", model, {"formulation": "eps/linear"})
    with pytest.raises(CheckpointError, match="trained for eps/linear"):
        start_weights(make_job(tmp_path, init=(tmp_path / "noise").as_uri()))
    save_model(tmp_path / "three", make_model(dataclasses.replace(MODEL, clip_tokens=2)))
    wanted = dataclasses.replace(MODEL, clip_tokens=3)
    with pytest.raises(CheckpointError, match="clip_tokens is 2 there and 3 in"):
        start_weights(make_job(tmp_path, model=wanted, init=(tmp_path / "three").as_uri()))


def test_weights_in_bf16_are_the_start_at_another_resolution(tmp_path):
    model = make_model(MODEL).bfloat16()
    save_model(tmp_path / "start", model)
    wanted = dataclasses.replace(NORMED, position_side=2 * MODEL.position_side)
    start = start_weights(make_job(tmp_path, model=wanted, init=(tmp_path / "start").as_uri()))
    assert start.weights.keys() == dict(model.named_parameters()).keys() | start.new
    assert all(torch.equal(start.weights[name], p.float()) for name, p in model.named_parameters())


class WholeWeights:
    """The trainer's view of its state, with nothing sharded."""

    def __init__(self):
        self.model = make_model(NORMED).requires_grad_(False)
        self.ema = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

    def pieces(self):
        for name, p in self.model.named_parameters():
            yield Piece("weights", name, 0, p.view(-1))
            yield Piece("ema", name, 0, self.ema[name].view(-1))

    def loaded(self, optimizer_step):
        assert optimizer_step == 0


def started(rank: int, store: Path, how: str) -> WholeWeights:
    """What one of two ranks has before its first step."""
    training = PhaseTraining.__new__(PhaseTraining)  # its constructor would start DeepSpeed
    training.job = make_job(store, model=NORMED, init=str(store / "start"), qk_norm="rms", qk_norm_start=how)
    training.store, training.place = open_store(str(store)), RankContext(rank, 2, CPU, threads=1)
    training.loader, training.null = fake_loader(training.job, rank, 2), None
    training.formulation, training.trainer = find_formulation(training.job.training.formulation), WholeWeights()
    training._load_start()
    return training.trainer


@pytest.mark.parametrize("how", ["fitted", "one"])
def test_inserted_scales_are_fitted_to_the_first_batch_of_all_ranks(tmp_path, monkeypatch, how):
    model, job = write_start(tmp_path / "start"), make_job(tmp_path)
    first = draw_inputs(FakeLoader(8, 0, 1).batch(0), job, None, CPU)
    z_t = find_formulation(job.training.formulation).add_noise(first.x0, first.noise, first.t)
    expected = insert_qk_norm(model, (z_t, first.t, first.context, first.pooled) if how == "fitted" else None)

    of_the_other: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda sums: of_the_other.append(sums.clone()))
    started(1, tmp_path, how)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(of_the_other.pop(0)))
    trainer = started(0, tmp_path, how)
    assert not of_the_other

    weights = dict(trainer.model.named_parameters())
    for name, p in expected.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trainer.ema[name], p.detach(), rtol=1e-5, atol=1e-6)
    scales = [p.mean().item() for name, p in expected.named_parameters() if ".ln_" in name]
    assert all(0.1 < scale < 0.9 for scale in scales) if how == "fitted" else set(scales) == {1.0}


@pytest.mark.parametrize("architecture", ["mmdit", "dit", "cross_dit", "uvit"])
def test_muon_steps_along_the_matrices_of_attention_and_mlp(architecture):
    extra = {"clip_tokens": 2, "dual_attention_blocks": 1} if architecture == "mmdit" else {}
    config = CONFIGS[architecture].from_depth(2, context_dim=24, pooled_dim=16, position_max=8, **extra)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in make_model(config).named_parameters()}
    chosen = {name: matrices_in(name, shape) for name, shape in shapes.items() if matrices_in(name, shape)}
    for name, stacked in chosen.items():
        rows, columns = shapes[name]
        assert rows % stacked == 0 and 128 in (rows // stacked, columns), name
    in_blocks = {n for n, shape in shapes.items() if len(shape) == 2 and n.startswith(("joint_blocks.", "blocks."))}
    assert set(chosen) == {name for name in in_blocks if "adaLN" not in name}
    kinds = {name.split(".")[-2]: stacked for name, stacked in chosen.items()}
    plain = {"qkv": 3, "proj": 1, "fc1": 1, "fc2": 1}
    assert kinds == (plain | {"q": 1, "kv": 2} if architecture in ("cross_dit", "uvit") else plain)
