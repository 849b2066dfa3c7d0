"""Has images captioned: in dense batches by a model here, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from PIL.Image import Image

from sd3core.captions.said import Said, caption_seed
from sd3core.errors import DataError
from workers.at_once import ShardTurn
from workers.inputs import batched, map_ahead
from workers.pool import of_the_process

Picture = tuple[str, Image]  # with its key
Written = tuple[Picture, Said | Exception]
WINDOW_BATCHES = 8  # that are sorted together


class Captioner(Protocol):
    """A model in this process. `prepare` may be called on any thread."""

    def prepare(self, images: Sequence[Image]) -> Any: ...

    def write(self, prepared: Any, seeds: Sequence[int]) -> list[Said]: ...


class BatchWriter:
    """A batch is prepared while the one before it is written; several shards take turns at the model.

    `window`: images that are sorted by size before they are dealt to batches, so that little of a batch is padding.
    """

    def __init__(self, captioner: Captioner, batch: int, window: int, seed: int) -> None:
        self.captioner, self.batch, self.window, self.seed = captioner, batch, window, seed

    @property
    def ahead(self) -> int:
        """Images that are decoded before they are asked for."""
        return self.window + self.batch

    def __call__(self, pictures: Iterable[Picture], turn: ShardTurn) -> Iterator[Written]:
        batches = dense_batches(pictures, self.batch, self.window)
        for batch, prepared in map_ahead(self._prepared, batches, threads=1, ahead=1):
            yield from zip(batch, self._written(batch, prepared, turn), strict=True)

    def _prepared(self, batch: Sequence[Picture]) -> tuple[Sequence[Picture], Any]:
        try:
            return batch, self.captioner.prepare([image for _, image in batch])
        except Exception as error:
            return batch, error

    def _written(self, batch: Sequence[Picture], prepared: Any, turn: ShardTurn) -> list[Said | Exception]:
        """A batch that fails is tried image by image, so that one bad image costs no other its caption."""
        try:
            if isinstance(prepared, Exception):
                raise prepared
            with turn.encoding():
                return list(self.captioner.write(prepared, [caption_seed(self.seed, key) for key, _ in batch]))
        except Exception as error:
            if len(batch) > 1:
                return [said for one in batch for said in self._written(*self._prepared([one]), turn)]
            if of_the_process(error):
                raise
            return [error]


class RequestWriter:
    """Requests go out as a server takes them; what bounds them is the captioner, which all shards of an actor share."""

    def __init__(self, captioner: Callable[[str, Image], Said], in_flight: int) -> None:
        self.captioner, self.in_flight = captioner, in_flight

    @property
    def ahead(self) -> int:
        return self.in_flight

    def __call__(self, pictures: Iterable[Picture], turn: ShardTurn) -> Iterator[Written]:
        return map_ahead(self._asked, pictures, threads=self.in_flight, ahead=2 * self.in_flight)

    def _asked(self, picture: Picture) -> Written:
        try:
            return picture, self.captioner(*picture)
        except DataError as error:
            return picture, error


def dense_batches(pictures: Iterable[Picture], batch: int, window: int) -> Iterator[Sequence[Picture]]:
    """Batches of pictures of like sizes: each window's are sorted, and a window is a multiple of a batch."""
    whole = max(batch, window - window % batch)
    for together in batched(pictures, whole):
        in_order = sorted(together, key=lambda picture: (picture[1].width * picture[1].height, picture[1].width))
        yield from batched(in_order if whole > batch else together, batch)
