"""Eager definition of gated_silu."""

# T tokens  G 2 * MLP width
import torch


def gated_silu(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """See `kernels.gated_silu.gated_silu`."""
    gate, up = gate_up_TG.to(torch.promote_types(gate_up_TG.dtype, torch.float32)).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TG.dtype)
