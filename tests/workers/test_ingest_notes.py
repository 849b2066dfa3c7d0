from __future__ import annotations

from sd3core.data.images import BARE_CMYK, CONVERTED, TRANSPARENT, UNKNOWN_COLOURS
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.recipe import Data
from workers.ingest import _notes_of_pictures


def test_what_was_done_to_colours_and_transparency_is_told_whoever_made_the_shards():
    """From counts that the manifest has by shard, so no row is read."""
    counts = [{TRANSPARENT: 1, CONVERTED: 7}, {}, {TRANSPARENT: 1200, UNKNOWN_COLOURS: 1, BARE_CMYK: 2}]
    shards = [
        ShardEntry(number=number, stem=f"{number:05d}.0123456789ab", rows=2000, bytes=1, digest="0", buckets=count)
        for number, count in enumerate(counts)
    ]
    manifest = Manifest(stage="raw", spec="0", fields={}, inputs={}, folder="raw", shards=shards)
    data = Data(name="x", source="folder", folder="/x", background="#102030")
    assert _notes_of_pictures(manifest, data) == [
        "1,201 images: transparent in parts: #102030 lies under those parts (data.background)",
        "1 image: colour profile of no use: damaged, of another colour space or of HDR; taken as sRGB",
        "2 images: CMYK without a profile: the colours are a guess; save such images as RGB",
    ]
