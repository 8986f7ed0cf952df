"""What each custom node launches: the kernels of kernels/, from shapes and attributes alone.

An operator is a pair of functions. `plan` makes tables and counters of a node for its shapes, once; `launch` hands the launches of one
execution to `run`, in order, and allocates scratch memory with torch.empty only: the caller decides where it lies. Both work on the meta
device, which is how a build finds out what to compile and how much memory an execution takes.
"""

# B batch  T chunk tokens  S cached tokens (capacity)  W ring slots  H query heads  K kv heads  G query heads per kv head  D head dim
# J retrieval heads  R index dim  M rows  E experts  X experts a token
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo.kernels.block_selection import kernel as selection_kernel
from rtpurbo.kernels.block_selection import plan_selection
from rtpurbo.kernels.cache_write import kernel as write_kernel
from rtpurbo.kernels.decode_layer.plan import RING_STAGES, RING_STEP_BLOCKS
from rtpurbo.kernels.experts import FEW_TOKENS, few_kernel
from rtpurbo.kernels.experts import kernel as experts_kernel
from rtpurbo.kernels.experts.sorting import PAIRS
from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention import kernel as prefill_kernel
from rtpurbo.kernels.local_attention.tiles import UNBOUNDED
from rtpurbo.kernels.prefill_layer import runs_of
from rtpurbo.kernels.router import kernel as router_kernel
from rtpurbo.kernels.sparse_attention import kernel as decode_kernel
from rtpurbo.kernels.sparse_attention import plan_attention
from rtpurbo.plugins.trt.memory import tensor_at
from rtpurbo.plugins.trt.nodes import DECODE, PREFILL, Node

Attributes = Mapping[str, Any]
Tensors = Sequence[torch.Tensor]
Shapes = Sequence[tuple[int, ...]]
Run = Callable[[Launch], None]
# Where kernels.experts changes its launches: pairs that one program sorts, and rows an expert (experts.kernel.tiles_for).
SORTED_PAIRS, TILE_ROWS = PAIRS, (12, 40, 160)
# Blocks of the ring attention; its selection is "everything", so any block size gives the same result.
RING_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Operator:
    """plan(attributes, input shapes, device) -> anything; launch(attributes, plan, inputs, outputs, run)."""

    plan: Callable[[Attributes, Shapes, torch.device], Any]
    launch: Callable[[Attributes, Any, Tensors, Tensors, Run], None]


def _no_plan(attributes: Attributes, shapes: Shapes, device: torch.device) -> None:
    return None


def _plan_ring(attributes: Attributes, shapes: Shapes, device: torch.device) -> Any:
    (B, T, H, D), K = shapes[0], shapes[1][2]
    if T > 1:
        return None
    G = H // K
    return plan_attention(
        [range(g * G, (g + 1) * G) for g in range(K)], range(K), batch=B, head_dim=D, device=device, block_size=RING_BLOCK,
        step_blocks=RING_STEP_BLOCKS, stages=RING_STAGES,
    )  # fmt: skip


def _attend_local(attributes: Attributes, plan: Any, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    q, k, v, ring_k, ring_v, lengths, counts = inputs
    out, window, sinks, scale = outputs[0], attributes["window"], attributes["sinks"], attributes["scale"]
    if plan is None:
        run(_prefill(q, k, v, lengths, counts, out, attributes, ring=(ring_k, ring_v)))
        run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, window, sinks))
        return
    # One token: the write replaces the one position that leaves the window, and the filled slots are what the query sees.
    visible = torch.empty_like(lengths)
    run(write_kernel.describe((ring_k, ring_v), (k, v), lengths, counts, window, sinks, visible))
    run(decode_kernel.describe(plan, q[:, 0], ring_k, ring_v, visible, None, None, scale, out[:, 0], _lse(q[:, 0])))


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, out: torch.Tensor,
    attributes: Attributes, *, ring: tuple[torch.Tensor, torch.Tensor] | None = None, dense: bool = False,
) -> Launch:  # fmt: skip
    """Attention of a chunk, to its ring and itself or, without a ring, to a cache by position; dense: within no window."""
    ring_k, ring_v = ring or (None, None)
    window = UNBOUNDED.value if dense else attributes["window"]
    return prefill_kernel.describe(
        q, k, v, lengths, counts, ring_k, ring_v, out, None, window=window, sinks=attributes["sinks"], scale=attributes["scale"],
        by_position=ring is None,
    )  # fmt: skip


