"""`manifest.json`, which stands beside ArrayRecord shards of token ids and says what they hold."""

from __future__ import annotations

import dataclasses
import json

import fsspec

NAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory of tokenised shards holds.

    Attributes:
      name, licence, origin, languages: of the source, as its SourceConfig had them.
      tokenizer: fingerprint of the tokenizer that made the ids.
      documents, tokens, loss_tokens: in all shards.
      shards: documents of each file.
    """

    name: str
    licence: str | None
    origin: str | None
    languages: list[str]
    tokenizer: str
    documents: int
    tokens: int
    loss_tokens: int
    shards: dict[str, int]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def beside(path: str) -> Manifest | None:
    """The manifest in the directory of the file `path`, None where there is none.

    Raises:
      ValueError: it is no manifest.
    """
    fs, inner = fsspec.core.url_to_fs(path.rpartition("/")[0] + "/" + NAME if "/" in path else NAME)
    if not fs.exists(inner):
        return None
    try:
        return Manifest(**json.loads(fs.cat_file(inner)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{NAME} beside it is not one of `qwen3-jax tokenize`: {error}") from None
