"""Folders of every architecture that `trim` takes: the same logits, loaded as users load them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import chats
import numpy as np
import pytest
import tiny
import torch
from support import call, loaded, mistake, representative, succeed
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vocabulary"))

import kinds  # noqa: E402

from lib.commands.trim import folder as folder_module  # noqa: E402
from lib.commands.trim.__main__ import main  # noqa: E402
from lib.data.chats import plain_text  # noqa: E402
from lib.data.documents import Corpus  # noqa: E402
from lib.data.sources import parse_sources  # noqa: E402
from lib.util.files import clone  # noqa: E402
from lib.vocabulary import logits as logits_module  # noqa: E402
from lib.vocabulary.cost import pieces_of  # noqa: E402
from lib.vocabulary.counts import count_tokens  # noqa: E402
from lib.vocabulary.tables import with_defaults  # noqa: E402
from lib.vocabulary.tokenizer_model import write_tokenizer_model  # noqa: E402

EVERY = tiny.ALL | tiny.REFUSED
QUICK = ["Llama", "Mamba", "Phi", "Gemma 3n", "Gemma 4 multimodal", "Qwen3-VL"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", kinds.texts(kinds.UK[:12], 60, 1), kinds.texts(kinds.UK, 12, 2))
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny vocabulary, most of which is bytes."""
    monkeypatch.setattr("lib.vocabulary.choice.MULTIPLE", 8)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", representative(EVERY, QUICK))
def test_same_logits_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Also where a table for all blocks has fewer rows than the vocabulary."""
    tokenizer = tiny.tiny_tokenizer()
    last = tokenizer.decode([297, 298, 299])  # beyond the smaller table
    texts = tiny.write_texts(tmp_path / "uk", train=[last, *[tiny.WORDS[0]] * 11], test=12)
    tiny.write_model(tmp_path / "model", EVERY[name](), tokenizer)
    argv = [tmp_path / "model", tmp_path / "out", "--data", texts]
    said = succeed(*argv, program=main).out
    assert "logits after 24 beginnings" in said and "not verified" not in said
    assert "on the same tokens, OUT needs -" in said
    listed = json.loads((tmp_path / "out/vocabulary.json").read_text("utf-8"))
    rows = torch.tensor(listed["rows"])
    assert {297, 298, 299} <= set(listed["ids"])
    ids = torch.randint(len(rows), (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = loaded(tmp_path / "model"), loaded(tmp_path / "out")
    expected = logits(before, rows[ids])[..., rows]
    torch.testing.assert_close(logits(after, ids), expected, rtol=1e-5, atol=1e-5)
    fields = vars(after.config.get_text_config(decoder=True))
    sizes = {v for k, v in fields.items() if k.startswith("vocab_size") and isinstance(v, int)}
    assert sizes == {len(rows)}
    tied = [
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
        for model in (before, after)
    ]
    assert tied[0] == tied[1]


def test_what_costs_too_much_is_not_written(place: Path, tmp_path: Path) -> None:
    """It ends with a status of its own and one line; so does what would save too little."""
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tokenizer = kinds.byte_level(regex=False)
    tiny.write_model(tmp_path / "in", tiny.tiny_llama(vocab_size=521, **numbers), tokenizer)
    texts = kinds.texts(kinds.UK[:-6], 60, 1), kinds.texts([*kinds.UK, *kinds.EN[:9]], 30, 2)
    argv = [tmp_path / "in", tmp_path / "out", "--data", tiny.write_texts(tmp_path / "uk", *texts)]
    done = call(*argv, "--most_cost", "0.1%", program=main)
    assert done.status == 3 and not (tmp_path / "out").exists()
    (line,) = done.complaints
    assert line.startswith("not trimmed: --most_cost 0.001: trimming costs ")
    cost = float(line.partition("costs ")[2].partition("%")[0]) / 100
    assert cost > 0.001 and f"{cost:+.2%} bits per byte" in done.out
    succeed(*argv, "--most_cost", str(cost + 0.001), program=main)
    record = json.loads((tmp_path / "out/vocabulary.json").read_text("utf-8"))["record"]
    assert record["measured_on"]["cost"] == pytest.approx(cost, abs=1e-4)
    ratio = record["bits_per_byte_trimmed"] / record["bits_per_byte_original"]
    assert ratio - 1 == pytest.approx(cost, abs=1e-4)
    shutil.rmtree(tmp_path / "out")
    done = call(*argv, "--rows", "512", "--most_cost", "2%", program=main)
    assert done.status == 3 and "over 90%" in done.complaints[0]
    assert "over 90%" in mistake(*argv, "--rows", "512", program=main).problem
    assert "--most_cost" in call(*argv, "--most_cost", "2 %%", program=main).err


def test_the_cost_is_that_of_the_original_on_both_tokens(place: Path, tmp_path: Path) -> None:
    """By a slow reference: each passage by itself, with all rows of the original."""
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tokenizer = kinds.byte_level(regex=False)
    tiny.write_model(tmp_path / "in", tiny.tiny_llama(vocab_size=521, **numbers), tokenizer)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        own = logits_module.pieces_of
        patch.setattr(logits_module, "pieces_of", lambda *a: seen.append(own(*a)) or seen[-1])
        succeed(tmp_path / "in", tmp_path / "out", "--data", place / "uk", program=main)
    content = json.loads((tmp_path / "out/vocabulary.json").read_text("utf-8"))
    rows, record = content["rows"], content["record"]
    model, (pieces,) = loaded(tmp_path / "in"), seen
    assert len({piece.text for piece in pieces}) == len(pieces)  # none is read twice
    nats, size = np.zeros(2), 0
    for piece in pieces:
        for place_, ids in enumerate((piece.before, [rows[i] for i in piece.after])):
            ids = torch.tensor([[1, *ids]])
            with torch.no_grad():
                nats[place_] += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(piece.text.encode())
    bits = nats / np.log(2) / size
    names = ("bits_per_byte_original", "bits_per_byte_trimmed")
    assert [record[name] for name in names] == pytest.approx(bits.tolist(), rel=1e-5)
    assert record["measured_on"]["tokens"] == sum(len(piece.before) for piece in pieces)


def test_little_text_is_measured_once_and_all_of_it() -> None:
    """Passages are different ones, however few there are."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    texts = ["one two three four five six seven eight nine ten " * 2, "", "eleven twelve"]
    pieces = pieces_of(texts, 10**15, 40, encode, encode)
    assert sorted({piece.document for piece in pieces}) == [0, 1]
    read = " ".join(piece.text for piece in pieces)
    assert sorted(read.split()) == sorted(" ".join(texts).split())
    assert all(len(piece.before) <= 40 for piece in pieces)


