"""Starts and stops the local services: Prefect's server, worker, deployments.

`sd3 up`, `sd3 down` and `sd3 status` stand on this.

Everything lies under `home()`, so a user's own Prefect stays untouched (flows.local.prefect_environment). The server binds to loopback,
on a port that is taken before it starts. A second `up` changes nothing that is well, and replaces what has died; every wait is
bounded and says what it waits for.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path

from flows.local.home import WORK_POOL, check_home, ensure, full_disk, home, local_command, one_at_a_time, write_whole
from flows.local.interrupt import put_off, unheard
from flows.local.prefect_environment import (
    basic_authorization,
    check_proxies,
    client_settings,
    prefect_folder,
    server_settings,
    use_settings,
    with_settings,
)
from flows.local.processes import STOP_SECONDS, Process, find_process, stop_tree
from sd3core.errors import UserError
from sd3core.words import counted
from workers.session_folders import remove_dead_sessions

FIRST_PORT, PORTS_TRIED = 4200, 20
SERVER_SECONDS, SLOW_SERVER_SECONDS, WORKER_SECONDS = 120, 30, 60
SERVICES_FORMAT = 2  # of services.json; before, a server asked for no password
SERVER = ("-m", "flows.local.prefect_server")
SERVER_BEFORE = ("-m", "flows.prefect_server")  # as versions before called it
WORKER = ("-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", "local")
START_MARK = "--- start"  # in the logs
# the first tells more
CAUSES = (
    re.compile(r"(?:\w+\.)*\w*(?:Error|Exception)\b.*"),
    re.compile(r".*\b(?:ERROR|CRITICAL)\b.*"),
)

Say = Callable[[str], None]


class ServiceError(UserError):
    """A local service that cannot be started or reached."""


@dataclass
class Services:
    """What stands in `home()/services.json`: the port and the two processes."""

    port: int
    server: Process | None = None
    worker: Process | None = None
    deployed: str = ""  # fingerprint of the deployments that the server has
    format: int = SERVICES_FORMAT

    @property
    def api_url(self) -> str:
        return f"{self.ui_url}/api"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def save(self) -> None:
        write_whole(ensure(home()) / "services.json", json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls) -> Services | None:
        """None where none were started here. A record that is damaged is made again from the processes themselves."""
        try:
            return cls._from_record(json.loads((home() / "services.json").read_text(errors="replace")))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return cls._from_processes()

    @classmethod
    def _from_record(cls, record: dict) -> Services:
        processes = {name: Process.from_record(record[name]) if record[name] else None for name in ("server", "worker")}
        return cls(int(record["port"]), **processes, deployed=str(record["deployed"]), format=record.get("format", 1))

    @classmethod
    def _from_processes(cls) -> Services:
        server = find_process(SERVER, SD3_HOME=str(home())) or find_process(SERVER_BEFORE, SD3_HOME=str(home()))
        port = server.environment().get("PREFECT_SERVER_API_PORT") if server else None
        return cls(int(port or FIRST_PORT), server, find_process(WORKER, SD3_HOME=str(home())))


def environment(services: Services) -> dict[str, str]:
    """What a Prefect command needs to talk to these services and to nothing else. It holds the password."""
    return client_settings(services.port)


def use(services: Services) -> None:
    """Points this process's Prefect client at the services. Call before prefect is imported."""
    use_settings(environment(services))


def server_answers(services: Services) -> bool:
    """Whether the server that was started here answers: whoever else has its port after it ended is left alone."""
    return _answer(services) == HTTPStatus.OK


def _answer(services: Services) -> int | None:
    """The status of an answer to this home's password; None without one. Never through a proxy."""
    import httpx

    if not (services.server and services.server.alive()):
        return None
    try:
        asked = {"headers": {"Authorization": basic_authorization()}, "timeout": 2.0, "trust_env": False}
        return httpx.get(f"{services.api_url}/version", **asked).status_code
    except httpx.HTTPError:
        return None


def start_services(say: Say = print) -> Services:
    """Starts what is not running, and returns when the server answers, the worker polls and the deployments stand."""
    check_home()
    check_proxies()
    with one_at_a_time("up", say):
        return _up(say)


