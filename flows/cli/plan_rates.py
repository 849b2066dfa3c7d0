"""Rates and prices that a user of `sd3 plan` knows better than the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sd3core.costs.stages import GPU_BF16_TFLOPS, StageCost
from sd3core.errors import UserError


@dataclass(frozen=True)
class GivenRates:
    """What is not given is assumed."""

    gpu_tflops: float = GPU_BF16_TFLOPS  # sustained in bf16
    gpu_price: float | None = None  # of one GPU for an hour, in whatever money
    rows: dict[str, float] = field(default_factory=dict)  # rows a second of one device, by the names of the time table

    @classmethod
    def read(cls, gpu_tflops: float | None, gpu_price: float | None, rates: Sequence[str]) -> GivenRates:
        """`rates`: NAME=ROWS_A_SECOND. UserError for what is no such."""
        rows = {}
        for text in rates:
            name, _, value = text.partition("=")
            try:
                rows[name] = float(value)
            except ValueError:
                rows[name] = math.nan
            if not (name and 0 < rows[name] < math.inf):
                raise UserError(f"--rate {text}: give NAME=ROWS_A_SECOND of one device, as text=250 or pretrain=12.5")
        return cls(gpu_tflops or GPU_BF16_TFLOPS, gpu_price, rows)

    def applied(self, costs: Sequence[StageCost]) -> list[StageCost]:
        """The costs with the hours of given rates. UserError for a name that is none of theirs."""
        names = [cost.name for cost in costs]
        if unknown := sorted(self.rows.keys() - set(names)):
            raise UserError(f"--rate {unknown[0]}: no part of this plan; take one of {', '.join(names)}")
        return [
            replace(cost, hours=cost.rows / (self.rows[cost.name] * cost.devices) / 3600)
            if cost.name in self.rows
            else cost
            for cost in costs
        ]

    def price(self, cost: StageCost) -> str:
        """For a table: of GPUs alone."""
        if not cost.gpu:
            return "-"
        return "not known" if cost.hours is None else f"{self._money(cost):,.2f}"

    def total(self, costs: Sequence[StageCost]) -> str:
        if not any(cost.gpu for cost in costs):
            return "no part of this plan is on GPUs"
        hours = sum(cost.hours * cost.devices for cost in costs if cost.gpu and cost.hours is not None)
        return (
            f"all that is known: {hours:,.1f} GPU hours, {hours * self.gpu_price:,.2f} at {self.gpu_price:g} a GPU hour"
        )

    def _money(self, cost: StageCost) -> float:
        return cost.hours * cost.devices * self.gpu_price


ASSUMED = GivenRates()
