"""attend_local: exact causal attention inside a sliding window plus attention sinks."""

# B batch  T chunk tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
import torch
from rtpurbo.kernels.local_attention import reference
from rtpurbo.kernels.local_attention.reference import ring_positions

__all__ = ["attend_local", "ring_positions", "write_ring"]


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
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk over `j <= i and (i - j < window or j < sinks)`; the window counts the query itself.

    Args:
        q_BTHD, k_BTKD, v_BTKD: the chunk, post-RoPE. Row t of sequence b is position lengths_B[b] + t. H = group * K.
        window, sinks: visible keys; window >= 1, sinks >= 0.
        scale: logit scale, usually head_dim ** -0.5 (dimensionless).
        lengths_B: int32, tokens written to the ring before this chunk (default 0).
        counts_B: int32, valid rows of the chunk, the first ones (default T). Other rows return 0 and an LSE of -inf.
        ring_k_BWKD, ring_v_BWKD: cache with W = sinks + window slots (see `ring_positions`); read, not written.
        impl: "auto" or "reference".

    Returns out [B, T, H, D] in q's dtype and lse fp32 [B, H, T] (natural log).
    Raises ValueError for shapes that do not fit. Source: arXiv 2605.16928 section 3 (window and sinks); counting: ours.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    if k_BTKD.shape != (B, T, K, D) or v_BTKD.shape != k_BTKD.shape or K == 0 or H % K:
        raise ValueError(f"attend_local: q {tuple(q_BTHD.shape)}, k {tuple(k_BTKD.shape)}, v {tuple(v_BTKD.shape)} do not fit")
    if window < 1 or sinks < 0:
        raise ValueError(f"attend_local: window {window} must be >= 1 and sinks {sinks} >= 0")
    if (ring_k_BWKD is None) != (ring_v_BWKD is None):
        raise ValueError("attend_local: give ring_k and ring_v together")
    for ring in (ring_k_BWKD, ring_v_BWKD):
        if ring is not None and ring.shape != (B, sinks + window, K, D):
            raise ValueError(f"attend_local: ring {tuple(ring.shape)}, wanted {(B, sinks + window, K, D)}")
    if impl not in ("auto", "reference"):
        raise ValueError(f"attend_local: impl {impl!r} is not one of auto, reference")
    if lengths_B is None:
        if ring_k_BWKD is not None:
            raise ValueError("attend_local: a ring needs lengths_B")
        lengths_B = torch.zeros(B, dtype=torch.int32, device=q_BTHD.device)
    if counts_B is None:
        counts_B = torch.full((B,), T, dtype=torch.int32, device=q_BTHD.device)
    return reference.attend_local(q_BTHD, k_BTKD, v_BTKD, lengths_B, counts_B, ring_k_BWKD, ring_v_BWKD, window, sinks, scale)


def write_ring(
    ring_BWKD: torch.Tensor,
    chunk_BTKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    *,
    window: int,
    sinks: int,
) -> None:
    """Write a chunk's keys (or values) into the ring, in place, after the chunk has attended.

    Row t < counts_B[b] has position lengths_B[b] + t; only the newest `window` of them and the sinks are kept.
    """
    T = chunk_BTKD.shape[1]
    offset_T = torch.arange(T, device=chunk_BTKD.device)
    position_BT = lengths_B.long()[:, None] + offset_T
    end_B1 = (lengths_B.long() + counts_B.long())[:, None]
    kept_BT = (offset_T < counts_B.long()[:, None]) & ((position_BT < sinks) | (position_BT >= end_B1 - window))
    slot_BT = torch.where(position_BT < sinks, position_BT, sinks + torch.remainder(position_BT - sinks, window))
    batch, row = torch.nonzero(kept_BT, as_tuple=True)
    ring_BWKD[batch, slot_BT[batch, row]] = chunk_BTKD[batch, row].to(ring_BWKD.dtype)
