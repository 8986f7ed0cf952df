"""What `rtpurbo bench` is asked for, and what it finds."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Every prompt length with every batch size. chunk: prompt tokens processed at a time (None: the subject's own).

    repeat: measured runs a row. new_tokens: the first comes from the prefill, the others from decode steps. dense: measure the dense
    mode beside the sparse one. Raises ValueError for values out of range.
    """

    tokens: tuple[int, ...]
    batch: tuple[int, ...] = (1,)
    new_tokens: int = 64
    chunk: int | None = None
    repeat: int = 3
    dense: bool = True

    def __post_init__(self) -> None:
        single = {"chunk": (self.chunk if self.chunk is not None else 1,), "repeat": (self.repeat,)}
        for name, values in {"tokens": self.tokens, "batch": self.batch, **single}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {', '.join(map(str, values)) or 'empty'}, wanted at least 1")
        if self.new_tokens < 3:
            raise ValueError(f"new_tokens is {self.new_tokens}, wanted at least 3: the first comes from the prefill, the second is apart")


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One measurement, or why there is none (`note` with times of None).

    ttft_s: prompt in, first token ids on the host; median, smallest and largest of the repeats. token_ms: one decode step of the whole
    batch, its ids on the host; median, 10th and 90th percentile over all steps but each run's first, whose median is first_step_ms
    (a CUDA graph is captured there). tokens_per_s: batch / token_ms. cache_bytes: what was allocated for tokens + new_tokens;
    plan_cache_bytes: what `rtpurbo plan` says. peak_bytes: most device memory in use, weights included (None on a CPU). kept_blocks:
    share of the cached blocks that the retrieval heads selected in one more step (None in dense mode, or without selection).
    ttft_speedup, token_speedup: dense time / sparse time, on sparse rows whose dense row ran.
    """

    form: str
    mode: Mode
    tokens: int
    batch: int
    new_tokens: int
    chunk: int
    dtype: str
    ttft_s: float | None = None
    ttft_low_s: float | None = None
    ttft_high_s: float | None = None
    token_ms: float | None = None
    token_low_ms: float | None = None
    token_high_ms: float | None = None
    first_step_ms: float | None = None
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    ttft_speedup: float | None = None
    token_speedup: float | None = None
    cache_bytes: int | None = None
    plan_cache_bytes: int | None = None
    peak_bytes: int | None = None
    kept_blocks: float | None = None
    note: str = ""
    device: str
    versions: str

    @property
    def ran(self) -> bool:
        """Whether there are times."""
        return self.ttft_s is not None
