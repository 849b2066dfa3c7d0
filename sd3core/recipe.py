"""The typed recipe: one YAML file is one run, validated before it starts.

Every value has its unit in its name or its comment. Sections under `compute` and the run's name never change the bytes
that a stage makes, so `sd3core.specs` leaves them out of every fingerprint.
"""

from __future__ import annotations

import math
import re
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, field_validator, model_validator

from sd3core.backbone_config import CONFIGS, BackboneConfig
from sd3core.buckets import PATCH_PX, Side, bucket_name, bucket_sides, buckets_for_area
from sd3core.formulation_names import canonical_name, export_problem, family, shift_problem
from sd3core.recipe_caption import CaptionSettings
from sd3core.recipe_compute import Compute
from sd3core.recipe_export import Export
from sd3core.recipe_filter import Filter
from sd3core.recipe_section import Section
from sd3core.sample_settings import Sampler

NAMED_COLOURS = {"#ffffff": "white", "#000000": "black", "#808080": "grey"}


def _colour(text: str) -> str:
    """A colour under one name only, so that a fingerprint has one for it."""
    colour = NAMED_COLOURS.get(text.lower(), text.lower())
    if colour not in NAMED_COLOURS.values() and not re.fullmatch("#[0-9a-f]{6}", colour):
        raise ValueError(
            f"{text!r} is no colour here; give white, black, grey, or #rrggbb in hexadecimal digits, in quotes"
        )
    return colour


def _one_or_several(value: Any) -> Any:
    """A name alone is a list of one."""
    return (value,) if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]  # becomes a folder and a deployment
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # of a running mean
Colour = Annotated[str, AfterValidator(_colour)]
CLASS = "{class}"  # in data.class_caption: where the class's word stands
FieldName = Annotated[str, StringConstraints(min_length=1)]
CaptionFields = Annotated[tuple[FieldName, ...], BeforeValidator(_one_or_several), Field(min_length=1)]
Urls = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what numpy and torch both take
Precision = Literal["auto", "bf16", "fp32"]  # auto: bf16 where the device has arithmetic for it, else fp32
AspectRatio = Annotated[float, Field(gt=0)]  # width / height
AspectRatios = Annotated[tuple[AspectRatio, ...], Field(min_length=1)]
ENCODERS = ("clip_l", "clip_g", "t5")  # of text: the order of every (B, 3) mask and length
TOKENS_AT_MOST = {"t5_tokens": 512, "clip_tokens": 77}  # T5's are what a longer caption needs
LARGEST_SIDE_PX = 65_536
MOST_STEPS = 256  # of the buckets' multiple in a phase's side: the sizes grow with the square
FourLevels = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=4, max_length=4)]  # they make f8


