"""Two attempts at one phase at the same time, moment by moment: no DONE.json is left without its files. And a store that is away."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_training import make_job

from sd3core.checkpoint_record import DamagedFile, DamagedRecord, list_checkpoints, read_checkpoint_done
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.store import FileStore
from sd3core.errors import StoreError
from sd3core.recipe import Compute
from sd3core.specs import DONE_FILE
from sd3core.training_checkpoint import Piece
from workers.trainer import checkpointing, train
from workers.trainer.checkpointing import PATIENCE_S, begin_attempt, load_checkpoint, save_checkpoint
from workers.trainer.job import TrainingSuperseded
from workers.trainer.standing_checkpoints import last_whole_checkpoint, read_metrics

COMPUTE = Compute(train_ranks=2)


class Disturbed(FileStore):
    """A store in which something happens once, just before or after a DONE.json is written or a file is deleted."""

    def __init__(self, root, **happenings):
        super().__init__(root)
        self.happenings = happenings

    def _now(self, moment):
        happening = self.happenings.pop(moment, None)
        if happening:
            happening()

    def put_json(self, path, value):
        if path.endswith(DONE_FILE):
            self._now("before_done")
        super().put_json(path, value)
        if path.endswith(DONE_FILE):
            self._now("after_done")

    def delete(self, path):
        super().delete(path)
        self._now("after_delete")


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def job(tmp_path):
    return make_job(tmp_path / "store")


def write(store, job, attempt, step=4, warn=print, rows=()):
    trainer = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), optimizer_step=step, shapes={"w": [3]})
    trainer.pieces = lambda own: [Piece("weights", "w", 0, torch.ones(3))]
    return save_checkpoint(store, job, trainer, attempt=attempt, step=step, rows=list(rows), warn=warn)


def test_a_newer_attempt_before_done_removes_the_files_and_the_older_one_takes_done_back(job):
    store = FileStore(Path(job.store))
    disturbed = Disturbed(store.root, before_done=lambda: begin_attempt(store, job.folder))
    with pytest.raises(TrainingSuperseded, match="attempt 2 of run test has begun elsewhere; attempt 1 stops"):
        write(disturbed, job, begin_attempt(store, job.folder))
    assert list_checkpoints(store, job.folder) == []


def test_a_newer_attempt_after_done_keeps_that_checkpoint(job):
    store = FileStore(Path(job.store))
    disturbed = Disturbed(store.root, after_done=lambda: begin_attempt(store, job.folder))
    with pytest.raises(TrainingSuperseded):
        write(disturbed, job, begin_attempt(store, job.folder))
    assert last_whole_checkpoint(store, job.folder).samples == 32


def test_a_newer_attempt_takes_back_a_done_that_comes_while_it_removes_the_files(job):
    store = FileStore(Path(job.store))
    folder = write(store, job, begin_attempt(store, job.folder))
    done = store.get_json(f"{folder}/{DONE_FILE}")
    store.delete(f"{folder}/{DONE_FILE}")
    disturbed = Disturbed(store.root, after_delete=lambda: store.put_json(f"{folder}/{DONE_FILE}", done))
    assert begin_attempt(disturbed, job.folder) == 2
    assert list_checkpoints(store, job.folder) == []


def test_a_done_of_the_newer_attempt_is_not_taken_back(job):
    """The older one slept over all of it: the newer attempt has written the same checkpoint meanwhile."""
    store = FileStore(Path(job.store))
    old = begin_attempt(store, job.folder)
    disturbed = Disturbed(store.root, after_done=lambda: write(store, job, begin_attempt(store, job.folder)))
    with pytest.raises(TrainingSuperseded):
        write(disturbed, job, old)
    last = last_whole_checkpoint(store, job.folder)
    assert read_checkpoint_done(store, last.folder).attempt == 2


@pytest.mark.parametrize("damage", ["samples", "steps", "not JSON"])
def test_a_damaged_checkpoint_is_named_and_passed_over(job, damage):
    store = FileStore(Path(job.store))
    attempt = begin_attempt(store, job.folder)
    first, second = (write(store, job, attempt, step) for step in (4, 8))
    assert last_whole_checkpoint(store, job.folder).folder == second
    data = bytearray(store.get(f"{second}/{DONE_FILE}"))
    if damage == "not JSON":
        del data[-20:]
    else:
        place = data.index(f'"{damage}": '.encode()) + len(damage) + 4
        data[place] ^= 1  # a digit becomes another
    store.put(f"{second}/{DONE_FILE}", bytes(data))
    warnings: list[str] = []
    assert last_whole_checkpoint(store, job.folder, warnings.append).folder == first
    assert (
        warnings[0].startswith(f"{store.uri(second)}/{DONE_FILE}: damaged")
        and "going on from an earlier" in warnings[0]
    )
    with pytest.raises(DamagedRecord, match="delete it, and run the training stage again"):
        read_checkpoint_done(store, second)


def test_a_bit_of_the_weights_is_found_by_who_reads_them_and_by_nobody_before(job, monkeypatch):
    """A look at a phase of many checkpoints reads none of their files."""
    store = FileStore(Path(job.store))
    folder = write(store, job, begin_attempt(store, job.folder))
    [name] = read_checkpoint_done(store, folder).rank_files
    data = store.get(f"{folder}/{name}")
    weights, loaded, told = torch.zeros(3), [], []
    trainer = SimpleNamespace(rank=0, world=1, shapes={"w": [3]}, loaded=loaded.append)
    trainer.pieces = lambda: [Piece("weights", "w", 0, weights)]
    assert load_checkpoint(store, folder, trainer, told.append).steps == 4 and weights.tolist() == [1, 1, 1]
    assert told == [f"reading {folder}/{name}"] and loaded == [4]
    store.put(f"{folder}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "get_file", None)
        patch.setattr("sd3core.data.records.sha256_of", None)
        patch.setattr("sd3core.data.checked_files.sha256_of", None)
        assert last_whole_checkpoint(store, job.folder).folder == folder
    record = store.uri(f"{folder}/{DONE_FILE}")
    mend = (
        f"take another checkpoint, or delete {record} and run the training stage again: it goes on from an earlier one"
    )
    with pytest.raises(DamagedFile) as error:
        load_checkpoint(store, folder, trainer)
    assert str(error.value) == f"{store.uri(folder)}/{name} is damaged (another SHA-256); {mend}" and loaded == [4]
    assert error.value.damage == f"{store.uri(folder)}/{name} is damaged (another SHA-256)"


def test_the_bytes_of_a_phases_last_checkpoint_are_compared_once_a_machine(job, tmp_path, monkeypatch):
    """A finished phase: nobody may read its last checkpoint before its weights are asked for."""
    store, checked = FileStore(Path(job.store)), CheckedFiles(tmp_path / "checked")
    attempt = begin_attempt(store, job.folder)
    first, second = (write(store, job, attempt, step) for step in (4, 8))
    [name] = read_checkpoint_done(store, second).rank_files
    assert last_whole_checkpoint(store, job.folder, checked=checked).folder == second
    with monkeypatch.context() as patch:
        patch.setattr("sd3core.data.checked_files.sha256_of", lambda path: pytest.fail(f"{path} is read again"))
        assert last_whole_checkpoint(store, job.folder, checked=checked).folder == second
    data = store.get(f"{second}/{name}")
    store.put(f"{second}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    told: list[str] = []
    assert last_whole_checkpoint(store, job.folder, told.append, checked=checked).folder == first
    assert told == [f"{store.uri(second)}: {name} is damaged; going on from an earlier checkpoint"]


def test_a_record_of_an_earlier_version_still_vouches_for_its_samples(job):
    store = FileStore(Path(job.store))
    folder = write(store, job, begin_attempt(store, job.folder))
    fields = store.get_json(f"{folder}/{DONE_FILE}")
    del fields["sha256"]
    store.put_json(f"{folder}/{DONE_FILE}", fields)
    assert read_checkpoint_done(store, folder).sha256 is None
    store.put_json(f"{folder}/{DONE_FILE}", fields | {"samples": fields["samples"] + 1})
    with pytest.raises(DamagedRecord, match="33 samples and its folder 32"):
        read_checkpoint_done(store, folder)
    assert last_whole_checkpoint(store, job.folder) is None


def test_a_checkpoint_whose_files_are_gone_is_passed_over(job):
    store = FileStore(Path(job.store))
    attempt = begin_attempt(store, job.folder)
    first, second = (write(store, job, attempt, step) for step in (4, 8))
    [name] = read_checkpoint_done(store, second).rank_files
    whole = store.get(f"{second}/{name}")
    store.delete(f"{second}/{name}")
    warnings: list[str] = []
    assert last_whole_checkpoint(store, job.folder, warnings.append).folder == first
    assert warnings == [f"{store.uri(second)}: {name} is missing; going on from an earlier checkpoint"]
    store.put(f"{second}/{name}", whole[:-8])
    assert last_whole_checkpoint(store, job.folder, warnings.append).folder == first
    assert f"{name} has {len(whole) - 8:,} bytes instead of {len(whole):,}; going on from an earlier" in warnings[1]
    store.put(f"{second}/{name}", whole)
    assert last_whole_checkpoint(store, job.folder).folder == second
    store.delete(f"{second}/{name}")
    store.delete(f"{first}/{DONE_FILE}")
    assert last_whole_checkpoint(store, job.folder) is None


def rows_of(*steps):
    return [{"step": step, "samples": 8 * step, "loss": 1.0 / step} for step in steps]


@pytest.mark.parametrize(
    ("damage", "left", "word"),
    [
        (None, [], "missing"),
        (lambda data: b"", [], "damaged"),
        (lambda data: data[:-5], [5, 6, 7], "damaged"),
        (lambda data: data[: data.index(b"\n") + 1], [5], "damaged"),  # whole lines, and too few
        (lambda data: b"\xff" + data, [], "damaged"),
        (lambda data: b"[]\n" + data, [], "damaged"),
    ],
)
def test_loss_rows_that_are_damaged_cost_a_piece_of_the_curve_and_nothing_else(job, damage, left, word):
    store, told = FileStore(Path(job.store)), []
    attempt = begin_attempt(store, job.folder)
    for steps in ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)):
        write(store, job, attempt, steps[-1], rows=rows_of(*steps))
    assert read_metrics(store, job.folder, warn=told.append) == rows_of(*range(1, 13)) and told == []
    path = f"{job.folder}/{64:012d}/metrics.jsonl"
    if damage is None:
        store.delete(path)
    else:
        store.put(path, damage(store.get(path)))
    assert read_metrics(store, job.folder, warn=told.append) == rows_of(1, 2, 3, 4, *left, 9, 10, 11, 12)
    [warning] = told
    assert warning.startswith(
        f"{store.uri(path)} is {word}: the loss curve has a gap up to 64 samples, and nothing else needs it"
    )
    assert last_whole_checkpoint(store, job.folder).samples == 96
    result = train(job, COMPUTE)  # a finished phase stays finished
    assert (result.samples, result.resumed_from, result.attempts) == (96, 96, 1)
    assert result.warnings == [f"pretrain: {warning}"]


class Away(FileStore):
    """A store that refuses the next `refusals` files and records, one after another."""

    def __init__(self, root, refusals):
        super().__init__(root)
        self.refusals = refusals

    def _refuse(self):
        if self.refusals:
            self.refusals -= 1
            raise StoreError("the store: No space left on device")

    def put_file(self, path, local):
        self._refuse()
        super().put_file(path, local)

    def put_json(self, path, value):
        self._refuse()
        super().put_json(path, value)


@pytest.fixture
def waits(monkeypatch):
    """How long was waited, without the waiting."""
    waited: list[float] = []
    monkeypatch.setattr(checkpointing.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("refusals", [1, len(PATIENCE_S)])
def test_a_checkpoint_waits_for_its_store(job, waits, refusals):
    store, told = FileStore(Path(job.store)), []
    attempt = begin_attempt(store, job.folder)
    write(Away(store.root, refusals), job, attempt, warn=told.append)
    assert last_whole_checkpoint(store, job.folder).samples == 32
    assert waits == [*PATIENCE_S[:refusals]]
    assert told[0] == "the store: No space left on device; the checkpoint waits, and is tried again in 10 s"
    assert len(told) == refusals


def test_a_store_that_stays_away_is_the_error(job, waits):
    store = FileStore(Path(job.store))
    attempt = begin_attempt(store, job.folder)
    with pytest.raises(StoreError, match="No space left"):
        write(Away(store.root, 100), job, attempt)
    assert waits == [*PATIENCE_S] and list_checkpoints(store, job.folder) == []
