"""The forward pass: a chunk of prompt tokens, or one new token per sequence, through all layers; eager on a CPU, kernels on a GPU."""

# B batch  T chunk tokens  t tokens of the batch, flat  C hidden  M (H + 2 K) D  H query heads  K kv heads  D head dim
# E experts  X experts a token  V vocabulary  R index dim
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import embedding

from rtpurbo.kernels.append import rope_append
from rtpurbo.kernels.cache_write import write_cache
from rtpurbo.kernels.decode_layer import DecodeLayerPlan, decode_layer
from rtpurbo.kernels.experts import mix_experts
from rtpurbo.kernels.gated_silu import gated_silu
from rtpurbo.kernels.norm_linear import linear, norm_linear
from rtpurbo.kernels.prefill_layer import prefill_layer
from rtpurbo.kernels.router import route_tokens
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.cache import CacheView, LayerCache
from rtpurbo.runtime.model import Experts, Layer, Mlp, Model
from rtpurbo.runtime.plans import LayerPlan, SelectionObserver, mask_of

# The widest activations of an MLP stay below this, whatever the chunk.
MLP_BYTES = 512 << 20

# (layer index, fused projections [B, T, M]) -> attention output [t, H D].
Attend = Callable[[int, torch.Tensor], torch.Tensor]


def prefill_chunk(
    model: Model,
    plans: tuple[LayerPlan, ...],
    manifest: Manifest,
    cache: CacheView,
    ids_BT: torch.Tensor,
    counts_B: torch.Tensor,
    *,
    newest: int,
    keep: list[int],
) -> torch.Tensor:
    """Append the first counts_B (int32) tokens of every row of ids_BT with the prefill pattern and advance the lengths.

    newest: no sequence is longer than this afterwards (host). keep: rows of the chunk whose logits are returned, [B, len(keep), V].
    """
    shared: dict[str, Any] = {"lengths_B": cache.lengths_B, "counts_B": counts_B}
    ring: dict[str, Any] = {"window": manifest.sliding_window, "sinks": manifest.sinks}
    cos_SE, sin_SE = model.rope(newest)
    topp = manifest.prefill_pattern == "topp" and not cache.dense

    def attend(i: int, qkv_BTM: torch.Tensor) -> torch.Tensor:
        plan, layer = plans[i], cache.layers[i]
        select = topp and plan.selects
        q_BTHD, k_BTKD, v_BTKD, index_q_BTHR = rope_append(
            qkv_BTM, plan=plan.append, cos_SE=cos_SE, sin_SE=sin_SE, **shared, index_queries=select, **_retained(layer),
            index_k_BSIR=layer.index_k_BSIR,
        )  # fmt: skip
        selection: dict[str, Any] = {
            "pattern": "topp", "index_q_BTHR": index_q_BTHR, "index_k_BSIR": layer.index_k_BSIR, "key_sets": plan.layout.key_sets,
            "index_scale": manifest.indexer.scale, "top_p": manifest.prefill_mass, "prefill_block": manifest.prefill_block,
        }  # fmt: skip
        out_BTHD = prefill_layer(
            q_BTHD, k_BTKD, v_BTKD, retrieval_counts=plan.layout.retrieval_counts, newest=newest, scale=model.scale, dense=cache.dense,
            **shared, **ring, **_retained(layer), **_rings(layer), **(selection if select else {}),
        )  # fmt: skip
        if layer.ring_k_BWKD is not None and layer.ring_v_BWKD is not None:
            # After the chunk attended: its early rows still saw the keys that this replaces.
            first = model.num_groups - layer.ring_k_BWKD.shape[2]
            local = k_BTKD[:, :, first:].contiguous(), v_BTKD[:, :, first:].contiguous()
            write_cache((layer.ring_k_BWKD, layer.ring_v_BWKD), local, **shared, **ring)
        return out_BTHD.flatten(2).flatten(0, 1)

    x_tC, residual_tC = _layers(model, ids_BT, attend)
    cache.lengths_B.add_(counts_B)
    B, T = ids_BT.shape
    if not keep:
        return x_tC.new_empty(B, 0, model.head_VC.shape[0])
    kept = [x.unflatten(0, (B, T))[:, keep].flatten(0, 1) for x in (x_tC, residual_tC)]
    return _logits(model, *kept).unflatten(0, (B, len(keep)))


