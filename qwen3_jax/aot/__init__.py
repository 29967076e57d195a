"""Programs compiled ahead of time by XLA:TPU, without a TPU, and what their schedules cost."""

from qwen3_jax.aot.cost import Collective, Cost, Operation, costliest_loop, read_cost
from qwen3_jax.aot.hlo import Program, read_program

__all__ = ["Collective", "Cost", "Operation", "Program", "costliest_loop", "read_cost", "read_program"]
