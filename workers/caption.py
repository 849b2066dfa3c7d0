"""Captioning: a synthetic caption for every raw image, beside the original ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image, Resampling

from sd3core.captions.api_key import ApiKey, find_api_key, no_api_key
from sd3core.captions.counts import CaptionCounts, count_captions
from sd3core.captions.repeated import (
    HASHES,
    RepeatedCaptions,
    caption_index,
    find_repeated,
    sample_bound,
)
from sd3core.captions.rules import OF_A_BROKEN_MODEL, REPEATED, RULES, apply_rules
from sd3core.captions.said import Said, caption_seed
from sd3core.data.earlier_rows import EarlierRows, row_name
from sd3core.data.images import PixelRules, decode_image, naming
from sd3core.data.kept_rows import KeptRows
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shards import FailedRow, write_table
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError, StopStageError, error_in_one_line
from sd3core.model_identity import model_identity
from sd3core.progress import ProgressCallback
from sd3core.recipe import Caption, Recipe
from sd3core.shown_text import printable, shortened
from sd3core.specs import captions_fields, captions_folder
from sd3core.words import counted
from workers.at_once import SHARDS_AT_ONCE, ShardsAtOnce, ShardTurn, WorkerAtOnce
from workers.caption_writers import WINDOW_BATCHES, BatchWriter, Captioner, Picture, RequestWriter
from workers.inputs import (
    InputShard,
    actor_device,
    decode_threads,
    image_digest,
    input_shards,
    map_ahead,
    read_input_index,
    shard_images,
    with_image_digest,
)
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage
from workers.stage import StageResult

TOO_MANY_FAILED = 8  # images of a shard, and no other: then it is the captioner, not they
TOO_MANY_USELESS = 64  # captions of a shard that are of OF_A_BROKEN_MODEL, and no other
CAPTION_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "caption", "model", "prompt")])
# Of a model: `rule` is the one that threw the caption out, which is "" then; `said` what the model wrote, where that is not the caption.
MODEL_SCHEMA = pa.schema(
    [
        *CAPTION_SCHEMA,
        ("revision", pa.string()),
        ("seed", pa.int64()),
        ("tokens", pa.int32()),
        ("rule", pa.string()),
        ("said", pa.string()),
    ]
)
SAID_CHARS = 4_000  # of what was thrown out


def caption_stage(
    recipe: Recipe, store: Store, raw: ManifestRef, report: ProgressCallback, keep: ManifestRef | None = None
) -> StageResult:
    """Captions parquets, a row a key that is kept. Where the recipe names no captioner there is nothing to make, and the raw
    data stand: originals are used alone then.
    """
    caption = recipe.caption
    if caption.captioner == "none":
        return StageResult("caption", raw.path, raw.digest, skipped=True, reason="the recipe names no captioner")
    folder, fields, kept = captions_folder(recipe), captions_fields(recipe), KeptRows.read(store, keep)
    shards = input_shards(read_manifest(store, raw.folder, raw.digest), kept)
    tasks = [ShardTask(number, shard.content[:12], folder, shard.rows, shard) for number, shard in shards.items()]
    inputs = {"raw": raw.digest} | kept.inputs
    stage = ShardStage("caption", "captions", folder, fields, inputs, tasks, unit="image")
    compute = recipe.compute.for_stage("caption")
    worker = {
        "store_url": store.url,
        "caption": caption,
        "rules": PixelRules.of(recipe.data),
        "threads": decode_threads(compute),
        "most_bytes": compute.decoded_gb * 1e9,
        "device": actor_device(compute),
        "identity": fields["caption"]["model"] if caption.captioner == "vision_language_model" else None,
        "in_flight": max(1, caption.requests_in_flight // compute.actors),
        "key": find_api_key(caption.api_key_env) if caption.api_key_env else None,
        "bound": sample_bound(sum(shard.rows for shard in shards.values())),
    }
    result = run_shard_stage(store, recipe.run, stage, CaptionWorker, worker, compute, report)
    if not caption.by_model:
        return result
    repeated = find_repeated(store, result.manifest, caption.max_share, report)
    return _told_of_rules(store, result, repeated)


def _told_of_rules(store: Store, result: StageResult, repeated: RepeatedCaptions) -> StageResult:
    """How many captions each rule threw out: a reader of the run's end sees what a captioner is worth."""
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    counts = CaptionCounts.of(manifest.buckets)
    said = [
        f"{_share(count / manifest.rows)} of {counted(manifest.rows, 'caption')} thrown out, {count:,}: {RULES[rule]}"
        for rule, count in counts.thrown_out.items()
    ]
    if repeated.captions:
        several = counted(len(repeated.captions), "caption")
        said.append(
            f"{_share(repeated.share)} of the images have one of {several} that stand {RULES[REPEATED]}"
            " (caption.max_share); those are thrown out"
        )
    told = [f"{line}; the original captions are used there" for line in said]
    return dataclasses.replace(result, warnings=[*result.warnings, *told])


