"""The decoder of a llama-like model as ONNX nodes: norms, projections, RoPE, attention by role, MLP and experts."""

# B batch  T chunk tokens  M = B * T rows  C hidden  H query heads  K kv heads  D head dim  I index-key sets  J retrieval heads
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper

from rtpurbo.manifests.manifest import Manifest
from rtpurbo.plugins.trt.graph import Graph
from rtpurbo.plugins.trt.nodes import DOMAIN, NODES, VERSION
from rtpurbo.plugins.trt.weights import ONNX_DTYPES, Weights
from rtpurbo.runtime.layout import LayerLayout


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as it is exported.

    retrieval_counts: retrieval heads of each group that is kept by position, in run-time order; groups behind them are local.
    index_q_JRD, index_k_IRD: the indexer in run-time order, None where nothing is selected.
    """

    index: int
    layout: LayerLayout
    retrieval_counts: tuple[int, ...]
    index_q_JRD: torch.Tensor | None
    index_k_IRD: torch.Tensor | None

    @property
    def num_retained(self) -> int:
        """KV groups kept by position."""
        return len(self.retrieval_counts)


class Decoder:
    """Writes a model's nodes into `graph`. `caches` maps the name of each cache input to its new value, in order of the layers."""

    def __init__(self, graph: Graph, weights: Weights, config: dict[str, Any], manifest: Manifest, index_dtype: torch.dtype) -> None:
        self.g, self.weights, self.config, self.manifest = graph, weights, config, manifest
        self.index_dtype = ONNX_DTYPES[index_dtype]
        self.dtype = ONNX_DTYPES[weights.dtype]
        self.caches: dict[str, str] = {}
        self.used: list[str] = []
        self.shape = manifest.model
        self.lengths = graph.int64("lengths")
        self.visible = graph.op("Add", "lengths", "counts")
        self.batch, self.rows = graph.size("input_ids", 0), graph.size("input_ids", 1)

    def custom(self, kind: str, inputs: list[str], attributes: dict[str, Any], prefix: str) -> list[str]:
        """A node of the domain `rtpurbo`; aliased outputs are noted in `caches` under the input that they update."""
        node = NODES[kind]
        assert attributes.keys() == node.attributes.keys(), (kind, attributes)
        assert len(inputs) == len(node.inputs), (kind, inputs)
        outputs = [f"{prefix}{port.name}" for port in node.outputs]
        for i in range(len(outputs)):
            if (source := node.aliased_input(i)) >= 0:
                # The graph output itself: an Identity behind it could become a copy of the whole cache.
                outputs[i] = self.caches[inputs[source]] = f"{inputs[source]}.new"
        plugin = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
        made: NodeProto = helper.make_node(kind, inputs, outputs, name=f"{prefix}{kind}", domain=DOMAIN, **attributes, **plugin)
        self.g.nodes.append(made)
        self.used.append(kind)
        return outputs

    def norm(self, x: str, weight: str, eps: float) -> str:
        """x / sqrt(mean(x^2) + eps) times the weight, in fp32 and not rounded."""
        g, x32 = self.g, self.g.float32(x)
        mean = g.op("ReduceMean", g.op("Mul", x32, x32), g.integers(-1), attributes={"keepdims": 1})
        scaled = g.op("Div", x32, g.op("Sqrt", g.op("Add", mean, g.real(eps))))
        return g.op("Mul", scaled, g.float32(weight))

    def normed(self, x_MC: str, name: str) -> str:
        """The norm of this name, rounded once to the model's dtype."""
        return self.g.cast(self.norm(x_MC, self.weights.tensor(f"{name}.weight"), self.config["rms_norm_eps"]), self.dtype)

    def linear(self, x_MC: str, name: str) -> str:
        """x W^T (+ bias), with W [out, in] as it is stored."""
        inputs = [x_MC, self.weights.tensor(f"{name}.weight")]
        if f"{name}.bias" in self.weights:
            inputs.append(self.weights.tensor(f"{name}.bias"))
        return self.g.op("Gemm", *inputs, attributes={"transB": 1})

    def rope_tables(self, cos: str, sin: str, positions: int) -> tuple[str, str]:
        """cos and sin of the chunk's rows, fp32 [B, T, 1, D / 2], from tables [positions, D / 2]."""
        g = self.g
        position_BT = g.op("Add", g.axes(self.lengths, 1), g.count_up(self.rows))
        # Rows of padding may lie beyond the table.
        position_BT = g.op("Min", position_BT, g.integer(positions - 1))
        cos_BT1d, sin_BT1d = (g.axes(g.float32(g.gather(table, position_BT, 0)), 2) for table in (cos, sin))
        return cos_BT1d, sin_BT1d

    def rotate(self, x_BTHD: str, cos_BT1d: str, sin_BT1d: str) -> str:
        """RoPE of fp32 heads: pairs (x_i, x_(i + D/2)) turned by the position's angle, rounded once to the model's dtype."""
        g = self.g
        a, b = g.ops("Split", [x_BTHD], 2, {"axis": 3, "num_outputs": 2})
        first = g.op("Sub", g.op("Mul", a, cos_BT1d), g.op("Mul", b, sin_BT1d))
        second = g.op("Add", g.op("Mul", b, cos_BT1d), g.op("Mul", a, sin_BT1d))
        return g.cast(g.concat(3, first, second), self.dtype)

    def attention(self, layer: Layer, x_MC: str, cos: str, sin: str) -> str:
        """One layer's self-attention, [M, C] -> [M, C]."""
        g, prefix = self.g, f"model.layers.{layer.index}.self_attn."
        layout, retained = layer.layout, layer.num_retained
        heads, groups, kept = len(layout.head_order), layout.num_groups, retained * layout.group_size
        # Queries and keys go through norm and RoPE together: one tensor of H + K heads.
        qk, v = self._projected(prefix, x_MC, layout)
        turned = self.rotate(qk, cos, sin)
        parts = []
        if retained:
            kv = [self._heads(turned, heads, heads + retained), self._heads(v, 0, retained)]
            parts.append(self._retained(layer, self._heads(turned, 0, kept), kv, qk))
        if retained < groups:
            kv = [self._heads(turned, heads + retained, heads + groups), self._heads(v, retained, groups)]
            parts.append(self._local(layer, self._heads(turned, kept, heads), kv))
        out_BTHD = self._reordered(g.concat(2, *parts), tuple(int(i) for i in np.argsort(layout.head_order)))
        return self.linear(g.reshape(out_BTHD, -1, heads * self.shape.head_dim), f"{prefix}o_proj")

    def mlp(self, index: int, x_MC: str) -> str:
        """The layer's feed-forward part: a gated MLP, or a mixture of experts where the checkpoint has a router."""
        g, prefix = self.g, f"model.layers.{index}.mlp."
        if f"{prefix}gate.weight" in self.weights:
            return self._experts(index, prefix, x_MC)
        gate_up = self._joined_linear(x_MC, prefix, "gate_up_proj", ("gate_proj", "up_proj"))
        gate, up = g.ops("Split", [g.float32(gate_up)], 2, {"axis": 1, "num_outputs": 2})
        silu = g.op("Mul", gate, g.op("Sigmoid", gate))
        return self.linear(g.cast(g.op("Mul", silu, up), self.dtype), f"{prefix}down_proj")

    def _experts(self, index: int, prefix: str, x_MC: str) -> str:
        config = self.config
        experts = self.weights.shape(f"{prefix}gate.weight")[0]
        routing = {"num_chosen": config["num_experts_per_tok"], "normalize": int(config.get("norm_topk_prob", False))}
        ids, weights = self.custom("Route", [self.linear(x_MC, f"{prefix}gate")], routing, f"layers.{index}.route.")
        gate_up = [f"{prefix}experts.{e}.{part}_proj.weight" for e in range(experts) for part in ("gate", "up")]
        down = [f"{prefix}experts.{e}.down_proj.weight" for e in range(experts)]
        stacks = [
            self.weights.stack(f"{prefix}experts.gate_up_proj", gate_up, experts),
            self.weights.stack(f"{prefix}experts.down_proj", down, experts),
        ]
        return self.custom("Experts", [x_MC, ids, weights, *stacks], {}, f"layers.{index}.")[0]

    def _joined_linear(self, x_MC: str, prefix: str, name: str, parts: tuple[str, ...]) -> str:
        """Several projections of one input side by side: one product where their weights lie below each other on disk."""
        weight = self.weights.join(f"{prefix}{name}.weight", [f"{prefix}{part}.weight" for part in parts])
        biased = [f"{prefix}{part}.bias" for part in parts if f"{prefix}{part}.bias" in self.weights]
        if weight is None or len(biased) not in (0, len(parts)):
            return self.g.concat(1, *(self.linear(x_MC, f"{prefix}{part}") for part in parts))
        bias = [self.weights.join(f"{prefix}{name}.bias", biased, copy=True)] if biased else []
        return self.g.op("Gemm", x_MC, weight, *(b for b in bias if b is not None), attributes={"transB": 1})

    def _projected(self, prefix: str, x_MC: str, layout: LayerLayout) -> tuple[str, str]:
        """Queries and keys [B, T, H + K, D] as they enter RoPE, in fp32, and values [B, T, K, D], in run-time order.

        Activations are reordered, not weights: a reordered weight could not stay where it is stored.
        """
        g, heads, groups = self.g, len(layout.head_order), layout.num_groups
        x = self._joined_linear(x_MC, prefix, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
        x = g.reshape(x, self.batch, self.rows, heads + 2 * groups, self.shape.head_dim)
        order = (*layout.head_order, *(heads + i for i in layout.group_order), *(heads + groups + i for i in layout.group_order))
        x = self._reordered(x, order)
        qk, v = g.float32(self._heads(x, 0, heads + groups)), self._heads(x, heads + groups, heads + 2 * groups)
        if f"{prefix}q_norm.weight" in self.weights:
            q, k = (self.weights.read(f"{prefix}{which}_norm.weight").to(self.weights.dtype) for which in "qk")
            both = self.weights.copy(f"{prefix}qk_norm.weight", torch.cat([q.expand(heads, -1), k.expand(groups, -1)]))
            qk = self.norm(qk, both, self.config["rms_norm_eps"])
        return qk, v

    def _reordered(self, x_BTHD: str, order: tuple[int, ...]) -> str:
        return x_BTHD if order == tuple(range(len(order))) else self.g.gather(x_BTHD, self.g.integers(*order), 2)

    def _heads(self, x_BTHD: str, start: int, stop: int) -> str:
        """Heads start ... stop-1."""
        return self.g.op("Slice", x_BTHD, *(self.g.integers(i) for i in (start, stop, 2)))

    def _window(self) -> dict[str, Any]:
        return {"window": self.manifest.sliding_window, "sinks": self.manifest.sinks, "scale": self.shape.head_dim**-0.5}

    def _local(self, layer: Layer, q: str, kv: list[str]) -> str:
        prefix = f"layers.{layer.index}."
        rings = [f"{prefix}ring_k", f"{prefix}ring_v"]
        return self.custom("AttendLocal", [q, *kv, *rings, "lengths", "counts"], self._window(), prefix)[0]

    def _retained(self, layer: Layer, q: str, kv: list[str], qk: str) -> str:
        """Append the chunk, then attend; qk is from before RoPE and holds all heads of the layer."""
        prefix, m = f"layers.{layer.index}.", self.manifest
        names = [f"{prefix}k_cache", f"{prefix}v_cache"]
        roles = {**self._window(), "retrieval_counts": layer.retrieval_counts}
        if layer.index_q_JRD is None or layer.index_k_IRD is None:
            caches = self.custom("AppendKV", [*names, *kv, "lengths", "counts"], {}, prefix)
            return self.custom("AttendCausal", [q, *caches, "lengths", "counts", self.visible], roles, f"{prefix}retained.")[0]
        index_q = self._indexed(qk, layer.layout.retrieval_heads, layer.index_q_JRD, f"{prefix}index_q")
        keys = tuple(len(layer.layout.head_order) + group for group in layer.layout.key_groups)
        index_k = self._indexed(qk, keys, layer.index_k_IRD, f"{prefix}index_k")
        rows = [*kv, self._stored(index_k)]
        *caches, index_cache = self.custom("Append", [*names, f"{prefix}index_cache", *rows, "lengths", "counts"], {}, prefix)
        selection = {
            "key_sets": layer.layout.key_sets,
            "block": m.decode_block,
            "sinks": m.sinks,
            "top_p_ppb": top_p_ppb(m.top_p),
            "scale": m.indexer.scale,
        }
        chosen = self.custom("SelectBlocks", [index_q, index_cache, self.visible, "phase"], selection, prefix)
        inputs = [q, *caches, "lengths", "counts", self.visible, *chosen, "phase"]
        return self.custom("AttendRetained", inputs, {**roles, "block": m.decode_block}, f"{prefix}retained.")[0]

    def _stored(self, index_k: str) -> str:
        """Index keys in the dtype of their cache."""
        if self.index_dtype != TensorProto.FLOAT8E4M3FN:
            return self.g.cast(index_k, self.index_dtype)
        # Rounded and saturated like a cast; TensorRT takes 8-bit floats from a quantisation only.
        return self.g.op("QuantizeLinear", index_k, self.g.real(1.0), attributes={"output_dtype": self.index_dtype})

    def _indexed(self, x_BTHD: str, heads: tuple[int, ...], weight_JRD: torch.Tensor, name: str) -> str:
        """Index vectors [B, T, J, R] in fp32 of these heads."""
        g = self.g
        x_BTJD = g.gather(x_BTHD, g.integers(*heads), 2)
        weight_JDR = self.weights.copy(name, weight_JRD.float().transpose(1, 2).contiguous())
        return g.transpose(g.op("MatMul", g.transpose(x_BTJD, 0, 2, 1, 3), weight_JDR), 0, 2, 1, 3)


def top_p_ppb(top_p: float) -> int:
    """top_p in billionths, which an integer attribute holds exactly; ValueError when that is not a whole number."""
    ppb = round(top_p * 1e9)
    if ppb / 1e9 != top_p:
        raise ValueError(f"top_p is {top_p!r}, wanted at most 9 decimals for an engine")
    return ppb
