"""The recipe's `caption`: who writes captions, how, and which are thrown out."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from sd3core.recipe_compute import Compute
from sd3core.recipe_section import Section

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
OF_ENDPOINTS = ("endpoint", "revision", "api_key_env")  # what only captioner 'endpoint' has


class CaptionSettings(Section):
    """All of it but the precision, and where `model` may lie."""

    captioner: Literal["small_world", "vision_language_model", "endpoint", "none"]
    # vision_language_model: the model's local folder; endpoint: its name there
    model: str | None = None
    prompt: str = "Describe this image in one detailed sentence: every object, its colour, how many, and where."
    max_new_tokens: int = Field(64, ge=1)
    batch: int = Field(8, ge=1)  # images that the model sees together; an endpoint batches by itself
    image_side_px: int = Field(1024, ge=32, le=8192)  # longest side that a model sees; a larger image is made smaller
    temperature: float = Field(0.0, ge=0, le=2)  # 0: greedy, the likeliest word each time
    seed: int = Field(0, ge=0, lt=2**63)  # of the words that are drawn at a temperature above 0, with the image's key
    # a model's caption that stands on a larger part of the images is thrown out; 1 keeps all. It makes no caption again
    max_share: float = Field(0.001, gt=0, le=1)
    endpoint: str | None = None  # http(s)://host:port/v1 of a server with the OpenAI chat interface
    revision: str | None = None  # endpoint: what of its model the name does not say; another one captions again
    api_key_env: str | None = None  # endpoint: the environment variable that holds its key, never the key
    requests_in_flight: int = Field(32, ge=1, le=4096)  # endpoint: at most, of all actors together
    request_timeout_s: float = Field(120.0, gt=0)  # endpoint: of one answer
    retry_s: float = Field(300.0, ge=0)  # endpoint: without any answer for so long, the stage stops

    @property
    def by_model(self) -> bool:
        """Whether words come from a trained model, on an actor or behind an endpoint: the rules are for those."""
        return self.captioner in ("vision_language_model", "endpoint")

    def spec_fields(self) -> dict[str, Any]:
        """What of it decides which words are written. What came later stands there of models alone, and of what is drawn by a seed
        where it is drawn: fingerprints from before are good.
        """
        fields = self.model_dump(mode="json", include={"captioner", "model", "prompt", "max_new_tokens"})
        if not self.by_model:
            return fields
        fields["image_side_px"] = self.image_side_px
        if self.temperature:
            fields |= {"temperature": self.temperature, "seed": self.seed}
        if self.captioner == "endpoint" and self.revision:
            fields["revision"] = self.revision
        return fields

    def endpoint_problem(self, compute: Compute) -> str | None:
        """How the actors and a server do not fit; None where they do."""
        # a request may begin just before retry_s is over, and then the server is asked whether it is there
        actors, waits = compute.for_stage("caption").actors, self.retry_s + 2 * self.request_timeout_s
        if self.captioner != "endpoint":
            return None
        if self.requests_in_flight < actors:
            return (
                f"caption.requests_in_flight {self.requests_in_flight} is less than the {actors} actors that share them; raise"
                f" it, or set compute.caption.actors to {self.requests_in_flight}"
            )
        if compute.stall_timeout_s <= waits:
            return (
                f"compute.stall_timeout_s {compute.stall_timeout_s:g} is not more than caption.retry_s {self.retry_s:g} and twice"
                f" caption.request_timeout_s {self.request_timeout_s:g} together, so an actor that waits for its server would"
                " count as dead; raise it"
            )
        return None

    @model_validator(mode="after")
    def _of_an_endpoint(self) -> CaptionSettings:
        if self.captioner != "endpoint":
            if given := next((key for key in OF_ENDPOINTS if getattr(self, key) is not None), None):
                raise ValueError(
                    f"{given} is for captioner 'endpoint'; leave it out, or set caption.captioner=endpoint"
                )
            return self
        if not self.endpoint:
            raise ValueError("endpoint must name the server, as http://host:8000/v1, when captioner is 'endpoint'")
        if not self.model:
            raise ValueError("model must be the model's name at the endpoint when captioner is 'endpoint'")
        if problem := _endpoint_problem(self.endpoint):
            raise ValueError(f"endpoint {problem}; give the server's address as http://host:8000/v1")
        # without the value: it may be the key itself
        if self.api_key_env is not None and not ENVIRONMENT_NAME.fullmatch(self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable that holds the key, and no key")
        return self


def _endpoint_problem(endpoint: str) -> str | None:
    try:
        url = urlsplit(endpoint)
        host, _ = url.hostname, url.port
    except ValueError:
        return "is no URL"
    if url.username is not None or url.password is not None:
        return "holds a user or password, which the recipe would show; name the key's variable in caption.api_key_env"
    if url.scheme not in ("http", "https") or not host:
        return f"{endpoint} is no http:// or https:// address"
    if url.query or url.fragment:
        return "has more after its path"
    if url.path.rstrip("/").endswith("/completions"):
        return f"{endpoint} names one of the server's calls"
    return None
