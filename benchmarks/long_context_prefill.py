"""Sparse prefill of retrieval heads on captured queries and keys: what it keeps, by pooling, and how fast it is at that density."""

# T tokens  H retrieval query heads  K kv heads  G heads of a KV head  D head dim
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rtpurbo.benchmarks import prefill_quality
from rtpurbo.benchmarks.long_context_capture import Captured
from rtpurbo.kernels.prefill_selection import POOLINGS, select_prefill
from rtpurbo.kernels.sparse_attention import attend_prefill
from rtpurbo.manifests.manifest import Manifest

QUALITY = ("density", "oracle_density", "index_mass", "true_mass", "worst_true_mass", "output_error", "worst_output_error")
TIMES = ("library_ms", "dense_ms", "selection_ms", "listed_ms")


def measure(captured: Captured, manifest: Manifest) -> list[dict[str, Any]]:
    """One record a pooling: prefill_quality.measure at the manifest's share of pooled mass, and on a GPU the times of these heads."""
    result = prefill_quality.measure(
        captured.q_THD,
        captured.k_TKD,
        captured.v_TKD,
        captured.index_q_THR,
        captured.index_k_TIR,
        kv_heads=captured.kv_heads,
        key_sets=captured.key_sets,
        scale=captured.scale,
        index_scale=manifest.indexer.scale,
        top_p=manifest.prefill_mass,
        sinks=manifest.sinks,
        block=manifest.prefill_block,
    )
    times = {pooling: prefill_times(captured, manifest, pooling) for pooling in POOLINGS} if captured.q_THD.is_cuda else {}
    return [
        {"layer": captured.layer, "heads": len(captured.heads), "pooling": pooling, **_rounded(values), **times.get(pooling, {})}
        for pooling, values in result.items()
    ]


def prefill_times(captured: Captured, manifest: Manifest, pooling: str) -> dict[str, float]:
    """Median ms of these heads over the whole prompt: dense by the faster of cuDNN and FlashAttention-2 (library), dense by attend_prefill,
    the selection alone, and attention over the listed blocks. Needs whole KV groups of retrieval heads."""
    device, T = captured.q_THD.device, captured.q_THD.shape[0]
    groups = sorted(set(captured.kv_heads))
    size = len(captured.heads) // len(groups)
    if captured.kv_heads != tuple(group for group in groups for _ in range(size)):
        raise ValueError(f"layer {captured.layer}: retrieval heads {captured.heads} are not equally many in every KV group")
    q_BTKGD = captured.q_THD.unflatten(1, (len(groups), size))[None]
    k_BSKD, v_BSKD = (x[None, :, groups].contiguous() for x in (captured.k_TKD, captured.v_TKD))
    key_set_H = torch.tensor(captured.key_sets, dtype=torch.int32, device=device)
    lengths_B, counts_B = (torch.tensor([x], dtype=torch.int32, device=device) for x in (0, T))
    block = manifest.prefill_block

    def select() -> tuple[torch.Tensor, torch.Tensor]:
        return select_prefill(
            captured.index_q_THR[None], captured.index_k_TIR[None], key_set_H=key_set_H, lengths_B=lengths_B, counts_B=counts_B,
            scale=manifest.indexer.scale, top_p=manifest.prefill_mass, sinks=manifest.sinks, block=block, pooling=pooling,
        )  # fmt: skip

    def attend(ids: torch.Tensor | None = None, count: torch.Tensor | None = None) -> None:
        attend_prefill(
            q_BTKGD,
            k_BSKD,
            v_BSKD,
            lengths_B=lengths_B,
            counts_B=counts_B,
            scale=captured.scale,
            ids_BHQN=ids,
            count_BHQ=count,
            block=block,
        )

    def library(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q_BTKGD.flatten(2, 3), k_BSKD, v_BSKD))
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=captured.scale, enable_gqa=True)

    ids, count = select()
    return {
        "library_ms": min(_median_ms(lambda b=b: library(b)) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)),
        "dense_ms": _median_ms(attend),
        "selection_ms": _median_ms(select),
        "listed_ms": _median_ms(lambda: attend(ids, count)),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over the layers, with the lowest and highest layer in brackets, for each length and pooling."""
    measures = [name for name in (*QUALITY, *TIMES) if name in records[0]]
    lines = ["| tokens | pooling | " + " | ".join(measures) + " |", "|---|---|" + "---|" * len(measures)]
    for key in dict.fromkeys((r["length"], r["pooling"]) for r in records):
        group = [r for r in records if (r["length"], r["pooling"]) == key]
        cells = [
            f"{statistics.fmean(r[m] for r in group):.3g} ({min(r[m] for r in group):.2g} ... {max(r[m] for r in group):.2g})"
            for m in measures
        ]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def _median_ms(run: Callable[[], object], calls: int = 7) -> float:
    """Median of single calls after two warm ones; inputs of a layer are larger than what the next call finds in L2 by chance."""
    times = []
    for n in range(calls + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if n >= 2:
            times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)
