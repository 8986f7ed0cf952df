"""The custom nodes of the ONNX domain `rtpurbo`: inputs, outputs, aliased pairs and attributes, as data.

Export writes them, the plugins implement them, and function bodies say what they compute in standard ONNX operators.

Conventions of all nodes. Heads are in run-time order (runtime.layout). `lengths`: tokens in the caches before the chunk; `counts`:
valid rows of the chunk, the first ones of its T rows (0: the sequence is idle, nothing of it is read or written); `visible` =
lengths + counts, and 0 where counts is 0. All three are int32 [B] and live on the device. Rows of `out` at or beyond `counts` are
unspecified, but finite where the inputs are.
`phase` says by its length, which a plugin reads from its input shapes, which pattern retrieval heads run: [1] prefill, [2] decode
(then T is 1). Its value is never read: it is int32. T alone cannot say it, as the last chunk of a prompt may have one token.
Cached values at or beyond `lengths`, and empty ring slots, may hold anything that is finite.

Every node also carries the string attributes plugin_namespace = "rtpurbo" and plugin_version = "1", so that TensorRT takes the
plugin and not the function body. In TensorRT an aliased output is its input, updated in place; in ONNX Runtime it is a new tensor.
"""

# B batch  T chunk tokens  S cached tokens (capacity)  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# I index-key sets  R index dim  N blocks (ceil(S / block))  M = B * T rows  E experts  X experts a token  C hidden  F expert width  G 2F
# J retrieval heads  O outputs of a product; of fused projections H + 2 K heads of D  A H * D  L local kv heads  Q positions  U D / 2  Z 2
import json
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

DOMAIN = "rtpurbo"
VERSION = 1
PREFILL, DECODE = 1, 2
# Axes of outputs whose size an attribute says.
SIZED_BY = {"num_chosen": "X", "heads": "H"}
# The node that carries them for tensorrt-rtx 1.6.1, see plugins.trt.carrier.
CARRIER_DOMAIN, CARRIER_NAME = "com.microsoft", "LinearAttention"

# model: the engine's dtype (float32, float16 or bfloat16). index: the manifest's indexer.key_dtype.
Kind = Literal["model", "index", "float32", "int32"]
AttributeType = Literal["int", "float", "ints"]
# How a layer's retained groups attend: there are none, densely in both phases, selecting in decode, selecting in both phases.
Retained = Literal["", "Causal", "Selected", "Pooled"]
RETAINED: tuple[Retained, ...] = ("", "Causal", "Selected", "Pooled")


