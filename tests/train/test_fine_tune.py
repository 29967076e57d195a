"""Fine-tuning as the README says it: from a checkpoint's directory and a file of conversations, and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from processes import Command
from program_cache import QUICK_COMPILE

from qwen3_jax.config import ModelConfig
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.text.chat_format import format_of

ROOT = Path(__file__).parents[2]
SUMS = [(a, b) for a in range(10) for b in range(10)]


def test_a_base_model_learns_to_answer_and_is_read_as_one_that_does(tmp_path: Path) -> None:
    """Three hundred conversations in ShareGPT's shape, twelve steps. Model, tokenizer and format are the checkpoint's;
    the run's directory is decoded as it is, and ends where its turns end."""
    base = tmp_path / "base"
    shutil.copytree(shipped_model(), base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 151643}))
    assert format_of(base).is_base
    records = [
        {"conversations": [{"from": "human", "value": f"{a} and {b}?"}, {"from": "gpt", "value": f"{a + b}"}]}
        for a, b in SUMS * 3
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--init_from", str(base), "--data.sources.chats.paths", str(tmp_path / "chats.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--data.sequence_length", "128", "--data.batch_size", "4"]
    words += ["--steps", "12", "--optimizer.warmup_steps", "2", "--optimizer.learning_rate", "1e-3"]
    command = ("qwen3_jax.cli.train:main", str(ROOT / "configs" / "post" / "sft.yaml"), *words)
    process = Command(*command, env={**os.environ, "XLA_FLAGS": QUICK_COMPILE}, cwd=ROOT)
    out, err = process.communicate()
    assert process.returncode == 0, err
    said = " ".join(out.split())
    assert f"{base}: 1,396,800 weights read" in said
    assert "data.sources.chats: taken for ShareGPT (conversations)" in said
    assert "taken for a base model; conversations are written in Qwen3's hybrid format" in said
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2

    lines: list[str] = []
    engine = Engine.load(tmp_path / "out", announce=lines.append)
    assert lines == [f"{tmp_path / 'out'}: weights of step 12"]
    assert not engine.form.is_base
    ends = list(engine.tokenizer.eos_ids)
    assert ModelConfig.from_hf(tmp_path / "out").eos_token_id == tuple(ends)
    (result,) = engine.generate([engine.prompt({"prompt": "3 and 4?", "enable_thinking": False}).request])
    assert result.finish_reason == "eos"