UNIT_SOURCES = ("webdataset", "parquet")  # of files that hold many images

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Data(Section):
    """Where the images come from, and which of them are taken."""

    name: Name  # datasets/NAME in the store
    source: Literal["small_world", "folder", "table", "webdataset", "parquet"]
    # a local folder: name.jpg with name.txt, or a metadata.jsonl with file_name and text. Of a table: where its paths begin
    folder: str | None = None
    # a .jsonl, .csv or .tsv of paths and captions; relative paths begin in its own folder, or in `folder` where that is given
    table: str | None = None
    # webdataset, parquet: whole paths or s3:// URLs of files or folders; {00000..00123} and {a,b} stand for several
    urls: Urls = ()
    # where a row of a source has its image, and its captions: column or field names; None: the source's own. A caption field
    # may hold a text or a list of texts; all captions are kept, and the first stands first wherever one alone is used
    image_field: FieldName | None = None
    caption_fields: CaptionFields | None = None
    # folder only: whether masks, thumbnails and what drives leave are taken for images (sd3core/data/image_files/sidecars.py)
    sidecars: Literal["skip", "take"] = "skip"
    # folder only, of images without words of their own: "a photo of a {class}", with the name of the image's folder
    class_caption: str | None = None
    # or with the words that this file has for that name: YAML, JSON or CSV, one or several words, each of which makes a caption
    class_names: str | None = None
    caption: Literal["whole", "first_line"] = "whole"  # of files: what a caption holds, or its first line
    images: int = Field(4096, ge=1, le=100_000_000)  # small world only: how many scenes
    # small world only: side of the square whose area each scene has
    image_side_px: int = Field(128, ge=16, le=LARGEST_SIDE_PX)
    aspect_ratios: AspectRatios = (1.0,)  # small world only: drawn evenly
    max_objects: int = Field(4, ge=1, le=4)  # small world only
    min_side_px: int = Field(32, ge=1)  # smaller images are rejected
    max_image_pixels: int = Field(100_000_000, ge=1)  # larger images are rejected
    background: Colour = "white"  # what transparent parts of images lie over: white, black, grey or #rrggbb
    max_caption_chars: int = Field(2_000, ge=1)  # longer captions are cut at a word
    rows_per_shard: int = Field(512, ge=1)
    held_out_fraction: Fraction = 0.05  # by a hash of the key; never trained on

    @model_validator(mode="after")
    def _folder_named(self) -> Data:
        if self.source == "folder" and not self.folder:
            raise ValueError("data.folder must name the folder of images when data.source is 'folder'")
        _refuse_url("folder", self.folder)
        _check_whole_path("folder", self.folder)
        if (self.source == "table") != (self.table is not None):
            raise ValueError("data.table must name the table of images when data.source is 'table', and only then")
        _refuse_url("table", self.table)
        _check_whole_path("table", self.table)
        return self

    @model_validator(mode="after")
    def _classes_of_a_folder(self) -> Data:
        if self.class_caption is None:
            if self.class_names is not None:
                raise ValueError(f"class_names is for class_caption; give that, too: 'a photo of a {CLASS}'")
            return self
        if self.source != "folder":
            raise ValueError(f"class_caption is of source 'folder'; leave it out for {self.source!r}")
        if CLASS not in self.class_caption or re.search(r"[{}]", self.class_caption.replace(CLASS, "")):
            raise ValueError(f"class_caption has the class as {CLASS} and no other braces: 'a photo of a {CLASS}'")
        _refuse_url("class_names", self.class_names)
        _check_whole_path("class_names", self.class_names)
        return self

    @model_validator(mode="after")
    def _urls_named(self) -> Data:
        if (self.source in UNIT_SOURCES) != bool(self.urls):
            raise ValueError(f"data.urls names the files of {' or '.join(UNIT_SOURCES)}, and of no other data.source")
        for url in self.urls:
            if not url.startswith("~"):  # a home is written out where it is used
                _check_whole_path("urls", url)
        return self

    @model_validator(mode="after")
    def _fields_of_a_source(self) -> Data:
        for key in ("image_field", "caption_fields"):
            if getattr(self, key) is not None and self.source == "small_world":
                raise ValueError(f"{key} is of a source that is read; leave it out for 'small_world'")
        if self.caption_fields and len({*self.caption_fields}) < len(self.caption_fields):
            raise ValueError("caption_fields names a field twice; name each once")
        return self


class ReleasedTowers(Section):
    """Local folders of released weights: diffusers' AutoencoderKL and transformers' CLIP and T5, with their tokenizers."""

    vae: str
    clip_l: str
    clip_g: str
    t5: str
    judge: str  # a CLIP with image and text side, for CLIP score and FID; not one of the two above
    clip_l_tokenizer: str
    clip_g_tokenizer: str
    t5_tokenizer: str

    @model_validator(mode="after")
    def _folders_here(self) -> ReleasedTowers:
        for key, folder in self:
            _refuse_url(key, folder)
            if not folder.startswith("~"):  # a home is written out where it is used
                _check_whole_path(key, folder)
        return self


class SmallVae(Section):
    channels: FourLevels = (16, 32, 64, 64)
    layers_per_block: int = Field(1, ge=1)
    crop_px: int = Field(64, ge=16, multiple_of=8)  # f8
    batch: int = Field(8, ge=1)
    steps: int = Field(900, ge=1)
    learning_rate: float = Field(0.01, gt=0)  # of Muon; biases and norms learn at a tenth of it
    kl_weight: float = Field(0.01, ge=0)  # on the KL per latent number, against the mean error per colour value


