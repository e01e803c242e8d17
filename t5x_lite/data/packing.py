# SPDX-License-Identifier: Apache-2.0
"""Packing of examples into rows: a plan computed once, from lengths alone.

Examples of equal lengths form a class. The plan fixes how many examples of each class stand in
each row; an epoch only determines which of them, and the order of the rows. So the number of rows
of an epoch is known, and any row of any epoch can be computed without those before it.
"""

from typing import NamedTuple

import numpy as np

from t5x_lite.data import randomness

CLASSES = 20_000  # beyond so many different lengths they are rounded up, to bound planning time


class Pattern(NamedTuple):
    """Rows that each take examples of a class after those of another pattern.

    Attributes:
      before: number of the other pattern, -1 for new rows.
      group: number of the class.
      count: examples of the class in each row.
    """

    before: int
    group: int
    count: int


class PackingPlan(NamedTuple):
    """Rows by pattern, patterns by entry, examples by class.

    Each of the rows of pattern p takes, for each of its entries e, entry_count[e] examples of class
    entry_class[e].

    Attributes:
      pattern_first: pattern p covers rows pattern_first[p] to pattern_first[p + 1] - 1.
      entry_first: pattern p has entries entry_first[p] to entry_first[p + 1] - 1.
      entry_class: class of an entry.
      entry_count: examples of it in each row.
      entry_rank: rank in the class of the first example of the pattern's first row.
      class_first: class c has members class_first[c] to class_first[c + 1] - 1.
      members: numbers of the examples, class by class.
    """

    pattern_first: np.ndarray
    entry_first: np.ndarray
    entry_class: np.ndarray
    entry_count: np.ndarray
    entry_rank: np.ndarray
    class_first: np.ndarray
    members: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.pattern_first[-1])


