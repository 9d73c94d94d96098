"""What `langprune trim` makes of GGUF files: measured on files, and computed from configs.

    python benchmarks/bench_gguf_trim.py measured --files NAME=IN.gguf ... \\
        --texts uk=texts/uk uk+en=texts/uk+texts/en ... --folder SCRATCH --out JSON
    python benchmarks/bench_gguf_trim.py computed --vocabularies FOLDER GEMMA3.gguf \\
        --data texts/uk --folder SCRATCH --out JSON

`measured` trims each file for each text, in a process of its own, and records what the command
found, the bytes of tables, blocks and the rest, seconds, and the peak of llama.cpp's resident
memory with 32 tokens. Run it alone: seconds of a shared machine are worthless.

`computed` needs no model. The rows are those that the rule keeps of llama.cpp's own vocabularies in
FOLDER (ggml-vocab-*.gguf). The bytes follow from the configs in MODELS, which are those of MaxText
(https://github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/models), and from llama.cpp's
types of Q4_K_M (src/llama-quant.cpp): q4_K, but q6_K for a head or a tied table with the per-layer
table, and for values and down projections of about half the blocks. Norms, routers and fields are
left out. `card`: what a GPU saves; llama.cpp keeps input and per-layer tables on the host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.gguf.file import GgufFile, write  # noqa: E402
from lib.gguf.vocabulary import TABLES, tokenizer_model  # noqa: E402

Q4_K, Q6_K = 144 / 256, 210 / 256  # bytes of a number
# vocabulary, rows, blocks, width, heads, heads of keys, size of a head, neurons, tied
FIELDS = "vocabulary rows blocks width heads kv_heads head neurons tied".split()
MODELS: dict[str, dict[str, Any]] = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, values in {
        "Gemma 3 4B": ("gemma-3", 262144, 34, 2560, 8, 4, 256, 10240, True),
        "Gemma 3 12B": ("gemma-3", 262144, 48, 3840, 16, 8, 256, 15360, True),
        "Gemma 3 27B": ("gemma-3", 262144, 62, 5376, 32, 16, 128, 21504, True),
        "Gemma 4 E2B": ("gemma-4", 262144, 35, 1536, 8, 1, 256, 6144, True),
        "Gemma 4 E4B": ("gemma-4", 262144, 42, 2560, 8, 2, 256, 10240, True),
        "Qwen3 4B": ("qwen2", 151936, 36, 2560, 32, 8, 128, 9728, True),
        "Qwen3 8B": ("qwen2", 151936, 36, 4096, 32, 8, 128, 12288, False),
        "Qwen3 30B-A3B": ("qwen2", 151936, 48, 2048, 32, 4, 128, 128 * 768, False),  # all experts
        "Llama 3.1 8B": ("llama-bpe", 128256, 32, 4096, 32, 8, 128, 14336, False),
        "Qwen2.5-Coder 1.5B": ("qwen2", 151936, 28, 1536, 12, 2, 128, 8960, False),  # as a check
    }.items()
}
# per-layer inputs; the last blocks have no keys and values, and E2B's are twice as wide; every so
# many blocks attend to all tokens, with heads of twice the size
MODELS["Gemma 4 E2B"] |= dict(per_layer=256, shared=20, wider=2, every=5)
MODELS["Gemma 4 E4B"] |= dict(per_layer=256, shared=18, wider=1, every=6)


def sizes(config: dict[str, Any], rows: int) -> tuple[float, float]:
    """Return the bytes of tables with so many rows, and of the blocks, in Q4_K_M."""
    width, n, per_layer = config["width"], config["blocks"], config.get("per_layer", 0)
    tables = rows * (width + n * per_layer) * Q6_K if config["tied"] else rows * width * Q6_K
    tables += 0 if config["tied"] else rows * width * Q4_K
    blocks = width * n * per_layer * Q4_K  # what makes the per-layer inputs
    with_values = n - config.get("shared", 0)
    for block in range(n):
        whole = "every" in config and (block + 1) % config["every"] == 0
        head = config["head"] * (2 if whole else 1)
        has_keys = block < with_values
        neurons = config["neurons"] * (1 if has_keys else config["wider"])
        plain = 2 * width * config["heads"] * head + 2 * width * neurons + 2 * width * per_layer
        plain += has_keys * width * config["kv_heads"] * head
        blocks += plain * Q4_K
        for count, of, numbers in (
            (block, with_values, has_keys * width * config["kv_heads"] * head),
            (block, n, width * neurons),
        ):
            more = count < of // 8 or count >= 7 * of // 8 or (count - of // 8) % 3 == 2
            blocks += numbers * (Q6_K if more else Q4_K)
    return tables, blocks


def trim(source: Path, texts: str, out: Path, *flags: str) -> tuple[dict[str, Any], float]:
    """Run the command; return its record and seconds."""
    argv = [sys.executable, "-m", "lib.commands", "trim", str(source), str(out)]
    start = time.monotonic()
    subprocess.run([*argv, "--data", *texts.split("+"), *flags], check=True)
    listed = out.with_name(f"{out.name}.vocabulary.json")
    return json.loads(listed.read_text("utf-8"))["record"], time.monotonic() - start


def parts(path: Path) -> dict[str, int]:
    """Return the bytes of a file by what they hold."""
    file = GgufFile(path, path.name)
    found = {"tables": 0, "blocks": 0}
    for tensor in file.tensors:
        name = "tables" if TABLES.fullmatch(tensor.name) else "blocks"
        found[name] += tensor.size
    return found | {"rest": file.size - sum(found.values())}


MEMORY = """
import sys
sys.path.insert(0, {root!r})
from lib.gguf.llama import Llama
from pathlib import Path
from lib.util.host import peak_host_memory
model = Llama(Path({path!r}))
next(model.logits([list(range(32))]))
print(peak_host_memory())
"""


def memory(path: Path) -> int:
    """Return the peak of resident memory of llama.cpp with a file, the mapped file included."""
    root = str(Path(__file__).resolve().parent.parent)
    code = MEMORY.format(root=root, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def measured(args: argparse.Namespace) -> None:
    found = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else []
    for entry in args.files:
        name, source = entry.split("=", 1)
        for named in args.texts:
            label, texts = named.split("=", 1)
            if any((each["model"], each["text"]) == (name, label) for each in found):
                continue
            out = args.folder / f"{name}-{label}.gguf".replace(" ", "-")
            record, seconds = trim(Path(source), texts, out, "--most_cost", "9999%")
            figures = {"model": name, "text": label, "seconds": seconds} | record
            figures |= {"parts_before": parts(Path(source)), "parts": parts(out)}
            figures |= {"memory_before": memory(Path(source)), "memory": memory(out)}
            found.append({key: value for key, value in figures.items() if key != "sources"})
            args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            if not args.keep:
                out.unlink()


def computed(args: argparse.Namespace) -> None:
    rows, found = {}, []
    *folder, gemma3 = args.vocabularies
    for name in dict.fromkeys(config["vocabulary"] for config in MODELS.values()):
        path = Path(gemma3) if name == "gemma-3" else Path(folder[0]) / f"ggml-vocab-{name}.gguf"
        whole, out = args.folder / f"{name}-whole.gguf", args.folder / f"{name}.gguf"
        for _ in write(whole, *tokenizer_model(GgufFile(path, path.name).fields)):
            pass
        record, _ = trim(whole, args.data, out)
        rows[name] = record["rows"]
    for name, config in MODELS.items():
        tables, blocks = sizes(config, config["rows"])
        kept = rows[config["vocabulary"]]
        figures = {"model": name, "rows_before": config["rows"], "rows": kept}
        figures |= {"tables_before": round(tables), "tables": round(sizes(config, kept)[0])}
        head = round((config["rows"] - kept) * config["width"] * Q6_K)
        found.append(figures | {"blocks": round(blocks), "card": head})
        print(json.dumps(found[-1]))
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (measured, computed):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--folder", required=True, type=Path, help="for files that are made")
        command.add_argument("--out", required=True, type=Path, metavar="JSON")
        if function is measured:
            command.add_argument("--files", nargs="+", required=True, metavar="NAME=GGUF")
            command.add_argument("--texts", nargs="+", required=True, metavar="NAME=SOURCE+SOURCE")
            command.add_argument("--keep", action="store_true", help="the trimmed files")
        else:
            command.add_argument("--vocabularies", nargs=2, required=True)
            command.add_argument("--data", required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    main()