class SmallClip(Section):
    width: int = Field(64, ge=16)
    layers: int = Field(2, ge=2)  # the sequence comes from the second-to-last
    heads: int = Field(2, ge=1)
    projection: int = Field(64, ge=16)
    image_px: int = Field(64, ge=16)
    patch_px: int = Field(16, ge=4)
    batch: int = Field(64, ge=2)
    steps: int = Field(300, ge=1)
    learning_rate: float = Field(0.02, gt=0)  # of Muon; embeddings, biases and norms learn at a tenth of it
    seed: Seed = 0

    @model_validator(mode="after")
    def _divides(self) -> SmallClip:
        _check_heads(self.width, self.heads)
        if self.image_px % self.patch_px:
            raise ValueError(f"image_px {self.image_px} is not a multiple of patch_px {self.patch_px}")
        return self


class SmallT5(Section):
    width: int = Field(128, ge=16)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    batch: int = Field(64, ge=1)
    steps: int = Field(300, ge=1)
    learning_rate: float = Field(0.02, gt=0)  # of Muon; embeddings, biases and norms learn at a tenth of it
    seed: Seed = 0

    @model_validator(mode="after")
    def _divides(self) -> SmallT5:
        _check_heads(self.width, self.heads)
        return self


STORE_SCHEMES = ("file", "s3")


def _refuse_url(key: str, path: str | None) -> None:
    if path is not None and (url := URL.match(path)):
        copy = "give the path alone" if url.group(1) == "file" else "download it, or mount it, and give its whole path"
        raise ValueError(f"{key} {path} is a URL, and {key} lies on this machine: {copy}")


def _check_whole_path(key: str, path: str | None, schemes: tuple[str, ...] = STORE_SCHEMES) -> None:
    """`schemes`: of the URLs that may stand there too."""
    if path is None:
        return
    url = URL.match(path)
    if url and url.group(1) not in schemes:
        raise ValueError(
            f"{key} {path} is a URL of another kind: take a whole path, {' or '.join(f'{s}://' for s in schemes)}"
        )
    if not url and not path.startswith("/"):
        raise ValueError(f"{key} {path} is relative, and workers run in folders of their own: give the whole path")


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")


class SmallTowers(Section):
    """Stand-ins made from the data set's training part, with the classes that load the released towers."""

    vae: SmallVae = SmallVae()
    clip_l: SmallClip = SmallClip(seed=1)
    clip_g: SmallClip = SmallClip(seed=2)
    t5: SmallT5 = SmallT5(seed=3)
    judge: SmallClip = SmallClip(steps=500, seed=4)
    vocabulary: int = Field(1_024, ge=600)  # tokens at most, for each tokenizer; 514 of CLIP's are bytes and marks
    images: int = Field(2_048, ge=1)  # how many training images the towers see at most

    @model_validator(mode="after")
    def _t5_wide_enough(self) -> SmallTowers:
        # diffusers pads the CLIPs to T5's width, so with a narrower T5 no checkpoint could be exported.
        if self.t5.width < self.clip_l.width + self.clip_g.width:
            raise ValueError(
                f"t5.width {self.t5.width} is less than clip_l.width {self.clip_l.width} + clip_g.width"
                f" {self.clip_g.width}; take a T5 as wide as both CLIPs together or wider"
            )
        return self

    @model_validator(mode="after")
    def _clips_differ(self) -> SmallTowers:
        # A section that is given replaces its default whole, seed included.
        for one, other in combinations(("clip_g", "clip_l", "judge"), 2):
            seed = getattr(self, one).seed
            if seed == getattr(self, other).seed:
                raise ValueError(
                    f"{one}.seed and {other}.seed are both {seed}, so the two would learn alike; give them different seeds"
                )
        return self


class Towers(Section):
    name: Name  # towers/NAME in the store
    released: ReleasedTowers | None = None
    small: SmallTowers | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Towers:
        if (self.released is None) == (self.small is None):
            raise ValueError(
                "towers needs exactly one of towers.released (paths) and towers.small (made by the towers stage)"
            )
        return self


