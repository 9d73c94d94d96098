"""Tiny random models of many architectures, a tiny tokenizer and tiny texts: no network, seconds.

Every model is float32, seeded, has two or three decoder blocks, VOCAB rows and linears whose input
widths are multiples of 8, so that 2:4 and 4:8 divide them. Sliding windows span 8 tokens: shorter
than the windows of any test. Weights and biases are drawn wide enough that a wrong mask, mixed-up
positions or a lost bias shows in the logits.

    tiny.ARCHITECTURES["Gemma 2"]()  x
    tiny.HYBRIDS["Mamba"]()              # mixers other than attention, and rarer layouts
    tiny.REFUSED["Gemma 3n"]()           # what can't be pruned; `tiny.ALL` is what can
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCAB = 320
ROWS = 384  # of models in folders, so that trimming removes some
WINDOW = 8  # tokens seen by a sliding-window layer
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WORDS = "сонце ріка ліс тихо пливе над старим містом the old river runs past a quiet town".split()

SIZE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
SIZE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
SIZE |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.2)
MIXED = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
WIDE = dict(head_dim=16, query_pre_attn_scalar=16)  # heads wider than hidden_size / heads
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SHARED = dict(shared_expert_intermediate_size=24, shared_intermediate_size=24)
MAMBA = dict(mamba_d_state=8, mamba_dt_rank=8, mamba_d_head=8, mamba_n_heads=8)
MAMBA |= dict(mamba_chunk_size=8)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)

# name: (model type, what differs from SIZE)
SPECS: dict[str, tuple[str, dict]] = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", dict(sliding_window=WINDOW)),
    "Qwen2": ("qwen2", dict(use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW)),
    "Qwen3": ("qwen3", dict(head_dim=16)),
    "Gemma": ("gemma", dict(head_dim=16)),
    "Gemma 2": ("gemma2", WIDE | MIXED),
    "Gemma 3": ("gemma3_text", WIDE | MIXED),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", dict(sliding_window=WINDOW)),
    "StableLM": ("stablelm", dict(use_qkv_bias=True)),
    "StarCoder2": ("starcoder2", dict(sliding_window=WINDOW)),
    "Cohere": ("cohere", dict(logit_scale=1.0)),
    "Cohere 2": ("cohere2", dict(logit_scale=1.0, head_dim=8) | MIXED),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", dict(residual_multiplier=0.5, embedding_multiplier=4.0)),
    "SmolLM3": ("smollm3", dict(no_rope_layers=[1, 0])),
    "GLM-4": ("glm4", dict(head_dim=8)),
    "Persimmon": ("persimmon", {}),
    "Nemotron": ("nemotron", dict(head_dim=8)),
    "Helium": ("helium", dict(head_dim=8)),
    "BLOOM": ("bloom", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-J": ("gptj", dict(rotary_dim=8)),
    "Falcon": ("falcon", dict(ffn_hidden_size=64)),
    "OPT": ("opt", dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.2)),
    "MPT": ("mpt", dict(max_seq_len=128, expansion_ratio=2)),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", EXPERTS | SHARED),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS | dict(head_dim=8, mlp_only_layers=[0])),
    "OLMoE": ("olmoe", EXPERTS),
}
ROPE = dict(rope_type="default", rope_theta=10000.0)
GROUPED = dict(n_routed_experts=4, first_k_dense_replace=1, n_group=2, topk_group=1)
GROUPED |= dict(num_experts_per_tok=2, moe_intermediate_size=16, num_key_value_heads=4)
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB)
PER_LAYER |= dict(num_hidden_layers=4, layer_types=MIXED["layer_types"] * 2, head_dim=16)
PER_LAYER |= dict(sliding_window=WINDOW, num_kv_shared_layers=0, global_head_dim=24)
SHARED_KEYS = dict(num_kv_shared_layers=2, use_double_wide_mlp=True)
GEMMA_3N = dict(vocab_size_per_layer_input=VOCAB - 32, num_kv_shared_layers=2, laurel_rank=8)
GEMMA_3N |= dict(altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4)
ZAMBA = dict(num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"], adapter_rank=8)
ZAMBA |= dict(num_key_value_heads=4, n_mamba_heads=8, mamba_d_state=8, chunk_size=8)

HYBRID_SPECS: dict[str, tuple[str, dict]] = {
    "GPT-OSS": ("gpt_oss", EXPERTS | MIXED | dict(head_dim=8, rope_parameters=ROPE)),
    "GraniteMoE": ("granitemoe", EXPERTS),
    "JetMoE": ("jetmoe", EXPERTS | dict(kv_channels=8)),
    "PhiMoE": ("phimoe", EXPERTS),
    "DeepSeek-V3": ("deepseek_v3", LATENT | GROUPED),
    "Gemma 4": ("gemma4_text", PER_LAYER),
    "Mamba": ("mamba", dict(state_size=8, time_step_rank=8)),
    "Mamba 2": ("mamba2", dict(num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8)),
    "RWKV": ("rwkv", dict(attention_hidden_size=32)),
    "Jamba": ("jamba", EXPERTS | MAMBA | dict(attn_layer_period=2, attn_layer_offset=1)),
    "Falcon-H1": ("falcon_h1", MAMBA | dict(mamba_d_ssm=64)),
    "Bamba": ("bamba", MAMBA | dict(attn_layer_indices=[1])),
    "Zamba2": ("zamba2", ZAMBA),
    "GraniteMoE hybrid": (
        "granitemoehybrid",
        MAMBA | EXPERTS | SHARED | dict(layer_types=["mamba", "attention"]),
    ),
}
TOWER = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
TOWER |= dict(image_size=8, patch_size=4)
MERGED = dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
MERGED |= dict(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=4)
ROPE_3D = dict(mrope_section=[1, 1, 2], partial_rotary_factor=1.0)
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=2)
LINEAR |= dict(linear_num_key_heads=2, linear_num_value_heads=2)
LINEAR |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
WITH_3D = dict(head_dim=8, rope_parameters=ROPE | ROPE_3D)
IMAGE = VOCAB - 1
AROUND = dict(boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3)
QWEN = dict(image_token_id=IMAGE, video_token_id=IMAGE - 1)
QWEN |= dict(vision_start_token_id=317, vision_end_token_id=316)
LLAMA = dict(model_type="llama")

# name: (model type, what differs from SIZE in its text, its tower, its own fields)
VISION_SPECS: dict[str, tuple[str, dict, dict, dict]] = {
    "Gemma 3 multimodal": (
        "gemma3",
        WIDE | MIXED,
        TOWER,
        AROUND | dict(image_token_index=IMAGE, mm_tokens_per_image=4),
    ),
    "Qwen 3.5 multimodal": ("qwen3_5", LINEAR | WITH_3D, MERGED, QWEN),
    "Qwen 3.5 MoE multimodal": ("qwen3_5_moe", EXPERTS | SHARED | LINEAR | WITH_3D, MERGED, QWEN),
    "Qwen3-VL": ("qwen3_vl", WITH_3D, MERGED | dict(deepstack_visual_indexes=[0]), QWEN),
    "Mistral 3": (
        "mistral3",
        dict(model_type="mistral", head_dim=8),
        TOWER | dict(model_type="pixtral", head_dim=8),
        dict(image_token_index=IMAGE, spatial_merge_size=2),
    ),
    "Llava": (
        "llava",
        LLAMA,
        TOWER | dict(model_type="clip_vision_model", projection_dim=16),
        dict(image_token_index=IMAGE),
    ),
    "Idefics 3": ("idefics3", LLAMA, TOWER, dict(image_token_id=IMAGE, scale_factor=2)),
    "SmolVLM": ("smolvlm", LLAMA, TOWER, dict(image_token_id=IMAGE, scale_factor=2)),
}
TILES = dict(num_global_layers=1, vision_output_dim=32, intermediate_layers_indices=[0])
TILES |= dict(attention_heads=2, max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
GEMMA_4_TOWER = dict(num_key_value_heads=2, head_dim=8, position_embedding_size=64)
GEMMA_4_IDS = {
    name: IMAGE - place
    for place, name in enumerate(
        "image_token_id video_token_id audio_token_id boi_token_id eoi_token_id boa_token_id "
        "eoa_token_index".split()
    )
}


def build(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Random model of a transformers `model_type`, in evaluation mode."""
    config = AutoConfig.for_model(model_type, **{**SIZE, **overrides})
    return _draw(lambda: AutoModelForCausalLM.from_config(config), seed)


