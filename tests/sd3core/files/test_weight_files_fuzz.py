"""Hostile weight files and configs, drawn with fixed seeds: opened, or a CheckpointError of one line, in little time and memory."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd3core.checkpoint import load_model, open_checkpoint, save_model
from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.errors import UserError
from sd3core.exchange.convert import import_model
from sd3core.exchange.foreign_weights import open_foreign_weights
from sd3core.files.tensor_files import TensorFiles
from sd3core.mmdit import MMDiT, MMDiTConfig
from sd3core.recipe import Text

SECONDS = 15.0  # of one file, on a machine that has other work
BIG = 2**62
NUMBERS = [
    0,
    1,
    -1,
    3,
    7,
    8,
    16,
    64,
    1.5,
    2**31,
    BIG,
    2**63,
    10**30,
    True,
    None,
    "8",
    "x",
    [],
    {},
    [1],
    [BIG, BIG, 0],
    float("nan"),
    "\x1b[2J",
    "\u202e",
]
DTYPES = ["F32", "F8_E4M3", "BF16", "f32", "F128", "", None, 5, [], {}, "\x1b[2J"]
CONFIG = MMDiTConfig.from_depth(
    1, latent_channels=4, context_dim=32, pooled_dim=32, position_base=2, position_side=2, position_max=2
)


def opens_or_is_one_line(call) -> str:
    begun, line = time.monotonic(), ""
    try:
        call()
    except UserError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) < 6000, line[:300]
    assert time.monotonic() - begun < SECONDS
    return line


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def read_all(path: Path) -> None:
    with TensorFiles([path]) as files:
        for name in files:
            assert files[name].numel() < 1000


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = [
    {"a": entry([BIG, BIG, 0], [0, 0])}, {"a": entry([0, BIG], [0, 0])}, {"a": entry([BIG], [0, 8])}, {"a": entry([2**40, 2**40, 0], [0, 0])},
    {"a": entry([-1]), "b": entry([2], [8, 16])}, {"a": entry([1.5])}, {"a": entry("ab")}, {"a": entry({"0": 1})}, {"a": entry([True, True])},
    {"a": entry([[2]])}, {"a": entry([1] * 9)}, {"a": entry([1] * 100_000)}, {"a": entry([], [0, 4])}, {"a": entry(None)}, {"a": entry(2)},
    {"a": entry(offsets=[8, 0])}, {"a": entry(offsets=[0, 16])}, {"a": entry(offsets=[-8, 0])}, {"a": entry(offsets=[0, 2**63])},
    {"a": entry(offsets=[0])}, {"a": entry(offsets=[0, 8, 8])}, {"a": entry(offsets="08")}, {"a": entry(offsets=[0.0, 8.0])}, {"a": entry(offsets=None)},
    {"a": entry(), "b": entry()}, {"a": entry(), "b": entry(offsets=[4, 12])}, {"a": entry(offsets=[0, 8]), "b": entry(offsets=[12, 20])},
    {"": entry()}, {"\x1b[2J": entry([3])}, {"\u202e": entry([3])}, {"x" * 100_000: entry([3])}, {"a/../../b": entry()},
    {"a": {}}, {"a": []}, {"a": None}, {"a": 1}, [], "x", 1, None, {}, {"__metadata__": []}, {"__metadata__": {"a": 1}, "a": entry()},
    {f"t{n}": entry([0], [0, 0]) for n in range(5000)},
    b"", b"{", b"{}" * 3, b"[" * 100_000, b'{"a":' * 50_000, b'{"a":1,"a":2}', b"\xff\xfe", b"\x00" * 64, b" " * 64, b"1" * 5000, b'{"a": ' + b"9" * 5000 + b"}",
    *({"a": entry(dtype=dtype)} for dtype in DTYPES),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers(tmp_path, header):
    for size in (0, 8, 20):
        opens_or_is_one_line(lambda: read_all(write(tmp_path / "a.safetensors", header, b"\0" * size)))
    for length in (0, 1, 2**63, 2**64 - 1):
        assert opens_or_is_one_line(lambda: read_all(write(tmp_path / "a.safetensors", header, length=length)))


def test_a_shape_that_no_tensor_can_have(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry([BIG, BIG, 0], [0, 0])})
    assert f"{path}: not a safetensors file: its header is wrong (shape [{BIG}, {BIG}, 0])" == opens_or_is_one_line(
        lambda: read_all(path)
    )


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "a.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3).half()}, path, metadata={"format": "pt"})
    good = path.read_bytes()
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) - 40)
            data[at : at + rng.randrange(3)] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b"9", b"-", b"[", b'"', b"0e9", b"999999999999"]
            )
        path.write_bytes(data)
        opens_or_is_one_line(lambda: read_all(path))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    facts = CheckpointFacts(null="empty", text=Text(), side_px=32, shift=1.0, digest="")
    save_model(folder, MMDiT(CONFIG), facts.to_extra())
    load_model(folder)  # the first one imports for seconds
    return folder


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, model_folder) -> Path:
    from sd3core.exchange.convert import export_model

    out = tmp_path_factory.mktemp("exported") / "transformer"
    export_model(str(model_folder), out, "diffusers")
    return out


def places(value, at=()):
    """Every place in JSON, so also those of later versions."""
    if isinstance(value, dict):
        for key in value:
            yield (*at, key)
            yield from places(value[key], (*at, key))


def changed(fields: dict, place: tuple, value: object) -> str:
    fields = json.loads(json.dumps(fields))
    inside = fields
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return json.dumps(fields)


RAW_JSON = [
    "",
    "{",
    "[]",
    "null",
    "1",
    '"x"',
    "[" * 100_000,
    "{}",
    '{"_class_name": "\\u001b[2J"}',
    '{"format": ' + "9" * 5000 + "}",
    "\udcff",
]


def test_hostile_configs_of_model_folders(model_folder):
    path = model_folder / "config.json"
    good = path.read_text()
    rng = random.Random(0)
    try:
        for place in places(json.loads(good)):
            for value in rng.sample(NUMBERS, 7):
                path.write_text(changed(json.loads(good), place, value))
                opens_or_is_one_line(
                    lambda: (
                        open_checkpoint(model_folder).config,
                        open_checkpoint(model_folder).facts,
                        load_model(model_folder),
                    )
                )
        for raw in RAW_JSON:
            path.write_bytes(raw.encode("utf-8", "surrogateescape"))
            assert opens_or_is_one_line(lambda: open_checkpoint(model_folder).facts)
    finally:
        path.write_text(good)
    load_model(model_folder)


def test_hostile_configs_of_imported_folders(diffusers_folder, tmp_path):
    path = diffusers_folder / "config.json"
    good = path.read_text()
    rng = random.Random(0)

    def import_it() -> None:
        with open_foreign_weights(diffusers_folder) as foreign:
            foreign.beside()
            import_model(foreign, str(tmp_path / f"out-{rng.random()}"), {})

    try:
        for place in places(json.loads(good)):
            for value in rng.sample(NUMBERS, 5):
                path.write_text(changed(json.loads(good), place, value))
                opens_or_is_one_line(import_it)
        for raw in RAW_JSON:
            path.write_bytes(raw.encode("utf-8", "surrogateescape"))
            opens_or_is_one_line(import_it)
    finally:
        path.write_text(good)
    assert not [out for out in tmp_path.iterdir() if not (out / "config.json").is_file()]  # nothing half written
