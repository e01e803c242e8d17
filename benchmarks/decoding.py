# SPDX-License-Identifier: Apache-2.0
"""Decoding speed in tokens per second, beside CTranslate2, transformers and llama.cpp on the same
weights.

Systems take turns within every round, so that a busy machine is busy for all of them. Reported are
medians and quartiles over rounds, and the median over rounds of our speed over the other's in the
same round; and the time that cores worked for a token, which a busy machine changes less. Texts are
greedy, and compared id by id with our own plain decoding.

  t5_base   T5-base of random weights, 64 ids in and 64 out, no EOS: how fast a step is
  bart_base, marian_base   the same with BART-base and with a base model of OPUS-MT
  g2p       --g2p RUN: words of the test split
  restore   --restore RUN of configs/runs/restore_lines.gin: almost all of a text is a copy
  heads     --heads RUN of configs/runs/heads_restore_tuned.gin, or what widened.py made of it
  code      --smollm2 FILE.gguf: continues code of Python's library
  prose     the same with its documentation

Texts alone are four of a case, one after the other (of random weights, whose texts are alike, one).
llama.cpp takes part where the package llama-cpp-python is installed; it is not part of any extra.

  python benchmarks/decoding.py --folder /tmp/decoding --cases t5_base [--batch 1 8] [--rounds 7]
"""

import argparse
import functools
import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Idle threads of one system must not spin while another is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import decoding_systems as systems
import numpy as np
import report
from decoding_systems import Case, Write

PACKAGES = ["jax", "jaxlib", "ctranslate2", "transformers", "torch"]
OURS = "t5x_lite"
CONTINUED, PROMPT, LENGTH = 8, 128, 64
ALONE = 4


class System(NamedTuple):
    """A name, and make() -> write; alone says that it takes one row at a time only."""

    name: str
    make: Callable[[], Write]
    alone: bool = False


def exported(checkpoint: str, folder: Path) -> Path:
    """The checkpoint as a Hugging Face folder, made by convert unless it is there."""
    target = folder / f"{Path(checkpoint).stem}-huggingface"
    if not target.exists():
        command = [sys.executable, "-m", "t5x_lite.convert", f"--from={checkpoint}"]
        subprocess.run([*command, f"--to={target}", "--format=huggingface"], check=True)
    return target


def random_case(name: str, options: argparse.Namespace) -> Case:
    folder, random = options.folder / name, systems.RANDOM_MODELS[name]
    systems.write_random_model(name, folder)
    words = sorted(set(range(random.pieces)) - set(random.special.values()))
    draw = np.random.default_rng(0)
    rows = draw.integers(words[0], words[-1] + 1, (CONTINUED, 64)).tolist()
    return Case(name, folder, True, rows, LENGTH, forced=True, half=True)


def of_run(name: str, checkpoint: str, options: argparse.Namespace, length: int) -> Case:
    """Inputs of a run's test split, as its own data pipeline reads them."""
    from t5x_lite import data
    from t5x_lite.checkpoints.opening import open_checkpoint

    opened = open_checkpoint(checkpoint)
    found = data.open_dataset(opened.run.data, "test")
    inputs = opened.text.vocabularies[0]
    texts = [found.inputs_text(number) for number in range(CONTINUED)]
    rows = [[*map(int, inputs.encode(text)), inputs.eos] for text in texts]
    run = checkpoint if name == "heads" else None
    return Case(name, exported(checkpoint, options.folder), True, rows, length, run=run)


def code() -> list[str]:
    """Eight classes of Python's library."""
    import cmd
    import configparser
    import fractions
    import inspect
    import shlex
    import string
    import textwrap

    chosen = [textwrap.TextWrapper, shlex.shlex, argparse.HelpFormatter, fractions.Fraction]
    chosen += [configparser.RawConfigParser, string.Formatter, cmd.Cmd, argparse.Action]
    return [inspect.getsource(each) for each in chosen]


