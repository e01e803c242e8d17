# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of public tools followed by SmolLM2-135M: share of valid texts, time of a token.

  schemas   compiles each schema, twice, and writes a text that follows it, which jsonschema judges
  speed     seconds until a schema of middling size can be followed, for the first time and again;
            milliseconds per token with it and without, 1 and 8 rows in turns; the same of
            transformers with llguidance in the same run

  pip install check-jsonschema validate-pyproject-schema-store nbformat debugpy llguidance
  python -m t5x_lite.convert --from=FILE.gguf --to=build/smollm2 --format=huggingface
  python benchmarks/constraints.py schemas --smollm2 FILE.gguf --work build/schemas
  python benchmarks/constraints.py speed --smollm2 FILE.gguf --work build/speed
  python benchmarks/constraints.py report --work build/schemas --work build/speed \\
      --json benchmarks/results/constraints.json

What is measured is kept in the files of --work: the same command goes on until all is done.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import report
import schemas

PACKAGES = ["jax", "jaxlib", "flax", "jsonschema", "check-jsonschema"]
PACKAGES += ["validate-pyproject-schema-store", "transformers", "torch", "llguidance"]
COUNT = 200  # schemas that can be followed
LENGTH = 128  # most new tokens of a text
SPEED_LENGTH = 32
PROMPT = "Settings of a small project, as JSON:\n"


def read_work(path: str) -> list[dict[str, Any]]:
    """Lines of a file of --work; [] of one that is not there."""
    file = Path(path)
    return [*map(json.loads, file.read_text().splitlines())] if file.exists() else []


