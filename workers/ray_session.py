"""Starts or joins this process's Ray, watches it, and starts it again.

A Ray at compute.ray_address is joined; one that died is started again. Nothing but this module begins one.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_token_setup import _enable_token_auth
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sd3core.errors import UserError, error_in_one_line
from sd3core.recipe import Compute
from workers.ray_room import Node
from workers.session_folders import scratch_folder, sessions_folder

RAY_WAS_LATE = "timed out during startup"
STARTS = 3  # of a Ray on this machine, where other work makes it late
KNOCK_S = 5.0  # for an address to take a connection
ANSWER_S = 10.0  # for the head of a cluster to answer its first question
ASK_EVERY_S = 5.0  # a cluster's head is asked whether this machine is one of its nodes
ASK_S = 2.0  # for that answer
NOTICED_S = 25.0  # at most until the head has noticed that a node is dead
SILENT_HEAD_S = 30.0  # a head that has not answered for so long is gone: after a minute Ray would end this process
DRIVERS_NODE = "SD3_DRIVERS_NODE"
ORPHAN_S = 600  # so long after its GCS server's death Ray ends this process, which may be at work without Ray; Ray's own is a minute
LOCAL_RAY = {
    "gcs_rpc_server_reconnect_timeout_s": ORPHAN_S,
    # it would start a worker for every CPU, and none would be used: actors and ranks have an environment of their own
    "prestart_worker_first_driver": False,
}
GPU_KIND = "accelerator_type:"  # so begins a node's resource that names the kind of its GPUs
NEEDED = {"gcs_server": "GCS server", "raylet": "raylet"}  # without these nothing goes on; the others only log


class RayFailed(UserError):
    """Ray cannot be started, reached or kept."""


class RayLost(RayFailed):
    """The Ray that this process worked with has died: nothing that was asked of it will ever be answered."""


@dataclass
class _Session:
    """The Ray that this process has started or joined itself."""

    compute: Compute
    scratch: Path | None = None
    asked_at: float = 0.0
    answered_at: float = 0.0
    loss: str | None = None


_session: _Session | None = None


@contextmanager
def start_ray(compute: Compute) -> Iterator[None]:
    """Ray for the duration of the block: this machine on loopback, or the cluster at compute.ray_address.

    A Ray that the process has already is used and left as it is; where it has died meanwhile, it is started again.
    CPUs are Ray's scheduling units: as many as the recipe asks for, whatever the machine has. What Ray's processes on
    this machine leave in their folder for temporary files goes when the block ends, whoever was killed in it.
    """
    with ray_when_needed(compute):
        _open_once()
        yield


@contextmanager
def ray_when_needed(compute: Compute) -> Iterator[None]:
    """As `start_ray`, but Ray is started or joined when `living_nodes` is first asked: where all is done, it never is."""
    global _session
    if _session is not None or ray.is_initialized():
        yield
        return
    _session = session = _Session(compute)
    try:
        yield
    finally:
        _session = None
        ray.shutdown()
        if session.scratch:
            shutil.rmtree(session.scratch, ignore_errors=True)


def _open_once() -> None:
    """This process's Ray: started or joined unless it has been, and again where it has died."""
    if not ray.is_initialized() and _session is not None:
        _open(_session)
    elif lost := loss_of_ray():
        restart_ray(RayLost(lost))


def restart_ray(lost: RayLost) -> None:
    """Ends this process's dead Ray and starts or joins one as before. Raises `lost` where another has started it."""
    if _session is None:
        raise lost
    ray.shutdown()
    _open(_session)


def check_ray() -> None:
    """Raises RayLost where Ray answers nothing any more: its actors' deaths are then not their own."""
    if lost := loss_of_ray():
        raise RayLost(lost)


def loss_of_ray(patient: bool = False) -> str | None:
    """What has died so that this process's Ray answers nothing any more, in words; None while it works.

    A Ray on this machine is looked at by its processes, so that no load makes it look dead. (The raylet ends itself when one of its
    agents has died.) A cluster is lost when its head says that this machine is no living node of it, or says nothing; it notices that
    after seconds, which `patient` waits.
    """
    node = ray_worker._global_node
    if node is None:  # a Ray Client's connection, which Ray keeps up itself
        return None
    if node.is_head():
        dead = [NEEDED[kind] for kind, _ in node.dead_processes() if kind in NEEDED]
        return f"Ray's {dead[0]} on this machine has died" if dead else None
    if _session is None:
        return None
    deadline = time.monotonic() + (NOTICED_S if patient else 0)
    while _session.loss is None:
        if time.monotonic() - _session.asked_at >= ASK_EVERY_S:
            _session.loss = _ask_the_head(_session)
        if time.monotonic() >= deadline:
            break
        time.sleep(1)
    return _session.loss


def _ask_the_head(session: _Session) -> str | None:
    worker = ray_worker.global_worker
    own = worker.core_worker.get_current_node_id()
    try:
        known = worker.gcs_client.get_all_node_info(timeout=ASK_S)
    except RayError:
        silent_s = time.monotonic() - session.answered_at
        return f"the head of Ray has not answered for {silent_s:.0f} s" if silent_s > SILENT_HEAD_S else None
    finally:
        session.asked_at = time.monotonic()
    session.answered_at = session.asked_at
    alive = any(node_id == own and info.state == 0 for node_id, info in known.items())
    return (
        None
        if alive
        else f"this machine's node ({own.hex()[:12]}) is no living node of Ray any more: its raylet has died"
    )


