"""`compare` on tiny GGUF files: figures by the definitions, vocabularies, resuming, bad input."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ggufs  # noqa: E402

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from lib.commands.compare import __main__ as command  # noqa: E402
from lib.commands.compare import measure  # noqa: E402
from lib.commands.compare.passages import passages_of  # noqa: E402
from lib.commands.trim import choosing  # noqa: E402
from lib.data.documents import Corpus  # noqa: E402
from lib.data.sources import parse_source  # noqa: E402
from lib.gguf.file import GgufFile, write  # noqa: E402
from lib.gguf.llama import Llama, speeds  # noqa: E402
from lib.gguf.vocabulary import GgufVocabulary  # noqa: E402
from lib.util.errors import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
REFERENCE, NEAR, FAR = "reference", "near", "far"


def with_noise(path: Path, noise: float, **options: object) -> Path:
    """The model of `ggufs` with some noise in its table, which is its head too."""
    rows = len(ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"][1])
    own, other = (ggufs.blocks(ggufs.F32, rows, ggufs.WIDTH, s).view(np.float32) for s in (8, 88))
    table = ((ggufs.WIDTH, rows), ggufs.F32, (0.5 * own + noise * other).view(np.uint8))
    return ggufs.model(path, head=None, more={"token_embd.weight": table}, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for name, noise in ((REFERENCE, 0.0), (NEAR, 0.05), (FAR, 0.4)):
        with_noise(folder / f"{name}.gguf", noise)
    ggufs.write_texts(folder / "uk", ggufs.UK)
    ggufs.write_texts(folder / "en", ggufs.EN)
    return folder


@pytest.fixture(autouse=True)
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not measured, as that starts a process and a server for each file."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(measure, "run_child", lambda *_, **__: [100.0, 10.0])


def compare(*argv: object) -> None:
    command.main([*map(str, argv)])


def files(*names: str) -> list[str]:
    return [f"{name}.gguf" for name in names]


def kept(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text("utf-8"))


def logs_of(file: str, windows: list[list[int]]) -> list[np.ndarray]:
    """The log-probabilities of all tokens, (tokens, rows), slowly."""
    logs = []
    with closing(Llama(file)) as model:
        for _, _, logits in model.logits(windows):
            logits = logits[:-1].astype(np.float64)
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return logs


def test_figures_are_those_of_the_definitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare(*files(REFERENCE, NEAR, FAR), "--data", "uk", "en", "--passages", 8, "--out", out)
    said, record = capsys.readouterr().out, kept(out)
    rows = [*csv.DictReader((out / "table.csv").open(encoding="utf-8"))]
    assert [(row["Text"], row["File"]) for row in rows] == [
        (text, name) for text in ("uk", "en") for name in (REFERENCE, NEAR, FAR)
    ]
    row = rows[1]
    texts = [json.loads(line)["text"] for line in Path("uk/test.jsonl").open(encoding="utf-8")]
    chosen = texts[::5]  # 8 of 40, spread over all
    assert record["asked"]["texts"]["uk"]["bytes"] == [len(text.encode()) for text in chosen]
    with closing(Llama(f"{REFERENCE}.gguf", tokenizer_alone=True)) as tokenizer:
        windows = [[tokenizer.first, *tokenizer.encode(text).tolist()] for text in chosen]
    logs = [logs_of(f"{name}.gguf", windows) for name in (REFERENCE, NEAR)]
    kl = [(np.exp(a) * (a - b)).sum(-1) for a, b in zip(*logs, strict=True)]
    nats = [
        -np.array(
            [each[np.arange(len(w) - 1), w[1:]].sum() for each, w in zip(own, windows, strict=True)]
        )
        for own in logs
    ]
    every, size = np.concatenate(kl), sum(len(text.encode()) for text in chosen)
    found = record["compared"][NEAR]["uk"]
    assert found["kl_by_document"] == pytest.approx([each.mean() for each in kl], rel=1e-4)
    assert found["kl"]["99%"] == pytest.approx(np.quantile(every, 0.99), rel=1e-4)
    assert found["kl"]["largest"] == pytest.approx(every.max(), rel=1e-4)
    equal = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(*logs, strict=True)])
    assert found["equal"] == equal.mean() and 0.2 < equal.mean() < 1
    assert float(row["KL, mean, ↓"]) == pytest.approx(every.mean(), rel=1e-3)
    bits = nats[1].sum() / math.log(2) / size
    assert float(row["Bits per byte, ↓"]) == pytest.approx(bits, abs=1e-4)
    over, low, high = map(float, re.findall(r"[+-][\d.]+", row["Over the reference (%), ↓"]))
    ratio = nats[1].sum() / nats[0].sum() - 1
    assert over == pytest.approx(100 * ratio, abs=0.01) and low < over < high
    assert (row["Prompt (tokens/s), ↑"], row["Generation (tokens/s), ↑"]) == ("100.0", "10.0")
    assert rows[0]["KL, mean, ↓"] == ""
    # the nearer file is the best in each text, and pairs are told
    bold = re.findall(r"\| (\w+) +\| (\w+) +\|[^|]*\*\*", said)
    assert bold == [("uk", NEAR), ("en", NEAR)]
    assert f"in uk {NEAR} needs " in said and f" bits per byte than {REFERENCE}" in said
    assert f"| {NEAR} | {FAR}     | KL " in said
    assert (out / "table.md").read_text("utf-8") in said
    assert (out / "sizes.png").is_file() == bool(find_spec("matplotlib"))


def test_a_file_beside_its_copy(tmp_path: Path) -> None:
    with_noise(Path("copy.gguf"), 0.0)
    out = tmp_path / "out"
    compare(*files(REFERENCE, "copy"), "--data", "uk", "--passages", 4, "--out", out)
    found = kept(out)["compared"]["copy"]["uk"]
    assert set(found["kl"].values()) == {0.0} and found["equal"] == 1.0
    losses = kept(out)["losses"]
    assert losses["copy"] == losses[REFERENCE] and not found["renormalized"]


def trimmed(source: str, out: str, texts: list[str]) -> Path:
    """The file with only the tokens of texts, and those that any text may need."""
    vocabulary = GgufVocabulary(GgufFile(Path(source), source))
    with closing(Llama(source, tokenizer_alone=True)) as tokenizer:
        used = {int(i) for ids in tokenizer.encode_all(texts) for i in ids}
    rest = set(range(300))  # bytes and special tokens
    rows = sorted(used | rest)
    for _ in write(Path(out), *vocabulary.trimmed(rows)):
        pass
    return Path(out)


def test_a_trimmed_file_is_compared_on_its_own_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [json.loads(line)["text"] for line in Path("uk/train.jsonl").open(encoding="utf-8")]
    trimmed(f"{REFERENCE}.gguf", "small.gguf", whole)
    for order in ((REFERENCE, "small"), ("small", REFERENCE)):
        out = tmp_path / order[0]
        compare(*files(*order), "--data", "uk", "--passages", 8, "--out", out)
        record = kept(out)
        found = record["compared"][order[1]]["uk"]
        left_out = dict(zip(order, found["left_out"], strict=True))
        assert max(found["kl"].values()) < 1e-9 and found["equal"] == 1.0
        assert len(found["documents"]) == 8 and found["renormalized"]
        assert left_out["small"] == 0 and 0.01 < left_out[REFERENCE] < 0.9
        said = capsys.readouterr().out
        assert f"on 8 of 8 documents; left out are {found['left_out'][0]:.2%} of the ref" in said
    # the whole file's loss is on its own tokens, which are others, so it runs a second time
    opened = measure.open_files(files(REFERENCE, "small"))
    passage = measure.Passage("", whole[0])
    assert len({len(each.window(passage)) for each in opened}) == 2
    compare(*files(REFERENCE, NEAR), "--data", "uk", "--passages", 8, "--out", tmp_path / "plain")
    plain = kept(tmp_path / "plain")["losses"][REFERENCE]["uk"]
    assert record["losses"][REFERENCE]["uk"] == pytest.approx(plain, rel=1e-5)


def test_documents_whose_tokens_both_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, tokens = ggufs.tokenizer("gpt2")["tokenizer.ggml.tokens"]
    with closing(Llama(f"{REFERENCE}.gguf", tokenizer_alone=True)) as tokenizer:
        texts = [json.loads(line)["text"] for line in Path("uk/test.jsonl").open(encoding="utf-8")]
        ids = [set(tokenizer.encode(text).tolist()) for text in texts[::5]]
    some = next(i for i in sorted(set.union(*ids)) if 0 < sum(i in each for each in ids) < 8)
    unused = next(i for i in reversed(range(len(tokens))) if not any(i in each for each in ids))
    for name, row in (("mine", some), ("theirs", unused)):
        renamed = [f"[{name}]" if i == row else token for i, token in enumerate(tokens)]
        changed = {"tokenizer.ggml.tokens": (kind, renamed)}
        with_noise(Path(f"{name}.gguf"), 0.0, changed=changed)
    compare(*files("theirs", "mine"), "--data", "uk", "--passages", 8, "--out", tmp_path / "out")
    found = kept(tmp_path / "out")["compared"]["mine"]["uk"]
    assert found["documents"] == [n for n, each in enumerate(ids) if some not in each]
    assert max(found["kl"].values()) < 1e-9 and min(found["left_out"]) > 0
    assert f"on {len(found['documents'])} of 8 documents" in capsys.readouterr().out


def test_another_tokenizer_has_bits_per_byte_alone(capsys: pytest.CaptureFixture[str]) -> None:
    ggufs.model(Path("other.gguf"), "llama")
    compare(*files(REFERENCE, "other"), "--data", "uk", "--passages", 4)
    said = capsys.readouterr().out
    assert "- other, uk: it has other tokens, so bits per byte alone are compared" in said
    assert "KL, mean" not in said and "Over the reference (%)" in said


def test_without_a_reference_each_is_compared_with_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    compare(
        *files(REFERENCE, NEAR, FAR),
        "--data",
        "uk",
        "--passages",
        4,
        "--no_reference",
        "--out",
        out,
    )
    said, record = capsys.readouterr().out, kept(out)
    assert len(re.findall(r"(?m)^\| uk +\| \w+ +\| \w+ +\| bits per byte ", said)) == 3
    assert "KL, mean" not in said and "Over the" not in said and not record["compared"]
    compare(*files(REFERENCE, NEAR), "--data", "uk", "--passages", 4, "--out", tmp_path / "with")
    theirs = kept(tmp_path / "with")["losses"]
    for name, losses in theirs.items():
        assert record["losses"][name]["uk"] == pytest.approx(losses["uk"], rel=1e-6)


def test_many_pairs_stand_in_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.commands.compare.table.MOST_PAIRS", 1)
    argv = [*files(REFERENCE, NEAR, FAR), "--data", "uk", "--passages", 4]
    compare(*argv, "--out", tmp_path / "out")
    said, kept_table = capsys.readouterr().out, (tmp_path / "out/table.md").read_text("utf-8")
    assert "the differences of pairs are 2 lines, which table.md in --out has" in said
    assert "p (Holm)" in kept_table and "p (Holm)" not in said


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*files(REFERENCE, NEAR, FAR), "--data", "uk", "en", "--passages", 4, "--out"]
    compare(*argv, tmp_path / "whole")
    run, calls = measure._run, []

    def stopped(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "_run", stopped)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            compare(*argv, tmp_path / "out")
    found = kept(tmp_path / "out")["compared"]
    assert {name: [*its] for name, its in found.items()} == {NEAR: ["uk"], FAR: ["uk"]}
    calls.clear()
    calls.append(None)  # the third call would not stop
    calls.append(None)
    monkeypatch.setattr(measure, "_run", stopped)
    compare(*argv, tmp_path / "out")
    assert len(calls) == 3
    for name in ("compare.json", "table.csv", "table.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(UserError, match="of other files, texts or versions. Name a new folder"):
        compare(*files(REFERENCE, FAR), "--data", "uk", "--passages", 4, "--out", tmp_path / "out")


def test_files_that_run_together_have_the_figures_of_each_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [json.loads(line)["text"] for line in Path("uk/train.jsonl").open(encoding="utf-8")]
    trimmed(f"{REFERENCE}.gguf", "between.gguf", whole)
    names, run, together = files(REFERENCE, NEAR, "between", FAR), measure._run, {8: [], 1: []}

    def counted(every: list[measure.File], *rest: object) -> object:
        together[measure.TOGETHER].append(len(every))
        return run(every, *rest)

    monkeypatch.setattr(measure, "_run", counted)
    for most in together:
        monkeypatch.setattr(measure, "TOGETHER", most)
        compare(*names, "--data", "uk", "en", "--passages", 4, "--out", tmp_path / str(most))
    assert together == {8: [2, 2, 3, 3], 1: [2] * 6}
    many, alone = (kept(tmp_path / str(most)) for most in (8, 1))
    assert many == alone


def test_more_files_join_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["--data", "uk", "--passages", 4, "--out"]
    compare(*files(REFERENCE, NEAR, FAR), *more, tmp_path / "whole")
    compare(*files(REFERENCE, FAR), *more, tmp_path / "out")
    losses = kept(tmp_path / "out")["losses"]
    run, calls = measure._run, []
    monkeypatch.setattr(measure, "_run", lambda *args: calls.append(args) or run(*args))
    compare(*files(REFERENCE, NEAR, FAR), *more, tmp_path / "out")
    assert len(calls) == 1 and kept(tmp_path / "out")["losses"][FAR] == losses[FAR]
    for name in ("table.csv", "table.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_passages_are_beginnings_that_fit_all_files(place: Path) -> None:
    short = {"llama.context_length": (ggufs.UINT32, 40)}
    with_noise(Path("short.gguf"), 0.0, changed=short)
    opened = measure.open_files(files(REFERENCE, "short"))
    long = [" ".join(ggufs.UK * 40), *ggufs.sentences(ggufs.UK, 9)]
    corpus = Corpus(parse_source("uk", "--data"), rows=long)
    for some, limit in ((opened[:1], 512), (opened, 40)):
        passages = passages_of({"mine": corpus}, some, 10)["mine"]
        texts = [passage.text for passage in passages]
        assert all(map(str.startswith, long, texts)) and texts[0] != long[0]
        sizes = [len(opened[0].window(passage)) for passage in passages]
        assert max(sizes) == sizes[0] and limit - 4 < sizes[0] <= limit
        longer = measure.Passage("", long[0][: len(texts[0]) + 9])
        assert len(opened[0].window(longer)) > limit


def test_only_the_last_answers_of_dialogues_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ggufs.sentences(ggufs.UK, 40)
    chats = [[{"role": "user", "content": text}] for text in texts]
    for number, chat in enumerate(chats[::2]):
        chat += [{"role": "assistant", "content": texts[number]}, chat[0]]  # no answer to the last
    said, out = rows("said", *({"messages": chat} for chat in chats)), tmp_path / "out"
    compare(*files(REFERENCE, NEAR), "--data", said, "--passages", 40, "--out", out)
    tests = [*Corpus(parse_source(said, "--data"), True).documents("test")]
    answered = [each.messages for each in tests if len(each.messages) > 1]
    assert f"{len(tests) - len(answered)} of {len(tests)} dialogues are left out" in (
        capsys.readouterr().out
    )
    render, record = "<|im_start|>user\n{content}<|im_end|>".format_map, kept(out)
    prompts, answers = zip(*([*map(render, chat[:2])] for chat in answered), strict=True)
    assert record["asked"]["texts"]["said"]["bytes"] == [len(each.encode()) for each in answers]
    with closing(Llama(f"{REFERENCE}.gguf", tokenizer_alone=True)) as tokenizer:
        starts = [tokenizer.encode(prompt).tolist() for prompt in prompts]
        ends = [tokenizer.encode(answer).tolist() for answer in answers]
    windows = [[*start, *end] for start, end in zip(starts, ends, strict=True)]
    logs = [logs_of(f"{name}.gguf", windows) for name in (REFERENCE, NEAR)]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        one, other = (each[number][len(start) - 1 :] for each in logs)
        nats = -other[np.arange(len(end)), end].sum()
        assert record["losses"][NEAR]["said"][number] == pytest.approx(nats, rel=1e-4)
        kl = (np.exp(one) * (one - other)).sum(-1).mean()
        found = record["compared"][NEAR]["said"]["kl_by_document"][number]
        assert found == pytest.approx(kl, rel=1e-4)


def bad(name: str) -> Path:
    path = Path(f"{name}.gguf")
    if name == "text":
        path.write_text("no GGUF")
    elif name == "cut":
        path.write_bytes(Path(f"{REFERENCE}.gguf").read_bytes()[:-5000])
    elif name == "martian":
        ggufs.model(path, changed={"general.architecture": (ggufs.STRING, "martian")})
    elif name == "pooled":
        ggufs.model(path, changed={"llama.pooling_type": (ggufs.UINT32, 1)})
    elif name == "bert":
        ggufs.model(path, "bert")
    elif name == "nan":
        table = np.full((ggufs.WIDTH, 96), np.nan, np.float32).view(np.uint8)
        ggufs.model(path, more={"blk.0.ffn_down.weight": ((96, ggufs.WIDTH), ggufs.F32, table)})
    return path


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("text", "FILE text.gguf: text.gguf is not GGUF. Name a GGUF file."),
        ("missing", "FILE missing.gguf: there is no file missing.gguf"),
        ("cut", "FILE cut.gguf: cut.gguf is truncated or damaged"),
        ("martian", "FILE martian.gguf: llama.cpp does not load it (unknown model architecture"),
        ("pooled", "FILE pooled.gguf: it embeds texts, and predicts no next token. Leave it out."),
        ("bert", "FILE bert.gguf: it embeds texts, and predicts no next token. Leave it out."),
        ("nan", "FILE nan.gguf: llama.cpp computes no finite values for it. Leave it out."),
        (REFERENCE, "FILE reference.gguf: it is named twice. Name it once."),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_files_are_named_in_one_line(name: str, line: str) -> None:
    bad(name)
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        compare(f"{REFERENCE}.gguf", f"{name}.gguf", "--data", "uk", "--passages", 2)


def rows(name: str, *documents: dict) -> str:
    text = "\n".join(json.dumps(each) for each in documents)
    Path(f"{name}.jsonl").write_text(text, "utf-8")
    return f"{name}.jsonl"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--data", "uk", "--gpu_layers", "3"], "--gpu_layers 3: the installed xllamacpp computes"),
        (["--data", "uk", "--out", "uk"], "--out uk: it holds "),
        (
            ["--data", "uk", "--out", "odd"],
            "--out odd: it holds a comparison of other files",
        ),
        ([], "FILE reference.gguf: no text to compare on is named. Give --language or --data."),
        (["--data", "uk", "--passages", "1"], "--data uk: --passages 1 gives 1 of its 40 test doc"),
        (["--data", "one.jsonl"], "--data one.jsonl: it has 5 characters, too few to hold out"),
        (["--data", "asked.jsonl"], "--data asked.jsonl: --passages 32 gives 0 of its 4 test doc"),
        (["--language", "xx-nonsense-zz-q"], "--language xx-nonsense-zz-q: it is not a language"),
    ],
)
def test_bad_texts_and_flags_are_named_in_one_line(argv: list[str], line: str) -> None:
    rows("one", {"text": "words"})
    Path("odd").mkdir(exist_ok=True)
    Path("odd/compare.json").write_text("{}")
    rows("asked", *({"messages": [{"role": "user", "content": str(n)}]} for n in range(40)))
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        compare(*files(REFERENCE, NEAR), *argv)


def test_one_file_is_not_enough() -> None:
    with pytest.raises(UserError, match="it is the only file. Name two or more."):
        compare(f"{REFERENCE}.gguf", "--data", "uk")


def test_texts_of_languages_have_the_names_of_their_tags(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from local folders here, and are those of the test split."""
    monkeypatch.setattr(choosing, "language_text", lambda tag: (tag, {"uk-UA": "uk"}[tag]))
    compare(*files(REFERENCE, NEAR), "--language", "uk-UA", "--data", "en", "--passages", 3)
    said = capsys.readouterr().out
    assert re.findall(r"(?m)^\| ([\w-]+) +\| near +\| +\d", said) == ["uk-UA", "en"]
    assert re.search(rf"- in uk-UA {NEAR} needs .* than {REFERENCE}.*; in en \d", said)


