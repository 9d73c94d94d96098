"""`--trim_vocabulary` as a user gives it: alone, composed with all else, on pictures, refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import kinds
import pytest
import tiny
import torch
from kinds import EN, UK
from support import ALONE, QUICK, call, loaded, results, succeed, weights
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Processor,
    Idefics3Processor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import lib.data.trimmed_tokenizer
import lib.run.steps
from lib.data.documents import Corpus
from lib.data.sources import parse_sources
from lib.model.checkpoint import Checkpoint
from lib.vocabulary import trim_vocabulary

pytestmark = pytest.mark.usefixtures("at_place")
ROWS = 640  # more than the tokenizer has
NUMBERS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3, vocab_size=ROWS)
TRIM = ["--model", "model", *QUICK, "--trim_vocabulary"]
PRUNE = ["--calibration_data", "uk", "--prune_method", "wanda", "--sparsity_type", "2:4"]
RECOVER = ["--recover", 20 * 256, "--recover_lr", "0.01"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model = tiny.tiny_llama(tie_word_embeddings=True, **NUMBERS).bfloat16()
    tiny.write_model(folder / "model", model, kinds.byte_level(regex=False, whole=True))
    tiny.write_texts(folder / "uk", train=kinds.texts(UK, 60, 1), test=kinds.texts(UK, 9, 2))
    tiny.write_texts(folder / "en", train=kinds.texts(EN, 60, 1), test=kinds.texts(EN, 9, 2))
    return folder


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run says that trims the vocabulary alone, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        argv = [*TRIM, "--vocabulary_data", "uk", "--save_model", folder / "model"]
        return succeed(*argv, "--save", folder / "out").out, folder


def bits_per_byte(model: Path | str, texts: Path | str) -> float:
    """Of pieces of test documents, each by itself: a slow reference of what trimming costs."""
    tokenizer, kind = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM
    measured, nats, size = kind.from_pretrained(model, dtype=torch.float32), 0.0, 0
    for line in Path(texts, "test.jsonl").read_text("utf-8").splitlines():
        for piece in re.findall(r"\S[\s\S]{0,32}(?=\s|$)", json.loads(line)["text"]):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            if len(ids) < 32:
                ids = torch.tensor([[tokenizer.bos_token_id, *ids]])
                nats += measured(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
                size += len(piece.encode())
    return nats / math.log(2) / size


def test_what_is_said_and_recorded(alone: tuple[str, Path]) -> None:
    """Also what trimming costs, on the same bytes."""
    said, folder = alone
    found = results(folder / "out")
    record = found["vocabulary"]
    assert record["rows"] % 64 == 0 and record["rows"] < record["rows_before"] == ROWS
    assert record["used"] <= record["tokens"] == record["rows"] and record["bytes_dropped"] > 0
    (test,) = record["tests"]
    assert test["documents"] == 9 and test["alike"] > 4 and test["rise"] < 0.05
    assert record["logits_differ"] < 1e-5
    assert f"vocabulary: {record['rows']} of {ROWS} rows stay" in said and "all 9 test" in said
    assert said.index("uk, bits per byte") < said.index("perplexity uk: ")
    assert json.dumps(found["fingerprint"]).count(record["digest"]) == 1
    card = (folder / "model/README.md").read_text("utf-8")
    assert record["note"] in card and "sparse" not in card
    for name, model in (("original", "model"), ("trimmed", folder / "model")):
        expected = bits_per_byte(model, "uk")
        assert record[f"bits_per_byte_{name}"] == pytest.approx(expected, rel=2e-3)
    cost = record["bits_per_byte_trimmed"] / record["bits_per_byte_original"] - 1
    assert f"trimming costs {cost:+.2%} bits per byte" in said


def test_loads_and_does_the_same(alone: tuple[str, Path], place: Path) -> None:
    _, folder = alone
    folders = place / "model", folder / "model"
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in folders]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in folders]
    assert models[1].get_input_embeddings().weight is models[1].lm_head.weight
    for text in kinds.texts(UK, 20, 1):
        old, new = (t(text, return_tensors="pt").input_ids for t in tokenizers)
        assert old.shape == new.shape
        with torch.no_grad():
            one, other = models[0](old).logits, models[1](new).logits
        before = one.log_softmax(-1).gather(-1, old[..., None])
        after = other.log_softmax(-1).gather(-1, new[..., None])
        assert torch.all(after >= before - 1e-2)  # fewer share the probability
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        new = getattr(tokenizers[1], name)
        assert getattr(models[1].config, name) == getattr(models[1].generation_config, name) == new
    argv = ["--eval_only", "--eval_data", "uk", "--save", folder / "again"]
    again = succeed("--model", folder / "model", *QUICK, *argv)
    assert "fewer tokens share" in again.out  # its config remembers
    first, second = results(folder / "out"), results(folder / "again")
    assert second["perplexity"]["uk"] == pytest.approx(first["perplexity"]["uk"], rel=1e-6)
    assert second["vocabulary"]["rows_before"] == ROWS


@pytest.mark.parametrize("flags", [["--trim_vocabulary"], []], ids=["trimmed", "whole"])
def test_padding_and_truncation_are_saved_as_loaded(flags: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree("model", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("Ġriver"), pad_token="Ġriver", length=9)
    tokenizer.enable_truncation(100, stride=7, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    argv = ["--model", folder, *QUICK, *PRUNE, *flags, "--save", tmp_path / "out"]
    succeed(*argv, "--save_model", tmp_path / "new")
    saved = Tokenizer.from_file(str(tmp_path / "new/tokenizer.json"))
    assert saved.truncation == tokenizer.truncation
    assert saved.padding == tokenizer.padding | {"pad_id": saved.token_to_id("Ġriver")}


@pytest.mark.full
def test_trimmed_first_then_all_as_on_a_model_trimmed_before(
    alone: tuple[str, Path], tmp_path: Path
) -> None:
    rest = [*PRUNE, *RECOVER, "--replace_sparse_layers"]
    succeed(*TRIM, *rest, "--save", tmp_path / "one", "--save_model", tmp_path / "first")
    argv = ["--model", alone[1] / "model", *QUICK, *rest]
    succeed(*argv, "--save", tmp_path / "two", "--save_model", tmp_path / "second")
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(before[EMBEDDING]) == results(tmp_path / "one")["vocabulary"]["rows"]


@pytest.mark.full
def test_a_teacher_with_more_tokens(alone: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = alone
    prune = ["--model", folder / "model", *QUICK, *PRUNE, "--save_model", tmp_path / "pruned"]
    succeed(*prune, "--save", tmp_path / "out")
    argv = ["--model", tmp_path / "pruned", *QUICK, "--calibration_data", "uk", *RECOVER]
    losses = []
    for teacher in ("model", folder / "model"):  # the whole one, and the same trimmed
        succeed(*argv, "--teacher", teacher, "--save", tmp_path / "out")
        losses.append([one["loss"] for one in results(tmp_path / "out")["recovery"]["curve"]])
    assert losses[0] == losses[1]
    few = kinds.texts(UK[:2], 60, 1), kinds.texts(UK[:2], 9, 2)
    few = tiny.write_texts(tmp_path / "few", train=few[0], test=few[1])
    argv += ["--trim_vocabulary", "--calibration_data", few, "--save", tmp_path / "both"]
    succeed(*argv, "--eval_data", few, "--teacher", "model")  # trimmed once more, further
    record = results(tmp_path / "both")["vocabulary"]
    before = results(folder / "out")["vocabulary"]["rows"]
    assert record["rows"] < record["rows_before"] == before


def test_tables_of_layers_in_a_model_that_is_measured_as_a_whole(tmp_path: Path) -> None:
    numbers = dict(vocab_size=ROWS, vocab_size_per_layer_input=512, pad_token_id=3)
    model = tiny.build("gemma3n_text", **tiny.PER_LAYER | tiny.GEMMA_3N | numbers)
    tiny.write_model(tmp_path / "gemma", model, kinds.byte_level(size=600))
    argv = ["--model", tmp_path / "gemma", "--save_model", tmp_path / "model"]
    done = succeed(*TRIM, *argv, "--vocabulary_data", "uk", "--save", tmp_path / "out")
    assert "evaluated as a whole: --model" in done.out
    first, rows = results(tmp_path / "out"), results(tmp_path / "out")["vocabulary"]["rows"]
    assert first["vocabulary"]["logits_differ"] < 1e-5
    tensors = weights(tmp_path / "model")
    assert len(tensors["model.embed_tokens_per_layer.weight"]) == len(tensors[EMBEDDING]) == rows
    again = ["--model", tmp_path / "model", *QUICK, "--save", tmp_path / "again"]
    succeed(*again, "--eval_only", "--eval_data", "uk")
    assert results(tmp_path / "again")["perplexity"] == first["perplexity"]
    (line,) = call(*again, *PRUNE).complaints
    assert "cannot be pruned" in line


def test_what_differs_stops_the_run(place: Path, tmp_path: Path, monkeypatch) -> None:
    """A text that reads otherwise, before weights are read; and logits."""
    own, keep = lib.data.trimmed_tokenizer.TrimmableTokenizer.trimmed_json, lib.run.steps.keep_rows_

    def broken(self, kept):
        return own(self, kept) | {"decoder": None}

    argv = [*TRIM, "--vocabulary_data", "uk", "--save_model", tmp_path / "model"]
    for place_of, wrong, words in (
        (
            "lib.data.trimmed_tokenizer.TrimmableTokenizer.trimmed_json",
            broken,
            "decodes differently",
        ),
        ("lib.run.steps.keep_rows_", lambda model, rows: keep(model, rows.flip(0)), "differ by"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place_of, wrong)
            done = call(*argv)
        assert done.status == 1 and words in done.complaints[0]
        assert not (tmp_path / "model").exists()


def test_another_run_takes_the_same_tokens(
    alone: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts nothing, and measures nothing again on the same model."""
    called, own = [], lib.run.steps._nats_by_window
    monkeypatch.setattr("lib.run.steps._nats_by_window", lambda *a: called.append(a) or own(*a))
    monkeypatch.delattr("lib.vocabulary.count_tokens")
    _, folder = alone
    kept, before = folder / "out/vocabulary.json", results(folder / "out")["vocabulary"]
    argv = [*TRIM, "--vocabulary_rows", kept, "--eval_data", "uk"]
    succeed(*argv, "--save_model", tmp_path / "model", "--save", tmp_path / "out")
    assert not called
    after = results(tmp_path / "out")["vocabulary"]
    assert {k: v for k, v in after.items() if before[k] != v} == {}
    tensors = weights(folder / "model"), weights(tmp_path / "model")
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    shutil.copytree("model", tmp_path / "other")
    argv = ["--model", tmp_path / "other", *QUICK, "--trim_vocabulary", "--eval_data", "uk"]
    succeed(*argv, "--vocabulary_rows", kept, "--save", tmp_path / "out")
    assert len(called) == 2  # its weights may be others
    other = json.loads(kept.read_text("utf-8"))
    other["tokens"][-1] += "s"
    (tmp_path / "wrong.json").write_text(json.dumps(other))
    (line,) = call(*argv, "--vocabulary_rows", tmp_path / "wrong.json").complaints
    assert "its tokens are not those of" in line


