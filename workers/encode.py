"""The encode stage: text features of captions, and VAE latents of images.

Text is encoded once for all resolutions, latents for each phase: pretraining's beside the text, each other phase's before it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from threading import Condition, Lock
from types import MappingProxyType
from typing import Any

from sd3core.captions.repeated import NONE_REPEATED, RepeatedCaptions, find_repeated
from sd3core.data.encoded_shards import NULL_FILE, pin_null
from sd3core.data.folder_source import Tell
from sd3core.data.images import PixelRules
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.raw_buckets import count_raw_buckets
from sd3core.data.settled_precision import SettledPrecision
from sd3core.data.shards import parts_digest
from sd3core.data.store import Store, open_store
from sd3core.data.uncaptioned import record_uncaptioned
from sd3core.data.unit_counts import rows_in_manifest, small_buckets_warning
from sd3core.progress import Progress, ProgressCallback
from sd3core.recipe import TOKENS_AT_MOST, Recipe, Text
from sd3core.specs import fingerprint, latents_fields, latents_folder, latents_part, text_fields, text_folder
from sd3core.towers.artifact import read_towers
from sd3core.words import counted
from workers.at_once import SHARDS_AT_ONCE, ShardsAtOnce
from workers.encode_latents import ENLARGED, FLIPPED, NOT_FLIPPED, FlipSource, LatentsSource, LatentsWorker
from workers.encode_text import TOO_LONG, TextSource, TextWorker
from workers.inputs import Images, InputShard, actor_device, decode_threads, input_shards
from workers.rare_sizes import MIN_SCALE, RareSizes, kept_note, latents_digest, own_merges, rare_sizes
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stages
from workers.stage import StageResult, join_results, remember_stage

LOAD_S = 1800  # that loading may take without a sign of life before the pool's watchdog begins to count


def encode_stage(
    recipe: Recipe,
    store: Store,
    raw: ManifestRef,
    captions: ManifestRef | None,
    towers: ManifestRef,
    report: ProgressCallback,
    tell: Tell = lambda note: None,
    keep: ManifestRef | None = None,
) -> StageResult:
    """What pretraining needs: its parts are "text", of all phases, and "latents.pretrain". Other phases' latents are made before
    them, by encode_phase.

    `tell` hears what becomes of the rare sizes of all phases before anything is encoded.

    Raises StageFailed when shards could not be made, DataError when an input is missing or not what its manifest says.
    """
    digests = read_towers(store, towers.folder, towers.digest).digests
    images = Images.read(store, raw, keep)
    caption_shards = input_shards(read_manifest(store, captions.folder, captions.digest)) if captions else {}
    repeated = NONE_REPEATED
    if captions and recipe.caption.by_model:
        repeated = find_repeated(store, captions, recipe.caption.max_share, report)
    first, *later = (key for key, _ in recipe.phases())
    rare = _rare_sizes(recipe, store, [first, *later], images, digests, report, tell)
    stages = [
        _text_stage(recipe, digests, images, captions, caption_shards, repeated),
        _latents_stage(recipe, first, digests, images, rare, captions=captions, caption_shards=caption_shards),
    ]
    folder = stages[0].folder
    damaged = pin_null(store, folder)
    text, latents = _encode(recipe, store, stages, towers, report, repeated)
    pin_null(store, folder)  # here, where one process does it: several workers may have written it
    text = _with_cut_captions(store, recipe, text)
    if damaged:
        warnings = [*text.warnings, f"{store.uri(damaged)} was damaged: it is made again"]
        text = dataclasses.replace(text, warnings=warnings)
    latents = _told_of_phase(store, recipe, first, latents, text.manifest, rare)
    results = {result.stage: result for result in (text, latents)}
    digest = fingerprint({name: result.digest for name, result in results.items()})
    return join_results("encode", results, digest, "; ".join(sorted({result.reason for result in results.values()})))


def encode_phase(
    recipe: Recipe,
    store: Store,
    phase_key: str,
    raw: ManifestRef,
    text: ManifestRef,
    towers: ManifestRef,
    report: ProgressCallback,
    tell: Tell = lambda note: None,
    keep: ManifestRef | None = None,
    captions: ManifestRef | None = None,
) -> StageResult:
    """The latents that one phase trains on, "latents.KEY". Those that it shares with an earlier phase are made once.

    `text`: what it trains on beside them. `captions`: the synthetic ones, which with encode.flip say what is flipped. `tell` and
    what is raised: as of encode_stage.
    """
    digests = read_towers(store, towers.folder, towers.digest).digests
    images = Images.read(store, raw, keep)
    rare = _rare_sizes(recipe, store, [phase_key], images, digests, report, tell)
    folders = {key: latents_folder(recipe, phase, digests) for key, phase in recipe.phases()}
    first = next(key for key, folder in folders.items() if folder == folders[phase_key])
    flip_by = captions if recipe.encode.flip else None  # else nobody needs them
    caption_shards = input_shards(read_manifest(store, flip_by.folder, flip_by.digest)) if flip_by else {}
    by_captions = {"captions": flip_by, "caption_shards": caption_shards}
    stage = _latents_stage(recipe, first, digests, images, rare, phase_key, **by_captions)
    (latents,) = _encode(recipe, store, [stage], towers, report)
    if first != phase_key:
        latents = dataclasses.replace(latents, stage=latents_part(phase_key))
        remember_stage(store, recipe.run, latents.stage, stage.folder, latents.digest, stage.noted)
    return _told_of_phase(store, recipe, phase_key, latents, text, rare)


def _encode(
    recipe: Recipe,
    store: Store,
    stages: list[ShardStage],
    towers: ManifestRef,
    report: ProgressCallback,
    repeated: RepeatedCaptions = NONE_REPEATED,
) -> list[StageResult]:
    compute = recipe.compute.for_stage("encode")
    worker = encoding_settings(recipe, store, towers) | {"repeated": frozenset(repeated.captions)}
    return run_shard_stages(store, recipe.run, stages, EncodeWorker, worker, compute, report)


def encoding_settings(recipe: Recipe, store: Store, towers: ManifestRef) -> dict[str, Any]:
    """What an EncodeWorker is made with."""
    compute = recipe.compute.for_stage("encode")
    return {
        "store_url": store.url,
        "towers": towers,
        "text": recipe.text,
        "dtypes": {"text": recipe.encode.text_dtype, "latents": recipe.encode.latent_dtype},
        "batch": recipe.encode.batch,
        "rules": PixelRules.of(recipe.data),
        "threads": decode_threads(compute),
        "device": actor_device(compute),
        "precisions": {"text": recipe.encode.text_precision, "latents": recipe.encode.latent_precision},
        "most_bytes": compute.decoded_gb * 1e9,
    }


def _rare_sizes(
    recipe: Recipe,
    store: Store,
    phases: list[str],
    images: Images,
    digests: dict[str, str],
    report: ProgressCallback,
    tell: Tell,
) -> RareSizes:
    count = lambda rules: count_raw_buckets(store, images.raw, rules, report, images.kept)
    rare = rare_sizes(recipe, store, phases, images, digests, count)
    for note in rare.notes:
        tell(note)
    return rare


def _latents_stage(
    recipe: Recipe,
    phase_key: str,
    digests: dict[str, str],
    images: Images,
    rare: RareSizes,
    judged: str | None = None,
    *,
    captions: ManifestRef | None = None,
    caption_shards: Mapping[int, InputShard] = MappingProxyType({}),
) -> ShardStage:
    """`judged`: the phase by which `rare` is, where that is a later one of the same latents. With encode.flip an image's synthetic
    caption too says whether it is flipped, so a shard is named by its captions as well.
    """
    judged = judged or phase_key
    phase, rule = dict(recipe.phases())[phase_key], rare.rules[judged]
    folder, fields = latents_folder(recipe, phase, digests), latents_fields(recipe, phase, digests)
    merged, left_out = rare.merged.get(judged, {}), rare.left_out.get(judged, {})
    tasks = []
    for number, shard in images.shards.items():
        own = own_merges(merged, number)
        digest, flip = latents_digest(shard, own, left_out.get(number, 0)), None
        if recipe.encode.flip:
            flip = FlipSource(caption_shards.get(number))
            digest = parts_digest(digest, flip.captions.digest) if flip.captions else digest
        tasks.append(ShardTask(number, digest, folder, shard.rows, LatentsSource(shard, rule, own, flip)))
    rules = {} if judged in rare.enlarged else {MIN_SCALE: phase.min_scale}
    inputs = images.inputs | ({"captions": captions.digest} if recipe.encode.flip and captions else {})
    return ShardStage(latents_part(phase_key), "latents", folder, fields, inputs, tasks, unit="image", rules=rules)


def _told_of_phase(
    store: Store, recipe: Recipe, phase_key: str, latents: StageResult, text: ManifestRef, rare: RareSizes
) -> StageResult:
    """What a user should know of a phase's latents before it trains, and what its ranks will ask of them."""
    phase = dict(recipe.phases())[phase_key]
    mend = (
        f"they stand from before there was {phase_key}.min_scale, and `--from-stage encode` leaves them out"
        if phase_key in rare.enlarged
        else f"a larger {phase_key}.min_scale leaves them out"
    )
    latents = _with_enlarged_images(store, f"{phase_key} ({phase.side_px} px)", latents, mend)
    latents = _with_rare_sizes(store, phase_key, phase.global_batch, latents, rare)
    latents = _with_flips(store, phase_key, latents) if recipe.encode.flip else latents
    record_uncaptioned(store, latents.manifest, text)
    return latents


