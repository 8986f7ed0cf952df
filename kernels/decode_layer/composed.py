"""decode_layer from the separate operations: selection and its attention in one stream, the local heads beside them."""

# B batch  H query heads  D head dim  N blocks
from typing import Any

import torch

from rtpurbo.kernels.block_selection import score_and_select
from rtpurbo.kernels.decode_layer.plan import DecodeLayerPlan
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.local_attention.decode_kernel import attend_slots, attend_window
from rtpurbo.kernels.sparse_attention import attend_grouped, attend_selected


def decode_layer(plan: DecodeLayerPlan, step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `kernels.decode_layer.decode_layer`; writes out, returns the selection."""
    q_BHD, lengths_B = step.q_BHD, step.lengths_B
    common: dict[str, Any] = {
        "lengths_B": lengths_B, "scale": step.scale, "out_BHD": step.out_BHD, "lse_BH": plan.lse_BH[: q_BHD.shape[0]], "impl": "triton",
    }  # fmt: skip

    def local_heads() -> None:
        if plan.local_window is not None:
            attend_window(q_BHD, *step.cache, plan=plan.local_window, window=plan.window, sinks=plan.sinks, **common)
        if plan.ring is not None:
            attend_slots(q_BHD, *step.ring, plan=plan.ring, **common)

    if not plan.retrieval_counts:
        local_heads()
        return None
    if not plan.selects(step.top_p):
        assert plan.everything is not None
        attend_slots(q_BHD, *step.cache, plan=plan.everything, **common)
        local_heads()
        return None
    assert plan.selection is not None
    assert plan.selected is not None
    main = torch.cuda.current_stream(q_BHD.device) if q_BHD.is_cuda else None
    beside = main is not None and plan.side_stream is not None and (plan.ring is not None or plan.local_window is not None)
    if main is not None and plan.side_stream is not None and beside:
        plan.side_stream.wait_stream(main)
    ids_BHN, count_BH = score_and_select(
        *step.index, plan=plan.selection, lengths_B=lengths_B, scale=step.index_scale, top_p=step.top_p, sinks=plan.sinks, impl="triton"
    )
    # The side stream joins before this function returns: its tensors live at least as long.
    with torch.cuda.stream(plan.side_stream if beside else None):
        local_heads()
    if plan.grouped is not None:
        assert plan.selection.mask_BHW is not None
        attend_grouped(q_BHD, *step.cache, plan=plan.grouped, mask_BHW=plan.selection.mask_BHW[: q_BHD.shape[0]], **common)
    else:
        attend_selected(q_BHD, *step.cache, plan=plan.selected, ids_BJN=ids_BHN, count_BJ=count_BH, **common)
    if main is not None and plan.side_stream is not None and beside:
        main.wait_stream(plan.side_stream)
    return ids_BHN, count_BH
