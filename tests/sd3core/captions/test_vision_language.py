from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from vision_language_models import FAMILIES, write_qwen2_vl

from sd3core.captions.said import caption_seed
from sd3core.captions.vision_language import DrawnWords, VisionLanguageCaptioner, load_processor
from sd3core.errors import DataError

SEEDS = [caption_seed(0, f"k{i}") for i in range(4)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family."""
    made = {}
    for family, write in FAMILIES.items():
        made[family] = tmp_path_factory.mktemp(family)
        write(made[family])
    return made


def noise_images(count: int) -> list[Image.Image]:
    """From tall to wide."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 20 + 30 * i, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_captioned_as_its_images_alone(folders, family):
    captioner = VisionLanguageCaptioner(folders[family], "Describe it.", max_new_tokens=6)
    images = noise_images(4)
    together = captioner.write(captioner.prepare(images), SEEDS)
    alone = [captioner.write(captioner.prepare([image]), [seed])[0] for image, seed in zip(images, SEEDS, strict=True)]
    assert together == alone
    assert not any("Describe" in said.text or "<image>" in said.text for said in together)


def test_a_processor_is_asked_by_one_thread_at_a_time(folders, monkeypatch):
    """Batches are prepared on several; its tokenizer is changed by each call."""
    captioner = VisionLanguageCaptioner(folders["llava"], "Describe it.", max_new_tokens=2)
    inside, most, processor = [], [], captioner.processor

    def asked(**arguments):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return processor(**arguments)

    monkeypatch.setattr(captioner, "processor", asked)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: captioner.prepare(noise_images(1)), range(8)))
    assert most == [1] * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_words_follow_from_the_images_seed_alone(folders, family):
    captioner = VisionLanguageCaptioner(folders[family], "Say.", max_new_tokens=8, temperature=1.0)
    images = noise_images(4)
    together = captioner.write(captioner.prepare(images), SEEDS)
    backwards = captioner.write(captioner.prepare(images[::-1]), SEEDS[::-1])[::-1]
    others = captioner.write(captioner.prepare(images), [seed + 1 for seed in SEEDS])
    assert [said.text for said in together] == [said.text for said in backwards]
    assert all(one.text != other.text for one, other in zip(together, others, strict=True))


def test_drawn_words_have_the_softmaxs_distribution():
    """Chi-squared of 20,000 draws on 5 tokens: 4 degrees of freedom, 18.5 is passed once in a thousand."""
    logits, temperature = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]), 0.7
    draws = DrawnWords(temperature, range(20_000), torch.device("cpu"))(None, logits.expand(20_000, -1)).argmax(dim=1)
    counts = torch.bincount(draws, minlength=5).double()
    expected = 20_000 * (logits / temperature).softmax(dim=0).double()
    assert ((counts - expected) ** 2 / expected).sum() < 18.5
    greedy = DrawnWords(1e-3, range(50), torch.device("cpu"))(None, logits.expand(50, -1)).argmax(dim=1)
    assert set(greedy.tolist()) == {2}


def test_the_end_of_a_caption_is_seen_and_its_padding_not_counted(folders):
    captioner = VisionLanguageCaptioner(folders["llava"], "Say.", max_new_tokens=4)
    assert captioner._length(torch.tensor([5, 6, 2, 0])) == (2, True)
    assert captioner._length(torch.tensor([5, 6, 7, 8])) == (4, False)
    said = captioner.write(captioner.prepare(noise_images(1)), SEEDS[:1])[0]
    captioner.model.generation_config.eos_token_id = None
    endless = captioner.write(captioner.prepare(noise_images(1)), SEEDS[:1])[0]
    assert endless.tokens == 4 and endless.cut_off
    assert said.tokens <= 4 and said.cut_off == (said.tokens == 4)


def test_what_an_encoder_decoder_begins_with_is_not_taken_for_its_end(folders, monkeypatch):
    """BART's, as Florence-2 has it, begins with the token that ends a text."""
    captioner = VisionLanguageCaptioner(folders["llava"], "Say.", max_new_tokens=4)
    captioner.model.generation_config.decoder_start_token_id = 2
    written = torch.tensor([[2, 5, 6, 7, 8], [2, 5, 2, 0, 0]])
    monkeypatch.setattr(captioner.model, "generate", lambda **_: written)
    said = captioner.write(captioner.prepare(noise_images(2)), SEEDS[:2])
    assert [(one.tokens, one.cut_off) for one in said] == [(4, True), (1, False)]


def test_a_chat_template_frames_the_prompt_and_else_the_models_own_mark(folders):
    framed = {family: VisionLanguageCaptioner(folders[family], "Say.", 2).prompt for family in FAMILIES}
    assert framed == {"llava": "<image>Say.:", "idefics3": "<image>\nSay.", "paligemma": "<image>\nSay."}


def test_a_model_that_needs_another_package_names_it(tmp_path):
    write_qwen2_vl(tmp_path)
    with pytest.raises(
        DataError, match="^caption.model .*: it needs the package torchvision, which this project's lock"
    ) as said:
        VisionLanguageCaptioner(tmp_path, "Say.", 4)
    assert "caption.captioner=endpoint" in str(said.value) and "\n" not in str(said.value)


def test_a_models_own_code_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoProcessor": "own.Own"}})
    )
    (tmp_path / "own.py").write_text("open(__file__ + '.ran', 'w').write('ran')")
    with pytest.raises(DataError, match="caption.model .*: it brings code of its own, and that is never run here"):
        load_processor(tmp_path)
    assert not list(tmp_path.glob("*.ran"))


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="caption.model .*no config.json"):
        VisionLanguageCaptioner(tmp_path, "x", 4)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="not a vision-language model that transformers loads"):
        VisionLanguageCaptioner(tmp_path, "x", 4)
