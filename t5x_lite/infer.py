# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.infer: writes a text for every line of a file, or scores given ones."""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from t5x_lite.evaluation import options
from t5x_lite.evaluation.progress import Progress
from t5x_lite.evaluation.records import Record, Sink, Source, append

EXAMPLES = """\
examples:
  # a text per line in, a JSON object per line out: {"input", "prediction", "score"}
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=out.jsonl
  # interrupted? the same command goes on where it stopped
  # a pipe; plain text out
  echo photograph | python -m t5x_lite.infer --checkpoint=runs/g2p --text
  # JSONL in: the text is in field "word", the other fields are kept
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.jsonl --field=word --output=out.jsonl
  # the 3 best of 8 beams; or 0.8 as adventurous as the model itself, always the same for a seed
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=b.jsonl \\
      --beams=8 --n_best=3
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=s.jsonl \\
      --temperature=0.8 --top_p=0.95 --seed=7
  # a vector for every line, for search or clustering: adds "embedding"
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=v.jsonl --embed=mean
  # guesses copied from the text or its input: faster where text repeats, and the same text;
  # --verify writes it plainly as well and compares, --draw shows which guesses held
  python -m t5x_lite.infer --checkpoint=smollm2.gguf --input=code.txt --output=c.jsonl \\
      --decoder=lookup --verify --draw=blocks.html
  # how probable are given targets? adds "log_probability" (nats) to every line
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=pairs.jsonl \\
      --targets=phonemes --output=p.jsonl

"score" is log-probability / ((5 + tokens) / 6) ** alpha. Lines come out in the order they went in;
one that cannot be read becomes {"line": 7, "error": "..."} and is counted. Next to FILE stands
FILE.settings.json, which says how it was made.
"""


def parser() -> options.Parser:
    made = options.Parser(
        prog="python -m t5x_lite.infer",
        description="Writes a text for every line of a file, with a trained run.",
        epilog=EXAMPLES,
    )
    options.add_checkpoint(made)
    group = made.add_argument_group("what is read and written")
    add = group.add_argument
    add(
        "--input",
        default="-",
        metavar="FILE",
        help="text, or JSONL if it ends in .jsonl; - is stdin",
    )
    add("--output", default="-", metavar="FILE", help="where to; - is stdout")
    add("--jsonl", action="store_true", help="the input is JSONL, whatever its name")
    add("--field", default="input", metavar="NAME", help="field of JSONL input (default: input)")
    add("--text", action="store_true", help="write the best text of each line, not JSON")
    add("--targets", metavar="NAME", help="score the texts in this field instead of writing any")
    add(
        "--embed",
        choices=("mean", "first", "last"),
        help="write a vector for each text instead: of its tokens, the mean, first or last",
    )
    handling = "a line that cannot be read: skip it, numbered and counted (default), or stop"
    add("--broken", choices=("skip", "stop"), default="skip", help=handling)
    add("--overwrite", action="store_true", help="begin an output that exists anew")
    options.add_decode(made)
    add = made.add_argument_group("what guessing ahead did").add_argument
    add(
        "--verify",
        action="store_true",
        help="write every text plainly as well, and count those that differ",
    )
    add(
        "--draw",
        metavar="FILE",
        help="draw the first texts by who guessed what: .html, .png, or - for the terminal",
    )
    return made


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse(arguments)
    try:
        infer(given)
    except BrokenPipeError:
        # The reader has seen enough (head): not even the flush at exit may complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        options.stop("t5x_lite.infer", "stopped; the same command goes on from here", status=130)
    except (ValueError, OSError) as error:
        options.stop("t5x_lite.infer", error)


def infer(given: argparse.Namespace) -> None:
    """Checks the files first, loads the weights, then goes through the records."""
    jsonl = given.jsonl or given.input.endswith(".jsonl")
    if given.targets and (not jsonl or given.text):
        raise ValueError("--targets names a field of JSONL input, and its scores are JSON")
    if given.embed and (given.targets or given.text):
        raise ValueError("--embed writes vectors as JSON: leave out --targets and --text")
    if (given.verify or given.draw) and (given.embed or given.targets):
        raise ValueError("--verify and --draw are about texts that are written: leave out the rest")
    from t5x_lite.evaluation.watching import Watch

    watch = Watch(given.verify, given.draw)
    source = Source(given.input, jsonl, given.field)
    total, digest = source.count(), source.digest()
    from t5x_lite import interactive

    which = {name: getattr(given, name) for name in ("step", "best", "mesh", "quantize")}
    session = interactive.load(given.checkpoint, **which)
    session.decode = session.settings(options.chosen(given))
    if given.draw and session.decode.beams > 1:
        raise ValueError("--draw shows who guessed each token, and beam search guesses none")
    if given.batch_size:
        session.predictor.batch_size = given.batch_size
    sink = Sink(given.output, settings(given, session, digest))
    done = sink.begin(given.overwrite)
    if done:
        print(f"{given.output} has {done:,} lines already: going on after them", file=sys.stderr)
    with sink.open() as output:
        records = itertools.islice(source.records(), done, None)
        through(given, session, records, output, Progress("lines", total, done), watch)
    watch.close(session.predictor)


