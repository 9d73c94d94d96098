"""The flag reference in docs/usage.md says what the parsers say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import ROOT, call

sys.path.append(str(ROOT / "benchmarks"))

import flags_table  # noqa: E402


def test_the_flag_reference_is_up_to_date() -> None:
    done = call("--check", program=flags_table.main)
    assert done.status == 0, done.err


def test_a_stale_reference_is_refused_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "usage.md"
    page.write_text("Before\n<!-- flags: main.py -->\nold\n<!-- end -->\nafter\n", "utf-8")
    monkeypatch.setattr(flags_table, "PAGE", page)
    refused = call("--check", program=flags_table.main)
    assert refused.status == 1 and "flags_table.py" in refused.err and "old" in page.read_text()
    assert call(program=flags_table.main).status == 0
    text = page.read_text("utf-8")
    assert text.startswith("Before\n") and text.endswith("\nafter\n")
    assert "`--sparsity_ratio" in text and "**pruning**" in text and "old\n" not in text
    assert call("--check", program=flags_table.main).status == 0
