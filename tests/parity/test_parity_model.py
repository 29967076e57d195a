"""The whole model against transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM: same random weights, float32,
logits within 1e-4 (relative to the largest logit where that exceeds 1); gradients; bfloat16 against PyTorch's own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    random_tokens,
    relative_error,
    to_params,
    torch,
    torch_config,
    torch_logits,
    torch_model,
    torch_params,
)
from tiny import DENSE, MOE

from qwen3_jax.cache import KVCache
from qwen3_jax.config import ModelConfig, RopeScaling
from qwen3_jax.model import Qwen3, head_weight, stack_layers
from qwen3_jax.ops.loss import linear_cross_entropy

TOLERANCE = 1e-4
YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)

CONFIGS: dict[str, ModelConfig] = {
    "dense": DENSE,
    "dense, tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "dense, heads 4/4": dataclasses.replace(DENSE, num_key_value_heads=4),
    "dense, heads 8/2": dataclasses.replace(DENSE, num_attention_heads=8),
    "dense, heads 4/1": dataclasses.replace(DENSE, num_key_value_heads=1),
    "dense, head_dim 10 = hidden / heads": dataclasses.replace(DENSE, head_dim=10),
    "dense, YaRN": dataclasses.replace(DENSE, rope_scaling=YARN),
    "moe": MOE,
    "moe, tied": dataclasses.replace(MOE, tie_word_embeddings=True),
    "moe, gates not renormalised": dataclasses.replace(MOE, norm_topk_prob=False),
    "moe, every 2nd layer": dataclasses.replace(MOE, num_hidden_layers=4, decoder_sparse_step=2),
    "moe, layers 0 and 2 dense": dataclasses.replace(MOE, num_hidden_layers=4, mlp_only_layers=(0, 2)),
    "moe, YaRN": dataclasses.replace(MOE, rope_scaling=YARN),
}
ONE_SEGMENT = np.ones((3, 20), np.int32)
BOTH = {"dense": DENSE, "moe": MOE}


@functools.cache
def forward(config: ModelConfig) -> Any:
    """`forward(config)(params, tokens, segment_ids)`: logits. Always called with [3, 20] tokens, to compile once."""
    return jax.jit(
        lambda params, tokens, segments: (
            Qwen3(config, stacked=True).apply({"params": params}, tokens, None, segments).logits
        )
    )


@functools.cache
def cached_forward(config: ModelConfig) -> Any:
    """`cached_forward(config)(params, tokens, positions, segment_ids, cache)`: the whole Output."""
    return jax.jit(lambda params, *inputs: Qwen3(config).apply({"params": params}, *inputs))


@functools.cache
def reference(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The PyTorch model and its weights as stacked params."""
    model = torch_model(config)
    return model, stack_layers(config, torch_params(config, model))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name: str, check_error: Any) -> None:
    """The config makes the round trip through transformers' own config class on the way."""
    config = CONFIGS[name]
    assert ModelConfig.from_hf(torch_config(config).to_dict()) == config
    model, params = reference(config)
    tokens = random_tokens(config, 3, 20)
    expected = torch_logits(model, tokens)
    assert expected.std() > 0.5, "logits too small to show a mistake"
    logits = forward(config)(params, tokens, ONE_SEGMENT)
    chex.assert_shape(logits, (3, 20, config.vocab_size))
    chex.assert_type(logits, jnp.float32)
    check_error(f"logits: {name}", relative_error(logits, expected), TOLERANCE)


