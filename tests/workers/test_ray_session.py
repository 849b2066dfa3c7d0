"""Ray before it is joined and after it has died: what is told, and how soon. Real processes die in test_pool.py and test_train.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from ray._private import services
from ray._raylet import NodeID
from ray.exceptions import ActorDiedError, AuthenticationError, GetTimeoutError

from sd3core.recipe import Compute
from workers import ray_session
from workers.pool import why_it_died
from workers.ray_session import RayFailed, RayLost, loss_of_ray, start_ray


def refused(address: str) -> str:
    with pytest.raises(RayFailed) as told, start_ray(Compute(ray_address=address)):
        pass
    return str(told.value)


@pytest.fixture
def listener():
    """Takes connections, and says nothing."""
    with socket.create_server((services.get_node_ip_address(), 0)) as server:
        yield f"{server.getsockname()[0]}:{server.getsockname()[1]}"


@pytest.fixture
def own_environment(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_an_address_where_nobody_listens_is_told_in_seconds(listener):
    host, _, _port = listener.partition(":")
    with socket.create_server((host, 0)) as gone:
        free = gone.getsockname()[1]
    began = time.monotonic()
    assert refused(f"{host}:{free}") == (
        f"Ray at compute.ray_address '{host}:{free}' does not answer: [Errno 111] Connection refused; start it there, or correct the address"
    )
    told = refused(f"127.0.0.1:{free}")
    # as Ray reads it
    assert told.startswith(f"Ray at compute.ray_address '127.0.0.1:{free}' ({host}:{free}) does not answer")
    assert refused(f"ray://{host}:{free}").startswith(f"Ray at compute.ray_address 'ray://{host}:{free}'")
    assert time.monotonic() - began < 10


def test_a_host_that_swallows_packets_is_not_waited_for(monkeypatch):
    def slow(address, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", slow)
    assert refused("10.255.255.1:6379").startswith(
        "Ray at compute.ray_address '10.255.255.1:6379' does not answer: timed out;"
    )


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:x", ":6379"])
def test_what_is_no_address_is_one_line(address):
    told = refused(address)
    assert told.startswith(f"Ray at compute.ray_address {address!r}") and "\n" not in told


def test_what_listens_and_is_no_ray_is_told(listener, monkeypatch, own_environment):
    monkeypatch.setattr(ray_session, "ANSWER_S", 0.5)
    assert refused(listener) == (
        f"Ray at compute.ray_address '{listener}' takes connections, but does not answer as the head of a Ray within 0.5 s"
    )


@pytest.mark.parametrize(
    "mode, mend", [(None, "the head's `ray get-auth-token` prints it"), ("disabled", "RAY_AUTH_MODE is disabled here")]
)
def test_a_token_that_ray_does_not_take_is_named_with_its_reason(listener, monkeypatch, own_environment, mode, mend):
    def wrong_token(address):
        raise AuthenticationError("RPC error: InvalidAuthToken: Authentication token is missing or incorrect")

    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(ray_session, "GcsClient", wrong_token)
    monkeypatch.setattr(ray_session, "_enable_token_auth", lambda: os.environ.update(RAY_AUTH_MODE="token"))
    told = refused(listener)
    assert told.startswith(
        f"Ray at compute.ray_address '{listener}' wants its token: RPC error: InvalidAuthToken: Authentication token is missing or incorrect"
    )
    assert told.endswith(f"put it into ~/.ray/auth_token or RAY_AUTH_TOKEN ({mend})")


@pytest.mark.parametrize(
    "wants, has, mode, sent",
    [
        (True, True, None, [None, "token"]),
        (False, True, None, [None]),  # a cluster without tokens could not call back a process that wants them
        (False, True, "token", ["token"]),
    ],
)
def test_a_token_that_is_here_is_sent_where_it_is_asked_for(
    listener, monkeypatch, own_environment, wants, has, mode, sent
):
    seen = []

    def head(address: str) -> None:
        seen.append(os.environ.get("RAY_AUTH_MODE"))
        if wants and seen[-1] != "token":
            raise AuthenticationError("InvalidAuthToken")

    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    loader = SimpleNamespace(instance=lambda: SimpleNamespace(has_token=lambda **_: has))
    monkeypatch.setattr(ray_session, "AuthenticationTokenLoader", loader)
    monkeypatch.setattr(ray_session, "_enable_token_auth", lambda: os.environ.update(RAY_AUTH_MODE="token"))
    monkeypatch.setattr(ray_session, "GcsClient", head)
    ray_session._knock(listener)
    assert seen == sent


OURS, OTHER = NodeID.from_random(), NodeID.from_random()


class Worker:
    """A driver that has joined a cluster; `head` answers who is there, or raises."""

    def __init__(self, head) -> None:
        self.core_worker = SimpleNamespace(get_current_node_id=lambda: OURS)
        self.gcs_client = SimpleNamespace(get_all_node_info=lambda timeout: head())


@pytest.fixture
def joined(monkeypatch):
    """A session of a cluster that was joined `since` seconds ago, and has not been asked for that long."""

    def join(head, since: float = 10.0) -> None:
        session = ray_session._Session(Compute(ray_address="10.0.0.1:6379"), answered_at=time.monotonic() - since)
        monkeypatch.setattr(ray_session, "_session", session)
        monkeypatch.setattr(ray_session.ray_worker, "_global_node", SimpleNamespace(is_head=lambda: False))
        monkeypatch.setattr(ray_session.ray_worker, "global_worker", Worker(head))

    return join


def node(alive: bool) -> SimpleNamespace:
    return SimpleNamespace(state=0 if alive else 1)


def silent():
    raise GetTimeoutError("no answer")


def test_a_cluster_is_lost_with_this_machines_node_and_with_no_other(joined):
    joined(lambda: {OURS: node(True), OTHER: node(False)})
    assert loss_of_ray() is None
    joined(lambda: {OURS: node(False), OTHER: node(True)})
    assert "is no living node of Ray any more: its raylet has died" in loss_of_ray()
    joined(lambda: {OTHER: node(True)})  # a head that was started anew knows nothing of it
    assert "is no living node of Ray any more" in loss_of_ray()


def test_a_head_that_is_slow_is_waited_for_and_one_that_is_silent_is_lost(joined):
    joined(silent, since=10)
    assert loss_of_ray() is None
    joined(silent, since=31)
    assert loss_of_ray() == "the head of Ray has not answered for 31 s"


def test_a_head_is_asked_every_few_seconds_only(joined):
    asked = []
    joined(lambda: asked.append(1) or {OURS: node(True)})
    for _ in range(20):
        loss_of_ray()
    assert asked == [1]


@pytest.mark.parametrize(
    "dead, told",
    [
        ([], None),
        (["raylet"], "Ray's raylet on this machine has died"),
        (["log_monitor", "gcs_server"], "Ray's GCS server on this machine has died"),
        (["log_monitor", "monitor", "dashboard"], None),  # nothing waits for these
    ],
)
def test_a_ray_on_this_machine_is_looked_at_by_its_processes(monkeypatch, dead, told):
    here = SimpleNamespace(is_head=lambda: True, dead_processes=lambda: [(kind, None) for kind in dead])
    monkeypatch.setattr(ray_session.ray_worker, "_global_node", here)
    assert loss_of_ray() == told


def test_ray_begins_when_its_machines_are_first_asked_for_and_by_nothing_else():
    """In a process of its own: the tests of this one may have a Ray already."""
    program = """
