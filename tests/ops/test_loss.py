"""The head with log-probabilities and with cross-entropy against written-out ones, on one device and on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.ops import loss as loss_module
from qwen3_jax.ops.loss import TokenScores, linear_cross_entropy, token_logprobs
from sharding import AXIS_RULES, DECODE_RULES, AxisRules, MeshConfig, axis_rules, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, LENGTH, WIDTH, VOCAB = 8, 12, 16, 40


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    targets = (hidden @ head.T + 4 * rng.standard_normal((ROWS, LENGTH, VOCAB))).argmax(axis=-1)
    weights = rng.random((ROWS, LENGTH)).astype(np.float32) * (rng.random((ROWS, LENGTH)) < 0.7)
    return jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets), jnp.asarray(weights)


def written_out() -> tuple[float, float, np.ndarray, np.ndarray]:
    """Loss, accuracy and the loss's two gradients, in float64."""
    hidden, head, targets, weights = (np.asarray(x, np.float64) for x in inputs())
    one_hot = targets[..., None] == np.arange(VOCAB)
    logits = hidden @ head.T
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    loss = -(np.log(probs[one_hot].reshape(targets.shape)) * weights).sum()
    correct = ((logits.argmax(axis=-1) == targets) * weights).sum()
    of_logits = (probs - one_hot) * weights[..., None]
    return loss, correct, of_logits @ head, np.einsum("BTV,BTD->VD", of_logits, hidden)


def plain_scores(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array) -> TokenScores:
    """A float32 softmax over all logits at once."""
    logprobs_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD.T)
    chosen_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy_BT = -(jnp.exp(logprobs_BTV) * logprobs_BTV).sum(axis=-1)
    return TokenScores(chosen_BT, entropy_BT, (chosen_BT >= logprobs_BTV.max(axis=-1)).astype(jnp.float32))


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        (None, AXIS_RULES),
        ({"data": 2, "fsdp": 2, "tensor": 2}, AXIS_RULES),
        ({"expert": 2, "context": 2, "tensor": 2}, AXIS_RULES),
        ({"data": 2, "context": 2, "tensor": 2}, DECODE_RULES),
        ({"data": 2, "fsdp": 4}, DECODE_RULES),
    ],
)
def test_token_logprobs(mesh: dict[str, int] | None, rules: AxisRules, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, and the gradients of a sum that weighs each token's log-probability and entropy unevenly."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 8 * VOCAB * 4)
    hidden, head, targets, weights = inputs()
    entropy_weights = jnp.sin(jnp.arange(targets.size, dtype=jnp.float32)).reshape(targets.shape)

    def value_and_gradients(scores_of: Callable[..., TokenScores]) -> Any:
        def weighted(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, TokenScores]:
            scores = scores_of(hidden, head, targets)
            return (scores.logprob * weights + scores.entropy * entropy_weights).sum(), scores

        return jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(hidden, head)

    (_, expected), expected_gradients = value_and_gradients(plain_scores)
    sizes = {"fsdp": 1} | (mesh or {})
    with (
        axis_rules(rules),
        jax.set_mesh(make_mesh(MeshConfig(**sizes), jax.devices()[: 8 if mesh else 1])),
    ):
        (_, scores), gradients = value_and_gradients(token_logprobs)
    assert 0.1 < float(expected.is_best.mean()) < 0.9
    chex.assert_trees_all_close(scores, expected, rtol=1e-5, atol=1e-5)
    for found, correct in zip(gradients, expected_gradients, strict=True):
        assert np.abs(found - correct).max() < 1e-5 * np.abs(correct).max()


@pytest.mark.parametrize("chunk_tokens", [1, 8, 10**6])
@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}])
def test_loss_and_gradients(mesh: dict[str, int] | None, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", chunk_tokens * VOCAB * 4)
    value_and_grad = jax.value_and_grad(
        lambda *args: jax.tree.map(lambda x: 3 * x, linear_cross_entropy(*args)), (0, 1), has_aux=True
    )
    loss, correct, of_hidden, of_head = written_out()
    with jax.set_mesh(make_mesh(MeshConfig(**(mesh or {"fsdp": 1})), jax.devices()[: 8 if mesh else 1])):
        (value, scores), gradients = jax.jit(value_and_grad)(*inputs())
        plain, plain_scores = jax.jit(linear_cross_entropy)(*inputs())
    assert 0.1 < correct / float(inputs()[3].sum()) < 0.9
    chex.assert_trees_all_close((value / 3, plain), (loss, loss), rtol=1e-5)
    for is_best in (scores.is_best / 3, plain_scores.is_best):
        chex.assert_trees_all_close((is_best * inputs()[3]).sum(), correct, rtol=1e-5)
    for found, expected in zip(gradients, (of_hidden, of_head), strict=True):
        assert np.abs(found / 3 - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "value",
    [lambda *args: linear_cross_entropy(*args)[0], lambda *args: sum(x.sum() for x in token_logprobs(*args[:3]))],
)
def test_logits_are_never_whole(value: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that has room for a tenth of the logits, no array is as large as all of them."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", ROWS * LENGTH * VOCAB * 4 // 10)
    program = jax.jit(jax.grad(value)).lower(*inputs()).as_text()
    assert f"tensor<{ROWS * LENGTH // 12}x{VOCAB}xf32>" in program
    assert f"{ROWS * LENGTH}x{VOCAB}x" not in program
    assert f"{ROWS}x{LENGTH}x{VOCAB}x" not in program
