"""Tokenizers: what is encoded comes back, and the facts about Qwen3's vocabulary that decoding builds on."""

from __future__ import annotations

import itertools
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import qwen3_jax
from qwen3_jax.text.tokenizer import (
    CHAT_MARKERS,
    SPECIAL_MARKERS,
    TextStream,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
    unfinished_bytes,
)

CORPUS = [
    "The cat sat on the mat.\n\n  It was 1234 years old, 你好!\n" * 20,
    "def f(x):\n    \n    return x  # naïve\n" * 20,
]
STOP_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
STOP_IDS = [271, 82796, 279, 7199, 882, 553, 279, 1196, 11, 358, 614, 311]
STOP_IDS += [2968, 279, 6291, 3118, 389, 279, 7274, 5961, 1431, 624, 151668, 271]

TEXTS = st.lists(
    st.text(max_size=20)
    | st.sampled_from(
        ["\n", "\n\n", " ", "   ", "\t", "\r\n", "😀", "👩‍👧", "e\u0301", "\u2581", "\ufffd", "\x00", "123", "<0x0A>"]
    )
    | st.sampled_from(["<unk>", "<s>", "the cat", *CHAT_MARKERS]),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    default = Path(__file__).parents[3] / "shared" / "qwen3-tokenizer"
    directory = Path(os.environ.get("QWEN3_TOKENIZER_DIR", default))
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("no Qwen3 tokenizer.json; set QWEN3_TOKENIZER_DIR to its directory")
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("small")
    train_sentencepiece(CORPUS, directory / "tokenizer.model", 400)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return load_tokenizer(Path(qwen3_jax.__file__).parent / "assets" / "qwen3-tiny")


@pytest.fixture(params=["qwen", "small"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


# Round trips


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
@example(text=" ")
@example(text="\u2581 \u2581")
def test_sentencepiece_gives_every_text_back(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert all(0 < i < small.num_tokens for i in ids)  # 0 is <unk>


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_qwen_gives_every_text_back_in_nfc(qwen: Tokenizer, text: str) -> None:
    assert unicodedata.normalize("NFC", qwen.decode(qwen.encode(text))) == unicodedata.normalize("NFC", text)


def test_qwen_normalises_to_nfc(qwen: Tokenizer) -> None:
    assert qwen.decode(qwen.encode("e\u0301")) == "\u00e9"


def test_sentencepiece_without_a_space_in_its_texts_still_spells_one(tmp_path: Path) -> None:
    """A space not among the pieces would fall back to the bytes of U+2581 and come back as that character."""
    train_sentencepiece(["abc"], tmp_path / "tokenizer.model", 300)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(" a  b")) == " a  b"


# Markers


def test_markers_in_text_are_one_id_each(either: Tokenizer) -> None:
    ids = either.encode("".join(CHAT_MARKERS))
    assert ids == [either.token_id(marker) for marker in CHAT_MARKERS]
    assert either.decode(ids) == "".join(CHAT_MARKERS)


def test_marker_properties(either: Tokenizer) -> None:
    assert [either.im_start, either.im_end, either.think, either.end_think, either.tool_call, either.end_tool_call] == [
        either.token_id(marker)
        for marker in ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
    ]
    assert either.eos_ids == (either.token_id("<|im_end|>"), either.token_id("<|endoftext|>"))
    assert either.pad_id == either.token_id("<|endoftext|>")


def test_skip_special_drops_turn_markers_but_no_think_or_tool_tag(either: Tokenizer) -> None:
    kept = [marker for marker in CHAT_MARKERS if marker not in SPECIAL_MARKERS]
    assert either.decode(either.encode("".join(CHAT_MARKERS)), skip_special=True) == "".join(kept)


def test_edge_41_a_marker_spelled_with_ordinary_pieces_is_text(either: Tokenizer) -> None:
    ids = [*either.encode("</"), *either.encode("think>")]
    assert either.decode(ids) == "</think>"
    assert either.end_think not in ids


def test_ids_beyond_the_vocabulary_decode_to_nothing(either: Tokenizer) -> None:
    ids = [*either.encode("a"), either.num_tokens, either.num_tokens + 266, 2**31 - 1, *either.encode("b")]
    assert either.decode(ids) == "ab"
    assert either.decode(np.array(ids)) == "ab"
    assert "".join(_streamed(either, ids, [1, 2], skip_special=False)) == "ab"
    assert either.decode([either.num_tokens - 1]) != ""


def test_token_id_of_an_unknown_piece_is_none(either: Tokenizer) -> None:
    assert either.token_id("no such piece") is None


def test_missing_markers_are_an_error_only_when_asked_for(tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "c": 4}, merges=[]))
    bare.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [0, 1]
    assert tokenizer.num_tokens == 5  # one above the highest id, though ids are missing below
    assert tokenizer.tool_call is None
    with pytest.raises(ValueError, match="has no <think>"):
        _ = tokenizer.think
    with pytest.raises(ValueError, match=r"has no <\|im_end\|>"):
        _ = tokenizer.eos_ids


def test_truncation_and_padding_saved_in_the_file_are_not_applied(tmp_path: Path) -> None:
    saved = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    saved.enable_truncation(2)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("abab") == [0, 1, 0, 1]


# Qwen3's vocabulary


def test_qwen_ids(qwen: Tokenizer) -> None:
    assert qwen.num_tokens == 151669
    assert [qwen.token_id(marker) for marker in CHAT_MARKERS] == [
        *(151643, 151644, 151645, 151657, 151658, 151665, 151666, 151667, 151668)
    ]
    assert qwen.eos_ids == (151645, 151643)
    assert qwen.decode([qwen.token_id("<|object_ref_start|>"), 198], skip_special=True) == "\n"
    assert qwen.decode([qwen.token_id("<|fim_prefix|>"), 198], skip_special=True) == "<|fim_prefix|>\n"


def test_edge_11_stop_text_is_24_ids(qwen: Tokenizer) -> None:
    assert len(STOP_IDS) == 24
    assert qwen.encode(STOP_TEXT) == STOP_IDS
    assert qwen.encode(STOP_TEXT.removesuffix("\n\n") + ".\n\n")[-1] == 382
    assert qwen.encode(" " + STOP_TEXT.lstrip("\n"))[0] == 55777


@pytest.mark.parametrize("before", ["So.", "So\n", "So "])
def test_edge_11_injected_ids_differ_from_retokenised_text(qwen: Tokenizer, before: str) -> None:
    """Appending ids after a thought that ends in a stop, a newline or a space is not encoding the joined text."""
    appended = qwen.encode(before) + STOP_IDS
    assert qwen.decode(appended) == before + STOP_TEXT
    assert qwen.encode(before + STOP_TEXT) != appended


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<think>\n\n</think>\n\n", [151667, 271, 151668, 271]),
        ("<think>\n", [151667, 198]),
        ("<|im_start|>assistant\n", [151644, 77091, 198]),
        (" /no_think", [608, 2152, 5854, 766]),
        (" /think", [608, 26865]),
        ("\n", [198]),
        ("\n\n", [271]),
        (".\n", [624]),
        (".\n\n", [382]),
    ],
)
def test_qwen_facts(qwen: Tokenizer, text: str, ids: list[int]) -> None:
    assert qwen.encode(text) == ids


