"""A folder and the GGUF file that is made of it: the same counts, and the same ordinary tokens."""

from __future__ import annotations

import json
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from support import mistake, succeed
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("vocabulary", ".")]

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

import ggufs  # noqa: E402
import kinds  # noqa: E402

from lib.commands.gguf.__main__ import main as convert  # noqa: E402
from lib.commands.trim import choosing  # noqa: E402
from lib.commands.trim.__main__ import main  # noqa: E402
from lib.gguf.file import GgufFile  # noqa: E402
from lib.gguf.vocabulary import GgufVocabulary  # noqa: E402
from lib.util.quirks import KNOWN_PROMPTS  # noqa: E402
from lib.vocabulary.choice import choose  # noqa: E402
from lib.vocabulary.kinds import Vocabulary  # noqa: E402
from lib.vocabulary.tokenizer_json import TrimmableTokenizer  # noqa: E402

NORMAL, UNKNOWN, CONTROL, BOOL = 1, 2, 3, 7
# tokens that code of a projector writes by number, or a model answers with
WRITTEN = """<row_#_col_4> <|img_row_1_col_#|> <｜hy_place▁holder▁no▁10#｜> <|LOC_#|> <loc000#>
<|s_#|> <|image_placeholder_#|>""".split()
RESERVED = """<unused#> [unused#] [UNUSED_TOKEN_14#] >>UNUSED_#<< <|reserved_20000#|> <extra_id_#>
<|reserved_special_token_#|> <|vision_reserved_special_token_#|> <SPECIAL_#>
<|placeholder#|>""".split()


