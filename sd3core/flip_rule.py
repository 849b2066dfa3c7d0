"""Says by its captions whether an image may be flipped, left to right.

A flipped picture with its old caption is a lie where the caption says which side something is on, and where there is something
to read in the picture. The rule knows English, and the words for left and right of a few other languages; it would rather keep
a picture as it is than flip one too many. What no caption says it cannot know: a sign that nobody mentions is flipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FLIP_RULE = 1  # raise it when another image may be flipped than before: it stands in the fingerprint of latents
SIDES, READABLE, UNCAPTIONED_IMAGE = "left or right", "letters or numbers", "no caption"

# A word that begins so, also after a hyphen: upper-left, right-handed, leftmost; not upright, bright, cleft.
_SIDE_WORDS = ("left", "right", "clockwise", "counterclockwise", "anticlockwise")
_SIDES_ELSEWHERE = (
    *("links", "rechts", "linke", "rechte"),  # German, Dutch
    *("gauche", "droite"),
    *("izquierd", "derech"),
    *("sinistr", "destr"),
    *("esquerd", "direit"),
    *("слева", "справа", "левы", "левой", "правы", "правой"),
)
_SIDE_SIGNS = "左右"
# Likewise: signs, labelled, handwritten; not textures, digital, or a plate of food.
_READ_WORDS = (
    *(
        "letter",
        "text(?!ur|il)",
        "word",
        "sign",
        "label",
        "logo",
        "caption",
        "writing",
        "written",
        "handwrit",
        "inscri",
    ),
    *(
        "spell",
        "title",
        "headline",
        "number",
        "numeral",
        "digit(?!al)",
        "alphabet",
        "typograph",
        r"fonts?\b",
        "calligraph",
    ),
    *("graffiti", "poster", "banner", "billboard", "newspaper", "magazine", "licen[cs]e", "clock", r"watch(?:es)?\b"),
    *("keyboard", "calendar"),
)
_SAYING = r"\b(?:that|which|it|and)\s+(?:says?|reads?)\b|\b(?:says|saying|reads|reading)\b"
_QUOTED = r"[\"“”„«»]|(?<!\w)['‘][^'’]+['’](?!\w)"

_SIDE = re.compile(rf"\b(?:{'|'.join((*_SIDE_WORDS, *_SIDES_ELSEWHERE))})|[{_SIDE_SIGNS}]", re.IGNORECASE)
_READ = re.compile(rf"\b(?:{'|'.join(_READ_WORDS)})|{_SAYING}|{_QUOTED}|\d", re.IGNORECASE)


def why_not_flipped(captions: Iterable[str]) -> str | None:
    """Why an image with these captions stays as it is; None where it may be flipped."""
    said = [caption for caption in captions if caption]
    if not said:
        return UNCAPTIONED_IMAGE
    if any(_SIDE.search(caption) for caption in said):
        return SIDES
    return READABLE if any(_READ.search(caption) for caption in said) else None
