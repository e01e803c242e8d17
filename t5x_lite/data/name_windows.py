# SPDX-License-Identifier: Apache-2.0
"""Objectives of names: windows of code become inputs and targets, or tags."""

import logging
from typing import NamedTuple

import numpy as np

from t5x_lite import config
from t5x_lite.config import windows
from t5x_lite.config.checked import MOST_TOKENS
from t5x_lite.config.objectives import Objective
from t5x_lite.config.windows import LengthLimits
from t5x_lite.data import randomness
from t5x_lite.data.names import HiddenNames, Occurrence, Room, TokenText, hide_names
from t5x_lite.data.ragged import Ragged
from t5x_lite.data.spans import corrupt, noise_mask
from t5x_lite.tokenizers.token_bytes import token_bytes
from t5x_lite.tokenizers.vocabulary import TextVocabulary

log = logging.getLogger(__name__)

# Word that separates the draw of names from other draws of a window.
NAMES = 5


class ReadWindows:
    """Counts of windows of a data source.

    Attributes:
      total: windows.
      other: those that Python's tokenizer does not read.
      reported: they were logged.
    """

    def __init__(self):
        self.total = self.other = 0
        self.reported = False


class NameWindows(NamedTuple):
    """Cuts windows of code by their names.

    Attributes:
      objective: config of the objective.
      text: finds the names of a window.
      sentinels: ids of the sentinels [k].
      room: most tokens of inputs and targets without their ends.
      counts: windows so far.
    """

    objective: config.MaskedNames | config.NameTags
    text: TokenText
    sentinels: np.ndarray
    room: Room
    counts: ReadWindows

    def cut(self, texts: np.ndarray, keys: np.ndarray) -> tuple[Ragged, Ragged]:
        """Returns inputs and targets of windows [b t], without ends, by one key each [b]."""
        pairs = [self.cut_window(ids, keys[[row]]) for row, ids in enumerate(texts)]
        return join_rows([pair[0] for pair in pairs]), join_rows([pair[1] for pair in pairs])

    def cut_window(self, ids: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets of a window [t], by its key [1]."""
        names = self.read(ids)
        if isinstance(self.objective, config.NameTags):
            return ids, self.sentinels[self.tag(ids, names or {}).astype(int)].astype(ids.dtype)
        if not names:
            mask = self.mask_spans(len(ids), key, len(self.sentinels))
            inputs, targets = corrupt(ids[None], mask[None], self.sentinels)
            return inputs.tokens, targets.tokens
        hidden = self.hide(ids, names, key)
        return np.array(hidden.inputs, ids.dtype), np.array(hidden.targets, ids.dtype)

    def align(
        self, texts: np.ndarray, keys: np.ndarray, mode: np.ndarray
    ) -> tuple[Ragged, Ragged, np.ndarray]:
        """Returns inputs, targets and their weights, with a target for each input, as an encoder
        alone learns.

        Args:
          texts: windows [b t].
          keys: one uint64 for each [b].
          mode: ids that inputs begin with [m].
        """
        rows = [self.align_window(ids, keys[[row]]) for row, ids in enumerate(texts)]
        before = np.tile(mode.astype(texts.dtype), (len(texts), 1))
        inputs, targets = (
            np.hstack([before, np.stack([row[side] for row in rows])]) for side in (0, 1)
        )
        weights = np.hstack([np.zeros(before.shape), np.stack([row[2] for row in rows])])
        lengths = np.full(len(texts), inputs.shape[1])
        return (
            Ragged(inputs.reshape(-1), lengths),
            Ragged(targets.reshape(-1), lengths),
            weights.reshape(-1).astype(np.float32),
        )

    def align_window(
        self, ids: np.ndarray, key: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns inputs, targets and weights of a window [t], by its key [1]."""
        names = self.read(ids)
        if isinstance(self.objective, config.NameTags):
            tags = self.sentinels[self.tag(ids, names or {}).astype(int)].astype(ids.dtype)
            return ids, tags, np.full(len(ids), float(names is not None))
        if not names:
            mask = self.mask_spans(len(ids), key, None)
            return np.where(mask, self.sentinels[0], ids), ids, mask
        hidden = self.hide(ids, names, key)
        return np.where(hidden.mask, self.sentinels[hidden.labels], ids), ids, hidden.mask

    def read(self, ids: np.ndarray) -> dict[str, list[Occurrence]] | None:
        """Returns the names of a window; None, which is counted, for one that is no code."""
        names = self.text.find_names(ids)
        self.counts.total += 1
        self.counts.other += names is None
        return names

    def report(self, name: str) -> None:
        """Logs once how many windows of a source were no Python code, if any were."""
        if self.counts.other and not self.counts.reported:
            self.counts.reported = True
            log.warning(
                "%s: %d of %d windows are no Python code: %s",
                name,
                self.counts.other,
                self.counts.total,
                "spans are hidden there"
                if isinstance(self.objective, config.MaskedNames)
                else "they have no tags",
            )

    def hide(
        self, ids: np.ndarray, names: dict[str, list[Occurrence]], key: np.ndarray
    ) -> HiddenNames:
        """Returns a window with names hidden that are drawn by its key.

        Args:
          ids: tokens of the window [t].
          names: occurrences of each name.
          key: uint64 [1].
        """
        assert isinstance(self.objective, config.MaskedNames)
        draws = randomness.keys(NAMES, key + np.arange(len(names), dtype=np.uint64))
        count = max(round(self.objective.share * len(names)), 1)
        every = list(names)
        order = [every[number] for number in np.argsort(draws, kind="stable")[:count]]
        return hide_names(ids, names, order, self.sentinels, self.room, self.text.space)

    def mask_spans(self, tokens: int, key: np.ndarray, most: int | None) -> np.ndarray:
        """Mask [t] of the spans that are hidden in a window that is no code.

        Args:
          tokens: tokens of the window.
          key: its key [1].
          most: most spans; None for any number.
        """
        assert isinstance(self.objective, config.MaskedNames)
        density, span = self.objective.noise_density, self.objective.mean_span
        shape = windows.noise_and_spans(tokens, density, span, most)
        return noise_mask(tokens, *shape, key)[0]

    def tag(self, ids: np.ndarray, names: dict[str, list[Occurrence]]) -> np.ndarray:
        """Mask [t] of the tokens of names."""
        mask = np.zeros(len(ids), bool)
        for places in names.values():
            for place in places:
                mask[place.begin : place.end] = True
        return mask


def join_rows(rows: list[np.ndarray]) -> Ragged:
    """Rows of different lengths, end to end."""
    return Ragged(np.concatenate(rows), np.array([len(row) for row in rows]))


def make_name_windows(
    objective: Objective, lengths: LengthLimits, vocabulary: TextVocabulary, mode: int
) -> NameWindows | None:
    """Makes the cutter of an objective that reads names; None for any other objective.

    Args:
      objective: its config.
      lengths: limits of the rows.
      vocabulary: of the text.
      mode: number of tokens before the inputs that name the denoiser.

    Raises:
      ValueError: the vocabulary does not say what its ids write.
    """
    if not isinstance(objective, config.MaskedNames | config.NameTags):
        return None
    room = Room(lengths.inputs - mode - 1, lengths.targets - 1)
    if lengths.layout == "encoder_only":
        room = Room(MOST_TOKENS, MOST_TOKENS)  # targets stand beside the inputs
    text = TokenText(token_bytes(vocabulary))
    return NameWindows(objective, text, vocabulary.sentinel_ids, room, ReadWindows())
