"""Eager definition of route."""

# T tokens  E experts  X experts a token
import torch


def route(logits_TE: torch.Tensor, num_chosen: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.routing.route`."""
    wide = torch.promote_types(logits_TE.dtype, torch.float32)
    # A stable sort: the lower id first among equals.
    sorted_TE, order_TE = torch.softmax(logits_TE.to(wide), dim=-1).sort(dim=-1, descending=True, stable=True)
    weight_TX = sorted_TE[:, :num_chosen]
    if normalize:
        weight_TX = weight_TX / weight_TX.sum(dim=-1, keepdim=True)
    return order_TE[:, :num_chosen].to(torch.int32), weight_TX.to(logits_TE.dtype)
