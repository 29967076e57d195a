"""What becomes of one document: chunks of text, masks of chats, errors that name the line."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen3_jax.data.config import Encoding, Turns
from qwen3_jax.data.examples import Cutter, Encoded, Encoder, Example, fingerprint_of
from qwen3_jax.data.records import read_record
from qwen3_jax.data.source import Document, DocumentSource
from qwen3_jax.text.chat import Modes
from qwen3_jax.text.chat_format import ChatFormat
from qwen3_jax.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["the user asks for the sum", "the answer is a number", "there is limited time"]
    train_sentencepiece(texts, folder / "tokenizer.model", vocab_size=400)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen3_tokenizer() -> Tokenizer:
    default = Path(__file__).parents[3] / "shared" / "qwen3-tokenizer"
    folder = Path(os.environ.get("QWEN3_TOKENIZER_DIR", default))
    if not folder.is_dir():
        pytest.skip("Qwen3's tokenizer is not here; set QWEN3_TOKENIZER_DIR")
    return load_tokenizer(folder)


def _encode(tokenizer: Tokenizer, record: Any, length: int = 1024) -> list[Example]:
    document = Document("a.jsonl", 0, json.dumps(record).encode())
    return Cutter(length)(Encoder(tokenizer)(document), document)


def _chat(answer: str, **keys: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the sum?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **keys}


def _in_loss(tokenizer: Tokenizer, example: Example) -> str:
    return tokenizer.decode(example.tokens_N[example.loss_mask_N > 0].tolist())


def test_text_ends_in_end_of_text_and_is_all_in_the_loss(tokenizer: Tokenizer) -> None:
    (example,) = _encode(tokenizer, {"text": "the user", "source": "ignored"})
    assert tokenizer.decode(example.tokens_N.tolist()) == "the user<|endoftext|>"
    assert example.loss_mask_N.tolist() == [1] * len(example.tokens_N)
    plain = Encoder(tokenizer)(Document("a.txt", 0, b"the user\r\n", "text"))
    np.testing.assert_array_equal(plain.examples[0].tokens_N, example.tokens_N)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 11])
def test_long_text_is_chunked_without_losing_a_target(tokenizer: Tokenizer, length: int) -> None:
    """10 digits and the end of text: 11 ids, 10 targets. Chunks without overlap would lose one target at each seam."""
    ids = [*tokenizer.encode("0123456789"), tokenizer.pad_id]
    assert len(ids) == 11
    chunks = [example.tokens_N.tolist() for example in _encode(tokenizer, {"text": "0123456789"}, length)]
    assert all(1 < len(chunk) <= length for chunk in chunks)
    pairs = [pair for chunk in chunks for pair in itertools.pairwise(chunk)]
    assert pairs == list(itertools.pairwise(ids))


def test_only_what_the_assistant_writes_is_in_the_loss(tokenizer: Tokenizer) -> None:
    (example,) = _encode(tokenizer, _chat("<think>\nthe sum\n</think>\n\na number"))
    text = tokenizer.decode(example.tokens_N.tolist())
    assert text.startswith("<|im_start|>user\nthe sum?<|im_end|>\n<|im_start|>assistant\n")
    assert _in_loss(tokenizer, example) == "<think>\nthe sum\n</think>\n\na number<|im_end|>"


def test_tools_stand_in_the_system_turn(tokenizer: Tokenizer) -> None:
    (example,) = _encode(tokenizer, _chat("a number", tools=[{"name": "add_up"}]))
    assert '{"name": "add_up"}' in tokenizer.decode(example.tokens_N.tolist())
    assert "add_up" not in _in_loss(tokenizer, example)


@pytest.mark.parametrize(
    ("answer", "literal", "left"),
    [
        ("ab+cd+ab", "+", "abcdab<|im_end|>"),  # every occurrence
        ("ab+cd+ab", "nowhere", "ab+cd+ab<|im_end|>"),
        ("12\u260334", "\u2603", "1234<|im_end|>"),  # a snowman of three byte tokens
        ("12\u2603\u260334", "2\u2603\u26033", "14<|im_end|>"),
        ("1\ufffd2+3", "+", "1\ufffd23<|im_end|>"),  # a true replacement character is one of three bytes, too
    ],
)
def test_no_loss_takes_occurrences_out(tokenizer: Tokenizer, answer: str, literal: str, left: str) -> None:
    (example,) = _encode(tokenizer, _chat(answer, no_loss=[literal]))
    assert _in_loss(tokenizer, example) == "<think>\n\n</think>\n\n" + left
    assert answer in tokenizer.decode(example.tokens_N.tolist())


def test_no_loss_takes_out_a_token_that_it_shares(tokenizer: Tokenizer) -> None:
    """`imite` stands inside a longer token, so ids of the literal alone would never match."""
    (whole,) = [token for token in tokenizer.encode("1 limited2") if tokenizer.decode([token]) == " limited"]
    (example,) = _encode(tokenizer, _chat("1 limited2", no_loss=["imite"]))
    assert whole in example.tokens_N
    assert _in_loss(tokenizer, example) == "<think>\n\n</think>\n\n12<|im_end|>"


def test_no_loss_finds_the_stop_text_where_it_merges(qwen3_tokenizer: Tokenizer) -> None:
    """After a full stop the stop text's first id, 271, becomes part of 382, so a search by ids finds nothing."""
    answer = "<think>\nLet me see." + STOP_TEXT + "It is 4."
    (example,) = _encode(qwen3_tokenizer, _chat(answer, no_loss=[STOP_TEXT]))
    assert 382 in example.tokens_N
    assert _in_loss(qwen3_tokenizer, example) == "<think>\nLet me seeIt is 4.<|im_end|>"


