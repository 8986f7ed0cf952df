"""Decode benchmarks on one GPU: score + select, attention over the selection, the ring, the layer's step against libraries.

Run from the repository root: `python benchmarks/decode.py --out benchmarks/decode_h200.csv [SECTION ...]`.
"""

# B batch  S cached tokens  H query heads  I index-key sets  K kv heads  D head dim  R index dim  W ring slots
import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtpurbo.kernels.bench import READ_BANDWIDTH_GB_S, rotations, time_graph, versions, write_csv
from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.local_attention.decode_kernel import attend_slots
from rtpurbo.kernels.sparse_attention import attend_selected, plan_attention
from rtpurbo.kernels.testing import peaked_index

K32, K128, M1 = 1 << 15, 1 << 17, 1 << 20
WINDOW, SINKS, D, R, BLOCK = 8192, 4, 128, 16, 64
SCALE = D**-0.5
# Of the ring all blocks are known beforehand: small steps leave room beside the selection.
RING_PLAN: dict[str, Any] = {"step_blocks": 1, "stages": 4}
# Retrieval heads of the layer (32 query heads, 4 KV groups of 8), the index-key set and the KV head of each.
LAYOUTS = {
    "A": {"heads": (0, 1, 2, 3, 4), "key_set": (0, 1, 2, 3, 4), "kv": (0, 0, 0, 0, 0)},
    "B": {"heads": (0, 1, 8, 16, 24), "key_set": (0, 0, 1, 2, 3), "kv": (0, 0, 1, 2, 3)},
    "C": {"heads": tuple(range(8)), "key_set": (0,) * 8, "kv": (0,) * 8},
}


def lengths_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.full((batch,), tokens, dtype=torch.int32, device="cuda")


def index_buffers(layout: str, batch: int, tokens: int, share: float, *, capacity: int = 0, by_set: bool = True, fp8: bool = False):
    """Rotated (index_q, index_k) with that share of hot blocks; keys stored set by set, or token by token."""
    key_set = LAYOUTS[layout]["key_set"]
    num_sets = max(key_set) + 1
    step_bytes = batch * tokens * num_sets * R * (1 if fp8 else 2)
    buffers = []
    for seed in range(rotations(step_bytes)):
        q, k = peaked_index(key_set, num_sets=num_sets, batch=batch, tokens=tokens, hot_share=share, device="cuda", seed=seed)
        if fp8:
            k = k.to(torch.float8_e4m3fn)
        if capacity:
            k = torch.cat([k, k.new_zeros(batch, capacity - tokens, num_sets, R)], dim=1)
        buffers.append((q, k.transpose(1, 2).contiguous().transpose(1, 2) if by_set else k))
    return buffers, step_bytes


def select_step(plan, q, k, lengths) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: score_and_select(q, k, plan=plan, lengths_B=lengths, scale=1.0, top_p=0.9, sinks=SINKS)


def time_select(layout: str, tokens: int, *, batch=1, share=0.03, by_set=True, fp8=False, capacity=0, name="select", **plan_options):
    buffers, step_bytes = index_buffers(layout, batch, tokens, share, capacity=capacity, by_set=by_set, fp8=fp8)
    key_set = LAYOUTS[layout]["key_set"]
    plan = plan_selection(key_set, num_sets=max(key_set) + 1, batch=batch, capacity=max(capacity, tokens), device="cuda", **plan_options)
    lengths = lengths_of(batch, tokens)
    timing = time_graph([select_step(plan, q, k, lengths) for q, k in buffers])
    _, count = select_step(plan, buffers[0][0], buffers[0][1], lengths)()
    gb_s = step_bytes / timing.median_us / 1000.0
    return row(
        name, layout, tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3),
        kept_share=round(float(count.float().mean()) * BLOCK / tokens, 4),
        variant=" ".join(f"{key}={value}" for key, value in plan_options.items())
        + ("" if by_set else " by_token") + (" fp8" if fp8 else "") + (f" capacity={capacity}" if capacity else ""),
    )  # fmt: skip


