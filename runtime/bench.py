"""Time and memory of a loaded artifact: time to first token, time per token and cache, sparse beside dense in one process."""

# B batch  T tokens  V vocabulary
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Protocol

import torch

from rtpurbo import __version__
from rtpurbo.manifests.assumptions import PlanOptions
from rtpurbo.manifests.manifest import Manifest
from rtpurbo.manifests.plan import plan
from rtpurbo.runtime.bench_rows import BenchOptions, BenchRow, Mode
from rtpurbo.runtime.sampling import Sampler, SamplingOptions
from rtpurbo.runtime.synthetic import SyntheticPrompts
from rtpurbo.runtime.verify import KeptBlocks

WARM_STEPS = 4


class Served(Protocol):
    """What is measured: a Runtime, or anything else with its start, prefill and decode."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def tokenizer(self) -> Any: ...
    def start(self, batch: int, capacity: int, dense: bool = False) -> Any: ...
    def prefill(self, state: Any, input_ids: torch.Tensor, *, chunk: int) -> torch.Tensor: ...
    def decode(self, state: Any, token_ids: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded model with its config.json as an object, the dtype that it runs in, its own prefill chunk, and the form it came in."""

    runtime: Any  # a Served; its states have cache.nbytes()
    config: dict[str, Any]
    dtype: torch.dtype
    chunk: int
    form: str


def bench(subject: Subject, options: BenchOptions, on_row: Callable[[BenchRow], None] | None = None) -> list[BenchRow]:
    """Measure every combination, sparse and then dense; a length or batch that does not fit becomes a row with the reason.

    Each row: a warm-up of at most two chunks and WARM_STEPS decode steps, then `repeat` runs of the whole prompt and greedy decoding
    that ignores end-of-sequence tokens. Times are taken with CUDA events on a GPU, else with the process clock. on_row sees each row
    when it is there. Raises ValueError when no row could run. Source: ours.
    """
    prompts, rows = SyntheticPrompts(subject.runtime.tokenizer, subject.config["vocab_size"]), []
    modes: tuple[Mode, ...] = ("sparse", "dense") if options.dense else ("sparse",)
    for tokens in options.tokens:
        for batch in options.batch:
            pair = []
            for mode in modes:
                blank = _blank(subject, options, mode, tokens, batch)
                pair.append(_measured(subject, options, blank, prompts))
                if on_row is not None:
                    on_row(pair[-1])
            rows += _with_speedup(pair)
    if not any(row.ran for row in rows):
        row = rows[0]
        raise ValueError(f"no row could run; {row.mode}, {row.tokens} tokens, batch {row.batch}: {row.note}")
    return rows


