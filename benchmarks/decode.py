"""Decode benchmarks on one GPU: score + select, attention over the selection, the ring, the layer's step against libraries.

Run from the repository root: `python benchmarks/decode.py --out benchmarks/decode_h200.csv [SECTION ...]`.
"""

# B batch  S cached tokens  H query heads  I index-key sets  K kv heads  D head dim  R index dim  W ring slots
import argparse
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtpurbo.kernels.bench import READ_BANDWIDTH_GB_S, Timing, rotations, versions, write_csv
from rtpurbo.kernels.bench import time_graph as time_steps
from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.decode_layer import decode_layer, plan_decode_layer
from rtpurbo.kernels.decode_layer.cuda import STAMPS, plan_cuda
from rtpurbo.kernels.decode_layer.fused import STAMP_NAMES, plan_fused
from rtpurbo.kernels.sparse_attention import attend_selected, plan_attention
from rtpurbo.kernels.testing import peaked_index

K32, K128, M1 = 1 << 15, 1 << 17, 1 << 20
WINDOW, SINKS, D, R, BLOCK = 8192, 4, 128, 16, 64
SCALE = D**-0.5
LAYERS = 48
# Retrieval heads of the layer (32 query heads, 4 KV groups of 8), the index-key set and the KV head of each.
LAYOUTS = {
    "A": {"heads": (0, 1, 2, 3, 4), "key_set": (0, 1, 2, 3, 4), "kv": (0, 0, 0, 0, 0), "counts": (5,)},
    "B": {"heads": (0, 1, 8, 16, 24), "key_set": (0, 0, 1, 2, 3), "kv": (0, 0, 1, 2, 3), "counts": (2, 1, 1, 1)},
    "C": {"heads": tuple(range(8)), "key_set": (0,) * 8, "kv": (0,) * 8, "counts": (8,)},
}


def time_graph(steps: Sequence[Callable[[], object]]) -> Timing:
    """A step's time in a graph of as many as a model has layers."""
    return time_steps(steps, at_least=LAYERS)


def lengths_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.full((batch,), tokens, dtype=torch.int32, device="cuda")


def index_buffers(layout: str, batch: int, tokens: int, share: float, *, capacity: int = 0, by_set: bool = True, fp8: bool = False):
    """Rotated (index_q fp32, index_k) as in the runtime, with that share of hot blocks; keys stored set by set, or token by token."""
    key_set = LAYOUTS[layout]["key_set"]
    num_sets = max(key_set) + 1
    step_bytes = batch * tokens * num_sets * R * (1 if fp8 else 2)
    buffers = []
    for seed in range(rotations(step_bytes)):
        q, k = peaked_index(
            key_set, num_sets=num_sets, batch=batch, tokens=tokens, hot_share=share, device="cuda", seed=seed, dtype=torch.float32
        )
        k = k.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
        if capacity:
            k = torch.cat([k, k.new_zeros(batch, capacity - tokens, num_sets, R)], dim=1)
        buffers.append((q, k.transpose(1, 2).contiguous().transpose(1, 2) if by_set else k))
    return buffers, step_bytes


def select_step(plan, q, k, lengths, impl="auto") -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: score_and_select(q, k, plan=plan, lengths_B=lengths, scale=1.0, top_p=0.9, sinks=SINKS, impl=impl)


def time_select(
    layout: str, tokens: int, *, impl="auto", batch=1, share=0.03, by_set=True, fp8=False, capacity=0, name="select", **plan_options
):
    buffers, step_bytes = index_buffers(layout, batch, tokens, share, capacity=capacity, by_set=by_set, fp8=fp8)
    key_set = LAYOUTS[layout]["key_set"]
    plan = plan_selection(
        key_set, num_sets=max(key_set) + 1, batch=batch, capacity=max(capacity, tokens), device="cuda", cuda=True, **plan_options
    )
    lengths = lengths_of(batch, tokens)
    timing = time_graph([select_step(plan, q, k, lengths, impl) for q, k in buffers])
    _, count = select_step(plan, buffers[0][0], buffers[0][1], lengths, impl)()
    gb_s = step_bytes / timing.median_us / 1000.0
    return row(
        name, layout, tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3),
        kept_share=round(float(count.float().mean()) * BLOCK / tokens, 4),
        variant=" ".join(["" if impl == "auto" else impl, *(f"{key}={value}" for key, value in plan_options.items())])
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


