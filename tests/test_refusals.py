"""What bad input gets, for all commands: one line that names what is wrong, and nothing written.

A case is a command line and what its error names: `A | B` is the command line A B, of which A is
named; `A => B` is the command line A, and B is named. What lines say: words/refusals.txt.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from stat import S_ISDIR
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tiny
import torch
from approval import Words
from safetensors.torch import save_file
from support import QUICK, attempt, call, mistake, program_of, raising
from tokenizers import Tokenizer, models
from transformers import (
    ByT5Tokenizer,
    LlamaPreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lib.util.errors import UserError
from lib.util.files import exclusive_lock

pytestmark = pytest.mark.usefixtures("at_place")


class Case(NamedTuple):
    line: str  # the words after `launch.sh`, or main.py
    what: str  # what the error names first
    status: int  # 2: a flag by itself or beside others; 1: what stands behind it
    world: str = ""  # see WORLDS


def cases(start: str, text: str, status: int = 1, world: str = "") -> list[Case]:
    """A case for each line of a text."""
    found = []
    for row in text.strip().splitlines():
        line, arrow, what = (part.strip() for part in row.partition("=> "))
        before, _, after = (part.strip() for part in line.partition(" | "))
        found.append(
            Case(f"{start} {before} {after}".strip(), what if arrow else before, status, world)
        )
    return found


WITH_WEIGHTS = "once weights are read"
RUN = f"main.py {' '.join(QUICK)}"
WANDA = f"{RUN} --prune_method wanda"
UK = f"{WANDA} --calibration_data uk"
TRAIN = f"{RUN} --model model --recover 64 --calibration_data"
SMALL = "compress dense small --data uk --device cpu"
SWEEP = "sweep --models model --device"
CASES = [
    # --- flags of main.py that say nothing or contradict each other
    *cases(
        "main.py --model M --prune_method wanda",
        """
        --sparsity_ratio -0.1
        --sparsity_ratio 1
        --sparsity_ratio 50
        --sparsity_ratio nan
        --sparsity_ratio half
        --sparsity_ratio 0.6 | --sparsity_type 2:4
        --sparsity_type nosuch
        --prune_method nosuch
        --use_variant | --sparsity_type 2:4
        --use_variant | --prune_method admm
        --allocation nosuch
        --allocation error | --sparsity_type 2:4
        --allocation owl | --sparsity_type 2:4
        --allocation error | --sparsity_type neurons
        --replace_sparse_layers | --sparsity_ratio 0.06
        --replace_sparse_layers --quantize q5 => --quantize
        --quantize q4_0 | --replace_sparse_layers
        --quantize iq4_nl | --replace_sparse_layers
        --quantize q4_0 | --load_bit 8
        --quantize int4 | --load_bit 4
        --nsamples 0
        --seqlen 1
        --batch_size 0
        --eval_windows 0
        --completions -1
        --date yesterday
        --recover 0
        --recover_rank 0 | --recover 9
        --recover_lr 1 | --recover 9
        --recover_ce_weight nan | --recover 9
        --recover_rank 4
        --recover_optimizer adamw8bit
        --recover_lr 0.1
        --recover_ce_weight 0.1
        --recover 64 | --sparsity_ratio 0
        --recover 64 | --load_bit 8
        --recover 64 | --offload_folder away
        --teacher T
        --recover 64 --teacher T => --teacher T
        --replace_sparse_layers | --load_bit 4
        --offload_folder away | --load_bit 4
        --sparsity_type neurons | --load_bit 4
        --sparsity_type neurons | --replace_sparse_layers
        --sparsity_ratio 0 | --sparsity_type neurons
        --prune_method contribution | --sparsity_type unstructured
        --prune_method wanda | --sparsity_type experts
        --save_masks x | --sparsity_type neurons
        --dtype float64
        --load_bit 3
        --text_only
        --text_only | --load_bit 4 --save_model new
        --prune_on_c4 | --calibration_data uk
        --vocabulary_data uk
        --eval_only
        --save= => --save
        --calibration_data= => --calibration_data
        --tasks , => --tasks ''
        --include_path tasks
        --nsample 8 => unrecognized arguments: --nsample 8
        --save_model M
        --save_model out | --save out/log
        --save_model out | --resume out/kept
        --save_model out | --offload_folder out/away
        """,
        2,
    ),
    *cases(
        "main.py --model M",
        """
        --save_model new | --eval_only
        --quantize q4_0 | --eval_only
        --recover 99 | --eval_only
        --allocation error | --eval_only
        --method_args alpha=1 | --eval_only
        --save_masks x | --eval_only
        --recover 9 | --teacher T --offload_folder away
        --completions 3 => --prune_method
        --quantize int4 => --prune_method
        """,
        2,
    ),
    *cases("main.py", "--prune_method wanda => the following arguments are required: --model", 2),
    # --- models
    *cases(
        UK,
        """
        --model owner/nosuch
        --model ./nosuch
        --model a/b/c
        --model not:an:id
        --model lost
        --model t5
        --model short
        --sparsity_type 4:8 | --model narrow
        --model gptq
        --seqlen 129 | --model model
        --device nosuch | --model model
        --device mps | --model model
        --device meta | --model model
        --device cuda:7 | --model model
        --text_only | --model model --save_model new
        --save_model mine | --model model
        --save_model taken.gguf | --model model
        --save taken.gguf/below | --model model
        --save_masks mine | --model model
        --allocation none.json | --model model
        --allocation half.json | --model model
        --prune_method none.py:Mine | --model model
        --prune_method broken.py:Mine | --model model
        --method_args alpha=1 | --model model
        --prune_method mine.py:Other | --model model
        --prune_method empty.py:Empty --model model => --sparsity_type unstructured
        --method_args nosuch=1 | --model model --prune_method mine.py:Mine
        --method_args power | --model model --prune_method mine.py:Mine
        --method_args rounds=1.5 | --model model --prune_method mine.py:Mine
        --sparsity_type neurons | --model model --prune_method mine.py:Mine
        --sparsity_type experts | --model model --prune_method mine.py:Mine
        --sparsity_type neurons | --model model --prune_method ria
        --sparsity_ratio 0.05 | --sparsity_type neurons --model model
        """,
    ),
    *(
        Case(f"{UK} --model broken/{name}", f"--model broken/{name}", 1)
        for name in (
            "no config,config cut short,unknown kind,layers,experts,tokens,adapter,no weights,"
            "weights cut short,no header,long template,no tokenizer,a pipe,a device,"
            "index of a list,index without names,index of a number,index outside,index of a device"
        )
        .replace(" ", "_")
        .split(",")
    ),
    *cases(
        f"{RUN} --quantize q4_0 --model model --calibration_data uk",
        """
        --trim_vocabulary --vocabulary_data untaught => --vocabulary_data untaught
        --trim_vocabulary | --model slow
        --trim_vocabulary | --model words
        --trim_vocabulary | --model short
        --quantize iq4_nl | --prune_method wanda
        """,
    ),
    *cases(
        TRAIN,
        """
        uk --teacher other => --teacher other
        uk --teacher foreign => --teacher foreign
        uk --teacher ./none => --teacher ./none
        uk --recover 31 --prune_method wanda => --recover 31
        uk --model four --teacher model => --recover 64
        uk --teacher four => --teacher four
        scant --teacher pruned => --calibration_data scant
        seen --teacher pruned --eval_data seen => --calibration_data seen
        """,
    ),
    *cases(
        TRAIN,
        """
        uk --teacher model => --model model
        """,
        world=WITH_WEIGHTS,
    ),
    *cases(UK, "--model broken/deeper\n--model broken/wider", world=WITH_WEIGHTS),
    # --- texts
    *cases(
        f"{WANDA} --model model",
        """
        --calibration_data nosuch
        --calibration_data ./nosuch
        --calibration_data empty
        --calibration_data blank
        --calibration_data oops
        --calibration_data uk | --nsamples 2100
        --calibration_data chat => --model model
        --calibration_data c4=0 ubertext=1 => --calibration_data c4=0
        --calibration_data c4=1 ubertext
        --calibration_data c4 | c4
        --calibration_data uk/nosuch.jsonl
        --calibration_data dump.bin
        --calibration_data bad/pipe
        --calibration_data bad/pipe/train.jsonl
        --calibration_data bad/cp1251.txt
        --calibration_data bad/cp1251.csv
        --calibration_data bad/column.csv
        --calibration_data bad/ragged.csv
        --calibration_data bad/blank.txt
        --calibration_data bad/number.jsonl
        --calibration_data bad/short.txt:test => --calibration_data bad/short.txt
        --calibration_data uk --eval_data nosuch => --eval_data nosuch
        --calibration_data uk --eval_data uk=1 => --eval_data uk
        --calibration_data uk --eval_data oops => --eval_data oops
        --calibration_data uk --eval_data word => --eval_data word
        --calibration_data uk --column body => --calibration_data uk
        """,
    ),
    # --- packages of which only some runs need one
    *cases(f"{UK} --model model --load_bit 8", "=> bitsandbytes is not", world="no bitsandbytes"),
    *cases(
        f"{UK} --model model --recover 2600 --recover_optimizer adamw8bit",
        "=> bitsandbytes is not",
        world="no bitsandbytes",
    ),
    *cases(f"{WANDA} --model model --calibration_data c4", "=> datasets is", world="no datasets"),
    *cases(f"{UK} --model model --eval_data wikitext2", "=> datasets is", world="no datasets"),
    *cases(
        f"{WANDA} --model model --calibration_data texts.parquet",
        "=> pyarrow is not",
        world="no pyarrow",
    ),
    # --- a hub that answers with an error
    *(
        Case(f"{UK} --model owner/{world[9:]}", f"--model owner/{world[9:]}", 1, world)
        for world in ("the hub: missing", "the hub: gated", "the hub: broken", "the hub: away")
    ),
    *cases(f"{UK} --model blockless", "=> --model blockless", world="no blocks"),
    # --- compress
    *cases(
        SMALL,
        """
        --minutes inf
        --minutes 0
        --for 2:4
        --minuts 3 => unrecognized arguments: --minuts 3
        -- --quantize q5 => --quantize
        """,
        2,
    ),
    *cases(
        SMALL,
        """
        --recover 3
        --work_dir mine/thesis.txt
        --work_dir mine
        --megabytes 1 | --for packed
        --for packed | any
        --quantize iq4_nl | --for mlx
        --quantize iq4_nl | --for packed
        -- --quantize iq4_nl => --quantize
        --language xx
        --save_model mine => --save_model
        --eval_data nosuch
        --for packed --nsamples 9999 => --data uk
        """,
    ),
    *cases(SMALL, "--for packed", world="no AVX2"),
    *cases(SMALL, "--recover 128 --nsamples 8 => --work_dir small-compress", world="a full disk"),
    *cases(SMALL, "--recover 128 => --work_dir small-compress", world="another command"),
    *cases(
        "compress --device cpu",
        """
        dense taken --data uk => OUT taken
        dense mine --data uk => OUT mine
        --seqlen 64 dense small --data uk => --seqlen
        dense small => --language
        dense small --language uk => --language uk
        nowhere/model small --data uk => --model nowhere/model
        """,
    ),
    # --- sweep
    *cases(
        "sweep --models model --calibration uk",
        """
        --ratios 1.5 => --sparsity_ratio 1.5
        --methods mine.py
        --types nosuch
        --vary nsamples=0 => --nsamples
        --methods magnitude -- --use_variant => --use_variant
        -- --prune_method=wanda => --prune_method after '--'
        -- --nosuch => unrecognized arguments: --nosuch
        """,
        2,
    ),
    *cases(
        "sweep --models model",
        """
        --calibration no/such/folder
        --calibration c4=-1 | ,ubertext=1
        --eval_data no/such/folder
        --vary nosuch=1
        --vary seed=1,2
        --vary use_variant=1
        --vary nsamples=2 | -- --nsamples 3
        --ratios 0.5 0.5 => --out runs
        --out taken.gguf
        """,
    ),
    # --- commands on runs and folders
    *cases(
        "report",
        """
        nosuch => RUN nosuch
        mine => RUN mine
        reports/cut => RUN reports/cut/results.json
        reports/list => RUN reports/list/results.json
        reports/lacks => RUN reports/lacks/results.json
        reports/good --out taken.gguf => --out taken.gguf
        reports/good --against dense => --against dense
        """,
    ),
    *cases(
        "overlap",
        """
        masks/a => RUN
        masks/a masks/wide => RUN masks/wide
        masks/a masks/deep => RUN masks/deep
        masks/a masks/dense => RUN
        masks/a masks/a --noise masks/a masks/a masks/a => --noise
        masks/a nowhere => RUN nowhere
        masks/a mine => RUN mine
        masks/a masks/cut => RUN masks/cut
        masks/a masks/a --out taken.gguf => --out taken.gguf
        """,
    ),
    *cases(
        "tasks",
        """
        few_words new => DATA few_words
        nowhere new => DATA nowhere
        uk taken.gguf => OUT taken.gguf
        uk new --model model => --model model
        asks new --pairs pairs/empty.jsonl => --pairs pairs/empty.jsonl
        asks new --pairs pairs/cut.jsonl => --pairs pairs/cut.jsonl
        asks new --pairs pairs/good.jsonl => --pairs pairs/good.jsonl
        asks new --pairs pairs/blank.jsonl => --pairs pairs/blank.jsonl
        asks new --pairs pairs/null.jsonl => --pairs pairs/null.jsonl
        asks new --pairs pairs/equal.jsonl => --pairs pairs/equal.jsonl
        """,
    ),
    *cases(
        "dialogues model --data uk --device cpu",
        """
        new.jsonl => --model model
        new => OUT new
        """,
    ),
    *cases("dialogues pickled new.jsonl --data uk --device cpu", "=> MODEL pickled"),
    *cases("demo", "--folder taken.gguf\n--folder mine"),
    *cases("unpack", "nowhere new => IN nowhere\nmodel new => IN model\nmodel mine => OUT mine"),
    *cases(
        "gguf",
        """
        model taken.gguf => OUT taken.gguf
        model named.gguf => OUT named.gguf
        model new => OUT new
        model new.gguf --type q4_k_m => --type q4_k_m
        model new.gguf --data ./nowhere => --data ./nowhere
        nowhere new.gguf => IN nowhere
        broken/no_weights new.gguf => IN broken/no_weights
        four new.gguf => IN four
        unigram new.gguf => IN unigram
        """,
        world="with convert_hf_to_gguf",
    ),
    *cases("gguf model new.gguf", "=> llama.cpp's converter is not", world="no convert_hf_to_gguf"),
    *cases(
        "export --to compressed-tensors",
        """
        model mine => NEW mine
        model ended => NEW ended
        nowhere new => OUT nowhere
        model new => OUT model
        gptq new => OUT gptq
        """,
        world="with compressed_tensors",
    ),
    *cases("export model new", "--to compressed-tensors", world="no compressed_tensors"),
    *cases("export model new", "--to nosuch", 2),
    *cases("ubertext nowhere new", "=> FOLDER"),
]


METHOD = """
from langprune.methods.base import PruningMethod

