"""Distillation on given text: the student's distribution is drawn to the teacher's at every target (report, 4.5).

Shapes: B rows of a micro-batch, T tokens, D hidden_size of the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qwen3_jax.model import Qwen3, head_weight
from qwen3_jax.ops.loss import token_divergences
from qwen3_jax.train.config import TeacherConfig
from qwen3_jax.train.feed import Feed
from qwen3_jax.train.flops import train_flops_per_token
from qwen3_jax.train.next_token import NextToken
from qwen3_jax.train.objective import Batch, BatchArray, Sums

_TEACHER = "teacher/"  # before the names of its weights in a batch


class Distill(NextToken):
    """The divergence of `qwen3_jax.ops.loss.token_divergences`, a mean over all weighted tokens of the step.

    The teacher's weights come with every batch: constants of a program would be copied into it. They are sharded as the
    student's are, each model by its own sizes.
    """

    def __init__(self, config: TeacherConfig, teacher: Qwen3, *student: Any) -> None:
        super().__init__(*student)
        self._teacher, self._config = teacher, config
        boxed: Any = jax.eval_shape(teacher.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        leaves = flatten_dict(boxed, sep="/", is_leaf=lambda _, leaf: isinstance(leaf, nn.LogicallyPartitioned))
        self.teacher_arrays = {
            _TEACHER + name: BatchArray(leaf.value.shape, teacher.dtype, leaf.names) for name, leaf in leaves.items()
        }
        self.arrays = {**self.arrays, **self.teacher_arrays}
        _, length = self.arrays["tokens"].shape
        self.flops += self.tokens * train_flops_per_token(teacher.config, length) / 3  # it goes forward only

    def nested(self, batch: Mapping[str, Any]) -> Any:
        """What of a batch is the teacher's weights, as the tree that the model takes."""
        return unflatten_dict({name.removeprefix(_TEACHER): batch[name] for name in self.teacher_arrays}, sep="/")

    def token_losses(self, params: Any, batch: Batch, hidden_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Sums]:
        """`(weighted sum of the tokens' divergences, each of them [B, T], no other sums)`."""
        teacher = self.nested(batch)
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        output: Any = self._teacher.apply({"params": teacher}, *inputs)
        loss, divergence_BT = token_divergences(
            hidden_BTD,
            head_weight(self.model.config, params),
            jax.lax.stop_gradient(output.hidden),
            head_weight(self._teacher.config, teacher),
            batch["loss_weights"],
            beta=self._config.beta,
            temperature=self._config.temperature,
        )
        return loss, divergence_BT, {}


@dataclasses.dataclass(frozen=True)
class TeacherFeed:
    """A feed whose batches bring the teacher's weights, which stay on the devices."""

    feed: Feed
    arrays: Mapping[str, jax.Array]

    @classmethod
    def of(cls, feed: Feed, params: Any) -> TeacherFeed:
        """Of a feed, and the teacher's weights."""
        return cls(feed, {_TEACHER + name: x for name, x in flatten_dict(params, sep="/").items()})

    def next(self, params: Any) -> Batch:
        return {**self.feed.next(params), **self.arrays}

    def get_state(self) -> dict[str, Any]:
        return self.feed.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self.feed.set_state(state)

    def describe(self, directory: Path) -> None:
        self.feed.describe(directory)