class Caption(CaptionSettings):
    precision: Precision = "fp32"  # that a vision-language model computes in here; auto: as for encode

    @model_validator(mode="after")
    def _model_named(self) -> Caption:
        if self.captioner == "endpoint":
            return self
        if self.captioner == "vision_language_model" and not self.model:
            raise ValueError("caption.model must name a local folder when caption.captioner is 'vision_language_model'")
        _refuse_url("model", self.model)
        _check_whole_path("model", self.model)
        return self


class Text(Section):
    clip_tokens: int = Field(77, ge=4, le=TOKENS_AT_MOST["clip_tokens"])
    t5_tokens: int = Field(77, ge=4, le=TOKENS_AT_MOST["t5_tokens"])
    padding: Literal["reference", "trimmed"] = (
        "reference"  # all positions as encoded, or real tokens only and zeros after
    )
    null: Literal["zeros", "empty"] = (
        "zeros"  # what stands for "no prompt": the paper's zeros, or the encoded empty string
    )


TextDtype = Literal["float32", "float16", "bfloat16", "int8"]


class Encode(Section):
    batch: int = Field(32, ge=1)
    latent_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # the paper stores fp32 latents
    # of stored text features; int8 has a scale for every 128 channels of a token, so that all cosines are 0.999 at least
    text_dtype: TextDtype = "float16"
    # what the text encoders and the autoencoder compute in. auto: bf16 where the actors have GPUs with arithmetic for it, settled
    # once for a data set (sd3core/data/settled_precision.py); on a CPU, and where something stands in fp32, it is fp32
    text_precision: Precision = "fp32"
    latent_precision: Precision = "fp32"
    # latents of the flipped images too, of those that train and whose captions allow it (sd3core/flip_rule.py); training
    # takes the one or the other by (seed, epoch, sample)
    flip: bool = False


class Model(Section):
    depth: int = Field(24, ge=1, le=256)  # blocks; width 64 * depth, heads = depth
    # the side whose positions are 0, 1, 2, ... (256 in the paper)
    base_side_px: int = Field(256, ge=16, le=LARGEST_SIDE_PX)
    # longest side of any bucket: the size of the position table
    max_side_px: int = Field(2048, ge=16, le=LARGEST_SIDE_PX)
    architecture: Literal["mmdit", "dit", "cross_dit", "uvit"] = "mmdit"  # or a rival of the paper's figure 4
    streams: Literal[2, 3] = 2  # mmdit: sets of weights, for text and image or for CLIP, T5 and image
    dual_attention_blocks: int = Field(0, ge=0)  # mmdit: the first n blocks have SD3.5-medium's second attention
    start_from: str | None = None  # absolute path or URL of a model folder or checkpoint: pretrain's start

    @model_validator(mode="after")
    def _of_the_mmdit(self) -> Model:
        _check_whole_path("start_from", self.start_from)
        for key, plain in (("streams", 2), ("dual_attention_blocks", 0)):
            if self.architecture != "mmdit" and getattr(self, key) != plain:
                raise ValueError(
                    f"{key} {getattr(self, key)} is for architecture 'mmdit'; leave it out for {self.architecture!r}"
                )
        if self.dual_attention_blocks > self.depth:
            raise ValueError(f"dual_attention_blocks {self.dual_attention_blocks} is more than depth {self.depth}")
        return self


class Buckets(Section):
    """Every size near the target area, instead of chosen ratios. As they stand these are SDXL's at 1024 px, and as many at 256 and 512."""

    multiple_px: int | None = Field(None, ge=PATCH_PX, multiple_of=PATCH_PX)  # of both sides; None: side_px / 16
    max_ratio: float = Field(4.0, ge=1, le=64)  # longer side / shorter side
    min_area: float = Field(0.9, ge=0.5, le=1)  # smallest area, as a part of side_px squared; the largest is 1


