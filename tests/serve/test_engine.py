"""Records to jobs to records on the model that ships: stop texts, streams, modes of other models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.checkpoint import weights_digest
from qwen3_jax.decode import Result
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.text.chat_format import ChatFormat
from qwen3_jax.text.prompt import Prompt
from sharding import MeshConfig, make_mesh

CHAIN = "Start with 3 and keep the last digit: +4 *7 +5 _ _ _ _ _ _ _"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(shipped_model())


def streamed(engine: Engine, job: Prompt) -> tuple[Result, list[tuple[str, bool]]]:
    pieces: list[tuple[str, bool]] = []
    return engine.stream(job, lambda text, in_thought: pieces.append((text, in_thought))), pieces


def result(engine: Engine, text: str, forced: range = range(0), **fields: Any) -> Result:
    """A finished row that wrote `text`."""
    ids = engine.tokenizer.encode(text)
    return Result(
        **{
            "token_ids": ids,
            "thinking_tokens": 0,
            "injected_tokens": len(forced),
            "answer_tokens": len(ids),
            "thinking_end": "natural" if "</think>" in text else "none",
            "finish_reason": "length",
            "logprobs": [-1.0] * len(ids),
            "forced": [i in forced for i in range(len(ids))],
            **fields,
        }
    )


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": CHAIN, "thinking_budget": 2},
        {"prompt": CHAIN, "temperature": 2.0, "seed": 4, "max_new_tokens": 40},
        {"prompt": CHAIN + " /no_think"},
        {"prompt": CHAIN, "enable_thinking": False},
        {"prompt": CHAIN, "thinking_budget": "auto", "auto_threshold": 1e-6},
        {"prompt": CHAIN, "max_new_tokens": 4},
    ],
)
def test_edge_52_stream_deltas_are_the_text_of_the_closed_run(engine: Engine, record: dict[str, Any]) -> None:
    """The same ids, and pieces that put together are the whole text: first of the thought, then of the answer."""
    job = engine.prompt(record)
    final, pieces = streamed(engine, job)
    closed = engine.generate([job.request])[0]
    assert dataclasses.replace(final, logprobs=[]) == dataclasses.replace(closed, logprobs=[])
    assert "".join(text for text, _ in pieces) == engine.text(closed)
    kinds = [in_thought for _, in_thought in pieces]
    assert kinds == sorted(kinds, reverse=True)
    thought = "".join(text for text, in_thought in pieces if in_thought)
    answer = engine.reader.record(closed)["content"]
    assert thought.rstrip("\n").endswith("</think>") or not thought or not answer
    assert "".join(text for text, in_thought in pieces if not in_thought).strip() == answer
    assert len(pieces) > 1 or len(closed.token_ids) <= 5


@pytest.mark.parametrize(
    ("text", "stop", "content"),
    [
        ("1 2 3 4 5", ["3"], "1 2 "),
        ("1 2 3 4 5", [" 4", "2 3"], "1 "),  # the one that is complete first
        ("1 2 3 4 5", ["3 4", "4"], "1 2 "),
        ("1 2 3", ["7"], "1 2 3"),
        ("<think>\n1 2\n</think>\n\n3 2 1", ["2"], "3 "),  # a thought does not stop
        ("<think>\n1\n</think>\n\n3\n\n1", ["\n\n"], "3"),  # nor do the newlines before the answer
        ("\u00e9 \u4f60\u597d!", ["\u597d"], "\u00e9 \u4f60"),  # of several bytes, each an id
        ("1 2<|im_end|>", ["<|im_end|>"], "1 2"),  # the end of a turn is no text
    ],
)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(
    engine: Engine, text: str, stop: list[str], content: str
) -> None:
    """The ids go on to the token that completes it, and no further."""
    written = result(engine, text)
    job = dataclasses.replace(engine.prompt({"prompt": "x", "stop": stop}))
    trimmed = engine.reader.trim(written, job.stop)
    record = engine.reader.record(trimmed, job)
    assert record["content"] == content
    thought = engine.reader.record(written)["thinking"]
    assert record["thinking"] == thought
    if trimmed == written:
        assert record["finish_reason"] == "length"
        return
    dropped = len(written.token_ids) - len(trimmed.token_ids)
    assert trimmed.answer_tokens == written.answer_tokens - dropped
    assert len(trimmed.logprobs) == len(trimmed.forced) == len(trimmed.token_ids)
    assert record["finish_reason"] == "stop"
    assert any(one in engine.tokenizer.decode(trimmed.token_ids) for one in stop)
    less = dataclasses.replace(written, token_ids=trimmed.token_ids[:-1], forced=trimmed.forced[:-1])
    assert engine.reader.trim(less, job.stop) == less


def test_edge_53_a_stop_text_does_not_fire_inside_injected_text(engine: Engine) -> None:
    """Words of the stop sentence, the newlines after it, and what a stop text of another recipe says after the close;
    nor does any text of the thought reach the content."""
    cut = {"prompt": CHAIN, "thinking_budget": 2}
    for stop in ("limited", "\n\n", "</think>", "now."):
        job = engine.prompt({**cut, "stop": stop})
        final, pieces = streamed(engine, job)
        assert final.token_ids == engine.generate([job.request])[0].token_ids
        assert "".join(text for text, _ in pieces) == engine.text(final)
        assert engine.reader.record(final, job)["thinking"].endswith("directly now.")
    longer = "<think>\n1\n</think>\n\nSo 2 it is: "
    head = len(engine.tokenizer.encode(longer))
    written = result(engine, longer + "1 2 3", range(3, head))
    job = engine.prompt({"prompt": "x", "stop": "2"})
    trimmed = engine.reader.trim(written, job.stop)
    assert engine.reader.record(trimmed, job)["content"] == "So 2 it is: 1 "


def test_a_stop_text_ends_the_row_early_and_the_same_in_every_batch(engine: Engine) -> None:
    """In a pool it is noticed when the loop is left, and what was written beyond it is dropped."""
    wild = {"temperature": 4.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 200, "presence_penalty": 0.0}
    records = [{"prompt": CHAIN + " /no_think", "seed": i, "stop": [" the", "1"], **wild} for i in range(6)]
    jobs = [engine.prompt(record) for record in records]
    pool = engine.pool(4, 200, steps=8)
    done = [item for finished in engine.run(pool, enumerate(jobs)) for item in finished]
    results = {key: (job, final) for key, job, final in done}
    closed = engine.generate([job.request for job in jobs])
    stopped = 0
    for i, raw in enumerate(closed):
        job, final = results[i]
        assert dataclasses.replace(final, logprobs=[]) == dataclasses.replace(
            engine.reader.trim(raw, job.stop), logprobs=[]
        )
        content = engine.reader.record(final, job)["content"]
        assert not any(text in content for text in job.stop)
        stopped += len(final.token_ids) < len(raw.token_ids)
        alone, pieces = streamed(engine, job)
        assert alone.token_ids == final.token_ids
        assert "".join(text for text, _ in pieces) == engine.text(final, job.stop)
    assert stopped >= 3
    assert pool.load.tokens < sum(len(raw.token_ids) for raw in closed)


def test_edge_33_models_with_one_mode(engine: Engine) -> None:
    """Instruct-2507 never thinks and takes no budget; Thinking-2507 always does; a base model takes no conversation.

    Flags are text to all three."""
    instruct = dataclasses.replace(engine, form=ChatFormat("instruct"))
    job = instruct.prompt({"prompt": "hi /no_think", "mode_by_query": True})
    assert (job.request.thinking, job.rule, job.request.temperature) == (True, None, 0.7)
    assert engine.tokens.think not in job.request.prompt_ids
    for budget in (0, 5, "auto"):
        with pytest.raises(
            ValueError, match=rf"^thinking_budget: '?{budget}'?, but this model never thinks; leave it out$"
        ):
            instruct.prompt({"prompt": "hi", "thinking_budget": budget})
    thinking = dataclasses.replace(engine, form=ChatFormat("thinking"))
    job = thinking.prompt({"prompt": "hi /no_think", "thinking_budget": 2})
    assert job.request.prompt_ids[-2:] == tuple(engine.tokenizer.encode("<think>\n"))
    assert (job.request.thinking, job.request.temperature) == (True, 0.6)
    written = thinking.generate([job.request])[0]
    assert written.forced.index(True) == 1  # the newline of the prompt is the first of two
    assert thinking.reader.record(written)["thinking"].endswith("directly now.")
    with pytest.raises(ValueError, match="thinking_budget: 0, but this model has no non-thinking mode"):
        thinking.prompt({"prompt": "hi", "thinking_budget": 0})
    with pytest.raises(ValueError, match="enable_thinking: False, but this model has no non-thinking mode"):
        thinking.prompt({"prompt": "hi", "enable_thinking": False})
    base = dataclasses.replace(engine, form=ChatFormat(refusal="messages: no chat format"))
    with pytest.raises(ValueError, match="messages: no chat format"):
        base.prompt({"prompt": "hi"})
    text, ids = base.prompt({"text": "2 + 3"}), base.prompt({"prompt_ids": engine.tokenizer.encode("2 + 3")})
    assert text == ids
    assert (text.request.temperature, text.raw) == (0.0, True)
    written = base.generate([text.request])[0]
    assert base.reader.record(written, text)["content"] == engine.tokenizer.decode(written.token_ids, skip_special=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "messages, prompt, text, prompt_ids: use exactly one of messages, prompt, text, prompt_ids"),
        ({"text": "a", "prompt": "b"}, "prompt, text: use exactly one of"),
        ({"text": ""}, "text: ''; use a string that is not empty"),
        ({"text": 3}, "text: 3; use a string that is not empty"),
        ({"prompt_ids": []}, "prompt_ids: empty; use at least one id"),
        ({"prompt_ids": "12"}, "prompt_ids: '12'; use a sequence of whole numbers"),
        ({"text": "a", "enable_thinking": False}, "enable_thinking: with text or prompt_ids"),
        ({"text": "a", "tools": []}, "tools: with text or prompt_ids"),
        ({"text": "a", "thinking_budget": 0}, "thinking_budget: 0 with text or prompt_ids"),
    ],
)
def test_raw_prompts_are_refused_by_field(engine: Engine, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.prompt(record)


def test_the_default_room_follows_the_budget(engine: Engine) -> None:
    """A budget beyond the usual room would leave one token for the answer."""

    def room(**fields: Any) -> int:
        return engine.prompt({"prompt": "hi", **fields}).request.max_new_tokens

    stop = len(engine.tokens.stop_ids)
    assert room() == room(thinking_budget=-1) == room(thinking_budget=400) == room(thinking_budget="auto") == 1024
    assert room(thinking_budget=4096, grace=8) == 4096 + 8 + stop + 512
    assert room(thinking_budget="auto", auto_cap=2048) == 2048 + stop + 512
    assert room(thinking_budget=4096, max_new_tokens=99) == 99


def test_sampling_is_by_mode_and_what_a_record_says_goes_first(engine: Engine) -> None:
    on = engine.prompt({"prompt": "x"}).request
    off = engine.prompt({"prompt": "x /no_think"}).request
    said = engine.prompt({"prompt": "x", "temperature": 0.1}, {"temperature": 0.9, "top_k": 5}).request
    assert (on.temperature, on.top_p, on.presence_penalty) == (0.6, 0.95, 0.0)
    assert (off.temperature, off.top_p, off.presence_penalty) == (0.7, 0.8, 1.5)
    assert (said.temperature, said.top_k, said.top_p) == (0.1, 5, 0.95)


@pytest.mark.parametrize("stop", [3, "", [""], ["a", 1], {"a": 1}])
def test_a_stop_text_of_the_wrong_kind_is_refused(engine: Engine, stop: Any) -> None:
    with pytest.raises(ValueError, match=r"^stop: .*; use a text that is not empty, or a list of them$"):
        engine.prompt({"prompt": "x", "stop": stop})


def test_a_model_with_too_few_embeddings_is_refused(tmp_path: Any) -> None:
    for path in shipped_model().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    larger = (tmp_path / "tokenizer.model").read_bytes()
    from qwen3_jax.text.tokenizer import train_sentencepiece

    train_sentencepiece(
        ["many words of every kind " * 3], tmp_path / "tokenizer.model", 1000, [f"<x{i}>" for i in range(400)]
    )
    assert (tmp_path / "tokenizer.model").read_bytes() != larger
    with pytest.raises(
        ValueError, match=r"^vocab_size: 512 in .*, whose tokenizer has \d+ tokens; use an embedding with a row"
    ):
        Engine.load(tmp_path)


def test_a_digest_tells_weights_from_others_and_not_their_sharding() -> None:
    """It depends on each element's bits and place, on the dtype, and on the name."""
    table = np.random.default_rng(0).normal(size=(8, 16, 4)).astype(np.float32)
    changed = table.copy()
    changed[3, 7, 1] = np.nextafter(changed[3, 7, 1], 1)
    trees = [
        {"a": table},
        {"b": table},
        {"a": changed},
        {"a": table[::-1]},
        {"a": table[:, ::-1]},
        {"a": table.swapaxes(0, 2)},
        {"a": table.reshape(16, 8, 4)},
        {"a": table.astype(jnp.bfloat16)},
    ]
    digests = [weights_digest(jax.tree.map(jnp.asarray, tree)) for tree in trees]
    assert len(set(digests)) == len(trees)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    split = jax.device_put(table, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
    assert weights_digest({"a": split}) == digests[0]
