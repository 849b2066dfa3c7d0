"""What a source of real images holds, before it is ingested, for `sd3 plan`."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from flows.upstream import NotFinishedError, Upstream
from sd3core.buckets import bucket_name
from sd3core.costs.stages import PlannedRows
from sd3core.data.manifest import read_manifest
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.size_rule import SizeRule
from sd3core.data.source_look import SourceLook, look_at_source
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.progress import Progress
from sd3core.recipe import Recipe, Training
from sd3core.words import MB, counted

PERCENTILES = (5, 50, 95)  # percent of the images or captions that are at most so large
REASONS_NAMED = 8
BUCKETS_NAMED = 12  # that are named


def look_at_recipe(recipe: Recipe, console: Console) -> SourceLook | None:
    """What the recipe's source holds; None of a drawn world, and of a source that cannot be read, which is said."""
    if recipe.data.source == "small_world":
        return None
    columns = (TextColumn("looking at the source"), BarColumn(), MofNCompleteColumn())
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total)

        try:
            return look_at_source(recipe.data, recipe.caption.captioner == "none", show)
        except UserError as error:
            console.print(f"the source was not looked at: {error}", soft_wrap=True, highlight=False)
            return None


def ingested_rows(recipe: Recipe, store: Store) -> int | None:
    """How many images stand as this recipe ingests them, of those that its filter keeps where that has ended; None where none do."""
    try:
        upstream = Upstream(settle_precisions(recipe, store), store)
        images = upstream.raw
        with suppress(UserError):  # it has not ended
            images = upstream.keep or images
        return read_manifest(store, images.folder, images.digest).rows
    except (NotFinishedError, UserError):
        return None


def planned_rows(recipe: Recipe, ingested: int | None, look: SourceLook | None) -> PlannedRows | None:
    """The rows that the data stages will have: drawn, ingested, or estimated; None where nobody knows."""
    if recipe.data.source == "small_world":
        return PlannedRows.of(recipe, recipe.data.images)
    if look is None:
        return None if ingested is None else PlannedRows.of(recipe, ingested)
    originals = sum(map(len, look.captions)) / max(1, len(look.captions))
    taken = {key: _taken(phase, look)[1].mean() if look.sizes else 0.0 for key, phase in recipe.phases()}
    return PlannedRows.of(recipe, look.taken, originals, taken)


def print_source(recipe: Recipe, look: SourceLook, console: Console) -> None:
    """Rows, reasons, sizes, captions, and what each phase takes of them."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    console.print()
    files = f" in {counted(look.files, 'file')}" if look.files else ""
    about = "about " if look.is_estimate else ""
    read = f"all {look.looked:,} of them read" if look.looked == look.rows else f"by the {look.looked:,} that were read"
    say(f"source: {about}{counted(look.rows, 'row')}{files}, {about}{look.taken:,} of use ({read})")
    for note in look.notes:
        say(f"note: {note}")
    for reason, count in look.left_out.most_common(REASONS_NAMED):
        say(f"left out, {count / look.looked:.1%} of the rows: {reason}")
    if not look.sizes:
        return
    sizes = np.array(look.sizes)
    sides, shape = np.percentile(sizes.min(axis=1), PERCENTILES), np.percentile(sizes[:, 0] / sizes[:, 1], PERCENTILES)
    mean = look.bytes / len(look.sizes) / MB
    say(
        f"images: shorter side {_three(sides, ',.0f')} px, width / height {_three(shape, '.2f')} (5 %, half and 95 % have at most"
        f" this), {mean:,.2f} MB each"
    )
    words = look.words
    if len(words):
        without = sum(not captions for captions in look.captions) / len(look.captions)
        say(
            f"captions: {len(words) / len(look.captions):.2f} an image, {_three(np.percentile(words, PERCENTILES), ',.0f')} words;"
            f" {without:.1%} of the images have none"
        )
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "sizes", "images", "too small"):
        table.add_column(column, justify="right" if column in ("images", "too small") else "left")
    for key, phase in recipe.phases():
        places, taken = _taken(phase, look)
        named = [bucket_name(side) for side in phase.bucket_sides()]
        found = np.bincount(places[taken], minlength=len(named))
        shares = [f"{named[at]} {found[at] / len(sizes):.0%}" for at in np.argsort(-found) if found[at]][:BUCKETS_NAMED]
        more = int((found > 0).sum()) - len(shares)
        images = f"{about}{round(look.taken * taken.mean()):,}"
        table.add_row(key, ", ".join(shares) + (f" and {more} more" if more else ""), images, f"{1 - taken.mean():.1%}")
    console.print(table)


def _taken(phase: Training, look: SourceLook) -> tuple[np.ndarray, np.ndarray]:
    return SizeRule(tuple(phase.bucket_sides()), phase.min_scale).place(np.array(look.sizes).reshape(-1, 2))


def _three(values: np.ndarray, form: str) -> str:
    return " / ".join(format(value, form) for value in values)
