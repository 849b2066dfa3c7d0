"""A store is a URL: file:///path, a plain path, or s3://bucket/prefix. The only file that knows boto3.

Both kinds keep one contract: an object is there whole or not at all, a path never leaves the store, a missing object is
StoreNotFound, and any other trouble is a StoreError of one line. Nothing is built on conditional puts.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from sd3core.errors import StoreError

PARTIAL = ".partial-"  # names of files being written; never listed
COPY_BYTES = 1 << 20


class StoreNotFound(StoreError):
    """An object that the store does not hold."""


@dataclass(frozen=True, order=True)
class StoreEntry:
    path: str
    size: int


class Store(ABC):
    """Objects under paths like `runs/mini/summary.json`. Pickles by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> tuple[Any, ...]:
        return open_store, (self.url,)

    def __repr__(self) -> str:
        return f"open_store({self.url!r})"

    @abstractmethod
    def get(self, path: str) -> bytes: ...

    @abstractmethod
    def get_range(self, path: str, offset: int, length: int) -> bytes: ...

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Whole or not at all; replaces what stood there."""

    @abstractmethod
    def put_file(self, path: str, local: Path) -> None: ...

    @abstractmethod
    def get_file(self, path: str, local: Path) -> None: ...

    @abstractmethod
    def size(self, path: str) -> int: ...

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoreEntry]:
        """Every object below the folder `prefix`, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes an object; one that is not there is no error."""

    def local_path(self, path: str) -> Path | None:
        """Where the object lies on this machine, for stores that are files; None otherwise."""
        return None

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except StoreNotFound:
            return False
        return True

    def get_json(self, path: str) -> Any:
        data = self.get(path)
        try:
            return json.loads(data)
        except ValueError:
            raise StoreError(f"{self.uri(path)}: not JSON; delete it and run the stage that makes it again") from None

    def put_json(self, path: str, value: Any) -> None:
        self.put(path, canonical_json(value))

    def uri(self, path: str) -> str:
        return f"{self.url}/{_checked(path)}"


def canonical_json(value: Any) -> bytes:
    """Sorted keys, indent 1, a newline at the end: the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def open_store(url: str) -> Store:
    """Opens `file:///abs/path`, a plain path, or `s3://bucket/prefix`."""
    scheme = urlparse(url).scheme if "://" in url or url.startswith("file:") else ""
    if scheme in ("", "file"):
        return FileStore(url)
    if scheme == "s3":
        return S3Store(url)
    raise StoreError(f"store {url!r}: {scheme}:// is not known; a store is a path, file:///path or s3://bucket/prefix")


def split_uri(uri: str) -> tuple[str, str]:
    """The URL of the folder an object lies in, as a store, and the object's name there."""
    parent, slash, name = uri.rstrip("/").rpartition("/")
    return (parent if slash else ".", name)


def read_uri(uri: str) -> bytes:
    parent, name = split_uri(uri)
    return open_store(parent).get(name)


def download_uri(uri: str, local: Path) -> None:
    parent, name = split_uri(uri)
    open_store(parent).get_file(name, local)


def _checked(path: str) -> str:
    if not path or path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise StoreError(f"store path {path!r}: it must be relative and stay inside the store")
    return path


