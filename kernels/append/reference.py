"""Eager definition of rope_append."""

# B batch  T chunk tokens  M (H + 2 K) D  H query heads  K kv heads  D head dim  E half the head dim  S cached tokens
# W ring slots (sinks + window)  P retrieval heads  I index-key sets  R index dim
import torch

from rtpurbo.kernels.append.plan import AppendPlan
from rtpurbo.kernels.norm.reference import rms_norm

FLOAT8_MAX = 448.0


def rope_append(
    qkv_BTM: torch.Tensor,
    plan: AppendPlan,
    cos_SE: torch.Tensor,
    sin_SE: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    index_k_BSIR: torch.Tensor | None,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    window: int,
    sinks: int,
    index_queries: bool,
) -> torch.Tensor | None:
    """See `kernels.append.rope_append`; returns the index queries."""
    H, K, D = plan.num_heads, plan.num_groups, plan.head_dim
    heads_BTHD = qkv_BTM.unflatten(2, (-1, D))
    wide = torch.promote_types(qkv_BTM.dtype, torch.float32)
    q_BTHD, k_BTKD = heads_BTHD[:, :, :H].to(wide), heads_BTHD[:, :, H : H + K].to(wide)
    if plan.norms_2D is not None:
        q_BTHD, k_BTKD = (rms_norm(x, weight, plan.eps) for x, weight in zip((q_BTHD, k_BTKD), plan.norms_2D, strict=True))
    offset_T = torch.arange(qkv_BTM.shape[1], device=qkv_BTM.device)
    position_BT = lengths_B.long()[:, None] + offset_T
    valid_BT = offset_T < counts_B[:, None]
    batch, row = torch.nonzero(valid_BT, as_tuple=True)
    position = position_BT[batch, row]
    index_q_BTPR = None
    if index_queries:
        assert plan.index_q_PRD is not None
        index_q_BTPR = torch.einsum("btpd,prd->btpr", q_BTHD[:, :, list(plan.retrieval_heads)], plan.index_q_PRD.to(wide)).float()
    if index_k_BSIR is not None:
        assert plan.index_k_IRD is not None
        index_k_BTIR = torch.einsum("btid,ird->btir", k_BTKD[:, :, list(plan.key_groups)], plan.index_k_IRD.to(wide))
        _store(index_k_BSIR, batch, position, index_k_BTIR[batch, row])
    for x_BTXD, heads in ((q_BTHD, slice(0, H)), (k_BTKD, slice(H, H + K))):
        rotated = _rotate(x_BTXD[batch, row], cos_SE[position].to(wide), sin_SE[position].to(wide))
        heads_BTHD[:, :, heads][batch, row] = rotated.to(qkv_BTM.dtype)
    pairs = ((k_BSKD, ring_k_BWKD, heads_BTHD[:, :, H : H + K]), (v_BSKD, ring_v_BWKD, heads_BTHD[:, :, H + K :]))
    for cache_BSKD, ring_BWKD, chunk_BTKD in pairs:
        retained = 0 if cache_BSKD is None else cache_BSKD.shape[2]
        if cache_BSKD is not None:
            _store(cache_BSKD, batch, position, chunk_BTKD[batch, row, :retained])
        if ring_BWKD is not None:
            end_B = lengths_B.long() + counts_B.long()
            kept = (position < sinks) | (position >= end_B[batch] - window)
            slot = torch.where(position < sinks, position, sinks + torch.remainder(position - sinks, window))
            _store(ring_BWKD, batch[kept], slot[kept], chunk_BTKD[batch, row, retained:][kept])
    return index_q_BTPR


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _store(cache_BSXY: torch.Tensor, batch: torch.Tensor, position: torch.Tensor, values: torch.Tensor) -> None:
    if cache_BSXY.dtype == torch.float8_e4m3fn:
        stored = values.float().clamp(-FLOAT8_MAX, FLOAT8_MAX).to(cache_BSXY.dtype)
        cache_BSXY.view(torch.uint8)[batch, position] = stored.view(torch.uint8)
    else:
        cache_BSXY[batch, position] = values.to(cache_BSXY.dtype)
