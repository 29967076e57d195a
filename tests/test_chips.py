"""The table of chips."""

from __future__ import annotations

import jax
import pytest

from qwen3_jax.chips import CHIPS, find_chip, slice_name
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
        assert peak_flops(devices, "bfloat16") == (
            len(devices) * CHIPS[name].peak_flops,
            f"data sheet of {devices[0].device_kind}",
        )


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5p:4x4x4", "v5p:4x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-16", "v5p:2x2x2"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-512", "v5p:4x8x8"),
        ("v4-32", "v4:2x2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5litepod-4", "v5e:2x2"),
        ("v5e-32", "v5e:4x8"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-1", "v6e:1x1"),
    ],
)
def test_accelerator_types_are_slices(name: str, topology: str) -> None:
    """As the Cloud TPU documentation pairs them: types of v4 and v5p count two cores a chip."""
    assert slice_name(name) == topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x8x2", "topology: 'v5e:4x8x2'; use 2 sizes, such as v5e:4x4"),
        ("v5p:4x4", "topology: 'v5p:4x4'; use 3 sizes, such as v5p:4x4x4"),
        ("v5p", "topology: 'v5p'; use 3 sizes"),
        ("v5p-100", "topology: 'v5p-100'; use a power of two of cores"),
        ("v5p-1", "topology: 'v5p-1'; use a power of two of cores"),
        ("v9-8", "chip: 'v9' is unknown; use one of v4"),
    ],
)
def test_slices_that_are_none_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        slice_name(name)


def test_peak_elsewhere_is_measured() -> None:
    peak, source = peak_flops(jax.devices()[:1], "float32")
    assert peak > 0
    assert source.endswith("measured")
