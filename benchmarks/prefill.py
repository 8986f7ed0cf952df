"""Prefill of one attention layer by head roles, beside dense libraries: single shot, 8K chunks, dense and sparse retrieval; CSV, plot.

The layer is Qwen3-Coder-30B-A3B's attention: 32 query heads, 4 KV heads, head dim 128, batch 1, bf16, window 8192, 4 sinks, random
data. Layouts: A = 5 retrieval heads in one KV group, B = 2+1+1+1 over four groups, C = one whole group. Sparse rows plant a density of
key blocks: pooled index logits are normal, with the deviation at which the selector keeps that share at top-p 0.9; the density column is
what it kept. All rows of a run share one process. Calls longer than a second are timed once, after shorter ones of the same kernel. The
host runs ahead of the GPU, as in a model: its cost a call has a column of its own.
"""

# B batch  T chunk tokens  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim  R index dim
import argparse
import functools
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtpurbo.kernels.bench import versions, write_csv
from rtpurbo.kernels.prefill_layer import LIST_BYTES, prefill_layer
from rtpurbo.kernels.prefill_selection import select_prefill
from rtpurbo.kernels.sparse_attention import attend_prefill

H, K, D, R, WINDOW, SINKS, CHUNK, BLOCK, TOP_P = 32, 4, 128, 16, 8192, 4, 8192, 128, 0.9
LAYOUTS = {"A": (5,), "B": (2, 1, 1, 1), "C": (8,)}
DENSITIES = (0.02, 0.05, 0.1, 0.2)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def time_calls(run: Callable[[], object], seconds: float, *, warm: bool = False) -> dict[str, object]:
    """Median, 10th and 90th percentile of single calls in ms, L2 flushed between short ones; warm: it has just run."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times: list[float] = []
    host: list[float] = []
    if not warm:
        run()
    wanted = 1
    while len(times) < wanted:
        if not times or times[-1] < 20:
            flush.zero_()
            torch.cuda._sleep(4_000_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        before = time.perf_counter()
        run()
        host.append(1000 * (time.perf_counter() - before))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        wanted = max(1, min(30, int(1000 * seconds / times[0])))
    low, high = (min(times), max(times)) if len(times) < 5 else (statistics.quantiles(times, n=10)[i] for i in (0, -1))
    columns = {"median_ms": statistics.median(times), "low_ms": low, "high_ms": high, "host_ms": statistics.median(host)}
    return {**{name: round(value, 4) for name, value in columns.items()}, "calls": len(times)}


def time_once(run: Callable[[], object]) -> dict[str, object]:
    """One call, for those that take seconds; the kernel has run before on fewer tokens."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    ms = round(start.elapsed_time(end), 2)
    return {"median_ms": ms, "low_ms": ms, "high_ms": ms, "calls": 1}


def causal_pairs(first: int, end: int) -> int:
    """Pairs (query, key) of the queries first ... end - 1 under the causal mask."""
    return (end * (end + 1) - first * (first + 1)) // 2


def window_pairs(first: int, end: int) -> int:
    """The same within window + sinks."""
    edge = WINDOW + SINKS
    return causal_pairs(min(first, edge), min(end, edge)) + (max(end, edge) - max(first, edge)) * edge