class Training(Section):
    """One training phase. Its clock is samples seen."""

    side_px: int = Field(256, ge=16, le=LARGEST_SIDE_PX)
    aspect_ratios: AspectRatios = (1.0,)  # more than one makes aspect buckets
    buckets: Buckets | None = None  # in place of aspect_ratios: all sizes by a rule
    # the least that an image's sides may be of its bucket's: 1 enlarges none, 0.5 to twice its sides, 0 takes all
    min_scale: Fraction = 1.0
    samples: int = Field(ge=1)
    max_epochs: float | None = Field(None, gt=0)  # of the phase's images: it ends there where `samples` are more
    seed: Seed | None = (
        None  # of weights, batches, timesteps and noise; None: the phase before's, of pretrain the recipe's
    )
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1)  # per rank and forward
    learning_rate: float = Field(1e-4, gt=0)
    warmup_samples: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"  # cosine ends at a tenth of the rate
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal steps for the blocks' matrices, Adam for all else
    matrix_rate: float = Field(1.0, gt=0)  # muon: the matrices' rate, as a multiple of learning_rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    formulation: str = (
        "rf/lognorm(0.00,1.00)"  # as sd3core.formulation_names has them, with any numbers in their bounds
    )
    shift: float = Field(1.0, gt=0)  # alpha of the resolution shift, in training and sampling: log-SNR - 2 ln(alpha)
    qk_norm: Literal["rms"] | None = None
    qk_norm_start: Literal["fitted", "one"] = "fitted"  # scales where a phase inserts it: from its first batch, or one
    text_dropout: Fraction = 0.464  # per encoder
    text_dropout_together: Fraction = 0.0  # of all encoders at once, besides; the paper has none
    original_caption_fraction: Fraction = 0.5
    ema_decay: Decay = 0.99
    ema_every_steps: int = Field(100, ge=1)
    checkpoint_every_samples: int = Field(ge=1)
    precision: Precision = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 2
    activation_checkpointing: bool = False

    @field_validator("formulation")
    @classmethod
    def _known_formulation(cls, name: str) -> str:
        return canonical_name(name)

    @property
    def total_steps(self) -> int:
        return math.ceil(self.samples / self.global_batch)

    @property
    def last_samples(self) -> int:
        """Samples seen at the phase's end: `samples`, in whole batches."""
        return self.total_steps * self.global_batch

    def bucket_sides(self) -> list[Side]:
        """(height, width) px of every bucket."""
        if self.buckets is None:
            return bucket_sides(self.side_px, self.aspect_ratios)
        rule = self.buckets
        return buckets_for_area(self.side_px, rule.multiple_px, rule.max_ratio, rule.min_area)

    @model_validator(mode="after")
    def _buckets_once(self) -> Training:
        if self.buckets is None:
            return self
        if self.aspect_ratios != (1.0,):
            raise ValueError("buckets makes its own aspect ratios; leave out aspect_ratios or buckets")
        if self.side_px > MOST_STEPS * (self.buckets.multiple_px or self.side_px):
            raise ValueError(
                f"buckets.multiple_px {self.buckets.multiple_px} makes a size at every {MOST_STEPS}th part of side_px {self.side_px}"
                f" and finer; take {-(-self.side_px // MOST_STEPS // PATCH_PX) * PATCH_PX} or more"
            )
        if not self.bucket_sides():
            raise ValueError(
                f"buckets: no two multiples of {self.buckets.multiple_px} px have an area between buckets.min_area"
                f" {self.buckets.min_area} and 1 of side_px {self.side_px} squared; take a smaller one of the two"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                "zero_stage 0 trains bf16 wrongly (first update off by a quarter); take zero_stage 1 or more, or"
                " precision fp32"
            )
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if problem := shift_problem(self.formulation, self.shift):
            raise ValueError(problem)
        return self


def picture_shift(of_evaluation: float | None, of_phase: float) -> float:
    """Of the levels at which pictures of a training phase are drawn: its own, or the one that evaluation names."""
    return of_phase if of_evaluation is None else of_evaluation


