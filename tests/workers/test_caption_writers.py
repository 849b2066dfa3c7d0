"""Batches of like sizes, and what a batch that fails costs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from sd3core.captions.said import Said
from workers.at_once import ShardsAtOnce
from workers.caption_writers import BatchWriter, dense_batches

RATIOS = (1, 4 / 3, 3 / 2, 3 / 4, 2 / 3, 16 / 9, 1.91)


def random_sizes(count: int, longest: int = 1024) -> list:
    """Pictures of 300 to 1,600 px in the ratios of photographs, as a model sees them."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(count):
        side, ratio = rng.uniform(300, 1600), rng.choice(RATIOS)
        width, height = side * ratio**0.5, side / ratio**0.5
        smaller = min(1, longest / max(width, height))
        pictures.append((f"k{number}", SimpleNamespace(width=int(width * smaller), height=int(height * smaller))))
    return pictures


def padding(batches) -> float:
    """The part of all image tokens that is padding, where a token is 28 x 28 px as in Qwen2-VL."""
    real = padded = 0
    for batch in batches:
        tokens = [(image.width // 28) * (image.height // 28) for _, image in batch]
        real, padded = real + sum(tokens), padded + max(tokens) * len(tokens)
    return 1 - real / padded


def test_a_window_of_eight_batches_leaves_a_quarter_of_the_padding():
    pictures = random_sizes(8192)
    in_order, dense = list(dense_batches(pictures, 8, 8)), list(dense_batches(pictures, 8, 64))
    assert [one for batch in in_order for one in batch] == pictures
    assert sorted(key for batch in dense for key, _ in batch) == sorted(key for key, _ in pictures)
    assert {len(batch) for batch in dense} == {8}
    assert padding(in_order) > 0.35 and padding(dense) < 0.09


def test_a_window_is_whole_batches_and_the_rest_is_not_lost():
    pictures = random_sizes(21)
    assert [len(batch) for batch in dense_batches(pictures, 4, 10)] == [4, 4, 4, 4, 4, 1]
    assert [len(batch) for batch in dense_batches(pictures, 8, 3)] == [8, 8, 5]
    assert list(dense_batches([], 4, 8)) == []


def test_an_image_that_cannot_be_prepared_costs_no_other_its_caption():
    class Picky:
        def prepare(self, images):
            if any(image.width == pictures[2][1].width for image in images):
                raise ValueError("an odd image")
            return [image.width for image in images]

        def write(self, widths, seeds):
            return [Said(f"{width} wide") for width in widths]

    pictures = random_sizes(5)
    with ShardsAtOnce(1e9).shard("a") as turn:
        written = {key: said for (key, _), said in BatchWriter(Picky(), 4, 4, 0)(pictures, turn)}
    assert str(written.pop("k2")) == "an odd image"
    assert written == {key: Said(f"{image.width} wide") for key, image in pictures if key != "k2"}
