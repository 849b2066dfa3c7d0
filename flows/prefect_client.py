"""The client of Prefect's server, for the many short talks of a follower and of a stage that tells its progress."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL


def prefect_client() -> SyncPrefectClient:
    """A client for one `with`. One that lives on would try for a minute to reach a server that has gone, telling nobody.

    Prefect reads a file of certificates for each client, which is two thirds of what a talk costs. The server of this
    machine has no TLS: its client gets a context that knows no certificate, and so trusts none.
    """
    url = urlsplit(PREFECT_API_URL.value() or "")
    own = (url.scheme, url.hostname) == ("http", "127.0.0.1")
    settings = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)} if own else None
    return get_client(httpx_settings=settings, sync_client=True)
