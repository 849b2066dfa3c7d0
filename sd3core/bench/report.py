"""Lays out the figures of a bench as a table.

The figures are seconds, ratios, memory, and how far the machine's own limit is.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from sd3core.bench.data import LOADER, DataBench, DataResult
from sd3core.bench.duplicates import DuplicatesBench, DuplicatesResult
from sd3core.bench.model import OURS, THEIRS, ModelBench, ModeResult


def heading(bench: ModelBench, config_parameters: int, threads: int) -> str:
    where = f"{threads} threads" if bench.device == "cpu" else bench.device
    compiled = ", both compiled" if bench.compile else ""
    return (
        f"depth {bench.depth} ({config_parameters:,} parameters), {bench.image_tokens} image and {bench.text_tokens} text tokens,"
        f" batch {bench.batch}, {where}{compiled}; medians of {bench.rounds} rounds"
    )


def result_table(results: Sequence[ModeResult]) -> Table:
    """Ratios above 1 mean that MM-DiT is faster; for memory, below 1 that it holds less."""
    table = Table(box=None, pad_edge=False)
    for column in ("mode", "what", OURS, THEIRS, "ratio", f"{OURS} / matmul", f"{THEIRS} / matmul"):
        table.add_column(column, justify="left" if column in ("mode", "what") else "right")
    for result in results:
        rate = f"{result.mode} (matmul {result.matmul_flops_per_second / 1e9:,.0f} GFLOP/s)"
        for what, seconds, ratio, fraction in (
            ("training step", result.train_seconds, result.train_ratio, result.train_fraction_of_matmul),
            ("sampling", result.sample_seconds, result.sample_ratio, result.sample_fraction_of_matmul),
        ):
            shown = (f"{1e3 * seconds[name]:,.1f} ms" for name in (OURS, THEIRS))
            table.add_row(rate, what, *shown, f"{ratio:.2f}", *(f"{fraction[name]:.2f}" for name in (OURS, THEIRS)))
            rate = ""
        parts = {
            "matrix products (fused attention whole)": result.train_product_seconds,
            "AdamW": result.optimizer_seconds,
        }
        for part, seconds in parts.items():
            if seconds is not None:
                shown = (f"{1e3 * seconds[name]:,.1f} ms" for name in (OURS, THEIRS))
                table.add_row("", f"{part} of a training step", *shown, "", "", "")
        table.add_row("", "forward and backward alone", "", "", f"{result.forward_backward_ratio:.2f}", "", "")
        held = (f"{result.activation_bytes[name] / 2**20:,.0f} MiB" for name in (OURS, THEIRS))
        table.add_row("", "peak activation memory", *held, f"{result.activation_ratio:.2f}", "", "")
        if (errors := result.velocity_errors) is not None:
            table.add_row(
                "", "error of the velocity by rounding", *(f"{errors[name]:.2%}" for name in (OURS, THEIRS)), "", "", ""
            )
    return table


def data_heading(bench: DataBench, result: DataResult) -> str:
    return (
        f"{result.rows} rows of {result.row_bytes / 1e3:,.0f} kB a round ({bench.side_px} px latents, {bench.tokens} CLIP and"
        f" {bench.tokens} T5 tokens in 16 bit), batch {bench.batch}, one core; medians of {bench.rounds} rounds"
    )


def data_table(result: DataResult) -> Table:
    """Ratios above 1 mean that the loader is faster."""
    table = Table(box=None, pad_edge=False)
    for column in ("reader", "rows/s", "MB/s", f"{LOADER} / reader"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    for name, seconds in result.seconds.items():
        rate = result.rows / statistics.median(seconds)
        ratio = "" if name == LOADER else f"{result.ratio(name):.2f}"
        table.add_row(name, f"{rate:,.0f}", f"{rate * result.row_bytes / 1e6:,.0f}", ratio)
    return table


def duplicates_heading(bench: DuplicatesBench, result: DuplicatesResult) -> str:
    return (
        f"{bench.planted} planted of each kind among {result.distinct:,} distinct {bench.pictures} pictures, threshold"
        f" {bench.threshold:g}; in brackets 95 % intervals; {result.state_bytes} bytes on disk a row, {result.state_bytes / 10:,.0f} GB"
        " for 100 million"
    )


def duplicates_table(result: DuplicatesResult) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("planted", "recall", "precision"):
        table.add_column(column)
    for found in result.found:
        table.add_row(found.kind, str(found.recall), str(found.precision))
    return table
