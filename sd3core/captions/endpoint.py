"""Captions from a server with the OpenAI chat interface, as vLLM and SGLang have.

    POST {endpoint}/chat/completions   an image as a data URL and the prompt -> choices[0].message.content

What goes wrong is one of three things. The server is away or busy (no connection, 429, 502, 503, 504): every request waits, with
growing pauses or as long as it says (Retry-After), and only when none has been answered for `retry_s` does the stage stop. The
server refuses everybody (401, 403, 404): the stage stops at once. Or this image's answer is of no use (500, a time-out, a body
cut short, no JSON): it is asked ANSWERS times, then the image goes without a caption; where that befalls one image after
another, it is the server, and the stage stops.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL.Image import Image

from sd3core.captions.api_key import ApiKey
from sd3core.captions.said import Said, caption_seed
from sd3core.errors import DataError, StopStageError
from sd3core.loopback import is_loopback
from sd3core.recipe_caption import CaptionSettings
from sd3core.shown_text import printable, shortened

JPEG_QUALITY = 92
ANSWERS = 4  # that are asked for before an image is given up
FAILED_IN_A_ROW = 16  # images given up without one that was not: then it is the server
AWAY = {429, 502, 503, 504}
REFUSES_ALL = {401: "refuses the key", 403: "refuses the key", 404: "does not know this"}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
CONNECT_S = 10.0
MOST_BYTES = 4 << 20  # of an answer
ERROR_CHARS, REVISION_CHARS = 300, 100  # of what a server says of an error, and of its model
AFTER_IT = "what is captioned stays, and the same command goes on"


class EndpointCaptioner:
    """captioner(key, image) -> what the model said of it; several threads may call it.

    Raises DataError for an image that gets no caption, StopStageError where the server is gone or refuses all.
    """

    def __init__(self, caption: CaptionSettings, in_flight: int, key: ApiKey | None = None) -> None:
        self.caption, self.key = caption, key
        self.base = caption.endpoint.rstrip("/")
        self.free = threading.BoundedSemaphore(in_flight)
        self.lock = threading.Lock()
        self.answered_at = time.monotonic()  # with a caption; at first, when this began
        self.not_before = 0.0  # it asked not to be asked before
        self.failed_in_a_row = 0
        self.gone: StopStageError | None = None
        try:
            self.client = httpx.Client(
                headers={"Authorization": f"Bearer {key.value}"} if key else {},
                timeout=httpx.Timeout(caption.request_timeout_s, connect=min(CONNECT_S, caption.request_timeout_s)),
                limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
                # the environment's proxies are for other machines
                trust_env=not is_loopback(urlsplit(self.base).hostname or ""),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise self._service_error(f"the environment's proxy cannot be used ({error}); mend it") from None

    def check(self) -> None:
        """Whether the server is there, takes the key and has the model, before any image is read. Raises StopStageError."""
        try:
            status, body, _ = self._call("GET", "/models")
        except _Away as error:
            raise self._service_error(f"{error}; start the server, or mend caption.endpoint") from None
        except _NoUse:
            return  # it is there, and need not have this call
        if status in (401, 403):
            raise self._refused(status, body)
        served = _model_names(body) if status == 200 else []
        if served and self.caption.model not in served:
            names = ", ".join(printable(name) for name in served[:5])
            raise self._service_error(f"has no model {self.caption.model!r} (caption.model); it has {names}")

    def __call__(self, key: str, image: Image) -> Said:
        if self.gone:
            raise self.gone
        request = self._request(key, image)
        reason, detail, pauses, asked_since = "", "", _pauses(), time.monotonic()
        for _ in range(ANSWERS):
            try:
                said = self._answer(request)
            except _NoUse as error:
                reason, detail = str(error), error.detail
                if error.final or self._silent(asked_since):
                    break
                time.sleep(next(pauses))
                continue
            with self.lock:
                self.answered_at, self.failed_in_a_row = time.monotonic(), 0
            return said
        with self.lock:
            self.failed_in_a_row += 1
            if self.failed_in_a_row >= FAILED_IN_A_ROW and self.gone is None:
                self.gone = self._service_error(
                    f"no image in {FAILED_IN_A_ROW} got a caption, the last: {reason}{detail}"
                )
        if self.gone:
            raise self.gone
        raise DataError(reason)

    def _silent(self, asked_since: float) -> bool:
        """Whether nothing has been answered for retry_s. Then it is asked for something that costs it nothing: a server that answers
        that is there, and the image at fault; else the stage stops.
        """
        silent = time.monotonic() - max(self.answered_at, asked_since)
        if silent < self.caption.retry_s:
            return False
        try:
            self._call("GET", "/models")
        except (_Away, _NoUse) as error:
            with self.lock:
                self.gone = self.gone or self._service_error(
                    f"{error}; no caption for {silent:.0f} s; see to the server"
                )
        return True

    def _answer(self, request: dict[str, Any]) -> Said:
        """One answer, however long the server is away before it. Raises _NoUse for one that says nothing."""
        pauses = _pauses()
        asked_since = time.monotonic()
        while True:
            if self.gone:
                raise self.gone
            try:
                with self._turn():
                    status, body, headers = self._call("POST", "/chat/completions", request)
                if status not in AWAY:
                    return self._said(status, body)
                problem, asked = f"answers {status}{_words(body)}", _retry_after(headers)
            except _Away as error:
                problem, asked = str(error), None
            with self.lock:
                waited = time.monotonic() - max(self.answered_at, asked_since)
                left = self.caption.retry_s - waited
                if self.gone is None and (left <= 0 or (asked or 0) > left):
                    more = f", and it asks to wait {asked:.0f} s more" if asked else ""
                    self.gone = self._service_error(
                        f"{problem}; no caption for {waited:.0f} s{more} (caption.retry_s {self.caption.retry_s:g}); see to the"
                        " server"
                    )
                pause = max(asked or 0, min(next(pauses), max(left, 0)))
                self.not_before = max(self.not_before, time.monotonic() + pause)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the requests that may be in flight, not before the time that the server named."""
        while (wait := self.not_before - time.monotonic()) > 0 and not self.gone:
            time.sleep(min(wait, 0.5))
        with self.free:
            if self.gone:
                raise self.gone
            yield

    def _call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes, httpx.Headers]:
        """(status, body, headers). Raises _Away where there was no connection, _NoUse where the answer does not end or is too long."""
        deadline = time.monotonic() + self.caption.request_timeout_s
        try:
            with self.client.stream(method, f"{self.base}{path}", json=body) as response:
                parts, size = [], 0
                for part in response.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > MOST_BYTES:
                        raise _NoUse(f"its answer is longer than {MOST_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        raise _NoUse(self._too_slow())
                return response.status_code, b"".join(parts), response.headers
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError) as error:
            raise _Away(f"cannot be reached ({self._hidden(str(error)) or type(error).__name__})") from None
        except httpx.TimeoutException:
            raise _NoUse(self._too_slow()) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _NoUse(
                "its answer broke off", detail=f" ({self._hidden(str(error)) or type(error).__name__})"
            ) from None

    def _too_slow(self) -> str:
        return f"no answer in {self.caption.request_timeout_s:g} s (caption.request_timeout_s)"

    def _request(self, key: str, image: Image) -> dict[str, Any]:
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self.caption.prompt}]
        request = {
            "model": self.caption.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.caption.max_new_tokens,
            "temperature": self.caption.temperature,
        }
        return request | ({"seed": caption_seed(self.caption.seed, key)} if self.caption.temperature else {})

    def _said(self, status: int, body: bytes) -> Said:
        if status in REFUSES_ALL:
            with self.lock:
                self.gone = self.gone or self._refused(status, body)
            raise self.gone
        if status != 200:
            words = self._hidden(_words(body))
            raise _NoUse(f"the server answers {status}{_alike(words)}", final=300 <= status < 500)
        try:
            answer = _parsed(body)
            choice = answer["choices"][0]
            message = choice["message"]
            refusal, finished = message.get("refusal"), choice.get("finish_reason")
            return Said(
                text=_text(message.get("content")) or str(refusal or ""),
                tokens=_tokens(answer.get("usage")),
                cut_off=finished == "length",
                refused=bool(refusal) or finished == "content_filter",
                revision=shortened(printable(str(answer.get("system_fingerprint") or "")), REVISION_CHARS),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            start = self._hidden(shortened(printable(body[:100].decode(errors="replace")), 80))
            raise _NoUse("the server's answer is none of the OpenAI chat interface", detail=f": {start!r}") from None

    def _refused(self, status: int, body: bytes) -> StopStageError:
        if status == 404:
            mend = "caption.model and caption.endpoint"
        elif self.key:
            mend = f"the key in ${self.key.variable} (caption.api_key_env)"
        else:
            mend = "caption.api_key_env, which names no key"
        return self._service_error(f"{REFUSES_ALL[status]} ({status}{_words(body)}); mend {mend}")

    def _service_error(self, problem: str) -> StopStageError:
        return StopStageError(f"caption.endpoint {self.base}: {self._hidden(problem)}; {AFTER_IT}")

    def _hidden(self, words: str) -> str:
        """Without the key, which a server may say again."""
        return words.replace(self.key.value, str(self.key)) if self.key else words


class _Away(Exception):
    """The server could not be asked: nothing is known of the image."""


class _NoUse(Exception):
    """An answer that is no caption. Its words are the reason that images are counted by, so they hold nothing of this one's own,
    which is `detail`. `final`: another answer would be the same.
    """

    def __init__(self, reason: str, detail: str = "", final: bool = False) -> None:
        super().__init__(reason)
        self.detail, self.final = detail, final


def _alike(words: str) -> str:
    """A server's words without what may be another for every image: numbers, and names that have some."""
    return re.sub(r"\S*\d\S*", "#", words)


def _pauses() -> Iterator[float]:
    """Growing ones; no two clients keep step."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that a server asks to wait, which it says as such or by a date (RFC 9110, 10.2.3); None where it does not."""
    said = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _parsed(body: bytes) -> Any:
    """Raises ValueError for what is no JSON."""
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("JSON in JSON without an end") from None


def _words(body: bytes) -> str:
    """What a server says of an error, in a few words."""
    try:
        said = _parsed(body)
        said = said.get("error", said.get("message", said.get("detail", "")))
        said = said.get("message", "") if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        said = body[:ERROR_CHARS].decode(errors="replace")
    words = " ".join(printable(str(said)).split())[:ERROR_CHARS]
    return f": {words}" if words else ""


def _text(content: Any) -> str:
    """Of a message: a string, or parts of which some are text."""
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part.get("type") == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content {type(content).__name__}")
    return content or ""


def _tokens(usage: Any) -> int | None:
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and 0 < count < 2**31 else None


def _model_names(body: bytes) -> list[str]:
    try:
        return [str(model["id"]) for model in _parsed(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []
