"""A million tokens end to end: Qwen3-Coder-30B-A3B's shape with random weights on one GPU, prefill in chunks and decode in a CUDA graph.

All 48 layers, bf16, made on the GPU. Roles by KV group: 29 of 192 groups, in the later half of the layers, all 8 heads of a retained
group retrieve. yarn factor 4. Random weights spread attention and index scores evenly, so that top-p would keep nearly everything; the
selection is therefore given structure: the prompt repeats each token for one block of 128, and the spread of the index logits is set,
separately for prefill and decode. What was really kept is measured and reported. Kernels are compiled before the clock starts,
unless the run is told to start cold. Each section writes its figures to the JSON file when it ends.
"""

# B batch  T tokens  H retrieval query heads  N blocks
import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from transformers import Qwen3MoeConfig

from rtpurbo.kernels import prefill_layer as prefill_module
from rtpurbo.kernels.bench import Clock, gpu_time_by_part
from rtpurbo.manifests.assumptions import PlanOptions
from rtpurbo.manifests.manifest import BaseModel, Indexer, Manifest, ModelShape, roles_from_heads
from rtpurbo.manifests.plan import plan
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import random_runtime
from rtpurbo.runtime.state import State

INDEX_DIM = 16
# A kernel belongs to the first part that one of these words names; the rest are projections, norms, logits and sampling.
PARTS = {
    "experts": ("up_few", "down_few", "grouped", "sum_rows", "copy_rows", "_pairs", "route_rows"),
    "attention": ["attend", "attention", "flash", "fmha", "sdpa", "prefill", "select", "score", "ring", "append", "decode", "pool"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured; the defaults are the headline's.

    spread_*: standard deviation of the index logits. cold: the first prefill compiles its kernels.
    """

    layers: int = 48
    hidden: int = 2048
    heads: int = 32
    groups: int = 4
    head_dim: int = 128
    experts: int = 128
    vocabulary: int = 151936
    retained: int = 29
    window: int = 8192
    chunk: int = 8192
    block: int = 128
    positions: int = 1 << 20
    new_tokens: int = 256
    index_keys: Literal["head", "group"] = "group"
    top_p: float = 0.9
    spread_prefill: float = 3.2
    spread_decode: float = 4.4
    cold: bool = False


def config_of(shape: Shape) -> Qwen3MoeConfig:
    """transformers' config of the model."""
    values: dict[str, Any] = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups, "head_dim": shape.head_dim,
        "num_experts": shape.experts, "num_experts_per_tok": min(8, shape.experts), "moe_intermediate_size": shape.hidden * 3 // 8,
        "intermediate_size": shape.hidden * 3, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": shape.positions, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0, "original_max_position_embeddings": shape.positions // 4,
        },
    }  # fmt: skip
    return Qwen3MoeConfig(**values)


