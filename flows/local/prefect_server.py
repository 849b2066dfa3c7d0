"""Runs this home's Prefect server on a socket that listens already.

`python -m flows.local.prefect_server FD`.

Whoever starts it has taken the port, so that no two servers can both believe to have it. Prefect's own app is kept as it is;
around it stands a guard, since pages of the internet reach loopback through a user's browser, under names of their own choice.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from flows.local.prefect_environment import own_origins

OWN_HOSTS = ["127.0.0.1", "localhost"]
ENDED_EARLY = 3  # uvicorn's exit code for a start that failed


class OwnPagesOnly:
    """Refuses what a page of another origin sends, also what a browser sends without asking first.

    Requests without an origin are no page's. A page that is opened through a tunnel has another port: its origin is its host.
    """

    def __init__(self, app: Any, port: int) -> None:
        self.app, self.port = app, port

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and origin not in (f"http://{headers.get('host')}", *own_origins(self.port)):
                await PlainTextResponse("a page of another origin", status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def guarded(app: Any, port: int) -> Any:
    """The app, for callers that name this machine as the host and for its own pages only."""
    return TrustedHostMiddleware(OwnPagesOnly(app, port), allowed_hosts=OWN_HOSTS, www_redirect=False)


def serve() -> None:
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    listening = socket.socket(fileno=int(sys.argv[1]))
    settings = get_current_settings().server
    config = uvicorn.Config(
        guarded(create_app(final=True), listening.getsockname()[1]),
        timeout_keep_alive=settings.api.keepalive_timeout,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
        log_level=settings.logging_level.lower(),
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    if not server.started:
        sys.exit(ENDED_EARLY)


if __name__ == "__main__":
    serve()
