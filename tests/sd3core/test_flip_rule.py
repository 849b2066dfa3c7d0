"""Which images their captions let be flipped, left to right."""

from __future__ import annotations

import pytest

from sd3core.flip_rule import READABLE, SIDES, UNCAPTIONED_IMAGE, why_not_flipped


@pytest.mark.parametrize(
    "caption",
    [
        "A cup of espresso on a red saucer with a spoon on a wooden table.",
        "an upright piano in bright light",  # no side in these words
        "the cleft of a rock, the alright kids, a playwright",
        "two green triangles above a red bar",
        "the dog's bone and the cat's tail",  # apostrophes are no quotes
        "a designer's chair",  # design is no sign
        "a digital painting of a fox on a texture of straw",
        "a woman watching a plate of food",
    ],
)
def test_what_reads_the_same_either_way_may_be_flipped(caption):
    assert why_not_flipped([caption]) is None


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle left of a blue square",
        "A man on the RIGHT",
        "in the upper-left corner",
        "a right-handed guitar",
        "the leftmost of three cups",
        "turning clockwise",
        "ein Hund links vom Baum",
        "un chien à gauche",
        "el gato a la izquierda",
        "左の猫",
        "дом слева",
    ],
)
def test_a_caption_that_says_a_side_keeps_its_image(caption):
    assert why_not_flipped([caption]) == SIDES


@pytest.mark.parametrize(
    "caption",
    [
        "a street sign",
        "a road with signs",
        "the letter B in red",
        "a handwritten note",
        "a card that says hello",
        'a shop called "Bakery"',
        "a shirt with 'love' on it",
        "a mug with “tea” on it",
        "bus 42 in the rain",
        "a row of numbers",
        "the label of a bottle",
        "she reads the headline",
        "a number plate",
        "a clock on a tower",
    ],
)
def test_a_caption_that_speaks_of_something_to_read_keeps_its_image(caption):
    assert why_not_flipped([caption]) == READABLE


def test_one_caption_of_several_is_enough_and_none_says_nothing():
    assert why_not_flipped(["a cat", "a cat, a dog to its left"]) == SIDES
    assert why_not_flipped(["a cat", "", "a cat beside a sign"]) == READABLE
    assert why_not_flipped(["a dog left of a sign"]) == SIDES  # the first reason is the one that is counted
    assert why_not_flipped([]) == why_not_flipped(["", ""]) == UNCAPTIONED_IMAGE
