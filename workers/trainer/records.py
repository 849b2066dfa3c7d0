"""A phase's loss rows and TensorBoard files. Both reach the store with the checkpoints: they tell only what stands."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

from sd3core.data.store import Store
from sd3core.shown_text import markdown_text
from workers.trainer.job import TrainingJob

SCALARS = ("loss", "grad_norm", "lr", "samples_per_s", "mfu", "wait_s", "checkpoint_s", "attention_logit_max")


class Records:
    """Rank 0 writes; on other ranks everything here does nothing."""

    def __init__(self, job: TrainingJob, store: Store, rank: int, attempt: int, step: int):
        self.since_checkpoint: list[dict[str, Any]] = []
        self._job, self._store, self._writer = job, store, None
        if rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and other ranks need none

            self._folder = Path(job.log_dir or tempfile.mkdtemp(prefix="sd3-logs-")).absolute()
            self._writer = SummaryWriter(
                str(self._folder), purge_step=step + 1 if step else None, filename_suffix=f".attempt-{attempt:04d}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        if not self._writer:
            return
        self.since_checkpoint.append(row)
        step = row["step"]
        for name in SCALARS:
            if row.get(name) is not None:
                self._writer.add_scalar(f"train/{name}", row[name], step)
        for number, loss in enumerate(row.get("loss_by_t", ())):
            if loss is not None:
                self._writer.add_scalar(f"train/loss_by_t/{number}", loss, step)
        if "warning" in row:
            self._writer.add_text("train/warning", markdown_text(row["warning"]), step)  # TensorBoard shows Markdown

    def checkpoint_stands(self) -> None:
        """The rows so far are in a finished checkpoint; the TensorBoard file goes beside it."""
        self.since_checkpoint = []
        if self._writer:
            self._writer.flush()
            current = Path(self._writer.file_writer.event_writer._file_name)
            self._store.put_file(f"{self._job.logs_folder}/{current.name}", current)
