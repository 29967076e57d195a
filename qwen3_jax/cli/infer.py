"""`infer.py`: one prompt to the terminal, or a JSONL file to another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qwen3_jax.cli.errors import exits_cleanly
from qwen3_jax.cli.progress import decoding_progress
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.serve.files import decode_file


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Decodes on a thinking budget. Sampling settings default to Qwen3's own, by mode."""
    parser = argparse.ArgumentParser(prog="infer.py", description=main.__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn; /think and /no_think are obeyed")
    what.add_argument("--input", type=Path, help="JSONL: id, messages or prompt, and any of the settings below")
    parser.add_argument("--output", type=Path, help="JSONL of answers, in the order of --input")
    parser.add_argument("--model", type=Path, default=shipped_model(), help="directory; default: the model that ships")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--thinking-budget", type=_number, help="most thinking tokens; -1 (default) is unlimited")
    parser.add_argument("--no-thinking", action="store_true", help="put the empty thought into the prompt")
    parser.add_argument("--max-new-tokens", type=_number, default=1024, help="default: %(default)s, or what fits")
    parser.add_argument("--temperature", type=_number, help="0 is greedy")
    parser.add_argument("--top-p", type=_number)
    parser.add_argument("--top-k", type=_number, help="0 is off")
    parser.add_argument("--min-p", type=_number)
    parser.add_argument("--seed", type=_number, help="default: 0")
    parser.add_argument("--batch-size", type=int, default=64, help="rows decoded together (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="stop at a bad line, before anything is decoded")
    parser.add_argument("--json", action="store_true", help="print the answer to --prompt as a record")
    args = parser.parse_args(argv)
    if (args.input is None) != (args.output is None):
        raise ValueError("--input, --output: one without the other; both or neither fit")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: {args.batch_size}; a number >= 1 fits")

    names = ("thinking_budget", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    defaults = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.no_thinking:
        defaults["enable_thinking"] = False
    engine = Engine.load(args.model, dtype=args.dtype)
    if args.prompt is not None:
        result = engine.generate([engine.request({"prompt": args.prompt}, defaults)])[0]
        print(json.dumps(engine.response(result), ensure_ascii=False) if args.json else engine.text(result))
        return
    console = Console(stderr=True)
    with decoding_progress(console) as report:
        counts = decode_file(
            engine,
            args.input,
            args.output,
            defaults=defaults,
            batch_size=args.batch_size,
            strict=args.strict,
            progress=report,
        )
    print(json.dumps({"output": str(args.output), **counts}), file=sys.stderr)


def _number(text: str) -> int | float | str:
    """A number as JSON would read it; other text is left for the request to refuse by the field's name."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
