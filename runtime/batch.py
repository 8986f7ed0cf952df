"""Continuous batching: requests join a running batch, share its decode steps, and leave their slot when they end."""

# B batch (slots)
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from rtpurbo.runtime.sampling import DeviceOptions, SamplingOptions, kind_of, sample, sequence_seeds
from rtpurbo.runtime.text import TextStream

if TYPE_CHECKING:
    from rtpurbo.runtime.engine import Runtime

Reason = Literal["stop", "eos", "length"]
OnText = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it. index: names the request to `on_text`, and seeds its draws together with options.seed."""

    index: int
    prompt: tuple[int, ...]
    options: SamplingOptions
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class Running:
    """One request in progress or ended: its tokens, its text, and why it ended (None while it runs).

    token_ids are without the end-of-sequence token, with those that completed a stop string.
    """

    def __init__(self, request: Request, slot: int, stream: TextStream, on_text: OnText | None) -> None:
        self.request, self.slot, self.stream, self._on_text = request, slot, stream, on_text
        self.tokens: list[int] = []
        self.reason: Reason | None = None
        # Tokens that the device has been asked for, the prefill's included; those beyond `tokens` are on their way.
        self.asked = 1

    def take(self, token: int, eos: frozenset[int]) -> None:
        """Add a token, stream the text that it completes, and notice the end."""
        if token in eos:
            piece = self.stream.finish()
            self.reason = "eos"
        else:
            self.tokens.append(token)
            piece = self.stream.push(token)
            if not self.stream.stopped and len(self.tokens) == self.request.max_new_tokens:
                piece += self.stream.finish()
                self.reason = "length"
            if self.stream.stopped:
                self.reason = "stop"
        if piece and self._on_text is not None:
            self._on_text(self.request.index, piece)


class Batch:
    """Slots of one cache, each free or with a running sequence; `running` lists these, `steps` counts decode steps that were used.

    On a GPU a step is launched before the ids of the step before are read, so the device does not wait for the host. A sequence
    that turns out to have ended meanwhile computed one token too many, which is dropped: its slot is cleared before it is used again.
    """

    def __init__(self, runtime: "Runtime", *, slots: int, capacity: int, dense: bool = False, graph: bool | None = None) -> None:
        """See Runtime.start for capacity, dense, graph and the errors."""
        self._runtime = runtime
        self.state = runtime.start(slots, capacity, dense, graph=graph)
        self.running: list[Running] = []
        self.steps = 0
        self._free = list(range(slots))
        self._ahead = 1 if runtime.device.type == "cuda" else 0
        self._launched: deque[tuple[_Ids, list[Running]]] = deque()
        self._unused = [_Ids(slots, runtime.device) for _ in range(self._ahead + 1)]

    @property
    def free(self) -> int:
        """Slots without a running sequence."""
        return len(self._free)

    def add(self, requests: Sequence[Request], *, prefill_chunk: int | None = None, on_text: OnText | None = None) -> list[Running]:
        """Start continuations of one prompt: it is prefilled once and its cache cloned for the others; first tokens are read.

        Raises ValueError, before anything is written, for different prompts, too few free slots, or too many tokens.
        """
        state, runtime, prompt = self.state, self._runtime, requests[0].prompt
        if any(request.prompt != prompt for request in requests):
            raise ValueError("requests that are added together must have the same prompt")
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(requests) > len(self._free):
            raise ValueError(f"{len(requests)} requests, but {len(self._free)} slots of {state.cache.batch} are free")
        longest = max(request.max_new_tokens for request in requests)
        if len(prompt) + longest > state.cache.capacity:
            raise ValueError(f"a prompt of {len(prompt)} and {longest} new tokens, but a slot's capacity is {state.cache.capacity}")
        slots, self._free = self._free[: len(requests)], self._free[len(requests) :]
        state.cache.clear(slots[0])
        logits_1V = runtime.prefill(state, torch.tensor([prompt]), chunk=prefill_chunk, slot=slots[0])
        state.cache.clone(slots[0], slots[1:])
        options = DeviceOptions.of([request.options for request in requests], runtime.device)
        seed_B = torch.cat([sequence_seeds(r.options.seed, [r.index], runtime.device) for r in requests])
        first_B = sample(logits_1V.expand(len(slots), -1), options, seed_B, torch.zeros_like(seed_B))
        state.set_rows(slots, options, seed_B, first_B)
        added = [Running(r, slot, TextStream(runtime.tokenizer, r.stop), on_text) for r, slot in zip(requests, slots, strict=True)]
        self.running += added
        self._take(first_B.tolist(), added, {slot: row for row, slot in enumerate(slots)})
        return added

    def step(self) -> list[Running]:
        """Launch a decode step for the running sequences and hand out the oldest ids that are due; the sequences that got one."""
        ready = [r for r in self.running if r.asked < r.request.max_new_tokens]
        if ready:
            slots = {r.slot for r in ready}
            active = [slot in slots for slot in range(self.state.cache.batch)]
            self._runtime.advance(self.state, active, kind_of([r.request.options for r in ready]))
            ids = self._unused.pop()
            ids.fetch(self.state.ids_B)
            self._launched.append((ids, ready))
            for r in ready:
                r.asked += 1
        if not self._launched or (ready and len(self._launched) <= self._ahead):
            return []
        ids, rows = self._launched.popleft()
        served = [r for r in rows if r.reason is None]
        self.steps += bool(served)
        self._take(ids.read(), served, {r.slot: r.slot for r in served})
        self._unused.append(ids)
        return served

    def _take(self, ids: list[int], rows: list[Running], row_of: dict[int, int]) -> None:
        eos = self._runtime.eos_token_ids
        for running in rows:
            running.take(ids[row_of[running.slot]], eos)
            if running.reason is not None:
                self.running.remove(running)
                self._free.append(running.slot)


class _Ids:
    """Token ids on their way to the host."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._host_B = torch.zeros(slots, dtype=torch.int64, pin_memory=device.type == "cuda")

    def fetch(self, ids_B: torch.Tensor) -> None:
        """Start the copy."""
        self._host_B.copy_(ids_B, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait for the copy, and for nothing launched after it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host_B.tolist()