def prose() -> list[str]:
    """Eight chapters of its documentation."""
    import difflib
    import heapq
    import inspect
    import pdb
    import statistics
    import timeit
    import unittest

    chosen = [heapq.__about__, inspect.getdoc(pdb), inspect.getdoc(difflib.SequenceMatcher)]
    chosen += map(inspect.getdoc, (argparse, statistics, difflib.Differ, timeit, unittest))
    return chosen


def smollm2(name: str, texts: Callable[[], list[str]], options: argparse.Namespace) -> Case:
    """The first PROMPT ids of texts, gone on with."""
    from transformers import AutoTokenizer

    folder = exported(options.smollm2, options.folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer.encode(text)[:PROMPT] for text in texts()]
    return Case(name, folder, False, rows, LENGTH, gguf=Path(options.smollm2))


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    **{name: functools.partial(random_case, name) for name in systems.RANDOM_MODELS},
    "g2p": lambda options: of_run("g2p", options.g2p, options, 40),
    "restore": lambda options: of_run("restore", options.restore, options, 192),
    "heads": lambda options: of_run("heads", options.heads, options, 192),
    "code": lambda options: smollm2("code", code, options),
    "prose": lambda options: smollm2("prose", prose, options),
}
# The option that names a case's checkpoint.
CHECKPOINT = {name: name for name in ("g2p", "restore", "heads")}
CHECKPOINT |= {"code": "smollm2", "prose": "smollm2"}
OF_SMOLLM2 = (("lookup", 8), ("lookup", 0), ("recycling", 16), ("lookup+recycling", 16))
DRAFTERS = {
    **dict.fromkeys(systems.RANDOM_MODELS, ()),
    "g2p": (("lookup", 8), ("recycling", 16)),
    "restore": (("lookup", 8), ("lookup", 16), ("lookup", 0)),
    "heads": (("blockwise", 4), ("blockwise", 8), ("lookup", 8)),
    "code": OF_SMOLLM2,
    "prose": OF_SMOLLM2,
}


def entrants(case: Case, threads: int) -> list[System]:
    """Every system, ours in its plain form first."""
    model = systems.loaded(case.folder)
    if case.run:
        model = systems.restored(case.run, model.stops)
    made = [System(OURS, lambda: systems.ours(case, model, "plain"))]
    for compute in ("int8", "bfloat16"):

        def make(compute=compute):
            return systems.ours(case, model, "plain", compute=compute)

        made.append(System(f"{OURS}, {compute}", make))
    for name, width in DRAFTERS[case.name]:
        label = f"{OURS}, {name} {width or 'auto'}"

        def make(name=name, width=width):
            return systems.ours(case, model, name, width)

        made.append(System(label, make))
    for kind in ("float32", "int8"):

        def make(kind=kind):
            return systems.ctranslate2(case, kind, threads)

        made.append(System(f"CTranslate2 {kind}", make))

    def theirs(**how):
        return systems.transformers(case, model.stops, threads, **how)

    made.append(System("transformers", theirs))
    if not case.pair:

        def lookup():
            return theirs(prompt_lookup_num_tokens=10)

        made.append(System("transformers, prompt lookup", lookup, alone=True))
        layers = model.cfg.decoder.layers // 4

        def early():
            return theirs(assistant_early_exit=layers)

        made.append(System(f"transformers, assisted by {layers} layers", early, alone=True))
    if case.gguf and importlib.util.find_spec("llama_cpp"):
        for label, float32 in ("float32", True), ("the file's bits", False):

            def make(float32=float32):
                return systems.llama_cpp(case, model.stops, threads, float32=float32)

            made.append(System(f"llama.cpp, {label}", make, alone=True))
    return made


class Entered(NamedTuple):
    """A system that runs: what it writes, the seconds of every round, and those of all cores."""

    name: str
    write: Write
    texts: list[list[int]]
    seconds: list[float]
    worked: list[float]


