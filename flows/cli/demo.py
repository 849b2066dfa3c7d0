"""`make demo`: services, one pipeline run, live progress, and what came of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from rich.console import Console

from flows.cli.closing import print_summary
from flows.cli.data_option import folder_overrides
from flows.local.home import local_command, run_store
from flows.local.interrupt import Interrupted, kept_from_children, listen, put_off, unheard
from flows.local.prefect_environment import prefect_folder
from flows.local.recipes import DEFAULT_RECIPE, find_recipe
from flows.local.services import ServiceError, Services, start_services, worker_lives
from flows.redo import check_stage, forget_from
from flows.summary import of_stage
from flows.upgrade import check_upgrade
from sd3core.data.folder_listing import READABLE_SUFFIXES, holds_nothing
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.store import Store
from sd3core.errors import DataError, UserError
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.recipe_yaml import yaml_text
from sd3core.shown_text import shell_word
from sd3core.specs import summary_path
from sd3core.words import cut_at_word, one_line

if TYPE_CHECKING:
    from flows.cli.terminal import RunView

DOWN = local_command("sd3 down")
PROMPT_CHARS = 120
START_SECONDS = 120
EXAMPLE_PROMPT = "a red circle left of a blue square"
RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class RunFailed(UserError):
    """A run that ended without being completed."""


def run_demo(
    name_or_path: str,
    data: str | None,
    overrides: list[str],
    console: Console,
    from_stage: str | None = None,
    remake: bool = False,
) -> dict[str, Any]:
    """Runs `pipeline/RECIPE` to its end and prints its result. Raises RunFailed with the stage's own words.

    A run of the same recipe and settings that is at work already is joined. `from_stage`: this stage and those after it are
    made again, once: the same command without it goes on with them. `remake`: so may be what this version makes otherwise
    than the one that it stands from.
    """
    name, source = find_recipe(name_or_path)
    if data is not None:
        overrides = [*folder_overrides(load_recipe(source, []), data), *overrides]
    recipe = load_recipe(source, overrides)
    if data is not None and recipe.data.source == "folder" and holds_nothing(Path(data)):
        raise DataError(f"DATA (--data) {data}: no image file in it ({' '.join(sorted(READABLE_SUFFIXES))})")
    store = run_store(recipe)
    if from_stage:
        check_stage(from_stage)
    store.check()  # what cannot be is told before anything starts
    settled = settle_precisions(recipe, store)
    check_upgrade(settled, store, remake, from_stage=from_stage)
    services = start_services(lambda line: console.print(line, soft_wrap=True, highlight=False))
    listen(f"stopped; the services stay, `{DOWN}` stops them; the same command goes on")

    run_id = _run_at_work(recipe)
    if run_id and from_stage:
        raise UserError(f"run {recipe.run} is at work; `{DOWN}` ends it, then --from-stage {from_stage} can begin")
    if from_stage:
        from flows.session import run_lock

        with run_lock(store.url, recipe.run, seconds=0):  # a stage of another deployment may work on it
            forgotten = forget_from(settled, store, from_stage)
        console.print(f"made again: {', '.join(forgotten)}", soft_wrap=True, highlight=False)
    parameters = ({"recipe": source} if source != name else {}) | ({"overrides": overrides} if overrides else {})
    parameters |= {"remake": True} if remake else {}  # also what only shows when the stages before it are made again
    view = _run_to_the_end(run_id, recipe, f"pipeline/{name}", parameters, services, console)
    if view.state.value != "COMPLETED":
        raise RunFailed(
            f"{_first_failure(view)} (the same command{' without --from-stage' if from_stage else ''} goes on from there)"
        )
    summary = store.get_json(summary_path(recipe.run))
    command = sample_command(recipe, _example_prompt(settle_precisions(recipe, store), store))
    print_summary(summary, store, recipe, services, console, command)
    return summary


def _run_to_the_end(
    joined: UUID | None,
    recipe: Recipe,
    deployment: str,
    parameters: dict[str, Any],
    services: Services,
    console: Console,
) -> RunView:
    """Follows the run that is joined, or starts one. After Ctrl-C the one that it started is ended, one that it joined goes on; so
    too where its process has read another recipe.
    """
    from flows.cli.terminal import follow
    from flows.local.runs import OtherRecipe, Reads, cancel_run

    run_id = joined
    try:
        if run_id is None:
            with put_off():  # once asked for, the run comes: its id is needed to end it
                run_id = start_run(deployment, parameters, console)
        console.print(f"run {run_id}: {services.ui_url}/runs/flow-run/{run_id}", soft_wrap=True, highlight=False)
        return follow(run_id, console, Reads.of(recipe))
    except OtherRecipe:
        if not joined:
            cancel_run(run_id, "It read another recipe than the command that started it.")
        raise RunFailed(
            f"run {recipe.run}: its process read another recipe than this command{'' if joined else ', so it was ended'}; its file was"
            f" edited meanwhile, and the same command takes it as it is now, or the services are of another checkout, and `{DOWN}` comes first"
        ) from None
    except Interrupted:
        if run_id is None:
            raise
        if joined:
            raise Interrupted(f"the run goes on; the same command shows it again, `{DOWN}` ends it") from None
        with unheard():
            console.print("ending the run", highlight=False)
            cancel_run(run_id)
        raise Interrupted(
            "the run is cancelled and its processes have ended; the same command goes on from there,"
            f" `{DOWN}` stops the services"
        ) from None


def _run_at_work(recipe: Recipe) -> UUID | None:
    """The unfinished pipeline run that reads this very recipe. RunFailed where one with another recipe works on the same run."""
    from flows.local.runs import Reads, flow_name, unfinished_runs, what_it_reads

    wanted = Reads.of(recipe)
    for run in unfinished_runs():
        reads = what_it_reads(run) if flow_name(run.flow_id) == "pipeline" else None
        if reads == wanted:
            return run.id
        if reads and (reads.store, reads.run) == (wanted.store, wanted.run):
            overrides = " ".join(run.parameters.get("overrides") or []) or "no overrides"
            raise RunFailed(
                f"run {recipe.run}: flow run {run.name} works on it with other settings (recipe {run.parameters['recipe']} as it"
                f" was when that run began, {overrides}); wait for it, or `{DOWN}` ends it"
            )
    return None


def _first_failure(view: RunView) -> str:
    from flows.local.runs import GONE

    if view.state.value != "CANCELLED" and not worker_lives():
        return "the Prefect worker has ended, and the run with it"
    failed = [stage for stage in view.stages if stage.state in ("failed", "crashed", "cancelled")]
    problem = of_stage(failed[0].name, failed[0].progress) if failed else view.message or view.state.value.lower()
    return problem.replace(GONE, "its process is gone")  # the rest of that is for the UI


def _example_prompt(recipe: Recipe, store: Store) -> str:
    """A prompt of what the run has learned: for a user's own images one of their captions."""
    if recipe.data.source == "small_world":
        return EXAMPLE_PROMPT
    from flows.ui.previews import preview_captions
    from flows.upstream import Upstream

    last, _ = recipe.phases()[-1]
    shown_captions = preview_captions(Upstream(recipe, store), last)
    captions = (cut_at_word(one_line(shown.caption), PROMPT_CHARS) for shown in shown_captions)
    return next(filter(None, captions), EXAMPLE_PROMPT)


