"""What XLA:TPU's compiler says of a program, ahead of time and without a TPU."""

from qwen3_jax.aot.cost import Collective, Cost, Operation, dearest_loop, read_cost
from qwen3_jax.aot.hlo import Program, read_program

__all__ = ["Collective", "Cost", "Operation", "Program", "dearest_loop", "read_cost", "read_program"]
