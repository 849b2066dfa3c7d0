"""The loop on real ranks (DeepSpeed over gloo, no Ray): bad steps, fencing, other world sizes, a later phase."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fake_training import MODEL, TOKENS, FakeLoader, Notebook, fake_loader, make_job
from rank_processes import run_ranks

from sd3core.checkpoint import load_model
from sd3core.checkpoint_record import list_checkpoints, read_checkpoint_done
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError
from sd3core.formulations import find_formulation
from sd3core.mmdit import CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig, lean
from sd3core.training_checkpoint import assemble_weights
from workers.trainer import loop
from workers.trainer.checkpointing import begin_attempt
from workers.trainer.job import TrainingFailed, TrainingSuperseded
from workers.trainer.loop import RankContext, draw_inputs, train_rank
from workers.trainer.standing_checkpoints import read_metrics

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
OTHER_FORMULATIONS = {
    "edm": {"formulation": "edm(-0.60,1.20)", "shift": 2.0},
    "linear": {"formulation": "eps/linear"},
}

SIZES = {key: value for key, value in MODEL.to_dict().items() if key.startswith(("context", "pooled", "position"))}
RIVALS = {  # each with another ZeRO stage, and the options that treat blocks in a way of their own
    "three-streams": (MMDiTConfig.from_depth(2, clip_tokens=TOKENS, **SIZES), {"zero_stage": 3, "optimizer": "muon"}),
    "dual-attention": (MMDiTConfig.from_depth(2, dual_attention_blocks=1, **SIZES), {"optimizer": "muon"}),
    "dit": (DiTConfig.from_depth(2, **SIZES), {"zero_stage": 1, "activation_checkpointing": True}),
    "cross_dit": (CrossDiTConfig.from_depth(2, **SIZES), {"zero_stage": 2, "optimizer": "muon"}),
    "uvit": (UViTConfig.from_depth(2, **SIZES), {"zero_stage": 3, "activation_checkpointing": True}),
}

PRECISIONS = {  # precision asked, whether the processor has arithmetic for bf16, precision taken
    "auto-with": ("auto", True, "bf16"),
    "auto-without": ("auto", False, "fp32"),
    "bf16-without": ("bf16", False, "bf16"),
}

AVERAGE = {"samples": 48, "checkpoint_every_samples": 16, "ema_decay": 0.15}  # a checkpoint at each update of the EMA
LATE = {"samples": 48, "checkpoint_every_samples": 16, "ema_every_steps": 3}  # the first update is after 24 samples

LEAN = {"all-lean": 1, "all-plain": 10**9}  # name -> least number of tokens that takes the lean forms


def _train(rank, world, job, loader_changes=None):
    """(error or None, notebook) of one attempt on this rank."""
    notebook = Notebook()
    try:
        train_rank(
            job,
            RankContext(rank, world, CPU, threads=1),
            notebook,
            lambda *_: fake_loader(job, rank, world, **(loader_changes or {})),
        )
    except (TrainingFailed, CheckpointError) as error:
        return error, notebook
    return None, notebook


@dataclass(frozen=True)
class Usurper:
    """A loader during whose batch of step 6 a newer attempt registers."""

    loader: FakeLoader
    store: str
    folder: str

    def batch(self, step: int, part: int):
        if step == 6 and part == 0:
            begin_attempt(open_store(self.store), self.folder)
        return self.loader.batch(step, part)


def _single_rank_stories(rank, world, root: Path):
    """Several trainings one after the other in one process: importing DeepSpeed costs more than all of them."""
    stories = {}
    make = partial(make_job, micro_batch=4)  # half the passes
    job = make(root / "one-nan")
    stories["one-nan"] = _train(rank, world, job, {"nan_steps": (5,)})
    stories["clean"] = _train(rank, world, make(root / "clean"))
    stories["slow"] = _train(rank, world, make(root / "slow"), {"slow_at": 6})
    for name, changes in OTHER_FORMULATIONS.items():
        stories[name] = _train(rank, world, make(root / name, **changes))
    for name, (model, changes) in RIVALS.items():
        changes = {"learning_rate": 5e-3} | changes
        stories[name] = _train(rank, world, make(root / name, model=model, **changes))
    for name, least in LEAN.items():
        with patch.object(lean, "MIN_TOKENS", least):
            stories[name] = _train(rank, world, make(root / name, zero_stage=3, activation_checkpointing=True))
    for name, (precision, able, _) in PRECISIONS.items():
        with patch.object(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}):
            stories[name] = _train(rank, world, make(root / name, samples=16, precision=precision))
    stories["average"] = _train(rank, world, make(root / "average", **AVERAGE))
    for samples in (16, 24, 48):  # made longer twice: before the EMA's first update, and after it
        stories[f"longer-{samples}"] = _train(rank, world, make(root / "longer", **LATE | {"samples": samples}))
    stories["at-once"] = _train(rank, world, make(root / "at-once", **LATE))
    stories["shorter"] = _train(rank, world, make(root / "longer", **LATE | {"samples": 40}))
    stories["always-nan"] = _train(rank, world, make(root / "always-nan"), {"nan_steps": tuple(range(6, 12))})

    job, notebook = make(root / "usurped"), Notebook()
    try:
        usurped = Usurper(fake_loader(job, 0, 1), job.store, job.folder)
        train_rank(job, RankContext(0, 1, CPU, threads=1), notebook, lambda *_: usurped)
        stories["usurped"] = None, notebook
    except TrainingSuperseded as error:
        stories["usurped"] = error, notebook

    store = open_store(str(root / "clean"))
    last = store.uri(list_checkpoints(store, make(root / "clean").folder)[-1].folder)
    config = MMDiTConfig.from_dict(MODEL.to_dict() | {"qk_norm": "rms", "position_side": 8})
    changes = {"zero_stage": 3, "samples": 16, "learning_rate": 1e-12}
    tuned = make(root / "clean", phase="finetune.0", model=config, init=last, **changes)
    stories["finetune"] = _train(rank, world, tuned)
    wrong = make(root / "clean", phase="finetune.1", model=MMDiTConfig.from_depth(3), init=last)
    stories["wrong-init"] = _train(rank, world, wrong)
    return stories


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def stories(root):
    return run_ranks(1, _single_rank_stories, root)[0]


def rows_of(root: Path, name: str):
    return read_metrics(open_store(str(root / name)), make_job(root / name).folder)


def test_checkpoints_and_rows_follow_the_clock(root, stories):
    error, notebook = stories["clean"]
    job, store = make_job(root / "clean"), open_store(str(root / "clean"))
    assert error is None and notebook.began_at == [0] and notebook.warnings == []
    assert [ref.samples for ref in list_checkpoints(store, job.folder)] == [32, 64, 96]
    rows = rows_of(root, "clean")
    assert [row["samples"] for row in rows] == list(range(8, 97, 8))
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["lr"] < rows[3]["lr"] == 1e-3
    assert all(0 < row["mfu"] and len(row["loss_by_t"]) == 8 for row in rows)
    assert [row["samples"] for row in rows if "attention_logit_max" in row] == [32, 64, 96]
    done = read_checkpoint_done(store, f"{job.folder}/000000000096")
    assert (done.steps, done.optimizer_step, done.attempt, done.null) == (12, 12, 1, "zeros")
    assert list(Path(job.log_dir).glob("events*")) and store.list(job.logs_folder + "/")


def test_a_loader_that_is_slow_shows_in_the_rates(root, stories):
    """Step 7's batch takes three seconds; two steps are ready when it is begun."""
    assert stories["slow"][0] is None
    rows = rows_of(root, "slow")
    slow, others = rows[6], [*rows[1:6], *rows[7:]]
    assert slow["wait_s"] > max(0.5, *(row["wait_s"] for row in others))
    assert slow["samples_per_s"] < 8 / slow["wait_s"]
    assert len({round(row["mfu"] / row["samples_per_s"], 12) for row in rows}) == 1  # so over the same wall time
    calm = rows_of(root, "clean")
    assert [row["loss"] for row in rows] == [row["loss"] for row in calm]


