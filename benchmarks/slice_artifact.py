"""An artifact with the real widths of Qwen3-Coder-30B-A3B (128 experts), a few layers and random bfloat16 weights: 3.7 GB at two layers.

python benchmarks/slice_artifact.py OUT [--layers 2 --experts 128 --window 8192 --index-peak 4]
"""

# R index dim  D head dim
import json
import math
from pathlib import Path

import click
import torch

from rtpurbo.converter.layout import plan_shards, shard_index
from rtpurbo.converter.safetensors_format import TensorInfo, header_bytes, tensor_bytes, write_file
from rtpurbo.converter.shards import expected_tensors, transformers_config
from rtpurbo.manifests.manifest import (
    INDEXER_NAME,
    MANIFEST_NAME,
    BaseModel,
    FileDigest,
    Indexer,
    Manifest,
    ModelShape,
    file_digest,
    roles_from_heads,
)

HEADS, GROUPS, HEAD_DIM, INDEX_DIM = 32, 4, 128, 16
# Queries and keys are normalised per head, so attention logits get the standard deviation of q_norm's weight.
PEAK = 4.0
# By layer, repeated: a whole retained group and parts of another; a group whose other heads stay local.
RETRIEVAL = ([8, 9, 10, 11, 12, 13, 14, 15, 24, 26], [3, 4, 5])


def config_of(layers: int, experts: int) -> dict[str, object]:
    """config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 262144,
        "rope_theta": 10000000,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }


def manifest_of(layers: int, window: int) -> Manifest:
    """Roles as in RETRIEVAL, 4 sinks, top_p 0.9, blocks of 64."""
    heads = [RETRIEVAL[i % len(RETRIEVAL)] for i in range(layers)]
    scores = [[float(h in chosen) for h in range(HEADS)] for chosen in heads]
    shape = ModelShape(
        model_type="qwen3_moe",
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=HEAD_DIM,
        max_position_embeddings=262144,
    )
    return Manifest(
        base_model=BaseModel(id="random", revision=None, config_sha256="0" * 64, tokenizer_sha256=None),
        model=shape,
        granularity="head",
        group_threshold=0.0,
        layers=roles_from_heads(scores, heads, HEADS // GROUPS),
        sliding_window=window,
        sinks=4,
        indexer=Indexer(dim=INDEX_DIM, keys="group", scale=HEAD_DIM**-0.5),
        top_p=0.9,
        decode_block=64,
        prefill_block=128,
        prefill_pattern="dense",
        dense_below=0,
    )


def indexer_of(manifest: Manifest, peak: float, random: torch.Generator) -> dict[str, torch.Tensor]:
    """Index queries that follow their keys, so that index logits have the standard deviation `peak`."""
    index: dict[str, torch.Tensor] = {}
    for i, layer in enumerate(manifest.layers):
        k_IRD = torch.randn(len(layer.retained_groups), INDEX_DIM, HEAD_DIM, generator=random) / math.sqrt(HEAD_DIM)
        noise_JRD = torch.randn(len(layer.retrieval_heads), INDEX_DIM, HEAD_DIM, generator=random) / math.sqrt(HEAD_DIM)
        factor = peak / (PEAK * math.sqrt(INDEX_DIM) * manifest.indexer.scale)
        index[f"layers.{i}.index_q"] = factor * (k_IRD[list(manifest.key_sets(i))] + 0.3 * noise_JRD)
        index[f"layers.{i}.index_k"] = k_IRD
    return index


def weight(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Norms near 1 (q_norm near PEAK), embeddings of std 1, and projections that keep the size of their input."""
    values = torch.randn(shape, generator=random, dtype=torch.float32)
    if name.endswith("norm.weight"):
        return (PEAK if "q_norm" in name else 1.0) * (1 + 0.1 * values)
    return values if "embed_tokens" in name else values / math.sqrt(shape[-1])


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=2, show_default=True)
@click.option("--experts", default=128, show_default=True)
@click.option("--window", default=8192, show_default=True)
@click.option("--index-peak", default=4.0, show_default=True, help="Standard deviation of the index logits.")
@click.option("--seed", default=0, show_default=True)
def main(out: Path, layers: int, experts: int, window: int, index_peak: float, seed: int) -> None:
    """Write the artifact to the new folder OUT."""
    out.mkdir(parents=True)
    config, manifest = config_of(layers, experts), manifest_of(layers, window)
    random = torch.Generator().manual_seed(seed)
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shapes = expected_tensors(transformers_config(config), "config.json")
    infos = {
        name: TensorInfo(file=out, dtype=torch.bfloat16, shape=shape, offset=0, nbytes=2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    index = indexer_of(manifest, index_peak, random)
    header = header_bytes({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in index.items()})
    written = {INDEXER_NAME: write_file(out / INDEXER_NAME, [header, *map(tensor_bytes, index.values())])}
    shards = plan_shards(infos, 5_000_000_000)
    for name, body in shard_index(shards, infos).items():
        (out / name).write_text(json.dumps(body), encoding="utf-8")
    for shard in shards:
        header = header_bytes({name: (infos[name].dtype, infos[name].shape) for name in shard.tensors})
        data = (tensor_bytes(weight(name, infos[name].shape, random).to(torch.bfloat16)) for name in shard.tensors)
        written[shard.name] = write_file(out / shard.name, (chunk for part in ([header], data) for chunk in part))
    files = {name: FileDigest(sha256=sha256, size_bytes=size) for name, (sha256, size) in written.items()}
    files |= {path.name: file_digest(path) for path in sorted(out.glob("*.json"))}
    Manifest(**{**vars(manifest), "files": files}).save(out / MANIFEST_NAME)
    click.echo(f"{out}: {sum(entry.size_bytes for entry in files.values()):,} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
