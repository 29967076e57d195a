"""The page of a plan, on a program whose numbers can be added up by hand; what a refusal of the compiler says."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from qwen3_jax.aot.programs import use_compiler
from qwen3_jax.aot.report import Report, page, refused_bytes

GIB = 2**30
REPORT = Report(
    what="train step, 64 rows of 1,024 tokens, 64 at a time",
    topology="v5e:4x4",
    mesh={"fsdp": 16},
    chips=16,
    chip="v5e",
    hbm={"parameters": 2.0 * GIB, "optimizer": 4.0 * GIB, "activations and temporaries": 8.5 * GIB},
    capacity=16.0 * GIB,
    tokens=65536,
    compile_s=12.3,
    compiler="jax 1, libtpu 2",
    flops=98.5e12,
    peak_flops=197e12,
    step_s=1.25,
    slow_step_s=1.5,
    seconds={"matrix products": 0.75, "kernels": 0.25, "other": 0.125, "collectives": 0.125},
    work={"matrix products": 120e12, "kernels": 10e12, "hbm": 200e9},
    collectives=(
        {
            "kind": "all-gather",
            "group_size": 16,
            "synchronous": False,
            "count": 56.0,
            "bytes": 3.2e9,
            "seconds": 0.25,
            "exposed_s": 0.125,
        },
    ),
    costliest=({"seconds": 0.5, "count": 28.0, "kind": "matmul", "shape": "bf16[8,8]", "source": "body/dot_general"},),
)


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_page_adds_up() -> None:
    """98.5 of 197 TFLOP in 1.25 s are 40 %; 65,536 tokens in 1.25 s are 52,429 a second; 16 chips at 3.6 dollars an
    hour are 0.016 a second, so 1e9 tokens, 19,073 s, cost 305.18."""
    text = page(REPORT, price=3.6)
    lines = words(text)
    assert "total 14.50 of 16: fits, 1.50 free".split() in lines
    assert "MFU 40.0%".split() in lines
    assert "tokens/s 52,429 3,276.8 per chip".split() in lines
    assert "$ per 10^9 tokens 305.18 at $3.6 per chip and hour".split() in lines
    assert "all-gather, async 16 56 3.20 250.00 ms 125.00 ms".split() in lines
    assert "matmul 28 500.00 ms bf16[8,8] body/dot_general".split() in lines
    assert "$" not in page(REPORT)
    long = dataclasses.replace(REPORT, costliest=({**REPORT.costliest[0], "source": "a/" * 17},))
    assert max(map(len, (*text.splitlines(), *page(long).splitlines()))) <= 80
    assert "waiting for HBM 0.00 ms 200.0 GB, async copies included".split() in lines
    slower = words(page(dataclasses.replace(REPORT, step_s=1.5)))
    assert "waiting for HBM 250.00 ms 200.0 GB, async copies included".split() in slower
    assert REPORT.to_json(3.6)["dollars_per_billion_tokens"] == pytest.approx(305.18, abs=0.01)
    assert REPORT.to_json()["mfu"] == pytest.approx(0.4)


def test_a_page_says_what_does_not_fit_and_what_to_change() -> None:
    large = dataclasses.replace(REPORT, hbm=REPORT.hbm | {"optimizer": 12.0 * GIB})
    assert "total 22.50 of 16: DOES NOT FIT, 6.50 over".split() in words(page(large))
    assert "the largest part is optimizer: use more chips along mesh.fsdp" in page(large)
    refused = dataclasses.replace(REPORT, step_s=None, hbm={"activations and temporaries": 20.0 * GIB})
    assert not refused.fits
    assert "fewer tokens per micro-batch" in page(refused)
    assert "estimated step" not in page(refused)
    assert refused.to_json()["mfu"] is None


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 106.54G of 95.74G hbm. Exceeded hbm capacity by 10.79G.", 106.54),
        ("the total memory required for HLO temporaries (192.00G) exceeds available HBM (95.74G).", 195.0),
        ("RESOURCE_EXHAUSTED: for some other reason", float("inf")),
    ],
)
def test_refusals(message: str, gib: float) -> None:
    """Temporaries lie beside the 3 GiB that the program is given."""
    assert refused_bytes(message, 3.0 * GIB) == pytest.approx(gib * GIB)


def test_a_machine_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu: not installed; `pip install 'jax\[tpu\]'` on Linux x86-64"):
        use_compiler()
