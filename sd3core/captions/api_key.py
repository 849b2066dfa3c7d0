"""An endpoint's key: named by its environment variable, and shown by nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from sd3core.errors import DataError


@dataclass(frozen=True)
class ApiKey:
    """It goes from the process that starts a stage to its workers in their start alone, and is written nowhere."""

    variable: str
    value: str = field(repr=False)

    def __str__(self) -> str:
        return f"${self.variable}"


def find_api_key(variable: str) -> ApiKey | None:
    """What the environment of this process has under that name. Raises DataError for what can be no key."""
    value = os.environ.get(variable, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise DataError(f"caption.api_key_env: ${variable} holds what no HTTP header can carry as a key; mend it")
    return ApiKey(variable, value)


def no_api_key(variable: str) -> DataError:
    return DataError(
        f"caption.api_key_env: ${variable} is empty where the stage runs; export it there, for a local worker before `sd3 down`"
        " and the same command, on a cluster in the environment of the flows or of Ray's nodes"
    )
