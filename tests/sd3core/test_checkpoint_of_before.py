"""A checkpoint that the version before trained on two ranks opens whole: for pictures, scores, export and fine-tuning.

tests/_written_before/checkpoint is what its trainer wrote after one step from known weights: parameter number i (by name) is
(i + 1) / 256 everywhere, and the last layer starts at 0. That layer alone has a gradient: Adam's first step moves its weights by
the learning rate 0.001 times g / (|g| + 1e-8), with 0.1 g and 0.001 g^2 as its moments, and an EMA of decay 0.9 by a tenth of it.
"""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest
import torch

from sd3core.checkpoint import load_model, open_checkpoint
from sd3core.checkpoint_formats import from_diffusers, to_diffusers
from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.store import open_store
from sd3core.training_checkpoint import assemble_weights, read_pieces

WRITTEN = Path(__file__).parents[1] / "_written_before" / "checkpoint"
LAST_LAYER = "final_layer.linear"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in WRITTEN.iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            shutil.copy(path, folder)
    return folder


def test_its_weights_and_averages_are_what_its_trainer_held(folder):
    live, ema = (dict(load_model(folder, weights).named_parameters()) for weights in ("live", "ema"))
    first, second = (assemble_weights(open_store(str(folder)), "", kind) for kind in ("exp_avg", "exp_avg_sq"))
    assert len(live) == 30
    for number, name in enumerate(sorted(live)):
        value, average = live[name].detach(), ema[name].detach()
        if name.startswith(LAST_LAYER):
            step = (first[name] / 0.1) / ((second[name] / 0.001).sqrt() + 1e-8)
            assert step.abs().min() > 0 and torch.allclose(value, -0.001 * step, rtol=1e-4, atol=1e-9)
            assert torch.allclose(average, 0.1 * value, rtol=1e-4)
        else:
            assert torch.equal(value, torch.full_like(value, (number + 1) / 256)) and torch.equal(average, value)


def test_all_that_training_goes_on_from_is_there(folder):
    store = open_store(str(folder))
    done = read_checkpoint_done(store, "")
    moments = assemble_weights(store, "", "exp_avg_sq")
    assert {name for name, moment in moments.items() if moment.any()} == {f"{LAST_LAYER}.bias", f"{LAST_LAYER}.weight"}
    assert (done.samples, done.steps, done.optimizer_step) == (8, 1, 1)
    pieces = {piece.kind for piece in read_pieces(store, "", done)}
    assert pieces == {"weights", "ema", "exp_avg", "exp_avg_sq"}


def test_its_content_keeps_its_name_so_what_was_made_from_it_stands(folder):
    assert open_checkpoint(folder).digest == "8ea08905d1f83698e9cc05fa8703d4183560a97eaa0d0b497831adf53a229fa9"
    facts = open_checkpoint(folder).facts
    assert (facts.null, facts.side_px, facts.shift, facts.samples) == ("zeros", 32, 1.0, 8)
    assert facts.text.clip_tokens == facts.text.t5_tokens == 16


def test_a_phase_starts_from_it_and_diffusers_layout_takes_it(folder):
    from workers.trainer.start import check_start

    done = read_checkpoint_done(open_store(str(folder)), "")
    check_start("pretrain", str(folder), done.model_config_of(), done.training["formulation"])
    model = load_model(folder)
    back = from_diffusers(to_diffusers(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
