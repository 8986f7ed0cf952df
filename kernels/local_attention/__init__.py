"""attend_local: exact causal attention inside a sliding window plus attention sinks."""

# B batch  T chunk tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
import importlib.util

import torch

from rtpurbo.kernels.local_attention import crossover, reference
from rtpurbo.kernels.local_attention.reference import ring_positions

__all__ = ["attend_local", "choose_impl", "head_axis", "obstacle_of", "ring_positions", "write_ring"]

IMPLEMENTATIONS = ("reference", "triton", "gluon", "fa4")


def attend_local(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    lengths_B: torch.Tensor | None = None,
    counts_B: torch.Tensor | None = None,
    ring_k_BWKD: torch.Tensor | None = None,
    ring_v_BWKD: torch.Tensor | None = None,
    by_position: bool = False,
    out: torch.Tensor | None = None,
    return_lse: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a chunk over `j <= i and (i - j < window or j < sinks)`; the window counts the query itself.

    Args:
        q_BTHD, k_BTKD, v_BTKD: the chunk, post-RoPE; views of any strides. Row t of sequence b is position lengths_B[b] + t.
            H = group * K; q may also be a view [B, T, K, group, D], then so is out.
        window, sinks: visible keys; window >= 1, sinks >= 0.
        scale: logit scale, usually head_dim ** -0.5 (dimensionless).
        lengths_B: int32, tokens written to the ring before this chunk (default 0).
        counts_B: int32, valid rows of the chunk, the first ones (default T). Other rows return 0 and an LSE of -inf.
        ring_k_BWKD, ring_v_BWKD: cache with W = sinks + window slots (see `ring_positions`); read, not written.
        by_position: k and v are instead a whole cache [B, S, K, D] in which row = position, the chunk already written; no ring then.
        out: written (default: a new tensor): q's shape and dtype, any view with a contiguous last axis.
        return_lse: also return the LSE, else None.
        impl: "auto" or one of IMPLEMENTATIONS; `choose_impl` says what "auto" picks and when a kernel can run. "fa4" wants finite
            values in rows that hold no token; all others take anything there.

    Returns out [B, T, H, D] in q's dtype and lse fp32 [B, H, T] (natural log).
    Raises ValueError for shapes that do not fit and for an impl that cannot run.
    Source: arXiv 2605.16928 section 3 (window and sinks); counting: ours.
    """
    K = k_BTKD.shape[2]
    q_BTKGD = q_BTHD
    if q_BTHD.dim() == 4 and K and q_BTHD.shape[2] % K == 0:
        q_BTKGD = q_BTHD.unflatten(2, (K, q_BTHD.shape[2] // K))
    if q_BTKGD.dim() != 5 or q_BTKGD.shape[2] != K or K == 0:
        raise ValueError(f"attend_local: q {tuple(q_BTHD.shape)} and k {tuple(k_BTKD.shape)} do not fit")
    B, T, _, G, D = q_BTKGD.shape
    rows = k_BTKD.shape[1] if by_position else T
    if k_BTKD.shape != (B, rows, K, D) or v_BTKD.shape != k_BTKD.shape:
        raise ValueError(f"attend_local: q {tuple(q_BTHD.shape)}, k {tuple(k_BTKD.shape)}, v {tuple(v_BTKD.shape)} do not fit")
    if window < 1 or sinks < 0:
        raise ValueError(f"attend_local: window {window} must be >= 1 and sinks {sinks} >= 0")
    if (ring_k_BWKD is None) != (ring_v_BWKD is None):
        raise ValueError("attend_local: give ring_k and ring_v together")
    for ring in (ring_k_BWKD, ring_v_BWKD):
        if ring is not None and ring.shape != (B, sinks + window, K, D):
            raise ValueError(f"attend_local: ring {tuple(ring.shape)}, wanted {(B, sinks + window, K, D)}")
    if by_position and ring_k_BWKD is not None:
        raise ValueError("attend_local: a cache by position and a ring exclude each other")
    if out is not None and (out.shape != q_BTHD.shape or out.dtype != q_BTHD.dtype or out.stride(-1) != 1):
        raise ValueError(f"attend_local: out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q_BTHD.shape)} {q_BTHD.dtype}")
    positions = by_position or lengths_B is None
    chosen = choose_impl(q_BTKGD, k_BTKD, v_BTKD, ring_k_BWKD, ring_v_BWKD, scale=scale, positions=positions, impl=impl)
    start_B = lengths_B
    if lengths_B is None:
        if ring_k_BWKD is not None or by_position:
            raise ValueError("attend_local: a ring or a cache by position needs lengths_B")
        lengths_B = torch.zeros(B, dtype=torch.int32, device=q_BTHD.device)
    if counts_B is None:
        counts_B = torch.full((B,), T, dtype=torch.int32, device=q_BTHD.device)
    if chosen == "reference":
        if by_position:
            k_BTKD, v_BTKD, ring_k_BWKD, ring_v_BWKD = reference.split_cache(k_BTKD, v_BTKD, lengths_B, T, window, sinks)
        made_BTHD, lse_BHT = reference.attend_local(
            q_BTKGD.flatten(2, 3), k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, window, sinks, scale
        )
        out = made_BTHD.view(q_BTHD.shape) if out is None else out.copy_(made_BTHD.view(q_BTHD.shape))
        return out, lse_BHT if return_lse else None
    if chosen == "fa4":
        from rtpurbo.kernels.local_attention import fa4
    elif chosen == "triton":
        from rtpurbo.kernels.local_attention.kernel import launch
    else:
        from rtpurbo.kernels.local_attention.hopper_kernel import launch
    if out is None:
        out = torch.empty(q_BTHD.shape, dtype=q_BTHD.dtype, device=q_BTHD.device)
    lse_BHT = torch.empty((B, K * G, T), dtype=torch.float32, device=q_BTHD.device) if return_lse else None
    lengths_B, counts_B = (x.to(torch.int32).contiguous() for x in (lengths_B, counts_B))
    if chosen == "fa4":
        q, written = head_axis(q_BTKGD), head_axis(out if out.dim() == 5 else out.unflatten(2, (K, G)))
        assert q is not None
        if written is None:
            raise ValueError(f"attend_local: impl 'fa4' writes heads of one stride, found out with strides {out.stride()}")
        start_B = None if start_B is None else lengths_B
        fa4.launch(q, k_BTKD, v_BTKD, start_B, counts_B, written, lse_BHT, window=window, sinks=sinks, scale=scale)
        return out, lse_BHT
    launch(
        q_BTKGD, k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, out, lse_BHT,
        window=window, sinks=sinks, scale=scale, by_position=by_position,
    )  # fmt: skip
    return out, lse_BHT


def choose_impl(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None = None,
    ring_v_BWKD: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    positions: bool = True,
    impl: str = "auto",
) -> str:
    """The implementation that `attend_local` runs for these tensors; positions: row j of k holds position j.

    "auto" picks "fa4" (FlashAttention-4, extra `fa4`) where it is installed, can run and was measured faster (see crossover.py), "gluon"
    on Hopper (compute capability 9.0), "triton" on other NVIDIA GPUs, and "reference" on the CPU, for head dims
    other than 64 and 128, for inputs that need gradients, and for a scale <= 0. A named one is returned as it is, or raises
    ValueError with what is in its way.
    """
    if impl == "reference":
        return impl
    tensors = [x for x in (q_BTHD, k_BTKD, v_BTKD, ring_k_BWKD, ring_v_BWKD) if x is not None]
    if impl == "auto":
        if not q_BTHD.is_cuda:
            return "reference"
        rows, keys = q_BTHD.shape[1], k_BTKD.shape[1]
        preferred = ["gluon", "triton"]
        if positions and ring_k_BWKD is None and crossover.prefers_fa4(q_BTHD.device, "window", rows, keys):
            preferred.insert(0, "fa4")
        return next((name for name in preferred if obstacle_of(name, tensors, scale) is None), "reference")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attend_local: impl {impl!r} is not one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    obstacle = obstacle_of(impl, tensors, scale)
    if impl == "fa4" and obstacle is None and (ring_k_BWKD is not None or not positions):
        obstacle = "it reads one tensor in which row = position: a cache, or a chunk without lengths"
    if obstacle is not None:
        raise ValueError(f"attend_local: impl {impl!r} cannot run: {obstacle}")
    return impl


def obstacle_of(impl: str, tensors: list[torch.Tensor], scale: float) -> str | None:
    """Why the kernel cannot run on these tensors, or None."""
    q = tensors[0]
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    interpreted = knobs.runtime.interpret and impl == "triton"
    dtypes = (torch.float32,) if interpreted else (torch.float16, torch.bfloat16)
    if q.dtype not in dtypes or any(x.dtype != q.dtype for x in tensors):
        wanted = " or ".join(str(x) for x in dtypes)
        return f"q, k and v are {', '.join(str(x.dtype) for x in tensors)}, wanted all {wanted}"
    if not interpreted and not all(x.is_cuda and x.device == q.device for x in tensors):
        return f"it needs all tensors on one NVIDIA GPU, found {', '.join(str(x.device) for x in tensors)}"
    if q.shape[-1] not in (64, 128) and not interpreted:
        return f"head dim {q.shape[-1]} is neither 64 nor 128"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it has no backward pass and an input needs a gradient"
    if not scale > 0:
        return f"scale {scale} is not positive"
    return _hopper_obstacle(tensors, impl) if impl in ("gluon", "fa4") else None


def _hopper_obstacle(tensors: list[torch.Tensor], impl: str) -> str | None:
    capability = torch.cuda.get_device_capability(tensors[0].device)
    if capability != (9, 0):
        return f"it needs compute capability 9.0, found {capability[0]}.{capability[1]}"
    if impl == "fa4":
        from rtpurbo.kernels.local_attention import fa4

        if not fa4.installed():
            return "flash-attn-4 is not installed (pip install rtpurbo[fa4])"
        if tensors[0].dim() == 5 and head_axis(tensors[0]) is None:
            return f"it wants query heads of one stride, found strides {tensors[0].stride()}"
    elif importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this triton has no Gluon"
    for x in tensors:
        if x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
            return f"the copy engine needs addresses and strides in multiples of 16 bytes, found strides {x.stride()}"
    return None


def head_axis(x_BTKGD: torch.Tensor) -> torch.Tensor | None:
    """The view [B, T, K * G, D], or None where the heads have no common stride."""
    K, G = x_BTKGD.shape[2:4]
    if K == 1 or G == 1:
        return x_BTKGD.squeeze(2) if K == 1 else x_BTKGD.squeeze(3)
    return x_BTKGD.flatten(2, 3) if x_BTKGD.stride(2) == G * x_BTKGD.stride(3) else None


def write_ring(
    ring_BWKD: torch.Tensor,
    chunk_BTKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    *,
    window: int,
    sinks: int,
) -> None:
    """Write a chunk's keys (or values) into the ring, in place, after the chunk has attended; the host waits for nothing.

    Row t < counts_B[b] has position lengths_B[b] + t; only the newest `window` of them and the sinks are kept.
    """
    if chunk_BTKD.shape[1] == 0:
        return
    batch_B1 = torch.arange(chunk_BTKD.shape[0], device=chunk_BTKD.device)[:, None]
    # Seen from the slots: which row of the chunk ends up in each, if any.
    row_BW = ring_positions(lengths_B + counts_B, window, sinks) - lengths_B.long()[:, None]
    written_BW11 = (row_BW >= 0)[:, :, None, None]
    new_BWKD = chunk_BTKD[batch_B1, row_BW.clamp(min=0)].to(ring_BWKD.dtype)
    ring_BWKD.copy_(torch.where(written_BW11, new_BWKD, ring_BWKD))
