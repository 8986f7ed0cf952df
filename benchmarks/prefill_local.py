"""Prefill of the window + sinks heads: own kernels beside FlexAttention, time and TFLOP/s on visible keys, as CSV.

The layer is Qwen3-Coder-30B-A3B's attention: 32 query heads, 4 KV heads, head dim 128, batch 1, bf16, window 8192, 4 sinks. All rows of
a run share one process and the same random tensors. A chunk row is 8192 queries at offset N - 8192 against the ring.
"""

# B batch  T query tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
import argparse
import csv
import functools
import pathlib
from collections.abc import Callable

import torch
import triton

from rtpurbo.kernels.local_attention import attend_local

H, K, D, WINDOW, SINKS, CHUNK = 32, 4, 128, 8192, 4, 8192
COLUMNS = ["case", "tokens", "impl", "median_ms", "p10_ms", "p90_ms", "tflops", "device", "torch", "triton"]


def visible_pairs(first: int, end: int) -> int:
    """Pairs (query, visible key) of the queries first ... end - 1."""
    return sum(min(i + 1, WINDOW + min(SINKS, i + 1 - min(WINDOW, i + 1))) for i in range(first, end))


def measure(run: Callable[[], object], pairs: int, seconds: float) -> dict[str, str]:
    """Median, 10th and 90th percentile of single launches (CUDA events, L2 flushed between them)."""
    timed = triton.testing.do_bench(run, warmup=200, rep=int(1000 * seconds), quantiles=[0.1, 0.5, 0.9])
    assert isinstance(timed, (list, tuple))
    low, median, high = timed
    tflops = 4 * D * H * pairs / median / 1e9
    return {"median_ms": f"{median:.4f}", "p10_ms": f"{low:.4f}", "p90_ms": f"{high:.4f}", "tflops": f"{tflops:.1f}"}


def flex_attention(q_BTHD: torch.Tensor, k_BTKD: torch.Tensor, v_BTKD: torch.Tensor) -> Callable[[], object]:
    """FlexAttention's launch over the same mask, in its own layout, with the block mask built beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return (j <= i) & ((i - j < WINDOW) | (j < SINKS))

    T = q_BTHD.shape[1]
    mask = create_block_mask(seen, None, None, T, T, device="cuda", _compile=True)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q_BTHD, k_BTKD, v_BTKD))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, scale=D**-0.5, enable_gqa=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def rows(lengths: list[int], flex_lengths: list[int], impls: list[str], seconds: float):
    """One dictionary per case and implementation."""
    for tokens in lengths:
        q, k, v = random(1, tokens, H, D), random(1, tokens, K, D), random(1, tokens, K, D)
        pairs = visible_pairs(0, tokens)
        attend = functools.partial(attend_local, window=WINDOW, sinks=SINKS, scale=D**-0.5)
        for impl in [*impls, "flex"] if tokens in flex_lengths else impls:
            run = flex_attention(q, k, v) if impl == "flex" else functools.partial(attend, q, k, v, impl=impl)
            yield {"case": "single shot", "tokens": tokens, "impl": impl, **measure(run, pairs, seconds)}
        if tokens > CHUNK:
            q, k, v = q[:, -CHUNK:], k[:, -CHUNK:], v[:, -CHUNK:]
            ring_k, ring_v = random(1, SINKS + WINDOW, K, D), random(1, SINKS + WINDOW, K, D)
            offset = torch.tensor([tokens - CHUNK], dtype=torch.int32, device="cuda")
            pairs = visible_pairs(tokens - CHUNK, tokens)
            attend = functools.partial(attend, q, k, v, lengths_B=offset, ring_k_BWKD=ring_k, ring_v_BWKD=ring_v)
            # FlashAttention-4 reads one tensor in which row = position, not ring and chunk.
            for impl in (impl for impl in impls if impl != "fa4"):
                run = functools.partial(attend, impl=impl)
                yield {"case": "chunk of 8192", "tokens": tokens, "impl": impl, **measure(run, pairs, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**k for k in range(12, 21)])
    parser.add_argument("--flex-tokens", type=int, nargs="*", default=[32768, 131072], help="lengths at which FlexAttention runs")
    parser.add_argument("--impl", nargs="+", default=["gluon", "triton"])
    parser.add_argument("--seconds", type=float, default=0.5, help="timed seconds a row")
    parser.add_argument("--csv", type=pathlib.Path, required=True)
    options = parser.parse_args()
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    torch.manual_seed(0)
    unfinished = options.csv.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(options.tokens, options.flex_tokens, options.impl, options.seconds):
            writer.writerow({**row, **versions})
            file.flush()
            print(f"{row['case']:>14} {row['tokens']:>8} {row['impl']:>7} {row['median_ms']:>10} ms {row['tflops']:>6} TFLOP/s", flush=True)
    unfinished.rename(options.csv)


if __name__ == "__main__":
    main()
