"""Checkpoints of a running phase: what ranks write and read. The format is sd3core.checkpoint's.

PHASE/SPEC/attempts/0001.json is registered by every start of the training. Only the newest attempt may commit, and its
number is in the names of its rank files, so that a late writer of an older attempt cannot touch a newer one's bytes.
A DONE.json that an older attempt writes while a newer one begins stays only where its files do: both look again.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sd3core.checkpoint_record import (
    METRICS_FILE,
    CheckpointDone,
    DamagedFile,
    checkpoint_folder,
    list_checkpoints,
    read_checkpoint_done,
    write_done,
)
from sd3core.data.provenance import device_kind, provenance, provenance_bytes, provenance_file
from sd3core.data.records import FileRecord, record_file
from sd3core.data.store import Store, is_transient
from sd3core.errors import CheckpointError, StoreError
from sd3core.specs import DONE_FILE
from sd3core.training_checkpoint import Piece, TensorKind, rank_file, read_pieces
from workers.trainer.engine import ShardedTrainer
from workers.trainer.job import TrainingJob, TrainingSuperseded
from workers.trainer.standing_checkpoints import damaged_files, newest_attempt

# between the tries of a write; the ranks that wait for it are silent so long
PATIENCE_S = (
    10.0,
    20.0,
    30.0,
    60.0,
    60.0,
)


def begin_attempt(store: Store, folder: str) -> int:
    """Registers the next attempt, removes what older ones left unfinished. One rank calls it, first of all."""
    store.remove_abandoned(folder)
    attempt = newest_attempt(store, folder) + 1
    who = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid()}
    store.put_json(f"{folder}/attempts/{attempt:04d}.json", who)
    finished = {ref.folder for ref in list_checkpoints(store, folder)}
    emptied = set()
    for entry in store.list(f"{folder}/"):
        parent, name = entry.path.rsplit("/", 1)
        if re.fullmatch(r"\d{12}", parent.rsplit("/", 1)[-1]) and parent not in finished and name != DONE_FILE:
            store.delete(entry.path)
            emptied.add(parent)
    for ref in list_checkpoints(store, folder) if emptied else []:
        if ref.folder in emptied:  # an older attempt finished it since we looked
            store.delete(f"{ref.folder}/{DONE_FILE}")
    return attempt


def save_checkpoint(
    store: Store,
    job: TrainingJob,
    trainer: ShardedTrainer,
    *,
    attempt: int,
    step: int,
    rows: list[dict[str, Any]],
    warn: Callable[[str], None],
) -> str:
    """Writes a checkpoint from all ranks, DONE.json last; returns its folder. `rows` (of rank 0): since the last one.

    A store that is away, or full, has a few minutes to come back, and `warn` is told. Raises TrainingSuperseded, on all
    ranks, where a newer attempt is registered.
    """
    folder = checkpoint_folder(job.folder, job.samples_at(step))
    name = rank_file(trainer.rank, trainer.world).replace(".safetensors", f".attempt-{attempt:04d}.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / name
        save_file({piece.name: piece.values for piece in trainer.pieces(own=True)}, local)
        record = record_file(local)
        _patiently(lambda: store.put_file(f"{folder}/{name}", local), warn)
    written: list[tuple[str, FileRecord]] = [None] * trainer.world  # type: ignore[list-item]
    dist.all_gather_object(written, (name, record))  # every file stands from here on

    outcome: list[str | None] = [None]
    if trainer.rank == 0:
        newest = newest_attempt(store, job.folder)
        if newest <= attempt:
            _patiently(lambda: _commit(store, job, trainer, folder, attempt, step, rows, dict(written)), warn)
            newest = newest_attempt(store, job.folder)
            if newest > attempt:  # it began meanwhile: it goes on from this checkpoint, or has removed its files
                _take_back_unless_whole(store, folder, attempt)
        if newest > attempt:
            outcome[0] = (
                f"{job.phase}: attempt {newest} of run {job.run} has begun elsewhere;"
                f" attempt {attempt} stops at {folder}"
            )
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise TrainingSuperseded(outcome[0])
    return folder


def _patiently(write: Callable[[], None], warn: Callable[[str], None]) -> None:
    """A rank that failed would have all steps since the last checkpoint computed again."""
    for seconds in PATIENCE_S:
        try:
            return write()
        except StoreError as error:
            if not is_transient(error):
                raise
            warn(f"{error}; the checkpoint waits, and is tried again in {seconds:g} s")
            time.sleep(seconds)
    return write()


def _commit(
    store: Store,
    job: TrainingJob,
    trainer: ShardedTrainer,
    folder: str,
    attempt: int,
    step: int,
    rows: list[dict[str, Any]],
    files: dict[str, FileRecord],
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / METRICS_FILE
        local.write_text("".join(json.dumps(row) + "\n" for row in rows))
        store.put_file(f"{folder}/{METRICS_FILE}", local)
        files[METRICS_FILE] = record_file(local)
        made_by = provenance(device_kind(trainer.device.type), trainer.world)
        local = Path(scratch) / provenance_file(attempt)
        local.write_bytes(provenance_bytes(made_by))
        store.put_file(f"{folder}/{local.name}", local)
        files[local.name] = record_file(local)
    done = CheckpointDone(
        samples=job.samples_at(step),
        steps=step,
        attempt=attempt,
        optimizer_step=trainer.optimizer_step,
        config=job.model,
        training=job.training.model_dump(mode="json"),
        parameters=trainer.shapes,
        files=files,
        specs={"train": job.spec, "latents": job.latents.digest, "text": job.text_features.digest},
        null=job.text.null,
        recipe=job.recipe,
    )
    write_done(store, folder, done)


def _take_back_unless_whole(store: Store, folder: str, attempt: int) -> None:
    try:
        done = read_checkpoint_done(store, folder)
    except CheckpointError:  # the newer attempt took it back
        return
    if done.attempt == attempt and damaged_files(store, folder, done):
        store.delete(f"{folder}/{DONE_FILE}")


def load_checkpoint(
    store: Store, folder: str, trainer: ShardedTrainer, tell: Callable[[str], None] = lambda word: None
) -> CheckpointDone:
    """Fills the ranks' states from a checkpoint of any world size and ZeRO stage, bit by bit. All ranks call it.

    Raises DamagedFile on all of them where one of them has found what it reads damaged. `tell` hears of every file.
    """
    done, damage = None, None
    try:
        done = _read_state(store, folder, trainer, tell)
    except DamagedFile as error:
        damage = str(error)
    damages: list[str | None] = [None] * trainer.world
    dist.all_gather_object(damages, damage)
    for damage in filter(None, damages):
        raise DamagedFile(damage)
    trainer.loaded(done.optimizer_step)
    return done


def _read_state(store: Store, folder: str, trainer: ShardedTrainer, tell: Callable[[str], None]) -> CheckpointDone:
    """Reads the file of the same place first and stops when nothing is missing: at the same world size that is one file."""
    done = read_checkpoint_done(store, folder)
    _check_same_shapes(store.uri(folder), done.parameters, trainer.shapes)
    wanted: dict[tuple[TensorKind, str], list[Piece]] = defaultdict(list)
    missing = 0
    for own in trainer.pieces():
        wanted[own.kind, own.parameter].append(own)
        missing += len(own.values)

    def overlaps(kind: TensorKind, name: str, start: int, stop: int) -> bool:
        return any(start < own.stop and own.start < stop for own in wanted.get((kind, name), ()))

    files, place = done.rank_files, trainer.rank / trainer.world
    for _, name in sorted((abs(number / len(files) - place), name) for number, name in enumerate(files)):
        if not missing:
            break
        tell(f"reading {folder}/{name}")
        for piece in read_pieces(store, folder, done, overlaps, files=[name]):
            for own in wanted[piece.kind, piece.parameter]:
                low, high = max(own.start, piece.start), min(own.stop, piece.stop)
                if low < high:
                    own.values[low - own.start : high - own.start].copy_(
                        piece.values[low - piece.start : high - piece.start]
                    )
                    missing -= high - low
    if missing:
        where = store.uri(folder)
        raise CheckpointError(f"{where}: {missing} elements are in none of its files; take another checkpoint")
    return done


@torch.no_grad()
def load_start_weights(weights: dict[str, Tensor], trainer: ShardedTrainer) -> None:
    """A fresh start from whole fp32 tensors: exact masters, the EMA equal to them, zero moments."""
    for piece in trainer.pieces():
        if piece.kind in ("weights", "ema"):
            piece.values.copy_(weights[piece.parameter].reshape(-1)[piece.start : piece.stop])
        else:
            piece.values.zero_()
    trainer.loaded(0)


def _check_same_shapes(where: str, stored: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            here, there = stored.get(name, "absent"), wanted.get(name, "absent")
            raise CheckpointError(f"{where}: {name} is {here} in the checkpoint and {there} in the model")
