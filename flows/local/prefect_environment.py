"""Settings of Prefect for this home's processes, and which must not reach them.

Prefect takes settings from the environment, from `.env`, `prefect.toml` and `pyproject.toml` in the current folder, and from a
profile. A user's own Prefect may be named in any of them: the services are started without the shell's, in a folder of their own.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from flows.local.home import ensure, home, local_command, private_folder, write_whole
from sd3core.errors import UserError
from sd3core.loopback import direct_loopback

# of the shell: they change no more than what is logged
KEPT = (
    "PREFECT_LOGGING_LEVEL",
    "PREFECT_SERVER_LOGGING_LEVEL",
)


def prefect_folder() -> Path:
    """PREFECT_HOME, and the folder in which Prefect's processes start: it holds no settings of anybody else's."""
    return private_folder(ensure(home()) / "prefect")


def password() -> str:
    """What the server of this home asks for, made when it is first needed. Only this user can read its file."""
    path = prefect_folder() / "password"
    with contextlib.suppress(FileNotFoundError):
        if found := path.read_text().strip():
            return found
    write_whole(path, secrets.token_urlsafe(24), mode=0o600)
    return path.read_text().strip()


def basic_authorization() -> str:
    """The header that the server asks for."""
    return f"Basic {base64.b64encode(password().encode()).decode()}"


def own_origins(port: int) -> list[str]:
    """Origins of the pages that may talk to the server: those that it serves itself."""
    return [f"http://127.0.0.1:{port}", f"http://localhost:{port}"]


def client_settings(port: int) -> dict[str, str]:
    """What a Prefect command, worker or flow needs to talk to the server at this port and to nothing else."""
    return {
        "PREFECT_HOME": str(prefect_folder()),
        "PREFECT_PROFILES_PATH": str(prefect_folder() / "profiles.toml"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_API_AUTH_STRING": password(),
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_RUNNER_SERVER_ENABLE": "false",
        # a person waits for the first stage; but each look costs the server 30 ms, also while a model trains beside it
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "SD3_HOME": str(home()),
        **direct_loopback(os.environ),
    }


# What Prefect's server looks for every 5 to 15 s, and a third of what an idle one costs: late runs, pauses that expire,
# schedules that were just changed, leases that nobody holds any more.
LOOKED_FOR_SELDOM = (
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "SCHEDULER_RECENT_DEPLOYMENTS",
    "REPOSSESSOR",
    "CLEANUP_RECONCILER",
)


def server_settings(port: int) -> dict[str, str]:
    """Settings of the server itself: it asks for the password, and for a token that other pages cannot get (CSRF)."""
    return client_settings(port) | {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING": password(),
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ",".join(own_origins(port)),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url(),
        **{f"PREFECT_SERVER_SERVICES_{name}_LOOP_SECONDS": "30" for name in LOOKED_FOR_SELDOM},
    }


def database_url() -> str:
    """The file where Prefect puts it by itself, as a URL is to name it: SQLAlchemy unquotes %20 and cuts at a ?."""
    return f"sqlite+aiosqlite:///{quote(os.fsencode(prefect_folder() / 'prefect.db'))}"


def check_proxies() -> None:
    """UserError for a proxy of a kind that Prefect's HTTP client refuses to begin with, also for what would not go through it."""
    for name in (
        name for scheme in ("HTTP", "HTTPS", "ALL") for name in (f"{scheme}_PROXY", f"{scheme}_proxy".lower())
    ):
        if os.environ.get(name, "").lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise UserError(
                f"{name}: Prefect's client knows no SOCKS proxies; unset it here, or `{local_command('python')} -m pip install socksio`"
            )


def shells_own(environ: Mapping[str, str]) -> list[str]:
    """Prefect's settings of the shell, which the services do not take. Prefect reads them in any case of letters."""
    return [name for name in environ if name.upper().startswith("PREFECT_") and name not in KEPT]


def with_settings(settings: dict[str, str]) -> dict[str, str]:
    """This process's environment with these settings instead of the shell's."""
    foreign = set(shells_own(os.environ))
    return {name: value for name, value in os.environ.items() if name not in foreign} | settings


def use_settings(settings: dict[str, str]) -> None:
    """Points this process's Prefect client by these settings. Prefect reads them once, also from the current folder: for that
    moment it is a folder of ours.
    """
    for name in shells_own(os.environ):
        del os.environ[name]
    os.environ.update(settings)
    with _in_folder(prefect_folder()):
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


@contextlib.contextmanager
def _in_folder(folder: Path):
    """The folder before may be gone: then there is nothing to go back to."""
    try:
        before = os.open(".", os.O_RDONLY)
    except OSError:
        before = None
    os.chdir(folder)
    try:
        yield
    finally:
        if before is not None:
            os.chdir(before)
            os.close(before)
