"""What index keys in bf16 and fp8 cost on a real model: the blocks that decode selects, their true attention mass and output error.

The artifact's model reads one document; every retrieval head's decode step at positions of its second half is selected with the same
index keys in each dtype. Runs on a CPU or a GPU.
"""

# T tokens  I index-key sets  R index dim
import dataclasses
import json
import os
import pydoc_data.topics
import statistics
import tempfile
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rtpurbo.benchmarks import decode_quality
from rtpurbo.benchmarks.conversion import versions
from rtpurbo.benchmarks.long_context_capture import capture, retrieval_layers
from rtpurbo.converter.attention import IMPLEMENTATION
from rtpurbo.converter.checkpoint import load_model, open_checkpoint
from rtpurbo.manifests.assumptions import KEY_BYTES
from rtpurbo.manifests.manifest import INDEXER_NAME, MANIFEST_NAME, Manifest

DTYPES = ("float32", "bfloat16", "float8_e4m3fn")


@click.command()
@click.argument("artifact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=int, default=6144, show_default=True, help="Of the document, the Python documentation's topics.")
@click.option("--rows", type=int, default=32, show_default=True, help="Positions, spread over the second half.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="JSON; a table is printed.")
def main(artifact: Path, tokens: int, rows: int, device: str, out: Path) -> None:
    """Measure and write."""
    manifest = Manifest.load(artifact / MANIFEST_NAME)
    with tempfile.TemporaryDirectory() as work:
        source = open_checkpoint(str(artifact), work=Path(work))
        model = load_model(source, dtype=torch.float32, device=device, attn_implementation=IMPLEMENTATION)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(AutoTokenizer.from_pretrained(artifact)(text[: tokens * 8])["input_ids"][:tokens], device=device)
    if len(ids) < tokens:
        raise click.UsageError(f"the document has {len(ids)} tokens, wanted {tokens}")
    positions = torch.linspace(tokens // 2, tokens - 1, rows).long().tolist()
    unrounded = dataclasses.replace(manifest, indexer=dataclasses.replace(manifest.indexer, key_dtype="float32"))
    found: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
    for captured in capture(model, unrounded, load_file(artifact / INDEXER_NAME, device=device), ids, retrieval_layers(manifest)):
        row_n, wanted_HnN = torch.tensor(positions, device=device), None
        for dtype in DTYPES:
            stored = dataclasses.replace(captured, index_k_TIR=captured.index_k_TIR.to(getattr(torch, dtype)))
            measured_Hn = decode_quality.measure(stored, manifest, positions)["selected"]
            kept_HnN = decode_quality.selected_blocks(stored, manifest, row_n)
            wanted_HnN = kept_HnN if wanted_HnN is None else wanted_HnN
            differing_H = (kept_HnN ^ wanted_HnN).sum(dim=(1, 2)) / wanted_HnN.sum(dim=(1, 2))
            for n in range(len(captured.heads)):
                record = dict(zip(decode_quality.MEASURES, measured_Hn[n].mean(dim=0).tolist(), strict=True))
                found[dtype].append({**record, "differing": differing_H[n].item()})
    body = {
        **versions(), "tokens": tokens, "rows": rows, "top_p": manifest.top_p,
        "heads": {dtype: [{name: round(value, 5) for name, value in head.items()} for head in heads] for dtype, heads in found.items()},
    }  # fmt: skip
    part = out.with_suffix(".part")
    part.write_text(json.dumps(body, indent=1) + "\n")
    os.replace(part, out)
    click.echo(table(found, manifest.indexer.dim))


def table(found: dict[str, list[dict[str, float]]], dim: int) -> str:
    """Means over the retrieval heads; of the mass the lowest head too, of the difference the highest."""
    lines = ["| index keys | bytes a token | token_share | mass (lowest head) | output_error | other blocks (most) |", "|" + "---|" * 6]
    for dtype, heads in found.items():
        share, mass, error, differing = ([head[name] for head in heads] for name in ("token_share", "mass", "output_error", "differing"))
        lines.append(
            f"| {dtype} | {dim * KEY_BYTES[dtype]} | {statistics.mean(share):.4f} | {statistics.mean(mass):.4f} ({min(mass):.3f}) | "
            f"{statistics.mean(error):.4f} | {statistics.mean(differing):.2%} ({max(differing):.1%}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
