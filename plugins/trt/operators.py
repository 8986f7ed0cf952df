"""What each custom node launches: the kernels of kernels/, from shapes and attributes alone.

An operator is a pair of functions. `plan` makes tables and counters of a node for its shapes, once; `launch` hands the launches of one
execution to the site's `run`, in order, and allocates scratch memory with torch.empty only: the caller decides where it lies. Both work on
the meta device, which is how a build finds out what to compile and how much memory an execution takes.
"""

# B batch  T chunk tokens  S cached tokens (capacity)  M rows  E experts  X experts a token
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo.kernels.decode_layer import fused
from rtpurbo.kernels.experts import FEW_TOKENS, GLUON_ROWS, few_kernel
from rtpurbo.kernels.experts import kernel as experts_kernel
from rtpurbo.kernels.experts.sorting import PAIRS
from rtpurbo.kernels.gated_silu import kernel as silu_kernel
from rtpurbo.kernels.norm import kernel as norm_kernel
from rtpurbo.kernels.norm_linear import AUTO_TOKENS, MAX_WIDTH
from rtpurbo.kernels.norm_linear import kernel as matvec_kernel
from rtpurbo.kernels.router import kernel as router_kernel
from rtpurbo.plugins.trt.attention_node import FUSED_BATCHES, attention, plan_attention_node
from rtpurbo.plugins.trt.attention_operators import (
    append,
    attend_local,
    attend_pooled,
    attend_retained,
    plan_pooled,
    plan_retained,
    plan_ring,
    plan_selection_node,
    select_blocks,
)
from rtpurbo.plugins.trt.memory import tensor_at
from rtpurbo.plugins.trt.nodes import DECODE, NODES, PREFILL, SIZED_BY, Node
from rtpurbo.plugins.trt.products import Product
from rtpurbo.plugins.trt.site import Attributes, Operator, Shapes, Site, Tensors, Work

# Where kernels.experts changes its launches: pairs that one program sorts, and rows an expert (experts.kernel.tiles_for).
SORTED_PAIRS, TILE_ROWS = PAIRS, (12, 40, 160, *GLUON_ROWS)


def _no_plan(attributes: Attributes, shapes: Shapes, site: Site) -> None:
    return None


def _is_few(x_MC: torch.Tensor) -> bool:
    """Whether the kernel that streams the weights multiplies these rows, as kernels.norm_linear.choose_impl says."""
    return x_MC.shape[0] <= AUTO_TOKENS and x_MC.shape[1] <= MAX_WIDTH and x_MC.dtype != torch.float32


