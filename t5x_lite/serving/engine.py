# SPDX-License-Identifier: Apache-2.0
"""Engine that writes the texts of many requests: a queue, and one thread that computes."""

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax

from t5x_lite import config, sharding
from t5x_lite.evaluation.predict import Predictor
from t5x_lite.model import adapter_banks
from t5x_lite.serving.completion import (
    Completion,
    CompletionChunk,
    EngineClosedError,
    FinishReason,
    QueueFullError,
    TextRequest,
)
from t5x_lite.serving.lane import Lane
from t5x_lite.serving.limits import DEFAULT_LIMITS, EngineGauges, EngineLimits
from t5x_lite.serving.prefix_cache import PrefixCache
from t5x_lite.serving.prompt_reading import PromptReading
from t5x_lite.serving.rehearsal import Rehearsals
from t5x_lite.serving.row_text import LaneKey, RowText, make_text

# Seconds between two looks at texts that wait for programs alone.
LOOK_SECONDS = 0.05


class Engine:
    """Writes completions; one thread computes, any thread may submit.

    The text of a request is that of `Predictor.predict` for it alone, whatever else is written, in
    whatever order requests arrive.

    Attributes:
      limits: sizes.
      predictors: the model with all adapters, by name of each; "" for none of them.
      waiting: texts that have no row yet, in order of arrival.
      lanes: rows by their settings, the one used last at the end.
      reading: the long prompt that is being read; None for none.
      prefixes: beginnings of prompts that were read.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: EngineLimits = DEFAULT_LIMITS,
        adapters: Mapping[str, Predictor] | None = None,
    ):
        """Starts the thread, which computes on the mesh in force.

        Args:
          predictor: the model.
          limits: sizes.
          adapters: predictors of `with_adapters`, which share the model's weights, by name.

        Raises:
          ValueError: the mesh cannot split the rows.
        """
        self.mesh = jax.sharding.get_mesh()
        shards = sharding.batch_shards()
        config.require(
            limits.rows % shards == 0,
            f"EngineLimits.rows {limits.rows} cannot be split over {shards} parts of the mesh: "
            "take a multiple",
        )
        adapters = adapters or {}
        predictor = add_adapters(predictor, [*adapters.values()])
        self.limits, self.predictors = limits, dict.fromkeys(["", *adapters], predictor)
        self.waiting: deque[RowText] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.lanes: dict[LaneKey, Lane] = {}
        self.reading: PromptReading | None = None
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.rehearsals = Rehearsals(self.make_lane, self.notify, self.mesh)
        self.changed = threading.Condition()
        self.closing = self.aborting = False
        self.passes, self.finished = 0, Counter[str]()
        self.prompt_tokens, self.cached_tokens, self.tokens, self.accepted = 0, 0, 0, 0
        self.thread = threading.Thread(target=self.run_loop, name="engine", daemon=True)
        self.thread.start()

    def submit(
        self, request: TextRequest, on_chunk: Callable[[CompletionChunk], None] | None = None
    ) -> Completion:
        """Puts a request into the queue.

        Args:
          request: the request.
          on_chunk: called with every chunk in the engine's thread, in place of iteration; it must
            not block.

        Returns:
          The completion, which begins at once or when a row is free.

        Raises:
          ValueError: the model cannot read the prompt, or the engine does not serve the settings.
          QueueFullError: `limits.queue` requests wait already.
          EngineClosedError: the engine is closing.
        """
        self.check_open()
        text = make_text(Completion(request, on_chunk), self.predictors, self.limits)
        with self.changed:
            self.check_open()
            self.waiting.append(text)
            self.changed.notify()
        return text.completion

    def check_open(self) -> None:
        """Raises EngineClosedError or QueueFullError where the engine takes no request now."""
        if self.closing:
            raise EngineClosedError("The engine is closing and takes no more requests")
        if len(self.waiting) >= self.limits.queue:
            raise QueueFullError(f"{self.limits.queue} requests wait already: try again later")

    def call(self, function: Callable[[], Any]) -> Future:
        """Runs a function in the engine's thread between two blocks: embeddings, scores, beams.

        Returns:
          The future of what it returns.

        Raises:
          EngineClosedError: the engine is closing.
        """
        future: Future = Future()
        with self.changed:
            if self.closing:
                raise EngineClosedError("The engine is closing and takes no more requests")
            self.calls.append((function, future))
            self.changed.notify()
        return future

    def gauges(self) -> EngineGauges:
        """Returns the numbers of the engine now."""
        return EngineGauges(
            rows=self.limits.rows,
            rows_used=sum(lane.used for lane in [*self.lanes.values()]),
            queued=len(self.waiting),
            finished=dict(self.finished),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            prefix_bytes=self.prefixes.used_bytes,
            tokens=self.tokens,
            accepted=self.accepted,
            passes=self.passes,
        )

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, ends those that it has, and waits for the thread's end.

        Args:
          drain: finishes the texts, those that wait too; False cancels them.
        """
        with self.changed:
            self.closing, self.aborting = True, self.aborting or not drain
            self.changed.notify()
        self.thread.join()
        self.rehearsals.close()

    def notify(self) -> None:
        """Wakes the engine's thread: what it waits for may be there."""
        with self.changed:
            self.changed.notify()

    def cancel_all(self) -> None:
        """Takes no more requests, and cancels those that it has; does not wait for their end."""
        with self.changed:
            self.closing = self.aborting = True
            self.changed.notify()

    def run_loop(self) -> None:
        """Computes until the engine is closed and every text has ended."""
        try:
            with contextlib.nullcontext() if self.mesh.empty else jax.set_mesh(self.mesh):
                while self.wait_for_work():
                    self.run_calls()
                    self.drop_unwanted()
                    self.admit_waiting()
                    for lane in [*self.lanes.values()]:
                        if lane.writes:
                            self.advance_lane(lane)
        except BaseException as error:  # nobody else would end what waits
            self.closing = True
            self.fail([*self.waiting, *self.list_texts()], error)
            for _, future in self.calls:
                future.set_exception(error)
            raise

    def list_texts(self) -> list[RowText]:
        """The texts that have a row."""
        return [text for lane in self.lanes.values() for text in lane.texts if text is not None]

    def wait_for_work(self) -> bool:
        """Waits until there is something to do; False once the engine is closed and empty."""

        def ready() -> bool:
            return bool(self.calls or self.list_texts() or any(map(is_ready, self.waiting)))

        is_ready = self.rehearsals.is_ready
        with self.changed:
            # Those whose programs are being compiled may be cancelled or expire.
            wait = LOOK_SECONDS if self.waiting else None
            self.changed.wait_for(lambda: ready() or self.closing, wait)
            return bool(ready() or self.waiting or not self.closing)

    def run_calls(self) -> None:
        """Runs the functions of `call`."""
        while self.calls:
            function, future = self.calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

    def drop_unwanted(self) -> None:
        """Ends the texts that are cancelled or past their deadline, with a row or without."""
        with self.changed:
            ends = {text: self.end_reason(text) for text in [*self.waiting, *self.list_texts()]}
            self.waiting = deque(text for text in self.waiting if ends[text] is None)
        for lane in self.lanes.values():
            lane.remove([text for text, reason in ends.items() if reason is not None])
        for text, reason in ends.items():
            if reason is not None:
                self.send(text, reason)

    def end_reason(self, text: RowText) -> FinishReason | None:
        """Returns why a text is to end before its time; None if it goes on."""
        completion = text.completion
        if self.aborting or completion.cancelled.is_set():
            return "cancelled"
        deadline = completion.request.deadline
        return "expired" if deadline is not None and time.monotonic() > deadline else None

    def admit_waiting(self) -> None:
        """Reads inputs, as many ids as the budget allows: a chunk of a long prompt, then waiting
        texts that get free rows, then more of the prompt if no row waits for its next block."""
        budget = self.limits.prefill_budget - self.read_chunk()
        while budget > 0 and (count := self.admit_next()):
            budget -= count
        while budget > 0 and not any(lane.writes for lane in self.lanes.values()):
            if not (count := self.read_chunk()):
                return
            budget -= count

    def admit_next(self) -> int:
        """Gives free rows to the oldest texts that are read together.

        Returns:
          The number of ids that were read, and at least 1; 0 if no text can have a row.
        """
        lane, texts = self.take_alike()
        if not texts:
            return 0
        try:
            lane = lane or self.open_lane(texts[0])
            if texts[0].is_long:
                lane.reserve(texts[0])
                self.reading = PromptReading(lane, texts[0], self.prefixes)
                texts[0].completion.usage.cached_tokens = self.reading.cached_tokens
                self.cached_tokens += self.reading.cached_tokens
            else:
                lane.join(texts)
        except Exception as error:
            self.fail([text for text in texts if not text.reading], error)
            self.drop_lane(texts[0].key, error)
            return 1
        self.prompt_tokens += sum(text.completion.usage.prompt_tokens for text in texts)
        if texts[0].reading:
            return 1
        return lane.rows_of_prefill(texts[0]) * sum(texts[0].widths())

    def read_chunk(self) -> int:
        """Reads a chunk of the long prompt, whose text joins its lane after the last one.

        Returns:
          The number of ids that were read; 0 if there is none.
        """
        reading, self.reading = self.reading, None
        if reading is None or reading.text not in self.list_texts():
            return 0
        try:
            count = 0 if reading.is_done else reading.read_next()
            if reading.is_done:
                reading.finish()
                reading.text.reading = False
            else:
                self.reading = reading
        except Exception as error:
            self.drop_lane(reading.text.key, error)
            return 1
        return max(count, 1)

    def take_alike(self) -> tuple[Lane | None, list[RowText]]:
        """Takes the oldest text that has a free row, and others that are read in one program.

        A text whose settings wait for a lane holds up the younger ones, so that it gets one.

        Returns:
          Their lane, None for one that is still to be opened, and the texts.
        """
        with self.changed:
            ready = [text for text in self.waiting if self.rehearsals.is_ready(text)]
            for first in ready:
                if first.is_long and self.reading is not None:
                    continue
                lane = self.lanes.get(first.key)
                if lane is None:
                    busy = [each for each in self.lanes.values() if each.used]
                    most = 1 if len(busy) < self.limits.lanes else 0
                else:
                    most = min(len(lane.free), lane.rows_of_prefill(first))
                if most:
                    most = 1 if first.is_long else most
                    alike = [text for text in ready if text.is_read_with(first)][:most]
                    for text in alike:
                        self.waiting.remove(text)
                    return lane, alike
                if lane is None:
                    break
        return None, []

    def open_lane(self, text: RowText) -> Lane:
        """Returns a new lane for a text, in place of an idle one if there are too many."""
        if len(self.lanes) >= self.limits.lanes:
            idle = next(key for key, lane in self.lanes.items() if not lane.used)
            del self.lanes[idle]
        lane = self.make_lane(text)
        self.lanes[text.key] = lane
        return lane

    def make_lane(self, text: RowText) -> Lane:
        """Returns a lane for texts like one."""
        return Lane(text.key, self.predictors[""], self.limits, [*self.predictors])

    def advance_lane(self, lane: Lane) -> None:
        """Writes a block of the texts of a lane, and sends what is new."""
        try:
            advanced = lane.advance()
        except Exception as error:
            self.drop_lane(lane.key, error)
            return
        self.passes += lane.passes
        for text, added, reason in advanced:
            self.tokens += added
            if reason is not None or text.completion.request.streamed:
                self.send(text, reason)

    def send(self, text: RowText, reason: FinishReason | None) -> None:
        """Sends what is new of a text.

        Args:
          text: the text.
          reason: why it has ended; None if it goes on.
        """
        try:
            text.completion.on_chunk(text.chunk(reason))
        except Exception as error:
            if reason is None:
                self.lanes[text.key].remove([text])
            self.fail([text], error)
            return
        if reason is not None:
            self.accepted += text.completion.usage.accepted
            self.finished[reason] += 1

    def fail(self, texts: list[RowText], error: BaseException) -> None:
        """Ends texts with an error."""
        for text in texts:
            text.completion.error = error
            self.finished["error"] += 1
            with contextlib.suppress(Exception):  # a listener that fails has no other
                text.completion.on_chunk(CompletionChunk("", [], [], "error"))

    def drop_lane(self, key: LaneKey, error: BaseException) -> None:
        """Ends the texts of a lane with an error, and frees its rows."""
        lane = self.lanes.pop(key, None)
        if lane is not None:
            self.fail([text for text in lane.texts if text is not None], error)


def add_adapters(predictor: Predictor, adapted: Sequence[Predictor]) -> Predictor:
    """Returns a predictor whose weights have the adapters of others beside them."""
    if not adapted:
        return predictor
    trees = [each.params for each in adapted]
    return predictor.with_params(adapter_banks.bank_adapters(predictor.params, trees))
