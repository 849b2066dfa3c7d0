"""What `sd3` can be told to do. Each command imports what it needs when it is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.bench import bench
from flows.cli.console import console, say
from flows.cli.options import one_of, path, place
from flows.local.home import local_command
from flows.local.recipes import DEFAULT_RECIPE, known_recipes
from sd3core.errors import UserError
from sd3core.recipe import TOKENS_AT_MOST, Recipe
from sd3core.recipe_file import load_recipe

if TYPE_CHECKING:
    from flows.cli.trained_runs import TrainedRun

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Training of SD3-class models."
)
app.add_typer(bench, name="bench")

RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe's name, or a path that ends in .yaml.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Changes one field: section.key=value. Repeatable.")
]
WeightsOption = Annotated[str | None, typer.Option(help="ema (the default) or live, of a training checkpoint.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as it is stored.")]


def run(complain: Callable[[str], None]) -> int:
    """The command of this process's arguments: its exit code. What cannot be read as one is a line to `complain`, and 2."""
    try:
        return app(standalone_mode=False) or 0
    except typer.TyperException as error:
        context, said = getattr(error, "ctx", None), error.format_message().rstrip(".")
        if said:  # without any arguments the help was printed
            complain(f"{said}; `{local_command(context.command_path if context else 'sd3')} --help` has what there is")
        return error.exit_code


def _load(name_or_path: str, set_: list[str] | None) -> Recipe:
    return load_recipe(known_recipes().get(name_or_path, name_or_path), set_ or [])


def _trained(name_or_path: str, run: str, set_: list[str] | None) -> TrainedRun:
    """A run of the store that the recipe and its settings name, which is this machine's own where they name none."""
    from flows.cli.trained_runs import trained_run
    from flows.local.home import run_store

    return trained_run(run_store(_load(name_or_path, set_)), run, set_)


@app.command()
def demo(
    recipe: RecipeOption = DEFAULT_RECIPE,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            parser=place,
            help="A folder of images: name.jpg with name.txt, or a metadata.jsonl; or a folder or s3:// URL of tars or parquet files.",
        ),
    ] = None,
    from_stage: Annotated[
        str | None, typer.Option(help="Makes this stage and those after it again, finished or not.")
    ] = None,
    remake: Annotated[
        bool,
        typer.Option("--remake", help="Makes again what this version makes otherwise than the one it stands from."),
    ] = False,
    set_: SetOption = None,
) -> None:
    """The whole chain, from nothing to a scored, exported checkpoint; run again, it goes on where it stopped."""
    from flows.cli.demo import run_demo

    run_demo(recipe, data, set_ or [], console, from_stage, remake)


@app.command()
def up() -> None:
    """Starts the local services: Prefect server, worker, deployments. A second `up` is harmless."""
    from flows.local.services import start_services

    services = start_services(say)
    say(f"UI: {services.ui_url} (`{local_command('sd3 ui')}` shows its password)")
    say(f'in this shell, for the prefect command: eval "$({local_command("sd3 env")})"')


@app.command()
def down() -> None:
    """Stops the local services and the runs they started. What the runs made stays; they go on when started again."""
    from flows.local.services import stop_services

    stop_services(say)


@app.command()
def env() -> None:
    """Prints what points this shell's `prefect` command at the local services and at nothing else; the password is in it."""
    import shlex

    from flows.local.prefect_environment import shells_own
    from flows.local.services import environment, require

    settings = environment(require())
    for name in shells_own(os.environ):
        if name not in settings:
            print(f"unset {name}")
    for name, value in settings.items():
        print(f"export {name}={shlex.quote(value)}")


@app.command()
def ui() -> None:
    """Prints the address of Prefect's UI and the password that it asks for once in a browser."""
    from flows.local.prefect_environment import password
    from flows.local.services import require

    say(f"UI: {require().ui_url}")
    say(f"password: {password()}")


