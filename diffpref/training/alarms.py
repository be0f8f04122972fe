"""Signs that a run goes wrong while its numbers are still finite. They are reported and change nothing.

A spike: loss or gradient norm far above the median of the steps before.
Saturation: the sigmoid of nearly all pairs is flat, so that they teach nothing more; or held-out pairs are told apart nearly
always while the policy denoises both pictures worse than its reference, the way in which preference training destroys a model.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

WINDOW, FEWEST = 50, 10
"""Steps whose median is the measure, and how many there must be."""
SPIKE = 10.0
"""Times the median at which a value is a spike."""
SATURATED_SHARE = 0.9
"""Share of pairs with a flat sigmoid, averaged over the window, that is reported."""
TOLD_APART = 0.98
"""Held-out accuracy that is suspicious while both errors rise."""

SATURATED = "rewards/saturated"


class Alarms:
    """Looks at the numbers of each step in turn. Saturation is reported once, and again after it had ended."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self._saturated: deque[float] = deque(maxlen=WINDOW)
        self._is_saturated = False

    def look(self, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """(kind, text) of what is wrong with a step whose loss and gradient norm are finite."""
        for name, seen in self._seen.items():
            value = abs(values[name])
            if len(seen) >= FEWEST and value > SPIKE * (middle := statistics.median(seen)) > 0:
                yield "spike", f"{name} is {value:.4g}, {value / middle:.0f} times the median of the last {len(seen)} steps"
            seen.append(value)
        if SATURATED in values:
            self._saturated.append(values[SATURATED])
            share = sum(self._saturated) / len(self._saturated)
            was, self._is_saturated = self._is_saturated, len(self._saturated) >= FEWEST and share >= SATURATED_SHARE
            if self._is_saturated and not was:
                yield (
                    "saturated",
                    f"the sigmoid of {share:.0%} of the pairs is flat, over {len(self._saturated)} steps: they teach nothing more; "
                    "lower beta or learning_rate, or stop here",
                )


def held_out_alarm(found: Mapping[str, Any]) -> str | None:
    """What is wrong with a validation, or None. Gains are how much lower the policy's error is than the reference's."""
    accuracy = found.get("eval/implicit_accuracy")
    gains = [found.get(f"eval/gain_{which}", 0.0) for which in ("chosen", "rejected")]
    if accuracy is None or accuracy < TOLD_APART or max(gains) >= 0:
        return None
    return (
        f"held-out accuracy is {accuracy:.3f} while the errors of both pictures rise: the policy leaves the images of the data; "
        "lower learning_rate or raise beta, or stop earlier"
    )
