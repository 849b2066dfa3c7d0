"""safetensors files by spans, against the safetensors library; and headers that lie."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3core.errors import CheckpointError, UserError
from sd3core.files.tensor_files import TensorFiles, TensorFileWriter, TensorInfo
from sd3core.files.whole_output import atomic_output

TENSORS = {
    "odd": torch.tensor([True, False, True]),
    "half": torch.randn(5, 3).half(),
    "brain": torch.randn(2, 2, 2).bfloat16(),
    "full": torch.randn(7),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}


def infos_of(tensors):
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file({"other": torch.arange(4)}, tmp_path / "b.safetensors")
    with TensorFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]) as files:
        assert set(files) == {*TENSORS, "other"} and files.infos["half"] == TensorInfo(torch.float16, (5, 3))
        for name, tensor in TENSORS.items():
            assert files[name].dtype == tensor.dtype and torch.equal(files[name], tensor)
        assert torch.equal(files.read("half", 4, 7), TENSORS["half"].flatten()[4:11])
        with pytest.raises(IndexError):
            files.read("half", 10, 6)


def test_the_library_reads_what_is_written_in_any_order(tmp_path):
    path, names = tmp_path / "a.safetensors", sorted(TENSORS)
    with TensorFileWriter(path, infos_of(TENSORS)) as out:
        for name in reversed(names):
            flat = TENSORS[name].flatten()
            out.write(name, len(flat) // 2, flat[len(flat) // 2 :])
            out.write(name, 0, flat[: len(flat) // 2])
    again = load_file(path)
    assert all(again[name].dtype == t.dtype and torch.equal(again[name], t) for name, t in TENSORS.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert path.stat().st_size == out.bytes


def test_a_part_that_is_not_written_is_noticed(tmp_path):
    with pytest.raises(ValueError, match="'full'"), TensorFileWriter(tmp_path / "a", infos_of(TENSORS)) as out:
        for name, tensor in TENSORS.items():
            out.write(name, 0, tensor.flatten()[: 3 if name == "full" else None])


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": entry(shape=[3])}, "tensor 'a' lies at bytes 0 to 8"),
        ({"a": entry(data_offsets=[4, 12])}, "tensor 'a' lies at bytes 4 to 12"),
        ({"a": entry(), "b": entry()}, "tensor 'b' lies at bytes 0 to 8"),
        ({"a": entry(shape=[-2], data_offsets=[0, -8])}, r"shape \[-2\]"),
        ({"a": entry(shape=[2.0])}, "shape"),
        ({"a": entry(shape=[True, 2])}, "shape"),
        ({"a": entry(shape=[1] * 9)}, "9 dimensions"),
        ({"a": entry(shape=[1 << 62, 1 << 62, 0, 2])}, "header is wrong"),
        ({"a": entry(dtype="F7")}, "dtype 'F7'"),
        ({"a": entry(dtype=["F32"])}, "header is wrong"),
        ({"a": 7}, "header is wrong"),
        ([], "header is wrong"),
        ({"a": entry(shape=[4], data_offsets=[0, 16])}, "but its header tells of"),
        ({}, "but its header tells of"),
        ('{"a":1,"a":2}', "stands in it twice"),
        ("[" * 100_000, "header is wrong"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, fields, message):
    text = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        TensorFiles([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("start", [b"", b"abc", b"\xff" * 8, (10**7 + 1).to_bytes(8, "little") + bytes(10**7 + 1)])
def test_other_files_are_refused(tmp_path, start):
    (tmp_path / "x").write_bytes(start)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TensorFiles([tmp_path / "x"])


@pytest.mark.parametrize("old", [False, True])
def test_pickles_are_not_loaded(tmp_path, old):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match="a pickle, .* get the .safetensors"):
        TensorFiles([tmp_path / "x.ckpt"])


def test_an_output_is_there_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "[model]"
    with pytest.raises(KeyError), atomic_output(out) as path:
        path.mkdir()
        raise KeyError
    assert list(out.parent.iterdir()) == []
    with atomic_output(out) as path:
        path.mkdir()
        (path / "file").write_text("whole")
        assert not out.exists()
        with atomic_output(out.with_name("other")) as other:
            other.write_text("a file")
    assert sorted(p.name for p in out.parent.iterdir()) == ["[model]", "other"]
    assert (out / "file").read_text() == "whole"
    with pytest.raises(UserError, match="exists already"), atomic_output(out):
        pass


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path):
    kill_itself = (
        "import os, signal, sys; from sd3core.files.whole_output import atomic_output\n"
        "with atomic_output(sys.argv[1]) as path:\n    path.write_bytes(bytes(1000)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = tmp_path / "model"
    done = subprocess.run(
        [sys.executable, "-c", kill_itself, out],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        check=False,
    )
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    with atomic_output(out) as path:
        assert not left.exists() and path.parent.exists()
        with pytest.raises(RuntimeError), atomic_output(out):
            raise RuntimeError  # a second maker of the same thing at the same time
        assert path.parent.exists()
        path.write_text("whole")
    assert list(tmp_path.iterdir()) == [out]
