"""A perceptual hash: the slow waves of a picture's brightness and colours.

The picture is shrunk to 32 x 32, whatever its aspect. Of the cosine transforms of its brightness and its two colour differences the
lowest waves are kept, a byte each, c -> sign(c) |c|^0.6, so that a few large ones do not outweigh all others. Two hashes are compared by their
cosine. A mirrored picture has the same waves, those of odd number across with the other sign.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

HASH_SIDE = 32
WAVES = (8, 5, 5)  # kept each way: of brightness, of blue's and of red's difference to it
HASH_BYTES = sum(waves**2 for waves in WAVES)
POWER = 0.6
LARGEST_WAVE = (255.0 * HASH_SIDE) ** POWER  # of any wave
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# -1 where a wave changes its sign when the picture is mirrored
MIRROR_SIGNS = np.concatenate([np.tile((-1) ** np.arange(waves), waves) for waves in WAVES]).astype(np.int8)


def picture_hash(image: Image.Image) -> np.ndarray:
    """(HASH_BYTES,) int8 of an RGB image."""
    from scipy.fft import dctn  # here: a flow's process, which imports this module too, loads none

    small = image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels = np.asarray(small, dtype=np.float32)  # (32, 32, 3)
    brightness = pixels @ LUMA
    planes = (brightness, 0.564 * (pixels[..., 2] - brightness), 0.713 * (pixels[..., 0] - brightness))
    waves = np.concatenate(
        [dctn(plane, norm="ortho")[:kept, :kept].ravel() for plane, kept in zip(planes, WAVES, strict=True)]
    )
    found = np.round(np.sign(waves) * np.abs(waves) ** POWER * (127 / LARGEST_WAVE)).astype(np.int8)
    if not found.any():
        found[0] = 1  # black is a grey as any other: nothing would be like a hash of nothing
    return found


def mirror_blind(hashes: np.ndarray) -> np.ndarray:
    """(n, HASH_BYTES): what a picture and its mirror image have alike, for finding which clusters they belong to."""
    return np.where(MIRROR_SIGNS < 0, np.abs(hashes), hashes)
