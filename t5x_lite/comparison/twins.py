# SPDX-License-Identifier: Apache-2.0
"""The twins of a model: other architectures with as many parameters or FLOPs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config, data
from t5x_lite.comparison import costs, taken
from t5x_lite.config.comparison import CHANGED_TWINS
from t5x_lite.config.training_run import ComparisonRun, TrainingRun

MULTIPLE = 8  # of the width of an MLP


class Twin(NamedTuple):
    """One architecture of the family.

    Attributes:
      name: one of Compare.twins.
      model: its config.
      matched: the cost that it is matched by, or measured in: one of Compare.matched.
      steps: steps in which it sees the examples as often as the encoder-decoder does; 0 if it is
        trained already.
      pretraining_steps: the same of Compare.pretraining; 0 without.
      parameters: number of parameters.
      cost: its cost in `matched`.
      off: relative difference of the cost from the encoder-decoder's (0.01: 1 % more).
      taken: its checkpoints, if it is trained already.
    """

    name: str
    model: config.Model
    matched: str
    steps: int
    pretraining_steps: int
    parameters: int
    cost: float
    off: float
    taken: tuple[str, ...] = ()


def make_family(run: ComparisonRun) -> list[Twin]:
    """Makes the twins of Run.compare, matched to the run's encoder-decoder.

    Raises:
      ValueError: the run's model is not an encoder-decoder, the data lack inputs, no depth comes
        within a tenth of the cost, or a checkpoint in Compare.trained is of another twin.
    """
    there = {
        name: taken.trained_model(run, name, paths) for name, paths in run.compare.trained.items()
    }
    run = dataclasses.replace(run, model=there.get("encoder_decoder", run.model))
    if run.model.layout != "encoder_decoder":
        raise ValueError(
            "compare takes the config of the encoder-decoder and makes its twins: bind "
            "Model.encoder and Model.decoder"
        )
    lengths = costs.Lengths(*costs.example_lengths(run.data).mean(axis=0).tolist())
    return [make_twin(run, name, lengths, there.get(name)) for name in run.compare.twins]


def make_twin(
    run: ComparisonRun, name: str, lengths: costs.Lengths, there: config.Model | None
) -> Twin:
    """Makes one twin, matched to the run's encoder-decoder; raises ValueError as `make_family`.

    Args:
      run: config of the comparison.
      name: name of the twin, with @ and its cost if that is its own.
      lengths: mean lengths of the examples.
      there: its model, if it is trained already.
    """
    kind, _, matched = name.partition("@")
    matched = matched or run.compare.matched

    def cost(cfg: config.Model) -> float:
        return costs.matched_cost(cfg, lengths, matched)

    wanted, paths = cost(run.model), run.compare.trained.get(name, ())
    if there is not None:
        cfg = there
    elif kind in SHAPES:
        cfg = match_cost(SHAPES[kind](run.model, run.compare.shallow_layers), cost, wanted)
    else:
        cfg = change_model(run, kind)
    price = cost(cfg)
    off = price / wanted - 1
    if abs(off) > 0.1 and not paths and kind not in CHANGED_TWINS:
        raise ValueError(
            f"No {name} comes nearer than {off:+.0%} to the {matched} of the "
            "encoder-decoder: choose another Compare.matched or Compare.shallow_layers"
        )
    steps = 0 if paths else matched_steps(run, cfg)
    before = None if paths else pretraining(run, name, cfg)
    return Twin(
        name=name,
        model=cfg,
        matched=matched,
        steps=steps,
        pretraining_steps=before.train.steps if before else 0,
        parameters=costs.count_parameters(cfg),
        cost=price,
        off=off,
        taken=paths,
    )


def change_model(run: ComparisonRun, kind: str) -> config.Model:
    """The run's encoder-decoder with the one change that a twin is named for.

    Raises:
      ValueError: the model has that already, or cannot have it.
    """
    cfg = run.model
    assert cfg.encoder is not None and cfg.decoder is not None
    changes = {
        "causal_encoder": {"encoder": dataclasses.replace(cfg.encoder, causal=(True,))},
        "chunked_encoder": {"encoder": dataclasses.replace(cfg.encoder, chunk=run.compare.chunk)},
        "tied_embeddings": {"tied": True},
    }
    if kind == "merged_attention":
        changes[kind] = {"decoder": dataclasses.replace(cfg.decoder, merged=True)}
    changed = dataclasses.replace(cfg, **changes.get(kind, {}))
    config.require(
        kind not in changes or changed != cfg,
        f"Compare.twins: the encoder-decoder has {kind.replace('_', ' ')} already",
    )
    return changed


def decoder_only_twin(cfg: config.Model, layers: int, prefix_lm: bool) -> config.Model:
    """A decoder-only twin.

    Args:
      cfg: config of the encoder-decoder.
      layers: number of layers.
      prefix_lm: True if the inputs are read bidirectionally.
    """
    assert cfg.decoder is not None
    decoder = dataclasses.replace(cfg.decoder, layers=layers, merged=False)
    alone = {"encoder": None, "separate_embeddings": False}
    return dataclasses.replace(cfg, decoder=decoder, prefix_lm=prefix_lm, **alone)


def deep_encoder(cfg: config.Model, layers: int, shallow: int) -> config.Model:
    """An encoder-decoder twin with a shallow decoder.

    Args:
      cfg: config of the encoder-decoder.
      layers: number of layers of the encoder.
      shallow: number of layers of the decoder.
    """
    assert cfg.encoder is not None and cfg.decoder is not None
    decoder = dataclasses.replace(cfg.decoder, layers=shallow)
    return dataclasses.replace(
        cfg, encoder=dataclasses.replace(cfg.encoder, layers=layers), decoder=decoder
    )


# The config of each matched twin as a function of its number of layers.
SHAPES: dict[str, Callable[[config.Model, int], Callable[[int], config.Model]]] = {
    "causal_decoder": lambda cfg, shallow: lambda layers: decoder_only_twin(cfg, layers, False),
    "prefix_decoder": lambda cfg, shallow: lambda layers: decoder_only_twin(cfg, layers, True),
    "tuned_prefix_decoder": lambda cfg, shallow: (
        lambda layers: decoder_only_twin(cfg, layers, True)
    ),
    "shallow_decoder": lambda cfg, shallow: lambda layers: deep_encoder(cfg, layers, shallow),
}


def match_cost(
    shape: Callable[[int], config.Model], cost: Callable[[config.Model], float], wanted: float
) -> config.Model:
    """Finds the depth with the nearest cost, then the MLP width that matches it.

    The cost grows with depth and is linear in the width.

    Args:
      shape: config by number of layers.
      cost: cost of a config.
      wanted: the cost to match.
    """
    layers = 1
    while cost(shape(layers + 1)) <= wanted:
        layers += 1
    layers = min((layers, layers + 1), key=lambda count: abs(cost(shape(count)) - wanted))
    cfg = shape(layers)
    first, second = (cost(widen_mlp(cfg, extra)) for extra in (0, MULTIPLE))
    extra = round((wanted - first) / (second - first)) * MULTIPLE
    narrow = MULTIPLE - min(stack.mlp for stack in (cfg.encoder, cfg.decoder) if stack)
    return widen_mlp(cfg, max(extra, narrow))


def widen_mlp(cfg: config.Model, extra: int) -> config.Model:
    """cfg with MLPs wider by `extra`; narrower if it is negative."""

    def wider(stack: config.Stack | None) -> config.Stack | None:
        return stack and dataclasses.replace(stack, mlp=stack.mlp + extra)

    return dataclasses.replace(cfg, encoder=wider(cfg.encoder), decoder=wider(cfg.decoder))


def matched_steps(run: TrainingRun, cfg: config.Model) -> int:
    """Steps in which cfg sees the examples as often as the run's model does."""
    if cfg.layout == run.model.layout:
        return run.train.steps
    return round(run.train.steps * examples_per_row(run, run.model) / examples_per_row(run, cfg))


