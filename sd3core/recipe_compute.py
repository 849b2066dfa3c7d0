"""The recipe's `compute`: how many processes on what, in all stages or in one."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from sd3core.recipe_section import Section

ActorStage = Literal["ingest", "towers", "filter", "caption", "encode", "evaluate"]  # whose work is done by actors
ACTOR_STAGES: tuple[ActorStage, ...] = get_args(ActorStage)
GPU_STAGES: tuple[ActorStage, ...] = ("filter", "caption", "encode", "evaluate")  # whose models may run on GPUs


class StageActors(Section):
    """What one stage's actors have of their own; what is left out they have as `compute` says for all. None of them has a GPU."""

    actors: int | None = Field(None, ge=1)
    cpus_per_actor: float | None = Field(None, gt=0)


class StageGpuActors(StageActors):
    """Likewise, of GPU_STAGES."""

    gpus_per_actor: float | None = Field(None, ge=0)

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_gpus(cls, gpus: float | None) -> float | None:
        return gpus if gpus is None else _whole_or_shared(gpus)


def _whole_or_shared(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} GPUs: Ray shares one GPU, or gives whole ones")
    return gpus


class Compute(Section):
    """How many processes on what; changes no bytes that are made, but for what a precision `auto` finds on the first actors' GPUs."""

    ray_address: str | None = None  # None starts Ray on this machine
    autoscaling: bool = (
        False  # the cluster adds nodes when asked: what its nodes of now lack is waited for, not refused
    )
    actors: int = Field(2, ge=1)  # of each stage, but where it has a number of its own below
    cpus_per_actor: float = Field(1.0, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0)  # for filter, caption, encode and evaluate
    ingest: StageActors = StageActors()
    towers: StageActors = StageActors()
    filter: StageGpuActors = StageGpuActors()
    caption: StageGpuActors = StageGpuActors()
    encode: StageGpuActors = StageGpuActors()
    evaluate: StageGpuActors = StageGpuActors()
    train_ranks: int = Field(2, ge=1)
    cpus_per_rank: float = Field(1.0, gt=0)
    gpus_per_rank: float = Field(0.0, ge=0)
    max_restarts: int = Field(3, ge=0)  # of training without a checkpoint between them, by Ray Train
    stall_timeout_s: float = Field(600.0, gt=0)  # no progress for so long is a failure
    object_store_mb: int = Field(200, ge=80)  # local Ray only
    cache_gb: float = Field(2.0, gt=0)  # on a machine's disk: tables of rows, and a store's data where all of it fits
    # read ahead in memory: of a training rank half rows, half micro batches; of a captioning or encoding actor files and images
    decoded_gb: float = Field(2.0, gt=0)
    loader_process: bool | None = None  # read and decode beside each rank, not in its threads; None: where it has a GPU

    @field_validator("gpus_per_actor", "gpus_per_rank")
    @classmethod
    def _whole_gpus(cls, gpus: float) -> float:
        return _whole_or_shared(gpus)

    @property
    def decodes_beside_ranks(self) -> bool:
        return self.gpus_per_rank > 0 if self.loader_process is None else self.loader_process

    def for_stage(self, stage: ActorStage) -> StageCompute:
        """As the actors of one stage have it."""
        gpus = {} if stage in GPU_STAGES else {"gpus_per_actor": 0.0}
        own = getattr(self, stage).model_dump(exclude_none=True)
        return StageCompute.model_construct(**dict(self) | gpus | own | {"stage": stage})

    def key(self, name: str) -> str:
        """Where the recipe says a number, for messages: compute.actors."""
        return f"compute.{name}"

    @property
    def most_cpus(self) -> float:
        """The CPUs that all actors of one stage or all ranks ask for together, whichever is more."""
        stages = (self.for_stage(stage) for stage in ACTOR_STAGES)
        return max(self.train_ranks * self.cpus_per_rank, *(of.actors * of.cpus_per_actor for of in stages))


class StageCompute(Compute):
    """`compute` as the actors of one stage have it."""

    stage: ActorStage

    def key(self, name: str) -> str:
        """compute.encode.actors where the stage has a number of its own."""
        own = getattr(getattr(self, self.stage), name, None)
        return super().key(name) if own is None else f"compute.{self.stage}.{name}"
