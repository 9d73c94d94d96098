"""How a dist divides work, what it compares, and on which GPU each process is."""

from __future__ import annotations

import pytest
import torch
from support import CPU

from lib.distributed.context import DistContext, local_device
from lib.util.errors import UserError


def test_different_facts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = DistContext(CPU, alone=True)
    facts = {"calibration windows": "ab", "packages": {"torch": "2.0"}}
    dist.check_equal(facts)
    for name, other in {"calibration windows": "cd", "packages": {"torch": "2.1"}}.items():
        monkeypatch.setattr(
            dist, "all_gather_object", lambda mine, n=name, o=other: [mine, mine | {n: o}]
        )
        with pytest.raises(UserError, match=f"{name}: process 0 has .*, process 1 has"):
            dist.check_equal(facts)


def test_gpus_are_counted_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_device(CPU) == CPU
    assert local_device(torch.device("cuda", 0)) == torch.device("cuda", 2)
    assert local_device(torch.device("cuda", 1)) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="--device cuda:2: process 2 .* needs cuda:4"):
        local_device(torch.device("cuda", 2))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_windows_and_solves_are_shared_out_evenly(size: int) -> None:
    dist = DistContext(CPU, alone=True)
    dist.size = size
    shares = []
    for dist.rank in range(size):
        shares.append(range(7)[dist.share(7)])
    assert [window for share in shares for window in share] == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    costs = [5.0, 3, 3, 2, 2, 1]
    owners = dist.assign_owners(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(size)]
    assert len(owners) == 6 and max(loads) <= sum(costs) / size + max(costs)
