"""A table of the skipped tests at the end of a run; on CI some reasons are no excuse."""

from __future__ import annotations

import os
from collections import Counter

import pytest

NO_TRITON, NO_COMPILER = "needs Triton: pip install triton", "needs a C++ compiler"
# what .ci/run installs: a test that is skipped for the lack of it was not run by mistake
REQUIRED_ON_CI = NO_TRITON, NO_COMPILER, "needs the package"


def reasons(config: pytest.Config) -> Counter[tuple[str, str]]:
    """Count the skipped tests by (reason, file)."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    counts: Counter[tuple[str, str]] = Counter()
    for report in reporter.stats.get("skipped", []) if reporter else ():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[reason.removeprefix("Skipped: "), report.nodeid.split("::")[0]] += 1
    return counts


def missing_on_ci(config: pytest.Config) -> list[str]:
    """List the reasons for which tests must not be skipped on CI."""
    if not os.environ.get("CI"):
        return []
    return sorted({why for why, _ in reasons(config) if why.startswith(REQUIRED_ON_CI)})


def print_table(reporter: pytest.TerminalReporter) -> None:
    counts = reasons(reporter.config)
    if not counts:
        return
    reporter.section("skipped tests")
    for (why, file), count in sorted(counts.items()):
        reporter.write_line(f"{count:4}  {why:50}  {file}")
    for why in missing_on_ci(reporter.config):
        reporter.write_line(f"CI: tests were skipped that must run here: {why}", red=True)