import ray
from sd3core.recipe import Compute
from workers.ray_session import living_nodes, ray_when_needed, start_ray

with ray_when_needed(Compute(object_store_mb=80)):
    assert not ray.is_initialized()
    try:
        ray.remote(lambda: None).remote()
    except ray.exceptions.RaySystemError:
        assert not ray.is_initialized()
    else:
        raise AssertionError("Ray began by itself")
    (node,) = living_nodes()
    assert ray.is_initialized() and node.name == "127.0.0.1"
    with start_ray(Compute()):
        assert living_nodes() == [node]
    assert ray.is_initialized()
assert not ray.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180)


def test_a_ray_that_another_has_started_is_not_started_again():
    with pytest.raises(RayLost, match="^gone$"):
        ray_session.restart_ray(RayLost("gone"))


class Died(ActorDiedError):
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def test_an_actor_that_lacks_a_module_says_so():
    died = Died(
        "The actor died because of an error raised in its creation task, ray::_ActorHost.__init__() (pid=1, ip=10.0.0.7, actor_id=f)\n"
        "  File \"x.py\", line 1\nModuleNotFoundError: No module named 'workers'\n"
    )
    assert why_it_died(died) == (
        "ModuleNotFoundError: No module named 'workers': Python on node 10.0.0.7 lacks it; install this project and its lock there,"
        " at the same versions"
    )
    assert why_it_died(Died("Worker exit type: SYSTEM_ERROR")) == "the worker process died"
    assert (
        why_it_died(Died("killed due to the node running low on memory")) == "the worker process died (out of memory)"
    )