def _share(part: float) -> str:
    return f"{100 * part:.2g} %" if part < 0.1 else f"{100 * part:.0f} %"


class CaptionWorker(WorkerAtOnce):
    """Raw shard -> captions parquet. An image that cannot be captioned becomes a failed row with its reason; a caption that breaks
    a rule stays a row, without its words.
    """

    tasks_at_once = SHARDS_AT_ONCE

    def __init__(
        self,
        store_url: str,
        caption: Caption,
        rules: PixelRules,
        threads: int,
        most_bytes: float,
        device: str,
        identity: str | None = None,
        in_flight: int = 1,
        key: ApiKey | None = None,
        bound: int = HASHES,
    ) -> None:
        """`identity`: of a model's files, where the stage began; `bound`: of key hashes in the index."""
        self.store = open_store(store_url)
        self.caption, self.rules, self.threads, self.bound = caption, rules, threads, bound
        self.at_once = ShardsAtOnce(most_bytes)
        self.revision = (identity or "")[:12]
        if caption.captioner == "endpoint":
            self.writer: BatchWriter | RequestWriter = RequestWriter(_reach(caption, in_flight, key), in_flight)
        else:
            window = _window(caption, most_bytes) if caption.by_model else caption.batch
            self.writer = BatchWriter(load_captioner(caption, device, identity), caption.batch, window, caption.seed)

    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard:
        index = read_input_index(self.store, task.source)
        names = {row["key"]: row_name(row) for row in index.to_pylist()}
        rows: dict[str, dict[str, Any]] = {}  # by key
        failed: list[FailedRow] = []
        with EarlierRows(self.store, task.folder, task.earlier) as earlier:
            stood = earlier.find_in_tables(set(names.values()), row_name)
        rows |= {key: stood[name] for key, name in names.items() if name in stood}
        turn.advance(len(rows))
        pictures = self._pictures(task.source, names.keys() - rows.keys(), failed, turn)
        for (key, image), said in self.writer(pictures, turn):
            if isinstance(said, Exception):
                failed.append(FailedRow(key=key, reason=f"captioner: {error_in_one_line(said)[:200]}"))
            elif not (said.text or self.caption.by_model):
                failed.append(FailedRow(key=key, reason="captioner: it wrote nothing"))
            else:
                rows[key] = self._row(key, said)
            turn.let_go(_nbytes(image))
            turn.advance(1)
        self._check_use(rows, failed)
        kept = [rows[key] | image_digest(names[key]) for key in names if key in rows]
        schema = with_image_digest(MODEL_SCHEMA if self.caption.by_model else CAPTION_SCHEMA, index)
        table = pa.Table.from_pylist(kept, schema=schema)
        record = write_table(self.store, task.folder, task.stem, table, failed, *self._beside(kept))
        return MadeShard(record, len(stood), len(rows) - len(stood), tuple(earlier.told))

    def _beside(self, rows: list[dict[str, Any]]) -> tuple[pa.Table | None, dict[str, int] | None]:
        """The index and the counts of a shard of a model's captions."""
        if not self.caption.by_model:
            return None, None
        return caption_index(((row["key"], row["caption"]) for row in rows), self.bound), count_captions(rows)

    def _pictures(
        self, shard: InputShard, wanted: AbstractSet[str], failed: list[FailedRow], turn: ShardTurn
    ) -> Iterator[Picture]:
        """The decoded images of these keys, each for its caption alone; threads decode ahead."""

        def decoded(item: tuple[str, bytes]) -> tuple[str, Image | DataError]:
            key, data = item
            try:
                with naming(key):
                    image = self._seen(decode_image(data, self.rules))
            except DataError as error:
                return key, error
            turn.hold(_nbytes(image))
            return key, image

        if not wanted:  # all captions stand in earlier shards: the images are not fetched
            return
        turn.hold(shard.bytes)
        images = ((key, data) for key, data in shard_images(self.store, shard) if key in wanted)
        for key, image in map_ahead(decoded, images, self.threads, ahead=self.writer.ahead):
            if isinstance(image, DataError):
                failed.append(FailedRow(key=key, reason=str(image)))
                turn.advance(1)
            else:
                yield key, image
        turn.let_go(shard.bytes)

    def _seen(self, image: Image) -> Image:
        """The image as a model sees it."""
        side = self.caption.image_side_px
        if self.caption.by_model and max(image.size) > side:
            image.thumbnail((side, side), Resampling.LANCZOS)
        return image

    def _row(self, key: str, said: Said) -> dict[str, Any]:
        if not self.caption.by_model:
            return {"key": key, "caption": said.text, "model": self.caption.captioner, "prompt": ""}
        judged = apply_rules(said)
        return {
            "key": key,
            "caption": judged.caption,
            "model": self.caption.model,
            "prompt": self.caption.prompt,
            "revision": self.revision or self.caption.revision or said.revision,
            "seed": caption_seed(self.caption.seed, key) if self.caption.temperature else None,
            "tokens": said.tokens,
            "rule": judged.rule,
            "said": shortened(printable(said.text), SAID_CHARS) if judged.rule or judged.shortened else None,
        }

    def _check_use(self, rows: dict[str, dict[str, Any]], failed: list[FailedRow]) -> None:
        """A captioner that is of no use for a whole shard would leave training without captions, and only a warning would say so."""
        if not rows and len(failed) >= TOO_MANY_FAILED:
            raise DataError(f"no image of {len(failed)} got a caption, the last: {failed[-1].reason}")
        useless = self.caption.by_model and all(row["rule"] in OF_A_BROKEN_MODEL for row in rows.values())
        if useless and len(rows) >= TOO_MANY_USELESS:
            first = next(iter(rows.values()))
            raise StopStageError(
                f"none of {counted(len(rows), 'caption')} of a shard is of use, the first, {first['key']}:"
                f" {shortened(first['said'], 80)!r} ({RULES[first['rule']]}); try another caption.precision,"
                " caption.prompt or caption.model"
            )


