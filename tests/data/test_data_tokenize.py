"""Tokenising once: the batches of the documents themselves, whole shards only, killed and resumed, refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qwen3_jax.cli.main import main
from qwen3_jax.config import ModelConfig
from qwen3_jax.data import DataConfig, SourceConfig, make_loader
from qwen3_jax.data.config import Encoding
from qwen3_jax.data.tokenize import tokenize_source
from qwen3_jax.text.tokenizer import train_sentencepiece

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`web.jsonl`: texts, some longer than a row, chats with a text that is out of the loss, and labels."""
    folder = tmp_path_factory.mktemp("tokenize")
    train_sentencepiece(["the user asks for the sum"], folder / "tokenizer.model", vocab_size=400)
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(NUM_DOCUMENTS):
        digits = "".join(map(str, rng.integers(0, 10, size=rng.integers(1, 100))))
        chat = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": digits[:15]}]
        record: dict[str, Any] = {"messages": chat, "no_loss": ["7"]} if i % 3 else {"text": digits}
        records.append({**record, "labels": {"parity": "odd" if i % 2 else "even"}})
    (folder / "web.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _source(path: Path | str, **fields: Any) -> SourceConfig:
    return SourceConfig("web", (str(path),), tokens=(5, 90), label_weights={"parity": {"odd": 0.5}}, **fields)


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    source = _source(folder / "web.jsonl", licence="CC0", languages=("en",))
    tokenize_source(source, Encoding(str(folder)), folder / "shards", workers=2, documents_per_shard=12)
    return folder / "shards"


def test_token_ids_train_as_the_documents_do(folder: Path, shards: Path) -> None:
    """The same batches and the same state, counters of labels included."""
    one, other = (
        make_loader(DataConfig((_source(path),), str(folder), sequence_length=32, batch_size=4))
        for path in (folder / "web.jsonl", shards / "*.arrayrecord")
    )
    for _ in range(20):
        a, b = next(one), next(other)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert one.get_state() == other.get_state()


def test_the_manifest_says_what_is_there(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["shards"] == {f"{i:06d}.arrayrecord": 12 if i < 4 else 2 for i in range(5)}
    assert sorted(path.name for path in shards.iterdir()) == [*manifest["shards"], "manifest.json"]
    assert (manifest["documents"], manifest["licence"], manifest["languages"]) == (NUM_DOCUMENTS, "CC0", ["en"])
    assert 0 < manifest["loss_tokens"] < manifest["tokens"]


def test_what_is_there_is_not_made_again(folder: Path, shards: Path) -> None:
    """A shard that is missing and one that was cut short are; the others keep their times."""
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    (shards / "000001.arrayrecord").unlink()
    os.truncate(shards / "000003.arrayrecord", 1000)
    tokenize_source(
        _source(folder / "web.jsonl", licence="CC0", languages=("en",)),
        Encoding(str(folder)),
        shards,
        workers=1,
        documents_per_shard=12,
    )
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    made = {path.name for path in shards.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert made == {"000001.arrayrecord", "000003.arrayrecord", "manifest.json"}


@pytest.fixture
def run_file(folder: Path, tmp_path: Path) -> Path:
    """A run over 20,000 documents, which take a while."""
    lines = (folder / "web.jsonl").read_text() * 400
    (tmp_path / "web.jsonl").write_text(lines)
    model = {key: value for key, value in vars(ModelConfig.preset("qwen3-tiny")).items() if value is not None}
    fields = {
        "model": {**model, "mlp_only_layers": []},
        "data": {
            "sources": [{"name": "web", "paths": [str(tmp_path / "web.jsonl")]}],
            "tokenizer": str(folder),
            "sequence_length": 32,
            "batch_size": 4,
        },
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 1},
        "output_dir": str(tmp_path / "out"),
        "steps": 2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_killed_it_leaves_whole_shards_and_no_process_and_goes_on(
    folder: Path, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of the command alone: its workers must end by themselves, and what they left is finished, not redone."""
    arguments = ["tokenize", str(run_file), str(tmp_path / "ids"), "--workers", "2", "--documents-per-shard", "1000"]
    command = [sys.executable, "-c", "from qwen3_jax.cli.main import main; main()", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    directory = tmp_path / "ids" / "web"
    while not list(directory.glob("0*.arrayrecord")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # returns when no worker holds the pipe any more
    left = sorted(path.name for path in directory.glob("0*.arrayrecord"))
    assert 0 < len(left) < 20
    unfinished = SourceConfig("web", (str(directory / "*.arrayrecord"),))
    with pytest.raises(
        ValueError, match="tokenising was not finished; the same `qwen3-jax tokenize` again finishes it"
    ):
        make_loader(DataConfig((unfinished,), str(folder), sequence_length=32, batch_size=4))
    times = {name: (directory / name).stat().st_mtime_ns for name in left}
    main(arguments)
    assert "20,000 documents" in capsys.readouterr().out
    assert {name: (directory / name).stat().st_mtime_ns for name in left} == times
    assert sorted(path.name for path in directory.iterdir() if not path.name.startswith(".")) == [
        *(f"{i:06d}.arrayrecord" for i in range(20)),
        "manifest.json",
    ]
    make_loader(DataConfig((unfinished,), str(folder), sequence_length=32, batch_size=4))


def test_another_tokenizer_is_refused_by_name(folder: Path, shards: Path, tmp_path: Path) -> None:
    train_sentencepiece(["another text"], tmp_path / "tokenizer.model", vocab_size=350)
    with pytest.raises(ValueError, match=r"sources.web: tokenised by another tokenizer \(\w{16}\) than .* \(\w{16}\)"):
        make_loader(DataConfig((_source(shards / "*.arrayrecord"),), str(tmp_path), 32, 4))
    with pytest.raises(ValueError, match=r"shards: begun with tokenizer '\w{16}', not '\w{16}'; use an empty"):
        tokenize_source(
            _source(folder / "web.jsonl"), Encoding(str(tmp_path)), shards, workers=1, documents_per_shard=12
        )
    with pytest.raises(ValueError, match="shards: begun with documents_per_shard 12, not 10000"):
        tokenize_source(_source(folder / "web.jsonl"), Encoding(str(folder)), shards, workers=1)


def test_a_shard_that_was_cut_short_is_refused_by_name(folder: Path, shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.truncate(tmp_path / "000003.arrayrecord", 1000)
    with pytest.raises(ValueError, match=r"000003\.arrayrecord' cannot be read \(0 records; its manifest"):
        make_loader(DataConfig((_source(tmp_path / "*.arrayrecord"),), str(folder), 32, 4))


def test_sources_that_do_not_fit(folder: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\.web\.paths: token ids already; use files of documents"):
        tokenize_source(_source(shards / "*.arrayrecord"), Encoding(str(folder)), tmp_path / "a", workers=1)
    (tmp_path / "bad.jsonl").write_text('{"text": "1"}\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: text: 2; use a string$"):
        tokenize_source(_source(tmp_path / "bad.jsonl"), Encoding(str(folder)), tmp_path / "b", workers=1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["manifest.json"]