def test_long_chat_keeps_its_beginning_and_says_so(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = _encode(tokenizer, _chat("123456789"))
    length = len(whole.tokens_N) - 4
    cut = Cutter(length)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_chat("123456789")))
    document = Document(str(path), 0, path.read_bytes())
    with caplog.at_level(logging.WARNING):
        results = [cut(Encoder(tokenizer)(document), document) for _ in range(5)]
    for (example,) in results:
        np.testing.assert_array_equal(example.tokens_N, whole.tokens_N[:length])
        np.testing.assert_array_equal(example.loss_mask_N, whole.loss_mask_N[:length])
    assert [record.message.split("; ")[1] for record in caplog.records] == [f"{n} truncated so far" for n in (1, 2, 4)]


def test_examples_without_a_token_in_the_loss_are_dropped_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A chat whose answer lies beyond the row's end, and a blank text."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_chat("123456789")) + '\n{"text": " "}\n')
    cut, encode = Cutter(6), Encoder(tokenizer)
    chat, blank = DocumentSource([str(path)])
    with caplog.at_level(logging.WARNING):
        assert [cut(encode(document), document) for document in (chat, chat, blank)] == [[], [], []]
    said = [record.message for record in caplog.records]
    assert f"{path}:1: none of 6 tokens is in the loss; 1 examples dropped so far" in said
    assert f"{path}:1: none of 6 tokens is in the loss; 2 examples dropped so far" in said
    assert f"{path}:2: no text; 1 blank texts passed over so far" in said


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_byte_order_mark_is_not_of_the_text(tokenizer: Tokenizer, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + (b'{"text": "ab"}\n{"text": "c"}' if suffix == "jsonl" else b"ab\n\nc"))
    ids = [Encoder(tokenizer)(document).examples[0].tokens_N for document in DocumentSource([str(path)])]
    assert [tokenizer.decode(each.tolist(), skip_special=True) for each in ids] == ["ab", "c"]