def _with_flips(store: Store, phase: str, result: StageResult) -> StageResult:
    counts = read_manifest(store, result.manifest.folder, result.manifest.digest).buckets
    kept = {name.removeprefix(NOT_FLIPPED): count for name, count in counts.items() if name.startswith(NOT_FLIPPED)}
    flipped, reasons = counts.get(FLIPPED, 0), ", ".join(f"{count:,} {why}" for why, count in kept.items())
    warning = f"{phase}: {flipped:,} of {counted(flipped + sum(kept.values()), 'training image')} flipped in half of their steps"
    warning += f"; not for what their captions say: {reasons}" if kept else ""
    return dataclasses.replace(result, warnings=[*result.warnings, warning])


def _with_rare_sizes(store: Store, phase: str, global_batch: int, result: StageResult, rare: RareSizes) -> StageResult:
    """What was told of the phase, and what training will say: an image that could not be encoded may have been of a rare size."""
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    counts = rows_in_manifest(manifest, "train")
    kept = kept_note(counts, global_batch) if phase in rare.kept else None
    said = [f"{phase}: {note}" for note in (kept, small_buckets_warning(counts, global_batch)) if note]
    told = [note for note in rare.notes if note.startswith(f"{phase}: ")]
    return dataclasses.replace(result, warnings=list(dict.fromkeys([*result.warnings, *told, *said])))


