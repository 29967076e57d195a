"""Text to token ids and back: one protocol over `tokenizer.json` and SentencePiece's `tokenizer.model`.

Ids of the chat markers are looked up by their text, never written down, so that a tiny SentencePiece model and
Qwen3's own tokenizer serve the same program. Encoding adds nothing (no BOS, no EOS, no prefix space), and every
marker in the text becomes its one id, whoever typed it: what a turn *is* must be read off the prompt's structure,
never off a scan for markers.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

# In the order of Qwen3's ids. The first three are special (`skip_special` drops them), think and tool tags are not.
SPECIAL_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_MARKERS = (
    *SPECIAL_MARKERS,
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

# What a checkpoint directory may hold besides weights and config.json; copied along with the weights.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("chat_template.jinja", "generation_config.json"),
)

_SPACE = "\u2581"  # SentencePiece's spelling of a space inside pieces


class Tokenizer(Protocol):
    """What the program asks of a tokenizer. Asking for a marker that the vocabulary lacks raises ValueError."""

    @property
    def num_tokens(self) -> int:
        """One above the highest id; the model's `vocab_size` may be larger, ids in between decode to nothing."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` and of nothing else. Markers in the text become their ids."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of `ids`. `skip_special` drops turn markers and `<|endoftext|>`, but no think or tool tag."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry in the vocabulary's own spelling, or None."""
        ...

    def token_bytes(self, skip_special: bool = False) -> list[bytes]:
        """What each id adds to a decoded text, in UTF-8; b"" for ids that decode to nothing. A character may be spread
        over several ids."""
        ...

    @property
    def im_start(self) -> int:
        return self._marker("<|im_start|>")

    @property
    def im_end(self) -> int:
        return self._marker("<|im_end|>")

    @property
    def think(self) -> int:
        return self._marker("<think>")

    @property
    def end_think(self) -> int:
        return self._marker("</think>")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a generation, as Qwen3's generation_config.json has them: end of turn, end of text."""
        return (self.im_end, self._marker("<|endoftext|>"))

    @property
    def pad_id(self) -> int:
        return self._marker("<|endoftext|>")

    @property
    def tool_call(self) -> int | None:
        return self.token_id("<tool_call>")

    @property
    def end_tool_call(self) -> int | None:
        return self.token_id("</tool_call>")

    def _marker(self, piece: str) -> int:
        found = self.token_id(piece)
        if found is None:
            raise ValueError(f"tokenizer: has no {piece}; a vocabulary with Qwen3's chat markers fits")
        return found


