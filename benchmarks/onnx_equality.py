"""An artifact's ONNX export, run by its function bodies in ONNX Runtime, against the PyTorch runtime: logits and kept blocks.

python benchmarks/onnx_equality.py ARTIFACT [--prompt 1100 --prompt 1037 --chunk 256 --steps 32] --out benchmarks/onnx_NAME.md
"""

import platform
import resource
import sys
import time
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch

from rtpurbo.plugins.trt.export import ExportOptions, export
from rtpurbo.plugins.trt.onnx_engine import OnnxEngine
from rtpurbo.runtime.loader import load


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", "prompts", type=int, multiple=True, default=(1100, 1037), show_default=True, help="Tokens of each row.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=Path(__file__), help="Text that the rows are cut from.")
@click.option("--chunk", type=int, default=256, show_default=True)
@click.option("--steps", type=int, default=32, show_default=True, help="Decode steps with the text's own tokens.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Markdown file.")
def main(folder: Path, prompts: tuple[int, ...], text: Path, chunk: int, steps: int, out: Path) -> None:
    """Compare the float32 export of FOLDER with the runtime on rows of different lengths."""
    runtime = load(folder, device="cpu", dtype="float32")
    assert runtime.tokenizer is not None
    tokens = runtime.tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    tokens = tokens * (2 + (max(prompts) + steps) // len(tokens))
    rows = [tokens[17 * b : 17 * b + prompt + steps] for b, prompt in enumerate(prompts)]
    capacity = max(prompts) + steps
    begin = time.perf_counter()
    exported = export(folder, ExportOptions(dtype="float32", positions=capacity))
    export_s = time.perf_counter() - begin
    begin = time.perf_counter()
    engine = OnnxEngine(exported, folder, len(rows), capacity, threads=torch.get_num_threads())
    load_s = time.perf_counter() - begin
    state, kept = runtime.start(len(rows), capacity), []
    block = runtime.manifest.decode_block
    state.on_selection = lambda _, mask_BHN, visible_B: kept.append(mask_BHN.sum(-1) / torch.ceil(visible_B[:, None] / block))
    width = max(prompts)
    ids = torch.tensor([row[:p] + [0] * (width - p) for row, p in zip(rows, prompts, strict=True)])
    mask = torch.tensor([[1] * p + [0] * (width - p) for p in prompts])
    want = [runtime.prefill(state, ids, mask, chunk=chunk)]
    begin = time.perf_counter()
    got = [engine.prefill([row[:p] for row, p in zip(rows, prompts, strict=True)], chunk)]
    prefill_s, begin = time.perf_counter() - begin, time.perf_counter()
    for step in range(steps):
        fed = [row[p + step] for row, p in zip(rows, prompts, strict=True)]
        got.append(engine.decode(fed))
    decode_s = time.perf_counter() - begin
    for step in range(steps):
        fed = [row[p + step] for row, p in zip(rows, prompts, strict=True)]
        want.append(runtime.decode(state, torch.tensor(fed)))
    difference = np.abs(np.stack(got) - torch.stack(want).numpy()).max(axis=(1, 2))
    same = (np.stack(got).argmax(-1) == torch.stack(want).argmax(-1).numpy()).mean()
    figures = {
        "model": runtime.manifest.base_model.id,
        "rows, chunk, decode steps": f"{' and '.join(map(str, prompts))} tokens, {chunk}, {steps}",
        "largest difference of a logit, prefill / decode": f"{difference[0]:.2e} / {difference[1:].max():.2e}",
        "standard deviation of the logits": f"{np.stack(got).std():.2f}",
        "same argmax": f"{same:.1%}",
        "blocks kept by the retrieval heads": f"{float(torch.cat([k.flatten() for k in kept]).mean()):.1%} of {-(-capacity // block)}",
        "nodes of the graph": str(len(exported.model.graph.node)),
        "ONNX file / weights in place": f"{len(exported.model.SerializeToString()):,} / {exported.external_bytes:,} bytes",
        "export / session / prefill / a decode step": f"{export_s:.1f} / {load_s:.1f} / {prefill_s:.1f} / {decode_s / steps:.2f} s",
        "peak memory of the process": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB",
        "device, onnxruntime, torch": f"CPU {platform.machine()}, {onnxruntime.__version__}, {torch.__version__}",
    }
    lines = [f"`python benchmarks/onnx_equality.py ARTIFACT {' '.join(sys.argv[2:])}`", "", "| | |", "|---|---|"]
    report = "\n".join([*lines, *(f"| {name} | {value} |" for name, value in figures.items())]) + "\n"
    out.write_text(report, encoding="utf-8")
    click.echo(report)


if __name__ == "__main__":
    main()