def test_a_step_says_how_long_the_checkpoint_before_it_took(root, stories):
    rows = rows_of(root, "clean")
    assert [row["step"] for row in rows if row["checkpoint_s"] > 0] == [5, 9]
    assert all(row["samples_per_s"] < 8 / row["checkpoint_s"] for row in rows if row["checkpoint_s"])


@pytest.mark.parametrize("name", OTHER_FORMULATIONS)
def test_another_formulation_trains_as_itself(root, stories, name):
    """It learns, its losses are binned by rectified flow's t, and the checkpoint says what it is."""
    error, notebook = stories[name]
    assert error is None and notebook.warnings == []
    job = make_job(root / name, **OTHER_FORMULATIONS[name])
    row, formulation = rows_of(root, name)[0], find_formulation(job.training.formulation).shifted(job.training.shift)
    model = load_model(str(root / name / job.folder / "000000000096"), "live")
    inputs = [draw_inputs(FakeLoader(8, 0, 1).batch(step), job, None, CPU) for step in range(4)]
    with torch.no_grad():
        fresh, trained = (
            [formulation.loss(partial(predict, drawn), drawn.x0, drawn.noise, drawn.t) for drawn in inputs]
            for predict in (
                lambda _, z, t: torch.zeros_like(z),
                lambda drawn, z, t: model(z, t, drawn.context, drawn.pooled),
            )
        )
    assert row["loss"] == pytest.approx(float(fresh[0].mean()), rel=1e-5)  # a fresh model gives 0
    assert torch.cat(trained).mean() < 0.97 * torch.cat(fresh).mean()
    bins = (formulation.rf_time(inputs[0].t) * 8).long()
    assert [i for i, loss in enumerate(row["loss_by_t"]) if loss is not None] == sorted(set(bins.tolist()))
    done = read_checkpoint_done(open_store(job.store), f"{job.folder}/000000000096")
    assert done.training["formulation"] == job.training.formulation
    assert done.model_config_of() == MODEL


