# SPDX-License-Identifier: Apache-2.0
"""How many tokens per second are written, beside CTranslate2 and transformers on the same weights?

Systems take turns within every round, so that a busy machine is busy for all of them. Reported are
medians and quartiles over rounds, and the median over rounds of our speed over the other's in the
same round; and the time that cores worked for a token, which a busy machine changes less. Texts are
greedy, and compared id by id with our own plain decoding.

  t5_base   T5-base of random weights, 64 ids in and 64 out, no EOS: how fast a step is
  g2p       --g2p RUN: words of the test split
  restore   --restore RUN of configs/runs/restore_lines.gin: almost all of a text is a copy
  smollm2   --smollm2 FILE.gguf: goes on with code and prose of Python's library

  python benchmarks/decoding.py --folder /tmp/decoding --cases t5_base [--batch 1 8] [--rounds 7]
"""

import argparse
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


def t5_base(options: argparse.Namespace) -> Case:
    folder = options.folder / "t5_base"
    systems.random_t5(folder)
    draw = np.random.default_rng(0)
    rows = draw.integers(3, systems.PIECES, (max(options.batch), 64)).tolist()
    return Case("t5_base", folder, True, rows, LENGTH, forced=True, half=True)


def of_run(name: str, checkpoint: str, options: argparse.Namespace, length: int) -> Case:
    """Inputs of a run's test split, as its own data pipeline reads them."""
    from t5x_lite import data
    from t5x_lite.training import restore

    found = data.open_dataset(restore.read_config(checkpoint).data, "test")
    inputs = restore.restore(checkpoint).vocabularies[0]
    texts = [found.inputs_text(number) for number in range(max(options.batch))]
    rows = [[*map(int, inputs.encode(text)), inputs.eos] for text in texts]
    return Case(name, exported(checkpoint, options.folder), True, rows, length)


def smollm2(options: argparse.Namespace) -> Case:
    """The first PROMPT ids of modules, every second one prose."""
    import argparse as parsing
    import heapq
    import inspect
    import pdb
    import shlex
    import textwrap

    from transformers import AutoTokenizer

    folder = exported(options.smollm2, options.folder)
    code = [inspect.getsource(each) for each in (textwrap.TextWrapper, shlex.shlex)]
    code += [inspect.getsource(parsing.HelpFormatter), inspect.getsource(heapq)]
    prose = [heapq.__about__, pdb.__doc__, textwrap.__doc__ + inspect.getdoc(textwrap.wrap)]
    prose.append(inspect.getdoc(parsing))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for pair in zip(code, prose, strict=True) for text in pair]
    rows = [tokenizer.encode(text)[:PROMPT] for text in texts][: max(options.batch)]
    return Case("smollm2", folder, False, rows, LENGTH)


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "t5_base": t5_base,
    "g2p": lambda options: of_run("g2p", options.g2p, options, 40),
    "restore": lambda options: of_run("restore", options.restore, options, 192),
    "smollm2": smollm2,
}
DRAFTERS = {
    "t5_base": (),
    "g2p": (("lookup", 8), ("recycling", 16)),
    "restore": (("lookup", 8), ("lookup", 16), ("lookup", 0)),
    "smollm2": (("lookup", 8), ("lookup", 0), ("recycling", 16), ("lookup+recycling", 16)),
}


def entrants(case: Case, threads: int) -> list[System]:
    """Every system, ours in its plain form first."""
    model = systems.loaded(case.folder)
    made = [System(OURS, lambda: systems.ours(case, model, "plain"))]
    for name, width in DRAFTERS[case.name]:
        label = f"{OURS}, {name} {width or 'auto'}"
        make = lambda name=name, width=width: systems.ours(case, model, name, width)
        made.append(System(label, make))
    for kind in ("float32", "int8"):
        make = lambda kind=kind: systems.ctranslate2(case, kind, threads)
        made.append(System(f"CTranslate2 {kind}", make))
    theirs = lambda **how: systems.transformers(case, model.stops, threads, **how)
    made.append(System("transformers", theirs))
    if not case.pair:
        lookup = lambda: theirs(prompt_lookup_num_tokens=10)
        made.append(System("transformers, prompt lookup", lookup, alone=True))
        layers = model.cfg.decoder.layers // 4
        early = lambda: theirs(assistant_early_exit=layers)
        made.append(System(f"transformers, assisted by {layers} layers", early, alone=True))
    return made


class Entered(NamedTuple):
    """A system that runs: what it writes, the seconds of every round, and those of all cores."""

    name: str
    write: Write
    texts: list[list[int]]
    seconds: list[float]
    worked: list[float]


def entered(case: Case, batch: int, asked: list[System]) -> tuple[list[Entered], list[report.Row]]:
    """The systems after their first, untimed turn; rows of the report for those that fail."""
    running, failed, label = [], [], f"{case.name}, batch {batch}"
    for system in asked:
        if system.alone and batch > 1:
            continue
        print(f"{label}: {system.name} gets ready", flush=True)
        try:
            write = system.make()
            running.append(Entered(system.name, write, write(case.rows[:batch]), [], []))
        except Exception as error:  # of any library, and for any reason: it becomes a row
            failed.append(report.Row(label, system.name, "tokens/s", None, str(error)[:80]))
    return running, failed


def measure(case: Case, batch: int, rounds: int, asked: list[System]) -> list[report.Row]:
    """Rows of the report for one batch size."""
    running, rows = entered(case, batch, asked)
    order, began = list(running), time.monotonic()
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for each in order:
            begin, work = time.perf_counter(), time.process_time()
            each.write(case.rows[:batch])
            each.worked.append(time.process_time() - work)
            each.seconds.append(time.perf_counter() - begin)
        left = (time.monotonic() - began) / (number + 1) * (rounds - number - 1)
        print(f"round {number + 1} of {rounds}, about {left:.0f} s left", flush=True)
    for each in running:
        rows += told(f"{case.name}, batch {batch}", each, running[0])
    return rows


def told(label: str, each: Entered, plain: Entered) -> list[report.Row]:
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
    for case in ("g2p", "restore", "smollm2"):
        add(f"--{case}", metavar="PATH", help=f"the checkpoint of case {case}")
    add("--json", help="also write the rows to this file")
    options = parser.parse_args()
    for name in options.cases:
        if name != "t5_base" and getattr(options, name) is None:
            parser.error(f"case {name} needs --{name}=PATH")
    if not 1 <= min(options.batch) <= max(options.batch) <= CONTINUED:
        parser.error(f"--batch must be in 1..{CONTINUED}")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.cases:
        case = CASES[name](options)
        asked = entrants(case, options.threads)
        if options.only is not None:
            wanted = lambda system: any(part in system.name for part in options.only)
            asked = [asked[0], *filter(wanted, asked[1:])]
        for batch in options.batch:
            rows += measure(case, batch, options.rounds, asked)
            if options.json:
                report.write(options.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
