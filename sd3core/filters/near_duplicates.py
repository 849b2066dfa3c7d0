"""Finds near-duplicates among any number of rows: clusters by k-means, a threshold inside them, the first is kept.

Paper appendix E.2, algorithm 1: rows are walked in order; one that is kept flags all that are like it, and one that is flagged flags
none, so at least one of any group stays. The order is: rows to train on before held-out ones, each by their keys. So a held-out row
that is like one to train on goes, and never the other way round.

Rows are compared with those of their two nearest clusters, so that two which fall on both sides of a border still meet. Memory holds
the centroids, the rows of one of DUPLICATE_PARTITIONS files on disk, and what was found: by `state_bytes` for the rows, whatever their number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd3core.errors import StoreError
from sd3core.filters.picture_hash import MIRROR_SIGNS, mirror_blind

DUPLICATE_PARTITIONS = 256
NEAREST_CLUSTERS = 2  # clusters that a row is compared in
POINTS_A_CENTROID = 256  # that k-means sees at most
BUFFERED_ROWS = 65_536  # before they are written to their partitions
BLOCK_ROWS = 1_024  # are compared with COLUMNS_AT_ONCE others at once
COLUMNS_AT_ONCE = 65_536
KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class FeatureRows:
    """Rows of one shard: keys (n,), whether each is held out (n,), features (n, D) int8 or float16."""

    shard: int
    keys: pa.Array
    held_out: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class DuplicateSearch:
    """`mirrored`: features are of sd3core.filters.picture_hash, and a picture is like its mirror image."""

    threshold: float
    mirrored: bool
    rows_per_cluster: int
    most_clusters: int
    seed: int

    def clusters(self, rows: int) -> int:
        return min(max(rows // self.rows_per_cluster, 1), self.most_clusters)


@dataclass(frozen=True)
class Duplicate:
    """A row that goes, and the one that stays for it."""

    shard: int
    key: str
    of: str
    of_shard: int
    leaked: bool  # it is held out, and the other one is trained on


def state_bytes(feature_bytes: int, key_bytes: int = 40) -> int:
    """On disk, for a row: twice its feature, place, key and cluster."""
    return NEAREST_CLUSTERS * (feature_bytes + key_bytes + 4 + 8 + 1 + 4)


def find_duplicates(
    read: Callable[[int], FeatureRows],
    shards: Sequence[tuple[int, int]],
    search: DuplicateSearch,
    tell: Callable[[int], None] = lambda rows: None,
) -> Iterator[Duplicate]:
    """`read`: a shard's rows by its number; each is read once, some of them once more for k-means. `shards`: their numbers and how
    many rows they have. `tell` hears how many rows are done of 2 x all: written, then compared.
    """
    rows = sum(count for _, count in shards)
    if rows < 2:
        return
    clusters = search.clusters(rows)
    centroids = _centroids(read, shards, clusters, search) if clusters > 1 else None
    with ExitStack() as scratch:
        try:
            folder = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="sd3-duplicates-")))
            done = _write_partitions(folder, read, shards, centroids, search, tell)
            edges = [edge for path in sorted(folder.iterdir()) for edge in _likes(path, search, done, tell)]
        except OSError as error:
            raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None
    yield from _walk(edges)


def _directions(features: np.ndarray, search: DuplicateSearch) -> np.ndarray:
    """(n, D) float32 of length 1, for k-means."""
    return _unit(mirror_blind(features) if search.mirrored else features)


def _unit(features: np.ndarray) -> np.ndarray:
    wide = features.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _centroids(
    read: Callable[[int], FeatureRows], shards: Sequence[tuple[int, int]], clusters: int, search: DuplicateSearch
) -> np.ndarray:
    """(clusters, D), of shards spread evenly over all."""
    import faiss  # here: who only hashes loads none

    wanted, rows = clusters * POINTS_A_CENTROID, sum(count for _, count in shards)
    number = len(shards) if wanted >= rows else max(1, -(-len(shards) * wanted // rows))
    chosen = [shards[position * len(shards) // number][0] for position in range(number)]
    points = np.concatenate([_directions(read(shard).features, search) for shard in chosen])
    kmeans = faiss.Kmeans(
        points.shape[1],
        min(clusters, len(points)),
        niter=KMEANS_ITERATIONS,
        seed=search.seed % 2**31,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_A_CENTROID,
    )
    kmeans.train(points)
    return kmeans.centroids


def _write_partitions(
    folder: Path,
    read: Callable[[int], FeatureRows],
    shards: Sequence[tuple[int, int]],
    centroids: np.ndarray | None,
    search: DuplicateSearch,
    tell: Callable[[int], None],
) -> int:
    """Writes every row to the partitions of its nearest clusters; the number of rows."""
    index = None
    if centroids is not None:
        import faiss

        index = faiss.IndexFlatIP(centroids.shape[1])
        index.add(centroids)
    written, waiting, buffered = 0, [], 0
    with ExitStack() as files:
        writers: dict[int, pa.RecordBatchWriter] = {}

        def flush() -> None:
            table = pa.concat_tables(waiting)
            partition = table["cluster"].to_numpy() % DUPLICATE_PARTITIONS
            for number in np.unique(partition).tolist():
                part = table.filter(pa.array(partition == number)).combine_chunks()
                if number not in writers:
                    sink = files.enter_context(pa.OSFile(str(folder / f"{number:03d}.arrow"), "wb"))
                    writers[number] = files.enter_context(pa.ipc.new_stream(sink, table.schema))
                writers[number].write_table(part)
            waiting.clear()

        for shard, _ in shards:
            found = read(shard)
            waiting += _cluster_tables(found, index, search)
            written, buffered = written + len(found.keys), buffered + len(found.keys)
            tell(written)
            if buffered >= BUFFERED_ROWS:
                flush()
                buffered = 0
        if waiting:
            flush()
    return written


def _cluster_tables(rows: FeatureRows, index, search: DuplicateSearch) -> Iterator[pa.Table]:
    """The rows with the number of a cluster: of the nearest, then of the next."""
    if not len(rows.keys):
        return
    count = len(rows.keys)
    nearest = np.zeros((count, 1), dtype=np.int64)
    if index is not None:
        _, nearest = index.search(_directions(rows.features, search), min(NEAREST_CLUSTERS, index.ntotal))
    width = rows.features.dtype.itemsize * rows.features.shape[1]
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), count, [None, pa.py_buffer(np.ascontiguousarray(rows.features).tobytes())]
    )
    for cluster in nearest.T:
        yield pa.table(
            {
                "cluster": pa.array(cluster.astype(np.int32)),
                "held_out": pa.array(rows.held_out.astype(bool)),
                "key": rows.keys.cast(pa.string()),
                "shard": pa.array(np.full(count, rows.shard, dtype=np.int64)),
                "feature": packed,
            }
        ).replace_schema_metadata({"dtype": rows.features.dtype.name})


@dataclass(frozen=True)
class _Like:
    """A row that is kept in its cluster, and those after it that are like it. Rows are named (held out, key, shard)."""

    first: tuple[bool, str, int]
    others: list[tuple[bool, str, int]]


def _likes(path: Path, search: DuplicateSearch, done: int, tell: Callable[[int], None]) -> Iterator[_Like]:
    """Of one partition, cluster by cluster."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("cluster", "held_out", "key", "shard")])
    table = table.take(order).combine_chunks()
    clusters = table["cluster"].to_numpy()
    starts = np.flatnonzero(np.r_[True, clusters[1:] != clusters[:-1]])
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(clusters)], strict=True):
        yield from _likes_of_cluster(table.slice(start, stop - start), search)
    tell(done + int(path.stem) * done // DUPLICATE_PARTITIONS)


def _likes_of_cluster(rows: pa.Table, search: DuplicateSearch) -> Iterator[_Like]:
    """The walk of one cluster, its rows in order.

    A block is first walked by itself: only its rows that are kept are compared with all later ones.
    """
    dtype = np.dtype(rows.schema.metadata[b"dtype"].decode())
    features = np.frombuffer(b"".join(rows["feature"].to_pylist()), dtype=dtype).reshape(len(rows), -1)
    alike = _Alike(features, search)
    flagged = np.zeros(len(rows), dtype=bool)
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(rows))
        block = start + np.flatnonzero(~flagged[start:stop])
        inner = np.triu(alike.compare(block, start, stop)[:, block - start], 1)
        hits: dict[int, list[np.ndarray]] = {}
        for place, row in enumerate(block.tolist()):
            if not flagged[row]:
                hits[row] = [block[inner[place]]]
                flagged[hits[row][0]] = True
        kept = np.fromiter(hits, dtype=np.int64)
        for left in range(stop, len(rows), COLUMNS_AT_ONCE):
            later = alike.compare(kept, left, min(left + COLUMNS_AT_ONCE, len(rows)))
            flagged[left : left + COLUMNS_AT_ONCE] |= later.any(axis=0)
            for place in np.flatnonzero(later.any(axis=1)).tolist():
                hits[int(kept[place])].append(left + np.flatnonzero(later[place]))
        for row, found in hits.items():
            if len(others := np.concatenate(found)):
                yield _Like(_names(rows, [row])[0], _names(rows, others))


