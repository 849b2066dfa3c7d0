"""Ingest: the drawn world's scenes, and what a raw sample is.

Scenes go to shards by runs of their numbers; a folder's files are `ingest_folder`'s.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image

from sd3core.data.shards import (
    DoneRecord,
    Sample,
    is_held_out,
    optional_column,
    parts_digest,
    shard_stem,
    write_shard,
)
from sd3core.data.store import open_store
from sd3core.recipe import Data
from sd3core.small_world.scenes import describe, draw_scene, render, scene_rng

RAW_SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        # all of an image's captions, where it has several
        optional_column("captions", pa.list_(pa.string())),
    ]
)
ASPECT, DESCRIBE = 2, 1  # purposes of scene_rng besides drawing, which is 0


@dataclass(frozen=True)
class SceneShard:
    """One shard of scenes to be drawn."""

    number: int
    digest: str  # 12 hex digits of the content
    scenes: range
    seed: int


def list_scenes(data: Data, seed: int) -> list[SceneShard]:
    """A scene is a function of (seed, settings, index), so those name a shard's content; a world that grows keeps its
    shards.
    """
    settings = data.model_dump(
        mode="json", include={"image_side_px", "aspect_ratios", "max_objects", "held_out_fraction"}
    )
    shards = []
    for number, start in enumerate(range(0, data.images, data.rows_per_shard)):
        indexes = range(start, min(start + data.rows_per_shard, data.images))
        world = {"seed": seed, "settings": settings, "start": indexes.start, "stop": indexes.stop}
        shards.append(SceneShard(number, parts_digest(json.dumps(world, sort_keys=True)), indexes, seed))
    return shards


class SceneWorker:
    """SceneShard -> raw tar."""

    def __init__(self, data: Data, store_url: str, folder: str) -> None:
        self.data, self.store, self.folder = data, open_store(store_url), folder
        self.progress = 0  # rows

    def __call__(self, shard: SceneShard) -> DoneRecord:
        self.progress = 0
        stem = shard_stem(shard.number, shard.digest)
        return write_shard(self.store, self.folder, stem, self._scenes(shard), [], RAW_SCHEMA)

    def _scenes(self, shard: SceneShard) -> Iterator[Sample]:
        for index in shard.scenes:
            aspects = self.data.aspect_ratios
            aspect = aspects[scene_rng(shard.seed, index, ASPECT).integers(len(aspects))]
            scene = draw_scene(shard.seed, index, self.data.image_side_px, aspect, self.data.max_objects)
            image = Image.fromarray(render(scene))
            caption = describe(scene, scene_rng(shard.seed, index, DESCRIBE))
            key = f"scene-{shard.seed}-{index:08d}"
            yield raw_sample(self.data, key, "png", png_bytes(image), image.size, (caption,), "small_world")
            self.progress += 1


def raw_sample(
    data: Data, key: str, extension: str, image: bytes, size: tuple[int, int], captions: Sequence[str], source: str
) -> Sample:
    """`size`: width, height of the upright picture. `source`: where it comes from.

    Of its captions, each a clean line, the first stands as "caption", "" where it has none; all distinct ones stand as
    "captions" beside it where they are several.
    """
    distinct = list(dict.fromkeys(filter(None, captions)))
    about = {"caption": "".join(distinct[:1]), "width": size[0], "height": size[1], "source": source}
    about |= {"captions": distinct} if len(distinct) > 1 else {}
    described = json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
    split = "held_out" if is_held_out(key, data.held_out_fraction) else "train"
    return Sample(key, {extension: image, "json": described}, about | {"split": split})


def captions_column(index: pa.Table) -> list[list[str]]:
    """Every row's captions, in the order of a raw shard's index."""
    first = [[caption] if caption else [] for caption in index["caption"].to_pylist()]
    if "captions" not in index.column_names:
        return first
    return [several or one for one, several in zip(first, index["captions"].to_pylist(), strict=True)]


def png_bytes(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
