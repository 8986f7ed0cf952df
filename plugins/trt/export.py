"""An artifact as an ONNX model: built by construction from manifest, config and safetensors headers, without tracing."""

# B batch  T chunk tokens  S capacity  W ring slots  K kv heads  D head dim  I index-key sets  R index dim  C hidden  V vocabulary
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest, verify_files
from rtpurbo.plugins.trt.bodies import functions
from rtpurbo.plugins.trt.decoder import Decoder, Layer, Pending
from rtpurbo.plugins.trt.graph import IR_VERSION, OPSET, Graph
from rtpurbo.plugins.trt.nodes import DOMAIN, VERSION
from rtpurbo.plugins.trt.weights import ONNX_DTYPES, Weights
from rtpurbo.runtime.layout import Roles, layout_of, with_roles
from rtpurbo.runtime.loader import read_config, read_indexer

# Tiles of the prefill kernels.
PREFILL_BLOCKS = (16, 32, 64, 128)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export fixes.

    dtype: "auto" (the checkpoint's), "float32", "float16" or "bfloat16". positions: longest sequence, the rows of the RoPE tables
    (None: the manifest's max_position_embeddings). roles, top_p: as in runtime.loader.load. dense: every KV group is kept and every head
    attends to everything, for prompts below the manifest's dense_below.
    """

    dtype: str = "auto"
    positions: int | None = None
    roles: Roles = "manifest"
    top_p: float | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, wanted auto, {', '.join(DTYPES)}")
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"positions is {self.positions}, wanted at least 1")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The model and what it is made of. caches: graph input of each cache -> the output with its new value."""

    model: onnx.ModelProto
    caches: dict[str, str]
    external_bytes: int
    copied_bytes: int

    def save(self, path: Path) -> None:
        """Write the ONNX file, which appears complete. External data is relative to the artifact's folder: a file that lies there
        can be opened by name; from anywhere else the reader is told the folder (see docs/tensorrt.md)."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(self.model.SerializeToString())
        partial.replace(path)


def export(folder: Path, options: ExportOptions | None = None) -> Export:
    """The ONNX model of an artifact.

    Inputs: input_ids int32 [batch, chunk], right-padded; lengths int32 [batch], tokens cached before; counts int32 [batch], valid
    tokens of the chunk; phase int32 [1] in prefill, [2] in decode (see plugins.trt.nodes); the caches, in order of the layers:
    layers.{i}.ring_k, ring_v [batch, sinks + window, K, D], layers.{i}.k_cache, v_cache [batch, capacity, K, D] and
    layers.{i}.index_cache [batch, I, capacity, R], zeros at first. Outputs: logits float32 [batch, V] of each sequence's last valid
    token, and every cache's new value under `Export.caches`; a caller of TensorRT binds it to the same memory as its input.

    Raises ValueError for an artifact that the runtime would refuse, an activation other than silu, a prefill_block that no kernel has, a
    top_p that an engine cannot hold exactly, more positions than the model has, and weights that would have to be copied but do not fit
    (see weights.Weights.copy).
    """
    options = ExportOptions() if options is None else options
    artifact = Manifest.load(folder / MANIFEST_NAME)
    manifest = with_roles(artifact, options.roles, options.top_p)
    verify_files(folder, artifact)
    config = read_config(folder, artifact)
    indexer = read_indexer(folder, artifact)
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{folder / 'config.json'}: hidden_act is {activation!r}, wanted silu")
    if manifest.prefill_pattern == "topp" and manifest.prefill_block not in PREFILL_BLOCKS:
        raise ValueError(
            f"{folder / MANIFEST_NAME}: prefill_block is {manifest.prefill_block}, wanted one of {list(PREFILL_BLOCKS)} for an engine"
        )
    positions = options.positions or manifest.model.max_position_embeddings
    if positions > manifest.model.max_position_embeddings:
        raise ValueError(f"{positions} positions exceed the model's max_position_embeddings {manifest.model.max_position_embeddings}")
    hf_config = _transformers_config(folder)
    weights = Weights(folder, _dtype(folder, options.dtype, hf_config))
    used = {} if options.dense or manifest.top_p >= 1 or manifest.layers != artifact.layers else indexer
    graph = Graph()
    index_dtype = getattr(torch, manifest.indexer.key_dtype)
    decoder = Decoder(graph, weights, hf_config.to_dict(), manifest, index_dtype, top_p_replaced=options.top_p is not None)
    layers = [_layer(manifest, i, used, options.dense) for i in range(len(manifest.layers))]
    logits = _write(decoder, layers, _rope_tables(hf_config, positions, weights), bool(hf_config.tie_word_embeddings))
    graph.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="logits"))
    return _model(decoder, layers, artifact, options, positions)


def _write(decoder: Decoder, layers: list[Layer], tables: tuple[str, str], tied: bool) -> str:
    """The whole model's nodes; the name of the logits [B, V]."""
    g, weights = decoder.g, decoder.weights
    hidden = decoder.config["hidden_size"]
    embedding = weights.tensor("model.embed_tokens.weight")
    x_MC = g.reshape(g.gather(embedding, "input_ids", 0), -1, hidden)
    x = Pending(x_MC, None)
    for layer in layers:
        prefix = f"model.layers.{layer.index}."
        qkv, total, _ = decoder.norm_linear(
            x, f"{prefix}input_layernorm", f"{prefix}self_attn.", "qkv_proj", ("q_proj", "k_proj", "v_proj")
        )
        x = decoder.mlp(layer.index, Pending(decoder.attention(layer, qkv, *tables), total))
    first_B = g.op("Mul", g.count_up(decoder.batch), g.op("Squeeze", decoder.rows, g.integers(0)))
    last_B = g.op("Max", g.op("Sub", g.int64("counts"), g.integer(1)), g.integer(0))
    row_B = g.op("Add", first_B, last_B)
    assert x.residual is not None, "a model has at least one layer"
    last = Pending(g.gather(x.added, row_B, 0), g.gather(x.residual, row_B, 0))
    return g.float32(decoder.norm_linear(last, "model.norm", "", "", ("model.embed_tokens" if tied else "lm_head",))[0])


def _layer(manifest: Manifest, index: int, indexer: dict[str, torch.Tensor], dense: bool) -> Layer:
    layout = layout_of(manifest, index)
    counts = (layout.group_size,) * layout.num_groups if dense else layout.retrieval_counts
    index_q, index_k = indexer.get(f"layers.{index}.index_q"), indexer.get(f"layers.{index}.index_k")
    return Layer(
        index=index,
        layout=layout,
        retrieval_counts=counts,
        index_q_JRD=None if index_q is None else index_q[list(layout.index_q_rows)],
        index_k_IRD=None if index_k is None else index_k[list(layout.index_k_rows)],
    )


def _model(decoder: Decoder, layers: list[Layer], artifact: Manifest, options: ExportOptions, positions: int) -> Export:
    """Nodes, initializers, inputs and outputs as one model."""
    caches = decoder.caches
    inputs = [
        _value("input_ids", TensorProto.INT32, ["batch", "chunk"]),
        _value("lengths", TensorProto.INT32, ["batch"]),
        _value("counts", TensorProto.INT32, ["batch"]),
    ]
    if any(layer.index_q_JRD is not None for layer in layers):
        inputs.append(_value("phase", TensorProto.INT32, ["phase"]))
    shapes = {name: entry for layer in layers for name, entry in _cache_shapes(decoder, layer).items()}
    inputs += [_value(name, *shapes[name]) for name in caches]
    outputs = [_value("logits", TensorProto.FLOAT, ["batch", decoder.config["vocab_size"]])]
    outputs += [_value(new, *shapes[name]) for name, new in caches.items()]
    onnx_graph = helper.make_graph(decoder.g.nodes, "rtpurbo", inputs, outputs, decoder.weights.initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        onnx_graph, opset_imports=opsets, functions=functions(decoder.used), ir_version=IR_VERSION, producer_name="rtpurbo"
    )
    helper.set_model_props(
        model,
        {
            "rtpurbo.manifest_digest": artifact.to_dict()["digest"],
            "rtpurbo.dtype": str(decoder.weights.dtype).removeprefix("torch."),
            "rtpurbo.positions": str(positions),
            "rtpurbo.roles": options.roles,
            "rtpurbo.top_p": repr(decoder.manifest.top_p),
            "rtpurbo.dense": str(options.dense).lower(),
        },
    )
    weights = decoder.weights
    return Export(model=model, caches=caches, external_bytes=weights.external_bytes, copied_bytes=weights.copied_bytes)


def _cache_shapes(decoder: Decoder, layer: Layer) -> dict[str, tuple[int, list[str | int]]]:
    """Dtype and shape of every cache that a layer may have."""
    manifest, prefix = decoder.manifest, f"layers.{layer.index}."
    dim, retained = manifest.model.head_dim, layer.num_retained
    ring = (decoder.dtype, ["batch", manifest.sinks + manifest.sliding_window, layer.layout.num_groups - retained, dim])
    full = (decoder.dtype, ["batch", "capacity", retained, dim])
    index = (decoder.index_dtype, ["batch", len(layer.layout.key_groups), "capacity", manifest.indexer.dim])
    kinds = {"ring_k": ring, "ring_v": ring, "k_cache": full, "v_cache": full, "index_cache": index}
    return {f"{prefix}{name}": entry for name, entry in kinds.items()}


def _value(name: str, dtype: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _transformers_config(folder: Path) -> Any:
    """The configuration with the defaults of the model's class filled in."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _dtype(folder: Path, wanted: str, hf_config: Any) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    stored = hf_config.dtype if isinstance(hf_config.dtype, torch.dtype) else getattr(torch, str(hf_config.dtype or "float32"))
    if stored not in ONNX_DTYPES or stored not in DTYPES.values():
        raise ValueError(f"{folder / 'config.json'}: dtype is {stored}, wanted {', '.join(DTYPES)}")
    return stored


def _rope_tables(hf_config: Any, positions: int, weights: Weights) -> tuple[str, str]:
    """The model's own cos and sin by position, scaling factors included, as initializers [positions, D / 2] in the model's dtype."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(hf_config)
    rotary = type(empty.model.rotary_emb)(config=hf_config)
    cos, sin = rotary(torch.empty(0, dtype=weights.dtype), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return weights.copy("rope.cos", cos[0, :, :half]), weights.copy("rope.sin", sin[0, :, :half])
