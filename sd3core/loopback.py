"""Keeps talks between processes of one machine off a user's HTTP proxy."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NO_PROXY_NAMES = ("NO_PROXY", "no_proxy")  # some programs read the one, some the other


def direct_loopback(environ: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY with the loopback addresses beside what the user has in it; the proxy stays for all other addresses."""
    user = [entry.strip() for name in NO_PROXY_NAMES for entry in environ.get(name, "").split(",") if entry.strip()]
    entries = ["*"] if "*" in user else list(dict.fromkeys([*user, *LOOPBACK]))
    return {name: ",".join(entries) for name in NO_PROXY_NAMES}


def keep_loopback_direct() -> None:
    """Keeps loopback direct for this process and those it starts. Call before clients are made: they read the environment once."""
    os.environ.update(direct_loopback(os.environ))


def is_loopback(host: str) -> bool:
    """Whether a URL's host is this machine itself, which no proxy can reach."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
