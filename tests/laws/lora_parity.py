# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft on tiny models of transformers, beside ours."""

from pathlib import Path
from typing import NamedTuple

import encoder_decoder_parity
import jax
import numpy as np
import parity
import peft
import torch
from families import FAMILIES
from parity import Pair, tensor

from t5x_lite import config, sharding
from t5x_lite.batch import Batch
from t5x_lite.checkpoints import adapters, train_state
from t5x_lite.checkpoints.formats.huggingface.peft import PREFIX, PeftAdapter
from t5x_lite.checkpoints.weight_paths import flatten_tree, nest_tree
from t5x_lite.checkpoints.weights import layer_numbers
from t5x_lite.training import frozen_base, optimizer, schedules, step

KINDS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
}
# name -> family, and the modules that have adapters there.
TOYS = {
    "t5": ("t5_1_0", ["q", "v", "o", "wi", "wo"]),
    "t5gemma": ("t5gemma", ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]),
    "llama": ("llama, biases", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
}


class AdaptedPair(NamedTuple):
    """A model of transformers with adapters of peft, and ours with those that it saved.

    Attributes:
      pair: base models; `theirs` has the adapters.
      folder: what peft's save_pretrained wrote.
      lora: config of the adapters, as ours reads the folder.
      adapters: tree of the adapters.
      ids: random token ids.
      laws: module of the layout.
    """

    pair: Pair
    folder: Path
    lora: config.Lora
    adapters: dict
    ids: NamedTuple
    laws: object


def draw_pair(toy: str, kind: str, folder: Path, **fields) -> AdaptedPair:
    """A toy with adapters whose weights are all random.

    Args:
      toy: key of TOYS.
      kind: key of KINDS.
      folder: folder to write.
      **fields: further fields of peft's LoraConfig.
    """
    name, modules = TOYS[toy]
    family = FAMILIES[name]
    pair = parity.read(family.draw(family.seeds[0]), folder / "base")
    pair = pair._replace(cfg=family.adjust(pair.cfg))
    torch.manual_seed(1)
    described = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, init_lora_weights=False, **KINDS[kind], **fields
    )
    theirs = peft.get_peft_model(pair.theirs, described)
    with torch.no_grad():
        for each, weight in theirs.named_parameters():
            if "magnitude" in each:
                weight.mul_(1 + 0.3 * torch.rand(weight.shape))
    theirs.peft_config["default"].base_model_name_or_path = str(folder / "base")
    theirs.save_pretrained(folder / "peft")
    opened, arrays = adapters.open_peft_tensors(folder / "peft", pair.cfg)
    start = pair.cfg.decoder_start_token_id if family.start is None else family.start
    ids = family.laws.drawn_ids(pair.cfg.vocab, start, 0)
    if family.laws is encoder_decoder_parity:
        pair = pair._replace(cfg=encoder_decoder_parity.cfg_from(pair.cfg, ids))
    tree = nest_tree(stacked(arrays))
    return AdaptedPair(
        pair._replace(theirs=theirs), folder / "peft", opened.lora, tree, ids, family.laws
    )


def stacked(arrays) -> dict[str, np.ndarray]:
    """All layers of every weight by dotted name."""
    return {
        path.replace("/", "."): np.stack([arrays.read(path, n) for n in layer_numbers(leaf)])
        for path, leaf in arrays.leaves.items()
    }


def our_outputs(toy: AdaptedPair) -> np.ndarray:
    """Logits of ours with the adapters attached, where tokens exist."""
    run = config.Run(
        model_dir="unused",
        model=toy.pair.cfg,
        lora=toy.lora,
        checkpoint=config.Checkpoint(initial="unused"),
    )
    params = frozen_base.whole_params(run, toy.adapters, toy.pair.params)
    pair = toy.pair._replace(params=params)
    if toy.laws is encoder_decoder_parity:
        return encoder_decoder_parity.our_results(pair, toy.ids)[1]
    return toy.laws.our_logits(pair, toy.ids)[toy.ids.exists]


def their_gradients(toy: AdaptedPair) -> dict[str, np.ndarray]:
    """Gradients of the adapters of the mean cross-entropy in theirs, by our dotted names."""
    batch = toy.laws.batch_of(toy.ids)
    theirs = toy.pair.theirs
    if toy.laws is encoder_decoder_parity:
        read = encoder_decoder_parity.their_inputs(toy.ids)
        out = theirs(**read, decoder_input_ids=tensor(toy.ids.decoder), use_cache=False)
    else:
        out = theirs(**toy.laws.inputs(toy.ids), use_cache=False)
    labels = tensor(np.asarray(batch.targets)).flatten()
    losses = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels, reduction="none")
    weights = torch.from_numpy(np.array(batch.loss_weights)).flatten()
    (torch.sum(losses * weights) / weights.sum()).backward()
    state = {}
    for name, weight in theirs.named_parameters():
        if weight.grad is not None:
            name = name.replace("magnitude_vector.default.weight", "magnitude_vector")
            state[name.replace(".default.", ".")] = weight.grad.numpy()
    assert all(name.startswith(PREFIX) and "lora" in name for name in state)
    source = parity.State(state)
    adapter = PeftAdapter(toy.lora, "theirs")
    return stacked(adapters.map_adapters(source, toy.pair.cfg, toy.pair.family, adapter))


def our_gradients(toy: AdaptedPair) -> dict[str, np.ndarray]:
    """Gradients of the adapters, read from a training step of SGD with rate 1."""
    run = config.Run(
        model_dir="unused",
        model=toy.pair.cfg,
        lora=toy.lora,
        checkpoint=config.Checkpoint(initial="unused"),
        data=config.Data(task="unused", lengths={"inputs": 13, "targets": 9}),
        train=config.Train(steps=10, batch_size=3, z_loss=0.0),
        schedule=config.Schedule("constant", 1.0),
        optimizer=config.Optimizer("sgd"),
    )
    update, stepper = make_step(run)
    before = jax.tree.map(jax.numpy.asarray, toy.adapters)
    state = train_state.begin_state(before, update)
    batch = place(toy.laws.batch_of(toy.ids))
    after, _ = stepper(state, batch, None, toy.pair.params)
    return {
        name: np.asarray(was) - np.asarray(now)
        for (name, was), now in zip(
            flatten_tree(toy.adapters).items(), jax.tree.leaves(after.params), strict=True
        )
    }


def make_step(run: config.Run):
    """Optimizer and step of a run with adapters, on the mesh in force."""
    axes = frozen_base.trained_axes(run)
    schedule = schedules.learning_rate(run.schedule, run.train.steps)
    update = optimizer.make_optimizer(run.optimizer, schedule, axes, run.train.param_groups)
    return update, step.make_step(run, update, schedule, axes)


def place(batch: Batch) -> Batch:
    """A batch on the mesh in force."""
    return sharding.place_batch(jax.tree.map(np.asarray, batch))
