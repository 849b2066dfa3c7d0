"""Says what shards and manifests hold: a few rows are read, by their ranges."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image, Resampling, fromarray
from pydantic import ValidationError
from safetensors import SafetensorError

from sd3core.data.encoded_shards import FEATURES, latent_of
from sd3core.data.images import PixelRules, decode_image
from sd3core.data.manifest import Manifest, read_head
from sd3core.data.provenance import provenance_of
from sd3core.data.shards import IMAGE_EXTENSIONS, read_samples, read_shard_done, read_shard_index
from sd3core.data.sources.ranged_file import RangedFile
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.inspection.contact_sheet import SHEET_CELL_PX
from sd3core.inspection.findings import Findings, ShownRow, counts_table, shown_bytes, shown_fields
from sd3core.specs import INDEX, MANIFEST, TABLE, TAR, manifest_copy

if TYPE_CHECKING:
    from sd3core.towers.autoencoder import Autoencoder

VaeOf = Callable[[str, str], "Autoencoder | None"]  # URL of a folder of latents, digest of their VAE
MOST_PIXELS = 100_000_000  # of a picture that is decoded to be shown
LARGEST_HEAD = 64_000_000  # at most, of a tar that has no index
FIRST_READ = 1_000_000
WIDEST_WORDS = 300
FAILURES_SHOWN = 10
# What else is bytes is no picture.
PICTURES_BEGIN = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*", b"MM\0*")
PLACE_COLUMNS = ("key", "offset", "length", "sha256")  # columns of an index that say where a row is


def inspect_manifest(store: Store, name: str, record: dict[str, Any], rows: int, vae_of: VaeOf) -> Findings:
    """All that a stage made, as the `record` at `name` says it, and the first rows of its first shard."""
    try:
        manifest = Manifest.model_validate(record)
    except ValidationError:
        raise DataError(f"{store.uri(name)}: not a manifest of this version; run the stage again") from None
    found = Findings(
        f"{manifest.stage}: {manifest.rows:,} rows in {len(manifest.shards):,} shards",
        {"bytes": shown_bytes(manifest.bytes), "spec": manifest.spec},
    )
    shards = [shard for shard in manifest.shards if shard.rows]
    if shards:
        sizes = sorted(shard.rows for shard in shards)
        found.facts["rows a shard"] = f"{sizes[0]:,} to {sizes[-1]:,}, median {sizes[len(sizes) // 2]:,}"
    found.facts |= {f"made from {key}": digest[:12] for key, digest in sorted(manifest.inputs.items())}
    found.facts |= {f"fields.{key}": value for key, value in shown_fields(manifest.fields).items()}
    parent, _, folder = store.url.rpartition("/")
    made_by = provenance_of(open_store(parent), manifest_copy(folder, manifest.digest))
    found.facts |= {"made by": "; ".join(made.line() for made in made_by)} if made_by else {}
    if manifest.buckets:
        found.tables["counted"] = counts_table(manifest.buckets, "what")
    if manifest.failed_reasons:
        found.tables["left out"] = counts_table(manifest.failed_reasons, "reason")
    if shards:
        first = inspect_shard(store.url, shards[0].stem, rows, vae_of)
        found.rows, found.notes = first.rows, first.notes
        found.facts["rows shown"] = f"the first of shard {shards[0].stem}"
    return found


def inspect_shard(folder_url: str, stem: str, rows: int, vae_of: VaeOf, *, index: bool = False) -> Findings:
    """A finished shard, by its done record and its table, or else its index; `index`: of a shard with both the index."""
    parent, _, folder = folder_url.rpartition("/")
    store = open_store(parent)
    done = read_shard_done(store, folder, stem)
    found = Findings(f"shard {stem}: {done.rows:,} rows", {"bytes": shown_bytes(done.bytes), "digest": done.digest})
    if done.extra:
        found.tables["counted"] = counts_table(done.extra, "what")
    if done.failed:
        found.tables["left out"] = [{"key": row.key, "reason": row.reason} for row in done.failed[:FAILURES_SHOWN]]
        if len(done.failed) > FAILURES_SHOWN:
            found.notes.append(f"the first {FAILURES_SHOWN} of {len(done.failed):,} rows that were left out are named")
    if TABLE in done.files:
        path = f"{folder}/{stem}{INDEX if index and INDEX in done.files else TABLE}"
        return _with_table(found, io.BytesIO(store.get(path)), store.uri(path), rows)
    table = read_shard_index(store, folder, stem)
    found.facts["columns"] = ", ".join(table.column_names)
    first = table.slice(0, rows).to_pylist()
    if "caption_id" in table.column_names:
        captions = len(set(table["caption_id"].to_pylist()))
        found.title = f"text {found.title}, {captions:,} captions encoded"
        found.rows = [ShownRow(row["key"], _words(row)) for row in first]
    elif "bucket" in table.column_names:
        found.title = f"latents {found.title}"
        found.rows = list(_latent_rows(store, folder, stem, first, vae_of, found.notes))
    else:
        found.title = f"raw {found.title}"
        found.rows = [_raw_row(store, folder, stem, row) for row in first]
    return found


def _words(row: dict[str, Any]) -> dict[str, str]:
    """A row's fields as words, but for where it is."""
    return {key: _shown(value) for key, value in row.items() if key not in PLACE_COLUMNS and value is not None}


