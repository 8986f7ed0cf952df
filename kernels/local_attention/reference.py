"""Eager definition of attend_local: causal sliding window + sinks, for a chunk of queries against a ring cache + the chunk."""

# B batch  T chunk tokens  W ring slots (sinks + window)  S visible cached keys  H query heads  K kv heads  D head dim
import torch


def ring_positions(lengths_B: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Position of the key in every ring slot after `lengths_B` tokens were written; -1 where the slot is empty.

    Slots 0 ... sinks-1 hold positions 0 ... sinks-1; position p >= sinks sits in slot sinks + (p - sinks) mod window.
    Returns int64 [B, sinks + window].
    """
    slot_W = torch.arange(sinks + window, device=lengths_B.device)
    length_B1 = lengths_B.long()[:, None]
    ring_slot_W = slot_W - sinks
    # The newest position p <= length - 1 with (p - sinks) mod window == ring_slot.
    newest_B1 = length_B1 - 1 - sinks
    ring_BW = newest_B1 - torch.remainder(newest_B1 - ring_slot_W, window) + sinks
    position_BW = torch.where(slot_W < sinks, slot_W.expand_as(ring_BW), ring_BW)
    filled_BW = torch.where(slot_W < sinks, slot_W < length_B1, ring_BW >= sinks)
    return torch.where(filled_BW, position_BW, -1)


def attend_local(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.local_attention.attend_local`; computes in the inputs' dtype with fp32 softmax."""
    B, T, H, _ = q_BTHD.shape
    group_size = H // k_BTKD.shape[2]
    offset_T = torch.arange(T, device=q_BTHD.device)
    query_BT = lengths_B.long()[:, None] + offset_T
    key_BT = torch.where(offset_T < counts_B.long()[:, None], query_BT, -1)
    keys, values, key_position = k_BTKD, v_BTKD, key_BT
    if ring_k_BWKD is not None and ring_v_BWKD is not None:
        keys = torch.cat([ring_k_BWKD, keys], dim=1)
        values = torch.cat([ring_v_BWKD, values], dim=1)
        key_position = torch.cat([ring_positions(lengths_B, window, sinks), key_position], dim=1)
    i_BT1, j_B1S = query_BT[:, :, None], key_position[:, None, :]
    visible_BTS = (j_B1S >= 0) & (j_B1S <= i_BT1) & ((i_BT1 - j_B1S < window) | (j_B1S < sinks))
    visible_BTS &= (offset_T < counts_B.long()[:, None])[:, :, None]
    # An empty slot may hold anything, NaN included: it must not reach the sum even with weight zero.
    empty = (key_position < 0)[:, :, None, None]
    return masked_attention(q_BTHD, keys.masked_fill(empty, 0), values.masked_fill(empty, 0), visible_BTS[:, None], scale, group_size)


def split_cache(
    k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, lengths_B: torch.Tensor, T: int, window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk of T rows and the ring before it, both gathered from a cache by position: (chunk k, chunk v, ring k, ring v)."""
    S = k_BSKD.shape[1]
    batch_B1 = torch.arange(k_BSKD.shape[0], device=k_BSKD.device)[:, None]
    chunk_BT = (lengths_B.long()[:, None] + torch.arange(T, device=k_BSKD.device)).clamp(max=S - 1)
    ring_BW = ring_positions(lengths_B, window, sinks).clamp(min=0, max=S - 1)
    chunk_k, chunk_v, ring_k, ring_v = (x[batch_B1, at] for at in (chunk_BT, ring_BW) for x in (k_BSKD, v_BSKD))
    return chunk_k, chunk_v, ring_k, ring_v


def masked_attention(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    visible_BHTS: torch.Tensor,
    scale: float,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v over the visible keys; rows that see no key give 0 and an LSE of -inf.

    visible_BHTS is bool and may have H = 1. Returns out [B, T, H, D] in q's dtype and lse fp32 [B, H, T] (natural log).
    """
    k_BSHD = k_BSKD.repeat_interleave(group_size, dim=2)
    v_BSHD = v_BSKD.repeat_interleave(group_size, dim=2)
    logits_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD).float() * scale
    logits_BHTS = logits_BHTS.masked_fill(~visible_BHTS, float("-inf"))
    lse_BHT = torch.logsumexp(logits_BHTS, dim=-1)
    weights_BHTS = torch.exp(logits_BHTS - lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0)[..., None])
    out_BTHD = torch.einsum("bhts,bshd->bthd", weights_BHTS.to(v_BSHD.dtype), v_BSHD)
    return out_BTHD, lse_BHT
