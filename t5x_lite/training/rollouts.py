# SPDX-License-Identifier: Apache-2.0
"""Samples of the model that trains, with their rewards, as a batch of a policy-gradient step.

For each step: sample groups with the decoding loop, reward their texts, and compute the
log-probability of every token anew with the training model, which also shows how far the sampler
is from it.

g groups    n samples of a group    t target position    L new tokens, at most
"""

import functools
import json
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config, decoding, processes, sharding
from t5x_lite.batch import Batch, SampleData
from t5x_lite.config.training_run import TrainingRun
from t5x_lite.config.windows import length_limits
from t5x_lite.data import layout
from t5x_lite.data.ragged import Ragged
from t5x_lite.evaluation import rewards
from t5x_lite.model import Transformer
from t5x_lite.tokenizers.vocabulary import TextVocabulary
from t5x_lite.training import frozen_base, token_losses
from t5x_lite.training.losses import policy
from t5x_lite.training.losses.cross_entropy import target_logits
from t5x_lite.utils.not_none import not_none

log = logging.getLogger(__name__)

# Log-probabilities of sampler and trainer that differ by more are reported: in nats, and of those
# below -1 as a share, for float32 has seven digits.
AGREEMENT = 1e-5


class SampledGroups(NamedTuple):
    """Texts of groups, before their rewards.

    Attributes:
      groups: input, texts and references of each.
      inputs: ids of each input.
      tokens: ids of each sample, group by group.
      log_probabilities: of these tokens as the sampler drew them, at temperature 1 and of what
        truncation left; end to end.
      unfinished: share of samples that reached the most tokens without an end.
    """

    groups: list[rewards.Group]
    inputs: list[list[int]]
    tokens: list[list[int]]
    log_probabilities: np.ndarray
    unfinished: float


class TokenScores(NamedTuple):
    """Log-probabilities [b t] of the tokens of samples.

    Attributes:
      current: under the model that trains.
      warmed: the same at Grpo.temperature; None at 1.
      reference: under the reference model; None without one.
    """

    current: Any
    warmed: Any
    reference: Any


class Rollout(NamedTuple):
    """Batch of a step, this host's rows of it, and what is reported of its samples."""

    batch: Batch
    values: dict[str, float]


def check_grpo(run: TrainingRun, has_inputs: bool) -> None:
    """Raises ValueError if the run's samples cannot be drawn or rewarded."""
    config.require(
        has_inputs,
        "Run.grpo continues inputs, and the task is text without any: name a task with inputs",
    )
    rewards.find_reward(not_none(run.grpo).reward)