def settings(given: argparse.Namespace, session: Any, digest: str | None) -> dict[str, Any]:
    """What decides the output, line by line."""
    return {
        "checkpoint": str(Path(given.checkpoint).resolve()),
        "step": session.step,
        "quantize": given.quantize,
        "input": given.input,
        "input_digest": digest,
        "field": given.field,
        "text": given.text,
        "targets": given.targets,
        "embed": given.embed,
    } | {f"decode.{name}": value for name, value in dataclasses.asdict(session.decode).items()}


def through(
    given: argparse.Namespace,
    session: Any,
    records: Iterator[Record],
    output: Any,
    progress: Progress,
    watch: Any,
) -> None:
    """Records to lines, some batches at a time; a person who types gets an answer per line."""
    typed = given.input == "-" and sys.stdin.isatty()
    size = 1 if typed else 16 * session.predictor.batch_size
    done, troubled = progress.already, 0
    while chunk := list(itertools.islice(records, size)):
        chunk = [checked(record, given.targets) for record in chunk]
        for record in chunk:
            if record.trouble:
                troubled += 1
                complain(given, record)
        told = lambda count, done=done: progress(done + count)
        append(output, written(given, session, chunk, told, watch))
        done += len(chunk)
    progress.close(done)
    if troubled:
        print(f"{troubled:,} of these lines could not be read", file=sys.stderr)


def checked(record: Record, targets: str | None) -> Record:
    """record, in trouble if it lacks the target it is to be scored with."""
    if record.trouble or targets is None or isinstance(record.fields.get(targets), str):
        return record
    return dataclasses.replace(record, trouble=f"no text in field {targets!r}")


def complain(given: argparse.Namespace, record: Record) -> None:
    message = f"{given.input} line {record.number}: {record.trouble}"
    if given.broken == "stop":
        raise ValueError(f"{message}. Mend it and start again, or pass --broken=skip")
    print(message, file=sys.stderr)


def written(
    given: argparse.Namespace, session: Any, chunk: Sequence[Record], told: Any, watch: Any
) -> list[str]:
    """The output line of every record."""
    good = [record for record in chunk if not record.trouble]
    texts = [record.text for record in good]
    if given.targets:
        scores = session.score(texts, [record.fields[given.targets] for record in good])
        found = [{"log_probability": round(score, 4)} for score in scores]
    elif given.embed:
        vectors = session.embed(texts, given.embed, told).tolist()
        found = [{"embedding": [float(f"{x:.7g}") for x in vector]} for vector in vectors]
    else:
        # A line's number is its own to the sampling: the draw does not depend on where one stops.
        rows = [record.number - 1 for record in good]
        predictions = session.predictor.predict(texts, session.decode, rows=rows, told=told)
        watch(session.predictor, texts, rows, session.decode, predictions)
        found = [described(each) for each in predictions]
    lines, answers = [], iter(found)
    for record in chunk:
        if record.trouble:
            row = {"line": record.number, "error": record.trouble}
        else:
            row = record.fields | next(answers)
        lines.append(plain(row) if given.text else json.dumps(row, ensure_ascii=False))
    return lines


def plain(row: dict[str, Any]) -> str:
    """The prediction on one line; nothing for a line that could not be read."""
    return row.get("prediction", "").replace("\n", "\\n")


def described(prediction: Any) -> dict[str, Any]:
    """A prediction as fields of a line; with several texts, all of them too."""
    scores = [round(score, 4) for score in prediction.scores]
    row = {"prediction": prediction.texts[0], "score": scores[0]}
    return row if len(scores) == 1 else row | {"predictions": prediction.texts, "scores": scores}


if __name__ == "__main__":
    main()
