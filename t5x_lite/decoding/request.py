# SPDX-License-Identifier: Apache-2.0
"""Requests: rows to be continued, as padded arrays of few shapes, each of which is compiled once.

b rows, several of them samples for one example    s encoder inputs    p prompt tokens
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_lite import config
from t5x_lite.decoding.steering.constraints import ConstraintTable
from t5x_lite.decoding.steering.spans import SpanTable
from t5x_lite.decoding.steering.stop_strings import StopTable

# Seeds of the second, third, ... sample of a text are this far apart (2^32 over the golden ratio):
# those of two near seeds differ.
SEED_STEP = 0x9E3779B9


class PromptRows(NamedTuple):
    """Inputs and prompts of rows, as those of `Request`.

    Attributes:
      inputs: [b s] int32, tokens of the encoder; None for a decoder-only model.
      inputs_length: [b], their lengths, or None.
      prompts: [b p], tokens of the decoder.
      prompts_length: [b], their lengths.
    """

    inputs: Any
    inputs_length: Any
    prompts: Any
    prompts_length: Any


class Request(NamedTuple):
    """Rows to be continued, right-padded: numpy arrays on the host, jax arrays on the mesh.

    Attributes:
      inputs: [b s] int32, tokens of the encoder; None for a decoder-only model.
      inputs_length: [b], their lengths, or None.
      prompts: [b p], tokens of the decoder; Model.decoder_start_token_id comes first, except in
        decoder-only models without it (`Model.add_bos`).
      prompts_length: [b], their lengths.
      limit: [b], most new tokens; 0 for a row that only fills up the batch.
      seed: [b], keys the sampling.
      row: [b], keys the sampling too.
      eos: the id that ends a text, or several [e] of which each does.
      constraint: the language of the new texts; None for any text.
      stop: texts that end a row; None for none.
      healing: texts that begin as a token that was removed from the prompt; None for any text.
      healing_start: [b], first state of each row in `healing`.
      spans: parts of the input of each row, which the new texts are; None for any text.
      companion: `companions.companion.Companion` whose logits are combined with the model's, with
        rows of its own; None for none.
    """

    inputs: Any
    inputs_length: Any
    prompts: Any
    prompts_length: Any
    limit: Any
    seed: Any
    row: Any
    eos: Any = 1
    constraint: ConstraintTable | None = None
    stop: StopTable | None = None
    healing: ConstraintTable | None = None
    healing_start: Any = None
    spans: SpanTable | None = None
    companion: Any = None

    def take_shared(self) -> dict[str, Any]:
        """Returns what is not repeated for samples, by name; the other fields have rows."""
        names = ("eos", "constraint", "stop", "healing", "companion")
        return {name: getattr(self, name) for name in names}

    def drop_shared(self) -> "Request":
        """Returns the request without what is not repeated for samples."""
        return self._replace(**dict.fromkeys(self.take_shared()))


def bucket_length(size: int, least: int = 16) -> int:
    """Rounds up to a power of two, or to halfway between two: at most a third is padding."""
    power = least
    while power < size:
        power *= 2
    between = power * 3 // 4
    return between if size <= between and between >= least else power


def pad_rows(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows as one array [b length], padded with zeros on the right, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), length), np.int32)
    padded[np.arange(length) < lengths[:, None]] = np.concatenate([*rows, []])
    return padded, lengths


def make_request(
    cfg: config.Model,
    examples: Sequence[Sequence[int]],
    decode: config.Decode,
    *,
    rows: Sequence[int] | None = None,
    batch: int | None = None,
    eos: int | Sequence[int] = 1,
    **tables: Any,
) -> Request:
    """Returns a Request to continue examples: a row for each, or `count_samples` in a row.

    Args:
      cfg: config of the model.
      examples: ids of each example: encoder inputs, or prompts of a decoder-only model.
      decode: limit, seed and number of samples.
      rows: numbers of the examples for sampling, 0, 1, ... by default: the same number and seed
        give the same text in any batch.
      batch: number of examples to fill up to.
      eos: the id that ends a text, or several.
      **tables: `constraint`, `stop`, `healing` and `spans` of Request; `beginnings`, ids that the
        target of each example begins with.

    Raises:
      ValueError: the model has no decoder, or an example is empty, outside of the vocabulary, or
        longer than the model's learned positions allow.
    """
    check_examples(cfg, examples)
    check_steering_ids(cfg, decode, eos)
    count, new_tokens = len(examples), decode.max_new_tokens
    beginnings = tables.pop("beginnings", [[]] * count)
    longer = [len(ids) + new_tokens for ids in beginnings]
    check_positions(cfg, "Input", examples, longer if any(beginnings) else new_tokens)
    examples = [*examples, *[[cfg.decoder_start_token_id]] * ((batch or count) - count)]
    row = np.zeros(len(examples), np.uint32)
    row[:count] = np.arange(count) if rows is None else rows
    limit = np.where(np.arange(len(examples)) < count, new_tokens, 0).astype(np.int32)
    beginnings = [*beginnings, *[[]] * (len(examples) - count)] if cfg.encoder else None
    seed = np.full(len(examples), decode.seed, np.uint32)
    stops = eos if isinstance(eos, int) else np.array(eos, np.int32)
    read = prompt_rows(cfg, examples, beginnings)
    request = Request(*read, limit, seed, row, stops, **tables)
    return repeat_samples(request, count_samples(decode))


def prompt_rows(
    cfg: config.Model,
    examples: Sequence[Sequence[int]],
    beginnings: Sequence[Sequence[int]] | None = None,
) -> PromptRows:
    """Returns the inputs and prompts of examples, padded to few shapes.

    Args:
      cfg: config of the model.
      examples: ids of each example: encoder inputs, or prompts of a decoder-only model.
      beginnings: of each example, ids that its target begins with; None for none.
    """
    inputs, inputs_length = None, None
    if cfg.encoder is None:
        prompts = [decoder_prompt(cfg, example) for example in examples]
    else:
        beginnings = beginnings or [[]] * len(examples)
        prompts = [[cfg.decoder_start_token_id, *ids] for ids in beginnings]
        inputs, inputs_length = pad_rows(examples, bucket_length(max(map(len, examples))))
    longest = max(map(len, prompts))
    prompts, prompts_length = pad_rows(prompts, longest if longest == 1 else bucket_length(longest))
    return PromptRows(inputs, inputs_length, prompts, prompts_length)


def count_samples(decode: config.Decode) -> int:
    """Number of texts that are sampled for each example, each in a row of its own."""
    return decode.n_best if decode.temperature > 0 else 1


def repeat_samples(request: Request, samples: int) -> Request:
    """Returns each row so many times, one after the other, with seeds SEED_STEP apart."""
    if samples == 1:
        return request
    repeated = jax.tree.map(lambda array: np.repeat(array, samples, axis=0), request.drop_shared())
    steps = np.tile(np.arange(samples, dtype=np.uint32), len(request.seed))
    seed = repeated.seed + steps * np.uint32(SEED_STEP)
    return repeated._replace(seed=seed, **request.take_shared())


def check_steering_ids(cfg: config.Model, decode: config.Decode, eos: int | Sequence[int]) -> None:
    """Checks the ids that Decode names.

    Args:
      cfg: config of the model.
      decode: the config.
      eos: the id that ends a text, or several.

    Raises:
      ValueError: the model's vocabulary lacks one, or has fewer than Decode.logprobs, every id is
        forbidden, or a text must both end and go on.
    """
    config.require(
        (decode.logprobs or 0) <= cfg.vocab,
        f"Decode.logprobs {decode.logprobs} is more than the {cfg.vocab} ids of the model",
    )
    ids = {
        "forced_bos_token_id": [decode.forced_bos_token_id or 0],
        "suppress_tokens": decode.suppress_tokens,
        "bad_words_ids": [token for each in decode.bad_words_ids for token in each],
        "logit_bias": decode.logit_bias or {},
    }
    for name, tokens in ids.items():
        largest = max(tokens, default=0)
        config.require(
            largest < cfg.vocab,
            f"Decode.{name} has id {largest}, and the ids of the model are 0..{cfg.vocab - 1}",
        )
    single = {each[0] for each in decode.bad_words_ids if len(each) == 1}
    config.require(
        len(single.union(decode.suppress_tokens)) < cfg.vocab,
        "Decode.suppress_tokens with Decode.bad_words_ids forbids every id of the model",
    )
    stops = (eos,) if isinstance(eos, int) else eos
    config.require(
        not decode.min_new_tokens or decode.forced_bos_token_id not in stops,
        f"Decode.forced_bos_token_id {decode.forced_bos_token_id} ends a text, and "
        f"Decode.min_new_tokens ({decode.min_new_tokens}) wants it longer: leave one out",
    )


def decoder_prompt(cfg: config.Model, example: Sequence[int]) -> list[int]:
    """Returns the prompt of a decoder-only model: the example, with the start token if one is due.

    A decoder needs at least one token, so an empty example becomes the start token.
    """
    return (
        [*example] if len(example) and not cfg.add_bos else [cfg.decoder_start_token_id, *example]
    )


def check_examples(cfg: config.Model, examples: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for examples that the model cannot continue."""
    if cfg.readout is not None:
        raise ValueError(
            f"Model.readout (kind {cfg.readout.kind}) writes no text: interactive's predict, infer "
            "and eval have what it says of a text"
        )
    if cfg.decoder is None:
        raise ValueError("An encoder alone writes no text: the model needs a decoder Stack")
    if not cfg.causal_decoder:
        raise ValueError(
            f"A decoder with Stack.causal = {cfg.decoder.causal!r} writes no text: tokens of a "
            "layer that is not causal attend to later ones, so that what is cached of them changes "
            "with every token. Readouts and embeddings of whole texts work"
        )
    if not examples:
        raise ValueError("There is nothing to decode: the request has no rows")
    check_ids(cfg, "Input", examples, empty=cfg.encoder is None)


