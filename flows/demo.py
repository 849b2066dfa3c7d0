"""`make demo`: services, one pipeline run, live progress, and what came of it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from rich.console import Console

from flows.home import PROJECT
from flows.services import ServiceError, up
from sd3core.errors import DataError, UserError
from sd3core.recipe import Recipe, load_recipe

EXAMPLE_PROMPT = "a red circle to the left of a blue square"
RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class RunFailed(UserError):
    """A run that ended without being completed."""


def folder_overrides(recipe: Recipe, folder: Path) -> list[str]:
    """The same recipe on a user's folder of images: its own data set, towers and run, no drawn world's captioner."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"DATA={folder}: no such folder")
    slug = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")[:40] or "folder"
    name = f"{slug}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
    overrides = [
        "data.source=folder",
        f"data.folder={json.dumps(str(folder))}",
        f"data.name={json.dumps(name)}",
        f"towers.name={json.dumps(name)}",
        f"run={json.dumps(name)}",
    ]
    if recipe.caption.captioner == "small_world":
        overrides.append("caption.captioner=none")
    return overrides


def demo(
    recipe_name: str, folder: Path | None, overrides: list[str], console: Console, from_stage: str | None = None
) -> dict[str, Any]:
    """Runs `pipeline/RECIPE` to its end and prints its result. Raises RunFailed with the stage's own words."""
    if folder is not None:
        overrides = [*folder_overrides(load_recipe(recipe_name, []), folder), *overrides]
    recipe = load_recipe(recipe_name, overrides)
    services = up(lambda line: console.print(line, soft_wrap=True, highlight=False))

    from flows.deployments import live_run
    from flows.session import run_store
    from flows.summary import print_summary, summary_path
    from flows.terminal import follow

    deployment = f"pipeline/{recipe_name}"
    running = live_run(deployment)
    if running and from_stage:
        raise UserError(
            f"run {running.name} of {deployment} is at work; `sd3 down` ends it, then --from-stage can begin"
        )
    run_id = (
        running.id if running else start_run(deployment, {"overrides": overrides, "from_stage": from_stage}, console)
    )
    console.print(f"run {run_id}: {services.ui_url}/runs/flow-run/{run_id}", soft_wrap=True, highlight=False)
    view = follow(run_id, services, console)
    if view.state.value != "COMPLETED":
        failed = [
            f"{stage.name}: {stage.progress}"
            for stage in view.stages
            if stage.state in ("failed", "crashed", "cancelled")
        ]
        raise RunFailed(
            f"{failed[0] if failed else view.message or view.state.value.lower()} (the same command goes on from there)"
        )
    store = run_store(recipe)
    summary = store.get_json(summary_path(recipe))
    print_summary(summary, store, recipe, services, console, sample_command(recipe_name, recipe, overrides))
    return summary


def sample_command(recipe_name: str, recipe: Recipe, overrides: list[str]) -> list[str]:
    """The command that draws from what this run made, ready to paste."""
    command = [".venv/bin/sd3", "sample", shlex.quote(EXAMPLE_PROMPT)]
    if recipe_name != "mini":
        command += ["--recipe", shlex.quote(recipe_name)]
    for override in overrides:
        command += ["--set", shlex.quote(override)]
    return command


def start_run(deployment: str, parameters: dict[str, Any], console: Console) -> UUID:
    """Starts the deployment with Prefect's own command, as a user would."""
    command = ["prefect", "--no-prompt", "deployment", "run", deployment]
    for name, value in parameters.items():
        if value:
            command += ["--param", f"{name}={json.dumps(value)}"]
    console.print(f"$ {shlex.join(command)}", soft_wrap=True, highlight=False)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    found = RUN_ID.search(done.stdout)
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ServiceError(
            f"`prefect deployment run {deployment}` failed: {said[-1] if said else 'it printed nothing'}"
        )
    return UUID(found.group(0))