def entered(
    case: Case, batch: int, entries: list[System]
) -> tuple[list[Entered], list[report.Row]]:
    """The systems after their first, untimed turn; rows of the report for those that fail."""
    running, failed, label = [], [], f"{case.name}, batch {batch}"
    for system in entries:
        if system.alone and batch > 1:
            continue
        print(f"{label}: {system.name} gets ready", flush=True)
        try:
            write = system.make()
            running.append(Entered(system.name, write, written(case, batch, write), [], []))
        except Exception as error:  # of any library, and for any reason: it becomes a row
            failed.append(report.Row(label, system.name, "tokens/s", None, str(error)[:80]))
    return running, failed


def written(case: Case, batch: int, write: Write) -> list[list[int]]:
    """Texts of the case, `batch` of them at a time."""
    alone = 1 if case.forced else ALONE
    rows = case.rows[: batch if batch > 1 else alone]
    if hasattr(write, "calls"):
        write.calls = 0
    return [ids for first in range(0, len(rows), batch) for ids in write(rows[first:][:batch])]


def measure(case: Case, batch: int, rounds: int, entries: list[System]) -> list[report.Row]:
    """Rows of the report for one batch size."""
    running, rows = entered(case, batch, entries)
    order, began = list(running), time.monotonic()
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for each in order:
            begin, work = time.perf_counter(), time.process_time()
            written(case, batch, each.write)
            each.worked.append(time.process_time() - work)
            each.seconds.append(time.perf_counter() - begin)
        left = (time.monotonic() - began) / (number + 1) * (rounds - number - 1)
        print(f"round {number + 1} of {rounds}, about {left:.0f} s left", flush=True)
    for each in running:
        rows += result_rows(f"{case.name}, batch {batch}", each, running[0])
    return rows


def result_rows(label: str, each: Entered, plain: Entered) -> list[report.Row]:
    """Tokens per second, their quartiles, plain's share of it, and how many texts agree."""
    tokens = sum(map(len, each.texts))
    speed = tokens / np.array(each.seconds)
    low, middle, high = np.percentile(speed, [25, 50, 75])
    of_plain = sum(map(len, plain.texts)) / np.array(plain.seconds)
    same = np.mean([ids == other for ids, other in zip(each.texts, plain.texts, strict=True)])
    values = {
        "tokens/s": middle,
        "tokens/s, lower quartile": low,
        "tokens/s, upper quartile": high,
        "ms of a core per token": 1e3 * np.median(each.worked) / tokens,
        "speed over plain t5x_lite's, median of rounds": np.median(speed / of_plain),
        "texts with the ids of plain t5x_lite": same,
    }
    if hasattr(each.write, "calls"):
        values["calls"] = each.write.calls
        values["tokens per call, of all rows"] = tokens / each.write.calls
    return [report.Row(label, each.name, key, round(float(x), 4)) for key, x in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where exported models are kept")
    add("--cases", nargs="+", choices=list(CASES), default=["t5_base"])
    add("--batch", nargs="+", type=int, default=[1, 8], help=f"rows, at most {CONTINUED}")
    add("--rounds", type=int, default=7)
    add("--only", nargs="*", help="systems whose names contain one of these; plain is always there")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    for case in ("g2p", "restore", "heads", "smollm2"):
        add(f"--{case}", metavar="PATH", help="the checkpoint of cases above")
    add("--json", help="also write the rows to this file")
    options = parser.parse_args()
    for name in options.cases:
        given = CHECKPOINT.get(name)
        if given and getattr(options, given) is None:
            parser.error(f"case {name} needs --{given}=PATH")
    if not 1 <= min(options.batch) <= max(options.batch) <= CONTINUED:
        parser.error(f"--batch must be in 1..{CONTINUED}")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.cases:
        case = CASES[name](options)
        entries = entrants(case, options.threads)
        if options.only is not None:

            def wanted(system):
                return any(part in system.name for part in options.only)

            entries = [entries[0], *filter(wanted, entries[1:])]
        for batch in options.batch:
            rows += measure(case, batch, options.rounds, entries)
            if options.json:
                report.write(options.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
