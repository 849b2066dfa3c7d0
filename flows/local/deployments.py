"""Prefect's deployments `STAGE/RECIPE` and their work pool.

A deployment's name is the recipe's; its parameters are the recipe and an empty list of overrides, so
`prefect deployment run 'pretrain/mini' --param 'overrides=["pretrain.samples=9600"]'` changes one run only.
"""

from __future__ import annotations

from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags, FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.local.home import TAG, WORK_POOL
from flows.local.prefect_client import AT_ONCE, prefect_client, read_whole
from flows.local.prefect_environment import prefect_folder
from flows.local.recipes import known_recipes
from sd3core.files.local_paths import PROJECT
from sd3core.specs import STAGES, fingerprint

FLOWS = (*STAGES, "pipeline")
ENTRYPOINT = "flows.{flow}.{flow}"
PARAMETERS = ("recipe", "overrides", "remake")  # of every flow; another list has the deployments written again


def deployments_fingerprint() -> str:
    return fingerprint(
        {
            "project": str(PROJECT),
            "begins_in": str(prefect_folder()),
            "entrypoint": ENTRYPOINT,
            "flows": FLOWS,
            "parameters": PARAMETERS,
            "recipes": known_recipes(),
        }
    )


def apply_deployments(recipes: dict[str, str] | None = None, work_pool: str = WORK_POOL) -> None:
    """Creates the work pool and every deployment; those that stand are updated in place. `recipes`: None takes all known ones.

    This home's runs begin in a folder that holds no settings of Prefect's. Elsewhere it is the checkout: a worker there finds the
    flows in it.
    """
    recipes = recipes or known_recipes()
    begins_in = str(prefect_folder() if work_pool == WORK_POOL else PROJECT)
    with prefect_client() as client:  # one for all: each would ask for the server's version and a token to write with
        try:
            client.create_work_pool(WorkPoolCreate(name=work_pool, type="process"))
        except ObjectAlreadyExists:
            pass
        ours = FlowFilter(name=FlowFilterName(any_=list(FLOWS)))
        found = read_whole(lambda offset: client.read_deployments(flow_filter=ours, limit=AT_ONCE, offset=offset))
        standing = {(each.flow_id, each.name): each.id for each in found}
        for name in FLOWS:
            flow = load_flow_from_entrypoint(ENTRYPOINT.format(flow=name))
            flow_id = client.create_flow_from_name(flow.name)
            fields = {
                "version": flow.version,
                "description": flow.description,
                "entrypoint": ENTRYPOINT.format(flow=name),
                "parameter_openapi_schema": parameter_schema(flow).model_dump(exclude_unset=True),
                "enforce_parameter_schema": True,
                "work_pool_name": work_pool,
                "job_variables": {"working_dir": begins_in},
                "path": begins_in,  # from any other folder Prefect copies all files before each run
                "tags": [TAG],
            }
            for recipe_name, recipe in recipes.items():
                own = fields | {"parameters": {"recipe": recipe, "overrides": []}}
                if stands := standing.get((flow_id, recipe_name)):  # keeps what else it has: a schedule, a limit
                    client.update_deployment(stands, DeploymentUpdate(**own))
                else:
                    client.create_deployment(flow_id, recipe_name, pull_steps=[], **own)


def tagged_deployments() -> list[DeploymentResponse]:
    """All with the tag of this project, which others may have given to theirs."""
    wanted = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    with prefect_client() as client:
        return read_whole(
            lambda offset: client.read_deployments(deployment_filter=wanted, limit=AT_ONCE, offset=offset)
        )


def worker_heartbeats() -> set[str]:
    """When workers of the pool last told the server that they live, by the server's clock: a new one lives now."""
    path = {"name": WORK_POOL}
    with prefect_client() as client:
        try:
            workers = client.request("POST", "/work_pools/{name}/workers/filter", path_params=path, json={}).json()
        except ObjectNotFound:
            return set()
    return {worker["last_heartbeat_time"] for worker in workers if worker["last_heartbeat_time"]}
