"""norm_linear from its parts."""

# T tokens  C hidden  M outputs
import torch

from rtpurbo.kernels.norm import add_norm


def norm_linear(
    x_TC: torch.Tensor,
    norm_C: torch.Tensor,
    eps: float,
    weight_MC: torch.Tensor,
    bias_M: torch.Tensor | None,
    residual_TC: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.norm_linear.norm_linear`."""
    normed_TC, sum_TC = add_norm(x_TC, norm_C, eps, residual_TC=residual_TC)
    return torch.nn.functional.linear(normed_TC, weight_MC, bias_M), sum_TC, normed_TC
