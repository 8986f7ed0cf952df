"""Mixture of experts of Qwen3-Coder-30B-A3B (128 experts, 8 a token, 2048 x 768, bf16) beside transformers' own, as CSV.

All rows share one process. What can be captured runs in a CUDA graph of several steps; each step has its own tokens and routing
and takes the weights of the next of several layers, so that none finds its weights in the L2. transformers' eager loop asks the
host for each expert's tokens and is timed as single calls.
"""

# T tokens  X experts a token  E experts  C hidden width  F expert width
import argparse
import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable

import torch

from rtpurbo.kernels.bench import READ_BANDWIDTH_GB_S, time_graph, versions, write_csv
from rtpurbo.kernels.experts import mix_experts
from rtpurbo.kernels.router import route_tokens

E, X, C, F, LAYERS = 128, 8, 2048, 768, 4
EXPERT_BYTES = 3 * C * F * 2
PEERS = ("eager", "batched_mm", "grouped_mm")


def random(*shape: int, scale: float) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def peer(implementation: str, gate_up: torch.Tensor, down: torch.Tensor) -> torch.nn.Module:
    """transformers' Qwen3MoeExperts on the given weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=C, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=X, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)
    return experts.requires_grad_(False)


def steps_for(implementation: str, layers: list, tokens: int, count: int) -> tuple[list[Callable[[], object]], float]:
    """So many steps with routing of their own, and the mean number of experts that a step reads."""
    steps, distinct = [], 0
    for step in range(count):
        gate_up, down = layers[step % LAYERS]
        x = random(tokens, C, scale=1.0)
        logits, ids = torch.randn(tokens, E, device="cuda").topk(X, dim=1)
        weights = logits.softmax(1).bfloat16()
        distinct += ids.unique().numel()
        if implementation in PEERS:
            steps.append(functools.partial(peer(implementation, gate_up, down), x, ids, weights))
        else:
            steps.append(functools.partial(mix_experts, x, ids, weights, gate_up, down, impl=implementation))
    return steps, distinct / count


def time_calls(steps: list[Callable[[], object]], repeats: int = 3) -> tuple[float, float, float]:
    """Median, lowest and highest time of single calls, in us, host included."""
    times = []
    for step in [steps[0], *steps * repeats]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(1000.0 * start.elapsed_time(end))
    return statistics.median(times[1:]), min(times[1:]), max(times[1:])


def rows(lengths: list[int], impls: list[str]):
    """One dictionary per number of tokens and implementation."""
    layers = [(random(E, 2 * F, C, scale=C**-0.5), random(E, C, F, scale=F**-0.5)) for _ in range(LAYERS)]
    for tokens in lengths:
        count = 16 if tokens <= 64 else 4
        for impl in impls:
            if (impl == "batched_mm" and tokens > 64) or (impl == "gluon" and tokens < 256):
                continue  # The one copies the weights of every pair, the other has tiles of 128 rows.
            torch.manual_seed(tokens)
            steps, experts = steps_for(impl, layers, tokens, count)
            if impl == "eager":
                median, low, high = time_calls(steps)
            else:
                timing = time_graph(steps, replays=20)
                median, low, high = timing.median_us, timing.low_us, timing.high_us
            yield {
                "tokens": tokens,
                "impl": impl,
                "median_us": round(median, 2),
                "low_us": round(low, 2),
                "high_us": round(high, 2),
                "experts_read": round(experts, 1),
                "floor_us": round(experts * EXPERT_BYTES / READ_BANDWIDTH_GB_S / 1e3, 2),
                "gb_s": round(experts * EXPERT_BYTES / median / 1e3),
                "tflops": round(6 * C * F * X * tokens / median / 1e6, 1),
            }
            del steps


def torch_route(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing as transformers' Qwen3MoeTopKRouter does it."""
    weights_TX, ids_TX = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(X, dim=-1)
    return ids_TX, (weights_TX / weights_TX.sum(dim=-1, keepdim=True)).to(logits_TE.dtype)


def route_rows(lengths: list[int]):
    """The step before the experts, from router logits: own kernel and PyTorch's operations."""
    for tokens in lengths:
        logits = [random(tokens, E, scale=1.0) for _ in range(16)]
        own = functools.partial(route_tokens, num_chosen=X, normalize=True)
        for impl, route in (("route, triton", own), ("route, torch", torch_route)):
            timing = time_graph([functools.partial(route, x) for x in logits], replays=20)
            timed = {"median_us": timing.median_us, "low_us": timing.low_us, "high_us": timing.high_us}
            yield {"tokens": tokens, "impl": impl, **{name: round(value, 2) for name, value in timed.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--impl", nargs="+", default=["triton", "gluon", "library", *PEERS])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="CSV")
    options = parser.parse_args()
    found = []
    for row in itertools.chain(route_rows([1, 64, 8192]), rows(options.tokens, options.impl)):
        found.append({**row, **versions()})
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        write_csv(options.out, found)


if __name__ == "__main__":
    main()
