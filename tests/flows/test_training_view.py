"""What a training phase shows while it works, from the news it tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flows import training_view as module
from flows.training_view import training_view
from sd3core.errors import DataError
from workers.trainer.news import TrainingNews


class Run:
    """A stage's run that only remembers."""

    def __init__(self):
        self.store, self.recipe, self.report = None, None, self
        self.upstream = SimpleNamespace(towers=SimpleNamespace(folder="towers/t"))
        self.looks, self.warnings = {}, []

    def show(self, key, look, seconds):
        self.looks[key] = look

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def shown(monkeypatch):
    """The run, the rows that stand in the store, and the rows of every curve that was plotted."""
    made = SimpleNamespace(
        run=Run(), stored=[], plotted=[], job=SimpleNamespace(phase="pretrain", folder="x", last_samples=40)
    )

    class Decoder:
        def __init__(self, store, towers, read_real):
            assert towers == "towers/t"

        def page(self, path):
            if "broken" in path:
                raise DataError("not whole")
            return f"page of {path}", f"{path}.png"

    def plot(rows, title):
        made.plotted.append([(row["samples"], row["loss"]) for row in rows])
        return b"\x89PNG"

    monkeypatch.setattr(module, "PreviewDecoder", Decoder)
    monkeypatch.setattr(module, "loss_curve", plot)
    monkeypatch.setattr(module, "read_metrics", lambda store, folder, last_samples: made.stored)
    return made


def test_the_curve_goes_on_where_the_checkpoints_end(shown):
    shown.stored = [{"samples": 8, "loss": 3.0}, {"samples": 16, "loss": None}, {"samples": 24, "loss": 2.0}]
    with training_view(shown.run, shown.job) as view:
        look = shown.run.looks["pretrain-loss"]
        look()
        view(TrainingNews(losses=((24, 2.0), (32, 1.5))))
        _, description = look()
        shown.stored = [*shown.stored, {"samples": 32, "loss": 1.5}, {"samples": 40, "loss": 1.25}]
    look()
    assert shown.plotted == [
        [(8, 3.0), (24, 2.0)],
        [(8, 3.0), (24, 2.0), (32, 1.5)],
        [(8, 3.0), (24, 2.0), (32, 1.5), (40, 1.25)],
    ]
    assert description == "pretrain: loss 1.500 after 32 samples"


def test_before_the_first_loss_there_is_nothing_to_show(shown):
    with training_view(shown.run, shown.job):
        assert shown.run.looks["pretrain-loss"]() is None and shown.run.looks["pretrain-pictures"]() is None


def test_the_newest_pictures_and_each_only_once(shown):
    with training_view(shown.run, shown.job) as view:
        view(TrainingNews(previews=("a",)))
        view(TrainingNews(previews=("a", "b")))
    assert shown.run.looks["pretrain-pictures"]() == ("page of b", "b.png")


def test_pictures_that_cannot_be_shown_are_a_warning(shown):
    with training_view(shown.run, shown.job) as view:
        view(TrainingNews(previews=("a", "broken"), warnings=("pretrain: step 6: loss not finite",)))
    assert shown.run.looks["pretrain-pictures"]() == ("page of a", "a.png")
    assert shown.run.warnings == [
        "pretrain: step 6: loss not finite",
        "pretrain: broken cannot be shown (DataError: not whole)",
    ]


def test_a_training_that_fails_does_not_wait_for_pictures(shown):
    with pytest.raises(DataError, match="gone"), training_view(shown.run, shown.job):
        raise DataError("gone")