def _nbytes(image: Image) -> int:
    return 3 * image.width * image.height


def _window(caption: Caption, most_bytes: float) -> int:
    """Images that are sorted together: a quarter of the memory holds them, for as many more are decoded behind them."""
    fit = int(most_bytes / 4 / (3 * caption.image_side_px**2))
    return max(caption.batch, min(WINDOW_BATCHES * caption.batch, fit))


class PixelCaptioner:
    """The drawn world's captioner, which no model is needed for."""

    def prepare(self, images: Sequence[Image]) -> Sequence[Image]:
        return images

    def write(self, images: Sequence[Image], seeds: Sequence[int]) -> list[Said]:
        from sd3core.small_world.captioner import caption_from_pixels

        return [Said(caption_from_pixels(np.asarray(image))) for image in images]


def load_captioner(caption: Caption, device: str, identity: str | None) -> Captioner:
    if caption.captioner == "small_world":
        return PixelCaptioner()
    # loads transformers, which the small world does not need
    from sd3core.captions.vision_language import VisionLanguageCaptioner
    from sd3core.precision import PRECISION_DTYPES

    if identity is not None and model_identity(caption.model, "caption.model") != identity:
        raise DataError(f"caption.model {caption.model}: not the model that lies there where the stage was started")
    dtype = PRECISION_DTYPES[caption.precision]
    return VisionLanguageCaptioner(
        caption.model, caption.prompt, caption.max_new_tokens, dtype, device, caption.temperature
    )


def _reach(caption: Caption, in_flight: int, key: ApiKey | None) -> Callable[[str, Image], Said]:
    """A captioner of which it is known that its server is there."""
    from sd3core.captions.endpoint import EndpointCaptioner

    if caption.api_key_env and key is None and (key := find_api_key(caption.api_key_env)) is None:
        raise no_api_key(caption.api_key_env)
    captioner = EndpointCaptioner(caption, in_flight, key)
    captioner.check()
    return captioner