def unigram(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A file of a Unigram tokenizer without bytes, which the converter does not take."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    scores = {token: score for token, score in model["vocab"]} | {kinds.USER: 0.0}
    special = {kinds.BOS, kinds.EOS, kinds.PAD, kinds.USER}
    types = [CONTROL if t in special else UNKNOWN if t == "<unk>" else NORMAL for t in scores]
    fields = ggufs.tokenizer("t5")
    fields |= {"tokenizer.ggml.tokens": (ggufs.STRING, [*scores])}
    fields |= {"tokenizer.ggml.scores": (ggufs.FLOAT32, [*scores.values()])}
    fields |= {"tokenizer.ggml.token_type": (ggufs.INT32, types)}
    fields |= {"tokenizer.chat_template": (ggufs.STRING, kinds.TEMPLATE)}
    ids = {"bos": kinds.BOS, "eos": kinds.EOS, "unknown": "<unk>", "padding": kinds.PAD}
    for name, token in ids.items():
        index = [*scores].index(token)
        fields[f"tokenizer.ggml.{name}_token_id"] = (ggufs.UINT32, index)
    fields["tokenizer.ggml.add_space_prefix"] = (BOOL, True)
    del fields["tokenizer.ggml.suppress_tokens"]
    tensors = {"token_embd.weight": ((256, len(scores)), ggufs.F32, np.zeros((len(scores), 1024)))}
    ggufs.write_gguf(path, fields, tensors)


@pytest.fixture(scope="module", params=["byte-level", "byte fallback", "without bytes"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    make = {
        "byte-level": lambda: kinds.byte_level(700),
        "byte fallback": lambda: kinds.byte_fallback(600),
        "without bytes": lambda: kinds.unigram(600, fallback=False),
    }
    tokenizer = make[request.param]()
    pre = ["--pre", "gpt-2"] * (request.param == "byte-level")
    rows = len(tokenizer) + 40  # some without a token
    numbers = dict(vocab_size=rows, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tiny.write_model(place / "model", tiny.tiny_llama(**numbers), tokenizer)
    if request.param == "without bytes":
        unigram(place / "model.gguf", tokenizer)
    else:
        with pytest.MonkeyPatch.context() as patch:  # it is proven elsewhere
            proof = {"tensors": {"changed": {}}}
            patch.setattr("lib.commands.gguf.convert.verify", lambda *_, **__: proof)
            succeed(place / "model", place / "model.gguf", "--type", "f32", *pre, program=convert)
    return place


def dialogues(texts: Iterable[str]) -> list[dict[str, Any]]:
    pairs = ((("user", text[:60]), ("assistant", text[60:])) for text in texts)
    return [{"messages": [{"role": r, "content": c} for r, c in pair]} for pair in pairs]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A source of 23 documents, dialogues, and a source that is above the stop of counting."""
    place = tmp_path_factory.mktemp("texts")
    rows = {
        "few": [{"text": text} for text in kinds.texts(kinds.UK[:16], 23, 1)],
        "chats": dialogues(kinds.texts(kinds.UK[4:20], 31, 2)),
        "much": [{"text": text} for text in kinds.texts([*kinds.UK[8:24], *kinds.EN[:4]], 400, 3)],
    }
    for name, each in rows.items():
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in each)
        (place / f"{name}.jsonl").write_text(text, "utf-8")
    return [place / f"{name}.jsonl" for name in rows]


def closed(rules: Vocabulary) -> set[int]:
    """The required tokens with those from which they are merged."""
    kept: set[int] = set()
    for index in rules.required:
        kept |= rules.with_parts(index, kept)
    return kept


def test_counts_and_ordinary_tokens_are_equal(
    models: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rows are rounded up, and but for tokens that only one of both requires."""
    monkeypatch.setattr("lib.vocabulary.choice.MULTIPLE", 1)
    monkeypatch.setattr("lib.commands.trim.choosing.MOST_ROWS", 1)
    monkeypatch.setattr("lib.vocabulary.counts.STEP", 4000)
    lists, found, own = [], [], choosing.choose_by_text

    def seen(args: Any, rules: Vocabulary, counts: np.ndarray, *rest: int) -> Any:
        found.append((rules, counts))
        return own(args, rules, counts, *rest)

    monkeypatch.setattr(choosing, "choose_by_text", seen)
    for name in ("model.gguf", "model"):
        argv = [models / name, models / f"new-{name}", "--dry_run", "--price", "60"]
        said = succeed(*argv, "--data", *texts, program=main).out
        assert re.findall(r"(\w+): [\d,]+ of at most", said) == ["much"]
        lists.append(set(own_ids(found[-1])))
    (rules, counts), (others, other_counts) = found
    n = min(counts.shape[1], other_counts.shape[1])
    assert np.array_equal(counts[:, :n], other_counts[:, :n]) and not counts[:, n:].any()
    assert counts[1].sum() > 0.05 * counts[0].sum()
    assert rules.tokens.items() >= others.tokens.items()
    assert lists[0] - lists[1] <= closed(rules) and lists[1] - lists[0] <= closed(others)
    ordinary = lists[0] & lists[1] - closed(rules) - closed(others)
    assert len(ordinary) > 20
    if rules.byte_level:  # whose tokens the texts do not all use
        assert any(not counts[0, index] for index in ordinary)


def own_ids(found: tuple[Vocabulary, np.ndarray]) -> list[int]:
    rules, counts = found
    return choose(rules, *counts, price=0.1).ids


@pytest.mark.parametrize("models", ["byte-level"], indirect=True)
def test_either_list_is_kept(models: Path, texts: list[Path], tmp_path: Path) -> None:
    """What the file and the folder require apart is printed by reason."""
    names = {"model.gguf": "a.gguf", "model": "b"}
    for name, out in names.items():
        argv = [models / name, tmp_path / out, "--rows", "576", "--data", texts[0]]
        succeed(*argv, program=main)
    lists = tmp_path / "a.gguf.vocabulary.json", tmp_path / "b/vocabulary.json"
    said = [
        succeed(models / "model", tmp_path / "c", "--keep", lists[0], program=main).out,
        succeed(models / "model.gguf", tmp_path / "d.gguf", "--keep", lists[1], program=main).out,
    ]
    one, other = (json.loads(each.read_text("utf-8")) for each in lists)
    kept = json.loads((tmp_path / "c/vocabulary.json").read_text("utf-8"))
    assert kept["ids"] == one["ids"] and kept["rows"][: len(one["ids"])] == one["ids"]
    kept = json.loads((tmp_path / "d.gguf.vocabulary.json").read_text("utf-8"))
    assert kept["ids"] == other["ids"]
    assert "the model of the list alone requires" in said[0] and "(chat template)" in said[0]
    assert "IN alone requires" in said[1] and "(chat template)" in said[1]
    other["ids"][0], other["tokens"][0] = 9, "x"
    (tmp_path / "wrong.json").write_text(json.dumps(other), "utf-8")
    argv = [models / "model", tmp_path / "e", "--keep", tmp_path / "wrong.json"]
    assert "its tokens are not those of" in mistake(*argv, program=main).problem


RERANKER = next(name for name in KNOWN_PROMPTS if "reranker" in name)
KNOWN = {
    "intfloat/multilingual-e5-small": ["query: ", "passage: "],
    "Multilingual E5 Small": ["query: ", "passage: "],
    "Nomic Embed Text V1.5": ["search_query: ", "search_document: "],
    "snowflake-arctic-embed-l-v2.0": ["query: "],
    "embeddinggemma-300M-Q8_0.gguf": ["title: none | text: ", "task: search result | query: "],
    "Qwen3 Reranker 0.6B": ["yes", "no"],
    "bge-m3": [],
    "code5-1b-instruct": [],
}


@pytest.mark.parametrize("name", KNOWN)
def test_prompts_are_known_by_the_name_of_a_family(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = choosing.prompts_of(Namespace(prompts=["mine: "]), [name], ["", "own: "])
    assert found[:2] == ["mine: ", "own: "] and {*KNOWN[name]} <= {*found[2:]}
    assert len(found) > 2 or not KNOWN[name]
    assert "prompts whose tokens stay: 'mine: ', 'own: '" in capsys.readouterr().out


@pytest.mark.parametrize("models", ["byte-level"], indirect=True)
def test_tokens_of_prompts_stay(models: Path, texts: list[Path], tmp_path: Path) -> None:
    """Of a folder whose card names the family, and of a file that has its name."""
    tokenizer = AutoTokenizer.from_pretrained(models / "model")
    shutil.copytree(models / "model", tmp_path / "mine")
    (tmp_path / "mine/README.md").write_text("---\nbase_model: Qwen/Qwen3-Reranker-8B\n---\n")
    shutil.copyfile(models / "model.gguf", tmp_path / "qwen3-reranker.gguf")
    flags = ["--data", texts[0], "--price", "1000"]
    succeed(models / "model", tmp_path / "plain", *flags, program=main)
    plain = json.loads((tmp_path / "plain/vocabulary.json").read_text("utf-8"))
    tokens = {*tokenizer.tokenize("children play"), *tokenizer.tokenize(KNOWN_PROMPTS[RERANKER][2])}
    assert len(tokens - {*plain["tokens"]}) > 5
    for source, out in (("mine", "new"), ("qwen3-reranker.gguf", "new.gguf")):
        argv = [tmp_path / source, tmp_path / out, *flags, "--prompts", "children play"]
        assert (
            "prompts whose tokens stay: 'children play', 'yes', "
            in succeed(*argv, program=main).out
        )
        listed = tmp_path / (f"{out}.vocabulary.json" if "." in out else f"{out}/vocabulary.json")
        assert tokens <= {*json.loads(listed.read_text("utf-8"))["tokens"]}, source
    argv = [models / "model", tmp_path / "kept", "--keep", tmp_path / "plain/vocabulary.json"]
    error = mistake(*argv, "--prompts", "children play", program=main)
    assert "it lacks " in error.problem and error.what.startswith("--keep ")


def test_tokens_are_reserved_by_their_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, reserved = (
        [name.replace("#", str(n)) for name in names for n in range(6)]
        for names in (WRITTEN, RESERVED)
    )
    tokenizer, fields = kinds.byte_level(), ggufs.tokenizer("gpt2")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in written + reserved])
    tokens, types = (fields[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "token_type"))
    tokens += [token for token in written + reserved if token not in tokens]
    types += [CONTROL] * (len(tokens) - len(types))
    monkeypatch.setattr(ggufs, "tokenizer", lambda _: fields)
    file = GgufVocabulary(GgufFile(ggufs.model(tmp_path / "in.gguf"), "IN"))
    for rules in (file.vocabulary(set()), TrimmableTokenizer(tokenizer, "m").vocabulary()):
        required = {rules.tokens[index] for index in rules.required}
        assert required.issuperset(written) and required.isdisjoint(reserved)
        assert {rules.tokens[index] for index in rules.special}.issuperset(written + reserved)
