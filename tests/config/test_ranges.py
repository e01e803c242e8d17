# SPDX-License-Identifier: Apache-2.0
"""Law: every number of every config dataclass has a range, and what is just outside is refused."""

import ast
import dataclasses
import math
import re
import shlex
import typing
from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest

from t5x_lite import config
from t5x_lite.config import gin_check, gin_file
from t5x_lite.config.checked import LARGEST_FLOAT, LARGEST_INT, WRITE, Range, coerce, field_types

G2P = ["configs/runs/g2p.gin"]
STACK = config.Stack(layers=1, embed=8, heads=1, head_dim=8, mlp=8)
MODEL = config.Model(vocab=384, encoder=STACK, decoder=STACK)
BYTES = config.Vocabulary("bytes")
# One of each class: fields that other fields decide about have a value where they have a say.
SAMPLES = [
    config.Run("runs/sample", MODEL),
    MODEL,
    dataclasses.replace(STACK, pattern=("sliding",), window=4),
    dataclasses.replace(STACK, positions="learned", max_length=4),
    dataclasses.replace(STACK, positions="bipe", segment_length=8, rotary_span=9),
    dataclasses.replace(STACK, positions="sinusoidal", random_positions=9),
    config.RotaryScaling("yarn", 2.0, attention_factor=1.5),
    config.DraftHeads(4),
    config.Canvas(4),
    config.Readout("number"),
    config.Data("cmudict_g2p", {"inputs": 8, "targets": 8}),
    config.Files("sample", "data.jsonl", BYTES),
    config.HubDataset("owner/name", BYTES),
    config.Mixture(("a", "b"), (1.0, 2.0)),
    config.Vocabulary("trained", size=300),
    config.SpanCorruption(),
    config.PrefixLM(share=0.25),
    config.CausalLM(),
    config.FillInTheMiddle(),
    config.MaskedNames(),
    config.NameTags(),
    config.Denoisers((config.SpanCorruption(), config.PrefixLM()), (1.0, 2.0)),
    config.Train(steps=4, batch_size=4),
    config.WeightAverage("exponential"),
    config.Schedule("constant", 0.1),
    config.Optimizer(options={"b1": 0.9}),
    config.ParamGroup(("*",)),
    config.DraftHeadLoss(),
    config.LayerSkip(),
    config.Evaluate(),
    config.Checkpoint(),
    config.Decode(),
    config.Mesh(),
    config.Adaptation("source"),
    config.Distillation("teacher", top_k=4),
    config.Lora(rank=8, alpha=16.0),
    config.Contrastive(),
    config.Preferences("simpo"),
    config.Grpo("exact_match"),
    config.Compare(),
]


class Number(NamedTuple):
    """A number of a field: wrap puts another one there; its kind is a type, its limits a Range."""

    wrap: typing.Callable[[Any], Any]
    kind: type
    limits: Range | None