def on_this_node() -> NodeAffinitySchedulingStrategy | None:
    """Where an actor runs that must live as long as this process: on its node, whose loss ends both."""
    if ray_worker._global_node is None:  # a Ray Client's machine is no node
        return None
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def drivers_mark() -> dict[str, str]:
    """A mark in the environment of this process's actors and ranks: by it they know whether they run elsewhere."""
    if ray_worker._global_node is None:  # a Ray Client's machine is no node
        return {}
    return {DRIVERS_NODE: ray.get_runtime_context().get_node_id()}


def elsewhere() -> str:
    """Which machine an actor or rank runs on, for the end of an error that is read on another; "" on that one."""
    drivers = os.environ.get(DRIVERS_NODE)
    if drivers is None or ray.get_runtime_context().get_node_id() == drivers:
        return ""
    return f" (on {socket.gethostname()}, {ray.util.get_node_ip_address()})"


def living_nodes() -> list[Node]:
    """The machines of this process's Ray, which begins here where it is still to begin."""
    _open_once()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            tuple(name.removeprefix(GPU_KIND) for name in node["Resources"] if name.startswith(GPU_KIND)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _open(session: _Session) -> None:
    compute = session.compute
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if compute.ray_address:
        _join(compute.ray_address)
    else:
        _start(session)
    session.loss, session.answered_at = None, time.monotonic()


QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


def _start(session: _Session) -> None:
    """Ray on this machine. It gives itself half a minute, which may not do beside other work: it is tried again."""
    compute, clusters_allowed = session.compute, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # else ray.init turns 127.0.0.1 into the address that others reach
    try:
        sessions = sessions_folder()
        for attempt in range(STARTS):
            try:
                with scratch_folder() as session.scratch:
                    ray.init(
                        address="local",  # also where RAY_ADDRESS names a cluster, or an older session left its traces
                        _node_ip_address="127.0.0.1",
                        _temp_dir=str(sessions),
                        num_cpus=max(1, math.ceil(compute.most_cpus)),
                        object_store_memory=compute.object_store_mb * 1024**2,
                        include_dashboard=False,
                        _system_config=LOCAL_RAY,
                        **QUIET,
                    )
                return
            except (ConnectionError, RayError, RuntimeError, ValueError) as error:
                raise RayFailed(f"Ray on this machine cannot be started: {error_in_one_line(error)}") from None
            except Exception as error:
                if RAY_WAS_LATE not in str(error):  # Ray has no class of its own for it
                    raise
                ray.shutdown()
                if attempt == STARTS - 1:
                    raise RayFailed(
                        f"Ray did not start within its half minute, tried {STARTS} times: other work keeps this machine busy"
                    ) from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters_allowed


def _join(address: str) -> None:
    """A cluster. Ray itself would try an address where nothing answers for a quarter of an hour."""
    _knock(address)
    try:
        ray.init(address=address, **QUIET)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        reason = error_in_one_line(error.__cause__ or error)
        raise RayFailed(f"Ray at compute.ray_address {address!r} cannot be reached: {reason}") from None


def _knock(address: str) -> None:
    """Raises RayFailed unless Ray answers there within seconds. Where it wants a token, the one of this machine is sent from here on."""
    where = f"Ray at compute.ray_address {address!r}"
    try:
        found = address.partition("://")[2] or services.canonicalize_bootstrap_address_or_die(address)
        host, port = services.parse_address(found) or ("", "")
        # "auto" finds one, and Ray turns 127.0.0.1 into this machine's address
        where += f" ({found})" if found != address else ""
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
    except (OSError, ValueError) as error:
        raise RayFailed(
            f"{where} does not answer: {error_in_one_line(error)}; start it there, or correct the address"
        ) from None
    if "://" in address:
        return
    mode = os.environ.get("RAY_AUTH_MODE")
    refused = _ask_as_a_head(found, where)
    if refused and mode is None and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        _enable_token_auth()  # only where it is asked for: a cluster without tokens could not call this process back
        refused = _ask_as_a_head(found, where)
    if refused:
        had = "RAY_AUTH_MODE is disabled here" if mode == "disabled" else "the head's `ray get-auth-token` prints it"
        raise RayFailed(
            f"{where} wants its token: {error_in_one_line(refused).partition('. ')[0]}; put it into ~/.ray/auth_token or RAY_AUTH_TOKEN ({had})"
        )


def _ask_as_a_head(address: str, where: str) -> AuthenticationError | None:
    """Whether and why it refuses this process. Raises RayFailed where it is no head of a Ray."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(GcsClient(address=address))
        except RayError as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)  # Ray's own patience is longer, and cannot be set
    thread.start()
    thread.join(ANSWER_S)
    if not answer:
        raise RayFailed(f"{where} takes connections, but does not answer as the head of a Ray within {ANSWER_S:g} s")
    if isinstance(answer[0], AuthenticationError):
        return answer[0]
    if isinstance(answer[0], RayError):
        raise RayFailed(f"{where} cannot be reached: {error_in_one_line(answer[0])}")
    return None
