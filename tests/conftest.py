from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from swift_server import KEY, REGION, SECRET, SwiftServer
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

CHAINS = "tests/end_to_end/"
OWN_HOMES = CHAINS + "test_homes.py"

# Prefect reads its settings when it is imported: the tests keep off the user's profile and send nothing.
_PREFECT_HOME = tempfile.mkdtemp(prefix="sd3-test-prefect-")
# two test processes share the cores: threads of torch's would wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(PREFECT_HOME=_PREFECT_HOME, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")
# In the environment of all that the tests start: the process that began them.
_SESSION = "TESTS_BEGUN_BY"
os.environ.setdefault(_SESSION, str(os.getpid()))


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C, so that what follows is done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers, a Ray or ranks come first: the short ones then fill both processes to the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_unconfigure() -> None:
    """A test process that is interrupted leaves its fixtures' services: the one that began it ends them."""
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)
    if os.environ[_SESSION] == str(os.getpid()):
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(_SESSION) == str(os.getpid()):
                    process.kill()


class _ChainsInOne(LoadScopeScheduling):
    """Test processes share out files; those of whole chains, which share their services and runs, go to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return CHAINS if file.startswith(CHAINS) and file != OWN_HOMES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _ChainsInOne(config, log)


@dataclass(frozen=True)
class S3Server:
    """Where it answers, and itself where it is a real one (`make test-s3`)."""

    endpoint: str
    swift: SwiftServer | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server on loopback for the session: moto, or a real one where SD3_SWIFT says where that is installed."""
    if "SD3_SWIFT" in os.environ:
        swift = SwiftServer(Path(os.environ["SD3_SWIFT"]))
        try:
            swift.start()
            yield S3Server(swift.endpoint, swift)
        finally:
            swift.close()
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request buries what a failing test says
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3_environment(monkeypatch, s3_server):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_bucket(s3_environment) -> str:
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name
