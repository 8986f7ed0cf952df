"""The attention function that transformers calls: local heads on the ring, retrieval heads dense or on selected blocks."""

# B batch  T chunk tokens  S cached tokens  H query heads  K kv heads  D head dim  I index-key sets  R index dim  N blocks
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AttentionInterface

from rtpurbo.kernels.local_attention import attend_local, ring_positions, write_ring
from rtpurbo.manifests.architectures import PreRopeTap
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.cache import Cache, LayerCache, Rows, write_rows
from rtpurbo.runtime.layout import LayerLayout, Run
from rtpurbo.runtime.selection import DecodePlan, SelectionObserver, attend_retrieval, mask_of

NAME = "rtpurbo"
# Elements of the largest boolean mask of the dense path: 64 MiB, whatever the length of the cache.
MASK_ELEMENTS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A layer's layout and its index projections in run-time order, on the model's device.

    retrieval: the retrieval heads among the query heads, a slice when they are contiguous. key_groups_I: the KV group that
    each index key projects. Without retrieval heads, and when top_p is 1, index_q_HRD and index_k_IRD are None.
    """

    layout: LayerLayout
    retrieval: slice | torch.Tensor
    key_groups_I: torch.Tensor
    index_q_HRD: torch.Tensor | None
    index_k_IRD: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """One forward pass over a chunk, handed through the model's keyword arguments as `rtpurbo`.

    counts_B: valid rows of the chunk, the first ones. newest: the largest length of any sequence after this chunk (host).
    """

    manifest: Manifest
    plans: tuple[LayerPlan, ...]
    decode_plans: tuple[DecodePlan | None, ...]
    cache: Cache
    tap: PreRopeTap
    phase: Literal["prefill", "decode"]
    counts_B: torch.Tensor
    rows: Rows
    newest: int
    on_selection: SelectionObserver | None = None


def plan_layer(layout: LayerLayout, weights: dict[str, torch.Tensor], layer: int, device: torch.device) -> LayerPlan:
    """Put one layer's layout and its reordered index projections (fp32) on the device; `weights` may lack the layer."""

    def ids(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def reordered(name: str, order: tuple[int, ...]) -> torch.Tensor | None:
        tensor = weights.get(f"layers.{layer}.{name}")
        return None if tensor is None else tensor.to(device, torch.float32)[ids(order)]

    heads = layout.retrieval_heads
    contiguous = heads == tuple(range(len(heads)))
    return LayerPlan(
        layout=layout,
        retrieval=slice(0, len(heads)) if contiguous else ids(heads),
        key_groups_I=ids(layout.key_groups),
        index_q_HRD=reordered("index_q", layout.index_q_rows),
        index_k_IRD=reordered("index_k", layout.index_k_rows),
    )


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    rtpurbo: AttentionContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, K, T, D] after RoPE -> out [B, T, H, D].

    Reads and writes the layer's cache in `rtpurbo`. Raises ValueError when the model is called without it.
    """
    if rtpurbo is None:
        raise ValueError("the model runs through rtpurbo.runtime only: its attention needs a cache that model(...) alone does not give")
    assert attention_mask is None, "masks come from positions; transformers builds none for this attention name"
    context, layer = rtpurbo, module.layer_idx
    plan, cache = context.plans[layer], context.cache.layers[layer]
    q_BTHD, k_BTKD, v_BTKD = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    index_q_BTHR, index_k_BTIR = _index(context, layer, plan)
    layout = plan.layout
    retained = layout.num_groups if context.cache.dense else layout.num_retained
    heads = retained * layout.group_size
    out_BTHD = q_BTHD.new_zeros(q_BTHD.shape)
    if retained < layout.num_groups:
        out_BTHD[:, :, heads:] = _attend_ring(
            context, cache, q_BTHD[:, :, heads:], k_BTKD[:, :, retained:], v_BTKD[:, :, retained:], scaling
        )
    if retained:
        k_BTKD, v_BTKD = k_BTKD[:, :, :retained], v_BTKD[:, :, :retained]
        assert cache.k_BSKD is not None
        assert cache.v_BSKD is not None
        write_rows(cache.k_BSKD, k_BTKD, context.rows)
        write_rows(cache.v_BSKD, v_BTKD, context.rows)
        if index_k_BTIR is not None:
            assert cache.index_k_BSIR is not None
            write_rows(cache.index_k_BSIR, index_k_BTIR, context.rows)
        if index_q_BTHR is not None:
            _attend_selected(context, layer, q_BTHD, index_q_BTHR, out_BTHD, scaling)
        for run in (Run(start=0, stop=retained, num_retrieval=layout.group_size),) if context.cache.dense else layout.runs:
            _attend_run(context, cache, run, out_BTHD, q_BTHD, k_BTKD, v_BTKD, scaling, dense=index_q_BTHR is None)
    return out_BTHD, None


AttentionInterface.register(NAME, attend)


def _index(context: AttentionContext, layer: int, plan: LayerPlan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Index queries [B, T, H_retrieval, R] (decode only) and keys [B, T, I, R] of the chunk, fp32, from before RoPE."""
    q_BTHD, k_BTKD = context.tap.pop(layer)
    if context.cache.dense or plan.index_q_HRD is None or plan.index_k_IRD is None:
        return None, None
    index_k_BTIR = torch.einsum("btid,ird->btir", k_BTKD[:, :, plan.key_groups_I].float(), plan.index_k_IRD)
    if context.phase == "prefill":
        return None, index_k_BTIR
    return torch.einsum("bthd,hrd->bthr", q_BTHD[:, :, plan.retrieval].float(), plan.index_q_HRD), index_k_BTIR


