"""`generate` over a small random mixture-of-experts model: against a naive loop, over batches, and as a program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import chex
import decode_reference as ref
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_judge import chooser, outcome, reference_row
from decode_model import (
    BREAK,
    CONFIG,
    END,
    END_TOOL,
    EOS,
    GEN,
    LONG,
    MODEL,
    NUM_TOKENS,
    STOP,
    THINK,
    TOKENS,
    TOOL,
    V,
    params,
    stacked_params,
)
from flax import linen as nn

from qwen3_jax.decode import Request, Result, check_request, generate, programs
from qwen3_jax.decode import batch as decode_batch
from qwen3_jax.decode.pack import pack, pack_markers
from qwen3_jax.model import Qwen3


def gen(requests: Sequence[Request], **options: Any) -> list[Result]:
    return generate(CONFIG, params(), requests, **{"tokens": TOKENS, **options})


@jax.jit
def _full_logits(params: Any, tokens_T: jax.Array) -> jax.Array:
    return MODEL.apply({"params": params}, tokens_T[None]).logits[0]


def full_logits(tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a forward pass over all tokens at once, without a cache; padded on the right to one shape."""
    padded = np.zeros(CONFIG.max_position_embeddings, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_full_logits(stacked_params(), padded))[: len(tokens)]


def naive(request: Request) -> ref.Outcome:
    """The whole sequence through the network at each step, and the plain-Python rules."""
    ids = ref.Ids(THINK, END, TOKENS.eos, TOOL, END_TOOL, NUM_TOKENS, STOP, TOKENS.empty_block)
    return ref.decode_row(
        lambda tokens: full_logits(tokens)[-1].tolist(), reference_row(request), ids, chooser(request)
    )


def some_requests() -> list[Request]:
    """Eight rows that differ in everything."""
    rng = np.random.default_rng(0)

    def prompt(length: int, *end: int) -> tuple[int, ...]:
        return (*rng.integers(0, 28, length).tolist(), EOS, GEN, *end)

    warm = {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "min_p": 0.01}
    return [
        Request(prompt(3), thinking_budget=4, max_new_tokens=30, **warm, seed=1),
        Request(prompt(20, THINK), thinking_budget=6, max_new_tokens=32),
        Request(prompt(9, THINK), max_new_tokens=25, **warm, seed=2, sample=1),
        Request(prompt(1), thinking_budget=0, max_new_tokens=31, **warm, seed=3),
        Request(prompt(6), thinking=False, thinking_budget=5, max_new_tokens=20),
        Request(prompt(12, THINK, 5, 6), thinking_budget=2, max_new_tokens=18, temperature=1.5, seed=2**32 - 1),
        Request(
            prompt(2, THINK, BREAK), thinking_budget=20, max_new_tokens=16, answer_reserve=4, eos_while_thinking="stop"
        ),
        Request(prompt(15, THINK), thinking_budget=9, max_new_tokens=32, temperature=1.2, seed=5),
    ]


def assert_same(got: Sequence[Result], expected: Sequence[Result]) -> None:
    """All fields equal, log-probabilities within 1e-4."""
    for one, other in zip(got, expected, strict=True):
        assert dataclasses.replace(one, logprobs=[]) == dataclasses.replace(other, logprobs=[])
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """What `generate` makes of `some_requests`, all in one batch."""
    return gen(some_requests())


def test_equals_the_naive_loop(results: list[Result]) -> None:
    """Cache, padding, batch and state machine together against none of them, token for token."""
    for request, result in zip(some_requests(), results, strict=True):
        assert naive(request) == outcome(result)
    assert {result.thinking_end for result in results} >= {"budget", "off", "natural", "length"}
    assert len({tuple(result.token_ids) for result in results}) == len(results)


def test_edge_12_23_injected_tokens_pass_through_the_model(results: list[Result]) -> None:
    """Log-probabilities of every token, before, in and after the injection, are those of a fresh forward pass over the
    sequence; a model that never saw an injected token would miss them by far."""
    for request, result in zip(some_requests(), results, strict=True):
        sequence = [*request.prompt_ids, *result.token_ids]
        logprobs = np.asarray(jax.nn.log_softmax(full_logits(sequence[:-1]), axis=-1))[len(request.prompt_ids) - 1 :]
        expected = logprobs[np.arange(len(result.token_ids)), result.token_ids]
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-4)
    cut = next(result for result in results if result.thinking_end == "budget" and result.answer_tokens > 3)
    i = results.index(cut)
    kept = [token for token, forced in zip(cut.token_ids, cut.forced, strict=True) if not forced]
    without = full_logits([*some_requests()[i].prompt_ids, *kept[:-1]])[-1]
    assert abs(jax.nn.log_softmax(without)[kept[-1]] - cut.logprobs[-1]) > 1e-2


