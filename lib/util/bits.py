"""Sets of small numbers as text: a bit for each number, in hexadecimal, the lowest first."""

from __future__ import annotations

from collections.abc import Iterable


def to_hex(numbers: Iterable[int], size: int) -> str:
    """Write a set of numbers below `size`; four to a digit, the lowest in its lowest bit."""
    digits = [0] * -(-size // 4)
    for number in numbers:
        assert 0 <= number < size
        digits[number // 4] |= 1 << number % 4
    return "".join(f"{digit:x}" for digit in digits)


def from_hex(text: str) -> set[int]:
    """Read what `to_hex` has written; ValueError where it is something else."""
    bits = ((place, int(digit, 16)) for place, digit in enumerate(text))
    return {4 * place + bit for place, digit in bits for bit in range(4) if digit >> bit & 1}
