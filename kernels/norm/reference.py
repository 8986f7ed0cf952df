"""Eager definition of add_norm."""

# T tokens  C hidden
import torch


def add_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float, residual_TC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_norm`."""
    residual_TC = x_TC if residual_TC is None else residual_TC.add_(x_TC)
    return rms_norm(residual_TC, weight_C, eps), residual_TC


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean over the last axis of x^2 + eps) * weight, in fp32 (fp64 for fp64 inputs), rounded once to x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)
