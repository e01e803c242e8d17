# SPDX-License-Identifier: Apache-2.0
"""python -m t5x_lite.infer: predicts a text for every line of a file, or scores texts."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5x_lite import config
from t5x_lite.cli import inference, options
from t5x_lite.cli.command import Command
from t5x_lite.cli.parser import Parser
from t5x_lite.cli.progress import Progress
from t5x_lite.cli.records import (
    Record,
    Sink,
    Source,
    check_apart,
    describe_text,
    is_json_lines,
    json_line,
)
from t5x_lite.utils.hub import source_identity
from t5x_lite.utils.not_none import not_none
from t5x_lite.utils.paths import path_argument

EXAMPLES = """\
examples:
  # a JSON object per line; after an interruption the same command goes on
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=out.jsonl
  # a pipe; plain text out
  echo photograph | python -m t5x_lite.infer --checkpoint=runs/g2p --text
  # JSONL in: the text is in field "word", the other fields are kept
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.jsonl --field=word --output=out.jsonl
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --beams=8 --n_best=3
  # 8 samples, the one nearest to the others first; or resampled on the way by a judge
  python -m t5x_lite.infer --checkpoint=runs/g2p --temperature=1 --n_best=8 --choose=mbr:per <words
  python -m t5x_lite.infer --checkpoint=runs/g2p --temperature=1 --search=smc --judge=score <words
  # a vector for every line, for search or clustering: adds "embedding"
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=words.txt --output=v.jsonl --embed=mean
  # drafts copied from text or input: the same text, faster; --verify compares, --draw shows them
  python -m t5x_lite.infer --checkpoint=smollm2.gguf --input=a.txt --drafter=lookup --draw=b.html
  # log-probability of targets: adds "log_probability" (nats) to every line
  python -m t5x_lite.infer --checkpoint=runs/g2p --input=pairs.jsonl --targets=phonemes

"score" is log-probability / ((5 + tokens) / 6) ** alpha. Lines keep their order; one that cannot be
read becomes {"line": 7, "error": "..."}. FILE.settings.json has the settings of the command.
"""

# Values of --embed: pooling and prompt, None for those of the readout, and for none.
EMBEDDINGS = {
    "mean": ("mean", None),
    "first": ("first", None),
    "last": ("last", None),
    "readout": (None, None),
    "query": (None, "query"),
    "document": (None, "document"),
}


def parser() -> Parser:
    """Parser of the command."""
    command = Parser(
        "infer",
        description="Predicts a text for every line of a file, by a trained model.",
        epilog=EXAMPLES,
    )
    options.add_checkpoint(command)
    streams = command.add_argument_group("input and output")
    add_streams(streams)
    options.add_languages(streams)
    options.add_decode(command)
    add = command.add_argument_group("reports on speculative decoding").add_argument
    verify = "decode every text plainly as well, and count those that differ"
    add("--verify", action="store_true", help=verify)
    draw = "draw the first texts by drafter: .html, .png, or -"
    add("--draw", type=path_argument, metavar="FILE", help=draw)
    return command


def add_streams(group) -> None:
    """Adds what is read and written to a group of options."""
    add = group.add_argument
    source = "text, or .jsonl; also .gz, .bz2, .xz, .zst; - is stdin"
    add("--input", type=path_argument, default="-", metavar="FILE", help=source)
    add(
        "--output",
        type=path_argument,
        default="-",
        metavar="FILE",
        help="the file to write; - is stdout",
    )
    add("--jsonl", action="store_true", help="the input is JSONL, whatever its name")
    add("--field", default="input", metavar="NAME", help="field of JSONL input (default: input)")
    add("--text", action="store_true", help="write the best text of each line, not JSON")
    options.add_adapter(group, "LoRA that lines of JSONL name in the field adapter")
    add("--targets", metavar="NAME", help="score the texts in this field instead of predicting")
    embed = "write a vector: mean, first, last, or readout, query, document"
    add("--embed", choices=EMBEDDINGS, metavar="HOW", help=embed)
    pairs = "write the best and the worst text: prompt, chosen, rejected"
    add("--pairs", action="store_true", help=pairs)
    handling = "skip and count lines that cannot be read (default), or stop"
    add("--broken", choices=("skip", "stop"), default="skip", help=handling)
    add("--overwrite", action="store_true", help="begin anew an output that exists")


def infer(args: argparse.Namespace) -> None:
    """Checks the files first, loads the weights, then goes through the records."""
    check_options(args)
    from t5x_lite.evaluation.draft_report import DraftReport

    watch = DraftReport(args.verify, args.draw)
    source = Source(args.input, is_jsonl(args), args.field)
    total, digest = source.count(), source.digest()
    weights = filter(os.path.isfile, [args.checkpoint])
    sources = (args.input, args.json_schema, args.grammar, *weights)
    check_apart("--draw", args.draw or "-", sources)
    from t5x_lite import interactive

    selection = {name: getattr(args, name) for name in ("step", "best", "mesh", "quantize")}
    session = interactive.load(args.checkpoint, **selection)
    options.configure_session(session, args)
    config.require(
        not args.pairs or session.decode.n_best > 1,
        "--pairs compares several texts of a line: pass --n_best=2 or more",
    )
    config.require(
        not session.decode.search or not (args.verify or args.draw),
        "--verify and --draw are about texts written from beginning to end: leave out --search",
    )
    check_readout(args, session)
    session.predictor.drafters.tiered.at_once = args.verify or args.draw is not None
    if args.draw and session.decode.beams > 1:
        raise ValueError("--draw shows the drafter of each token, and beam search has none")
    sink = Sink(args.output, settings(args, session, digest), sources)
    done = sink.begin(args.overwrite)
    if done:
        print(f"{args.output} has {done:,} lines already: going on after them", file=sys.stderr)
    with sink.open() as output, Progress("lines", total, done) as progress:
        records = checked_records(itertools.islice(source.records(), done, None), args.targets)
        # A person who types gets an answer per line.
        typed = args.input == "-" and sys.stdin.isatty()
        size = 1 if typed else 16 * session.predictor.batch_size
        writer = PredictionWriter(args, adapted_sessions(args, session), watch)
        inference.write_lines(records, output, progress, size, writer.lines)
    if writer.troubled:
        print(f"{writer.troubled:,} of these lines could not be read", file=sys.stderr)
    watch.close(session.predictor)


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that exclude each other."""
    if args.targets and (not is_jsonl(args) or args.text):
        raise ValueError("--targets names a field of JSONL input, and its scores are JSON")
    if args.embed and (args.targets or args.text):
        raise ValueError("--embed writes vectors as JSON: leave out --targets and --text")
    if args.pairs and (args.text or args.targets or args.embed):
        raise ValueError("--pairs writes two texts of each line as JSON: leave out the rest")
    if args.adapter and not is_jsonl(args):
        raise ValueError("--adapter is named by lines of JSONL input, in the field adapter")
    if args.adapter and (args.verify or args.draw):
        raise ValueError("--verify and --draw are about one model: leave out --adapter")
    if (args.verify or args.draw) and (args.embed or args.targets):
        raise ValueError("--verify and --draw are about predicted texts: leave out the rest")


