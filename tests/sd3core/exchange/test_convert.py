"""`sd3 import` and `sd3 export`: bit-exact, strict, larger than memory, and careful with what comes from outside."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import randomise, small_config, small_inputs
from test_checkpoint import checkpoint_folder, write_checkpoint
from test_generate import FACTS
from test_generate import write_checkpoint as write_model

from sd3core.checkpoint import load_model, open_checkpoint, save_model
from sd3core.checkpoint_formats import diffusers_config, to_diffusers, to_single_file
from sd3core.errors import CheckpointError, UserError
from sd3core.exchange.convert import assumed_facts, export_model, import_model
from sd3core.exchange.diffusers_folder import export_diffusers
from sd3core.exchange.foreign_weights import open_foreign_weights
from sd3core.generate import sample_to_files
from sd3core.mmdit import MMDiT
from sd3core.training_checkpoint import TENSOR_KINDS

RELEASED_KINDS = {
    "SD3": {},
    "SD3.5-large": {"qk_norm": "rms"},
    "SD3.5-medium": {"qk_norm": "rms", "dual_attention_blocks": 2},
}


@pytest.fixture(params=RELEASED_KINDS)
def model(request) -> MMDiT:
    return randomise(MMDiT(small_config(**RELEASED_KINDS[request.param])))


def as_diffusers(model: MMDiT) -> SD3Transformer2DModel:
    reference = SD3Transformer2DModel(**diffusers_config(model.config)).eval()
    reference.load_state_dict(to_diffusers(model))
    return reference


def imported(source: Path, out: Path, **options) -> MMDiT:
    with open_foreign_weights(source, any_dtype="dtype" in options) as foreign:
        import_model(foreign, str(out), assumed_facts(foreign).to_extra(), **options)
    return load_model(out)


def assert_same(one: MMDiT, other: MMDiT) -> None:
    assert one.config == other.config
    for name, tensor in other.state_dict().items():
        found = one.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


@pytest.mark.parametrize("shards", ["one file", "sharded", "in a pipeline", "only the file"])
def test_what_diffusers_saves_is_imported_bit_by_bit(tmp_path, model, shards):
    folder = tmp_path / "pipeline" / "transformer"
    as_diffusers(model).save_pretrained(folder, max_shard_size="1MB" if shards == "sharded" else "10GB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (shards == "sharded")
    if shards == "in a pipeline":
        (folder.parent / "model_index.json").write_text("{}")
        (folder.parent / "scheduler").mkdir()
        (folder.parent / "scheduler" / "scheduler_config.json").write_text('{"shift": 1.5}')
    source = {"in a pipeline": folder.parent, "only the file": folder / "diffusion_pytorch_model.safetensors"}
    assert_same(imported(source.get(shards, folder), tmp_path / "out"), model)
    facts = open_checkpoint(tmp_path / "out").facts
    assert (facts.null, facts.side_px, facts.text.t5_tokens) == ("empty", 8 * 16, 77)
    assert facts.shift == (1.5 if shards == "in a pipeline" else 3.0)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_single_file_is_imported_in_its_dtypes(tmp_path, model, prefix):
    state = to_single_file(model.half())
    state["model.diffusion_model.pos_embed"] = state["model.diffusion_model.pos_embed"].float()
    others = {"first_stage_model.x": torch.zeros(2), "text_encoders.t5xxl.x": torch.zeros(2).to(torch.float8_e4m3fn)}
    if not prefix:
        state, others = {name.removeprefix("model.diffusion_model."): t for name, t in state.items()}, {}
    save_file(state | others, tmp_path / "sd3.safetensors")
    again = imported(tmp_path / "sd3.safetensors", tmp_path / "out")
    assert again.pos_embed.dtype == torch.float32
    again.pos_embed = again.pos_embed.half()
    assert_same(again, model)
    with open_foreign_weights(tmp_path / "sd3.safetensors") as foreign:
        assert ["the VAE and the text encoders" in note for note in foreign.notes] == [True] * prefix


def test_import_casts(tmp_path):
    model = randomise(MMDiT(small_config()))
    save_file(to_single_file(model), tmp_path / "a.safetensors")
    assert_same(imported(tmp_path / "a.safetensors", tmp_path / "out", dtype="bfloat16"), model.bfloat16())
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in to_single_file(model).items()}
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="is float8_e4m3fn; add --dtype"):
        imported(tmp_path / "b.safetensors", tmp_path / "fp8")
    narrow = imported(tmp_path / "b.safetensors", tmp_path / "fp8", dtype="float32")
    assert (narrow.final_layer.linear.weight - model.final_layer.linear.weight).abs().max() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 12), (14, 6)])
def test_diffusers_opens_the_export_and_computes_the_same(tmp_path, model, size):
    save_model(tmp_path / "model", model, replace(FACTS, side_px=96).to_extra())
    export_model(str(tmp_path / "model"), tmp_path / "out", "diffusers")
    reference, loading = SD3Transformer2DModel.from_pretrained(
        tmp_path / "out", low_cpu_mem_usage=False, output_loading_info=True
    )
    assert not any(loading.values())  # no key missing, unexpected or of another shape
    assert reference.config.sample_size == 96 // 8
    latent, t, context, pooled = small_inputs(height=size[0], width=size[1], config=model.config)
    expected = reference(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=1000 * t).sample
    assert (model(latent, t, context, pooled) - expected).abs().max() < 1e-5
    assert_same(imported(tmp_path / "out", tmp_path / "again"), model)


@pytest.mark.parametrize("weights", [None, "ema", "live"])
def test_a_training_checkpoint_is_exported_from_its_pieces(tmp_path, weights):
    config = small_config(depth=2, qk_norm="rms", dual_attention_blocks=1)
    model = randomise(MMDiT(config))
    values = {kind: {n: p.detach() + i for n, p in model.named_parameters()} for i, kind in enumerate(TENSOR_KINDS)}
    write_checkpoint(tmp_path, 64, values, config, world_size=3)
    checkpoint = str(tmp_path / checkpoint_folder("runs/r/checkpoints/pretrain/0123456789ab", 64))
    export_model(checkpoint, tmp_path / "out", "diffusers", weights=weights)
    export_model(checkpoint, tmp_path / "out.safetensors", "single-file", weights=weights)
    expected = load_model(checkpoint, weights)
    assert torch.equal(expected.x_embedder.proj.bias, model.x_embedder.proj.bias + (0 if weights == "live" else 3))
    assert_same(imported(tmp_path / "out", tmp_path / "again"), expected)
    single = load_file(tmp_path / "out.safetensors")
    assert single.keys() == to_single_file(expected).keys()
    assert all(torch.equal(single[name], tensor) for name, tensor in to_single_file(expected).items())


def test_export_and_import_give_the_same_file_again(tmp_path):
    save_file(to_single_file(randomise(MMDiT(small_config(qk_norm="rms"))).half()), tmp_path / "a.safetensors")
    imported(tmp_path / "a.safetensors", tmp_path / "model")
    export_model(str(tmp_path / "model"), tmp_path / "b.safetensors", "single-file")
    imported(tmp_path / "b.safetensors", tmp_path / "again")
    export_model(str(tmp_path / "again"), tmp_path / "c.safetensors", "single-file")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    export_model(str(tmp_path / "model"), tmp_path / "d.safetensors", "single-file", dtype="float32")
    wide = load_file(tmp_path / "d.safetensors")
    assert all(wide[name].dtype == torch.float32 and torch.equal(wide[name], one[name].float()) for name in one)


def test_progress_ends_at_the_file_and_what_exists_is_kept(tmp_path):
    seen = []
    save_file(to_single_file(MMDiT(small_config())), tmp_path / "a.safetensors")
    imported(tmp_path / "a.safetensors", tmp_path / "out", on_bytes=lambda *both: seen.append(both))
    total = sum(math.prod(t.shape) * 4 for t in load_file(tmp_path / "a.safetensors").values())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 10
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        imported(tmp_path / "a.safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_model(str(tmp_path / "out"), tmp_path / "a.safetensors", "single-file")
    assert (tmp_path / "out" / "config.json").read_bytes() == before

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path / "a.safetensors", tmp_path / "stopped", on_bytes=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out"]


LARGE = """
import os, resource, sys
from contextlib import suppress
from sd3core.checkpoint import model_shapes
from sd3core.checkpoint_formats import SINGLE_FILE
from sd3core.exchange.convert import import_model, export_model
from sd3core.exchange.diffusers_folder import export_diffusers
from sd3core.exchange.foreign_weights import open_foreign_weights
from sd3core.mmdit import MMDiTConfig
from sd3core.files.tensor_files import TensorFiles, TensorFileWriter, TensorInfo
import torch

