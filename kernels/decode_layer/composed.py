"""decode_layer from the separate operations: selection and its attention in one stream, the local heads beside them."""

# B batch  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# I index-key sets  R index dim  N blocks
import torch

from rtpurbo.kernels.block_selection import score_and_select
from rtpurbo.kernels.decode_layer.plan import DecodeLayerPlan
from rtpurbo.kernels.local_attention.decode_kernel import attend_slots, attend_window
from rtpurbo.kernels.sparse_attention import attend_selected


def decode_layer(
    q_BHD: torch.Tensor,
    index_q_BHR: torch.Tensor | None,
    plan: DecodeLayerPlan,
    lengths_B: torch.Tensor,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    index_k_BSIR: torch.Tensor | None,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    scale: float,
    index_scale: float,
    top_p: float,
    out_BHD: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """See `kernels.decode_layer.decode_layer`; writes out, returns the selection."""
    lse_BH = plan.lse_BH[: q_BHD.shape[0]]

    def local_heads() -> None:
        if plan.local_window is not None:
            assert k_BSKD is not None
            assert v_BSKD is not None
            attend_window(
                q_BHD, k_BSKD, v_BSKD, plan=plan.local_window, lengths_B=lengths_B, window=plan.window, sinks=plan.sinks, scale=scale,
                out_BHD=out_BHD, lse_BH=lse_BH, impl="triton",
            )  # fmt: skip
        if plan.ring is not None:
            assert ring_k_BWKD is not None
            assert ring_v_BWKD is not None
            attend_slots(
                q_BHD, ring_k_BWKD, ring_v_BWKD, plan=plan.ring, lengths_B=lengths_B, scale=scale, out_BHD=out_BHD, lse_BH=lse_BH,
                impl="triton",
            )  # fmt: skip

    if not plan.retrieval_counts:
        local_heads()
        return None
    assert k_BSKD is not None
    assert v_BSKD is not None
    if not plan.selects(top_p):
        assert plan.everything is not None
        attend_slots(
            q_BHD, k_BSKD, v_BSKD, plan=plan.everything, lengths_B=lengths_B, scale=scale, out_BHD=out_BHD, lse_BH=lse_BH, impl="triton"
        )
        local_heads()
        return None
    assert plan.selection is not None
    assert plan.selected is not None
    assert index_q_BHR is not None
    assert index_k_BSIR is not None
    main = torch.cuda.current_stream(q_BHD.device) if q_BHD.is_cuda else None
    beside = main is not None and plan.side_stream is not None and (plan.ring is not None or plan.local_window is not None)
    if main is not None and plan.side_stream is not None and beside:
        plan.side_stream.wait_stream(main)
    ids_BHN, count_BH = score_and_select(
        index_q_BHR, index_k_BSIR, plan=plan.selection, lengths_B=lengths_B, scale=index_scale, top_p=top_p, sinks=plan.sinks, impl="triton"
    )
    # The side stream joins before this function returns: its tensors live at least as long.
    with torch.cuda.stream(plan.side_stream if beside else None):
        local_heads()
    attend_selected(
        q_BHD, k_BSKD, v_BSKD, plan=plan.selected, lengths_B=lengths_B, ids_BJN=ids_BHN, count_BJ=count_BH, scale=scale,
        out_BHD=out_BHD, lse_BH=lse_BH, impl="triton",
    )  # fmt: skip
    if main is not None and plan.side_stream is not None and beside:
        main.wait_stream(plan.side_stream)
    return ids_BHN, count_BH
