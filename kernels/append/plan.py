"""What rope_append knows of a layer before any token: its heads, norms and index projections, on the device."""

# H query heads  K kv heads  D head dim  P retrieval heads  I index-key sets  R index dim
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AppendPlan:
    """A layer's facts. norms_2D: fp32 weights of q_norm and k_norm, or None. place_H: a query head's place among the retrieval
    heads, or -1; group_I: the KV group of every index-key set (both int32).
    """

    num_heads: int
    num_groups: int
    head_dim: int
    eps: float
    retrieval_heads: tuple[int, ...]
    key_groups: tuple[int, ...]
    norms_2D: torch.Tensor | None
    index_q_PRD: torch.Tensor | None
    index_k_IRD: torch.Tensor | None
    place_H: torch.Tensor
    group_I: torch.Tensor


def plan_append(
    *,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    device: torch.device | str,
    eps: float = 0.0,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    retrieval_heads: Sequence[int] = (),
    key_groups: Sequence[int] = (),
    index_q_PRD: torch.Tensor | None = None,
    index_k_IRD: torch.Tensor | None = None,
) -> AppendPlan:
    """Put a layer's facts on the device.

    Args:
        q_norm_D, k_norm_D, eps: RMS norms of every query and key head (Qwen3), both or none.
        retrieval_heads: the query head of each row of index_q_PRD.
        key_groups: the KV group of each row of index_k_IRD, not descending: the sets of a group lie side by side.
        index_q_PRD, index_k_IRD: index projections, both or none.

    Raises ValueError for an odd head_dim and for heads, groups or shapes that do not fit.
    """
    if head_dim % 2:
        raise ValueError(f"plan_append: head_dim is {head_dim}, wanted an even number (RoPE turns pairs)")
    if (q_norm_D is None) != (k_norm_D is None) or (index_q_PRD is None) != (index_k_IRD is None):
        raise ValueError("plan_append: give both norms or none, both index projections or none")
    if index_q_PRD is not None and index_k_IRD is not None:
        rows = (len(retrieval_heads), len(key_groups))
        if (index_q_PRD.shape[0], index_k_IRD.shape[0]) != rows or index_q_PRD.shape[1:] != index_k_IRD.shape[1:]:
            raise ValueError(
                f"plan_append: index_q {tuple(index_q_PRD.shape)} and index_k {tuple(index_k_IRD.shape)} do not fit "
                f"{rows[0]} retrieval heads and {rows[1]} sets of keys"
            )
        inside = all(0 <= h < num_heads for h in retrieval_heads) and all(0 <= g < num_groups for g in key_groups)
        if not inside or list(key_groups) != sorted(key_groups):
            raise ValueError(f"plan_append: retrieval heads {list(retrieval_heads)} or groups of the keys {list(key_groups)} do not fit")
    place = {head: p for p, head in enumerate(retrieval_heads)}

    def placed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, torch.float32).contiguous()

    norms = None if q_norm_D is None or k_norm_D is None else torch.stack([q_norm_D, k_norm_D])
    return AppendPlan(
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=head_dim,
        eps=eps,
        retrieval_heads=tuple(retrieval_heads),
        key_groups=tuple(key_groups),
        norms_2D=placed(norms),
        index_q_PRD=placed(index_q_PRD),
        index_k_IRD=placed(index_k_IRD),
        place_H=torch.tensor([place.get(h, -1) for h in range(num_heads)], dtype=torch.int32, device=device),
        group_I=torch.tensor(list(key_groups), dtype=torch.int32, device=device),
    )
