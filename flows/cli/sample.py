"""`sd3 sample`: pictures from a run's last or best checkpoint, or from any other."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flows.cli.options import device as chosen_device
from flows.cli.options import one_of
from flows.cli.trained_runs import TrainedRun
from flows.local.home import local_command, run_store
from flows.local.recipes import DEFAULT_RECIPE
from flows.summary import finished_runs
from flows.upstream import NotFinishedError, Upstream
from sd3core.checkpoint import open_checkpoint
from sd3core.checkpoint_record import list_checkpoints
from sd3core.conditioning import ENCODERS
from sd3core.data.settled_precision import settle_precisions
from sd3core.errors import UserError
from sd3core.exchange.diffusers_folder import check_exported
from sd3core.generate import Draw, sample_to_files
from sd3core.metrics.best_checkpoint import BestCheckpoint, best_checkpoint
from sd3core.precision import PRECISION_DTYPES
from sd3core.recipe import Recipe
from sd3core.recipe_export import PLAIN_SCORE, unknown_score
from sd3core.sample_settings import Convention, Weights
from sd3core.sampling import SAMPLERS
from sd3core.shown_text import is_utf8
from sd3core.towers.artifact import fetch_towers
from sd3core.words import counted
from workers.caches import checked_here, towers_cache

LARGEST_SEED = 2**63 - 1
MOST_PICTURES = 100_000
STORE_OF = re.compile(r"^(.+)/runs/[^/]+/checkpoints/[^/]+/[^/]+/[^/]+/?$")  # of a training checkpoint
LARGEST_PROMPT_FILE = 10_000_000  # bytes; a device or a pipe may have no end


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, but for empty ones. UserError where there are none or the file cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_PROMPT_FILE + 1)
        if len(content) > LARGEST_PROMPT_FILE:
            raise UserError(f"--file {path}: more than {LARGEST_PROMPT_FILE:,} bytes; cut it into several")
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--file {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"--file {path}: cannot be read ({error.strerror or error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--file {path}: it has no prompt; write one on each line")
    return prompts


def draws_of(
    prompts: Sequence[str], seed: int | None = None, images: int | None = None, seeds: str | None = None
) -> list[Draw]:
    """(prompt, seed) of every picture, those of a prompt together.

    The first picture takes `seed`, the next the numbers after it. `seeds`, "3,17,4", gives every prompt each of these.
    """
    if not prompts:
        raise UserError("no prompt: give one or more, or --file with a prompt on each line")
    for prompt in prompts:
        check_unicode("a prompt", prompt)
    count, first = len(prompts) * (images or 1), seed or 0
    if seeds is None:
        if count > MOST_PICTURES:
            raise UserError(f"--images {images}: {count:,} pictures; one command draws at most {MOST_PICTURES:,}")
        if first + count - 1 > LARGEST_SEED:
            raise UserError(
                f"--seed {first}: with {count:,} pictures the last seed is above {LARGEST_SEED}; take a lower one"
            )
        repeated = [prompt for prompt in prompts for _ in range(images or 1)]
        return [(prompt, own) for own, prompt in enumerate(repeated, start=first)]
    if seed is not None or images is not None:
        raise UserError("--seeds: leave out --seed and --images; every prompt is drawn with each of the seeds")
    numbers = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() and len(part) < 20 and int(part) <= LARGEST_SEED for part in numbers):
        raise UserError(f"--seeds {seeds}: give whole numbers from 0 to {LARGEST_SEED} with commas between, as 3,17,4")
    if len(prompts) * len(numbers) > MOST_PICTURES:
        raise UserError(
            f"--seeds: {len(prompts) * len(numbers):,} pictures; one command draws at most {MOST_PICTURES:,}"
        )
    return [(prompt, int(part)) for prompt in prompts for part in numbers]


def check_unicode(what: str, text: str) -> None:
    """UserError where an argument's bytes were no UTF-8, which no tokenizer takes."""
    if not is_utf8(text):
        raise UserError(f"{what} {text!r}: not UTF-8 text; write it as UTF-8")


