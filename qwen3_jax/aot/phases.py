"""A step on rollouts, put together from the programs of its phases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from qwen3_jax.aot.programs import ROLLOUT_PHASES, prefill_rows
from qwen3_jax.aot.report import Report
from qwen3_jax.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Phase:
    """seconds: of a step in it. runs: of its program, or of its program's loop. hbm_bytes: of a chip."""

    name: str
    runs: int
    seconds: float
    hbm_bytes: float


def phases(config: TrainConfig, reports: Mapping[str, Report], prompt_tokens: int, new_tokens: int) -> list[Phase]:
    """Of a step whose prompts and answers have so many tokens each. All programs must have been estimated.

    Answers decode together, `rollouts.rows` at a time. The update takes the micro-batches that packed rows fill.
    """
    assert config.rollouts is not None
    rows, answers = config.rollouts.rows, config.data.batch_size
    prompts = answers // config.rollouts.samples
    per_row = max(config.data.sequence_length // (prompt_tokens + new_tokens), 1)
    filled = math.ceil(math.ceil(answers / per_row) / answers * config.accumulation) / config.accumulation
    runs = {
        "rollout_weights": 1,
        "rollout_prefill": math.ceil(prompts / prefill_rows(config)),
        "rollout_step": math.ceil(answers / rows) * new_tokens,
        "train_step": 1,
    }
    found = []
    for name in ROLLOUT_PHASES:
        seconds = reports[name].step_s
        assert seconds is not None
        share = filled if name == "train_step" else 1.0
        found.append(Phase(name, runs[name], runs[name] * seconds * share, reports[name].hbm_bytes))
    return found


def phases_page(config: TrainConfig, reports: Mapping[str, Report], prompt_tokens: int, new_tokens: int) -> str:
    """The phases as text; says so where a program did not fit."""
    if not all(report.step_s is not None for report in reports.values()):
        return "no estimate of a step: a phase does not fit\n"
    found = phases(config, reports, prompt_tokens, new_tokens)
    total, peak = sum(phase.seconds for phase in found), max(found, key=lambda phase: phase.hbm_bytes)
    written, chips = config.data.batch_size * new_tokens, reports["train_step"].chips
    lines = [
        f"a step: {config.data.batch_size:,} answers of {new_tokens:,} tokens to prompts of {prompt_tokens:,}",
        f"{'phase':20}{'runs':>10}{'time':>12}{'share':>9}{'HBM GiB':>10}",
    ]
    for phase in found:
        share, hbm = phase.seconds / total, phase.hbm_bytes / 2**30
        lines.append(f"  {phase.name:18}{phase.runs:10,}{phase.seconds:10,.1f} s{share:9.1%}{hbm:10.1f}")
    lines += [
        f"  {'all':18}{'':10}{total:10,.1f} s{'':9}{peak.hbm_bytes / 2**30:10.1f}  in {peak.name}",
        f"  {written / total:,.0f} new tokens/s, {written / total / chips:,.1f} per chip",
        "Not counted: verdicts, rows that end before others, and what the pages above do not count.",
    ]
    return "\n".join(lines) + "\n"
