"""The divergence of a student from its teacher, against float64, on one device and on meshes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.ops import loss as loss_module
from qwen3_jax.ops.loss import divergence_loss, token_divergences
from sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, LENGTH, WIDTH, TEACHER_WIDTH, VOCAB = 8, 12, 16, 24, 40
BETAS = (0.0, 0.3, 0.9, 1.0)


def inputs(scale: float = 1.0) -> tuple[jax.Array, ...]:
    """Hidden states and head of the student, of the teacher, and weights, a third of them 0."""
    rng = np.random.default_rng(0)
    shapes = ((ROWS, LENGTH, WIDTH), (VOCAB, WIDTH), (ROWS, LENGTH, TEACHER_WIDTH), (VOCAB, TEACHER_WIDTH))
    weights = rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 0.7)
    arrays = [scale * rng.standard_normal(shape) / shape[-1] ** 0.25 for shape in shapes]
    return tuple(jnp.asarray(x, jnp.float32) for x in (*arrays, weights))


def written_out(beta: float, temperature: float, arrays: tuple[jax.Array, ...]) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean and its two gradients, in float64, by the formulas over all logits at once."""
    hidden, head, teacher_hidden, teacher_head, weights = (np.asarray(x, np.float64) for x in arrays)

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        logits = logits - logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    log_p = log_softmax(teacher_hidden @ teacher_head.T / temperature)
    log_q = log_softmax(hidden @ head.T / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    if beta == 0:
        j, of_logits = (p * (log_p - log_q)).sum(axis=-1), q - p
    elif beta == 1:
        j = (q * (log_q - log_p)).sum(axis=-1)
        of_logits = q * (log_q - log_p - j[..., None])
    else:
        log_m = np.log(beta * p + (1 - beta) * q)
        of_q = (q * (log_q - log_m)).sum(axis=-1)
        j = beta * (p * (log_p - log_m)).sum(axis=-1) + (1 - beta) * of_q
        of_logits = (1 - beta) * q * (log_q - log_m - of_q[..., None])
    of_logits *= (weights / weights.sum() / temperature)[..., None]
    return (j * weights).sum() / weights.sum(), of_logits @ head, np.einsum("BTV,BTD->VD", of_logits, hidden)


def value_and_gradients(beta: float, temperature: float, arrays: tuple[jax.Array, ...]) -> Any:
    # The teacher too is an argument: XLA folds constants with other roundings than those of the program.
    value = functools.partial(divergence_loss, beta=beta, temperature=temperature)
    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(*arrays)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_written_out(
    beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 2 * 8 * VOCAB * 4)
    loss, gradients = value_and_gradients(beta, temperature, inputs())
    expected, *of_weights = written_out(beta, temperature, inputs())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip(gradients, of_weights, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}])
def test_a_mesh_changes_nothing(mesh: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary of both heads split over `tensor`, their widths gathered, tokens on every axis."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 2 * 2 * VOCAB * 4)
    expected, *of_weights = written_out(0.3, 1.0, inputs())
    with jax.set_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:8])):
        loss, gradients = value_and_gradients(0.3, 1.0, inputs())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, wanted in zip(gradients, of_weights, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta: float) -> None:
    """Exactly: loss and gradients are 0, not nearly."""
    hidden, head, *_, weights = inputs()
    loss, gradients = value_and_gradients(beta, 1.3, (hidden, head, hidden, head, weights))
    assert float(loss) == 0.0
    assert all(not np.asarray(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("beta", BETAS)
def test_distributions_far_apart_stay_finite(beta: float) -> None:
    """Logits of several hundred: probabilities that float32 holds as 0 on either side."""
    loss, gradients = value_and_gradients(beta, 1.0, inputs(scale=20.0))
    assert np.isfinite(loss)
    assert loss > 0
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_tokens_without_weight_have_no_part_and_none_is_no_loss() -> None:
    hidden, head, teacher_hidden, teacher_head, weights = inputs()
    other = jnp.where((weights == 0)[..., None], 7.0, hidden)
    losses = [divergence_loss(each, head, teacher_hidden, teacher_head, weights, beta=0.5) for each in (hidden, other)]
    assert losses[0] == losses[1]
    assert divergence_loss(hidden, head, teacher_hidden, teacher_head, 0 * weights, beta=0.5) == 0.0


def test_each_tokens_divergence_is_given_for_the_metrics() -> None:
    arrays = inputs()
    total, divergence_BT = token_divergences(*arrays, beta=0.0)
    assert divergence_BT.shape == (ROWS, LENGTH)
    np.testing.assert_allclose(total, (divergence_BT * arrays[-1]).sum(), rtol=1e-6)
    np.testing.assert_allclose(total / arrays[-1].sum(), written_out(0.0, 1.0, arrays)[0], rtol=1e-5)


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of the student nor the teacher's: a tenth of them at a time in the compiled program."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 2 * ROWS * LENGTH * VOCAB * 4 // 10)
    arrays = inputs()

    def value(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return divergence_loss(hidden, head, *arrays[2:], beta=0.3)

    text = jax.jit(jax.grad(value, argnums=(0, 1))).lower(*arrays[:2]).compile().as_text()
    for shape in (f"[{ROWS},{LENGTH},{VOCAB}]", f"[{ROWS * LENGTH},{VOCAB}]", f"[12,8,{VOCAB}]"):
        assert shape not in text
    assert f"[8,{VOCAB}]" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -0.1}, r"beta: -0.1; use a number in \[0, 1\]"),
        ({"beta": float("nan")}, "beta: nan; use a number"),
        ({"temperature": 0.0}, "temperature: 0.0; use a number above 0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        divergence_loss(*inputs(), **{"beta": 0.5, **fields})
    hidden, head, *teacher, weights = inputs()
    with pytest.raises(ValueError, match=r"^teacher: 39 entries; use one with the student's 40"):
        divergence_loss(hidden, head, teacher[0], teacher[1][:-1], weights, beta=0.5)
