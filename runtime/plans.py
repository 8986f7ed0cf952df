"""What a layer's operations know before any token: its head order and projections once, its division of decode work per batch."""

# B batch  H query heads  P retrieval heads  I index-key sets  R index dim  D head dim  N blocks
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rtpurbo.kernels.append import AppendPlan, plan_append
from rtpurbo.kernels.decode_layer import DecodeLayerPlan, plan_decode_layer
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.runtime.layout import LayerLayout
from rtpurbo.runtime.model import Model

# Called with (layer, selected_BHN of the retrieval heads in run-time order, visible_B) at every decode step.
SelectionObserver = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """A layer's head order, and what its append writes. `append` has index projections only where something is selected."""

    layout: LayerLayout
    append: AppendPlan

    @property
    def selects(self) -> bool:
        """Whether retrieval heads score and select."""
        return self.append.index_q_PRD is not None


def plan_layers(model: Model, layouts: tuple[LayerLayout, ...], index: dict[str, torch.Tensor]) -> tuple[LayerPlan, ...]:
    """Plans of all layers; `index` has the tensors of indexer.safetensors in the checkpoint's head order, or lacks the layer's."""

    def reordered(name: str, order: tuple[int, ...]) -> torch.Tensor | None:
        return index[name][list(order)] if name in index else None

    return tuple(
        LayerPlan(
            layout=layout,
            append=plan_append(
                num_heads=layout.num_groups * layout.group_size,
                num_groups=layout.num_groups,
                head_dim=model.head_dim,
                device=model.device,
                eps=model.eps,
                q_norm_D=layer.q_norm_D,
                k_norm_D=layer.k_norm_D,
                retrieval_heads=layout.retrieval_heads,
                key_groups=layout.key_groups,
                index_q_PRD=reordered(f"layers.{i}.index_q", layout.index_q_rows),
                index_k_IRD=reordered(f"layers.{i}.index_k", layout.index_k_rows),
            ),
        )
        for i, (layer, layout) in enumerate(zip(model.layers, layouts, strict=True))
    )


def plan_decode(
    manifest: Manifest, layouts: tuple[LayerLayout, ...], *, batch: int, capacity: int, device: torch.device, dense: bool
) -> tuple[DecodeLayerPlan, ...]:
    """The decode plans of all layers; layers of equal roles share one, since they run one after the other."""
    made: dict[tuple[tuple[int, ...], tuple[int, ...]], DecodeLayerPlan] = {}
    for layout in layouts:
        roles = (layout.retrieval_counts, layout.key_sets)
        if roles not in made:
            made[roles] = plan_decode_layer(
                group_size=layout.group_size,
                num_groups=layout.num_groups,
                retrieval_counts=layout.retrieval_counts,
                key_sets=layout.key_sets,
                batch=batch,
                capacity=capacity,
                head_dim=manifest.model.head_dim,
                window=manifest.sliding_window,
                sinks=manifest.sinks,
                block_size=manifest.decode_block,
                device=device,
                dense=dense,
            )
    return tuple(made[layout.retrieval_counts, layout.key_sets] for layout in layouts)


def mask_of(ids_BHN: torch.Tensor, count_BH: torch.Tensor) -> torch.Tensor:
    """Bool [B, H, N]: the blocks that the first `count` ids name."""
    blocks = ids_BHN.shape[2]
    listed_BHN = torch.arange(blocks, device=ids_BHN.device) < count_BH[..., None]
    # Places beyond the count may hold anything: they go to a column of their own.
    place_BHN = torch.where(listed_BHN, ids_BHN, blocks).long()
    mask_BHN = torch.zeros(*count_BH.shape, blocks + 1, dtype=torch.bool, device=ids_BHN.device)
    return mask_BHN.scatter(2, place_BHN, True)[..., :blocks]
