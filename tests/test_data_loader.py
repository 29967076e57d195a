"""The whole pipeline on small files: order, shares of processes, exact resumption."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import draccus
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwen3_jax.data import DataConfig, make_loader
from qwen3_jax.data.packing import PACKING_BINS
from qwen3_jax.tokenizer import load_tokenizer, train_sentencepiece

NUM_NUMBERS = 2 * PACKING_BINS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`numbers.txt`: documents "100", "101", ..., each 4 tokens with its end. `mixed.jsonl`: text and chats."""
    folder = tmp_path_factory.mktemp("data")
    train_sentencepiece(["the user asks for the sum"], folder / "tokenizer.model", vocab_size=400)
    (folder / "numbers.txt").write_text("\n\n".join(str(100 + i) for i in range(NUM_NUMBERS)))
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(60):
        digits = "".join(map(str, rng.integers(0, 10, size=rng.integers(1, 100))))
        chat = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": digits[:15]}]
        records.append({"text": digits} if i % 2 else {"messages": chat})
    (folder / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _config(folder: Path, name: str, **fields: Any) -> DataConfig:
    fields = {"sequence_length": 4, "batch_size": 8, **fields}
    return DataConfig(paths=(str(folder / name),), tokenizer=str(folder), **fields)


def _numbers(config: DataConfig, epochs: int = 1, **process: int) -> list[int]:
    """The documents of `numbers.txt` in the order in which they come, one a row.

    Rows of 4 hold one document each, and a share of 32 or 64 fills whole packing buffers, so epochs do not mix.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    count = process.get("process_count", 1)
    num_batches = epochs * NUM_NUMBERS // config.batch_size
    batches = list(itertools.islice(make_loader(config, **process), num_batches))
    assert all(batch["tokens"].shape == (config.batch_size // count, 4) for batch in batches)
    return [int(tokenizer.decode(row[:3].tolist())) for batch in batches for row in batch["tokens"]]


ALL_NUMBERS = list(range(100, 100 + NUM_NUMBERS))


def test_unshuffled_documents_come_in_order_forever(folder: Path) -> None:
    assert _numbers(_config(folder, "numbers.txt", shuffle=False), epochs=3) == 3 * ALL_NUMBERS


def test_shuffle_is_a_new_whole_order_each_epoch_and_fixed_by_the_seed(folder: Path) -> None:
    """Sets of the 32 documents in a packing buffer are compared, as the rows of a buffer are shuffled by themselves.

    There are 64 over 32, 10^18, of them: that two agree by chance is out of the question.
    """
    numbers = _numbers(_config(folder, "numbers.txt"), epochs=3)
    epochs = [numbers[i : i + NUM_NUMBERS] for i in range(0, len(numbers), NUM_NUMBERS)]
    assert [sorted(epoch) for epoch in epochs] == [ALL_NUMBERS] * 3
    assert _numbers(_config(folder, "numbers.txt"), epochs=3) == numbers
    other_seed = _numbers(_config(folder, "numbers.txt", seed=7))
    orders = [*epochs, other_seed, ALL_NUMBERS]
    assert len({frozenset(order[:PACKING_BINS]) for order in orders}) == len(orders)
    assert epochs[0][:PACKING_BINS] != sorted(epochs[0][:PACKING_BINS])


@pytest.mark.parametrize("shuffle", [False, True])
def test_shares_of_two_processes_are_disjoint_and_complete(folder: Path, shuffle: bool) -> None:
    config = _config(folder, "numbers.txt", shuffle=shuffle)
    shares = [_numbers(config, process_index=i, process_count=2) for i in range(2)]
    assert [len(share) for share in shares] == [NUM_NUMBERS // 2] * 2
    assert sorted(shares[0] + shares[1]) == ALL_NUMBERS


def _assert_same(actual: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("process_count", [1, 2])
def test_resumption_is_exact_at_every_step(folder: Path, process_count: int) -> None:
    """Each state, as JSON, in a new iterator gives the same batches as the run that was never cut.

    Batches of 6 rows do not divide a packing buffer of 32, and long texts are cut into chunks, so the states also lie
    inside a buffer and inside a document, which is asserted. The run goes over several epochs.
    """
    config = _config(folder, "mixed.jsonl", sequence_length=24, batch_size=6 * process_count)
    process = {"process_index": process_count - 1, "process_count": process_count}
    loader = make_loader(config, **process)
    states, batches = [json.dumps(loader.get_state())], []
    for _ in range(40):
        batches.append(next(loader))
        states.append(json.dumps(loader.get_state()))
    parsed = [json.loads(state) for state in states]
    assert any(state["next_row"] % 6 for state in parsed)
    assert any(state["parent"]["next_index_in_buffer"] == 2 for state in parsed)
    assert parsed[-1]["parent"]["parent"]["next_index"] > 60
    for step in range(37):
        resumed = make_loader(config, **process)
        resumed.set_state(json.loads(states[step]))
        _assert_same(list(itertools.islice(resumed, 3)), batches[step : step + 3])
    loader.set_state(json.loads(states[5]))
    _assert_same(list(itertools.islice(loader, 20)), batches[5:25])


def test_state_goes_through_orbax(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, "mixed.jsonl", sequence_length=24, batch_size=6)
    loader = make_loader(config)
    for _ in range(7):
        next(loader)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        resumed = make_loader(config)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    _assert_same(list(itertools.islice(resumed, 4)), list(itertools.islice(loader, 4)))


def test_every_document_of_an_epoch_is_trained_on_whole(folder: Path) -> None:
    """Text in, packed rows out: the digits of the first 60 documents come back from the segments, chats in full."""
    config = _config(folder, "mixed.jsonl", sequence_length=128, batch_size=1, shuffle=False)
    tokenizer = load_tokenizer(folder)
    segments = []
    for batch in itertools.islice(make_loader(config), PACKING_BINS):
        tokens, ids = batch["tokens"][0], batch["segment_ids"][0]
        segments += [tokenizer.decode(tokens[ids == i].tolist()) for i in range(1, ids.max() + 1)]
    for line in (folder / "mixed.jsonl").read_text().splitlines():
        record = json.loads(line)
        text = record["text"] if "text" in record else record["messages"][1]["content"]
        end = "<|endoftext|>" if "text" in record else "<|im_end|>\n"
        assert any(segment.endswith(text + end) for segment in segments), line


def test_malformed_line_stops_the_loader_by_name(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "1"}\n{"text": 2}\n')
    loader = make_loader(DataConfig(paths=(str(path),), tokenizer=str(folder), sequence_length=4, batch_size=1))
    with pytest.raises(ValueError, match=rf"(?m)\A{path}:2: text: 2; a string that is not blank fits$"):
        next(loader)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": "a.jsonl"}, "paths: 'a.jsonl'; a list"),
        ({"paths": ()}, r"paths: \(\); a list of at least one"),
        ({"sequence_length": 1}, "sequence_length: 1; a number >= 2 fits"),
        ({"batch_size": 0}, "batch_size: 0; a number >= 1 fits"),
        ({"seed": -1}, "seed: -1; a number from 0"),
        ({"seed": 2**32}, "seed: 4294967296; a number from 0"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"paths": ("a.jsonl",), "tokenizer": "t", "sequence_length": 8, "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        DataConfig(**{**good, **fields})


def test_process_counts_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size: 8; a multiple of the 3 processes fits"):
        make_loader(_config(folder, "numbers.txt"), process_index=0, process_count=3)
    with pytest.raises(ValueError, match="paths: 64 documents; at least one for each of 128 processes fits"):
        make_loader(_config(folder, "numbers.txt", batch_size=128), process_index=0, process_count=128)


def test_config_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("paths: [a.jsonl, 'b/*.txt']\ntokenizer: t\nsequence_length: 8\nbatch_size: 2\nshuffle: false\n")
    assert draccus.parse(DataConfig, config_path=path, args=[]) == DataConfig(
        paths=("a.jsonl", "b/*.txt"), tokenizer="t", sequence_length=8, batch_size=2, shuffle=False
    )
