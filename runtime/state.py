"""A batch in progress: its cache, what the next decode step reads on the device, and the captured graphs of that step."""

# B batch  V vocabulary
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rtpurbo.kernels.decode_layer import DecodeLayerPlan
from rtpurbo.runtime.cache import Cache
from rtpurbo.runtime.plans import SelectionObserver
from rtpurbo.runtime.sampling import DeviceOptions, Kind, SamplingOptions


@dataclass(kw_only=True)
class State:
    """A batch in progress. All tensors keep their addresses, so that captured graphs stay valid.

    ids_B int64: the token that the next decode step appends to each sequence; the step leaves the sampled next one there.
    active_B int32: 1 for sequences that take part. seed_B, step_B int64 and options: see runtime.sampling.sample.
    graph: decode steps run as a captured CUDA graph. on_selection, if set, sees every selection of decode steps, which then run
    uncaptured (runtime.plans.SelectionObserver).
    """

    cache: Cache
    decode_plans: tuple[DecodeLayerPlan, ...]
    rope: tuple[torch.Tensor, torch.Tensor]
    ids_B: torch.Tensor
    active_B: torch.Tensor
    seed_B: torch.Tensor
    step_B: torch.Tensor
    options: DeviceOptions
    graph: bool
    on_selection: SelectionObserver | None = None
    active: list[bool] = field(default_factory=list)
    graphs: dict[Kind, "CapturedStep"] = field(default_factory=dict)

    @staticmethod
    def of(cache: Cache, decode_plans: tuple[DecodeLayerPlan, ...], rope: tuple[torch.Tensor, torch.Tensor], *, graph: bool) -> "State":
        """A state for an empty cache; greedy until `set_row` says otherwise."""
        B, device = cache.batch, cache.lengths_B.device
        return State(
            cache=cache,
            decode_plans=decode_plans,
            rope=rope,
            ids_B=torch.zeros(B, dtype=torch.int64, device=device),
            active_B=torch.zeros(B, dtype=torch.int32, device=device),
            seed_B=torch.zeros(B, dtype=torch.int64, device=device),
            step_B=torch.zeros(B, dtype=torch.int64, device=device),
            options=DeviceOptions.of([SamplingOptions()] * B, device),
            graph=graph,
            active=[False] * B,
        )

    def activate(self, active: Sequence[bool]) -> None:
        """Choose the sequences of the next steps; the device hears of it only when they change."""
        if list(active) != self.active:
            self.active = list(active)
            self.active_B.copy_(torch.tensor(self.active, dtype=torch.int32), non_blocking=True)

    def set_rows(self, slots: list[int], options: DeviceOptions, seed_B: torch.Tensor, first_B: torch.Tensor) -> None:
        """Give slots new sequences' options and seeds, and the first token of each, drawn from the prefill's logits with step 0."""
        place = torch.tensor(slots).to(self.ids_B.device)
        for name in ("temperature_B", "top_k_B", "top_p_B"):
            getattr(self.options, name)[place] = getattr(options, name)
        self.ids_B[place] = first_B
        self.seed_B[place] = seed_B
        self.step_B[place] = 1


class CapturedStep:
    """A decode step as a CUDA graph. `replay` runs it on the state's tensors as they are then and returns its logits.

    step: launches one step of the state and returns logits; it must not wait for the device. Sequences that are not active are
    not changed by a step, so warming up and capturing leave the state as it was. The logits are overwritten by the next replay.
    """

    def __init__(self, state: State, step: Callable[[], torch.Tensor]) -> None:
        active = state.active
        state.activate([False] * len(active))
        stream = torch.cuda.Stream(state.ids_B.device)
        stream.wait_stream(torch.cuda.current_stream(state.ids_B.device))
        with torch.cuda.stream(stream):
            # Compiles kernels and allocates what libraries keep: neither may happen while a graph is captured.
            step()
        torch.cuda.current_stream(state.ids_B.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = step()
        state.activate(active)

    def replay(self) -> torch.Tensor:
        """Launch the step; nothing waits."""
        self._graph.replay()
        return self._logits_BV
