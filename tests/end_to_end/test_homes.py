"""Homes with services of their own: beside each other, beside a user's own Prefect, on a taken port, without a record."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from conftest import described
from installation import PROJECT, Installation, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STOPPED = "sd3: stopped; what was finished stays, and nothing that it started is left running"


@pytest.fixture
def fresh() -> Iterator[Installation]:
    yield from closed(Installation())


@pytest.fixture
def second() -> Iterator[Installation]:
    yield from closed(Installation())


def closed(made: Installation) -> Iterator[Installation]:
    try:
        yield made
    finally:
        made.close()


def test_two_homes_that_start_at_once_have_servers_of_their_own(fresh, second):
    """Both look for the same port first."""
    port = free_port()
    for home in (fresh, second):
        (home.home / "services.json").write_text(
            json.dumps({"port": port, "server": None, "worker": None, "deployed": ""})
        )
    with ThreadPoolExecutor() as both:
        list(both.map(lambda home: home.command("sd3", "up", seconds=400), (fresh, second)))
    for home, other in ((fresh, second), (second, fresh)):
        assert home.services["port"] != other.services["port"]
        assert home.server_process().environ()["SD3_HOME"] == str(home.home)
        assert {
            c.laddr.port for c in home.server_process().net_connections("inet") if c.status == psutil.CONN_LISTEN
        } == {home.services["port"]}
        assert home.api("work_pools/filter")  # it takes this home's password
        assert httpx.get(f"{home.ui}/api/version", headers=other.authorization()).status_code == 401
    assert port in (fresh.services["port"], second.services["port"])


def test_a_users_own_prefect_and_other_runs_of_the_server_are_left_alone(fresh, tmp_path):
    """`up` and `down` from another folder, behind a proxy that answers nobody, in a shell that names the user's own database."""
    own = tmp_path / "own.db"
    fresh.environment |= {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{own}",
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
        "PREFECT_PROFILE": "mine",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
        "NO_PROXY": "",
    }
    (tmp_path / ".env").write_text(f"PREFECT_SERVER_DATABASE_CONNECTION_URL=sqlite+aiosqlite:///{own}\n")

    def sd3(*arguments: str) -> str:
        done = subprocess.run(
            ["sd3", *arguments],
            cwd=tmp_path,
            env=fresh.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, fresh.story(f"{arguments} ended with {done.returncode}", done.stdout + done.stderr)
        return done.stdout

    assert f"{PROJECT}/.venv/bin/sd3 env" in sd3("up")
    assert f"server: answers at {fresh.ui}" in sd3("status")
    assert not own.exists()

    for proxied in ("HTTP_PROXY", "http_proxy"):  # the test's own client follows them as well
        os.environ.pop(proxied, None)
    flow = fresh.api("flows/", name="pipeline")["id"]
    fresh.api("work_pools/", name="theirs", type="process")
    deployments = [
        fresh.api(
            "deployments/", flow_id=flow, name=name, tags=["sd3"], path=path, entrypoint="a.py:b", work_pool_name=pool
        )["id"]
        for name, path, pool in (("a", "/elsewhere", "local"), ("b", str(fresh.home / "prefect"), "theirs"))
    ]
    runs = {}
    for deployment in (*deployments, None):
        for state in ("SCHEDULED", "RUNNING"):
            run = fresh.api("flow_runs/", flow_id=flow, deployment_id=deployment, state={"type": state})["id"]
            runs[run] = state
    psutil.Process(fresh.services["worker"]["pid"]).kill()
    sd3("up")  # without a worker what one had taken is dead

    def states() -> dict[str, str]:
        with sqlite3.connect(f"file:{fresh.home}/prefect/prefect.db?mode=ro", uri=True) as database:
            found = dict(database.execute("SELECT id, state_type FROM flow_run"))
        return {run: found[run] for run in runs}

    assert states() == runs
    said = sd3("down")
    assert not re.search("cancelled|ending", said), said
    assert states() == runs
    assert not own.exists()


def test_a_server_that_nobody_wrote_down_is_found(fresh):
    """`up` was killed just after it had started one, or the record was lost."""
    fresh.command("sd3", "up", seconds=400)
    server, worker = fresh.services["server"], fresh.services["worker"]
    for record in ("", json.dumps(fresh.services | {"server": None, "worker": None})):
        (fresh.home / "services.json").write_text(record)
        fresh.command("sd3", "up", seconds=200)
        assert (fresh.services["server"], fresh.services["worker"]) == (server, worker)
    (fresh.home / "services.json").unlink()
    printed = fresh.command("sd3", "down", seconds=90)
    assert printed.splitlines()[-2:] == ["worker: stopped", "server: stopped"] and not fresh.processes()


def test_a_database_that_is_damaged_is_named(fresh):
    (fresh.home / "prefect").mkdir()
    (fresh.home / "prefect" / "prefect.db").write_bytes(b"no database" * 1000)
    code, printed = fresh.ends("sd3", "up", seconds=200)
    assert code == 1 and "Traceback" not in printed
    assert re.search(
        r"ended while starting: .*file is not a database \(all of it: .*/server.log\)$", printed.strip()
    ), printed


def test_while_services_start_on_a_port_that_is_taken(fresh):
    """The server takes another port and says so; Ctrl-C leaves nothing of what was being started."""
    port = fresh.services["port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        code, printed = fresh.interrupted(["sd3", "up"], "waiting for the Prefect server")
    assert printed.startswith(f"port {port} is taken by another program; the server takes {fresh.services['port']}\n")
    assert (code, printed.splitlines()[-1]) == (130, STOPPED), printed
    assert not fresh.processes(), [described(process) for process in fresh.processes()]
    for moment in ("deployments: writing", "waiting for the Prefect worker"):
        code, printed = fresh.interrupted(["sd3", "up"], moment)
        assert (code, printed.splitlines()[-1]) == (130, STOPPED), printed
        assert not fresh.processes(), [described(process) for process in fresh.processes()]
