"""Attention of whole sequences: every form of it against one written out, packed rows, a sequence over devices."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax.cache import write_slots
from qwen3_jax.ops import attention as forms
from qwen3_jax.ops import zigzag
from qwen3_jax.ops.attention import attention, attention_before_write, causal_attention
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

SEGMENTS = (1, 1, 1, 2, 2, 3, 3, 0)  # of eighths of a row: three documents and padding


def inputs(length: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, length, n, head_dim)), jnp.float32) for n in (heads, kv_heads, kv_heads)
    )
    segments = np.repeat(SEGMENTS, length // 8)
    return q, k, v, jnp.asarray([segments, segments[::-1]], jnp.int32)


def written_out(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """All scores at once, masked by a matrix."""
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTNH, v_BTNH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
    places = jnp.arange(q_BTNH.shape[1])
    earlier_TS = places[:, None] >= places[None]
    visible_BTS = (segments_BT[:, :, None] == segments_BT[:, None]) & earlier_TS[None]
    weights_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)


def value_and_grads(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
    """The output, and the gradients of a weighted sum of it over tokens that are no padding."""
    weights = jnp.cos(jnp.arange(q.size)).reshape(q.shape) * (segments > 0)[..., None, None]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, segments) * (segments > 0)[..., None, None]
        return (out * weights).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, grads


@functools.cache
def expected(length: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> Any:
    return value_and_grads(written_out, *inputs(length, heads, kv_heads, head_dim))


def assert_equal(result: Any, reference: Any) -> None:
    chex.assert_trees_all_close(jax.device_get(result), jax.device_get(reference), atol=1e-5, rtol=1e-5)


def test_packed_rows_and_padding() -> None:
    assert_equal(value_and_grads(causal_attention, *inputs(64)), expected(64))


def test_blocks_of_queries() -> None:
    """Long enough for three blocks, of which the last is shorter."""
    assert_equal(value_and_grads(causal_attention, *inputs(312)), expected(312))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=1, context=8),
        MeshConfig(fsdp=2, context=2, tensor=2),
        MeshConfig(fsdp=1, context=4, tensor=2),
        MeshConfig(fsdp=1, context=2, tensor=4),  # more than the key-value heads
    ],
    ids=str,
)
def test_a_sequence_over_devices(mesh: MeshConfig) -> None:
    """Packed rows, of which documents begin and end within chunks, on up to eight parts of a sequence."""

    def attend(*arrays: jax.Array) -> jax.Array:
        return zigzag.from_zigzag(causal_attention(*(zigzag.to_zigzag(x) for x in arrays)))

    with jax.set_mesh(make_mesh(mesh)):
        assert_equal(value_and_grads(attend, *inputs(64)), expected(64))


def test_zigzag_order() -> None:
    """Chunks 0..7 of a sequence on four devices: each has one from the front and its mirror from the back."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, context=4))):
        chunks = jnp.tile(jnp.repeat(jnp.arange(8), 2), (2, 1))
        mixed = jax.jit(zigzag.to_zigzag)(chunks)
        assert mixed[0, ::2].tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
        assert zigzag.zigzag_order(8, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
        chex.assert_trees_all_equal(jax.jit(zigzag.from_zigzag)(mixed), chunks)
        with pytest.raises(ValueError, match="sequence length: 12; use a multiple of 2 x context = 8"):
            zigzag.to_zigzag(chunks[:, :12])


def test_every_device_attends_to_as_many_keys() -> None:
    """The work of a causal mask over four devices: in zig-zag order equal, in the sequence's own 1 : 3 : 5 : 7."""
    order = zigzag.zigzag_order(64, 4)
    keys = (order + 1).reshape(4, -1).sum(axis=1)
    assert keys.max() - keys.min() == 0
    assert np.ptp((np.arange(64) + 1).reshape(4, -1).sum(axis=1)) > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_splash_kernel(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU's kernel, interpreted; with two parts each device has its own rows of the mask."""
    length = 256 * parts
    make = functools.partial(forms.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(forms.splash, "make_splash_mha", make)
    mesh = make_mesh(MeshConfig(fsdp=2 // parts, context=parts), jax.devices()[:2])
    kernel = forms._splash_kernel(4, length, parts)
    assert kernel is not None
    rows, place = PartitionSpec("fsdp", "context"), NamedSharding(mesh, PartitionSpec(None, "context"))

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        keys, values, key_segments = (zigzag.gather_sequence(x, parts) for x in (k, v, segments))
        return forms.splash_attention(kernel, q, keys, values, segments, key_segments)

    def attend(*arrays: jax.Array) -> jax.Array:
        specs = (kernel.manual_sharding_spec(place), rows, rows, rows, rows)
        split = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
        return zigzag.from_zigzag(split(kernel, *(zigzag.to_zigzag(x) for x in arrays)))

    with jax.set_mesh(mesh):
        result = value_and_grads(attend, *inputs(length, head_dim=128))
    assert_equal(result, expected(length, head_dim=128))


def test_splash_wants_whole_tiles() -> None:
    assert forms._splash_kernel(2, 192, 1) is None
    assert forms._splash_kernel(2, 384, 2) is None


@pytest.mark.parametrize(("length", "slot"), [(1, 5), (1, 0), (3, 4)])
def test_reading_a_cache_before_writing_equals_writing_first(length: int, slot: int) -> None:
    """What a TPU does, against the plain order; the slots about to be written hold old tokens, as in a ring that has
    gone round, and one row may look nowhere but at itself."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, k, v = normal(2, length, 4, 8), normal(2, length, 2, 8), normal(2, length, 2, 8)
    cached = (normal(2, 2, 8, 9), normal(2, 2, 9, 8))
    mask = jnp.asarray(rng.random((2, length, 9)) < 0.6).at[1].set(False)
    mask = mask.at[:, :, slot : slot + length].set(jnp.tril(jnp.ones((length, length), bool)))
    out = jax.jit(attention_before_write)(q, k, v, cached, mask, jnp.int32(slot))
    expected = jax.jit(lambda slot: attention(q, *write_slots(cached, k, v, slot), mask))(jnp.int32(slot))
    chex.assert_trees_all_close(out, expected, rtol=1e-5, atol=1e-5)
