"""A real S3 server on loopback: OpenStack Swift with its S3 interface, one replica, in four processes beside a memcached.

`make test-s3` installs it and names its environment in SD3_SWIFT.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

KEY, SECRET, REGION = "sd3:tester", "testing", "us-east-1"
START_S = 60
STORAGE = ("account", "container", "object")
CONFIG = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
"""
STORAGE_CONFIG = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
# One that failed is asked again after a second, not a minute, and a slow one is waited for: here there is no other.
PROXY_CONFIG = """
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
error_suppression_interval = 1
conn_timeout = 10
node_timeout = 60
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = {region}
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_{key} = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""
RINGS_CONFIG = """
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
[storage-policy:0]
name = one
default = yes
"""


class SwiftServer:
    """Clients speak to the process "proxy"; it, and those that store, can be killed and started again on their ports."""

    def __init__(self, environment: Path, port: int | None = None) -> None:
        """`environment`: where Swift is installed; `port`: where it answers, one that is free where None is asked for."""
        self.bin = environment / "bin"
        self.folder = Path(tempfile.mkdtemp(prefix="sd3-swift-"))
        self.ports = {name: _free_port() for name in ("memcached", *STORAGE, "proxy")}
        self.ports["proxy"] = port or self.ports["proxy"]
        self._running: dict[str, subprocess.Popen] = {}
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(RINGS_CONFIG)
        for name in STORAGE:
            self._write_ring(name)
            self._write_config(name, STORAGE_CONFIG.format(name=name))
        of_proxy = {"memcached": self.ports["memcached"], "key": KEY.replace(":", "_"), "secret": SECRET}
        self._write_config("proxy", PROXY_CONFIG.format(region=REGION, **of_proxy))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['proxy']}"

    def start(self) -> None:
        """Starts what does not run, and returns when all listen."""
        for name in self.ports:
            if name not in self._running:
                self._start(name)
        for name in self.ports:
            self._wait_for(name)

    def kill(self, *names: str) -> None:
        """By SIGKILL; without names all of it."""
        for name in names or tuple(self._running):
            process = self._running.pop(name)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str) -> None:
        command = [self.bin / f"swift-{name}-server", self.folder / f"{name}.conf"]
        if name == "memcached":
            command = [name, "-l", "127.0.0.1", "-p", str(self.ports[name]), "-U", "0", "-u", getpass.getuser()]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _wait_for(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.ports[name]), timeout=1).close()
            except OSError:
                if self._running[name].poll() is not None or time.monotonic() > deadline:
                    said = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                    raise AssertionError(f"Swift's {name} did not start: {said}") from None
                time.sleep(0.05)

    def _write_ring(self, name: str) -> None:
        """Where a kind's one copy of everything lies: a ring of 2^4 parts on one device."""
        builder = self.folder / f"{name}.builder"
        device = f"r1z1-127.0.0.1:{self.ports[name]}/d1"
        for words in (["create", "4", "1", "1"], ["add", device, "1"], ["rebalance"]):
            subprocess.run([self.bin / "swift-ring-builder", builder, *words], check=True, capture_output=True)

    def _write_config(self, name: str, rest: str) -> None:
        common = CONFIG.format(port=self.ports[name], user=getpass.getuser(), folder=self.folder)
        (self.folder / f"{name}.conf").write_text(common + rest)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
