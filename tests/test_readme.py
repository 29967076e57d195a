"""The README's Python runs as it stands, from the repository's root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("quick_compile")
def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In one interpreter, block after block, as a reader would paste it."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.M)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (1, names["tokens_BT"].shape[1], names["config"].vocab_size)
    assert names["results"][0].thinking_tokens == 4
    assert "directly now." in capsys.readouterr().out
    assert len(names["logprobs"]) == len(names["prompt_ids"]) - 1
