"""The runtime's decode step and its small kernels on one GPU.

`step`: a slice of Qwen3-Coder-30B-A3B (same widths, fewer layers, random weights) with caches filled to a length: time of a captured
and an uncaptured step, and its split by kernels. `long`: 4096 steps, whose memory must not grow. `kernels`: rope_append, write_cache,
add_norm, gated_silu and norm_linear beside eager PyTorch.

Run from the repository root: `python benchmarks/runtime.py --out benchmarks/runtime_h200.csv [SECTION ...]`.
"""

# B batch  T chunk tokens  S cached tokens  M (H + 2 K) D  H query heads  K kv heads  D head dim  I index-key sets  R index dim
# N blocks  C hidden  E experts
import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3MoeConfig

from rtpurbo.kernels.append import plan_append, rope_append
from rtpurbo.kernels.bench import time_graph, versions, write_csv
from rtpurbo.kernels.cache_write import write_cache
from rtpurbo.kernels.gated_silu import gated_silu
from rtpurbo.kernels.norm import add_norm
from rtpurbo.kernels.norm_linear import FEW_TOKENS, norm_linear
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import random_runtime
from rtpurbo.runtime.state import State

H, K, D, R, C, E, X, F, BLOCK = 32, 4, 128, 16, 2048, 128, 8, 768, 64
POSITIONS, TOP_P, KEPT = 1 << 20, 0.9, 0.03
# A kernel of a step belongs to the first part that one of these words names; the rest are projections, logits and sampling.
PARTS = {
    "experts": ("up_few", "down_few", "grouped", "sum_rows", "_pairs", "expert"),
    "attention": ("attend", "select", "decode", "merge", "ring"),
    "append, norms, routing": ("rope_append", "add_norm", "route", "gated_silu", "write_rows"),
}