def _with_enlarged_images(store: Store, phase: str, result: StageResult, mend: str) -> StageResult:
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    some, *more = [(over, manifest.buckets.get(name, 0)) for over, name in ENLARGED.items()]
    if not some[1]:
        return result
    parts = "".join(f", {count:,} of them more than {over:g} times" for over, count in more if count)
    warning = (
        f"{phase}: {some[1]:,} of {counted(manifest.rows, 'image')} enlarged more than {some[0]:g} times to fill their"
        f" bucket{parts}; {mend}"
    )
    return dataclasses.replace(result, warnings=[*result.warnings, warning])


def _with_cut_captions(store: Store, recipe: Recipe, result: StageResult) -> StageResult:
    cut = read_manifest(store, result.manifest.folder, result.manifest.digest).buckets.get(TOO_LONG, 0)
    if not cut:
        return result
    text = recipe.text
    warning = (
        f"{counted(cut, 'image')} with a caption longer than text.clip_tokens {text.clip_tokens} and text.t5_tokens"
        f" {text.t5_tokens}: no encoder reads its end; {cut_advice(text, recipe.caption.captioner)}"
    )
    return dataclasses.replace(result, warnings=[*result.warnings, warning])


def cut_advice(text: Text, captioner: str) -> str:
    """What can be done about captions that are longer than the encoders read: no key is raised that is at its maximum."""
    keys = [f"text.{key} (up to {most})" for key, most in TOKENS_AT_MOST.items() if getattr(text, key) < most]
    advice = f"raise {' or '.join(keys)}" if keys else "both are the most there is: shorten the captions"
    if captioner in ("vision_language_model", "endpoint"):
        advice += "; the captioner's are shorter with another caption.prompt or fewer caption.max_new_tokens"
    return f"{advice} to have the ends count"


