# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.distill: writes a teacher's probabilities or texts to disk, for training."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from t5x_lite.cli import gin_arguments, inference, options
from t5x_lite.cli.command import Command
from t5x_lite.cli.options import number_parser
from t5x_lite.cli.parser import Parser
from t5x_lite.cli.progress import Progress
from t5x_lite.cli.records import Record, Sink, Source, is_json_lines
from t5x_lite.config.checked import Count
from t5x_lite.utils import bounded_files
from t5x_lite.utils.hub import source_identity
from t5x_lite.utils.hub_names import source_argument
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import local_argument, parse_path, path_argument

DESCRIPTION = """\
A teacher is a trained decoder-only model: a run folder, a Hugging Face folder or a .gguf file. A
run learns from its distribution over the next token by Run.distillation, with the teacher loaded
beside the model; nothing needs to be written for that. The two commands here are for the rest:

  answers   the answers of a run's teacher to all its batches: its top_k most probable ids and
            their probabilities. Training with Distillation.answers = DIR then loads no teacher
            and gives the same losses.
  generate  a target for every input, written by the teacher (sequence-level distillation, Kim and
            Rush, 2016); the pairs are data that any run trains on."""

EXAMPLES = """\
examples:
  python -m t5x_lite.distill answers --gin_file=configs/runs/adapt_prefixlm_distill.gin \\
      --gin.config.Distillation.top_k=32 --output=answers
  python -m t5x_lite.train --gin_file=configs/runs/adapt_prefixlm_distill.gin \\
      --gin.config.Distillation.top_k=32 --gin.config.Distillation.answers=answers
  python -m t5x_lite.distill generate --teacher=smollm2.gguf --input=questions.txt \\
      --output=pairs.jsonl --template="Question: {}\\nAnswer:" --max_new_tokens=64
  # then: config.Files.train = "pairs.jsonl", config.Files.inputs = "inputs"

Both can be interrupted: the same command goes on.
python -m t5x_lite.distill answers --help and generate --help list the options of each."""

ANSWERS = """\
Writes the top_k answers of Run.distillation's teacher to every batch of the run. A batch is a
function of seed and step, so training finds the answers by step; it compares every row with that
of the teacher. Each step takes about batch_size x targets x top_k x 6 bytes (8 for vocabularies
above 65,536 ids). Whole chunks of steps appear at once; after a kill the same command goes on."""

GENERATE = """\
Writes the teacher's target for every line of FILE, or for the inputs of a task, as lines of JSON
{"line", "inputs", "targets", "score"}, which config.Files reads (Files.inputs = "inputs"). score is
log-probability / ((5 + tokens) / 6) ** alpha. Lines that cannot be read and empty targets are left
out and counted. An encoder-decoder can write targets too."""


def parser() -> Parser:
    """Parser of the command and of its two subcommands."""
    command = Parser("distill", description=DESCRIPTION, epilog=EXAMPLES)
    kinds = command.add_subparsers(dest="kind", required=True, metavar="answers|generate")
    add_answers(
        kinds.add_parser(
            "answers",
            command="distill",
            description=ANSWERS,
            help="a teacher's top_k for the batches of a run",
        )
    )
    add_generate(
        kinds.add_parser(
            "generate",
            command="distill",
            description=GENERATE,
            help="targets written by a teacher, as JSONL",
        )
    )
    return command


def add_answers(command: Parser) -> None:
    """Adds the options of answers."""
    gin_arguments.add_gin(command)
    add = command.add_argument
    add(
        "--output",
        type=local_argument,
        metavar="DIR",
        help="the folder to write (default: Distillation.answers)",
    )
    add(
        "--steps",
        type=number_parser(Count),
        metavar="N",
        help="how many steps (default: Train.steps)",
    )
    add(
        "--chunk",
        type=number_parser(Count),
        default=16,
        metavar="N",
        help="steps per file (default: 16)",
    )


def add_generate(command: Parser) -> None:
    """Adds the options of generate."""
    add = command.add_argument
    add(
        "--teacher",
        type=source_argument,
        required=True,
        metavar="PATH",
        help="a run folder, HF folder, .gguf file or model of the hub, owner/name",
    )
    add(
        "--output",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="the JSONL file to write",
    )
    add("--input", type=path_argument, metavar="FILE", help="text, or JSONL if it ends in .jsonl")
    add("--field", default="inputs", metavar="NAME", help="field of JSONL input (default: inputs)")
    gin_arguments.add_gin(command, required=False, text="the inputs of a run's task")
    add("--split", default="train", metavar="NAME", help="split of the task (default: train)")
    add(
        "--template",
        default="{}",
        metavar="TEXT",
        help='the prompt, {} being the input and \\n a new line: "Q: {}\\nA:"',
    )
    add("--chat", action="store_true", help="prompt by the teacher's own chat template")
    add("--overwrite", action="store_true", help="begin anew an output that exists")
    options.add_mesh(command)
    options.add_decode(command)


def distill(args: argparse.Namespace) -> None:
    """Writes answers or generates texts."""
    if args.kind == "answers":
        write_answers(args)
    else:
        generate(args)