def decode_step(
    model: Model,
    plans: tuple[LayerPlan, ...],
    manifest: Manifest,
    cache: CacheView,
    decode_plans: tuple[DecodeLayerPlan, ...],
    ids_B: torch.Tensor,
    active_B: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    on_selection: SelectionObserver | None = None,
) -> torch.Tensor:
    """Append one token to every sequence with active_B (int32) 1 and advance its length, on the device alone; logits [B, V].

    Nothing here waits for the device or depends on values on the host, so that a CUDA graph can hold it. The other sequences are
    not written; their logits mean nothing. rope: tables up to the cache's capacity.
    """
    visible_B = (cache.lengths_B + 1) * active_B

    def attend(i: int, qkv_BTM: torch.Tensor) -> torch.Tensor:
        plan, layer = plans[i], cache.layers[i]
        select = plan.selects and not cache.dense
        q_BTHD, _, _, index_q_BTHR = rope_append(
            qkv_BTM, plan=plan.append, cos_SE=rope[0], sin_SE=rope[1], lengths_B=cache.lengths_B, counts_B=active_B,
            window=manifest.sliding_window, sinks=manifest.sinks, index_queries=select, index_k_BSIR=layer.index_k_BSIR,
            **_retained(layer), **_rings(layer),
        )  # fmt: skip
        out_BHD, selection = decode_layer(
            q_BTHD[:, 0], None if index_q_BTHR is None else index_q_BTHR[:, 0], plan=decode_plans[i], lengths_B=visible_B,
            index_k_BSIR=layer.index_k_BSIR, scale=model.scale, index_scale=manifest.indexer.scale,
            top_p=manifest.top_p if select else 1.0, **_retained(layer), **_rings(layer),
        )  # fmt: skip
        if on_selection is not None and selection is not None:
            on_selection(i, mask_of(*selection), visible_B)
        return out_BHD.flatten(1)

    logits_BV = _logits(model, *_layers(model, ids_B[:, None], attend))
    cache.lengths_B.add_(active_B)
    return logits_BV


def _layers(model: Model, ids_BT: torch.Tensor, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers; the last one's output and the residual that it is to be added to."""
    x_tC, residual_tC = embedding(ids_BT.flatten(), model.embed_VC), None
    for i, layer in enumerate(model.layers):
        qkv_tM, residual_tC, _ = norm_linear(
            x_tC, layer.input_norm_C, model.eps, layer.qkv_MC, layer.qkv_bias_M, residual_TC=residual_tC
        )  # fmt: skip
        x_tC = linear(attend(i, qkv_tM.unflatten(0, ids_BT.shape)), layer.o_CM, layer.o_bias_C)
        x_tC, residual_tC = _mlp(layer, x_tC, residual_tC, model.eps)
    assert residual_tC is not None, "a model has at least one layer"
    return x_tC, residual_tC


def _logits(model: Model, x_tC: torch.Tensor, residual_tC: torch.Tensor) -> torch.Tensor:
    return norm_linear(x_tC, model.norm_C, model.eps, model.head_VC, residual_TC=residual_tC)[0]


def _mlp(layer: Layer, x_tC: torch.Tensor, residual_tC: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and MLP, in pieces of tokens whose activations are bounded: (output, residual that it is to be added to)."""
    mlp = layer.mlp
    width = mlp.gate_up_GC.shape[0] if isinstance(mlp, Mlp) else mlp.num_chosen * (mlp.gate_up_EGC.shape[1] + x_tC.shape[1])
    piece = max(1, MLP_BYTES // (width * x_tC.element_size()))
    pairs = zip(x_tC.split(piece), residual_tC.split(piece), strict=True)
    done = [_mlp_piece(mlp, layer.post_norm_C, *pair, eps) for pair in pairs]
    return done[0] if len(done) == 1 else (torch.cat([out for out, _ in done]), torch.cat([residual for _, residual in done]))


def _mlp_piece(
    mlp: Mlp | Experts, norm_C: torch.Tensor, x_tC: torch.Tensor, residual_tC: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(mlp, Mlp):
        gate_up_tG, residual_tC, _ = norm_linear(x_tC, norm_C, eps, mlp.gate_up_GC, mlp.gate_up_bias_G, residual_TC=residual_tC)
        return linear(gated_silu(gate_up_tG), mlp.down_CF, mlp.down_bias_C), residual_tC
    logits_tE, residual_tC, normed_tC = norm_linear(x_tC, norm_C, eps, mlp.router_EC, residual_TC=residual_tC)
    ids_tX, weight_tX = route_tokens(logits_tE, num_chosen=mlp.num_chosen, normalize=mlp.normalize)
    return mix_experts(normed_tC, ids_tX, weight_tX, mlp.gate_up_EGC, mlp.down_ECF), residual_tC


def _retained(layer: LayerCache) -> dict[str, Any]:
    return {"k_BSKD": layer.k_BSKD, "v_BSKD": layer.v_BSKD}


def _rings(layer: LayerCache) -> dict[str, Any]:
    return {"ring_k_BWKD": layer.ring_k_BWKD, "ring_v_BWKD": layer.ring_v_BWKD}
