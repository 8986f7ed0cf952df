"""route_tokens: which experts a token goes to, and with which weights."""

# T tokens  E experts  X experts a token
import importlib.util

import torch

from rtpurbo.kernels.router import reference

__all__ = ["route_tokens"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def route_tokens(logits_TE: torch.Tensor, *, num_chosen: int, normalize: bool, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """The num_chosen experts of highest logit and their softmax weights, over the chosen ones' sum if normalize.

    Args:
        logits_TE: router logits, last axis contiguous; softmax and sums are fp32.
        num_chosen: experts a token, 1 <= num_chosen <= E.
        normalize: transformers' norm_topk_prob.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns ids int32 [T, X], best first and the lowest id first among equals, and weights [T, X] in the logits' dtype.
    Raises ValueError for values out of range and for an impl that cannot run.
    """
    T, E = logits_TE.shape
    if not 1 <= num_chosen <= E:
        raise ValueError(f"route_tokens: num_chosen is {num_chosen}, wanted 1 to {E}")
    if logits_TE.dtype not in DTYPES or logits_TE.stride(1) != 1:
        raise ValueError(f"route_tokens: logits are {logits_TE.dtype} of strides {logits_TE.stride()}, wanted floats, contiguous rows")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"route_tokens: impl {impl!r} is not one of auto, triton, reference")
    tracked = torch.is_grad_enabled() and logits_TE.requires_grad
    if impl == "reference" or (impl == "auto" and (tracked or not logits_TE.is_cuda)):
        return reference.route_tokens(logits_TE, num_chosen, normalize)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("route_tokens: impl 'triton' cannot run: triton is not installed")
    from triton import knobs

    if tracked or not (logits_TE.is_cuda or knobs.runtime.interpret):
        raise ValueError(f"route_tokens: impl 'triton' cannot run: needs a GPU and no gradient, found {logits_TE.device}")
    from rtpurbo.kernels.router import kernel

    hopper = logits_TE.is_cuda and torch.cuda.get_device_capability(logits_TE.device) == (9, 0)
    return kernel.route_tokens(logits_TE, num_chosen, normalize, early_launch=hopper)
