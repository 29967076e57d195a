"""The whole pipeline on small files: order, lanes shared out to processes and workers, exact resumption, mixtures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draccus
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import Command

from qwen3_jax.data import DataConfig, SourceConfig, make_loader
from qwen3_jax.data.config import Encoding
from qwen3_jax.data.mixture import shuffled
from qwen3_jax.data.packing import OPEN_ROWS
from qwen3_jax.data.tokenize import tokenize_source
from qwen3_jax.text.tokenizer import load_tokenizer, train_sentencepiece

Batch = dict[str, np.ndarray]

NUM_NUMBERS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`numbers.txt`: documents "100", "101", ..., each 4 tokens with its end. `mixed.jsonl`: text and chats, labelled
    by the length of their digits. `few.jsonl`: three texts."""
    folder = tmp_path_factory.mktemp("data")
    train_sentencepiece(["the user asks for the sum"], folder / "tokenizer.model", vocab_size=400)
    (folder / "numbers.txt").write_text("\n\n".join(str(100 + i) for i in range(NUM_NUMBERS)))
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for i in range(60):
        digits = "".join(map(str, rng.integers(0, 10, size=rng.integers(1, 100))))
        chat = [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": digits[:15]}]
        labels = {"size": "long" if len(digits) > 50 else "short"}
        records.append({"text": digits, "labels": labels} if i % 2 else {"messages": chat, "labels": labels})
    (folder / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aaaa", "bbbbbb", "c")))
    return folder


def _config(folder: Path, *names: str, weights: tuple[float, ...] = (), **fields: Any) -> DataConfig:
    weights = weights or (1.0,) * len(names)
    sources = [SourceConfig(name, (str(folder / name),), weight) for name, weight in zip(names, weights, strict=True)]
    fields = {"sequence_length": 24, "batch_size": 8, **fields}
    return DataConfig(sources=tuple(sources), tokenizer=str(folder), **fields)


def _batches(loader: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def _joined(parts: list[list[Batch]]) -> list[Batch]:
    """The global batches, of those of each process."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]


def _assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


# The order of documents.


def _epochs(config: DataConfig, count: int) -> list[list[int]]:
    """The numbers of `numbers.txt`, which fill a row each, in the order in which they are drawn over all lanes.

    A row is given out when OPEN_ROWS are full, so a lane's rows come late, but in order.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    batches = _batches(make_loader(config), count * NUM_NUMBERS // config.batch_size)
    numbers = [int(tokenizer.decode(row[:3].tolist())) for batch in batches for row in batch["tokens"]]
    return [numbers[i : i + NUM_NUMBERS] for i in range(0, len(numbers), NUM_NUMBERS)]


ALL_NUMBERS = list(range(100, 100 + NUM_NUMBERS))


def test_unshuffled_documents_come_in_order_forever(folder: Path) -> None:
    assert _epochs(_config(folder, "numbers.txt", sequence_length=4, shuffle=False), 3) == [ALL_NUMBERS] * 3


def test_shuffle_is_a_new_whole_order_each_epoch_and_fixed_by_the_seed_and_the_name(folder: Path) -> None:
    """Of the 64! orders, that two agree by chance is out of the question."""
    config = _config(folder, "numbers.txt", sequence_length=4)
    epochs = _epochs(config, 3)
    assert [sorted(epoch) for epoch in epochs] == [ALL_NUMBERS] * 3
    assert _epochs(config, 3) == epochs
    (other_seed,) = _epochs(_config(folder, "numbers.txt", sequence_length=4, seed=7), 1)
    renamed = SourceConfig("other", config.sources[0].paths)
    (other_name,) = _epochs(DataConfig((renamed,), config.tokenizer, 4, 8), 1)
    orders = [*epochs, other_seed, other_name, ALL_NUMBERS]
    assert len({tuple(order) for order in orders}) == len(orders)


@pytest.mark.parametrize("batch_size", [1, 8, 24, 128])
def test_lanes_share_each_epoch_out_however_many_they_are(folder: Path, batch_size: int) -> None:
    """With 128 lanes for 64 documents lanes 0 to 63 have the first epoch, the others the second, and so on."""
    config = _config(folder, "numbers.txt", sequence_length=4, batch_size=batch_size)
    counts = Counter(number for epoch in _epochs(config, 6) for number in epoch)
    assert counts == dict.fromkeys(ALL_NUMBERS, 6)


def test_every_document_of_an_epoch_is_trained_on_whole(folder: Path) -> None:
    """Text in, packed rows out: the digits of all documents come back from the segments, chats in full."""
    config = _config(folder, "mixed.jsonl", sequence_length=128, batch_size=1, shuffle=False)
    tokenizer = load_tokenizer(folder)
    segments = []
    for batch in _batches(make_loader(config), 8 * OPEN_ROWS):
        tokens, ids = batch["tokens"][0], batch["segment_ids"][0]
        segments += [tokenizer.decode(tokens[ids == i].tolist()) for i in range(1, ids.max() + 1)]
    for line in (folder / "mixed.jsonl").read_text().splitlines():
        record = json.loads(line)
        text = record["text"] if "text" in record else record["messages"][1]["content"]
        end = "<|endoftext|>" if "text" in record else "<|im_end|>\n"
        assert any(segment.endswith(text + end) for segment in segments), line


def test_segments_never_mix(folder: Path) -> None:
    """Every segment of rows of three sources is a piece of one document, in its own positions, and nothing of it is a
    target from elsewhere."""
    config = _config(folder, "numbers.txt", "mixed.jsonl", "few.jsonl")
    tokenizer = load_tokenizer(folder)
    whole = [f"{number}<|endoftext|>" for number in ALL_NUMBERS]
    for name in ("mixed.jsonl", "few.jsonl"):
        for line in (folder / name).read_text().splitlines():
            record = json.loads(line)
            if "text" in record:
                whole.append(record["text"] + "<|endoftext|>")
            else:
                user, assistant = (message["content"] for message in record["messages"])
                whole.append(
                    f"<|im_start|>user\n{user}<|im_end|>\n"
                    f"<|im_start|>assistant\n<think>\n\n</think>\n\n{assistant}<|im_end|>\n"
                )
    several = 0
    for batch in _batches(make_loader(config), 30):
        for tokens, ids, positions, targets, weights in zip(
            *(batch[key] for key in ("tokens", "segment_ids", "positions", "targets", "loss_weights")), strict=True
        ):
            several += ids.max() > 1
            for i in range(1, ids.max() + 1):
                segment = tokens[ids == i]
                assert any(tokenizer.decode(segment.tolist()) in text for text in whole)
                np.testing.assert_array_equal(positions[ids == i], np.arange(len(segment)))
                np.testing.assert_array_equal(targets[ids == i][:-1], segment[1:])
                assert weights[ids == i][-1] == 0
    assert several > 100


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 1000])
def test_shuffles_are_permutations_in_which_every_place_is_as_likely(count: int) -> None:
    keys = 400 if count <= 5 else 2
    orders = [[shuffled(i, count, key) for i in range(count)] for key in range(keys)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count <= 5:  # six standard deviations
        firsts = Counter(order[0] for order in orders)
        assert all(abs(firsts[i] - keys / count) < 6 * (keys / count) ** 0.5 for i in range(count))
    else:
        assert orders[0] != orders[1]


# Processes, workers, resumption.


def _share(config: DataConfig, index: int, count: int) -> range:
    """The rows of one of `count` processes."""
    rows = config.batch_size // count
    return range(index * rows, (index + 1) * rows)


def test_rows_may_lie_apart(folder: Path) -> None:
    """As those of a TPU host do, whose chips are a square of the network."""
    config = _config(folder, "numbers.txt", "mixed.jsonl", "few.jsonl", weights=(1, 5, 0.3))
    rows = [1, 2, 5]
    expected = [{name: x[rows] for name, x in batch.items()} for batch in _batches(make_loader(config), 30)]
    _assert_same(_batches(make_loader(config, rows), 30), expected)


def test_processes_feed_the_rows_of_their_devices(folder: Path, coordinator_address: str) -> None:
    """Two processes, each with two blocks of rows that lie apart, and pairs of devices that split the tokens."""
    config = json.dumps(dataclasses.asdict(_config(folder, "mixed.jsonl")))
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": coordinator_address, "JAX_NUM_PROCESSES": "2"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    processes = [
        Command("feed_worker:main", config, env={**env, "JAX_PROCESS_ID": str(i)}, cwd=Path.cwd()) for i in range(2)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    rows = [json.loads(out) for out, _ in said]
    assert rows == [["0", "1", "4", "5"], ["2", "3", "6", "7"]]


def test_the_number_of_processes_changes_no_batch(folder: Path) -> None:
    config = _config(folder, "numbers.txt", "mixed.jsonl", "few.jsonl", weights=(1, 5, 0.3))
    whole = _batches(make_loader(config), 30)
    for count in (2, 4):
        _assert_same(
            _joined([_batches(make_loader(config, _share(config, i, count)), 30) for i in range(count)]), whole
        )


@pytest.mark.parametrize("counts", [(2, 1, 4), (1, 4, 2)])
def test_a_run_may_change_its_number_of_processes(folder: Path, counts: tuple[int, ...]) -> None:
    """Ten steps with each number of processes, states joined between them: the batches of a run that never changed."""
    config = _config(folder, "numbers.txt", "mixed.jsonl", "few.jsonl", weights=(1, 5, 0.3))
    whole = _batches(make_loader(config), 10 * len(counts))
    joined: dict[str, Any] = {}
    for number, count in enumerate(counts):
        loaders = [make_loader(config, _share(config, i, count)) for i in range(count)]
        for loader in loaders:
            if joined:
                loader.set_state(joined)
        steps = _joined([_batches(loader, 10) for loader in loaders])
        _assert_same(steps, whole[10 * number : 10 * (number + 1)])
        states = [json.loads(json.dumps(loader.get_state())) for loader in loaders]
        assert [len(state) for state in states] == [8 // count] * count
        joined = {lane: state for part in states for lane, state in part.items()}


def test_the_number_of_workers_changes_no_batch_and_no_state(folder: Path) -> None:
    config = _config(folder, "numbers.txt", "mixed.jsonl", weights=(1, 5))
    loader = make_loader(config)
    whole = _batches(loader, 12)
    helped = make_loader(DataConfig(config.sources, config.tokenizer, 24, 8, workers=2))
    _assert_same(_batches(helped, 6), whole[:6])
    state = helped.get_state()
    resumed = make_loader(config)
    resumed.set_state(state)
    _assert_same(_batches(resumed, 6), whole[6:])
    helped.set_state(state)
    _assert_same(_batches(helped, 6), whole[6:])
    assert helped.get_state() == loader.get_state()
    helped.close()


def test_an_error_in_a_worker_is_that_of_the_document(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "1"}\n{"text": 2}\n')
    for workers in (0, 1):
        source = SourceConfig("bad", (str(path),))
        loader = make_loader(DataConfig((source,), str(folder), sequence_length=4, batch_size=1, workers=workers))
        with pytest.raises(ValueError, match=rf"(?m)\A{path}:2: text: 2; use a string$"):
            next(loader)


def test_resumption_is_exact_at_every_step(folder: Path) -> None:
    """Each state, as JSON, in a new iterator gives the same batches as the run that was never cut.

    Long texts are cut into chunks and rows of several documents are open, so states lie inside a document and inside
    rows, which is asserted. The run goes over several epochs.
    """
    config = _config(folder, "mixed.jsonl", "few.jsonl", weights=(3, 1), batch_size=3)
    loader = make_loader(config)
    states, batches = [json.dumps(loader.get_state())], []
    for _ in range(50):
        batches.append(next(loader))
        states.append(json.dumps(loader.get_state()))
    parsed = [json.loads(state)["0"] for state in states]
    assert any(state["sources"]["mixed.jsonl"][1] > 1 for state in parsed)
    assert any(len(row) > 4 for state in parsed for row in state["open_rows"])
    assert parsed[-1]["sources"]["mixed.jsonl"][0] > 60 / 3
    assert max(map(len, states)) < 3 * 2000
    for step in range(47):
        resumed = make_loader(config)
        resumed.set_state(json.loads(states[step]))
        _assert_same(_batches(resumed, 3), batches[step : step + 3])
        assert json.dumps(resumed.get_state()) == states[step + 3]
    loader.set_state(json.loads(states[5]))
    _assert_same(_batches(loader, 20), batches[5:25])


def test_state_goes_through_orbax(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, "mixed.jsonl", batch_size=6)
    loader = make_loader(config)
    _batches(loader, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
        manager.wait_until_finished()
        resumed = make_loader(config)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    _assert_same(_batches(resumed, 4), _batches(loader, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1}, "data.seed: 1, but the data position was saved under 0; use 0"),
        ({"batch_size": 4}, "data.batch_size: 4, but the data position was saved under 8"),
        ({"sequence_length": 25}, "data.sequence_length: 25, but .* under 24"),
        ({"weights": (2.0, 1.0)}, r"data.sources.mixed.jsonl.weight: 2.0, but .* under 1.0"),
        ({"names": ("mixed.jsonl",)}, r"data.sources: \['mixed.jsonl'\], but .* \['mixed.jsonl', 'few.jsonl'\]"),
    ],
)
def test_a_position_in_another_order_is_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    state = make_loader(_config(folder, "mixed.jsonl", "few.jsonl")).get_state()
    names = fields.pop("names", ("mixed.jsonl", "few.jsonl"))
    with pytest.raises(ValueError, match=message):
        make_loader(_config(folder, *names, **fields)).set_state(state)


@pytest.mark.parametrize("name", ["mixed.jsonl", "numbers.txt"])
def test_files_that_were_replaced_are_refused_or_accepted(folder: Path, tmp_path: Path, name: str) -> None:
    """Also where their number of documents is the same. A position from before there was a digest is taken."""
    for file in (name, "tokenizer.model"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    config = _config(tmp_path, name, batch_size=3)
    loader = make_loader(config)
    _batches(loader, 5)
    state = json.loads(json.dumps(loader.get_state()))
    other = [json.dumps({"text": "9" * (5 * i + 1)}) for i in range(60)]
    (tmp_path / name).write_text("\n".join(other) if name.endswith("jsonl") else "\n\n".join(["7"] * NUM_NUMBERS))
    count = NUM_NUMBERS if name.endswith("txt") else 60
    with pytest.raises(
        ValueError,
        match=rf"^data.sources.{name}: its files \({count} documents, digest \w+\) are not those of the checkpoint "
        rf"\({count} documents, digest \w+\); use those, or --data.accept_changed true",
    ):
        make_loader(config).set_state(state)
    accepting = make_loader(dataclasses.replace(config, accept_changed=True))
    accepting.set_state(state)
    assert all(batch["tokens"].shape == (3, 24) for batch in _batches(accepting, 40))
    for lane in state.values():
        del lane["order"]["sources"][name]["content"]
    make_loader(config).set_state(state)


def test_shards_are_the_files_they_were_made_from(folder: Path, tmp_path: Path) -> None:
    """A run may go on with them, and the other way round."""
    source = SourceConfig("few", (str(folder / "few.jsonl"),))
    tokenize_source(source, Encoding(str(folder)), tmp_path, workers=1)
    shards = dataclasses.replace(source, paths=(f"{tmp_path}/*.arrayrecord",))
    one, other = (
        make_loader(dataclasses.replace(_config(folder, "few.jsonl"), sources=(each,))) for each in (source, shards)
    )
    _batches(one, 2)
    other.set_state(one.get_state())
    _assert_same(_batches(other, 3), _batches(one, 3))


def test_a_position_without_a_lane_is_refused(folder: Path) -> None:
    config = _config(folder, "mixed.jsonl")
    with pytest.raises(
        ValueError, match="data: the saved position lacks lane 4; use the union of all processes' positions"
    ):
        make_loader(config, range(4, 8)).set_state(make_loader(config, range(4)).get_state())


# Mixtures.


def test_tokens_follow_the_weights_in_every_lane(folder: Path) -> None:
    """Drawn tokens are off by at most an example of T tokens, at every step and in every lane; over all lanes the
    shares are right from the first step on."""
    weights = {"numbers.txt": 0.2, "mixed.jsonl": 0.7, "few.jsonl": 0.1}
    config = _config(folder, *weights, weights=tuple(weights.values()), batch_size=16)
    loader = make_loader(config)
    for _ in range(60):
        next(loader)
        lanes = [lane["sources"] for lane in loader.get_state().values()]
        for lane in lanes:
            total = sum(tokens for _, _, tokens, _ in lane.values())
            for name, weight in weights.items():
                assert abs(lane[name][2] - weight * total) <= 24
        total = sum(tokens for lane in lanes for _, _, tokens, _ in lane.values())
        for name, weight in weights.items():
            drawn = sum(lane[name][2] for lane in lanes)
            assert drawn == pytest.approx(weight * total, rel=0.1)


def test_lanes_take_turns_at_a_rare_source(folder: Path) -> None:
    """Of 16 rows a step, a document each, one is of the rare source; lanes in the same phase would give 16 at once."""
    path = (str(folder / "numbers.txt"),)
    sources = (SourceConfig("often", path, 15), SourceConfig("rare", path, 1))
    loader = make_loader(DataConfig(sources, str(folder), sequence_length=4, batch_size=16))
    before, rare = 0, []
    for _ in range(64):
        next(loader)
        documents = sum(lane["consumed"]["rare"]["total"][0] for lane in loader.get_state().values())
        rare.append(documents - before)
        before = documents
    assert max(rare) <= 3
    assert sum(rare) == pytest.approx(64, abs=4)


def test_only_documents_of_the_wanted_length_come(folder: Path) -> None:
    """The mix of the long-context stage in small: 3/4 of the tokens from documents of 60 to 120, 1/4 of 20 to 59."""
    path = (str(folder / "mixed.jsonl"),)
    sources = (SourceConfig("long", path, 0.75, tokens=(60, 120)), SourceConfig("short", path, 0.25, tokens=(20, 59)))
    loader = make_loader(DataConfig(sources, str(folder), sequence_length=120, batch_size=2))
    lengths: list[int] = []
    for batch in _batches(loader, 100):
        for ids in batch["segment_ids"]:
            lengths += np.bincount(ids)[1:].tolist()
    assert min(lengths) >= 20
    assert max(lengths) <= 120
    assert sum(n for n in lengths if n >= 60) / sum(lengths) == pytest.approx(0.75, abs=0.03)


def test_a_source_without_a_document_that_fits_is_refused(folder: Path) -> None:
    source = SourceConfig("long", (str(folder / "few.jsonl"),), tokens=(60, 120))
    with pytest.raises(
        ValueError, match=r"sources.long: of 97 documents in a row none is used; use wider `tokens` than \(60, 120\)"
    ):
        next(make_loader(DataConfig((source,), str(folder), sequence_length=120, batch_size=2)))


def test_labels_weigh_documents(folder: Path) -> None:
    """Long documents are kept in every pass, short ones in one of four: 64 epochs of 60 documents on one lane."""
    weights = {"size": {"long": 2.0, "*": 0.5}}
    source = SourceConfig("mixed", (str(folder / "mixed.jsonl"),), label_weights=weights)
    loader = make_loader(DataConfig((source,), str(folder), sequence_length=128, batch_size=1))
    while loader.get_state()["0"]["sources"]["mixed"][0] < 64 * 60:
        next(loader)
    tally = loader.get_state()["0"]["consumed"]["mixed"]
    sizes = Counter(json.loads(line)["labels"]["size"] for line in (folder / "mixed.jsonl").read_text().splitlines())
    assert tally["labels"]["size"]["long"][0] == pytest.approx(64 * sizes["long"], rel=0.03)
    assert tally["labels"]["size"]["short"][0] == pytest.approx(64 * sizes["short"] / 4, rel=0.03)


def test_counters_are_those_of_the_rows(folder: Path) -> None:
    loader = make_loader(_config(folder, "mixed.jsonl", "few.jsonl"))
    batches = _batches(loader, 40)
    tallies = [tally for lane in loader.get_state().values() for tally in lane["consumed"].values()]
    documents, tokens, in_loss = np.sum([tally["total"] for tally in tallies], axis=0)
    assert tokens == sum((batch["segment_ids"] > 0).sum() for batch in batches)
    assert in_loss == sum(batch["loss_weights"].sum() for batch in batches)
    assert 0 < documents <= sum(batch["segment_ids"].max(axis=1).sum() for batch in batches)
    mixed = [lane["consumed"]["mixed.jsonl"] for lane in loader.get_state().values()]
    for tally in mixed:
        np.testing.assert_array_equal(np.sum(list(tally["labels"]["size"].values()), axis=0), tally["total"])


# Configuration.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, r"sources: \(\); use a list of at least one source"),
        ({"sources": (SourceConfig("a", ("a",)),) * 2}, "sources.name: 'a' occurs twice"),
        ({"sequence_length": 1}, "sequence_length: 1; use a number >= 2"),
        ({"batch_size": 0}, "batch_size: 0; use a number >= 1"),
        ({"seed": -1}, "seed: -1; use a number from 0"),
        ({"seed": 2**32}, "seed: 4294967296; use a number from 0"),
        ({"workers": -1}, "workers: -1; use a number >= 0"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "sources": (SourceConfig("a", ("a.jsonl",)),),
        "tokenizer": "t",
        "sequence_length": 8,
        "batch_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        DataConfig(**{**good, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "sources.name: ''; use a name"),
        ({"paths": ()}, r"sources.a.paths: \(\); use a list of at least one"),
        ({"weight": 0}, "sources.a.weight: 0; use a number > 0"),
        ({"weight": float("nan")}, "sources.a.weight: nan; use a number > 0"),
        ({"tokens": (5, 4)}, r"sources.a.tokens: \[5, 4\]; use \[min, max\]"),
        ({"label_weights": {"domain": {"math": -1}}}, "sources.a.label_weights.domain.math: -1; use a number >= 0"),
        ({"label_weights": {"domain": {"math": 0, "*": 0}}}, "sources.a.label_weights.domain: all 0"),
    ],
)
def test_source_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"name": "a", "paths": ("a.jsonl",), **fields})


