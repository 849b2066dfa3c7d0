"""How often each phase of a plan sees its images, and where a bound ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from flows.upstream import Upstream
from sd3core.costs.stages import PlannedRows
from sd3core.data.phase_images import many_epochs_warning, within_epochs
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.recipe import Recipe, Training


@dataclass(frozen=True)
class PlannedImages:
    """The images of a phase, and whether they are counted (its latents stand) or estimated from what is ingested."""

    count: int
    counted: bool

    @property
    def shown(self) -> str:
        return f"{self.count:,}" if self.counted else f"about {self.count:,}"


def planned_images(recipe: Recipe, store: Store, rows: PlannedRows | None) -> dict[str, PlannedImages]:
    """Phase -> its images, of the phases whose number of images is known before they start. `rows`: that are planned for."""
    try:
        upstream = Upstream(settle_precisions(recipe, store), store)
    except UserError:  # a store that cannot be read: the rest of the plan says so
        upstream = None
    found = {}
    for key, _ in recipe.phases():
        if upstream and (images := _known(lambda key=key: upstream.images(key))):
            found[key] = PlannedImages(images, True)
        elif rows and rows.phases[key]:
            trained = round(rows.phases[key] * (1 - recipe.data.held_out_fraction))
            found[key] = PlannedImages(max(1, trained), False)
    return found


def _known(count: Callable[[], int]) -> int:
    """0 of what no stage has made yet."""
    try:
        return count()
    except UserError:
        return 0


def recipe_within_epochs(recipe: Recipe, images: dict[str, PlannedImages]) -> Recipe:
    """The recipe with its phases ended where max_epochs ends them, as far as their images are known."""

    def ended(key: str, phase: Training) -> Training:
        return within_epochs(phase, images[key].count) if key in images else phase

    phases = [ended(key, phase) for key, phase in recipe.phases()]
    return recipe.model_copy(update={"pretrain": phases[0], "finetune": tuple(phases[1:])})


def print_epochs(recipe: Recipe, images: dict[str, PlannedImages], console: Console) -> None:
    """`recipe`: as it is written, without its bounds taken."""
    console.print()
    console.print("epochs", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "images", "samples", "epochs", "max_epochs"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    warnings = []
    for key, phase in recipe.phases():
        bound = "-" if phase.max_epochs is None else f"{phase.max_epochs:g}"
        if key not in images:
            table.add_row(key, "not known yet", f"{phase.last_samples:,}", "not known yet", bound)
            continue
        count, ended = images[key].count, within_epochs(phase, images[key].count)
        samples = f"{ended.last_samples:,}"
        if ended.samples != phase.samples:
            samples += f" instead of {phase.last_samples:,}"
        table.add_row(key, images[key].shown, samples, f"{ended.last_samples / count:,.1f}", bound)
        warnings += filter(None, [many_epochs_warning(key, phase, count)])
    console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