def plant(tokens: int, heads: int, density: float, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Index queries (from `offset` on) and keys [1, ..., heads, R], the logit scale at which the selector keeps `density`, and the
    density kept; all tokens of a block are equal."""
    blocks = -(-tokens // BLOCK)
    q = torch.nn.functional.normalize(torch.randn(1, blocks, heads, R, device="cuda"), dim=-1)
    k = torch.randn(1, blocks, heads, R, device="cuda")
    q, k = (x.bfloat16().repeat_interleave(BLOCK, dim=1)[:, :tokens] for x in (q, k))
    q = q[:, offset:]
    # Some 16 blocks of queries, evenly spaced, are enough to find the scale.
    low, high = 0.5, 8.0
    for _ in range(12):
        scale = (low + high) / 2
        low, high = (scale, high) if kept_density(q, k, scale, offset, sampled=True) > density else (low, scale)
    return q, k, scale, kept_density(q, k, scale, offset)


def layer_call(q, k, v, counts: Sequence[int], offset: int, density: float | None) -> tuple[Callable[..., torch.Tensor], float | None]:
    """prefill_layer on q's tokens at `offset` of k's and v's, and the density that its selector keeps (None: dense retrieval)."""
    T, S, retained, n = q.shape[1], k.shape[1], len(counts), sum(counts)
    lengths, valid = (torch.tensor([x], dtype=torch.int32, device="cuda") for x in (offset, T))
    rings = [random(1, SINKS + WINDOW, K - retained, D) for _ in range(2)] if retained < K else [None, None]
    extra: dict = {}
    kept = None
    if density is not None:
        index_q, index_k, scale, kept = plant(S, n, density, offset)
        key_sets = tuple(range(n))
        extra = {"pattern": "topp", "index_q_BTHR": index_q, "index_k_BSIR": index_k, "key_sets": key_sets, "index_scale": scale}
        extra |= {"top_p": TOP_P, "prefill_block": BLOCK}
    call = functools.partial(
        prefill_layer, q, k[:, offset:], v[:, offset:], retrieval_counts=counts, lengths_B=lengths, counts_B=valid, newest=S,
        k_BSKD=k[:, :, :retained], v_BSKD=v[:, :, :retained], ring_k_BWKD=rings[0], ring_v_BWKD=rings[1], window=WINDOW, sinks=SINKS,
        scale=D**-0.5, from_start=offset == 0, **extra,
    )  # fmt: skip
    return call, kept


def pieces(index_q, index_k, scale: float, offset: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """(ids, count, lengths, first row) of the selection, piece by piece as prefill_layer works through a long chunk."""
    T, n, S = index_q.shape[1], index_q.shape[2], index_k.shape[1]
    key_set = torch.arange(n, dtype=torch.int32, device="cuda")
    step = max(1, LIST_BYTES // (4 * n * -(-S // BLOCK))) * BLOCK
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        lengths, valid = (torch.tensor([x], dtype=torch.int32, device="cuda") for x in (offset + start, rows.stop - start))
        ids, count = select_prefill(
            index_q[:, rows], index_k, key_set_H=key_set, lengths_B=lengths, counts_B=valid, scale=scale, top_p=TOP_P, sinks=SINKS,
            block=BLOCK,
        )  # fmt: skip
        yield ids, count, lengths, start


def kept_density(index_q, index_k, scale: float, offset: int, *, sampled: bool = False) -> float:
    """Listed blocks over candidate blocks, of all blocks of queries or of some evenly spaced ones."""
    first, blocks = offset // BLOCK, -(-index_q.shape[1] // BLOCK)
    if not sampled or blocks < 128:
        listed = sum(int(count.sum()) for _, count, _, _ in pieces(index_q, index_k, scale, offset))
        return listed / (causal_pairs(first, first + blocks) * index_q.shape[2])
    listed = candidates = 0
    for n in range(blocks // 64, blocks, blocks // 16):
        rows = slice(n * BLOCK, (n + 1) * BLOCK)
        for _, count, _, _ in pieces(index_q[:, rows], index_k, scale, offset + n * BLOCK):
            listed, candidates = listed + int(count.sum()), candidates + (first + n + 1) * index_q.shape[2]
    return listed / candidates


def dense_library(q, k, v, impl: str) -> Callable[[], object]:
    """All of q's heads, causal, through PyTorch (flash = FlashAttention-2, cudnn) or FlashAttention-4, in the layout that each reads."""
    if impl == "fa4":
        from flash_attn.cute import flash_attn_func

        return functools.partial(flash_attn_func, q, k, v, causal=True)
    backend = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[impl]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def row(case: str, tokens: int, impl: str, pairs: float, timed: dict[str, object], **rest: object) -> dict[str, object]:
    """A CSV row; pairs: visible (query, key) pairs over all heads."""
    tflops = round(4 * D * pairs / float(str(timed["median_ms"])) / 1e9, 1)
    result = {"case": case, "tokens": tokens, "impl": impl, **rest, **timed, "tflops": tflops}
    print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
    return result


def peer_rows(tokens: int, impls: Sequence[str], seconds: float) -> Iterator[dict[str, object]]:
    """The whole layer dense, by each library."""
    q, k, v = random(1, tokens, H, D), random(1, tokens, K, D), random(1, tokens, K, D)
    for impl in impls:
        run = dense_library(q, k, v, impl)
        timed = time_once(run) if tokens > 300_000 else time_calls(run, seconds)
        yield row("layer, all heads dense", tokens, impl, H * causal_pairs(0, tokens), timed)


def layer_rows(
    tokens: int, layouts: Sequence[str], densities: Sequence[float], seconds: float, *, fa4: bool = False
) -> Iterator[dict[str, object]]:
    """The layer by roles: single shot, and the last 8K as a chunk; own kernels; with fa4 layout A in one shot through it."""
    q, k, v = random(1, tokens, H, D), random(1, tokens, K, D), random(1, tokens, K, D)
    for layout in layouts:
        counts = LAYOUTS[layout]
        n = sum(counts)
        for case, offset in (("single shot", 0), ("chunk of 8192", tokens - CHUNK)):
            if offset < 0 or (case != "single shot" and offset == 0):
                continue
            local = (H - n) * window_pairs(offset, tokens)
            dense = n * causal_pairs(offset, tokens)
            cases = [("gluon", None), *([("fa4", None)] if fa4 and offset == 0 and layout == "A" else [])]
            cases += [("gluon", density) for density in (densities if layout == "A" else [0.1] if 0.1 in densities else [])]
            for impl, density in cases:
                call, kept = layer_call(q[:, offset:], k, v, counts, offset, density)
                run = functools.partial(call, impl=impl)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                out = run()
                workspace = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
                del out
                yield row(
                    case, tokens, impl, local + dense * (kept or 1.0), time_calls(run, seconds, warm=True), layout=layout,
                    pattern="dense" if density is None else "topp", planted=density, density=kept and round(kept, 4),
                    workspace_mb=round(workspace / 2**20, 1),
                )  # fmt: skip


def retrieval_rows(tokens: int, impls: Sequence[str], seconds: float) -> Iterator[dict[str, object]]:
    """The 5 retrieval heads of layout A alone: dense by each implementation, the selection alone, listed blocks alone."""
    q, k, v = random(1, tokens, 5, D), random(1, tokens, 1, D), random(1, tokens, 1, D)
    lengths, valid = (torch.tensor([x], dtype=torch.int32, device="cuda") for x in (0, tokens))
    own = functools.partial(attend_prefill, q[:, :, None], k, v, lengths_B=lengths, counts_B=valid, scale=D**-0.5)
    for impl in impls:
        run = functools.partial(own, impl=impl) if impl in ("gluon", "triton") else dense_library(q, k, v, impl)
        timed = time_once(run) if tokens > 300_000 else time_calls(run, seconds)
        yield row("retrieval heads, dense", tokens, impl, 5 * causal_pairs(0, tokens), timed)
    index_q, index_k, scale, kept = plant(tokens, 5, 0.1)
    timed = time_calls(lambda: [None for _ in pieces(index_q, index_k, scale, 0)], seconds)
    yield row("retrieval heads, selection", tokens, "triton", 0, timed, density=round(kept, 4))
    if tokens <= 131072:
        (ids, count, _, _) = next(pieces(index_q, index_k, scale, 0))
        for impl in [x for x in impls if x in ("gluon", "triton")]:
            timed = time_calls(functools.partial(own, ids_BHQN=ids, count_BHQ=count, impl=impl), seconds)
            yield row("retrieval heads, listed", tokens, impl, 5 * causal_pairs(0, tokens) * kept, timed, density=round(kept, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**k for k in range(12, 21)])
    parser.add_argument("--cases", nargs="+", default=["peers", "retrieval", "layer"], choices=["peers", "retrieval", "layer"])
    parser.add_argument("--peers", nargs="*", default=["fa2", "cudnn", *(["fa4"] if importlib.util.find_spec("flash_attn") else [])])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--densities", type=float, nargs="*", default=list(DENSITIES))
    parser.add_argument("--triton-up-to", type=int, default=131072, help="longest run of the portable kernel, in tokens")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed seconds a row")
    parser.add_argument("--csv", type=pathlib.Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for tokens in options.tokens:
        own = ["gluon", *(["triton"] if tokens <= options.triton_up_to else [])]
        if "peers" in options.cases:
            rows += peer_rows(tokens, options.peers, options.seconds)
        if "retrieval" in options.cases:
            rows += retrieval_rows(tokens, [*own, *options.peers], options.seconds)
        if "layer" in options.cases:
            rows += layer_rows(tokens, options.layouts, options.densities, options.seconds, fa4="fa4" in options.peers)
        write_csv(options.csv, [{**r, **versions()} for r in rows])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