@app.command()
def status() -> None:
    """What runs: the services, and the flow runs that are not finished."""
    from flows.local.services import Services, server_answers, use

    services = Services.load()
    if services is None:
        say(f"services: never started here; `{local_command('sd3 up')}` starts them")
        raise typer.Exit(1)
    answers = server_answers(services)
    say(f"server: {'answers at ' + services.ui_url if answers else 'does not answer'}")
    say(f"worker: {'running' if services.worker and services.worker.alive() else 'not running'}")
    if answers:
        use(services)
        from flows.cli.terminal import view_run
        from flows.local.runs import described, unfinished_runs

        for run in unfinished_runs():
            say(f"{described(run)}  {services.ui_url}/runs/flow-run/{run.id}")
            for stage in view_run(run.id).stages:
                if stage.state == "running":
                    say(f"  {stage.name}: {stage.progress or 'starting'}")
    if not answers or not (services.worker and services.worker.alive()):
        say(f"`{local_command('sd3 up')}` starts what is missing")
        raise typer.Exit(1)


@app.command()
def deploy(
    recipe: Annotated[Path, typer.Argument(parser=path, help="A recipe file; its deployments get the recipe's name.")],
    api: Annotated[str | None, typer.Option(help="Another Prefect server's API, as in PREFECT_API_URL.")] = None,
    pool: Annotated[str, typer.Option(help="The work pool there; its workers run in a checkout at this path.")] = "sd3",
) -> None:
    """Adds deployments of a recipe of your own: `prefect deployment run 'pipeline/NAME'`."""
    from flows.local.recipes import add_recipe
    from sd3core.moving_average import short_average_warnings

    added = add_recipe(recipe)
    name = added.name
    for warning in short_average_warnings(added):
        say(f"warning: {warning}")
    if api is None:
        from flows.local.services import start_services

        start_services(say)
    else:
        from flows.local.prefect_environment import password

        os.environ["PREFECT_API_URL"] = api  # before prefect is imported
        if os.environ.get("PREFECT_API_AUTH_STRING") == password():  # by `sd3 env`: another server is not told it
            del os.environ["PREFECT_API_AUTH_STRING"]
        import httpx

        from flows.local.deployments import apply_deployments

        try:
            apply_deployments({name: str(recipe.resolve())}, pool)
        except httpx.HTTPError as error:
            raise UserError(f"--api {api}: no Prefect server that takes deployments answers there ({error})") from None
    say(f"deployed: pipeline/{name} and its stages")


@app.command()
def plan(
    recipe: RecipeOption = DEFAULT_RECIPE,
    data: Annotated[
        Path | None,
        typer.Option(parser=path, help="A folder of images, as for `sd3 demo --data`: looked at, not ingested."),
    ] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="What a GPU sustains in bf16; default: 40 % of an H100.")
    ] = None,
    gpu_price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for an hour: adds the money.")] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="NAME=ROWS_A_SECOND of one device, by the time table's names, as text=250. Repeatable."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Before money is spent: what the source holds, parameters, bytes in the store, memory per GPU, steps, FLOPs, hours."""
    from flows.cli.plan import print_whole_plan
    from flows.cli.plan_rates import GivenRates

    given = GivenRates.read(gpu_tflops, gpu_price, rate or [])
    if data is not None:
        from flows.cli.demo import folder_overrides

        set_ = [*folder_overrides(_load(recipe, None), data), *(set_ or [])]
    print_whole_plan(_load(recipe, set_), given, console)


@app.command("inspect")
def inspect_(
    url: Annotated[str, typer.Argument(help="A path or URL: a shard, manifest, checkpoint, table, record or folder.")],
    rows: Annotated[int, typer.Option(min=0, max=1_000, help="Of a shard, at most so many are shown.")] = 24,
    sheet: Annotated[
        Path | None,
        typer.Option(parser=path, help="The contact sheet's file; default: inspect-NAME.png in this folder."),
    ] = None,
) -> None:
    """What any stored object holds, in words and with a contact sheet of its pictures."""
    from flows.cli.inspect import print_inspection
    from flows.cli.options import file_to_write

    file_to_write("--sheet", sheet)
    print_inspection(url, rows, sheet, console)


