"""Bytes as a function of the number of tokens.

Every storage of a layer without quadratic attention has a + b T bytes for T tokens: activations a = 0, gradients of
weights b = 0. So is every sum of them, and the most that is alive is the greatest of a few such lines. They are found
from two measurements, T1 and T2, and checked with a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction


class NotAffineError(ValueError):
    """Bytes that do not lie on a line over the number of tokens."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The greatest of some lines: bytes(T) = max over (a, b) of a + b T."""

    lines: tuple[tuple[Fraction, Fraction], ...]  # (bytes, bytes per token); none is nowhere the greatest by both

    @classmethod
    def through(cls, tokens: Sequence[int], totals: Sequence[Sequence[int]]) -> Lines:
        """The upper envelope of what was measured at several numbers of tokens.

        Args:
            tokens: numbers of tokens, increasing; with one alone the bytes count as constant.
            totals: for each number of tokens, bytes alive after the same operations.

        Raises:
            NotAffineError: operations differ in number, or a total is off its line at a further number of tokens.
        """
        if len({len(each) for each in totals}) != 1:
            raise NotAffineError(f"{[len(each) for each in totals]} operations at {list(tokens)} tokens")
        if len(tokens) == 1:
            return cls(((Fraction(max(totals[0], default=0)), Fraction(0)),))
        lines = set()
        for values in zip(*totals, strict=True):
            slope = Fraction(values[1] - values[0], tokens[1] - tokens[0])
            line = (values[0] - slope * tokens[0], slope)
            for count, value in zip(tokens[2:], values[2:], strict=True):
                if abs(line[0] + slope * count - value) > 0.01 * abs(value) + 64:
                    raise NotAffineError(f"{list(values)} bytes at {list(tokens)} tokens")
            lines.add(line)
        return cls(tuple(_greatest(lines)))

    def plus(self, num_bytes: int) -> Lines:
        """The same with a constant on top."""
        return Lines(tuple((a + num_bytes, b) for a, b in self.lines))

    def at(self, tokens: int) -> int:
        """Bytes at this number of tokens."""
        return round(max((a + b * tokens for a, b in self.lines), default=Fraction(0)))


def _greatest(lines: Iterable[tuple[Fraction, Fraction]]) -> list[tuple[Fraction, Fraction]]:
    """Without the lines that another one is never below."""
    kept: list[tuple[Fraction, Fraction]] = []
    for a, b in sorted(lines, reverse=True):
        if not kept or b > kept[-1][1]:
            kept.append((a, b))
    return kept
