"""The policy loss against float64 numpy, written token by token; masks; packed rows and parts."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.ops.policy import Policy, Sequences, policy_loss, policy_sums

ROWS, LENGTH = 3, 12
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] * 2 + [2] * 3 + [3] * 7])
GRPO = {"kind": "grpo", "clip_low": 0.2, "clip_high": 0.28}
GSPO = {"kind": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
SETTINGS = {
    "grpo": GRPO,
    "grpo, mean of sequences": GRPO | {"aggregation": "seq-mean"},
    "grpo, dual clip": GRPO | {"dual_clip": 1.5},
    "grpo, reference": GRPO | {"kl_coef": 0.3},
    "grpo, sampler": GRPO | {"tis_cap": 1.2},
    "gspo": GSPO,
    "gspo, wide, reference, sampler": GSPO | {"clip_low": 0.3, "clip_high": 0.3, "kl_coef": 0.1, "tis_cap": 2.0},
    "gspo, mean of sequences": GSPO | {"aggregation": "seq-mean", "clip_low": 0.2, "clip_high": 0.2},
    "gspo_token": GSPO | {"kind": "gspo_token", "clip_low": 0.1, "clip_high": 0.1},
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    logprobs, old, ref, sampler = (-rng.uniform(0.1, 2, (ROWS, LENGTH)) for _ in range(4))
    return {
        "logprobs": logprobs,
        "old": logprobs + rng.normal(size=(ROWS, LENGTH)) * 0.3,
        "ref": 0.5 * (ref + logprobs),
        "sampler": 0.1 * sampler + 0.9 * old,
        "advantages": rng.normal(size=(ROWS, LENGTH)),
        "mask": (rng.random((ROWS, LENGTH)) < 0.7).astype(float),
    }


def by_definition(given: dict[str, np.ndarray], frozen: np.ndarray, settings: dict[str, Any]) -> float:
    """In float64, one token after the other; `frozen` is what stop_gradient holds in place of the log-probabilities."""
    kind, losses, lengths = settings["kind"], [], []
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    for b in range(ROWS):
        for segment in range(1, SEGMENTS[b].max() + 1):
            at = [t for t in range(LENGTH) if SEGMENTS[b, t] == segment and given["mask"][b, t]]
            new, stopped, old = (x[b][at] for x in (given["logprobs"], frozen, given["old"]))
            mean = sum(new - old) / len(at)
            stopped_mean = sum(stopped - old) / len(at)
            of_tokens = []
            for i, t in enumerate(at):
                log_ratio = {
                    "grpo": new[i] - old[i],
                    "gspo": mean,
                    "gspo_token": stopped_mean + new[i] - stopped[i],
                }[kind]
                advantage, ratio = given["advantages"][b, t], math.exp(log_ratio)
                loss = -min(advantage * ratio, advantage * min(max(ratio, low), high))
                if "dual_clip" in settings and advantage < 0:
                    loss = min(loss, -settings["dual_clip"] * advantage)
                if "tis_cap" in settings:
                    loss *= min(math.exp(old[i] - given["sampler"][b, t]), settings["tis_cap"])
                if "kl_coef" in settings:
                    d, stopped_d = given["ref"][b, t] - new[i], given["ref"][b, t] - stopped[i]
                    k3_less_k2 = math.exp(stopped_d) - stopped_d - 1 - stopped_d**2 / 2
                    loss += settings["kl_coef"] * (d**2 / 2 + k3_less_k2)
                of_tokens.append(loss)
            losses.append(of_tokens)
            lengths.append(len(at))
    if settings.get("aggregation") == "seq-mean":
        return sum(sum(loss) / n for loss, n in zip(losses, lengths, strict=True)) / len(losses)
    return sum(map(sum, losses)) / sum(lengths)


def loss_of(given: dict[str, Any], settings: dict[str, Any], logprobs: Any = None) -> tuple[Any, Any]:
    extra: dict[str, Any] = {}
    if "kl_coef" in settings:
        extra["ref_logprobs_BT"] = given["ref"]
    if "tis_cap" in settings:
        extra["sampler_logprobs_BT"] = given["sampler"]
    logprobs = given["logprobs"] if logprobs is None else logprobs
    extra |= {"segment_ids_BT": SEGMENTS, **settings}
    return policy_loss(logprobs, given["old"], given["advantages"], given["mask"], **extra)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_and_gradient_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    """The gradient by central differences, in float64."""
    given = arrays()
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    (loss, _), gradient = jax.value_and_grad(lambda x: loss_of(inputs, settings, x), has_aux=True)(inputs["logprobs"])
    frozen = given["logprobs"]
    np.testing.assert_allclose(loss, by_definition(given, frozen, settings), atol=1e-6)
    expected, step = np.zeros((ROWS, LENGTH)), 1e-6
    for place in np.ndindex(ROWS, LENGTH):
        moved = []
        for sign in (1, -1):
            logprobs = frozen.copy()
            logprobs[place] += sign * step
            moved.append(by_definition(given | {"logprobs": logprobs}, frozen, settings))
        expected[place] = (moved[0] - moved[1]) / (2 * step)
    assert np.abs(expected).max() > 0.003
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_token_that_the_model_did_not_choose_is_in_nothing(settings: dict[str, Any]) -> None:
    """Whatever its numbers are, infinite ones too: the same loss and metrics, and a gradient of exactly 0."""
    given, is_out = arrays(), (arrays()["mask"] == 0) | (SEGMENTS == 0)
    spoilt = {name: np.where(is_out, -np.inf, x) if name != "mask" else x for name, x in given.items()}
    spoilt["advantages"] = np.where(is_out, 9.0, given["advantages"])

    def run(values: dict[str, Any]) -> Any:
        return jax.value_and_grad(lambda x: loss_of(values, settings, x), has_aux=True)(jnp.asarray(values["logprobs"]))

    expected, found = run(given), run(spoilt)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (found[1][is_out] == 0).all()
    assert (found[1][~is_out] != 0).any()


def test_k2_is_half_the_square_and_k3_has_its_gradient() -> None:
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arrays().items()}
    sequences, found = Sequences.of(given["mask"], SEGMENTS), {}
    for kind in ("k2", "k3"):

        def kl(logprobs: Any, kind: Any = kind) -> Any:
            policy = Policy(kl_coef=1.0, kl_kind=kind)
            loss, sums, _ = policy_sums(policy, sequences, logprobs, given["old"], 0 * logprobs, given["ref"])
            return loss, sums["kl"]

        (_, value), gradient = jax.value_and_grad(kl, has_aux=True)(given["logprobs"])
        found[kind] = value, gradient
    d = arrays()["ref"] - arrays()["logprobs"]
    at = (arrays()["mask"] > 0) & (SEGMENTS > 0)
    np.testing.assert_allclose(found["k2"][0], (d[at] ** 2 / 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["k3"][0], (np.exp(d[at]) - d[at] - 1).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["k2"][1], np.where(at, -d, 0), atol=1e-6)
    np.testing.assert_array_equal(found["k3"][1], found["k2"][1])


def test_the_first_update_has_ratios_of_exactly_one() -> None:
    given = arrays()
    for settings in (GRPO, GSPO, SETTINGS["gspo_token"]):
        _, metrics = loss_of(given | {"old": given["logprobs"]}, settings)
        assert (metrics["ratio"], metrics["clipped_low"], metrics["clipped_high"], metrics["old_kl"]) == (1, 0, 0, 0)


def test_both_forms_of_gspo_agree_where_a_sequence_has_one_advantage() -> None:
    given = arrays()
    for b, segment in ((0, 1), (0, 2), (1, 1), (2, 1), (2, 2), (2, 3)):
        given["advantages"][b][SEGMENTS[b] == segment] = b + segment - 2.0
    wide = {"clip_low": 0.3, "clip_high": 0.3}
    both = [
        jax.value_and_grad(lambda x, kind=kind: loss_of(given, {"kind": kind, **wide}, x), has_aux=True)(
            jnp.asarray(given["logprobs"], jnp.float32)
        )
        for kind in ("gspo", "gspo_token")
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *both)


def test_the_loss_of_a_step_does_not_depend_on_how_its_rows_are_cut() -> None:
    """Nor on packing: each sequence in a row of its own gives the same."""
    given = {name: jnp.asarray(x, jnp.float32) for name, x in arrays().items()}
    policy = Policy("gspo", 0.1, 0.1, aggregation="seq-mean", max_sampler_ratio=1.02, tis_cap=2.0)

    def parts(cut: list[Any]) -> tuple[Any, Any]:
        sums, counts = [], []
        for rows, segments in cut:
            names = ("logprobs", "old", "advantages", "mask", "sampler")
            logprobs, old, advantages, mask, sampler = (given[name][rows] for name in names)
            sequences = Sequences.of(mask, segments)
            sums.append(policy_sums(policy, sequences, logprobs, old, advantages, sampler_logprobs_BT=sampler)[:2])
            counts.append(sequences.counts())
        (loss, sums), counts = (jax.tree.map(lambda *x: sum(x), *trees) for trees in (sums, counts))
        return loss / policy.denominator(counts), sums

    whole = parts([(slice(None), SEGMENTS)])
    assert 0 < whole[1]["left_out"] < arrays()["mask"].sum()
    rows = [slice(b, b + 1) for b in range(ROWS)]
    cut = parts([(row, SEGMENTS[row]) for row in rows])
    alone = parts([(row, SEGMENTS[row] == s) for row in rows for s in range(1, SEGMENTS[row].max() + 1)])
    for other in (cut, alone):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), other, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ppo"}, "kind: 'ppo'; use one of grpo, gspo, gspo_token"),
        ({"aggregation": "mean"}, "aggregation: 'mean'; use one of token-mean, seq-mean"),
        ({"clip_low": 1.0}, r"clip_low, clip_high: 1.0, 0.28; use \[0, 1\) and 0 or more"),
        ({"dual_clip": 1.0}, "dual_clip: 1.0; use a number above 1, or none"),
        ({"kl_coef": 0.1}, "kl_coef: 0.1 without ref_logprobs_BT; give the reference's, or use 0"),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    ones = np.ones((1, 2))
    with pytest.raises(ValueError, match=message):
        policy_loss(ones, ones, ones, ones, **settings)