def row(name: str, layout: str, tokens: int, timing, **more) -> dict[str, object]:
    result = {"case": name, "layout": layout, "tokens": tokens, **{k: round(v, 2) for k, v in asdict(timing).items()}, **more}
    print("  ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    return result


def listed_blocks(batch: int, jobs: int, tokens: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ascending ids of that share of the blocks, always with the first and the newest two."""
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator("cuda").manual_seed(seed)
    score = torch.rand(batch, jobs, blocks, device="cuda", generator=generator)
    score[..., 0] = score[..., -2:] = 2.0
    count = max(3, round(share * blocks))
    ids = score.topk(count, dim=-1).indices.sort(dim=-1).values
    padded = torch.full((batch, jobs, blocks), -1, dtype=torch.int32, device="cuda")
    padded[..., :count] = ids
    return padded, torch.full((batch, jobs), count, dtype=torch.int32, device="cuda")


def kv_buffers(batch: int, tokens: int, kv_heads: int, num: int):
    return [[torch.randn(batch, tokens, kv_heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(num)]


def time_selected(layout: str, tokens: int, share: float, *, batch=1, name="attend_selected", **plan_options):
    facts = LAYOUTS[layout]
    jobs, kv_heads = len(facts["heads"]), max(facts["kv"]) + 1
    plan = plan_attention([(h,) for h in facts["heads"]], facts["kv"], batch=batch, head_dim=D, device="cuda", **plan_options)
    lists = [listed_blocks(batch, jobs, tokens, share, seed) for seed in range(2)]
    step_bytes = int(lists[0][1].sum()) * BLOCK * D * 4
    num = rotations(step_bytes, at_most=min(32, int(60e9 // (batch * tokens * kv_heads * D * 4))))
    buffers = kv_buffers(batch, tokens, kv_heads, num)
    lists = [listed_blocks(batch, jobs, tokens, share, seed) for seed in range(num)]
    q = torch.randn(batch, 32, D, device="cuda", dtype=torch.bfloat16)
    lengths, out, lse = lengths_of(batch, tokens), torch.empty_like(q), torch.empty(batch, 32, device="cuda")

    def step(k, v, ids, count):
        return lambda: attend_selected(
            q, k, v, plan=plan, lengths_B=lengths, ids_BJN=ids, count_BJ=count, scale=SCALE, out_BHD=out, lse_BH=lse
        )

    timing = time_graph([step(k, v, *chosen) for (k, v), chosen in zip(buffers, lists, strict=True)])
    gb_s = step_bytes / timing.median_us / 1000.0
    return row(
        name, layout, tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3),
        kept_share=share, variant=" ".join(f"{key}={value}" for key, value in plan_options.items()),
    )  # fmt: skip


def local_jobs(layout: str):
    """Per KV group the heads that are not retrieval heads."""
    retrieval = set(LAYOUTS[layout]["heads"])
    jobs = [(kv, tuple(h for h in range(8 * kv, 8 * kv + 8) if h not in retrieval)) for kv in range(4)]
    return [(kv, heads) for kv, heads in jobs if heads]


def time_ring(layout: str, *, batch=1, **plan_options):
    jobs = local_jobs(layout)
    plan = plan_attention(
        [h for _, h in jobs], [kv for kv, _ in jobs], batch=batch, head_dim=D, device="cuda", **(RING_PLAN | plan_options)
    )
    step_bytes = batch * (WINDOW + SINKS) * len(jobs) * D * 4
    buffers = kv_buffers(batch, WINDOW + SINKS, 4, rotations(step_bytes))
    q = torch.randn(batch, 32, D, device="cuda", dtype=torch.bfloat16)
    lengths, out, lse = lengths_of(batch, 1 << 17), torch.empty_like(q), torch.empty(batch, 32, device="cuda")

    def step(k, v):
        return lambda: attend_slots(q, k, v, plan=plan, lengths_B=lengths, scale=SCALE, out_BHD=out, lse_BH=lse)

    timing = time_graph([step(k, v) for k, v in buffers])
    gb_s = step_bytes / timing.median_us / 1000.0
    return row(
        "attend_slots", layout, WINDOW + SINKS, timing, batch=batch, gb_s=round(gb_s),
        read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3), variant=" ".join(f"{k}={v}" for k, v in plan_options.items()),
    )  # fmt: skip


def layer_steps(layout: str, tokens: int, num: int, *, overlap: bool, capacity: int = 0, early: bool = False):
    """The layer's decode step: score + select, attention over the selection, and beside them the ring of the local heads."""
    facts, jobs = LAYOUTS[layout], local_jobs(layout)
    num_sets, kv_heads, held = max(facts["key_set"]) + 1, max(facts["kv"]) + 1, max(tokens, capacity)
    select_plan = plan_selection(facts["key_set"], num_sets=num_sets, batch=1, capacity=held, device="cuda", early_launch=bool(early))
    sparse_plan = plan_attention([(h,) for h in facts["heads"]], facts["kv"], batch=1, head_dim=D, device="cuda", early_launch=bool(early))
    local_plan = plan_attention([h for _, h in jobs], [kv for kv, _ in jobs], batch=1, head_dim=D, device="cuda", **RING_PLAN)
    lengths, side = lengths_of(1, tokens), torch.cuda.Stream()
    q = torch.randn(1, 32, D, device="cuda", dtype=torch.bfloat16)
    rings, caches = kv_buffers(1, WINDOW + SINKS, 4, num), kv_buffers(1, held, kv_heads, num)
    steps = []
    for seed in range(num):
        index_q, index_k = peaked_index(facts["key_set"], num_sets=num_sets, batch=1, tokens=held, hot_share=0.03, device="cuda", seed=seed)
        index_k = index_k.transpose(1, 2).contiguous().transpose(1, 2)
        out, lse = torch.empty_like(q), torch.empty(1, 32, device="cuda")

        def step(seed=seed, index_q=index_q, index_k=index_k, out=out, lse=lse):
            main = torch.cuda.current_stream()
            local = side if overlap else main
            local.wait_stream(main)
            common = {"lengths_B": lengths, "scale": SCALE, "out_BHD": out, "lse_BH": lse}
            ids, count = select_step(select_plan, index_q, index_k, lengths)()
            with torch.cuda.stream(local):
                attend_slots(q, *rings[seed], plan=local_plan, **common)
            attend_selected(q, *caches[seed], plan=sparse_plan, ids_BJN=ids, count_BJ=count, **common)
            main.wait_stream(local)
            return count

        steps.append(step)
    return steps


def time_layer(layout: str, tokens: int):
    """Ours with and without the side stream, then FlashAttention-2 and cuDNN over the dense cache, in one process."""
    num = max(2, min(16, (32 << 20) // tokens))
    rows = []
    for overlap, early in ((True, False), (True, True), (False, False)):
        steps = layer_steps(layout, tokens, num, overlap=overlap, early=early)
        timing = time_graph(steps)
        kept = float(steps[0]().float().mean()) * BLOCK / tokens
        variant = ("ring beside" if overlap else "ring before") + (", early launch" if early else "")
        rows.append(row("layer", layout, tokens, timing, batch=1, kept_share=round(kept, 4), variant=variant))
        del steps
    caches = [[x.transpose(1, 2).contiguous() for x in kv] for kv in kv_buffers(1, tokens, 4, max(2, min(8, num)))]
    q = torch.randn(1, 32, 1, D, device="cuda", dtype=torch.bfloat16)
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def step(k, v, backend=backend):
            def attend():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            return attend

        timing = time_graph([step(k, v) for k, v in caches])
        for ours in rows[:3]:
            ours[f"speedup_{name}"] = round(timing.median_us / ours["median_us"], 2)
        rows.append(row("layer", "dense", tokens, timing, batch=1, kept_share=1.0, variant=name))
    for ours in rows[:3]:
        print({key: value for key, value in ours.items() if key.startswith(("tokens", "speedup"))}, flush=True)
    return rows


def section_select():
    rows = [time_select(layout, tokens) for tokens in (K32, K128, 1 << 18, 1 << 19, M1) for layout in LAYOUTS]
    rows += [time_select("A", tokens, by_set=False) for tokens in (K128, M1)]
    rows += [time_select(layout, tokens, fp8=True) for layout in ("A", "C") for tokens in (K128, M1)]
    return rows + [time_select(layout, K32, capacity=M1) for layout in LAYOUTS]


def section_sweep():
    rows = [time_selected("A", tokens, share) for tokens in (K32, K128, M1) for share in (0.005, 0.01, 0.03, 0.1, 0.25)]
    return rows + [time_ring(layout) for layout in LAYOUTS]


def section_batch():
    rows = []
    for batch, tokens in ((8, K32), (8, K128), (8, M1), (64, K32), (64, K128)):
        rows.append(time_select("A", tokens, batch=batch))
        rows.append(time_selected("A", tokens, 0.03, batch=batch))
    return rows


def section_layer():
    return [r for tokens in (K32, K128, 1 << 18, 1 << 19, M1) for r in time_layer("A", tokens)] + capacity_rows()


def capacity_rows():
    """The cost of 32K tokens inside a graph built for 1M."""
    steps = layer_steps("A", K32, 4, overlap=True, capacity=M1)
    return [row("layer", "A", K32, time_graph(steps), batch=1, variant=f"ring beside capacity={M1}")]


SECTIONS = {"select": section_select, "sweep": section_sweep, "batch": section_batch, "layer": section_layer}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    common = versions()
    rows = [result | common for name in options.sections for result in SECTIONS[name]()]
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
