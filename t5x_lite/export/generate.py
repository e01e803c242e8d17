# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding by the programs of this folder, with jax alone: python generate.py 5 3 22"""

import json
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np


def load(folder):
    """Settings, weights by name, and compiled programs by name."""
    settings = json.loads((folder / "export.json").read_text())
    data = np.memmap(folder / "model.safetensors", np.uint8, "r")
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    params = {}
    for name, tensor in json.loads(data[8:begin].tobytes()).items():
        if name != "__metadata__":
            first, last = (begin + offset for offset in tensor["data_offsets"])
            params[name] = np.frombuffer(data[first:last], "<f4").reshape(tensor["shape"])
    programs = {}
    for name in settings["programs"]:
        program = jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes()))
        programs[name] = jax.jit(program.call)
    return settings, jax.device_put(params), programs


def pad(rows, length):
    """Rows of ids as an array, and their lengths."""
    if not all(0 < len(row) <= length for row in rows):
        raise ValueError(f"the programs take rows of 1 to {length} ids")
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32), np.array(
        [len(row) for row in rows], np.int32
    )


def generate(folder, rows, new_tokens):
    """The most probable ids after each row of ids, up to one that ends a text.

    Args:
      folder: folder of the programs.
      rows: ids of each input, or of each prompt of a decoder alone.
      new_tokens: most ids to write for a row.
    """
    settings, params, programs = load(Path(folder))
    count, batch = len(rows), settings["batch_size"]
    if not 0 < count <= batch:
        raise ValueError(f"the programs take 1 to {batch} rows at a time")
    rows = rows + rows[:1] * (batch - count)
    if not all(0 <= token < settings["vocab"] for row in rows for token in row):
        raise ValueError(f"ids are 0 to {settings['vocab'] - 1}")
    encodes = "encode" in programs
    inputs = pad(rows, settings["input_length"])
    prompts = [settings["prefix"] + ([] if encodes else row) for row in rows]
    prompts, lengths = pad(prompts, 1 if encodes else settings["input_length"])
    if lengths.max() + new_tokens > settings["row_length"]:
        raise ValueError(f"prompt and new ids have {settings['row_length']} places")
    memory = programs["encode"](params, *inputs) if encodes else ()
    cache = programs["prefill"](params, memory, prompts, lengths)
    tokens, texts = prompts[np.arange(len(rows)), lengths - 1], [[] for _ in rows]
    for place in range(new_tokens):
        logits, cache = programs["step"](params, memory, cache, tokens, lengths - 1 + place)
        tokens = np.asarray(logits.argmax(-1), np.int32)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            if not text or text[-1] not in settings["stops"]:
                text.append(token)
        if all(text[-1] in settings["stops"] for text in texts):
            break
    return texts[:count]


if __name__ == "__main__":
    print(generate(Path(__file__).parent, [[int(word) for word in sys.argv[1:]]], 32)[0])