SENTENCES = {
    "Georgian": "საქართველოს დედაქალაქია თბილისი და მდინარე მტკვარი მის შუაგულში მიედინება.",
    "Chinese": "北京是中华人民共和国的首都，位于华北平原的北部边缘，城市历史悠久，人口众多。",
    "without blanks": "сонцерікалістихопливенадстариммістом" * 3000,
}


@pytest.mark.parametrize("script", SENTENCES)
def test_the_cost_is_measured_in_any_script(script: str, tmp_path: Path) -> None:
    """On windows of equal text by both tokenizers, however finely they cut it."""
    tokenizer = kinds.byte_level(regex=False)
    texts = tiny.write_texts(
        tmp_path / "text", train=[*kinds.texts(UK, 40, 1)], test=[SENTENCES[script] * 4]
    )
    corpora = [Corpus(each) for each in parse_sources([str(texts)], "--vocabulary_data")]
    options = dict(rows=len(tokenizer), config_ids=set())
    trimmed = trim_vocabulary(
        tokenizer, Checkpoint("m"), PretrainedConfig(), corpora, ALONE, **options
    )
    trimmed.hold_out(corpora[0], 48, 4000)
    whole, smaller, size = trimmed.held_out
    assert len(whole) == len(smaller) > 1 and 50 < size < 8000
    read = []
    for windows, reader in ((whole, tokenizer), (smaller, trimmed.tokenizer)):
        counted = windows.mask
        read.append([reader.decode(ids[of]) for ids, of in zip(windows.ids, counted, strict=True)])
    assert read[0] == read[1]
    assert sum(len(text.encode()) for text in read[0]) == pytest.approx(size, rel=0.05)
    trimmed.hold_out(corpora[0], 48, 4000, most=1)
    assert len(trimmed.held_out[0]) == 1


def test_text_that_is_too_little_is_warned_of(tmp_path: Path) -> None:
    """Text of another language cuts the test text into bytes; few documents do not."""
    argv = ["--vocabulary_data", "en", "--eval_data", "uk", "en", "--save", tmp_path / "en"]
    other = succeed(*TRIM, *argv)
    assert "Give more text in the language" in other.out
    assert "uk: all 9 test" in other.out and "en: all 9 test" in other.out
    found = results(tmp_path / "en")["vocabulary"]
    assert found["bits_per_byte_trimmed"] > 1.02 * found["bits_per_byte_original"]


# --- a model that also sees reads a picture as before


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
    make: Callable, sign: str, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    processor, model = make()
    folder, new = tmp_path / "model", tmp_path / "new"
    processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text("utf-8"))
    settings["image_token_id"] = model.config.image_token_id
    (folder / "processor_config.json").write_text(json.dumps(settings))
    model.save_pretrained(folder)
    argv = ["--model", folder, "--vocabulary_data", "uk", "--save_model", new]
    succeed(*TRIM, *argv, "--save", tmp_path / "out")
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
