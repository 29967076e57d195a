"""Packed rows and their targets, as literal matrices: 0 pads, tens digit = document, ones digit = place in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qwen3_jax.data.examples import Example
from qwen3_jax.data.packing import MAX_AGE, OPEN_ROWS, OpenRows, to_arrays


def _example(ids: Sequence[int], mask: Sequence[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(mask, np.uint8))


def _batch(rows: Sequence[Sequence[Example]], length: int) -> dict[str, np.ndarray]:
    arrays = [to_arrays(row, length, pad_id=0) for row in rows]
    return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}


def _closed(rows: OpenRows[Example], examples: Sequence[Example]) -> Iterator[list[Example]]:
    for example in examples:
        if (row := rows.add(example)) is not None:
            yield row


def test_packed_rows_by_eye() -> None:
    """Documents of 3, 4, 2 and 6 tokens in rows of 6: the third goes where it leaves the least room, into the second.

    Text (documents 1, 3 and 4) is in the loss wholly; of the chat (2), the last two tokens are the assistant's.
    """
    rows: OpenRows[Example] = OpenRows(6)
    examples = [
        _example([11, 12, 13], [1, 1, 1]),
        _example([21, 22, 23, 24], [0, 0, 1, 1]),
        _example([31, 32], [1, 1]),
        _example([41, 42, 43, 44, 45, 46], [1, 1, 1, 1, 1, 1]),
    ]
    assert not list(_closed(rows, examples))
    batch = _batch([row.items for row in rows.rows], length=6)
    expected = {
        "tokens": [
            [11, 12, 13, 0, 0, 0],
            [21, 22, 23, 24, 31, 32],
            [41, 42, 43, 44, 45, 46],
        ],
        "targets": [
            [12, 13, 0, 0, 0, 0],
            [22, 23, 24, 0, 32, 0],
            [42, 43, 44, 45, 46, 0],
        ],
        "loss_weights": [
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 1, 0],
            [1, 1, 1, 1, 1, 0],
        ],
        "segment_ids": [
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 2, 2],
            [1, 1, 1, 1, 1, 1],
        ],
        "positions": [
            [0, 1, 2, 0, 0, 0],
            [0, 1, 2, 3, 0, 1],
            [0, 1, 2, 3, 4, 5],
        ],
    }
    assert batch.keys() == expected.keys()
    for name, matrix in expected.items():
        np.testing.assert_array_equal(batch[name], matrix, err_msg=name)
        assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32), name


def test_targets_never_cross_segments() -> None:
    """Token p of document d is 100 d + p, so a target from another document cannot be its token plus one.

    500 documents of random length over many times the open rows; in closed and open ones every target occurs once.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 17, size=500)
    examples = [_example([100 * d + p for p in range(n)], [1] * n) for d, n in enumerate(lengths, start=1)]
    rows: OpenRows[Example] = OpenRows(16)
    closed = list(_closed(rows, examples))
    assert len(closed) > 10 * OPEN_ROWS
    batch = _batch([*closed, *(row.items for row in rows.rows)], length=16)
    trained = batch["loss_weights"] > 0
    np.testing.assert_array_equal(batch["targets"][trained], batch["tokens"][trained] + 1)
    np.testing.assert_array_equal(batch["targets"][~trained], 0)
    np.testing.assert_array_equal(batch["positions"], batch["tokens"] % 100)
    assert sorted(batch["targets"][trained].tolist()) == [
        100 * d + p for d, n in enumerate(lengths, 1) for p in range(1, n)
    ]


def test_no_document_waits_for_ever() -> None:
    """A document of 3 among those of 4 in rows of 4: its row is never the fullest, and nothing fits beside it."""
    rows: OpenRows[Example] = OpenRows(4)
    short = _example([1] * 3, [1] * 3)
    full = [_example([2] * 4, [1] * 4)] * (2 * MAX_AGE)
    closed = list(_closed(rows, [*full[:OPEN_ROWS], short, *full]))
    waited = [any(example is short for example in row) for row in closed].index(True)
    assert MAX_AGE <= waited <= MAX_AGE + OPEN_ROWS


def test_little_is_padding() -> None:
    """Documents of 4 to 32 pages in rows of 32: the mixture of the long-context stage, three quarters above 16."""
    rng = np.random.default_rng(0)
    tokens = {True: 0, False: 0}
    examples = []
    for _ in range(2000):
        long = tokens[True] <= 3 * tokens[False]
        count = int(rng.integers(160, 321) if long else rng.integers(40, 161))
        tokens[long] += count
        examples.append(_example([1] * count, [1] * count))
    closed = list(_closed(OpenRows(320), examples))
    assert sum(len(example) for row in closed for example in row) / (320 * len(closed)) > 0.93