def test_a_single_path_is_a_list_of_one() -> None:
    source = SourceConfig("a", "a.jsonl", languages="en")  # type: ignore[arg-type]
    assert (source.paths, source.languages) == (("a.jsonl",), ("en",))


def test_blank_texts_are_passed_over(tmp_path: Path, folder: Path) -> None:
    """As if they were not there, in documents and in shards; a source of nothing else ends the run."""
    for name, lines in (("with", ["a", "", " \n", "b"]), ("without", ["a", "b"]), ("blank", ["", " "])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    config = _config(folder, "few.jsonl", shuffle=False, batch_size=1)

    def tokens(name: str, file: str = "web.jsonl") -> list[list[int]]:
        source = SourceConfig("web", (str(tmp_path / name / file),))
        loader = make_loader(dataclasses.replace(config, sources=(source,)))
        return [batch["tokens"].tolist() for batch in _batches(loader, 3)]

    assert tokens("with") == tokens("without")
    tokenize_source(
        SourceConfig("web", (str(tmp_path / "with" / "web.jsonl"),)), Encoding(str(folder)), tmp_path / "t", workers=1
    )
    assert tokens("t", "*.arrayrecord") == tokens("without")
    with pytest.raises(
        ValueError, match=r"^sources.web: of \d+ documents in a row none is used; .*documents with tokens"
    ):
        tokens("blank")


def test_config_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(
        """
        sources:
          - name: web
            paths: [a.jsonl, 'b/*.txt']
            weight: 3
            licence: CC-BY-4.0
            languages: [en, de]
            label_weights: {domain: {math: 2.0, "*": 0.5}}
          - {name: books, paths: ['gs://bucket/books/*.arrayrecord'], tokens: [16384, 32768]}
        tokenizer: t
        sequence_length: 8
        batch_size: 2
        """
    )
    web = SourceConfig(
        "web",
        ("a.jsonl", "b/*.txt"),
        3.0,
        licence="CC-BY-4.0",
        languages=("en", "de"),
        label_weights={"domain": {"math": 2.0, "*": 0.5}},
    )
    books = SourceConfig("books", ("gs://bucket/books/*.arrayrecord",), tokens=(16384, 32768))
    assert draccus.parse(DataConfig, config_path=path, args=[]) == DataConfig((web, books), "t", 8, 2)
