"""GGUF files trimmed by `langprune trim`, compared with what gguf's reader and llama.cpp read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ggufs  # noqa: E402

from lib.util.errors import UserError  # noqa: E402

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from lib.commands.trim.__main__ import main  # noqa: E402
from lib.commands.trim.choosing import rows_line  # noqa: E402
from lib.gguf.conversion import run_child  # noqa: E402
from lib.gguf.file import Field, GgufFile, write  # noqa: E402
from lib.gguf.llama import Llama, dialogues  # noqa: E402
from lib.gguf.predictions import ODD_LIMIT, values_of  # noqa: E402
from lib.gguf.vocabulary import GgufVocabulary  # noqa: E402
from lib.util.quirks import PRE_TOKENIZERS  # noqa: E402
from lib.vocabulary.cost import MOST_COST  # noqa: E402
from lib.vocabulary.proof import texts_to_compare  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ggufs.UK + ggufs.EN[-4:]  # words for texts of which the test has other ones
IDS = ("bos_token_id", "eos_token_id", "unknown_token_id")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ggufs.write_texts(tmp_path_factory.mktemp("texts") / "uk", ggufs.UK)


def fields_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: t.data.view(np.uint8).reshape(int(t.shape[-1]), -1) for t in tensors}


def check(source: Path, out: Path) -> list[int]:
    """OUT must be IN with fewer rows; returns the old id of each new one."""
    old, new = fields_of(source), fields_of(out)
    kept = json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["ids"]
    prefix = "tokenizer.ggml."
    tokens, small = old[f"{prefix}tokens"], new[f"{prefix}tokens"]
    assert 100 < len(kept) < 0.9 * len(tokens)
    for name in ("tokens", "token_type", "scores"):
        if prefix + name in old:
            assert new[prefix + name] == [old[prefix + name][index] for index in kept], name
    if merges := old.get(f"{prefix}merges"):
        there = [m for m in merges if {*m.split(" "), m.replace(" ", "")} <= set(small)]
        assert new[f"{prefix}merges"] == there and there
    for name in IDS:
        assert small[new[prefix + name]] == tokens[old[prefix + name]], name
    suppressed = [small[index] for index in new[f"{prefix}suppress_tokens"]]
    assert suppressed == ["<s>"]  # the reserved one is removed
    assert new["llama.vocab_size"] == len(kept)
    assert "tokenizer.huggingface.json" not in new
    assert "trimmed" in new["general.name"] and "trimmed" in new["general.size_label"]
    assert not any(token.startswith("<unused") for token in small)
    same = [n for n in old if n.startswith("llama.") and n != "llama.vocab_size"]
    assert all(new[name] == old[name] for name in [*same, "tokenizer.chat_template"])
    before, after = tensors_of(source), tensors_of(out)
    assert list(before) == list(after)
    for name, data in before.items():
        expected = data[kept] if name in ("token_embd.weight", "output.weight") else data
        assert np.array_equal(after[name], expected), name
    return kept


CASES = {
    "gpt2": (ggufs.Q4_K, ggufs.Q6_K),
    "llama": (ggufs.Q8_0, ggufs.IQ4_NL),
    "gemma4": (ggufs.BF16, None),
    "t5": (ggufs.F16, ggufs.F16),
    "bert": (ggufs.F32, None),
}


@pytest.mark.parametrize("kind", CASES)
def test_kept_rows_tokens_and_ids(
    kind: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, head = CASES[kind]
    source = ggufs.model(tmp_path / "in.gguf", kind, table, head)
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    said = capsys.readouterr().out
    if kind == "gpt2":  # as on the page
        page = (ROOT / "docs/vocabulary.md").read_text("utf-8")
        shown = re.search(r"```\n(--data .*?)```", page, re.DOTALL)[1]
        printed = said.replace(str(texts), "texts/uk")
        words = [re.sub(r"[+-]?\d[\d,.]*(e-\d+)?", "#", text) for text in (printed, shown)]
        left_out = "fields left out: tokenizer.huggingface.json\n"
        assert words[0].replace(left_out, "") == words[1]
    kept = check(source, tmp_path / "out.gguf")
    before, after = Llama(source), Llama(tmp_path / "out.gguf")
    rows, alike = np.array(kept), 0
    for text in [*ggufs.sentences(ggufs.UK, 20, 7), *ggufs.sentences(ggufs.EN, 20, 8)]:
        ids, new = before.encode(text), rows[after.encode(text)]
        assert set(ids.tolist()) - set(kept) or np.array_equal(ids, new), text
        alike += np.array_equal(ids, new)
        if kind not in ("t5", "bert"):
            assert before.decode(ids) == after.decode(after.encode(text))
    assert 0 < alike
    if kind in ("t5", "bert"):
        assert "not verified: predictions and cost (it predicts no next token)" in said
    else:
        assert "proven, probabilities: log-probabilities after 24 beginnings" in said
        own = re.search(r"same tokens, OUT needs -([\d.]+)% bits per byte \(95% interval -", said)
        assert "longer tokens cost at most" in said and float(own[1]) > 0
        assert "not verified" not in said


def test_every_table_with_a_row_for_each_token(texts: Path, tmp_path: Path) -> None:
    """Per-layer tables, heads of MTP and a bias; a table of positions is none."""
    rows = len(ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"][1])
    tables = {
        "per_layer_token_embd.weight": ((512, rows), ggufs.Q4_K),
        "blk.0.nextn.embed_tokens.weight": ((ggufs.WIDTH, rows), ggufs.Q6_K),
        "blk.0.nextn.shared_head_head.weight": ((ggufs.WIDTH, rows), ggufs.IQ4_NL),
        "output.bias": ((rows,), ggufs.F32),
        "position_embd.weight": ((32, rows), ggufs.F32),
    }
    more = {
        name: (shape, kind, ggufs.blocks(kind, shape[-1], (*shape, 1)[0] if shape[1:] else 1, 1))
        for name, (shape, kind) in tables.items()
    }
    source = ggufs.model(tmp_path / "in.gguf", more=more)
    file = GgufFile(source, "IN")
    kept = [*range(300), rows - 1]
    fields, tensors = GgufVocabulary(file).trimmed(kept)
    for _ in write(tmp_path / "out.gguf", fields, tensors):
        pass
    before, after = tensors_of(source), tensors_of(tmp_path / "out.gguf")
    for name in tables:
        whole = name == "position_embd.weight"
        assert np.array_equal(after[name], before[name] if whole else before[name][kept]), name


def test_a_mixture_with_as_many_neurons_as_tokens(texts: Path, tmp_path: Path) -> None:
    """Experts are copied as they are, whatever their dimensions."""
    rows = len(ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"][1])
    shapes = {"gate_inp": (ggufs.WIDTH, 4), "down_exps": (rows, ggufs.WIDTH, 4)}
    shapes |= dict.fromkeys(("gate_exps", "up_exps"), (ggufs.WIDTH, rows, 4))
    more = {f"blk.0.ffn_{name}.weight": None for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        values = ggufs.blocks(ggufs.F32, shape[1] * (*shape, 1)[2], shape[0], 1)
        more[f"blk.0.ffn_{name}.weight"] = shape, ggufs.F32, values
    changed = {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": rows}
    changed = {f"llama.{name}": (ggufs.UINT32, count) for name, count in changed.items()}
    source = ggufs.model(tmp_path / "in.gguf", more=more, changed=changed)
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    check(source, tmp_path / "out.gguf")
    record = json.loads((tmp_path / "out.gguf.vocabulary.json").read_text("utf-8"))["record"]
    assert record["distance"] < ODD_LIMIT and record["beginnings"] == 24


def test_chats_are_rendered_as_before(texts: Path, tmp_path: Path) -> None:
    source = ggufs.model(tmp_path / "in.gguf")
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    kept = check(source, tmp_path / "out.gguf")
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ("сонце над", "ліс")]
    one, other = (
        run_child("chats", dialogues, model=str(path), chats=chats, end=2)
        for path in (source, tmp_path / "out.gguf")
    )
    assert one["chats"] == [[kept[index] for index in ids] for ids in other["chats"]]
    assert len(one["chats"][0]) > 5


def test_a_slow_child_gets_all_that_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds, long before it reads."""
    code = "import time\ntime.sleep(1.5)\n\ndef count(text):\n    return len(text)\n"
    (tmp_path / "slow.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("lib.gguf.conversion.LIMIT", 30)
    count = SimpleNamespace(__module__="slow", __name__="count")
    assert run_child("this", count, text="a" * 200_000) == 200_000


def test_text_is_counted_until_the_list_stops_changing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents that stand at the end count too, since each round takes some of all places."""
    source, folder = ggufs.model(tmp_path / "in.gguf"), tmp_path / "uk"
    folder.mkdir()
    texts = ggufs.sentences(ggufs.UK[:20], 400) + ggufs.sentences(ggufs.UK[20:], 100, 1)
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (folder / "test.jsonl").write_text(json.dumps({"text": texts[-1]}))
    monkeypatch.setattr("lib.vocabulary.counts.STEP", 4000)
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(folder), "--price", "200"])
    said = capsys.readouterr().out
    assert f" of at most {sum(map(len, texts)):,} characters are counted; " in said
    counted = int(said.partition("\nuk: ")[2].partition(" of ")[0].replace(",", ""))
    encoded = [*map(len, map(Llama(source).encode, texts))]
    assert 5000 < counted / sum(map(len, texts)) * sum(encoded) < 6000  # 1e6 / 200 tokens
    kept = set(json.loads((tmp_path / "out.gguf.vocabulary.json").read_text("utf-8"))["ids"])
    assert kept.issuperset(i for text in texts for i in Llama(source).encode(text).tolist())


def test_a_draft_and_its_target_get_one_list(texts: Path, tmp_path: Path) -> None:
    """Of two sizes of one vocabulary, of which one has rows without a token."""
    target = ggufs.model(tmp_path / "target.gguf", padding=216)
    draft = ggufs.model(tmp_path / "draft.gguf", table=ggufs.Q8_0, head=None)
    one, other = tmp_path / "new/t.gguf", tmp_path / "d.gguf"
    main([str(target), str(one), "--data", str(texts), "--rows", "448"])
    main([str(draft), str(other), "--keep", f"{one}.vocabulary.json"])
    assert check(target, one) == check(draft, other)
    one, other = fields_of(one), fields_of(other)
    names = [name for name in one if name.startswith("tokenizer.")]
    assert all(one[name] == other[name] for name in names) and len(names) > 5
    assert len(one["tokenizer.ggml.tokens"]) == 448


def test_parts_are_read_as_one(texts: Path, tmp_path: Path) -> None:
    whole = ggufs.model(tmp_path / "in.gguf")
    file, half = GgufFile(whole, "IN"), 5
    for number, tensors in enumerate((file.tensors[:half], file.tensors[half:])):
        fields = dict(file.fields) if number == 0 else {}
        fields |= {"split.no": Field(2, number), "split.count": Field(2, 2)}
        fields["split.tensors.count"] = Field(ggufs.INT32, len(file.tensors))
        for _ in write(tmp_path / f"in-0000{number + 1}-of-00002.gguf", fields, tensors):
            pass
    for name in ("in.gguf", "in-00002-of-00002.gguf"):
        main([str(tmp_path / name), str(tmp_path / f"small-{name}"), "--data", str(texts)])
    one, other = (tmp_path / f"small-{name}" for name in ("in.gguf", "in-00002-of-00002.gguf"))
    assert one.read_bytes() == other.read_bytes()


def test_an_id_that_llama_cpp_assumes_is_written(tmp_path: Path) -> None:
    """Without a field, GPT-2's kind ends texts with the id 11, wherever that token is then."""
    source = ggufs.model(tmp_path / "in.gguf", without="tokenizer.ggml.eos_token_id")
    file = GgufFile(source, "IN")
    fields, _ = GgufVocabulary(file).trimmed([0, 1, 5, 11])
    assert fields["tokenizer.ggml.eos_token_id"].value == 3


def test_a_field_that_may_hold_ids_is_left_out_on_request(tmp_path: Path) -> None:
    changed = {"llama.mine_token_ids": (ggufs.INT32, [1, 400]), "llama.idsy": (ggufs.UINT32, 1)}
    changed["llama.other_vocab_id"] = (ggufs.UINT32, 7)
    file = GgufFile(ggufs.model(tmp_path / "in.gguf", changed=changed), "IN")
    with pytest.raises(UserError, match="add --drop llama.other_vocab_id"):
        GgufVocabulary(file)
    fields, _ = GgufVocabulary(file, {"llama.other_vocab_id"}).trimmed([0, 1, 2, 11, 400])
    assert "llama.other_vocab_id" not in fields and fields["llama.idsy"].value == 1
    assert fields["llama.mine_token_ids"].value == [1, 4]


def test_the_same_token_ends_a_turn(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a field, llama.cpp takes one of several by an order that removed tokens change."""
    fields, ends = ggufs.tokenizer("gpt2"), ["<|endoftext|>", "<|eot_id|>", "<|end|>"]
    fields["tokenizer.ggml.tokens"][1].extend(ends)
    fields["tokenizer.ggml.token_type"][1].extend([3] * len(ends))
    monkeypatch.setattr(ggufs, "tokenizer", lambda _: fields)
    source, out = ggufs.model(tmp_path / "in.gguf", padding=100), tmp_path / "out.gguf"
    main([str(source), str(out), "--data", str(texts)])
    one, other = Llama(source), Llama(out)
    assert one.decode([one.end_of_turn]) == other.decode([other.end_of_turn]) == b"<|im_end|>"
    assert fields_of(out)["tokenizer.ggml.eot_token_id"] == other.end_of_turn
    assert other.ends_answer(other.end_of_turn)


def test_an_architecture_with_a_hyphen(tmp_path: Path) -> None:
    fields = {"vocab_size": (ggufs.UINT32, 502), "adapters.token_ids_on": (ggufs.INT32, [11, 400])}
    changed = {f"falcon-h1.{name}": field for name, field in fields.items()}
    changed["general.architecture"] = (ggufs.STRING, "falcon-h1")
    file = GgufFile(ggufs.model(tmp_path / "in.gguf", changed=changed), "IN")
    new, _ = GgufVocabulary(file).trimmed([0, 1, 2, 11, 400])
    assert new["falcon-h1.vocab_size"].value == 5
    assert new["falcon-h1.adapters.token_ids_on"].value == [3, 4]
    changed["falcon-h1.ple.heads"] = (ggufs.UINT32, 1)
    file = GgufFile(ggufs.model(tmp_path / "hashes.gguf", changed=changed), "IN")
    with pytest.raises(UserError, match="falcon-h1.ple.heads belongs to hashes of ids"):
        GgufVocabulary(file)


def test_llama_cpp_tells_models_apart_by_their_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"general.architecture": (ggufs.STRING, "deepseek2")}
    changed["deepseek2.block_count"] = (ggufs.UINT32, 47)
    file = GgufFile(ggufs.model(tmp_path / "in.gguf", changed=changed), "IN")
    GgufVocabulary(file).check_count(480)
    with pytest.raises(UserError, match="another model by its 154880 tokens"):
        GgufVocabulary(file).check_count(154880)
    monkeypatch.setattr("lib.gguf.vocabulary.TELLING_ROWS", (502,))
    with pytest.raises(UserError, match="by its 502 tokens"):
        GgufVocabulary(file)


def test_the_values_of_a_file(texts: Path, tmp_path: Path) -> None:
    """By IN's tokens and by OUT's, which are the same here."""
    source = ggufs.model(tmp_path / "in.gguf")
    ids = Llama(source).encode(ggufs.sentences(ggufs.UK[:8], 1)[0]).tolist()
    given = dict(own=[ids] * 2, windows=[ids] * 2, places=[[0, 3], [1, 5]], rows=[1, 5, 7])
    losses = values_of(str(source), **given, values=str(tmp_path / "values.npy"))
    assert np.allclose([*losses["own"], *losses["mapped"]], losses["own"][0])
    values = np.load(tmp_path / "values.npy")
    assert values.shape == (2, 3) and np.allclose(np.exp(values).sum(-1), 1)


@pytest.mark.parametrize("rows", [502, 504])
def test_one_other_row_is_noticed(
    rows: int, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not llama.cpp computes both heads by one kernel, which depends on their rows.

    Large logits of 502 rows of q4_K differ by more than 1e-5.
    """
    steep = ggufs.blocks(ggufs.Q4_K, rows, ggufs.WIDTH, 9)
    steep.reshape(-1, 144)[:, :4] = np.float16([0.007, 0.007]).view(np.uint8)
    more = {"output.weight": ((ggufs.WIDTH, rows), ggufs.Q4_K, steep)}
    source = ggufs.model(tmp_path / "in.gguf", more=more, padding=rows - 502)
    out, argv = tmp_path / "out.gguf", [str(source), str(tmp_path / "out.gguf")]
    main([*argv, "--data", str(texts)])
    record = json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["record"]
    assert record["beginnings"] == 24 and record["distance"] < (1e-6 if rows == 504 else 1e-5)
    data = bytearray(out.read_bytes())
    head = next(t for t in gguf.GGUFReader(out).tensors if t.name == "output.weight")
    at, size = int(head.data_offset), head.n_bytes // int(head.shape[-1])
    data[at : at + size] = data[at + size : at + 2 * size]
    out.write_bytes(data)
    with pytest.raises(UserError, match="output.weight is not IN's"):
        main([*argv, "--verify"])
    monkeypatch.setattr("lib.commands.trim.file._same_bytes", lambda *_: "")
    with pytest.raises(UserError, match="log-probabilities differ by"):
        main([*argv, "--verify"])
    assert out.read_bytes() == data  # nothing that was there is deleted


def test_a_trimmed_file_is_trimmed_again(texts: Path, tmp_path: Path) -> None:
    """By texts without a test, in a folder whose name is no UTF-8."""
    ggufs.model(tmp_path / "in.gguf")
    main([str(tmp_path / "in.gguf"), str(tmp_path / "out.gguf"), "--data", str(texts)])
    folder = tmp_path / os.fsdecode("тексти".encode("cp1251"))
    shutil.copytree(texts, folder)
    (folder / "test.jsonl").write_text('{"text": ""}\n{"text": " "}\n', "utf-8")
    again = tmp_path / "again.gguf"
    main([str(tmp_path / "out.gguf"), str(again), "--data", str(folder), "--rows", "384"])
    assert len(fields_of(again)["tokenizer.ggml.tokens"]) == 384


def appears_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another program write a file while tokens are compared."""

    def begun(*args: object) -> dict[str, list[str]]:
        path.write_bytes(b"theirs")
        return texts_to_compare(*args)

    monkeypatch.setattr("lib.commands.trim.file.texts_to_compare", begun)


def test_a_file_that_another_run_writes_is_left(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, partial = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf.partial"

    appears_meanwhile(partial, monkeypatch)
    with pytest.raises(UserError, match="another run writes it now"):
        main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    assert partial.read_bytes() == b"theirs"


@pytest.mark.parametrize("fault", ["disk", "bytes"])
def test_nothing_is_left_of_a_file_that_is_not_whole(
    fault: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ggufs.model(tmp_path / "in.gguf")
    module = "lib.commands.trim.file"

    def spoiled(path: Path, *rest: object) -> object:
        yield from write(path, *rest)
        if path.name == "out.gguf.partial":
            if fault == "disk":
                raise OSError(28, "No space left on device")
            data = bytearray(path.read_bytes())
            data[-400] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(f"{module}.write", spoiled)
    error, words = (OSError, "No space") if fault == "disk" else (UserError, "is not IN's")
    with pytest.raises(error, match=words):
        main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_a_dry_run_writes_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ggufs.model(tmp_path / "in.gguf", "llama")
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts), "--dry-run"])
    said = capsys.readouterr().out
    assert "MB become" in said and said.index("uk: ") < said.index("lines in many scripts: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_what_is_read_and_why_rows_stay(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder's files, also those left out; and the rows by reason, of which each counts once."""
    source, own = ggufs.model(tmp_path / "in.gguf", "llama"), tmp_path / "own"
    shutil.copytree(texts, own)
    (own / "b.txt").write_text("text")
    for rows in ([], ["--rows", "448"]):
        main([str(source), str(tmp_path / "out.gguf"), "--data", str(own), "--dry-run", *rows])
        said = capsys.readouterr().out
        (line,) = (line for line in said.splitlines() if line.startswith("--data"))
        assert line.startswith(f"--data {own}: 2 files, ") and line.endswith("left out: b.txt")
        stay, why = re.search(r": ([\d,]+) of [\d,]+ rows stay: (.*)\n", said).groups()
        counts = [each.replace(",", "").split()[0] for each in [stay, *why.split(", ")]]
        assert int(counts[0]) == sum(map(int, counts[1:])) > 0 and len(counts) == 4
    few = dict(rows=64, rows_before=99, used=80, kept_for=(20, 10, 33))
    said = "64 of 99 rows stay: 20 of the 80 that the texts use, 10 required or parts of others, "
    said += "33 likely (more text tells which are needed), 1 without a token"
    assert rows_line(few) == said


@pytest.mark.parametrize("same", [True, False, None])
def test_a_tokenizer_beside_counts_if_it_agrees(
    same: bool | None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for name in ("alone", "beside"):
        (tmp_path / name).mkdir()
        ggufs.model(tmp_path / name / "in.gguf")
    fields = {name: value for name, (_, value) in ggufs.tokenizer("gpt2").items()}
    vocab = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges if same else merges[:9]))
    split = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(next(n for n, v in PRE_TOKENIZERS.items() if v == "qwen2")), "isolated"
    )
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    made.add_special_tokens([*ggufs.SPECIAL, *ggufs.RESERVED])
    made.enable_truncation(9)  # must not count
    made.save(str(tmp_path / "beside/tokenizer.json"))
    if same is None:  # it cannot be read
        (tmp_path / "beside/tokenizer.json").write_text(
            "version https://git-lfs.github.com", "utf-8"
        )
    lists = []
    for name in ("alone", "beside"):
        out = tmp_path / f"{name}.gguf"
        main([str(tmp_path / name / "in.gguf"), str(out), "--data", str(texts)])
        lists.append(json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["ids"])
    assert ("tokenizer.json gives the same tokens" in capsys.readouterr().out) == bool(same)
    assert lists[0] == lists[1]


