"""gated_silu: silu(gate) * up on the fused output of the gate and up projections."""

# T tokens  F MLP width
import torch

from rtpurbo.kernels.gated_silu import reference

__all__ = ["gated_silu"]


def gated_silu(gate_up_TG: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """silu(gate) * up with gate = gate_up[:, :F], up = gate_up[:, F:], G = 2 F; computed in fp32, rounded once.

    gate_up_TG: contiguous. impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".
    Returns [T, F] in the input's dtype. Raises ValueError for an odd G or a strided input. Source: the MLP of the Llama family.
    """
    if gate_up_TG.ndim != 2 or gate_up_TG.shape[1] % 2 or not gate_up_TG.is_contiguous():
        raise ValueError(f"gated_silu: gate_up {tuple(gate_up_TG.shape)}, wanted contiguous [T, 2 F]")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"gated_silu: impl {impl!r} is not one of auto, triton, reference")
    if impl == "triton" or (impl == "auto" and gate_up_TG.is_cuda):
        from rtpurbo.kernels.gated_silu import kernel

        return kernel.launch(gate_up_TG)
    return reference.gated_silu(gate_up_TG)
