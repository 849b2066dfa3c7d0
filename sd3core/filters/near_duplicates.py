"""Finds near-duplicates among any number of rows, and keeps the first of each.

Clusters by k-means, and a cosine threshold inside them: paper appendix E.2, algorithm 1. Rows are walked in order; one that is kept
flags all that are like it, and one that is flagged flags none, so at least one of any group stays. The order is: rows to train on
before held-out ones, each by their keys. So a held-out row that is like one to train on goes, and never the other way round.

Rows are compared with those of their two nearest clusters, so that two which fall on both sides of a border still meet. Memory holds
k-means' points, the rows of one of DUPLICATE_PARTITIONS files on disk (`state_bytes` for each row), and what was found, as columns.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
COLUMNS_AT_ONCE = 16_384
KMEANS_ITERATIONS = 10
READING_AT_ONCE = 16  # shards: of a bucket each takes some 50 ms

TellSearch = Callable[[int, str], None]


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


# A row that goes, and the one that stays for it. `leaked`: it is held out, and the other one is trained on.
DUPLICATES_SCHEMA = pa.schema(
    [("shard", pa.int64()), ("key", pa.string()), ("of", pa.string()), ("of_shard", pa.int64()), ("leaked", pa.bool_())]
)
NAME = ("held_out", "key", "shard")  # of a row: its place in the order
LIKES_SCHEMA = pa.schema(
    [
        (f"{whose}{name}", kind)
        for whose in ("first_", "")
        for name, kind in zip(NAME, (pa.bool_(), pa.string(), pa.int64()), strict=True)
    ]
)
WALKED_AT_ONCE = 1_000_000


def state_bytes(feature_bytes: int, key_bytes: int = 40) -> int:
    """On disk, for a row: twice its feature, place, key and cluster."""
    return NEAREST_CLUSTERS * (feature_bytes + key_bytes + 4 + 8 + 1 + 4)


def find_duplicates(
    read: Callable[[int], FeatureRows],
    shards: Sequence[tuple[int, int]],
    search: DuplicateSearch,
    tell: TellSearch = lambda rows, doing: None,
) -> pa.Table:
    """The rows that go (DUPLICATES_SCHEMA), in no order.

    `read`: a shard's rows by its number; each is read once, some of them once more for k-means. `shards`: their numbers and how
    many rows they have. `tell` hears how many rows are done of 2 x all, written and then compared, and what is being done.
    """
    rows = sum(count for _, count in shards)
    if rows < 2:
        return DUPLICATES_SCHEMA.empty_table()
    clusters = search.clusters(rows)
    centroids = _centroids(read, shards, clusters, search, tell) if clusters > 1 else None
    with ExitStack() as scratch:
        try:
            folder = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="sd3-duplicates-")))
            done = _write_partitions(folder, read, shards, centroids, search, tell)
            likes = [found for path in sorted(folder.iterdir()) for found in _likes(path, search, done, tell)]
        except OSError as error:
            raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None
    return _walk(pa.concat_tables([LIKES_SCHEMA.empty_table(), *likes]))


def _directions(features: np.ndarray, search: DuplicateSearch) -> np.ndarray:
    """(n, D) float32 of length 1, for k-means."""
    return _unit(mirror_blind(features) if search.mirrored else features)


def _unit(features: np.ndarray) -> np.ndarray:
    wide = features.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _centroids(
    read: Callable[[int], FeatureRows],
    shards: Sequence[tuple[int, int]],
    clusters: int,
    search: DuplicateSearch,
    tell: TellSearch,
) -> np.ndarray | None:
    """(clusters, D), of shards spread evenly over all; None where these have no rows."""
    import faiss  # here: who only hashes loads none

    wanted, rows = clusters * POINTS_A_CENTROID, sum(count for _, count in shards)
    number = len(shards) if wanted >= rows else max(1, -(-len(shards) * wanted // rows))
    chosen = [shards[position * len(shards) // number][0] for position in range(number)]
    parts = []
    for place, found in enumerate(_read_ahead(read, chosen)):
        tell(0, f"reading for k-means, shard {place + 1} of {number}")
        if len(found.keys):
            parts.append(_directions(found.features, search))
    if not parts:
        return None
    points = np.concatenate(parts)
    centroids = None
    for iteration in range(KMEANS_ITERATIONS):  # one by one: at a hundred million rows each takes minutes
        tell(0, f"k-means, {iteration + 1} of {KMEANS_ITERATIONS}")
        kmeans = faiss.Kmeans(
            points.shape[1],
            min(clusters, len(points)),
            niter=1,
            seed=search.seed % 2**31,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=POINTS_A_CENTROID,
        )
        kmeans.train(points, init_centroids=centroids)
        centroids = kmeans.centroids
    return centroids


def _read_ahead(read: Callable[[int], FeatureRows], shards: Sequence[int]) -> Iterator[FeatureRows]:
    """In order, the next ones on threads while the caller uses earlier ones."""
    with ThreadPoolExecutor(READING_AT_ONCE, thread_name_prefix="measures") as threads:
        waiting: deque[Future[FeatureRows]] = deque()
        for shard in shards:
            waiting.append(threads.submit(read, shard))
            if len(waiting) > READING_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write_partitions(
    folder: Path,
    read: Callable[[int], FeatureRows],
    shards: Sequence[tuple[int, int]],
    centroids: np.ndarray | None,
    search: DuplicateSearch,
    tell: TellSearch,
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

        for found in _read_ahead(read, [shard for shard, _ in shards]):
            waiting += _cluster_tables(found, index, search)
            written, buffered = written + len(found.keys), buffered + len(found.keys)
            tell(written, "sorted into clusters")
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


def _likes(path: Path, search: DuplicateSearch, done: int, tell: TellSearch) -> Iterator[pa.Table]:
    """Of one partition, cluster by cluster: rows that are kept there, each beside a later one that is like it (LIKES_SCHEMA)."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ("cluster", "held_out", "key", "shard")])
    table = table.take(order).combine_chunks()
    clusters = table["cluster"].to_numpy()
    starts = np.flatnonzero(np.r_[True, clusters[1:] != clusters[:-1]])
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(clusters)], strict=True):
        yield from _likes_of_cluster(table.slice(start, stop - start), search)
        share = (int(path.stem) + stop / len(clusters)) / DUPLICATE_PARTITIONS
        tell(done + int(done * share), "compared within clusters")