def test_a_file_that_llama_cpp_does_not_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is trimmed, and what was not compared is said."""
    more = {"unheard_of.weight": ((32, 4), ggufs.F32, ggufs.blocks(ggufs.F32, 4, 32, 1))}
    source = ggufs.model(tmp_path / "in.gguf", more=more)
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not verified: predictions and cost (") and "tensors" in last
    check(source, tmp_path / "out.gguf")


def test_a_projector_beside_it_is_not_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"unheard_of.weight": ((32, 4), ggufs.F32, ggufs.blocks(ggufs.F32, 4, 32, 1))}
    source = ggufs.model(tmp_path / "in.gguf", more=more)
    (tmp_path / "mmproj-in.gguf").write_bytes(b"GGUF")
    main([str(source), str(tmp_path / "out.gguf"), "--data", str(texts)])
    assert "mmproj-in.gguf beside IN: unchanged, not run\n" in capsys.readouterr().out


def embedder(path: Path, pooling: int) -> Path:
    """A file whose logits llama.cpp does not compute, as its converter writes embedders."""
    counts = dict(context_length=512, embedding_length=ggufs.WIDTH, block_count=1)
    counts |= {"feed_forward_length": 96, "rope.dimension_count": 64, "pooling_type": pooling}
    counts |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    changed = {f"llama-embed.{name}": (ggufs.UINT32, count) for name, count in counts.items()}
    changed["llama-embed.attention.layer_norm_rms_epsilon"] = (ggufs.FLOAT32, 1e-5)
    changed["llama-embed.attention.causal"] = 7, False
    changed["general.architecture"] = ggufs.STRING, "llama-embed"
    return ggufs.model(path, head=None, changed=changed)


@pytest.mark.parametrize("pooling", [0, 1, 3])  # none, mean, last
def test_an_embedder_is_proven_by_its_vectors(
    pooling: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by logits that are all 0, and it has no cost."""
    source, out = embedder(tmp_path / "in.gguf", pooling), tmp_path / "out.gguf"
    argv = [str(source), str(out), "--data", str(ggufs.write_texts(tmp_path / "both", OTHERS))]
    main(argv)
    said = capsys.readouterr().out
    assert re.search(r"vectors of \d+ passages, by OUT's tokens: IN's bit for bit", said)
    assert "bits per byte" not in said and "log-prob" not in said
    record = json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["record"]
    assert record["distance"] == 0 and record["beginnings"] >= 20
    data = bytearray(out.read_bytes())
    data[-20] ^= 0x40  # of the last norm
    out.write_bytes(data)
    monkeypatch.setattr("lib.commands.trim.file._same_bytes", lambda *_: "")
    with pytest.raises(UserError, match="vectors differ by"):
        main([*argv, "--verify"])