class FileStore(Store):
    """A folder. Objects are written beside their place and renamed into it."""

    def __init__(self, url: str) -> None:
        path = unquote(urlparse(url).path) if url.startswith("file:") else url
        self.root = Path(path).expanduser().resolve()
        super().__init__(f"file://{self.root}")

    def local_path(self, path: str) -> Path:
        return self.root / _checked(path)

    def get(self, path: str) -> bytes:
        with self._reading(path) as file:
            return file.read()

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        with self._reading(path) as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise StoreError(f"{self.uri(path)}: ends before byte {offset + length}; it is not the file that its index describes")
        return data

    def put(self, path: str, data: bytes) -> None:
        self._write(path, lambda file: file.write(data))

    def put_file(self, path: str, local: Path) -> None:
        def copy(file) -> None:
            with local.open("rb") as source:
                while chunk := source.read(COPY_BYTES):
                    file.write(chunk)

        self._write(path, copy)

    def get_file(self, path: str, local: Path) -> None:
        with self._reading(path) as source, local.open("wb") as file:
            while chunk := source.read(COPY_BYTES):
                file.write(chunk)

    def size(self, path: str) -> int:
        target = self.local_path(path)
        if not target.is_file():
            raise StoreNotFound(f"{self.uri(path)}: no such object")
        return target.stat().st_size

    def list(self, prefix: str = "") -> list[StoreEntry]:
        start = self.root / _checked(prefix.rstrip("/")) if prefix else self.root
        entries = []
        for folder, _, names in os.walk(start):
            for name in names:
                if PARTIAL not in name:
                    full = Path(folder, name)
                    try:
                        entries.append(StoreEntry(full.relative_to(self.root).as_posix(), full.stat().st_size))
                    except FileNotFoundError:  # deleted while we listed
                        continue
        return sorted(entries)

    def delete(self, path: str) -> None:
        self.local_path(path).unlink(missing_ok=True)

    def _reading(self, path: str):
        try:
            return self.local_path(path).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise StoreNotFound(f"{self.uri(path)}: no such object") from None
        except PermissionError:
            raise StoreError(f"{self.uri(path)}: not readable for this user") from None

    def _write(self, path: str, write) -> None:
        target = self.local_path(path)
        partial = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=PARTIAL, dir=target.parent)
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, target)
            partial = None
        except OSError as error:
            raise StoreError(f"{self.uri(path)}: cannot be written: {error.strerror or error}") from None
        finally:
            if partial:
                Path(partial).unlink(missing_ok=True)


class S3Store(Store):
    """A bucket and a prefix, by boto3. The endpoint and credentials come from the environment (AWS_ENDPOINT_URL, ...)."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        if not parsed.netloc:
            raise StoreError(f"store {url!r}: name the bucket as s3://bucket/prefix")
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        super().__init__(f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else ""))
        self._made: Any = None

    @property
    def _client(self) -> Any:
        if self._made is None:
            import boto3
            from botocore.config import Config

            retries = {"max_attempts": 6, "mode": "standard"}
            self._made = boto3.client("s3", config=Config(retries=retries, connect_timeout=10, read_timeout=60))
        return self._made

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{_checked(path)}" if self.prefix else _checked(path)

    def _call(self, path: str, operation, *arguments: Any, **keywords: Any) -> Any:
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return operation(*arguments, **keywords)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("404", "NoSuchKey", "NotFound"):
                raise StoreNotFound(f"{self.url}/{path}: no such object") from None
            if code == "NoSuchBucket":
                raise StoreError(f"{self.url}: there is no bucket {self.bucket!r}; create it, or mend the recipe's store") from None
            if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                raise StoreError(f"{self.url}/{path}: access denied ({code}); check the credentials in the environment") from None
            raise StoreError(f"{self.url}/{path}: {code or error}") from None
        except (BotoCoreError, S3UploadFailedError) as error:
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default endpoint"
            raise StoreError(f"{self.url}: cannot be reached at {endpoint}: {' '.join(str(error).split())}") from None

    def get(self, path: str) -> bytes:
        return self._call(path, lambda: self._client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"].read())

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        wanted = f"bytes={offset}-{offset + length - 1}"
        data = self._call(path, lambda: self._client.get_object(Bucket=self.bucket, Key=self._key(path), Range=wanted)["Body"].read())
        if len(data) != length:
            raise StoreError(f"{self.uri(path)}: ends before byte {offset + length}; it is not the file that its index describes")
        return data

    def put(self, path: str, data: bytes) -> None:
        self._call(path, self._client.put_object, Bucket=self.bucket, Key=self._key(path), Body=data)

    def put_file(self, path: str, local: Path) -> None:
        self._call(path, self._client.upload_file, str(local), self.bucket, self._key(path))

    def get_file(self, path: str, local: Path) -> None:
        self._call(path, self._client.download_file, self.bucket, self._key(path), str(local))

    def size(self, path: str) -> int:
        return self._call(path, self._client.head_object, Bucket=self.bucket, Key=self._key(path))["ContentLength"]

    def list(self, prefix: str = "") -> list[StoreEntry]:
        folder = "/".join(part for part in (self.prefix, _checked(prefix.rstrip("/")) if prefix else "") if part)
        start = f"{folder}/" if folder else ""
        cut = len(self.prefix) + 1 if self.prefix else 0
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
        found = self._call(prefix, lambda: [item for page in pages for item in page.get("Contents", [])])
        return sorted(StoreEntry(item["Key"][cut:], item["Size"]) for item in found)

    def delete(self, path: str) -> None:
        self._call(path, self._client.delete_object, Bucket=self.bucket, Key=self._key(path))
