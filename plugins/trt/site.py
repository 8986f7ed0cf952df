"""What an operator is told about where its launches run, and what it hands out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.kernels.division import OTHER_BYTES, SHARED_BYTES, num_processors_of
from rtpurbo.kernels.launch import Launch
from rtpurbo.plugins.trt.products import Product

Attributes = Mapping[str, Any]
Tensors = Sequence[torch.Tensor]
Shapes = Sequence[tuple[int, ...]]
Work = Launch | Product


@dataclass(frozen=True, kw_only=True)
class Site:
    """device: of tables and counters, "meta" while building. capability: that the kernels are compiled for, 10 x major + minor.
    run: takes launches, in order."""

    device: torch.device
    capability: int
    run: Callable[[Work], None]

    @property
    def processors(self) -> int:
        """Multiprocessors of the GPU; while building a number that no multiple of 16 comes from."""
        return num_processors_of(self.device)

    @property
    def pipeline_bytes(self) -> int:
        """Shared memory for the pipelines of a program, of the capability that the kernels are compiled for."""
        return SHARED_BYTES[self.capability] - OTHER_BYTES

    @property
    def launches_early(self) -> bool:
        """Whether a launch may overlap the end of the one before it (programmatic dependent launch)."""
        return self.capability >= 90


@dataclass(frozen=True, kw_only=True)
class Operator:
    """plan(attributes, input shapes, site) -> anything; launch(attributes, plan, inputs, outputs, site)."""

    plan: Callable[[Attributes, Shapes, Site], Any]
    launch: Callable[[Attributes, Any, Tensors, Tensors, Site], None]
