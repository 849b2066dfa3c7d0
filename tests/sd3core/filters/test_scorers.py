"""Scores and embeddings by tiny models of real classes, against the models asked directly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from sd3core.errors import DataError
from sd3core.filters.scorers import load_embedder, load_scorer
from sd3core.recipe_filter import ScoreRule

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60,
    "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + n, 50, 3), dtype=np.uint8)) for n in range(5)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    made = {
        "clip": (CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)), CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)),
        "dino": (Dinov2Model(Dinov2Config(**VISION)), ViTImageProcessor(size=size)),
        "vit": (ViTForImageClassification(ViTConfig(**VISION, id2label={0: "fine", 1: "watermark"}, label2id={"fine": 0, "watermark": 1})), ViTImageProcessor(size=size)),
    }  # fmt: skip
    for name, (model, processor) in made.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    save_file({"weight": torch.randn(1, 12), "bias": torch.tensor([0.5])}, root / "head.safetensors")
    return root


def inputs(folder, images):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]


def test_a_label_is_its_probability_whatever_the_batch(folders, images):
    rule = ScoreRule(kind="label", model=str(folders / "vit"), label="watermark", max=0.5, batch=2)
    with torch.no_grad():
        model = ViTForImageClassification.from_pretrained(folders / "vit")
        wanted = model(pixel_values=inputs(folders / "vit", images)).logits.softmax(1)[:, 1]
    np.testing.assert_allclose(load_scorer("mark", rule)(images), wanted, rtol=1e-5)
    assert len({*wanted.tolist()}) == len(images)
    with pytest.raises(DataError, match="^filter.scores.mark.label 'logo': .* has fine, watermark$"):
        load_scorer("mark", rule.model_copy(update={"label": "logo"}))


def test_a_head_is_linear_on_the_clips_unit_vector(folders, images):
    from safetensors.torch import load_file

    rule = ScoreRule(kind="clip_head", model=str(folders / "clip"), head=str(folders / "head.safetensors"), min=0.0)
    model, head = CLIPModel.from_pretrained(folders / "clip"), load_file(folders / "head.safetensors")
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=inputs(folders / "clip", images)).pooler_output
        vectors = torch.nn.functional.normalize(model.visual_projection(pooled), dim=1)
    wanted = (vectors @ head["weight"].T + head["bias"])[:, 0]
    np.testing.assert_allclose(load_scorer("beauty", rule)(images), wanted, rtol=1e-4, atol=1e-5)
    embedded = load_embedder(str(folders / "clip"), 2)(images)
    assert embedded.dtype == np.float16 and embedded.shape == (5, 12)
    np.testing.assert_allclose(embedded, vectors, atol=2e-3)
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, folders / "other.safetensors")
    with pytest.raises(
        DataError, match=r"weight and bias are \(1, 5\) and \(1,\); this CLIP wants \(1, 12\) and \(1,\)"
    ):
        load_scorer("beauty", rule.model_copy(update={"head": str(folders / "other.safetensors")}))
    with pytest.raises(DataError, match=r"filter.scores.beauty.head /nowhere: wants weight \(1, D\) and bias"):
        load_scorer("beauty", rule.model_copy(update={"head": "/nowhere"}))


def test_a_vision_model_alone_gives_its_pooled_vector(folders, images):
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(folders / "dino")
        pooled = model(pixel_values=inputs(folders / "dino", images)).pooler_output
    embedded = load_embedder(str(folders / "dino"), 3)(images)
    np.testing.assert_allclose(embedded, torch.nn.functional.normalize(pooled, dim=1), atol=2e-3)
    for folder, said in (("/nowhere", "no config.json there"), (str(folders), "no config.json there")):
        with pytest.raises(DataError, match=f"^filter.duplicates.model {folder}: {said}"):
            load_embedder(folder, 2)
