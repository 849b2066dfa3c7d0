"""A store in an S3 bucket; the only file that imports boto3."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from sd3core.data.store.contract import Store, StoreDenied, StoreEntry, StoreNotFound, checked, too_short
from sd3core.errors import StoreError, with_mend

ABANDONED_UPLOAD_S = 24 * 3600  # an upload that began so long ago has lost its writer
READ_TIMEOUT_S = 60  # without a byte
S3_ATTEMPTS = 5  # of one request, by botocore, and of one body that breaks off


class _CutShort(Exception):
    """An answer that broke off. Before its body, botocore takes it for an empty one: a listing of nothing, an object of no bytes."""


def _check_whole(http_response: Any, model: Any, **_: Any) -> None:
    """Called by botocore after each request. A whole answer says how long its body is, and has a body of that length; an
    object's, which is read later, botocore compares itself.
    """
    if http_response.status_code not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return
    headers, length = http_response.headers, http_response.headers.get("content-length")
    # a body may also go on to the connection's end, where that is announced
    to_its_end = "transfer-encoding" in headers or headers.get("connection", "").lower() == "close"
    if model.http["method"] == "HEAD":
        whole = length is not None or model.name == "HeadBucket"  # of a bucket there is no length to tell
    elif model.has_streaming_output:
        whole = length is not None or to_its_end
    elif length is not None:
        whole = len(http_response.content) == int(length)
    else:
        whole = to_its_end and (model.http["method"] != "GET" or bool(http_response.content))
    if not whole:
        raise _CutShort("the answer was cut short")


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

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.url,)

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
                        read_timeout=READ_TIMEOUT_S,
                        max_pool_connections=32,
                        request_checksum_calculation="when_required",  # not every S3 server knows the others
                        response_checksum_validation="when_required",
                    ),
                )
                self._made.meta.events.register("after-call.s3", _check_whole)
            return self._made

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{checked(path)}" if self.prefix else checked(path)

    def _call(self, path: str, request: Callable[[Any], Any]) -> Any:
        """request(client), with every failure told in one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from botocore.parsers import ResponseParserError

        try:
            for attempt in range(1, S3_ATTEMPTS + 1):
                try:
                    return request(self._client())
                except (_CutShort, ResponseParserError) as error:  # the latter: XML that ends in its middle
                    if attempt == S3_ATTEMPTS:
                        raise self._unreachable(error) from None
                    time.sleep(0.1 * 2**attempt)
            raise AssertionError("not reached")
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
            raise StoreError(f"{self.url}/{path}: {error.filename or 'local disk'}: {with_mend(error)}") from None

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
            # a HEAD says 403 to wrong credentials, too
            kind = StoreDenied if code in ("403", "AccessDenied") else StoreError
            return kind(f"{self.url}/{path}: access denied ({code}); check the credentials in the environment")
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
        """botocore retries requests, not bodies that break off; `_call` does."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        def read(s3: Any) -> bytes:
            try:
                return s3.get_object(Bucket=self.bucket, Key=self._key(path), **wanted)["Body"].read()
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError) as error:
                raise _CutShort(" ".join(str(error).split())) from None

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
                raise (too_short(self.uri(path), offset + length) if "InvalidRange" in str(error) else error) from None
        else:
            self.size(path)
            data = b""
        if len(data) != length:
            raise too_short(self.uri(path), offset + length)
        return data

    def put(self, path: str, data: bytes) -> None:
        self._call(path, lambda s3: s3.put_object(Bucket=self.bucket, Key=self._key(path), Body=data))

    def put_file(self, path: str, local: Path) -> None:
        """Large files go in parts (boto3's transfer); nothing shows until the last one is there."""
        self._call(path, lambda s3: s3.upload_file(str(local), self.bucket, self._key(path)))

    def get_file(self, path: str, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        self._call(path, lambda s3: s3.download_file(self.bucket, self._key(path), str(local)))

    def version(self, path: str) -> tuple[int, str]:
        head = self._call(path, lambda s3: s3.head_object(Bucket=self.bucket, Key=self._key(path)))
        return head["ContentLength"], head["ETag"]

    def entry(self, path: str) -> StoreEntry:
        head = self._call(path, lambda s3: s3.head_object(Bucket=self.bucket, Key=self._key(path)))
        return StoreEntry(path, head["ContentLength"], head["LastModified"].timestamp(), head["ETag"])

    def now(self) -> float:
        answer = self._call("", lambda s3: s3.head_bucket(Bucket=self.bucket))["ResponseMetadata"]
        date = answer["HTTPHeaders"].get("date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def list(self, prefix: str = "") -> list[StoreEntry]:
        folder = self._folder(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0

        def pages(s3: Any) -> list[StoreEntry]:
            found = s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            objects = (item for page in found for item in page.get("Contents", []))
            # A key that ends in "/" is what consoles and file gateways put for a folder.
            return [
                StoreEntry(item["Key"][cut:], item["Size"], item["LastModified"].timestamp(), item.get("ETag", ""))
                for item in objects
                if not item["Key"].endswith("/")
            ]

        return sorted(self._call(prefix, pages))

    def folders(self, prefix: str = "") -> list[str]:
        folder = self._folder(prefix)

        def pages(s3: Any) -> list[str]:
            found = s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder, Delimiter="/")
            below = (item["Prefix"] for page in found for item in page.get("CommonPrefixes", []))
            return [name for prefix in below if (name := prefix[len(folder) : -1])]

        return sorted(self._call(prefix, pages))

    def _folder(self, prefix: str) -> str:
        """What the keys below a folder of the store begin with."""
        parts = (self.prefix, checked(prefix.rstrip("/")) if prefix else "")
        return "".join(f"{part}/" for part in parts if part)

    def delete(self, path: str) -> None:
        self._call(path, lambda s3: s3.delete_object(Bucket=self.bucket, Key=self._key(path)))

    def remove_abandoned(self, prefix: str) -> None:
        """Parts of an upload whose writer was killed are no object, and are paid for."""

        def abort(s3: Any) -> None:
            listed = s3.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=f"{self._key(prefix.rstrip('/'))}/"
            )
            for upload in [upload for page in listed for upload in page.get("Uploads", [])]:
                if time.time() - upload["Initiated"].timestamp() > ABANDONED_UPLOAD_S:
                    s3.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

        with suppress(StoreError):  # a user who may not: they are in nobody's way
            self._call(prefix, abort)
