"""Problems of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760); extra `verify`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

VERIFIER = "reasoning-gym"


def problems(
    name: str, count: int, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """`count` records of the data set `name`, each with `id`, `prompt`, `answer`, `verifier` and `metadata`.

    Raises:
      ValueError: reasoning-gym is not installed, or has no such data set or setting.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError("problems: need reasoning-gym; pip install -e '.[verify]'") from None
    if name not in DATASETS:
        raise ValueError(f"problems: {name!r}; use one of {', '.join(sorted(DATASETS))}")
    try:
        entries = reasoning_gym.create_dataset(name, **{**(settings or {}), "size": count, "seed": seed})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"problems: {name} refuses its settings ({error})") from None
    for number, entry in enumerate(entries):
        record = {"id": f"{name}-{seed}-{number}", "prompt": entry["question"], "answer": entry["answer"]}
        yield {**record, "verifier": VERIFIER, "metadata": entry["metadata"]}