def test_digits_stand_singly(either: Tokenizer) -> None:
    assert [either.decode([i]) for i in either.encode("12345")] == list("12345")


# Bytes and streams


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
@example(text="👩‍👧 e\u0301 你好 \u2581\x00 ﷽ 🏳️‍🌈")
def test_the_bytes_of_the_ids_spell_the_text(qwen: Tokenizer, small: Tokenizer, shipped: Tokenizer, text: str) -> None:
    for tokenizer, written in (
        (qwen, unicodedata.normalize("NFC", text)),
        (small, text),
        (shipped, text),
    ):
        pieces = tokenizer.token_bytes()
        assert b"".join(pieces[i] for i in tokenizer.encode(text)) == written.encode()


def test_token_bytes_are_what_single_ids_decode_to(qwen: Tokenizer, shipped: Tokenizer) -> None:
    for tokenizer in (qwen, shipped):
        for skip_special in (False, True):
            pieces = tokenizer.token_bytes(skip_special)
            assert [piece.decode(errors="replace") for piece in pieces] == [
                tokenizer.decode([i], skip_special) for i in range(tokenizer.num_tokens)
            ]


def test_qwen_token_bytes_counted(qwen: Tokenizer) -> None:
    pieces = qwen.token_bytes()
    assert len(pieces) == 151669
    assert sum(piece.endswith(b"\n") for piece in pieces) == 2178
    assert sum(piece.endswith(b"\n\n") for piece in pieces) == 564
    assert sum(unfinished_bytes(piece) > 0 for piece in pieces) == 1271


def test_token_bytes_of_gaps_and_of_sentencepieces_byte_pieces(small: Tokenizer, tmp_path: Path) -> None:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "Ġ": 1, "c": 4}, merges=[]))
    bare.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes() == [b"a", b" ", b"", b"", b"c"]
    bare.add_tokens(["\u00e9 Ġ"])  # an added token is text, not spelled bytes
    bare.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes()[3] == "\u00e9 Ġ".encode()
    pieces = small.token_bytes()
    assert pieces[small.token_id("<0xE4>") or 0] == b"\xe4"
    assert pieces[0] == b""  # <unk>
    assert b" " in pieces


def test_a_vocabulary_not_of_bytes_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"\u2581a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer: '\u2581a' spells no bytes; use a byte-level vocabulary"):
        load_tokenizer(tmp_path).token_bytes()


