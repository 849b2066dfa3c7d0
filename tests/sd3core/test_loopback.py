"""A proxy of the user's is for other machines: each client library is asked where it would send a request."""

from __future__ import annotations

import urllib.request

import httpx
import pytest
import websockets.proxy
from botocore.utils import get_environ_proxies

from sd3core.loopback import direct_loopback, keep_loopback_direct

PROXY = "http://proxy.example:3128"


@pytest.fixture(autouse=True)
def proxied(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("HTTPS_PROXY", PROXY)


def through_proxy(url: str) -> set[bool]:
    """By httpx, botocore, websockets and the standard library, which Ray's and others' clients follow."""
    client = httpx.Client()
    by_httpx = client._transport_for_url(httpx.URL(url)) is not client._transport
    by_websockets = websockets.proxy.get_proxy(websockets.uri.parse_uri(url.replace("http", "ws", 1))) is not None
    host = httpx.URL(url).host
    return {by_httpx, by_websockets, bool(get_environ_proxies(url)), not urllib.request.proxy_bypass(host)}


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200"])
def test_loopback_goes_through_no_proxy(host):
    before = through_proxy(f"http://{host}/api")
    assert True in before
    keep_loopback_direct()
    assert through_proxy(f"http://{host}/api") == {False}


@pytest.mark.parametrize("user", ["", "intranet.example", "10.0.0.1, intranet.example"])
def test_the_proxy_stays_for_all_else(monkeypatch, user):
    monkeypatch.setenv("NO_PROXY", user)
    keep_loopback_direct()
    for url in ("http://s3.example/bucket", "https://s3.example/bucket"):
        assert through_proxy(url) == {True}
    assert through_proxy("http://intranet.example/") == {"intranet" not in user}


def test_what_the_user_has_stays_and_is_not_repeated():
    once = direct_loopback({"NO_PROXY": "a,127.0.0.1", "no_proxy": "b"})
    assert once == dict.fromkeys(("NO_PROXY", "no_proxy"), "a,127.0.0.1,b,localhost,::1")
    assert direct_loopback(once) == once
    assert direct_loopback({"NO_PROXY": "*"})["no_proxy"] == "*"