def _linear(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    x, weight, *biases = inputs
    bias = biases[0] if biases else None
    if _is_few(x):
        site.run(matvec_kernel.describe(x, weight, bias, outputs[0], early_launch=site.launches_early))
    else:
        site.run(Product(x_MC=x, weight_OC=weight, bias_O=bias, y_MO=outputs[0]))


def _norm_linear(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    x, residual, norm, weight, *biases = inputs
    _norm_and_multiply(attributes, x, residual, norm, weight, biases[0] if biases else None, outputs, site)


def _first_norm_linear(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    x, norm, weight, *biases = inputs
    # The kernel writes the sum too, which is x.
    outputs = (outputs[0], torch.empty_like(x), outputs[1])
    _norm_and_multiply(attributes, x, None, norm, weight, biases[0] if biases else None, outputs, site)


def _norm_and_multiply(
    attributes: Attributes, x: torch.Tensor, residual: torch.Tensor | None, norm: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, outputs: Tensors, site: Site,
) -> None:  # fmt: skip
    (y, total, normed), eps = outputs, attributes["eps"]
    if _is_few(x):
        described = (norm, eps, residual, total, normed)
        site.run(matvec_kernel.describe(x, weight, bias, y, described, early_launch=site.launches_early))
        return
    site.run(norm_kernel.describe(x, norm, eps, residual, normed, total, early_launch=site.launches_early))
    site.run(Product(x_MC=normed, weight_OC=weight, bias_O=bias, y_MO=y))


def _gated_silu(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    site.run(silu_kernel.describe(inputs[0], outputs[0], early_launch=site.launches_early))


def _route(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    ids, weights = outputs
    site.run(router_kernel.describe(inputs[0], ids, weights, bool(attributes["normalize"]), early_launch=site.launches_early))


def _experts(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, site: Site) -> None:
    x, ids, weights, gate_up, down = inputs
    if x.shape[0] <= FEW_TOKENS:
        few_kernel.mix_experts(x, ids, weights, gate_up, down, y_TC=outputs[0], run=site.run, early_launch=site.launches_early)
        return
    # As kernels.experts.choose_impl chooses.
    (E, C, F), hopper = down.shape, site.capability == 90
    few, many = GLUON_ROWS
    if hopper and few <= ids.numel() / E < many and x.dtype != torch.float32 and C % 256 == 0 and F % 128 == 0:
        from rtpurbo.kernels.experts import hopper_kernel

        hopper_kernel.mix_experts(x, ids, weights, gate_up, down, y_TC=outputs[0], programs=site.processors, run=site.run)
        return
    tiles = experts_kernel.tiles_for(ids.numel(), E, hopper=hopper)
    if x.dtype == torch.float32:
        # Twice the bytes: the large tiles would not fit.
        tiles = replace(experts_kernel.tiles_for(ids.numel(), E, hopper=False), descriptors=False)
    experts_kernel.mix_experts(x, ids, weights, gate_up, down, tiles=tiles, y_TC=outputs[0], early_launch=site.launches_early, run=site.run)


OPERATORS = {
    "AttendLocal": Operator(plan=plan_ring, launch=attend_local),
    "Append": Operator(plan=_no_plan, launch=append),
    "AppendKV": Operator(plan=_no_plan, launch=append),
    "SelectBlocks": Operator(plan=plan_selection_node, launch=select_blocks),
    "AttendRetained": Operator(plan=partial(plan_retained, selects=True), launch=attend_retained),
    "AttendPooled": Operator(plan=plan_pooled, launch=attend_pooled),
    "AttendCausal": Operator(plan=partial(plan_retained, selects=False), launch=attend_retained),
    "GatedSilu": Operator(plan=_no_plan, launch=_gated_silu),
    "Route": Operator(plan=_no_plan, launch=_route),
    "Experts": Operator(plan=_no_plan, launch=_experts),
    **{name: Operator(plan=_no_plan, launch=_linear) for name in ("Linear", "LinearBias")},
    **{name: Operator(plan=_no_plan, launch=_norm_linear) for name in ("NormLinear", "NormLinearBias")},
    **{name: Operator(plan=_no_plan, launch=_first_norm_linear) for name in ("FirstNormLinear", "FirstNormLinearBias")},
    **{
        name: Operator(plan=partial(plan_attention_node, node), launch=partial(attention, node))
        for name, node in NODES.items()
        if name.startswith("Attention")
    },
}


class Scratch(TorchDispatchMode):
    """While entered, torch.empty takes its memory from one buffer, and any other computation is refused: an operator only launches.

    address: of the buffer, or None to measure on the meta device; `used` is what was taken so far, in bytes.
    """

    ALIGNMENT = 256

    def __init__(self, address: int | None) -> None:
        super().__init__()
        self.address, self.used = address, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's hook: called instead of every operation."""
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function.is_view:
            return function(*args, **kwargs)
        if function is aten.empty_like.default:
            return self._take(args[0].shape, args[0].dtype)
        assert function is aten.empty.memory_format, f"an operator may not compute with torch: {function}"
        return self._take(args[0], kwargs.get("dtype") or torch.get_default_dtype())

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        start = self.used
        self.used += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        if self.address is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return tensor_at(self.address + start, tuple(shape), dtype)


Ports = Sequence[tuple[tuple[int, ...], torch.dtype]]


def launches(name: str, attributes: Attributes, inputs: Ports, outputs: Ports, capability: int) -> tuple[list[Work], int]:
    """The launches of a node for (shape, dtype) of its ports, on the meta device, and the scratch memory they take in bytes."""
    operator, scratch = OPERATORS[name], Scratch(None)
    found: list[Work] = []
    site = Site(device=torch.device("meta"), capability=capability, run=found.append)
    tensors = [[torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ports] for ports in (inputs, outputs)]
    plan = operator.plan(attributes, [shape for shape, _ in inputs], site)
    with scratch:
        operator.launch(attributes, plan, tensors[0], tensors[1], site)
    return found, scratch.used


def port_shapes(node: Node, attributes: Attributes, sizes: Mapping[str, int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of a node's inputs and outputs from the size of every axis; N follows from S, F from G, A from H, D; some are attributes."""
    full = {**sizes, "N": -(-sizes["S"] // attributes["block"])} if "block" in attributes else dict(sizes)
    full |= {"F": full["G"] // 2} if "G" in full else {}
    full |= {axis: attributes[name] for name, axis in SIZED_BY.items() if name in attributes}
    full |= {"A": full["H"] * full["D"]} if "H" in full and "D" in full else {}
    inputs, outputs = ([tuple(full[axis] for axis in port.axes) for port in ports] for ports in (node.inputs, node.outputs))
    return inputs, outputs


def probes(node: Node, largest: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes at which a node's launches can differ in what has to be compiled, up to the largest (of tokens one more).

    Neighbouring sizes show which arguments are multiples of 16 by chance only. M is B * T where a node has sequences.
    """
    axes = {axis for port in node.inputs for axis in port.axes}
    choices: dict[str, list[int]] = {}
    if "B" in axes:
        # The fewest sequences of each kind of decode step: they may have the longest caches.
        fewest = (1, *(size + 1 for size in FUSED_BATCHES))
        choices["B"] = sorted({B for B in (*fewest, largest["B"] - 1, largest["B"]) if 1 <= B <= largest["B"]})
    tokens = {"B", "M"} <= axes
    if "T" in axes or tokens:
        choices["T"] = sorted({1, max(2, largest["T"]), largest["T"] + 1} if largest["T"] > 1 else {1})
    if "S" in axes:
        # A selection is compiled for powers of two of blocks: one size of each kind has an odd number of them, whatever a block is.
        selects = node.name == "SelectBlocks" or "key_sets" in node.attributes
        odd = (1 + (1 << bits) for bits in range(8, 22)) if selects else (largest["S"] - 1,)
        # Several sequences decode in one launch up to so many tokens each.
        beyond = (fused.FEW_TOKENS // B + 1 for B in range(2, FUSED_BATCHES[-1] + 1) if selects)
        choices["S"] = sorted({min(256, largest["S"]), largest["S"], *(S for S in (*odd, *beyond) if 1 <= S <= largest["S"])})
    if "M" in axes and not tokens:
        edges = (AUTO_TOKENS, router_kernel.FEW_TOKENS, largest["M"])
        if node.name == "Experts":
            X, E = largest["X"], largest["E"]
            edges = (FEW_TOKENS, SORTED_PAIRS // X, *(rows * E // X for rows in TILE_ROWS), largest["M"])
        near = {edge + step for edge in edges for step in (-1, 0, 1, 2)}
        choices["M"] = sorted(size for size in near if 1 <= size <= largest["M"] + 1)
    if "P" in axes:
        choices["P"] = [PREFILL, DECODE]
    for values in product(*choices.values()):
        sizes = {**largest, **dict(zip(choices, values, strict=True))}
        if tokens:
            sizes["M"] = sizes["B"] * sizes["T"]
        if sizes.get("P") != DECODE or sizes["T"] == 1:
            yield sizes
