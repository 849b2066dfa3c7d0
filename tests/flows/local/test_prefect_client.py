"""The client trusts no certificate only where there is no TLS: towards this machine's own server."""

from __future__ import annotations

import ssl

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.local.prefect_client import prefect_client


@pytest.mark.parametrize(
    ("url", "certificates"),
    [
        ("http://127.0.0.1:4200/api", False),
        ("http://prefect.internal:4200/api", True),  # it may send on to https
        ("https://127.0.0.1/api", True),
    ],
)
def test_other_servers_are_checked_by_the_known_certificates(monkeypatch, url, certificates):
    contexts = []
    create = ssl.create_default_context

    def default(*args, **kwargs):
        contexts.append(create(*args, **kwargs))
        return contexts[-1]

    monkeypatch.setattr(ssl, "create_default_context", default)
    with temporary_settings({PREFECT_API_URL: url}):
        with prefect_client():
            pass
    assert bool(contexts) is certificates


def test_this_machines_server_is_reached_past_a_proxy(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # what httpx cannot speak
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}), prefect_client() as client:
        assert client._client._mounts == {}


def test_the_token_for_writing_is_asked_for_once(monkeypatch):
    """Each client of Prefect's would ask anew, and each answer is a row that the server writes."""
    asked = []

    def answer(self, request, **_):
        asked.append(
            (request.url.path, request.headers.get("Prefect-Csrf-Token"), request.headers.get("Prefect-Csrf-Client"))
        )
        token = {"token": "a token", "client": "c", "expiration": "2999-01-01T00:00:00Z"}
        return httpx.Response(200, json=token if "csrf" in request.url.path else [], request=request)

    monkeypatch.setattr(httpx.Client, "send", answer)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4201/api"}):
        for _ in range(3):
            with prefect_client() as client:
                client._client.post("/flow_runs/filter", json={})
    paths, tokens, clients = zip(*asked, strict=True)
    assert paths == ("/api/csrf-token", *["/api/flow_runs/filter"] * 3)
    assert tokens[1:] == ("a token",) * 3 and len({*clients[1:]}) == 1