def examples_per_row(run: TrainingRun, cfg: config.Model) -> float:
    """Mean number of examples that packing puts into a row of the model's layout."""
    batches = data.open_batches(run.data, cfg.layout, run.train.batch_size, run.seed)
    return batches.statistics.examples_per_row


def twin_run(run: ComparisonRun, twin: Twin, seed: int) -> TrainingRun:
    """The training run of a twin, which begins with the weights of `pretraining_run` if it has one.

    Args:
      run: config of the comparison.
      twin: the twin.
      seed: number of the seed, from 0 to Compare.seeds - 1.
    """
    if twin.taken:
        here = {"model_dir": twin.taken[seed], "model": twin.model, "compare": None}
        return dataclasses.replace(run, **here)
    folder = Path(run.model_dir) / f"{twin.name}-{seed}"
    train = dataclasses.replace(run.train, steps=twin.steps)
    if twin.name == "averaged":
        train = dataclasses.replace(train, average=last_tenth(twin.steps))
    alone = dataclasses.replace(
        run,
        model_dir=str(folder),
        model=twin.model,
        train=train,
        seed=run.seed + seed,
        compare=None,
    )
    before = pretraining_run(run, twin, seed)
    if before is None:
        return alone
    if twin.name == "adapted":
        return dataclasses.replace(alone, adaptation=config.Adaptation(before.model_dir))
    checkpoint = dataclasses.replace(run.checkpoint, initial=before.model_dir)
    return dataclasses.replace(alone, checkpoint=checkpoint)


def last_tenth(steps: int) -> config.WeightAverage:
    """The mean of five weights from the last tenth of a run."""
    return config.WeightAverage("uniform", last=5, every=max(1, steps // 50))


def pretraining(run: ComparisonRun, name: str, cfg: config.Model) -> TrainingRun | None:
    """The run of a twin on Compare.pretraining, without seed and folder; None if it has none.

    Args:
      run: config of the comparison.
      name: name of the twin.
      cfg: its model.
    """
    kind = name.partition("@")[0]
    if run.compare.pretraining is None or kind == "scratch":
        return None
    if kind == "adapted":
        assert cfg.decoder is not None
        cfg = decoder_only_twin(cfg, cfg.decoder.layers, False)
    elif kind == "tuned_prefix_decoder":
        cfg = dataclasses.replace(cfg, prefix_lm=False)
    train = dataclasses.replace(run.train, steps=run.compare.pretraining_steps)
    alone = dataclasses.replace(run, data=run.compare.pretraining, train=train, compare=None)
    train = dataclasses.replace(train, steps=matched_steps(alone, cfg))
    return dataclasses.replace(alone, model=cfg, train=train)


def pretraining_run(run: ComparisonRun, twin: Twin, seed: int) -> TrainingRun | None:
    """The run on Compare.pretraining before that of a twin; None without one.

    Args:
      run: config of the comparison.
      twin: the twin.
      seed: number of the seed.
    """
    if not twin.pretraining_steps:
        return None
    before = pretraining(run, twin.name, twin.model)
    assert before is not None
    folder = Path(run.model_dir) / f"{twin.name}-{seed}-pretraining"
    return dataclasses.replace(before, model_dir=str(folder), seed=run.seed + seed)
