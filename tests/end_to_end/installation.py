"""One SD3_HOME with its own services, used as a user does: through the `sd3` and `prefect` commands."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import psutil
from swift_server import KEY, REGION, SECRET

PROJECT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TAIL_LINES = 40
BUSY_TRIES = 5
UNLESS_SECONDS = 2.0
RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class FileState(NamedTuple):
    """Equal only if nobody wrote the file, not even the same bytes again."""

    inode: int
    written_ns: int
    sha256: str


class Installation:
    """`s3_port`: where the environment of all its processes says that S3 answers."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="sd3-", dir="/tmp"))  # short: Ray's and Prefect's sockets lie below
        self.store = self.home / "store"
        self.s3_port = free_port()
        (self.home / "services.json").write_text(
            json.dumps({"port": free_port(), "server": None, "worker": None, "deployed": ""})
        )
        clean = {
            key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "RAY_", "AWS_", "SD3_"))
        }
        self.environment = clean | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "SD3_HOME": str(self.home),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
        }

    def command(self, *arguments: str, seconds: float) -> str:
        """What it printed. Fails with the output and the logs' ends unless it ends with exit code 0 in time."""
        code, printed = self.ends(*arguments, seconds=seconds)
        assert code == 0, self.story(f"{arguments} ended with exit code {code}", printed)
        return printed

    def ends(self, *arguments: str, seconds: float = 180) -> tuple[int, str]:
        """Exit code and output of a command that may fail, but ends in time."""
        try:
            done = subprocess.run(
                arguments,
                env=self.environment,
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as expired:
            printed = (expired.stdout or b"").decode(errors="replace")
            raise AssertionError(self.story(f"{arguments} did not end within {seconds} s", printed)) from None
        return done.returncode, done.stdout

    def interrupted(
        self, arguments: Sequence[str], moment: str | Callable[[], Any], times: int = 1, seconds: float = 180
    ) -> tuple[int, str]:
        """Runs a command, presses Ctrl-C when it prints `moment` or `moment` is true: its exit code and what it printed."""

        def press(running: subprocess.Popen) -> None:
            for _ in range(times):
                os.killpg(running.pid, signal.SIGINT)
                time.sleep(0.5)

        return self.disturbed(arguments, moment, press, seconds)

    def disturbed(
        self,
        arguments: Sequence[str],
        moment: str | Callable[[], Any],
        happens: Callable[[subprocess.Popen], Any],
        seconds: float = 180,
    ) -> tuple[int, str]:
        """Runs a command, and lets something happen when it prints `moment` or `moment` is true: its exit code and what it printed."""
        with tempfile.TemporaryFile("w+") as printed:
            running = subprocess.Popen(
                arguments,
                env={**self.environment, "PYTHONUNBUFFERED": "1"},
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

            def so_far() -> str:
                printed.seek(0)
                return printed.read()

            reached = moment if callable(moment) else lambda: moment in so_far()
            try:
                self.wait(
                    f"{arguments} to come to {moment}",
                    lambda: reached() or running.poll() is not None,
                    seconds,
                    poll=0.05,
                )
                assert running.poll() is None, self.story(f"{arguments} ended before it came to {moment}", so_far())
                happens(running)
                code = running.wait(seconds)
            finally:
                running.kill()
            return code, so_far()

    def demo(self, overrides: Sequence[str] = (), seconds: float = 420) -> str:
        return self.command(*demo_command(*overrides), seconds=seconds)

    def enter(self) -> None:
        """As `eval "$(sd3 env)"` does in a shell."""
        exported = self.command("sd3", "env", seconds=60)
        self.environment |= dict(re.findall(r"^export (\w+)=(\S+)$", exported, re.MULTILINE))

    def start(self, deployment: str, overrides: Sequence[str] = ()) -> str:
        """Starts a deployment with Prefect's own command; the run's id."""
        self.enter()
        printed = self.command(
            "prefect",
            "--no-prompt",
            "deployment",
            "run",
            deployment,
            "--param",
            f"overrides={json.dumps(list(overrides))}",
            seconds=120,
        )
        return self.run_id(printed)

    def run_id(self, printed: str) -> str:
        return RUN_ID.search(printed).group(0)

    def api(self, path: str, /, **body: Any) -> Any:
        """The server's answer. One that is too busy says 503, and is asked again, as Prefect's own clients do."""
        for attempt in range(BUSY_TRIES):
            answer = httpx.post(
                f"{self.ui}/api/{path}", json=body, headers=self.authorization() | self.csrf_token(), timeout=30
            )
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1 + attempt)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @property
    def password(self) -> str:
        return (self.home / "prefect" / "password").read_text()

    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(self.password.encode()).decode()}"}

    def csrf_token(self) -> dict[str, str]:
        """The headers that let a client write."""
        client = str(uuid4())
        answer = httpx.get(
            f"{self.ui}/api/csrf-token", params={"client": client}, headers=self.authorization(), timeout=30
        )
        answer.raise_for_status()
        return {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": answer.json()["token"]}

    def stages_of(self, flow_run_id: str) -> dict[str, str]:
        """Stage -> state type of the stage runs that a pipeline run started."""
        runs = self.api(
            "flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [flow_run_id]}}, sort="START_TIME_ASC"
        )
        names = {run["flow_id"]: "" for run in runs}
        for flow in self.api("flows/filter", flows={"id": {"any_": list(names)}}) if names else []:
            names[flow["id"]] = flow["name"]
        return {names[run["flow_id"]]: run["state_type"] for run in runs}

    def stage_runs(self, flow_run_id: str) -> dict[str, str]:
        """Stage -> flow run id of the stage runs that a pipeline run started."""
        runs = self.api("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [flow_run_id]}})
        return {run["name"].partition(" ")[0]: run["id"] for run in runs}

    def artifact(self, flow_run_id: str, key: str) -> dict[str, Any]:
        """A run's artifact: id, description, when it was created and updated."""
        wanted = {"flow_run_id": {"any_": [flow_run_id]}, "key": {"any_": [key]}}
        [found] = self.api("artifacts/filter", artifacts=wanted)
        return found

    @property
    def ui(self) -> str:
        return f"http://127.0.0.1:{self.services['port']}"

    def running(self) -> list[str]:
        """Names of the flow runs that the server takes for running."""
        return [
            run["name"]
            for run in self.api("flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
        ]

    @property
    def services(self) -> dict[str, Any]:
        return json.loads((self.home / "services.json").read_text())

    def flow_process(self) -> psutil.Process | None:
        """The process of the flow run that is recorded as alive."""
        for record in (self.home / "live").glob("*.json"):
            pid = json.loads(record.read_text())["pid"]
            if psutil.pid_exists(pid):
                return psutil.Process(pid)
        return None

    def server_process(self) -> psutil.Process:
        return psutil.Process(self.services["server"]["pid"])

    def processes(self) -> set[psutil.Process]:
        """Every process that was started with this SD3_HOME, and those below it (which may have overwritten their environment)."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):
                if environment_of(process).get("SD3_HOME") == str(self.home) and process.pid != os.getpid():
                    found |= {process, *process.children(recursive=True)}
        return found

    def flow_processes(self) -> set[psutil.Process]:
        """Those of flow runs: Prefect's worker writes the run's id into their environment."""
        return {process for process in self.processes() if "PREFECT__FLOW_RUN_ID" in environment_of(process)}

    def service_processes(self) -> set[psutil.Process]:
        """The server, the worker, and what these have below them."""
        found: set[psutil.Process] = set()
        for name in ("server", "worker"):
            root = psutil.Process(self.services[name]["pid"])
            found |= {root, *root.children(recursive=True)}
        return found

    def only_services_run(self) -> bool:
        """A flow's process stands below the Prefect worker, so among the services' processes: it is looked for by its own mark."""
        return not self.flow_processes() and self.processes() == self.service_processes()

    def files(self, *parts: str) -> dict[str, FileState]:
        """The state of every file of the local store whose path begins with one of `parts`."""
        return file_states(self.store, *parts)

    def summary(self, run: str = "tiny-test") -> dict[str, Any]:
        return json.loads((self.store / "runs" / run / "summary.json").read_text())

    def wait(
        self,
        what: str,
        condition: Callable[[], Any],
        seconds: float,
        poll: float = 0.5,
        unless: Callable[[], Any] = lambda: None,
    ) -> Any:
        """The first true value of `condition`, or of `unless`, which is asked every two seconds.

        What asks the server or looks at all processes takes a tenth of a core where it is asked ten times a second.
        """
        deadline, asked_at = time.monotonic() + seconds, time.monotonic()
        while not (value := condition()):
            now = time.monotonic()
            assert now < deadline, self.story(f"waited {seconds:.0f} s for {what}")
            if now - asked_at >= UNLESS_SECONDS:
                if value := unless():
                    return value
                asked_at = now
            time.sleep(poll)
        return value

    def story(self, what: str, printed: str = "") -> str:
        """What happened, with the end of what was printed and of the logs."""
        parts = [what, *([f"--- printed\n{tail(printed)}"] if printed else [])]
        parts += [
            f"--- {log.name}\n{tail(log.read_text(errors='replace'))}"
            for log in sorted((self.home / "logs").glob("*.log"))
        ]
        return "\n".join(parts)

    def close(self) -> None:
        """Stops everything that was started here, whatever state it is in, and removes the folder."""
        try:
            self.command("sd3", "down", seconds=90)
        finally:
            left = self.processes()
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=10)
            shutil.rmtree(self.home, ignore_errors=True)


def file_states(folder: Path, *parts: str) -> dict[str, FileState]:
    """Of every file below it, or of those whose path from there begins with one of `parts`."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(parts or ""):
            stat = path.stat()
            found[name] = FileState(stat.st_ino, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def finished_files(folder: Path, *parts: str) -> dict[str, FileState]:
    """Shards, towers and checkpoints whose done record stands: their files and the record itself."""
    files = file_states(folder, *parts)
    done = [name[: -len("done.json")] for name in files if name.lower().endswith(("/done.json", ".done.json"))]
    return {name: state for name, state in files.items() if name.startswith(tuple(done))}


def demo_command(*overrides: str) -> list[str]:
    return ["sd3", "demo", "--recipe", "tiny-test", *(word for o in overrides for word in ("--set", o))]


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Nothing of a process that is gone, or another user's."""
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def free_port() -> int:
    """One that no developer's server takes: those begin at 4200."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