def test_edge_14_49_a_row_is_the_same_alone_and_in_any_order(results: list[Result]) -> None:
    """Alone it has no padding but to the bucket, and no neighbours."""
    requests = some_requests()
    for i in (1, 3, 5):
        assert_same(gen([requests[i]]), [results[i]])
    order = np.random.default_rng(1).permutation(len(requests))
    assert_same(gen([requests[i] for i in order]), [results[i] for i in order])
    # A longer neighbour: twice the prompt slots, so more padding in all others.
    assert_same(gen([Request(LONG), *requests[1:]])[1:], results[1:])


def test_edge_60_progress_changes_nothing(results: list[Result]) -> None:
    reports: list[tuple[int, int, int]] = []
    assert_same(gen(some_requests(), progress=lambda *report: reports.append(report)), results)
    assert len(reports) > 1
    assert [total for _, total, _ in reports] == [len(results)] * len(reports)
    assert reports == sorted(reports)
    assert reports[-1] == (len(results), len(results), sum(len(result.token_ids) for result in results))
    assert reports[0][0] < len(results)


def test_stacked_and_per_layer_weights_and_samples(results: list[Result]) -> None:
    requests = some_requests()
    assert_same(generate(CONFIG, stacked_params(), requests, tokens=TOKENS), results)
    boxed = jax.tree.map(lambda w: nn.LogicallyPartitioned(w, (None,) * w.ndim), params())
    assert_same(generate(CONFIG, boxed, requests, tokens=TOKENS), results)
    other = [dataclasses.replace(request, sample=request.sample + 1) for request in requests]
    for request, result, before in zip(other, gen(other), results, strict=True):
        assert (result.token_ids == before.token_ids) == (request.temperature == 0)


def test_the_context_bounds_the_length() -> None:
    """A row ends by length where the context does, and a finite budget counts on no more than that."""
    assert len(LONG) + 11 == CONFIG.max_position_embeddings
    requests = [Request(LONG, seed=seed, temperature=1.0) for seed in range(3)]
    requests += [Request(LONG, thinking_budget=100, answer_reserve=2, seed=seed, temperature=1.0) for seed in range(4)]
    results = gen([*requests, some_requests()[-1]])[:-1]
    assert max(len(result.token_ids) for result in results[:3]) == 11
    assert max(len(result.token_ids) for result in results[3:]) == 11
    assert max(result.thinking_tokens for result in results[3:]) == 11 - len(STOP) - 2
    with pytest.raises(ValueError, match=r"max_new_tokens: 256 leaves 11 .* at least 12 .*6 for the stop text, 6 for"):
        gen([Request(LONG, thinking_budget=100, answer_reserve=6)])


# The program ---------------------------------------------------------------------------------------------------------


def other_requests(seed: int) -> list[Request]:
    """Eight rows whose every field is random."""
    rng = np.random.default_rng(seed)

    def request() -> Request:
        is_open = bool(rng.integers(2))
        prompt = (*rng.integers(0, 28, rng.integers(0, 25)).tolist(), EOS, GEN, *[THINK] * is_open)
        return Request(
            prompt,
            thinking_budget=rng.choice([None, 0, 1, 5, 100]),
            thinking=is_open or bool(rng.integers(2)),
            max_new_tokens=int(rng.integers(20, 33)),
            answer_reserve=int(rng.integers(4)),
            eos_while_thinking=str(rng.choice(["close", "stop"])),
            temperature=float(rng.choice([0.0, 0.7, 1.3])),
            top_p=float(rng.uniform(0.5, 1)),
            top_k=int(rng.integers(0, V)),
            min_p=float(rng.uniform(0, 0.2)),
            seed=int(rng.integers(2**32)),
            sample=int(rng.integers(8)),
        )

    return [request() for _ in range(8)]


def test_edge_61_no_value_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets, modes, sampling, seeds, lengths within the bucket, stop texts and special ids share one trace; what
    it writes differs, so that the values did matter."""
    once = chex.assert_max_traces(programs.start.__wrapped__, n=1)
    monkeypatch.setattr(decode_batch, "start", jax.jit(once, static_argnames=("model", "columns")))
    texts = set()
    for seed in range(5):
        tokens = dataclasses.replace(
            TOKENS, stop_ids=(*range(seed * 3), END), num_tokens=NUM_TOKENS - seed % 2, eos=TOKENS.eos[: 1 + seed % 2]
        )
        texts |= {tuple(result.token_ids) for result in gen(other_requests(seed), tokens=tokens)}
    assert len(texts) > 30
    with pytest.raises(AssertionError, match="traced > 1 times"):
        gen(other_requests(0)[:3])  # another batch size is another program


def test_edge_62_one_loop_and_no_host() -> None:
    """The compiled program holds one loop over tokens and nothing that talks to the host; one layer shows it."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, mlp_only_layers=())
    weights = {name: leaf for name, leaf in params().items() if name not in ("layer_0", "layer_2")}
    weights["layer_0"] = weights.pop("layer_1")
    requests = some_requests()
    limits = [check_request(request, config, TOKENS) for request in requests]
    packed = pack(requests, limits, config, TOKENS, prompt_slots=32)
    markers = pack_markers(TOKENS, V)
    model = Qwen3(config, dtype=jnp.float32)
    program = programs.start.lower(weights, packed, markers, np.int32(2**31 - 1), model=model, columns=32)
    text = program.compile().as_text()
    # The entry has one loop, that over tokens; sampling's bisection is in branches, and random bits in their own.
    entry = text[text.index("\nENTRY ") :]
    assert len(re.findall(r"= .* while\(", entry)) == 1
    assert not re.findall(r"= .* (infeed|outfeed|send|recv)\(", text)
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    assert not [target for target in targets if "callback" in target.lower() or "python" in target.lower()]


