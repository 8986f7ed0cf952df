"""One execution context of an engine: its profile, its bindings."""

from collections.abc import Mapping
from typing import Any

import torch

from rtpurbo.plugins.trt.folder import EngineInfo
from rtpurbo.plugins.trt.plugins import Session


class Execution:
    """Runs the engine with one of its profiles, on torch's current stream."""

    def __init__(
        self, trt: Any, engine: Any, owners: tuple[Any, ...], info: EngineInfo, session: Session, *, profile: int, phase: int
    ) -> None:
        """Raises ValueError when the memory of the activations is not there."""
        # Log and runtime must outlive the engine, the engine its contexts.
        self._owners, self._engine, self._info, self._session = owners, engine, info, session
        self._context = engine.create_execution_context(_runtime_config(trt, engine))
        if self._context is None:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise ValueError(f"not enough memory for the engine's activations: {free:.2f} GiB are free on the GPU")
        stream = torch.cuda.current_stream()
        if not self._context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise ValueError(f"the engine has no profile {profile}{self._reason()}")
        stream.synchronize()
        self._phase = torch.zeros(phase, dtype=torch.int32, device="cuda")

    def run(self, inputs: Mapping[str, torch.Tensor], caches: Mapping[str, torch.Tensor], logits_BV: torch.Tensor) -> None:
        """Execute once: caches are updated in place, the logits overwritten. Does not wait for the device.

        Raises ValueError for shapes beyond the profile and when TensorRT or a plugin fails.
        """
        context = self._context
        named = dict(inputs) | dict(caches)
        if self._info.phased:
            named["phase"] = self._phase
        for name, tensor in named.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(f"the engine's profile does not hold {name} {tuple(tensor.shape)}{self._reason()}")
            context.set_tensor_address(name, tensor.data_ptr())
        for name, tensor in caches.items():
            context.set_tensor_address(self._info.caches[name].output, tensor.data_ptr())
        context.set_tensor_address("logits", logits_BV.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ValueError(f"the engine cannot run{self._reason()}")

    def _reason(self) -> str:
        return f" ({self._session.failures[0]})" if self._session.failures else ""


def _runtime_config(trt: Any, engine: Any) -> Any:
    """tensorrt-rtx compiles kernels for new shapes: before it runs them, not beside, as that would break a capture in another thread."""
    config = engine.create_runtime_config()
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return config
