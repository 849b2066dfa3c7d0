from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sd3core.data.images import PixelRules
from sd3core.data.shards import Sample, read_shard_done, read_table, write_shard
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.recipe import Caption
from sd3core.towers.captioner import VisionLanguageCaptioner, _tidy
from workers.caption import TOO_MANY_FAILED, CaptionWorker
from workers.inputs import InputShard
from workers.shard_stage import ShardTask

TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    """A LLaVA of random weights with a processor of its own: the classes are real, the words mean nothing."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(["a red circle"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=16)
    text = LlamaConfig(**small, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3))
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def noise_images(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 30 + 8 * i, 3), dtype=np.uint8)) for i in range(count)]


def raw_shard(store, images: dict[str, bytes]):
    record = write_shard(
        store, "raw", "00000.0123456789ab", [Sample(key, {"png": data}) for key, data in images.items()], []
    )
    shard = InputShard("raw", record.stem, record.digest, record.rows)
    return ShardTask(0, record.digest[:12], "captions", record.rows, shard)


def png(image):
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def test_a_batch_is_captioned_as_its_images_alone(vlm_folder):
    captioner = VisionLanguageCaptioner(vlm_folder, "Describe it.", max_new_tokens=6)
    assert captioner.prompt == "<image>Describe it.:"
    images = noise_images(3)
    together = captioner(images)
    assert together == [captioner([image])[0] for image in images]
    assert not any("Describe" in caption or "<" in caption for caption in together)


def test_worker_writes_model_and_prompt_and_names_what_failed(vlm_folder, tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    images = noise_images(5)
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(images)} | {"broken": b"no image"})
    caption = Caption(
        captioner="vision_language_model", model=str(vlm_folder), prompt="Say.", max_new_tokens=4, batch=2
    )
    worker = CaptionWorker(store.url, caption, PixelRules(10**6), 1, 1e9, "cpu")
    sizes = []

    def captioner(batch):
        sizes.append(len(batch))
        if any(image.width == images[2].width for image in batch):
            raise RuntimeError("the model\nfell over")
        return ["" if image.width == images[3].width else "a picture" for image in batch]

    monkeypatch.setattr(worker, "captioner", captioner)
    record = worker(task).record
    rows = read_table(store, "captions", task.stem).to_pylist()
    assert [row["key"] for row in rows] == ["k0", "k1", "k4"]
    assert {(row["caption"], row["model"], row["prompt"]) for row in rows} == {("a picture", str(vlm_folder), "Say.")}
    failed = {row.key: row.reason for row in read_shard_done(store, "captions", task.stem).failed}
    assert failed["k2"] == "captioner: the model fell over"
    assert failed["k3"] == "captioner: it wrote nothing"
    assert "broken" in failed and record.rows == 3
    assert sizes == [2, 2, 1, 1, 1]  # the batch that failed was tried one by one


def test_a_captioner_that_fails_on_every_image_is_an_error_and_no_shard(vlm_folder, tmp_path, monkeypatch):
    """Else training would go on without captions, and only a warning would say so."""
    store = open_store(str(tmp_path))
    caption = Caption(captioner="vision_language_model", model=str(vlm_folder), max_new_tokens=4, batch=4)
    worker = CaptionWorker(store.url, caption, PixelRules(10**6), 1, 1e9, "cpu")
    pictures = {f"k{i}": png(image) for i, image in enumerate(noise_images(TOO_MANY_FAILED))}

    def broken(batch):
        raise TypeError("no such argument")

    monkeypatch.setattr(worker, "captioner", broken)
    task = raw_shard(store, pictures)
    with pytest.raises(DataError, match="^no image of 8 got a caption, the last: captioner: no such argument$"):
        worker(task)

    def without_memory(batch):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(worker, "captioner", without_memory)
    with pytest.raises(RuntimeError, match="^CUDA out of memory"):  # not the image's fault: another worker tries
        worker(raw_shard(store, {"one": png(noise_images(1)[0])}))
    for error in (
        MemoryError(),
        OSError(24, "Too many open files"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):

        def runs_out(batch, error=error):
            raise error

        monkeypatch.setattr(worker, "captioner", runs_out)
        with pytest.raises(type(error)):
            worker(raw_shard(store, {"one": png(noise_images(1)[0])}))
    assert not [entry for entry in store.list("captions")]


def test_the_real_model_fills_a_shard(vlm_folder, tmp_path):
    store = open_store(str(tmp_path))
    task = raw_shard(store, {f"k{i}": png(image) for i, image in enumerate(noise_images(3))})
    caption = Caption(captioner="vision_language_model", model=str(vlm_folder), max_new_tokens=4, batch=2)
    record = CaptionWorker(store.url, caption, PixelRules(10**6), 1, 1e9, "cpu")(task).record
    assert record.rows + len(record.failed) == 3 and record.rows > 0


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="caption.model .*no config.json"):
        VisionLanguageCaptioner(tmp_path, "x", 4)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="not a vision-language model that transformers loads"):
        VisionLanguageCaptioner(tmp_path, "x", 4)


def test_a_text_that_was_cut_off_ends_at_its_last_sentence():
    assert _tidy(" A cat.\n It sits. And th", cut_off=True) == "A cat. It sits."
    assert _tidy("A cat on a m", cut_off=True) == "A cat on a m"
    assert _tidy("A cat. It sits", cut_off=False) == "A cat. It sits"
