"""What the services take of a shell, and what they do not: a user's own Prefect may be named there."""

from __future__ import annotations

import os
import subprocess
import sys

import httpx
import pytest

from flows.local import prefect_environment
from flows.local.prefect_environment import client_settings, password, server_settings, shells_own, with_settings
from sd3core.errors import UserError

OTHERS = "sqlite+aiosqlite:////tmp/somebody-elses.db"


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_home_has_one_password_that_only_its_user_can_read(own_home):
    assert password() == password() and len(password()) >= 32
    file = own_home / "prefect" / "password"
    assert file.read_text() == password()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    file.write_text("")  # of a machine that lost its power while it was written
    assert len(password()) >= 32


def test_homes_have_different_passwords(monkeypatch, tmp_path):
    first = password()
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "another"))
    assert password() != first


def test_nothing_of_the_shells_prefect_is_taken(monkeypatch):
    for name in (
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "prefect_api_key",
        "PREFECT_PROFILE",
        "PREFECT__FLOW_RUN_ID",
    ):
        monkeypatch.setenv(name, OTHERS)
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    taken = with_settings(server_settings(4321))
    assert OTHERS not in taken.values() and "PREFECT_LOGGING_LEVEL" in taken
    assert {name for name in taken if name.upper().startswith("PREFECT_")} == {
        "PREFECT_LOGGING_LEVEL",
        *(name for name in server_settings(4321) if name.startswith("PREFECT_")),
    }
    assert "PREFECT_LOGGING_LEVEL" not in shells_own(os.environ)


def test_the_password_is_no_setting_of_the_server_in_its_clients():
    assert client_settings(1)["PREFECT_API_AUTH_STRING"] == password()
    assert "PREFECT_SERVER_API_AUTH_STRING" not in client_settings(1)


SHOWN = """
import os
from flows.local.prefect_environment import use_settings, client_settings
use_settings(client_settings(4321))
from prefect.settings import get_current_settings
settings = get_current_settings()
print(settings.server.database.connection_url.get_secret_value(), settings.api.url, settings.api.key, settings.logging.level, os.getcwd())
"""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".env", f"PREFECT_SERVER_DATABASE_CONNECTION_URL={OTHERS}\nPREFECT_API_KEY=pnu_x\n"),
        ("prefect.toml", f'[server.database]\nconnection_url = "{OTHERS}"\n[api]\nkey = "pnu_x"\n'),
        (
            "pyproject.toml",
            f'[tool.prefect.server.database]\nconnection_url = "{OTHERS}"\n[tool.prefect.api]\nkey = "pnu_x"\n',
        ),
        (
            "profiles.toml",
            f'active = "theirs"\n[profiles.theirs]\nPREFECT_SERVER_DATABASE_CONNECTION_URL = "{OTHERS}"\n',
        ),
        ("environment", ""),
    ],
)
def test_a_process_with_our_settings_reads_no_others(tmp_path, own_home, file, content):
    """In a real process, in a folder with each of the files that Prefect reads."""
    (tmp_path / file).write_text(content)
    shell = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": OTHERS} if file == "environment" else {}
    if file == "profiles.toml":
        shell = {"PREFECT_HOME": str(tmp_path), "PREFECT_PROFILE": "theirs"}
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], cwd=tmp_path, env=os.environ | shell, capture_output=True, text=True, check=True
    )
    database, api, key, _, folder = done.stdout.split()
    assert database == f"sqlite+aiosqlite:///{own_home}/prefect/prefect.db"
    assert (api, key, folder) == ("http://127.0.0.1:4321/api", "None", str(tmp_path))


def test_a_folder_that_is_gone_is_no_hindrance(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with prefect_environment._in_folder(tmp_path):
        assert os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_a_socks_proxy_is_told_before_anything_starts(monkeypatch, name):
    """httpx raises for it as a client is made, whatever NO_PROXY has."""
    prefect_environment.check_proxies()
    monkeypatch.setenv(name, "socks5h://user:secret@127.0.0.1:9")
    with pytest.raises(ImportError):
        httpx.Client()
    with pytest.raises(UserError, match=f"^{name}: Prefect's client knows no SOCKS proxies; unset it here") as told:
        prefect_environment.check_proxies()
    assert "secret" not in str(told.value)


def test_the_services_and_the_demo_are_there_before_prefect_is():
    """Its settings are chosen before it is imported: else a user's own .env or profile ends every command."""
    look = "import sys, flows.cli.commands, flows.cli.demo, flows.local.services; sys.exit('prefect' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
