"""What each stage's bytes depend on, its fingerprint, and every path of the store.

A spec is a fingerprint of every recipe field that changes how a stage's bytes are made and of the specs upstream (a Merkle
chain). It names no content: the content of the inputs is in the shard digests and in the manifest's `inputs`. Format versions
are numbers here, held by tests on golden bytes; source text is never hashed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sd3core.flip_rule import FLIP_RULE
from sd3core.formulation_names import FORMULATION_KINDS, formulation_version
from sd3core.model_identity import file_identity, model_identity
from sd3core.recipe import UNIT_SOURCES, Precision, Recipe, Training
from sd3core.recipe_filter import Filter, ScoreRule

STAGES = (
    "ingest",
    "towers",
    "filter",
    "caption",
    "encode",
    "pretrain",
    "finetune",
    "evaluate",
    "export",
)  # in their order

ONLY_WHERE_ASKED = ("filter",)  # of them: a pipeline calls it where the recipe has a section of that name

# Raise a number when the bytes that a stage writes for the same input change.
FORMATS = {
    "raw": 3,
    "towers": 1,
    "measures": 1,
    "keep": 1,
    "captions": 1,
    "text": 2,  # 2: the index has the digest of every row's file
    "latents": 2,  # 2: likewise, and rows are sorted by bucket and split
    # 2: the EMA's decay grows from nothing; `samples` only where the schedule depends on it. 3: another order of the rows
    "train": 3,
    "evaluations": 2,
    "export": 2,
}
PIXELS = (
    2  # how image files become pixels (1 stood in no fingerprint): with their colour profiles, transparency, all bits
)
HASH_VERSION = 1  # of sd3core.filters.picture_hash
SLICES = 2  # how a folder's files become shards (1, runs of files by name, stood in no fingerprint)
UNITS = 1  # how the rows of tars and parquet files become shards; from 2 on it stands in version_numbers
WORLD = (
    2  # the small world's scenes, pictures and captions (1 stood in no fingerprint); raise it when any of them changes
)
CAPTION_RULES = 2  # which of a model's captions are thrown out (1, the empty ones, stood in no fingerprint)


def fingerprint(fields: Any) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON of `fields`."""
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def version_numbers() -> str:
    """Names all the numbers that only this software changes, as they are in this version."""
    formulations = {name: kind.version for name, kind in FORMULATION_KINDS.items() if kind.version > 1}
    return fingerprint(
        {
            "formats": FORMATS,
            "pixels": PIXELS,
            "slices": SLICES,
            "world": WORLD,
            "rules": CAPTION_RULES,
            "formulations": formulations,
        }
    )


def raw_fields(recipe: Recipe) -> dict[str, Any]:
    """How images are read and kept. The number of images is content, not spec: a data set that grows keeps its shards."""
    left_out, drawn = {"name", "images", "folder", "table", "class_names", "urls"}, recipe.data.source == "small_world"
    # of files; from before them fingerprints are good
    for later, plain in (
        ("caption", "whole"),
        ("background", "white"),
        ("image_field", None),
        ("caption_fields", None),
        ("class_caption", None),
        ("sidecars", "skip"),
    ):
        if drawn or getattr(recipe.data, later) == plain:
            left_out.add(later)
    fields = {"format": FORMATS["raw"], "data": recipe.data.model_dump(mode="json", exclude=left_out)}
    if drawn:
        fields |= {"seed": recipe.seed, "world": WORLD}
    else:
        fields |= {"captions_needed": recipe.caption.captioner == "none", **_dealing(recipe), **_pixels(recipe)}
    return fields


def _dealing(recipe: Recipe) -> dict[str, int]:
    return {"units": UNITS} if recipe.data.source in UNIT_SOURCES else {"slices": SLICES}


def _pixels(recipe: Recipe) -> dict[str, int]:
    """Stands wherever files are decoded; a drawn world has none."""
    return {} if recipe.data.source == "small_world" else {"pixels": PIXELS}


def towers_fields(recipe: Recipe) -> dict[str, Any]:
    """Towers are pinned: they depend on how the data is made, not on how much of it there is."""
    fields: dict[str, Any] = {
        "format": FORMATS["towers"],
        "towers": recipe.towers.model_dump(mode="json", exclude={"name"}),
    }
    if recipe.towers.small is not None:
        fields |= {"raw": fingerprint(raw_fields(recipe)), "data_name": recipe.data.name, "seed": recipe.seed}
    return fields


def measures_fields(recipe: Recipe) -> dict[str, Any]:
    """What a filter's models and its hash give for each image, whatever the thresholds are. Models count by their files.

    Raises DataError where a model's folder is not here.
    """
    fields = {"format": FORMATS["measures"], "raw": fingerprint(raw_fields(recipe)), **_pixels(recipe)}
    return fields | measured_by(recipe.filter)