def _shown(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= WIDEST_WORDS else f"{text[:WIDEST_WORDS]}..."


def _files_of(store: Store, folder: str, stem: str, row: dict[str, Any]) -> dict[str, bytes]:
    data = store.get_range(f"{folder}/{stem}{TAR}", row["offset"], row["length"])
    return next((files for _, files in read_samples(data)), {})


def _raw_row(store: Store, folder: str, stem: str, row: dict[str, Any]) -> ShownRow:
    return ShownRow(row["key"], _words(row), _picture(_files_of(store, folder, stem, row)))


def _picture(files: dict[str, bytes]) -> np.ndarray | str:
    """The image among a sample's files, or why there is none to show."""
    images = [data for name, data in files.items() if name.lower().rpartition(".")[2] in (*IMAGE_EXTENSIONS, "jpeg")]
    if not images:
        return f"no image among {', '.join(sorted(files)) or 'its files'}"
    try:
        return _small(decode_image(images[0], PixelRules(MOST_PIXELS)))
    except DataError as error:
        return str(error)


def _small(image: Image) -> np.ndarray:
    """As large as a sheet shows it: the pictures of all rows are held until then."""
    image.thumbnail((SHEET_CELL_PX, SHEET_CELL_PX), Resampling.LANCZOS)
    return np.asarray(image)


def _latent_rows(
    store: Store, folder: str, stem: str, rows: list[dict[str, Any]], vae_of: VaeOf, notes: list[str]
) -> Iterator[ShownRow]:
    """Latents as what the autoencoder that made them makes of them."""
    from sd3core.pictures import to_uint8

    head = read_head(store, f"{folder}/{MANIFEST}")
    digest = str(head.fields.get("vae", "")) if head else ""
    autoencoder = vae_of(store.uri(folder), digest) if digest and rows else None
    if autoencoder is None and rows:
        why = (
            "its stage has no manifest yet" if head is None else f"towers with it ({digest[:12]}) are not in this store"
        )
        notes.append(f"latents are not decoded: {why}")
    for row in rows:
        if autoencoder is None:
            yield ShownRow(row["key"], _words(row), "not decoded")
            continue
        try:
            latent = latent_of(_files_of(store, folder, stem, row)[FEATURES])
        except (KeyError, SafetensorError, DataError):
            yield ShownRow(row["key"], _words(row), "damaged: it holds no latent")
            continue
        yield ShownRow(
            row["key"], _words(row), _small(fromarray(to_uint8(autoencoder.decode(latent[None].float()))[0]))
        )


def inspect_table(folder: Store, name: str, rows: int) -> Findings:
    """A parquet file from anywhere, of which the footer and the first rows are read."""
    entry = folder.entry(name)
    with RangedFile(folder, name, entry.size, entry.tag) as ranged:
        return _with_table(Findings(f"{name}: a table"), ranged, folder.uri(name), rows)


def _with_table(found: Findings, data: BinaryIO | RangedFile, where: str, rows: int) -> Findings:
    try:
        file = pq.ParquetFile(pa.PythonFile(data, mode="r"), pre_buffer=False)
        first = next(file.iter_batches(batch_size=max(rows, 1)), None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: not a parquet file ({str(error).splitlines()[0]}); name another") from None
    groups = f"{file.metadata.num_rows:,} in {file.metadata.num_row_groups:,} row groups"
    found.facts |= {"rows": groups, "columns": ", ".join(f"{c.name} ({c.type})" for c in file.schema_arrow)}
    shown = first.slice(0, rows).to_pylist() if first is not None else []
    for number, row in enumerate(shown):
        files = {f"{column}.jpg": image for column, image in _images_in(row)}
        found.rows.append(ShownRow(str(row.get("key", number)), _words(row), _picture(files) if files else ""))
    return found


def _images_in(row: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Columns of bytes, and Hugging Face's struct of bytes and path."""
    for column, value in row.items():
        image = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(image, bytes) and image.startswith(PICTURES_BEGIN):
            yield column, image


def inspect_tar(folder: Store, name: str, rows: int) -> Findings:
    """The beginning of a tar that no stage of this system made: its first samples."""
    size = folder.size(name)
    found = Findings(f"{name}: a tar without an index", {"bytes": shown_bytes(size)})
    samples: dict[str, dict[str, bytes]] = {}
    asked = min(size, FIRST_READ)
    while True:
        samples = dict(_whole_samples(folder.get_range(name, 0, asked), folder.uri(name)))
        if len(samples) > rows or asked >= min(size, LARGEST_HEAD):
            break
        asked = min(size, asked * 4, LARGEST_HEAD)
    if asked < size:
        found.notes.append(f"of the tar the first {shown_bytes(asked)} were read")
    for key, files in list(samples.items())[:rows]:
        words = {ending: _text_of(data) for ending, data in sorted(files.items()) if ending in ("txt", "json", "cls")}
        sizes = ", ".join(f"{ending} {len(data):,}" for ending, data in sorted(files.items()))
        found.rows.append(ShownRow(key, words | {"files": sizes}, _picture(files)))
    return found


def _whole_samples(data: bytes, where: str) -> Iterable[tuple[str, dict[str, bytes]]]:
    """Neighbours of one name up to its first dot, of those members that are whole."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if not member.isfile() or member.offset_data + member.size > len(data):
                    continue
                path, _, last = member.name.rpartition("/")
                stem, _, ending = last.partition(".")
                samples.setdefault(f"{path}/{stem}" if path else stem, {})[ending] = tar.extractfile(member).read()
    except tarfile.TarError as error:
        if not samples:
            raise DataError(f"{where}: not a plain tar ({error}); name another, or unpack a compressed one") from None
    return samples.items()


def _text_of(data: bytes) -> str:
    return _shown(data.decode("utf-8", "replace"))
