"""`qwen3-jax plan`: what a training or decoding run takes on a slice of TPUs, by compiling for it."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

from rich.console import Console

from qwen3_jax.aot.phases import phases_page
from qwen3_jax.aot.programs import ROLLOUT_PHASES, DecodeConfig, topology_shape, use_compiler
from qwen3_jax.aot.report import Report, page
from qwen3_jax.aot.sweep import Job, run_jobs
from qwen3_jax.aot.sweep_plot import plot_sweep
from qwen3_jax.chips import slice_name
from qwen3_jax.cli.config_file import decode_config, load_config, load_model, load_runs
from qwen3_jax.cli.progress import planning_progress
from qwen3_jax.train import TrainConfig
from sharding import MeshConfig

_EPILOG = """--section.key value, as of train.py, changes a key of the configuration. Keys of --infer are model, mesh,
batch, context, prompt (its slots, of the context's) and dtype."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `qwen3-jax plan`."""
    parser.epilog = _EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", type=Path, help="a YAML file of train.py: its train step, and the phases of its rollouts"
    )
    what.add_argument("--infer", action="store_true", help="prefill and decode step of infer.py")
    parser.add_argument("--topology", help="a slice, as v5p:4x4x4, v5e:4x4 or v5p-128; default: the mesh's own")
    parser.add_argument("--stage", help="with --config: of a plan of stages; default: the first")
    parser.add_argument("--model", help="with --infer: a size of configs/model by its name, or a YAML file like those")
    parser.add_argument(
        "--mesh", type=Path, help="with --infer: YAML of mesh axes; default: tensor over the key-value heads"
    )
    parser.add_argument("--batch", type=int, help="with --infer: rows (default: 32)")
    parser.add_argument("--context", type=int, help="with --infer: room of a row, half of it prompt (default: 8192)")
    parser.add_argument("--prompt-tokens", type=int, help="with rollouts: of a prompt (default: the most that fit)")
    parser.add_argument("--new-tokens", type=int, help="with rollouts: of an answer (default: the most that fit)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="append",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a key and its values; of several, all combinations are compiled",
    )
    parser.add_argument("--plot", type=Path, help="with --sweep: a PNG of tokens/s and memory of a chip")
    parser.add_argument("--price", type=float, help="dollars per chip and hour, for the cost of a billion tokens")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each program")
    parser.add_argument("--hlo", type=Path, help="keep the scheduled HLO in this directory")
    parser.set_defaults(takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Compiles, and prints a page for each program, or of a sweep a table; exits with 1 where one does not fit."""
    _check(args)
    use_compiler()
    jobs = _jobs(args)
    console = Console(stderr=True)
    reports: list[tuple[Job, Report]] = []
    outcomes = run_jobs(jobs, args.hlo)
    with planning_progress(console, len(jobs)) as begin:
        for job in jobs:
            begin(f"{job.label} {job.program}")
            outcome = next(outcomes)
            if isinstance(outcome, str):
                if not args.sweep:
                    raise ValueError(outcome)
                console.print(f"{job.label}: {outcome}", highlight=False, markup=False, soft_wrap=True)
                continue
            reports.append((job, outcome))
            if args.json:
                named = {"label": job.label, "program": job.program}
                print(json.dumps(named | outcome.to_json(args.price)), flush=True)
            elif not args.sweep:
                print(page(outcome, args.price) + "\n", flush=True)
    made_by = reports[0][0].config if reports else None
    if isinstance(made_by, TrainConfig) and made_by.rollouts is not None and not args.sweep and not args.json:
        print(phases_page(made_by, {job.program: report for job, report in reports}, *_lengths(args, made_by)))
    # The fastest first, those that do not fit last.
    reports.sort(key=lambda found: (not found[1].fits, -(found[1].tokens_per_second or 0) / found[1].chips))
    programs = list(dict.fromkeys(job.program for job, _ in reports))
    for program in programs if args.sweep else ():
        found = [(job.label, report) for job, report in reports if job.program == program]
        if not args.json:
            print(_table(program, found, args.price))
        if args.plot:
            apart = args.plot.with_name(f"{args.plot.stem}-{program}{args.plot.suffix}")
            plot_sweep(apart if len(programs) > 1 else args.plot, program, found)
    if not args.sweep and not all(report.fits for _, report in reports):
        sys.exit(1)


def _lengths(args: argparse.Namespace, config: TrainConfig) -> tuple[int, int]:
    """Tokens of a prompt and of an answer to it; by default the most that fit."""
    assert config.rollouts is not None
    new = config.rollouts.max_new_tokens if args.new_tokens is None else args.new_tokens
    prompt = config.data.sequence_length - config.rollouts.max_new_tokens
    return prompt if args.prompt_tokens is None else args.prompt_tokens, new


def _check(args: argparse.Namespace) -> None:
    for name in ("stage", "model", "mesh", "batch", "context"):
        other = "config" if name == "stage" else "infer"
        if getattr(args, name) is not None and not getattr(args, other):
            raise ValueError(f"--{name}: {getattr(args, name)}; use --{other} with it")
    if args.infer and args.model is None:
        raise ValueError("--model: none; use a size of configs/model, such as qwen3-8b")
    if args.plot and not args.sweep:
        raise ValueError(f"--plot: {args.plot}; use --sweep with it")
    for name in ("prompt_tokens", "new_tokens"):
        if (tokens := getattr(args, name)) is not None and tokens < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {tokens}; use a number >= 1")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ValueError(f"--price: {args.price}; use a number >= 0")
    for key, *values in args.sweep:
        if not values:
            raise ValueError(f"--sweep {key}: no values; use --sweep KEY VALUE [VALUE ...]")


def _jobs(args: argparse.Namespace) -> list[Job]:
    """One for each program, and for each combination of what is swept over."""
    swept = [[(key, value) for value in values] for key, *values in args.sweep]
    jobs = []
    for combination in itertools.product(*swept):
        words = [*args.overrides, *itertools.chain(*((f"--{key}", value) for key, value in combination))]
        label = " ".join(f"{key}={value}" for key, value in combination)
        config = _decode_config(args, words) if args.infer else _train_config(args, words)
        if config.mesh.topology is not None:
            mesh = dataclasses.replace(config.mesh, topology=slice_name(config.mesh.topology))
            config = dataclasses.replace(config, mesh=mesh)
        programs: tuple[str, ...] = ("prefill", "decode_step") if args.infer else ("train_step",)
        if isinstance(config, TrainConfig) and config.rollouts is not None:
            programs = ROLLOUT_PHASES
        jobs += [Job(program, config, label) for program in programs]
    return jobs


def _train_config(args: argparse.Namespace, words: list[str]) -> TrainConfig:
    if args.topology is not None:
        words = [*words, "--mesh.topology", args.topology]
    runs = load_runs(args.config, words)
    stage = next(iter(runs)) if args.stage is None else args.stage
    if stage not in runs:
        raise ValueError(f"--stage: {stage!r}; use {' or '.join(filter(None, runs)) or 'a plan of stages'}")
    return runs[stage]


def _decode_config(args: argparse.Namespace, words: list[str]) -> DecodeConfig:
    model = load_model(args.model)
    if args.mesh:
        mesh = load_config(MeshConfig, args.mesh)
    else:  # key-value heads are the most that tensor splits without copies
        chips = math.prod(topology_shape(slice_name(args.topology)) if args.topology else [])
        mesh = MeshConfig(tensor=math.gcd(model.num_key_value_heads, chips))
    raw = {"model": dataclasses.asdict(model), "mesh": dataclasses.asdict(mesh)}
    raw |= {name: getattr(args, name) for name in ("batch", "context") if getattr(args, name) is not None}
    if args.topology is not None:
        raw["mesh"]["topology"] = args.topology
    return decode_config(DecodeConfig, raw, words, "--infer")


def _table(program: str, reports: list[tuple[str, Report]], price: float | None) -> str:
    width = max(len(label) for label, _ in reports)
    title = (
        f"{program} on {' and '.join(sorted({report.topology for _, report in reports}))}; * is the fastest that fits"
    )
    header = f"  {'':{width}}     step     tokens/s/chip    MFU  HBM GiB"
    lines = [title, header if price is None else f"{header}    $ per 10^9 tokens"]
    for number, (label, report) in enumerate(reports):
        speed, cost = f"{'':33}", ""
        if report.step_s is not None:
            rate = (report.tokens_per_second or 0) / report.chips
            speed = f"{report.step_s * 1e3:8,.1f} ms  {rate:13,.1f} {report.mfu:6.1%}"
        if report.step_s is not None and price is not None:
            cost = f"{report.dollars_per_billion_tokens(price):21,.2f}"
        hbm = f"{report.hbm_bytes / 2**30:7.1f}" + ("" if report.fits else f" of {report.capacity / 2**30:.0f}")
        lines.append(f"{'*' if number == 0 and report.fits else ' '} {label:{width}} {speed}  {hbm}{cost}")
    return "\n".join(lines) + "\n"
