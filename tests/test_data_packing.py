"""Packed rows and their targets, as literal matrices: 0 pads, tens digit = document, ones digit = place in it."""

from __future__ import annotations

import grain
import numpy as np

from qwen3_jax.data.packing import PACKING_BINS, add_targets, pack


def _batches(examples: list[tuple[list[int], list[int]]], *, length: int, rows: int) -> list[dict[str, np.ndarray]]:
    arrays = [{"tokens": np.array(ids, np.int32), "loss_mask": np.array(mask, np.float32)} for ids, mask in examples]
    stream = grain.MapDataset.source(arrays).to_iter_dataset()
    packed = pack(stream, sequence_length=length, pad_id=0, shuffle_seed=None)
    return [add_targets(batch, pad_id=0) for batch in packed.batch(rows)]


def test_packed_rows_by_eye() -> None:
    """Documents of 3, 4, 2 and 6 tokens in rows of 6: the third goes back into the first row, where it fits first.

    Text (documents 1, 3 and 4) is in the loss wholly; of the chat (2), the last two tokens are the assistant's.
    """
    (batch,) = _batches(
        [
            ([11, 12, 13], [1, 1, 1]),
            ([21, 22, 23, 24], [0, 0, 1, 1]),
            ([31, 32], [1, 1]),
            ([41, 42, 43, 44, 45, 46], [1, 1, 1, 1, 1, 1]),
        ],
        length=6,
        rows=3,
    )
    expected = {
        "tokens": [
            [11, 12, 13, 31, 32, 0],
            [21, 22, 23, 24, 0, 0],
            [41, 42, 43, 44, 45, 46],
        ],
        "targets": [
            [12, 13, 0, 32, 0, 0],
            [22, 23, 24, 0, 0, 0],
            [42, 43, 44, 45, 46, 0],
        ],
        "loss_weights": [
            [1, 1, 0, 1, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0],
        ],
        "segment_ids": [
            [1, 1, 1, 2, 2, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 1],
        ],
        "positions": [
            [0, 1, 2, 0, 1, 0],
            [0, 1, 2, 3, 0, 0],
            [0, 1, 2, 3, 4, 5],
        ],
    }
    assert batch.keys() == expected.keys()
    for name, matrix in expected.items():
        np.testing.assert_array_equal(batch[name], matrix, err_msg=name)
        assert batch[name].dtype == (np.float32 if name == "loss_weights" else np.int32), name


def test_targets_never_cross_segments() -> None:
    """Token p of document d is 100 d + p, so a target from another document cannot be its token plus one.

    500 documents of random length over several packing buffers, in which every target must occur exactly once.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 17, size=500)
    examples = [([100 * d + p for p in range(n)], [1] * n) for d, n in enumerate(lengths, start=1)]
    batches = _batches(examples, length=16, rows=1)
    assert len(batches) > 3 * PACKING_BINS
    seen: list[int] = []
    for batch in batches:
        trained = batch["loss_weights"] > 0
        np.testing.assert_array_equal(batch["targets"][trained], batch["tokens"][trained] + 1)
        np.testing.assert_array_equal(batch["targets"][~trained], 0)
        np.testing.assert_array_equal(batch["positions"], batch["tokens"] % 100)
        seen += batch["targets"][trained].tolist()
    assert sorted(seen) == [token for ids, _ in examples for token in ids[1:]]
