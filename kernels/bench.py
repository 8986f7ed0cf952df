"""Timing for kernel benchmarks: CUDA-graph replay over rotated buffers, medians, CSV rows with device and versions."""

import csv
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

READ_BANDWIDTH_GB_S = 4560.0  # pure reads measured on one H200, see benchmarks/decode.md


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one step in microseconds: median, 10th and 90th percentile over replays."""

    median_us: float
    low_us: float
    high_us: float


def rotations(step_bytes: int, *, at_least: int = 2, at_most: int = 128, total_bytes: int = 256 << 20) -> int:
    """How many buffer sets make a round of steps touch several times the L2, so that no step finds its own data there."""
    return max(at_least, min(at_most, -(-total_bytes // max(1, step_bytes))))


def time_graph(steps: Sequence[Callable[[], object]], *, replays: int = 30, at_least: int = 1) -> Timing:
    """Capture all steps, one after the other, in one CUDA graph; time its replays; divide by the number of steps.

    at_least: so many steps a graph, by several rounds of them. The graph's own launch takes some microseconds.
    """
    steps = [step for _ in range(-(-at_least // len(steps))) for step in steps]
    for step in (steps[0], steps[0], steps[-1]):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for replay in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1000.0 / len(steps))
    deciles = statistics.quantiles(times, n=10)
    return Timing(median_us=statistics.median(times), low_us=deciles[0], high_us=deciles[-1])


class Clock:
    """Marks in time: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", []

    def mark(self) -> None:
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._marks.append(mark)

    def seconds(self) -> list[float]:
        """Times between the marks."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


def gpu_time_by_part(run: Callable[[], object], parts: Mapping[str, Sequence[str]], *, times: int = 1) -> dict[str, object]:
    """Milliseconds of GPU time of each part in one call of `run` (mean of `times` calls), and the largest kernels.

    A kernel belongs to the first part that has a word of its name (lower case), or to "rest".
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    total_ms = dict.fromkeys((*parts, "rest"), 0.0)
    kernels: list[tuple[float, str]] = []
    for event in profiler.key_averages():
        time_ms, name = event.self_device_time_total / 1e3 / times, event.key.lower()
        total_ms[next((part for part, words in parts.items() if any(word in name for word in words)), "rest")] += time_ms
        kernels.append((round(time_ms, 4), event.key[:60]))
    largest = sorted(kernels, reverse=True)[:12]
    return {**{f"{part}_ms": round(value, 3) for part, value in total_ms.items()}, "largest_kernels_ms": largest}


def versions() -> dict[str, str]:
    """The columns that every benchmark row carries."""
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows (the union of their keys as columns); the file appears when it is complete."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    part = path.with_suffix(".part")
    with part.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
