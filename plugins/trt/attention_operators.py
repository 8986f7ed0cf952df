"""What the attention nodes launch: RoPE and append, selection, and attention by role, in prefill and in decode."""

# B batch  T chunk tokens  S cached tokens (capacity)  W ring slots  H query heads  K kv heads  G query heads per kv head  D head dim
# J retrieval heads  I index-key sets  R index dim  L local kv heads  O heads of fused projections
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.kernels.append import AppendPlan
from rtpurbo.kernels.append import kernel as append_kernel
from rtpurbo.kernels.block_selection import kernel as selection_kernel
from rtpurbo.kernels.block_selection import plan_selection
from rtpurbo.kernels.block_selection.scoring import MOST_HELD_TILES
from rtpurbo.kernels.cache_write import kernel as write_kernel
from rtpurbo.kernels.decode_layer import DecodeStep, fused
from rtpurbo.kernels.division import SHARED_BYTES
from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention import kernel as prefill_kernel
from rtpurbo.kernels.local_attention.tiles import UNBOUNDED
from rtpurbo.kernels.prefill_layer import runs_of
from rtpurbo.kernels.prefill_selection import kernel as select_kernel
from rtpurbo.kernels.sparse_attention import kernel as decode_kernel
from rtpurbo.kernels.sparse_attention import plan_attention
from rtpurbo.plugins.trt.nodes import DECODE, Node
from rtpurbo.plugins.trt.site import Attributes, Shapes, Site, Tensors

# Blocks of the ring attention; its selection is "everything", so any block size gives the same result.
RING_BLOCK = 64
# Queries and keys of a tile of the Hopper kernel.
KERNEL_BLOCK = 128


def plan_ring(attributes: Attributes, shapes: Shapes, site: Site) -> Any:
    """Work division of local groups for one token, None for a chunk."""
    (B, T, H, D), K = shapes[0], shapes[1][2]
    return None if T > 1 else _plan_ring(B, H, K, D, site)


def _plan_ring(B: int, H: int, K: int, D: int, site: Site) -> Any:
    G = H // K
    return plan_attention(
        [range(g * G, (g + 1) * G) for g in range(K)], range(K), batch=B, head_dim=D, device=site.device, block_size=RING_BLOCK,
        reads="ring", pipeline_bytes=site.pipeline_bytes,
    )  # fmt: skip


def attend_local(attributes: Attributes, plan: Any, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """AttendLocal."""
    q, k, v, ring_k, ring_v, lengths, counts = inputs
    window, sinks = attributes["window"], attributes["sinks"]
    if plan is None:
        _local_chunk(attributes, inputs, outputs[0], site)
        return
    # One token: the write replaces the one position that leaves the window, and the filled slots are what the query sees.
    visible = torch.empty_like(lengths)
    site.run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, window, sinks, visible))
    _local_token(attributes, plan, q, ring_k, ring_v, visible, outputs[0], site)


def _local_chunk(attributes: Attributes, inputs: Tensors, out: torch.Tensor, site: Site) -> None:
    """A chunk of local groups attends to the old ring and itself; then the ring is written."""
    q, k, v, ring_k, ring_v, lengths, counts = inputs
    site.run(_prefill(q, k, v, lengths, counts, out, attributes, site, ring=(ring_k, ring_v)))
    site.run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, attributes["window"], attributes["sinks"]))