def add_work(path: str, line: dict[str, Any]) -> None:
    """Adds a line to a file of --work."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def use_fresh_cache() -> None:
    """Lets constraints be compiled anew: kept in a folder that this process alone has."""
    from t5x_lite.decoding.steering import constraints

    constraints.FOLDER = tempfile.mkdtemp(prefix="constraints-")


def measure_schemas(checkpoint: str, work: str, seconds: float) -> None:
    """Writes a line for each schema, up to COUNT: why it is refused, or seconds and validity.

    Args:
      checkpoint: SmolLM2's .gguf file.
      work: file of the lines.
      seconds: no schema is begun after these.
    """
    from t5x_lite import config, interactive
    from t5x_lite.decoding.steering.constraints import find_constraint, vocabulary_digest

    use_fresh_cache()
    session = interactive.load(checkpoint)
    predictor = session.predictor
    vocabulary_digest(predictor.targets)  # once for each vocabulary, not for each schema
    started, lines = time.monotonic(), read_work(work)
    done, followed = {line["name"] for line in lines}, sum("text" in line for line in lines)
    for number, (name, schema) in enumerate(schemas.list_schemas()):
        if followed == COUNT:
            break
        if name in done:
            continue
        if time.monotonic() - started > seconds:
            print(f"{COUNT - followed} schemas are left: the same command goes on")
            break
        decode = config.Decode(max_new_tokens=LENGTH, json_schema=schema, drafter="plain")
        line: dict[str, Any] = {"name": name, "number": number}
        began = time.perf_counter()
        try:
            table = find_constraint(decode, predictor.targets, predictor.cfg.vocab)
        except ValueError as error:
            add_work(work, line | {"refused": str(error)})
            continue
        line["first"] = time.perf_counter() - began
        began = time.perf_counter()
        find_constraint(decode, predictor.targets, predictor.cfg.vocab)
        line["again"] = time.perf_counter() - began
        line["table"] = None if table is None else [*table.following.shape]
        (text,) = session.generate([PROMPT], **vars(decode))
        line |= {"text": text, "trouble": describe_trouble(text, schema)}
        if followed % 8 == 0:
            (free,) = session.generate([PROMPT], max_new_tokens=LENGTH, drafter="plain")
            line["free trouble"] = describe_trouble(free, schema)
        add_work(work, line)
        followed += 1
        print(name, line["table"], f"{line['first']:.2f} s", line["trouble"], flush=True)


def describe_trouble(text: str, schema: dict[str, Any]) -> str:
    """The reason why a text does not follow a schema, by jsonschema; "" where it does."""
    import jsonschema

    kind = jsonschema.validators.validator_for(schema)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def measure_speed(checkpoint: str, work: str, folder: str, rounds: int) -> None:
    """Writes a line for each time that a schema is prepared, and for each system, number of rows
    and round: milliseconds of a token.

    Args:
      checkpoint: SmolLM2's .gguf file.
      work: file of the lines.
      folder: the same model as a Hugging Face folder.
      rounds: how often each system is measured.
    """
    from t5x_lite import interactive

    schema, session = typical_schema(), interactive.load(checkpoint)
    for line in prepare_schema(session.predictor, schema, rounds):
        add_work(work, line)
    for rows in (1, 8):
        systems = [*our_systems(session, schema, rows), *their_systems(folder, schema, rows)]
        for name, run in systems:
            print("compiled", name, rows, "rows,", run(), "tokens", flush=True)
        for _ in range(rounds):
            for name, run in systems:
                began = time.perf_counter()
                tokens = run()
                milliseconds = 1e3 * (time.perf_counter() - began) / tokens
                line = {"system": name, "rows": rows, "ms": milliseconds, "tokens": tokens}
                add_work(work, line)


def prepare_schema(predictor: Any, schema: dict[str, Any], rounds: int) -> Iterator[dict]:
    """Yields the seconds until a table is there: compiled anew, and read from the cache.

    Args:
      predictor: the model.
      schema: the schema.
      rounds: how often each is measured.
    """
    from t5x_lite import config
    from t5x_lite.decoding.steering.constraints import find_constraint, vocabulary_digest

    decode = config.Decode(json_schema=schema)
    vocabulary_digest(predictor.targets)  # once for each vocabulary, not for each schema
    for _ in range(rounds):
        use_fresh_cache()
        for use in ("first use", "second use"):
            began = time.perf_counter()
            find_constraint(decode, predictor.targets, predictor.cfg.vocab)
            yield {"use": use, "seconds": time.perf_counter() - began}


def typical_schema() -> dict[str, Any]:
    """A schema of middling size: checks of a pipeline, with texts, numbers and lists."""
    named = {each.name: each.schema for each in schemas.list_schemas()}
    return named["buildkite#notifyGithubCheck"]


def our_systems(session: Any, schema: dict[str, Any], rows: int) -> Iterator[tuple[str, Any]]:
    """Yields (name, function that writes and returns the tokens of a row) of t5x_lite."""
    from t5x_lite import config, decoding
    from t5x_lite.decoding.steering.stop_strings import find_tables

    predictor = session.predictor
    ids = predictor.encode_inputs([PROMPT] * rows)
    plain = config.Decode(max_new_tokens=SPEED_LENGTH, drafter="plain")
    for name, decode in (
        ("t5x_lite", plain),
        ("t5x_lite, schema", dataclasses.replace(plain, json_schema=schema)),
    ):
        tables = find_tables(decode, predictor.targets, predictor.cfg.vocab)
        stops = predictor.targets.stops if decode.json_schema else (predictor.cfg.vocab + 1,)
        request = decoding.make_request(predictor.cfg, ids, decode, eos=stops, **tables)

        def run(request=request, decode=decode):
            return int(decoding.generate(predictor.cfg, predictor.params, request, decode).steps)

        yield name, run


def their_systems(folder: str, schema: dict[str, Any], rows: int) -> Iterator[tuple[str, Any]]:
    """Yields the same of transformers, plain and with llguidance."""
    import llguidance
    import llguidance.hf
    import llguidance.torch
    import torch
    import transformers

    torch.set_num_threads(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer([PROMPT] * rows, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    spelled = llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)

    class Guidance(transformers.LogitsProcessor):
        """The mask of llguidance for each row."""

        def __init__(self):
            self.matchers = [llguidance.LLMatcher(spelled, grammar) for _ in range(rows)]
            self.mask = llguidance.torch.allocate_token_bitmask(1, spelled.vocab_size)

        def __call__(self, input_ids, scores):
            for row, matcher in enumerate(self.matchers):
                if input_ids.shape[1] > length and not matcher.is_stopped():
                    matcher.consume_token(int(input_ids[row, -1]))
                llguidance.torch.fill_next_token_bitmask(matcher, self.mask, 0)
                llguidance.torch.apply_token_bitmask_inplace(scores[row : row + 1], self.mask)
            return scores

    def run(guided):
        processors = [Guidance()] if guided else []
        output = model.generate(
            **inputs,
            max_new_tokens=SPEED_LENGTH,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id if guided else None,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList(processors),
        )
        return output.shape[1] - length

    yield "transformers", lambda: run(False)
    yield "transformers, llguidance", lambda: run(True)


def schema_rows(lines: list[dict[str, Any]]) -> Iterator[report.Row]:
    """Yields the figures of `schemas`: of the first COUNT schemas that can be followed."""
    lines = sorted(lines, key=lambda line: line["number"])
    followed = [line for line in lines if "refused" not in line][:COUNT]
    case = f"{len(followed)} JSON schemas of public tools, SmolLM2-135M"
    tried = [line for line in lines if line["number"] <= followed[-1]["number"]]
    free = [line["free trouble"] for line in followed if "free trouble" in line]

    def row(metric, value):
        return report.Row(case, "t5x_lite", metric, value)

    yield row("schemas tried until then", len(tried))
    yield row(
        "valid by jsonschema, %", 100 * sum(not x["trouble"] for x in followed) / len(followed)
    )
    if free:
        share = 100 * sum(not each for each in free) / len(free)
        yield row(f"valid without constraint, % of {len(free)}", share)
    for key, name in (("first", "first use"), ("again", "second use")):
        seconds = [line[key] for line in followed]
        for share in (50, 90, 100):
            yield row(
                f"{name}, s, {share} % within", round(float(np.percentile(seconds, share)), 4)
            )


def speed_rows(lines: list[dict[str, Any]]) -> Iterator[report.Row]:
    """Yields the figures of `speed`: medians, and medians of the ratios of a round."""
    for use in dict.fromkeys(line["use"] for line in lines if "use" in line):
        seconds = [line["seconds"] for line in lines if line.get("use") == use]
        yield report.Row(
            "a schema of middling size", "t5x_lite", f"{use}, s", statistics.median(seconds)
        )
    lines = [line for line in lines if "rows" in line]
    for rows in dict.fromkeys(line["rows"] for line in lines):
        case = f"milliseconds per token, {rows} row{'s' if rows > 1 else ''}"
        times: dict[str, list[float]] = {}
        for line in lines:
            if line["rows"] == rows:
                times.setdefault(line["system"], []).append(line["ms"])
        for name, each in times.items():
            yield report.Row(case, name, "median", statistics.median(each))
        for plain, steered in zip([*times][::2], [*times][1::2], strict=True):
            ratios = [y / x for x, y in zip(times[plain], times[steered], strict=True)]
            yield report.Row(case, steered, "ratio to without", statistics.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("schemas", "speed", "report"))
    parser.add_argument("--smollm2", help="SmolLM2's .gguf file")
    parser.add_argument("--folder", default="build/smollm2", help="the same as a folder")
    parser.add_argument("--work", action="append", required=True, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=400, help="begin no schema after these")
    parser.add_argument("--rounds", type=int, default=7, help="of speed")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.what == "schemas":
        measure_schemas(args.smollm2, args.work[0], args.seconds)
    elif args.what == "speed":
        measure_speed(args.smollm2, args.work[0], args.folder, args.rounds)
    else:
        lines = [line for path in args.work for line in read_work(path)]
        rows = [*schema_rows([line for line in lines if "number" in line])]
        rows += speed_rows([line for line in lines if "number" not in line])
        print(report.table(rows))
        if args.json:
            report.write(args.json, rows, PACKAGES)


if __name__ == "__main__":
    main()
