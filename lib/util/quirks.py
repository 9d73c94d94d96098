"""All that is known by name of single models and of the engines' tables, as data.

A model whose config has other names needs an entry here, and no other change. This module imports
nothing, so that every folder can read it.
"""

from __future__ import annotations

import re

# --- names of fields in configs, which transformers leaves to each model

# a model's longest window, by the first of these that its config has: most, GPT-2, MPT, BLOOM
WINDOW_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")

# the number of layers, in the bytes of config.json: most, GPT-Neo, GPT-2 and MPT
LAYER_COUNT = re.compile(rb'"(?:num_hidden_layers|num_layers|n_layers?)"\s*:\s*(\d{1,18})')

# the width of MLPs, and the number of experts in a block; lib/model/parts.py tries each, and takes
# the first that sets nothing else
NEURON_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# token ids, which change when the vocabulary is trimmed: `eos_token_id`, `image_token_index`,
# vision models' `image_start_id`, generation's `suppress_tokens`, ...
TOKEN_ID_FIELDS = re.compile(
    r"(.*_)?tokens?_(ids?|index|indices)|(image|video|audio|slice)_(start|end|pad)_id|newline_id"
    r"|(begin_)?suppress_tokens|(bad|force)_words_ids|sequence_bias|padding_idx"
)

# --- what cards of embedders and rerankers put before texts, or take for an answer

_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_PASSAGES = "Represent this sentence for searching relevant passages: "
_JUDGE = "Judge whether the Document meets the requirements based on the Query and the Instruct "
_JUDGE += 'provided. Note that the answer can only be "yes" or "no".'
_TASKS = "search result, question answering, fact checking, classification, clustering, "
_TASKS += "sentence similarity, code retrieval"
_TEXTS = tuple(f"task: {task} | query: " for task in _TASKS.split(", "))
# {pattern of a model's name, in small letters and with blanks between its words: these texts}
KNOWN_PROMPTS = {
    r"\b(e5|nemotron( \d)? embed)\b": ("query: ", "passage: "),
    r"\b(qwen3( vl)? embedding|e5 .*instruct|gte qwen2)\b": (f"Instruct: {_SEARCH}\nQuery: ",),
    r"\bqwen3( vl)? reranker\b": (
        *("yes", "no", _JUDGE),
        f"<Instruct>: {_SEARCH}\n<Query>: \n<Document>: ",
    ),
    r"\b(bge \w+ en|mxbai embed|arctic embed)\b": (_PASSAGES, "query: "),
    r"\bbge \w+ zh\b": ("为这个句子生成表示以用于检索相关文章：",),
    r"\bnomic embed\b": ("search_query: ", "search_document: ", "classification: ", "clustering: "),
    r"\bembedding ?gemma\b": ("title: none | text: ", *_TEXTS),
    r"\bjina embeddings v3\b": (
        "Represent the query for retrieving evidence documents: ",
        "Represent the document for retrieval: ",
    ),
    r"\bjina embeddings v[45]\b": ("Query: ", "Passage: ", "Document: "),
}

# --- llama.cpp and its converter

# it takes a LLaMA with these numbers of rows for CodeLlama or Granite
MISLEADING_ROWS = frozenset({32016, 49152})

# {name of a config field: the older name that the converter reads}, at the top: GPT-2
OLDER_FIELDS = {"n_positions": "n_ctx"}
# and for the layers that `per_layer_config` describes: Gemma 4
OLDER_LAYER_FIELDS = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "num_global_key_value_heads",
}

# before the names of tensors in multimodal checkpoints; its table of names has none
TEXT_PREFIX = "language_model."

# {pattern of a tokenizer.json: the name of its pre-tokenizer}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    r"{}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    _WORDS.format(_CONTRACTIONS, "{1,3}"): "llama-bpe",  # Llama 3
    _WORDS.format(_CONTRACTIONS, ""): "qwen2",
}

# --- mlx-lm

# most of it reads RoPE's settings under their names before transformers 5
ROPE_BASE, ROPE_SETTINGS = "rope_theta", "rope_scaling"
ROPE_OF_FULL_ATTENTION = "full_attention"  # Gemma 3 has settings for each kind of layer