@dataclass(frozen=True, kw_only=True)
class Port:
    """One input or output: its name, dtype and axes, one letter of the legend each."""

    name: str
    dtype: Kind
    axes: str

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.axes)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator. aliased: output name -> the input that it updates in place. attributes: name -> type."""

    name: str
    what: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliased: dict[str, str]
    attributes: dict[str, AttributeType]

    def aliased_input(self, output: int) -> int:
        """Index of the input that output number `output` updates in place, or -1."""
        source = self.aliased.get(self.outputs[output].name)
        return next((i for i, port in enumerate(self.inputs) if port.name == source), -1)


def _ports(text: str) -> tuple[Port, ...]:
    """Ports from "name:dtype:axes ..."."""
    ports = []
    for item in text.split():
        name, dtype, axes = item.split(":")
        assert dtype in ("model", "index", "float32", "int32"), item
        ports.append(Port(name=name, dtype=dtype, axes=axes))
    return tuple(ports)


def _node(name: str, what: str, inputs: str, outputs: str, aliased: dict[str, str], **attributes: AttributeType) -> Node:
    return Node(name=name, what=what, inputs=_ports(inputs), outputs=_ports(outputs), aliased=aliased, attributes=attributes)


def _product_nodes() -> tuple[Node, ...]:
    """Linear, NormLinear and FirstNormLinear, each also with a bias."""
    made = []
    for bias in ("", " bias:model:O"):
        suffix = "Bias" if bias else ""
        made += [
            _node(
                f"Linear{suffix}",
                """y = x weight^T (+ bias), summed in fp32 and rounded once.""",
                f"x:model:MC weight:model:OC{bias}",
                "y:model:MO",
                {},
            ),
            _node(
                f"NormLinear{suffix}",
                """sum = x + residual, rounded; normed = sum / sqrt(mean over C of sum^2 + eps) * norm in fp32, rounded; y = normed weight^T
                (+ bias).""",
                f"x:model:MC residual:model:MC norm:model:C weight:model:OC{bias}",
                "y:model:MO sum:model:MC normed:model:MC",
                {},
                eps="float",
            ),
            _node(
                f"FirstNormLinear{suffix}",
                """NormLinear of x alone: normed = x / sqrt(mean over C of x^2 + eps) * norm in fp32, rounded; y = normed weight^T
                (+ bias).""",
                f"x:model:MC norm:model:C weight:model:OC{bias}",
                "y:model:MO normed:model:MC",
                {},
                eps="float",
            ),
        ]
    return tuple(made)


def attention_name(*, norm: bool, retained: Retained, local: bool) -> str:
    """The attention node of a layer: with q_norm and k_norm, with retained groups that attend so, with local groups."""
    return f"Attention{'Norm' if norm else ''}{retained}{'Local' if local else ''}"


def _attention_nodes() -> tuple[Node, ...]:
    """The attention of a layer between its projections, one node for each kind of layer."""
    made = []
    for norm, retained, local in product((False, True), RETAINED, (False, True)):
        if not (retained or local):
            continue
        inputs = "qkv:model:MO cos:model:QU sin:model:QU lengths:int32:B counts:int32:B visible:int32:B"
        outputs, aliased = "out:model:MA", {}
        attributes: dict[str, AttributeType] = {"heads": "int", "order": "ints", "window": "int", "sinks": "int", "scale": "float"}
        if norm:
            inputs += " norms:float32:ZD"
            attributes["eps"] = "float"
        if retained:
            inputs += " k_cache:model:BSKD v_cache:model:BSKD"
            outputs += " new_k:model:BSKD new_v:model:BSKD"
            aliased |= {"new_k": "k_cache", "new_v": "v_cache"}
            attributes["retrieval_counts"] = "ints"
        if retained in ("Selected", "Pooled"):
            inputs += " index_cache:index:BISR index_q:float32:JRD index_k:float32:IRD phase:int32:P"
            outputs += " new_index:index:BISR"
            aliased["new_index"] = "index_cache"
            attributes |= {
                "retrieval_heads": "ints", "key_groups": "ints", "key_sets": "ints", "block": "int", "top_p_ppb": "int",
                "index_scale": "float", "narrow_keys": "int",
            }  # fmt: skip
        if retained == "Pooled":
            attributes |= {"prefill_ppb": "int", "prefill_block": "int"}
        if local:
            inputs += " ring_k:model:BWLD ring_v:model:BWLD"
            outputs += " new_ring_k:model:BWLD new_ring_v:model:BWLD"
            aliased |= {"new_ring_k": "ring_k", "new_ring_v": "ring_v"}
        made.append(
            _node(
                attention_name(norm=norm, retained=retained, local=local),
                """Rows of qkv and out are tokens, those of a sequence one after the other: as products give and take them, without a
                reshape that a library may turn into a copy. qkv holds q, k, v heads side by side; run-time head i is its head
                order[i] (H, then K + L, then K + L of them; `heads` is H). q and k through their RMS norms (norms: of q, of k; eps),
                then RoPE with cos and sin of the position; index queries and keys from before RoPE, index_q of head
                retrieval_heads[j] and index_k of group key_groups[i]. Then the chunk is appended and attends: retained groups as
                AppendKV + AttendCausal (Causal), Append + SelectBlocks + AttendRetained (Selected) or + AttendPooled (Pooled), local
                groups as AttendLocal. Index keys lie set by set, which the selection reads faster.""",
                inputs,
                outputs,
                aliased,
                **attributes,
            )
        )
    return tuple(made)


NODES = {
    node.name: node
    for node in (
        *_product_nodes(),
        *_attention_nodes(),
        _node(
            "AttendLocal",
            """Local KV groups, both phases. Query t of sequence b has position i = lengths[b] + t and sees the key at position j when
            j <= i and (i - j < window or j < sinks); keys come from the old ring and the chunk itself. Then the chunk's valid rows are
            written to the ring: position p < sinks to slot p, others to slot sinks + (p - sinks) mod window.""",
            "q:model:BTHD k:model:BTKD v:model:BTKD ring_k:model:BWKD ring_v:model:BWKD lengths:int32:B counts:int32:B",
            "out:model:BTHD new_ring_k:model:BWKD new_ring_v:model:BWKD",
            {"new_ring_k": "ring_k", "new_ring_v": "ring_v"},
            window="int",
            sinks="int",
            scale="float",
        ),
        _node(
            "Append",
            """Retained KV groups with an indexer: writes row t < counts[b] of k, v and index_k at position lengths[b] + t.""",
            "k_cache:model:BSKD v_cache:model:BSKD index_cache:index:BSIR k:model:BTKD v:model:BTKD index_k:index:BTIR "
            "lengths:int32:B counts:int32:B",
            "new_k:model:BSKD new_v:model:BSKD new_index:index:BSIR",
            {"new_k": "k_cache", "new_v": "v_cache", "new_index": "index_cache"},
        ),
        _node(
            "AppendKV",
            """Append without index keys: layers whose retrieval heads attend densely in decode as well (top_p 1, dense mode).""",
            "k_cache:model:BSKD v_cache:model:BSKD k:model:BTKD v:model:BTKD lengths:int32:B counts:int32:B",
            "new_k:model:BSKD new_v:model:BSKD",
            {"new_k": "k_cache", "new_v": "v_cache"},
        ),
        _node(
            "SelectBlocks",
            """Decode: the blocks that each retrieval head selects for its one query, from the index keys with the query's own appended
            (kernels.block_selection.score_and_select). Retrieval head j reads key set key_sets[j]. ids: ascending,
            anything at or beyond count. top_p = top_p_ppb / 1e9, exact where a float attribute is not. narrow_keys: 1 where the index
            keys are narrower than float32; queries are rounded to bfloat16 then. In prefill: count 0.""",
            "index_q:float32:BTJR index_k:index:BSIR visible:int32:B phase:int32:P",
            "ids:int32:BJN count:int32:BJ",
            {},
            key_sets="ints",
            block="int",
            sinks="int",
            top_p_ppb="int",
            narrow_keys="int",
            scale="float",
        ),
        _node(
            "AttendRetained",
            """All heads of the retained groups, from their caches with the chunk already appended; K = len(retrieval_counts) and H is a
            multiple of K. The first retrieval_counts[g] heads of group g retrieve: causal over every position in prefill, over their
            selected blocks (and positions < visible) in decode. The other heads of the group see window + sinks by position. ids and
            count come from SelectBlocks, retrieval heads in ascending run-time order.""",
            "q:model:BTHD k_cache:model:BSKD v_cache:model:BSKD lengths:int32:B counts:int32:B visible:int32:B ids:int32:BJN "
            "count:int32:BJ phase:int32:P",
            "out:model:BTHD",
            {},
            retrieval_counts="ints",
            block="int",
            window="int",
            sinks="int",
            scale="float",
        ),
        _node(
            "AttendPooled",
            """AttendRetained whose retrieval heads select in prefill too (kernels.prefill_selection.select_prefill): per block of
            prefill_block queries the blocks of as many keys whose mass under the pooled index logits reaches prefill_ppb / 1e9.""",
            "q:model:BTHD k_cache:model:BSKD v_cache:model:BSKD lengths:int32:B counts:int32:B visible:int32:B ids:int32:BJN "
            "count:int32:BJ phase:int32:P index_q:float32:BTJR index_k:index:BSIR",
            "out:model:BTHD",
            {},
            retrieval_counts="ints",
            key_sets="ints",
            block="int",
            window="int",
            sinks="int",
            scale="float",
            index_scale="float",
            prefill_ppb="int",
            prefill_block="int",
        ),
        _node(
            "AttendCausal",
            """AttendRetained where nothing is selected: retrieval heads are causal over every position in both phases.""",
            "q:model:BTHD k_cache:model:BSKD v_cache:model:BSKD lengths:int32:B counts:int32:B visible:int32:B",
            "out:model:BTHD",
            {},
            retrieval_counts="ints",
            window="int",
            sinks="int",
            scale="float",
        ),
        _node(
            "GatedSilu",
            """y = silu(gate) * up in fp32, rounded once; gate_up holds the F values of gate, then those of up.""",
            "gate_up:model:MG",
            "y:model:MF",
            {},
        ),
        _node(
            "Route",
            """The num_chosen experts of highest router logit, best first and the lowest id first among equals, and their softmax weights
            (fp32 inside), over the chosen ones' sum if normalize is 1. X = num_chosen.""",
            "logits:model:ME",
            "ids:int32:MX weights:model:MX",
            {},
            num_chosen="int",
            normalize="int",
        ),
        _node(
            "Experts",
            """y_m = sum_x weights[m, x] * down_e (silu(gate_e x_m) * (up_e x_m)), e = ids[m, x]; gate_up[e] holds the F rows of gate_e,
            then those of up_e. Rows of padding are computed like any other.""",
            "x:model:MC ids:int32:MX weights:model:MX gate_up:model:EGC down:model:ECF",
            "y:model:MC",
            {},
        ),
    )
}


def parse_rule(rule: str) -> tuple[str, dict[str, Any]]:
    """(name, attributes) of an update_rule; ValueError when it is not one of ours."""
    name, brace, rest = rule.removeprefix(f"{DOMAIN}::").partition("{")
    if not rule.startswith(f"{DOMAIN}::") or name not in NODES or not brace:
        raise ValueError(f"update_rule is {rule[:80]!r}, wanted {DOMAIN}::Name{{...}} with a name of plugins.trt.nodes")
    attributes = json.loads(brace + rest)
    if attributes.keys() != NODES[name].attributes.keys():
        raise ValueError(f"update_rule {name} has the attributes {sorted(attributes)}, wanted {sorted(NODES[name].attributes)}")
    return name, attributes