@app.command()
def clean(
    recipe: RecipeOption = DEFAULT_RECIPE,
    remove: Annotated[
        list[str] | None, typer.Option(help="What to remove, by its name in the list; all for everything. Repeatable.")
    ] = None,
    days: Annotated[
        float,
        typer.Option(min=1.0, help="What was written to in so many days is left alone: a run may be at work on it."),
    ] = 7.0,
    set_: SetOption = None,
) -> None:
    """Lists what no run uses any more in the recipe's store and this machine's cache, with sizes; removes it only when told."""
    from flows.cli.clean import clean_store
    from flows.local.home import run_store

    clean_store(run_store(_load(recipe, set_)), remove or [], days, console)


@app.command()
def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", parser=path, help="A text file with a prompt on each line.")
    ] = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    run: Annotated[
        str | None,
        typer.Option(help="A run by its name, with the settings that its checkpoint keeps; default: the recipe's."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="A model folder or training checkpoint, by path or URL, instead of a run's last."),
    ] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="The run's best checkpoint instead of its last; by the recipe's score, or validation_loss."
        ),
    ] = False,
    best_by: Annotated[
        str | None,
        typer.Option(
            help="Likewise, by this score: validation_loss, clip_score, fid, shapes_bench, shapes_bench/TASK."
        ),
    ] = None,
    towers: Annotated[
        Path | None,
        typer.Option(parser=path, help="A folder with VAE and text encoders, as diffusers' pipelines have them."),
    ] = None,
    out: Annotated[Path, typer.Option(parser=path, help="Folder for the pictures.")] = Path("samples"),
    height: Annotated[int | None, typer.Option(help="px; default: the last phase's side.")] = None,
    width: Annotated[int | None, typer.Option(help="px; default: the last phase's side.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="The first picture's; the next take the numbers after it; default: 0."),
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Pictures per prompt; default: 1.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Draws every prompt with each of these, as 3,17,4; for --seed and --images.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="Guidance leads away from this prompt; default: from none, as in training.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, max=1000.0, help="1 = no guidance; default: the recipe's.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leaves an encoder out: clip_l, clip_g or t5. Repeatable.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="euler, heun, dpm++2m or dpm++2m-sde; default: the recipe's.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Of the sampler; heun calls the model twice in each. Default: the recipe's."
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="reference (the released code's sigmas) or textbook (an even grid, shifted); default: the sampler's."
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(min=0.01, max=1000.0, help="Alpha of the resolution shift; default: the last phase's."),
    ] = None,
    weights: WeightsOption = None,
    precision: Annotated[str, typer.Option(help="Of the model: fp32 or bf16; its towers run in fp32.")] = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once, as memory allows.")] = 64,
    set_: SetOption = None,
) -> None:
    """Pictures from prompts, from a run's last or best checkpoint or from --checkpoint."""
    from flows.cli.sample import draws_of, read_prompts, sample_run, score_to_choose_by

    chosen = _trained(recipe, run, set_) if run else None
    if chosen and checkpoint:
        raise UserError(f"--run {run} and --checkpoint {checkpoint}: name the one or the other")
    if chosen and chosen.unfinished:
        say(f"note: {chosen.unfinished}")
    loaded = chosen.recipe if chosen else _load(recipe, set_)
    prompts = [*(prompt or []), *(read_prompts(file) if file else [])]
    sample_run(
        loaded,
        draws_of(prompts, seed, images, seeds),
        out,
        checkpoint=checkpoint,
        trained=chosen,
        best=score_to_choose_by(best, best_by, checkpoint, loaded),
        towers=towers,
        weights=weights,
        precision=precision,
        device=device,
        batch=batch,
        settings={
            "height": height,
            "width": width,
            "num_steps": steps,
            "guidance_scale": guidance,
            "shift": shift,
            "drop": tuple(sorted(set(without or []))),
            "convention": schedule,
            "sampler": sampler,
            "negative_prompt": negative,
        },
        console=console,
    )


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            parser=path,
            help="A .safetensors file, the index of a sharded one, or a folder: accelerate's, or diffusers' of a transformer or"
            " of a whole pipeline.",
        ),
    ],
    out: Annotated[str, typer.Argument(help="The model folder to make: a path, or a store's URL.")],
    dtype: DtypeOption = None,
    null: Annotated[
        str | None, typer.Option(help='What it knows as "no prompt": empty (the default) or zeros.')
    ] = None,
    t5_tokens: Annotated[
        int | None, typer.Option(min=4, max=TOKENS_AT_MOST["t5_tokens"], help="T5 tokens; default: 77.")
    ] = None,
    shift: Annotated[
        float | None, typer.Option(min=0.01, max=1000.0, help="Of the schedule; default: the pipeline's, or 3.")
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=16, help="px of the square it makes best; default: as it says.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="What its tensors' names begin with, where a file holds several sets: as ema. or model."),
    ] = None,
) -> None:
    """Released weights (SD3, SD3.5-medium, SD3.5-large) as a model folder, to sample or to train from."""
    from flows.cli.convert import import_weights

    import_weights(
        source,
        out,
        dtype=dtype,
        null=null,
        t5_tokens=t5_tokens,
        shift=shift,
        side_px=side,
        prefix=prefix,
        console=console,
    )