folder, limit = sys.argv[1], 32_000_000
config = MMDiTConfig.from_depth(2, hidden_size=1024, num_heads=16, context_dim=64, pooled_dim=64, position_max=8)
infos = {name: TensorInfo(torch.float16, shape) for name, shape in SINGLE_FILE.shapes(config).items()}
path = f"{folder}/large.safetensors"
with suppress(ValueError), TensorFileWriter(path, infos):
    pass  # left without data: zeros, and no room taken on the disk
assert os.path.getsize(path) > 3.5 * limit
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
try:
    with TensorFiles([path]) as files:
        dict(files)
    sys.exit("the limit does not bite")
except (MemoryError, RuntimeError) as error:
    pass
with open_foreign_weights(path) as foreign:
    import_model(foreign, f"{folder}/model", {})
export_model(f"{folder}/model", f"{folder}/diffusers", "diffusers")
"""


def test_files_larger_than_memory(tmp_path):
    """Import and export of a 120 MB file under a limit of 32 MB of data, which holding its tensors goes beyond."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LARGE, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()  # pytest would keep them
    assert done.returncode == 0, done.stderr
    assert len(sizes) == 3 and min(sizes) > 112e6


@pytest.fixture
def folder(tmp_path) -> Path:
    as_diffusers(MMDiT(small_config(depth=2))).save_pretrained(tmp_path / "transformer", max_shard_size="1MB")
    return tmp_path / "transformer"


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error, open_foreign_weights(path):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\0.safetensors", 7]
)
def test_an_index_names_files_beside_it_only(folder, name):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] |= {"proj_out.bias": name}
    index.write_text(json.dumps(fields))
    refused(folder, "it must be a .safetensors file beside it")


