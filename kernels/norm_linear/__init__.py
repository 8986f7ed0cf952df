"""norm_linear: residual addition, RMS norm and a linear layer; for a few tokens in one launch that streams the weights."""

# T tokens  C hidden  M outputs
import torch

from rtpurbo.kernels.norm_linear import reference

__all__ = ["choose_impl", "linear", "norm_linear"]

IMPLEMENTATIONS = ("reference", "triton")
FEW_TOKENS = 4  # Tokens that a program holds at most.
AUTO_TOKENS = 1  # From 4 tokens on the library's products were faster (benchmarks/runtime.md).
MAX_WIDTH = 8192  # A program holds whole rows of weights.


def norm_linear(
    x_TC: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    weight_MC: torch.Tensor,
    bias_M: torch.Tensor | None = None,
    *,
    residual_TC: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum = x + residual; normed = sum / sqrt(mean over C of sum^2 + eps) * norm; y = normed W^T + b.

    Args:
        x_TC: contiguous. residual_TC: the same shape; None: the sum is x itself. It may be changed in place and is not to be used again.
        norm_C, eps: of the RMS norm.
        weight_MC, bias_M: of the linear layer, weight contiguous.
        impl: "auto" or one of IMPLEMENTATIONS; `choose_impl` says what "auto" picks. "reference" is `add_norm` and the library's product.

    Returns (y [T, M], sum [T, C], normed [T, C]), each rounded to x's dtype; products are summed in fp32.
    Raises ValueError for shapes that do not fit and for an impl that cannot run.
    """
    if norm_C.shape != x_TC.shape[1:] or (residual_TC is not None and residual_TC.shape != x_TC.shape):
        found = None if residual_TC is None else tuple(residual_TC.shape)
        raise ValueError(f"norm_linear: x {tuple(x_TC.shape)}, norm {tuple(norm_C.shape)} and residual {found} do not fit")
    if choose_impl(x_TC, weight_MC, bias_M, impl=impl) == "reference":
        return reference.norm_linear(x_TC, norm_C, eps, weight_MC, bias_M, residual_TC)
    from rtpurbo.kernels.norm_linear import kernel

    return kernel.norm_linear(x_TC, norm_C, eps, weight_MC, bias_M, residual_TC)


def linear(x_TC: torch.Tensor, weight_MC: torch.Tensor, bias_M: torch.Tensor | None = None, *, impl: str = "auto") -> torch.Tensor:
    """y = x W^T + b [T, M]; see `norm_linear` for the arguments and the errors."""
    if choose_impl(x_TC, weight_MC, bias_M, impl=impl) == "reference":
        return torch.nn.functional.linear(x_TC, weight_MC, bias_M)
    from rtpurbo.kernels.norm_linear import kernel

    return kernel.linear(x_TC, weight_MC, bias_M)


def choose_impl(x_TC: torch.Tensor, weight_MC: torch.Tensor, bias_M: torch.Tensor | None = None, *, impl: str = "auto") -> str:
    """ "auto" picks "triton" for up to AUTO_TOKENS tokens of at most MAX_WIDTH values in 16 bits on a GPU, else "reference".

    A named one is returned as it is, or raises ValueError with what is in its way.
    """
    if x_TC.ndim != 2 or weight_MC.ndim != 2 or weight_MC.shape[1] != x_TC.shape[1] or x_TC.stride(1) != 1:
        raise ValueError(f"norm_linear: x {tuple(x_TC.shape)} (rows contiguous) and weight {tuple(weight_MC.shape)} do not fit")
    if bias_M is not None and bias_M.shape != weight_MC.shape[:1]:
        raise ValueError(f"norm_linear: bias {tuple(bias_M.shape)} does not fit weight {tuple(weight_MC.shape)}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"norm_linear: impl {impl!r} is not one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    few = 1 <= x_TC.shape[0] <= FEW_TOKENS and x_TC.shape[1] <= MAX_WIDTH and weight_MC.is_contiguous()
    if impl == "auto":
        fast = few and x_TC.shape[0] <= AUTO_TOKENS and x_TC.is_cuda and x_TC.dtype in (torch.float16, torch.bfloat16)
        return "triton" if fast else "reference"
    if impl == "triton" and not few:
        raise ValueError(
            f"norm_linear: impl 'triton' wants 1 to {FEW_TOKENS} tokens of at most {MAX_WIDTH} values and a contiguous weight, found "
            f"{tuple(x_TC.shape)}"
        )
    return impl
