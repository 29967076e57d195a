"""`qwen3-jax suggest --model NAME --tokens D`: initial values for learning rate and batch size."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from qwen3_jax.cli.config_file import load_model
from qwen3_jax.optim import step_law

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# The range of the dense runs that Step Law was fitted on.
_FITTED_WEIGHTS = (215e6, 1.07e9)
_FITTED_TOKENS = (4e9, 100e9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `qwen3-jax suggest`."""
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--params", help="weights without embedding table and head, as 440M or 6.9B")
    size.add_argument("--model", help="a name in configs/model, or a YAML file like those")
    parser.add_argument("--tokens", required=True, help="tokens of the complete run, as 100B or 30T")
    parser.add_argument("--sequence-length", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the suggestion."""
    if args.sequence_length < 1:
        raise ValueError(f"--sequence-length: {args.sequence_length}; use a number >= 1")
    weights = _number("--params", args.params) if args.model is None else _weights(args.model)
    tokens = _number("--tokens", args.tokens)
    rate, batch_tokens = step_law(weights, tokens)
    rows = max(1, round(batch_tokens / args.sequence_length))
    steps = math.ceil(tokens / (rows * args.sequence_length))
    outside = _outside("weights", weights, _FITTED_WEIGHTS) + _outside("tokens", tokens, _FITTED_TOKENS)
    if args.json:
        found: dict[str, Any] = {"params": weights, "tokens": tokens, "outside": outside, "learning_rate": rate}
        found |= {"batch_tokens": batch_tokens, "sequence_length": args.sequence_length, "batch_size": rows}
        found |= {"steps": steps}
        print(json.dumps(found))
        return
    print(
        f"weights        {weights:,.0f} without embedding table and head; of a mixture of experts, all experts\n"
        f"tokens         {tokens:,.0f}\n"
        f"learning_rate  {rate:.2e}, the peak\n"
        f"batch_size     {rows:,} rows of {args.sequence_length:,}; the law says {batch_tokens:,.0f} tokens a step\n"
        f"steps          {steps:,}\n"
        "\n"
        "By Step Law (Li et al. 2025, arXiv 2503.04715), for AdamW with 2,000 steps of warm-up and a cosine decay\n"
        "to a rate of 1e-5; not for Muon, a constant rate, or a later stage. It was fitted on runs of 215M to 1.07B\n"
        f"weights and 4B to 100B tokens: {' and '.join(outside) or 'this run is inside that range'}."
    )


def _number(name: str, text: str) -> float:
    """`text` as a number above 0, with an optional suffix K, M, B or T."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {text!r}; use a number above 0, as 440M or 30T or 3e13")
    return value


def _weights(model: str) -> int:
    """Number of weights of a model without embedding table and head."""
    config = load_model(model)
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_params - tables * config.vocab_size * config.hidden_size


def _outside(name: str, value: float, fitted: tuple[float, float]) -> list[str]:
    """A message for a value outside the range that the law was fitted on; empty for a value inside."""
    low, high = fitted
    if value < low:
        return [f"{name} {low / value:,.1f} times below that"]
    return [f"{name} {value / high:,.1f} times above that"] if value > high else []