def _local_token(
    attributes: Attributes, plan: Any, q: torch.Tensor, ring_k: torch.Tensor, ring_v: torch.Tensor, visible: torch.Tensor,
    out: torch.Tensor, site: Site,
) -> None:  # fmt: skip
    """One token of local groups, already in the ring."""
    lse = _lse(q[:, 0])
    site.run(decode_kernel.describe(plan, q[:, 0], ring_k, ring_v, visible, None, None, attributes["scale"], out[:, 0], lse))


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, out: torch.Tensor,
    attributes: Attributes, site: Site, *, ring: tuple[torch.Tensor, torch.Tensor] | None = None, dense: bool = False,
    lists: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:  # fmt: skip
    """Attention of a chunk, to its ring and itself or, without a ring, to a cache by position.

    dense: within no window. lists: ids and counts of the key blocks of every block of queries, of `prefill_block` both.
    """
    ring_k, ring_v = ring or (None, None)
    window = UNBOUNDED.value if dense else attributes["window"]
    listed = None if lists is None else attributes["prefill_block"]
    tensors = [x for x in (q, k, v, ring_k, ring_v) if x is not None]
    mask: dict[str, Any] = {
        "window": window, "sinks": attributes["sinks"], "scale": attributes["scale"], "by_position": ring is None, "lists": lists,
    }  # fmt: skip
    if listed not in (None, KERNEL_BLOCK) or not _suits_hopper(tensors, attributes["scale"], site):
        tiles: dict[str, Any] = prefill_kernel.tiles_that_fit(q.shape[-1], q.element_size(), SHARED_BYTES[site.capability], listed)
        return prefill_kernel.describe(q, k, v, lengths, counts, ring_k, ring_v, out, None, **mask, **tiles)
    from rtpurbo.kernels.local_attention import hopper_kernel

    K = k.shape[2]
    q, out = (x if x.dim() == 5 else x.unflatten(2, (K, x.shape[2] // K)) for x in (q, out))
    return hopper_kernel.describe(q, k, v, lengths, counts, ring_k, ring_v, out, None, **mask, programs=site.processors)


def _suits_hopper(tensors: list[torch.Tensor], scale: float, site: Site) -> bool:
    """Whether the Hopper kernel can attend to these tensors, as kernels.local_attention.obstacle_of says."""
    copyable = all(x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:-1]) for x in tensors)
    wide = tensors[0].dtype in (torch.float16, torch.bfloat16) and tensors[0].shape[-1] in (64, 128)
    return site.capability == 90 and wide and copyable and scale > 0


def _lse(q_BHD: torch.Tensor) -> torch.Tensor:
    return torch.empty(q_BHD.shape[:2], dtype=torch.float32, device=q_BHD.device)


def append(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """Append and AppendKV."""
    caches = (len(inputs) - 2) // 2
    site.run(write_kernel.describe(inputs[:caches], inputs[caches : 2 * caches], inputs[-2], inputs[-1], None, 0))


def plan_selection_node(attributes: Attributes, shapes: Shapes, site: Site) -> Any:
    """Work division of SelectBlocks in decode, None in prefill."""
    (B, T, _, _), (_, S, sets, _), phase = shapes[0], shapes[1], shapes[3][0]
    if phase != DECODE:
        return None
    assert T == 1, f"a decode step has {T} tokens"
    return _plan_selection(attributes, B, S, sets, site)


def _plan_selection(attributes: Attributes, B: int, S: int, sets: int, site: Site) -> Any:
    key_sets = list(attributes["key_sets"])
    return plan_selection(
        key_sets, num_sets=sets, batch=B, capacity=S, device=site.device, block_size=attributes["block"],
        pipeline_bytes=site.pipeline_bytes, held_tiles=MOST_HELD_TILES,
    )  # fmt: skip


def select_blocks(attributes: Attributes, plan: Any, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """SelectBlocks; prefill reads no selection."""
    index_q, index_k, visible, _ = inputs
    if plan is not None:
        _select(attributes, plan, index_q, index_k, visible, attributes["scale"], outputs[0], outputs[1], site)


def _select(
    attributes: Attributes, plan: Any, index_q: torch.Tensor, index_k: torch.Tensor, visible: torch.Tensor, scale: float,
    ids: torch.Tensor, count: torch.Tensor, site: Site,
) -> None:  # fmt: skip
    top_p, sinks = attributes["top_p_ppb"] / 1e9, attributes["sinks"]
    site.run(selection_kernel.describe(plan, index_q[:, 0], index_k, visible, scale, top_p, sinks, ids, count))


@dataclass(frozen=True, kw_only=True)
class RetainedPlan:
    """Work division of the retrieval heads and of the local heads (None if there are none) of retained groups, for one token."""

    retrieval: Any
    local: Any


def plan_retained(attributes: Attributes, shapes: Shapes, site: Site, *, selects: bool) -> RetainedPlan | None:
    """Work division of AttendRetained and AttendCausal in decode, None for a chunk."""
    B, T, H, D = shapes[0]
    if (shapes[8][0] != DECODE) if selects else (T > 1):
        return None
    return _plan_retained(attributes, B, H, D, site, selects=selects)


def _plan_retained(attributes: Attributes, B: int, H: int, D: int, site: Site, *, selects: bool) -> RetainedPlan:
    counts, block = attributes["retrieval_counts"], attributes.get("block", RING_BLOCK)
    G = H // len(counts)
    jobs = [range(g * G, g * G + n) for g, n in enumerate(counts)]
    rest = [(range(g * G + n, (g + 1) * G), g) for g, n in enumerate(counts) if n < G]
    if selects:
        heads = [head for job in jobs for head in job]
        work, kv_heads = [(head,) for head in heads], [head // G for head in heads]
    else:
        work, kv_heads = jobs, list(range(len(jobs)))
    retrieval = plan_attention(
        work, kv_heads, batch=B, head_dim=D, device=site.device, block_size=block, reads="list" if selects else "all",
        pipeline_bytes=site.pipeline_bytes,
    )  # fmt: skip
    local = None
    if rest:
        local = plan_attention(
            [heads for heads, _ in rest], [g for _, g in rest], batch=B, head_dim=D, device=site.device, block_size=RING_BLOCK,
            reads="ring", pipeline_bytes=site.pipeline_bytes,
        )  # fmt: skip
    return RetainedPlan(retrieval=retrieval, local=local)


def attend_retained(attributes: Attributes, plan: RetainedPlan | None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """AttendRetained and AttendCausal."""
    q, k, v, lengths, counts, visible = inputs[:6]
    ids, count = (inputs[6], inputs[7]) if len(inputs) > 6 else (None, None)
    out, scale = outputs[0], attributes["scale"]
    if plan is not None:
        q_BHD, out_BHD, lse = q[:, 0], out[:, 0], _lse(q[:, 0])
        site.run(decode_kernel.describe(plan.retrieval, q_BHD, k, v, visible, ids, count, scale, out_BHD, lse))
        if plan.local is not None:
            window, sinks = attributes["window"], attributes["sinks"]
            site.run(decode_kernel.describe(plan.local, q_BHD, k, v, visible, None, None, scale, out_BHD, lse, window, sinks))
        return
    K = k.shape[2]
    q_BTKGD, out_BTKGD = (x.unflatten(2, (K, x.shape[2] // K)) for x in (q, out))
    for groups, n in runs_of(tuple(attributes["retrieval_counts"])):
        for heads, dense in ((slice(0, n), True), (slice(n, q_BTKGD.shape[3]), False)):
            if heads.start < heads.stop:
                place = (slice(None), slice(None), groups, heads)
                keys = k[:, :, groups], v[:, :, groups]
                site.run(_prefill(q_BTKGD[place], *keys, lengths, counts, out_BTKGD[place], attributes, site, dense=dense))


@dataclass(frozen=True, kw_only=True)
class PooledPlan:
    """Work division of the retained groups for one token, None for a chunk, and the set of index keys of every retrieval head."""

    retained: RetainedPlan | None
    key_set_J: torch.Tensor


def plan_pooled(attributes: Attributes, shapes: Shapes, site: Site) -> PooledPlan:
    """What AttendPooled knows of its shapes."""
    return PooledPlan(retained=plan_retained(attributes, shapes, site, selects=True), key_set_J=_key_sets(attributes, site))


def _key_sets(attributes: Attributes, site: Site) -> torch.Tensor:
    return torch.tensor(list(attributes["key_sets"]), dtype=torch.int32, device=site.device)


def attend_pooled(attributes: Attributes, plan: PooledPlan, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """AttendPooled."""
    *retained, index_q, index_k = inputs
    if plan.retained is not None:
        attend_retained(attributes, plan.retained, retained[:8], outputs, site)
    else:
        _pooled_chunk(attributes, plan.key_set_J, retained[:5], index_q, index_k, outputs[0], site)


def _pooled_chunk(
    attributes: Attributes, key_set_J: torch.Tensor, inputs: Tensors, index_q: torch.Tensor, index_k: torch.Tensor, out: torch.Tensor,
    site: Site,
) -> None:  # fmt: skip
    """A chunk of the retained groups: retrieval heads over the blocks that they select, the others within window + sinks."""
    q, k, v, lengths, counts = inputs
    (B, T), K, block, device = q.shape[:2], k.shape[2], attributes["prefill_block"], q.device
    (S, sets, R), top_p = index_k.shape[1:], attributes["prefill_ppb"] / 1e9
    Q, N = -(-T // block), -(-S // block)
    pooled = torch.empty((B, sets, R, N), dtype=torch.float32, device=device)
    site.run(select_kernel.describe_pool(index_k, lengths, counts, pooled, block=block))
    q_BTKGD, out_BTKGD = (x.unflatten(2, (K, x.shape[2] // K)) for x in (q, out))
    first = 0
    for groups, n in runs_of(tuple(attributes["retrieval_counts"])):
        chosen, other = ((slice(None), slice(None), groups, heads) for heads in (slice(0, n), slice(n, q_BTKGD.shape[3])))
        keys, heads = (k[:, :, groups], v[:, :, groups]), slice(first, first + n * q_BTKGD[chosen].shape[2])
        first = heads.stop
        ids = torch.empty((B, heads.stop - heads.start, Q, N), dtype=torch.int32, device=device)
        count = torch.empty(ids.shape[:3], dtype=torch.int32, device=device)
        site.run(
            select_kernel.describe_select(
                index_q[:, :, heads], pooled, key_set_J[heads], lengths, counts, ids, count, scale=attributes["index_scale"], top_p=top_p,
                sinks=attributes["sinks"], block=block,
            )
        )  # fmt: skip
        site.run(_prefill(q_BTKGD[chosen], *keys, lengths, counts, out_BTKGD[chosen], attributes, site, dense=True, lists=(ids, count)))
        if n < q_BTKGD.shape[3]:
            site.run(_prefill(q_BTKGD[other], *keys, lengths, counts, out_BTKGD[other], attributes, site))


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
        selection=_plan_selection(attributes, B, named["index_cache"][2], named["index_cache"][1], site) if selects and decodes else None,
        retained=_plan_retained(attributes, B, retained * G, D, site, selects=selects) if retained and decodes else None,
        ring=_plan_ring(B, local * G, local, D, site) if local and one else None,
        fused=_plan_fused(attributes, layer, named["index_cache"][2], site) if whole else None,
        key_set_J=_key_sets(attributes, site) if "prefill_ppb" in attributes and not decodes else None,
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
            _select(attributes, plan.selection, index_q, index_cache, visible, attributes["index_scale"], *chosen, site)
        kept = (q[:, :, : retained * G], k_cache, v_cache, lengths, counts, visible, *chosen)
        if plan.key_set_J is not None and index_q is not None and index_cache is not None:
            _pooled_chunk(attributes, plan.key_set_J, kept[:5], index_q, index_cache, out[:, :, : retained * G], site)
        else:
            attend_retained(attributes, plan.retained, kept, (out[:, :, : retained * G],), site)
    if ring_k is not None and ring_v is not None:
        local = q[:, :, retained * G :], k[:, :, retained:], v[:, :, retained:]
        if plan.ring is None:
            _local_chunk(attributes, (*local, ring_k, ring_v, lengths, counts), out[:, :, retained * G :], site)
        else:
            _local_token(attributes, plan.ring, local[0], ring_k, ring_v, visible, out[:, :, retained * G :], site)


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