@pytest.mark.parametrize("name", ["dense", "moe, layers 0 and 2 dense"])
def test_logits_see_every_weight(name: str) -> None:
    """Noise of 0.01 on any one leaf breaks the tolerance, so no weight can be mapped wrongly unseen."""
    config = CONFIGS[name]
    model, params = reference(config)
    tokens = random_tokens(config, 3, 20)
    expected = torch_logits(model, tokens)
    leaves, tree = jax.tree.flatten_with_path(params)
    generator = np.random.default_rng(0)
    blind = []
    for i, (path, leaf) in enumerate(leaves):
        noisy = [x for _, x in leaves]
        noisy[i] = leaf + 0.01 * generator.standard_normal(leaf.shape).astype(np.float32)
        if relative_error(forward(config)(jax.tree.unflatten(tree, noisy), tokens, ONE_SEGMENT), expected) <= TOLERANCE:
            blind.append(jax.tree_util.keystr(path))
    assert not blind


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BOTH)
def test_padding(name: str, side: str, check_error: Any) -> None:
    """Rows of 20, 13 and 1 tokens; what stands at the padding does not matter."""
    config = BOTH[name]
    model, params = reference(config)
    tokens, lengths = random_tokens(config, 3, 20), np.array([20, 13, 1])[:, None]
    index = np.arange(20)
    real = (index >= 20 - lengths) if side == "left" else (index < lengths)
    positions = np.maximum(real.cumsum(axis=1) - 1, 0)  # as `generate` counts them
    expected = torch_logits(model, tokens, attention_mask=real.astype(np.int64), position_ids=positions)
    logits = forward(config)(params, tokens, real.astype(np.int32))
    assert np.isfinite(logits).all()
    check_error(f"{side} padding: {name}", relative_error(logits[real], expected[real]), TOLERANCE)
    if side == "left":
        unmasked = forward(config)(params, tokens, ONE_SEGMENT)
        assert relative_error(unmasked[real], expected[real]) > TOLERANCE
    else:
        other = forward(config)(params, np.where(real, tokens, 0), real.astype(np.int32))
        chex.assert_trees_all_close(logits[real], other[real], atol=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_packed_segments(name: str, check_error: Any) -> None:
    """Documents of several lengths in each row, with and without padding at the end, against each document alone."""
    config = BOTH[name]
    model, params = reference(config)
    tokens = random_tokens(config, 3, 20)
    rows = [(5, 11, 2), (20,), (1, 19)]
    segments = np.zeros((3, 20), np.int32)
    expected = np.zeros((3, 20, config.vocab_size), np.float32)
    for row, lengths in enumerate(rows):
        for segment, stop in enumerate(np.cumsum(lengths), start=1):
            document = slice(stop - lengths[segment - 1], stop)
            segments[row, document] = segment
            expected[row, document] = torch_logits(model, tokens[row : row + 1, document])
    real = segments > 0
    logits = forward(config)(params, tokens, segments)
    check_error(f"packed segments: {name}", relative_error(logits[real], expected[real]), TOLERANCE)
    unsegmented = forward(config)(params, tokens, ONE_SEGMENT)
    assert relative_error(unsegmented[real], expected[real]) > TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["dense, YaRN", "moe"])
def test_cached_decoding(name: str, side: str, check_error: Any) -> None:
    """Padded prompts of 3 and 8 tokens in one prefill, then 8 tokens one at a time, against the reference's full
    forward of each row. Slots past the last token stay empty and must not be seen."""
    config = CONFIGS[name]
    model, _ = reference(config)
    params = torch_params(config, model)
    lengths, prompt, steps = np.array([3, 8]), 8, 8
    rows = [random_tokens(config, 1, length + steps, seed=int(length)) for length in lengths]
    expected = [torch_logits(model, row)[0] for row in rows]

    tokens, segments = np.zeros((2, prompt), np.int32), np.zeros((2, prompt), np.int32)
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        where = slice(prompt - length, prompt) if side == "left" else slice(0, length)
        tokens[i, where], segments[i, where] = row[0, :length], 1
    positions = np.maximum(segments.cumsum(axis=1) - 1, 0)
    step = functools.partial(cached_forward(config), params)
    cache = KVCache.create(config, batch=2, prompt_slots=prompt + steps + 3, dtype=jnp.float32)
    out = step(tokens, positions, segments, cache)
    errors = [relative_error(out.logits[i][segments[i] > 0], expected[i][:length]) for i, length in enumerate(lengths)]
    for t in range(steps):
        tokens = np.stack([row[:, length + t] for row, length in zip(rows, lengths, strict=True)])
        out = step(tokens, lengths[:, None] + t, np.ones((2, 1), np.int32), out.cache)
        errors += [relative_error(out.logits[i, 0], expected[i][length + t]) for i, length in enumerate(lengths)]
    assert int(out.cache.next_slot) == prompt + steps
    check_error(f"cached decoding, {side}-padded: {name}", max(errors), TOLERANCE)
    wrong = step(tokens, lengths[:, None] + steps, np.ones((2, 1), np.int32), out.cache)  # one position late
    assert relative_error(wrong.logits[0, 0], expected[0][-1]) > TOLERANCE


