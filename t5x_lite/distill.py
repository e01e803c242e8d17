# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.distill: what a teacher knows, written to disk for training."""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite import gin_arguments
from t5x_lite.evaluation import options
from t5x_lite.evaluation.progress import Progress
from t5x_lite.evaluation.records import Record, Sink, Source, append

COMMAND = "t5x_lite.distill"
TEACHING = """\
A teacher is a trained decoder-only model: a run folder, a Hugging Face folder or a .gguf file. A
run learns from its distribution over the next token by Run.distillation, with the teacher loaded
beside the model; nothing needs to be written for that. The two commands here are for the rest:

  answers   a run's teacher answers all its batches beforehand: its top_k most probable ids and
            their probabilities. Training with Distillation.answers = DIR then loads no teacher
            and gives the same losses.
  generate  the teacher writes a target for every input (sequence-level distillation, Kim and Rush,
            2016); the pairs are data that any run trains on.

examples
  python -m t5x_lite.distill answers --gin_file=configs/runs/adapt_prefixlm_distill.gin \\
      --gin.config.Distillation.top_k=32 --output=answers
  python -m t5x_lite.train --gin_file=configs/runs/adapt_prefixlm_distill.gin \\
      --gin.config.Distillation.top_k=32 --gin.config.Distillation.answers=answers
  python -m t5x_lite.distill generate --teacher=smollm2.gguf --input=questions.txt \\
      --output=pairs.jsonl --template="Question: {}\\nAnswer:" --length=64
  # then: config.Files.train = "pairs.jsonl", config.Files.inputs = "inputs"

Both go on where they were stopped: the same command again.
python -m t5x_lite.distill answers --help and generate --help list the options of each."""

ANSWERS = """\
Writes the top_k answers of Run.distillation's teacher to every batch of the run. A batch is a
function of seed and step, so training finds the answers by step; it compares every row with what
the teacher read. Each step takes about batch_size x targets x top_k x 6 bytes (8 for vocabularies
above 65,536 ids). Whole chunks of steps appear at once; after a kill the same command goes on."""

GENERATE = """\
The teacher writes a target for every line of FILE, or for the inputs of a task, as lines of JSON
{"line", "inputs", "targets", "score"}, which config.Files reads (Files.inputs = "inputs"). score is
log-probability / ((5 + tokens) / 6) ** alpha. Lines that cannot be read and empty targets are left
out and counted. An encoder-decoder can write targets too."""


def parser() -> argparse.ArgumentParser:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    made = argparse.ArgumentParser(prog=f"python -m {COMMAND}", description=TEACHING, **raw)
    commands = made.add_subparsers(dest="command", required=True, metavar="answers|generate")
    both = {
        "answers": (ANSWERS, "a teacher's top_k for the batches of a run"),
        "generate": (GENERATE, "targets that a teacher writes, as JSONL"),
    }
    found = {
        name: commands.add_parser(name, description=text, help=short, **raw)
        for name, (text, short) in both.items()
    }
    add_answers(found["answers"])
    add_generate(found["generate"])
    return made


def add_answers(made: argparse.ArgumentParser) -> None:
    gin_arguments.add(made)
    add = made.add_argument
    add("--output", metavar="DIR", help="the folder to write (default: Distillation.answers)")
    add("--steps", type=int, metavar="N", help="how many steps (default: Train.steps)")
    add("--chunk", type=int, default=16, metavar="N", help="steps per file (default: 16)")


