"""route: the experts of every token and their weights, from the router's logits."""

# T tokens  E experts  X experts a token
import torch

from rtpurbo.kernels.routing import reference

__all__ = ["route"]


def route(logits_TE: torch.Tensor, num_chosen: int, *, normalize: bool, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """p = softmax(logits) in fp32; the num_chosen largest p, most likely first; divided by their sum if `normalize`.

    Args:
        logits_TE: contiguous.
        num_chosen: X, 1 ... E.
        impl: "auto" (Triton on a GPU, else the reference), "triton" or "reference".

    Returns ids int32 [T, X] and weights [T, X] in the logits' dtype; of equal logits the lower id comes first. Rows with NaN give
    ids in range and unspecified weights. Raises ValueError for shapes that do not fit. Source: the router of Qwen3-MoE.
    """
    if logits_TE.ndim != 2 or not logits_TE.is_contiguous() or not 1 <= num_chosen <= logits_TE.shape[1]:
        raise ValueError(f"route: {num_chosen} experts a token of logits {tuple(logits_TE.shape)}, wanted contiguous [T, E]")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"route: impl {impl!r} is not one of auto, triton, reference")
    if impl == "triton" or (impl == "auto" and logits_TE.is_cuda):
        from rtpurbo.kernels.routing import kernel

        return kernel.launch(logits_TE, num_chosen, normalize)
    return reference.route(logits_TE, num_chosen, normalize)
