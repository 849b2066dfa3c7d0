"""The loader of real shards, as a rank opens it: the same global batch at any world size, held-out rows left out."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch
from fake_training import TOKENS, UNTIMED, FakeLoader, Notebook, make_job
from rank_processes import run_ranks
from safetensors.torch import save

from sd3core.data.encoded_shards import FILE_DIGEST, pin_null
from sd3core.data.loader_process import LoaderProcess
from sd3core.data.manifest import Manifest, ManifestRef, ShardEntry, commit_manifest
from sd3core.data.shards import Sample, shard_stem, write_shard
from sd3core.data.store import FileStore, open_store
from sd3core.data.stored_text import StoredText
from sd3core.data.uncaptioned import read_uncaptioned, record_uncaptioned
from sd3core.errors import DataError
from sd3core.recipe import Compute, Text, TextDtype
from sd3core.training_checkpoint import assemble_weights
from workers.trainer.loop import RankContext, draw_inputs, read_null, train_rank
from workers.trainer.shards import open_shards
from workers.trainer.standing_checkpoints import read_metrics

CPU = torch.device("cpu")
SCHEMAS = {
    "latents": pa.schema([("bucket", pa.string()), ("split", pa.string()), FILE_DIGEST]),
    "text": pa.schema([("kind", pa.string()), ("caption_id", pa.string()), FILE_DIGEST]),
}


def _latents(numbers: range, dtype: torch.dtype = torch.float32):
    for i, image in zip(numbers, FakeLoader(40, 0, 1).batch(0).latent[numbers.start : numbers.stop], strict=True):
        split = "held_out" if i % 5 == 0 else "train"
        data = save({"latent": image.contiguous().to(dtype)})
        row = {"bucket": "64x64", "split": split, "sha256": hashlib.sha256(data).digest()}
        yield Sample(f"k{i}", {"safetensors": data}, row)


def _text(numbers: range, dtype: TextDtype = "float32"):
    features = StoredText.of(FakeLoader(40, 0, 1).batch(0).text.features(), dtype)
    for i in numbers:
        if i != 7:  # an image without a caption
            data = features.index([i]).to_bytes("reference")
            row = {"key": f"k{i}", "kind": "original", "caption_id": f"c{i}", "sha256": hashlib.sha256(data).digest()}
            yield Sample(f"c{i}", {"safetensors": data}, row)


def _write(store, stage, samples_of):
    folder, entries = f"datasets/d/{stage}/0", []
    for number in range(2):
        stem, counts = shard_stem(number, f"{number:012d}"), {"64x64": 20, "64x64 held out": 4}
        if stage == "text":
            counts = {"without caption": 1} if number == 0 else {}
        rows = range(20 * number, 20 * number + 20)
        done = write_shard(store, folder, stem, samples_of(rows), [], SCHEMAS[stage], counts=counts)
        entries.append(ShardEntry.of(done))
    return commit_manifest(
        store, folder, Manifest(stage=stage, spec="0", fields={}, inputs={"raw": "r"}, folder=folder, shards=entries)
    )


@pytest.fixture
def job(tmp_path):
    return _job(tmp_path)


def _job(tmp_path, text_of=_text):
    store = open_store(str(tmp_path / "store"))
    data = {"latents": _write(store, "latents", _latents), "text_features": _write(store, "text", text_of)}
    record_uncaptioned(store, data["latents"], data["text_features"])
    null = FakeLoader(8, 0, 1).batch(0).text.index([0])
    store.put(f"{data['text_features'].folder}/NULL.safetensors", null.to_bytes("reference"))
    pin_null(store, data["text_features"].folder)
    text = Text(clip_tokens=TOKENS, t5_tokens=TOKENS, null="empty")
    return make_job(tmp_path / "store").model_copy(update=data | {"text": text})


def _in_one_part(job):
    return job.model_copy(update={"training": job.training.model_copy(update={"micro_batch": 8})})


def _step(loader, step: int) -> tuple[list[str], torch.Tensor]:
    """Keys and latents of a rank's step, its micro batches one after the other."""
    batches = [loader.batch(step, part) for part in range(loader.parts)]
    return [key for batch in batches for key in batch.keys], torch.cat([batch.latent for batch in batches])


