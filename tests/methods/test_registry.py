"""The methods by name: what flags may use is light, and every class says the same things."""

from pathlib import Path

import pytest
import torch
from support import CPU, LIMIT, start

from lib.methods.registry import METHODS, MethodSpec


def test_flags_cost_no_torch(tmp_path: Path) -> None:
    code = "import sys, lib.methods.registry, lib.methods.sparsity; print('torch' in sys.modules)"
    out, _ = start(["-c", code], tmp_path).communicate(timeout=LIMIT)
    assert out.strip() == "False"


def test_settings_name_every_option_given_or_not() -> None:
    assert MethodSpec("magnitude").settings == {}
    assert MethodSpec("wanda", {"variant": True}).settings == {"variant": True}
    known = dict(exploring=10, agreeing=10, refinements=5, rho=1.5, damping=6.0)
    assert MethodSpec("admm", {"blend": 0.5}).settings == known | {"blend": 0.5}


@pytest.mark.parametrize("name", METHODS)
def test_bytes_of_the_statistics(name: str) -> None:
    """Said before anything is observed; after it they are there."""
    method_spec = MethodSpec(name)
    said, _ = method_spec(40, torch.device("meta")).bytes_needed([24])
    method = method_spec(40, CPU)
    more = (torch.ones(9, 40), torch.ones(9, 24)) if method_spec.cls.dense_stream else ()
    method.observe(torch.ones(9, 40), *more)
    assert sum(statistic.nbytes for statistic in method.statistics()) == said
