"""The exact detector: which shapes in which colours stand where in a picture.

Backgrounds are near grey, so objects are the pixels with chroma. Pixels are labelled by the nearest hue, connected
pixels of one hue form a blob, and the blob's soft coverage is compared with each shape drawn at the blob's own area and
centroid. A blob that looks like no shape of the world (half drawn, merged, noise) comes back with the shape UNKNOWN, so
that a judge can refuse it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from sd3core.small_world.world import AREAS, CENTROIDS_Y, COLOURS, MIN_SIDE_PX, SHAPES, signed_distance

UNKNOWN = "unknown"
_MAX_SIDE_PX = 128  # larger pictures are read at this size
_MIN_BLOB = 0.003  # of the central square: smaller specks are no objects (12 pixels at 64 px)
_MIN_OBJECT = 0.012  # smaller blobs are no whole objects (49 pixels at 64 px)
_MIN_CHROMA = 0.42  # of the palette's chroma: where an object begins
_MIN_IOU = 0.84  # whole shapes reach 0.92, three quarters of one 0.8, a diamond against a circle 0.83
_BLURS = (0.5, 1.0, 1.5, 2.0)  # standard deviations, pixels at 64 px, that a shape may have been blurred by
_MAX_HUE_ERROR = 26.0  # degrees
# (3, 2): colour without its grey
_PLANE = np.array([[1 / 2**0.5, -1 / 2**0.5, 0], [1 / 6**0.5, 1 / 6**0.5, -2 / 6**0.5]]).T
_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float64) @ _PLANE  # (6, 2)
_CHROMA = np.hypot(*_PALETTE.T)  # (6,)
_HUES = _PALETTE / _CHROMA[:, None]
_CROSS = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Detection:
    shape: str  # one of SHAPES, or UNKNOWN
    colour: str  # one of COLOURS, or UNKNOWN
    centre: tuple[float, float]  # x, y in pixels of the picture given
    size: float  # width of the shape in pixels
    box: tuple[float, float, float, float]  # left, top, right, bottom
    area: float  # pixels
    fit: float  # intersection over union with the shape's outline


def detect(image: np.ndarray) -> list[Detection]:
    """Objects in a uint8 (H, W, 3) picture, from top to bottom, left to right.

    ValueError if the picture is not uint8 RGB or its shorter side is below 48 px.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"detect takes uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if min(image.shape[:2]) < MIN_SIDE_PX:
        raise ValueError(
            f"detect needs a shorter side of at least {MIN_SIDE_PX} px, got {image.shape[1]}x{image.shape[0]}"
        )
    scale = min(image.shape[:2]) / _MAX_SIDE_PX
    if scale > 1:
        size = round(image.shape[1] / scale), round(image.shape[0] / scale)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    chroma = image.astype(np.float64) @ _PLANE  # (H, W, 2)
    length = np.hypot(chroma[..., 0], chroma[..., 1])
    grey = length < 0.3 * _CHROMA.min()
    if grey.any():  # a tinted background is no colour
        chroma = chroma - np.median(chroma[grey], axis=0)
        length = np.hypot(chroma[..., 0], chroma[..., 1])
    hue = (chroma @ _HUES.T).argmax(-1)  # (H, W) index of the nearest hue
    hue[length < _MIN_CHROMA * _CHROMA[hue]] = -1
    found = [_read_blob(chroma, hue, mask, window, max(scale, 1)) for mask, window in _blobs(hue)]
    return sorted(found, key=lambda item: (round(item.centre[1]), item.centre[0]))


def _blobs(hue: np.ndarray) -> list[tuple[np.ndarray, tuple[slice, slice]]]:
    """(mask, window) of each connected region of one hue that is more than a speck; the mask covers the window."""
    smallest = _MIN_BLOB * min(hue.shape) ** 2
    blobs = []
    for colour in range(len(_NAMES)):
        mask = hue == colour
        if mask.sum() < smallest:
            continue
        labels, count = ndimage.label(mask, structure=_CROSS)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            if areas[label] >= smallest:
                window = tuple(
                    slice(max(edge.start - 3, 0), min(edge.stop + 3, side))
                    for edge, side in zip((rows, columns), hue.shape)
                )
                blobs.append((labels[window] == label, window))
    return blobs


def _read_blob(
    chroma: np.ndarray, hue: np.ndarray, mask: np.ndarray, window: tuple[slice, slice], scale: float
) -> Detection:
    colour = int(hue[window][mask][0])
    inside = chroma[window][mask]  # (n, 2)
    strength = inside @ _HUES[colour]
    body = np.median(inside[strength >= np.quantile(strength, 0.4)], axis=0)  # the blob's colour, away from its edge
    near = ndimage.binary_dilation(mask, iterations=2) & (mask | (hue[window] < 0))
    cover = _sharpened((chroma[window] @ body) / (body @ body)) * near
    y, x = np.mgrid[window] + 0.5
    area = float(cover.sum())
    centroid = np.array([(cover * x).sum(), (cover * y).sum()]) / area
    shape, fit, centre, size = _fit_shape(cover, x, y, area, centroid, min(hue.shape))
    error = np.degrees(np.arccos(np.clip(body @ _HUES[colour] / np.hypot(*body), -1, 1)))
    whole = fit >= _MIN_IOU and area >= _MIN_OBJECT * min(hue.shape) ** 2
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    left, top = window[1].start, window[0].start
    box = left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1
    return Detection(
        shape=shape if whole else UNKNOWN,
        colour=_NAMES[colour] if error <= _MAX_HUE_ERROR else UNKNOWN,
        centre=(float(centre[0] * scale), float(centre[1] * scale)),
        size=float(size * scale),
        box=tuple(float(edge * scale) for edge in box),
        area=area * scale**2,
        fit=fit,
    )


def _sharpened(cover: np.ndarray) -> np.ndarray:
    """Coverage in [0, 1] with a tenth cut off at both ends: texture of the background is no coverage."""
    return np.clip(1.25 * cover - 0.125, 0, 1)


def _fit_shape(cover, x, y, area: float, centroid: np.ndarray, side: int) -> tuple[str, float, np.ndarray, float]:
    """(shape, intersection over union, centre, size) of the shape that fits best at the blob's area and centroid."""
    sizes = [(area / AREAS[shape]) ** 0.5 for shape in SHAPES]
    centres = [centroid - np.array([0.0, CENTROIDS_Y[shape] * size]) for shape, size in zip(SHAPES, sizes)]
    outlines = [
        signed_distance(shape, (x - centre[0]) / size, (y - centre[1]) / size) * size
        for shape, size, centre in zip(SHAPES, sizes, centres)
    ]
    drawn = np.clip(0.5 - np.stack(outlines), 0, 1)  # (shapes, h, w)
    fits = []
    for blur in _BLURS:  # blur changes neither area nor centroid
        soft = _sharpened(ndimage.gaussian_filter(drawn, blur * side / 64, axes=(1, 2), mode="constant", truncate=3.0))
        fits.append(np.minimum(cover, soft).sum((1, 2)) / np.maximum(cover, soft).sum((1, 2)))
    fit = np.max(fits, axis=0)  # (shapes,)
    best = int(fit.argmax())
    return SHAPES[best], float(fit[best]), centres[best], sizes[best]