def test_every_world_size_reads_the_same_batches(job):
    store, warnings = open_store(job.store), []
    whole = open_shards(job, store, RankContext(0, 1, CPU, 1), warnings.append)
    ranks = [open_shards(job, store, RankContext(rank, 2, CPU, 1), warnings.append) for rank in range(2)]
    assert warnings == ["1 images have no caption and are left out of training"] * 3
    assert (whole.parts, ranks[0].parts) == (4, 2)  # of 2 rows
    seen = []
    for step in range(4):
        (keys, latents), halves = _step(whole, step), [_step(rank, step) for rank in ranks]
        assert keys == halves[0][0] + halves[1][0] and len(keys) == 8
        assert torch.equal(latents, torch.cat([half for _, half in halves]))
        seen += keys
    assert sorted(set(seen[:31])) == sorted(f"k{i}" for i in range(40) if i % 5 and i != 7)

    null = read_null(store, job)
    inputs = [draw_inputs(whole.batch(0, part), job, null, CPU) for part in range(4)]
    pooled = torch.cat([part.pooled for part in inputs])
    dropped = np.flatnonzero((pooled[:, :8] == null.clip_l_pooled).all(1).numpy())
    assert inputs[0].context.shape == (2, 2 * TOKENS, 24)
    assert len(dropped) > 0  # "no prompt" is the encoded empty string


