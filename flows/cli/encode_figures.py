"""Lays out the figures of `sd3 bench encode` as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from sd3core.recipe import Recipe
from sd3core.towers.precision_difference import PrecisionDifference
from workers.encode_bench import WAYS, EncodeBench, EncodeRates


def difference_table(differences: Mapping[str, PrecisionDifference]) -> Table:
    """What encoders give in bf16 beside what they give in fp32: cosines, and the difference as a part of the length."""
    table = Table(box=None, pad_edge=False)
    for column in ("bf16 against fp32", "cosine", "least", "error", "most"):
        table.add_column(column, justify="left" if column.startswith("bf16") else "right")
    for name, of in differences.items():
        cosines = (f"{value:.5f}" for value in (of.mean_cosine, of.least_cosine))
        table.add_row(name, *cosines, *(f"{value:.2%}" for value in (of.mean_error, of.most_error)))
    return table


def encoding_heading(settings: EncodeBench, recipe: Recipe) -> str:
    compute, encode = recipe.compute.for_stage("encode"), recipe.encode
    return (
        f"shards of {settings.rows} rows a second; text in {encode.text_precision}, latents of {recipe.phases()[-1][1].side_px} px in"
        f" {encode.latent_precision}; an actor has {compute.cpus_per_actor:g} CPUs and {compute.gpus_per_actor:g} GPUs; medians of"
        f" {settings.rounds} rounds"
    )


def encoding_table(found: Sequence[EncodeRates]) -> Table:
    """Ratios above 1 mean that being at several shards at once, or a second actor, is faster."""
    table = Table(box=None, pad_edge=False)
    for column in ("what", *WAYS, "at once / one by one", "two actors / one"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for rates in found:
        shown = (_figure(rates.rate(way)) for way in WAYS)
        table.add_row(rates.kind, *shown, _figure(rates.gain), _figure(rates.two_actors))
    return table


def _figure(value: float) -> str:
    """A dash for two actors that were never at work together: one GPU for both, or the second still loading."""
    return "-" if math.isnan(value) else f"{value:.2f}"
