"""route_tokens in eager PyTorch: the definition."""

# T tokens  E experts  X experts a token
import torch


def route_tokens(logits_TE: torch.Tensor, num_chosen: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See rtpurbo.kernels.router.route_tokens."""
    ids_TX = torch.sort(logits_TE, dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    weights_TX = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).gather(1, ids_TX)
    if normalize:
        weights_TX = weights_TX / weights_TX.sum(dim=-1, keepdim=True)
    return ids_TX.to(torch.int32), weights_TX.to(logits_TE.dtype)
