"""Eager definition of decode_layer: one mask over positions for each retained KV group, one over slots for the rings."""

# B batch  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# I index-key sets  R index dim  N blocks
import torch

from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import mask_to_ids, select_blocks
from rtpurbo.kernels.decode_layer.plan import DecodeLayerPlan
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.local_attention.reference import masked_attention


def decode_layer(plan: DecodeLayerPlan, step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `kernels.decode_layer.decode_layer`; writes out, returns the selection."""
    q_BHD, out_BHD, scale = step.q_BHD, step.out_BHD, step.scale
    retained = plan.num_retained * plan.group_size
    length_B1 = step.lengths_B.long()[:, None]
    selected_BHN = _selection(plan, step) if plan.selects(step.top_p) else None
    if plan.num_retained:
        k_BSKD, v_BSKD = step.cache
        position_S = torch.arange(k_BSKD.shape[1], device=q_BHD.device)
        stored_BS = position_S < length_B1
        near_BS = stored_BS & ((position_S >= length_B1 - plan.window) | (position_S < plan.sinks))
        visible_BHS = near_BS[:, None].repeat(1, retained, 1)
        for row, head in enumerate(plan.retrieval_heads):
            visible_BHS[:, head] = stored_BS if selected_BHN is None else stored_BS & selected_BHN[:, row, position_S // plan.block_size]
        out_BHD[:, :retained] = _attend(q_BHD[:, :retained], k_BSKD, v_BSKD, stored_BS, visible_BHS, scale, plan.group_size)
    if plan.num_retained < plan.num_groups:
        ring_k_BWKD, ring_v_BWKD = step.ring
        filled_BW = torch.arange(ring_k_BWKD.shape[1], device=q_BHD.device) < length_B1
        out_BHD[:, retained:] = _attend(
            q_BHD[:, retained:], ring_k_BWKD, ring_v_BWKD, filled_BW, filled_BW[:, None], scale, plan.group_size
        )
    return None if selected_BHN is None else mask_to_ids(selected_BHN)


def _selection(plan: DecodeLayerPlan, step: DecodeStep) -> torch.Tensor:
    index_q_BHR, index_k_BSIR = step.index
    max_BHTN, sum_BHTN = block_scores(
        index_q_BHR[:, None], index_k_BSIR, key_set_H=torch.tensor(plan.key_sets, device=index_q_BHR.device),
        visible_BT=step.lengths_B[:, None], scale=step.index_scale, block_size=plan.block_size,
    )  # fmt: skip
    return select_blocks(max_BHTN, sum_BHTN, top_p=step.top_p, sinks=plan.sinks, block_size=plan.block_size)[:, :, 0]


def _attend(
    q_BHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    stored_BS: torch.Tensor,
    visible_BHS: torch.Tensor,
    scale: float,
    group_size: int,
) -> torch.Tensor:
    """Attention over the visible rows; rows that are not stored may hold NaN and must not reach the sums."""
    empty = ~stored_BS[:, :, None, None]
    out_BTHD, _ = masked_attention(
        q_BHD[:, None], k_BSKD.masked_fill(empty, 0), v_BSKD.masked_fill(empty, 0), visible_BHS[:, :, None], scale, group_size
    )
    return out_BTHD[:, 0]
