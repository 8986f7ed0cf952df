"""Queries, keys, values and index projections of a model's retrieval heads on one document, as decode and prefill meet them."""

# T tokens  H retrieval query heads  K kv heads  D head dim  I index-key sets  R index dim
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.converter.attention import dense_attention, index_projections
from rtpurbo.manifests.architectures import ARCHITECTURES, PreRopeTap
from rtpurbo.manifests.manifest import Manifest


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """One layer on one document: q (retrieval heads), k, v (all KV heads) post-RoPE, and the index projections in the cache's dtype.

    heads: the retrieval query heads. kv_heads, key_sets: for each of them its KV head and its row of index_k. scale: logit scale.
    """

    layer: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    key_sets: tuple[int, ...]
    q_THD: torch.Tensor
    k_TKD: torch.Tensor
    v_TKD: torch.Tensor
    index_q_THR: torch.Tensor
    index_k_TIR: torch.Tensor
    scale: float


def retrieval_layers(manifest: Manifest) -> list[int]:
    """Layers with a retrieval head, those with the highest retrieval scores first."""
    scores = {i: sum(layer.scores[h] for h in layer.retrieval_heads) for i, layer in enumerate(manifest.layers) if layer.retrieval_heads}
    return sorted(scores, key=lambda i: -scores[i])


@torch.no_grad()
def capture(
    model: Any, manifest: Manifest, indexer: Mapping[str, torch.Tensor], token_ids: torch.Tensor, layers: Sequence[int]
) -> Iterator[Captured]:
    """Run the model (attention implementation converter.attention.IMPLEMENTATION, dense) over token_ids [T]; yield `layers` in order.

    q and k enter the index projections before RoPE, by hooks, in fp32; index keys take the dtype that the manifest gives the index
    cache, and so do index queries, but that fp8 keys meet them in bf16.
    """
    wanted, kept = set(layers), {}
    dtype = getattr(torch, manifest.indexer.key_dtype)
    group_size = manifest.model.group_size

    def attend(layer: int, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, scale: float) -> torch.Tensor:
        q_pre_BTHD, k_pre_BTKD = tap.pop(layer)
        if layer in wanted:
            heads = manifest.layers[layer].retrieval_heads
            kv_heads, key_sets = tuple(h // group_size for h in heads), manifest.key_sets(layer)
            index_q, index_k = index_projections(dict(indexer), layer, q_pre_BTHD, k_pre_BTKD, heads, kv_heads, key_sets)
            kept[layer] = Captured(
                layer=layer,
                heads=heads,
                kv_heads=kv_heads,
                key_sets=key_sets,
                q_THD=q_BHTD[0, list(heads)].transpose(0, 1).contiguous(),
                k_TKD=k_BKTD[0].transpose(0, 1).contiguous(),
                v_TKD=v_BKTD[0].transpose(0, 1).contiguous(),
                index_q_THR=index_q[0].to(dtype if dtype.itemsize > 1 else torch.bfloat16),
                index_k_TIR=index_k[0].to(dtype),
                scale=scale,
            )
        return dense_attention(layer, q_BHTD, k_BKTD, v_BKTD, scale)

    with PreRopeTap(model, ARCHITECTURES[manifest.model.model_type]) as tap:
        model.model(input_ids=token_ids[None], use_cache=False, rtpurbo=attend)
    for layer in layers:
        yield kept.pop(layer)