def _attend_ring(
    context: AttentionContext,
    cache: LayerCache,
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Local KV groups: the chunk attends to the old ring and itself, and is written after."""
    window, sinks, lengths_B = context.manifest.sliding_window, context.manifest.sinks, context.cache.lengths_B
    assert cache.ring_k_BWKD is not None
    assert cache.ring_v_BWKD is not None
    out_BTHD, _ = attend_local(
        q_BTHD,
        k_BTKD,
        v_BTKD,
        window=window,
        sinks=sinks,
        scale=scale,
        lengths_B=lengths_B,
        counts_B=context.counts_B,
        ring_k_BWKD=cache.ring_k_BWKD,
        ring_v_BWKD=cache.ring_v_BWKD,
    )
    write_ring(cache.ring_k_BWKD, k_BTKD, lengths_B, context.counts_B, window=window, sinks=sinks)
    write_ring(cache.ring_v_BWKD, v_BTKD, lengths_B, context.counts_B, window=window, sinks=sinks)
    return out_BTHD


def _attend_selected(
    context: AttentionContext, layer: int, q_BTHD: torch.Tensor, index_q_BTHR: torch.Tensor, out_BTHD: torch.Tensor, scale: float
) -> None:
    """Retrieval heads in decode, over the blocks that they select."""
    decode = context.decode_plans[layer]
    assert decode is not None
    visible_B = context.cache.lengths_B + context.counts_B
    ids_BHN, count_BH = attend_retrieval(
        decode,
        context.manifest,
        context.cache.layers[layer],
        q_BTHD,
        index_q_BTHR,
        out_BTHD,
        visible_B,
        newest=context.newest,
        scale=scale,
    )
    if context.on_selection is not None:
        context.on_selection(layer, mask_of(ids_BHN, count_BH), visible_B)


def _attend_run(
    context: AttentionContext,
    cache: LayerCache,
    run: Run,
    out_BTHD: torch.Tensor,
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    scale: float,
    *,
    dense: bool,
) -> None:
    """One run of retained groups: its retrieval heads densely (unless they selected), its local heads within the window."""
    assert cache.k_BSKD is not None
    assert cache.v_BSKD is not None
    groups, group_size = slice(run.start, run.stop), q_BTHD.shape[2] // context.plans[0].layout.num_groups
    q_BTKGD = q_BTHD.unflatten(2, (-1, group_size))[:, :, groups]
    out_BTKGD = out_BTHD.unflatten(2, (-1, group_size))[:, :, groups]
    lengths_B = context.cache.lengths_B
    n = run.num_retrieval
    if dense:
        position_BT = lengths_B.long()[:, None] + torch.arange(q_BTHD.shape[1], device=q_BTHD.device)
        cached = slice(0, context.newest)
        out_BTKGD[:, :, :, :n] = attend_causal(
            q_BTKGD[:, :, :, :n], cache.k_BSKD[:, cached, groups], cache.v_BSKD[:, cached, groups], position_BT, scale
        )
    if n < group_size:
        window, sinks = context.manifest.sliding_window, context.manifest.sinks
        # The ring that a local group would hold, gathered from the cache by position; empty slots are masked by attend_local.
        slot_BW = ring_positions(lengths_B, window, sinks).clamp(min=0)
        batch_B1 = torch.arange(slot_BW.shape[0], device=slot_BW.device)[:, None]
        out, _ = attend_local(
            q_BTKGD[:, :, :, n:].flatten(2, 3),
            k_BTKD[:, :, groups],
            v_BTKD[:, :, groups],
            window=window,
            sinks=sinks,
            scale=scale,
            lengths_B=lengths_B,
            counts_B=context.counts_B,
            ring_k_BWKD=cache.k_BSKD[:, :, groups][batch_B1, slot_BW],
            ring_v_BWKD=cache.v_BSKD[:, :, groups][batch_B1, slot_BW],
        )
        out_BTKGD[:, :, :, n:] = out.unflatten(2, (-1, group_size - n))


def attend_causal(
    q_BTKGD: torch.Tensor, k_BSKD: torch.Tensor, v_BSKD: torch.Tensor, position_BT: torch.Tensor, scale: float
) -> torch.Tensor:
    """Dense causal attention of G query heads per KV head: query t sees cached positions 0 ... position_BT[b, t].

    Works through the queries in pieces, so that no mask of T x S exists for long chunks. Returns [B, T, K, G, D].
    Cached keys and values must be finite even where nothing was written.
    """
    B, T, K, G, D = q_BTKGD.shape
    S = k_BSKD.shape[1]
    k_BKSD, v_BKSD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    step = max(1, MASK_ELEMENTS // (B * G * S))
    position_S = torch.arange(S, device=q_BTKGD.device)
    pieces = []
    for start in range(0, T, step):
        q_BKTGD = q_BTKGD[:, start : start + step].transpose(1, 2)
        rows = q_BKTGD.shape[2]
        visible_BTS = position_S <= position_BT[:, start : start + step, None]
        # The heads of a group share keys and mask: as extra rows they need no copy of the keys.
        visible_B1qS = visible_BTS[:, :, None].expand(B, rows, G, S).reshape(B, 1, rows * G, S)
        out = torch.nn.functional.scaled_dot_product_attention(
            q_BKTGD.reshape(B, K, rows * G, D), k_BKSD, v_BKSD, attn_mask=visible_B1qS, scale=scale
        )
        pieces.append(out.unflatten(2, (rows, G)).transpose(1, 2))
    return torch.cat(pieces, dim=1)
