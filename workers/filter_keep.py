"""Makes keep-lists: which rows of a shard stay, and why the others go.

Near-duplicates are looked for over all shards before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shards import FailedRow, write_table
from sd3core.data.store import open_store
from sd3core.filters.duplicate_lists import Duplicate, DuplicatePart, write_duplicates
from sd3core.filters.near_duplicates import DuplicateSearch, FeatureRows, find_duplicates
from sd3core.filters.row_rules import DUPLICATE, LEAKED, SCORE_COLUMN, judge_rows
from sd3core.progress import Progress
from sd3core.recipe_filter import Filter
from workers.filter_measures import features_of
from workers.inputs import InputShard, input_shards, read_input_index, read_input_table
from workers.shard_stage import MadeShard, ShardTask


@dataclass(frozen=True)
class DuplicatesTask:
    """The search over all shards: one task. `record`: the path of what it writes last."""

    raw: ManifestRef
    measures: ManifestRef
    record: str

    @property
    def place(self) -> str:
        return self.record


class DuplicatesWorker:
    """DuplicatesTask -> the number of rows that go. Only rows that no rule leaves out are compared: what is first is kept."""

    def __init__(self, store_url: str, rules: Filter, seed: int) -> None:
        self.store, self.rules, self.seed = open_store(store_url), rules, seed
        self.progress: Progress | None = None

    def __call__(self, task: DuplicatesTask) -> int:
        raw = input_shards(read_manifest(self.store, task.raw.folder, task.raw.digest))
        measures = input_shards(read_manifest(self.store, task.measures.folder, task.measures.digest))
        shards = [(number, shard.rows) for number, shard in measures.items()]
        rows, duplicates = sum(count for _, count in shards), self.rules.duplicates
        search = DuplicateSearch(
            threshold=duplicates.alike_from,
            mirrored=duplicates.mirrored and duplicates.model is None,
            rows_per_cluster=duplicates.rows_per_cluster,
            most_clusters=duplicates.most_clusters,
            seed=self.seed,
        )

        def tell(done: int, doing: str) -> None:
            self.progress = Progress(done, 2 * rows, "images", f"near-duplicates: {doing}")

        def read(number: int) -> FeatureRows:
            return self._rows(number, raw[number], measures[number])

        found = find_duplicates(read, shards, search, tell)
        write_duplicates(self.store, task.record, [*raw], found)
        return len(found)

    def _rows(self, number: int, raw: InputShard, measures: InputShard) -> FeatureRows:
        table = read_input_table(self.store, measures)
        index = read_input_index(self.store, raw)
        reasons = dict(zip(index["key"].to_pylist(), judge_rows(self.rules, index, table).to_pylist(), strict=True))
        table = table.filter(pa.array([reasons[key] is None for key in table["key"].to_pylist()], pa.bool_()))
        keys = table["key"].combine_chunks()
        return FeatureRows(number, keys, table["held_out"].to_numpy(), features_of(table))


@dataclass(frozen=True)
class KeepSource:
    raw: InputShard
    measures: InputShard | None
    duplicates: DuplicatePart | None


class KeepWorker:
    """Raw shard, its measures and its near-duplicates -> keep parquet: the keys that stay; beside it why the others go."""

    def __init__(self, store_url: str, rules: Filter) -> None:
        self.store, self.rules = open_store(store_url), rules
        self.part: tuple[DuplicatePart, pa.Table] | None = (
            None  # the last one: it is of many shards that follow each other
        )
        self.progress = 0  # rows

    def _alike(self, part: DuplicatePart, number: int) -> dict[str, Duplicate]:
        """What goes of a shard, by key."""
        if self.part is None or self.part[0] != part:
            self.part = (part, part.read(self.store))
        own = self.part[1].filter(pc.equal(self.part[1]["shard"], number))
        return {row["key"]: Duplicate(**row) for row in own.to_pylist()}

    def __call__(self, task: ShardTask) -> MadeShard:
        source, self.progress = task.source, 0
        index = read_input_index(self.store, source.raw)
        measures = read_input_table(self.store, source.measures) if source.measures else None
        reasons = judge_rows(self.rules, index, measures).to_pylist()
        alike = self._alike(source.duplicates, task.number) if source.duplicates else {}
        keys = index["key"].to_pylist()
        why = {key: reason or _why(alike.get(key)) for key, reason in zip(keys, reasons, strict=True)}
        stay = pa.table({"key": pa.array([key for key in keys if why[key] is None], pa.string())})
        failed = [FailedRow(key=key, reason=reason) for key, reason in why.items() if reason is not None]
        told = _told(why, alike, measures)
        record = write_table(self.store, task.folder, task.stem, stay, failed, told)
        self.progress = len(keys)
        return MadeShard(record)


def _why(duplicate: Duplicate | None) -> str | None:
    if duplicate is None:
        return None
    return LEAKED if duplicate.leaked else DUPLICATE


def _told(why: Mapping[str, str | None], alike: Mapping[str, Duplicate], measures: pa.Table | None) -> pa.Table:
    """A row for every key of the shard: the reason, null where it stays, for which other it goes, and its scores."""
    keys = [*why]
    told = {
        "key": pa.array(keys, pa.string()),
        "reason": pa.array(why.values(), pa.string()),
        "duplicate_of": pa.array([alike[key].of if key in alike else None for key in keys], pa.string()),
        "duplicate_of_shard": pa.array([alike[key].of_shard if key in alike else None for key in keys], pa.int64()),
    }
    scores = [name for name in measures.column_names if name.startswith(SCORE_COLUMN)] if measures is not None else []
    for name in scores:
        values = dict(zip(measures["key"].to_pylist(), measures[name].to_pylist(), strict=True))
        told[name] = pa.array([values.get(key) for key in keys], pa.float32())
    return pa.table(told)
