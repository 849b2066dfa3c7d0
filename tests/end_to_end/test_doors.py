"""Who can reach the local services: no page of the internet, no other user of the machine."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest
from conftest import described

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMAND = {"name": "x", "flow_id": str(uuid4()), "job_variables": {"command": "touch /tmp/was-here"}}
PATHS = ("flow_runs/", "deployments/", "flow_runs/filter", "work_pools/filter")


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"Origin": "http://page.example"}, 403),
        ({"Origin": "null"}, 403),  # a sandboxed frame, a file
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another program of this machine
        ({"Host": "page.example"}, 400),
        (
            {"Host": "page.example", "Origin": "http://page.example"},
            400,
        ),  # a name that was bound to 127.0.0.1 meanwhile
        ({"Authorization": None}, 401),  # another user
        ({"Authorization": "Basic YWRtaW46cGFzcw=="}, 401),
        ({"Prefect-Csrf-Token": None}, 403),
        ({"Prefect-Csrf-Token": "guessed"}, 403),
        (
            {name: None for name in ("Authorization", "Prefect-Csrf-Token", "Prefect-Csrf-Client")}
            | {"Content-Type": "text/plain"},
            403,
        ),
    ],
)
def test_the_api_refuses(installation, changed, status):
    """The last is what a form sends without asking first. Without any change the same request is answered."""
    headers = installation.authorization() | installation.csrf_token()
    changed = {name: value for name, value in (headers | changed).items() if value is not None}
    for path in PATHS:
        assert httpx.post(f"{installation.ui}/api/{path}", json=COMMAND, headers=changed).status_code == status, path
    assert httpx.post(f"{installation.ui}/api/flow_runs/filter", json={}, headers=headers).status_code == 200


def test_no_other_page_may_read_answers(installation):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    allowed = {
        origin: httpx.options(f"{installation.ui}/api/flow_runs/filter", headers=ask | {"Origin": origin}).headers.get(
            "access-control-allow-origin"
        )
        for origin in ("http://page.example", installation.ui, installation.ui.replace("127.0.0.1", "localhost"))
    }
    assert list(allowed.values()) == [None, *list(allowed)[1:]]


def test_the_password_stands_in_its_file_only(installation):
    secret = installation.password
    assert (installation.home / "prefect" / "password").stat().st_mode & 0o777 == 0o600
    holds = [path for path in installation.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert holds == [installation.home / "prefect" / "password"]
    for process in installation.processes():
        assert secret not in described(process)
    assert secret not in installation.command("sd3", "up", seconds=120)
    assert secret not in installation.ends("sd3", "status")[1]