class Slots(NamedTuple):
    """Examples in rows: example[i] stands in row[i], which counts the selected rows from 0."""

    row: np.ndarray
    example: np.ndarray


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on, end to end."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def length_classes(lengths: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lengths [k d], and the class of each example [n] from its lengths [n d].

    Where there are more than CLASSES, lengths are rounded up to multiples of 2, 4 and so on, but
    never above the capacity.
    """
    step = 1
    while True:
        rounded = np.minimum(-(-lengths // step) * step, capacity)
        flat = rounded[:, 0].astype(np.int64)
        for column in range(1, lengths.shape[1]):
            flat = flat * (int(capacity[column]) + 1) + rounded[:, column]
        _, index, inverse = np.unique(flat, return_index=True, return_inverse=True)
        if len(index) <= CLASSES:
            return rounded[index], inverse
        step *= 2


class Bins:
    """Open rows, grouped by their pattern: the number of rows and the room left in each."""

    def __init__(self, capacity: np.ndarray):
        self.capacity = capacity
        self.room = np.zeros((0, len(capacity)), np.int64)
        self.rows = np.zeros(0, np.int64)
        self.pattern = np.zeros(0, np.int64)
        self.used = 0
        self.patterns: list[Pattern] = []
        self.closed: list[tuple[int, int]] = []

    def best(self, lengths: np.ndarray) -> int | None:
        """Returns the group with the least room that still takes an example of these lengths."""
        room = self.room[: self.used]
        fits = (self.rows[: self.used] > 0) & (room >= lengths).all(axis=1)
        candidates = np.flatnonzero(fits)
        if not len(candidates):
            return None
        return int(candidates[np.argmin((room[candidates] / self.capacity).sum(axis=1))])

    def add(self, rows: int, room: np.ndarray, pattern: int) -> None:
        """Adds a group of open rows.

        Args:
          rows: their number.
          room: tokens left in each [d].
          pattern: number of their pattern.
        """
        if rows == 0:
            return
        if self.used == len(self.rows):
            grown = max(64, 2 * self.used)
            self.room = np.resize(self.room, (grown, len(self.capacity)))
            self.rows = np.resize(self.rows, grown)
            self.pattern = np.resize(self.pattern, grown)
        self.room[self.used], self.rows[self.used] = room, rows
        self.pattern[self.used] = pattern
        self.used += 1

    def place(self, group: int, lengths: np.ndarray, count: int, source: int | None) -> int:
        """Places examples of a class in rows of one group, each as full as possible.

        Args:
          group: number of the class.
          lengths: of its examples [d].
          count: examples to place.
          source: group of rows to fill; None opens as many new rows as are needed.

        Returns:
          The number of examples that were placed.
        """
        room = self.capacity if source is None else self.room[source].copy()
        pattern = -1 if source is None else int(self.pattern[source])
        each = int((room // lengths).min())
        rows = -(-count // each) if source is None else int(self.rows[source])
        full = min(count // each, rows)
        rest = count - full * each if full < rows else 0
        for number, taken in ((full, each), (1 if rest else 0, rest)):
            if number:
                self.patterns.append(Pattern(pattern, group, taken))
                self.add(number, room - taken * lengths, len(self.patterns) - 1)
        if source is not None:
            self.rows[source] -= full + (1 if rest else 0)
        return full * each + rest

    def close(self, least: np.ndarray) -> None:
        """Removes the groups with no room for any of the remaining examples."""
        rows, room = self.rows[: self.used], self.room[: self.used]
        shut = (rows > 0) & (room < least).any(axis=1)
        patterns = self.pattern[: self.used][shut].tolist()
        self.closed += zip(patterns, rows[shut].tolist(), strict=True)
        keep = np.flatnonzero((rows > 0) & ~shut)
        for name in ("room", "rows", "pattern"):
            array = getattr(self, name)
            array[: len(keep)] = array[keep]
        self.used = len(keep)


def best_fit(lengths: np.ndarray, counts: np.ndarray, capacity: np.ndarray) -> Bins:
    """Best fit decreasing over classes of lengths.

    An example goes to the row with the least room, summed over the lengths as shares of the
    capacity, that takes it; largest examples first. (Of bins of equal size, best fit decreasing
    needs at most 11/9 of the fewest possible: Johnson, 1973.)

    Args:
      lengths: of each class [k d].
      counts: examples of each class [k].
      capacity: of a row [d].
    """
    order = np.argsort(-(lengths / capacity).sum(axis=1), kind="stable")
    least = np.minimum.accumulate(lengths[order][::-1], axis=0)[::-1]
    bins = Bins(capacity)
    for turn, group in enumerate(order):
        if turn % 64 == 0:
            bins.close(least[turn])
        left = int(counts[group])
        while left:
            source = bins.best(lengths[group])
            left -= bins.place(int(group), lengths[group], left, source)
    bins.close(capacity + 1)
    return bins


def make_plan(lengths: np.ndarray, capacity: tuple[int, ...], pack: bool) -> PackingPlan:
    """Plans the rows of examples.

    Args:
      lengths: of the examples, none above the capacity [n d].
      capacity: of a row [d].
      pack: false gives every example a row of its own.
    """
    limits = np.array(capacity, np.int64)
    if not pack:
        return unpacked_plan(len(lengths))
    lengths = np.maximum(lengths, 1)  # an empty example still needs a place
    shapes, class_of = length_classes(lengths, limits)
    counts = np.bincount(class_of, minlength=len(shapes))
    bins = best_fit(shapes, counts, limits)
    entries: list[tuple[int, int]] = []
    entry_first, rows = [0], []
    for pattern, number in bins.closed:
        while pattern >= 0:
            before, group, count = bins.patterns[pattern]
            entries.append((group, count))
            pattern = before
        entry_first.append(len(entries))
        rows.append(number)
    pattern_first = np.concatenate([[0], np.cumsum(rows)])
    entry_class, entry_count = np.array(entries, np.int64).T
    entry_first = np.array(entry_first)
    taken = entry_count * np.repeat(np.array(rows), np.diff(entry_first))
    return PackingPlan(
        pattern_first=pattern_first,
        entry_first=entry_first,
        entry_class=entry_class,
        entry_count=entry_count,
        entry_rank=ranks(entry_class, taken),
        class_first=np.concatenate([[0], np.cumsum(counts)]),
        members=np.argsort(class_of, kind="stable"),
    )


def ranks(entry_class: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Rank in its class at which each entry begins, entries taking ranks in turn."""
    order = np.argsort(entry_class, kind="stable")
    before = np.cumsum(taken[order]) - taken[order]
    begins = np.searchsorted(entry_class[order], entry_class[order], side="left")
    result = np.empty_like(before)
    result[order] = before - before[begins]
    return result


def unpacked_plan(examples: int) -> PackingPlan:
    """Plan in which row i holds one example of a single class."""
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    whole = np.array([0, examples])
    return PackingPlan(whole, np.array([0, 1]), zero, one, zero, whole, np.arange(examples))


def find_slots(plan: PackingPlan, rows: np.ndarray, epochs: np.ndarray, key: int | None) -> Slots:
    """Selects the examples of rows.

    Args:
      plan: of the split.
      rows: numbers of the rows [n].
      epochs: epoch of each row [n].
      key: random key of the assignment; None keeps the order of the plan.
    """
    pattern = np.searchsorted(plan.pattern_first, rows, side="right") - 1
    entries = plan.entry_first[pattern + 1] - plan.entry_first[pattern]
    row = np.repeat(np.arange(len(rows)), entries)
    entry = plan.entry_first[pattern][row] + ranges(entries)
    counts = plan.entry_count[entry]
    within = (rows - plan.pattern_first[pattern])[row] * counts + plan.entry_rank[entry]
    row, group = np.repeat(row, counts), np.repeat(plan.entry_class[entry], counts)
    rank = np.repeat(within, counts) + ranges(counts)
    first = plan.class_first[group]
    if key is not None:
        # One permutation per epoch and class; the constant keeps (epoch, class) pairs apart.
        salt = randomness.keys(key, epochs[row] * len(plan.class_first) + group)
        rank = randomness.permute(rank, plan.class_first[group + 1] - first, salt)
    return Slots(row, plan.members[first + rank])
