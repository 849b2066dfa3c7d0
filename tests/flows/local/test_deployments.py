"""Deployments as a server that counts gets them: new ones whole, standing ones changed and otherwise left as they are."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from uuid import uuid4

import pytest

from flows.local import deployments
from flows.local.deployments import FLOWS, apply_deployments
from flows.local.home import TAG, WORK_POOL
from flows.local.prefect_environment import prefect_folder
from sd3core.files.local_paths import PROJECT

RECIPES = {"mini": "mini", "own": "/home/a/own.yaml"}


class Server:
    """A server's flows and deployments, and the requests that reached it."""

    def __init__(self) -> None:
        self.flows, self.deployments, self.asked = {}, {}, []

    @contextmanager
    def client(self):
        self.asked.append("open")
        yield self

    def create_work_pool(self, pool):
        self.asked.append(f"pool {pool.name}")

    def read_deployments(self, flow_filter, limit, offset):
        self.asked.append("list")
        names = {flow_id: name for name, flow_id in self.flows.items()}
        found = [
            SimpleNamespace(id=each["id"], flow_id=flow_id, name=name)
            for (flow_id, name), each in self.deployments.items()
            if names[flow_id] in flow_filter.name.any_
        ]
        return found[offset : offset + limit]

    def create_flow_from_name(self, name):
        self.asked.append(f"flow {name}")
        return self.flows.setdefault(name, uuid4())

    def create_deployment(self, flow_id, name, **fields):
        self.asked.append("create")
        assert (flow_id, name) not in self.deployments
        self.deployments[flow_id, name] = {"id": uuid4(), "schedules": ()} | fields

    def update_deployment(self, deployment_id, changes):
        self.asked.append("update")
        (standing,) = [each for each in self.deployments.values() if each["id"] == deployment_id]
        standing |= changes.model_dump(exclude_unset=True)

    def one(self, flow, name):
        return self.deployments[self.flows[flow], name]


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    server = Server()
    monkeypatch.setattr(deployments, "prefect_client", server.client)
    return server


def test_each_costs_one_request(server):
    apply_deployments(RECIPES)
    assert len(server.deployments) == len(FLOWS) * len(RECIPES)
    assert sorted(server.asked) == sorted(
        [
            "open",
            "list",
            f"pool {WORK_POOL}",
            *(f"flow {flow}" for flow in FLOWS),
            *["create"] * len(server.deployments),
        ]
    )


def test_they_run_the_flow_of_their_name_with_the_recipe(server):
    apply_deployments(RECIPES)
    made = server.one("pretrain", "own")
    assert made["entrypoint"] == "flows.pretrain.pretrain" and made["tags"] == [TAG]
    assert made["parameters"] == {"recipe": RECIPES["own"], "overrides": []}
    assert made["path"] == made["job_variables"]["working_dir"] == str(prefect_folder())
    assert set(made["parameter_openapi_schema"]["properties"]) == {"recipe", "overrides", "remake"}
    apply_deployments({"mini": "mini"}, work_pool="cluster")
    assert server.one("pretrain", "mini")["path"] == str(PROJECT)


def test_those_that_stand_are_changed_and_keep_what_else_they_have(server):
    """Also one that nobody tagged: the name is the project's."""
    apply_deployments(RECIPES)
    standing = server.one("ingest", "mini")
    standing |= {"schedules": ("daily",), "entrypoint": "old.flows:ingest", "tags": [], "path": "/elsewhere"}
    server.asked.clear()
    apply_deployments(RECIPES)
    assert server.asked.count("update") == len(server.deployments) and "create" not in server.asked
    now = server.one("ingest", "mini")
    assert now["schedules"] == ("daily",) and now["id"] == standing["id"]
    assert (now["entrypoint"], now["tags"], now["path"]) == ("flows.ingest.ingest", [TAG], str(prefect_folder()))
