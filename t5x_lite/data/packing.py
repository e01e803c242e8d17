# SPDX-License-Identifier: Apache-2.0
"""Which lengths share a row: a plan made once, from lengths alone.

Examples of equal lengths form a class. The plan fixes how many examples of each class stand in
each row; an epoch only decides which of them, and in which order the rows come. So the number of
rows of an epoch is known, and any row of any epoch can be found without those before it.
"""

from typing import NamedTuple

import numpy as np

from t5x_lite.data import randomness

CLASSES = 20_000  # beyond so many different lengths they are rounded up, to bound planning time


class Pattern(NamedTuple):
    """`rows` rows that each take `count` examples of a class after those of the pattern before."""

    before: int
    group: int
    count: int


class Plan(NamedTuple):
    """Rows by pattern, patterns by entry, examples by class; every `first` has one more element.

    Pattern p covers rows pattern_first[p]..pattern_first[p + 1]. Its entries e say that each of
    its rows takes entry_count[e] examples of class entry_class[e]; those of its first row have
    ranks from entry_rank[e] in the class. members[class_first[c]:class_first[c + 1]] are the
    examples of class c.
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
    """Examples in rows: example[i] stands in row[i], which counts the rows asked for from 0."""

    row: np.ndarray
    example: np.ndarray


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[0] - 1, 0 .. counts[1] - 1, and so on, end to end."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def classes(lengths: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    """Open rows, grouped by the pattern they carry: how many there are and what room is left."""

    def __init__(self, capacity: np.ndarray):
        self.capacity = capacity
        self.room = np.zeros((0, len(capacity)), np.int64)
        self.rows = np.zeros(0, np.int64)
        self.pattern = np.zeros(0, np.int64)
        self.used = 0
        self.patterns: list[Pattern] = []
        self.closed: list[tuple[int, int]] = []

    def best(self, lengths: np.ndarray) -> int | None:
        """The group with the least room that still takes an example of these lengths."""
        room = self.room[: self.used]
        fits = (self.rows[: self.used] > 0) & (room >= lengths).all(axis=1)
        candidates = np.flatnonzero(fits)
        if not len(candidates):
            return None
        return int(candidates[np.argmin((room[candidates] / self.capacity).sum(axis=1))])

    def add(self, rows: int, room: np.ndarray, pattern: int) -> None:
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
        """Puts up to count examples of a class in rows of one group, each as full as it gets.

        Returns how many found a place. source None opens new rows, as many as are needed.
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
        """Takes out the groups with no room for any example that is still to come."""
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
    """Best fit decreasing over classes of lengths [k d], counts[c] examples each.

    An example goes to the row with the least room, summed over the lengths as shares of the
    capacity, that takes it; largest examples first. (Of bins of equal size, best fit decreasing
    needs at most 11/9 of the fewest possible: Johnson, 1973.)
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


def plan(lengths: np.ndarray, capacity: tuple[int, ...], pack: bool) -> Plan:
    """The plan for examples of these lengths [n d], none above the capacity [d].

    Without packing every example has a row of its own.
    """
    limits = np.array(capacity, np.int64)
    if not pack:
        return alone(len(lengths))
    lengths = np.maximum(lengths, 1)  # an empty example still needs a place
    shapes, class_of = classes(lengths, limits)
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
    return Plan(
        pattern_first=pattern_first,
        entry_first=entry_first,
        entry_class=entry_class,
        entry_count=entry_count,
        entry_rank=ranks(entry_class, taken),
        class_first=np.concatenate([[0], np.cumsum(counts)]),
        members=np.argsort(class_of, kind="stable"),
    )


def ranks(entry_class: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The rank in its class at which each entry begins, entries taking ranks in turn."""
    order = np.argsort(entry_class, kind="stable")
    before = np.cumsum(taken[order]) - taken[order]
    begins = np.searchsorted(entry_class[order], entry_class[order], side="left")
    result = np.empty_like(before)
    result[order] = before - before[begins]
    return result


def alone(examples: int) -> Plan:
    """The plan in which row i holds one example of a single class."""
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    whole = np.array([0, examples])
    return Plan(whole, np.array([0, 1]), zero, one, zero, whole, np.arange(examples))


def find(plan: Plan, rows: np.ndarray, epochs: np.ndarray, key: int | None) -> Slots:
    """The examples of rows[i] of the plan in epoch epochs[i]; in plan order if key is None."""
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
