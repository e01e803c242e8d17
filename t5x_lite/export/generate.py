# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding by this folder, with jax and flatbuffers: python generate.py 5 3 22"""

import json
import sys
from pathlib import Path

import jax.export
import numpy as np

FOLDER = Path(__file__).parent


def generate(rows, new_tokens):
    """The most probable ids after each row of ids, up to one that ends a text."""
    settings = json.loads((FOLDER / "export.json").read_text())
    batch, length, vocab = (settings[k] for k in ("batch_size", "input_length", "vocab"))
    fit = all(0 < len(row) <= length and 0 <= min(row) <= max(row) < vocab for row in rows)
    if not fit or not 0 < len(rows) <= batch:
        raise ValueError(f"takes 1 to {batch} rows of 1 to {length} ids from 0 to {vocab - 1}")
    rows, count = rows + rows[:1] * (batch - len(rows)), len(rows)
    inputs = np.array([row + [0] * (length - len(row)) for row in rows], np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    data = np.memmap(FOLDER / "model.safetensors", np.uint8, "r")
    weights = data[8 + int(data[:8].view("<u8")[0]) :]
    params = json.loads(bytes(data[8 : len(data) - len(weights)]))
    params.pop("__metadata__", None)
    for name, tensor in params.items():
        params[name] = weights[slice(*tensor["data_offsets"])].view("<f4").reshape(tensor["shape"])
    program = jax.export.deserialize(bytearray((FOLDER / "generate.jax").read_bytes()))
    first = np.full(batch, settings["forced_bos_token_id"], np.int32)
    texts = map(np.asarray, program.call(params, inputs, lengths, first, np.int32(new_tokens)))
    return [row[:end].tolist() for row, end in zip(*texts, strict=True)][:count]


if __name__ == "__main__":
    print(generate([[int(word) for word in sys.argv[1:]]], 32)[0])
