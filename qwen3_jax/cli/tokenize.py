"""`qwen3-jax tokenize CONFIG OUT`: tokenises the documents of a run."""

from __future__ import annotations

import argparse
import os

from rich.console import Console

from qwen3_jax.cli.arguments import on_disk
from qwen3_jax.cli.config_file import load_runs
from qwen3_jax.cli.progress import bar
from qwen3_jax.curate.stages import is_not_made_yet
from qwen3_jax.data import DataConfig, SourceConfig
from qwen3_jax.data.tokenize import DOCUMENTS_PER_SHARD, tokenize_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `tokenize`."""
    parser.add_argument("config", help="a run file; its data.sources are read; --section.key value as in train.py")
    parser.add_argument("out", type=on_disk, help="the ArrayRecord shards of each source are written to OUT/NAME")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("--documents-per-shard", type=int, default=DOCUMENTS_PER_SHARD, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Tokenises source after source."""
    for name in ("workers", "documents_per_shard"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(args, name)}; use a number >= 1")
    runs = load_runs(args.config, args.overrides)
    sources: dict[str, tuple[SourceConfig, DataConfig]] = {}
    for stage, config in runs.items():
        for source in config.data.sources:
            if made := is_not_made_yet(source.paths):
                print(f"{source.name}: {made} is made by a stage of the plan, and is not there yet")
                continue
            first, data = sources.setdefault(source.name, (source, config.data))
            if (first.paths, data.encoding) != (source.paths, config.data.encoding):
                raise ValueError(
                    f"stages.{stage}.data.sources.{source.name}: other paths, turns, chat_template or another "
                    "tokenizer than an earlier stage; use another name"
                )
    console = Console(highlight=False)
    for source, data in sources.values():
        _tokenize(source, data, args, console)


def _tokenize(source: SourceConfig, data: DataConfig, args: argparse.Namespace, console: Console) -> None:
    directory = args.out / source.name
    with bar(console, source.name, "reading") as update:
        made = tokenize_source(
            source,
            data.encoding,
            directory,
            workers=args.workers,
            documents_per_shard=args.documents_per_shard,
            progress=lambda done, total: update(
                completed=done.documents, total=total, status=f"{done.tokens:,} tokens"
            ),
        )
    console.print(
        f"{directory}: {made.documents:,} documents, {made.tokens:,} tokens, {made.loss_tokens:,} in the loss, "
        f"{len(made.shards):,} shards; to train on them: paths: [{directory}/*.arrayrecord]",
        soft_wrap=True,
        markup=False,
    )
