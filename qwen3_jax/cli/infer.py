"""`infer.py`: one prompt to the terminal, or a JSONL file to another."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import jax
from jax.sharding import Mesh
from rich.console import Console

from qwen3_jax.cli.arguments import Parser, run_on_disk, version
from qwen3_jax.cli.config_file import load_config
from qwen3_jax.cli.errors import exits_cleanly
from qwen3_jax.cli.progress import file_progress
from qwen3_jax.request import SETTINGS
from qwen3_jax.serve import Engine, shipped_model
from qwen3_jax.serve.files import decode_file
from qwen3_jax.serve.input_file import STDIN
from qwen3_jax.text.chat_format import TemplateChoice
from sharding import MeshConfig, make_mesh, num_parts, start_processes


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Decodes on a thinking budget. Sampling settings default to Qwen3's own, by mode."""
    args = _parser().parse_args(argv)
    if (args.input is None) != (args.output is None):
        missing = "--output" if args.output is None else "--input"
        raise ValueError(f"{missing}: missing; answers to an --input go to a file, --output FILE")
    for name, given in (("--stream", args.stream), ("--json", args.json)):
        if given and args.prompt is None:
            raise ValueError(f"{name}: with --input; use --prompt")
    if args.raw and args.prompt is None:
        raise ValueError("--raw: with --input; use the field text in its lines")
    for_files = {"samples": 1, "batch_size": 64, "logprobs": False, "strict": False}
    for name, default in for_files.items():
        if args.prompt is not None and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: with --prompt; use --input and --output")
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.stream and args.json:
        raise ValueError("--stream, --json: both; use one of them")
    for name, value in (("--auto-threshold", args.auto_threshold), ("--auto-cap", args.auto_cap)):
        if value is not None and args.thinking_budget != "auto":
            raise ValueError(f"{name}: {value}; use --thinking-budget auto with it")
    for name, value in (("--batch-size", args.batch_size), ("--samples", args.samples)):
        if value < 1:
            raise ValueError(f"{name}: {value}; use a number >= 1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "qwen3-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    start_processes()

    names = (*SETTINGS, "stop", "enable_thinking", "mode_by_query")
    defaults = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    mesh = args.mesh and _mesh(args.mesh)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        writes = not _is_shared(mesh) or jax.process_index() == 0
        console = Console(stderr=True, quiet=not writes)

        def announce(text: str) -> None:
            console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

        engine = Engine.load(
            args.model, dtype=args.dtype, mesh=mesh, chat_template=args.chat_template, announce=announce
        )
        if args.prompt is not None:
            _prompt(engine, args, defaults, announce, writes)
        else:
            _file(engine, args, defaults, console, announce, _is_shared(mesh))


def _mesh(path: Path) -> Mesh:
    """Over all devices, one model for all processes; or, where the mesh has just the size for them, over this
    process's own devices."""
    config = load_config(MeshConfig, path)
    own = jax.local_devices()
    is_own = -1 not in config.axes.values() and math.prod(config.axes.values()) == len(own)
    return make_mesh(config, own if is_own else jax.devices())


def _is_shared(mesh: Mesh | None) -> bool:
    """Whether one model spans several processes."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="infer.py", description=main.__doc__)
    parser.add_argument("--version", action="version", version=version())
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn; /think and /no_think are obeyed")
    what.add_argument(
        "--input",
        type=Path,
        help="JSONL (gzip too), a JSON array or an OpenAI batch file; - is standard input. Fields: id; prompt, "
        "messages, text or prompt_ids; and any of the settings below",
    )
    parser.add_argument(
        "--output", type=Path, help="JSONL of answers, each as it is done; one begun before is completed"
    )
    parser.add_argument(
        "--model",
        type=run_on_disk,
        default=shipped_model(),
        help="directory in Hugging Face's layout, or a run's output_dir (default: the model that ships)",
    )
    parser.add_argument(
        "--chat-template",
        choices=get_args(TemplateChoice),
        default="own",
        help="own: write conversations as the model's template does; ours: in the nearest of Qwen3's formats",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    parser.add_argument("--mesh", type=Path, help="YAML of mesh axes; rows, weights and cache are sharded over them")

    thinking = parser.add_argument_group("thinking")
    thinking.add_argument(
        "--enable-thinking", type=_number, help="false puts the empty thought into the prompt (default: true)"
    )
    thinking.add_argument(
        "--no-thinking", dest="enable_thinking", action="store_false", help="short for --enable-thinking false"
    )
    thinking.add_argument(
        "--mode-by-query", action="store_true", help="turn thinking off for questions that look something up"
    )
    settings = parser.add_argument_group("settings, also fields of a record; sampling defaults to Qwen3's own, by mode")
    for name, help_text in SETTINGS.items():
        settings.add_argument(f"--{name.replace('_', '-')}", type=_number, help=help_text)
    parser.set_defaults(enable_thinking=None, mode_by_query=None)
    settings.add_argument("--stop", action="append", help="text that ends the answer; may be given several times")

    one = parser.add_argument_group("with --prompt")
    one.add_argument("--raw", action="store_true", help="continue the text as it is, without a chat format")
    one.add_argument("--stream", action="store_true", help="print the text as it comes, the thought dimmed")
    one.add_argument("--json", action="store_true", help="print the answer as a record")
    many = parser.add_argument_group("with --input")
    many.add_argument("--samples", type=int, help="answers to each line (default: 1)")
    many.add_argument("--logprobs", action="store_true", default=None, help="add the log-probability of each token")
    many.add_argument("--batch-size", type=int, help="rows decoded together (default: 64)")
    many.add_argument("--strict", action="store_true", default=None, help="stop at a bad line, before decoding")
    return parser


def _prompt(
    engine: Engine,
    args: argparse.Namespace,
    defaults: dict[str, object],
    announce: Callable[[str], None],
    prints: bool,
) -> None:
    prompt = engine.prompt({"text" if args.raw else "prompt": args.prompt}, defaults)
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

    def emit(text: str, in_thought: bool) -> None:
        if args.stream and prints:
            print(f"{dim}{text}{plain}" if in_thought else text, end="", flush=True)

    result = engine.stream(prompt, emit, lambda what, seconds: announce(f"compiled {what} in {seconds:.1f} s"))
    if not prints:
        return
    if args.json:
        print(json.dumps(engine.reader.record(result, prompt), ensure_ascii=False))
    else:
        print("" if args.stream else engine.text(result, prompt.stop))


def _file(
    engine: Engine,
    args: argparse.Namespace,
    defaults: dict[str, object],
    console: Console,
    announce: Callable[[str], None],
    is_shared: bool,
) -> None:
    # Processes that share one model answer all lines together; otherwise each answers its share.
    part, parts = (0, 1) if is_shared else (jax.process_index(), jax.process_count())
    writes = not is_shared or jax.process_index() == 0
    output = args.output if parts == 1 else args.output.with_name(f"{args.output.name}-{part:05d}-of-{parts:05d}")
    row_parts = num_parts("attention_batch")
    if args.batch_size % row_parts:
        raise ValueError(f"--batch-size: {args.batch_size}; use a multiple of the mesh's {row_parts} parts")
    settings = {**defaults, "model": str(args.model.resolve()), "dtype": args.dtype, "logprobs": args.logprobs}
    settings |= {"chat_template": args.chat_template}
    if args.input == STDIN and jax.process_count() > 1:
        raise ValueError("--input: - with several processes; use a file that all of them see")
    with file_progress(console) as report:
        tally = decode_file(
            engine,
            args.input,
            output,
            settings=settings,
            defaults=defaults,
            rows=args.batch_size,
            samples=args.samples,
            logprobs=args.logprobs,
            strict=args.strict,
            part=(part, parts),
            writes=writes,
            report=report,
            announce=announce,
        )
    if writes:
        print(json.dumps({"output": str(output), **tally.summary()}), flush=True)


def _number(text: str) -> int | float | str:
    """A number as JSON would read it; other text is left for the request to refuse by the field's name."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
