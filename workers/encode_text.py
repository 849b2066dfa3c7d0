"""Encodes each distinct caption of one shard through CLIP-L, CLIP-G and T5."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from sd3core.captions.repeated import caption_hash
from sd3core.data.earlier_rows import EarlierRow, EarlierRows
from sd3core.data.encoded_shards import (
    FEATURES,
    NULL_FILE,
    ORIGINAL,
    SYNTHETIC,
    TEXT_SCHEMA,
    WITHOUT_CAPTION,
    caption_id,
)
from sd3core.data.ingest import captions_column
from sd3core.data.manifest import ManifestRef
from sd3core.data.settled_precision import SettledPrecision
from sd3core.data.shards import TAR_BLOCK, FailedRow, Sample, read_shard_done, write_shard
from sd3core.data.store import Store
from sd3core.progress import ProgressCallback, ignore_progress
from sd3core.recipe import ENCODERS, Text, TextDtype
from sd3core.specs import DONE
from sd3core.towers.artifact import fetch_towers
from workers.at_once import ShardsAtOnce, ShardTurn, WorkerAtOnce
from workers.caches import towers_cache
from workers.inputs import InputShard, batched, read_input_index, read_input_table
from workers.shard_stage import MadeShard, ShardTask

if TYPE_CHECKING:
    from sd3core.data.stored_text import StoredText

ON_TOO_MANY = "captions on too many images"  # how many of a shard's synthetic ones are left out for that
TOO_LONG = "captions too long"  # how many images of a shard have one, original or synthetic
NONE_STOOD: Mapping[str, EarlierRow] = MappingProxyType({})


@dataclass(frozen=True)
class TextSource:
    raw: InputShard
    captions: InputShard | None


class CaptionUse(NamedTuple):
    """An image that has a caption, and as what."""

    key: str
    kind: str
    place: int | None = None  # among its captions of this kind, where it has several


class TextWorker(WorkerAtOnce):
    """Raw shard and its captions -> text tar: each distinct caption once, an index row for each use of it.

    Several threads may call it.
    """

    def __init__(
        self,
        store: Store,
        towers: ManifestRef,
        text: Text,
        dtype: TextDtype,
        batch: int,
        device: str,
        precision: SettledPrecision,
        at_once: ShardsAtOnce,
        report: ProgressCallback = ignore_progress,  # of fetching the encoders
        repeated: AbstractSet[int] = frozenset(),
    ) -> None:
        """`repeated`: hashes of synthetic captions that are left out, for they stand on too many images."""
        # here, so that a latents worker does not load transformers, nor the process that hands out shards torch
        from sd3core.precision import PRECISION_DTYPES
        from sd3core.towers.text_encoders import load_text_encoders

        self.store, self.text, self.dtype, self.batch, self.at_once = store, text, dtype, batch, at_once
        self.repeated = repeated
        local = fetch_towers(store, towers.folder, towers_cache(), ENCODERS, towers.digest, report)
        self.encoders = load_text_encoders(local, text, PRECISION_DTYPES[precision], device)

    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard:
        null = f"{task.folder}/{NULL_FILE}"
        if not self.store.exists(null):
            # one file, which stands for "no prompt" in a part of all steps: its sequences are not rounded to 8 bits
            dtype = "float16" if self.dtype == "int8" else self.dtype
            self.store.put(null, self._encode([""], dtype, turn)[0].to_bytes(self.text.padding))
            if self.store.exists(f"{task.folder}/{task.stem}{DONE}"):  # the shard stands: this alone was missing
                return MadeShard(read_shard_done(self.store, task.folder, task.stem))
        failed: list[FailedRow] = []
        counts: Counter[str] = Counter()
        uses = _distinct(self._captions(task.source, counts))
        with EarlierRows(self.store, task.folder, task.earlier) as earlier:
            stood = earlier.find({caption_id(caption) for caption in uses}, lambda row: row["caption_id"])
            samples = self._samples(uses, task.rows, failed, counts, turn, stood)
            samples = count_without_caption(samples, task.rows, counts)
            record = write_shard(self.store, task.folder, task.stem, samples, failed, TEXT_SCHEMA, counts=counts)
        return MadeShard(record, len(stood), len(uses) - len(stood), tuple(earlier.told))

    def _captions(self, source: TextSource, counts: Counter[str]) -> Iterator[tuple[CaptionUse, str]]:
        """Every caption that is used, and whose it is."""
        raw = read_input_index(self.store, source.raw)
        synthetic = {}
        if source.captions:
            table = read_input_table(self.store, source.captions)
            synthetic = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
        for key, originals in zip(raw["key"].to_pylist(), captions_column(raw), strict=True):
            for place, original in enumerate(originals):
                yield CaptionUse(key, ORIGINAL, place if len(originals) > 1 else None), original
            if not synthetic.get(key):
                continue
            if self.repeated and caption_hash(synthetic[key]) in self.repeated:
                counts[ON_TOO_MANY] += 1
            else:
                yield CaptionUse(key, SYNTHETIC), synthetic[key]

    def _samples(
        self,
        uses: dict[str, list[CaptionUse]],
        rows: int,
        failed: list[FailedRow],
        counts: Counter[str],
        turn: ShardTurn,
        stood: Mapping[str, EarlierRow] = NONE_STOOD,
    ) -> Iterator[Sample]:
        """`stood`: captions, by their ids, whose features are taken over."""
        offset = encoded = 0
        cut: set[str] = set()  # images with a caption that no encoder reads to its end
        for captions in batched(uses, self.batch):
            for caption, encoded_as in self._features(captions, stood, turn):
                if encoded_as is None:
                    failed += [
                        FailedRow(
                            key=use.key, reason=f"{use.kind} caption: its features are not finite in {self.dtype}"
                        )
                        for use in uses[caption]
                    ]
                    continue
                data, real = encoded_as
                length = TAR_BLOCK * (1 + math.ceil(len(data) / TAR_BLOCK))  # one tar header and the padded bytes
                name = caption_id(caption)
                if real == [self.encoders.tokens[name] for name in ENCODERS] and self.encoders.too_long([caption]):
                    cut.update(use.key for use in uses[caption])
                    counts[TOO_LONG] = len(cut)
                stored = {f"{name}_len": count for name, count in zip(ENCODERS, real, strict=True)}
                stored |= {"offset": offset, "length": length, "sha256": hashlib.sha256(data).digest()}
                for position, use in enumerate(uses[caption]):
                    row = {**use._asdict(), "caption_id": name, **stored}
                    yield Sample(name, {FEATURES: data} if position == 0 else {}, row)
                offset += length
            encoded += len(captions)
            # rows, by the share of the shard's captions that is done
            turn.reach(rows * encoded // len(uses))

    def _features(
        self, captions: Sequence[str], stood: Mapping[str, EarlierRow], turn: ShardTurn
    ) -> Iterator[tuple[str, tuple[bytes, list[int]] | None]]:
        """(caption, its features' bytes and the encoders' token counts), in order; None where they are not finite."""
        new = [caption for caption in captions if caption_id(caption) not in stood]
        made = dict(zip(new, self._encode(new, self.dtype, turn), strict=True)) if new else {}
        for caption in captions:
            if (features := made.get(caption)) is None:
                row = stood[caption_id(caption)]
                yield caption, (row.files()[FEATURES], [row.row[f"{name}_len"] for name in ENCODERS])
            elif features.is_finite:
                yield caption, (features.to_bytes(self.text.padding), features.tensors["lengths"][0].tolist())
            else:
                yield caption, None

    def _encode(self, captions: list[str], dtype: TextDtype, turn: ShardTurn) -> list[StoredText]:
        from sd3core.data.stored_text import StoredText

        with turn.encoding():
            features = self.encoders.encode(captions).to("cpu")
        stored = StoredText.of(features, dtype)
        return [stored.index([i]) for i in range(len(captions))]


def count_without_caption(samples: Iterable[Sample], rows: int, counts: Counter[str]) -> Iterator[Sample]:
    """The samples as they are; at their end `counts` has how many of the raw shard's rows none of them is for."""
    captioned = set()
    for sample in samples:
        captioned.add(sample.row["key"])
        yield sample
    if rows > len(captioned):
        counts[WITHOUT_CAPTION] = rows - len(captioned)


def _distinct(captions: Iterable[tuple[CaptionUse, str]]) -> dict[str, list[CaptionUse]]:
    """caption -> its uses, in order of the first."""
    uses: dict[str, list[CaptionUse]] = {}
    for use, caption in captions:
        uses.setdefault(caption, []).append(use)
    return uses