class Sampler:
    """Draws and rewards the samples of each step of a run.

    Attributes:
      run: config of the run.
      vocabularies: of inputs and targets.
      warned: true once a warning has said that sampler and trainer differ, and why.

    Raises:
      ValueError: there is no such reward.
    """

    def __init__(self, run: TrainingRun, vocabularies: tuple[TextVocabulary, TextVocabulary]):
        self.run, self.cfg = run, not_none(run.grpo)
        self.vocabularies = vocabularies
        self.reward = rewards.find_reward(self.cfg.reward)
        self.lengths = length_limits(run.data.lengths, run.model.layout)
        self.decode = config.Decode(
            max_new_tokens=self.lengths.targets,
            temperature=self.cfg.temperature,
            top_k=self.cfg.top_k,
            top_p=self.cfg.top_p,
            seed=run.seed,
            n_best=self.cfg.samples,
            logprobs=0,
        )
        self.score = jax.jit(functools.partial(score_samples, run))
        self.warned = False

    def empty_batch(self) -> Batch:
        """A batch of the shapes of `draw`, this host's rows."""
        _, hosts = sharding.batch_share()
        rows = self.run.train.batch_size * self.cfg.samples // hosts
        batch = layout.empty_batch(rows, self.lengths)
        zeros = np.zeros(batch.targets.shape, np.float32)
        reference = zeros if self.cfg.has_reference else None
        return batch._replace(teacher_data=SampleData(zeros, zeros, reference))

    def draw(self, step: int, prompts: Batch, params: Any, constants: tuple[Any, Any]) -> Rollout:
        """Draws the samples of a step; they are a function of the weights, the seed and the step.

        Args:
          step: number of steps done before.
          prompts: the step's examples on all hosts, one in a row.
          params: the weights that train.
          constants: the reference's weights and the frozen base, each or None.

        Raises:
          ValueError: the reward is not a finite number for each text.
        """
        _, base = constants
        whole = frozen_base.whole_params(self.run, params, base)
        sampled = self.sample(step, prompts, decoding.prepare_params(self.run.model, whole))
        reward = self.reward_samples(sampled)
        batch = self.sample_batch(sampled)
        host, hosts = sharding.batch_share()
        size = len(batch.targets) // hosts
        local = slice(host * size, (host + 1) * size)
        placed = sharding.place_batch(jax.tree.map(lambda rows: rows[local], batch))
        scores = jax.device_get(self.score(params, *constants, placed))
        inside = batch.loss_weights > 0
        gap = self.compare(step, sampled, scores, inside)
        advantages = policy.group_advantages(reward, self.cfg.divide_by_deviation)
        samples = SampleData(
            (advantages.reshape(-1, 1) * inside).astype(np.float32),
            np.where(inside, scores.current, 0),
            None if scores.reference is None else np.where(inside, scores.reference, 0),
        )
        batch = batch._replace(teacher_data=samples)
        return Rollout(
            jax.tree.map(lambda rows: rows[local], batch),
            {
                "reward": float(reward.mean()),
                "reward_deviation": float(reward.std()),
                "sample_tokens": float(np.mean([len(ids) for ids in sampled.tokens])),
                "unfinished": sampled.unfinished,
                "equal_groups": float((advantages == 0).all(axis=1).mean()),
                "sampler_gap": gap,
            },
        )

    def sample(self, step: int, prompts: Batch, weights: Any) -> SampledGroups:
        """Samples the groups of a step.

        Args:
          step: number of the step.
          prompts: examples, one in a row.
          weights: prepared for decoding.
        """
        inputs, references = split_prompts(prompts)
        reader, writer = self.vocabularies
        numbers = [(step * len(inputs) + i) % 2**32 for i in range(len(inputs))]
        request = decoding.make_request(
            self.run.model, inputs, self.decode, rows=numbers, eos=writer.stops
        )
        result = decoding.generate(self.run.model, weights, request, self.decode)
        details = not_none(result.details)
        kept = np.arange(result.tokens.shape[2]) < result.lengths[..., None]
        drawn = details.log_probability - np.log1p(-np.minimum(details.truncated, 1 - 1e-6))
        tokens = [
            ids[:length].tolist()
            for ids, length in zip(
                result.tokens.reshape(-1, result.tokens.shape[2]),
                result.lengths.reshape(-1),
                strict=True,
            )
        ]
        texts = [writer.decode(ids) for ids in tokens]
        size = self.cfg.samples
        groups = [
            rewards.Group(reader.decode(ids), texts[i * size : (i + 1) * size], [answer])
            for i, (ids, answer) in enumerate(
                zip(inputs, map(writer.decode, references), strict=True)
            )
        ]
        unfinished = np.mean([ids[-1] not in writer.stops for ids in tokens])
        return SampledGroups(groups, inputs, tokens, np.asarray(drawn)[kept], float(unfinished))

    def reward_samples(self, sampled: SampledGroups) -> np.ndarray:
        """Rewards [g n], computed on the first process, whose numbers all take."""
        values = []
        if processes.is_first():
            values = rewards.reward_groups(self.cfg.reward, self.reward, sampled.groups).tolist()
        return np.array(json.loads(processes.broadcast_text(json.dumps(values))))

    def sample_batch(self, sampled: SampledGroups) -> Batch:
        """The samples of all hosts, one in a row, with the targets' weights."""
        size = self.cfg.samples
        inputs = [ids for ids in sampled.inputs for _ in range(size)]
        rows = np.arange(len(inputs))
        pair = join_ids(inputs), join_ids(sampled.tokens)
        return layout.build_batch(self.lengths, len(inputs), rows, pair)

    def compare(
        self, step: int, sampled: SampledGroups, scores: TokenScores, inside: np.ndarray
    ) -> float:
        """The largest difference, in nats, between the log-probability with which a token was drawn
        and the trainer's; warns once if it is large.

        Args:
          step: number of the step.
          sampled: the samples.
          scores: of their tokens.
          inside: [b t], true at these tokens.
        """
        current, drawn = scores.current[inside], sampled.log_probabilities
        if scores.warmed is not None:
            drawn = drawn + (scores.warmed - scores.current)[inside]
        apart = np.abs(current - drawn)
        gap = float(apart.max())
        agree = np.all(apart <= AGREEMENT * np.maximum(1, np.abs(current)))
        if not agree and not self.warned:
            self.warned = True
            log.warning(
                "Step %d drew samples with log-probabilities up to %.2g nats from those of the "
                "model that trains: %s",
                step,
                gap,
                self.explain_gap(),
            )
        return gap

    def explain_gap(self) -> str:
        """Why sampler and trainer differ, by the config."""
        cfg = self.cfg
        if cfg.temperature != 1:
            return f"Grpo.temperature is {cfg.temperature:g}"
        if cfg.top_k or cfg.top_p < 1:
            return "Grpo.top_k and Grpo.top_p leave tokens out"
        if self.run.model.dtype != "float32":
            return f"in Model.dtype {self.run.model.dtype} both round, in another order"
        return "both round, in another order"


