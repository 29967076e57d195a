"""Problems, their answers, and how a response is judged. Plain Python, nothing of jax."""

from qwen3_jax.tasks.judge import Verdict, judge

__all__ = ["Verdict", "judge"]