def _lse(q_BHD: torch.Tensor) -> torch.Tensor:
    return torch.empty(q_BHD.shape[:2], dtype=torch.float32, device=q_BHD.device)


def _append(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    caches = (len(inputs) - 2) // 2
    run(write_kernel.describe(inputs[:caches], inputs[caches : 2 * caches], inputs[-2], inputs[-1], None, 0))


def _plan_selection(attributes: Attributes, shapes: Shapes, device: torch.device) -> Any:
    (B, T, _, _), (_, S, sets, _), phase = shapes[0], shapes[1], shapes[3][0]
    if phase != DECODE:
        return None
    assert T == 1, f"a decode step has {T} tokens"
    key_sets = list(attributes["key_sets"])
    return plan_selection(key_sets, num_sets=sets, batch=B, capacity=S, device=device, block_size=attributes["block"])


def _select_blocks(attributes: Attributes, plan: Any, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    index_q, index_k, visible, _ = inputs
    ids, count = outputs
    if plan is None:  # Prefill reads no selection.
        return
    top_p, scale, sinks = attributes["top_p_ppb"] / 1e9, attributes["scale"], attributes["sinks"]
    run(selection_kernel.describe(plan, index_q[:, 0], index_k, visible, scale, top_p, sinks, ids, count))


@dataclass(frozen=True, kw_only=True)
class RetainedPlan:
    """Work division of the retrieval heads and of the local heads (None if there are none) of retained groups, for one token."""

    retrieval: Any
    local: Any


def _plan_retained(attributes: Attributes, shapes: Shapes, device: torch.device, *, selects: bool) -> RetainedPlan | None:
    B, T, H, D = shapes[0]
    if (shapes[8][0] != DECODE) if selects else (T > 1):
        return None
    counts, block = attributes["retrieval_counts"], attributes.get("block", RING_BLOCK)
    G = H // len(counts)
    jobs = [range(g * G, g * G + n) for g, n in enumerate(counts)]
    rest = [(range(g * G + n, (g + 1) * G), g) for g, n in enumerate(counts) if n < G]
    if selects:
        heads = [head for job in jobs for head in job]
        work, kv_heads = [(head,) for head in heads], [head // G for head in heads]
    else:
        work, kv_heads = jobs, list(range(len(jobs)))
    retrieval = plan_attention(work, kv_heads, batch=B, head_dim=D, device=device, block_size=block)
    local = None
    if rest:
        local = plan_attention(
            [heads for heads, _ in rest], [g for _, g in rest], batch=B, head_dim=D, device=device, block_size=RING_BLOCK,
            step_blocks=RING_STEP_BLOCKS, stages=RING_STAGES,
        )  # fmt: skip
    return RetainedPlan(retrieval=retrieval, local=local)


def _attend_retained(attributes: Attributes, plan: RetainedPlan | None, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    q, k, v, lengths, counts, visible = inputs[:6]
    ids, count = (inputs[6], inputs[7]) if len(inputs) > 6 else (None, None)
    out, scale = outputs[0], attributes["scale"]
    if plan is not None:
        q_BHD, out_BHD, lse = q[:, 0], out[:, 0], _lse(q[:, 0])
        run(decode_kernel.describe(plan.retrieval, q_BHD, k, v, visible, ids, count, scale, out_BHD, lse))
        if plan.local is not None:
            window, sinks = attributes["window"], attributes["sinks"]
            run(decode_kernel.describe(plan.local, q_BHD, k, v, visible, None, None, scale, out_BHD, lse, window, sinks))
        return
    K = k.shape[2]
    q_BTKGD, out_BTKGD = (x.unflatten(2, (K, x.shape[2] // K)) for x in (q, out))
    for groups, n in runs_of(tuple(attributes["retrieval_counts"])):
        for heads, dense in ((slice(0, n), True), (slice(n, q_BTKGD.shape[3]), False)):
            if heads.start < heads.stop:
                place = (slice(None), slice(None), groups, heads)
                run(_prefill(q_BTKGD[place], k[:, :, groups], v[:, :, groups], lengths, counts, out_BTKGD[place], attributes, dense=dense))


def _route(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    run(router_kernel.describe(inputs[0], outputs[0], outputs[1], bool(attributes["normalize"])))


def _experts(attributes: Attributes, plan: None, inputs: Tensors, outputs: Tensors, run: Run) -> None:
    x, ids, weights, gate_up, down = inputs
    if x.shape[0] <= FEW_TOKENS:
        few_kernel.mix_experts(x, ids, weights, gate_up, down, y_TC=outputs[0], run=run)
        return
    # Without the copy engine's descriptors and large tiles: one choice for all GPUs.
    tiles = replace(experts_kernel.tiles_for(ids.numel(), gate_up.shape[0], hopper=False), descriptors=False)
    experts_kernel.mix_experts(x, ids, weights, gate_up, down, tiles=tiles, y_TC=outputs[0], run=run)


OPERATORS = {
    "AttendLocal": Operator(plan=_plan_ring, launch=_attend_local),
    "Append": Operator(plan=_no_plan, launch=_append),
    "AppendKV": Operator(plan=_no_plan, launch=_append),
    "SelectBlocks": Operator(plan=_plan_selection, launch=_select_blocks),
    "AttendRetained": Operator(plan=lambda a, shapes, device: _plan_retained(a, shapes, device, selects=True), launch=_attend_retained),
    "AttendCausal": Operator(plan=lambda a, shapes, device: _plan_retained(a, shapes, device, selects=False), launch=_attend_retained),
    "Route": Operator(plan=_no_plan, launch=_route),
    "Experts": Operator(plan=_no_plan, launch=_experts),
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


def launches(name: str, attributes: Attributes, inputs: Ports, outputs: Ports) -> tuple[list[Launch], int]:
    """The launches of a node for (shape, dtype) of its ports, on the meta device, and the scratch memory they take in bytes."""
    operator, scratch = OPERATORS[name], Scratch(None)
    tensors = [[torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ports] for ports in (inputs, outputs)]
    plan = operator.plan(attributes, [shape for shape, _ in inputs], torch.device("meta"))
    found: list[Launch] = []
    with scratch:
        operator.launch(attributes, plan, tensors[0], tensors[1], found.append)
    return found, scratch.used


def port_shapes(node: Node, attributes: Attributes, sizes: Mapping[str, int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of a node's inputs and outputs from the size of every axis; N follows from S, and X of a router is its own."""
    full = {**sizes, "N": -(-sizes["S"] // attributes["block"])} if "block" in attributes else dict(sizes)
    full["X"] = attributes.get("num_chosen", full.get("X", 0))
    inputs, outputs = ([tuple(full[axis] for axis in port.axes) for port in ports] for ports in (node.inputs, node.outputs))
    return inputs, outputs


def probes(node: Node, largest: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes at which a node's launches can differ in what has to be compiled, up to the largest; each also one larger.

    Neighbouring sizes show which arguments are multiples of 16 by chance only.
    """
    axes = {axis for port in node.inputs for axis in port.axes}
    choices: dict[str, list[int]] = {}
    if "B" in axes:
        choices["B"] = [largest["B"], largest["B"] + 1]
    if "T" in axes:
        choices["T"] = sorted({1, max(2, largest["T"]), largest["T"] + 1} if largest["T"] > 1 else {1})
    if "S" in axes:
        bounds = [largest["S"] >> bits for bits in range(11)] if node.name == "SelectBlocks" else [largest["S"]]
        choices["S"] = sorted({size for bound in bounds if bound for size in (bound, bound + 1)})
    if "M" in axes:
        edges = (1, router_kernel.FEW_TOKENS, largest["M"])
        if node.name == "Experts":
            X, E = largest["X"], largest["E"]
            edges = (FEW_TOKENS, SORTED_PAIRS // X, *(rows * E // X for rows in TILE_ROWS), largest["M"])
        near = {edge + step for edge in edges for step in (-1, 0, 1, 2)}
        choices["M"] = sorted(size for size in near if 1 <= size <= largest["M"] + 1)
    if "P" in axes:
        choices["P"] = [PREFILL, DECODE]
    for values in product(*choices.values()):
        sizes = {**largest, **dict(zip(choices, values, strict=True))}
        if sizes.get("P") != DECODE or sizes["T"] == 1:
            yield sizes
