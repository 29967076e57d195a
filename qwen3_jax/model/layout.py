"""The two layouts of the weights: one entry per layer, or one stacked entry per run of equal layers.

Training scans over stacked layers (`layers_0_28`, leading axis 28), so that compile time does not grow with depth.
Decoding wants one array per layer (`layer_0`, ...): a scan would copy each layer's weights and cache at every step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen3_jax.config import ModelConfig


def layer_name(layer: int) -> str:
    """Name of one layer's weights."""
    return f"layer_{layer}"


def run_name(start: int, stop: int) -> str:
    """Name of the stacked weights of layers start .. stop - 1."""
    return f"layers_{start}_{stop}"


def is_stacked(config: ModelConfig, params: Any) -> bool:
    """Whether `params` holds stacked layers."""
    return run_name(*config.layer_runs[0]) in params


def stack_layers(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Per-layer weights to stacked ones; stacked ones are returned as they are."""
    if is_stacked(config, params):
        return params
    out = {name: value for name, value in params.items() if not name.startswith("layer_")}
    for start, stop in config.layer_runs:
        layers = [params[layer_name(i)] for i in range(start, stop)]
        out[run_name(start, stop)] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return out


def unstack_layers(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Stacked weights to per-layer ones; per-layer ones are returned as they are."""
    if not is_stacked(config, params):
        return params
    out = {name: value for name, value in params.items() if not name.startswith("layers_")}
    for start, stop in config.layer_runs:
        for i in range(start, stop):
            out[layer_name(i)] = jax.tree.map(lambda x, i=i, start=start: x[i - start], params[run_name(start, stop)])
    return out
