import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sd3core.metrics import LeftOut
from sd3core.metrics.clip_score import clip_score, cosines, image_embeddings
from sd3core.towers.judge import Judge, clip_pixels


def test_is_the_mean_cosine_whatever_the_lengths():
    angles = np.linspace(0, np.pi, 9)
    texts = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 7
    images = np.tile([[3.0, 0.0]], (9, 1))
    assert cosines(images, texts) == pytest.approx(np.cos(angles))
    score = clip_score(images, texts)
    assert score.value == pytest.approx(0, abs=1e-12) and score.count == 9
    assert isinstance(clip_score(images[:7], texts[:7]), LeftOut)


def test_embeddings_are_those_of_the_vision_tower_in_any_batches():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=12)
    ).eval()
    judge = Judge(None, vision, None)
    images = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = vision(clip_pixels(images, 16)).image_embeds.numpy()
    assert image_embeddings(judge, images, batch=2) == pytest.approx(expected, abs=1e-5)
    assert image_embeddings(judge, []).shape == (0, 12)
