"""Prefect's deployments `STAGE/RECIPE` and their work pool.

A deployment's name is the recipe's; its parameters are the recipe and an empty list of overrides, so
`prefect deployment run 'pretrain/mini' --param 'overrides=["pretrain.samples=9600"]'` changes one run only.
"""

from __future__ import annotations

from datetime import datetime

from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flows.home import PROJECT
from flows.prefect_client import prefect_client
from flows.recipes import known_recipes
from flows.services import WORK_POOL
from sd3core.specs import STAGES, fingerprint

FLOWS = (*STAGES, "pipeline")
PARAMETERS = ("recipe", "overrides", "remake")  # of every flow; another list has the deployments written again


def deployments_fingerprint() -> str:
    return fingerprint(
        {"project": str(PROJECT), "flows": FLOWS, "parameters": PARAMETERS, "recipes": known_recipes()}
    )


def apply_deployments(recipes: dict[str, str] | None = None, work_pool: str = WORK_POOL) -> None:
    """Creates the work pool and every deployment; those that stand are updated in place. `recipes`: None takes all known ones."""
    with prefect_client() as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=work_pool, type="process"))
        except ObjectAlreadyExists:
            pass
    for flow in FLOWS:
        for name, recipe in (recipes or known_recipes()).items():
            deployment = RunnerDeployment.from_entrypoint(
                f"flows/{flow}.py:{flow}",
                name=name,
                parameters={"recipe": recipe, "overrides": []},
                work_pool_name=work_pool,
                job_variables={"working_dir": str(PROJECT)},
                tags=["sd3"],
            )
            deployment._path = str(PROJECT)  # private: the public way builds an image or pulls from a remote store
            deployment.apply()


def worker_is_online(since: float) -> bool:
    """Has the worker polled the pool after `since` (Unix seconds)?"""
    path = {"name": WORK_POOL}
    with prefect_client() as client:
        try:
            workers = client.request("POST", "/work_pools/{name}/workers/filter", path_params=path, json={}).json()
        except ObjectNotFound:
            return False
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["last_heartbeat_time"]]
    return any(datetime.fromisoformat(beat).timestamp() > since for beat in beats)
