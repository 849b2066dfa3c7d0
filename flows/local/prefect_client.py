"""Opens the client of Prefect's server, for many short talks."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL

AT_ONCE = 200  # of what a server has it hands out so many
CSRF = ("csrf_client_id", "csrf_token", "csrf_token_expiration")
_tokens: dict[str, dict[str, Any]] = {}  # of each server, kept for the clients to come


@contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """A client for one `with`. One that lives on would try for a minute to reach a server that has gone, telling nobody.

    Prefect reads a file of certificates for each client, which is two thirds of what a talk costs. The server of this
    machine has no TLS: its client gets a context that knows no certificate, and so trusts none; and it goes through no proxy. The
    token that a server wants before it lets a client write (CSRF) is asked for once, not by every client.
    """
    api = PREFECT_API_URL.value() or ""
    url = urlsplit(api)
    own = (url.scheme, url.hostname) == ("http", "127.0.0.1")
    settings = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "trust_env": False} if own else None
    with get_client(httpx_settings=settings, sync_client=True) as client:
        connection = client._client  # private: Prefect has no other way to it
        for name, value in _tokens.get(api, {}).items():
            setattr(connection, name, value)
        try:
            yield client
        finally:
            _tokens[api] = {name: getattr(connection, name) for name in CSRF}


def read_whole(read: Callable[[int], list[Any]]) -> list[Any]:
    """All that the server has; `read` asks for AT_ONCE from an offset on."""
    found = read(0)
    while found and len(found) % AT_ONCE == 0 and (more := read(len(found))):
        found += more
    return found
