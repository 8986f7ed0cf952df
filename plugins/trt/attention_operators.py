"""Steps of attention as launches: append, selection, and attention by role, in prefill and in decode."""

# B batch  T chunk tokens  S cached tokens (capacity)  W ring slots  H query heads  K kv heads  G query heads per kv head  D head dim
# J retrieval heads  I index-key sets  R index dim  L local kv heads  O heads of fused projections
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.kernels.block_selection import kernel as selection_kernel
from rtpurbo.kernels.block_selection import plan_selection
from rtpurbo.kernels.block_selection.scoring import MOST_HELD_TILES
from rtpurbo.kernels.cache_write import kernel as write_kernel
from rtpurbo.kernels.division import SHARED_BYTES
from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention import kernel as prefill_kernel
from rtpurbo.kernels.local_attention.tiles import UNBOUNDED
from rtpurbo.kernels.prefill_layer import runs_of
from rtpurbo.kernels.prefill_selection import kernel as select_kernel
from rtpurbo.kernels.sparse_attention import kernel as decode_kernel
from rtpurbo.kernels.sparse_attention import plan_attention
from rtpurbo.plugins.trt.nodes import DECODE
from rtpurbo.plugins.trt.site import Attributes, Shapes, Site, Tensors

# Blocks of the ring attention; its selection is "everything", so any block size gives the same result.
RING_BLOCK = 64
# Queries and keys of a tile of the Hopper kernel.
KERNEL_BLOCK = 128


def plan_ring(attributes: Attributes, shapes: Shapes, site: Site) -> Any:
    """Work division of local groups for one token, None for a chunk."""
    (B, T, H, D), K = shapes[0], shapes[1][2]
    return None if T > 1 else divide_ring(B, H, K, D, site)


def divide_ring(B: int, H: int, K: int, D: int, site: Site) -> Any:
    """Work division of one token of B sequences over the rings of K local groups with H heads."""
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
        attend_local_chunk(attributes, inputs, outputs[0], site)
        return
    # One token: the write replaces the one position that leaves the window, and the filled slots are what the query sees.
    visible = torch.empty_like(lengths)
    site.run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, window, sinks, visible))
    attend_local_token(attributes, plan, q, ring_k, ring_v, visible, outputs[0], site)


def attend_local_chunk(attributes: Attributes, inputs: Tensors, out: torch.Tensor, site: Site) -> None:
    """A chunk of local groups attends to the old ring and itself; then the ring is written."""
    q, k, v, ring_k, ring_v, lengths, counts = inputs
    site.run(_prefill(q, k, v, lengths, counts, out, attributes, site, ring=(ring_k, ring_v)))
    site.run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, attributes["window"], attributes["sinks"]))


def attend_local_token(
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
    return divide_selection(attributes, B, S, sets, site)


def divide_selection(attributes: Attributes, B: int, S: int, sets: int, site: Site) -> Any:
    """Work division of a selection among S cached tokens of B sequences, with so many sets of index keys."""
    key_sets = list(attributes["key_sets"])
    return plan_selection(
        key_sets, num_sets=sets, batch=B, capacity=S, device=site.device, block_size=attributes["block"],
        pipeline_bytes=site.pipeline_bytes, held_tiles=MOST_HELD_TILES, cuda=False,
    )  # fmt: skip


def select_blocks(attributes: Attributes, plan: Any, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """SelectBlocks; prefill reads no selection."""
    index_q, index_k, visible, _ = inputs
    if plan is not None:
        launch_selection(attributes, plan, index_q, index_k, visible, attributes["scale"], outputs[0], outputs[1], site)


def launch_selection(
    attributes: Attributes, plan: Any, index_q: torch.Tensor, index_k: torch.Tensor, visible: torch.Tensor, scale: float,
    ids: torch.Tensor, count: torch.Tensor, site: Site,
) -> None:  # fmt: skip
    """Index scores of one token and histogram top-p: writes ids and count."""
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
    return divide_retained(attributes, B, H, D, site, selects=selects)


def divide_retained(attributes: Attributes, B: int, H: int, D: int, site: Site, *, selects: bool) -> RetainedPlan:
    """Work division of one token of B sequences over the caches of retained groups with H heads."""
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
    return PooledPlan(retained=plan_retained(attributes, shapes, site, selects=True), key_set_J=key_sets_of(attributes, site))


def key_sets_of(attributes: Attributes, site: Site) -> torch.Tensor:
    """The set of index keys of each retrieval head, int32 [J]."""
    return torch.tensor(list(attributes["key_sets"]), dtype=torch.int32, device=site.device)


def attend_pooled(attributes: Attributes, plan: PooledPlan, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    """AttendPooled."""
    *retained, index_q, index_k = inputs
    if plan.retained is not None:
        attend_retained(attributes, plan.retained, retained[:8], outputs, site)
    else:
        attend_pooled_chunk(attributes, plan.key_set_J, retained[:5], index_q, index_k, outputs[0], site)


def attend_pooled_chunk(
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
