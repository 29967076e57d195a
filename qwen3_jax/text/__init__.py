"""Text before and after the token ids, on the host only: tokenizer, chat format, query modes, JSON records."""