@app.command("export")
def export_(
    checkpoint: Annotated[
        list[str] | None,
        typer.Argument(help="A model folder or training checkpoint, by path or URL; without it a run's last."),
    ] = None,
    out: Annotated[str, typer.Argument(help="The folder or .safetensors file to make.")] = ...,
    format_: Annotated[
        str, typer.Option("--format", help="diffusers (a transformer folder) or single-file.")
    ] = "diffusers",
    recipe: RecipeOption = DEFAULT_RECIPE,
    run: Annotated[str | None, typer.Option(help="The run whose last checkpoint; default: the recipe's.")] = None,
    weights: WeightsOption = None,
    dtype: DtypeOption = None,
    set_: SetOption = None,
) -> None:
    """The transformer alone, for other programs. The stage `export` makes a whole diffusers pipeline folder of a run."""
    from flows.cli.convert import export_weights
    from flows.cli.sample import last_checkpoint
    from sd3core.errors import UserError

    given = checkpoint or []
    if len(given) > 1:
        raise UserError(f"{', '.join(given)}: name one checkpoint and the output")
    if given and (run or set_ or recipe != DEFAULT_RECIPE):
        raise UserError(f"{given[0]}, and --run or --recipe: name the one checkpoint or the other")
    if run:
        trained = _trained(recipe, run, set_)
        if trained.unfinished:
            say(f"note: {trained.unfinished}")
        chosen = trained.checkpoint
    else:
        chosen = given[0] if given else last_checkpoint(_load(recipe, set_))
    export_weights(chosen, out, format_, weights=weights, dtype=dtype, console=console)


@app.command()
def photographs(
    to: Annotated[str, typer.Argument(parser=place, help="Where to write them: a folder, or s3://bucket/prefix.")],
    form: Annotated[
        str, typer.Option("--as", help="folder: images beside their captions; tars: as img2dataset's; or parquet.")
    ] = "folder",
) -> None:
    """Writes the real photographs that come inside scikit-learn, scikit-image and matplotlib, with captions: data to try sources on."""
    from sd3core.data.photographs import write_photographs
    from sd3core.data.sources.photograph_files import FORMS, put_photographs
    from sd3core.data.sources.urls import S3_URL
    from sd3core.data.store import open_store

    one_of("--as", form, FORMS)
    if form == "folder" and not to.startswith(S3_URL):
        count, names = len(write_photographs(Path(to))), []
    else:
        store = open_store(to)
        store.check()
        count, names = put_photographs(store, form)
    more = "" if form == "folder" else f": {', '.join(names)}"
    say(f"{count} photographs with captions in {to}{more}")