def test_what_is_doubtful_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few documents, another script than the language's, and too little memory for two files."""
    monkeypatch.setattr(command, "available", lambda: 1000)
    name = rows("pl", *({"text": text} for text in ggufs.sentences(ggufs.UK, 40)))
    compare(*files(REFERENCE, NEAR), "--data", name)
    said = capsys.readouterr().out
    assert "pl: only 4 test documents, a tenth of its documents, so intervals are wide\n" in said
    assert "pl: most letters are CYRILLIC, and those of pl are LATIN\n" in said
    assert re.search(r"memory: two files take [\d.]+ MiB, and 1 KiB are free, so they may be", said)


def test_it_runs_without_torch_and_measures_speed(place: Path) -> None:
    heavy = "torch,transformers,tokenizers,pandas,matplotlib"
    argv = [f"{REFERENCE}.gguf", f"{NEAR}.gguf", "--data", "uk", "--passages", "4"]
    done = ggufs.run_without(heavy, "compare", *argv, cwd=place)
    assert done.returncode == 0, done.stderr
    speeds = re.findall(
        r"(?m)^\| (?:reference|near) +\| +1\.\d \| +([\d,.]+) \| +([\d,.]+) \|", done.stdout
    )
    assert len(speeds) == 2 and all(float(each.replace(",", "")) > 1 for s in speeds for each in s)
    assert done.stdout.endswith("\n\n\n")  # none of the heavy packages