class Mine(PruningMethod):
    power: float = 1.0
    rounds: int = 2

    def prune_(self, linear, inputs, sparsity): ...
"""
# --- the folder in which all commands run, and what differs in some cases


def changed(model: Path, folder: str, file: str, content: bytes | None) -> None:
    """A copy of a model with another file, or without it."""
    Path(shutil.copytree(model, folder), file).unlink(missing_ok=True)
    if content is not None:
        Path(folder, file).write_bytes(content)


def lines(file: str, *rows: object) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    written = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    Path(file).write_text("".join(f"{row}\n" for row in written), "utf-8")


def write_models(model: Path) -> None:
    """Models that can't be pruned, trimmed or trained, each for its own reason."""
    config = json.loads((model / "config.json").read_text())

    def fields(**other: object) -> bytes:
        return json.dumps(config | other).encode()

    shard, tokenizer = (
        (model / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")
    )
    broken: dict[str, tuple[str, bytes | None]] = {
        "no_config": ("config.json", None),
        "config_cut_short": ("config.json", b"{"),
        "unknown_kind": ("config.json", fields(model_type="nosuch")),
        "layers": ("config.json", fields(num_hidden_layers=10**7)),
        "experts": ("config.json", fields(model_type="phimoe", num_local_experts=10**7)),
        "tokens": ("config.json", fields(vocab_size=10**11)),
        "deeper": ("config.json", fields(num_hidden_layers=3)),
        "wider": ("config.json", fields(intermediate_size=128)),
        "adapter": ("adapter_config.json", b"{}"),
        "no_weights": ("model.safetensors", None),
        "weights_cut_short": ("model.safetensors", shard[:-100]),
        "no_header": ("model.safetensors", bytes(4000)),
        "long_template": ("chat_template.jinja", b"{%" * 33000),
        "no_tokenizer": ("tokenizer.json", tokenizer[:-100]),
    }
    for name, (file, content) in broken.items():
        changed(model, f"broken/{name}", file, content)
    indices = {
        "index_of_a_list": [],
        "index_without_names": {"weight_map": [1]},
        "index_of_a_number": {"weight_map": {"a": 5}},
        "index_outside": {"weight_map": {"a": "../a"}},
        "index_of_a_device": {"weight_map": {"a": "/dev/zero"}},
    }
    for name, index in indices.items():
        changed(model, f"broken/{name}", "model.safetensors", None)
        lines(f"broken/{name}/model.safetensors.index.json", index)
    changed(model, "broken/a_pipe", "tokenizer.json", None)
    os.mkfifo("broken/a_pipe/tokenizer.json")
    changed(model, "broken/a_device", "a.txt", None)
    Path("broken/a_device/a.txt").symlink_to("/dev/zero")
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    changed(model, "four", "config.json", fields(quantization_config=four))
    changed(
        model,
        "gptq",
        "config.json",
        fields(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    changed(model, "pickled", "model.safetensors", None)
    torch.save({}, "pickled/pytorch_model.bin")
    tiny.tiny_llama().save_pretrained("lost", max_shard_size="60KB")
    tiny.tiny_tokenizer().save_pretrained("lost")
    sorted(Path("lost").glob("*.safetensors"))[1].unlink()
    small = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    tiny.write_model("t5", T5ForConditionalGeneration(small))
    odd = dict(hidden_size=36, num_attention_heads=6, intermediate_size=60)
    tiny.write_model("narrow", tiny.tiny_llama(**odd))
    tiny.write_model("short", tiny.tiny_llama(vocab_size=200))
    tiny.write_model("slow", tokenizer=ByT5Tokenizer())
    of_words = Tokenizer(models.WordLevel({"a": 0, "text": 1, "?": 2}, unk_token="?"))
    tiny.write_model("words", tokenizer=PreTrainedTokenizerFast(tokenizer_object=of_words))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    tiny.write_model("unigram", tokenizer=PreTrainedTokenizerFast(tokenizer_object=unigram))
    tiny.write_model("other", tiny.tiny_llama(intermediate_size=48))
    tiny.write_model("foreign", tokenizer=tiny.tiny_tokenizer(size=290))
    pruned = tiny.tiny_llama()
    for block in pruned.model.layers:
        for weight in block.parameters():
            weight.data[..., ::2] = 0
    tiny.write_model("pruned", pruned)


def write_files() -> None:
    """Texts, results, masks and files of the user."""
    good = [{"text": text} for text in tiny.sentences(20)]
    lines("oops/train.jsonl", *good, "{oops")
    lines("oops/test.jsonl", "{")
    lines("blank/train.jsonl", "")
    lines("word/test.jsonl", {"text": "сонце"})
    lines("scant/train.jsonl", *good[:1])
    tiny.write_texts("seen", tiny.sentences(8), tiny.sentences(9))
    lines("untaught/test.jsonl", *good)
    words = "місто річка дерево сонце вікно книга дорога пташка хмара камінь".split()
    draw = random.Random(0)
    asks = [" ".join(draw.choices(words, k=14)) + "." for _ in range(40)]
    lines("asks/test.jsonl", *({"text": text} for text in asks))
    lines("few_words/test.jsonl", {"text": "Мало слів."})
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for split in ("train", "test"):
        lines(f"chat/{split}.jsonl", *9 * [chat])
    for name in ("empty", "mine"):
        Path(name).mkdir()
    for file in ("mine/thesis.txt", "taken.gguf", "named.gguf.json", "dump.bin", "none.py"):
        Path(file).write_text("mine")
    Path("none.py").unlink()
    Path("broken.py").write_text("1 / 0\n")
    Path("mine.py").write_text(METHOD)
    Path("empty.py").write_text(
        METHOD.partition("    power")[0].replace("Mine", "Empty") + "    pass\n"
    )
    Path("bad/pipe").mkdir(parents=True)
    os.mkfifo("bad/pipe/train.jsonl")
    Path("bad/cp1251.txt").write_bytes("слово".encode("cp1251") * 9)
    Path("bad/cp1251.csv").write_bytes("text\nслово слово".encode("cp1251"))
    lines("bad/column.csv", "id,body", "1,one")
    lines("bad/ragged.csv", "id,text", "1,one, two")
    lines("bad/blank.txt", " ")
    lines("bad/number.jsonl", {"text": 1})
    lines("bad/short.txt", "one two")
    Path("half.json").write_text("[]")
    Path("texts.parquet").write_bytes(b"PAR1")
    Path("ended.partial").mkdir()  # of a run that was killed
    pairs = dict(empty="", cut="{", good='{"good": "a"}', blank='{"good": "a", "bad": " "}')
    pairs["null"] = '{"good": "a", "bad": "b"}\n{"good": "a", "bad": null}'
    pairs["equal"] = '\n{"good": "a", "bad": "a "}'
    for name, text in pairs.items():
        lines(f"pairs/{name}.jsonl", text)
    made = {"model": "m", "method": "wanda", "sparsity_type": "2:4", "sparsity_ratio": 0.5}
    made |= {"flags": {}, "seed": 0, "calibration": None, "evaluation": [], "perplexity": {}}
    reports = dict(cut="{", list="[]", lacks="{}", good=json.dumps(made | {"sparsity": {}}))
    for name, text in reports.items():
        lines(f"reports/{name}/results.json", text)
    for name, (blocks, width, zeros) in dict(
        a=(3, 16, 0), wide=(3, 32, 0), deep=(4, 16, 0), dense=(3, 16, 1)
    ).items():
        Path("masks", name).mkdir(parents=True)
        half = (torch.arange(24 * width).view(24, width) % 2 + zeros).float()
        masks = {
            f"model.layers.{block}.mlp.up_proj.weight": half.clone() for block in range(blocks)
        }
        save_file(masks, f"masks/{name}/model.safetensors")
    whole = Path("masks/a/model.safetensors").read_bytes()
    Path("masks/cut").mkdir()
    Path("masks/cut/model.safetensors").write_bytes(whole[:-100])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    with chdir(folder):
        model = tiny.write_model("model")
        shutil.copytree(model, "dense")
        tiny.write_texts("uk", 40, 8)
        write_models(model)
        write_files()
    return folder


def hub_error(name: str) -> Callable:
    """A hub that answers every question about a model by an error."""
    from huggingface_hub import errors

    # the hub's client brings its own: httpx, or in later releases httpx2
    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    answer = httpx.Response(500, request=httpx.Request("GET", "http://hub"))
    error = {
        "missing": errors.RepositoryNotFoundError("404", response=answer),
        "gated": errors.GatedRepoError("403", response=answer),
        "broken": errors.HfHubHTTPError("500 broken", response=answer),
        "away": httpx.ConnectError("no route"),
    }[name]

    def model_info(*_: object, **__: object) -> None:
        raise error

    return model_info


@contextmanager
def world(name: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where something is so that is otherwise here."""
    what, _, more = name.partition(" ")
    with ExitStack() as stack:
        if name == "no blocks":
            patch.setattr(LlamaPreTrainedModel, "_no_split_modules", [])
        elif name == "no AVX2":
            patch.setattr("lib.packed.kernels.supported", lambda: False)
        elif name == "a full disk":
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
        elif name == "another command":
            stack.enter_context(exclusive_lock(Path("small-compress.lock"), ""))
        elif what == "the":
            patch.setattr("huggingface_hub.HfApi.model_info", hub_error(more.removeprefix("hub: ")))
        elif what == "no":
            patch.setitem(sys.modules, more, None)
        elif what == "with":
            patch.setitem(sys.modules, more, SimpleNamespace(__spec__=ModuleSpec(more, None)))
        yield


# --- the cases


def files() -> dict[str, object]:
    """All files and folders here, and whether files were written to.

    The folder that compress works in may stay, empty.
    """
    found = {str(path): path.lstat() for path in Path().rglob("*") if path.name != "small-compress"}
    return {
        path: S_ISDIR(one.st_mode) or (one.st_size, one.st_mtime_ns) for path, one in found.items()
    }


def is_named(what: str, error: UserError | None, line: str) -> bool:
    """Whether an error names this first; argparse calls a flag an argument."""
    if error and error.problem:
        return f"{error.what}: ".startswith(f"{what}: ")
    flag = what.partition(" ")[0]
    return line.startswith(f"error: {what}") or line.startswith(f"error: argument {flag}: ")


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case))
def test_one_line_and_nothing_else(
    case: Case, words: Words, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if case.world != WITH_WEIGHTS:
        request.getfixturevalue("no_weights")
    before = files()
    program, *argv = shlex.split(case.line)
    with world(case.world, monkeypatch):
        done, error = attempt(*argv, program=program_of(program))
    assert done.status == case.status, done
    assert files() == before
    [line] = done.err.splitlines()
    assert is_named(case.what, error, line), line
    words("refusals.txt", line, name_of(case))


def name_of(case: Case) -> str:
    line = case.line.replace(RUN, "main.py ...")
    return f"{line} ({case.world})" if case.world else line


def test_all_that_was_approved_is_still_said(words: Words) -> None:
    names = [name_of(case) for case in CASES]
    assert len(names) == len({*names})
    words.only("refusals.txt", {*names})


# --- what is found on the way


@pytest.mark.parametrize("offload", [[], ["--offload_folder", "away"]])
@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_weights_that_are_not_finite(method: str, offload: list[str], tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    folder, new = tiny.write_model(tmp_path / "damaged", damaged), tmp_path / "new"
    given = ["--calibration_data", "uk", *QUICK, "--save_model", new, *offload]
    assert mistake("--model", folder, "--prune_method", method, *given).what.startswith("--model")
    assert not new.exists()


@pytest.mark.parametrize("does", ["--prune_method wanda", "--prune_method admm", "--eval_only"])
def test_activations_that_become_infinite(does: str, tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data *= 1e38  # finite, but no product with it is
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    data = ["--calibration_data", "uk", "--save", tmp_path / "out"]
    error = mistake("--model", folder, *does.split(), *data, *QUICK)
    assert error.what.startswith("--model") and "--dtype float32" in str(error)


def test_a_lack_of_memory_names_flags(words: Words, tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with raising(full, "prune"):
        done = call(*shlex.split(UK)[1:], "--model", "model", "--save", tmp_path / "out")
    assert done.status == 1
    words("on_the_way.txt", "\n".join(done.complaints), "a lack of memory")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError):
        call("--model", "model", "--calibration_data", "nosuch", *WANDA.split()[1:], "--debug")
