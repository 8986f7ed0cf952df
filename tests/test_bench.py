"""`rtpurbo bench`: figures of every length, batch and mode, rows that do not fit, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import eager_model as eager
import pytest
import torch
from test_runtime_generate import byte_tokenizer

from rtpurbo.runtime import bench_report
from rtpurbo.runtime.bench import Subject, bench
from rtpurbo.runtime.bench_rows import BenchOptions, BenchRow
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load
from rtpurbo.runtime.synthetic import SyntheticPrompts

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def subject_of(runtime: Runtime) -> Subject:
    return Subject(runtime=runtime, config=runtime.model.config.to_dict(), dtype=runtime.model.dtype, chunk=1024, form="safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "artifact"
    folder.mkdir()
    byte_tokenizer().save_pretrained(folder)
    config = eager.tiny_config("llama", layers=2, vocab_size=len(byte_tokenizer()))
    eager.save_artifact(folder, config, [[0, 5], [4, 5, 6, 7]], dense_below=50)
    return folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return subject_of(load(folder, device="cpu"))


class Recorded:
    """A runtime whose calls are written down and passed on; `failing` replaces some of them."""

    def __init__(self, runtime: Runtime, **failing: Any) -> None:
        self._runtime, self.calls = runtime, []
        self._failing = failing
        self.manifest, self.device, self.tokenizer = runtime.manifest, runtime.device, runtime.tokenizer

    def start(self, batch: int, capacity: int, dense: bool = False) -> Any:
        self.calls.append(("start", batch, capacity, dense))
        return self._runtime.start(batch, capacity, dense=dense)

    def prefill(self, state: Any, input_ids: torch.Tensor, *, chunk: int) -> torch.Tensor:
        self.calls.append(("prefill", tuple(input_ids.shape), chunk))
        if "prefill" in self._failing:
            raise self._failing["prefill"]
        return self._runtime.prefill(state, input_ids, chunk=chunk)

    def decode(self, state: Any, token_ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(("decode", tuple(token_ids.shape)))
        return self._runtime.decode(state, token_ids)


def recorded(subject: Subject, **failing: Any) -> tuple[Subject, Recorded]:
    runtime = Recorded(subject.runtime, **failing)
    return Subject(runtime=runtime, config=subject.config, dtype=subject.dtype, chunk=16, form="recorded"), runtime


def test_every_length_and_batch_is_measured_sparse_and_dense(subject: Subject) -> None:
    seen: list[BenchRow] = []
    rows = bench(subject, BenchOptions(tokens=(40, 300), batch=(1, 2), new_tokens=5, chunk=64, repeat=2), seen.append)
    assert [(row.tokens, row.batch, row.mode) for row in rows] == [
        (t, b, m) for t in (40, 300) for b in (1, 2) for m in ("sparse", "dense")
    ]
    assert [(row.tokens, row.batch, row.mode) for row in seen] == [(row.tokens, row.batch, row.mode) for row in rows]
    for row in rows:
        assert row.ran
        assert 0 < (row.ttft_low_s or 0) <= (row.ttft_s or 0) <= (row.ttft_high_s or 0)
        assert 0 < (row.token_low_ms or 0) <= (row.token_ms or 0) <= (row.token_high_ms or 0)
        assert (row.first_step_ms or 0) > 0
        assert row.tokens_per_s == pytest.approx(row.batch / (row.token_ms or 0) * 1e3)
        assert row.cache_bytes == pytest.approx(row.plan_cache_bytes, rel=0.02)
        assert (row.ttft_speedup is not None) == (row.token_speedup is not None) == (row.mode == "sparse")
        assert row.peak_bytes is None
        assert (row.kept_blocks is not None) == (row.mode == "sparse")
        assert "CPU" in row.device
        assert f"torch {torch.__version__}" in row.versions
        assert ("below dense_below 50" in row.note) == (row.tokens == 40 and row.mode == "sparse")
    sparse, dense = rows[4], rows[5]
    assert 0.05 < (sparse.kept_blocks or 0) < 0.5
    assert sparse.token_speedup == pytest.approx((dense.token_ms or 0) / (sparse.token_ms or 0))


def test_each_row_warms_up_on_a_short_prompt_and_then_runs_the_whole_one_in_fresh_caches(subject: Subject) -> None:
    watched, runtime = recorded(subject)
    bench(watched, BenchOptions(tokens=(100,), batch=(2,), new_tokens=7, repeat=2, dense=False))
    warm = [("start", 2, 107, False), ("prefill", (2, 32), 16), *[("decode", (2,))] * 4]
    run = [("start", 2, 107, False), ("prefill", (2, 100), 16), *[("decode", (2,))] * 6]
    # One more step, outside the times, counts the blocks.
    assert runtime.calls == [*warm, *run, *run, ("decode", (2,))]


def test_a_length_that_does_not_fit_is_a_row_with_its_reason_and_the_others_run(subject: Subject) -> None:
    rows = bench(subject, BenchOptions(tokens=(1020, 30), new_tokens=5, repeat=1))
    assert [row.ran for row in rows] == [False, False, True, True]
    assert rows[0].note == "1025 tokens exceed the model's max_position_embeddings 1024"
    assert rows[0].token_ms is rows[0].cache_bytes is rows[0].ttft_speedup is None
    assert bench_report.line(rows[0]) == f"sparse, 1020 tokens, batch 1: skipped, {rows[0].note}"


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")]
)
def test_memory_that_ends_while_running_is_a_reason_and_when_nothing_ran_an_error(subject: Subject, failure: Exception) -> None:
    watched, _ = recorded(subject, prefill=failure)
    with pytest.raises(ValueError, match="no row could run; sparse, 20 tokens, batch 1: out of memory on cpu while running"):
        bench(watched, BenchOptions(tokens=(20,), new_tokens=3))


def test_other_failures_are_not_taken_for_a_lack_of_memory(subject: Subject) -> None:
    watched, _ = recorded(subject, prefill=RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        bench(watched, BenchOptions(tokens=(20,), new_tokens=3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (5, 0)}, "tokens is 5, 0, wanted at least 1"),
        ({"tokens": (5,), "batch": (-1,)}, "batch is -1"),
        ({"tokens": (5,), "chunk": 0}, "chunk is 0"),
        ({"tokens": (5,), "repeat": 0}, "repeat is 0"),
        ({"tokens": (5,), "new_tokens": 2}, "new_tokens is 2, wanted at least 3"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchOptions(**options)


def test_synthetic_prompts_are_the_tokenizers_and_the_same_for_every_length(subject: Subject) -> None:
    tokenizer = subject.runtime.tokenizer
    prompts = SyntheticPrompts(tokenizer, subject.config["vocab_size"])
    long, short = prompts.take(30_000, 2), prompts.take(700, 3)
    assert long.shape == (2, 30_000)
    assert torch.equal(long[:, :700], short[:2])
    assert len({tuple(row) for row in short.tolist()}) == 3
    assert tokenizer.decode(short[1].tolist()).startswith("Shelf 1-0: box 0 stands beside box 0.\nShelf 1-1: box 7919")
    bare = SyntheticPrompts(None, 101).take(5000, 2)
    assert 0 <= int(bare.min()) <= int(bare.max()) < 101
    assert not torch.equal(bare[0], bare[1])


def test_csv_and_json_hold_every_field_and_a_skipped_row_is_empty(subject: Subject, tmp_path: Path) -> None:
    rows = bench(subject, BenchOptions(tokens=(1020, 30), new_tokens=5, repeat=1, dense=False))
    bench_report.write_csv(rows, tmp_path / "rows.csv")
    written = list(csv.DictReader((tmp_path / "rows.csv").open(newline="")))
    body = json.loads(json.dumps(bench_report.as_json(rows)))
    assert [list(row) for row in written] == [list(row) for row in body]
    for fields, row in zip(written, body, strict=True):
        assert fields == {name: "" if value is None else str(value) for name, value in row.items()}
    assert body[0]["ttft_s"] is None
    assert written[0]["note"] == rows[0].note
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_events_time_the_rows_and_peak_memory_covers_weights_and_cache(folder: Path) -> None:
    subject = subject_of(load(folder, device="cuda", dtype="bfloat16"))
    rows = bench(subject, BenchOptions(tokens=(200, 1 << 12), batch=(1, 3), new_tokens=6, chunk=64, repeat=2))
    assert [row.ran for row in rows] == [True] * 4 + [False] * 4
    weights = sum(path.stat().st_size for path in folder.glob("model*.safetensors")) // 2  # float32 on disk
    for row in rows[:4]:
        assert row.device == torch.cuda.get_device_name()
        assert row.cache_bytes == pytest.approx(row.plan_cache_bytes, rel=0.02)
        assert (row.peak_bytes or 0) > 0.9 * weights + (row.cache_bytes or 0)
        assert 1e-3 < (row.token_ms or 0) < 1e3