def test_links_may_not_lead_out_of_the_folder_but_into_the_hubs_cache(folder, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "0123" / "transformer"
    blobs = tmp_path / "models--x" / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../../blobs/{path.name}")
    with open_foreign_weights(snapshot) as foreign:
        assert foreign.config.depth == 2
    config = blobs / "config.json"
    config.rename(tmp_path / "elsewhere.json")
    config.symlink_to(tmp_path / "elsewhere.json")
    refused(snapshot, "leads out of the folder")
    elsewhere = tmp_path / "pipeline"
    elsewhere.mkdir()
    (elsewhere / "model_index.json").write_text("{}")
    (elsewhere / "transformer").symlink_to(blobs)
    refused(elsewhere, "leads out of the folder")


def test_an_index_that_lies_is_refused(folder):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    fields = json.loads(index.read_text())
    files = sorted(set(fields["weight_map"].values()))
    moved = next(name for name, file in fields["weight_map"].items() if file == files[0])
    for change, message in (
        ({moved: files[1]}, f"1 tensors are not in the files that it says, '{moved}'"),
        ({"odd": files[1]}, "'odd' the first"),
        ({moved: "gone.safetensors"}, "gone.safetensors: missing"),
    ):
        index.write_text(json.dumps({"weight_map": fields["weight_map"] | change}))
        refused(folder, message)
    for text in ("", "[]", "{}", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        refused(folder, "not a JSON object|no weight_map")


def test_a_config_that_contradicts_the_weights_is_refused(folder):
    config = folder / "config.json"
    fields = json.loads(config.read_text())
    for change, message in (
        ({"num_layers": 3, "qk_norm": "rms_norm"}, "num_layers is 3, the weights say 2; qk_norm is 'rms_norm', the"),
        ({"dual_attention_layers": [0]}, r"dual_attention_layers is \[0\], the weights say \[\]"),
        ({"_class_name": "FluxTransformer2DModel"}, "a FluxTransformer2DModel, not an SD3Transformer2DModel"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0"),
        ({"sample_size": "big"}, "sample_size is 'big'"),
    ):
        config.write_text(json.dumps(fields | change))
        refused(folder, message)
    for gone in ("dual_attention_layers", "qk_norm"):  # as SD3-medium's was released
        fields.pop(gone)
    config.write_text(json.dumps(fields | {"out_channels": None}))
    with open_foreign_weights(folder) as foreign:
        assert foreign.config.dual_attention_blocks == 0


def test_heads_are_taken_from_the_config_where_shapes_do_not_tell(tmp_path):
    model = randomise(MMDiT(small_config(num_heads=4)))
    as_diffusers(model).save_pretrained(tmp_path / "a")
    assert_same(imported(tmp_path / "a", tmp_path / "out"), model)


def test_what_is_no_such_model_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "none", "no such file or folder")
    refused(tmp_path / "empty", "name a .safetensors file, or a diffusers folder")
    torch.save({}, tmp_path / "empty" / "diffusion_pytorch_model.bin")
    refused(tmp_path / "empty", "only pickles there; they are not read")
    refused(tmp_path / "empty" / "diffusion_pytorch_model.bin", "pickles are not read")
    (tmp_path / "empty" / "diffusion_pytorch_model.bin").rename(tmp_path / "empty" / "x.safetensors")
    refused(tmp_path / "empty" / "x.safetensors", "a pickle, not a safetensors file")
    refused(tmp_path / "empty", "name one of its files: x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "empty" / "x.safetensors")
    refused(tmp_path / "empty" / "x.safetensors", "not an SD3 transformer")
    refused(folder / "config.json", "name the folder that it is in")
    save_model(tmp_path / "model", MMDiT(small_config()))
    refused(tmp_path / "model", "a model folder already")
    (tmp_path / "model" / "DONE.json").write_text("{}")
    refused(tmp_path / "model", "a training checkpoint of this system")
    fifo = tmp_path / "pipe" / "diffusion_pytorch_model.safetensors"
    fifo.parent.mkdir()
    os.mkfifo(fifo)
    refused(fifo.parent, "missing; get the folder again")


def test_an_architecture_that_others_do_not_know_is_not_exported(tmp_path):
    save_model(tmp_path / "model", MMDiT(small_config(depth=1, clip_tokens=4)))
    with pytest.raises(CheckpointError, match="model: a three-stream MM-DiT has no diffusers or single-file form"):
        export_model(str(tmp_path / "model"), tmp_path / "out", "diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_folder_goes_to_a_store(tmp_path, s3_bucket):
    save_file(to_single_file(MMDiT(small_config(depth=1))), tmp_path / "a.safetensors")
    with open_foreign_weights(tmp_path / "a.safetensors") as foreign:
        import_model(foreign, f"s3://{s3_bucket}/sd3", {})
        with pytest.raises(UserError, match="exists already"):
            import_model(foreign, f"s3://{s3_bucket}/sd3", {})
    export_model(f"s3://{s3_bucket}/sd3", tmp_path / "b.safetensors", "single-file")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_imported_pipeline_draws_the_pictures_of_the_model_that_was_exported(towers_folder, tmp_path):
    """The same model, through a diffusers pipeline folder and back, with that folder's own towers."""
    facts = replace(FACTS, null="empty")
    checkpoint = write_model(tmp_path / "model", facts)
    pipeline = export_diffusers(checkpoint, towers_folder, tmp_path / "pipeline")
    with open_foreign_weights(pipeline) as foreign:
        found = assumed_facts(foreign, t5_tokens=facts.text.t5_tokens)
        import_model(foreign, str(tmp_path / "imported"), found.to_extra())
    assert replace(found, samples=None) == facts  # shift, CLIP tokens and size lie in the folder
    drawn = [
        sample_to_files(str(path), towers, [("a red square", 0)], tmp_path / name, num_steps=2)[0]
        for name, path, towers in (("one", checkpoint, towers_folder), ("two", tmp_path / "imported", pipeline))
    ]
    one, other = (np.asarray(Image.open(path)) for path in drawn)
    assert one.shape == (32, 32, 3) and one.std() > 5 and np.array_equal(one, other)
