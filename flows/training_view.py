"""Shows a training phase at work: warnings, the loss curve, newest pictures."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from flows.stage import StageRun
from flows.ui.artifacts import Shown, markdown_picture
from flows.ui.loss_curve import loss_curve
from flows.ui.previews import PreviewDecoder, real_pictures
from sd3core.shown_text import markdown_text
from workers.trainer.job import TrainingJob
from workers.trainer.news import LossPoints, TrainingNews
from workers.trainer.standing_checkpoints import read_metrics

CURVE_SECONDS = 10.0


class TrainingView:
    """Hears a phase's news; drawing is on other threads, so that it never holds up the watch over the ranks."""

    def __init__(self, run: StageRun, job: TrainingJob, drawing: ThreadPoolExecutor) -> None:
        self.run, self.job, self._drawing = run, job, drawing
        self._news: TrainingNews | None = None
        self._stored = self._stored_losses()
        self._decoder = PreviewDecoder(run.store, run.upstream.towers.folder, real_pictures(run.upstream, job.phase))
        self._pictures: Shown | None = None
        run.report.show(f"{job.phase}-loss", self._curve, CURVE_SECONDS)
        run.report.show(f"{job.phase}-pictures", lambda: self._pictures, 0.0)

    def __call__(self, news: TrainingNews) -> None:
        for warning in news.warnings:
            self.run.warn(warning)
        if self._news is None:
            self._drawing.submit(lambda: self._decoder.autoencoder)  # loaded while the first steps are taken
        for path in news.previews[len(self._news.previews) if self._news else 0 :]:
            self._drawing.submit(self._draw, path)
        self._news = news

    def ended(self) -> None:
        """The curve is now that of the checkpoints: training does not wait until its last losses are told."""
        self._stored = self._stored_losses()

    def _stored_losses(self) -> tuple[tuple[int, float], ...]:
        losses = LossPoints()
        for row in read_metrics(self.run.store, self.job.folder, self.job.last_samples):
            if row["loss"] is not None:
                losses.add(row["samples"], row["loss"])
        return losses.with_last()

    def _curve(self) -> Shown | None:
        stored, told = self._stored, self._news.losses if self._news else ()
        points = [*stored, *(point for point in told if not stored or point[0] > stored[-1][0])]
        if not points:
            return None
        title = f"{self.job.phase}: loss {points[-1][1]:.3f} after {points[-1][0]:,} samples"
        rows = [{"samples": samples, "loss": loss} for samples, loss in points]
        return f"## {markdown_text(title)}\n\n{markdown_picture('loss', loss_curve(rows, self.job.phase))}", title

    def _draw(self, path: str) -> None:
        try:
            self._pictures = self._decoder.page(path)
        except Exception as error:  # pictures are for looking at: nothing of them may end the training
            self.run.warn(f"{self.job.phase}: {path} cannot be shown ({type(error).__name__}: {error})")


@contextmanager
def training_view(run: StageRun, job: TrainingJob) -> Iterator[TrainingView]:
    """Ends when the last pictures are drawn; at once when training failed."""
    drawing = ThreadPoolExecutor(1, thread_name_prefix="pictures")
    try:
        view = TrainingView(run, job, drawing)
        yield view
        view.ended()
        drawing.shutdown(wait=True)
    finally:
        drawing.shutdown(wait=False, cancel_futures=True)
