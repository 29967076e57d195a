"""Both sides of the token ids, on the host alone: tokenizer, chat format, prompts, answers."""