def _up(say: Say) -> Services:
    services = _known_services()
    found = (services.server, services.worker)
    try:
        _end_an_older_server(services, say)
        _start_what_is_missing(services, say)
        services.save()
    except BaseException:  # Ctrl-C too: what this call has started goes with it, so that nothing is left half up
        with unheard():
            _stop_those_started(services, found)
        raise
    return services


def _known_services() -> Services:
    """What services.json holds, and what a start that was killed has not written down there."""
    recorded, found = Services.load() or Services(FIRST_PORT), Services._from_processes()
    if found.server and not (recorded.server and recorded.server.alive()):
        recorded.server, recorded.port, recorded.format = found.server, found.port, found.format
    if found.worker and not (recorded.worker and recorded.worker.alive()):
        recorded.worker = found.worker
    return recorded


def _start_what_is_missing(services: Services, say: Say) -> None:
    if not _server_is_well(services):
        _start_server(services, say)
    _end_a_worker_of_another_server(services, say)
    use(services)
    from flows.local.deployments import apply_deployments, deployments_fingerprint
    from flows.local.runs import fail_dead_runs

    if services.deployed != deployments_fingerprint() or not (services.worker and services.worker.alive()):
        say("deployments: writing them")
        apply_deployments()
        services.deployed = deployments_fingerprint()
        services.save()
    _end_a_worker_with_other_keys(services, say)
    starts_worker = not (services.worker and services.worker.alive())
    # before the next worker takes runs, which are not to be taken for lost
    for name in fail_dead_runs(no_worker=starts_worker):
        say(f"run {name}: its process is gone, marked as crashed; the same command goes on with it")
    if starts_worker:
        _start_worker(services, say)


def _end_an_older_server(services: Services, say: Say) -> None:
    """It asks for no password, and its runs know none: it is replaced, but not under runs at work."""
    if services.format >= SERVICES_FORMAT or not server_answers(services):
        return
    use(services)
    from flows.local.runs import unfinished_runs

    if at_work := unfinished_runs():
        raise ServiceError(
            f"the services are of an older version and have {counted(len(at_work), 'run')} at work"
            f" ({', '.join(run.name for run in at_work)}); wait for it, or `{local_command('sd3 down')}` ends it: it goes on when asked for"
        )
    say("the services of an older version are replaced")
    stop_tree(services.server)


def _end_a_worker_of_another_server(services: Services, say: Say) -> None:
    """Ends a worker that asks another port or has another password: its runs would tell nobody how they fare."""
    has = services.worker.environment() if services.worker else {}
    asks = {name: has.get(name) for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")}
    if has and asks.items() - environment(services).items():
        say(
            "worker: stopped, since it asks another server; it is started again, and what it had at work goes on when asked for"
        )
        stop_tree(services.worker)


def _end_a_worker_with_other_keys(services: Services, say: Say) -> None:
    """Runs get the worker's environment: with an S3 endpoint or keys that were set after it began they would not reach the store."""
    if not (services.worker and services.worker.alive()):
        return
    has = services.worker.environment()
    if not has:  # it has only just begun, so it has this shell's
        return
    changed = sorted(name for name, value in os.environ.items() if name.startswith("AWS_") and has.get(name) != value)
    if not changed:
        return
    from flows.local.runs import unfinished_runs

    if unfinished_runs():
        say(f"the worker keeps its own {', '.join(changed)} while it has runs at work")
    else:
        say(f"the worker is started again with this shell's {', '.join(changed)}")
        stop_tree(services.worker)


def _stop_those_started(services: Services, found: tuple[Process | None, Process | None]) -> None:
    for name in ("worker", "server"):
        process = getattr(services, name)
        if process and process not in found:
            stop_tree(process)
            setattr(services, name, None)
    services.save()


def stop_services(say: Say = print) -> None:
    """Stops the worker, then the server, and whatever flow runs the worker had started."""
    services = _known_services()
    if not (services.server or services.worker or (home() / "services.json").exists()):
        say("services: none were started here")
        return
    if server_answers(services):
        use(services)
        from flows.local.runs import cancel_run, cancel_waiting_runs, unfinished_runs

        for name in cancel_waiting_runs():
            say(f"run {name}: cancelled before it began")
        if at_work := unfinished_runs():
            names = ", ".join(run.name for run in at_work)
            say(f"ending {counted(len(at_work), 'run')} ({names}), at most {2 * STOP_SECONDS} s")
        for run in at_work:
            cancel_run(run.id, "`sd3 down` ended it.")
    with put_off():
        for name in ("worker", "server"):
            process = getattr(services, name)
            if process and process.alive():
                stop_tree(process)
                say(f"{name}: stopped")
            else:
                say(f"{name}: was not running")
            setattr(services, name, None)
        services.save()
        remove_dead_sessions()


def require() -> Services:
    """The running services, or a ServiceError that says how to start them."""
    services = Services.load()
    if services is None or not server_answers(services):
        raise ServiceError(f"the local services are not running; start them with `{local_command('sd3 up')}`")
    return services


def worker_lives() -> bool:
    services = Services.load()
    return bool(services and services.worker and services.worker.alive())


def _server_is_well(services: Services) -> bool:
    """A server that lives has a while to answer: while training fills the cores it is slow, not dead."""
    deadline = time.monotonic() + SLOW_SERVER_SECONDS
    while services.server and services.server.alive():
        answer = _answer(services)
        if answer in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED):
            return answer == HTTPStatus.OK  # else its password is lost
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return False