def write_answers(args: argparse.Namespace) -> None:
    """Writes the answers of a run's teacher to its batches."""
    from t5x_lite import config, data
    from t5x_lite.config.training_run import require_training

    run = require_training(data.load_run(args.gin_file, args.bindings))
    from t5x_lite.training import host, write_teacher_logits

    write_teacher_logits.check_run(run)
    output = args.output or not_none(run.distillation).answers
    config.require(output, "--output names the folder to write")
    assert output is not None
    steps = run.train.steps if args.steps is None else args.steps
    host.prepare_jax()
    run = host.with_device_dtype(run, args.gin_file, args.bindings)
    with contextlib.ExitStack() as stack:

        def begin(done: int, size: int) -> Progress:
            """Progress from `done` steps on; all of them take `size` bytes."""
            print(f"{steps} steps in {output}: about {size / 2**20:,.1f} MiB", file=sys.stderr)
            return stack.enter_context(Progress("steps", steps, done))

        write_teacher_logits.write_teacher_logits(run, output, steps, args.chunk, begin)
    print(f"{output}: train with --gin.config.Distillation.answers={output}", file=sys.stderr)


def generate(args: argparse.Namespace) -> None:
    """Writes the teacher's targets for inputs."""
    if bool(args.input) == bool(args.gin_file):
        raise ValueError("name either --input=FILE or a run's task by --gin_file=FILE")
    if "{}" not in args.template:
        raise ValueError('--template needs {} where the input stands: "Question: {}\\nAnswer:"')
    records, total, digest = open_inputs(args)
    from t5x_lite import interactive

    session = interactive.load(args.teacher, mesh=args.mesh)
    options.configure_session(session, args)
    sources = (args.input, *filter(os.path.isfile, [args.teacher]))
    sink = Sink(args.output, settings(args, session, digest), sources)
    count = sink.begin(args.overwrite)
    done = last_line(args.output) if count else 0
    if count:
        print(f"{args.output} has {count:,} lines: going on after line {done}", file=sys.stderr)
    with sink.open() as output, Progress("inputs", total, done) as progress:
        writer = PairWriter(args, session)
        size = 8 * session.predictor.batch_size
        rest = islice(records, done, None)
        written = inference.write_lines(rest, output, progress, size, writer.lines)
    left_out = progress.done - done - written
    if left_out:
        print(f"{left_out} inputs left out (unreadable, or nothing written)", file=sys.stderr)


def open_inputs(args: argparse.Namespace) -> tuple[Iterator[Record], int | None, str | None]:
    """The records to write targets for, their number, and a digest of their content."""
    if args.input:
        source = Source(args.input, is_json_lines(args.input), args.field)
        return source.records(), source.count(), source.digest()
    from t5x_lite import config, data

    run = data.load_run(args.gin_file, args.bindings)
    config.require(run.data is not None, "The run of --gin_file has no Data")
    dataset = data.open_dataset(not_none(data.with_run_vocabulary(run).data), args.split)
    config.require(
        dataset.has_inputs,
        f"{dataset.name} is text without inputs: write what the teacher is to continue to a file "
        "and name it with --input",
    )
    records = (input_record(i + 1, not_none(dataset.inputs_text(i))) for i in range(len(dataset)))
    return records, len(dataset), " ".join(part.digest for part in dataset.parts)


def input_record(number: int, text: str) -> Record:
    """Input `number` of a task, from 1."""
    return Record(number, text, {}, None if text.strip() else "empty")


def settings(args: argparse.Namespace, session: Any, digest: str | None) -> dict[str, Any]:
    """Settings that decide the output, line by line.

    Args:
      args: options of the command.
      session: the teacher.
      digest: of the inputs; None of a stream.
    """
    names = ("field", "template", "chat")
    options = {name: getattr(args, name) for name in names} | {"input_digest": digest}
    teacher = source_identity(args.teacher)
    return {"teacher": teacher} | options | inference.decode_settings(session)


def last_line(path: str) -> int:
    """The number of the input that the last line of an output belongs to.

    Raises:
      ValueError: a line is not a pair of distill's.
    """
    last = 0
    with parse_path(path).open("rb") as lines:
        for place, line in enumerate(lines, 1):
            try:
                number = bounded_files.parse_json(line)["line"]
                if type(number) is not int:
                    raise TypeError(f"field 'line' is {number!r:.80}")
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path}:{place} is not a pair that distill wrote ({error}): choose another "
                    "--output, or --overwrite it"
                ) from error
            last = max(last, number)
    return last


class PairWriter:
    """Lines of pairs: inputs, and targets written by a teacher.

    Attributes:
      args: options of the command.
      session: the teacher.
    """

    def __init__(self, args: argparse.Namespace, session: Any):
        self.args, self.session = args, session

    def lines(self, chunk: Sequence[Record], progress: Callable[[int], None]) -> list[str]:
        """A line for each input that can be read and whose target is not empty."""
        chunk = inference.mark_troubles(chunk, self.describe_trouble)
        inference.complain(chunk, self.args.input or "task")
        records = [each for each in chunk if not each.trouble]
        prompts = [self.prompt(not_none(each.text)) for each in records]
        predictions = inference.predict(self.session, records, prompts, progress)
        lines = []
        for each, prediction in zip(records, predictions, strict=True):
            text, score = prediction.texts[0].strip(), round(prediction.scores[0], 4)
            if text:
                line = {"line": each.number, "inputs": each.text, "targets": text, "score": score}
                lines.append(json.dumps(line, ensure_ascii=False))
        return lines

    def describe_trouble(self, record: Record) -> str:
        """The reason why the teacher cannot read an input; "" where it can."""
        prompt = self.prompt(not_none(record.text))
        return self.session.predictor.describe_trouble(prompt, self.session.decode.max_new_tokens)

    def prompt(self, text: str) -> str:
        """The prompt of an input."""
        prompt = self.args.template.replace("\\n", "\n").replace("{}", text)
        return self.session.prompt(prompt) if self.args.chat else prompt


COMMAND = Command("distill", parser, distill, afterwards="the same command goes on from here")
main = COMMAND.main

if __name__ == "__main__":
    COMMAND.start()
