"""Training captions left, held-out ones right, each drawn picture beside the real one of its caption."""

from __future__ import annotations

import numpy as np
import pytest

from sd3core.comparison_grid import BETWEEN_HALVES_PX, GAP_PX, ComparedPicture, captions_in_words, comparison_grid

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 120, 150)


def plain(colour, height=64, width=64) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def compared(split, drawn, real, caption="c", **size) -> ComparedPicture:
    return ComparedPicture(split, caption, plain(drawn, **size), real and plain(real, **size))


def box_of(grid: np.ndarray, colour) -> tuple[int, int, int, int]:
    """(top, left, height, width) of all that has a colour; it fills its box."""
    found = (grid == colour).all(axis=2)
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    box = rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert found.sum() == box[2] * box[3]
    return tuple(int(side) for side in box)


def test_each_picture_stands_in_its_half_beside_its_real_one():
    """64 px are shown as 128, so that the headings have room."""
    grid = comparison_grid([compared("held_out", BLUE, GREY), compared("train", RED, GREEN)])
    top, left, height, width = box_of(grid, RED)
    assert (left, height, width) == (0, 128, 128) and top > 24
    assert box_of(grid, GREEN) == (top, 128 + GAP_PX, 128, 128)
    right = 2 * 128 + GAP_PX + BETWEEN_HALVES_PX
    assert box_of(grid, BLUE) == (top, right, 128, 128)
    assert box_of(grid, GREY) == (top, right + 128 + GAP_PX, 128, 128)
    assert grid.shape == (top + 128, right + 2 * 128 + GAP_PX, 3)


def test_both_halves_have_headings_of_their_own_and_words_over_their_columns():
    grid = comparison_grid([compared("train", RED, GREEN), compared("held_out", RED, GREEN)])
    top, half = box_of(grid[:, : 2 * 128 + GAP_PX], RED)[0], 2 * 128 + GAP_PX
    left, right = grid[:top, :half], grid[:top, half + BETWEEN_HALVES_PX :]
    assert (left[: top // 2] != right[: top // 2]).any()  # by what they are
    for part in (left, right):
        for words in (part[: top // 2], part[top // 2 :, :128], part[top // 2 :, 128 + GAP_PX :]):
            dark = (words < 128).all(axis=2)
            assert 0.02 < dark.mean() < 0.5
            assert not dark[:, -1].any()  # none is cut off
    assert (left[top // 2 :] == right[top // 2 :]).all()  # drawn, real


def test_without_held_out_rows_there_is_one_half_and_a_missing_real_picture_leaves_its_place_white():
    grid = comparison_grid([compared("train", RED, GREEN), compared("train", BLUE, None)])
    assert grid.shape[1] == 2 * 128 + GAP_PX
    top, _, height, _ = box_of(grid, BLUE)
    assert (grid[top : top + height, 128 + GAP_PX :] == 255).all()


def test_pictures_of_several_shapes_stand_in_cells_of_the_largest():
    wide = ComparedPicture("train", "c", plain(RED, 64, 128), plain(GREEN, 64, 128))
    grid = comparison_grid([wide, ComparedPicture("train", "c", plain(BLUE, 128, 64), plain(GREY, 128, 64))])
    assert box_of(grid, RED)[2:] == (64, 128) and box_of(grid, BLUE)[2:] == (128, 64)
    assert box_of(grid, GREY)[1] == box_of(grid, GREEN)[1] == 128 + GAP_PX


@pytest.mark.parametrize("side", [16, 96, 1024])
def test_headings_fit_pictures_of_any_size(side):
    pictures = [compared(split, RED, GREEN, height=side, width=side) for split in ("train", "held_out")]
    grid = comparison_grid(pictures)
    assert min(grid.shape[:2]) > 96 and (grid[:, -1] != 0).any(axis=1).all()


def test_captions_in_words_follow_the_halves():
    pictures = [compared("held_out", RED, RED, "x"), compared("train", RED, RED, "a"), compared("train", RED, RED, "b")]
    assert captions_in_words(pictures) == [("captions trained on", ["a", "b"]), ("held-out captions", ["x"])]
    with pytest.raises(ValueError, match="at least one"):
        comparison_grid([])