def sample_run(
    recipe: Recipe,
    draws: Sequence[Draw],
    out: Path,
    *,
    checkpoint: str | None,
    trained: TrainedRun | None = None,
    best: str | None = None,
    towers: Path | None,
    weights: str | None,
    precision: str,
    device: str | None,
    batch: int,
    settings: dict[str, Any],
    console: Console,
) -> list[Path]:
    """Draws the prompts with their seeds and prints where the pictures are. UserError for settings that cannot be.

    settings: fields of SampleSettings; None takes the recipe's, for the size the checkpoint's, and for the shift that of what is drawn from.
    best: the score by which the best checkpoint of the run's last phase is taken; None takes the last.
    device: None takes a GPU where there is one. Without `checkpoint` and `towers` they are those of the recipe's run, or of `trained`,
    whose recipe it then is.
    """
    one_of("--weights", weights, get_args(Weights))
    one_of("--precision", precision, PRECISION_DTYPES)
    one_of("--sampler", settings["sampler"] or recipe.evaluate.sampler, SAMPLERS)
    one_of("--schedule", settings["convention"], get_args(Convention))
    for name in settings["drop"]:
        one_of("--without", name, ENCODERS)
    check_unicode("--negative", settings["negative_prompt"] or "")
    device = chosen_device(device)
    chosen = checkpoint or (trained.checkpoint if trained else last_checkpoint(recipe))
    if best:
        found = best_of_run(recipe, chosen, best)
        console.print(f"note: {found.line}", soft_wrap=True, highlight=False)
        chosen = run_store(recipe).uri(found.ref.folder)
    towers = _towers(recipe, checkpoint, towers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        drawing = bar.add_task("loading", total=None)
        loaded: list[float] = []

        def show(done: int, total: int) -> None:
            if done == 0:
                loaded.append(time.monotonic())
            bar.update(drawing, description="sampling", completed=done, total=total)

        def tell(note: str) -> None:
            console.print(f"note: {note}", soft_wrap=True, highlight=False)

        of_recipe = recipe.evaluate.model_dump(include={"num_steps", "guidance_scale", "sampler"})
        if checkpoint is None:  # another checkpoint has a shift of its own
            of_recipe["shift"] = recipe.evaluate.shift_for(trained.phase if trained else recipe.phases()[-1][1])
        paths = sample_to_files(
            chosen,
            towers,
            draws,
            out,
            columns=_columns(draws),
            weights=weights,
            precision=precision,
            device=device,
            batch=batch,
            on_step=show,
            on_note=tell,
            **of_recipe | {name: value for name, value in settings.items() if value is not None},
        )
    seconds, pictures = time.monotonic() - loaded[0], counted(len(draws), "picture")
    console.print(f"{pictures} in {seconds:.1f} s after loading", highlight=False)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
    return paths


def score_to_choose_by(best: bool, by: str | None, checkpoint: str | None, recipe: Recipe) -> str | None:
    """What `--best` and `--best-by` ask for: the score that is named, else the one that the recipe exports by, else the
    validation loss; None where neither is given. UserError for a score that there is not, and beside `--checkpoint`.
    """
    if not best and by is None:
        return None
    if checkpoint:
        raise UserError(f"--checkpoint {checkpoint}: leave out --best and --best-by, which choose one of a run's")
    if by is not None and (problem := unknown_score(by)):
        raise UserError(f"--best-by: {problem}")
    return by or recipe.export.score or PLAIN_SCORE


def best_of_run(recipe: Recipe, last: str, score: str) -> BestCheckpoint:
    """The best among the checkpoints of one training, up to its last one, which is named by its URL."""
    store = run_store(recipe)
    folder, _, samples = last.removeprefix(f"{store.url.rstrip('/')}/").rpartition("/")
    phase = folder.split("/")[-2]
    return best_checkpoint(store, recipe.run, phase, list_checkpoints(store, folder, int(samples)), score)


def _columns(draws: Sequence[Draw]) -> int | None:
    """A row of the grid for each prompt, where prompts have several pictures."""
    of_a_prompt = len(list(next(groupby(draws, key=lambda draw: draw[0]))[1]))
    return of_a_prompt if of_a_prompt > 1 else None


def _towers(recipe: Recipe, checkpoint: str | None, given: Path | None) -> Path:
    """The folder that is given, or what the checkpoint was trained with where it says so, or the recipe's, fetched: from the store
    that is named, else from the one that the checkpoint lies in, else from the one of its own recipe.
    """
    if given is not None:
        if not (given / "vae").is_dir():
            raise UserError(f"--towers {given}: no vae folder there; name a folder as diffusers' pipelines have it")
        for part in ("vae/", "text_encoder", "tokenizer"):
            check_exported(given, checked_here(), part)
        return given
    own = _own_recipe(checkpoint) if checkpoint else None
    urls = [*STORE_OF.findall(checkpoint), own.store] if own and recipe.store is None else [recipe.store]
    for url in urls:
        of_store = (own or recipe).model_copy(update={"store": url})
        store = run_store(of_store)
        try:
            return fetch_towers(store, Upstream(of_store, store).towers_manifest.folder, towers_cache())
        except NotFinishedError:
            if checkpoint is None:
                raise
    raise UserError(f"--checkpoint {checkpoint}: name its VAE and text encoders too, with --towers FOLDER")


def _own_recipe(checkpoint: str) -> Recipe | None:
    """The recipe of the run that wrote a training checkpoint; None for a model folder."""
    fields = open_checkpoint(checkpoint).recipe
    if fields is None:
        return None
    try:
        return Recipe.model_validate(fields)
    except ValidationError:
        raise UserError(
            f"--checkpoint {checkpoint}: no recipe of this version in it, so name its VAE and text encoders with --towers FOLDER"
        ) from None


def last_checkpoint(recipe: Recipe) -> str:
    """URL of the last phase's. Where this run is not finished and others are, the UserError names those."""
    store = run_store(recipe)
    recipe = settle_precisions(recipe, store)
    try:
        return store.uri(Upstream(recipe, store).last_checkpoint(recipe.phases()[-1][0]).folder)
    except NotFinishedError:
        finished = finished_runs(store)
        if recipe.run in finished:  # with other settings: the error names the stage
            raise
        default = " (the default)" if recipe.name == DEFAULT_RECIPE else ""
        if not finished:
            makes = local_command(f"sd3 demo --recipe {recipe.name}")
            raise UserError(
                f"recipe {recipe.name}{default} is not finished here, nor is another; `{makes}` makes it"
            ) from None
        named = ", ".join(f"{run} (--recipe {of})" if run == of else run for run, of in finished.items())
        wanted = f"recipe {recipe.name}{default}" if recipe.run == recipe.name else f"run {recipe.run}"
        raise UserError(f"{wanted} is not finished here; finished: {named}") from None