def test_a_loader_beside_the_rank_gives_the_same_inputs_and_warnings(job):
    told, loaders = {True: [], False: []}, {}
    for beside, warnings in told.items():
        place = RankContext(1, 2, CPU, 1, loader_process=beside)
        loaders[beside] = open_shards(job, open_store(job.store), place, warnings.append)
    assert isinstance(loaders[True], LoaderProcess) and told[True] == told[False] != []
    for step, part in product(range(3), range(2)):  # micro batches of 2
        found, wanted = (draw_inputs(loaders[b].batch(step, part), job, None, CPU) for b in (True, False))
        assert found.keys == wanted.keys and len(found.keys) == 2
        for name in ("x0", "noise", "t", "context", "pooled"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    loaders[True].close()


def _train(rank, world, jobs):
    for beside, job in jobs.items():
        place = RankContext(rank, world, CPU, threads=1, loader_process=beside)
        train_rank(job, place, Notebook(), open_shards)


@pytest.mark.slow
def test_training_is_the_same_whichever_process_reads(tmp_path):
    """A phase of 12 steps, by the losses of each and the weights and moments at its end, bit by bit."""
    jobs = {beside: _job(tmp_path / str(beside)) for beside in (False, True)}
    run_ranks(1, _train, jobs)
    stores = [open_store(job.store) for job in jobs.values()]
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        inside, beside = (assemble_weights(store, f"{jobs[True].folder}/{96:012d}", kind) for store in stores)
        assert inside.keys() == beside.keys() and all(torch.equal(inside[name], beside[name]) for name in inside)
    rows = [read_metrics(store, jobs[True].folder) for store in stores]
    inside, beside = ([{k: v for k, v in row.items() if k not in UNTIMED} for row in part] for part in rows)
    assert inside == beside and len(inside) == 12 and all("wait_s" in row for row in rows[1])


@pytest.mark.parametrize(
    "gpus, setting, beside", [(0, None, False), (1, None, True), (0, True, True), (1, False, False)]
)
def test_a_loader_runs_beside_ranks_that_have_gpus_or_where_the_recipe_says_so(gpus, setting, beside):
    assert Compute(gpus_per_rank=gpus, loader_process=setting).decodes_beside_ranks is beside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_travel_as_they_are_stored_and_a_step_sees_the_same_numbers(job, dtype):
    """Every input of a step, on its device, is bit by bit what it is of latents that were made float32 when they were read."""
    store = open_store(job.store)
    job = job.model_copy(update={"latents": _write(store, "latents", partial(_latents, dtype=dtype))})
    record_uncaptioned(store, job.latents, job.text_features)
    loader = open_shards(job, store, RankContext(0, 1, CPU, 1), lambda message: None)
    for step in range(4):
        batch = loader.batch(step)
        assert batch.latent.dtype == dtype
        wanted = draw_inputs(dataclasses.replace(batch, latent=batch.latent.float()), job, None, CPU)
        inputs = draw_inputs(batch, job, None, CPU)
        for name in ("x0", "noise", "t", "context", "pooled"):
            found = getattr(inputs, name)
            assert found.dtype == torch.float32 and torch.equal(found, getattr(wanted, name)), name


def test_8_bit_text_stays_so_up_to_where_it_is_joined(job, tmp_path):
    job, coarse = map(_in_one_part, (job, _job(tmp_path / "coarse", partial(_text, dtype="int8"))))
    loaders = [open_shards(j, open_store(j.store), RankContext(0, 1, CPU, 1), len) for j in (job, coarse)]
    batches = [loader.batch(0) for loader in loaders]
    assert batches[0].keys == batches[1].keys and batches[1].text.tensors["t5"].dtype == torch.int8
    exact, near = (draw_inputs(batch, job, None, CPU) for batch in batches)
    kept = exact.context.norm(dim=-1) > 0  # else dropped
    assert torch.equal(kept, near.context.norm(dim=-1) > 0) and kept.any() and not kept.all()
    assert torch.cosine_similarity(exact.context[kept], near.context[kept], dim=-1).min() > 0.999
    assert not torch.equal(exact.context, near.context) and torch.equal(exact.noise, near.noise)
    assert torch.equal(near.pooled, exact.pooled.half().float())


def test_another_manifest_than_the_job_names_is_refused(job):
    wrong = job.model_copy(update={"latents": ManifestRef(folder=job.latents.folder, digest="f" * 64)})
    with pytest.raises(DataError, match="no such manifest"):
        open_shards(wrong, open_store(job.store), RankContext(0, 1, CPU, 1), pytest.fail)


def test_named_samples_whatever_their_split(job):
    """By shard and key, in the order asked for; without those that are not there or have no caption."""
    loader = open_shards(job, open_store(job.store), RankContext(0, 1, CPU, 1), lambda message: None)
    [batch] = loader.samples([(1, "k25"), (0, "k3"), (0, "k25"), (0, "k7"), (9, "k3"), (0, "k0")])
    assert batch.keys == ["k25", "k3", "k0"] and batch.bucket == "64x64"
    whole = FakeLoader(40, 0, 1).batch(0)
    assert torch.equal(batch.latent, whole.latent[[25, 3, 0]])
    assert torch.equal(batch.text.features().t5, whole.text.features().t5[[25, 3, 0]])
    assert loader.samples([]) == []


def test_rows_without_a_caption_are_recorded_once_and_a_rank_reads_no_index_to_begin(job, monkeypatch):
    store, asked, real = open_store(job.store), [], FileStore.get
    monkeypatch.setattr(FileStore, "get", lambda self, path: (asked.append(path), real(self, path))[1])
    pair = job.latents, job.text_features
    assert read_uncaptioned(store, *pair) == {0: {"64x64": [1, 0]}}
    asked.clear()
    record_uncaptioned(store, *pair)  # it stands
    open_shards(job, store, RankContext(0, 1, CPU, 1), lambda message: None)
    assert not [path for path in asked if path.endswith(".parquet")] and len(asked) <= 6
    [record] = [entry.path for entry in store.list() if "UNCAPTIONED" in entry.path]
    store.put(record, store.get(record).replace(b"1,", b"2,"))
    with pytest.raises(DataError, match="UNCAPTIONED.*not there or damaged; run the stage again that makes it"):
        open_shards(job, store, RankContext(0, 1, CPU, 1), lambda message: None)
    record_uncaptioned(store, *pair)
    assert read_uncaptioned(store, *pair) == {0: {"64x64": [1, 0]}}
