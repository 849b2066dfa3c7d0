"""The local services: a Prefect server (SQLite), one process worker, the deployments. Up, down, status.

Everything lies under `home()`, so a user's own Prefect profile stays untouched. The server binds to loopback. A second `up`
changes nothing that is well, and replaces what has died; every wait is bounded and says what it waits for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from flows.home import PROJECT, ensure, full_disk, home, one_at_a_time, pasted, write_whole
from flows.interrupt import put_off, unheard
from sd3core.errors import UserError
from sd3core.progress import counted
from workers.session_folders import remove_dead_sessions

WORK_POOL = "local"
FIRST_PORT, PORTS_TRIED = 4200, 20
SERVER_SECONDS, SLOW_SERVER_SECONDS, WORKER_SECONDS, STOP_SECONDS = 120, 30, 60, 15

Say = Callable[[str], None]


class ServiceError(UserError):
    """A local service that cannot be started or reached."""


@dataclass(frozen=True)
class Process:
    """A process by number and birth, so that a number used again is not taken for it."""

    pid: int
    born: float

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass
class Services:
    """What stands in `home()/services.json`: the port and the two processes."""

    port: int
    server: Process | None = None
    worker: Process | None = None
    deployed: str = ""  # fingerprint of the deployments that the server has

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def ui_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def save(self) -> None:
        write_whole(ensure(home()) / "services.json", json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls) -> Services | None:
        path = home() / "services.json"
        if not path.is_file():
            return None
        fields = json.loads(path.read_text())
        for name in ("server", "worker"):
            fields[name] = Process(**fields[name]) if fields[name] else None
        return cls(**fields)


def environment(services: Services) -> dict[str, str]:
    """What a Prefect command needs to talk to these services and to nothing else."""
    return {
        "PREFECT_HOME": str(ensure(home() / "prefect")),
        "PREFECT_API_URL": services.api_url,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(services.port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_RUNNER_SERVER_ENABLE": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",  # a person waits for the first stage
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",  # the server wants none; a client would ask before it writes
        "PREFECT_CLI_PROMPT": "false",
        "DO_NOT_TRACK": "1",
        "SD3_HOME": str(home()),
    }


def use(services: Services) -> None:
    """Points this process's Prefect client at the services. Call before prefect is imported."""
    os.environ.update(environment(services))