class Evaluate(Section):
    guidance_scale: float = Field(5.0, ge=0)
    num_steps: int = Field(25, ge=1)  # of the sampler; heun calls the network twice a step, the others once
    sampler: Sampler = "euler"
    shift: float | None = Field(None, gt=0)  # of the sampler's levels, in every phase; None: the phase's own
    bench_prompts_per_task: int = Field(60, ge=0)  # ShapesBench; small world only
    # for all but a phase's last checkpoint; None: the same
    earlier_bench_prompts_per_task: int | None = Field(None, ge=0)
    bench_images_per_prompt: int = Field(1, ge=1)
    scored_images: int = Field(256, ge=0)  # for CLIP score and FID, prompts from the held-out part
    reference_images: int = Field(5_000, ge=0)  # held-out images that FID compares with, at most
    validation_images: int = Field(256, ge=0)
    grid_prompts: int = Field(16, ge=1)
    bucket_grid_prompts: int = Field(4, ge=0)  # pictures per aspect bucket of a fine-tuning phase
    # captions that were trained on, and as many held-out ones, whose pictures stand side by side with the real ones
    compared_captions: int = Field(4, ge=0)
    batch: int = Field(64, ge=1)
    precision: Precision = "auto"  # of the transformer; the towers run in fp32
    checkpoints: Literal["all", "last"] = "all"  # score every checkpoint kept, or the last of each phase
    weights: Literal["both", "ema"] = (
        "both"  # score the EMA's and the live weights, or in half the time the EMA's alone
    )
    seed: Seed = 0

    def shift_for(self, phase: Training) -> float:
        """The shift at which a phase's pictures are drawn; it changes nothing in training."""
        return picture_shift(self.shift, phase.shift)


