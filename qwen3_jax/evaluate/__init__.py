"""Evaluation: accuracy against the thinking budget, and pass@k."""
