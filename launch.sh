#!/usr/bin/env bash
# Everything that can be run, by name, from any folder; without a name, the list of it. The paper's
# four recipes take more flags of main.py, of which the last value counts, as in `--model MODEL`.
# Every other name is the same as `langprune NAME` after `pip install .`.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# -P: a folder from which this is called must not hide this package's modules
langprune() { exec "${PYTHON:-python3}" -P -m lib.commands "$@"; }
recipe() { langprune prune --model baffo32/decapoda-research-llama-7B-hf --seed 0 "$@"; }

case "${1:-help}" in
  sparsegpt)     recipe --prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type unstructured --nsamples 64 "${@:2}" ;;
  sparsegpt-2:4) recipe --prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type 2:4 --replace_sparse_layers --nsamples 64 "${@:2}" ;;
  dense)         recipe --eval_only "${@:2}" ;;
  c4)            recipe --prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type 2:4 --prune_on_c4 --nsamples 64 "${@:2}" ;;
  help | -h | --help)
    (langprune help)
    printf '\nrecipes of the paper, which take more flags of prune:\n\n'
    sed -n 's/^  \([^ ]*\))\( *\)recipe \(.*\) ".*/  \1\2 \3/p' "${BASH_SOURCE[0]}" ;;
  *) langprune "$@" ;;
esac
