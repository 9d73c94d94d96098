"""What a user names becomes a source and its texts, or one line that says why not."""

import errno
import gzip
import io
import json
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from pyarrow import parquet
from support import LIMIT, start
from tiny import write_texts

from lib.data import documents
from lib.data.documents import check_source, open_documents
from lib.data.sources import AGAIN, BUILT_IN, JOINED, has_test, parse_source, parse_sources
from lib.util.errors import UserError

FLAG = "--calibration_data"


def message(function, *args, **options) -> str:
    """The one line that a mistake gives; it must name the flag."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("--")
    return text


def read(source, split="train"):
    with open_documents(source, split) as (texts, _):
        return list(texts)


# --- names


def test_built_in_names():
    uber = parse_source("ubertext", FLAG)
    assert (uber.hub, uber.column, uber.stream) == (
        "mshamrai/lang-pruning-uk-uber-text-2",
        "text",
        False,
    )
    c4 = parse_source("c4", FLAG)
    assert (c4.hub, c4.train_file, c4.draw) == (
        "allenai/c4",
        "en/c4-train.00000-of-01024.json.gz",
        AGAIN,
    )
    assert parse_source("wikitext2", FLAG).draw == JOINED
    for text, hub, config in [
        ("c4:uk", "allenai/c4", "uk"),
        ("fineweb2:ukr_Cyrl", "HuggingFaceFW/fineweb-2", "ukr_Cyrl"),
        ("wikipedia:uk", "wikimedia/wikipedia", "20231101.uk"),
    ]:
        source = parse_source(text, FLAG)
        assert (source.hub, source.config, source.stream) == (hub, config, True)
        assert source.name == text and source.draw != AGAIN and source.train_file is None


def test_hub_ids():
    source = parse_source("owner/name", FLAG)
    assert (source.hub, source.config, source.split, source.column) == (
        "owner/name",
        None,
        None,
        "text",
    )
    source = parse_source("owner/name:uk::body", FLAG)
    assert (source.config, source.split, source.column) == ("uk", None, "body")
    assert source.stream and source.name == "name:uk::body"
    assert not parse_source("mshamrai/lang-pruning-uk-uber-text-2", FLAG).stream
    assert parse_source("Salesforce/wikitext:wikitext-2-raw-v1", FLAG).draw == JOINED
    assert parse_source("allenai/c4:en", FLAG).draw != AGAIN


def test_local_names(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "uk")
    assert parse_source(f"{folder}/", FLAG).name == "uk"
    monkeypatch.chdir(folder)
    assert parse_source(".", FLAG).name == "uk"
    assert parse_source("train.jsonl", FLAG).name == "train"
    (folder / "book.txt").write_text("рядок")
    assert parse_source("book.txt", FLAG).draw == JOINED
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert parse_source("owner/name", FLAG).hub is None  # what is there goes before the hub
    (tmp_path / "c4").mkdir()
    assert parse_source("c4", FLAG).hub and parse_source("./c4", FLAG).path


def test_has_test(tmp_path):
    assert has_test(parse_source(str(write_texts(tmp_path / "uk")), FLAG))
    (tmp_path / "uk" / "test.jsonl").unlink()
    assert not has_test(parse_source(str(tmp_path / "uk"), FLAG))
    assert not has_test(parse_source("ubertext", FLAG))


@pytest.mark.parametrize("text", ["nothing", "ubertexts", "wikipedia", "wikipedia:", "a b"])
def test_unknown_names_list_those_that_exist(text):
    assert all(name in message(parse_source, text, FLAG) for name in BUILT_IN)


@pytest.mark.parametrize("text", ["/no/such", "./no", "../no", "a/b/c", "no.jsonl", "a/b.txt"])
def test_missing_local_path(text):
    assert f"{FLAG} {text}: no such file" in message(parse_source, text, FLAG)


def test_unknown_file_type(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    assert ".parquet" in message(parse_source, str(tmp_path / "a.csv"), FLAG)


# --- mixtures and names told apart


def test_weights(tmp_path):
    uk, en = (str(write_texts(tmp_path / name)) for name in ("uk", "en"))
    sources = parse_sources([f"{uk}=3", f"{en}=.5"], FLAG, mixture=True)
    assert [(s.text, s.weight) for s in sources] == [(uk, 3.0), (en, 0.5)]
    equal = write_texts(tmp_path / "a=b")
    assert parse_source(str(equal), FLAG).name == "a=b"
    assert parse_source(f"{equal}=2", FLAG).weight == 2


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much", "", "0.0", "1,5"])
def test_bad_weights(weight):
    line = message(parse_sources, [f"c4={weight}", "ubertext=1"], FLAG, mixture=True)
    assert f"c4={weight}" in line and "weight" in line


def test_bad_mixtures():
    assert "every source" in message(parse_sources, ["c4=1", "ubertext"], FLAG, mixture=True)
    assert "twice" in message(parse_sources, ["c4", "c4"], FLAG)
    assert "takes no weight" in message(parse_sources, ["c4=1"], "--eval_data")


def test_equal_names_are_told_apart(tmp_path):
    folders = [write_texts(tmp_path / a / "uk") for a in ("old", "new")]
    sources = parse_sources([*map(str, folders), "c4"], FLAG)
    assert [s.name for s in sources] == ["old/uk", "new/uk", "c4"]
    names = [str(write_texts(tmp_path / a / "x" / "uk")) for a in ("one", "two")]
    assert [s.name for s in parse_sources(names, FLAG)] == names
    assert "twice" in message(parse_sources, [names[0], f"{names[0]}/"], FLAG)


# --- local files


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_folder_rows_in_order(tmp_path):
    (tmp_path / "train_b.jsonl").write_text(rows("3", "4"))
    (tmp_path / "train_a.jsonl").write_text("\n" + rows("1") + "\n" + rows("ґ2").rstrip("\n"))
    (tmp_path / "train_c.jsonl.gz").write_bytes(gzip.compress((rows("5") + "\n").encode()))
    (tmp_path / "train_0.jsonl").write_text("")
    (tmp_path / "test.jsonl").write_text(rows("t"))
    source = parse_source(str(tmp_path), FLAG)
    assert read(source) == ["1", "ґ2", "3", "4", "5"] and read(source, "test") == ["t"]
    with open_documents(source, "train") as (texts, _):
        assert [texts[i] for i in (4, 0, 3, 1, 2)] == ["5", "1", "4", "ґ2", "3"]


def test_single_files(tmp_path):
    texts = ["один", "два\n\n", "three"]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "a.jsonl").write_text(rows(*texts), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows(*texts).encode()))
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz"):
        source = parse_source(str(tmp_path / name), FLAG)
        assert read(source) == read(source, "test") == texts and source.name == "a"
    (tmp_path / "a.txt").write_text("\ufeffодин\n\nдва", encoding="utf-8")
    assert read(parse_source(str(tmp_path / "a.txt"), FLAG)) == ["один\n\nдва"]


BAD_LINES = {
    b"{text}": "not JSON",
    b'["text"]': "not an object",
    b'{"title": "a", "id": 1}': "no column 'text'; the row has: title, id",
    b'{"text": null}': "NoneType",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "\xff"}': "not JSON",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("line", BAD_LINES)
def test_malformed_lines_name_file_and_line(tmp_path, line, packed):
    (tmp_path / "train_0.jsonl").write_text(rows("fine"))
    bad = rows("fine", "fine").encode() + b"\n" + line + b"\n"
    file = tmp_path / f"train_1.jsonl{'.gz' * packed}"
    file.write_bytes(gzip.compress(bad) if packed else bad)
    problem = message(read, parse_source(str(tmp_path), FLAG))
    assert f"{file}, line 4: " in problem and BAD_LINES[line] in problem


def test_check_reads_the_first_row_of_each_file(tmp_path):
    (tmp_path / "train_0.jsonl").write_text("\n" + rows("1") + "{")
    (tmp_path / "train_1.jsonl.gz").write_bytes(gzip.compress(rows("1").encode() * 9)[:-1])
    source = parse_source(str(tmp_path), FLAG)
    check_source(source, "train")
    assert "train_0.jsonl, line 3" in message(read, source)
    (tmp_path / "train_2.jsonl").write_text("\n{")
    assert "train_2.jsonl, line 2" in message(check_source, source, "train")


def test_local_rows_need_no_library(tmp_path):
    folder = write_texts(tmp_path / "uk", ["один", "два"])
    code = (
        "import sys; sys.modules |= dict.fromkeys(['datasets', 'pyarrow', 'torch', 'numpy'])\n"
        "from lib.data.documents import check_source, open_documents\n"
        "from lib.data.sources import parse_source\n"
        "source = parse_source(sys.argv[1], '--eval_data')\n"
        "check_source(source, 'train')\n"
        "with open_documents(source, 'train') as (texts, _): print(*texts)\n"
        "print('transformers' in sys.modules)"
    )
    out, err = start(["-c", code, str(folder)], tmp_path).communicate(timeout=LIMIT)
    assert out == "один два\nFalse\n", err


def test_folders_without_rows(tmp_path):
    (tmp_path / "valid.jsonl").write_text("")
    source = parse_source(str(tmp_path), FLAG)
    line = message(check_source, source, "train")
    assert "no train*.jsonl" in line and "valid.jsonl" in line
    assert "no test*.jsonl" in message(check_source, source, "test")
    (tmp_path / "train.jsonl").write_text("\n\n")
    assert "holds no text" in message(check_source, source, "train")


def test_damaged_files_are_named(tmp_path):
    packed = gzip.compress(rows(*"abc" * 100).encode())
    for name, content in {
        "short.jsonl.gz": packed[:-20],
        "none.jsonl.gz": b"not gzip",
        "bad.jsonl.gz": packed[:20] + b"\xff\xff\xff" + packed[23:],
        "bad.parquet": b"PAR1 no PAR1",
        "empty.parquet": b"",
        "bad.txt": b"\xff\xfe\x00",
    }.items():
        (tmp_path / name).write_bytes(content)
        source = parse_source(str(tmp_path / name), FLAG)
        assert name in message(read, source)
        if name != "short.jsonl.gz":  # its first row is whole
            assert name in message(check_source, source, "train")


def test_rows_are_checked_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    (tmp_path / "train_0.jsonl").write_text(rows("1", "2"))
    (tmp_path / "train_1.jsonl.gz").write_bytes(gzip.compress(rows("3", "4").encode()))
    source = parse_source(str(tmp_path), FLAG)
    assert read(source) == ["1", "2", "3", "4"]
    checked = []
    monkeypatch.setattr(documents.JsonLines, "_check", lambda *given: checked.append(given))
    with open_documents(source, "train") as (texts, _):
        assert [texts[row] for row in (3, 0, 2, 1)] == ["4", "1", "3", "2"] and not checked
    (tmp_path / "train_0.jsonl").write_text(rows("one", "2", "5"))
    assert read(source) == ["one", "2", "5", "3", "4"] and len(checked) == 3


def test_what_does_not_fit_unpacked_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(gzip.compress(rows("текст").encode()))
    source = parse_source(str(tmp_path), FLAG)
    with monkeypatch.context() as patched:
        patched.setattr(documents.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
        line = message(read, source)
    assert f"{file} does not fit into the temporary folder" in line and "set TMPDIR" in line

    class Full(io.BytesIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(documents.tempfile, "TemporaryFile", Full)
    assert "set TMPDIR" in message(read, source)


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_end_is_one_line(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(documents, "LONGEST_LINE", 50)
    text = (rows("a") + rows("б" * 50)).encode()
    file = tmp_path / f"train.jsonl{'.gz' * packed}"
    file.write_bytes(gzip.compress(text) if packed else text)
    assert f"{file}, line 2: longer than" in message(read, parse_source(str(tmp_path), FLAG))


def test_damaged_inside_of_a_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["текст"] * 50 + list("abcdef")}), file)
    content = bytearray(file.read_bytes())
    content[4:40] = b"\xff" * 36
    file.write_bytes(content)
    assert "a.parquet" in message(check_source, parse_source(str(file), FLAG), "train")


def test_parquet_columns(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), file)
    assert "id, body" in message(check_source, parse_source(str(file), FLAG), "train")
    parquet.write_table(pyarrow.table({"text": [None, "a"]}), file)
    assert "row 0" in message(check_source, parse_source(str(file), FLAG), "train")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    assert "holds no text" in message(check_source, parse_source(str(file), FLAG), "train")
    (tmp_path / "a.txt").write_text(" \n")
    text = parse_source(str(tmp_path / "a.txt"), FLAG)
    assert "holds no text" in message(check_source, text, "train")


# --- the hub


def test_ubertext_is_loaded_whole_and_pinned(hub):
    name = "mshamrai/lang-pruning-uk-uber-text-2"
    hub.sets[(name,)] = {"train": {"text": ["a", "b"]}, "test": {"text": ["c"]}}
    with open_documents(parse_source("ubertext", FLAG), "train") as (texts, revision):
        assert list(texts) == ["a", "b"] and revision == "c0ffee"
    assert read(parse_source("ubertext", FLAG), "test") == ["c"]
    assert hub.calls[0] == ((name,), {"revision": "c0ffee"})


def test_c4_reads_one_file_of_each_split(hub):
    hub.sets[("allenai/c4",)] = {"train": {"text": ["a"]}, "validation": {"text": ["v"]}}
    c4 = parse_source("c4", FLAG)
    assert read(c4) == ["a"] and read(c4, "test") == ["v"]
    files = [options["data_files"] for _, options in hub.calls]
    assert files == [
        {"train": "en/c4-train.00000-of-01024.json.gz"},
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    ]


def test_streams(hub):
    hub.sets[("allenai/c4", "uk")] = {"train": {"text": ["a"]}, "validation": {"text": ["v"]}}
    source = parse_source("c4:uk", FLAG)
    assert read(source) == [(0, "a")] and read(source, "test") == [(0, "v")]
    assert hub.calls[0][1]["streaming"] is True
    check_source(source, "train")


def test_a_set_without_test_is_parted(hub):
    """The first 1,100 documents are the test."""
    texts = [str(number) for number in range(1102)]
    hub.sets[("owner/name", "x")] = {"train": {"text": texts}}
    source = parse_source("owner/name:x", FLAG)
    assert read(source) == [(1100, "1100"), (1101, "1101")]
    assert read(source, "test")[:2] == [(0, "0"), (1, "1")]
    assert len(read(parse_source("owner/name:x:train", FLAG))) == 1102
    hub.sets[("owner/name", "x")] = {"train": {"text": texts[:1100]}}
    check_source(source, "train")
    assert "holds 1100 rows, of which the first 1100 are the test" in message(read, source)
    nothing = datasets.IterableDataset.from_generator(lambda: iter([]))
    hub.sets[("owner/name", "x")] = {"train": nothing}
    assert "holds 0 rows" in message(check_source, source, "train")


def test_a_split_without_rows_is_refused(hub):
    hub.sets[("mshamrai/lang-pruning-uk-uber-text-2",)] = {"train": {"text": []}}
    line = message(check_source, parse_source("ubertext", FLAG), "train")
    assert line.endswith("the split 'train' is empty; name another")


def test_what_the_hub_set_lacks(hub):
    hub.sets[("owner/name",)] = {"dev": {"body": ["a"]}, "train": {"body": ["a"], "id": [1]}}
    assert "dev, train" in message(check_source, parse_source("owner/name::tset", FLAG), "test")
    assert "body, id" in message(check_source, parse_source("owner/name", FLAG), "train")
    assert "int, not text" in message(read, parse_source("owner/name:::id", FLAG))
    check_source(parse_source("owner/name:::body", FLAG), "train")


def test_configs_are_named(hub, monkeypatch):
    names, default = [f"2023.{a}{b}" for a in "abcu" for b in "abck"], None
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda hub, revision: names)
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda hub, revision: default)
    hub.error = ValueError("what it says\nis of no matter")
    line = message(check_source, parse_source("wikipedia:uk", FLAG), "train")
    assert "no config '20231101.uk'" in line and "2023.uk" in line and "16 in all" in line
    names = names[:2]
    line = message(check_source, parse_source("owner/name", FLAG), "train")
    assert "needs a config: 2023.aa, 2023.ab; name one as owner/name:CONFIG" in line
    default = names[0]  # then the error is of another kind
    for name in ("owner/name", f"owner/name:{names[1]}"):
        line = message(check_source, parse_source(name, FLAG), "train")
        assert line.endswith("can't be loaded: what it says")


def test_a_hub_that_refuses_is_said_in_one_line(hub):
    answer = SimpleNamespace(status_code=429, headers={}, request=None)
    hub.error = HfHubHTTPError("429 Too Many Requests\nmore", response=answer)
    line = message(check_source, parse_source("owner/name", FLAG), "train")
    assert line.endswith("the hub refused: 429 Too Many Requests; try again later")


@pytest.mark.parametrize(
    "error",
    [DatasetNotFoundError("x\ny"), RuntimeError("scripts\nx"), FileNotFoundError("no file")],
)
def test_what_datasets_raises_is_one_line(hub, error):
    hub.error = error
    assert message(check_source, parse_source("owner/name", FLAG), "train")


def test_a_stream_that_breaks_is_one_line(hub):
    def broken():
        yield {"text": "a"}
        raise HTTPError("slow")

    train = datasets.IterableDataset.from_generator(broken)
    hub.sets[("owner/name",)] = {"test": {"text": ["a"]}, "train": train}
    assert "can't be reached" in message(read, parse_source("owner/name", FLAG))


@pytest.fixture
def unreachable(hub, monkeypatch, tmp_path):
    """A hub that does not answer; load_dataset finds what was downloaded before."""
    hub.unreachable = HTTPError("no route")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path / "hub"))
    return hub


def test_a_hub_out_of_reach_is_said_at_once(unreachable, tmp_path):
    source = parse_source("ubertext", FLAG)
    assert "can't be reached (no route)" in message(check_source, source, "train")
    (tmp_path / "hub").mkdir()
    assert "can't be reached (no route)" in message(check_source, source, "train")
    assert not unreachable.calls


def test_what_was_downloaded_serves_without_the_hub(unreachable, tmp_path):
    for name in ("mshamrai/lang-pruning-uk-uber-text-2", "owner/name"):
        place = tmp_path / "hub" / f"datasets--{name.replace('/', '--')}" / "snapshots" / "c0ffee"
        place.mkdir(parents=True)
        unreachable.sets[(name,)] = {"train": {"text": ["a"]}}
    with open_documents(parse_source("ubertext", FLAG), "train") as (texts, revision):
        assert list(texts) == ["a"] and revision is None
    assert unreachable.calls == [(("mshamrai/lang-pruning-uk-uber-text-2",), {})]
    stream = parse_source("owner/name", FLAG)  # can't come from a cache
    assert "can't be reached (no route)" in message(check_source, stream, "train")


def test_unknown_set_is_neither_local_nor_on_the_hub(hub):
    answer = SimpleNamespace(status_code=401, headers={}, request=None)
    hub.unreachable = RepositoryNotFoundError("401", response=answer)
    line = message(check_source, parse_source("owner/name", FLAG), "train")
    assert "no data set owner/name on the hub" in line and "no local folder" in line


def test_offline_without_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    source = parse_source("ubertext", FLAG)
    assert "can't be reached" in message(check_source, source, "train")
    assert not list(tmp_path.iterdir())
