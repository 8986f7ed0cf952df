"""Decode of retrieval heads: score the index keys, select blocks, attend to them; and the work plans that the kernels want."""

# B batch  T query tokens (1)  H query heads  D head dim  R index dim  N blocks
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rtpurbo.kernels.block_selection import SelectionPlan, plan_selection, score_and_select
from rtpurbo.kernels.sparse_attention import AttendPlan, attend_selected, plan_attention
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.cache import LayerCache
from rtpurbo.runtime.layout import LayerLayout

# Called with (layer, selected_BHN of the retrieval heads in run-time order, visible_B) at every decode step.
SelectionObserver = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Work division and scratch memory of one layer's decode, for one batch and capacity."""

    selection: SelectionPlan
    attention: AttendPlan


def plan_decode(manifest: Manifest, layout: LayerLayout, *, batch: int, capacity: int, device: torch.device) -> DecodePlan | None:
    """The plan of a layer, or None where nothing is selected: no retrieval head, or top_p 1."""
    heads = layout.retrieval_heads
    if not heads or manifest.top_p >= 1:
        return None
    return DecodePlan(
        selection=plan_selection(
            layout.key_sets,
            num_sets=len(layout.key_groups),
            batch=batch,
            capacity=capacity,
            device=device,
            block_size=manifest.decode_block,
        ),
        attention=plan_attention(
            [(head,) for head in heads],
            [head // layout.group_size for head in heads],
            batch=batch,
            head_dim=manifest.model.head_dim,
            device=device,
            block_size=manifest.decode_block,
        ),
    )


def attend_retrieval(
    plan: DecodePlan,
    manifest: Manifest,
    cache: LayerCache,
    q_BTHD: torch.Tensor,
    index_q_BTHR: torch.Tensor,
    out_BTHD: torch.Tensor,
    visible_B: torch.Tensor,
    *,
    newest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the retrieval heads' attention over their selected blocks into out_BTHD; other heads are not touched.

    q_BTHD and out_BTHD hold all heads of the layer, index_q_BTHR the retrieval heads'. visible_B: int32 cached tokens, the query's
    own included; newest: the largest of them. Returns the selection, ids int32 [B, H, N] ascending and count int32 [B, H].
    """
    assert cache.index_k_BSIR is not None
    assert cache.k_BSKD is not None
    assert cache.v_BSKD is not None
    ids_BHN, count_BH = score_and_select(
        index_q_BTHR[:, 0].contiguous(),
        cache.index_k_BSIR[:, :newest],
        plan=plan.selection,
        lengths_B=visible_B,
        scale=manifest.indexer.scale,
        top_p=manifest.top_p,
        sinks=manifest.sinks,
    )
    attend_selected(
        q_BTHD[:, 0],
        cache.k_BSKD[:, :newest],
        cache.v_BSKD[:, :newest],
        plan=plan.attention,
        lengths_B=visible_B,
        ids_BJN=ids_BHN,
        count_BJ=count_BH,
        scale=scale,
        out_BHD=out_BTHD[:, 0],
    )
    return ids_BHN, count_BH


def mask_of(ids_BHN: torch.Tensor, count_BH: torch.Tensor) -> torch.Tensor:
    """Bool [B, H, N]: the blocks that the first `count` ids name."""
    blocks = ids_BHN.shape[2]
    listed_BHN = torch.arange(blocks, device=ids_BHN.device) < count_BH[..., None]
    # Places beyond the count may hold anything: they go to a column of their own.
    place_BHN = torch.where(listed_BHN, ids_BHN, blocks).long()
    mask_BHN = torch.zeros(*count_BH.shape, blocks + 1, dtype=torch.bool, device=ids_BHN.device)
    return mask_BHN.scatter(2, place_BHN, True)[..., :blocks]
