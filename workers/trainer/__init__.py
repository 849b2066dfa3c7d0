"""Training of one phase: Ray Train starts the ranks, DeepSpeed shards the state.

The model knows neither.
"""

from workers.trainer.job import TrainingFailed, TrainingJob, TrainingResult, TrainingSuperseded
from workers.trainer.launch import train

__all__ = ["TrainingFailed", "TrainingJob", "TrainingResult", "TrainingSuperseded", "train"]
