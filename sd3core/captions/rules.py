"""The rules that throw out what a captioning model should not have said.

A captioner fails quietly: one writes "!!!!" for every fifth image, another the same sentence for thousands, a third refuses. Each
caption that is thrown out has one rule, the first that it breaks:

    empty          nothing, or nothing that shows
    one_character  one character alone: "!!!!"
    looping        the same words again and again, side by side, or a sentence three times
    refusing       it begins by refusing: "I'm sorry, I cannot ..."
    cut_off        it ended at caption.max_new_tokens, before its first sentence did; a later one ends with its last whole sentence
    repeated       it stands on more than caption.max_share of all images (sd3core.captions.repeated)

The last is decided when a stage has all captions, the others here, of each by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from sd3core.captions.said import Said
from sd3core.words import one_line

EMPTY, ONE_CHARACTER, LOOPING, REFUSING, CUT_OFF = "empty", "one_character", "looping", "refusing", "cut_off"
REPEATED = "repeated"
RULES = {  # each, as a reader is told of it
    EMPTY: "empty",
    ONE_CHARACTER: "one character again and again",
    LOOPING: "the same words again and again",
    REFUSING: "the model refuses",
    CUT_OFF: "cut off in its first sentence",
    REPEATED: "on too many images",
}
OF_A_BROKEN_MODEL = (EMPTY, ONE_CHARACTER, LOOPING)  # what no image calls for
# A loop: a run of words (characters) so many times side by side, and so long in all. "very very very tall" is none.
WORD_TURNS, LOOPED_WORDS, LONGEST_ROUND = 3, 8, 500
CHARACTER_TURNS, LOOPED_CHARACTERS, LONGEST_TURN = 6, 24, 40
SENTENCE_TURNS, SENTENCE_WORDS = 3, 3
# A sentence ends at a mark, and what closes after it; the marks of Chinese and Japanese need no space behind them.
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？][”’」』）]*")
NO_SENTENCE_END = re.compile(  # initials, abbreviations, and the numbers of a list
    r"(?:^|[\s(])(?:[^\W\d_]|Dr|Mr|Mrs|Ms|Prof|St|vs|No|approx|ca|e\.g|i\.e|U\.S)\.$|(?:^|[.!?]\s)\d+\.$"
)
REFUSALS = re.compile(
    r"""\W*(?:
    (?:oh,?\s)? (?:i['’]?m|i\sam|we['’]?re|we\sare|so) \s+ (?:\w+\s+)? sorry (?=[,.;:!—–-]|\s+(?:but|i|for|that|about|we)\b)
    | sorry,?\s+ (?:but\s+)? (?:i|we) \b
    | (?:unfortunately,?\s+)? (?:i|we) \s+ (?:can['’]?t|cannot|can\snot|could\snot|won['’]?t|will\snot|am\sunable|am\snot\sable)
      \s+ (?:\w+\s+){0,2}? (?:to\s+)?
      (?:assist|help|describe|identify|provide|see|view|process|comply|fulfil|fulfill|analy[sz]e|access|answer|discuss|do|display|open)\b
    | (?:i['’]?m|i\sam) \s+ (?:unable|not\sable) \s+ to \b
    | (?:i\s+)? (?:must\s+)? apologi[sz]e\b
    | as \s+ an? \s+ (?:ai|artificial|language) \b
    | (?:there\s(?:is|was)\s)? no \s+ image \s+ (?:was|is|has\sbeen|provided|attached|uploaded)
    | (?:please|could\syou) \s+ (?:provide|upload|share|attach) \s+ (?:me\s+with\s+)? (?:the|an|your|a) \s+ image
    | (?:es\stut\smir\sleid|ich\skann\s(?:das|dieses)\sbild\snicht|je\ssuis\sdésolée?|désolée?,|lo\ssiento,|no\spuedo\s)
    | (?:很抱歉|非常抱歉|抱歉|对不起|我无法|我不能|申し訳)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class Judged:
    """`caption`: what is kept; "" where a rule threw it out."""

    caption: str
    rule: str = ""
    shortened: bool = False  # to its whole sentences


def apply_rules(said: Said) -> Judged:
    """What is kept of one caption, in one line, or the rule that it breaks."""
    line = one_line(said.text)
    if said.refused:
        return Judged("", REFUSING)
    if not line:
        return Judged("", EMPTY)
    if len(set(line) - {" "}) == 1:
        return Judged("", ONE_CHARACTER)
    if loops(line):
        return Judged("", LOOPING)
    if REFUSALS.match(line):
        return Judged("", REFUSING)
    if said.cut_off:
        whole = whole_sentences(line)
        return Judged(whole, shortened=whole != line) if whole else Judged("", CUT_OFF)
    return Judged(line)


def whole_sentences(line: str) -> str:
    """The line up to the end of its last whole sentence; "" where none ends."""
    for end in reversed([found.end() for found in SENTENCE_END.finditer(line)]):
        if not NO_SENTENCE_END.search(line[:end]):
            return line[:end]
    return ""


def loops(line: str) -> bool:
    """Whether it says the same again and again. Words are compared without case and marks; text without spaces by its characters."""
    words = re.findall(r"\w+", line.lower())
    if _turns(words, WORD_TURNS, LOOPED_WORDS, LONGEST_ROUND):
        return True
    if _turns(line, CHARACTER_TURNS, LOOPED_CHARACTERS, LONGEST_TURN):
        return True
    sentences = Counter(" ".join(re.findall(r"\w+", part.lower())) for part in re.split(r"[.!?。！？]+", line))
    return any(count >= SENTENCE_TURNS and said.count(" ") >= SENTENCE_WORDS - 1 for said, count in sentences.items())


def _turns(items: list[str] | str, turns: int, length: int, longest: int) -> bool:
    """Whether a run of at most `longest` items stands `turns` times side by side or more, and is at least `length` items then.

    With period n, item i equals item i + n for as long as the run goes on.
    """
    names = {item: number for number, item in enumerate(dict.fromkeys(items))}
    numbers = np.array([names[item] for item in items])
    for period in range(1, min(longest, len(items) // turns) + 1):
        differ = np.flatnonzero(numbers[:-period] != numbers[period:])
        edges = np.concatenate([[-1], differ, [len(numbers) - period]])
        if np.diff(edges).max() - 1 + period >= max(turns * period, length):
            return True
    return False
