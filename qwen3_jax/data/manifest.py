"""`manifest.json`, which describes the ArrayRecord shards of token ids in its directory."""

from __future__ import annotations

import dataclasses
import json

import fsspec

NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a directory of tokenised shards.

    Attributes:
      name, licence, origin, languages: of the source, from its SourceConfig.
      tokenizer: fingerprint of the tokenizer and the chat format.
      documents, tokens, loss_tokens: totals of all shards.
      documents_per_shard: the last shard may hold fewer.
      content: digest of the documents' files; None of shards made before there was one.
      shards: number of documents of each file; empty until all files are written.
    """

    name: str
    licence: str | None
    origin: str | None
    languages: list[str]
    tokenizer: str
    documents: int
    documents_per_shard: int
    content: str | None = None
    tokens: int = 0
    loss_tokens: int = 0
    shards: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def beside(path: str) -> Manifest | None:
    """The manifest in the directory of the file `path`, None where there is none.

    Raises:
      ValueError: the file is not a manifest, or tokenising was not finished.
    """
    fs, inner = fsspec.core.url_to_fs(path.rpartition("/")[0] + "/" + NAME if "/" in path else NAME)
    if not fs.exists(inner):
        return None
    found = from_json(fs.cat_file(inner))
    if not found.shards:
        raise ValueError("tokenising was not finished; the same `qwen3-jax tokenize` again finishes it")
    return found


def from_json(text: str | bytes) -> Manifest:
    """The inverse of `Manifest.to_json`.

    Raises:
      ValueError: `text` is not a manifest.
    """
    try:
        return Manifest(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{NAME} is not one of `qwen3-jax tokenize`: {error}") from None
