"""`qwen3-jax data report RUN`: the data that a run has consumed. `qwen3-jax data check FILE...`: duplicates, and
overlap with evaluation sets. `qwen3-jax data lint CONFIG`: every document that a run would refuse."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from qwen3_jax.cli.arguments import one_run
from qwen3_jax.cli.config_file import load_runs
from qwen3_jax.cli.progress import bar
from qwen3_jax.curate.stages import is_not_made_yet
from qwen3_jax.data.catalogue import Consumption, consumption, plot_consumption
from qwen3_jax.data.duplicates import NGRAM, THRESHOLD, Checker, Finding, write_without
from qwen3_jax.data.lint import lint
from qwen3_jax.data.source import DocumentSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the commands under `data`."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    text = "the data that a run has consumed, by source, licence, language and label"
    report = commands.add_parser("report", help=text, description=text)
    report.add_argument("run", type=one_run, help="output_dir of a training run that has saved a checkpoint")
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report.add_argument("--plot", type=Path, help="PNG of the shares (default: RUN/data.png)")
    report.set_defaults(run_data=_report)
    text = "exact and near duplicates, and overlap with evaluation sets"
    check = commands.add_parser("check", help=text, description=text)
    check.add_argument("sources", nargs="+", metavar="FILE", help="files or globs of documents")
    check.add_argument("--eval", nargs="+", default=[], metavar="FILE", help="files or globs of evaluation sets")
    check.add_argument("--ngram", type=int, default=NGRAM, help="words of an overlap (default: %(default)s)")
    check.add_argument(
        "--near", type=float, default=THRESHOLD, help="similarity of near duplicates, 0 is off (default: %(default)s)"
    )
    check.add_argument(
        "--drop", type=Path, metavar="OUT", help="directory for copies of the files without the documents found"
    )
    check.add_argument("--json", action="store_true", help="print each finding as a line of JSON")
    check.set_defaults(run_data=_check)
    text = "read all documents of a run once; list those that it would refuse, and count what it would pass over"
    linted = commands.add_parser("lint", help=text, description=text)
    linted.add_argument("config", help="a run file; --section.key value changes a key as in train.py")
    linted.set_defaults(run_data=_lint, takes_overrides=True)


def run(args: argparse.Namespace) -> None:
    """Runs the command under `data`."""
    args.run_data(args)


def _report(args: argparse.Namespace) -> None:
    console = Console(highlight=False)
    consumed = consumption(args.run)
    plot = args.plot or args.run / "data.png"
    plot_consumption(consumed, plot)
    if args.json:
        print(json.dumps(consumed.to_json(), indent=2, ensure_ascii=False))
        return
    console.print(f"consumed up to step {consumed.step:,}")
    console.print(_table(consumed))
    console.print(f"plot: {plot}", markup=False, soft_wrap=True)


def _check(args: argparse.Namespace) -> None:
    checker = Checker(args.eval, args.ngram, args.near)
    sources = [DocumentSource([path], "sources") for path in args.sources]
    table = Table("", "documents", "exact", "near", "overlap", box=None)
    findings: list[Finding] = []
    with Progress(console=Console(stderr=True)) as progress:
        for path, source in zip(args.sources, sources, strict=True):
            kinds: Counter[str] = Counter()
            for document in progress.track(source, description=path):
                finding = checker.check(document)
                if finding is not None:
                    kinds[finding.kind] += 1
                    findings.append(finding)
                    if args.json:
                        print(json.dumps(finding.to_json(), ensure_ascii=False))
            counts = (len(source), kinds["exact"], kinds["near"], kinds["overlap"])
            table.add_row(path, *(f"{count:,}" for count in counts))
    console = Console(highlight=False, stderr=args.json)
    console.print(table)
    if checker.num_too_short:
        console.print(
            f"{checker.num_too_short:,} evaluation documents are shorter than {args.ngram} words: not searched for"
        )
    if args.drop is not None:
        written = write_without(sources, findings, args.drop)
        console.print(f"{args.drop}: {written:,} documents", markup=False, soft_wrap=True)


def _lint(args: argparse.Namespace) -> None:
    runs = load_runs(args.config, args.overrides)
    console, bad, seen = Console(highlight=False, stderr=True), 0, set()
    for config in runs.values():
        for data in filter(None, (config.data, config.eval_data)):
            for source in data.sources:
                if (reading := (source.paths, data.encoding, data.sequence_length)) in seen:
                    continue
                seen.add(reading)
                if made := is_not_made_yet(source.paths):
                    print(f"{source.name}: {made} is made by a stage of the plan, and is not there yet")
                    continue
                with bar(console, source.name) as update:
                    found = lint(source, data, lambda done, total: update(completed=done, total=total, status=""))
                for line in found.bad:
                    print(line)
                bad += len(found.bad)
                documents, tokens, loss_tokens = found.counts
                step = data.batch_size * data.sequence_length
                notes = "".join(f", {count:,} {note}" for note, count in found.notes.items())
                print(
                    f"{source.name}: {documents:,} documents, {tokens:,} tokens, {loss_tokens:,} in the loss, "
                    f"about {math.ceil(tokens / step):,} steps of {data.batch_size} x {data.sequence_length} tokens; "
                    f"{len(found.bad):,} bad{notes}"
                )
    if bad:
        raise ValueError(f"{bad:,} documents cannot be read; mend or delete them")


def _table(consumed: Consumption) -> Table:
    numbers = ("tokens", "share", "in the loss", "documents", "epochs drawn")
    table = Table("", "", *(Column(title, justify="right") for title in numbers), box=None)
    for kind, values in consumed.shares.items():
        total = sum(counts.tokens for counts in values.values())
        for number, (value, counts) in enumerate(sorted(values.items(), key=lambda item: -item[1].tokens)):
            table.add_row(
                "" if number else kind,
                value,
                f"{counts.tokens:,}",
                f"{counts.tokens / max(total, 1):.1%}",
                f"{counts.loss_tokens:,}",
                f"{counts.documents:,}",
                f"{consumed.epochs[value]:.2f}" if kind == "source" else "",
            )
    return table