@pytest.mark.parametrize("name", RIVALS)
def test_every_backbone_trains_and_is_read_again(root, stories, name):
    error, notebook = stories[name]
    assert error is None and notebook.warnings == []
    config, _ = RIVALS[name]
    job = make_job(root / name, model=config)
    model = load_model(str(root / name / job.folder / "000000000096"), "live")
    assert model.config == config
    inputs = [draw_inputs(FakeLoader(8, 0, 1).batch(step), job, None, CPU) for step in range(4)]
    targets = [drawn.noise - drawn.x0 for drawn in inputs]
    with torch.no_grad():
        outputs = [
            model((1 - t) * drawn.x0 + t * drawn.noise, drawn.t, drawn.context, drawn.pooled)
            for drawn in inputs
            for t in [drawn.t.view(-1, 1, 1, 1)]
        ]
    fresh, trained = (
        sum(float((target - output).square().mean()) for target, output in zip(targets, given, strict=True))
        for given in ([torch.zeros(())] * 4, outputs)  # a fresh model gives 0
    )
    assert trained < 0.985 * fresh


def test_lean_forms_train_alike_where_their_weights_come_and_go(root, stories):
    """ZeRO 3 takes weights away between forward and backward, and blocks are run twice; bf16 rounds differently."""
    assert [stories[name][0] for name in LEAN] == [None, None]
    own, plain = ([row["loss"] for row in rows_of(root, name) if "loss" in row] for name in LEAN)
    assert own != plain and len(own) > 5
    assert own == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_checkpoint_says_in_which_precision_it_was_trained(root, stories, name):
    precision, able, taken = PRECISIONS[name]
    error, notebook = stories[name]
    assert error is None
    folder = list_checkpoints(open_store(str(root / name)), make_job(root / name).folder)[-1].folder
    assert read_checkpoint_done(open_store(str(root / name)), folder).training["precision"] == taken
    advice = "pretrain.precision is bf16, for which this cpu has no arithmetic: fp32 is many times as fast, and auto takes it"
    assert notebook.warnings == ([advice] if precision == "bf16" and not able else [])


def average_of(job, checkpoints: tuple[int, ...], decays: tuple[float, ...]):
    """The EMA by hand, from the live weights of checkpoints that each stand at one of its updates."""
    store, average = open_store(job.store), {}
    for samples, decay in zip(checkpoints, decays, strict=True):
        live = assemble_weights(store, f"{job.folder}/{samples:012d}", "weights")
        average = {name: decay * average.get(name, 0.0) + (1 - decay) * tensor for name, tensor in live.items()}
    return average, assemble_weights(store, f"{job.folder}/{checkpoints[-1]:012d}", "ema")