class HFTokenizer(Tokenizer):
    """A `tokenizer.json`, as Qwen3's. It normalises to NFC: decoding gives the NFC form of what was encoded."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {str(path)!r} cannot be read ({error})") from None
        # A file saved after a batched call carries its truncation and padding along.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)

    def token_bytes(self, skip_special: bool = False) -> list[bytes]:
        pieces = list(self._pieces)
        if skip_special:
            for i, added in self._tokenizer.get_added_tokens_decoder().items():
                pieces[i] = b"" if added.special else pieces[i]
        return pieces

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self._num_tokens
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._tokenizer.get_added_tokens_decoder()
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            try:
                pieces[i] = piece.encode() if i in added else bytes(map(byte_of.__getitem__, piece))
            except KeyError:
                raise ValueError(f"tokenizer: {piece!r} spells no bytes; a byte-level vocabulary fits") from None
        return pieces


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model` that keeps text as it is, as `train_sentencepiece` makes it.

    Bytes that are no UTF-8 decode as in a `tokenizer.json`, where SentencePiece itself gives a U+FFFD for each of them.

    Raises:
      ValueError: if the model would not give every text back: no byte fallback, a dummy prefix, removed whitespace.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer: {str(path)!r} cannot be read ({error})") from None
        self._unk_id = self._processor.unk_id()
        space = [self._processor.id_to_piece(i) for i in self._processor.encode(" ")]
        if space != [_SPACE] or self.token_id("<0x00>") is None:
            raise ValueError(
                f"tokenizer: {str(path)!r} does not give every text back; a model with byte fallback, no dummy prefix "
                "and no whitespace removal fits (see train_sentencepiece)"
            )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._pieces = [self._spelled(i) for i in range(self.num_tokens)]
        special = {self._processor.piece_to_id(marker) for marker in SPECIAL_MARKERS}
        self._unmarked = [b"" if i in special else piece for i, piece in enumerate(self._pieces)]

    @property
    def num_tokens(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        # A typed U+2581 would come back as a space; as three bytes it comes back as itself.
        # One by one: given a list, SentencePiece starts threads, which takes longer than a short text.
        first, *others = (self._processor.encode(part) for part in text.split(_SPACE))
        return first + [i for part in others for i in (*self._space_bytes, *part)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        pieces = self._unmarked if skip_special else self._pieces
        return b"".join(pieces[i] for i in ids if i < len(pieces)).decode(errors="replace")

    def token_id(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return None if found == self._unk_id else found

    def token_bytes(self, skip_special: bool = False) -> list[bytes]:
        return list(self._unmarked if skip_special else self._pieces)

    def _spelled(self, i: int) -> bytes:
        piece = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):
            return bytes([int(piece[1:-1], 16)])
        unspelled = self._processor.is_unknown(i) or self._processor.is_control(i)
        return b"" if unspelled else piece.replace(_SPACE, " ").encode()


def unfinished_bytes(piece: bytes) -> int:
    """How many bytes of a UTF-8 character are still to come after `piece`; for a piece of continuation bytes alone,
    minus the number of bytes that it supplies."""
    tail = len(piece) - len(piece.rstrip(bytes(range(0x80, 0xC0))))  # continuation bytes at the end
    if tail == len(piece):
        return -tail
    lead = piece[-tail - 1]
    length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return max(length - 1 - tail, 0)


class TextStream:
    """The text of ids that come a few at a time; bytes of a character that is not whole yet are held back.

    What `push` and at the end `flush` return, put together, is `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._pieces = tokenizer.token_bytes(skip_special)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids settle."""
        return self._decoder.decode(b"".join(self._pieces[i] for i in ids if i < len(self._pieces)))

    def flush(self) -> str:
        """The text of what was held back."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> str:
    """The characters that spell the bytes 0..255 in a byte-level BPE vocabulary (GPT-2): printable ones of Latin-1 are
    themselves, the others are numbered from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory: its `tokenizer.json`, else its `tokenizer.model`."""
    file = _file_of(Path(directory))
    return HFTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def _file_of(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"tokenizer: {str(directory)!r} has none; a directory with tokenizer.json or tokenizer.model fits")


def fingerprint(directory: str | Path) -> str:
    """16 hexadecimal digits that differ between tokenizers: a hash of the file that `load_tokenizer` reads."""
    return hashlib.sha256(_file_of(Path(directory)).read_bytes()).hexdigest()[:16]


def train_sentencepiece(
    texts: Iterable[str], path: Path, vocab_size: int, user_defined_symbols: Sequence[str] = ()
) -> None:
    r"""Train a small BPE model on `texts` and write it to the file `path`; the same texts give the same bytes.

    As in Qwen3's vocabulary digits stand singly, any byte can be spelled, and the chat markers, "\n" and "\n\n" are
    entries of their own, to which `user_defined_symbols` adds. `vocab_size` is an upper bound: texts with fewer
    pairs to merge give fewer pieces (ask `num_tokens`).

    Raises:
      ValueError: if there is no text, or `vocab_size` has no room for bytes, markers and the characters of the texts.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts: none; at least one that is not empty fits")
    symbols = (*CHAT_MARKERS, "\n", "\n\n", *user_defined_symbols)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=[symbol.replace(" ", _SPACE) for symbol in dict.fromkeys(symbols)],
            required_chars=_SPACE,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=2**30,  # longer texts would be left out without a word
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise ValueError(f"vocab_size: {vocab_size}; a larger one fits ({reason})") from None
    path.write_bytes(model.getvalue())
