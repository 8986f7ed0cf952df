"""Kernels fit into the shared memory of every capability that they are compiled for, and those of decode load keys ahead into it."""

import re

import pytest
import torch
from kernel_compiler import compile_for
from trt_attention_case import AttentionCase

pytest.importorskip("triton")

from rtpurbo.kernels.block_selection import kernel as selection_kernel
from rtpurbo.kernels.block_selection import plan_selection
from rtpurbo.kernels.decode_layer.fused import describe as describe_fused
from rtpurbo.kernels.decode_layer.fused import plan_fused
from rtpurbo.kernels.decode_layer.step import DecodeStep
from rtpurbo.kernels.division import OTHER_BYTES, SHARED_BYTES
from rtpurbo.kernels.launch import Launch
from rtpurbo.kernels.local_attention import kernel as prefill_kernel
from rtpurbo.kernels.sparse_attention import kernel as attention_kernel
from rtpurbo.kernels.sparse_attention import plan_attention
from rtpurbo.plugins.trt.cubins import variant_of
from rtpurbo.plugins.trt.nodes import PREFILL
from rtpurbo.plugins.trt.operators import launches, port_shapes

CAPABILITIES = (80, 86, 90)
TOKENS = 1 << 17
LENGTHS = torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("key_set", [(0, 1, 2, 3, 4), (0,) * 8], ids=["five sets", "one set"])
def test_selection(capability, key_set):
    plan = plan_selection(
        key_set, num_sets=max(key_set) + 1, batch=1, capacity=TOKENS, device="cpu", pipeline_bytes=SHARED_BYTES[capability] - OTHER_BYTES
    )
    q = torch.zeros(1, len(key_set), 16)
    k = torch.empty(1, max(key_set) + 1, TOKENS, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    ids, count = (torch.zeros(1, len(key_set), *rest, dtype=torch.int32) for rest in ((plan.capacity_blocks,), ()))
    launch = selection_kernel.describe(plan, q, k, LENGTHS, 1.0, 0.9, 4, ids, count)
    assert compile_for(launch, capability).metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["selected", "ring"])