class _Clock:
    """Marks on the device's own time line (CUDA events, so that host delays between kernels count too) or on the process clock."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, []

    def mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Between each two neighbouring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def _measured(subject: Subject, options: BenchOptions, row: BenchRow, prompts: SyntheticPrompts) -> BenchRow:
    """The row with its figures, or with the reason why there are none."""
    try:
        return _measure(subject, options, row, prompts)
    except _Unfit as error:
        reason = str(error)
    except (torch.OutOfMemoryError, MemoryError):
        reason = f"out of memory on {subject.runtime.device} while running"
    except RuntimeError as error:
        # The CPU allocator's failure has no class of its own.
        if "can't allocate memory" not in str(error):
            raise
        reason = "out of memory on cpu while running"
    # Outside the except block, where the traceback no longer holds the tensors.
    _free(subject.runtime.device)
    return replace(row, note=reason)


class _Unfit(Exception):
    """The runtime refused this length or batch size."""


def _measure(subject: Subject, options: BenchOptions, row: BenchRow, prompts: SyntheticPrompts) -> BenchRow:
    runtime, capacity = subject.runtime, row.tokens + options.new_tokens
    dense = row.mode == "dense"

    def started() -> Any:
        _free(runtime.device)
        try:
            return runtime.start(row.batch, capacity, dense=dense)
        except ValueError as error:
            raise _Unfit(str(error)) from error

    state = started()
    ids_BT = prompts.take(row.tokens, row.batch)
    _run(runtime, state, ids_BT[:, : 2 * row.chunk], row.chunk, min(options.new_tokens, WARM_STEPS + 1))
    first, opening, steps, cache_bytes, newest_B = [], [], [], state.cache.nbytes(), torch.empty(0)
    on_gpu = runtime.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(runtime.device)
    for _ in range(options.repeat):
        del state
        state = started()
        (ttft, opened, *rest), newest_B = _run(runtime, state, ids_BT, row.chunk, options.new_tokens)
        first.append(ttft)
        opening.append(opened)
        steps += rest
    ordered, step_s = sorted(steps), statistics.median(steps)
    return replace(
        row,
        ttft_s=statistics.median(first),
        ttft_low_s=min(first),
        ttft_high_s=max(first),
        token_ms=step_s * 1e3,
        token_low_ms=_quantile(ordered, 0.1) * 1e3,
        token_high_ms=_quantile(ordered, 0.9) * 1e3,
        first_step_ms=statistics.median(opening) * 1e3,
        tokens_per_s=row.batch / step_s,
        prompt_tokens_per_s=row.batch * row.tokens / statistics.median(first),
        cache_bytes=cache_bytes,
        plan_cache_bytes=_planned(subject, row, capacity),
        peak_bytes=torch.cuda.max_memory_allocated(runtime.device) if on_gpu else None,
        kept_blocks=_kept_blocks(runtime, state, newest_B),
    )


def _run(runtime: Served, state: Any, ids_BT: torch.Tensor, chunk: int, new_tokens: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of the prefill and of each decode step, ids read on the host after each, as streaming needs them; the last ids."""
    sampler, clock = Sampler(SamplingOptions(), range(len(ids_BT)), runtime.device), _Clock(runtime.device)
    clock.mark()
    picked_B = sampler.pick(runtime.prefill(state, ids_BT, chunk=chunk))
    picked_B.tolist()
    clock.mark()
    for _ in range(new_tokens - 1):
        picked_B = sampler.pick(runtime.decode(state, picked_B))
        picked_B.tolist()
        clock.mark()
    return clock.seconds(), picked_B


def _kept_blocks(runtime: Served, state: Any, ids_B: torch.Tensor) -> float | None:
    """Share of the blocks that one more step selects: the cache has room for the last token that was picked."""
    if not hasattr(state, "on_selection"):
        return None
    kept = KeptBlocks(runtime.manifest.decode_block)
    state.on_selection = kept.observe
    runtime.decode(state, ids_B)
    return kept.share


def _blank(subject: Subject, options: BenchOptions, mode: Mode, tokens: int, batch: int) -> BenchRow:
    manifest: Manifest = subject.runtime.manifest
    short = mode == "sparse" and tokens < manifest.dense_below
    return BenchRow(
        form=subject.form,
        mode=mode,
        tokens=tokens,
        batch=batch,
        new_tokens=options.new_tokens,
        chunk=subject.chunk if options.chunk is None else options.chunk,
        dtype=str(subject.dtype).removeprefix("torch."),
        note=f"below dense_below {manifest.dense_below}: generate runs such prompts dense" if short else "",
        device=_device_name(subject.runtime.device),
        versions=_versions(),
    )


def _planned(subject: Subject, row: BenchRow, capacity: int) -> int:
    options = PlanOptions(roles=subject.runtime.manifest, kv_bytes=subject.dtype.itemsize)
    sizes = plan(subject.config, context=capacity, batch=row.batch, options=options)
    return sizes.dense_cache_bytes(capacity, row.batch) if row.mode == "dense" else sizes.cache_bytes(capacity, row.batch)


def _with_speedup(pair: list[BenchRow]) -> list[BenchRow]:
    if len(pair) == 1 or not all(row.ran for row in pair):
        return pair
    sparse, dense = pair
    speedup = {name: getattr(dense, name) / getattr(sparse, name) for name in ("ttft_s", "token_ms")}
    return [replace(sparse, ttft_speedup=speedup["ttft_s"], token_speedup=speedup["token_ms"]), dense]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()}"


def _versions() -> str:
    found = [f"rtpurbo {__version__}"]
    for name in ("torch", "triton", "transformers"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"python {platform.python_version()}"])
