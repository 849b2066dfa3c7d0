"""Real photographs that installed packages carry, as a small folder data set.

They have captions, and nothing is downloaded.

The files lie inside the wheels of scikit-learn, scikit-image and matplotlib. They come in several sizes, in portrait,
square and landscape, in colour and in grey.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sd3core.errors import DataError

_SCIKIT_LEARN, _SCIKIT_IMAGE, _MATPLOTLIB = "sklearn/datasets/images", "skimage/data", "matplotlib/mpl-data/sample_data"

# name -> (folder, file, caption)
PHOTOGRAPHS: dict[str, tuple[str, str, str]] = {
    "pagoda": (
        _SCIKIT_LEARN,
        "china.jpg",
        "A red Chinese pagoda with green and orange roofs rises above trees beside a wide lake.",
    ),
    "dahlia": (_SCIKIT_LEARN, "flower.jpg", "A close-up of a round orange dahlia in bloom before dark green leaves."),
    "officer": (
        _MATPLOTLIB,
        "grace_hopper.jpg",
        "A portrait of an elderly woman with glasses in a dark navy uniform and white cap, a flag behind her.",
    ),
    "astronaut": (
        _SCIKIT_IMAGE,
        "astronaut.png",
        "A smiling astronaut in an orange space suit sits beside her helmet before a flag and a model of a shuttle.",
    ),
    "cat": (_SCIKIT_IMAGE, "chelsea.png", "A close-up of the face of a ginger tabby cat with green eyes."),
    "coffee": (_SCIKIT_IMAGE, "coffee.png", "A cup of espresso on a red saucer with a spoon on a wooden table."),
    "rocket": (
        _SCIKIT_IMAGE,
        "rocket.jpg",
        "A white rocket stands on a launch pad between steel towers at dusk, lit by bright lamps.",
    ),
    "motorcycle": (
        _SCIKIT_IMAGE,
        "motorcycle_left.png",
        "A red motorcycle is parked in a garage in front of shelves with boxes.",
    ),
    "cameraman": (
        _SCIKIT_IMAGE,
        "camera.png",
        "A black and white photograph of a man in a dark coat looking through a camera on a tripod on a lawn.",
    ),
    "coins": (_SCIKIT_IMAGE, "coins.png", "A black and white photograph of four rows of old coins on a dark surface."),
    "bricks": (_SCIKIT_IMAGE, "brick.png", "A black and white photograph of a wall of bricks with pale joints."),
    "gravel": (_SCIKIT_IMAGE, "gravel.png", "A black and white photograph of gravel seen from above."),
    "grass": (
        _SCIKIT_IMAGE,
        "grass.png",
        "A black and white photograph of a tangle of grass and straw seen from above.",
    ),
    "galaxies": (
        _SCIKIT_IMAGE,
        "hubble_deep_field.jpg",
        "Hundreds of small coloured galaxies scattered over a black sky.",
    ),
    "moon": (_SCIKIT_IMAGE, "moon.png", "A grey photograph of the surface of the moon with craters and dark patches."),
    "retina": (
        _SCIKIT_IMAGE,
        "retina.jpg",
        "A round orange photograph of the back of a human eye with branching red blood vessels.",
    ),
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Photograph:
    name: str
    extension: str
    caption: str
    content: bytes  # of the file, as it is

    @property
    def file_name(self) -> str:
        return f"{self.name}.{self.extension}"


def read_photographs() -> Iterator[Photograph]:
    """DataError if a package, or a file of it, is missing."""
    for name, (inside, file, caption) in PHOTOGRAPHS.items():
        source = _installed(inside) / file
        if not source.is_file():
            distribution = _DISTRIBUTIONS[inside.split("/")[0]]
            raise DataError(
                f"{source} is missing; reinstall it with: pip install --force-reinstall --no-deps {distribution}"
            )
        yield Photograph(name, source.suffix.removeprefix("."), caption, source.read_bytes())


def write_photographs(folder: Path) -> list[Path]:
    """Copies the photographs as they are to NAME.jpg or NAME.png in `folder`, each with NAME.txt; returns the pictures'
    paths.

    DataError if a package, or a file of it, is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for photograph in read_photographs():
        path = folder / photograph.file_name
        path.write_bytes(photograph.content)
        path.with_suffix(".txt").write_text(photograph.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def _installed(inside: str) -> Path:
    """The folder on disk, found without importing the package."""
    package, *rest = inside.split("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the photographs need the package {package}; install it with: pip install {_DISTRIBUTIONS[package]}"
        )
    return Path(spec.origin).parent.joinpath(*rest)
