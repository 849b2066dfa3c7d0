"""A store is a URL: file:///path, a plain path, or s3://bucket/prefix. The only file that knows boto3.

Both kinds keep one contract: an object is there whole or not at all, a path never leaves the store, a missing object is
StoreNotFound, and any other trouble is a StoreError of one line. Nothing is built on conditional puts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlparse

from sd3core.errors import StoreError, with_mend

PARTIAL = ".partial-"  # names of files being written; never listed
ABANDONED_S = 3600  # a file being written that has not grown for so long has lost its writer
COPY_BYTES = 1 << 20
S3_ATTEMPTS = 5  # of one request, by botocore, and of one body that breaks off


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
    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """Just those bytes; StoreError where the object ends before them."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Whole or not at all; replaces what stood there."""

    @abstractmethod
    def put_file(self, path: str, local: Path) -> None:
        """As put, for files larger than memory."""

    @abstractmethod
    def get_file(self, path: str, local: Path) -> None:
        """Replaces `local` when all of it is here."""

    @abstractmethod
    def size(self, path: str) -> int: ...

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoreEntry]:
        """Every object below the folder `prefix`, sorted by path."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Removes an object; one that is not there is no error."""

    def remove_abandoned(self, prefix: str) -> None:
        """Removes what killed writers left below the folder `prefix`, where the store keeps such things at all."""

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
        """The object's full URL."""
        return f"{self.url}/{_checked(path)}"


