"""mix_experts: the feed-forward part of a mixture of experts, from one token to a whole chunk of a prompt."""

# T tokens  X experts a token  P pairs (T * X)  E experts  C hidden width  F expert width
import importlib.util

import torch

from rtpurbo.kernels.experts import reference

__all__ = ["choose_impl", "mix_experts"]

IMPLEMENTATIONS = ("reference", "triton", "gluon", "library")
FEW_TOKENS = 4  # Up to here pairs that share an expert are rare: reading its weights twice costs less than sorting.
CHUNK_TOKENS = 8192  # Bounds the workspace: at most (F + 2 C) * X values a token.
GLUON_ROWS = (64, 384)  # Rows an expert on average, from and below which "auto" takes the Hopper kernel: see benchmarks/experts.md.


def mix_experts(
    x_TC: torch.Tensor,
    ids_TX: torch.Tensor,
    weights_TX: torch.Tensor,
    gate_up_EGC: torch.Tensor,
    down_ECF: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """y_t = sum over x of w_tx * down_e (silu(gate_e x_t) * (up_e x_t)) with e = ids_tx.

    Args:
        x_TC: tokens, last axis contiguous.
        ids_TX: int64 or int32, 0 <= id < E; an id outside reads memory that is not its own.
        weights_TX: routing weights, as they are multiplied (already normalised if the model normalises).
        gate_up_EGC: [E, 2F, C], an expert's gate rows before its up rows, as transformers 5 stacks them.
        down_ECF: [E, C, F].
        impl: "auto" or one of IMPLEMENTATIONS; `choose_impl` says what "auto" picks and when one can run.

    Returns y [T, C] in x's dtype, with fp32 sums; equal inputs give equal bits. No host synchronisation and no workspace beyond
    CHUNK_TOKENS * X * (F + 2 C) values, except for "reference".
    Raises ValueError for shapes that do not fit and for an impl that cannot run.
    """
    T, C = x_TC.shape
    E, _, F = down_ECF.shape
    if down_ECF.shape != (E, C, F) or gate_up_EGC.shape != (E, 2 * F, C):
        raise ValueError(
            f"mix_experts: x {tuple(x_TC.shape)}, gate_up {tuple(gate_up_EGC.shape)} and down {tuple(down_ECF.shape)} do not fit: "
            "wanted [T, C], [E, 2F, C] and [E, C, F]"
        )
    if ids_TX.ndim != 2 or ids_TX.shape[0] != T or ids_TX.shape[1] < 1 or weights_TX.shape != ids_TX.shape:
        raise ValueError(
            f"mix_experts: ids {tuple(ids_TX.shape)} and weights {tuple(weights_TX.shape)}, wanted both [{T}, experts a token]"
        )
    if ids_TX.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"mix_experts: ids are {ids_TX.dtype}, wanted torch.int32 or torch.int64")
    chosen = choose_impl(x_TC, ids_TX, weights_TX, gate_up_EGC, down_ECF, impl=impl)
    if T == 0:
        return torch.zeros_like(x_TC)
    if chosen == "reference":
        return reference.mix_experts(x_TC, ids_TX, weights_TX, gate_up_EGC, down_ECF)
    ids_TX, weights_TX = ids_TX.contiguous(), weights_TX.contiguous()
    parts = [
        _run(chosen, x_TC[first:end], ids_TX[first:end], weights_TX[first:end], gate_up_EGC, down_ECF)
        for first, end in ((first, min(first + CHUNK_TOKENS, T)) for first in range(0, T, CHUNK_TOKENS))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def choose_impl(
    x_TC: torch.Tensor,
    ids_TX: torch.Tensor,
    weights_TX: torch.Tensor,
    gate_up_EGC: torch.Tensor,
    down_ECF: torch.Tensor,
    *,
    impl: str = "auto",
) -> str:
    """The implementation that `mix_experts` runs for these tensors.

    "auto" picks, for fp16 and bf16 without gradients on an NVIDIA GPU, "gluon" on Hopper (compute capability 9.0) for a number of
    rows an expert within GLUON_ROWS, and "triton" otherwise; else "reference". A named one is returned as it is, or raises
    ValueError with what is in its way. "library" is torch.nn.functional.grouped_mm between the own sort and the own sum.
    """
    if impl == "reference":
        return impl
    tensors = (x_TC, ids_TX, weights_TX, gate_up_EGC, down_ECF)
    if impl == "auto":
        rows = min(ids_TX.shape[0], CHUNK_TOKENS) * ids_TX.shape[1] / gate_up_EGC.shape[0]
        names = ("gluon", "triton") if GLUON_ROWS[0] <= rows < GLUON_ROWS[1] else ("triton",)
        return next((name for name in names if x_TC.is_cuda and _obstacle(name, *tensors) is None), "reference")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"mix_experts: impl {impl!r} is not one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    obstacle = _obstacle(impl, *tensors)
    if obstacle is not None:
        raise ValueError(f"mix_experts: impl {impl!r} cannot run: {obstacle}")
    return impl


def _obstacle(
    impl: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> str | None:
    """Why the implementation cannot run on these tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    interpreted = knobs.runtime.interpret and impl == "triton"
    dtypes = (torch.float32,) if interpreted else (torch.float16, torch.bfloat16)
    if impl == "library":
        dtypes = (torch.bfloat16,)
    if x.dtype not in dtypes or gate_up.dtype != x.dtype or down.dtype != x.dtype:
        return f"x, gate_up and down are {x.dtype}, {gate_up.dtype}, {down.dtype}, wanted all {' or '.join(map(str, dtypes))}"
    tensors = (x, ids, weights, gate_up, down)
    if not interpreted and not all(t.is_cuda and t.device == x.device for t in tensors):
        return f"it needs all tensors on one NVIDIA GPU, found {', '.join(str(t.device) for t in tensors)}"
    if x.stride(1) != 1 or not gate_up.is_contiguous() or not down.is_contiguous():
        return "x's last axis, gate_up and down must be contiguous"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no backward pass and an input needs a gradient"
    return _hopper_obstacle(x, down) if impl == "gluon" else None


def _hopper_obstacle(x: torch.Tensor, down: torch.Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, found {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this triton has no Gluon"
    if down.shape[1] % 256 or down.shape[2] % 128:
        return f"it needs a hidden width in multiples of 256 and an expert width in multiples of 128, found {tuple(down.shape[1:])}"
    return None


def _run(
    chosen: str, x_TC: torch.Tensor, ids_TX: torch.Tensor, weights_TX: torch.Tensor, gate_up_EGC: torch.Tensor, down_ECF: torch.Tensor
) -> torch.Tensor:
    tensors = (x_TC, ids_TX, weights_TX, gate_up_EGC, down_ECF)
    if chosen == "library":
        from rtpurbo.kernels.experts import library

        return library.mix_experts(*tensors)
    if chosen == "gluon":
        from rtpurbo.kernels.experts import hopper_kernel

        return hopper_kernel.mix_experts(*tensors)
    hopper = x_TC.is_cuda and torch.cuda.get_device_capability(x_TC.device) == (9, 0)
    if x_TC.shape[0] <= FEW_TOKENS:
        from rtpurbo.kernels.experts import few_kernel

        return few_kernel.mix_experts(*tensors, early_launch=hopper)
    from rtpurbo.kernels.experts import kernel

    tiles = kernel.tiles_for(ids_TX.numel(), gate_up_EGC.shape[0], hopper=hopper)
    return kernel.mix_experts(*tensors, tiles=tiles, early_launch=hopper)
