"""Packing of examples into rows of fixed length, and the targets of the packed rows.

B: rows of a batch, T: `sequence_length`, N: tokens of one example. Grain's first-fit packer fills `PACKING_BINS` rows
at a time; its state is the position in the unpacked stream plus the rows already emitted, so restoring repacks at most
these rows and nothing is stored.
"""

from __future__ import annotations

import grain
import numpy as np

# More bins leave less padding, but the first batch (also after a restore) waits for all of them.
PACKING_BINS = 32


def pack(
    examples: grain.IterDataset, *, sequence_length: int, pad_id: int, shuffle_seed: int | None
) -> grain.IterDataset:
    """Packs examples {"tokens": [N] int32, "loss_mask": [N] float32}, N <= T, into rows.

    Returns:
      Rows {"tokens": [T], "loss_mask": [T], "segment_ids": [T] from 1, 0 = padding, "positions": [T] from 0 in each
      segment}. The rows of one packing buffer come in the order they were filled, or shuffled where a seed is given.
    """
    packed = grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct={"tokens": sequence_length, "loss_mask": sequence_length},
        padding_struct={"tokens": pad_id, "loss_mask": 0},
        # Packed like the others, but spared segment ids and positions of its own, which would equal those of tokens.
        meta_features=["loss_mask"],
        num_packing_bins=PACKING_BINS,
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    names = {"tokens_segment_ids": "segment_ids", "tokens_positions": "positions"}
    return packed.map(lambda row: {names.get(name, name): value for name, value in row.items()})


def add_targets(batch: dict[str, np.ndarray], *, pad_id: int) -> dict[str, np.ndarray]:
    """Turns packed rows [B, T] into what the loss reads.

    Position t is trained to predict token t+1, where that is in the same segment and in the loss.

    Returns:
      {"tokens", "targets", "segment_ids", "positions": [B, T] int32; "loss_weights": [B, T] float32}. A position
      without a target (the last of its segment, or padding) has target `pad_id` and weight 0.
    """
    tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
    targets_BT = np.full_like(tokens_BT, pad_id)
    loss_weights_BT = np.zeros_like(batch["loss_mask"])
    same_BT = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]  # True in padding, whose mask is 0 and tokens pad_id
    np.copyto(targets_BT[:, :-1], tokens_BT[:, 1:], where=same_BT)
    np.copyto(loss_weights_BT[:, :-1], batch["loss_mask"][:, 1:], where=same_BT)
    return {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "loss_weights": loss_weights_BT,
        "segment_ids": segment_ids_BT,
        "positions": batch["positions"],
    }
