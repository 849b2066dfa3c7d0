"""What every section of a recipe keeps to: no unknown key, finite numbers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and value >= 2**63:  # also where it stands in quotes
            raise ValueError("larger than a number of 64 bits")
        return value