def sample_command(recipe: Recipe, prompt: str = EXAMPLE_PROMPT) -> list[str]:
    """The command that draws from what this run made, ready to paste: its checkpoint keeps the settings. Without a run's name it
    would be the run of the default recipe as it is shipped.
    """
    command = [local_command("sd3"), "sample", shell_word(prompt)]
    if recipe.model_copy(update={"store": None}) != load_recipe(DEFAULT_RECIPE):
        command += ["--run", recipe.run]
    if recipe.export.score is not None:  # from what is exported
        command += ["--best-by", recipe.export.score]
    if recipe.store is not None:
        command += ["--set", shell_word(f"store={yaml_text(recipe.store)}")]
    return command


def start_run(deployment: str, parameters: dict[str, Any], console: Console) -> UUID:
    """Starts the deployment with Prefect's own command, as a user would. ServiceError where that says no, or nothing in time.

    `parameters`: those that are not as the deployment has them. A recipe of one's own is always among them: the deployment may
    have got another file of the same name meanwhile.
    """
    command = ["prefect", "--no-prompt", "deployment", "run", deployment]
    for name, value in parameters.items():
        command += ["--param", f"{name}={json.dumps(value)}"]
    console.print(f"$ {' '.join(map(shell_word, command))}", soft_wrap=True, highlight=False)
    try:
        with kept_from_children():
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=prefect_folder(),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                timeout=START_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise ServiceError(
            f"`prefect deployment run {deployment}` did not end within {START_SECONDS} s; the same command goes on, also with a"
            " run that it began"
        ) from None
    found = RUN_ID.search(done.stdout)
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ServiceError(
            f"`prefect deployment run {deployment}` failed: {said[-1] if said else 'it printed nothing'}"
        )
    return UUID(found.group(0))
