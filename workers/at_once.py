"""Lets an actor be at several shards at once: read, encoded and written.

The oldest goes first, to the encoder and to memory. So shards end one after the other, and do not all wait for their last batch
together. Each is still one task with one record, written last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.shard_stage import MadeShard, ShardTask

SHARDS_AT_ONCE = 3  # of one actor: read and decoded, encoded, written


@dataclass(eq=False)
class ShardTurn:
    """One of the shards that an actor is at."""

    place: str
    among: ShardsAtOnce
    held: int = 0  # bytes
    wants_encoder: bool = False

    def hold(self, size: int) -> None:
        """Counts memory that is about to be taken, or just was. Waits while others hold too much, but for the oldest shard."""
        shards, changed = self.among, self.among.changed
        with changed:
            changed.wait_for(lambda: shards.turns[0] is self or shards.held + size <= shards.most_bytes)
            self.held += size

    def let_go(self, size: int) -> None:
        with self.among.changed:
            self.held -= size
            self.among.changed.notify_all()

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """The encoder for one batch: one shard has it at a time, the oldest of those that wait for it first."""
        shards, changed = self.among, self.among.changed
        with changed:
            self.wants_encoder = True
            changed.wait_for(lambda: not shards.encoder_at_work and shards.next_to_encode() is self)
            self.wants_encoder, shards.encoder_at_work = False, True
        try:
            yield
        finally:
            with changed:
                shards.encoder_at_work = False
                changed.notify_all()

    def advance(self, rows: int) -> None:
        """So many rows more are done."""
        self.among.rows_done[self.place] += rows

    def reach(self, rows: int) -> None:
        """So many rows are done."""
        self.among.rows_done[self.place] = rows


class ShardsAtOnce:
    """`most_bytes`: what the shards hold together of files and decoded images; the oldest alone may hold more."""

    def __init__(self, most_bytes: float) -> None:
        self.most_bytes = most_bytes
        self.changed = Condition()
        self.turns: list[ShardTurn] = []  # oldest first
        self.encoder_at_work = False
        self.rows_done: dict[str, int] = {}  # by place

    @contextmanager
    def shard(self, place: str) -> Iterator[ShardTurn]:
        """`place`: names the shard, also in what `progress` shows."""
        turn = ShardTurn(place, self)
        with self.changed:
            self.turns.append(turn)
            self.rows_done[place] = 0
        try:
            yield turn
        finally:
            with self.changed:
                self.turns.remove(turn)
                self.rows_done.pop(place, None)
                self.changed.notify_all()

    @property
    def held(self) -> int:
        return sum(turn.held for turn in self.turns)

    @property
    def progress(self) -> dict[str, int]:
        """Rows done of each shard at hand; another thread asks."""
        with self.changed:
            return dict(self.rows_done)

    def next_to_encode(self) -> ShardTurn | None:
        return next((turn for turn in self.turns if turn.wants_encoder), None)


class WorkerAtOnce(ABC):
    """A worker that several threads call, each with a shard of its own."""

    at_once: ShardsAtOnce

    def __call__(self, task: ShardTask) -> MadeShard:
        with self.at_once.shard(task.place) as turn:
            return self._made(task, turn)

    @abstractmethod
    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard: ...

    @property
    def progress(self) -> dict[str, int]:
        """Rows done of each shard at hand."""
        return self.at_once.progress
