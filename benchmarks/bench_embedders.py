"""What trimming makes of an embedder: size, tokenizer, vectors and speed.

    python benchmarks/bench_embedders.py IN OUT --data texts/uk texts/en --save FILE.json
    python benchmarks/bench_embedders.py IN OUT --data texts/uk --save FILE.json --speed

IN is the original, OUT its trimmed folder, by any tool. The vectors of the same held-out texts are
compared; those of `langprune trim` are in its list. `--speed` measures sentences per second on one
thread, of both in turn; run it alone on the machine, where the tokenizers' seconds count too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lib.data.documents import Corpus
from lib.data.sources import parse_sources
from lib.util.cli import make_parser, run
from lib.vocabulary.proof import MANY
from lib.vocabulary.vectors import Encoder, _texts, compare_vectors

ROUNDS, EACH = 5, 20  # of sentences, for the speed
LOAD = """
import json, sys, time, psutil
from tokenizers import Tokenizer
process = psutil.Process()
before, start = process.memory_info().rss, time.perf_counter()
tokenizer = Tokenizer.from_file(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps([seconds, process.memory_info().rss - before]))
"""


def main(arguments: list[str]) -> None:
    args = _parser().parse_args(arguments)
    sources = parse_sources(args.data, "--data")
    texts = [text for each in sources for text in islice(Corpus(each).documents("test"), MANY)]
    folders = [Path(args.model), Path(args.trimmed)]
    record = {"model": folders[0].name, "trimmed": folders[1].name, "tool": args.tool}
    record["data"] = [each.name for each in sources]
    if args.speed:
        torch.set_num_threads(1)
        sentences = _texts(folders[0], texts)["sentences"][: ROUNDS * EACH]
        encoders, seconds = [Encoder(each) for each in folders], ([], [])
        for encoder in encoders:
            encoder(sentences[0])
        for number in range(ROUNDS):
            for encoder, times in zip(encoders, seconds, strict=True):
                start = time.perf_counter()
                for each in sentences[number * EACH : (number + 1) * EACH]:
                    encoder(each)
                times.append(EACH / (time.perf_counter() - start))
        record["sentences_per_second"] = [statistics.median(times) for times in seconds]
    for name, folder in zip(("before", "after"), folders, strict=True):
        (file,) = folder.rglob("tokenizer.json")
        tensors = [t for f in file.parent.glob("*.safetensors") for t in load_file(f).values()]
        whole = [path for path in folder.rglob("*") if path.is_file() and "/." not in str(path)]
        loads = [
            json.loads(subprocess.check_output([sys.executable, "-c", LOAD, file]))
            for _ in range(3)
        ]
        seconds, memory = (statistics.median(each) for each in zip(*loads, strict=True))
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        ids = [i for each in tokenizer.encode_batch_fast(texts) for i in each.ids]
        record[name] = {
            "rows": tokenizer.get_vocab_size(),
            "held_out_tokens": len(ids),
            "held_out_unknown": ids.count(tokenizer.token_to_id("<unk>")),
            "parameters": sum(tensor.numel() for tensor in tensors),
            "bytes": sum(path.stat().st_size for path in whole),
            "tokenizer_bytes": file.stat().st_size,
            "tokenizer_memory": memory,
        }
        if args.speed:
            record[name]["tokenizer_seconds"] = seconds
    listed = folders[1] / "vocabulary.json"
    if listed.is_file():  # of langprune, which has compared them
        record["vectors"] = json.loads(listed.read_text("utf-8"))["record"]["vectors"]
    elif not args.speed:
        old, new = (
            Tokenizer.from_file(str(next(each.rglob("tokenizer.json")))).get_vocab()
            for each in folders
        )
        ids = [old[token] for token in sorted(new, key=new.get)]
        size = record["before"]["parameters"]
        record["vectors"] = compare_vectors(*folders, ids, texts, size)
    file, names = Path(args.save), ("model", "tool", "data")
    records = json.loads(file.read_text("utf-8")) if file.is_file() else []
    known = {str([each[name] for name in names]): each for each in records}
    key = str([record[name] for name in names])
    record = known[key] = known.get(key, {}) | record  # in its place
    text = json.dumps([*known.values()], indent=1, ensure_ascii=False)
    file.write_text(f"{text}\n", "utf-8")
    print(json.dumps(record, indent=1))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("", __doc__)
    add = parser.add_argument
    add("model", metavar="IN", help="folder of the original")
    add("trimmed", metavar="OUT", help="folder of the trimmed one")
    add("--data", nargs="+", required=True, metavar="SOURCE", help="texts, of which test is read")
    add("--tool", default="langprune", help="what has trimmed it")
    add("--save", required=True, metavar="FILE.json", help="list to add the record to")
    add("--speed", action="store_true", help="measure sentences per second")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
