"""An engine beside the safetensors runtime of the same artifact, in one process on one GPU: agreement, times, build time and memory.

    python -m rtpurbo.benchmarks.trt_engine ARTIFACT --work FOLDER --prompt 16384 --out rows.json

builds the engine into FOLDER (unless it is there), compares logits token by token (batch 1, and 4 of different lengths), and times a
decode step and a prefill chunk of both forms. ARTIFACT may be `smollm2` or `qwen3-30b-slice`: random weights of that shape. --exact adds
the errors of both forms against the float32 runtime, --needles the answers to needle prompts of a model tuned by long_context.py.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from rtpurbo.benchmarks.trt_shapes import shapes, write_shape
from rtpurbo.plugins.trt.build import BuildOptions, build
from rtpurbo.plugins.trt.folder import read_info
from rtpurbo.plugins.trt.run import EngineRuntime, load_engine
from rtpurbo.plugins.trt.verify import compare_logits, teacher_forced_logits
from rtpurbo.runtime.engine import Runtime
from rtpurbo.runtime.loader import load


class Lines:
    """A Reporter that prints a line a stage."""

    def stage(self, name: str, total: int) -> None:
        click.echo(f"{name}: {total}")

    def advance(self, facts: Any) -> None:
        pass


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of `run` by CUDA events, after two runs to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def times(form: Runtime, prompt: int, batch: int, chunk: int) -> dict[str, float]:
    """ms of a prefill chunk after `prompt - chunk` tokens (batch 1) and of a decode step after `prompt` tokens."""
    vocabulary = form.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (batch, prompt), generator=generator)
    state = form.start(1, prompt + chunk)
    if prompt > chunk:
        form.prefill(state, ids_BT[:1, : prompt - chunk], chunk=chunk)

    def one_chunk() -> None:
        length = state.cache.lengths[0]
        form.prefill(state, ids_BT[:1, -chunk:], chunk=chunk)
        # Back to where it began: the same chunk again.
        state.cache.lengths[0] = length
        state.cache.lengths_B.fill_(length)

    prefill = median_ms(one_chunk, 5)
    del state
    state = form.start(batch, prompt + 128)
    form.prefill(state, ids_BT, chunk=chunk)
    step = median_ms(lambda: form.advance(state, [True] * batch), 60)
    return {"prefill_chunk_ms": prefill, "decode_step_ms": step}


def agreement(
    engine: EngineRuntime, runtime: Runtime, exact: Runtime | None, tokens: list[int], lengths: list[int], steps: int, chunk: int
) -> dict[str, Any]:
    """Teacher-forced comparison of sequences cut from `tokens`; exact: the float32 runtime, which shows what rounding does to each form."""
    sequences = [tokens[: length + steps] for length in lengths]
    got, want = (teacher_forced_logits(form, sequences, dense=False, steps=steps, chunk=chunk) for form in (engine, runtime))
    found = {"lengths": lengths, "steps": steps, **compare_logits(got, want)}
    if exact is not None:
        true = teacher_forced_logits(exact, sequences, dense=False, steps=steps, chunk=chunk)
        for name, logits in (("engine", got), ("runtime", want)):
            errors = ((logits - true).norm(dim=-1) / true.norm(dim=-1)).flatten()
            found[f"{name} against float32: median, 0.9, largest"] = [round(float(errors.quantile(q)), 4) for q in (0.5, 0.9, 1.0)]
    return found


def needles(forms: dict[str, Runtime], length: int, count: int) -> dict[str, Any]:
    """Exact answers of `count` held-out needle prompts (half of them with four keys) by each form, greedily, one prompt at a time."""
    from rtpurbo.benchmarks.long_context_data import Material, source_texts

    material = Material(next(iter(forms.values())).tokenizer, source_texts("heldout", 1 << 30))
    prompts = [material.needles(random.Random(f"check-{n}"), length, keys=1 + 3 * (n % 2)) for n in range(count)]
    answers = {}
    for name, form in forms.items():
        answers[name] = [
            list(form.generate([p.token_ids[: int(p.predicting[0]) + 1].tolist()], max_new_tokens=int(p.is_answer.sum()))[0].token_ids)
            for p in prompts
        ]
    right = {
        name: sum(a == p.token_ids[p.is_answer].tolist() for a, p in zip(found, prompts, strict=True)) for name, found in answers.items()
    }
    first, *others = answers.values()
    return {"length": length, "prompts": count, "right": right, "equal": sum(all(o[i] == a for o in others) for i, a in enumerate(first))}


def text_tokens(runtime: Runtime, count: int) -> list[int]:
    """A text whose facts recur far apart, repeated with other numbers until it is long enough; plain ids without a tokenizer."""
    if runtime.tokenizer is None:
        return [7919 * i % runtime.vocab_size for i in range(count)]
    lines = (f"Shelf {i % 23}: box {i * 7919 % 10007} stands beside box {i % 23 * 104729 % 10007}." for i in range(count // 8))
    return list(runtime.tokenizer("\n".join(lines))["input_ids"])[:count]


def operators_by_time(run: Callable[[], object]) -> list[tuple[str, float]]:
    """(kernel, us a run) of the ten kernels that take most of the device's time, then of all together."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda entry: -entry.device_time_total)
    rows = [(f"{entry.key[:60]} x{entry.count}", round(entry.device_time_total, 1)) for entry in found[:10]]
    return [*rows, (f"all x{sum(entry.count for entry in found)}", round(sum(entry.device_time_total for entry in found), 1))]