def test_the_chat_format_is_that_of_the_tokenizers_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An instruct model learns no think block, and what was tokenised for it is refused for a hybrid one."""
    train_sentencepiece(["the user asks"], tmp_path / "tokenizer.model", vocab_size=400)
    document = Document("a.jsonl", 0, json.dumps(_chat("4")).encode())
    encoding = Encoding(str(tmp_path))
    hybrid, before = Encoder.of(encoding), fingerprint_of(encoding)
    (tmp_path / "chat_template.jinja").write_text(templates.INSTRUCT)
    instruct = Encoder.of(encoding)
    said = [
        encode.tokenizer.decode(np.extract(encoded.loss_mask_N, encoded.tokens_N).tolist())
        for encode in (hybrid, instruct)
        for encoded in encode(document).examples
    ]
    assert said == ["<think>\n\n</think>\n\n4<|im_end|>", "4<|im_end|>"]
    assert fingerprint_of(encoding) == f"{before}-instruct"


def test_null_counts_as_absent(tokenizer: Tokenizer) -> None:
    chat = _chat("1")
    record = {**chat, "text": None, "tools": None, "no_loss": None, "labels": None}
    (given,), (expected,) = _encode(tokenizer, record), _encode(tokenizer, chat)
    np.testing.assert_array_equal(given.tokens_N, expected.tokens_N)


def test_labels_come_along_and_nulls_are_none(tokenizer: Tokenizer) -> None:
    document = Document("a.jsonl", 0, b'{"text": "a", "labels": {"domain": "math", "language": null}}')
    assert Encoder(tokenizer)(document).labels == {"domain": "math"}


EXAMPLES = st.lists(st.lists(st.tuples(st.integers(0, 151_935), st.booleans()), min_size=2), min_size=1, max_size=3)


@settings(max_examples=50)
@given(EXAMPLES, st.booleans(), st.booleans())
def test_records_of_token_files_give_everything_back(
    parts: list[list[tuple[int, bool]]], is_text: bool, has_labels: bool
) -> None:
    arrays = [np.array(pairs).T for pairs in parts]
    examples = tuple(Example(ids.astype(np.int32), mask.astype(np.uint8)) for ids, mask in arrays)
    encoded = Encoded(examples, {"domain": "ü"} if has_labels else {}, is_text and len(parts) == 1)
    again = Encoded.from_bytes(encoded.to_bytes())
    assert (again.labels, again.is_text, len(again)) == (encoded.labels, encoded.is_text, len(parts[-1]))
    for found, expected in zip(again.examples, examples, strict=True):
        np.testing.assert_array_equal(found.tokens_N, expected.tokens_N)
        np.testing.assert_array_equal(found.loss_mask_N, expected.loss_mask_N)
        assert (found.tokens_N.dtype, found.loss_mask_N.dtype) == (np.int32, np.uint8)


ROUNDS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "", "reasoning_content": "y", "tool_calls": [{"name": "f", "arguments": "{}"}]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "d", "reasoning_content": "z"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]
LEARNT = [
    "<think>\nx\n</think>\n\nb<|im_end|>",
    '<think>\ny\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    "<think>\nz\n</think>\n\nd<|im_end|>",
    "<think>\n\n</think>\n\nf<|im_end|>",
]


def test_each_round_is_learnt_as_it_stood_when_it_was_written(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A template drops the thoughts of earlier rounds: learnt from the complete chat, they would teach not to think."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": ROUNDS}))
    (document,) = DocumentSource([str(path)])

    def learnt(turns: Turns, modes: Modes = "hybrid") -> list[str]:
        encoded = Encoder(tokenizer, ChatFormat(modes), turns)(document)
        assert Encoded.from_bytes(encoded.to_bytes()).labels == {}
        return [_in_loss(tokenizer, example) for example in Cutter(1024)(encoded, document)]

    with caplog.at_level(logging.WARNING):
        assert learnt("auto") == learnt("each") == LEARNT
    assert [record.message for record in caplog.records][:1] == [
        f"{path}:1: thoughts in earlier rounds, learnt as 3 examples (data.turns); 1 chats learnt in rounds so far"
    ]
    assert learnt("last") == LEARNT[-1:]
    (everything,) = learnt("all")
    assert everything.startswith("b<|im_end|>")
    assert everything.endswith(LEARNT[-1])
    assert len(learnt("auto", "instruct")) == 1  # such a model writes no thoughts
    plain = [{**message, "reasoning_content": None, "content": "g"} for message in ROUNDS[:3] + ROUNDS[7:]]
    document = Document("a.jsonl", 0, json.dumps({"messages": plain}).encode())
    assert len(learnt("auto")) == 1


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a\nb"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a\nb"},
                    {"from": "gpt", "value": "c", "weight": None},
                    {"from": "user", "value": "d"},
                    {"from": "assistant", "value": "e"},
                ]
            },
            "ShareGPT",
        ),
        ({"system": "s", "conversations": [dict(turn) for turn in TURNS[1:]]}, "ShareGPT"),
        (
            {"instruction": "d", "input": "", "output": "e", "system": "s", "history": [["a\nb", "c"]]},
            "Alpaca",
        ),
        ({"messages": json.dumps(TURNS), "tools": ""}, ""),
    ],
)
def test_conversations_of_other_shapes_are_read(tokenizer: Tokenizer, record: dict[str, Any], shape: str) -> None:
    given, expected = _encode(tokenizer, record), _encode(tokenizer, {"messages": TURNS})
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_array_equal(one.tokens_N, other.tokens_N)
        np.testing.assert_array_equal(one.loss_mask_N, other.loss_mask_N)
    assert read_record(Document("a.jsonl", 0, json.dumps(record).encode())).shape.startswith(shape)


def test_alpacas_input_follows_its_instruction(tokenizer: Tokenizer) -> None:
    alpaca = _encode(tokenizer, {"instruction": "a", "input": "b", "output": "c"})
    pair = _encode(tokenizer, {"prompt": "a\nb", "completion": "c"})
    messages = _encode(tokenizer, {"messages": TURNS[1:3]})
    for one in (alpaca, pair):
        np.testing.assert_array_equal(one[0].tokens_N, messages[0].tokens_N)


def test_of_a_prompt_of_messages_the_completion_alone_is_learnt(tokenizer: Tokenizer) -> None:
    (example,) = _encode(tokenizer, {"prompt": TURNS[:4], "completion": TURNS[4:]})
    assert _in_loss(tokenizer, example) == "<think>\n\n</think>\n\ne<|im_end|>"


def test_a_sharegpt_call_is_a_tool_call(tokenizer: Tokenizer) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]
    tools = [{"name": "f"}]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    given = _encode(tokenizer, {"conversations": turns, "tools": json.dumps(tools)})
    expected = _encode(tokenizer, {"messages": messages, "tools": tools})
    np.testing.assert_array_equal(given[0].tokens_N, expected[0].tokens_N)


MALFORMED = [
    (b'{"text": "a"', "Expecting ',' delimiter"),
    (b"\xff", "can't decode byte 0xff"),
    (b"[1]", "not a JSON object"),
    (b'{"txt": "a", "id": 1}', "an object with the keys 'txt', 'id'; use text, messages, conversations, instruction"),
    (b'{"text": "a", "messages": []}', '"text" and "messages": both; use one of them'),
    (b'{"text": 1}', "text: 1; use a string"),
    (b'{"text": null}', "an object with the keys (none); use text"),
    (b'{"text": "\\ud800"}', "surrogates not allowed"),
    (b'{"text": "a", "labels": ["math"]}', "labels: ['math']; use an object of strings"),
    (b'{"text": "a", "labels": {"domain": 1}}', "labels: {'domain': 1}; use an object of strings"),
    (b'{"messages": {}}', "messages: {}; use a list"),
    (b'{"messages": []}', "messages: no assistant turn"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "messages: no assistant turn"),
    (b'{"messages": [{"role": "assistant", "content": "a"}, 1]}', "messages: not all are objects"),
    (b'{"conversations": [{"from": "robot", "value": "a"}]}', "conversations[0].from: 'robot'; use one of human"),
    (b'{"conversations": [{"from": "gpt", "value": 1}]}', "conversations[0].value: 1; use a string"),
    (b'{"conversations": ["a"]}', "conversations[0]: 'a'; use an object with from and value"),
    (b'{"conversations": [{"from": "function_call", "value": "f()"}]}', "value: 'f()'; use the JSON of a call"),
    (b'{"instruction": "a", "output": ["b"]}', "output: ['b']; use a string"),
    (b'{"instruction": "a", "output": "b", "history": [["c"]]}', "history: [['c']]; use a list of pairs"),
    (b'{"prompt": "a", "completion": ["b"]}', "prompt: 'a'; use a list"),
    (b'{"messages": "[{", "tools": null}', "messages: '[{'; use a list, or its JSON text"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "f"}', "tools: 'f'; use a list, or its JSON"),
    (b'{"messages": [{"role": "assistant", "content": 1}]}', "content"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": 1}', "tools: 1; use a list"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "no_loss": "a"}', "no_loss: 'a'; use a list of strings"),
    (b'{"messages": [{"role": "assistant", "content": "a"}], "no_loss": [""]}', "no_loss: ['']; use a list of strings"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_malformed_lines_are_named(tokenizer: Tokenizer, tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    one_line = rf"\A{re.escape(str(path))}:3: .*{re.escape(reason)}.*\Z"
    with pytest.raises(ValueError, match=one_line):
        Encoder(tokenizer)(Document(str(path), 15, line))


# A property of every example, with the template itself as the oracle.

WORDS = st.lists(st.sampled_from(["the sum", "is", "4", "\n", "\n\n", "/think", "{{ x }}", "你好", "  "]), max_size=5)
TEXTS = WORDS.map(lambda words: " ".join(words).strip())
THINKING = st.one_of(st.just(""), TEXTS)  # a turn without a thought is one of the non-thinking mode
CALLS = st.fixed_dictionaries({"name": st.just("f"), "arguments": st.just({"x": 1})})
FINAL = st.builds(lambda thought, text: _turn(thought, text), THINKING, TEXTS)
ASKS = st.tuples(
    st.builds(lambda thought, text, call: _turn(thought, text, [{"function": call}]), THINKING, TEXTS, CALLS),
    st.builds(lambda text: {"role": "tool", "content": text}, TEXTS),
)
QUERIES = st.builds(lambda text: {"role": "user", "content": f"q {text}"}, TEXTS)
ROUND = st.builds(
    lambda query, asks, final: [query, *itertools.chain(*asks), final], QUERIES, st.lists(ASKS, max_size=2), FINAL
)
TOOLS = st.one_of(st.none(), st.just([{"type": "function", "function": {"name": "f"}}]))


def _turn(thought: str, text: str, calls: list[Any] | None = None) -> dict[str, Any]:
    turn = {"role": "assistant", "reasoning_content": thought, "content": text}
    return turn | ({"tool_calls": calls} if calls else {})


@pytest.fixture(scope="module", params=["ours", "official"])
def template(request: pytest.FixtureRequest) -> Callable[..., str]:
    """The template of the released models, where it is at hand, and the one written for the tests."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    if request.param == "ours":
        plain = re.sub(r"\{%- (end)?generation %\}", "", templates.HYBRID)  # a tag that Jinja does not know
        return environment.from_string(plain).render
    default = Path(__file__).parents[3] / "shared" / "qwen3-tokenizer"
    path = Path(os.environ.get("QWEN3_TOKENIZER_DIR", default)) / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip("the released template is not here; set QWEN3_TOKENIZER_DIR")
    return environment.from_string(json.loads(path.read_text(encoding="utf-8"))["chat_template"]).render


