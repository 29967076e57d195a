"""Text to token ids and back: one protocol for `tokenizer.json` and SentencePiece's `tokenizer.model`.

The ids of the chat markers are looked up by their text, so that a small SentencePiece model and Qwen3's tokenizer work
in the same code. Encoding adds nothing: no BOS, no EOS, no space in front. A marker in the text becomes its id, also in
a user's message. Code must therefore find turns by the structure of the prompt, not by searching ids for markers.
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

from qwen3_jax.config import refuse_other_than_directory

# In the order of Qwen3's ids. The first three are special (`skip_special` drops them); think and tool tags are not.
SPECIAL_MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_MARKERS = (
    *SPECIAL_MARKERS,
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)

# The files of a checkpoint directory beside weights and config.json; they are copied with the weights.
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("chat_template.jinja", GENERATION_CONFIG),
)

_SPACE = "\u2581"  # SentencePiece's spelling of a space inside pieces


class Tokenizer(Protocol):
    """What this project needs of a tokenizer. The marker properties raise ValueError if the vocabulary lacks it."""

    num_tokens: int  # the highest id plus one; the model's `vocab_size` may be larger, and ids above decode to nothing

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added. Markers in the text become their ids."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`. `skip_special` drops turn markers and `<|endoftext|>`, but not think and tool tags."""
        ...

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry, in the vocabulary's own spelling; None if there is none."""
        ...

    def token_bytes(self, skip_special: bool = False) -> list[bytes]:
        """The UTF-8 bytes that each id adds to the decoded text. A character may be spread over several ids."""
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
        """The ids that end a generation, as in Qwen3's generation_config.json: end of turn, end of text."""
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
            raise ValueError(f"tokenizer: has no {piece}; use a vocabulary with Qwen3's chat markers")
        return found


class HFTokenizer(Tokenizer):
    """A `tokenizer.json`, such as Qwen3's. Qwen3's normalises to NFC: decoding gives the NFC form of the text."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {str(path)!r} cannot be read ({error})") from None
        # The file may contain the truncation and padding of a batched call made before it was saved.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.num_tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

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
        pieces = [b""] * self.num_tokens
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._tokenizer.get_added_tokens_decoder()
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            try:
                pieces[i] = piece.encode() if i in added else bytes(map(byte_of.__getitem__, piece))
            except KeyError:
                raise ValueError(f"tokenizer: {piece!r} spells no bytes; use a byte-level vocabulary") from None
        return pieces


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model` that round-trips every text, as `train_sentencepiece` makes it.

    Invalid UTF-8 decodes as with a `tokenizer.json`; SentencePiece's own decoder gives a U+FFFD for each byte.

    Raises:
      ValueError: the model does not round-trip every text: no byte fallback, a dummy prefix, or removed whitespace.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"tokenizer: {str(path)!r} cannot be read ({error})") from None
        self.num_tokens = self._processor.get_piece_size()
        self._unk_id = self._processor.unk_id()
        space = [self._processor.id_to_piece(i) for i in self._processor.encode(" ")]
        if space != [_SPACE] or self.token_id("<0x00>") is None:
            raise ValueError(
                f"tokenizer: {str(path)!r} does not round-trip every text; use a model with byte fallback, no dummy "
                "prefix and no whitespace removal (see train_sentencepiece)"
            )
        self._space_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._pieces = [self._spelled(i) for i in range(self.num_tokens)]
        special = {self._processor.piece_to_id(marker) for marker in SPECIAL_MARKERS}
        self._unmarked = [b"" if i in special else piece for i, piece in enumerate(self._pieces)]

    def encode(self, text: str) -> list[int]:
        # SentencePiece spells a space as U+2581, so that character in a text would decode to a space: encode its three
        # bytes instead. One part at a time: for a list, SentencePiece starts threads, which is slower for short texts.
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
    """The number of bytes missing from the UTF-8 character at the end of `piece`; for a piece of continuation bytes
    only, minus the number of its bytes."""
    tail = len(piece) - len(piece.rstrip(bytes(range(0x80, 0xC0))))  # continuation bytes at the end
    if tail == len(piece):
        return -tail
    lead = piece[-tail - 1]
    length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return max(length - 1 - tail, 0)


class TextStream:
    """Incremental decoding. Bytes of an incomplete character are held back.

    The concatenation of all results of `push` and a final `flush` equals `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._pieces = tokenizer.token_bytes(skip_special)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """The text that is complete after these ids."""
        return self._decoder.decode(b"".join(self._pieces[i] for i in ids if i < len(self._pieces)))

    def flush(self) -> str:
        """The text of the bytes held back."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> str:
    """The characters that spell the bytes 0..255 in a byte-level BPE vocabulary (GPT-2): printable Latin-1 characters
    stand for themselves, the other bytes are numbered from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory: `tokenizer.json`, or else `tokenizer.model`."""
    file = _file_of(Path(directory))
    return HFTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


def _file_of(directory: Path) -> Path:
    refuse_other_than_directory(directory, "tokenizer")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"tokenizer: {str(directory)!r} has none; use a directory with tokenizer.json or tokenizer.model")


def fingerprint(directory: str | Path) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the file that `load_tokenizer` reads."""
    return hashlib.sha256(_file_of(Path(directory)).read_bytes()).hexdigest()[:16]


def train_sentencepiece(
    texts: Iterable[str], path: Path, vocab_size: int, user_defined_symbols: Sequence[str] = ()
) -> None:
    r"""Trains a small BPE model on `texts` and writes it to the file `path`, deterministically.

    As in Qwen3's vocabulary, each digit is a token, every byte can be spelled, and the chat markers, "\n" and "\n\n"
    are entries. `user_defined_symbols` adds more. `vocab_size` is an upper bound: texts with few pairs to merge give
    fewer pieces (see `num_tokens`).

    Raises:
      ValueError: there is no text, or `vocab_size` is too small for bytes, markers and the characters of the texts.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts: none; use at least one that is not empty")
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
            max_sentence_length=2**30,  # SentencePiece silently skips longer texts
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise ValueError(f"vocab_size: {vocab_size}; use a larger one ({reason})") from None
    path.write_bytes(model.getvalue())
