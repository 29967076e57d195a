"""Whether two mathematical expressions are equal, by math-verify; called in a process that can be killed."""

from __future__ import annotations

import math_verify


def are_equal(wanted: str, answer: str) -> bool | None:
    """None where `wanted` is no expression. math-verify's own deadlines only work in a main thread, and are off."""
    gold = math_verify.parse(f"${wanted}$", parsing_timeout=None) or math_verify.parse(wanted, parsing_timeout=None)
    if not gold:
        return None
    # An answer that is nothing but a formula may lack its dollars, as the reference may.
    readings = [answer] if "$" in answer or "\n" in answer.strip() else [answer, f"${answer}$"]
    return any(
        math_verify.verify(gold, math_verify.parse(reading, parsing_timeout=None), timeout_seconds=None)
        for reading in readings
    )
