"""Measures the images of one shard: what filters compare, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image

from sd3core.data.earlier_rows import EarlierRows, row_name
from sd3core.data.images import PixelRules, decode_image, naming
from sd3core.data.shards import FailedRow, write_table
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.filters.picture_hash import picture_hash
from sd3core.filters.row_rules import SCORE_COLUMN
from sd3core.recipe_filter import Filter
from sd3core.specs import measured_by
from workers.at_once import SHARDS_AT_ONCE, ShardsAtOnce, ShardTurn, WorkerAtOnce
from workers.inputs import (
    InputShard,
    batched,
    image_digest,
    map_ahead,
    read_input_index,
    shard_images,
    with_image_digest,
)
from workers.shard_stage import MadeShard, ShardTask

if TYPE_CHECKING:
    from sd3core.filters.scorers import Embedder, Scorer

FEATURE = "feature"  # column: an int8 hash or a float16 embedding, packed
DTYPE = b"feature_dtype"  # of the table's metadata
NOT_FINITE = "a score or its embedding is not finite"
MEASURED_TOGETHER = 32  # images that wait for the models together, each of which has a batch of its own


class MeasureWorker(WorkerAtOnce):
    """Raw shard -> measures parquet, a row an image that can be decoded. Several threads may call it.

    Measures that stand in earlier shards are taken over.
    """

    tasks_at_once = SHARDS_AT_ONCE

    def __init__(
        self,
        store_url: str,
        rules: Filter,
        made_by: dict[str, Any],
        pixels: PixelRules,
        threads: int,
        most_bytes: float,
        device: str,
    ) -> None:
        """`made_by`: the models as they were when the stage began, whose measures' place is named by them."""
        self.store, self.rules, self.pixels, self.threads = open_store(store_url), rules, pixels, threads
        self.at_once = ShardsAtOnce(most_bytes)
        self.scorers: dict[str, Scorer] = {}
        self.embedder: Embedder | None = None
        if measured_by(rules) != made_by:
            raise DataError("filter: its models are not those that lay there when the stage began; run it again")
        duplicates = rules.duplicates
        if rules.scores or (duplicates and duplicates.model):
            from sd3core.filters.scorers import load_embedder, load_scorer  # loads transformers, which a hash needs not

            self.scorers = {name: load_scorer(name, score, device) for name, score in rules.scores.items()}
            if duplicates and duplicates.model:
                self.embedder = load_embedder(duplicates.model, duplicates.batch, device)

    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard:
        index = read_input_index(self.store, task.source)
        raw = {row["key"]: row for row in index.select(_named(index)).to_pylist()}
        names = {key: row_name(row) for key, row in raw.items()}
        failed: list[FailedRow] = []
        with EarlierRows(self.store, task.folder, task.earlier) as earlier:
            stood = earlier.find_in_tables(set(names.values()), row_name)
        rows = {key: stood[name] for key, name in names.items() if name in stood}
        turn.advance(len(rows))
        wanted = raw.keys() - rows.keys()
        for batch in batched(self._images(task.source, wanted, failed, turn), MEASURED_TOGETHER):
            self._measure(batch, rows, failed, turn)
        made = [
            rows[key] | {"held_out": raw[key]["split"] == "held_out"} | image_digest(names[key])
            for key in raw
            if key in rows
        ]
        table = pa.Table.from_pylist(made, schema=with_image_digest(self._schema(made), index))
        record = write_table(self.store, task.folder, task.stem, table, failed)
        return MadeShard(record, len(stood), len(rows) - len(stood), tuple(earlier.told))

    def _schema(self, rows: Sequence[dict[str, Any]]) -> pa.Schema:
        columns = [("key", pa.string()), ("held_out", pa.bool_())]
        columns += [(f"{SCORE_COLUMN}{name}", pa.float32()) for name in self.scorers]
        if self.rules.duplicates is None:
            return pa.schema(columns)
        size = len(rows[0][FEATURE]) if rows else 1
        dtype = b"int8" if self.embedder is None else b"float16"
        return pa.schema([*columns, (FEATURE, pa.binary(size))], metadata={DTYPE: dtype})

    def _images(
        self, shard: InputShard, wanted: set[str], failed: list[FailedRow], turn: ShardTurn
    ) -> Iterator[tuple[str, Image, np.ndarray | None]]:
        """Key, decoded image, and its hash where one is wanted; threads decode and hash ahead."""
        hashes = self.rules.duplicates is not None and self.embedder is None

        def decoded(item: tuple[str, bytes]) -> tuple[str, Image, np.ndarray | None] | FailedRow:
            key, data = item
            try:
                with naming(key):
                    image = decode_image(data, self.pixels)
            except DataError as error:
                return FailedRow(key=key, reason=str(error))
            turn.hold(_nbytes(image))
            return key, image, picture_hash(image) if hashes else None

        turn.hold(shard.bytes)
        images = (item for item in shard_images(self.store, shard) if item[0] in wanted)
        for found in map_ahead(decoded, images, self.threads, ahead=2 * MEASURED_TOGETHER):
            if isinstance(found, FailedRow):
                failed.append(found)
                turn.advance(1)
            else:
                yield found
        turn.let_go(shard.bytes)

    def _measure(
        self,
        batch: Sequence[tuple[str, Image, np.ndarray | None]],
        rows: dict[str, dict[str, Any]],
        failed: list[FailedRow],
        turn: ShardTurn,
    ) -> None:
        images = [image for _, image, _ in batch]
        measured: list[dict[str, Any]] = [{"key": key} for key, _, _ in batch]
        features = [found for _, _, found in batch]
        if self.scorers or self.embedder:
            with turn.encoding():
                for name, scorer in self.scorers.items():
                    for row, value in zip(measured, scorer(images), strict=True):
                        row[f"{SCORE_COLUMN}{name}"] = value
                if self.embedder:
                    features = [*self.embedder(images)]
        for row, feature in zip(measured, features, strict=True):
            values = [value for name, value in row.items() if name != "key"]
            if not (np.isfinite(values).all() and (feature is None or np.isfinite(feature).all())):
                failed.append(FailedRow(key=row["key"], reason=NOT_FINITE))
                continue
            rows[row["key"]] = row | ({FEATURE: feature.tobytes()} if feature is not None else {})
        turn.let_go(sum(map(_nbytes, images)))
        turn.advance(len(batch))


def _nbytes(image: Image) -> int:
    return 3 * image.width * image.height


def _named(index: pa.Table) -> list[str]:
    return [name for name in ("key", "split", "image_digest") if name in index.column_names]


def features_of(table: pa.Table) -> np.ndarray:
    """(n, D) of a table of measures."""
    dtype = np.dtype((table.schema.metadata or {})[DTYPE].decode())
    packed = b"".join(table[FEATURE].to_pylist())
    if not packed:
        return np.zeros((0, 1), dtype=dtype)
    return np.frombuffer(packed, dtype=dtype).reshape(len(table), -1)
