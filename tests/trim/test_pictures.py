"""A model that also sees reads a picture as before its vocabulary was trimmed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from support import loaded, succeed
from tokenizers import AddedToken
from transformers import (
    AutoProcessor,
    Gemma3Processor,
    Idefics3Processor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vocabulary"))

import kinds  # noqa: E402
from kinds import UK  # noqa: E402

from lib.commands.trim.__main__ import main  # noqa: E402
from lib.model.checkpoint import Checkpoint  # noqa: E402
from lib.model.processor import processor_ids  # noqa: E402

NUMBERS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3, vocab_size=640)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", kinds.texts(UK, 60, 1), kinds.texts(UK, 9, 2))
    return folder


def gemma3() -> tuple[ProcessorMixin, PreTrainedModel]:
    names = dict(image_token="<image>", boi_token="<start>", eoi_token="<end>")
    backend = kinds.byte_level(whole=True).backend_tokenizer
    special = dict(bos_token=kinds.BOS, eos_token=kinds.EOS, pad_token=kinds.PAD)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=names, **special
    )
    pictures = Gemma3ImageProcessorPil(size=dict(height=8, width=8))
    processor = Gemma3Processor(pictures, tokenizer, image_seq_length=4)
    ids = {f"{name}_index": tokenizer.convert_tokens_to_ids(names[name]) for name in names}
    kind, own, tower, fields = tiny.VISION_SPECS["Gemma 3 multimodal"]
    return processor, tiny.vision(kind, own | NUMBERS, tower, **fields | ids)


def idefics3() -> tuple[ProcessorMixin, PreTrainedModel]:
    """Its code writes tokens for the parts of a picture, which no setting names."""
    places = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    tokenizer = kinds.byte_level(whole=True)
    unused = [f"<unused{number}>" for number in range(40)]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in [*unused, *names]])
    size = dict(size=dict(longest_edge=16), max_image_size=dict(longest_edge=8))
    processor = Idefics3Processor(Idefics3ImageProcessorPil(**size), tokenizer, image_seq_len=1)
    kind, own, tower, fields = tiny.VISION_SPECS["Idefics 3"]
    fields = fields | dict(image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    return processor, tiny.vision(kind, own | NUMBERS, tower, **fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "sign"), [(gemma3, "<start>"), (idefics3, "<image>")])
def test_a_picture_is_read_as_before_the_vocabulary_was_trimmed(
    make: Callable, sign: str, place: Path, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    processor, model = make()
    folder, new = tmp_path / "model", tmp_path / "new"
    processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text("utf-8"))
    settings["image_token_id"] = model.config.image_token_id
    (folder / "processor_config.json").write_text(json.dumps(settings))
    model.save_pretrained(folder)
    succeed(folder, new, "--data", place / "uk", program=main)
    picture = image.linear_gradient("L").convert("RGB").resize((20, 10))
    text = f"{kinds.UK[3]} {sign} {kinds.UK[5]}"
    tokens, logits, vocab = [], [], []
    for each in (folder, new):
        reader = AutoProcessor.from_pretrained(each, backend="pil")
        inputs = reader(images=[picture], text=text, return_tensors="pt")
        tokens.append(reader.tokenizer.convert_ids_to_tokens(inputs.input_ids[0]))
        vocab.append(reader.tokenizer.get_vocab())
        with torch.no_grad():
            logits.append(loaded(each)(**inputs).logits)
    assert tokens[0] == tokens[1] and len(vocab[1]) < len(vocab[0])
    assert not any(token.startswith("<unused") for token in vocab[1])
    whole, trimmed = ([ids[token] for token in sorted(vocab[1])] for ids in vocab)
    torch.testing.assert_close(logits[1][..., trimmed], logits[0][..., whole])
    saved = json.loads((new / "processor_config.json").read_text("utf-8"))
    assert saved["image_token_id"] == loaded(new).config.image_token_id == vocab[1]["<image>"]


def test_a_reserved_token_stays_if_the_code_of_a_processor_writes_it(tmp_path: Path) -> None:
    tokens, tokenizer = [f"<|reserved_special_token_{n}|>" for n in range(9)], kinds.byte_level()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    text = '{"processor_class": "HiggsAudioV2Processor"}'
    (tmp_path / "processor_config.json").write_text(text)
    found = processor_ids(Checkpoint(str(tmp_path), "IN"), tokenizer)
    assert found.intersection(tokenizer.convert_tokens_to_ids(tokens)) == {
        tokenizer.convert_tokens_to_ids(tokens[6])
    }