def test_a_file_that_lacks_a_tensor_is_refused_before_its_server_starts() -> None:
    file = ggufs.model(Path("broken.gguf"), more={"blk.0.ffn_down.weight": None})
    with pytest.raises(ValueError, match="llama.cpp does not load it .*ffn_down.weight' not found"):
        speeds(str(file), [1, 2], 1)


def test_a_file_in_parts_is_one(tmp_path: Path) -> None:
    """Of which any one is named."""
    parts = [f"parts-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert len(split(Path(f"{NEAR}.gguf"), parts)) == 2
    compare(f"{NEAR}.gguf", parts[0], "--data", "uk", "--passages", 2, "--out", tmp_path / "out")
    found = kept(tmp_path / "out")["compared"][Path(parts[0]).stem]["uk"]
    assert set(found["kl"].values()) == {0.0}


def split(source: Path, names: list[str]) -> list[Path]:
    """Write the tensors of a file into two, as llama-gguf-split does."""
    from gguf import GGUFReader, GGUFWriter

    reader, written = GGUFReader(source), []
    middle = len(reader.tensors) // 2
    for number, tensors in enumerate((reader.tensors[:middle], reader.tensors[middle:])):
        writer = GGUFWriter(names[number], "llama")
        fields = reader.fields.values() if not number else ()
        for field in fields:
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind = field.types[0]
                more = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), kind, more)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.append(Path(names[number]))
    return written