def assert_close(found, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def test_going_on_with_more_and_with_fewer_ranks(root, stories, tmp_path):
    """From 1 rank at ZeRO 2 to 2 ranks at ZeRO 1, then to 1 rank at ZeRO 3; bf16 sums in another order differ slightly.

    The EMA counts its updates on, whoever makes them.
    """
    shutil.copytree(root / "average", tmp_path / "store")
    alone = rows_of(root, "average")
    for later in (32, 48):
        shutil.rmtree(tmp_path / "store" / make_job(root / "average").folder / f"{later:012d}")
    for attempt, (ranks, stage, start) in enumerate([(2, 1, 16), (1, 3, 32)], start=2):
        job = make_job(tmp_path / "store", **AVERAGE | {"samples": start + 16, "zero_stage": stage})
        (error, notebook), *_ = run_ranks(ranks, _train, job)
        assert error is None and notebook.began_at == [start]
        rows = read_metrics(open_store(job.store), job.folder)
        for ours, theirs in zip(rows, alone[: len(rows)], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        done = read_checkpoint_done(open_store(job.store), f"{job.folder}/{start + 16:012d}")
        assert (len(done.rank_files), done.attempt, done.optimizer_step) == (ranks, attempt, (start + 16) // 8)
    average, ema = average_of(job, (16, 32, 48), (0, 1 / 10, 0.15))
    assert_close(ema, average)


def test_ema_is_the_average_of_the_weights_since_its_first_update(root, stories):
    """Decays 0, 1 / 10, then the recipe's, in fp32 although the model is bf16: nothing of the start is in it."""
    assert stories["average"][0] is None
    job = make_job(root / "average")
    average, ema = average_of(job, (16, 32, 48), (0, 1 / 10, 0.15))
    assert_close(ema, average)
    assert load_model(str(root / "average" / job.folder / "000000000048"), weights="ema").config == MODEL


def test_before_its_first_update_the_ema_is_the_live_weights(root, stories):
    job, store = make_job(root / "at-once"), open_store(str(root / "at-once"))
    for samples, same in ((16, True), (32, False)):
        live, ema = (assemble_weights(store, f"{job.folder}/{samples:012d}", kind) for kind in ("weights", "ema"))
        assert all(torch.equal(live[name], ema[name]) for name in live) == same


def test_a_phase_that_is_made_longer_goes_on(root, stories):
    """Bit by bit as if its length had been known, and its curve has each step once."""
    assert [stories[f"longer-{samples}"][0] for samples in (16, 24, 48)] == [None] * 3
    assert [stories[f"longer-{samples}"][1].began_at for samples in (16, 24, 48)] == [[0], [16], [24]]
    folder, stores = make_job(root / "longer").folder, [open_store(str(root / name)) for name in ("longer", "at-once")]
    for kind in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        longer, at_once = (assemble_weights(store, f"{folder}/{48:012d}", kind) for store in stores)
        assert all(torch.equal(longer[name], at_once[name]) for name in at_once)
    losses = [[(row["samples"], row["loss"]) for row in rows_of(root, name)] for name in ("longer", "at-once")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_phase_that_is_made_shorter_starts_before_its_end(root, stories):
    """Checkpoints at 16, 24, 32 and 48 stand; an end at 40 goes on from 32."""
    error, notebook = stories["shorter"]
    assert error is None and notebook.began_at == [32]
    store, folder = open_store(str(root / "longer")), make_job(root / "longer").folder
    assert [ref.samples for ref in list_checkpoints(store, folder)] == [16, 24, 32, 40, 48]
    assert [ref.samples for ref in list_checkpoints(store, folder, 40)] == [16, 24, 32, 40]
    assert [row["samples"] for row in read_metrics(store, folder, 40)] == [8, 16, 24, 32, 40]


def _damaged_story(rank, world, job):
    """A phase of two ranks, then the same made longer: of two checkpoints one rank's file of the later one has lost a bit.

    The first rank reads the encoded empty string for all: on the other one the call would fail.
    """
    with patch.object(loop, "read_null", {0: lambda *_: None}.get(rank)):
        stories = [_train(rank, world, job)]
    store, folder = open_store(job.store), f"{job.folder}/{64:012d}"
    if rank == 0:
        path = f"{folder}/{read_checkpoint_done(store, folder).rank_files[1]}"
        data = store.get(path)
        store.put(path, data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    longer = job.model_copy(update={"training": job.training.model_copy(update={"samples": 96})})
    return [*stories, _train(rank, world, longer)]


def test_a_checkpoint_that_one_rank_finds_damaged_is_passed_over_by_all(s3_bucket, tmp_path):
    """On S3 as on files: nobody goes on with its own whole part, and the same steps are made again."""
    job = make_job(tmp_path / "store", samples=64).model_copy(update={"store": f"s3://{s3_bucket}/a"})
    first, second = run_ranks(2, _damaged_story, job)
    assert [error for error, _ in (*first, *second)] == [None] * 4
    assert [notebook.began_at for _, notebook in first] == [[0], [32]]
    store = open_store(job.store)
    [warning] = first[1][1].warnings
    damaged = f"{job.folder}/{64:012d}/rank-001-of-002.attempt-0001.safetensors"
    assert (
        warning == f"pretrain: {store.uri(damaged)} is damaged (another SHA-256); going on from an earlier checkpoint"
    )
    assert [ref.samples for ref in list_checkpoints(store, job.folder)] == [32, 64, 96]
    assert read_checkpoint_done(store, f"{job.folder}/{64:012d}").attempt == 2
    assert all(assemble_weights(store, f"{job.folder}/{64:012d}", "weights"))


def test_a_step_that_is_not_finite_is_named_and_left_out(root, stories):
    error, notebook = stories["one-nan"]
    assert error is None
    [warning] = notebook.warnings
    assert warning == "pretrain: step 6: loss not finite, update left out; samples: image-0"
    rows = rows_of(root, "one-nan")
    assert rows[5]["loss"] is None and rows[5]["keys"] == ["image-0"] and "warning" not in rows[6]
    assert [row["loss"] for row in rows[:5]] == [row["loss"] for row in rows_of(root, "clean")[:5]]
    done = read_checkpoint_done(open_store(str(root / "one-nan")), f"{make_job(root / 'one-nan').folder}/000000000096")
    assert (done.steps, done.optimizer_step) == (12, 11)


def test_many_of_them_go_back_to_the_last_checkpoint_and_then_fail(root, stories):
    error, notebook = stories["always-nan"]
    assert notebook.began_at == [0, 32, 32]
    assert sum("going back" in warning for warning in notebook.warnings) == 2
    assert str(error).startswith("pretrain: 5 steps in a row without a finite gradient up to step 11, again after")
    assert "\n" not in str(error)


def test_an_older_attempt_cannot_commit_after_a_newer_one(root, stories):
    error, _ = stories["usurped"]
    assert isinstance(error, TrainingSuperseded) and "attempt 2" in str(error)
    job, store = make_job(root / "usurped"), open_store(str(root / "usurped"))
    assert [ref.samples for ref in list_checkpoints(store, job.folder)] == [32]
    assert any("000000000064" in entry.path for entry in store.list(job.folder + "/"))
    assert begin_attempt(store, job.folder) == 3
    assert not any("000000000064" in entry.path for entry in store.list(job.folder + "/"))


def test_a_later_phase_starts_exactly_from_the_averaged_weights(root, stories):
    """With a rate of almost nothing the trained weights are still the start: EMA of the phase before, fitted scales.

    That they are those of the first batch stands in test_start.py.
    """
    error, _ = stories["finetune"]
    assert error is None
    store = open_store(str(root / "clean"))
    before = assemble_weights(store, f"{make_job(root / 'clean').folder}/000000000096", "ema")
    after = assemble_weights(store, f"{make_job(root / 'clean', phase='finetune.0').folder}/000000000016", "weights")
    new = sorted(after.keys() - before.keys())
    assert len(new) == 8 and all(0.1 < after[name].min() and after[name].max() < 3 for name in new)
    assert not any(torch.allclose(after[name], torch.ones(64)) for name in new)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-10)


def test_a_start_that_does_not_fit_is_named(stories):
    error, _ = stories["wrong-init"]
    assert isinstance(error, CheckpointError) and "finetune.1 starts from" in str(error)


def test_draws_do_not_depend_on_the_number_of_ranks(tmp_path):
    job = make_job(tmp_path / "store", shift=3.0)
    whole = draw_inputs(FakeLoader(8, 0, 1).batch(2), job, None, CPU)
    parts = [draw_inputs(FakeLoader(8, rank, 2).batch(2), job, None, CPU) for rank in range(2)]
    for name in ("x0", "noise", "t", "context", "pooled"):
        torch.testing.assert_close(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name), rtol=0, atol=0)
    unshifted = draw_inputs(FakeLoader(8, 0, 1).batch(2), make_job(tmp_path / "store"), None, CPU)
    torch.testing.assert_close(whole.t, 3 * unshifted.t / (1 + 2 * unshifted.t))


def test_rows_are_json(root, stories):
    path = root / "one-nan" / make_job(root / "one-nan").folder / "000000000064" / "metrics.jsonl"
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6, 7, 8]
