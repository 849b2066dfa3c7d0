"""Captioning: a synthetic caption for every raw image, beside the original ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import pyarrow as pa
from PIL.Image import Image

from sd3core.data.earlier_rows import EarlierRows, row_name
from sd3core.data.images import PixelRules, decode_image, naming
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shards import FailedRow, write_table
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.progress import ProgressCallback
from sd3core.recipe import Caption, Recipe
from sd3core.specs import captions_fields, captions_folder
from workers.at_once import SHARDS_AT_ONCE, ShardsAtOnce, ShardTurn
from workers.inputs import (
    InputShard,
    actor_device,
    batched,
    decode_threads,
    image_digest,
    input_shards,
    map_ahead,
    read_input_index,
    shard_images,
    with_image_digest,
)
from workers.pool import of_the_process
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage
from workers.stage import StageResult

TOO_MANY_FAILED = 8  # images of a shard, and no other: then it is the captioner, not they
CAPTION_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "caption", "model", "prompt")])
Captioner = Callable[[Sequence[Image]], list[str]]


def caption_stage(recipe: Recipe, store: Store, raw: ManifestRef, report: ProgressCallback) -> StageResult:
    """Captions parquets, a row a key. Where the recipe names no captioner there is nothing to make, and the raw data stand:
    originals are used alone then.
    """
    if recipe.caption.captioner == "none":
        return StageResult("caption", raw.path, raw.digest, skipped=True, reason="the recipe names no captioner")
    folder = captions_folder(recipe)
    tasks = [
        ShardTask(number, shard.digest[:12], folder, shard.rows, shard)
        for number, shard in input_shards(read_manifest(store, raw.folder, raw.digest)).items()
    ]
    stage = ShardStage("caption", "captions", folder, captions_fields(recipe), {"raw": raw.digest}, tasks, unit="image")
    compute = recipe.compute.for_stage("caption")
    worker = {
        "store_url": store.url,
        "caption": recipe.caption,
        "rules": PixelRules.of(recipe.data),
        "threads": decode_threads(compute),
        "most_bytes": compute.decoded_gb * 1e9,
        "device": actor_device(compute),
    }
    return run_shard_stage(store, recipe.run, stage, CaptionWorker, worker, compute, report)


class CaptionWorker:
    """Raw shard -> captions parquet. An image that cannot be captioned becomes a failed row with its reason."""

    tasks_at_once = SHARDS_AT_ONCE

    def __init__(
        self, store_url: str, caption: Caption, rules: PixelRules, threads: int, most_bytes: float, device: str
    ) -> None:
        self.store = open_store(store_url)
        self.caption = caption
        self.rules, self.threads = rules, threads
        self.at_once = ShardsAtOnce(most_bytes)
        self.captioner = _load_captioner(caption, device)
        self.is_model = caption.captioner == "vision_language_model"

    @property
    def progress(self) -> dict[str, int]:
        return self.at_once.progress

    def __call__(self, task: ShardTask) -> MadeShard:
        with self.at_once.shard(task.place) as turn:
            return self._made(task, turn)

    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard:
        index = read_input_index(self.store, task.source)
        names = {row["key"]: row_name(row) for row in index.to_pylist()}
        rows: dict[str, dict[str, str]] = {}  # by key
        failed: list[FailedRow] = []
        with EarlierRows(self.store, task.folder, task.earlier) as earlier:
            stood = earlier.find_in_tables(set(names.values()), row_name)
        rows |= {key: stood[name] for key, name in names.items() if name in stood}
        turn.advance(len(rows))
        for batch in batched(self._images(task.source, names.keys() - rows.keys(), failed, turn), self.caption.batch):
            self._write_captions(batch, rows, failed, turn)
        if not rows and len(failed) >= TOO_MANY_FAILED:
            raise DataError(f"no image of {len(failed)} got a caption, the last: {failed[-1].reason}")
        schema = with_image_digest(CAPTION_SCHEMA, index)
        table = pa.Table.from_pylist(
            [rows[key] | image_digest(names[key]) for key in names if key in rows], schema=schema
        )
        record = write_table(self.store, task.folder, task.stem, table, failed)
        return MadeShard(record, len(stood), len(rows) - len(stood), tuple(earlier.told))

    def _images(
        self, shard: InputShard, wanted: AbstractSet[str], failed: list[FailedRow], turn: ShardTurn
    ) -> Iterator[tuple[str, Image]]:
        """The decoded images of these keys, each for its caption alone; threads decode ahead."""

        def decoded(item: tuple[str, bytes]) -> tuple[str, Image | DataError]:
            key, data = item
            try:
                with naming(key):
                    image = decode_image(data, self.rules)
            except DataError as error:
                return key, error
            turn.hold(_nbytes(image))
            return key, image

        turn.hold(shard.bytes)
        images = ((key, data) for key, data in shard_images(self.store, shard) if key in wanted)
        for key, image in map_ahead(decoded, images, self.threads, ahead=2 * self.caption.batch):
            if isinstance(image, DataError):
                failed.append(FailedRow(key=key, reason=str(image)))
                turn.advance(1)
            else:
                yield key, image
        turn.let_go(shard.bytes)

    def _write_captions(
        self,
        batch: Sequence[tuple[str, Image]],
        rows: dict[str, dict[str, str]],
        failed: list[FailedRow],
        turn: ShardTurn,
    ) -> None:
        for (key, _), caption in zip(batch, self._captions([image for _, image in batch], turn), strict=True):
            if isinstance(caption, Exception):
                failed.append(FailedRow(key=key, reason=f"captioner: {' '.join(str(caption).split())[:200]}"))
            elif not caption:
                failed.append(FailedRow(key=key, reason="captioner: it wrote nothing"))
            else:
                model, prompt = (self.caption.model, self.caption.prompt) if self.is_model else ("small_world", "")
                rows[key] = {"key": key, "caption": caption, "model": model, "prompt": prompt}
        turn.let_go(sum(_nbytes(image) for _, image in batch))
        turn.advance(len(batch))

    def _captions(self, images: list[Image], turn: ShardTurn) -> list[str | Exception]:
        """A batch that fails is tried image by image, so that one bad image costs no other its caption."""
        if not images:
            return []
        try:
            with turn.encoding():
                return list(self.captioner(images))
        except Exception as error:
            if len(images) == 1:
                if of_the_process(error):
                    raise
                return [error]
            return [caption for image in images for caption in self._captions([image], turn)]


def _nbytes(image: Image) -> int:
    return 3 * image.width * image.height


def _load_captioner(caption: Caption, device: str) -> Captioner:
    if caption.captioner == "vision_language_model":
        # loads transformers, which the small world does not need
        from sd3core.precision import PRECISION_DTYPES
        from sd3core.towers.captioner import VisionLanguageCaptioner

        dtype = PRECISION_DTYPES[caption.precision]
        return VisionLanguageCaptioner(caption.model, caption.prompt, caption.max_new_tokens, dtype, device)
    from sd3core.small_world.captioner import caption_from_pixels

    return lambda images: [caption_from_pixels(np.asarray(image)) for image in images]