@pytest.mark.parametrize("name", ["dense, tied", "moe"])
def test_gradients(name: str, check_error: Any) -> None:
    """Gradient of the mean cross-entropy with respect to every leaf, each relative to its own largest entry."""
    config = CONFIGS[name]
    model, params = reference(config)
    tokens = random_tokens(config, 2, 20)
    model.zero_grad()
    logits = model(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(tokens)[:, 1:].flatten())
    loss.backward()
    expected = stack_layers(config, to_params(config, {key: weight.grad for key, weight in model.named_parameters()}))

    @jax.jit
    @jax.value_and_grad
    def ours(params: Any) -> jax.Array:
        hidden = Qwen3(config, stacked=True).apply({"params": params}, tokens).hidden[:, :-1]
        targets = jnp.asarray(tokens[:, 1:])
        sums = linear_cross_entropy(hidden, head_weight(config, params), targets, jnp.ones(targets.shape))
        return sums[0] / targets.size

    def worst(params: Any) -> tuple[float, dict[str, float]]:
        value, grads = ours(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, expected)
        errors = jax.tree.map(lambda a, e: float(np.abs(a - e).max() / np.abs(e).max()), grads, expected)
        return abs(float(value) - loss.item()), {
            jax.tree_util.keystr(path): error for path, error in jax.tree.leaves_with_path(errors)
        }

    loss_error, errors = worst(params)
    check_error(f"loss: {name}", loss_error, 1e-5)
    check_error(f"gradients, worst of {len(errors)} leaves: {name}", max(errors.values()), TOLERANCE)
    _, perturbed = worst(jax.tree.map(lambda x: 1.01 * x, params))
    assert min(perturbed.values()) > TOLERANCE, "the tolerance lets a weight 1 % off pass"


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16(name: str, check_error: Any) -> None:
    """Both frameworks compute in bfloat16 from the same bfloat16 weights; the truth is the float32 reference on those
    weights. Our error, root mean square over the logits of six models, may be 1.5 times PyTorch's at most.

    Only PyTorch's weights are cast: casting the whole module would round its rotary frequencies too, which
    `from_pretrained` does not.
    """
    config = BOTH[name]
    squares = np.zeros(2)
    tokens = random_tokens(config, 4, 32)
    run = jax.jit(
        lambda params: Qwen3(config, stacked=True, dtype=jnp.bfloat16).apply({"params": params}, tokens).logits
    )
    for seed in range(6):
        model = torch_model(config, seed=100 + seed)
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        truth, params = torch_logits(model, tokens), stack_layers(config, torch_params(config, model))
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
        theirs, ours = torch_logits(model, tokens), np.asarray(run(params))
        squares += np.square(ours - truth).mean(), np.square(theirs - truth).mean()
    ours_rms, theirs_rms = np.sqrt(squares / 6)
    assert 1e-4 < theirs_rms < 1, "the reference is no longer a bfloat16 one"
    check_error(f"bfloat16 RMS ({theirs_rms:.2e} PyTorch): {name}", ours_rms, 1.5 * theirs_rms)
