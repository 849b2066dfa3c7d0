"""What a phase starts from: fresh weights, a model folder of another system's weights, never another model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fake_training import MODEL, make_job

from sd3core.checkpoint import load_model, save_model
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT
from workers.trainer.start import start_weights


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    save_model(tmp_path / "model", MMDiT(dataclasses.replace(MODEL, qk_norm=None)).bfloat16())
    return tmp_path / "model"


def test_a_model_folder_is_the_start_at_another_resolution(tmp_path, folder):
    wanted = dataclasses.replace(MODEL, qk_norm="rms", position_side=MODEL.position_side * 2)
    start = start_weights(make_job(tmp_path, model=wanted, init=folder.as_uri()))
    stored = dict(load_model(folder).named_parameters())
    assert start.new and all(name.endswith(("ln_q.weight", "ln_k.weight")) for name in start.new)
    assert start.weights.keys() == stored.keys() | start.new
    assert all(torch.equal(start.weights[name], p.float()) for name, p in stored.items())
    fresh = start_weights(make_job(tmp_path, model=wanted))
    assert not fresh.new and not torch.equal(
        fresh.weights["x_embedder.proj.weight"], start.weights["x_embedder.proj.weight"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": MODEL.num_heads * 2}, f"num_heads is {MODEL.num_heads} there and {MODEL.num_heads * 2}"),
        ({"position_base": 3}, f"position_base is {MODEL.position_base} there and 3 in the recipe's model"),
        ({"context_dim": 12}, "context_embedder.weight is"),
    ],
)
def test_another_model_is_refused(tmp_path, folder, change, message):
    job = make_job(tmp_path, model=dataclasses.replace(MODEL, qk_norm=None, **change), init=folder.as_uri())
    with pytest.raises(CheckpointError, match=message):
        start_weights(job)


def test_positions_that_cannot_be_made_anew_are_refused(tmp_path):
    model = MMDiT(MODEL)
    model.pos_embed += 0.1
    save_model(tmp_path / "model", model)
    with pytest.raises(CheckpointError, match="its position table follows no grid"):
        start_weights(make_job(tmp_path, init=(tmp_path / "model").as_uri()))
