"""Problems, their answers, and how a response is judged. Plain Python, nothing of jax."""