def _text_stage(
    recipe: Recipe,
    digests: dict[str, str],
    images: Images,
    captions: ManifestRef | None,
    caption_shards: dict[int, InputShard],
    repeated: RepeatedCaptions,
) -> ShardStage:
    """Which captions are left out counts in a shard's digest: where others are, its rows are taken over, and few are encoded."""
    folder, fields = text_folder(recipe, digests), text_fields(recipe, digests)
    tasks = []
    for number, shard in images.shards.items():
        captioned = caption_shards.get(number)
        left_out = [repeated.digest] if repeated.captions else []
        digest = parts_digest(shard.content, captioned.digest if captioned else "", *left_out)
        tasks.append(ShardTask(number, digest, folder, shard.rows, TextSource(shard, captioned)))
    inputs = images.inputs | ({"captions": captions.digest} if captions else {})
    inputs |= {"repeated": repeated.digest} if repeated.captions else {}
    return ShardStage("text", "text", folder, fields, inputs, tasks, needs=(NULL_FILE,), unit="caption")


class EncodeWorker:
    """Text shards first, then latents, with only the encoders loaded that the task at hand needs. Several threads may call it."""

    tasks_at_once = SHARDS_AT_ONCE

    def __init__(
        self,
        store_url: str,
        towers: ManifestRef,
        text: Text,
        dtypes: dict[str, str],
        batch: int,
        rules: PixelRules,
        threads: int,
        device: str,
        precisions: dict[str, SettledPrecision],
        most_bytes: float,
        repeated: AbstractSet[int] = frozenset(),
    ) -> None:
        """`repeated`: hashes of synthetic captions that text leaves out."""
        store, self.at_once = open_store(store_url), ShardsAtOnce(most_bytes)
        shared = (self.at_once, self._fetched)
        self.make = {
            TextSource: lambda: TextWorker(
                store, towers, text, dtypes["text"], batch, device, precisions["text"], *shared, repeated
            ),
            LatentsSource: lambda: LatentsWorker(
                store, towers, dtypes["latents"], batch, rules, threads, device, precisions["latents"], *shared
            ),
        }
        self.loaded_for: type | None = None
        self.worker: TextWorker | LatentsWorker | None = None
        self.waiting_since = time.monotonic()  # for encoders: since the load began, or the last file came
        self.gate = Lock()  # held by who waits for other encoders, so that nobody passes
        self.users, self.idle = 0, Condition()

    def __call__(self, task: ShardTask) -> MadeShard:
        with self.gate:
            worker = self._loaded(type(task.source))
            with self.idle:
                self.users += 1
        try:
            return worker(task)
        finally:
            with self.idle:
                self.users -= 1
                self.idle.notify_all()

    def _loaded(self, wanted: type) -> TextWorker | LatentsWorker:
        if self.loaded_for is not wanted:
            with self.idle:
                self.idle.wait_for(lambda: not self.users)
            self.waiting_since = time.monotonic()
            self.worker = self.loaded_for = None  # the old encoders' memory goes before the new ones come
            self.worker = self.make[wanted]()
            self.loaded_for = wanted
        return self.worker

    @property
    def progress(self) -> dict[str, int] | Progress:
        """Rows by shard; while encoders are fetched and loaded the time this takes, which stands still after LOAD_S."""
        if self.worker is not None:  # another thread asks
            return self.at_once.progress
        seconds = min(int(time.monotonic() - self.waiting_since), LOAD_S)
        return Progress(seconds, LOAD_S, "s", f"loading the encoders, {seconds} s")

    def _fetched(self, progress: Progress) -> None:
        self.waiting_since = time.monotonic()