def tiny_llama(seed: int = 0, **overrides) -> PreTrainedModel:
    """Random LLaMA: 2 blocks, 32 wide, 4 heads, unless its config's fields say otherwise."""
    return build("llama", seed, **overrides)


def vision(model_type: str, text: dict, tower: dict, seed: int = 0, **fields) -> PreTrainedModel:
    """Random model that also sees: the language model sits one level deeper."""
    fields |= dict(text_config=SIZE | text, vision_config=tower)
    config = AutoConfig.for_model(model_type, **fields)
    return _draw(lambda: AutoModelForImageTextToText.from_config(config), seed)


def _draw(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # drawn as zeros: a bias that gets lost would not show
                parameter.data += torch.randn_like(parameter) * 0.1
    return model


def _makers(specs: dict[str, tuple[str, dict]]) -> dict[str, Callable[[], PreTrainedModel]]:
    return {name: partial(build, kind, **fields) for name, (kind, fields) in specs.items()}


ARCHITECTURES = _makers(SPECS)
VISION = {
    name: partial(vision, kind, text, tower, **fields)
    for name, (kind, text, tower, fields) in VISION_SPECS.items()
}
HYBRIDS = _makers(HYBRID_SPECS) | VISION
ALL = ARCHITECTURES | HYBRIDS
# hidden states that are not (windows, tokens, hidden), or are changed between the blocks; or keys
# of another block
REFUSED = {
    "Gemma 3n": partial(build, "gemma3n_text", **PER_LAYER | GEMMA_3N),
    "Gemma 4, shared keys": partial(build, "gemma4_text", **PER_LAYER | SHARED_KEYS),
    "Gemma 4 multimodal": partial(
        vision, "gemma4", PER_LAYER | SHARED_KEYS, TOWER | GEMMA_4_TOWER, **GEMMA_4_IDS
    ),
    "RWKV, rescaled every 2 blocks": partial(
        build, "rwkv", attention_hidden_size=32, num_hidden_layers=4, rescale_every=2
    ),
}


def sentences(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """`count` random texts of `words` words each."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)).capitalize() + "." for _ in range(count)]


def tiny_tokenizer(add_bos: bool = True, size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `add_bos`: puts `<s>` before every text by itself; 259 tokens are bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50), trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
        )
    names = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_model(
    folder: Path | str,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save a model (default: a LLaMA) and a tokenizer, as a user would have them in a folder."""
    (tiny_llama(vocab_size=ROWS) if model is None else model).save_pretrained(folder)
    (tiny_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return Path(folder)


def write_texts(
    folder: Path | str, train: Iterable[str] | int = 20, test: Iterable[str] | int = 8
) -> Path:
    """Write `train.jsonl` and `test.jsonl`, rows with `text`; a number means random texts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, texts) in enumerate(dict(train=train, test=test).items()):
        rows = sentences(texts, seed) if isinstance(texts, int) else texts
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


def own_code_(folder: Path) -> None:
    """Make a saved LLaMA a model of its own code, whose logits are twice as large."""
    (folder / "modeling_odd.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    names = {"AutoConfig": "OddConfig", "AutoModelForCausalLM": "OddForCausalLM"}
    config["auto_map"] = {auto: f"modeling_odd.{name}" for auto, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