def numbers(hint: Any, wrap=lambda value: value) -> typing.Iterator[Number]:
    """Numbers that an annotation has room for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        yield Number(wrap, hint, None)
    elif origin is Annotated and inner[0] in (int, float):
        yield Number(wrap, *inner)
    elif origin is tuple:
        yield from numbers(inner[0], lambda value: wrap((value, value)))
    elif origin is dict:
        yield from numbers(inner[1], lambda value: wrap({"targets": value, "inputs": 8}))
    elif origin is not typing.Literal:
        for each in inner:
            yield from numbers(each, wrap)


CASES = [
    pytest.param(sample, name, number, id=f"{type(sample).__name__}.{name}")
    for sample in SAMPLES
    for name, hint in field_types(type(sample)).items()
    for number in numbers(hint)
]


def outside(number: Number) -> list[float]:
    """Numbers just outside a range, and those that are no finite float32."""
    least, most, kind = number.limits.least, number.limits.most, number.kind
    values = []
    if kind is int:
        values = [least - 1, most + 1, 2**64]
    else:
        values = [math.inf, -math.inf, math.nan, 2 * LARGEST_FLOAT, 1e-50, 10**400]
        if math.isfinite(least):
            open_end = number.limits.open in ("least", "both")
            values.append(least if open_end else np.nextafter(np.float32(least), -(9**9)).item())
        if math.isfinite(most):
            open_end = number.limits.open in ("most", "both")
            values.append(most if open_end else np.nextafter(np.float32(most), 9**9).item())
    return values


def test_every_class_has_a_sample_and_every_number_a_range():
    assert {type(sample).__name__ for sample in SAMPLES} == set(gin_check.dataclass_names())
    assert [case.id for case in CASES if case.values[2].limits is None] == []
    free = [case.id for case in CASES if case.values[2].limits == Range()]
    assert free == ["Optimizer.options"]  # optax says what each of them may be
    for case in CASES:
        number = case.values[2]
        assert number.kind is float or number.limits.most <= 2**32, case.id


@pytest.mark.parametrize("sample, name, number", CASES)
def test_a_number_just_outside_its_range_is_refused_by_name(sample, name, number):
    owner = f"{type(sample).__name__}.{name}"
    for value in outside(number):
        with pytest.raises(ValueError, match=rf"{re.escape(owner)}(\[.*\])? must be"):
            dataclasses.replace(sample, **{name: number.wrap(value)})


@pytest.mark.parametrize(
    "binding, words",
    [
        ("config.Optimizer.clip_norm=0.0", "Optimizer.clip_norm must be positive; got 0.0"),
        ("config.Optimizer.clip_norm=-1", "Optimizer.clip_norm must be positive; got -1.0"),
        ("config.Optimizer.weight_decay=-5", "Optimizer.weight_decay must be at least 0"),
        ("config.Optimizer.options={'b1': 1e999}", 'Optimizer.options["b1"] must be a finite'),
        ("config.Train.z_loss=-1", "Train.z_loss must be at least 0"),
        ("config.Schedule.peak=1e999", "Schedule.peak must be a finite number; got inf"),
        ("config.Schedule.peak=1e39", "Schedule.peak must be a number of float32"),
        ("config.Schedule.peak=1e-50", "Schedule.peak must be a number of float32"),
        ("config.Evaluate.every=-5", "Evaluate.every must be at least 0; got -5"),
        ("config.Evaluate.batch_size=0", "Evaluate.batch_size must be at least 1; got 0"),
        ("config.Run.seed=18446744073709551616", "Run.seed must be in [0, 4,294,967,295]"),
        ("config.Run.seed=-1", "Run.seed must be in"),
        ("config.Data.lengths={'targets': 1}", 'Data.lengths["targets"] must be at least 2'),
        ("config.Decode.draft_length=1", "Decode.draft_length must be 0, or in [2, 64]; got 1"),
        ("config.Mesh.fsdp=0", "Mesh.fsdp must be -1, or at least 1; got 0"),
        ("TRAIN_STEPS=2147483648", f"Train.steps must be at most {LARGEST_INT:,}"),
        ("config.Stack.max_distance=8", "Model.encoder: Stack.max_distance must be above 8"),
        ("config.Stack.buckets=3", "Model.encoder: Stack.buckets must be at least 4"),
    ],
)
def test_a_number_is_checked_when_a_config_loads(binding, words):
    with pytest.raises(gin_file.ConfigError) as raised:
        gin_file.load_run(G2P, [binding])
    assert words in str(raised.value)


CLASSES = {type(each).__name__: each for each in SAMPLES}
WRONG = ["true", "No", "none", "NULL", "12", "0.5", 2.0, "SpanCorruption", "@PrefixLM()", "full"]
WRONG += ["bleu,chrf", "[a, b]", None, [1], {}, 3, True, "a'b", 'say "hi"']


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_value_that_a_message_suggests_is_accepted(sample):
    for name, hint in field_types(type(sample)).items():
        for value in WRONG:
            try:
                dataclasses.replace(sample, **{name: value})
            except ValueError as error:
                _, _, suggested = str(error).partition(WRITE)
                if not suggested:
                    continue
                if "@" in suggested:
                    meant = CLASSES[re.findall(r"@config\.(\w+)", suggested)[0]]
                    meant = (meant,) if suggested.endswith(",)") else meant
                else:
                    meant = ast.literal_eval(suggested)
                coerce(meant, hint)


@pytest.mark.parametrize(
    "binding, words",
    [
        ("config.Train.tensorboard=true", "write --gin.config.Train.tensorboard=True)"),
        ("config.Stack.kv_heads=none", "write --gin.config.Stack.kv_heads=None)"),
        ("TRAIN_STEPS=1e3", "write --gin.TRAIN_STEPS=1000)"),
        ("config.Evaluate.metrics=bleu", """write --gin.config.Evaluate.metrics='("bleu",)')"""),
        ("config.Evaluate.metrics=[bleu, chrf]", """metrics='("bleu", "chrf")')"""),
        ("config.Data.objective=PrefixLM", "objective='@config.PrefixLM()')"),
        ("MODEL_DIR=[1]", "must be a string; got [1] (--gin.MODEL_DIR=[1])"),
        ("MODEL_DIR=None", "must be a string; got None (--gin.MODEL_DIR=None)"),
        ("MODEL_DIR=%RUN", "give --gin.RUN=VALUE (--gin.MODEL_DIR=%RUN)"),
        ("Files.train=x", "did you mean config.Files?"),
        ("train.steps=3", "did you mean config.Train?"),
        ("config.Data.objective=@PrefixLM()", "did you mean config.PrefixLM?"),
    ],
)
def test_a_value_that_was_probably_meant_is_written_out(binding, words):
    with pytest.raises(gin_file.ConfigError) as raised:
        gin_file.load_run(G2P, [binding])
    assert words in str(raised.value)
    shown = re.search(r"write --gin\.(.+)\)$", str(raised.value))
    if shown:  # as a shell reads it
        gin_file.load_run(G2P, shlex.split(shown[1]))


def test_a_filter_without_a_temperature_is_refused_and_out_of_an_old_config_left_out():
    for name, value in (("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.5)):
        with pytest.raises(ValueError, match=rf"Decode\.{name} narrows .* set Decode.temperature"):
            config.Decode(**{name: value})
        assert getattr(config.Decode(temperature=0.5, **{name: value}), name) == value
    saved = gin_file.to_text(gin_file.load_run(G2P))
    old = saved.replace("config.Decode.top_k = 0", "config.Decode.top_k = 40")
    assert old != saved and gin_file.from_text(old) == gin_file.from_text(saved)
    sampled = old.replace("config.Decode.temperature = 0.0", "config.Decode.temperature = 0.7")
    assert gin_file.from_text(sampled).decode.top_k == 40


def test_two_seeds_are_two_runs():
    import jax

    largest = typing.get_args(field_types(config.Run)["seed"])[1].most
    keys = [tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in (0, 1, largest)]
    assert len(set(keys)) == 3


def texts(hint: Any, wrap=lambda value: value) -> typing.Iterator[typing.Callable[[str], Any]]:
    """Functions that put a text where an annotation has room for one."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        yield wrap
    elif origin is tuple:
        yield from texts(inner[0], lambda value: wrap((value,)))
    elif origin is dict:
        yield from texts(inner[0], lambda value: wrap({value: 8}))
        yield from texts(inner[1], lambda value: wrap({"targets": value}))
    elif origin is not typing.Literal:
        for each in inner:
            yield from texts(each, wrap)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_text_that_no_file_can_hold_is_refused_by_name(sample):
    """A command line with bytes that are no UTF-8, or half of a surrogate pair."""
    for name, hint in field_types(type(sample)).items():
        for wrap in texts(hint):
            with pytest.raises(ValueError, match=rf"{type(sample).__name__}.{name}: not Unicode"):
                dataclasses.replace(sample, **{name: wrap("a\udcff")})
