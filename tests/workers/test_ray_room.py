"""What is asked of Ray's nodes against what they have: one line that names the key, or none."""

from __future__ import annotations

import pytest

from sd3core.recipe import Compute
from workers.ray_room import Node, actors_problem, ranks_problem

LAPTOP = [Node("127.0.0.1", 2, 0)]
CLUSTER = [Node(f"10.0.0.{i}", 32, 8) for i in range(256)]
HEAD_AND_ONE = [Node("10.0.0.1", 16, 0), Node("10.0.0.2", 2, 1)]
GROWS = "set compute.autoscaling where the cluster adds nodes by itself"


@pytest.mark.parametrize(
    "asked, nodes, problem",
    [
        ({}, LAPTOP, None),
        ({"actors": 100}, LAPTOP, None),  # they take turns
        ({"cpus_per_actor": 2.0}, LAPTOP, None),
        ({"cpus_per_actor": 0.1}, [Node("a", 0.1, 0)], None),
        ({"gpus_per_actor": 0.3, "cpus_per_actor": 1}, [Node("a", 1, 0.3)], None),
        ({"gpus_per_actor": 8, "cpus_per_actor": 32}, CLUSTER, None),
        (
            {"gpus_per_actor": 1},
            LAPTOP,
            f"compute.gpus_per_actor 1 is more than the 0 GPUs that the largest node of Ray has; lower it, or {GROWS}",
        ),
        (
            {"cpus_per_actor": 33},
            CLUSTER,
            f"compute.cpus_per_actor 33 is more than the 32 CPUs that the largest node of Ray has (10.0.0.0); lower it, or {GROWS}",
        ),
        (
            {"cpus_per_actor": 4, "gpus_per_actor": 1},
            HEAD_AND_ONE,
            f"compute.cpus_per_actor 4 and compute.gpus_per_actor 1: no single node of Ray has both; lower one of them, or {GROWS}",
        ),
        (
            {"cpus_per_actor": 1},
            [],
            f"compute.cpus_per_actor 1 is more than the 0 CPUs that the largest node of Ray has; lower it, or {GROWS}",
        ),
        ({"gpus_per_actor": 9, "autoscaling": True}, CLUSTER, None),
    ],
)
def test_an_actor_needs_one_node_that_holds_it(asked, nodes, problem):
    assert actors_problem(Compute(**asked), nodes) == problem


@pytest.mark.parametrize(
    "asked, nodes, problem",
    [
        ({}, LAPTOP, None),
        ({"train_ranks": 2048, "gpus_per_rank": 1, "cpus_per_rank": 4}, CLUSTER, None),
        (
            {"train_ranks": 2049, "gpus_per_rank": 1, "cpus_per_rank": 1},
            CLUSTER,
            f"compute.train_ranks 2049 x compute.gpus_per_rank 1 is more than the 2048 GPUs that Ray has; lower one of them, or {GROWS}",
        ),
        (
            {"train_ranks": 4, "cpus_per_rank": 64},
            CLUSTER,
            f"compute.cpus_per_rank 64 is more than the 32 CPUs that the largest node of Ray has (10.0.0.0); lower it, or {GROWS}",
        ),
        (
            {"train_ranks": 2, "cpus_per_rank": 3},
            [Node("a", 5, 0), Node("b", 1, 0)],
            "compute.train_ranks 2: the nodes of Ray hold 1 such ranks (compute.cpus_per_rank 3), each whole on one node;"
            f" lower one of them, or {GROWS}",
        ),
        ({"train_ranks": 10, "cpus_per_rank": 0.1}, [Node("a", 1, 0)], None),
        ({"train_ranks": 64, "gpus_per_rank": 1, "autoscaling": True}, LAPTOP, None),
    ],
)
def test_ranks_need_nodes_that_hold_them_all(asked, nodes, problem):
    assert ranks_problem(Compute(**asked), nodes) == problem


@pytest.mark.parametrize("key", ["gpus_per_actor", "gpus_per_rank"])
def test_gpus_are_shared_or_whole(key):
    """Ray refuses others, deep inside the stage."""
    with pytest.raises(ValueError, match="1.5 GPUs: Ray shares one GPU, or gives whole ones"):
        Compute(**{key: 1.5})
    assert getattr(Compute(**{key: 2.0}), key) == 2