def _likes_of_cluster(rows: pa.Table, search: DuplicateSearch) -> Iterator[pa.Table]:
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
        found = {row: np.concatenate(others) for row, others in hits.items()}
        firsts = np.repeat(np.fromiter(found, dtype=np.int64), [len(others) for others in found.values()])
        if len(firsts):
            yield _beside(rows, firsts, np.concatenate([*found.values()]))


class _Alike:
    """Which features are alike, by the cosine of the pictures or of one and the other's mirror image."""

    def __init__(self, features: np.ndarray, search: DuplicateSearch) -> None:
        self.threshold = search.threshold
        self.sides = [_unit(features), *([_unit(features * MIRROR_SIGNS)] if search.mirrored else [])]

    def compare(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """(rows, stop - start) bool."""
        return np.any([self.sides[0][rows] @ side[start:stop].T >= self.threshold for side in self.sides], axis=0)


def _beside(rows: pa.Table, firsts: np.ndarray, others: np.ndarray) -> pa.Table:
    names = rows.select(list(NAME))
    left, right = names.take(pa.array(firsts)), names.take(pa.array(others))
    return pa.Table.from_arrays([*left.columns, *right.columns], schema=LIKES_SCHEMA)


def _walk(likes: pa.Table) -> pa.Table:
    """The walk over all clusters: a row that another cluster flags flags none."""
    order = pc.sort_indices(likes, sort_keys=[(name, "ascending") for name in LIKES_SCHEMA.names])
    likes = likes.take(order)
    named = pa.chunked_array([*likes["first_key"].chunks, *likes["key"].chunks], pa.string()).combine_chunks()
    codes = named.dictionary_encode()
    number = codes.indices.to_numpy()  # of each first, then of each other
    gone, goes = bytearray(len(codes.dictionary)), bytearray(len(likes))
    for start in range(0, len(likes), WALKED_AT_ONCE):
        stop = min(start + WALKED_AT_ONCE, len(likes))
        firsts, others = (number[base + start : base + stop].tolist() for base in (0, len(likes)))
        for place, (first, other) in enumerate(zip(firsts, others, strict=True), start):
            if not gone[first] and not gone[other]:
                gone[other] = goes[place] = 1
    kept = likes.filter(pa.array(np.frombuffer(goes, dtype=np.uint8).astype(bool)))
    leaked = pc.and_(kept["held_out"], pc.invert(kept["first_held_out"]))
    columns = [kept["shard"], kept["key"], kept["first_key"], kept["first_shard"], leaked]
    return pa.Table.from_arrays(columns, schema=DUPLICATES_SCHEMA)
