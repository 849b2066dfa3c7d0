"""What a shard of captions counts: by rule, and by length in words and tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sd3core.captions.rules import RULES

THROWN_OUT, SHORTENED = "thrown out: ", "shortened to whole sentences"
IN_WORDS, IN_TOKENS = "words", "tokens"
LENGTHS = ("1-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256+")  # of a caption: every one twice the one before


def length_class(length: int) -> str:
    """Which of LENGTHS a number of words or tokens, at least 1, is in."""
    return LENGTHS[min(max(0, length.bit_length() - 3), len(LENGTHS) - 1)]


def count_words(caption: str) -> int:
    """Words; of what is written without spaces, as Chinese, characters."""
    return len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", caption))


def count_captions(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The counts of a shard's record, none of them 0, from the rows of its table."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row["rule"]:
            counts[f"{THROWN_OUT}{row['rule']}"] += 1
            continue
        counts[f"{IN_WORDS} {length_class(count_words(row['caption']))}"] += 1
        counts[SHORTENED] += row["said"] is not None
        if row["tokens"]:
            counts[f"{IN_TOKENS} {length_class(row['tokens'])}"] += 1
    return {name: counts[name] for name in sorted(counts) if counts[name]}


@dataclass(frozen=True)
class CaptionCounts:
    """What the shards of a stage counted together."""

    thrown_out: dict[str, int]  # by rule, in the rules' order
    shortened: int
    words: dict[str, int]  # kept captions, by LENGTHS
    tokens: dict[str, int]

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> CaptionCounts:
        """`counts`: a captions manifest's, of all its shards."""
        lengths = {kind: {name: counts.get(f"{kind} {name}", 0) for name in LENGTHS} for kind in (IN_WORDS, IN_TOKENS)}
        thrown_out = {rule: counts[f"{THROWN_OUT}{rule}"] for rule in RULES if f"{THROWN_OUT}{rule}" in counts}
        return cls(thrown_out, counts.get(SHORTENED, 0), lengths[IN_WORDS], lengths[IN_TOKENS])