@click.command()
@click.argument("artifact")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--prompt", type=int, default=16384)
@click.option("--steps", type=int, default=200)
@click.option("--chunk", type=int, default=8192)
@click.option("--dtype", default="bfloat16")
@click.option("--build-only", is_flag=True)
@click.option("--exact", is_flag=True)
@click.option("--needles", "prompts", type=int, default=0)
@click.option("--times/--no-times", "timed", default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    artifact: str,
    work: Path,
    prompt: int,
    steps: int,
    chunk: int,
    dtype: str,
    build_only: bool,
    exact: bool,
    prompts: int,
    timed: bool,
    out: Path | None,
) -> None:
    """Build, compare, time; print and write what was found."""
    source = Path(artifact)
    if artifact in shapes():
        source = work / artifact if (work / artifact).exists() else write_shape(artifact, work)
    major, minor = torch.cuda.get_device_capability()
    folder = work / f"{source.name}-engine"
    rows: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "artifact": source.name}

    def note(name: str, value: Any) -> None:
        rows[name] = value
        click.echo(f"{name}: {json.dumps(value)}")
        if out is not None:
            out.write_text(json.dumps(rows, indent=1) + "\n")

    if not folder.exists():
        options = BuildOptions(dtype=dtype, capacity=prompt + 256 + 2 * chunk, prefill_chunk=chunk, capabilities=(10 * major + minor,))
        build(source, folder, options, Lines())
    note("build", read_info(folder).build)
    if build_only:
        return
    began = time.perf_counter()
    engine, runtime = load_engine(folder), load(source, device="cuda", dtype=dtype)
    note("seconds to load both", round(time.perf_counter() - began, 1))
    tokens = text_tokens(runtime, prompt + steps)
    true = load(source, device="cuda", dtype="float32") if exact else None
    note("batch 1", agreement(engine, runtime, true, tokens, [prompt], steps, chunk))
    note("batch 4", agreement(engine, runtime, true, tokens, [prompt, prompt // 2 + 7, prompt // 3, 99], steps, chunk))
    del true
    if prompts:
        note("needles", needles({"engine": engine, "runtime": runtime}, prompt, prompts))
    if not timed:
        return
    for batch in (1, 4):
        for name, form in (("engine", engine), ("runtime", runtime)):
            note(f"{name}, batch {batch}", times(form, prompt, batch, chunk))
    for name, form in (("engine", engine), ("runtime", runtime)):
        state = form.start(1, prompt + 2 * chunk + 256)
        form.prefill(state, torch.tensor([tokens[:prompt]]), chunk=chunk)
        form.advance(state, [True])
        note(f"{name}, decode step by kernel, us", operators_by_time(lambda form=form, state=state: form.advance(state, [True])))
        # The profiler runs it twice: two more chunks.
        again = torch.tensor([tokens[:chunk]])
        chunks = operators_by_time(lambda f=form, s=state, t=again: f.prefill(s, t, chunk=chunk))
        note(f"{name}, prefill chunk by kernel, us", chunks)


if __name__ == "__main__":
    main()
