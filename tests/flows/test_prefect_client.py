"""The client trusts no certificate only where there is no TLS: towards this machine's own server."""

from __future__ import annotations

import ssl

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.prefect_client import prefect_client


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
        prefect_client()
    assert bool(contexts) is certificates
