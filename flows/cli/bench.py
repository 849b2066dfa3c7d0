"""What `sd3 bench` can be told to do. Each command imports what it needs when it is called."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.console import console, say
from flows.cli.options import path
from sd3core.errors import UserError

JsonOption = Annotated[Path | None, typer.Option("--json", parser=path, help="Also writes the figures to this file.")]

bench = typer.Typer(no_args_is_help=True, help="What things cost on this machine.")


@bench.command("model")
def bench_model(
    depth: Annotated[int, typer.Option(min=1, max=256, help="Blocks; the width is 64 times as much.")] = 6,
    image_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="A square number: 256 is a picture of 256 px.")
    ] = 256,
    text_tokens: Annotated[int, typer.Option(min=1, max=2**20)] = 154,
    batch: Annotated[int, typer.Option(min=2, max=2**20, help="Even: sampling takes half of it, with guidance.")] = 4,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="With RMS norms of queries and keys.")] = False,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, bf16 (fp32 master) or autocast. Repeatable; default: those the device has arithmetic for."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Euler steps of a sampling.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Each measures both models once, in turn.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Of the CPU; default: PyTorch's.")] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile on both sides.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    json_out: JsonOption = None,
) -> None:
    """Training step, sampling and activation memory of the MM-DiT against diffusers' SD3 transformer, same weights."""
    import torch

    from flows.cli.options import device as chosen_device
    from flows.cli.options import file_to_write, one_of
    from sd3core.bench.model import MODES, ModelBench, fast_modes, measure
    from sd3core.bench.report import heading, result_table
    from sd3core.mmdit import count_parameters

    for name in mode or ():
        one_of("--mode", name, MODES)
    file_to_write("--json", json_out)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = ModelBench(
        depth=depth,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        batch=batch,
        qk_norm="rms" if qk_norm else None,
        sampling_steps=steps,
        rounds=rounds,
        compile=compile_,
        device=chosen_device(device),
    )
    modes = tuple(mode or fast_modes(torch.device(settings.device)))
    if left_out := [name for name in MODES if not mode and name not in modes]:
        say(f"note: {settings.device} has no arithmetic for bf16; left out, but for --mode: {', '.join(left_out)}")
    title = heading(settings, count_parameters(settings.config()), torch.get_num_threads())
    say(title)
    with console.status("loading") as status:
        results = list(measure(settings, modes, status.update))
    console.print(result_table(results))
    figures = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    _write_figures(json_out, settings, figures | {"results": [result.to_dict() for result in results]})


@bench.command("data")
def bench_data(
    store: Annotated[
        str | None, typer.Option(help="Where the shards are written, and removed again; default: a temporary folder.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, max=10_000)] = 4,
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Of a shard; a row has about 1 MB.")] = 128,
    batch: Annotated[int, typer.Option(min=1, max=100_000)] = 32,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Each reads an epoch in every way, in turn.")] = 5,
    json_out: JsonOption = None,
) -> None:
    """The loader against webdataset, or on S3 plain boto3, that read the same tars: decoded, hashed, in batches."""
    import tempfile

    from flows.cli.options import file_to_write
    from sd3core.bench.data import DataBench, measure_data
    from sd3core.bench.report import data_heading, data_table
    from sd3core.data.store import open_store

    file_to_write("--json", json_out)
    if batch > shards * rows:
        raise UserError(f"--batch {batch} is more than the {shards * rows} rows of an epoch; lower it, or raise --rows")
    settings = DataBench(shards=shards, rows=rows, batch=batch, rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="sd3-bench-") as folder, console.status("writing") as status:
        where = open_store(store or Path(folder).as_uri())
        result = measure_data(settings, where, lambda done: status.update(f"round {done} of {rounds}"), say)
    say(data_heading(settings, result))
    console.print(data_table(result))
    _write_figures(json_out, settings, {"result": asdict(result)})


@bench.command("encode")
def bench_encode(
    recipe: Annotated[str, typer.Option(help="Its towers must have been made.")] = "mini",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    shards: Annotated[int, typer.Option(min=4, max=10_000, help="That one actor encodes at a time.")] = 16,
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Of a shard.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Each encodes in every way, in turn.")] = 3,
    json_out: JsonOption = None,
) -> None:
    """Actors that encode a recipe's text and latents: shards at once, two actors, and what bf16 changes."""

    from flows.cli.encode_figures import difference_table, encoding_heading, encoding_table
    from flows.cli.options import file_to_write
    from flows.local.home import run_store
    from flows.local.recipes import known_recipes
    from flows.upstream import Upstream
    from sd3core.data.settled_precision import settle_precisions
    from sd3core.recipe_file import load_recipe
    from workers.encode_bench import EncodeBench, measure_differences, measure_encoding

    file_to_write("--json", json_out)
    loaded = load_recipe(known_recipes().get(recipe, recipe), set_ or [])
    store = run_store(loaded)
    loaded = settle_precisions(loaded, store)
    towers = Upstream(loaded, store).towers
    settings = EncodeBench(shards=shards, rows=rows, rounds=rounds)
    with console.status("comparing bf16 with fp32") as status:
        differences = measure_differences(loaded, store, towers)
        console.print(difference_table(differences))
        status.update("encoding")
        found = measure_encoding(
            settings, loaded, store, towers, lambda n: status.update(f"round {n} of {rounds}"), say
        )
    say(encoding_heading(settings, loaded))
    console.print(encoding_table(found))
    changed = {name: asdict(difference) for name, difference in differences.items()}
    _write_figures(json_out, settings, {"rates": {rates.kind: rates.rates for rates in found}, "bf16": changed})


@bench.command("duplicates")
def bench_duplicates(
    scenes: Annotated[
        int, typer.Option(min=16, max=1_000_000, help="Drawn pictures, beside crops of photographs.")
    ] = 1_900,
    planted: Annotated[int, typer.Option(min=1, max=100_000, help="Near-duplicates of each kind.")] = 300,
    threshold: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Default: the built-in hash's.")] = None,
    pictures: Annotated[str, typer.Option(help="test, or tuning: those that chose the threshold.")] = "test",
    json_out: JsonOption = None,
) -> None:
    """Recall and precision of the built-in hash on planted near-duplicates: rescaled, recompressed, cropped, mirrored."""

    from flows.cli.options import file_to_write, one_of
    from sd3core.bench.duplicates import SEEDS, DuplicatesBench, measure_duplicates
    from sd3core.bench.report import duplicates_heading, duplicates_table
    from sd3core.recipe_filter import HASH_THRESHOLD

    one_of("--pictures", pictures, SEEDS)
    file_to_write("--json", json_out)
    if planted > scenes:
        raise UserError(f"--planted {planted} is more than the {scenes} scenes; lower it, or raise --scenes")
    chosen = HASH_THRESHOLD if threshold is None else threshold
    settings = DuplicatesBench(scenes=scenes, planted=planted, threshold=chosen, pictures=pictures)
    with console.status("drawing") as status:
        result = measure_duplicates(settings, status.update)
    say(duplicates_heading(settings, result))
    console.print(duplicates_table(result))
    _write_figures(json_out, settings, {"result": asdict(result)})


def _write_figures(json_out: Path | None, settings: Any, figures: dict[str, Any]) -> None:
    """What `--json` asks for, with the bench's settings first."""
    if json_out is not None:
        json_out.write_text(json.dumps({"bench": asdict(settings)} | figures, indent=1))