def selected_steps(layout: str, tokens: int, share: float, *, batch=1, most=32, **plan_options):
    """Calls of `attend_selected` over rotated caches and lists, and the bytes that each of them reads."""
    facts = LAYOUTS[layout]
    jobs, kv_heads = len(facts["heads"]), max(facts["kv"]) + 1
    plan = plan_attention([(h,) for h in facts["heads"]], facts["kv"], batch=batch, head_dim=D, device="cuda", **plan_options)
    step_bytes = batch * jobs * max(3, round(share * -(-tokens // BLOCK))) * BLOCK * D * 4
    num = rotations(step_bytes, at_most=min(most, int(60e9 // (batch * tokens * kv_heads * D * 4))))
    buffers = kv_buffers(batch, tokens, kv_heads, num)
    lists = [listed_blocks(batch, jobs, tokens, share, seed) for seed in range(num)]
    q = torch.randn(batch, 32, D, device="cuda", dtype=torch.bfloat16)
    lengths, out, lse = lengths_of(batch, tokens), torch.empty_like(q), torch.empty(batch, 32, device="cuda")

    def step(k, v, ids, count):
        return lambda: attend_selected(
            q, k, v, plan=plan, lengths_B=lengths, ids_BJN=ids, count_BJ=count, scale=SCALE, out_BHD=out, lse_BH=lse
        )

    return [step(k, v, *chosen) for (k, v), chosen in zip(buffers, lists, strict=True)], step_bytes


def time_selected(layout: str, tokens: int, share: float, *, batch=1, name="attend_selected", **plan_options):
    steps, step_bytes = selected_steps(layout, tokens, share, batch=batch, **plan_options)
    timing = time_graph(steps)
    gb_s = step_bytes / timing.median_us / 1000.0
    return row(
        name, layout, tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3),
        kept_share=share, variant=" ".join(f"{key}={value}" for key, value in plan_options.items()),
    )  # fmt: skip


def layer_inputs(layout: str, tokens: int, num: int, *, batch: int = 1, capacity: int = 0, share: float = 0.03, fp8: bool = False):
    """Rotated tensors of a layer whose newest `tokens` of `capacity` are filled; index keys stored set by set."""
    facts, held = LAYOUTS[layout], max(tokens, capacity)
    key_set, groups = facts["key_set"], len(facts["counts"])
    inputs = []
    for seed in range(num):
        index_q, index_k = peaked_index(
            key_set, num_sets=max(key_set) + 1, batch=batch, tokens=tokens, hot_share=share, device="cuda", seed=seed, dtype=torch.float32
        )
        index_k = index_k.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
        index_k = torch.cat([index_k, index_k.new_zeros(batch, held - tokens, *index_k.shape[2:])], dim=1)
        ((k, v),) = kv_buffers(batch, held, groups, 1)
        ring_k, ring_v = kv_buffers(batch, WINDOW + SINKS, 4 - groups, 1)[0] if groups < 4 else (None, None)
        inputs.append(
            {
                "q_BHD": torch.randn(batch, 32, D, device="cuda", dtype=torch.bfloat16), "index_q_BHR": index_q,
                "index_k_BSIR": index_k.transpose(1, 2).contiguous().transpose(1, 2), "k_BSKD": k, "v_BSKD": v,
                "ring_k_BWKD": ring_k, "ring_v_BWKD": ring_v, "out_BHD": torch.empty(batch, 32, D, device="cuda", dtype=torch.bfloat16),
            }
        )  # fmt: skip
    return inputs


def layer_shape(layout: str, tokens: int, *, batch: int = 1, capacity: int = 0) -> dict[str, Any]:
    facts = LAYOUTS[layout]
    return {
        "group_size": 8, "num_groups": 4, "retrieval_counts": facts["counts"], "key_sets": facts["key_set"], "batch": batch,
        "capacity": max(tokens, capacity), "head_dim": D, "block_size": BLOCK, "device": torch.device("cuda"),
    }  # fmt: skip


def layer_plan(
    layout: str, tokens: int, *, batch: int = 1, capacity: int = 0, dense: bool = False, read_once: bool | None = False, **fused: Any
):
    """A plan of `decode_layer`; options of the one-launch form as measured variants."""
    shape = layer_shape(layout, tokens, batch=batch, capacity=capacity)
    plan = plan_decode_layer(**shape, window=WINDOW, sinks=SINKS, dense=dense, read_once=read_once, cuda=True)
    return replace(plan, fused=plan_fused(**shape, **fused)) if fused else plan


def layer_bytes(layout: str, tokens: int, batch: int, kept: float, *, fp8: bool = False) -> float:
    """Bytes that one step has to read: index keys, selected blocks, windows."""
    facts = LAYOUTS[layout]
    local_groups = 4 - sum(count == 8 for count in facts["counts"])
    index = tokens * (max(facts["key_set"]) + 1) * R * (1 if fp8 else 2)
    return batch * (index + (kept * tokens * len(facts["heads"]) + min(tokens, WINDOW + SINKS) * local_groups) * D * 4)


def rotated_inputs(layout: str, tokens: int, *, batch=1, capacity=0, share=0.03, fp8=False):
    # Several sets also where two would do: times differ by some per cent with where a cache happens to lie.
    most = max(2, min(16, int(40e9 // (batch * max(tokens, capacity) * D * 4))))
    num = rotations(int(layer_bytes(layout, tokens, batch, share)), at_least=min(8, most), at_most=most)
    return layer_inputs(layout, tokens, num, batch=batch, capacity=capacity, share=share, fp8=fp8)


def time_decode(layout: str, tokens: int, *, impl: str, inputs=None, batch=1, capacity=0, share=0.03, fp8=False, name="layer", **fused):
    """The whole layer's step by `decode_layer`."""
    inputs = inputs or rotated_inputs(layout, tokens, batch=batch, capacity=capacity, share=share, fp8=fp8)
    plan = layer_plan(layout, tokens, batch=batch, capacity=capacity, **fused)
    lengths = lengths_of(batch, tokens)

    def step(tensors):
        return lambda: decode_layer(**tensors, plan=plan, lengths_B=lengths, scale=SCALE, index_scale=1.0, top_p=0.9, impl=impl)

    timing = time_graph([step(tensors) for tensors in inputs])
    _, selection = step(inputs[0])()
    assert selection is not None
    kept = float(selection[1].float().mean()) * BLOCK / tokens
    gb_s = layer_bytes(layout, tokens, batch, kept, fp8=fp8) / timing.median_us / 1000.0
    variant = " ".join(
        [impl, *(f"{key}={value}" for key, value in fused.items()), *["fp8"] * fp8, *[f"capacity={capacity}"] * (capacity > 0)]
    )
    return row(
        name, layout, tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3),
        kept_share=round(kept, 4), variant=variant,
    )  # fmt: skip


def time_stamps(layout: str, tokens: int, *, impl: str, replays=4):
    """When the programs of one launch come to its stretches, in us after the first started: earliest, median and latest program."""
    inputs = layer_inputs(layout, tokens, max(2, min(8, int(40e9 // (tokens * D * 4)))))
    plan = layer_plan(layout, tokens, **({"stamps": True} if impl == "fused" else {}))
    if impl == "cuda":
        plan = replace(plan, cuda=plan_cuda(**layer_shape(layout, tokens), stamps=True))
    launch, names = (plan.fused, dict(enumerate(STAMP_NAMES))) if impl == "fused" else (plan.cuda, STAMPS)
    assert launch is not None
    assert launch.stamps is not None
    lengths, seen = lengths_of(1, tokens), []
    for replay in range(replays):
        for tensors in inputs:
            launch.stamps.zero_()
            torch.cuda.synchronize()
            decode_layer(**tensors, plan=plan, lengths_B=lengths, scale=SCALE, index_scale=1.0, top_p=0.9, impl=impl)
            torch.cuda.synchronize()
            if replay:
                seen.append(launch.stamps.cpu())
    rows = []
    for n, name in names.items():
        # Programs that never came there hold 0.
        times = [(stamps[:, n][stamps[:, n] > 0] - stamps[:, 0].min()).double() / 1e3 for stamps in seen if stamps[:, n].any()]
        if not times:
            continue
        low, middle, high = (statistics.median(float(of(x)) for x in times) for of in (torch.min, torch.median, torch.max))
        timing = Timing(median_us=middle, low_us=low, high_us=high)
        rows.append(
            row(
                "stamp", layout, tokens, timing, batch=1, variant=f"{impl}: {name}, {statistics.median(len(x) for x in times):.0f} programs"
            )
        )
    return rows


def time_local_layer(*, batch=1, tokens=K128):
    """A layer without retrieval heads: four rings."""
    step_bytes = batch * (WINDOW + SINKS) * 4 * D * 4
    rings = kv_buffers(batch, WINDOW + SINKS, 4, rotations(step_bytes))
    plan = plan_decode_layer(
        group_size=8, num_groups=4, retrieval_counts=(), key_sets=(), batch=batch, capacity=tokens, head_dim=D, window=WINDOW, sinks=SINKS,
        block_size=BLOCK, device="cuda",
    )  # fmt: skip
    q, lengths = torch.randn(batch, 32, D, device="cuda", dtype=torch.bfloat16), lengths_of(batch, tokens)
    out = torch.empty_like(q)

    def step(k, v):
        return lambda: decode_layer(
            q, None, plan=plan, lengths_B=lengths, k_BSKD=None, v_BSKD=None, index_k_BSIR=None, ring_k_BWKD=k, ring_v_BWKD=v,
            scale=SCALE, index_scale=1.0, top_p=0.9, out_BHD=out,
        )  # fmt: skip

    timing = time_graph([step(k, v) for k, v in rings])
    gb_s = step_bytes / timing.median_us / 1000.0
    return row("layer", "local", tokens, timing, batch=batch, gb_s=round(gb_s), read_share=round(gb_s / READ_BANDWIDTH_GB_S, 3), variant="")


def time_dense(tokens: int, *, batch=1):
    """FlashAttention-2 and cuDNN over the whole cache of four KV heads."""
    num = max(2, min(8, (32 << 20) // (tokens * batch)))
    q = torch.randn(batch, 32, 1, D, device="cuda", dtype=torch.bfloat16)
    rows, caches = [], [[x.transpose(1, 2).contiguous() for x in kv] for kv in kv_buffers(batch, tokens, 4, num)]
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):

        def step(k, v, backend=backend):
            def attend():
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            return attend

        timing = time_graph([step(k, v) for k, v in caches])
        rows.append(row("layer", "dense", tokens, timing, batch=batch, kept_share=1.0, variant=name))
    return rows


def compare(ours, dense):
    """The rows with their speedups over the dense libraries."""
    return [mine | {f"speedup_{other['variant']}": f"{other['median_us'] / mine['median_us']:.2f}" for other in dense} for mine in ours]


def compiled_together(steps: list[Callable[[], object]]) -> None:
    """Run each once, on all cores: what takes time is compiling their kernels."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda step: step(), steps))
    torch.cuda.synchronize()


def one_step(layout: str, tokens: int, *, capacity: int = 0, **fused: Any) -> Callable[[], object]:
    """One step of the layer in one launch, with tensors of its own."""

    def step() -> object:
        (tensors,) = layer_inputs(layout, tokens, 1, capacity=capacity)
        plan = layer_plan(layout, tokens, capacity=capacity, **fused)
        lengths = lengths_of(1, tokens)
        return decode_layer(**tensors, plan=plan, lengths_B=lengths, scale=SCALE, index_scale=1.0, top_p=0.9, impl="fused")

    return step


def section_select():
    rows = [time_select(layout, tokens, impl=impl) for tokens in (K32, K128, M1) for layout in LAYOUTS for impl in ("cuda", "triton")]
    rows += [time_select("A", tokens, by_set=False) for tokens in (K128, M1)]
    rows += [
        time_select(layout, tokens, impl=impl, fp8=True) for tokens in (K32, K128, M1) for layout in LAYOUTS for impl in ("cuda", "triton")
    ]
    return rows + [time_select(layout, K32, capacity=M1) for layout in LAYOUTS]


def section_sweep():
    rows = []
    for tokens in (K32, K128, M1):
        for share in (0.005, 0.01, 0.03, 0.1, 0.25):
            rows.append(time_selected("A", tokens, share))
            for layout in ("A", "C"):
                inputs = rotated_inputs(layout, tokens, share=share)
                rows += [time_decode(layout, tokens, impl=impl, inputs=inputs, share=share) for impl in ("cuda", "fused", "composed")]
                rows.append(time_decode(layout, tokens, impl="composed", inputs=inputs, share=share, read_once=True))
    return rows


def section_batch():
    rows = [time_local_layer(batch=batch) for batch in (1, 8, 64)]
    rows += [time_select("A", K32, impl=impl, batch=16) for impl in ("cuda", "triton")]
    for batch, tokens in ((2, 8192), (4, 8192), (4, 1 << 18), (6, K32)):
        for layout in ("A", "C"):
            inputs = rotated_inputs(layout, tokens, batch=batch)
            rows += [time_decode(layout, tokens, impl=impl, inputs=inputs, batch=batch) for impl in ("cuda", "fused", "composed")]
    for batch, tokens in ((2, K32), (2, K128), (4, K32), (4, K128), (8, K32), (8, K128), (8, M1), (64, K32), (64, K128)):
        rows += [time_select("A", tokens, impl=impl, batch=batch) for impl in (("cuda", "triton") if tokens < M1 else ("triton",))]
        rows.append(time_selected("A", tokens, 0.03, batch=batch))
        for layout in ("A", "C"):
            inputs = rotated_inputs(layout, tokens, batch=batch)
            forms = (("cuda", "fused") if batch <= 8 and tokens < M1 else ("fused",)) + ("composed",)
            rows += [time_decode(layout, tokens, impl=impl, inputs=inputs, batch=batch) for impl in forms]
            if batch >= 8:
                rows.append(time_decode(layout, tokens, impl="composed", inputs=inputs, batch=batch, read_once=True))
    return rows


def section_layer():
    """One launch in CUDA C++ and in Triton beside dense libraries."""
    rows = []
    compiled_together([one_step(layout, tokens) for tokens in (K32, K128, M1) for layout in LAYOUTS])
    for tokens in (K32, K128, 1 << 18, 1 << 19, M1):
        dense = time_dense(tokens)
        rows += dense
        for layout in LAYOUTS if tokens in (K32, K128, M1) else ("A",):
            inputs = rotated_inputs(layout, tokens)
            rows += compare([time_decode(layout, tokens, impl=impl, inputs=inputs) for impl in ("cuda", "fused")], dense)
            rows += compare([time_decode(layout, tokens, impl="cuda", fp8=True)], dense)
    return rows


def section_composed():
    """Separate launches, and 32K inside a plan for 1M."""
    compiled_together([one_step(layout, K32, capacity=M1) for layout in LAYOUTS])
    rows = []
    for tokens in (K32, K128, M1):
        for layout in LAYOUTS:
            rows.append(time_decode(layout, tokens, impl="composed"))
            if layout != "B":
                rows.append(time_decode(layout, tokens, impl="composed", read_once=True))
    return rows + [time_decode(layout, K32, impl=impl, capacity=M1) for layout in LAYOUTS for impl in ("cuda", "fused", "composed")]


def section_stamps():
    compiled_together([one_step(layout, tokens, stamps=True) for tokens in (K32, K128, M1) for layout in LAYOUTS])
    return [
        result for impl in ("cuda", "fused") for tokens in (K32, K128, M1) for layout in LAYOUTS
        for result in time_stamps(layout, tokens, impl=impl)
    ]  # fmt: skip


def section_options():
    """Options of the one launch beside their defaults."""
    options: list[dict[str, Any]] = [
        {}, {"early_launch": False}, {"local_stages": 1}, {"local_stages": 2}, {"local_stages": 3}, {"stages": 2}, {"stages": 4},
        {"programs_per_processor": 3}, {"select_tile": 1024, "part_blocks": 512}, {"part_blocks": 512, "max_parts": 32}, {"merge_tile": 64},
        {"num_warps": 8, "programs_per_processor": 1, "step": 128, "local_step": 128, "tile_blocks": 8},
    ]  # fmt: skip
    cases = [("A", tokens, option) for tokens in (K32, K128, M1) for option in options] + [("C", tokens, {}) for tokens in (K32, K128, M1)]
    compiled_together([one_step(layout, tokens, **option) for layout, tokens, option in cases])
    return [time_decode(layout, tokens, impl="fused", **option) for layout, tokens, option in cases]


def section_attend():
    """Options of the attention over a selection beside their defaults."""
    options: list[dict[str, Any]] = [
        {}, {"stages": 4}, {"programs_per_processor": 3}, {"step_blocks": 2, "stages": 2}, {"stages": 6, "programs_per_processor": 1},
        {"step_blocks": 2, "stages": 4, "programs_per_processor": 1, "num_warps": 8},
    ]  # fmt: skip
    compiled_together([lambda o=o: selected_steps("A", K32, 0.03, most=1, **o)[0][0]() for o in options])
    cases = [(1, K32, 0.03), (1, K128, 0.03), (1, M1, 0.03), (1, M1, 0.25), (64, K32, 0.03)]
    return [time_selected("A", tokens, share, batch=batch, **option) for batch, tokens, share in cases for option in options]


SECTIONS = {
    "select": section_select, "sweep": section_sweep, "batch": section_batch, "layer": section_layer, "composed": section_composed,
    "stamps": section_stamps,
    "options": section_options, "attend": section_attend,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    common = versions()
    rows: list[dict[str, object]] = []
    for name in options.sections:
        rows += [result | common for result in SECTIONS[name]()]
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
