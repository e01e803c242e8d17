# SPDX-License-Identifier: Apache-2.0
"""Lattices: the texts of a beam search as a graph, those that it dropped included where they merge.

Hypotheses of one length that end with the same n tokens are one node (recombination; Och et al.,
2001; Xu, Jonnalagadda and Durrett, 2022, arXiv 2112.07660): a text that was dropped goes on as the
one that was kept. So a search of few beams has many more texts.

b rows    k beams    m continuations of a step
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_lite import config
from t5x_lite.decoding import generation
from t5x_lite.decoding.beam_ranking import LengthPenalty, make_length_penalty
from t5x_lite.decoding.beam_selection import BeamContinuations
from t5x_lite.decoding.generation import ChoiceRules, DecodeProgram
from t5x_lite.decoding.request import Request
from t5x_lite.model.computation import with_dtype_of


class LatticeEdge(NamedTuple):
    """A token between two nodes.

    Attributes:
      source: number of the node before it.
      target: number of the node after it; larger.
      token: its id.
      log_probability: of the token after the text that was searched, in nats.
    """

    source: int
    target: int
    token: int
    log_probability: float


class Lattice(NamedTuple):
    """Graph of texts: every path from node 0 to an end is one.

    Attributes:
      edges: in the order of their targets.
      ends: nodes in which texts end.
    """

    edges: list[LatticeEdge]
    ends: list[int]

    def count_paths(self) -> int:
        """Number of texts."""
        ways = {0: 1}
        for edge in self.edges:
            ways[edge.target] = ways.get(edge.target, 0) + ways.get(edge.source, 0)
        return sum(ways.get(end, 0) for end in self.ends)

    def list_paths(self) -> Iterator[tuple[list[int], float]]:
        """Yields the ids of every text, and the sum of its log-probabilities."""
        after: dict[int, list[LatticeEdge]] = {}
        for edge in self.edges:
            after.setdefault(edge.source, []).append(edge)
        ends, stack = {*self.ends}, [(0, [], 0.0)]
        while stack:
            node, tokens, total = stack.pop()
            if node in ends:
                yield tokens, total
            for edge in after.get(node, []):
                stack.append((edge.target, [*tokens, edge.token], total + edge.log_probability))


def search_lattices(
    cfg: config.Model, params: Any, request: Request, decode: config.Decode, merged: int
) -> list[Lattice]:
    """Searches with beams, and returns the lattice of each row.

    Args:
      cfg: config of the model.
      params: weights from `prepare_params`.
      request: the rows.
      decode: limits and beams.
      merged: n, tokens in which texts agree that are merged.

    Raises:
      ValueError: there are no beams, groups of them, or n is below 1.
    """
    config.require(decode.beams > 1, "A lattice is of a beam search: set Decode.beams to 2 or more")
    config.require(decode.beam_groups == 1, "A lattice is of one group of beams: leave out groups")
    config.require(merged >= 1, f"Texts are merged that agree in 1 or more tokens; got {merged}")
    program = generation.make_program(with_dtype_of(cfg, params), decode)
    placed = generation.place_request(request)
    rules = generation.make_rules(request, decode)
    penalty = make_length_penalty(decode)
    history = jax.device_get(compiled_history(program, params, placed, rules, penalty))
    stops = np.atleast_1d(request.eos).tolist()
    limits = np.asarray(request.limit).tolist()
    rows = zip(*history, limits, strict=True)
    return [
        build_lattice(BeamContinuations(*parts), decode.beams, stops, (limit, merged))
        for *parts, limit in rows
    ]


@functools.partial(jax.jit, static_argnums=0)
def compiled_history(
    program: DecodeProgram,
    params: Any,
    request: Request,
    rules: ChoiceRules,
    penalty: LengthPenalty,
) -> BeamContinuations:
    """Returns the continuations of every step of a beam search, [b steps m].

    Args:
      program: static arguments.
      params: weights of the model.
      request: the rows, on the mesh.
      rules: by which the next token is chosen.
      penalty: length penalty.
    """
    state, _ = generation.run_beams(program, params, request, rules, penalty, program.length)
    return jax.tree.map(lambda x: jax.reshard(x, P()), state.history)


def build_lattice(
    history: BeamContinuations, beams: int, stops: Sequence[int], sizes: tuple[int, int]
) -> Lattice:
    """Builds the lattice of one row.

    Args:
      history: continuations of every step, [steps m], best first; minus infinity where none is.
      beams: k.
      stops: ids that end a text.
      sizes: most new tokens, and n.
    """
    limit, merged = sizes
    texts, nodes, totals = {0: ()}, {0: 0}, {0: 0.0}
    known, edges, ends = 1, {}, set()
    for step in range(min(limit, len(history.token))):
        rows = zip(*(part[step].tolist() for part in history), strict=True)
        rows = [row for row in rows if np.isfinite(row[2])]
        if not rows:
            break
        here: dict[tuple, int] = {}
        after: tuple[dict, dict, dict] = ({}, {}, {})
        dropped = []
        for place, (parent, token, total) in enumerate(rows):
            text = (*texts[parent], token)
            edge = nodes[parent], token, total - totals[parent]
            key = (token in stops, *text[-merged:])
            beam = len(after[0])
            survives = token not in stops and beam < beams
            if not survives and not (token in stops and place < beams):
                dropped.append((key, edge))
                continue
            if key not in here:
                here[key], known = known, known + 1
            add_edge(edges, edge, here[key])
            if token in stops or step == limit - 1:
                ends.add(here[key])
            if survives:
                after[0][beam], after[1][beam], after[2][beam] = text, here[key], total
        for key, edge in dropped:
            if key in here:
                add_edge(edges, edge, here[key])
        texts, nodes, totals = after
    return keep_reachable(edges, ends)


def add_edge(edges: dict, edge: tuple[int, int, float], target: int) -> None:
    """Adds an edge; of two with the same token between the same nodes, the more probable one stays.

    Args:
      edges: log-probabilities by (source, target, token).
      edge: source, token and log-probability.
      target: node after it.
    """
    source, token, log_probability = edge
    key = source, target, token
    edges[key] = max(edges.get(key, -np.inf), log_probability)


def keep_reachable(edges: dict, ends: set[int]) -> Lattice:
    """Returns the lattice of the nodes from which an end can be reached, numbered anew."""
    useful = {*ends}
    for source, target, _ in sorted(edges, key=lambda key: -key[1]):
        if target in useful:
            useful.add(source)
    numbers = {node: number for number, node in enumerate(sorted(useful | {0}))}
    kept = [
        LatticeEdge(numbers[source], numbers[target], token, edges[source, target, token])
        for source, target, token in sorted(edges, key=lambda key: (key[1], key[0], key[2]))
        if target in useful
    ]
    return Lattice(kept, sorted(numbers[end] for end in ends))
