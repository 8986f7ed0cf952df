"""The decode kernels fit into the shared memory of every compute capability that they are compiled for."""

import pytest
import torch
from kernel_compiler import compile_for

pytest.importorskip("triton")

from rtpurbo.kernels.block_selection import kernel as selection_kernel
from rtpurbo.kernels.block_selection import plan_selection
from rtpurbo.kernels.decode_layer.plan import RING_STAGES, RING_STEP_BLOCKS
from rtpurbo.kernels.division import OTHER_BYTES, SHARED_BYTES
from rtpurbo.kernels.sparse_attention import kernel as attention_kernel
from rtpurbo.kernels.sparse_attention import plan_attention

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
@pytest.mark.parametrize("case", ["selected", "ring"])
def test_attention(capability, dim, case):
    selects = case == "selected"
    more = {} if selects else {"step_blocks": RING_STEP_BLOCKS, "stages": RING_STAGES}
    jobs, kv_heads = ([(0,), (1,)], [0, 0]) if selects else ([tuple(range(8))], [0])
    plan = plan_attention(
        jobs, kv_heads, batch=1, head_dim=dim, device="cpu", pipeline_bytes=SHARED_BYTES[capability] - OTHER_BYTES, **more
    )
    q = torch.zeros(1, 8, dim, dtype=torch.bfloat16)
    k = torch.empty(1, TOKENS, 1, dim, dtype=torch.bfloat16, device="meta")
    ids, count = (torch.zeros(1, 2, *rest, dtype=torch.int32) if selects else None for rest in ((TOKENS // 64,), ()))
    launch = attention_kernel.describe(plan, q, k, k, LENGTHS, ids, count, 1.0, q, torch.zeros(1, 8))
    assert compile_for(launch, capability).metadata.shared <= SHARED_BYTES[capability]