def test_attention(capability, dim, dtype, case):
    selects = case == "selected"
    jobs, kv_heads = ([(0,), (1,)], [0, 0]) if selects else ([tuple(range(8))], [0])
    plan = plan_attention(
        jobs, kv_heads, batch=1, head_dim=dim, device="cpu", reads="list" if selects else "ring",
        pipeline_bytes=SHARED_BYTES[capability] - OTHER_BYTES,
    )  # fmt: skip
    q = torch.zeros(1, 8, dim, dtype=dtype)
    k = torch.empty(1, TOKENS, 1, dim, dtype=dtype, device="meta")
    ids, count = (torch.zeros(1, 2, *rest, dtype=torch.int32) if selects else None for rest in ((TOKENS // 64,), ()))
    launch = attention_kernel.describe(plan, q, k, k, LENGTHS, ids, count, 1.0, q, torch.zeros(1, 8))
    assert compile_for(launch, capability).metadata.shared <= SHARED_BYTES[capability]


def steps_on_their_way(compiled, rows, dim):
    """Steps of keys (and as many of values) for which each loop of a kernel has shared memory beside the one it computes."""
    return [int(steps) for steps in re.findall(rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{rows}x{dim}xbf16", compiled.asm["ttgir"])]


@pytest.mark.parametrize(("reads", "steps"), [("list", [2, 2]), ("ring", [3, 3])])
def test_attention_loads_keys_ahead(reads, steps):
    """Triton's compiler decides what is pipelined: a load of ids in the loop, or an address that it cannot follow, ends it."""
    jobs, kv_heads = ([(0,), (1,)], [0, 0]) if reads == "list" else ([tuple(range(8))], [0])
    plan = plan_attention(jobs, kv_heads, batch=1, head_dim=128, device="cpu", reads=reads)
    q = torch.zeros(1, 8, 128, dtype=torch.bfloat16)
    k = torch.empty(1, TOKENS, 1, 128, dtype=torch.bfloat16, device="meta")
    ids, count = (torch.zeros(1, 2, *rest, dtype=torch.int32) if reads == "list" else None for rest in ((TOKENS // 64,), ()))
    launch = attention_kernel.describe(plan, q, k, k, LENGTHS, ids, count, 1.0, q, torch.zeros(1, 8))
    assert steps_on_their_way(compile_for(launch), 64, 128) == steps


@pytest.mark.parametrize(("tokens", "local"), [(1 << 15, 2), (1 << 20, 1)])
def test_the_one_launch_loads_keys_ahead(tokens, local):
    """Lists two steps, local heads one, or two where few tokens are scored: where they were measured best."""
    plan = plan_fused(
        group_size=8, num_groups=4, retrieval_counts=(5,), key_sets=(0, 1, 2, 3, 4), batch=1, capacity=tokens, head_dim=128, block_size=64,
        device=torch.device("cpu"),
    )  # fmt: skip
    q = torch.zeros(1, 32, 128, dtype=torch.bfloat16)
    k, ring, index_k = (
        torch.empty(1, rows, heads, dim, dtype=torch.bfloat16, device="meta")
        for rows, heads, dim in ((tokens, 1, 128), (8196, 3, 128), (tokens, 5, 16))
    )
    step = DecodeStep(
        q_BHD=q, index_q_BHR=torch.zeros(1, 5, 16), lengths_B=LENGTHS, k_BSKD=k, v_BSKD=k, index_k_BSIR=index_k, ring_k_BWKD=ring,
        ring_v_BWKD=ring, scale=1.0, index_scale=1.0, top_p=0.9, out_BHD=q,
    )  # fmt: skip
    ids, count = (torch.zeros(1, 5, *rest, dtype=torch.int32) for rest in ((plan.capacity_blocks,), ()))
    compiled = compile_for(describe_fused(plan, step, 8192, 4, ids, count, 0))
    assert steps_on_their_way(compiled, 64, 128) == [local, local, 2, 2]
    # Two programs share a multiprocessor.
    assert 2 * compiled.metadata.shared <= SHARED_BYTES[90]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill_tiles_are_the_fast_ones_wherever_they_fit(capability, itemsize, dim):
    found = prefill_kernel.tiles_that_fit(dim, itemsize, SHARED_BYTES[capability])
    # Half a kilobyte of q, k and v each, for a row of 128 float32.
    assert (found == {"block_queries": 128, "block_keys": 64}) == (dim * itemsize <= (256 if capability == 86 else 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_of_an_engine_on_the_smallest_gpu(dtype):
    """A layer with a ring, a cache by position and lists, as its node launches them."""
    case = AttentionCase("AttentionPooledLocal", ((0,), (1,), 1), D=128, dtype=dtype)
    sizes = {
        "B": 1, "T": 600, "M": 600, "P": PREFILL, "S": 1000, "O": (case.H + 2 * case.K) * 128, "U": 64, "Q": 1000, "K": len(case.counts_K),
        "L": case.local, "D": 128, "W": 27, "I": 3, "J": len(case.heads), "R": 16, "H": case.H,
    }  # fmt: skip
    dtypes = {"model": dtype, "index": dtype, "float32": torch.float32, "int32": torch.int32}
    ports = zip(port_shapes(case.node, case.attributes, sizes), (case.node.inputs, case.node.outputs), strict=True)
    described = [[(shape, dtypes[port.dtype]) for shape, port in zip(*side, strict=True)] for side in ports]
    works = launches(case.name, case.attributes, *described, 86)[0]
    different = {variant_of(work).shape: work for work in works if isinstance(work, Launch) and work.kernel is prefill_kernel._prefill}
    assert {(work.constants["HAS_RING"], work.constants["LISTED"]) for work in different.values()} == {
        (True, False),
        (False, False),
        (False, True),
    }
    for work in different.values():
        assert compile_for(work, 86).metadata.shared <= SHARED_BYTES[86]


@pytest.mark.parametrize("dim", [64, 128])
def test_prefill_of_the_runtime_on_the_smallest_gpu(dim):
    """The tiles that the kernel takes unless told, in 16 bits: the runtime gives it nothing else on a GPU."""
    q, k, ring = (torch.zeros(1, tokens, heads, dim, dtype=torch.bfloat16) for tokens, heads in ((256, 4), (256, 2), (64, 2)))
    launch = prefill_kernel.describe(q, k, k, LENGTHS, LENGTHS, ring, ring, q, None, window=60, sinks=4, scale=1.0)
    assert compile_for(launch, 86).metadata.shared <= SHARED_BYTES[86]
