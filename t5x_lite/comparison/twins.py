# SPDX-License-Identifier: Apache-2.0
"""The twins of a model: other architectures with as many parameters or FLOPs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config, data
from t5x_lite.comparison import costs, taken
from t5x_lite.config.training_run import ComparisonRun, TrainingRun

MULTIPLE = 8  # of the width of an MLP


class Twin(NamedTuple):
    """One architecture of the family.

    Attributes:
      name: one of Compare.twins.
      model: its config.
      steps: steps in which it sees the examples as often as the encoder-decoder does; 0 if it is
        trained already.
      parameters: number of parameters.
      cost: the cost that Compare.matched names.
      off: relative difference of the cost from the encoder-decoder's (0.01: 1 % more).
      taken: its checkpoints, if it is trained already.
    """

    name: str
    model: config.Model
    steps: int
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

    def cost(cfg: config.Model) -> float:
        return costs.matched_cost(cfg, lengths, run.compare.matched)

    wanted, results = cost(run.model), []
    for name in run.compare.twins:
        paths = run.compare.trained.get(name, ())
        if paths:
            cfg = there[name]
        elif name == "encoder_decoder":
            cfg = run.model
        else:
            candidates = SHAPES[name](run.model, run.compare.shallow_layers)
            cfg = match_cost(candidates, cost, wanted)
        price = cost(cfg)
        off = price / wanted - 1
        if abs(off) > 0.1 and not paths:
            raise ValueError(
                f"No {name} comes nearer than {off:+.0%} to the {run.compare.matched} of the "
                "encoder-decoder: choose another Compare.matched or Compare.shallow_layers"
            )
        steps = 0 if paths else matched_steps(run, cfg)
        results.append(Twin(name, cfg, steps, costs.count_parameters(cfg), price, off, paths))
    return results


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


# The config of each twin as a function of its number of layers.
SHAPES: dict[str, Callable[[config.Model, int], Callable[[int], config.Model]]] = {
    "encoder_decoder": lambda cfg, shallow: lambda layers: cfg,
    "causal_decoder": lambda cfg, shallow: lambda layers: decoder_only_twin(cfg, layers, False),
    "prefix_decoder": lambda cfg, shallow: lambda layers: decoder_only_twin(cfg, layers, True),
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
    return round(run.train.steps * examples_per_row(run, run.model) / examples_per_row(run, cfg))


def examples_per_row(run: TrainingRun, cfg: config.Model) -> float:
    """Mean number of examples that packing puts into a row of the model's layout."""
    batches = data.open_batches(run.data, cfg.layout, run.train.batch_size, run.seed)
    return batches.statistics.examples_per_row


def twin_run(run: ComparisonRun, twin: Twin, seed: int) -> TrainingRun:
    """The training run of a twin.

    Args:
      run: config of the comparison.
      twin: the twin.
      seed: number of the seed, from 0 to Compare.seeds - 1.
    """
    if twin.taken:
        here = {"model_dir": twin.taken[seed], "model": twin.model, "compare": None}
        return dataclasses.replace(run, **here)
    folder = Path(run.model_dir) / f"{twin.name}-{seed}"
    return dataclasses.replace(
        run,
        model_dir=str(folder),
        model=twin.model,
        train=dataclasses.replace(run.train, steps=twin.steps),
        seed=run.seed + seed,
        compare=None,
    )
