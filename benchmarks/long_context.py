"""A real long-context model and what sparsity costs on it: tune SmolLM2, convert it, capture its queries and keys, measure.

python benchmarks/long_context.py --work WORK --out benchmarks
"""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

import rtpurbo
from rtpurbo.benchmarks import decode_quality, long_context_prefill, long_context_teacher
from rtpurbo.benchmarks.conversion import versions
from rtpurbo.benchmarks.long_context_capture import Captured, capture, retrieval_layers
from rtpurbo.benchmarks.long_context_data import Material, Prompt, source_texts, write_rows
from rtpurbo.benchmarks.long_context_teacher import TeacherRecipe
from rtpurbo.converter.attention import IMPLEMENTATION
from rtpurbo.converter.checkpoint import load_model, open_checkpoint
from rtpurbo.converter.recipe import Recipe
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest
from rtpurbo.runtime.layout import Roles

COMMAND = "python benchmarks/long_context.py --work WORK --out benchmarks"
MEASURES = ("decode", "prefill", "teacher", "runtime")
PREFILL_LAYERS = 4
ANSWERS = "answer"
TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Folder, sizes and device of a run. Stages whose folder is there are not repeated: `teacher`, `artifact`."""

    work: Path
    out: Path
    device: str
    teacher: TeacherRecipe
    lengths: tuple[int, ...]
    captured: tuple[int, ...]
    samples: int
    checked: int
    measures: tuple[str, ...]
    conversion: Recipe
    max_bytes: int
    say: Callable[[str], None]

    def write(self, name: str, result: dict[str, Any], table: str) -> None:
        """`name`.json and `name`.md in the output folder, with versions."""
        self.out.mkdir(parents=True, exist_ok=True)
        body = {"versions": versions(), **result}
        facts = ", ".join(f"{key} {value}" for key, value in body["versions"].items())
        (self.out / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        (self.out / f"{name}.md").write_text(f"`{COMMAND}`\n\n{facts}\n\n{table}", encoding="utf-8")
        self.say(table)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for models and captured tensors.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for JSON files and tables.")
@click.option("--model", default="demo", show_default=True, help="Checkpoint to tune.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--steps", default=300, show_default=True, help="Steps of the teacher.")
@click.option("--indexer-steps", default=120, show_default=True, help="Steps of stage 1.")
@click.option("--distill-steps", default=0, show_default=True, help="Steps of stage 2.")
@click.option("--samples", default=24, show_default=True, help="Prompts of a needle measurement.")
@click.option("--checked", default=6, show_default=True, help="Prompts that the runtime answers, sparse and dense.")
@click.option("--measure", "measures", type=click.Choice(MEASURES), multiple=True, default=MEASURES, help="What to measure (default: all).")
@click.option("--scale", default=1, show_default=True, help="Divide every length by this (for a try on a CPU).")
def main(
    work: Path,
    out: Path,
    model: str,
    device: str,
    steps: int,
    indexer_steps: int,
    distill_steps: int,
    samples: int,
    checked: int,
    measures: tuple[str, ...],
    scale: int,
) -> None:
    """Tune, convert, capture and measure; finished models in WORK are kept and used again."""
    began = time.perf_counter()
    teacher = TeacherRecipe(steps=steps)
    scaled = dataclasses.replace(
        teacher,
        step_tokens=teacher.step_tokens // scale,
        text_length=teacher.text_length // scale,
        needle_lengths=tuple(length // scale for length in teacher.needle_lengths),
        max_keys=teacher.max_keys if scale == 1 else 2,
        warmup=min(teacher.warmup, steps),
    )
    bench = Bench(
        work=work,
        out=out,
        device=device,
        teacher=scaled,
        lengths=tuple(length // scale for length in (8192, 16384, 32768)),
        captured=tuple(length // scale for length in (16384, 32768)),
        samples=samples,
        checked=checked,
        measures=measures,
        conversion=conversion_recipe(device, indexer_steps, distill_steps, scale, work / "python-sources.jsonl"),
        max_bytes=1 << 30 if scale == 1 else 1 << 20,
        say=lambda text: click.echo(f"[{time.perf_counter() - began:6.1f} s] {text}"),
    )
    run(bench, model)


def conversion_recipe(device: str, indexer_steps: int, distill_steps: int, scale: int, data: Path) -> Recipe:
    """The conversion: window 512, 15 % of the KV groups, calibration at 8K, stage 1 at 4K to 8K."""
    return Recipe.preset_named(
        "demo",
        device=device,
        dtype="bfloat16" if device.startswith("cuda") else "float32",
        sliding_window=512 // scale,
        calibration_tokens=8192 // scale,
        indexer_data=str(data),
        indexer_steps=indexer_steps,
        indexer_min_tokens=4096 // scale,
        indexer_max_tokens=8192 // scale,
        indexer_warmup=min(12, indexer_steps),
        distill_data=str(data),
        distill_steps=distill_steps,
        distill_min_tokens=4096 // scale,
        distill_max_tokens=4096 // scale,
        answer_tokens=256 // scale,
        checkpoint_every=10**6,
        evaluation_documents=2,
        evaluation_tokens=8192 // scale,
        evaluation_needles=0 if scale > 1 else 8,
    )


def run(bench: Bench, model: str) -> None:
    """Every stage in turn."""
    bench.work.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(model, work=bench.work)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    heldout = Material(tokenizer, source_texts("heldout", bench.max_bytes))
    teacher, artifact = bench.work / "smollm2-135m-32k", bench.work / "artifact"
    bench.say("base model and held-out text are there")
    if not teacher.exists():
        texts = source_texts("train", bench.max_bytes)
        write_rows(texts, bench.work / "python-sources.jsonl")
        material = Material(tokenizer, texts)
        bench.say(f"{len(material.tokens)} training tokens, {len(heldout.tokens)} held out")
        tuned = long_context_teacher.tune(source, material, bench.teacher, device=bench.device, say=bench.say)
        long_context_teacher.save(tuned, tokenizer, teacher)
        del tuned
    if not artifact.exists():
        rtpurbo.convert(str(teacher), artifact, recipe=bench.conversion, report=_Notes(bench.say))
        bench.say("converted")
    manifest = Manifest.load(artifact / MANIFEST_NAME)
    if {"decode", "prefill"}.intersection(bench.measures):
        prompts = {length: heldout.needles(random.Random(f"capture-{length}"), length, keys=4, asked=2) for length in bench.captured}
        report_quality(bench, artifact, manifest, prompts)
    if "teacher" in bench.measures:
        report_teacher(bench, teacher, manifest, heldout)
    if "runtime" in bench.measures:
        check_runtime(bench, artifact, heldout)


def report_teacher(bench: Bench, folder: Path, manifest: Manifest, heldout: Material) -> None:
    """Needle accuracy and perplexity of the saved teacher; what the conversion measured stands in the JSON beside them."""
    model = _load(folder, bench, "sdpa")
    result = long_context_teacher.measure(
        model, heldout, bench.lengths, samples=bench.samples, text_length=bench.teacher.text_length, device=bench.device
    )
    lines = ["| " + " | ".join(["tokens", *map(str, bench.lengths)]) + " |", "|---|" + "---|" * len(bench.lengths)]
    for name in ("needle", "four_keys"):
        lines.append("| " + " | ".join([name, *(f"{result[name][str(length)]:.0%}" for length in bench.lengths)]) + " |")
    lines.append(f"\nPerplexity of held-out text: {result['perplexity']}; {bench.samples} prompts a cell.")
    counts = {"num_retrieval_heads": manifest.num_retrieval_heads, "rank_stability": manifest.calibration["rank_stability"]}
    body = {"recipe": dataclasses.asdict(bench.teacher), "teacher": result, "conversion": {**counts, **manifest.metrics}}
    bench.write("long_context", body, "\n".join(lines) + "\n")


def report_quality(bench: Bench, artifact: Path, manifest: Manifest, prompts: dict[int, Prompt]) -> None:
    """Decode quality of every retrieval layer and prefill quality of the PREFILL_LAYERS with the highest scores, on their own q, k, v."""
    model = _load(artifact, bench, IMPLEMENTATION)
    indexer = load_file(artifact / INDEXER_NAME, device=bench.device)
    layers = retrieval_layers(manifest)
    captures: dict[int, list[Captured]] = {}
    for length, prompt in prompts.items():
        ids = torch.from_numpy(prompt.token_ids.astype("int64")).to(bench.device)
        captures[length] = list(capture(model, manifest, indexer, ids, layers))
        save_captured(captures[length][0], bench.work / f"captured-{length}.safetensors")
    if "decode" in bench.measures:
        decode: list[dict[str, Any]] = []
        for length, prompt in prompts.items():
            rows, kinds = query_rows(prompt)
            for captured in captures[length]:
                records = decode_quality.summary(captured, manifest, decode_quality.measure(captured, manifest, rows), kinds)
                decode += [{"length": length, **record} for record in records]
        bench.write("decode_quality", {"top_p": manifest.top_p, "heads": decode}, decode_quality.table(decode))
    if "prefill" in bench.measures:
        prefill = [
            {"length": length, **record}
            for length, layers_of in captures.items()
            for captured in layers_of[:PREFILL_LAYERS]
            for record in long_context_prefill.measure(captured, manifest)
        ]
        bench.write("prefill_quality", {"mass": manifest.prefill_mass, "layers": prefill}, long_context_prefill.table(prefill))


def query_rows(prompt: Prompt) -> tuple[list[int], dict[str, slice]]:
    """Positions that predict the codes, then 48 positions of text spread over the second half of the prompt."""
    answers = prompt.predicting.tolist()
    last = answers[0] - 64
    text = torch.linspace(len(prompt.token_ids) // 2, last, 48).long().tolist()
    return answers + text, {ANSWERS: slice(0, len(answers)), TEXT: slice(len(answers), None)}


def save_captured(captured: Captured, path: Path) -> None:
    """The tensors of one layer as safetensors, its facts as metadata."""
    fields = dataclasses.asdict(captured)
    tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in fields.items() if name not in tensors})


def check_runtime(bench: Bench, artifact: Path, heldout: Material) -> None:
    """Needle accuracy through the runtime at the shorter captured length: as the manifest says, and with every head dense."""
    length = bench.captured[0]
    prompts = [heldout.needles(random.Random(f"check-{n}"), length, keys=1 + 3 * (n % 2)) for n in range(bench.checked)]
    result: dict[str, Any] = {"length": length, "samples": bench.checked}
    modes: tuple[tuple[str, Roles, float | None], ...] = (("sparse", "manifest", None), ("dense", "all-retrieval", 1.0))
    for name, roles, top_p in modes:
        runtime = rtpurbo.load(artifact, device=bench.device, roles=roles, top_p=top_p)
        hits, began = [], time.perf_counter()
        for prompt in prompts:
            answer = prompt.token_ids[prompt.is_answer].tolist()
            start = int(prompt.predicting[0]) + 1
            generation = runtime.generate([prompt.token_ids[:start].tolist()], max_new_tokens=len(answer))[0]
            hits.append(list(generation.token_ids) == answer)
        result[name] = {"exact_match": sum(hits) / len(hits), "seconds": round(time.perf_counter() - began, 2)}
        bench.say(f"runtime {name}: {result[name]}")
    bench.write("long_context_runtime", result, f"{json.dumps(result)}\n")


def _load(folder: Path, bench: Bench, attention: str) -> Any:
    dtype = torch.bfloat16 if bench.device.startswith("cuda") else torch.float32
    source = open_checkpoint(str(folder), work=bench.work)
    return load_model(source, dtype=dtype, device=bench.device, attn_implementation=attention)


class _Notes:
    """Reports the stages of the conversion as lines."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def stage(self, name: str, total: int) -> None:
        self._say(f"{name}: {total}")

    def advance(self, facts: Any) -> None: ...

    def note(self, text: str) -> None:
        self._say(text)


if __name__ == "__main__":
    main()
