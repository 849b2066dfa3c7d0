from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from uuid import uuid4

import pytest

from flows import home, services
from flows.services import Process, ServiceError, Services


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def child():
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def test_a_process_lives_until_it_ends(child):
    process = Process.of(child.pid)
    assert process.alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for: a zombie is not alive
    assert not process.alive()
    child.wait()
    assert not process.alive()


def test_a_number_used_again_is_another_process():
    mine = Process.of(os.getpid())
    assert mine.alive()
    assert not Process(mine.pid, mine.born - 100).alive()


def test_services_are_read_as_they_were_written(own_home):
    assert Services.load() is None
    written = Services(port=4321, server=Process(1, 2.5), worker=None, deployed="abc")
    written.save()
    assert Services.load() == written
    assert [path.name for path in own_home.iterdir()] == ["services.json"]
    assert services.environment(written)["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert services.environment(written)["PREFECT_HOME"] == str(own_home / "prefect")


def test_a_taken_port_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not services._port_is_free(port)
        assert services._free_port(port) > port
    assert services._port_is_free(port)


def test_no_free_port_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(services, "_port_is_free", lambda port: False)
    with pytest.raises(ServiceError, match="^ports 4200 to 4219 are all taken; free one of them$"):
        services._free_port(4200)


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
    monkeypatch.setitem(sys.modules, "flows.runs", None)  # whoever asks that server for runs fails
    Services(strangers_server, server=Process(child.pid, 1.0)).save()
    with pytest.raises(ServiceError, match="not running"):
        services.require()
    said = []
    services.down(said.append)
    assert said == ["worker: was not running", "server: was not running"]


def test_a_worker_that_asks_at_a_port_that_was_lost_is_stopped(monkeypatch, child, strangers_server):
    monkeypatch.setattr(services, "_spawn", lambda arguments, found, name: Process(1, 1.0))
    monkeypatch.setattr(services, "_wait", lambda *_: None)
    found, said = Services(strangers_server, worker=Process.of(child.pid), deployed="abc"), []
    services._start_server(found, said.append)
    assert found.port != strangers_server and not found.deployed and not found.worker.alive()
    assert said[0] == f"port {strangers_server} is taken by another program; the server takes {found.port}"
    assert said[1].startswith("worker: stopped, since it asks at the port before")


def test_a_second_command_says_what_it_waits_for(own_home):
    said = []
    with home.one_at_a_time("up", said.append):
        other = threading.Thread(target=lambda: home.one_at_a_time("up", said.append).__enter__())
        other.start()
        other.join(0.5)
        assert said == [f"waiting for another command, which holds {own_home}/up.lock"] and other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_stopping_ends_the_descendants_too():
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        grandchild = Process.of(int(parent.stdout.readline()))
        assert grandchild.alive()
        services._stop_tree(Process.of(parent.pid))
    assert not grandchild.alive()


def test_down_where_nothing_was_started():
    said = []
    services.down(said.append)
    assert said == ["services: none were started here"]


def test_down_says_which_runs_it_ends_before_it_does(monkeypatch):
    run, ended = SimpleNamespace(name="pipeline mini", id=uuid4()), []
    runs = SimpleNamespace(
        cancel_waiting_runs=lambda: [],
        unfinished_runs=lambda: [run],
        cancel_run=lambda run_id, reason: ended.append((run_id, reason)),
    )
    monkeypatch.setitem(sys.modules, "flows.runs", runs)
    monkeypatch.setattr(services, "server_answers", lambda found: True)
    monkeypatch.setattr(services, "use", lambda found: None)
    swept = []
    monkeypatch.setattr(services, "remove_dead_sessions", lambda: swept.append(True))
    Services(port=1).save()
    said = []
    services.down(said.append)
    assert said == ["ending 1 run (pipeline mini), at most 30 s", "worker: was not running", "server: was not running"]
    assert ended == [(run.id, "`sd3 down` ended it.")]
    assert swept  # what the killed runs left in /tmp


def test_waiting_is_bounded_and_says_what_for(own_home, child):
    (own_home / "logs").mkdir()
    (own_home / "logs" / "server.log").write_text("first\nPort 4200 is in use\n\n")
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


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_with_other_s3_keys_is_started_again(monkeypatch, child, busy):
    """But not under a run that is at work."""
    monkeypatch.setitem(sys.modules, "flows.runs", SimpleNamespace(unfinished_runs=lambda: ["a run"] * busy))
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
