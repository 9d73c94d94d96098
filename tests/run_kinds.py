"""The one list of kinds of run: what tests/matrix.py does again, and compare_commits.py records.

A kind is `name: steps`, one after another. A step begins with a command of `langprune`, or with the
model of a run of main.py, whose other flags are BASE. Models and texts are those of matrix.Place;
`NAME-trimmed` and `pruned` are made by a step before, see `made`. Of {OLD|NEW}, OLD is for commits
that still have a flag, NEW for those that have retired it.
"""

from __future__ import annotations

import re

BASE = "--device cpu --seqlen 32 --nsamples 8 --completions 0 --eval_data uk --calibration_data uk"
COMMANDS = "compress export gguf overlap report sweep trim unpack".split()
TRAIN = "--recover 768"  # three steps of eight windows
PACK, INT4 = "--replace_sparse_layers", "--replace_sparse_layers --quantize int4"
WANDA, SPARSEGPT, ADMM = (f"--prune_method {name}" for name in ("wanda", "sparsegpt", "admm"))
HALF, NEURONS = "--sparsity_type 2:4", "--sparsity_type neurons"
FEWER = "--sparsity_type experts --sparsity_ratio 0.25"
ERROR = "--allocation error --sparsity_ratio 0.6"
TIED, SMALL = (
    f"{{{name} --trim_vocabulary --vocabulary_rows {name}.list.json|{name}-trimmed}}"
    for name in ("tied", "bfloat16")
)
ANY_COST = "{|--most_cost 9999%}"  # of models of random weights
KINDS = {  # of one step, which the matrix does again in its ways
    "wanda": f"llama {WANDA}",
    "wanda variant": f"llama {WANDA} --use_variant",
    "wanda neurons": f"wide {WANDA} {NEURONS}",
    "magnitude, trimmed": f"{TIED} --prune_method magnitude",
    "magnitude neurons": f"wide --prune_method magnitude {NEURONS}",
    "ria 4:8": "llama --prune_method ria --sparsity_type 4:8",
    "sparsegpt 2:4": f"bfloat16 {SPARSEGPT} {HALF}",
    "sparsegpt 4:8": f"llama {SPARSEGPT} --sparsity_type 4:8",
    "sparsegpt neurons": f"wide {SPARSEGPT} {NEURONS}",
    "admm 2:4": f"llama {ADMM} {HALF}",
    "admm neurons": f"wide {ADMM} {NEURONS}",
    "by error": f"llama {ADMM} {ERROR}",
    "by outliers": f"llama {WANDA} --allocation owl",
    "experts pruned": f"mixture {SPARSEGPT}",
    "fewer experts": f"mixture --prune_method reap {FEWER}",
    "half the experts": "mixture --prune_method contribution --sparsity_type experts",
    "in bfloat16": f"bfloat16 {SPARSEGPT} --dtype bfloat16",
    "in 8 bits": f"llama {WANDA} --load_bit 8",
    "sharded": f"sharded {SPARSEGPT}",
    "tied": f"{TIED} {WANDA}",
    "transposed": f"transposed {WANDA}",
    "mixed": f"mixed {WANDA}",  # float32 norms in a float16 checkpoint
    "one window": f"llama {WANDA} --nsamples 1",  # and ranks that have none
    # saved packed
    "packed": f"bfloat16 {WANDA} {HALF} {PACK}",
    "packed, unstructured": f"bfloat16 {SPARSEGPT} {PACK}",
    "int4": f"bfloat16 {WANDA} {HALF} {INT4}",
    "int4, unstructured": f"llama {WANDA} {INT4}",
    "int4, trained": f"bfloat16 {WANDA} {INT4} {TRAIN}",
    # on a grid
    "q4_0": f"{SMALL} --quantize q4_0",
    "q4_0, odd rows": "odd --quantize q4_0",  # no whole blocks; float32, saved in bfloat16
    "q4_0, SentencePiece": "phi3 --quantize q4_0",
    "q4_0, transposed": f"transposed {WANDA} --quantize q4_0 {TRAIN}",
    "q4_0, experts": f"mixture --quantize q4_0 {TRAIN}",
    "q4_0, trained": f"{SMALL} --quantize q4_0 {TRAIN}",
    "q4_0, by rank": f"bfloat16 --dtype bfloat16 --quantize q4_0 --recover_rank 4 {TRAIN}",
    "q4_0, neurons": f"wide {SPARSEGPT} {NEURONS} --quantize q4_0 {TRAIN}",
    "iq4_nl": f"{SMALL} --quantize iq4_nl",
    "iq4_nl, trained": f"llama --quantize iq4_nl {TRAIN}",
    "iq4_nl, transposed": "transposed --quantize iq4_nl",
    "iq4_nl, experts": f"mixture --prune_method reap {FEWER} --quantize iq4_nl {TRAIN}",
    "q5_0": f"{SMALL} --quantize q5_0",
    "q5_0, trained": f"transposed {WANDA} --quantize q5_0 {TRAIN}",
    "q3_k": f"wide --quantize q3_k {TRAIN}",  # only one of its layers has such rows
    "auto": "wide --quantize auto --megabytes 0.15",
    "auto, trained": f"{SMALL} --quantize auto --megabytes 0.05 {TRAIN}",
    "types of a file": f"wide --quantize types.json {TRAIN}",
    "iq4_nl, neurons": f"wide {SPARSEGPT} {NEURONS} --quantize iq4_nl {TRAIN}",
    # trained
    "trained": f"bfloat16 {WANDA} {HALF} {TRAIN}",
    "trained in 8 bits": f"wide {WANDA} --recover_optimizer adamw8bit {TRAIN}",
    "trained, tied": f"tied {WANDA} --recover_ce_weight 0.3 {TRAIN}",
    "trained by rank": f"llama {WANDA} --recover_rank 4 {TRAIN}",
    "transposed by rank": f"transposed {WANDA} --recover_rank 4 {TRAIN}",
    "experts by rank": f"mixture {WANDA} --recover_rank 4 {TRAIN}",
    "trained neurons": f"wide {WANDA} {NEURONS} {TRAIN}",
    "trained on one window": f"llama {WANDA} --recover 32",
    "trained in vain": f"llama {WANDA} --recover_lr 0.5 {TRAIN}",
    "never called": f"mamba {WANDA} {TRAIN}",  # one of its linears
    "a teacher": f"pruned --teacher llama {TRAIN}",
    "dialogues": f"chat {WANDA} --calibration_data chats --recover 96",
}
RECOVER, FAST = "--recover 2600 --recover_lr 0.01", "--eval_windows 4 --nsamples 4"
OFFLOAD, KEPT = "--offload_folder away", "model --eval_only"
PRUNED = f"bfloat16 {WANDA} {HALF} --save_model pruned"
SMALL_TEXT = f"--data uk --device cpu --recover 0 --seqlen 32 {FAST}"
ARCHITECTURES = ["Mistral", "Qwen2", "Gemma 2", "Gemma 3", "Phi-3"]
ARCHITECTURES += ["GPT-2", "OPT", "BLOOM", "GPT-NeoX", "Mixtral", "Mamba", "Zamba2"]
PATTERNS = ["unstructured", "2:4", "4:8"]
SOME = ["wanda", "sparsegpt 2:4", "admm 2:4", "by error", "sparsegpt neurons", "experts pruned"]
RECORDED = {  # `ranks N:`, `resumed N:` and `kill N:` are explained in compare_commits.py
    f"{name}, {flags.split()[1]}": f"'{name}' {flags} --sparsity_type {PATTERNS[(i + j) % 3]}"
    for i, name in enumerate(ARCHITECTURES)
    for j, flags in enumerate((WANDA, SPARSEGPT, ADMM))
}
RECORDED |= {
    f"ranks, {kind}": f"ranks 2: {KINDS[kind]}" for kind in [*SOME, "trained", "int4", "q4_0"]
}
RECORDED |= {f"resumed, {kind}": f"resumed 2: {KINDS[kind]}" for kind in [*SOME[:4], "q4_0"]}
RECORDED |= {f"offload, {kind}": f"{KINDS[kind]} {OFFLOAD}" for kind in [*SOME[:4], "packed"]}
CUDA = [*SOME[:5], "trained", "packed", "int4", "int4, trained", "tied"]
RECORDED |= {f"cuda {kind}": KINDS[kind] for kind in CUDA}
RECORDED |= {
    f"{kind}, again": f"{KINDS[kind]}; {KEPT}; unpack model dense"
    for kind in ("packed", "packed, unstructured", "int4", "int4, unstructured")
}
RECORDED |= {
    f"gguf {to}": f"{name} --quantize {to}; gguf model model.gguf --type {to}"
    for name, to in (
        ("llama", "q4_0"),
        ("wide", "iq4_nl"),
        ("transposed", "q5_0"),
        ("wide", "q3_k"),
    )
}
RECORDED |= {
    f"export {to}": f"heads --quantize q4_0; export model new --to {to}"
    for to in ("compressed-tensors", "mlx", "onnx")
}
RECORDED |= {
    "resumed, trained": f"resumed 4: {KINDS['trained']}",
    "resumed, offload": f"resumed 2: llama {SPARSEGPT} {OFFLOAD}",
    "cuda offload": f"llama {ADMM} {HALF} {OFFLOAD}",
    "cuda resumed": f"resumed 2: llama {SPARSEGPT}",
    "magnitude 2:4": f"bfloat16 --prune_method magnitude {HALF}",
    "completions": f"tied {WANDA} --completions 2",
    "seed, batch size, length": f"llama {ADMM} --seed 3 --batch_size 1 --seqlen 48",
    "mix of texts": f"llama {WANDA} --calibration_data uk=3 en=1 --eval_data uk en",
    "dense": "bfloat16 --eval_only",
    "bfloat16 experts": f"mixture {WANDA} {HALF} --dtype bfloat16",
    "bos never": f"llama {WANDA} --bos never",
    "load 4 bits": f"llama {WANDA} --load_bit 4",
    "error, wanda": f"llama {WANDA} {ERROR}",
    "error, sparsegpt": f"llama {SPARSEGPT} {ERROR}",
    "error, experts": f"mixture {WANDA} {ERROR}",
    "trimmed": "{tied --trim_vocabulary --vocabulary_rows tied.list.json --save_model model|"
    f"trim tied model --keep tied.list.json; {KEPT}}}",
    "trimmed and pruned": f"{SMALL} {WANDA} {HALF}",
    "trimmed and recovered": f"{TIED} {WANDA} {HALF} {RECOVER}",
    "recovered, the rate of the rule": f"llama {WANDA} {HALF} --recover 2600",
    "recovered by the teacher alone": f"llama {WANDA} {RECOVER} --recover_ce_weight 0",
    "recovered experts": f"mixture {WANDA} {HALF} {RECOVER}",
    "recovered on the grid, rank 4": f"llama {WANDA} {RECOVER} --recover_rank 4 {INT4}",
    "recovered later": f"{PRUNED}; pruned --teacher bfloat16 {RECOVER}",
    "measured beside a teacher": f"{PRUNED}; pruned --eval_only --teacher bfloat16",
    "neurons, Conv1D": f"GPT-2 {SPARSEGPT} {NEURONS} --sparsity_ratio 0.25",
    "neurons, fused": f"Phi-3 {WANDA} {NEURONS} --sparsity_ratio 0.25",
    "packed experts": f"mixture {WANDA} {PACK}; {KEPT}",
    "packed 4 bits, tied": f"tied {WANDA} {INT4}; {KEPT}",
    "packed 4 bits, Conv1D": f"GPT-2 {WANDA} {HALF} {INT4}",
    "packed 4 bits, experts": f"mixture {WANDA} {HALF} {INT4}; unpack model dense",
    "rounded later": f"{PRUNED}; pruned {INT4} --save_model model",
    "rounded to the nearest": f"{PRUNED}; pruned --eval_only {INT4} --save_model model",
    "trim: folder": f"trim bfloat16 small --data uk {ANY_COST}",
    "trim: tied folder, two texts": f"trim tied small --data uk en --price 2 {ANY_COST}",
    "trim: folder by a list": "trim tied small --keep tied.list.json",
    "trim: rows": f"trim tied small --data uk --rows 320 {ANY_COST}",
    "trim: SentencePiece": f"trim phi3 small --data words {ANY_COST}",
    "trim: without bytes": f"trim unigram small --data words {ANY_COST}",
    "trim: encoder": "trim encoder small --data words",
    "trim: dialogues": f"trim chat small --data chats {ANY_COST}",
    "trim: shards": f"trim sharded small --data uk {ANY_COST}",
    "trim: file": f"trim gpt2.gguf small.gguf --data words {ANY_COST}",
    "trim: file, rows": f"trim gpt2.gguf small.gguf --data words --rows 384 {ANY_COST}",
    "trim: file by a list": "trim gpt2.gguf small.gguf --keep gpt2.list.json",
    "trim: file, SentencePiece": f"trim llama.gguf small.gguf --data words {ANY_COST}",
    "trim: file of an encoder": "trim bert.gguf small.gguf --data words",
    "trim: file, dialogues": f"trim gpt2.gguf small.gguf --data chats {ANY_COST}",
    "gguf f32": "gguf llama model.gguf --type f32",
    "gguf f16": "gguf wide model.gguf --type f16",
    "gguf bf16, text": "gguf bfloat16 model.gguf --data uk",
    "gguf q8_0, tied": "gguf tied model.gguf --type q8_0",
    "gguf, SentencePiece": "gguf pieces model.gguf",
    "gguf, experts": "gguf mixture model.gguf --type f32",
    "gguf, dialogues": "gguf chat model.gguf",
    "gguf auto": "wide --quantize auto --megabytes 0.15; gguf model model.gguf --type auto",
    "gguf, packed": f"bfloat16 {WANDA} {HALF} {INT4}; gguf model model.gguf",
    "overlap": f"llama {WANDA} --save_model one; llama {ADMM} --save_model two; overlap one two",
    "report": f"llama {WANDA} --save runs/one --save_model one; "
    f"llama {ADMM} {HALF} --save runs/two --save_model two; "
    "report runs --csv runs.csv --latex runs.tex --against runs/one",
    "sweep": f"sweep --models llama --methods wanda --types 2:4 --calibration uk -- {FAST} "
    "--device cpu --seqlen 32 --completions 0; report runs --csv runs.csv",
    "compress: text": f"compress wide small {SMALL_TEXT}",
    "compress: dialogues": f"compress chat small --dialogues 8 --quantize q4_0 {SMALL_TEXT}",
}


def spelled(kind: str, new: bool) -> list[str]:
    """The steps of a kind as commits before or after a flag was retired have them."""
    steps = {**KINDS, **RECORDED}[kind]
    if kind.startswith("cuda "):
        steps = re.sub(r"( --prune_method)", r" --device cuda:0\1", steps)
    steps = re.sub(r"\{(.*?)\|(.*?)\}", r"\2" if new else r"\1", steps)
    steps = re.sub(r"resumed (\d+): (.*)", r"kill \1: \2 --resume kept; \2 --resume kept", steps)
    return steps.split("; ")


def made(model: str) -> str:
    """The step that makes a model of another one; nothing for one that is there."""
    if model == "pruned":
        return f"llama {WANDA} --save_model pruned"
    name, dash, _ = model.partition("-trimmed")
    return f"trim {name} {model} --keep {name}.list.json" if dash else ""
