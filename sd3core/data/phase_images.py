"""How many images a phase trains on, and where a bound on its epochs ends it.

Both follow from the manifests of its latents and its text and from the recipe, so that every restart, on any machine, ends at
the same sample. Data that grow have manifests of other digests: a training of its own, with a bound of its own. What has been
trained on the manifests before it stays as it is.
"""

from __future__ import annotations

import math

from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.store import Store
from sd3core.data.training_plan import NO_ROWS
from sd3core.data.uncaptioned import read_uncaptioned, shards_without_captions, take_out_uncaptioned
from sd3core.data.unit_counts import leave_out_small_buckets, rows_in_manifest
from sd3core.errors import DataError
from sd3core.recipe import Training
from sd3core.words import counted

MANY_EPOCHS = 50  # from here on a phase is told to learn its images by heart


def phase_images(store: Store, latents: ManifestRef, text: ManifestRef, global_batch: int) -> int:
    """The images that an epoch of a phase takes: those of its latents that are not held out, have a caption, and stand in no
    bucket that is left out for being small.

    Reads the two manifests, and the record of rows without a caption where there are any. DataError where one is missing, and
    where there is no image to train on.
    """
    of_latents = read_manifest(store, latents.folder, latents.digest)
    of_text = read_manifest(store, text.folder, text.digest)
    counts = rows_in_manifest(of_latents, "train")
    if shards_without_captions(of_text):
        place_of = {shard.number: place for place, shard in enumerate(of_latents.shards)}
        counts, _ = take_out_uncaptioned(counts, place_of, read_uncaptioned(store, latents, text), "train")
    if len(counts) == 0:
        raise DataError(NO_ROWS)
    return len(leave_out_small_buckets(counts, global_batch))


def within_epochs(phase: Training, images: int) -> Training:
    """The phase as it is trained on so many images: `samples` = min(samples, max_epochs * images), at least one batch.

    The last batch is a whole one, as for any number of samples. A schedule goes by the length that is left.
    """
    if phase.max_epochs is None:
        return phase
    most = max(math.floor(phase.max_epochs * images), phase.global_batch)
    return phase.model_copy(update={"samples": min(phase.samples, most)})


def epochs_line(key: str, phase: Training, images: int) -> str:
    """How often a phase sees its images, and what a bound has made of its length: for a log."""
    ended = within_epochs(phase, images)
    epochs = f"{key}: {ended.last_samples / images:,.1f} epochs of {counted(images, 'image')}"
    if ended.samples == phase.samples:
        return epochs
    bound = f"max_epochs {phase.max_epochs:g} ends it after {ended.last_samples:,} of {phase.samples:,} samples"
    return f"{epochs}: {bound}"


def many_epochs_warning(key: str, phase: Training, images: int) -> str | None:
    """What to know of a phase that sees its images very often; None of others."""
    epochs = within_epochs(phase, images).last_samples / images
    if epochs < MANY_EPOCHS:
        return None
    return (
        f"{key}: {epochs:,.0f} epochs of {counted(images, 'image')}: so often seen they are learnt by heart, and pictures of"
        f" other captions suffer; more images, or a bound {key}.max_epochs, mend that"
    )
