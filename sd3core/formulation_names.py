"""The names of the paper's formulations, apart from what they do: a recipe is checked without torch."""

from __future__ import annotations

import difflib
import re

LOGNORM = {  # name -> mean and standard deviation of logit t
    f"rf/lognorm({mean:.2f},{std:.2f})": (mean, std)
    for mean in (-1.0, -0.5, 0.0, 0.5, 1.0)
    for std in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)
}
MODE = {  # name -> scale: seven even steps over [-1, 1.75], and 1; scale 0 is plain rf
    f"rf/mode({scale:.2f})": scale for scale in (*(-1 + 2.75 * i / 6 for i in range(7)), 1.0)
}
NAMES = ("rf", "rf/cosmap", *LOGNORM, *MODE)


def unknown_formulation(name: str) -> str | None:
    """What is wrong with a name, with the nearest that is known; None for a known one."""
    if name in NAMES:
        return None
    as_printed = re.sub(r"-?\d+\.?\d*", lambda number: f"{float(number.group()):.2f}", name.replace(" ", ""))
    close = difflib.get_close_matches(as_printed, NAMES, n=1, cutoff=0.0)[0]
    return f"formulation {name!r} is not one of the {len(NAMES)} known; did you mean {close!r}?"