def _streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip_special: bool) -> list[str]:
    """What a stream returns for `ids` cut at `cuts`."""
    stream = TextStream(tokenizer, skip_special)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    deltas = [stream.push(ids[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return [*deltas, stream.flush()]


@pytest.fixture(scope="module")
def pools(qwen: Tokenizer, shipped: Tokenizer) -> list[tuple[Tokenizer, range, list[int]]]:
    """Each tokenizer with all its ids, and with those that hold a part of a character."""
    return [
        (
            tokenizer,
            range(tokenizer.num_tokens),
            [i for i, piece in enumerate(tokenizer.token_bytes()) if unfinished_bytes(piece)],
        )
        for tokenizer in (qwen, shipped)
    ]


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(TEXTS | st.tuples(st.booleans(), st.integers(0, 2**20))),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    skip_special=st.booleans(),
)
def test_edge_52_the_deltas_of_a_stream_are_the_text(
    pools: list[tuple[Tokenizer, range, list[int]]],
    parts: list[str | tuple[bool, int]],
    cuts: list[int],
    skip_special: bool,
) -> None:
    """Any ids in any cut: parts of characters, bytes that are no UTF-8, markers."""
    for tokenizer, all_ids, parts_of_characters in pools:
        ids = []
        for part in parts:
            if isinstance(part, str):
                ids += tokenizer.encode(part)
            else:
                pool = parts_of_characters if part[0] else all_ids
                ids.append(pool[part[1] % len(pool)])
        deltas = _streamed(tokenizer, ids, cuts, skip_special)
        assert "".join(deltas) == tokenizer.decode(ids, skip_special)


def test_edge_52_forced_ids_come_in_their_order(either: Tokenizer) -> None:
    thought, answer = either.encode("<think>\nSo 你"), either.encode("4")
    ids = [*thought, *either.encode(STOP_TEXT), *answer]
    deltas = _streamed(either, ids, list(range(len(ids))), skip_special=True)
    assert "".join(deltas) == f"<think>\nSo 你{STOP_TEXT}4"


def test_a_stream_holds_back_a_character_until_it_is_whole(shipped: Tokenizer) -> None:
    one_by_one = [[i] for i in shipped.encode("a😀b")]
    assert len(one_by_one) == 6
    stream = TextStream(shipped)
    assert [stream.push(ids) for ids in one_by_one] == ["a", "", "", "", "😀", "b"]
    assert stream.flush() == ""
    assert [stream.push(ids) for ids in one_by_one[:3]] == ["a", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(one_by_one[0]) == "a"  # nothing is left of what was flushed


def test_bytes_that_are_no_text_decode_alike(qwen: Tokenizer, shipped: Tokenizer) -> None:
    for broken in (b"\xe2\x82", b"\xf0\x9f\x98a", b"\x80\x80", b"\xe0\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80"):
        decoded = []
        for tokenizer in (qwen, shipped):
            pieces = tokenizer.token_bytes()
            byte_ids = [pieces.index(bytes([byte])) for byte in broken]
            decoded.append(tokenizer.decode(byte_ids))
        assert decoded == [broken.decode(errors="replace")] * 2


# Loading and training


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path: Path) -> None:
    train_sentencepiece(CORPUS, tmp_path / "tokenizer.model", 400)
    bare = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    bare.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).num_tokens == 1


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: .* use a directory with tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(ValueError, match=f"tokenizer: .*{name}.* cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changed", "accepted"),
    [
        ({}, True),
        ({"byte_fallback": False}, False),
        ({"add_dummy_prefix": True}, False),
        ({"remove_extra_whitespaces": True}, False),
    ],
)
def test_a_sentencepiece_model_that_loses_text_is_refused(
    tmp_path: Path, changed: dict[str, bool], accepted: bool
) -> None:
    options = {"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False, **changed}
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    if accepted:
        assert load_tokenizer(tmp_path).token_id("<think>") is None
    else:
        with pytest.raises(ValueError, match="does not round-trip every text"):
            load_tokenizer(tmp_path)


def test_training_is_deterministic_and_bounded_by_vocab_size(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        train_sentencepiece(iter(CORPUS), tmp_path / name / "tokenizer.model", 320, ["<mask>"])
    first, second = (tmp_path / name / "tokenizer.model" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    tokenizer = load_tokenizer(first.parent)
    assert tokenizer.num_tokens == 320
    assert tokenizer.encode("a<mask>\n\n") == [tokenizer.token_id(piece) for piece in ("a", "<mask>", "\n\n")]


def test_a_long_text_is_not_left_out_of_training(tmp_path: Path) -> None:
    """SentencePiece skips texts above 4,192 bytes by default, and says so only in its log."""
    train_sentencepiece(["xyzzy " * 5000, "a"], tmp_path / "tokenizer.model", 300)
    assert len(load_tokenizer(tmp_path).encode("xyzzy")) == 1


def test_indentation_is_one_piece(small: Tokenizer) -> None:
    assert len(small.encode("    ")) == 1


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: 100; use a larger one"):
        train_sentencepiece(CORPUS, tmp_path / "tokenizer.model", 100)
    with pytest.raises(ValueError, match="texts: none"):
        train_sentencepiece([""], tmp_path / "tokenizer.model", 400)
    assert not (tmp_path / "tokenizer.model").exists()