def server_answers(services: Services) -> bool:
    """Only the server that was started here: whoever else has its port after it ended is left alone."""
    import httpx

    if not (services.server and services.server.alive()):
        return False
    try:
        return httpx.get(f"{services.api_url}/health", timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False


def up(say: Say = print) -> Services:
    """Starts what is not running, and returns when the server answers, the worker polls and the deployments stand."""
    with one_at_a_time("up", say):
        return _up(say)


def _up(say: Say) -> Services:
    services = Services.load() or Services(port=_free_port(FIRST_PORT))
    found = (services.server, services.worker)
    try:
        _start_what_is_missing(services, say)
    except BaseException:  # Ctrl-C too: what this call has started goes with it, so that nothing is left half up
        with unheard():
            _stop_those_started(services, found)
        raise
    return services


def _start_what_is_missing(services: Services, say: Say) -> None:
    if not _server_is_well(services):
        _start_server(services, say)
    use(services)
    from flows.deployments import apply_deployments, deployments_fingerprint
    from flows.runs import fail_dead_runs

    if services.deployed != deployments_fingerprint() or not (services.worker and services.worker.alive()):
        say("deployments: writing them")
        apply_deployments()
        services.deployed = deployments_fingerprint()
        services.save()
    _end_a_worker_with_other_keys(services, say)
    starts_worker = not (services.worker and services.worker.alive())
    for name in fail_dead_runs(no_worker=starts_worker):  # before the next worker takes runs, which are not to be taken for lost
        say(f"run {name}: its process is gone, marked as crashed; the same command goes on with it")
    if starts_worker:
        _start_worker(services, say)


def _end_a_worker_with_other_keys(services: Services, say: Say) -> None:
    """Runs get the worker's environment: with an S3 endpoint or keys that were set after it began they would not reach the store."""
    if not (services.worker and services.worker.alive()):
        return
    has = psutil.Process(services.worker.pid).environ()
    changed = sorted(name for name, value in os.environ.items() if name.startswith("AWS_") and has.get(name) != value)
    if not changed:
        return
    from flows.runs import unfinished_runs

    if unfinished_runs():
        say(f"the worker keeps its own {', '.join(changed)} while it has runs at work")
    else:
        say(f"the worker is started again with this shell's {', '.join(changed)}")
        _stop_tree(services.worker)


def _stop_those_started(services: Services, found: tuple[Process | None, Process | None]) -> None:
    for name in ("worker", "server"):
        process = getattr(services, name)
        if process and process not in found:
            _stop_tree(process)
            setattr(services, name, None)
    services.save()


def down(say: Say = print) -> None:
    """Stops the worker, then the server, and whatever flow runs the worker had started."""
    services = Services.load()
    if services is None:
        say("services: none were started here")
        return
    if server_answers(services):
        use(services)
        from flows.runs import cancel_run, cancel_waiting_runs, unfinished_runs

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
                _stop_tree(process)
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
        raise ServiceError(f"the local services are not running; start them with `{pasted('sd3 up')}`")
    return services


def worker_lives() -> bool:
    services = Services.load()
    return bool(services and services.worker and services.worker.alive())


def _server_is_well(services: Services) -> bool:
    """A server that lives has a while to answer: while training fills the cores it is slow, not dead."""
    deadline = time.monotonic() + SLOW_SERVER_SECONDS
    while services.server and services.server.alive():
        if server_answers(services):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return False


def _start_server(services: Services, say: Say) -> None:
    if services.server and services.server.alive():
        _stop_tree(services.server)
    if not _port_is_free(services.port):
        taken, services.port = services.port, _free_port(FIRST_PORT)
        services.deployed = ""
        say(f"port {taken} is taken by another program; the server takes {services.port}")
        if services.worker and services.worker.alive():
            say("worker: stopped, since it asks at the port before; it is started again, and what it had at work goes on when asked for")
            _stop_tree(services.worker)
    with put_off():
        services.server = _spawn(["server", "start"], services, "server")
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
    from flows.deployments import worker_is_online

    with put_off():
        services.worker = _spawn(
            ["worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", "local"], services, "worker"
        )
        services.save()
    _wait(
        "the Prefect worker",
        WORKER_SECONDS,
        lambda: worker_is_online(services.worker.born),
        services.worker,
        "worker",
        say,
    )


def _spawn(arguments: list[str], services: Services, name: str) -> Process:
    log = ensure(home() / "logs") / f"{name}.log"
    with log.open("ab") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=PROJECT,
            env={**os.environ, **environment(services)},
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
            raise ServiceError(f"{what} ended while starting: {full_disk() or _last_line(log)} (all of it: {log})")
        if time.monotonic() > deadline:
            raise ServiceError(f"{what} did not answer within {seconds:.0f} s; see {log}")
        time.sleep(0.3)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _stop_tree(process: Process) -> None:
    """SIGTERM to the process and its descendants, SIGKILL to what is left: nothing stays running."""
    try:
        root = psutil.Process(process.pid)
    except psutil.NoSuchProcess:
        return
    tree = [root, *root.children(recursive=True)]
    for member in tree:
        _signal(member, signal.SIGTERM)
    _, left = psutil.wait_procs(tree, timeout=STOP_SECONDS)
    for member in left:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port(first: int) -> int:
    for port in range(first, first + PORTS_TRIED):
        if _port_is_free(port):
            return port
    raise ServiceError(f"ports {first} to {first + PORTS_TRIED - 1} are all taken; free one of them")