def split_prompts(prompts: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the inputs and of the targets of rows of one example each."""
    written = prompts.loss_weights > 0
    if prompts.inputs is None:
        tokens, read = prompts.targets, prompts.prefix & (prompts.target_segments > 0)
    else:
        tokens, read = prompts.inputs, prompts.input_segments > 0
    inputs = [ids[there].tolist() for ids, there in zip(tokens, read, strict=True)]
    targets = [ids[there].tolist() for ids, there in zip(prompts.targets, written, strict=True)]
    return inputs, targets


def join_ids(rows: list[list[int]]) -> Ragged:
    """Rows of ids end to end."""
    return Ragged(np.array(sum(rows, []), np.int32), np.array([len(row) for row in rows]))


def score_samples(
    run: TrainingRun, params: Any, reference_params: Any, base: Any, batch: Batch
) -> TokenScores:
    """Computes the log-probabilities of the targets of a batch, replicated over the mesh.

    Args:
      run: config of the run.
      params: the weights that train.
      reference_params: weights of the reference model; None for those of the base.
      base: frozen weights under adapters; None without adapters.
      batch: samples, on the mesh.
    """
    cfg = not_none(run.grpo)
    transformer = Transformer(run.model, unroll=run.train.unroll)
    score = functools.partial(score_targets, transformer, run)
    whole = frozen_base.whole_params(run, params, base)
    current, warmed, reference = score(whole, batch), None, None
    if cfg.temperature != 1:
        warmed = score_targets(transformer, run, whole, batch, cfg.temperature)
    if cfg.has_reference:
        reference = score(base if reference_params is None else reference_params, batch)
    return jax.tree.map(lambda x: jax.reshard(x, P()), TokenScores(current, warmed, reference))


@sharding.split_rows()
def score_targets(
    transformer: Transformer, run: TrainingRun, params: Any, batch: Batch, temperature: float = 1.0
) -> jax.Array:
    """Log-probability [b t] of each target at a temperature.

    Args:
      transformer: the model.
      run: config of the run.
      params: its weights.
      batch: the rows.
      temperature: divides the logits.
    """
    if temperature == 1:
        return -token_losses.text_losses(transformer, run, params, batch).nll
    apply = functools.partial(transformer.apply, {"params": params})
    hidden = apply(batch, None, method=Transformer.hidden)
    logits = apply(hidden, method=Transformer.logits) / temperature
    return target_logits(logits, batch.targets) - jax.nn.logsumexp(logits, axis=-1)
