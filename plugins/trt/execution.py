"""One execution context of an engine: its profile, its bindings, its stream."""

from collections.abc import Mapping
from typing import Any

import torch

from rtpurbo.plugins.trt.folder import EngineInfo
from rtpurbo.plugins.trt.plugins import Session


class Execution:
    """Runs the engine with one of its profiles."""

    def __init__(self, engine: Any, runtime: Any, info: EngineInfo, session: Session, *, profile: int, phase: int) -> None:
        """Raises ValueError when the memory of the activations is not there."""
        self.stream = torch.cuda.Stream()
        # The runtime must outlive the engine, the engine its contexts.
        self._runtime, self._engine, self._info, self._session = runtime, engine, info, session
        self._context = engine.create_execution_context()
        if self._context is None:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise ValueError(f"not enough memory for the engine's activations: {free:.2f} GiB are free on the GPU")
        if not self._context.set_optimization_profile_async(profile, self.stream.cuda_stream):
            raise ValueError(f"the engine has no profile {profile}{self._reason()}")
        self.stream.synchronize()
        self._phase = torch.zeros(phase, dtype=torch.int32, device="cuda")
        self._bound: list[torch.Tensor] = []

    def bind(self, inputs: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor], logits_BV: torch.Tensor) -> None:
        """Take these tensors for the next executions; caches are updated in place. They stay alive until the next call."""
        named = dict(inputs) | dict(caches)
        if self._info.phased:
            named["phase"] = self._phase
        for name, tensor in named.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(f"the engine's profile does not hold {name} {tuple(tensor.shape)}{self._reason()}")
            self._context.set_tensor_address(name, tensor.data_ptr())
        for name, tensor in caches.items():
            self._context.set_tensor_address(self._info.caches[name].output, tensor.data_ptr())
        self._context.set_tensor_address("logits", logits_BV.data_ptr())
        self._bound = [*named.values(), logits_BV]

    def run(self) -> None:
        """Execute after the work of torch's current stream, which waits for the result."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        self.enqueue()
        current.wait_stream(self.stream)
        for tensor in self._bound:
            tensor.record_stream(self.stream)

    def enqueue(self) -> None:
        """Execute on the own stream; ValueError when TensorRT or a plugin fails."""
        if not self._context.execute_async_v3(self.stream.cuda_stream):
            raise ValueError(f"the engine cannot run{self._reason()}")

    def _reason(self) -> str:
        return f" ({self._session.failures[0]})" if self._session.failures else ""