class Recipe(Section):
    name: Name
    run: Name  # runs/RUN in the store
    seed: Seed = 0
    store: str | None = None  # a path, file:///path or s3://bucket/prefix; None: this machine's own, SD3_HOME/store
    data: Data
    towers: Towers
    filter: Filter | None = None  # None: all images are kept
    caption: Caption
    text: Text = Text()
    encode: Encode = Encode()
    model: Model
    pretrain: Training
    finetune: tuple[Training, ...] = ()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        _check_whole_path("store", self.store)
        scales: dict[
            tuple[Side, ...], tuple[str, float]
        ] = {}  # sizes -> the first phase that has them, and its min_scale
        for where, phase in self.phases():
            accumulation = phase.micro_batch * self.compute.train_ranks
            if phase.global_batch % accumulation:
                raise ValueError(
                    f"{where}.global_batch {phase.global_batch} is not a multiple of {where}.micro_batch"
                    f" {phase.micro_batch} x compute.train_ranks {self.compute.train_ranks}"
                )
            if phase.side_px % 16:
                raise ValueError(f"{where}.side_px {phase.side_px} is not a multiple of 16 (VAE 8 x patch 2)")
            sides = phase.bucket_sides()
            side = max(sides, key=max)
            if max(side) > self.model.max_side_px:
                leave = "lower buckets.max_ratio" if phase.buckets else "leave out the aspect ratio"
                raise ValueError(
                    f"{where}: its bucket {bucket_name(side)} px is longer than model.max_side_px"
                    f" {self.model.max_side_px}; raise that, or {leave}"
                )
            if family(phase.formulation) != family(self.pretrain.formulation):
                raise ValueError(
                    f"{where}.formulation {phase.formulation} cannot go on from pretrain.formulation"
                    f" {self.pretrain.formulation}: their networks predict different things, or are told time differently"
                )
            if problem := shift_problem(phase.formulation, self.evaluate.shift_for(phase)):
                raise ValueError(f"evaluate.shift: {problem}")
            first, min_scale = scales.setdefault(tuple(sides), (where, phase.min_scale))
            if min_scale != phase.min_scale:
                raise ValueError(
                    f"{where}.min_scale {phase.min_scale:g} differs from {first}.min_scale {min_scale:g}, and both phases have"
                    " the same sizes, so that they share their latents; give both the same"
                )
        if problem := self._choice_problem():
            raise ValueError(f"export.checkpoint: {problem}")
        if len(self.pretrain.aspect_ratios) != 1 or self.pretrain.aspect_ratios[0] != 1.0:
            raise ValueError("pretrain.aspect_ratios must be [1.0]: pretraining is on square crops")
        if self.pretrain.buckets is not None:
            raise ValueError("pretrain.buckets must be left out: pretraining is on square crops")
        if self.caption.captioner == "small_world" and self.data.source != "small_world":
            raise ValueError(
                "caption.captioner 'small_world' reads drawn scenes only; take vision_language_model or none"
            )
        if problem := self.caption.endpoint_problem(self.compute):
            raise ValueError(problem)
        return self

    def phases(self) -> list[tuple[str, Training]]:
        """Every training phase in order, with the key under which the recipe has it."""
        return [("pretrain", self.pretrain), *((f"finetune.{i}", phase) for i, phase in enumerate(self.finetune))]

    def _choice_problem(self) -> str | None:
        """Why the checkpoints will have no scores to choose the best by, as far as it can be told before they are made."""
        score, evaluate = self.export.score, self.evaluate
        if score is None:
            return None
        if evaluate.checkpoints == "last":
            return "the best is chosen among scored checkpoints; take evaluate.checkpoints all"
        if not score.startswith("shapes_bench"):
            return None
        if self.data.source != "small_world":
            return f"{score} is of the small world alone; choose by validation_loss or clip_score"
        earlier = evaluate.earlier_bench_prompts_per_task
        if earlier not in (None, evaluate.bench_prompts_per_task):
            return (
                f"{score} of earlier checkpoints is over {earlier} prompts a task and the last one's over"
                f" {evaluate.bench_prompts_per_task}; leave out evaluate.earlier_bench_prompts_per_task"
            )
        return None

    def export_problem(self) -> str | None:
        """Why diffusers' SD3 pipeline cannot hold this recipe's model; None where it can."""
        if self.model.architecture != "mmdit" or self.model.streams != 2:
            kind = f"{self.model.architecture} with {self.model.streams} streams"
            return f"diffusers knows the MM-DiT of two streams only, not {kind}; sd3 sample draws from the checkpoint"
        return export_problem(self.phases()[-1][1].formulation)

    def inserts_qk_norm(self, phase: Training) -> bool:
        """Whether the phase adds QK-norm to weights that were trained without it; of `model.start_from`, whether it may."""
        before = self._phases_until(phase)[:-1]
        if not before:
            return phase.qk_norm is not None and self.model.start_from is not None
        return phase.qk_norm is not None and before[-1].qk_norm is None

    def training_seed(self, phase: Training) -> int:
        """The seed that a phase trains with: its own, else the nearest earlier phase's, else the recipe's.

        Data, towers and the held-out part have the recipe's, so runs of several training seeds are compared on the same.
        """
        own = [other.seed for other in self._phases_until(phase) if other.seed is not None]
        return own[-1] if own else self.seed

    def _phases_until(self, phase: Training) -> list[Training]:
        phases = [other for _, other in self.phases()]
        position = next(i for i, other in enumerate(phases) if other is phase)  # equal phases may follow each other
        return phases[: position + 1]

    def model_config_for(self, phase: Training) -> BackboneConfig:
        """The model of one phase: the recipe's architecture and depth, the towers' widths, the phase's QK-norm."""
        small, model = self.towers.small, self.model
        own = {}
        if small is not None:
            clip_width = small.clip_l.width + small.clip_g.width
            own = {
                "context_dim": max(clip_width, small.t5.width),
                "pooled_dim": small.clip_l.width + small.clip_g.projection,
            }
        if model.architecture == "mmdit":
            own["clip_tokens"] = self.text.clip_tokens if model.streams == 3 else None
            own["dual_attention_blocks"] = model.dual_attention_blocks
        return CONFIGS[model.architecture].from_depth(
            model.depth,
            qk_norm=phase.qk_norm,
            position_base=model.base_side_px // 16,
            position_side=phase.side_px // 16,
            position_max=model.max_side_px // 16,
            **own,
        )