class _Alike:
    """Which features are alike, by the cosine of the pictures or of one and the other's mirror image."""

    def __init__(self, features: np.ndarray, search: DuplicateSearch) -> None:
        self.threshold = search.threshold
        self.sides = [_unit(features), *([_unit(features * MIRROR_SIGNS)] if search.mirrored else [])]

    def compare(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """(rows, stop - start) bool."""
        return np.any([self.sides[0][rows] @ side[start:stop].T >= self.threshold for side in self.sides], axis=0)


def _names(rows: pa.Table, places: Sequence[int] | np.ndarray) -> list[tuple[bool, str, int]]:
    found = rows.select(["held_out", "key", "shard"]).take(pa.array(places, pa.int64()))
    return list(zip(*(column.to_pylist() for column in found.columns), strict=True))


def _walk(edges: Iterable[_Like]) -> Iterator[Duplicate]:
    """The walk over all clusters: a row that another cluster flags flags none."""
    gone: set[tuple[bool, str, int]] = set()
    for like in sorted(edges, key=lambda like: like.first):
        if like.first in gone:
            continue
        for other in like.others:
            if other not in gone:
                gone.add(other)
                held_out, key, shard = like.first
                yield Duplicate(other[2], other[1], key, shard, leaked=other[0] and not held_out)
