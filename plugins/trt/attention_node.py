"""The attention node: a layer's attention between its projections, from RoPE and append to every head's output."""

# B batch  T chunk tokens  S cached tokens (capacity)  H query heads  K kv heads  G query heads per kv head  D head dim
# J retrieval heads  I index-key sets  R index dim  O heads of fused projections
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.kernels.append import AppendPlan
from rtpurbo.kernels.append import kernel as append_kernel
from rtpurbo.kernels.block_selection.scoring import MOST_HELD_TILES
from rtpurbo.kernels.decode_layer import DecodeStep, fused
from rtpurbo.plugins.trt.attention_operators import (
    RING_BLOCK,
    RetainedPlan,
    attend_local_chunk,
    attend_local_token,
    attend_pooled_chunk,
    attend_retained,
    divide_retained,
    divide_ring,
    divide_selection,
    key_sets_of,
    launch_selection,
)
from rtpurbo.plugins.trt.nodes import DECODE, Node
from rtpurbo.plugins.trt.site import Attributes, Shapes, Site, Tensors

# Sequences that the one launch of a decode step is compiled for.
FUSED_BATCHES = (1, 4, fused.FEW_SEQUENCES)


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What an attention node knows of its layer and, for one token, its work division (None where there is nothing to divide).

    order_O: which head of qkv each run-time head is, None where it is its own. fused: of the whole layer in one launch, in 16 bits.
    """

    append: AppendPlan
    order_O: torch.Tensor | None
    selection: Any
    retained: RetainedPlan | None
    ring: Any
    fused: Any
    key_set_J: torch.Tensor | None


def plan_attention_node(node: Node, attributes: Attributes, shapes: Shapes, site: Site) -> AttentionPlan:
    """Tables and work division of an attention node."""
    named = dict(zip((port.name for port in node.inputs), shapes, strict=True))
    (B,), rows = named["lengths"], named["qkv"][0]
    T = rows // B
    H, D, order = attributes["heads"], 2 * named["cos"][1], list(attributes["order"])
    retained, local = (named[name][2] if name in named else 0 for name in ("k_cache", "ring_k"))
    groups, selects = retained + local, "index_q" in named
    G, one = H // groups, T == 1
    decodes = named["phase"][0] == DECODE if selects else one
    assert one or not decodes, f"a decode step has {T} tokens"
    retrieval_heads, key_groups = (list(attributes.get(name, ())) for name in ("retrieval_heads", "key_groups"))
    place = {head: j for j, head in enumerate(retrieval_heads)}
    layer = {
        "group_size": G, "num_groups": groups, "retrieval_counts": attributes.get("retrieval_counts", ()), "batch": B, "head_dim": D,
        "block_size": attributes.get("block", RING_BLOCK),
    }  # fmt: skip
    whole = decodes and selects and _suits_fused(attributes, B, D, named["index_cache"][2], site)

    def table(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=site.device)

    facts = AppendPlan(
        num_heads=H, num_groups=groups, head_dim=D, eps=attributes.get("eps", 0.0), retrieval_heads=tuple(retrieval_heads),
        key_groups=tuple(key_groups), norms_2D=None, index_q_PRD=None, index_k_IRD=None,
        place_H=table([place.get(head, -1) for head in range(H)]),
        group_I=table(key_groups),
    )  # fmt: skip
    return AttentionPlan(
        append=facts,
        order_O=None if order == list(range(len(order))) else table(order),
        selection=divide_selection(attributes, B, named["index_cache"][2], named["index_cache"][1], site) if selects and decodes else None,
        retained=divide_retained(attributes, B, retained * G, D, site, selects=selects) if retained and decodes else None,
        ring=divide_ring(B, local * G, local, D, site) if local and one else None,
        fused=_plan_fused(attributes, layer, named["index_cache"][2], site) if whole else None,
        key_set_J=key_sets_of(attributes, site) if "prefill_ppb" in attributes and not decodes else None,
    )


def _suits_fused(attributes: Attributes, B: int, D: int, S: int, site: Site) -> bool:
    """Whether a layer decodes in one launch: as kernels.decode_layer.choose_impl says."""
    ascending = list(attributes["key_sets"]) == sorted(attributes["key_sets"])
    return ascending and fused.is_faster(divmod(site.capability, 10), torch.bfloat16, B, S, D)


def _plan_fused(attributes: Attributes, layer: dict[str, Any], S: int, site: Site) -> Any:
    """The one launch is compiled for a largest batch, seconds each: a plan for more sequences than there are saves an engine some."""
    layer = layer | {"batch": min(size for size in FUSED_BATCHES if size >= layer["batch"])}
    return fused.plan_fused(
        **layer, key_sets=list(attributes["key_sets"]), capacity=S, device=site.device,
        pipeline_bytes=site.pipeline_bytes, held_tiles=MOST_HELD_TILES, early_launch=site.launches_early,
    )  # fmt: skip


def attention(node: Node, attributes: Attributes, plan: AttentionPlan, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """An attention node: RoPE and append in one launch, then each group by its role."""
    named = dict(zip((port.name for port in node.inputs), inputs, strict=True))
    lengths, counts, visible = (named[name] for name in ("lengths", "counts", "visible"))
    facts = plan.append
    H, D, G = facts.num_heads, facts.head_dim, facts.num_heads // facts.num_groups
    qkv, out = (x.unflatten(0, (lengths.shape[0], -1)) for x in (named["qkv"], outputs[0]))
    out = out.unflatten(2, (H, D))
    k_cache, v_cache = named.get("k_cache"), named.get("v_cache")
    index_cache = named["index_cache"].transpose(1, 2) if "index_cache" in named else None
    ring_k, ring_v = named.get("ring_k"), named.get("ring_v")
    retained = 0 if k_cache is None else k_cache.shape[2]
    turned, index_q = torch.empty_like(qkv), None
    if index_cache is not None:
        index_q = torch.empty((*qkv.shape[:2], *named["index_q"].shape[:2]), dtype=torch.float32, device=qkv.device)
    # A chunk's own attention still needs what it will replace in the ring; one token's does not.
    rings = (None, None) if plan.ring is None else (ring_k, ring_v)
    weights, tables, caches = _with_weights(facts, named), (named["cos"], named["sin"]), (k_cache, v_cache, index_cache)
    mask = attributes["window"], attributes["sinks"]
    launch = append_kernel.describe(
        qkv, weights, *tables, lengths, counts, *caches, *rings, *mask, index_q, turned, plan.order_O, early_launch=site.launches_early
    )
    site.run(launch)
    q, k, v = turned.unflatten(2, (-1, D)).split((H, facts.num_groups, facts.num_groups), dim=2)
    if k_cache is not None and v_cache is not None:
        chosen: Tensors = ()
        if plan.selection is not None and index_q is not None and index_cache is not None:
            J, blocks = index_q.shape[2], -(-index_cache.shape[1] // attributes["block"])
            ids = torch.empty((qkv.shape[0], J, blocks), dtype=torch.int32, device=qkv.device)
            chosen = (ids, torch.empty((qkv.shape[0], J), dtype=torch.int32, device=qkv.device))
            if plan.fused is not None and qkv.dtype != torch.float32:
                step = DecodeStep(
                    q_BHD=q[:, 0], index_q_BHR=index_q[:, 0], lengths_B=visible, k_BSKD=k_cache, v_BSKD=v_cache, index_k_BSIR=index_cache,
                    ring_k_BWKD=ring_k, ring_v_BWKD=ring_v, scale=attributes["scale"], index_scale=attributes["index_scale"],
                    top_p=attributes["top_p_ppb"] / 1e9, out_BHD=out[:, 0],
                )  # fmt: skip
                launch = fused.describe(plan.fused, step, *mask, *chosen, 0)
                site.run(launch)
                return
            launch_selection(attributes, plan.selection, index_q, index_cache, visible, attributes["index_scale"], *chosen, site)
        kept = (q[:, :, : retained * G], k_cache, v_cache, lengths, counts, visible, *chosen)
        if plan.key_set_J is not None and index_q is not None and index_cache is not None:
            attend_pooled_chunk(attributes, plan.key_set_J, kept[:5], index_q, index_cache, out[:, :, : retained * G], site)
        else:
            attend_retained(attributes, plan.retained, kept, (out[:, :, : retained * G],), site)
    if ring_k is not None and ring_v is not None:
        local = q[:, :, retained * G :], k[:, :, retained:], v[:, :, retained:]
        if plan.ring is None:
            attend_local_chunk(attributes, (*local, ring_k, ring_v, lengths, counts), out[:, :, retained * G :], site)
        else:
            attend_local_token(attributes, plan.ring, local[0], ring_k, ring_v, visible, out[:, :, retained * G :], site)


def _with_weights(facts: AppendPlan, named: dict[str, torch.Tensor]) -> AppendPlan:
    """The layer's facts with the tensors of one execution."""
    return AppendPlan(
        **{
            **vars(facts),
            "norms_2D": named.get("norms"),
            "index_q_PRD": named.get("index_q"),
            "index_k_IRD": named.get("index_k"),
        }
    )