def measured_by(chosen: Filter) -> dict[str, Any]:
    """The models of a filter, and its hash, as they are now."""
    fields: dict[str, Any] = {}
    if chosen.duplicates is not None:
        model = chosen.duplicates.model
        fields["feature"] = model_identity(model, "filter.duplicates.model") if model else f"hash {HASH_VERSION}"
    if chosen.scores:
        fields["scores"] = {name: _score_fields(name, score) for name, score in chosen.scores.items()}
    return fields


def _score_fields(name: str, score: ScoreRule) -> dict[str, Any]:
    fields = {"kind": score.kind, "model": model_identity(score.model, f"filter.scores.{name}.model")}
    if score.kind == "label":
        return fields | {"label": score.label}
    return fields | {"head": file_identity(score.head, f"filter.scores.{name}.head")}


def keep_fields(recipe: Recipe) -> dict[str, Any]:
    """Which rows stay. What is made later does not have them in its spec: its shards are named by the rows that stay."""
    left_out = {"scores": {name: {"batch", "model", "head"} for name in recipe.filter.scores}}
    rules = recipe.filter.model_dump(mode="json", exclude=left_out | {"duplicates": {"batch", "model"}})
    if recipe.filter.duplicates is not None:
        rules["duplicates"]["threshold"] = recipe.filter.duplicates.alike_from
    fields = {"format": FORMATS["keep"], "filter": rules, "seed": recipe.seed, "raw": fingerprint(raw_fields(recipe))}
    return fields | ({"measures": fingerprint(measures_fields(recipe))} if recipe.filter.measures else {})


def captions_fields(recipe: Recipe) -> dict[str, Any]:
    """A captioning model counts by its files and not by its path. Raises DataError where its folder is not here."""
    caption = recipe.caption.spec_fields()
    if recipe.caption.captioner == "vision_language_model":
        caption["model"] = model_identity(recipe.caption.model, "caption.model")
        caption |= _computed_in(recipe.caption.precision)
    fields = {"format": FORMATS["captions"], "caption": caption, "raw": fingerprint(raw_fields(recipe))}
    if recipe.caption.by_model:
        fields["rules"] = CAPTION_RULES
    return fields | (_pixels(recipe) if recipe.caption.captioner != "none" else {})


def _computed_in(precision: Precision) -> dict[str, str]:
    """fp32 stands in no fingerprint: those from before there was a choice are good."""
    if precision == "auto":
        raise ValueError("a precision 'auto' names no bytes: sd3core.data.settled_precision settles it for a data set")
    return {} if precision == "fp32" else {"precision": precision}


def text_fields(recipe: Recipe, tower_digests: dict[str, str]) -> dict[str, Any]:
    """`tower_digests`: digest of each tower's files, by tower name, from the towers manifest."""
    return _computed_in(recipe.encode.text_precision) | {
        "format": FORMATS["text"],
        "text": recipe.text.model_dump(mode="json", exclude={"null"}),
        "dtype": recipe.encode.text_dtype,
        "encoders": {name: tower_digests[name] for name in ("clip_l", "clip_g", "t5")},
        "captions": fingerprint(captions_fields(recipe)),
    }


def latents_fields(recipe: Recipe, phase: Training, tower_digests: dict[str, str]) -> dict[str, Any]:
    """`buckets` stands there only where the phase has a rule: fingerprints from before it are good.

    `flip` likewise; then all captions of an image say whether it is flipped. `min_scale` does not: it changes which images are taken, and a shard is named by those that are not (workers.rare_sizes).
    """
    rule = {"buckets": phase.buckets.model_dump(mode="json")} if phase.buckets is not None else {}
    if recipe.encode.flip:
        rule |= {"flip": FLIP_RULE, "captions": fingerprint(captions_fields(recipe))}
    return (
        rule
        | _pixels(recipe)
        | _computed_in(recipe.encode.latent_precision)
        | {
            "format": FORMATS["latents"],
            "side_px": phase.side_px,
            "aspect_ratios": list(phase.aspect_ratios),
            "dtype": recipe.encode.latent_dtype,
            "vae": tower_digests["vae"],
            "raw": fingerprint(raw_fields(recipe)),
        }
    )


def train_fields(
    recipe: Recipe, phase: Training, *, latents: str, text: str, init: str | None, samples: int | None = None
) -> dict[str, Any]:
    """`latents`, `text`: manifest digests. `init`: the content digest of what the phase starts from, or None. `samples`: what
    `max_epochs` leaves of the phase's (sd3core.data.phase_images); None: all.

    Fields that came later stand there only where they change something: fingerprints from before them are good. Under a
    constant rate a step does not depend on how many there will be, so a phase that is made longer goes on.
    """
    left_out = {
        "micro_batch",
        "checkpoint_every_samples",
        "activation_checkpointing",
        "seed",
        "max_epochs",
        "min_scale",
    }
    if phase.schedule == "constant":
        left_out.add("samples")
    if phase.buckets is None:
        left_out.add("buckets")
    if phase.qk_norm_start == "one" or not recipe.inserts_qk_norm(phase):
        left_out.add("qk_norm_start")
    ended = phase if samples is None else phase.model_copy(update={"samples": samples})
    training = ended.model_dump(mode="json", exclude=left_out)
    training["zero_stage"] = 2  # whatever it is: checkpoints fit any, so a run may go on with another number of GPUs
    if phase.precision == "auto":
        training["precision"] = "bf16"  # the run is the same whatever a machine's arithmetic is
    version = formulation_version(phase.formulation)
    return ({"formulation_version": version} if version > 1 else {}) | {
        "format": FORMATS["train"],
        "model": recipe.model_config_for(phase).to_dict(),
        "training": training,
        "seed": recipe.training_seed(phase),
        "null": recipe.text.null,
        "latents": latents,
        "text": text,
        "init": init,
    }