@settings(deadline=None, max_examples=100)
@given(rounds=st.lists(ROUND, min_size=1, max_size=3), tools=TOOLS, system=st.booleans())
def test_each_example_is_the_template_and_its_mask_the_turns_own_tokens(
    tokenizer: Tokenizer, template: Callable[..., str], rounds: list[Any], tools: Any, system: bool
) -> None:
    """The ids are those of the conversation as the template writes it when the round ends. In the loss are exactly the
    tokens between each generation prompt of the round and the end of that turn."""
    head = [{"role": "system", "content": "be brief"}] if system else []
    messages = [*head, *itertools.chain(*rounds)]
    document = Document("a.jsonl", 0, json.dumps({"messages": messages, "tools": tools}).encode())
    examples = Encoder(tokenizer, turns="each")(document).examples
    assert len(examples) == len(rounds)
    stop = len(head)
    for example, turns in zip(examples, rounds, strict=True):
        start, stop = stop, stop + len(turns)
        text, pieces, at = template(messages=messages[:stop], tools=tools), [], 0
        for place in range(start, stop):
            if messages[place]["role"] == "assistant":
                prompt = template(messages=messages[:place], tools=tools, add_generation_prompt=True)
                assert text.startswith(prompt)
                end = text.index("<|im_end|>", len(prompt)) + len("<|im_end|>")
                pieces += [(text[at : len(prompt)], 0), (text[len(prompt) : end], 1)]
                at = end
        pieces.append((text[at:], 0))
        expected = [(token, learnt) for piece, learnt in pieces for token in tokenizer.encode(piece)]
        found = zip(example.tokens_N.tolist(), example.loss_mask_N.tolist(), strict=True)
        assert list(found) == expected
