"""The table of chips."""

from __future__ import annotations

import jax
import pytest

from qwen3_jax.chips import CHIPS, find_chip
from qwen3_jax.train.flops import peak_flops


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("v5p", "v5p"),
        ("v5p:4x4x4", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("v5e:16x16", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v4", "v4"),
    ],
)
def test_names(name: str, chip: str) -> None:
    assert find_chip(name) is CHIPS[chip]


@pytest.mark.parametrize("name", ["v5", "TPU", "", ":4x4", "cpu"])
def test_unknown_name_lists_what_fits(name: str) -> None:
    with pytest.raises(ValueError, match=r"^chip: .*; use one of v4, v5e, v5p, v6e, tpu7x.*'TPU v5 lite'"):
        find_chip(name)


def test_torus_axes_wrap() -> None:
    assert CHIPS["v5e"].wraps((16, 8), 0)
    assert not CHIPS["v5e"].wraps((16, 8), 1)
    assert CHIPS["v5p"].wraps((4, 4, 8), 0)
    assert not CHIPS["v5p"].wraps((4, 4, 2), 0)  # no whole cubes of 4 x 4 x 4


def test_device_kinds_are_those_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is not in the table would have MFU counted against a measured matmul."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for name, topology in {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}.items():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        assert find_chip(devices[0].device_kind) is CHIPS[name]
        assert peak_flops(devices) == (
            len(devices) * CHIPS[name].peak_flops,
            f"data sheet of {devices[0].device_kind}",
        )


def test_peak_elsewhere_is_measured() -> None:
    peak, source = peak_flops(jax.devices()[:1])
    assert peak > 0
    assert source.endswith("measured")
