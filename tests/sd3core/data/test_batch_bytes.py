"""Packed batches against safetensors and torch: the same tensors, bit by bit, in every precision."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn.utils.rnn import pad_sequence

from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.data.batch import unpacked
from sd3core.data.batch_bytes import (
    ITEM_BYTES,
    SCALES_ENDING,
    TEXT_TENSORS,
    StoredSample,
    TensorPacking,
    pack_batch,
    read_tensors,
)
from sd3core.data.stored_text import StoredText
from sd3core.errors import DataError
from sd3core.files.tensor_files import SAFETENSORS_DTYPES

TOKENS = {"clip_tokens": 4, "t5_tokens": 6}


def captions(dtype: str, padding: str) -> list[bytes]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    made = []
    for length in (2, 4, 3):
        sequences = (drawn(4, 130), drawn(4, 7), drawn(6, 9))
        features = TextFeatures(*sequences, drawn(130), drawn(3), torch.full((1, 3), length))
        made.append(StoredText.of(features.trimmed(), dtype).to_bytes(padding))
    return made


def samples(texts: list[bytes], latents: list[torch.Tensor]) -> list[StoredSample]:
    return [
        StoredSample(save({"latent": latent}), text, f"k{number}", 10 + number, f"latents/0.tar: k{number}")
        for number, (latent, text) in enumerate(zip(latents, texts, strict=True))
    ]


@pytest.mark.parametrize("padding", ["reference", "trimmed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_batch_is_what_torch_stacks(dtype, padding):
    latents = [torch.randn(16, 2, 3).to(getattr(torch, dtype if dtype != "int8" else "float16")) for _ in range(3)]
    texts, epochs = captions(dtype, padding), np.array([0, 1, 1])
    packed = pack_batch(samples(texts, latents), epochs, "16x24", **TOKENS)
    batch = unpacked(packed.layout, packed.buffer.memory)
    assert torch.equal(batch.latent, torch.stack(latents)) and batch.latent.dtype == latents[0].dtype
    rows, names = [load(text) for text in texts], set()
    for name in rows[0]:
        parts = [row[name] for row in rows]
        padded = name.removesuffix(SCALES_ENDING) in ENCODERS
        wanted = pad_sequence(parts, batch_first=True) if padded else torch.stack(parts)
        found = batch.text.tensors[name]
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
        names.add(name)
    assert names == batch.text.tensors.keys() and batch.text.nbytes <= packed.layout.size
    assert batch.keys == ["k0", "k1", "k2"] and batch.sample_ids.tolist() == [10, 11, 12]
    assert batch.epochs is epochs and batch.bucket == "16x24"


def test_names_and_sizes_are_those_of_the_features_and_of_torch():
    assert TEXT_TENSORS == tuple(field.name for field in fields(TextFeatures))
    assert {name: SAFETENSORS_DTYPES[name].itemsize for name in ITEM_BYTES} == ITEM_BYTES


def test_a_tensor_without_elements_and_rows_that_do_not_fit():
    data = save(
        {"empty": torch.zeros(0, 4), "a": torch.zeros(2, 3), "b": torch.zeros(2, 4), "c": torch.zeros(2, 3).half()}
    )
    tensors, packing = read_tensors(data), TensorPacking()
    assert packing.add([tensors["empty"]], padded=True).shape == (1, 0, 4) and packing.size == 0
    for other in "bc":
        with pytest.raises(ValueError, match="rows of different sizes or precisions"):
            packing.add([tensors["a"], tensors[other]], padded=True)
    longer = read_tensors(save({"a": torch.ones(3, 3)}))["a"]
    assert packing.add([tensors["a"], longer], padded=True).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="rows of different sizes"):
        packing.add([tensors["a"], longer])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:4],
        lambda data: b"\0" * len(data),
        lambda data: data[:-1],
        lambda data: data.replace(b'"F32"', b'"F64"'),
        lambda data: data.replace(b"[2,3]", b"[9,9]"),
        lambda data: data.replace(b"data_offsets", b"data_offsetz"),
        lambda data: (2).to_bytes(8, "little") + b"[]" + data[10:],
    ],
)
def test_what_is_no_safetensors_is_a_value_error(damage):
    data = save({"a": torch.zeros(2, 3)})
    assert read_tensors(data)["a"].shape == (2, 3)
    with pytest.raises(ValueError, match="no safetensors"):
        read_tensors(damage(data))


def test_rows_that_are_no_rows_are_named():
    texts, latents = captions("float16", "trimmed"), [torch.zeros(16, 2, 3)] * 3
    row = samples(texts, latents)[1]

    def refused(changed: StoredSample, message: str, **tokens: int) -> None:
        with pytest.raises(DataError, match=message) as error:
            pack_batch([row, changed], np.zeros(2), "16x24", **TOKENS | tokens)
        assert "\n" not in str(error.value)

    refused(row._replace(latent=save({"image": latents[0]})), "latents/0.tar: k1 holds no latent; run the stage again")
    refused(row._replace(latent=b"?"), "latents/0.tar: k1 holds no latent; run the stage again")
    wide = save({"latent": torch.zeros(16, 2, 4)})
    refused(row._replace(latent=wide), r"k1 has a latent of \(16, 2, 4\), its bucket is 16x24 px; run the stage again")
    refused(row, "text features: 4 stored t5 tokens do not fit 3; encode again", t5_tokens=3)
    refused(row._replace(text=b"?"), "text features cannot be read .*; encode the shard again")
    fine = captions("float32", "trimmed")[0]
    refused(row._replace(text=fine), "text features cannot be read .rows of different sizes or precisions.; encode")


def test_reading_and_packing_load_no_torch():
    code = "import sys, sd3core.data.loader, sd3core.data.store; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)
