"""Model folders and training checkpoints: round trips, and every damage named."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_models import randomise, small_config, small_inputs

from sd3core.checkpoint import load_model, model_shapes, open_checkpoint, save_model
from sd3core.checkpoint_record import (
    CheckpointDone,
    checkpoint_folder,
    list_checkpoints,
    read_checkpoint_done,
    write_done,
)
from sd3core.data.records import record_file
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT
from sd3core.specs import DONE_FILE
from sd3core.training_checkpoint import (
    TENSOR_KINDS,
    assemble_weights,
    parse_piece_name,
    piece_name,
    rank_file,
    read_pieces,
)

PARENT = "runs/r/checkpoints/pretrain/0123456789ab"


def write_checkpoint(root, samples, tensors, config, world_size=3, commit=True, change=lambda rank, pieces: None):
    """Every rank owns an even share of all parameters laid end to end, as a ZeRO partition does."""
    folder = root / checkpoint_folder(PARENT, samples)
    folder.mkdir(parents=True)
    total = sum(t.numel() for t in tensors["weights"].values())
    share = -(-total // world_size)
    for rank in range(world_size):
        pieces, offset = {}, 0
        for name in tensors["weights"]:
            size = tensors["weights"][name].numel()
            low, high = max(rank * share - offset, 0), min((rank + 1) * share - offset, size)
            for kind in TENSOR_KINDS if low < high else ():
                pieces[piece_name(kind, name, low)] = tensors[kind][name].flatten()[low:high].clone()
            offset += size
        change(rank, pieces)
        save_file(pieces, folder / rank_file(rank, world_size))
    (folder / "metrics.jsonl").write_text('{"samples": 1}\n')
    done = CheckpointDone(
        samples=samples,
        steps=samples // 8,
        attempt=1,
        optimizer_step=samples // 8,
        config=config.to_dict(),
        training={"global_batch": 8},
        parameters={name: list(t.shape) for name, t in tensors["weights"].items()},
        files={path.name: record_file(path) for path in folder.iterdir()},
        specs={"latents": "ab"},
        null="zeros",
    )
    if commit:
        (folder / DONE_FILE).write_text(done.model_dump_json())
    return folder, done


@pytest.fixture
def tensors():
    config = small_config(depth=2, qk_norm="rms")
    weights = {name: p.detach() for name, p in randomise(MMDiT(config)).named_parameters()}
    return config, {kind: {name: w + i for name, w in weights.items()} for i, kind in enumerate(TENSOR_KINDS)}


def test_model_folder_round_trip(tmp_path):
    model = randomise(MMDiT(small_config(qk_norm="rms"))).bfloat16()
    save_model(tmp_path / "model", model, extra={"note": 1})
    again = load_model(tmp_path / "model")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in again.parameters())
    assert torch.equal(again(*small_inputs()), model(*small_inputs()))
    assert load_model(f"file://{tmp_path}/model").config == model.config
    with pytest.raises(CheckpointError, match="one set of weights"):
        load_model(tmp_path / "model", weights="ema")


def test_model_folder_problems_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(tmp_path / "empty")
    save_model(tmp_path, MMDiT(small_config()))
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model": fields["model"] | {"dept": 3}}, "unknown key 'dept'; did you mean 'depth'"),
        ({"odd": 1}, "unknown key 'odd'"),
        ({"format": 99}, "format 99"),
        ({"model": fields["model"] | {"depth": 2}}, "20 tensors unknown: .joint_blocks.1.context_block.attn.proj.bias"),
        ({"model": fields["model"] | {"depth": 4}}, "tensors missing: .joint_blocks."),
        (
            {"model": fields["model"] | {"context_dim": 64}},
            r"1 tensor of another shape: 'context_embedder.weight' \(128, 48\) instead of \(128, 64\)",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(CheckpointError, match=message) as error:
            load_model(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)


def test_piece_names():
    assert piece_name("exp_avg", "a.b.weight", 12) == "exp_avg/a.b.weight/12"
    assert parse_piece_name("exp_avg/a.b.weight/12") == ("exp_avg", "a.b.weight", 12)
    assert rank_file(0, 2) == "rank-000-of-002.safetensors"
    assert checkpoint_folder("p/q/", 12800) == "p/q/000000012800"
    with pytest.raises(CheckpointError, match="KIND/PARAMETER/START"):
        parse_piece_name("momentum/a/1")


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_checkpoint_comes_back_whole(tmp_path, tensors, world_size):
    config, values = tensors
    folder, done = write_checkpoint(tmp_path, 64, values, config, world_size)
    store = open_store(str(tmp_path))
    path = checkpoint_folder(PARENT, 64)
    assert read_checkpoint_done(store, path) == done and read_checkpoint_done(store, path).digest == done.digest
    for kind in TENSOR_KINDS:
        whole = assemble_weights(store, path, kind)
        assert whole.keys() == values[kind].keys()
        assert all(torch.equal(whole[name], values[kind][name]) for name in whole)
    for weights, kind in (("ema", "ema"), ("live", "weights"), (None, "ema")):
        model = load_model(folder, weights)
        assert all(torch.equal(p, values[kind][name]) for name, p in model.named_parameters())
        assert torch.equal(model.pos_embed, MMDiT(config).pos_embed)


def spans_joined(checkpoint, weights=None):
    """The model's tensors, put together from the spans, each element once."""
    with checkpoint.spans(weights) as spans:
        found = {name: torch.full(shape, torch.nan) for name, shape in model_shapes(checkpoint.config).items()}
        for name, start, values in spans.read():
            assert values.dtype == spans.dtypes[name]
            part = found[name].view(-1)[start : start + len(values)]
            assert part.isnan().all() and part.shape == values.shape
            part.copy_(values)
    return found


