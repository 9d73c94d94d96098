"""What a pruning run did and did not do: nothing is left dense silently."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib.groups import Group

UNREACHED = "no calibration token reached it, or it is used without being called"


@dataclass
class Pruned:
    """What was done: sizes in weights of what was pruned and left dense, and why it was left."""

    pruned: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)  # method: experts
    warnings: list[str] = field(default_factory=list)

    def leave(self, name: str, size: int, why: str) -> None:
        self.left[name] = size
        self.why[name] = why

    def note(self, group: Group) -> None:
        if group.fallback:
            self.fallbacks.setdefault(group.fallback, []).append(group.names)

    def summary(self) -> list[str]:
        """What a user should know, a line each: nothing is left dense silently."""
        pruned, left = sum(self.pruned.values()), sum(self.left.values())
        lines = [
            f"pruned {pruned:,} weights in {len(self.pruned)} linears; "
            f"left {left:,} weights of the blocks dense"
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.why.items():
            reasons.setdefault(f"left dense, {why}", []).append(name)
        for method, names in self.fallbacks.items():
            reasons[f"pruned by {method}, too few tokens were routed to them"] = names
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{why}: {', '.join(names[:3])}{more}")
        return lines + self.warnings
