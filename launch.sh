#!/usr/bin/env bash
# Everything that can be run, by name; without a name, the list of it. Works from any folder.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

list() {
    cat <<'LIST'
bash launch.sh NAME ...          further flags go to the command behind it; --help shows them

  demo                           the whole job in small, on a text and a model that it makes

  unstructured MODEL             SparseGPT, half of the weights
  semistructured MODEL           SparseGPT, 2:4, with packed linears
  c4 MODEL                       SparseGPT, half of the weights, calibrated on English C4
  dense MODEL                    perplexity of the model as it is
  vocabulary MODEL OUT           its vocabulary trimmed for --vocabulary_data SOURCE ...; no pruning

  compress MODEL OUT --data uk   all of it for one model, in --minutes 30; --for cpu, gpu, llama.cpp

  sweep --models MODEL ...       methods x types x ratios x calibration sets x seeds, one table
  languages MODEL SOURCE ...     prunings for two or more languages, and what their masks share
  report RUN ...                 table and pictures of finished runs
  overlap RUN_A RUN_B ...        what the masks of pruned models share
  tasks DATA OUT                 tasks for lm-eval from documents, for --tasks and --include_path
  unpack IN OUT                  a packed model as a plain dense one
  gguf IN OUT.gguf               a saved model for llama.cpp and ollama, proven on --data SOURCE ...
  ubertext DUMPS OUT             the published data set from raw dumps
  bench                          speed and memory, beside llm-compressor
  bench_sparse products | model  packed weights beside dense ones: speed, size, loading
  gpu                            what must hold on a GPU, and published figures again

MODEL: hub id or local folder. PYTHON=... chooses the interpreter (default: python3).
LIST
}

fail() {
    echo "launch.sh: $1" >&2
    exit 2
}

# -P: a folder from which this is called must not hide this package's modules
module() { exec "$python" -P -m "$@"; }

recipe() { # main.py's flags in one string, then MODEL and what the user adds
    local flags
    read -ra flags <<<"$1"
    shift
    [[ $# -gt 0 && $1 != -* ]] || fail "$name: needs a model: bash launch.sh $name MODEL [flags]"
    exec "$python" "$here/main.py" --model "$1" "${flags[@]}" --save "out/$name" "${@:2}"
}

trimmed() { # MODEL OUT, then what the user adds
    [[ $# -gt 1 && $1 != -* && $2 != -* ]] ||
        fail "$name: needs a model and a folder: bash launch.sh $name MODEL OUT --vocabulary_data SOURCE ..."
    exec "$python" "$here/main.py" --model "$1" --trim_vocabulary --save_model "$2" \
        --save "out/$name" "${@:3}"
}

name=${1:-}
[[ $# -eq 0 ]] || shift
case $name in
    "" | help | -h | --help) list ;;
    compress | demo | gguf | languages | overlap | report | sweep | tasks | ubertext | unpack)
        module "lib.commands.$name" "$@"
        ;;
    bench | bench_sparse) exec "$python" "$here/tests/bench/$name.py" "$@" ;;
    gpu) exec "$python" "$here/tests/bench/gpu/first_run.py" "$@" ;;
    unstructured) recipe "--prune_method sparsegpt" "$@" ;;
    semistructured)
        recipe "--prune_method sparsegpt --sparsity_type 2:4 --replace_sparse_layers" "$@"
        ;;
    c4) recipe "--prune_method sparsegpt --prune_on_c4" "$@" ;;
    dense) recipe "--eval_only" "$@" ;;
    vocabulary) trimmed "$@" ;;
    *) fail "unknown name '$name'; bash launch.sh alone lists them" ;;
esac