def test_both_kinds_of_checkpoint_are_opened_alike(tmp_path, tensors):
    config, values = tensors
    folder, done = write_checkpoint(tmp_path, 64, values, config, world_size=2)
    stored = open_checkpoint(folder)
    save_model(tmp_path / "model", stored.model(), {"formulation": "eps/linear", "side_px": 48})
    model = open_checkpoint(tmp_path / "model")
    assert stored.config == model.config == config
    assert stored.digest == done.digest and model.digest == record_file(tmp_path / "model/model.safetensors").sha256
    assert (stored.formulation, model.formulation, model.trained["side_px"]) == ("rf", "eps/linear", 48)
    assert (stored.weights_taken(), stored.weights_taken("live"), model.weights_taken()) == ("ema", "live", None)
    assert (stored.recipe, model.recipe) == ({}, None)
    for checkpoint, weights, kind in ((stored, None, "ema"), (stored, "live", "weights"), (model, None, "ema")):
        expected = values[kind] | {"pos_embed": MMDiT(config).pos_embed}
        for found in (checkpoint.state(weights), spans_joined(checkpoint, weights)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    for ask in (model.state, lambda weights: spans_joined(model, weights)):
        with pytest.raises(CheckpointError, match="one set of weights; leave out weights='ema'"):
            ask("ema")
    with pytest.raises(CheckpointError, match="weights='best': take 'ema' or 'live'"):
        stored.state("best")


def test_the_record_of_an_open_checkpoint_is_read_once(tmp_path, tensors, monkeypatch):
    config, values = tensors
    folder, _ = write_checkpoint(tmp_path, 64, values, config)
    save_model(tmp_path / "model", MMDiT(config))
    for place in (folder, tmp_path / "model"):
        checkpoint = open_checkpoint(place)
        with monkeypatch.context() as patch:
            patch.setattr("sd3core.data.store.FileStore.get", None)
            assert checkpoint.config and checkpoint.digest and checkpoint.formulation
            assert checkpoint.state() and spans_joined(checkpoint) and checkpoint.model()


@pytest.mark.parametrize("of_evaluation, shift", [(None, 3.0), (5.0, 5.0)])
def test_pictures_of_a_checkpoint_are_drawn_at_the_shift_that_its_evaluation_names(
    tmp_path, tensors, of_evaluation, shift
):
    config, values = tensors
    folder, done = write_checkpoint(tmp_path, 64, values, config)
    with pytest.raises(CheckpointError, match="DONE.json holds no recipe"):
        _ = open_checkpoint(folder).facts
    recipe = {"text": {"clip_tokens": 12, "t5_tokens": 10}, "evaluate": {"shift": of_evaluation}}
    training = {"side_px": 64, "shift": 3.0, "formulation": "rf"}
    write_done(open_store(str(folder)), "", done.model_copy(update={"recipe": recipe, "training": training}))
    facts = open_checkpoint(folder).facts
    assert (facts.shift, facts.side_px, facts.samples, facts.null) == (shift, 64, 64, "zeros")


def test_the_digest_names_the_job_and_the_clock_not_the_way_there(tmp_path, tensors):
    config, values = tensors
    _, done = write_checkpoint(tmp_path, 64, values, config)
    resumed = {"attempt": 2, "files": {}, "recipe": {"compute": {}}, "training": {"global_batch": 8, "micro_batch": 1}}
    assert done.model_copy(update=resumed).digest == done.digest
    for change in ({"samples": 128}, {"specs": {"latents": "cd"}}, {"null": "empty"}):
        assert done.model_copy(update=change).digest != done.digest


def test_object_storage(tmp_path, tensors, s3_bucket):
    config, values = tensors
    folder, _done = write_checkpoint(tmp_path, 64, values, config, world_size=2)
    store, path = open_store(f"s3://{s3_bucket}/here"), checkpoint_folder(PARENT, 64)
    for file in folder.iterdir():
        store.put_file(f"{path}/{file.name}", file)
    assert [ref.folder for ref in list_checkpoints(store, PARENT)] == [path]
    model = load_model(f"{store.url}/{path}")
    assert all(torch.equal(p, values["ema"][name]) for name, p in model.named_parameters())
    save_model(f"s3://{s3_bucket}/model", model)
    assert torch.equal(load_model(f"s3://{s3_bucket}/model").pos_embed, model.pos_embed)


def test_only_wanted_pieces_are_read(tmp_path, tensors):
    config, values = tensors
    write_checkpoint(tmp_path, 64, values, config)
    store, path = open_store(str(tmp_path)), checkpoint_folder(PARENT, 64)
    name = "context_embedder.weight"
    done = read_checkpoint_done(store, path)
    pieces = list(read_pieces(store, path, done, lambda kind, p, start, stop: p == name and kind == "ema"))
    assert {(p.kind, p.parameter) for p in pieces} == {("ema", name)}
    assert torch.equal(torch.cat([p.values for p in pieces]), values["ema"][name].flatten())


def test_only_finished_checkpoints_are_listed_in_order(tmp_path, tensors):
    config, values = tensors
    for samples, commit in ((128, True), (64, True), (256, False)):
        write_checkpoint(tmp_path, samples, values, config, world_size=1, commit=commit)
    store = open_store(str(tmp_path))
    assert [ref.samples for ref in list_checkpoints(store, PARENT)] == [64, 128]
    assert list_checkpoints(store, PARENT)[0].folder == checkpoint_folder(PARENT, 64)
    assert list_checkpoints(store, "runs/other") == []
    with pytest.raises(CheckpointError, match="not finished"):
        read_checkpoint_done(store, checkpoint_folder(PARENT, 256))


def test_gaps_overlaps_and_strangers_are_named(tmp_path, tensors):
    config, values = tensors
    store = open_store(str(tmp_path))

    def lose(rank, pieces):
        pieces.pop("ema/final_layer.linear.bias/0", None)

    def double(rank, pieces):
        pieces["ema/final_layer.linear.bias/0"] = torch.zeros(64)

    def stranger(rank, pieces):
        pieces["ema/odd/0"] = torch.zeros(4)

    for samples, change, message in (
        (1, lose, "ema/final_layer.linear.bias are missing"),
        (2, double, "ema/final_layer.linear.bias are stored twice"),
        (3, stranger, "ema/odd/0 lies outside"),
    ):
        write_checkpoint(tmp_path, samples, values, config, change=change)
        with pytest.raises(CheckpointError, match=message):
            assemble_weights(store, checkpoint_folder(PARENT, samples), "ema")
    assemble_weights(store, checkpoint_folder(PARENT, 1), "weights")  # the other kinds are whole


def test_damaged_files_are_named(tmp_path, tensors):
    config, values = tensors
    folder, _ = write_checkpoint(tmp_path, 64, values, config)
    store, path = open_store(str(tmp_path)), checkpoint_folder(PARENT, 64)
    file = folder / rank_file(1, 3)
    whole = file.read_bytes()
    for damaged, message in ((whole[:-9], f"{file.name} is damaged .* bytes"), (whole[:-1] + b"\1", "another SHA-256")):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            assemble_weights(store, path, "ema")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{rank_file(1, 3)} is missing"):
        assemble_weights(store, path, "ema")
    fields = json.loads((folder / DONE_FILE).read_text())
    for text, message in ((json.dumps(fields | {"odd": 1}), "odd"), (json.dumps(fields | {"format": 9}), "format 9")):
        (folder / DONE_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint_done(store, path)