def slice_of_model(layers: int, retained: int) -> Runtime:
    """Random weights; one KV group is retained in each of the last `retained` layers, all of its heads retrieve."""
    values: dict[str, Any] = {
        "vocab_size": 151936, "hidden_size": C, "num_hidden_layers": layers, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "num_experts": E, "num_experts_per_tok": X, "moe_intermediate_size": F, "intermediate_size": 3 * C,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    config = Qwen3MoeConfig(**values)
    heads = [list(range(H // K)) if i >= layers - retained else [] for i in range(layers)]
    shape = ModelShape(
        model_type="qwen3_moe", num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=K, head_dim=D,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    # Scores of unit normal index queries and keys have std R^0.5; at this scale a normal distribution keeps KEPT of the blocks.
    scale = (NormalDist().inv_cdf(TOP_P) + NormalDist().inv_cdf(1 - KEPT)) / R**0.5
    manifest = Manifest(
        base_model=BaseModel(id="random", revision=None, config_sha256="0" * 64, tokenizer_sha256=None), model=shape, granularity="group",
        group_threshold=0.0, layers=roles_from_heads([[0.5] * H] * layers, heads, H // K), sliding_window=8192, sinks=4,
        indexer=Indexer(dim=R, keys="group", scale=scale), top_p=TOP_P, decode_block=BLOCK, prefill_block=128, prefill_pattern="dense",
        dense_below=0,
    )  # fmt: skip
    return random_runtime(config, manifest, torch.device("cuda:0"), torch.bfloat16, 0, index_std=D**-0.5)


def filled(runtime: Runtime, batch: int, tokens: int, *, capacity: int, graph: bool) -> State:
    """A state whose sequences have random caches of `tokens` tokens; the index keys of a block are equal."""
    state = runtime.start(batch, capacity, graph=graph)
    for layer in state.cache.layers:
        for name, tensor in vars(layer).items():
            if tensor is not None and name != "index_k_BSIR":
                tensor.normal_()
        if layer.index_k_BSIR is not None:
            keys_BISR = layer.index_k_BSIR.transpose(1, 2)
            B, I, S, _ = keys_BISR.shape  # noqa: E741
            block_BINR = torch.randn(B, I, -(-S // BLOCK), R, device=keys_BISR.device, dtype=keys_BISR.dtype)
            keys_BISR.copy_(block_BINR.repeat_interleave(BLOCK, dim=2)[:, :, :S])
    state.cache.lengths_B.fill_(tokens)
    state.cache.lengths = [tokens] * batch
    state.ids_B.copy_(torch.arange(batch) + 17)
    return state


def time_steps(runtime: Runtime, state: State, steps: int) -> float:
    """Microseconds a step, host included."""
    active = [True] * state.cache.batch
    for _ in range(4):
        runtime.advance(state, active)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        runtime.advance(state, active)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps * 1e6


def split_of_step(runtime: Runtime, state: State, steps: int = 8) -> tuple[dict[str, float], list[tuple[float, int, str]]]:
    """GPU microseconds of each part in one step, and every kernel as (time, launches, name)."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            runtime.advance(state, [True] * state.cache.batch)
        torch.cuda.synchronize()
    parts: dict[str, float] = defaultdict(float)
    kernels = []
    for event in profiler.key_averages():
        time_us, name = event.self_device_time_total / steps, event.key.lower()
        parts[next((part for part, words in PARTS.items() if any(word in name for word in words)), "rest")] += time_us
        kernels.append((round(time_us, 2), event.count // steps, event.key[:70]))
    return {part: round(value, 1) for part, value in parts.items()}, sorted(kernels, reverse=True)


def measure_step(rows: list[dict[str, object]], layers: int) -> None:
    runtime = slice_of_model(layers, layers * 29 // 48)
    cases = [(1, 1 << 15, 1 << 16), (1, 1 << 17, 1 << 18), (8, 1 << 15, 1 << 16)]
    for batch, tokens, capacity in cases:
        state = filled(runtime, batch, tokens, capacity=capacity, graph=True)
        captured = time_steps(runtime, state, 50)
        parts, kernels = split_of_step(runtime, state)
        uncaptured = time_steps(runtime, filled(runtime, batch, tokens, capacity=capacity, graph=False), 10)
        row: dict[str, object] = {
            "section": "step",
            "layers": layers,
            "batch": batch,
            "tokens": tokens,
            "us": captured,
            "uncaptured_us": uncaptured,
        }
        rows.append(row | {f"{part}_us": value for part, value in parts.items()})
        print(rows[-1], flush=True)
        for kernel in kernels[:24]:
            print("   ", *kernel, flush=True)


def measure_long(rows: list[dict[str, object]], layers: int) -> None:
    """4096 generated tokens after 32K: time and memory at the beginning and at the end."""
    runtime, tokens, steps = slice_of_model(layers, layers * 29 // 48), 1 << 15, 1 << 12
    state = filled(runtime, 1, tokens, capacity=tokens + steps, graph=True)
    first = time_steps(runtime, state, 252)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(steps - 512):
        runtime.advance(state, [True])
    last = time_steps(runtime, state, 252)
    grown = torch.cuda.memory_allocated() - before[0], torch.cuda.memory_reserved() - before[1]
    row: dict[str, object] = {"section": "long", "layers": layers, "batch": 1, "tokens": state.cache.lengths[0], "us": last}
    rows.append(row | {"first_us": first, "grown_bytes": grown[0], "grown_reserved_bytes": grown[1]})
    print(rows[-1], flush=True)


def small_kernels(T: int) -> dict[str, tuple[Callable[[str], object], int]]:
    """name -> (call with an impl, bytes that one call must move)."""
    device, kind = "cuda", torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind)

    plan = plan_append(
        num_heads=H, num_groups=K, head_dim=D, device=device, eps=1e-6, q_norm_D=random(D), k_norm_D=random(D),
        retrieval_heads=range(8), key_groups=[0], index_q_PRD=torch.randn(8, R, D), index_k_IRD=torch.randn(1, R, D),
    )  # fmt: skip
    M, S = (H + 2 * K) * D, 2 * T + 64
    qkv, x, residual, weight, gate_up = random(1, T, M), random(T, C), random(T, C), random(C), random(T, 6 * C)
    qkv_MC = random(M, C)
    cache: dict[str, Any] = {"k_BSKD": random(1, S, 1, D), "v_BSKD": random(1, S, 1, D), "index_k_BSIR": random(1, S, 1, R)}
    chunks = [x_BSXY[:, :T].contiguous() for x_BSXY in cache.values()]
    rings = {"ring_k_BWKD": random(1, 8196, 3, D), "ring_v_BWKD": random(1, 8196, 3, D), "window": 8192, "sinks": 4} if T == 1 else {}
    lengths, counts = (torch.full((1,), value, dtype=torch.int32, device=device) for value in (T, T))
    tables = {"cos_SE": random(S, D // 2), "sin_SE": random(S, D // 2)}
    return {
        "append": (
            lambda impl: rope_append(
                qkv, plan=plan, lengths_B=lengths, counts_B=counts, index_queries=T == 1, impl=impl, **tables, **cache, **rings
            ),
            2 * (2 * qkv.numel() + 2 * T * D),
        ),
        "cache_write": (
            lambda impl: write_cache(list(cache.values()), chunks, lengths_B=lengths, counts_B=counts, impl=impl),
            4 * sum(chunk.numel() for chunk in chunks),
        ),
        "norm": (lambda impl: add_norm(x, weight, 1e-6, residual_TC=residual, impl=impl), 8 * x.numel()),
        "gated_silu": (lambda impl: gated_silu(gate_up, impl=impl), 3 * gate_up.numel()),
        "norm_linear": (
            # More tokens than a program holds are the library's in either case.
            lambda impl: norm_linear(x, weight, 1e-6, qkv_MC, residual_TC=residual, impl=impl if T <= FEW_TOKENS else "reference"),
            2 * qkv_MC.numel(),
        ),
    }


def measure_kernels(rows: list[dict[str, object]]) -> None:
    for T in (1, 64, 8192):
        for name, (call, size_bytes) in small_kernels(T).items():
            timing = time_graph([lambda call=call: call("triton")] * 8)
            row = {"section": "kernels", "kernel": name, "tokens": T, "us": timing.median_us, "gb_s": size_bytes / timing.median_us / 1e3}
            if name not in ("append", "cache_write"):  # Their definitions wait for the device, so no graph can hold them.
                row["eager_us"] = time_graph([lambda call=call: call("reference")] * 8).median_us
            rows.append(row)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=["kernels", "step", "long"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    if "kernels" in options.sections:
        measure_kernels(rows)
    if "step" in options.sections:
        measure_step(rows, options.layers)
    if "long" in options.sections:
        measure_long(rows, options.layers)
    write_csv(options.out, [{**versions(), **row} for row in rows])


if __name__ == "__main__":
    main()
