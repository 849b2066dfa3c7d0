"""What is asked of Ray's nodes against what they have: one line that names the key, or none."""

from __future__ import annotations

import pytest

from sd3core.recipe import Compute
from sd3core.recipe_compute import ACTOR_STAGES
from workers.pool import PoolSettings
from workers.ray_room import Node, actors_problem, gpus_have_bf16, ranks_problem

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


def test_a_stage_has_actors_of_its_own_and_ingest_and_towers_no_gpu():
    compute = Compute(
        actors=8,
        cpus_per_actor=4,
        gpus_per_actor=1,
        ingest={"actors": 99},
        caption={"gpus_per_actor": 4},
        evaluate={"cpus_per_actor": 2},
    )
    asked = {stage: compute.for_stage(stage) for stage in ACTOR_STAGES}
    found = {stage: (of.actors, of.cpus_per_actor, of.gpus_per_actor) for stage, of in asked.items()}
    assert found == {
        "ingest": (99, 4, 0),
        "towers": (8, 4, 0),
        "filter": (8, 4, 1),
        "caption": (8, 4, 4),
        "encode": (8, 4, 1),
        "evaluate": (8, 2, 1),
    }
    assert compute.most_cpus == 99 * 4
    nodes = [Node("a", 16, 2)]
    assert [stage for stage, of in asked.items() if actors_problem(of, nodes)] == ["caption"]
    assert actors_problem(asked["caption"], nodes).startswith(
        "compute.caption.gpus_per_actor 4 is more than the 2 GPUs"
    )
    settings = PoolSettings.of(asked["caption"])
    assert (settings.actors, settings.gpus_per_actor) == (8, 4)
    assert actors_problem(settings, nodes) == actors_problem(asked["caption"], nodes)
    assert (settings.key("actors"), settings.key("gpus_per_actor")) == (
        "compute.actors",
        "compute.caption.gpus_per_actor",
    )


def test_by_default_every_stage_has_what_compute_says():
    compute = Compute(actors=3, cpus_per_actor=2)
    for stage in ACTOR_STAGES:
        of = compute.for_stage(stage)
        assert (of.actors, of.cpus_per_actor, of.gpus_per_actor, of.cache_gb) == (3, 2, 0, 2)


@pytest.mark.parametrize(
    "nodes, autoscaling, able",
    [
        ([Node("a", 8, 8, ("H100",)), Node("b", 64, 0)], False, True),
        ([Node("a", 8, 8, ("H100",)), Node("b", 8, 1, ("V100",))], False, False),
        ([Node("a", 8, 1)], False, True),  # a kind that Ray does not name
        ([Node("a", 8, 0)], False, False),
        ([Node("a", 8, 0)], True, True),
        ([Node("a", 8, 1, ("T4",))], True, False),
    ],
)
def test_bf16_is_fast_where_every_gpu_has_arithmetic_for_it(nodes, autoscaling, able):
    assert gpus_have_bf16(nodes, autoscaling) is able


@pytest.mark.parametrize("key", ["gpus_per_actor", "gpus_per_rank"])
def test_gpus_are_shared_or_whole(key):
    """Ray refuses others, deep inside the stage."""
    with pytest.raises(ValueError, match="1.5 GPUs: Ray shares one GPU, or gives whole ones"):
        Compute(**{key: 1.5})
    assert getattr(Compute(**{key: 2.0}), key) == 2
