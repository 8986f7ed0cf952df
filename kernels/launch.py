"""A launch as data: which kernel, over which grid, with which arguments. Its compiler runs it here, an engine a cubin of it."""

from dataclasses import dataclass
from typing import Any

from rtpurbo.kernels.cuda import CudaKernel


def triton_release() -> tuple[int, int]:
    """Major and minor release of the installed Triton, for what kernels write differently to suit its compiler."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel in Triton, or in CUDA C++.

    arguments: the run-time parameters in the kernel's order, tensors as their pointers or as tensor descriptors. constants: its constexpr
    parameters by name, or its macros.
    early_launch: programmatic dependent launch, for a kernel that waits for the launch before it.
    all_at_once: refuse a grid whose programs do not all fit the GPU together, for programs that wait for each other.
    max_registers: of a thread, where the assembler would spill rather than let fewer programs share a multiprocessor; None: its choice.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    early_launch: bool = False
    all_at_once: bool = False
    max_registers: int | None = None

    def run(self) -> None:
        """Compile (once for each kind of arguments) and launch on the current stream."""
        if isinstance(self.kernel, CudaKernel):
            self.kernel.run(self)
            return
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "launch_pdl": self.early_launch,
            "launch_cooperative_grid": self.all_at_once,
            "maxnreg": self.max_registers,
            # Said, not left to a default that changes between releases of Triton; cubins of engines are compiled with it too.
            "enable_fp_fusion": True,
        }
        self.kernel[self.grid](*self.arguments, **self.constants, **options)
