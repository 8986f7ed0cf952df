"""mix_experts in eager PyTorch: the definition, one expert after the other."""

# T tokens  X experts a token  E experts  C hidden width  F expert width
import torch
import torch.nn.functional as F_


def mix_experts(
    x_TC: torch.Tensor, ids_TX: torch.Tensor, weights_TX: torch.Tensor, gate_up_EGC: torch.Tensor, down_ECF: torch.Tensor
) -> torch.Tensor:
    """See rtpurbo.kernels.experts.mix_experts; every product rounds to the inputs' dtype, as a plain model does."""
    y_TC = torch.zeros_like(x_TC)
    for expert in torch.unique(ids_TX).tolist():
        token, choice = torch.nonzero(ids_TX == expert, as_tuple=True)
        gate, up = F_.linear(x_TC[token], gate_up_EGC[expert]).chunk(2, dim=-1)
        out = F_.linear(F_.silu(gate) * up, down_ECF[expert]) * weights_TX[token, choice, None].to(x_TC.dtype)
        y_TC.index_add_(0, token, out)
    return y_TC
