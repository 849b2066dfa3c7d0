"""`sd3 import`, `sd3 export` and `sd3 sample --checkpoint` as a user gives them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from flows.cli import sample
from flows.local.home import local_command
from sd3core.checkpoint import load_model, open_checkpoint
from sd3core.checkpoint_formats import to_single_file
from sd3core.mmdit import MMDiT, MMDiTConfig


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = MMDiTConfig.from_depth(1, context_dim=16, pooled_dim=16, position_side=4, position_max=8, qk_norm="rms")
    state = to_single_file(MMDiT(config)) | {"first_stage_model.x": torch.zeros(1)}
    save_file(state, "released.safetensors")


def test_import_says_what_it_found_and_what_it_took_for_granted(sd3):
    code, out, err = sd3("import", "released.safetensors", "model", "--t5-tokens", "20", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    note, found, follows = out.splitlines()
    assert note == "note: released.safetensors: left aside: the VAE"
    assert found.startswith("single file, depth 1, ") and "QK-norm; to be sampled at 64 px with shift 3" in found
    assert "77 CLIP and 20 T5 tokens, no prompt = empty" in found
    # with its whole path: the test is elsewhere
    command = local_command("sd3 sample --checkpoint model --towers FOLDER 'a prompt'")
    assert Path(command.split()[0]).is_absolute() and follows == f"model: try `{command}`"
    facts = open_checkpoint("model").facts
    assert (facts.null, facts.side_px, facts.shift, facts.text.t5_tokens) == ("empty", 64, 3.0, 20)
    assert load_model("model").final_layer.linear.weight.dtype == torch.bfloat16
    assert json.loads(open("model/config.json").read())["extra"]["imported"]["from"] == "released.safetensors"
    code, _, err = sd3("import", "released.safetensors", "model")
    assert code == 1 and err.endswith("model exists already; name another, or remove it\n")


def test_export_in_both_formats(sd3, monkeypatch):
    sd3("import", "released.safetensors", "model")
    assert sd3("export", "model", "out") == (0, "out: the transformer of model\n", "")
    SD3Transformer2DModel.from_pretrained("out", low_cpu_mem_usage=False)
    assert sd3("export", "model", "out.safetensors", "--format", "single-file", "--dtype", "float16")[0] == 0
    before, after = load_file("released.safetensors"), load_file("out.safetensors")
    assert after.keys() == before.keys() - {"first_stage_model.x"}
    assert all(torch.equal(tensor, before[name].half()) for name, tensor in after.items())
    monkeypatch.setattr(sample, "last_checkpoint", lambda recipe: {"tiny-test": "model"}[recipe.run])
    assert sd3("export", "again", "--recipe", "tiny-test") == (0, "again: the transformer of model\n", "")
    assert open("again/config.json").read() == open("out/config.json").read()
    code, _, err = sd3("export", "model", "other", "--weights", "ema")
    assert code == 1 and "a model folder has one set of weights" in err


def test_ctrl_c_leaves_nothing(sd3, monkeypatch, tmp_path):
    def press(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("sd3core.exchange.convert.record_file", press)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert sd3("import", "released.safetensors", "model")[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["released.safetensors"]


def test_a_model_folder_needs_towers(sd3):
    sd3("import", "released.safetensors", "model")
    code, _, err = sd3("sample", "a circle", "--checkpoint", "model")
    assert (code, err) == (1, "sd3: --checkpoint model: name its VAE and text encoders too, with --towers FOLDER\n")


def test_sample_takes_a_checkpoint_and_towers_of_ones_own(sd3, monkeypatch, tmp_path):
    given = {}

    def draw(checkpoint, towers, prompts, out, *, weights, on_step, **_):
        given.update(checkpoint=checkpoint, towers=towers, prompts=prompts, weights=weights)
        on_step(0, 1)
        return [out / "00000.png"]

    monkeypatch.setattr(sample, "sample_to_files", draw)
    (tmp_path / "pipeline" / "vae").mkdir(parents=True)
    code, out, err = sd3("sample", "a circle", "--checkpoint", "model", "--towers", "pipeline")
    assert (code, err) == (0, "") and out.endswith("samples/00000.png\n")
    assert given["checkpoint"] == "model" and str(given["towers"]) == "pipeline" and given["weights"] is None
