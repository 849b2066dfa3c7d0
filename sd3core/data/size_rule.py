"""Says which images a phase takes: those large enough for their bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sd3core.buckets import Side, bucket_name, bucket_side, nearest_bucket, nearest_places
from sd3core.data.images import enlargement

TOO_SMALL = "smaller than its bucket, and would be enlarged (min_scale)"  # why a phase leaves an image out
NO_ENLARGEMENT = 1.0  # min_scale where a recipe does not name it

Sides = tuple[Side, ...]


@dataclass(frozen=True)
class SizeRule:
    """An image goes to its nearest bucket, and is taken where min_scale times its enlargement there is at most 1.

    At `min_scale` 1 an image fills its bucket as it is; at 0.5 it may be enlarged to twice its sides; at 0 all are taken. For one
    shard and one list of buckets larger scales leave out the same images and more, so their number names which they are.
    """

    sides: Sides
    min_scale: float = 0.0

    def takes(self, width: int, height: int) -> bool:
        bucket = nearest_bucket(width, height, self.sides)
        return enlargement((width, height), *bucket) * self.min_scale <= 1

    def place(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each (width, height) in `sizes` (n, 2): the place of its bucket in `sides` (n,), and whether it is taken (n,)."""
        places = nearest_places(sizes, self.sides)
        if not self.min_scale:
            return places, np.ones(len(sizes), dtype=bool)
        wanted = np.array(self.sides, dtype=np.float64)[places]  # (n, 2): height, width
        enlarged = np.maximum(wanted[:, 0] / sizes[:, 1], wanted[:, 1] / sizes[:, 0])
        return places, enlarged * self.min_scale <= 1

    def to_dict(self) -> dict[str, Any]:
        """As a score's protocol says it."""
        return {"min_scale": self.min_scale, "sizes": [bucket_name(side) for side in self.sides]}

    @classmethod
    def of_dict(cls, fields: Mapping[str, Any]) -> SizeRule | None:
        """The rule of such fields; None where they name none."""
        if "min_scale" not in fields:
            return None
        return cls(tuple(map(bucket_side, fields["sizes"])), fields["min_scale"])

    def taken_of(self, index: pa.Table) -> pa.Table:
        """The rows of a raw index that are taken."""
        return index.filter(pa.array(self.place(image_sizes(index))[1]))


def image_sizes(index: pa.Table) -> np.ndarray:
    """(n, 2): width and height of a raw index's images."""
    return np.stack([index[name].to_numpy().astype(np.int64) for name in ("width", "height")], axis=1)
