from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from uuid import uuid4

import psutil
import pytest

from flows.local import home, services
from flows.local.processes import Process
from flows.local.services import ServiceError, Services
from sd3core.errors import UserError


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    return tmp_path


def test_services_are_read_as_they_were_written(own_home):
    assert Services.load() is None
    written = Services(port=4321, server=Process(1, 25, "a boot"), worker=None, deployed="abc")
    written.save()
    assert Services.load() == written
    assert [path.name for path in own_home.iterdir()] == ["services.json"]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"port": 4321}', '{"port": "x", "server": 3, "worker": null, "deployed": ""}']
)
def test_a_damaged_record_is_made_again_from_the_processes(own_home, monkeypatch, damage):
    (own_home / "services.json").write_text(damage)
    assert Services.load() == Services(port=services.FIRST_PORT)
    script = "import time; time.sleep(60)"  # a server and a worker as they are started, seen from outside
    monkeypatch.setattr(services, "SERVER", ("-c", script, "server"))
    monkeypatch.setattr(services, "WORKER", ("-c", script, "worker"))
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", "4999")
    started = [subprocess.Popen([sys.executable, "-c", script, name]) for name in ("server", "worker")]
    another = subprocess.Popen([sys.executable, "-c", script, "server"], env=dict(os.environ, SD3_HOME="/another/home"))
    try:
        assert Services.load() == Services(4999, *(Process.of(each.pid) for each in started))
    finally:
        for each in (*started, another):
            each.kill()
            each.wait()


def test_services_of_a_version_before_are_read_as_such(own_home, child):
    """Its records hold the time of day at which a process began."""
    server = {"pid": child.pid, "born": psutil.Process(child.pid).create_time()}
    (own_home / "services.json").write_text(
        json.dumps({"port": 4321, "server": server, "worker": None, "deployed": "abc"})
    )
    assert Services.load() == Services(4321, Process.of(child.pid), None, "abc", format=1)


def test_a_server_of_a_version_before_is_replaced_but_not_under_runs_at_work(monkeypatch, child):
    monkeypatch.setattr(services, "server_answers", lambda found: True)
    monkeypatch.setattr(services, "use", lambda found: None)
    runs = SimpleNamespace(unfinished_runs=lambda: [SimpleNamespace(name="pipeline mini")])
    monkeypatch.setitem(sys.modules, "flows.local.runs", runs)
    found, said = Services(4321, Process.of(child.pid), format=1), []
    with pytest.raises(
        ServiceError,
        match=r"older version and have 1 run at work \(pipeline mini\); wait for it, or `.venv/bin/sd3 down`",
    ):
        services._end_an_older_server(found, said.append)
    assert found.server.alive() and found.format == 1
    runs.unfinished_runs = list
    services._end_an_older_server(found, said.append)
    assert said == ["the services of an older version are replaced"] and not found.server.alive()


def test_commands_talk_to_the_services_and_to_nothing_else(own_home, monkeypatch):
    written = Services(port=4321)
    assert services.environment(written)["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert services.environment(written)["PREFECT_HOME"] == str(own_home / "prefect")


def test_a_port_is_held_from_the_moment_it_is_chosen():
    with services._take_port(services.FIRST_PORT) as first, services._take_port(services.FIRST_PORT) as second:
        ports = [listening.getsockname()[1] for listening in (first, second)]
        assert ports[0] < ports[1]
        with socket.socket() as bound:  # a program that looks for a free port the same way, and is as fast
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="Address already in use"):
                bound.bind(("127.0.0.1", ports[0]))
    with services._take_port(ports[0]) as again:
        assert again.getsockname()[1] == ports[0]