def add_generate(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("--teacher", required=True, metavar="PATH", help="a run folder, HF folder or .gguf file")
    add("--output", required=True, metavar="FILE", help="the JSONL file to write")
    add("--input", metavar="FILE", help="text, or JSONL if it ends in .jsonl")
    add("--field", default="inputs", metavar="NAME", help="field of JSONL input (default: inputs)")
    add(
        "--gin_file", action="append", default=[], metavar="FILE", help="the inputs of a run's task"
    )
    add("--import", dest="modules", action="append", default=[], metavar="MODULE", help="import it")
    add("--split", default="train", metavar="NAME", help="split of the task (default: train)")
    add(
        "--template",
        default="{}",
        metavar="TEXT",
        help='what the teacher continues, {} being the input and \\n a new line: "Q: {}\\nA:"',
    )
    add("--chat", action="store_true", help="ask by the teacher's own chat template")
    add("--overwrite", action="store_true", help="begin an output that exists anew")
    add("--mesh", type=options.mesh, metavar="D,F,T", help="devices for data, fsdp and tensor axes")
    options.add_decode(made)


def main(arguments: list[str] | None = None) -> None:
    given, extra = parser().parse_known_args(arguments)
    try:
        bindings = gin_arguments.bindings(extra)
        answers(given, bindings) if given.command == "answers" else generate(given, bindings)
    except KeyboardInterrupt:
        options.stop(COMMAND, "stopped; the same command goes on from here", status=130)
    except (ValueError, OSError) as error:
        options.stop(COMMAND, error)


def answers(given: argparse.Namespace, bindings: list[str]) -> None:
    """The command answers."""
    gin_arguments.bring(given.modules)
    from t5x_lite import config, config_file

    run = config_file.load(given.gin_file, bindings)
    from t5x_lite.training import answering, compilation

    answering.check(run)
    output = given.output or run.distillation.answers
    config.require(output, "--output names the folder to write")
    steps = run.train.steps if given.steps is None else given.steps
    config.require(steps >= 1 and given.chunk >= 1, "--steps and --chunk are at least 1")
    compilation.keep_compiled()
    counted: list[Progress] = []

    def progress(done: int, size: int) -> Progress:
        print(f"{steps} steps in {output}: about {size / 2**20:,.1f} MiB", file=sys.stderr)
        counted.append(Progress("steps", steps, done))
        return counted[0]

    done = answering.write(run, output, steps, given.chunk, progress)
    counted[0].close(done)
    print(f"{output}: train with --gin.config.Distillation.answers={output}", file=sys.stderr)


def generate(given: argparse.Namespace, bindings: list[str]) -> None:
    """The command generate."""
    if bool(given.input) == bool(given.gin_file):
        raise ValueError("name either --input=FILE or a run's task by --gin_file=FILE")
    if "{}" not in given.template:
        raise ValueError('--template needs {} where the input stands: "Question: {}\\nAnswer:"')
    records, total, digest = inputs(given, bindings)
    from t5x_lite import interactive

    session = interactive.load(given.teacher, mesh=given.mesh)
    session.decode = session.settings(options.chosen(given))
    if given.batch_size:
        session.predictor.batch_size = given.batch_size
    sink = Sink(given.output, settings(given, session, digest))
    written = sink.begin(given.overwrite)
    done = last_line(given.output) if written else 0
    if written:
        print(f"{given.output} has {written:,} lines: going on after line {done}", file=sys.stderr)
    with sink.open() as output:
        left = itertools.islice(records, done, None)
        through(given, session, left, output, Progress("inputs", total, done))


def inputs(
    given: argparse.Namespace, bindings: list[str]
) -> tuple[Iterator[Record], int | None, str]:
    """The records to write targets for, their number, and what tells them from others."""
    if given.input:
        source = Source(given.input, given.input.endswith(".jsonl"), given.field)
        return source.records(), source.count(), source.digest()
    gin_arguments.bring(given.modules)
    from t5x_lite import config, config_file, data

    run = config_file.load(given.gin_file, bindings)
    config.require(run.data is not None, "The run of --gin_file has no Data")
    found = data.open_dataset(run.data, given.split)
    config.require(
        found.has_inputs,
        f"{found.name} is text without inputs: write what the teacher is to continue to a file and "
        "name it with --input",
    )
    records = (record(i + 1, found.inputs_text(i)) for i in range(len(found)))
    return records, len(found), f"{found.name}/{given.split}: {len(found)} examples"


def record(number: int, text: str) -> Record:
    """An input of a task."""
    return Record(number, text, {}, None if text.strip() else "empty")


def settings(given: argparse.Namespace, session: Any, digest: str) -> dict[str, Any]:
    """What decides the output, line by line."""
    return {
        "teacher": str(Path(given.teacher).resolve()),
        "step": session.step,
        "input_digest": digest,
        "field": given.field,
        "template": given.template,
        "chat": given.chat,
    } | {f"decode.{name}": value for name, value in dataclasses.asdict(session.decode).items()}


def last_line(path: str) -> int:
    """The number of the input that the last line of an output belongs to."""
    with open(path, "rb") as lines:
        last = max((json.loads(line)["line"] for line in lines), default=0)
    return last


def through(
    given: argparse.Namespace,
    session: Any,
    records: Iterator[Record],
    output: Any,
    progress: Progress,
) -> None:
    """Chunk after chunk; what is written is on disk."""
    size, done, left_out = 8 * session.predictor.batch_size, progress.already, 0
    while chunk := list(itertools.islice(records, size)):
        before = done
        lines = written(
            given, session, chunk, lambda count, before=before: progress(before + count)
        )
        append(output, lines)
        done, left_out = done + len(chunk), left_out + len(chunk) - len(lines)
        progress(done)
    progress.close(done)
    if left_out:
        print(f"{left_out} inputs left out (unreadable, or nothing written)", file=sys.stderr)


def written(
    given: argparse.Namespace, session: Any, chunk: Sequence[Record], told: Any
) -> list[str]:
    """A line for every input that can be read and for which the teacher wrote something."""
    for each in chunk:
        if each.trouble:
            print(f"line {each.number}: {each.trouble}", file=sys.stderr)
    good = [each for each in chunk if not each.trouble]
    prompts = [prompt(given, session, each.text) for each in good]
    # A line's number is its own to the sampling: the draw does not depend on where one stops.
    rows = [each.number - 1 for each in good]
    found = session.predictor.predict(prompts, session.decode, rows=rows, told=told) if good else []
    lines = []
    for each, prediction in zip(good, found, strict=True):
        text, score = prediction.texts[0].strip(), round(prediction.scores[0], 4)
        if text:
            line = {"line": each.number, "inputs": each.text, "targets": text, "score": score}
            lines.append(json.dumps(line, ensure_ascii=False))
    return lines


def prompt(given: argparse.Namespace, session: Any, text: str) -> str:
    """What the teacher is asked to continue."""
    asked = given.template.replace("\\n", "\n").replace("{}", text)
    return session.prompt(asked) if given.chat else asked


if __name__ == "__main__":
    main()
