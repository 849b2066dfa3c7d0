"""`sd3 sample`: pictures from a run's last checkpoint."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flows import upstream
from flows.session import run_store
from sd3core.errors import UserError
from sd3core.generate import sample_to_files
from sd3core.recipe import Recipe
from sd3core.text_encoders import ENCODERS
from sd3core.towers import fetch_towers
from workers.towers import towers_cache


def sample_run(
    recipe: Recipe,
    *,
    prompts: list[str],
    out: Path,
    size: tuple[int | None, int | None],
    seed: int,
    images: int,
    steps: int | None,
    guidance: float | None,
    without: set[str],
    weights: str,
    console: Console,
) -> list[Path]:
    """Draws the prompts and prints where the pictures are. UserError for settings that cannot be."""
    unknown = sorted(without - set(ENCODERS))
    if unknown:
        raise UserError(f"--without {unknown[0]}: the encoders are {', '.join(ENCODERS)}")
    if weights not in ("ema", "live"):
        raise UserError(f"--weights {weights}: it is ema or live")
    store = run_store(recipe)
    checkpoint = upstream.last_checkpoint(recipe, store, recipe.phases()[-1][0])
    towers = fetch_towers(store, upstream.towers_manifest(recipe, store).folder, towers_cache())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        drawing = bar.add_task("sampling", total=None)
        paths = sample_to_files(
            store.uri(checkpoint.folder),
            towers,
            prompts,
            out,
            seed=seed,
            pictures_per_prompt=images,
            weights=weights,
            on_step=lambda done, total: bar.update(drawing, completed=done, total=total),
            height=size[0],
            width=size[1],
            num_steps=steps if steps is not None else recipe.evaluate.num_steps,
            guidance_scale=guidance if guidance is not None else recipe.evaluate.guidance_scale,
            drop=tuple(sorted(without)),
        )
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
    return paths