def check_ids(
    cfg: config.Model, name: str, rows: Sequence[Sequence[int]], empty: bool = False
) -> None:
    """Checks ids against the vocabulary of a model.

    Args:
      cfg: config of the model.
      name: what a row is called in messages.
      rows: the ids.
      empty: rows may be empty.

    Raises:
      ValueError: an id is outside of the vocabulary, or a row is empty and may not be.
    """
    for number, row in enumerate(rows):
        if reason := describe_ids(cfg, row, empty):
            raise ValueError(f"{name} {number} {reason}")


def describe_ids(cfg: config.Model, row: Sequence[int], empty: bool = False) -> str:
    """The reason why a model cannot read a row of ids; "" where it can.

    Args:
      cfg: config of the model.
      row: the ids.
      empty: the row may be empty.
    """
    if not len(row) and not empty:
        return "is empty, and the tokenizer adds no token to it: the model needs at least one"
    if len(row) and not 0 <= min(row) <= max(row) < cfg.vocab:
        return (
            f"has ids outside of the model's vocabulary 0..{cfg.vocab - 1}: was it tokenized with "
            "another vocabulary?"
        )
    return ""


def describe_excess(cfg: config.Model, example: Sequence[int], new_tokens: int = 1) -> str:
    """The reason why the model has too few learned positions; "" where it has enough.

    Positions beyond a learned table have no meaning. The last token that is written is never read,
    so it takes none.

    Args:
      cfg: config of the model.
      example: ids of the encoder, or the prompt of a decoder-only model.
      new_tokens: tokens that are written, or scored, after it; 1 where it is only read.
    """
    if cfg.encoder is not None and lacks_positions(cfg.encoder, len(example)):
        return f"takes {len(example)} positions, but the encoder has {count_positions(cfg.encoder)}"
    if cfg.decoder is None:
        return ""
    prompt = 1 if cfg.encoder else len(decoder_prompt(cfg, example))
    positions = prompt + new_tokens - 1
    if not lacks_positions(cfg.decoder, positions):
        return ""
    after = f" with {new_tokens} tokens after it" if new_tokens > 1 else ""
    return f"takes {positions} positions{after}, but the model has {count_positions(cfg.decoder)}"


