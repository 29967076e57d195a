"""Choosing a token: the filters against plain numpy, the draws against the distribution, and what a draw depends on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.decode.sampling import Sampling, choose, filter_logits

V = 40

_filter = jax.jit(filter_logits)


@jax.jit
def _choose(logits_BV: jax.Array, allowed_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    return choose(logits_BV, allowed_BV, jnp.zeros(logits_BV.shape, jnp.int32), sampling, position_B)


def settings(batch: int, **fields: object) -> Sampling:
    """Settings of `batch` rows; a number is for all of them. Off, unless given."""
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence": 0.0, "frequency": 0.0}
    given |= {"seed": 0, "sample": 0, **fields}
    kinds = {"top_k": np.int32, "seed": np.uint32, "sample": np.int32}
    return Sampling(
        **{
            f"{name}_B": np.broadcast_to(value, batch).astype(kinds.get(name, np.float32))
            for name, value in given.items()
        }
    )


def plain_filter(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row's probabilities after the filters, in float64, with a sort, equal logits staying or going together."""
    logits = logits.astype(np.float64) / temperature
    probs = np.exp(logits - logits.max())
    if top_k > 0:
        probs[logits < np.sort(logits)[::-1][min(top_k, len(logits)) - 1]] = 0
    probs /= probs.sum()
    if top_p < 1:
        for level in np.unique(probs[probs > 0])[::-1]:
            if probs[probs >= level].sum() >= top_p:
                probs[probs < level] = 0
                break
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": V},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=lambda fields: " ".join(f"{name}={value}" for name, value in fields.items()) or "off",
)
def test_filters_are_the_plain_ones(fields: dict[str, float], ties: bool) -> None:
    """Temperature, then top-k, then top-p of what top-k left, then min-p; with ties, one row is all equal."""
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(32, V)).astype(np.float32)
    if ties:
        logits = np.round(logits / 2) * 2
        logits[0] = 1.0
    logits[:, 30:] = -np.inf  # masked
    filtered = np.asarray(_filter(logits, settings(32, **fields)))
    got = np.asarray(jax.nn.softmax(filtered, axis=-1))
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **fields}
    expected = np.stack([plain_filter(row, **given) for row in logits])
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    if fields:
        off = np.asarray(jax.nn.softmax(np.asarray(logits), axis=-1))
        assert fields == {"top_k": V} or not np.allclose(got, off, atol=1e-3)


def test_settings_are_per_row() -> None:
    """A batch of rows with settings of their own equals each in a batch of its like."""
    rng = np.random.default_rng(2)
    logits = rng.normal(scale=3, size=(4, V)).astype(np.float32)
    fields = {
        "temperature": [0.5, 1, 2, 0.9],
        "top_k": [0, 3, 12, 20],
        "top_p": [1, 1, 0.9, 0.5],
        "min_p": [0, 0, 0.1, 0.01],
    }
    mixed = np.asarray(_filter(logits, settings(4, **{name: np.array(values) for name, values in fields.items()})))
    for i in range(4):
        alike = _filter(logits, settings(4, **{name: values[i] for name, values in fields.items()}))
        np.testing.assert_array_equal(mixed[i], np.asarray(alike)[i])


@pytest.mark.parametrize("over", ["position", "seed", "sample"])
def test_draws_follow_the_filtered_distribution(over: str) -> None:
    """8,000 draws that differ in one part of the key only. Chi-square with 5 degrees of freedom: above 25.7 in one run
    of 10,000; the seed is fixed."""
    n = 8000
    logits = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], np.float32)
    fields = {"temperature": 1.2, "top_k": 7, "top_p": 0.97, "min_p": 0.02}
    probs = plain_filter(logits, **fields)
    keys = {"seed": 7, "sample": 3, "position": 11, over: np.arange(n)}
    position = np.broadcast_to(keys.pop("position"), n).astype(np.int32)
    allowed = np.ones((n, 8), bool)
    drawn = np.asarray(_choose(np.tile(logits, (n, 1)), allowed, settings(n, **fields, **keys), position))
    counts = np.bincount(drawn, minlength=8)
    kept = probs > 0
    assert kept.sum() == 6
    assert counts[~kept].sum() == 0
    chi_square = ((counts - n * probs)[kept] ** 2 / (n * probs[kept])).sum()
    assert chi_square < 25.7
    # Neighbouring keys are independent: as many equal neighbours as chance gives, within 5 standard deviations.
    expected = (probs**2).sum()
    assert abs((drawn[1:] == drawn[:-1]).mean() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_a_draw_depends_on_seed_sample_and_position_only() -> None:
    """Not on the slot, nor on what stands in the other slots; and on each of the three."""
    rng = np.random.default_rng(3)
    n = 64
    logits = np.tile(rng.normal(size=V).astype(np.float32), (n, 1))
    keys = {"seed": rng.integers(0, 2**32, n), "sample": rng.integers(0, 9, n)}
    position = rng.integers(0, 40960, n).astype(np.int32)
    allowed = np.ones((n, V), bool)
    drawn = np.asarray(_choose(logits, allowed, settings(n, **keys), position))
    order = rng.permutation(n)
    shuffled = {name: value[order] for name, value in keys.items()}
    np.testing.assert_array_equal(_choose(logits, allowed, settings(n, **shuffled), position[order]), drawn[order])

    others = logits + rng.normal(size=(n, V)).astype(np.float32)  # as forcing would change a row: others draw the same
    others[::2] = logits[::2]
    np.testing.assert_array_equal(np.asarray(_choose(others, allowed, settings(n, **keys), position))[::2], drawn[::2])

    for name in ("seed", "sample"):
        changed = {**keys, name: keys[name] ^ 1}
        assert (np.asarray(_choose(logits, allowed, settings(n, **changed), position)) != drawn).mean() > 0.8
    assert (np.asarray(_choose(logits, allowed, settings(n, **keys), position + 1)) != drawn).mean() > 0.8


def test_greedy_is_argmax_with_ties_to_the_lowest_id() -> None:
    """Alone, beside sampled rows, and whatever filters say."""
    rng = np.random.default_rng(4)
    logits = np.round(rng.normal(size=(16, V)).astype(np.float32) * 2)
    allowed = rng.random((16, V)) < 0.7
    expected = np.argmax(np.where(allowed, logits, -np.inf), axis=-1)
    position = np.arange(16, dtype=np.int32)
    alone = settings(16, temperature=0.0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(_choose(logits, allowed, alone, position), expected)
    mixed = settings(16, temperature=np.arange(16) % 2 * 5.0)
    drawn = np.asarray(_choose(logits, allowed, mixed, position))
    np.testing.assert_array_equal(drawn[::2], expected[::2])
    assert (drawn[1::2] != expected[1::2]).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_masked_ids_are_never_drawn(temperature: float) -> None:
    """Though they be the likeliest by far; and top-k counts allowed ids only."""
    n = 512
    rng = np.random.default_rng(5)
    allowed = rng.random((n, V)) < 0.3
    allowed[:, 7] = True
    logits = np.where(allowed, rng.normal(size=(n, V)), 30.0).astype(np.float32)
    position = np.arange(n, dtype=np.int32)
    for fields in ({}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.5}):
        drawn = np.asarray(_choose(logits, allowed, settings(n, temperature=temperature, **fields), position))
        assert allowed[np.arange(n), drawn].all()
    only = np.zeros((n, V), bool)
    only[:, 7] = True
    assert (np.asarray(_choose(jnp.asarray(logits), only, settings(n, temperature=temperature), position)) == 7).all()