def test_logits_that_are_not_computed_prove_nothing(texts: Path, tmp_path: Path) -> None:
    """Whatever the file's fields say."""
    table = np.zeros((502, 4 * ggufs.WIDTH), np.uint8)
    more = {"output.weight": ((ggufs.WIDTH, 502), ggufs.F32, table)}
    source, out = ggufs.model(tmp_path / "in.gguf", more=more), tmp_path / "out.gguf"
    main([str(source), str(out), "--data", str(texts)])
    record = json.loads(Path(f"{out}.vocabulary.json").read_text("utf-8"))["record"]
    assert "llama.cpp computes no finite values" in record["reason"] and "distance" not in record


CHILD = """
import os, signal
from lib.gguf.predictions import *
own = values_of

def values_of(**given):
    fault = {fault!r}
    if bool(given["own"]) != ({of!r} == "IN"):
        return own(**given)
    if fault == "refused":
        return {{"reason": "llama.cpp does not load it"}}
    os.kill(os.getpid(), getattr(signal, fault))
"""


@pytest.mark.parametrize(
    ("of", "fault"),
    [("IN", "SIGABRT"), ("IN", "refused"), ("OUT", "SIGABRT"), ("OUT", "refused")]
    + [("OUT", "SIGKILL")],
)
def test_only_a_difference_deletes_a_finished_file(
    of: str,
    fault: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As one is what llama.cpp does with OUT alone; a kill tells nothing, as where memory ends."""
    source, out = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    (tmp_path / "child.py").write_text(CHILD.format(of=of, fault=fault))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    own, argv = values_of, [str(source), str(out), "--data", str(texts)]
    spoiled = SimpleNamespace(__module__="child", __name__="values_of")
    monkeypatch.setattr("lib.gguf.predictions.values_of", spoiled)
    if of == "OUT" and fault != "SIGKILL":
        with pytest.raises(UserError, match="IN runs, and it does not"):
            main(argv)
        assert [path.name for path in tmp_path.glob("out*")] == []
        return
    if of == "IN":
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--most_cost", "2%"])
        assert ended.value.code == 3 and not out.exists()
        assert "the cost of trimming cannot be measured" in capsys.readouterr().err
    main(argv)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not verified: predictions") and fault in last + "refused"
    check(source, out)
    monkeypatch.setattr("lib.gguf.predictions.values_of", own)
    before = {path: path.read_bytes() for path in tmp_path.glob("out*")}
    main([*argv, "--verify"])
    assert "log-probabilities after 24 beginnings" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out*")}


def test_a_file_is_proven_by_its_own_original(texts: Path, tmp_path: Path) -> None:
    source, out = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    with pytest.raises(UserError, match="there is no out.gguf"):
        main([str(source), str(out), "--verify"])
    main([str(source), str(out), "--data", str(texts)])
    other = ggufs.model(tmp_path / "other.gguf", table=ggufs.F16)
    with pytest.raises(UserError, match="that IN and OUT belong together"):
        main([str(other), str(out), "--verify"])
    main([str(source), str(out), "--verify"])  # without texts of a language


def test_what_has_appeared_since_the_start_is_not_replaced(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf"

    appears_meanwhile(out, monkeypatch)
    with pytest.raises(UserError, match="The new file is out.gguf.partial: rename it"):
        main([str(source), str(out), "--data", str(texts)])
    assert out.read_bytes() == b"theirs"
    (tmp_path / "out.gguf.partial").replace(out)
    (tmp_path / "out.gguf.partial.vocabulary.json").rename(f"{out}.vocabulary.json")
    check(source, out)


def test_little_text_is_said_and_what_costs_too_much_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rule of `compress`, unless --most_cost says otherwise."""
    monkeypatch.setattr("lib.commands.trim.choosing.MOST_COST", MOST_COST)
    source, out = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    few = ggufs.write_texts(tmp_path / "few", OTHERS, 1)
    argv = [str(source), str(out), "--data", str(few)]
    with pytest.raises(UserError, match="trimming costs .* Give more text") as refused:
        main(argv)
    assert refused.value.what == "--most_cost 0.02 (default)" and not out.exists()
    said = capsys.readouterr().out
    assert "little text: 1 test document of " in said and "Give 24 test documents" in said
    cost = re.search(r"at most ([+\d.]+)% bits per byte on", said)  # few have no interval
    assert float(cost[1]) > 2 and "more than" not in said
    main([*argv, "--most_cost", "200%"])
    said = capsys.readouterr().out
    assert re.search(r"log-probabilities after [1-9]\d* beginnings", said) and out.exists()


def test_without_test_text_there_is_no_cost(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines in scripts that were removed would tell nothing about a language; they prove OUT."""
    source, out = ggufs.model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    main([str(source), str(out), "--data", str(texts)])
    capsys.readouterr()
    main([str(source), str(tmp_path / "b.gguf"), "--keep", f"{out}.vocabulary.json"])
    said = capsys.readouterr().out
    assert "bits per byte" not in said and "little text" not in said
    assert "log-probabilities after 24 beginnings" in said
    assert said.endswith("not verified: cost (no test text is given)\n")


def test_neither_torch_nor_transformers_nor_tokenizers(texts: Path, tmp_path: Path) -> None:
    source = ggufs.model(tmp_path / "in.gguf")
    heavy = "torch,transformers,tokenizers,datasets,pandas,huggingface_hub"
    argv = ["trim", source, tmp_path / "out.gguf", "--data", texts]
    done = ggufs.run_without(heavy, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check(source, tmp_path / "out.gguf")
