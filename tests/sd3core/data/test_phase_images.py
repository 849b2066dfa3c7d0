"""How many images a phase trains on, counted as its loader counts them, and where a bound on epochs ends it."""

from __future__ import annotations

import pytest
from small_shards import CLIP_TOKENS, T5_TOKENS, write_data_set

from sd3core.data.loader_settings import LoaderSettings, open_loader
from sd3core.data.manifest import ManifestRef, commit_manifest
from sd3core.data.phase_images import epochs_line, many_epochs_warning, phase_images, within_epochs
from sd3core.data.store import Store, open_store
from sd3core.data.uncaptioned import record_uncaptioned
from sd3core.errors import DataError
from sd3core.recipe import Training
from sd3core.recipe_file import load_recipe
from workers.trainer.metrics import learning_rate


@pytest.fixture
def data_set(tmp_path) -> tuple[Store, ManifestRef, ManifestRef]:
    """120 rows, some held out, three of them without a caption, in two buckets."""
    store = open_store(str(tmp_path / "store"))
    latents, text = (commit_manifest(store, made.folder, made) for made in write_data_set(store))
    record_uncaptioned(store, latents, text)
    return store, latents, text


def phase(**settings) -> Training:
    return load_recipe("tiny-test").pretrain.model_copy(update={"samples": 1_000, "global_batch": 8} | settings)


@pytest.mark.parametrize(
    "global_batch", [8, 32]
)  # by 32 the smaller bucket does not fill a batch, and stays: it is no rare one
def test_they_are_those_that_the_loader_of_the_phase_trains_on(data_set, tmp_path, global_batch):
    store, latents, text = data_set
    settings = LoaderSettings(
        store, latents, text, CLIP_TOKENS, T5_TOKENS, seed=0, original_fraction=0.5, global_batch=global_batch,
        micro_batch=4, steps=1, rank=0, world=1, cache_folder=tmp_path / "cache", cache_bytes=1e9, read_ahead_bytes=1e6,
    )  # fmt: skip
    loader, _ = open_loader(settings)
    try:
        epoch = sum(report.rows for report in loader.plan.epoch_report().values())
    finally:
        loader.close()
    assert phase_images(store, latents, text, global_batch) == epoch
    assert 60 < epoch < 120 - 3


def test_where_nothing_is_left_to_train_on_it_says_so(tmp_path):
    store = open_store(str(tmp_path))
    latents, text = (commit_manifest(store, made.folder, made) for made in write_data_set(store, shards=0))
    with pytest.raises(DataError, match="^there is no row to train on"):
        phase_images(store, latents, text, 8)


@pytest.mark.parametrize(
    ("max_epochs", "images", "samples", "last"),
    [
        (None, 10, 1_000, 1_000),
        (5, 100, 500, 504),  # whole batches, as 1,000 samples would be
        (2.5, 101, 252, 256),
        (50, 100, 1_000, 1_000),  # more than the phase's own length
        (0.01, 100, 8, 8),  # a phase has a step
    ],
)
def test_a_bound_ends_a_phase_at_a_whole_batch(max_epochs, images, samples, last):
    ended = within_epochs(phase(max_epochs=max_epochs), images)
    assert (ended.samples, ended.last_samples) == (samples, last)
    assert ended.total_steps * 8 == last


def test_a_cosine_goes_by_the_length_that_is_left():
    bounded = within_epochs(phase(max_epochs=5, schedule="cosine", warmup_samples=0), 100)
    assert learning_rate(bounded, 500) == pytest.approx(0.1 * bounded.learning_rate)
    assert learning_rate(bounded, 250) == pytest.approx(0.55 * bounded.learning_rate)


def test_the_words_say_epochs_images_and_what_the_bound_has_done():
    assert epochs_line("pretrain", phase(), 711) == "pretrain: 1.4 epochs of 711 images"
    assert (
        epochs_line("pretrain", phase(max_epochs=5), 100)
        == "pretrain: 5.0 epochs of 100 images: max_epochs 5 ends it after 504 of 1,000 samples"
    )
    assert many_epochs_warning("pretrain", phase(), 21) is None
    assert many_epochs_warning("pretrain", phase(), 20).startswith("pretrain: 50 epochs of 20 images: ")
    assert many_epochs_warning("pretrain", phase(max_epochs=49), 20) is None
