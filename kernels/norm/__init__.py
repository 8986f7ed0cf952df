"""add_norm: the residual addition and the RMS norm after it, in one pass."""

# T tokens  C hidden
import torch

from rtpurbo.kernels.norm import reference

__all__ = ["add_norm"]


def add_norm(
    x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float, *, residual_TC: torch.Tensor | None = None, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual += x; out = residual / sqrt(mean over C of residual^2 + eps) * weight.

    Args:
        x_TC: what the previous layer adds, last axis contiguous.
        weight_C, eps: of the norm.
        residual_TC: contiguous, changed in place; None: x itself is the residual, and is not changed.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns (out [T, C] in x's dtype, residual). The sum is rounded to x's dtype and normed in fp32 from there, as the model does.
    Raises ValueError for shapes that do not fit. Source: the RMS norm of the Llama family; one pass: ours.
    """
    if x_TC.ndim != 2 or weight_C.shape != x_TC.shape[1:] or x_TC.stride(1) != 1:
        raise ValueError(f"add_norm: x {tuple(x_TC.shape)} (last axis contiguous) and weight {tuple(weight_C.shape)} do not fit")
    if residual_TC is not None and (residual_TC.shape != x_TC.shape or residual_TC.dtype != x_TC.dtype or not residual_TC.is_contiguous()):
        raise ValueError(
            f"add_norm: residual {tuple(residual_TC.shape)} {residual_TC.dtype}, wanted contiguous {tuple(x_TC.shape)} {x_TC.dtype}"
        )
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"add_norm: impl {impl!r} is not one of auto, triton, reference")
    if impl == "triton" or (impl == "auto" and x_TC.is_cuda):
        from rtpurbo.kernels.norm import kernel

        return kernel.launch(x_TC, weight_C, eps, residual_TC)
    return reference.add_norm(x_TC, weight_C, eps, residual_TC)