def test_other_logits_are_noticed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two rows alone were mixed up: nothing is left of OUT."""
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = tiny.tiny_llama(vocab_size=521, **numbers).bfloat16()
    tiny.write_model(tmp_path / "in", model, kinds.byte_level(regex=False))
    own = folder_module.write_rows

    def mixed(source: Path, target: Path, kept: dict[str, torch.Tensor], what: str) -> None:
        rows = kept["lm_head.weight"].clone()
        rows[[20, 21]] = rows[[21, 20]]
        own(source, target, kept | {"lm_head.weight": rows}, what)

    monkeypatch.setattr(folder_module, "write_rows", mixed)
    argv = [tmp_path / "in", tmp_path / "out", "--data", place / "uk"]
    assert "logits of kept tokens differ" in mistake(*argv, program=main).problem
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("free", [None, 500_000])
def test_blocks_are_fetched_where_a_model_does_not_fit(
    free: int | None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3, num_hidden_layers=6)
    model = tiny.tiny_llama(vocab_size=521, intermediate_size=256, **numbers)
    tiny.write_model(tmp_path / "in", model, kinds.byte_level(regex=False))
    argv = [tmp_path / "in", tmp_path / "out", "--data", place / "uk"]
    monkeypatch.setattr(logits_module, "available", lambda: free or 1000)
    said = succeed(*argv, program=main).out
    assert ("logits after 24 beginnings" in said) == bool(free)
    assert ("not verified: logits and cost (" in said) == (not free)


def test_out_stays_where_memory_ends_after_the_cost_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_llama(vocab_size=521, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tiny.write_model(tmp_path / "in", model, kinds.byte_level(regex=False))
    left = iter([10**9, 1000])
    monkeypatch.setattr(logits_module, "available", lambda: next(left))
    said = succeed(tmp_path / "in", tmp_path / "out", "--data", place / "uk", program=main).out
    assert "not verified: logits (OUT " in said and "bits per byte" in said
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_sentencepiece_model_alone(place: Path, tmp_path: Path) -> None:
    """Without tokenizer.json, as Llama 2 has it; OUT has both."""
    tokenizer = kinds.byte_fallback(600)
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = tiny.tiny_llama(vocab_size=len(tokenizer) + 3, **numbers)
    tiny.write_model(tmp_path / "in", model, tokenizer)
    assert write_tokenizer_model(tokenizer, tmp_path / "in")
    (tmp_path / "in/tokenizer.json").unlink()
    names = dict(bos_token=kinds.BOS, eos_token=kinds.EOS, unk_token="<unk>")
    fields = {"tokenizer_class": "LlamaTokenizer", "legacy": True} | names
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(fields))
    said = succeed(tmp_path / "in", tmp_path / "out", "--data", place / "uk", program=main).out
    assert "logits after 24" in said
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("in", "out"))
    ids = json.loads((tmp_path / "out/vocabulary.json").read_text("utf-8"))["ids"]
    alike = [
        old(text).input_ids == [ids[i] for i in new(text).input_ids]
        for text in kinds.texts(kinds.UK[:12], 20, 5)
    ]
    assert sum(alike) > 15 and len(new) < len(old)


def test_code_of_a_model_runs_where_it_is_trusted(place: Path, tmp_path: Path) -> None:
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = tiny.tiny_llama(vocab_size=521, **numbers)
    tiny.write_model(tmp_path / "in", model, kinds.byte_level(regex=False))
    tiny.own_code_(tmp_path / "in")
    argv = [tmp_path / "in", tmp_path / "out", "--data", place / "uk"]
    assert "not verified: logits and cost" in succeed(*argv, program=main).out
    argv[1] = tmp_path / "trusted"
    assert "logits after 24 beginnings" in succeed(*argv, "--trust_remote_code", program=main).out
    trusted = AutoModelForCausalLM.from_pretrained(argv[1], trust_remote_code=True)
    assert type(trusted).__name__ == "OddForCausalLM"


def test_what_is_not_changed_is_linked_in_the_hubs_cache_alone(tmp_path: Path) -> None:
    for cached in (False, True):
        source, target = tmp_path / f"in-{cached}", tmp_path / f"out-{cached}"
        source.write_text("weights")
        if clone(source, target, cached):
            assert target.read_text() == "weights"
            linked = target.stat().st_ino == source.stat().st_ino
            assert not linked or cached and not target.stat().st_mode & 0o222
        else:
            assert not cached and not target.exists()


def test_settings_that_only_the_class_has_follow(place: Path, tmp_path: Path) -> None:
    """Ids and sizes that a config.json leaves to its class."""
    tokenizer = kinds.byte_level(regex=False)
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tiny.write_model(tmp_path / "in", tiny.tiny_llama(vocab_size=521, **numbers), tokenizer)
    config = json.loads((tmp_path / "in/config.json").read_text("utf-8"))
    given = with_defaults({"a": 1}, config | {"text_config": {"vocab_size": 9}}, lambda *_: True)
    assert given["text_config"] == {"vocab_size": 9} and given["a"] == 1
    assert with_defaults({"pad_token_id": None}, config, lambda *_: True)["pad_token_id"] is None


def test_padding_and_truncation_are_written_as_loaded(place: Path, tmp_path: Path) -> None:
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = tiny.tiny_llama(vocab_size=521, **numbers)
    tiny.write_model(tmp_path / "in", model, kinds.byte_level(regex=False))
    tokenizer = Tokenizer.from_file(str(tmp_path / "in/tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("Ġriver"), pad_token="Ġriver", length=9)
    tokenizer.enable_truncation(100, stride=7, direction="left")
    tokenizer.save(str(tmp_path / "in/tokenizer.json"))
    succeed(tmp_path / "in", tmp_path / "out", "--data", place / "uk", program=main)
    saved = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert saved.truncation == tokenizer.truncation
    assert saved.padding == tokenizer.padding | {"pad_id": saved.token_to_id("Ġriver")}


def test_every_tenth_document_of_all_is_held_out(tmp_path: Path) -> None:
    """Numbered through over sources whose first is no multiple of ten, dialogues too."""
    letters = [chr(ord("A") + number) for number in range(45)]
    rows = [{"text": letter} for letter in letters]
    rows[20:30] = [
        {"messages": chats.said(a, b)} for a, b in zip(letters[20:30], "x" * 10, strict=False)
    ]
    for name, part in (("one", rows[:13]), ("two", rows[13:20]), ("three", rows[20:])):
        text = "\n".join(json.dumps(row) for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    sources = parse_sources(
        [str(tmp_path / f"{n}.jsonl") for n in ("one", "two", "three")], "--data"
    )

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text[:1].encode(), np.uint8) for text in texts]

    counts = count_tokens([*map(Corpus, sources)], encode, plain_text, 256, 0.2)
    assert {chr(i) for i in np.flatnonzero(counts[0])} == set(letters)
    assert {chr(i) for i in np.flatnonzero(counts[1])} == set(letters[9::10])
