"""Distillation: the student's distribution is drawn to the teacher's at every target (report, 4.5).

Shapes: B rows of a micro-batch, T tokens, D hidden_size of the student.
"""

from __future__ import annotations

from typing import Any

import jax

from qwen3_jax.model import head_weight
from qwen3_jax.ops.loss import token_divergences
from qwen3_jax.train.config import TeacherConfig
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.frozen import Frozen
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.objective import Batch, Sums


class Distill(NextToken):
    """The divergence of `qwen3_jax.ops.loss.token_divergences`, a mean over all weighted tokens of the step."""

    def __init__(self, config: TeacherConfig, teacher: Frozen, *student: Any) -> None:
        super().__init__(*student)
        self.teacher, self._config = teacher, config
        self.arrays = {**self.arrays, **teacher.arrays}
        _, length = self.arrays["tokens"].shape
        self.flops += self.tokens * train_flops_per_token(teacher.model.config, length) / 3  # it goes forward only

    def token_losses(self, params: Any, batch: Batch, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Sums]:
        """`(weighted sum of the tokens' divergences, each of them [B, T], no other sums)`."""
        teacher = self.teacher.params(batch)
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        output: Any = self.teacher.model.apply({"params": teacher}, *inputs)
        loss, divergence_BT = token_divergences(
            hidden_BTD,
            head_weight(self.model.config, params),
            jax.lax.stop_gradient(output.hidden),
            head_weight(self.teacher.model.config, teacher),
            batch["loss_weights"],
            beta=self._config.beta,
            temperature=self._config.temperature,
        )
        return loss, divergence_BT, {}
