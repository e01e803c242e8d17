# SPDX-License-Identifier: Apache-2.0
"""The twins of a model: other architectures of as many parameters, or of as much work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from t5x_lite import config, data
from t5x_lite.comparison import costs, taken

MULTIPLE = 8  # of which the width of an MLP stays one


class Twin(NamedTuple):
    """One architecture of the family.

    steps makes it see the examples as often as the encoder-decoder does; cost is what
    `Compare.matched` names, off how far it is from that of the encoder-decoder (0.01: 1 % more).
    taken are its checkpoints where it is not trained here; steps is 0 then.
    """

    name: str
    model: config.Model
    steps: int
    parameters: int
    cost: float
    off: float
    taken: tuple[str, ...] = ()


def family(run: config.Run) -> list[Twin]:
    """The twins that run.compare names, matched to the run's own encoder-decoder.

    Raises:
      ValueError: the run's model is no encoder-decoder, the data have no inputs, no depth comes
        within a tenth of the cost, or a checkpoint to take is not of such a twin.
    """
    there = {name: taken.model_of(run, name, paths) for name, paths in run.compare.trained.items()}
    run = dataclasses.replace(run, model=there.get("encoder_decoder", run.model))
    if run.model.layout != "pair":
        raise ValueError(
            "compare takes the config of the encoder-decoder and makes its twins: bind "
            "Model.encoder and Model.decoder"
        )
    lengths = costs.Lengths(*costs.lengths_of(run.data).mean(axis=0).tolist())
    measured = lambda cfg: costs.cost(cfg, lengths, run.compare.matched)
    wanted, found = measured(run.model), []
    for name in run.compare.twins:
        paths = run.compare.trained.get(name, ())
        if paths:
            cfg = there[name]
        elif name == "encoder_decoder":
            cfg = run.model
        else:
            candidates = SHAPES[name](run.model, run.compare.shallow_layers)
            cfg = matched(candidates, measured, wanted)
        price = measured(cfg)
        off = price / wanted - 1
        if abs(off) > 0.1 and not paths:
            raise ValueError(
                f"No {name} comes nearer than {off:+.0%} to the {run.compare.matched} of the "
                "encoder-decoder: choose another Compare.matched or Compare.shallow_layers"
            )
        steps = 0 if paths else steps_of(run, cfg)
        found.append(Twin(name, cfg, steps, costs.parameters(cfg), price, off, paths))
    return found


def lone(cfg: config.Model, layers: int, prefix_lm: bool) -> config.Model:
    """cfg without its encoder, with so many layers."""
    decoder = dataclasses.replace(cfg.decoder, layers=layers, merged=False)
    alone = {"encoder": None, "separate_embeddings": False}
    return dataclasses.replace(cfg, decoder=decoder, prefix_lm=prefix_lm, **alone)


def deep_encoder(cfg: config.Model, layers: int, shallow: int) -> config.Model:
    """cfg with `shallow` decoder layers and so many of the encoder."""
    decoder = dataclasses.replace(cfg.decoder, layers=shallow)
    return dataclasses.replace(
        cfg, encoder=dataclasses.replace(cfg.encoder, layers=layers), decoder=decoder
    )


# Of each twin, its model by number of layers.
SHAPES: dict[str, Callable[[config.Model, int], Callable[[int], config.Model]]] = {
    "encoder_decoder": lambda cfg, shallow: lambda layers: cfg,
    "causal_decoder": lambda cfg, shallow: lambda layers: lone(cfg, layers, False),
    "prefix_decoder": lambda cfg, shallow: lambda layers: lone(cfg, layers, True),
    "shallow_decoder": lambda cfg, shallow: lambda layers: deep_encoder(cfg, layers, shallow),
}


def matched(
    shape: Callable[[int], config.Model], cost: Callable[[config.Model], float], wanted: float
) -> config.Model:
    """The depth of which the cost is nearest to the one wanted, then the MLP width that meets it.

    Cost grows with depth and is linear in the width.
    """
    layers = 1
    while cost(shape(layers + 1)) <= wanted:
        layers += 1
    layers = min((layers, layers + 1), key=lambda count: abs(cost(shape(count)) - wanted))
    cfg = shape(layers)
    first, second = (cost(widened(cfg, extra)) for extra in (0, MULTIPLE))
    extra = round((wanted - first) / (second - first)) * MULTIPLE
    narrow = MULTIPLE - min(stack.mlp for stack in (cfg.encoder, cfg.decoder) if stack)
    return widened(cfg, max(extra, narrow))


def widened(cfg: config.Model, extra: int) -> config.Model:
    """cfg with MLPs wider by `extra` (narrower where negative)."""
    wider = lambda stack: stack and dataclasses.replace(stack, mlp=stack.mlp + extra)
    return dataclasses.replace(cfg, encoder=wider(cfg.encoder), decoder=wider(cfg.decoder))


def steps_of(run: config.Run, cfg: config.Model) -> int:
    """Steps in which cfg sees the examples as often as the run's own model does."""
    return round(run.train.steps * examples_per_row(run, run.model) / examples_per_row(run, cfg))


def examples_per_row(run: config.Run, cfg: config.Model) -> float:
    """How many examples packing puts into a row of the model's layout."""
    batches = data.open_batches(run.data, cfg.layout, run.train.batch_size, run.seed)
    return batches.statistics.examples_per_row


def run_of(run: config.Run, twin: Twin, seed: int) -> config.Run:
    """The training run of a twin with the seed'th of the seeds."""
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
