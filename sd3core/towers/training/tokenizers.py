"""Makes small tokenizers from captions, of the released ones' classes.

CLIP: byte-level BPE laid out as OpenAI's (256 bytes, the same 256 at a word's end, merges, begin mark, end mark), so that any
text has tokens. T5: a unigram model with <pad> 0, </s> 1, <unk> 2 and the sentinels <extra_id_0> ... at the very end.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer

CLIP_POSITIONS = 77
WORD_END = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SENTINELS = 100
# CLIPTokenizer's own normalisation and word splitting, so that the merges are learnt on the words it will see.
_CLIP_NORMALIZER = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
)
_CLIP_WORDS = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")


def make_clip_tokenizer(captions: Sequence[str], vocabulary: int, pad_with_id_0: bool) -> CLIPTokenizer:
    """A tokenizer of at most `vocabulary` tokens. Pads with the end mark (CLIP-L), or with id 0, which is "!" (CLIP-G)."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())  # begins with "!", as OpenAI's does
    fixed = 2 * len(byte_tokens) + 2
    trained = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    trained.normalizer = _CLIP_NORMALIZER
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_CLIP_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        initial_alphabet=byte_tokens,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained.train_from_iterator(captions, trainer)
    learnt = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokens = dict.fromkeys(byte_tokens + [byte + WORD_END for byte in byte_tokens])
    merges = []
    for left, right in learnt:
        if fixed + len(merges) >= vocabulary:
            break
        merges.append((left, right))
        tokens[left + right] = None
    tokens |= dict.fromkeys((BEGIN, END))
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token="!" if pad_with_id_0 else END,
        model_max_length=CLIP_POSITIONS,
    )


def make_t5_tokenizer(captions: Sequence[str], vocabulary: int) -> T5Tokenizer:
    """A tokenizer of at most `vocabulary` tokens besides the sentinels: marks, letters (printable ASCII and all that occur), then whole words.

    A piece's score is its log frequency. Built by counting, so that it does not depend on the order of any summation.
    """
    words = Counter("▁" + word for caption in captions for word in caption.split())
    letters = Counter(letter for word, count in words.items() for letter in word for _ in range(count))
    letters.update({chr(code): 1 for code in range(33, 127)})
    total = sum(words.values()) + sum(letters.values())
    marks = ["<pad>", "</s>", "<unk>"]
    room = vocabulary - len(marks)
    # A letter costs far more than a word that has it, so a known word is always one piece.
    pieces = [(letter, math.log(count / total) - 10.0) for letter, count in _by_frequency(letters)[:room]]
    known = {piece for piece, _ in pieces}
    frequent = [(word, math.log(count / total)) for word, count in _by_frequency(words) if word not in known]
    pieces += frequent[: room - len(pieces)]
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    return T5Tokenizer(
        vocab=[(mark, 0.0) for mark in marks] + pieces + [(sentinel, 0.0) for sentinel in sentinels],
        extra_ids=SENTINELS,
        model_max_length=512,
    )


def _by_frequency(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
