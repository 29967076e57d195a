"""`qwen3-jax COMMAND`: all commands other than train.py and infer.py."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_jax.cli import (
    convert,
    data,
    demo,
    evaluate,
    fuse,
    pass_at_k,
    plan,
    problems,
    select,
    suggest,
    tiny,
    tokenize,
)
from qwen3_jax.cli.arguments import Parser, version
from qwen3_jax.cli.errors import exits_cleanly
from sharding import skip_absent_tpu

_COMMANDS = {
    "demo": (demo, "a worked example, and accuracy against the thinking budget, on the shipped model"),
    "convert": (convert, "convert a Hugging Face checkpoint to Orbax, or back"),
    "evaluate": (evaluate, "what each stage of the recipe has taught a miniature"),
    "pass-at-k": (pass_at_k, "accuracy and pass@k of a file of answers"),
    "data": (data, "the data that a run has consumed; duplicates, and overlap with evaluation sets"),
    "problems": (problems, "write problems of reasoning-gym, with their answers"),
    "select": (select, "judge and filter answers into training records"),
    "fuse": (fuse, "build the training data of thinking mode fusion"),
    "tokenize": (tokenize, "tokenise the documents of a run to ArrayRecord shards"),
    "plan": (plan, "memory and speed of a run on a slice of TPUs, by compiling for it; needs no TPU"),
    "suggest": (suggest, "learning rate and batch size by a published scaling law"),
    "tiny-data": (tiny, "write the training data of the shipped model"),
}


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and runs the command."""
    parser = Parser(prog="qwen3-jax")
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, help_text) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=help_text, description=help_text))
    args, overrides = parser.parse_known_args(argv)
    args.overrides = overrides
    if not getattr(args, "takes_overrides", False):
        commands.choices[args.command].refuse(overrides)
    skip_absent_tpu()
    _COMMANDS[args.command][0].run(args)
