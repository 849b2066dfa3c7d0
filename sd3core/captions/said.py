"""What a captioning model said of one image, and the seed of its words."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """`tokens`: how many were written, where that is known; `cut_off`: they ended at the limit, not where the model ended;
    `revision`: what a server says of the model that answered.
    """

    text: str
    tokens: int | None = None
    cut_off: bool = False
    refused: bool = False  # a server's own word for it
    revision: str = ""


def caption_seed(seed: int, key: str) -> int:
    """31 bits of (seed, key): an image's words do not depend on the batch, the actor or the attempt that they are drawn in."""
    digest = hashlib.sha256(f"{int(seed)}/caption/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