def lacks_positions(stack: config.Stack, positions: int) -> bool:
    """True if a tower has learned fewer positions."""
    return stack.longest is not None and positions > stack.longest


def count_positions(stack: config.Stack) -> str:
    """The learned positions of a tower, for messages."""
    return f"{stack.longest} (Stack.max_length)"


def check_positions(
    cfg: config.Model,
    name: str,
    examples: Sequence[Sequence[int]],
    new_tokens: int | Sequence[int] = 1,
) -> None:
    """Checks that the model has learned positions for all tokens.

    Args:
      cfg: config of the model.
      name: what an example is called in messages.
      examples: ids of the encoder, or prompts of a decoder-only model.
      new_tokens: tokens after each example, or after every one.

    Raises:
      ValueError: an example takes more positions than there are (`describe_excess`).
    """
    if all(stack is None or stack.max_length is None for stack in (cfg.encoder, cfg.decoder)):
        return
    counts = [new_tokens] * len(examples) if isinstance(new_tokens, int) else new_tokens
    for number, (example, count) in enumerate(zip(examples, counts, strict=True)):
        if reason := describe_excess(cfg, example, count):
            remedy = " or lower max_new_tokens" if isinstance(new_tokens, int) and count > 1 else ""
            raise ValueError(f"{name} {number} {reason}: shorten it{remedy}")


def check_row_lengths(cfg: config.Model, lengths: dict[str, int], owner: str) -> None:
    """Checks that the model has learned positions for whole rows of data.

    Args:
      cfg: config of the model.
      lengths: tokens of a row by feature, as Data.lengths has them.
      owner: what has the model, for the message: "The model", "Distillation.teacher: PATH".

    Raises:
      ValueError: rows are longer than a tower's learned positions.
    """
    inputs, targets = lengths.get("inputs", 0), lengths.get("targets", 0)
    alone = cfg.layout == "decoder_only"
    rows = {"encoder": inputs or targets, "decoder": inputs + targets if alone else targets}
    for tower, length in rows.items():
        stack = getattr(cfg, tower)
        if stack is not None and lacks_positions(stack, length):
            raise ValueError(
                f"{owner} has {stack.longest} positions (Stack.max_length), but Data.lengths "
                f"{lengths} (TASK_FEATURE_LENGTHS) make rows of {length} tokens: lower them"
            )
