"""The decoder of a llama-like model as ONNX nodes: norms, projections, RoPE, attention by role, MLP and experts."""

# B batch  T chunk tokens  M = B * T rows  C hidden  H query heads  K kv heads  D head dim  I index-key sets  J retrieval heads
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper

from rtpurbo.manifests.manifest import MANIFEST_NAME, Manifest
from rtpurbo.plugins.trt.graph import Graph
from rtpurbo.plugins.trt.nodes import DOMAIN, NODES, VERSION, Retained, attention_name
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


class Pending(NamedTuple):
    """Rows [M, C] as the sum of what a layer's part adds and of what was there before it, not added yet; None: nothing was."""

    added: str
    residual: str | None


class Decoder:
    """Writes a model's nodes into `graph`. `caches` maps the name of each cache input to its new value, in order of the layers.

    top_p_replaced: the manifest's top_p is not its file's.
    """

    def __init__(
        self, graph: Graph, weights: Weights, config: dict[str, Any], manifest: Manifest, index_dtype: torch.dtype, *, top_p_replaced: bool
    ) -> None:
        self.g, self.weights, self.config, self.manifest = graph, weights, config, manifest
        self.index_dtype = ONNX_DTYPES[index_dtype]
        self.dtype = ONNX_DTYPES[weights.dtype]
        self.caches: dict[str, str] = {}
        self.used: list[str] = []
        self.shape = manifest.model
        self.source, self.top_p_replaced = f"{weights.folder / MANIFEST_NAME}: ", top_p_replaced
        # Idle sequences see nothing, whatever is in their caches.
        self.visible = graph.op("Mul", graph.op("Add", "lengths", "counts"), graph.op("Min", "counts", graph.constant(1, np.int32)))
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

    def linear(self, x_MC: str, name: str) -> str:
        """x W^T (+ bias), with W [out, in] as it is stored."""
        return self._product(x_MC, f"{name}.weight", f"{name}.bias" if f"{name}.bias" in self.weights else None)

    def _product(self, x_MC: str, weight: str, bias: str | None) -> str:
        inputs = [x_MC, *(self._weight(name) for name in (weight, bias) if name is not None)]
        return self.custom("Linear" if bias is None else "LinearBias", inputs, {}, f"{weight}.")[0]

    def norm_linear(self, x: Pending, norm: str, prefix: str, joined: str, parts: tuple[str, ...]) -> tuple[str, str, str]:
        """Sum, norm and the projections of one input side by side: (y [M, O], sum [M, C], normed [M, C]).

        One product where the weights lie below each other on disk, else one for each of the parts.
        """
        weights, biases = ([f"{prefix}{part}.{kind}" for part in parts] for kind in ("weight", "bias"))
        biased = [bias for bias in biases if bias in self.weights]
        pairs = [(weight, bias if bias in self.weights else None) for weight, bias in zip(weights, biases, strict=True)]
        if len(parts) > 1 and len(biased) in (0, len(parts)):
            weight = self.weights.join(f"{prefix}{joined}.weight", weights)
            if weight is not None:
                pairs = [(weight, self.weights.join(f"{prefix}{joined}.bias", biased, copy=True) if biased else None)]
        (weight, bias), *pairs = pairs
        inputs = [self._weight(name) for name in (f"{norm}.weight", weight, bias) if name is not None]
        kind, attributes = "NormLinear" if bias is None else "NormLinearBias", {"eps": self.config["rms_norm_eps"]}
        if x.residual is None:
            y, normed = self.custom(f"First{kind}", [x.added, *inputs], attributes, f"{norm}.")
            total = x.added
        else:
            y, total, normed = self.custom(kind, [x.added, x.residual, *inputs], attributes, f"{norm}.")
        ys = [y]
        ys += [self._product(normed, weight, bias) for weight, bias in pairs]
        return self.g.concat(1, *ys), total, normed

    def _weight(self, name: str) -> str:
        """The initializer of this name, stored or already made of several."""
        return self.weights.tensor(name) if name in self.weights else name

    def attention(self, layer: Layer, qkv: str, cos: str, sin: str) -> str:
        """One layer's self-attention from its fused projections [M, O D] to what o_proj adds [M, C]; cos, sin: tables by position."""
        g, prefix, layout = self.g, f"model.layers.{layer.index}.self_attn.", layer.layout
        heads, groups, dim = len(layout.head_order), layout.num_groups, self.shape.head_dim
        order = (*layout.head_order, *(heads + i for i in layout.group_order), *(heads + groups + i for i in layout.group_order))
        attributes = {"heads": heads, "order": order, **self._window()}
        inputs = [qkv, cos, sin, "lengths", "counts", self.visible]
        cache = f"layers.{layer.index}."
        norm = f"{prefix}q_norm.weight" in self.weights
        if norm:
            rows = [self.weights.read(f"{prefix}{which}_norm.weight").to(self.weights.dtype).float() for which in "qk"]
            inputs.append(self.weights.copy(f"{prefix}qk_norm.weight", torch.stack(rows)))
            attributes["eps"] = self.config["rms_norm_eps"]
        retained: Retained = ""
        if layer.num_retained:
            retained = "Causal"
            inputs += [f"{cache}k_cache", f"{cache}v_cache"]
            attributes["retrieval_counts"] = layer.retrieval_counts
        if layer.index_q_JRD is not None and layer.index_k_IRD is not None:
            retained = "Pooled" if self.manifest.prefill_pattern == "topp" else "Selected"
            index = {"index_q": layer.index_q_JRD, "index_k": layer.index_k_IRD}
            weights = [self.weights.copy(f"{cache}{name}", weight.float().contiguous()) for name, weight in index.items()]
            inputs += [f"{cache}index_cache", *weights, "phase"]
            attributes |= self._selection(layout)
            if retained == "Pooled":
                m = self.manifest
                attributes |= {"prefill_ppb": in_ppb(f"{self.source}prefill_top_p", m.prefill_mass), "prefill_block": m.prefill_block}
        if local := layer.num_retained < groups:
            inputs += [f"{cache}ring_k", f"{cache}ring_v"]
        out_MA = self.custom(attention_name(norm=norm, retained=retained, local=local), inputs, attributes, cache)[0]
        places = tuple(int(i) for i in np.argsort(layout.head_order))
        if places != tuple(range(heads)):
            out_MA = g.reshape(g.gather(g.reshape(out_MA, -1, heads, dim), g.integers(*places), 1), -1, heads * dim)
        return self.linear(out_MA, f"{prefix}o_proj")

    def mlp(self, index: int, x: Pending) -> Pending:
        """The layer's feed-forward part: a gated MLP, or a mixture of experts where the checkpoint has a router."""
        prefix, norm = f"model.layers.{index}.mlp.", f"model.layers.{index}.post_attention_layernorm"
        if f"{prefix}gate.weight" in self.weights:
            logits, total, normed = self.norm_linear(x, norm, prefix, "", ("gate",))
            return Pending(self._experts(index, prefix, logits, normed), total)
        gate_up, total, _ = self.norm_linear(x, norm, prefix, "gate_up_proj", ("gate_proj", "up_proj"))
        activated = self.custom("GatedSilu", [gate_up], {}, f"layers.{index}.")[0]
        return Pending(self.linear(activated, f"{prefix}down_proj"), total)

    def _experts(self, index: int, prefix: str, logits: str, x_MC: str) -> str:
        config = self.config
        experts = self.weights.shape(f"{prefix}gate.weight")[0]
        routing = {"num_chosen": config["num_experts_per_tok"], "normalize": int(config.get("norm_topk_prob", False))}
        ids, weights = self.custom("Route", [logits], routing, f"layers.{index}.route.")
        gate_up = [f"{prefix}experts.{e}.{part}_proj.weight" for e in range(experts) for part in ("gate", "up")]
        down = [f"{prefix}experts.{e}.down_proj.weight" for e in range(experts)]
        stacks = [
            self.weights.stack(f"{prefix}experts.gate_up_proj", gate_up, experts),
            self.weights.stack(f"{prefix}experts.down_proj", down, experts),
        ]
        return self.custom("Experts", [x_MC, ids, weights, *stacks], {}, f"layers.{index}.")[0]

    def _window(self) -> dict[str, Any]:
        return {"window": self.manifest.sliding_window, "sinks": self.manifest.sinks, "scale": self.shape.head_dim**-0.5}

    def _selection(self, layout: LayerLayout) -> dict[str, Any]:
        m = self.manifest
        return {
            "retrieval_heads": layout.retrieval_heads,
            "key_groups": layout.key_groups,
            "key_sets": layout.key_sets,
            "block": m.decode_block,
            "top_p_ppb": in_ppb("top_p" if self.top_p_replaced else f"{self.source}top_p", m.top_p),
            "index_scale": m.indexer.scale,
            "narrow_keys": int(self.index_dtype != TensorProto.FLOAT),
        }


def in_ppb(name: str, share: float) -> int:
    """A share in billionths, which an integer attribute holds exactly; ValueError when that is not a whole number."""
    ppb = round(share * 1e9)
    if ppb / 1e9 != share:
        raise ValueError(f"{name} is {share!r}, wanted at most 9 decimals for an engine")
    return ppb