# Refusals ------------------------------------------------------------------------------------------------------------

PROMPT = (1, EOS, GEN)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("thinking_budget", [-2, -100, 1.0, 2.5, True, False, "5", "none", float("nan")]),
        ("max_new_tokens", [0, -1, 1.0, True, "5", None]),
        ("answer_reserve", [-1, 1.0, True, "5", None, 2**31]),
        ("top_k", [-1, 1.0, True, "5", None]),
        ("sample", [-1, 1.0, True, "5", None, 2**31]),
        ("seed", [-1, 1.0, True, "5", None, 2**32]),
        ("temperature", [-0.1, True, "1", None, float("nan"), float("inf"), 1e-9, 1001]),
        ("top_p", [-0.1, 0, 0.0, 1.1, True, "1", None, float("nan")]),
        ("min_p", [-0.1, 1.1, True, "1", None, float("nan")]),
        ("thinking", [0, 1, None, "false", "true"]),
        ("start_in_think", [0, 1, "false"]),
        ("eos_while_thinking", ["Close", True, None, "mask"]),
        ("prompt_ids", [(), [1.5], ["1"], None, 3, [None], "12"]),
    ],
)
def test_edge_08_a_field_of_the_wrong_kind_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field}: .*use .*"):
            Request(**{"prompt_ids": PROMPT, field: value})


def test_right_kinds_are_accepted() -> None:
    """The bounds themselves, and numpy's numbers."""
    Request(
        np.int32([1, 2]), thinking_budget=np.int64(3), max_new_tokens=1, answer_reserve=0, top_p=1, min_p=1, top_k=0
    )
    for budget in (None, -1, 0, 2**31 - 1, 2**40):
        Request(PROMPT, thinking_budget=budget, temperature=np.float32(0.6), seed=2**32 - 1, sample=2**31 - 1)


def test_edge_10_an_unknown_field_is_refused() -> None:
    for name in ("budget", "thinking_budget_tokens", "enable_thinking"):
        with pytest.raises(TypeError, match=name):
            Request(PROMPT, **{name: 3})
        with pytest.raises(TypeError, match=name):
            gen([Request(PROMPT)], **{name: 3})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request((4,) * 62), r"prompt_ids: 62 tokens; use at most 61, one less than the context"),
        (Request((1, V)), rf"prompt_ids: {V}; use ids in 0\.\.{V - 1}"),
        (Request((-1, 1)), rf"prompt_ids: -1; use ids in 0\.\.{V - 1}"),
        (
            Request(PROMPT, thinking_budget=1, max_new_tokens=9, answer_reserve=3),
            r"max_new_tokens: 9 .*needs at least 10 \(1 for <think>, 6 for the stop text, 3 for the answer\)",
        ),
        (
            Request((*PROMPT, THINK), thinking=False),
            r"thinking: False, but the prompt ends inside an open <think>; use True",
        ),
        (Request(PROMPT, start_in_think=True, thinking=False), r"thinking: False"),
    ],
)
def test_a_bad_request_is_named_by_its_place(bad: Request, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^requests\[2\]\.{message}"):
        gen([Request(PROMPT), Request(PROMPT), bad])


def test_start_in_think_overrides_what_the_prompt_says() -> None:
    """A thought without its marker in the prompt, and a marker that opens nothing."""
    told = Request((1, EOS, GEN, BREAK), start_in_think=True, thinking_budget=2, max_new_tokens=30)
    read = Request((1, EOS, GEN, THINK), start_in_think=False, thinking_budget=0, max_new_tokens=30)
    told, read, *_ = gen([told, read, *some_requests()[2:]])
    assert told.thinking_tokens <= 2
    assert told.thinking_end in ("natural", "budget", "eos")
    assert read.token_ids[:4] == list(TOKENS.empty_block)
    assert read.thinking_end == "off"


def test_thinking_tokens_are_checked() -> None:
    for fields, name in (({"stop_ids": (1, 2)}, "stop_ids"), ({"stop_ids": ()}, "stop_ids"), ({"eos": ()}, "eos")):
        with pytest.raises(ValueError, match=rf"^{name}: .*use .*"):
            dataclasses.replace(TOKENS, **fields)


def test_no_requests_no_results() -> None:
    assert gen([]) == []