def manifest_of(shape: Shape) -> Manifest:
    """Roles spread over the later half of the layers, one group a layer before any gets a second."""
    size, first = shape.heads // shape.groups, shape.layers // 2
    heads: list[list[int]] = [[] for _ in range(shape.layers)]
    for i in range(shape.retained):
        place = i % (shape.layers - first)
        group = (place + i // (shape.layers - first)) % shape.groups
        heads[first + place] += range(group * size, (group + 1) * size)
    scores = [[float(h in chosen) for h in range(shape.heads)] for chosen in heads]
    model = ModelShape(
        model_type="qwen3_moe", num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        head_dim=shape.head_dim, max_position_embeddings=shape.positions,
    )  # fmt: skip
    return Manifest(
        base_model=BaseModel(id="random", revision=None, config_sha256="0" * 64, tokenizer_sha256=None), model=model,
        granularity="group", group_threshold=0.0, layers=roles_from_heads(scores, heads, size), sliding_window=shape.window, sinks=4,
        indexer=Indexer(dim=INDEX_DIM, keys=shape.index_keys, scale=1.0), top_p=shape.top_p, decode_block=min(64, shape.block),
        prefill_block=shape.block, prefill_pattern="dense", dense_below=0,
    )  # fmt: skip


def with_spread(manifest: Manifest, spread: float, pattern: Any) -> Manifest:
    """The manifest with index logits of that standard deviation: products of the index projections' outputs have INDEX_DIM^0.5."""
    indexer = dataclasses.replace(manifest.indexer, scale=spread / INDEX_DIM**0.5)
    return dataclasses.replace(manifest, indexer=indexer, prefill_pattern=pattern)


def prompt_of(shape: Shape, tokens: int) -> torch.Tensor:
    """int64 [1, T]: random tokens, each repeated for one block."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(shape.vocabulary, (-(-tokens // shape.block),), generator=generator)
    return blocks.repeat_interleave(shape.block)[None, :tokens]


class Report:
    """Figures by section, written after each; every line carries the seconds since the start."""

    def __init__(self, out: pathlib.Path, start: dict[str, Any]) -> None:
        self._out, self._figures, self._begin = out, dict(start), time.perf_counter()

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self._begin:7.1f} s  {text}", flush=True)

    def add(self, section: str, figures: dict[str, Any]) -> None:
        self._figures[section] = {**self._figures.get(section, {}), **figures}
        part = self._out.with_suffix(".part")
        part.write_text(json.dumps(self._figures, indent=1) + "\n")
        os.replace(part, self._out)
        self.say(f"{section}: {json.dumps(figures)}")


def run_prefill(runtime: Runtime, state: State, prompt_BT: torch.Tensor, shape: Shape, report: Report) -> dict[str, Any]:
    """Prefill chunk by chunk; TTFT ends when the first new token is on the host. The state then holds it as its next input."""
    clock, begin = Clock(runtime.device), time.perf_counter()
    clock.mark()
    logits_BV = torch.empty(0)
    starts = range(0, prompt_BT.shape[1], shape.chunk)
    for n, start in enumerate(starts):
        logits_BV = runtime.prefill(state, prompt_BT[:, start : start + shape.chunk], chunk=shape.chunk)
        clock.mark()
        if n % 16 == 15:
            clock.seconds()
            report.say(f"prefill {start + shape.chunk} tokens")
    picked_B = logits_BV.argmax(-1)
    picked_B.tolist()
    ttft = time.perf_counter() - begin
    state.ids_B.copy_(picked_B)
    chunks = clock.seconds()
    sampled = {str(starts[n]): round(chunks[n], 4) for n in sorted({0, len(chunks) // 4, len(chunks) // 2, len(chunks) - 1})}
    return {"tokens": prompt_BT.shape[1], "ttft_s": round(ttft, 3), "chunk_s_at": sampled}


def warm_up(runtime: Runtime, state: State, prompt_BT: torch.Tensor, shape: Shape) -> dict[str, Any]:
    """Compile what the prefill will need: the chunks that end at a power of two of chunks, and the last one."""
    begin, tokens, start = time.perf_counter(), prompt_BT.shape[1], 0
    while start < tokens:
        rewind(state, start)
        runtime.prefill(state, prompt_BT[:, start : start + shape.chunk], chunk=shape.chunk)
        start = 2 * start + shape.chunk if (start // shape.chunk) % 2 else start + shape.chunk
    last = (tokens - 1) // shape.chunk * shape.chunk
    rewind(state, last)
    runtime.prefill(state, prompt_BT[:, last:], chunk=shape.chunk).argmax(-1).tolist()
    rewind(state, 0)
    return {"warm_up_s": round(time.perf_counter() - begin, 2)}


def run_decode(runtime: Runtime, state: State, steps: int) -> dict[str, Any]:
    """Greedy tokens, each read on the host before the next step as a stream of text needs it."""
    clock = Clock(runtime.device)
    runtime.advance(state, [True])  # Captures the graph.
    state.ids_B.tolist()
    clock.mark()
    for _ in range(steps - 1):
        runtime.advance(state, [True])
        state.ids_B.tolist()
        clock.mark()
    times = clock.seconds()
    part = max(1, len(times) // 8)
    return {
        "new_tokens": steps,
        "token_ms": round(1e3 * statistics.median(times), 3),
        "token_ms_first_eighth": round(1e3 * statistics.median(times[:part]), 3),
        "token_ms_last_eighth": round(1e3 * statistics.median(times[-part:]), 3),
        "token_ms_max": round(1e3 * max(times), 3),
    }


def rewind(state: State, length: int) -> None:
    """Let a batch of one continue from an earlier position: what lies behind is overwritten. Rings keep newer tokens: for timing only."""
    state.cache.lengths[0] = length
    state.cache.lengths_B.fill_(length)


def sampled_prefill(runtime: Runtime, state: State, prompt_BT: torch.Tensor, shape: Shape, samples: int) -> dict[str, Any]:
    """Times of chunks at evenly spread positions of a filled cache, and their integral: what a whole prefill would take."""
    last = prompt_BT.shape[1] // shape.chunk - 1
    places = sorted({round(last * i / (samples - 1)) for i in range(samples)})
    times = []
    for place in places:
        clock, start = Clock(runtime.device), place * shape.chunk
        rewind(state, start)
        clock.mark()
        runtime.prefill(state, prompt_BT[:, start : start + shape.chunk], chunk=shape.chunk)
        clock.mark()
        times += clock.seconds()
    whole = times[0] + sum((b - a) * (x + y) / 2 for a, b, x, y in zip(places, places[1:], times, times[1:], strict=False))
    return {
        "estimated_prefill_s": round(whole, 2),
        "chunk_s_at": {str(place * shape.chunk): round(seconds, 4) for place, seconds in zip(places, times, strict=True)},
    }


@contextlib.contextmanager
def recorded_shares(shares: list[float], block: int) -> Iterator[None]:
    """Note the kept share of candidate blocks of every selection of prefill inside."""
    select = prefill_module.select_prefill

    def recording(index_q_BTHR: torch.Tensor, *args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BHQN, count_BHQ = select(index_q_BTHR, *args, **named)
        T, last = index_q_BTHR.shape[1], count_BHQ.shape[2] - 1
        newest = int(named["lengths_B"][0]) + (torch.arange(last + 1) * block + block - 1).clamp(max=T - 1)
        candidates_Q = (newest // block + 1).to(count_BHQ.device)
        shares.append(float((count_BHQ[0] / candidates_Q).mean()))
        return ids_BHQN, count_BHQ

    prefill_module.select_prefill = recording
    try:
        yield
    finally:
        prefill_module.select_prefill = select


def kept_at_decode(runtime: Runtime, state: State, steps: int, block: int) -> dict[str, Any]:
    """Kept share of the blocks of uncaptured decode steps: mean over heads and steps, 10th and 90th percentile of heads."""
    shares: list[torch.Tensor] = []

    def observe(layer: int, mask_BHN: torch.Tensor, visible_B: torch.Tensor) -> None:
        shares.append(mask_BHN[0].sum(-1) / -(-visible_B[0] // block))

    state.on_selection = observe
    for _ in range(steps):
        runtime.advance(state, [True])
    state.on_selection = None
    kept = torch.cat(shares).float().cpu()
    low, high = kept.quantile(torch.tensor([0.1, 0.9])).tolist()
    return {"kept_share": round(float(kept.mean()), 4), "kept_share_p10": round(low, 4), "kept_share_p90": round(high, 4)}


def memory_of(runtime: Runtime, planned_bytes: int) -> dict[str, Any]:
    """Peak of torch's allocator since the last reset, and what the plan says."""
    if runtime.device.type != "cuda":
        return {"planned_bytes": planned_bytes}
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {
        "peak_bytes": peak,
        "reserved_bytes": reserved,
        "planned_bytes": planned_bytes,
        "peak_over_plan": round(peak / planned_bytes, 3),
    }


def measure(
    runtime: Runtime, shape: Shape, report: Report, section: str, *, tokens: int, pattern: str, decode: bool = True, dense: bool = False
) -> None:
    """One model at one length: TTFT, time per token, kept shares, split, memory."""
    on_gpu = runtime.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prefilling = with_spread(runtime.manifest, shape.spread_prefill, pattern)
    decoding = with_spread(runtime.manifest, shape.spread_decode, pattern)
    capacity = tokens + shape.new_tokens + 32 if tokens + shape.new_tokens + 32 <= shape.positions else shape.positions
    state = runtime.start(1, capacity, dense=dense)
    runtime.manifest = prefilling
    prompt_BT = prompt_of(shape, tokens)
    if not shape.cold:
        report.add(section, warm_up(runtime, state, prompt_BT, shape))
    report.add(section, run_prefill(runtime, state, prompt_BT, shape, report))
    planned = plan(config_of(shape).to_dict(), context=capacity, options=PlanOptions(roles=runtime.manifest, chunk=shape.chunk))
    stage = next(stage for stage in planned.stages if stage.name == f"serving, {'dense' if dense else 'converted'}")
    if decode:
        runtime.manifest = decoding
        report.add(section, run_decode(runtime, state, min(shape.new_tokens, capacity - tokens)))
        report.add(section, {"cache_bytes": state.cache.nbytes(), **memory_of(runtime, stage.total_bytes)})
        rewind(state, tokens - 16)
        if not dense:
            report.add(section, {"decode": kept_at_decode(runtime, state, 4, runtime.manifest.decode_block)})
        if on_gpu:
            report.add(section, {"decode_split": gpu_time_by_part(lambda: runtime.advance(state, [True]), PARTS, times=4)})
    else:
        report.add(section, {"cache_bytes": state.cache.nbytes(), **memory_of(runtime, stage.total_bytes)})
    if pattern == "topp":
        runtime.manifest = with_spread(runtime.manifest, shape.spread_prefill, "dense")
        report.add(section, {"dense_heads_sampled": sampled_prefill(runtime, state, prompt_BT, shape, 7)})
    runtime.manifest = prefilling
    for part in (2, 1):
        start = (tokens // part // shape.chunk - 1) * shape.chunk
        shares: list[float] = []
        with recorded_shares(shares, shape.block):
            rewind(state, start)
            runtime.prefill(state, prompt_BT[:, start : start + shape.chunk], chunk=shape.chunk)
        found: dict[str, Any] = {"kept_share": round(statistics.mean(shares), 4)} if shares else {}
        if on_gpu:
            rewind(state, start)
            chunk_BT = prompt_BT[:, start : start + shape.chunk]
            found |= gpu_time_by_part(functools.partial(runtime.prefill, state, chunk_BT, chunk=shape.chunk), PARTS)
        report.add(section, {f"prefill_split_at_{start}": found})


def measure_growth(device: torch.device, shape: Shape, report: Report, *, tokens: int, new_tokens: int) -> None:
    """Many generated tokens on a slice of a few layers: time per token and memory at the beginning and at the end."""
    small = dataclasses.replace(shape, layers=4, retained=2)
    runtime = random_runtime(config_of(small), manifest_of(small), device, dtype_on(device), 0, index_std=small.head_dim**-0.5)
    runtime.manifest = with_spread(runtime.manifest, small.spread_prefill, "dense")
    state = runtime.start(1, tokens + new_tokens)
    run_prefill(runtime, state, prompt_of(small, tokens), small, report)
    runtime.manifest = with_spread(runtime.manifest, small.spread_decode, "dense")
    found = run_decode(runtime, state, new_tokens // 2)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    rest = run_decode(runtime, state, new_tokens - new_tokens // 2)
    grown = (torch.cuda.memory_allocated() if device.type == "cuda" else 0) - before
    report.add("growth", {
        "layers": small.layers, "tokens": tokens, "new_tokens": new_tokens, "token_ms_first": found["token_ms_first_eighth"],
        "token_ms_last": rest["token_ms_last_eighth"], "grown_bytes_second_half": grown,
    })  # fmt: skip


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def run(device: torch.device, shape: Shape, out: pathlib.Path, sections: list[str], *, short: int, growth: tuple[int, int]) -> None:
    """The wanted sections, shortest first."""
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report = Report(out, {"shape": dataclasses.asdict(shape), "device": device_name, "torch": torch.__version__})
    if "growth" in sections:
        measure_growth(device, shape, report, tokens=growth[0], new_tokens=growth[1])
    runtime = random_runtime(config_of(shape), manifest_of(shape), device, dtype_on(device), 0, index_std=shape.head_dim**-0.5)
    report.say("weights are there")
    long = shape.positions - shape.new_tokens
    wanted = {
        "short": lambda name: measure(runtime, shape, report, name, tokens=short, pattern="topp"),
        "short_dense_heads": lambda name: measure(runtime, shape, report, name, tokens=short, pattern="dense", decode=False),
        "short_dense_model": lambda name: measure(runtime, shape, report, name, tokens=short, pattern="dense", dense=True),
        "long": lambda name: measure(runtime, shape, report, name, tokens=long, pattern="topp"),
        "long_dense_heads": lambda name: measure(runtime, shape, report, name, tokens=long, pattern="dense", decode=False),
    }
    for name, section in wanted.items():
        if name in sections:
            section(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["growth", "short", "short_dense_heads", "short_dense_model", "long", "long_dense_heads"]
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--short", type=int, default=1 << 17, help="tokens of the short sections")
    parser.add_argument("--index-keys", choices=["group", "head"], default="group", help="one key set a KV group, or one a head")
    parser.add_argument("--spread-prefill", type=float, default=Shape.spread_prefill)
    parser.add_argument("--spread-decode", type=float, default=Shape.spread_decode)
    parser.add_argument("--cold", action="store_true", help="let the first prefill compile its kernels")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON")
    options = parser.parse_args()
    shape = Shape(
        index_keys=options.index_keys, spread_prefill=options.spread_prefill, spread_decode=options.spread_decode, cold=options.cold
    )  # fmt: skip
    run(torch.device("cuda:0"), shape, options.out, options.sections, short=options.short, growth=(1 << 15, 4096))


if __name__ == "__main__":
    main()