def check_readout(args: argparse.Namespace, session: Any) -> None:
    """Raises ValueError for options that are about text if the model writes labels."""
    readout = session.predictor.cfg.readout
    if readout is None:
        return
    of_text = ("pairs", "verify", "draw", *(() if readout.matching else ("targets",)))
    bound = [name for name in of_text if getattr(args, name)]
    bound += list(options.decode_fields(args))
    config.require(
        not bound,
        f"{args.checkpoint} writes no text (Model.readout): leave out --{' and --'.join(bound)}",
    )


def is_jsonl(args: argparse.Namespace) -> bool:
    """True if the input is JSONL."""
    return args.jsonl or is_json_lines(args.input)


def settings(args: argparse.Namespace, session: Any, digest: str | None) -> dict[str, Any]:
    """Settings that decide the output, line by line.

    Args:
      args: options of the command.
      session: the model that is loaded.
      digest: of the input's content; None of a stream.
    """
    names = ("quantize", "input", "field", "text", "targets", "embed", "pairs")
    names += ("source_language", "target_language")
    options = {name: getattr(args, name) for name in names} | {"input_digest": digest}
    checkpoint = source_identity(args.checkpoint)
    if args.adapter:
        options["adapters"] = {name: source_identity(source) for name, source in args.adapter}
    return {"checkpoint": checkpoint} | options | inference.decode_settings(session)


def adapted_sessions(args: argparse.Namespace, session: Any) -> dict[str | None, Any]:
    """The session by None, and those with each of --adapter by name."""
    return {None: session} | options.attach_named(session, args.adapter or [])


def checked_records(records: Iterator[Record], targets: str | None) -> Iterator[Record]:
    """Records, in trouble where one lacks the target that it is to be scored with."""
    for record in records:
        if record.trouble or targets is None:
            yield record
        else:
            yield dataclasses.replace(record, trouble=describe_text(record.fields, targets))