# Where everything lies in the store: no other file spells a path of it.
DATASETS, TOWERS, REFERENCES, RUNS, BEGUN = "datasets", "towers", "references", "runs", "begun"
DATA_STAGES = ("raw", "measures", "keep", "captions", "text", "latents")  # in the order in which they are made
MANIFEST = "MANIFEST.json"  # of a stage's folder: written last, it says that all is there
MANIFEST_COPY = "MANIFEST."  # so begin the names of the copies that stay
DONE_FILE = "DONE.json"  # of a checkpoint, and of reference features: written last
DONE, INDEX, TAR, TABLE = ".done.json", ".index.parquet", ".tar", ".parquet"  # of a shard: its stem and these
SEEN = ".seen.json.gz"  # of a raw shard, its stem and this: what was seen of its files
DUPLICATES = "DUPLICATES."  # beside keep-lists: so begin the names of what was found over all shards
SEEN_FOLDER = "FOLDER."  # so begins the name of what was seen of a folder as a whole
SEEN_SOURCE = "SOURCE"  # of all tars or parquet files
SEEN_UNIT = "UNIT."  # of one of them
SCORES_FILE = "scores.json"


def data_folder(name: str, stage: str, *spec: str) -> str:
    return "/".join((DATASETS, name, stage, *spec))


def precision_path(data_name: str) -> str:
    """What of a data set is made in bf16 where a recipe says `auto`."""
    return f"{DATASETS}/{data_name}/PRECISION.json"


def raw_folder(recipe: Recipe) -> str:
    return data_folder(recipe.data.name, "raw", fingerprint(raw_fields(recipe)))


def measures_folder(recipe: Recipe) -> str:
    return data_folder(recipe.data.name, "measures", fingerprint(measures_fields(recipe)))


def keep_folder(recipe: Recipe) -> str:
    return data_folder(recipe.data.name, "keep", fingerprint(keep_fields(recipe)))


def captions_folder(recipe: Recipe) -> str:
    return data_folder(recipe.data.name, "captions", fingerprint(captions_fields(recipe)))


def text_folder(recipe: Recipe, tower_digests: dict[str, str]) -> str:
    return data_folder(recipe.data.name, "text", fingerprint(text_fields(recipe, tower_digests)))


def latents_folder(recipe: Recipe, phase: Training, tower_digests: dict[str, str]) -> str:
    return data_folder(recipe.data.name, "latents", fingerprint(latents_fields(recipe, phase, tower_digests)))


def latents_part(phase_key: str) -> str:
    """What a phase's latents are called in notes and messages: "latents.finetune.0"."""
    return f"latents.{phase_key}"


def named_towers(name: str, *spec: str) -> str:
    return "/".join((TOWERS, name, *spec))


def towers_folder(recipe: Recipe) -> str:
    return named_towers(recipe.towers.name, fingerprint(towers_fields(recipe)))


def references_folder(data_name: str, *spec: str) -> str:
    return "/".join((REFERENCES, data_name, *spec))


def manifest_copy(folder: str, digest: str) -> str:
    """The path of the copy of a manifest that stays, whatever is committed later."""
    return f"{folder}/{MANIFEST_COPY}{digest[:12]}.json"


def run_folder(run: str, *inside: str) -> str:
    return "/".join((RUNS, run, *inside))


def phase_folder(run: str, phase_key: str, *spec: str) -> str:
    """The folder of a phase's checkpoints."""
    return run_folder(run, "checkpoints", phase_key, *spec)


def checkpoints_folder(recipe: Recipe, phase_key: str, fields: dict[str, Any]) -> str:
    return phase_folder(recipe.run, phase_key, fingerprint(fields))


def logs_folder(run: str, phase_key: str, spec: str) -> str:
    return run_folder(run, "logs", f"{phase_key}-{spec}")


def previews_folder(run: str, phase_key: str, spec: str) -> str:
    return run_folder(run, "previews", f"{phase_key}-{spec}")


def evaluations_folder(run: str) -> str:
    return run_folder(run, "evaluations")


def scores_path(run: str) -> str:
    return f"{evaluations_folder(run)}/{SCORES_FILE}"


def exports_folder(run: str, *spec: str) -> str:
    return run_folder(run, "export", *spec)


def summary_path(run: str) -> str:
    return run_folder(run, "summary.json")


def stage_note_path(run: str, stage: str) -> str:
    return run_folder(run, "stages", f"{stage}.json")


def remake_path(run: str) -> str:
    return run_folder(run, "remake.json")
