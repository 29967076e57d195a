"""Log-probabilities of given tokens: against a plain softmax, in any layout, on meshes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiles import count_compiles
from decode_model import CONFIG, MODEL, params, stacked_params

from qwen3_jax.decode import Request, generate, score
from qwen3_jax.decode.weights import decoding_weights
from sharding import MeshConfig, make_mesh, named_shardings

pytestmark = pytest.mark.usefixtures("quick_compile")

RNG = np.random.default_rng(0)
ROWS = [RNG.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 2, 31, 32, 33, 62, 5, 40, 7)]


def plain(row: list[int]) -> np.ndarray:
    """By the whole logits of one row, padded on the right to one shape."""
    padded = np.zeros((1, CONFIG.max_position_embeddings), np.int32)
    padded[0, : len(row)] = row
    logits_TV = jax.jit(lambda p, t: MODEL.apply({"params": p}, t).logits[0])(stacked_params(), padded)
    return np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(row) - 1), row[1:]]


def assert_plain(scores: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for found, values in zip(scores, expected, strict=True):
        assert (found.shape, found.dtype) == (values.shape, np.float32)
        np.testing.assert_allclose(found, values, atol=1e-5)


def test_scores_are_those_of_a_plain_softmax_in_either_layout() -> None:
    expected = [plain(row) for row in ROWS]
    assert_plain(score(CONFIG, stacked_params(), ROWS), expected)
    assert_plain(score(CONFIG, params(), ROWS), expected)
    assert score(CONFIG, params(), []) == []


@pytest.mark.parametrize(
    "sizes", [MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(data=2, fsdp=2, context=2)], ids=str
)
def test_scores_are_the_same_on_a_mesh(sizes: MeshConfig) -> None:
    """In the training layout, and in that of decoding."""
    mesh, weights, per_layer = make_mesh(sizes), stacked_params(), params()
    expected = [plain(row) for row in ROWS]
    with jax.set_mesh(mesh):
        sample = np.zeros((8, 16), np.int32)
        boxed: Any = jax.eval_shape(MODEL.init, jax.random.key(0), sample)["params"]
        assert_plain(score(CONFIG, jax.device_put(weights, named_shardings(boxed, mesh)), ROWS), expected)
        if sizes.context == 1:  # which decoding does not split
            assert_plain(score(CONFIG, decoding_weights(CONFIG, per_layer), ROWS), expected)


def test_other_rows_of_these_lengths_compile_nothing() -> None:
    score(CONFIG, params(), ROWS)
    with count_compiles() as compiles:
        score(CONFIG, params(), [row[::-1] for row in ROWS])
    assert compiles() == 0


def test_sampled_tokens_have_the_samplers_log_probabilities() -> None:
    """What trainer and sampler must agree on: one network, two programs."""
    from decode_model import EOS, GEN, TOKENS

    requests = [Request((i, EOS, GEN), temperature=1.0, seed=i, max_new_tokens=30) for i in range(1, 5)]
    results = generate(CONFIG, params(), requests, tokens=TOKENS)
    rows = [[*request.prompt_ids, *result.token_ids] for request, result in zip(requests, results, strict=True)]
    for result, found in zip(results, score(CONFIG, params(), rows), strict=True):
        np.testing.assert_allclose(found[2:], result.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r"^ids\[1\]: 0 tokens; use 1 to 62$"),
        ([1] * 63, r"^ids\[1\]: 63 tokens; use 1 to 62$"),
        ([1, 40], r"^ids\[1\]: 1\.\.40; use ids in 0\.\.39$"),
        ([-1, 3], r"^ids\[1\]: -1\.\.3; use ids in 0\.\.39$"),
    ],
)
def test_refusals(row: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(CONFIG, params(), [[1], row])


def test_half_precision_is_close() -> None:
    halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params())
    for row, found in zip(ROWS, score(CONFIG, halves, ROWS), strict=True):
        np.testing.assert_allclose(found, plain(row), atol=0.2)
