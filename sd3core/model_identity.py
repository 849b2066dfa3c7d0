"""Says which model a local folder holds, by its content and not its path."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sd3core.errors import DataError

READ_WHOLE = (".json", ".jinja", ".txt", ".model")  # configs, tokenizers, chat templates
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a weight file, spread evenly: reading tens of GB would take minutes


def model_identity(folder: Path | str, key: str) -> str:
    """The SHA-256 of config.json and the files like it, and of each safetensors file's name, size, header and samples.

    Raises DataError naming the recipe's `key` where the folder, its config.json or its weights are not there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise DataError(f"{key} {str(folder)!r}: no config.json there; give a model's folder on this machine")
    total, weights = hashlib.sha256(), 0
    try:
        for path in sorted(folder.iterdir()):
            if not path.is_file():
                continue
            if path.suffix == ".safetensors":
                weights += 1
                _add(total, path.name, path.stat().st_size.to_bytes(8, "big") + _header_and_samples(path))
            elif path.suffix in READ_WHOLE:
                _add(total, path.name, path.read_bytes())
    except OSError as error:
        raise DataError(f"{key} {str(folder)!r}: cannot be read ({error.strerror or error})") from None
    if not weights:
        raise DataError(f"{key} {str(folder)!r}: no .safetensors file there")
    return total.hexdigest()


def file_identity(path: Path | str, key: str) -> str:
    """The SHA-256 of a file. Raises DataError naming the recipe's `key` where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{key} {str(path)!r}: cannot be read ({error.strerror or error})") from None


def _header_and_samples(path: Path) -> bytes:
    """A safetensors file starts with the length N of its header in 8 bytes, little end first, and the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        parts = [start, file.read(min(int.from_bytes(start, "little"), size))]
        for i in range(SAMPLES):
            file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)


def _add(total, name: str, content: bytes) -> None:
    for part in (name.encode(), content):
        total.update(len(part).to_bytes(8, "big") + part)
