"""A Ray of two nodes: what must live with the driver stays on its node, an error names the other, and which loss is whose."""

from __future__ import annotations

import sys

import pytest
import ray
from ray.cluster_utils import Cluster

from sd3core.errors import DataError
from sd3core.recipe import Compute
from workers.pool import PoolFailed, PoolSettings, map_over_actors
from workers.ray_session import living_nodes, loss_of_ray, on_this_node, start_ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module
pytestmark = pytest.mark.slow
SMALL = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The driver's node has no CPU to schedule on: whatever asks for one runs on the other."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        made.add_node(num_cpus=2, **SMALL)
        with start_ray(Compute(ray_address=made.address)):
            yield made
    finally:
        made.shutdown()


class Where:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


class Refuses:
    def __call__(self, task: str) -> None:
        raise DataError("s3://bucket: no credentials")


@pytest.mark.usefixtures("cluster")
def test_what_asks_for_no_cpu_stays_on_the_drivers_node():
    """Ray gives such an actor to any node."""
    pinned = ray.remote(num_cpus=0, scheduling_strategy=on_this_node())(Where)
    actors = [pinned.remote() for _ in range(4)]
    nodes = ray.get([actor.node.remote() for actor in actors])
    assert set(nodes) == {ray.get_runtime_context().get_node_id()}


@pytest.mark.usefixtures("cluster")
def test_an_error_of_another_machine_names_it():
    [outcome] = map_over_actors(Refuses, {}, ["a"], PoolSettings(actors=1, max_attempts=1))
    assert outcome.error.startswith("s3://bucket: no credentials (on ")


@pytest.mark.usefixtures("cluster")
def test_an_actor_must_fit_one_node_not_all_of_them_together():
    assert sorted(node.cpus for node in living_nodes()) == [0, 2]
    with pytest.raises(
        PoolFailed, match="^compute.cpus_per_actor 3 is more than the 2 CPUs that the largest node of Ray has"
    ):
        map_over_actors(Refuses, {}, ["a"], PoolSettings(actors=1, cpus_per_actor=3))


def test_the_session_is_lost_with_the_drivers_node_only(cluster):
    cluster.remove_node(
        next(node for node in cluster.list_all_nodes() if node is not cluster.head_node), allow_graceful=False
    )
    assert loss_of_ray(patient=False) is None
    cluster.head_node.kill_raylet()
    assert "is no living node of Ray any more: its raylet has died" in loss_of_ray(patient=True)
