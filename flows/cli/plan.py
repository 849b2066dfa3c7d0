"""`sd3 plan` prints what a recipe will cost before anything starts."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flows.cli.plan_epochs import planned_images, print_epochs, recipe_within_epochs
from flows.cli.plan_rates import ASSUMED, GivenRates
from flows.cli.plan_source import ingested_rows, look_at_recipe, planned_rows, print_source
from flows.local.home import run_store
from flows.upstream import NotFinishedError, Upstream
from sd3core.buckets import bucket_name, off_centre
from sd3core.costs.phases import PhaseCost, compare_backbones, phase_cost, text_bytes
from sd3core.costs.stages import (
    CAPTION_CONTEXT_TOKENS,
    GPU_FP32_TFLOPS,
    SMALL_CAPTIONS_PER_S,
    PlannedRows,
    stage_costs,
)
from sd3core.data.raw_buckets import look_at_raw_buckets
from sd3core.data.settled_precision import settle_precisions
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.moving_average import short_average_warnings
from sd3core.recipe import Recipe
from sd3core.recipe_compute import GPU_STAGES
from sd3core.towers.artifact import TOWER_FOLDERS, check_vae_folder
from sd3core.words import GB
from workers.inputs import Images
from workers.rare_sizes import rare_sizes

GIB = 2**30
SIZES_TOLD = "images too small for a phase, and sizes with fewer images than a batch,"
INDEXES_READ = 1_000  # of raw shards that nobody has counted yet: some seconds


def print_whole_plan(recipe: Recipe, given: GivenRates, console: Console) -> None:
    """What the source holds where it is not ingested yet, what all will cost, and what an upgrade would make again."""
    from flows.upgrade import print_upgrade

    store = run_store(recipe)
    ingested = ingested_rows(recipe, store) if recipe.data.source != "small_world" else None
    look = look_at_recipe(recipe, console) if ingested is None else None
    rows = planned_rows(recipe, ingested, look)
    images = planned_images(recipe, store, rows)
    print_plan(recipe_within_epochs(recipe, images), console, rows, given)
    if look is not None:
        print_source(recipe, look, console)
    print_epochs(recipe, images, console)
    if look is None:
        print_rare_sizes(recipe, store, console)
    print_upgrade(recipe, store, console)


def print_plan(recipe: Recipe, console: Console, rows: PlannedRows | None = None, given: GivenRates = ASSUMED) -> None:
    """`rows`: that the data stages will have, where that is known."""
    if recipe.towers.released is not None:
        check_vae_folder(recipe.towers.released.vae, recipe.model_config_for(recipe.phases()[0][1]).latent_channels)
    phases = [phase_cost(recipe, key, phase) for key, phase in recipe.phases()]
    console.print(
        f"recipe {recipe.name}: run {recipe.run}, {recipe.model.architecture} of depth {recipe.model.depth},"
        f" {phases[0].parameters:,} parameters",
        highlight=False,
    )
    _print_phases(recipe, phases, console)
    _print_backbones(recipe, console)
    _print_storage(recipe, phases, rows, console)
    _print_time(recipe, phases, rows, given, console)


def print_rare_sizes(recipe: Recipe, store: Store, console: Console) -> None:
    """Prints what each phase will leave out for its size, and what will become of sizes with fewer images than a batch, where
    the images are ingested; writes nothing.
    """
    if all(len(phase.bucket_sides()) == 1 and not phase.min_scale for _, phase in recipe.phases()):
        return
    try:
        said = _rare_sizes_notes(recipe, store) or [
            "every image fills its bucket, and every size that has images has enough for a batch, or stays as it is encoded"
        ]
    except NotFinishedError:
        said = [f"{SIZES_TOLD} are told here when the images are ingested"]
    except UserError as error:
        said = [f"{SIZES_TOLD} were not looked for: {error}"]
    console.print()
    for line in said:
        console.print(line, highlight=False, soft_wrap=True)


def _rare_sizes_notes(recipe: Recipe, store: Store) -> tuple[str, ...]:
    recipe = settle_precisions(recipe, store)
    upstream = Upstream(recipe, store)
    ref = upstream.raw
    try:
        digests = upstream.towers_manifest.digests
    except NotFinishedError:  # then nothing is encoded, and which phases share latents is a matter of their sizes
        digests = dict.fromkeys(TOWER_FOLDERS, "")
    try:
        images = Images.read(store, ref, upstream.keep)
    except NotFinishedError:  # what a filter leaves out is not known: all of them are counted
        images = Images.read(store, ref, None)
    look = lambda rules: look_at_raw_buckets(store, images.raw, rules, at_most=INDEXES_READ, kept=images.kept)
    phases = [key for key, _ in recipe.phases()]
    return rare_sizes(recipe, store, phases, images, digests, look).notes


def _print_phases(recipe: Recipe, phases: list[PhaseCost], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "parameters", "side px", "samples", "batch", "steps", "tokens", "FLOPs/step", "FLOPs"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for (key, phase), plan in zip(recipe.phases(), phases, strict=True):
        row = (plan.parameters, phase.side_px, plan.samples, phase.global_batch, plan.steps, plan.tokens)
        table.add_row(key, *(f"{value:,}" for value in row), f"{plan.step_flops:.2e}", f"{plan.flops:.2e}")
    console.print(table)
    for warning in short_average_warnings(recipe):
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    for key, phase in recipe.phases():
        off = off_centre(phase.bucket_sides(), recipe.model.max_side_px)
        if 0 < len(off) < len(phase.bucket_sides()):
            console.print(
                f"note: {key}: of its sizes {', '.join(map(bucket_name, off))} px lie half a patch off the others' positions, as the"
                " released code has them; sides that are all odd or all even numbers of 16 px lie alike",
                highlight=False,
                soft_wrap=True,
            )
    console.print()
    console.print(
        f"training state of one of {recipe.compute.train_ranks} ranks, GiB (activations come on top)", highlight=False
    )
    memory = Table(box=None, pad_edge=False)
    for column in ("phase", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "the recipe's"):
        memory.add_column(column, justify="left" if column == "phase" else "right")
    for (key, phase), plan in zip(recipe.phases(), phases, strict=True):
        memory.add_row(
            key, *(f"{plan.rank_state_bytes[stage] / GIB:,.2f}" for stage in range(4)), f"ZeRO {phase.zero_stage}"
        )
    console.print(memory)


def _print_backbones(recipe: Recipe, console: Console) -> None:
    console.print()
    console.print("the paper's backbones at this depth and width (model.architecture, model.streams)", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("backbone", "parameters", "FLOPs/forward", "of the first"):
        table.add_column(column, justify="left" if column == "backbone" else "right")
    plans = compare_backbones(recipe, recipe.pretrain)
    for plan in plans:
        share = f"{plan.flops / plans[0].flops:.2f}"
        table.add_row(plan.name, f"{plan.parameters:,}", f"{plan.flops:.2e}", share)
    console.print(table)


def _print_storage(recipe: Recipe, phases: list[PhaseCost], rows: PlannedRows | None, console: Console) -> None:
    console.print()
    console.print("storage", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("what", "an image, kB", "images", "GB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    most = ", at most" if recipe.text.padding == "trimmed" else ""
    flipped = ", flipped too, at most" if recipe.encode.flip else ""
    captions = rows.captions if rows else PlannedRows.of(recipe, 1).captions
    parts = [(f"text, {captions:.3g} caption(s) an image{most}", captions * text_bytes(recipe), rows and rows.images)]
    parts += [(f"latents {plan.key}{flipped}", plan.latent_bytes, rows and rows.phases[plan.key]) for plan in phases]
    for what, size, images in parts:
        total = f"{size * 1e6 / GB:,.1f} a million images" if images is None else f"{images * size / GB:,.3f}"
        table.add_row(what, f"{size / 1e3:,.1f}", "as the source has" if images is None else f"{images:,}", total)
    for plan in phases:
        table.add_row(
            f"{plan.checkpoints} checkpoint(s) {plan.key}",
            "",
            "",
            f"{plan.checkpoints * plan.checkpoint_bytes / GB:,.3f}",
        )
    console.print(table)


def _print_time(
    recipe: Recipe, phases: list[PhaseCost], rows: PlannedRows | None, given: GivenRates, console: Console
) -> None:
    costs, compute = given.applied(stage_costs(recipe, rows, given.gpu_tflops)), recipe.compute
    keys = {plan.key for plan in phases}
    console.print()
    console.print("time (ingest, towers, filter and export are not counted)", highlight=False)
    table = Table(box=None, pad_edge=False)
    columns = ["what", "work", "FLOPs", "hours", *(["price"] if given.gpu_price is not None else [])]
    for column in columns:
        table.add_column(column, justify="left" if column in ("what", "work") else "right")
    for cost in costs:
        hours = "not known" if cost.hours is None else f"{cost.hours:,.2f}"
        price = [] if given.gpu_price is None else [given.price(cost)]
        table.add_row(cost.name, cost.work, f"{cost.flops:.2e}" if cost.flops else "-", hours, *price)
    console.print(table)
    flops, hours = (sum(getattr(cost, name) for cost in costs if cost.name in keys) for name in ("flops", "hours"))
    recomputed = (
        ", activations computed again" if any(phase.activation_checkpointing for _, phase in recipe.phases()) else ""
    )
    if compute.gpus_per_rank:
        gpus = compute.train_ranks * compute.gpus_per_rank
        how = f"about {hours:,.0f} h on {gpus:,.0f} GPUs ({hours * gpus:,.0f} GPU hours)"
    else:
        how = f"at least {hours:,.2f} h on this machine"
    console.print()
    console.print(f"training: {flops:.2e} FLOPs{recomputed}, {how}", highlight=False)
    if given.gpu_price is not None:
        console.print(given.total(costs), highlight=False)
    console.print(_assumed(recipe, given), highlight=False, soft_wrap=True)


def _assumed(recipe: Recipe, given: GivenRates) -> str:
    compute, said = recipe.compute, []
    gpus = [compute.gpus_per_rank, *(compute.for_stage(stage).gpus_per_actor for stage in GPU_STAGES)]
    if any(gpus):
        said.append(f"a GPU does {given.gpu_tflops:g} TFLOP/s in bf16 and {GPU_FP32_TFLOPS:.0f} in fp32")
    if not all(gpus):
        said.append("a CPU does what plain matrix products reach here, measured now: real work takes longer")
    if recipe.caption.captioner == "small_world":
        said.append(f"the drawn world's captioner writes {SMALL_CAPTIONS_PER_S:.0f} captions/s an actor")
    elif recipe.caption.captioner == "vision_language_model":
        said.append(
            f"the captioner reads {CAPTION_CONTEXT_TOKENS:,} tokens an image, and its weights once for each token of a batch"
        )
    if given.rows:
        said.append(f"as given, rows a second of one device: {', '.join(f'{k} {v:g}' for k, v in given.rows.items())}")
    return f"assumed: {'; '.join(said)}; every image is as large as the largest bucket"