def test_no_free_port_is_an_error_that_says_so(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(services, "FIRST_PORT", port)
        monkeypatch.setattr(services, "PORTS_TRIED", 1)
        with pytest.raises(ServiceError, match=f"^ports {port} to {port} are all taken; free one of them$"):
            services._take_port(port)


def test_services_that_do_not_answer_are_named_with_the_mend():
    with pytest.raises(ServiceError, match="not running; start them with `.venv/bin/sd3 up`$"):
        services.require()
    Services(port=1).save()  # nobody listens there
    with pytest.raises(ServiceError, match="not running; start them with `.venv/bin/sd3 up`$"):
        services.require()


@pytest.fixture
def strangers_server():
    """Another program, or another installation's server, that answers as healthy."""

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_server_of_somebody_else_on_the_remembered_port_is_not_taken_for_ours(monkeypatch, child, strangers_server):
    assert services.server_answers(Services(strangers_server, server=Process.of(child.pid)))
    child.kill()
    child.wait()
    monkeypatch.setitem(sys.modules, "flows.local.runs", None)  # whoever asks that server for runs fails
    Services(strangers_server, server=Process(child.pid, 1, "")).save()
    with pytest.raises(ServiceError, match="not running"):
        services.require()
    said = []
    services.stop_services(said.append)
    assert said == ["worker: was not running", "server: was not running"]


def test_a_server_whose_port_was_lost_takes_another_and_says_so(monkeypatch, strangers_server):
    spawned = []
    monkeypatch.setattr(services, "_spawn", lambda *arguments: spawned.append(arguments) or Process(1, 1, ""))
    monkeypatch.setattr(services, "_wait", lambda *_: None)
    found, said = Services(strangers_server, format=1), []
    services._start_server(found, said.append)
    assert found.port != strangers_server and found.format == services.SERVICES_FORMAT
    assert said == [f"port {strangers_server} is taken by another program; the server takes {found.port}"]
    assert spawned[0][1]["PREFECT_SERVER_API_PORT"] == str(found.port)


@pytest.mark.parametrize(
    "asks", [{}, {"PREFECT_API_URL": "http://127.0.0.1:1/api"}, {"PREFECT_API_AUTH_STRING": "of before"}]
)
def test_a_worker_that_asks_another_server_is_stopped(asks):
    found = Services(4321)
    script = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(script, env=os.environ | services.environment(found) | asks) as worker:
        found.worker, said = Process.of(worker.pid), []
        while not found.worker.environment():  # the system shows it a moment after the program has begun
            time.sleep(0.01)
        services._end_a_worker_of_another_server(found, said.append)
        assert found.worker.alive() != bool(asks)
        assert [line[:50] for line in said] == ["worker: stopped, since it asks another server; it "] * bool(asks)
        worker.kill()


def test_a_second_command_says_what_it_waits_for(own_home):
    said = []
    with home.one_at_a_time("up", said.append):
        other = threading.Thread(target=lambda: home.one_at_a_time("up", said.append).__enter__())
        other.start()
        other.join(0.5)
        assert said == [f"waiting for another command, which holds {own_home}/up.lock"] and other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_down_where_nothing_was_started():
    said = []
    services.stop_services(said.append)
    assert said == ["services: none were started here"]


def test_down_says_which_runs_it_ends_before_it_does(monkeypatch):
    run, ended = SimpleNamespace(name="pipeline mini", id=uuid4()), []
    runs = SimpleNamespace(
        cancel_waiting_runs=list,
        unfinished_runs=lambda: [run],
        cancel_run=lambda run_id, reason: ended.append((run_id, reason)),
    )
    monkeypatch.setitem(sys.modules, "flows.local.runs", runs)
    monkeypatch.setattr(services, "server_answers", lambda found: True)
    monkeypatch.setattr(services, "use", lambda found: None)
    swept = []
    monkeypatch.setattr(services, "remove_dead_sessions", lambda: swept.append(True))
    Services(port=1).save()
    said = []
    services.stop_services(said.append)
    assert said == ["ending 1 run (pipeline mini), at most 30 s", "worker: was not running", "server: was not running"]
    assert ended == [(run.id, "`sd3 down` ended it.")]
    assert swept  # what the killed runs left in /tmp


def test_waiting_is_bounded_and_says_what_for(own_home, child):
    (own_home / "logs").mkdir()
    log = own_home / "logs" / "server.log"
    log.write_text("ValueError: of a start before\n--- start\nfirst\nPort 4200 is in use\n\n")
    said, alive = [], Process.of(child.pid)
    with pytest.raises(ServiceError, match="^the server did not answer within 0 s; see .*server.log$"):
        services._wait("the server", 0, lambda: False, alive, "server", said.append)
    assert said == ["waiting for the server (at most 0 s)"]
    child.kill()
    child.wait()
    with pytest.raises(
        ServiceError, match=r"^the server ended while starting: Port 4200 is in use \(all of it: .*server.log\)$"
    ):
        services._wait("the server", 5, lambda: False, alive, "server", said.append)


PREFECTS_WORDS = """--- start
Traceback (most recent call last):
  File "sqlalchemy/engine/base.py", line 1967, in _exec_single_context
    self.dialect.do_execute(
sqlite3.DatabaseError: file is not a database

The above exception was the direct cause of the following exception:

sqlalchemy.exc.DatabaseError: (sqlite3.DatabaseError) file is not a database
(Background on this error at: https://sqlalche.me/e/20/4xp6)
ERROR:    Application startup failed. Exiting.
Check out the dashboard at http://127.0.0.1:4200
"""


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (PREFECTS_WORDS, "sqlalchemy.exc.DatabaseError: (sqlite3.DatabaseError) file is not a database"),
        ("--- start\nERROR:    [Errno 98] in use\nINFO: bye\n", "ERROR:    [Errno 98] in use"),
        ("ValueError: before\n--- start\n", "it printed nothing"),
    ],
)
def test_the_cause_of_an_end_is_named_and_not_the_last_words(tmp_path, told, cause):
    (tmp_path / "server.log").write_text(told)
    assert services._cause(tmp_path / "server.log") == cause


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_with_other_s3_keys_is_started_again(monkeypatch, child, busy):
    """But not under a run that is at work."""
    monkeypatch.setitem(sys.modules, "flows.local.runs", SimpleNamespace(unfinished_runs=lambda: ["a run"] * busy))
    found, said = Services(port=1, worker=Process.of(child.pid)), []
    services._end_a_worker_with_other_keys(found, said.append)
    assert (said, found.worker.alive()) == ([], True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    services._end_a_worker_with_other_keys(found, said.append)
    assert found.worker.alive() == busy
    assert said == [
        "the worker keeps its own AWS_ENDPOINT_URL while it has runs at work"
        if busy
        else "the worker is started again with this shell's AWS_ENDPOINT_URL"
    ]


@pytest.mark.parametrize("folder", ["plain", "a b", "it's $HOME", 'q"`ls`"', "new\nline", "ü"])
def test_a_command_in_a_message_can_be_pasted_whatever_the_projects_folder_is_called(monkeypatch, tmp_path, folder):
    """Also within `eval "$(...)"`, as the line of `sd3 up` has it."""
    program = tmp_path / folder / ".venv" / "bin" / "sd3"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho \"called='$*'\"\n")
    program.chmod(0o700)
    monkeypatch.setattr(home, "PROJECT", tmp_path / folder)
    pasted = home.local_command("sd3 demo --recipe 'a  b'")
    for command in (pasted, f'eval "$({pasted})"; echo "$called"'):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "demo --recipe a  b" in done.stdout


def test_a_home_whose_name_is_no_text_is_told_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "\udcff"))
    monkeypatch.setattr(services, "_up", lambda say: pytest.fail("services were started"))
    with pytest.raises(
        UserError,
        match=r"^SD3_HOME /.*/\\xff: its name is not UTF-8, which Prefect's server wants; name another folder$",
    ):
        services.start_services()
