from __future__ import annotations

import time

import pytest

from sd3core.captions.counts import LENGTHS, CaptionCounts, count_captions, count_words, length_class
from sd3core.captions.rules import (
    CUT_OFF,
    EMPTY,
    LOOPING,
    ONE_CHARACTER,
    REFUSING,
    RULES,
    Judged,
    apply_rules,
    loops,
    whole_sentences,
)
from sd3core.captions.said import Said, caption_seed

THROWN_OUT = {
    EMPTY: ["", "   \n", "\u200b\u200d", "\x07"],
    ONE_CHARACTER: ["!!!!", "! ! !\n!", "啊啊啊啊啊啊啊啊", "0", "-----"],
    LOOPING: [
        "a cat a cat a cat a cat a cat",
        "A red circle, a red circle. A red circle; a red circle",
        "A dog on the grass!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
        "The mat is red. A cat sits. The mat is red. A dog stands. The mat is red.",
        "一只红色的猫一只红色的猫一只红色的猫一只红色的猫一只红色的猫一只红色的猫",
        "the man with the hat and the man with the hat and the man with the hat and the man",
        "dog dog dog dog dog dog dog dog",
    ],
    REFUSING: [
        "I'm sorry, I cannot help with that.",
        "I’m sorry, but I can’t assist with this request.",
        "I am very sorry, but I am unable to describe it",
        "Sorry, I can't describe people.",
        "I cannot see the image.",
        "I can't provide a description of this picture.",
        "Unfortunately, I cannot identify the person",
        "As an AI language model, I see no pictures.",
        "I apologize, but no picture came.",
        "There is no image provided.",
        "Please upload the image you mean.",
        "I am unable to view images",
        "很抱歉，我无法描述这张图片。",
        "Es tut mir leid, aber das geht nicht.",
        "Lo siento, no puedo ayudar",
    ],
}
KEPT = [
    "A cat on a mat.",
    "A very very very tall man beside a short one.",
    "I can see a dog that runs.",
    "A sign that says 'I'm sorry, I can't'.",
    "An I am sorry card with a bear on it.",
    "I am sorry card with a bear",
    "No image of the sea could be calmer",
    "Two red circles, a blue circle, a green square and a red square, all on white.",
    "A red circle left of a blue circle, a red square left of a blue square, a red star left of a blue star.",
    "一只红色的猫坐在蓝色的垫子上。",
    "Ha ha ha ha, says the clown.",
    "12 12 12 on three clocks",
    "The word GOOOOOOOOAL in the stadium",
]


@pytest.mark.parametrize("rule, text", [(rule, text) for rule, texts in THROWN_OUT.items() for text in texts])
def test_a_rule_throws_out_what_it_is_for(rule, text):
    assert apply_rules(Said(text)) == Judged("", rule)
    assert apply_rules(Said(text, cut_off=True)).rule == rule, "and says so, not that it was cut off"


@pytest.mark.parametrize("text", KEPT)
def test_what_is_like_it_and_means_something_stays(text):
    assert apply_rules(Said(text)) == Judged(text)


def test_a_servers_word_for_a_refusal_counts():
    assert apply_rules(Said("A man.", refused=True)) == Judged("", REFUSING)


def test_what_is_kept_is_one_line():
    assert apply_rules(Said(" A cat\n\tsits.\x07 ")) == Judged("A cat sits.")


@pytest.mark.parametrize(
    "text, kept",
    [
        ("A cat sits. It is bl", "A cat sits."),
        ("A cat sits. It is blue.", "A cat sits. It is blue."),  # it ended as it reached the limit
        ('He says "Stop!" and th', 'He says "Stop!"'),
        ("Dr. Smith and Mr. J. Doe st", ""),
        ("Dr. Smith waits. Mr. J. Doe st", "Dr. Smith waits."),
        ("A flag of the U.S. in a", ""),
        ("A box of 3.5 m by 2. A d", "A box of 3.5 m by 2."),
        ("A box of 3.5 m by", ""),
        ("1. A cat sleeps. 2. A d", "1. A cat sleeps."),
        ("一只猫。它在", "一只猫。"),
        ("A cat on a m", ""),
        ("Wow… a c", "Wow…"),
    ],
)
def test_a_caption_that_was_cut_off_ends_with_its_last_whole_sentence(text, kept):
    assert whole_sentences(text) == kept
    expected = Judged(kept, shortened=kept != text) if kept else Judged("", CUT_OFF)
    assert apply_rules(Said(text, cut_off=True)) == expected
    assert apply_rules(Said(text)) == Judged(text)


def test_a_loop_is_found_by_what_stands_side_by_side():
    """Seven words in a row are no loop, eight are; a phrase of four three times, not twice."""
    assert not loops("no " * 7) and loops("no " * 8)
    phrase = "a tree, a house, "
    assert not loops(phrase * 2) and loops(phrase * 3)
    assert not loops("ab" * 11) and loops("ab" * 12)
    assert not loops("") and not loops("cat")


def test_lengths_double_from_class_to_class():
    firsts = [int(name.rstrip("+").partition("-")[0]) for name in LENGTHS]
    for name, first, after in zip(LENGTHS, firsts, [*firsts[1:], 10_000], strict=True):
        assert length_class(first) == length_class(after - 1) == name
    assert count_words("It's a cat, 2 dogs") == 6 and count_words("一只猫 on a mat") == 6


def row(caption: str, rule: str = "", said: str | None = None, tokens: int | None = None) -> dict:
    return {"caption": caption, "rule": rule, "said": said, "tokens": tokens}


def test_a_shards_counts_add_up_to_its_rows():
    rows = [
        row("A cat.", tokens=4),
        row("A cat sits on a mat by the door.", tokens=40),
        row("A dog.", said="A dog. It r", tokens=64),
        row("", EMPTY, "", tokens=1),
        row("", LOOPING, "a a a"),
        row("", LOOPING, "b b b"),
        row("A bird."),
    ]
    found = CaptionCounts.of(count_captions(rows))
    assert found.thrown_out == {EMPTY: 1, LOOPING: 2} and found.shortened == 1
    assert {name: count for name, count in found.words.items() if count} == {"1-7": 3, "8-15": 1}
    assert {name: count for name, count in found.tokens.items() if count} == {"1-7": 1, "32-63": 1, "64-127": 1}
    assert sum(found.words.values()) + sum(found.thrown_out.values()) == len(rows)
    assert list(found.thrown_out) == [rule for rule in RULES if rule in found.thrown_out]
    assert count_captions([]) == {}


def test_a_captions_seed_is_of_its_image():
    """Golden: other words would be drawn with another."""
    assert [caption_seed(0, "a"), caption_seed(1, "a"), caption_seed(0, "b")] == [1825027453, 24804963, 1860090146]
    assert len({caption_seed(0, f"k{i}") for i in range(10_000)}) > 9_990


def test_an_answer_of_a_server_that_knows_no_end_is_judged_in_time():
    began = time.process_time()
    assert not loops(" ".join(f"word{number}" for number in range(150_000)))
    assert time.process_time() - began < 8