def canonical_json(value: Any) -> bytes:
    """Sorted keys, indent 1, a newline at the end: the same value gives the same bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def open_store(url: str) -> Store:
    """Opens `file:///abs/path`, a plain path, or `s3://bucket/prefix`. Touches nothing yet."""
    scheme, colon, _ = url.partition(":")
    if not colon or "/" in scheme:
        if not url:
            raise StoreError("store '': name a path, file:///path or s3://bucket/prefix")
        return FileStore(Path(url))
    if url.startswith("file:///"):
        return FileStore(Path(unquote(url.removeprefix("file://"))))
    if url.startswith("s3://"):
        return S3Store(url)
    raise StoreError(f"store {url!r}: a store is a path, file:///path or s3://bucket/prefix")


def _checked(path: str) -> str:
    if (
        not path
        or path.startswith("/")
        or "\\" in path
        or "\0" in path
        or any(part in ("", ".", "..") for part in path.split("/"))
    ):
        raise StoreError(f"store path {path!r}: it must be relative and stay inside the store")
    if PARTIAL in path:
        raise StoreError(f"store path {path!r}: {PARTIAL!r} marks files being written; take another name")
    return path


def _too_short(uri: str, end: int) -> StoreError:
    return StoreError(f"{uri}: ends before byte {end}; it is not the file that its index describes")


class FileStore(Store):
    """A folder. Objects are written beside their place and renamed into it."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        super().__init__(self.root.as_uri())

    def uri(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(_checked(path))}"

    def local_path(self, path: str) -> Path:
        return self.root / _checked(path)

    def get(self, path: str) -> bytes:
        with self._reading(path):
            return self.local_path(path).read_bytes()

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        with self._reading(path), self.local_path(path).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise _too_short(self.uri(path), offset + length)
        return data

    def put(self, path: str, data: bytes) -> None:
        with self._replacing(path) as file:
            file.write(data)

    def put_file(self, path: str, local: Path) -> None:
        with local.open("rb") as source, self._replacing(path) as file:
            shutil.copyfileobj(source, file, COPY_BYTES)

    def get_file(self, path: str, local: Path) -> None:
        with self._reading(path):
            source = self.local_path(path).open("rb")
        with source, _replaced(local, str(local)) as file:
            shutil.copyfileobj(source, file, COPY_BYTES)

    def size(self, path: str) -> int:
        with self._reading(path):
            target = self.local_path(path)
            status = target.stat()
        if not target.is_file():
            raise StoreNotFound(f"{self.uri(path)}: no such object")
        return status.st_size

    def list(self, prefix: str = "") -> list[StoreEntry]:
        start = self.root / _checked(prefix.rstrip("/")) if prefix else self.root
        entries = []
        for folder, _, names in os.walk(start, onerror=self._cannot_list):
            for name in names:
                if PARTIAL not in name:
                    full = Path(folder, name)
                    try:
                        entries.append(StoreEntry(full.relative_to(self.root).as_posix(), full.stat().st_size))
                    except FileNotFoundError:  # deleted while we listed
                        continue
        return sorted(entries)

    def delete(self, path: str) -> None:
        try:
            self.local_path(path).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreError(f"{self.uri(path)}: cannot be deleted: {error.strerror or error}") from None

    def remove_abandoned(self, prefix: str) -> None:
        for folder, _, names in os.walk(self.root / _checked(prefix.rstrip("/"))):
            for partial in (Path(folder, name) for name in names if name.startswith(PARTIAL)):
                with suppress(OSError):  # another process has removed it, or this one may not: it is in nobody's way
                    if time.time() - partial.stat().st_mtime > ABANDONED_S:
                        partial.unlink()

    def _cannot_list(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those are folders without objects
            raise StoreError(f"{self.url}: {error.filename} cannot be listed: {error.strerror}") from None

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise StoreNotFound(f"{self.uri(path)}: no such object") from None
        except OSError as error:
            raise StoreError(f"{self.uri(path)}: cannot be read: {with_mend(error)}") from None

    def _replacing(self, path: str):
        return _replaced(self.local_path(path), self.uri(path))


@contextmanager
def _replaced(target: Path, shown: str) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` when all of it is on disk; killed before, only a hidden name is left."""
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=PARTIAL, dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, target)
        partial = None
    except OSError as error:
        raise StoreError(f"{shown}: cannot be written: {with_mend(error)}") from None
    finally:
        if partial:
            Path(partial).unlink(missing_ok=True)


class S3Store(Store):
    """A bucket and a prefix, by boto3. Endpoint and credentials come from the environment (AWS_ENDPOINT_URL, ...)."""

    def __init__(self, url: str) -> None:
        parsed = urlparse(url)
        if not parsed.netloc or parsed.query or parsed.fragment:
            raise StoreError(f"store {url!r}: write it as s3://bucket/prefix, without ? and #")
        self.bucket, self.prefix = parsed.netloc, parsed.path.strip("/")
        super().__init__(f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else ""))
        self._made: Any = None
        self._lock = threading.Lock()

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                import boto3
                from botocore.config import Config

                # A session of its own: boto3's default one is not safe for threads, and keeps the first credentials.
                self._made = boto3.session.Session().client(
                    "s3",
                    config=Config(
                        retries={"max_attempts": S3_ATTEMPTS, "mode": "standard"},
                        connect_timeout=10,
                        read_timeout=60,
                        max_pool_connections=32,
                        request_checksum_calculation="when_required",  # not every S3 server knows the others
                        response_checksum_validation="when_required",
                    ),
                )
            return self._made

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{_checked(path)}" if self.prefix else _checked(path)

    def _call(self, path: str, request: Callable[[Any], Any]) -> Any:
        """request(client), with every failure told in one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            return request(self._client())
        except (ClientError, Boto3Error) as error:
            cause = error if isinstance(error, ClientError) else error.__context__  # uploads wrap the cause
            if not isinstance(cause, ClientError):
                raise self._unreachable(cause or error) from None
            raise self._refused(path, cause) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise StoreError(f"{self.url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise self._unreachable(error) from None
        except OSError as error:
            raise StoreError(
                f"{self.url}/{path}: {error.filename or 'local disk'}: {with_mend(error)}"
            ) from None

    def _unreachable(self, error: BaseException) -> StoreError:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the default endpoint"
        return StoreError(
            f"{self.url}: cannot be reached at {endpoint}; mend AWS_ENDPOINT_URL, or start this again when the server is"
            f" back: it goes on ({' '.join(str(error).split())})"
        )

    def _refused(self, path: str, error: Any) -> StoreError:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "NoSuchBucket" or (
            code == "404" and error.operation_name != "HeadBucket" and not self._bucket_is_there()
        ):
            return StoreError(f"{self.url}: there is no bucket {self.bucket!r}; create it, or mend the recipe's store")
        if code in ("404", "NoSuchKey", "NotFound"):
            return StoreNotFound(f"{self.url}/{path}: no such object")
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
            return StoreError(f"{self.url}/{path}: access denied ({code}); check the credentials in the environment")
        return StoreError(f"{self.url}/{path}: {code}: {error.response.get('Error', {}).get('Message', error)}")

    def _bucket_is_there(self) -> bool:
        """A HEAD answers 404 without saying whether the object or its bucket is missing."""
        try:
            self._call("", lambda s3: s3.head_bucket(Bucket=self.bucket))
        except StoreNotFound:
            return False
        except StoreError:  # a user who may read objects only
            return True
        return True

    def _read(self, path: str, **wanted: str) -> bytes:
        """botocore retries requests, not bodies that break off; this does."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        def read(s3: Any) -> bytes:
            for attempt in range(1, S3_ATTEMPTS + 1):
                try:
                    return s3.get_object(Bucket=self.bucket, Key=self._key(path), **wanted)["Body"].read()
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if attempt == S3_ATTEMPTS:
                        raise
                    time.sleep(0.1 * 2**attempt)
            raise AssertionError("not reached")

        return self._call(path, read)

    def get(self, path: str) -> bytes:
        return self._read(path)

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        if length > 0:
            try:
                data = self._read(path, Range=f"bytes={offset}-{offset + length - 1}")
            except StoreNotFound:
                raise
            except StoreError as error:
                raise (_too_short(self.uri(path), offset + length) if "InvalidRange" in str(error) else error) from None
        else:
            self.size(path)
            data = b""
        if len(data) != length:
            raise _too_short(self.uri(path), offset + length)
        return data

    def put(self, path: str, data: bytes) -> None:
        self._call(path, lambda s3: s3.put_object(Bucket=self.bucket, Key=self._key(path), Body=data))

    def put_file(self, path: str, local: Path) -> None:
        """Large files go in parts (boto3's transfer); nothing shows until the last one is there."""
        self._call(path, lambda s3: s3.upload_file(str(local), self.bucket, self._key(path)))

    def get_file(self, path: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        self._call(path, lambda s3: s3.download_file(self.bucket, self._key(path), str(local)))

    def size(self, path: str) -> int:
        return self._call(path, lambda s3: s3.head_object(Bucket=self.bucket, Key=self._key(path)))["ContentLength"]

    def list(self, prefix: str = "") -> list[StoreEntry]:
        folder = "/".join(part for part in (self.prefix, _checked(prefix.rstrip("/")) if prefix else "") if part)
        cut = len(self.prefix) + 1 if self.prefix else 0

        def pages(s3: Any) -> list[StoreEntry]:
            found = s3.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{folder}/" if folder else ""
            )
            objects = (item for page in found for item in page.get("Contents", []))
            # A key that ends in "/" is what consoles and file gateways put for a folder.
            return [StoreEntry(item["Key"][cut:], item["Size"]) for item in objects if not item["Key"].endswith("/")]

        return sorted(self._call(prefix, pages))

    def delete(self, path: str) -> None:
        self._call(path, lambda s3: s3.delete_object(Bucket=self.bucket, Key=self._key(path)))
