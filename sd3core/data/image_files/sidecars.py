"""Tells a folder's images from what tools and network drives leave beside them.

Not taken for images, unless the recipe says `data.sidecars: take`:

    whatever lies in a folder that a tool or a drive keeps for itself (TOOL_FOLDERS), however deep
    a mask or thumbnail: its name is that of another image of its folder and one of ENDINGS, and it has no caption of its own

so pictures that are all called so, or that somebody has captioned, are images. Hidden files and folders are never looked into.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from sd3core.words import NAMED, some

# in small letters
TOOL_FOLDERS = frozenset(
    [
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "__macosx",
        ".thumbnails",
        ".@__thumb",
        ".appledouble",
        ".trashes",
        ".picasaoriginals",
        ".ipynb_checkpoints",
    ]
)
TRASH = ".trash-"  # of a drive, and then the number of its user
ENDINGS = ("_mask", "-mask", "_masklabel", "-masklabel", "_thumb", "-thumb", "_thumbnail", "-thumbnail")


def is_of_tools(folder: str) -> bool:
    """Whether a folder of this name is kept by a tool or a drive."""
    name = folder.lower()
    return name in TOOL_FOLDERS or name.startswith(TRASH)


def lies_in_tools_folder(path: str) -> bool:
    """Whether any folder of a relative path, which ends in a slash where it is a folder's, is one of tools."""
    return any(map(is_of_tools, path.split("/")[:-1]))


def beside_images(images: Collection[str], has_caption: Callable[[str], bool]) -> set[str]:
    """The masks and thumbnails among the names of one folder's images."""
    endings = [(name, stem, ending) for name in images if (found := _ending(name)) for stem, ending in [found]]
    if not endings:
        return set()
    stems = {posixpath.splitext(name)[0] for name in images}
    return {name for name, stem, ending in endings if stem[: -len(ending)] in stems and not has_caption(name)}


def _ending(name: str) -> tuple[str, str] | None:
    """A name's stem, and the ending that it has."""
    stem = posixpath.splitext(name)[0]
    ending = next((ending for ending in ENDINGS if stem.lower().endswith(ending)), None)
    return (stem, ending) if ending and len(stem) > len(ending) else None


@dataclass
class CountedNames:
    """How many there are of a kind, and the first names."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str]) -> CountedNames:
        counted = cls()
        for name in names:
            counted.count += 1
            if len(counted.first) < NAMED:
                counted.first.append(name)
        return counted

    def __add__(self, others: CountedNames) -> CountedNames:
        return CountedNames(self.count + others.count, [*self.first, *others.first][:NAMED])

    def __str__(self) -> str:
        return some(self.first, self.count)


def sidecar_note(in_folders: CountedNames, beside: CountedNames, hidden: CountedNames) -> list[str]:
    """One line on all that is not taken; none where nothing is."""
    kinds = [
        (in_folders, f"{in_folders.count:,} in folders of tools or drives"),
        (beside, f"{beside.count:,} as mask or thumbnail of an image beside it"),
        (hidden, f"{hidden.count:,} hidden"),
    ]
    said = [f"{what} ({found})" for found, what in kinds if found.count]
    if not said:
        return []
    mend = "; data.sidecars=take takes them" + (", but what is hidden" if hidden.count else "")
    mend = mend if in_folders.count or beside.count else ""
    total = sum(found.count for found, _ in kinds)
    return [f"{total:,} left by tools and not taken for images: {', '.join(said)}{mend}"]
