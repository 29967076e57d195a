"""llama.cpp as a peer of `benchmarks/decode.py`, by its low-level API: `python llama_cpp_peer.py CHECKPOINT THREADS`.

Answers each line `batch prompt new` on stdin with `prefill seconds, seconds per decode step` (greedy, after a warm-up).
Needs llama-cpp-python, gguf and numpy. The GGUF is written beside the checkpoint's safetensors, of the same weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Matrices as they are, norms in float32, no vocabulary."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for file in sorted(checkpoint.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        start = 8 + int(raw[:8].view(np.uint64)[0])
        for name, entry in json.loads(raw[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            value: Any = raw[start + begin : start + end].view(np.uint16 if entry["dtype"] == "BF16" else np.float32)
            value = value.reshape(entry["shape"])
            if value.dtype == np.uint16 and value.ndim == 1:
                value = (value.astype(np.uint32) << 16).view(np.float32)
            kind = gguf.GGMLQuantizationType.BF16 if value.dtype == np.uint16 else None
            value = value.view(np.uint8) if kind else value
            writer.add_tensor(names.get_name(name, (".weight",)), value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(model: Any, threads: int, rows: int, prompt: int, new: int) -> tuple[float, float]:
    """One prefill of `rows` prompts and `new` steps."""
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_seq_max = rows * (prompt + new + 1), rows * prompt, rows
    params.n_threads = params.n_threads_batch = threads
    context = ll.llama_init_from_model(model, params)
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    batch = ll.llama_batch_init(rows * prompt, 0, 1)

    def forward(tokens_BT: Any, start: int) -> Any:
        length = tokens_BT.shape[1]
        batch.n_tokens = tokens_BT.size
        for i, token in enumerate(tokens_BT.reshape(-1).tolist()):
            row, at = divmod(i, length)
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + at, 1, row
            batch.logits[i] = at == length - 1
        assert ll.llama_decode(context, batch) == 0
        last = [row * length + length - 1 for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (vocab,)).argmax() for i in last])

    tokens = np.random.default_rng(0).integers(0, vocab - 64, (rows, prompt))
    begin = time.perf_counter()
    next_B = forward(tokens, 0)
    prefilled = time.perf_counter()
    for i in range(new):
        next_B = forward(next_B[:, None], prompt + i)
    end = time.perf_counter()
    ll.llama_batch_free(batch)
    ll.llama_free(context)
    return prefilled - begin, (end - prefilled) / new


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "model.gguf").exists():
        write_gguf(folder, folder / "partial.gguf")
        (folder / "partial.gguf").rename(folder / "model.gguf")
    quiet = ll.llama_log_callback(lambda *_: None)  # llama.cpp keeps no reference to it
    ll.llama_log_set(quiet, None)
    ll.llama_backend_init()
    loaded = ll.llama_model_load_from_file(str(folder / "model.gguf").encode(), ll.llama_model_default_params())
    assert loaded, f"{folder}: llama.cpp refuses the GGUF"
    print("ready", flush=True)
    for line in sys.stdin:
        print(*run(loaded, int(sys.argv[2]), *map(int, line.split())), flush=True)