def _start_server(services: Services, say: Say) -> None:
    if services.server:
        stop_tree(services.server)
    with _take_port(services.port) as listening:
        taken, services.port = services.port, listening.getsockname()[1]
        if services.port != taken:
            say(f"port {taken} is taken by another program; the server takes {services.port}")
        services.format = SERVICES_FORMAT
        with put_off():
            services.server = _spawn(SERVER, server_settings(services.port), "server", listening)
            services.save()
    _wait(
        f"the Prefect server on port {services.port}",
        SERVER_SECONDS,
        lambda: server_answers(services),
        services.server,
        "server",
        say,
    )


def _start_worker(services: Services, say: Say) -> None:
    from flows.local.deployments import worker_heartbeats

    before = worker_heartbeats()
    with put_off():
        services.worker = _spawn(WORKER, environment(services), "worker")
        services.save()
    _wait(
        "the Prefect worker",
        WORKER_SECONDS,
        lambda: bool(worker_heartbeats() - before),
        services.worker,
        "worker",
        say,
    )


def _spawn(
    arguments: Sequence[str], settings: dict[str, str], name: str, listening: socket.socket | None = None
) -> Process:
    """`listening`: a socket that the child inherits; its number is the last argument."""
    log = ensure(home() / "logs") / f"{name}.log"
    sockets = [listening.fileno()] if listening else []
    with log.open("ab") as sink:
        sink.write(f"{START_MARK}\n".encode())
        sink.flush()
        child = subprocess.Popen(
            [sys.executable, *arguments, *map(str, sockets)],
            cwd=prefect_folder(),
            env=with_settings(settings),
            pass_fds=sockets,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal ends the view, not the services
        )
    return Process.of(child.pid)


def _wait(what: str, seconds: float, ready: Callable[[], bool], process: Process, name: str, say: Say) -> None:
    say(f"waiting for {what} (at most {seconds:.0f} s)")
    deadline = time.monotonic() + seconds
    log = home() / "logs" / f"{name}.log"
    while not ready():
        if not process.alive():
            raise ServiceError(f"{what} ended while starting: {full_disk() or _cause(log)} (all of it: {log})")
        if time.monotonic() > deadline:
            raise ServiceError(f"{what} did not answer within {seconds:.0f} s; see {log}")
        time.sleep(0.3)


def _cause(log: Path) -> str:
    """Why a service ended: the last error that it told since it was started, else its last line."""
    told = log.read_text(errors="replace").rpartition(START_MARK)[2]
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [[line for line in lines if cause.match(line)] for cause in CAUSES]
    return next(filter(None, [*errors, lines, ["it printed nothing"]]))[-1]


def _take_port(first: int) -> socket.socket:
    """A listening socket on this port, else on the first free one. Whoever holds it has the port: nobody else can get it."""
    ports = range(FIRST_PORT, FIRST_PORT + PORTS_TRIED)
    for port in (first, *ports):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            listening.bind(("127.0.0.1", port))
            listening.listen()
            return listening
        listening.close()
    raise ServiceError(f"ports {ports[0]} to {ports[-1]} are all taken; free one of them")