class PredictionWriter:
    """Lines of output for records.

    Attributes:
      args: options of the command.
      sessions: the model by None, and with adapters by name.
      watch: reports on speculative decoding.
      troubled: how many records could not be read so far.
    """

    def __init__(self, args: argparse.Namespace, sessions: dict[str | None, Any], watch: Any):
        self.args, self.sessions, self.watch = args, sessions, watch
        self.session = sessions[None]
        self.troubled = 0

    def lines(self, chunk: Sequence[Record], progress: Callable[[int], None]) -> list[str]:
        """The output line of every record; `progress` is called with how many are done."""
        chunk = inference.mark_troubles(chunk, self.describe_trouble)
        self.troubled += inference.complain(chunk, self.args.input, self.args.broken == "stop")
        answers = iter(self.answers([each for each in chunk if not each.trouble], progress))
        lines = []
        for record in chunk:
            if record.trouble:
                row = {"line": record.number, "error": record.trouble}
            else:
                row = record.fields | next(answers)
            lines.append(plain(row) if self.args.text else json_line(row))
        return lines

    def describe_trouble(self, record: Record) -> str:
        """The reason why the model cannot read a record; "" where it can."""
        named = self.adapter_of(record)
        if named is not None and not (isinstance(named, str) and named in self.sessions):
            known = ", ".join(name for name in self.sessions if name is not None)
            return f"adapter {named!r:.80} is none of --adapter: {known}"
        target = record.fields[self.args.targets] if self.args.targets else None
        readout = self.session.predictor.cfg.readout
        if target is not None and readout is not None:
            from t5x_lite.evaluation import embed

            return embed.describe_pair_trouble(
                self.session.predictor, not_none(record.text), target
            )
        reads = self.args.embed or readout is not None
        new_tokens = 1 if reads else self.session.decode.max_new_tokens
        return self.session.predictor.describe_trouble(not_none(record.text), new_tokens, target)

    def adapter_of(self, record: Record) -> Any:
        """The name of the adapter that a record has; None for none."""
        return record.fields.get("adapter") if self.args.adapter else None

    def answers(self, records: list[Record], progress: Callable[[int], None]) -> list[dict]:
        """Fields that the model adds to each record, with the adapter that the record names."""
        groups: dict[str | None, list[int]] = {}
        for place, record in enumerate(records):
            groups.setdefault(self.adapter_of(record), []).append(place)
        answers: dict[int, dict] = {}
        for name, places in groups.items():
            report = functools.partial(inference.report_within, progress, len(answers))
            chosen = [records[place] for place in places]
            rows = self.answer_alike(self.sessions[name], chosen, report)
            answers |= dict(zip(places, rows, strict=True))
        return [answers[place] for place in range(len(records))]

    def answer_alike(
        self, session: Any, records: list[Record], progress: Callable[[int], None]
    ) -> list[dict]:
        """Fields that a model adds to each record: a score, a vector or a text.

        Args:
          session: the model.
          records: what it reads.
          progress: called with how many are done.
        """
        args = self.args
        texts = [not_none(record.text) for record in records]
        if args.targets:
            scores = session.score(texts, [record.fields[args.targets] for record in records])
            return [{"log_probability": round(score, 4)} for score in scores]
        if args.embed:
            kind, prompt = EMBEDDINGS[args.embed]
            vectors = session.embed(texts, kind, progress, prompt).tolist()
            return [{"embedding": [float(f"{x:.7g}") for x in vector]} for vector in vectors]
        if session.predictor.cfg.readout is not None:
            from t5x_lite.evaluation import readouts

            labeled = readouts.predict_readouts(session.predictor, texts, on_progress=progress)
            return [readouts.prediction_fields(each) for each in labeled]
        predictions = inference.predict(session, records, texts, progress)
        rows = [record.number - 1 for record in records]
        self.watch(session.predictor, texts, rows, session.decode, predictions)
        if args.pairs:
            return [pair_fields(*each) for each in zip(predictions, texts, strict=True)]
        return [prediction_fields(each) for each in predictions]


def plain(row: dict[str, Any]) -> str:
    """The prediction on one line; nothing for a line that could not be read."""
    prediction = row.get("prediction", "")
    if not isinstance(prediction, str):
        return json.dumps(prediction, ensure_ascii=False)
    return prediction.replace("\n", "\\n")


def prediction_fields(prediction: Any) -> dict[str, Any]:
    """A prediction as fields of a line; with several texts, all of them too."""
    several = len(prediction.texts) > 1
    scores = [round(score, 4) for score in prediction.scores]
    row = {"prediction": prediction.texts[0], "score": scores[0]}
    if several:
        row |= {"predictions": prediction.texts, "scores": scores}
    if prediction.utilities:
        row["utilities"] = [round(each, 4) for each in prediction.utilities]
    if prediction.details:
        tokens = [[token_fields(token) for token in text] for text in prediction.details]
        row |= {"logprobs": tokens[0]} | ({"all_logprobs": tokens} if several else {})
    return row


def token_fields(token: Any) -> dict[str, Any]:
    """A `prediction.TokenScore` as fields."""
    return {
        "token": token.text,
        "id": token.token,
        "logprob": round(token.log_probability, 4),
        "truncated": float(f"{token.truncated:.4g}"),
        "top_logprobs": [
            {"token": text, "id": other, "logprob": round(log_probability, 4)}
            for other, text, log_probability in token.top
        ],
    }


def pair_fields(prediction: Any, text: str) -> dict[str, Any]:
    """The best and the worst text of an input; None for both where all are alike."""
    from t5x_lite.evaluation import choosing

    utilities = prediction.utilities or prediction.scores
    pair = choosing.preference_pair(text, prediction.texts, utilities)
    return pair or {"prompt": text, "chosen": None, "rejected": None}


COMMAND = Command("infer", parser, infer, afterwards="the same command goes on from here")
main, run = COMMAND.main, COMMAND.run

if __name__ == "__main__":
    COMMAND.start()
