"""`sd3 sample`: pictures from a run's last checkpoint, or from any other."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flows import upstream
from flows.home import run_store
from flows.recipes import DEFAULT_RECIPE
from flows.summary import finished_runs
from sd3core.errors import UserError
from sd3core.generate import sample_to_files
from sd3core.progress import counted
from sd3core.recipe import Recipe
from sd3core.text_encoders import ENCODERS
from sd3core.towers import fetch_towers
from workers.caches import towers_cache


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, but for empty ones. UserError where there are none or the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror or error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--file {path}: it has no prompt; write one on each line")
    return prompts


def sample_run(
    recipe: Recipe,
    *,
    prompts: list[str],
    checkpoint: str | None,
    towers: Path | None,
    out: Path,
    size: tuple[int | None, int | None],
    seed: int,
    images: int,
    steps: int | None,
    guidance: float | None,
    without: set[str],
    weights: str | None,
    console: Console,
) -> list[Path]:
    """Draws the prompts and prints where the pictures are. UserError for settings that cannot be.

    Without `checkpoint` and `towers` they are those of the recipe's run.
    """
    if not prompts:
        raise UserError("no prompt: give one or more, or --file with a prompt on each line")
    unknown = sorted(without - set(ENCODERS))
    if unknown:
        raise UserError(f"--without {unknown[0]}: the encoders are {', '.join(ENCODERS)}")
    if weights not in (None, "ema", "live"):
        raise UserError(f"--weights {weights}: it is ema or live")
    chosen = checkpoint or last_checkpoint(recipe)
    towers = _towers(recipe, checkpoint, towers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        drawing = bar.add_task("loading", total=None)
        loaded: list[float] = []

        def show(done: int, total: int) -> None:
            if done == 0:
                loaded.append(time.monotonic())
            bar.update(drawing, description="sampling", completed=done, total=total)

        paths = sample_to_files(
            chosen,
            towers,
            prompts,
            out,
            seed=seed,
            pictures_per_prompt=images,
            weights=weights,
            on_step=show,
            height=size[0],
            width=size[1],
            num_steps=steps if steps is not None else recipe.evaluate.num_steps,
            guidance_scale=guidance if guidance is not None else recipe.evaluate.guidance_scale,
            drop=tuple(sorted(without)),
        )
    seconds, pictures = time.monotonic() - loaded[0], counted(len(prompts) * images, "picture")
    console.print(f"{pictures} in {seconds:.1f} s after loading", highlight=False)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
    return paths


def _towers(recipe: Recipe, checkpoint: str | None, given: Path | None) -> Path:
    """The folder that is given, or the recipe's, fetched from its store."""
    if given is not None:
        if not (given / "vae").is_dir():
            raise UserError(f"--towers {given}: no vae folder there; name a folder as diffusers' pipelines have it")
        return given
    store = run_store(recipe)
    try:
        return fetch_towers(store, upstream.towers_manifest(recipe, store).folder, towers_cache())
    except upstream.NotFinishedError:
        if checkpoint is None:
            raise
        raise UserError(
            f"--checkpoint {checkpoint}: name its VAE and text encoders too, with --towers FOLDER"
        ) from None


def last_checkpoint(recipe: Recipe) -> str:
    """URL of the last phase's. Where this run is not finished and others are, the UserError names those."""
    store = run_store(recipe)
    try:
        return store.uri(upstream.last_checkpoint(recipe, store, recipe.phases()[-1][0]).folder)
    except upstream.NotFinishedError:
        finished = finished_runs(store)
        if not finished or recipe.run in finished:  # finished with other settings: the error names the stage
            raise
        default = " (the default)" if recipe.name == DEFAULT_RECIPE else ""
        named = ", ".join(f"{run} (--recipe {of})" if run == of else run for run, of in finished.items())
        raise UserError(f"recipe {recipe.name}{default} is not finished here; finished: {named}") from None
