"""Heads of a KV group that read a block once: bits of the selection, and attention over their union."""

# B batch  S cached tokens  H query heads  K kv heads  D head dim  N blocks
import pytest
import torch
from interpreter_process import serve
from kernel_compiler import compile_for

pytest.importorskip("triton")

from rtpurbo.kernels.block_selection import mask_to_ids, mask_to_words, plan_selection, score_and_select, words_to_mask
from rtpurbo.kernels.division import OTHER_BYTES, SHARED_BYTES
from rtpurbo.kernels.sparse_attention import attend_grouped, attend_selected, plan_attention
from rtpurbo.kernels.testing import peaked_index, relative_error


def run_select(request, device="cpu"):
    """Ids, count and bits of one call; the bits' words hold ones before."""
    q, k = request["q"].to(device), request["k"].to(device)
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device=device)
    plan = plan_selection(
        request["key_set"], num_sets=k.shape[2], batch=q.shape[0], capacity=k.shape[1], device=device, masks=True, **request["plan"]
    )
    assert plan.mask_BHW is not None
    plan.mask_BHW.fill_(-1)
    ids, count = score_and_select(q, k, plan=plan, lengths_B=lengths, scale=1.0, top_p=0.9, sinks=4, impl="triton")
    return {"ids": ids.cpu(), "count": count.cpu(), "mask": plan.mask_BHW.cpu()}


def run_grouped(request, device="cpu"):
    """Two calls with one plan, outputs and lists poisoned; heads that no job names must stay untouched."""
    q, k, v, mask = (request[name].to(device) for name in ("q", "k", "v", "mask"))
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device=device)
    plan = plan_attention(
        request["heads"], request["kv_heads"], batch=q.shape[0], head_dim=q.shape[2], device=device, union_blocks=-(-k.shape[1] // 64),
        **request["plan"],
    )  # fmt: skip
    results = []
    for _ in range(2):
        plan.acc_BLGD.fill_(float("nan"))
        plan.list_BJN.fill_(1 << 20)
        plan.heads_BJN.fill_(-1)
        out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:2], 7.0, device=device)
        attend_grouped(q, k, v, plan=plan, lengths_B=lengths, mask_BHW=mask, scale=request["scale"], out_BHD=out, lse_BH=lse, impl="triton")
        results.append((out.cpu(), lse.cpu()))
    return {"results": results, "counters": plan.counters.abs().sum().cpu()}


OPERATIONS = {"select": run_select, "grouped": run_grouped}


def words_of(length):
    """Words that hold the blocks of a sequence."""
    return -(-length // (64 * 32))


def listed(ids_BHN, count_BH, blocks):
    mask = torch.zeros(*count_BH.shape, blocks, dtype=torch.bool)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in count_BH.shape)).tolist():
        mask[b, h, ids_BHN[b, h, : count_BH[b, h]].long()] = True
    return mask


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 200])
def test_words_hold_a_bit_a_block(blocks):
    mask = torch.rand(2, 3, blocks, generator=torch.Generator().manual_seed(blocks)) < 0.4
    mask[0] = True
    words = mask_to_words(mask)
    assert words.shape == (2, 3, -(-blocks // 32))
    assert words.dtype == torch.int32
    assert torch.equal(words_to_mask(words, blocks), mask)


@pytest.mark.parametrize(
    ("lengths", "plan"),
    [
        ([64 * 40 + 3], {}),
        ([64 * 33, 0, 1, 64 * 31 + 1], {}),
        ([64 * 300 + 7], {"select_tile": 64, "part_blocks": 64}),
        ([64 * 290, 700], {"select_tile": 256, "part_blocks": 32}),
    ],
)
def test_a_selection_gives_its_ids_as_bits_too(run, lengths, plan):
    key_set = (0, 1, 1)
    q, k = peaked_index(key_set, num_sets=2, batch=len(lengths), tokens=max(lengths), hot_share=0.15, dtype=torch.float32)
    answer = run("select", {"q": q, "k": k, "key_set": key_set, "lengths": lengths, "plan": plan})
    for b, length in enumerate(lengths):
        # Up to the word of the last block.
        words = words_of(length)
        wanted = listed(answer["ids"][b : b + 1], answer["count"][b : b + 1], words * 32)
        assert torch.equal(words_to_mask(answer["mask"][b : b + 1, :, :words], words * 32), wanted)


JOBS = {
    "five of a group": (((0, 1, 2, 3, 4),), (0,)),
    "four groups": (((0, 1), (4,), (6, 5), (9, 8, 10)), (0, 1, 2, 3)),
    "sixteen": ((tuple(range(16)),), (1,)),
}


@pytest.mark.parametrize("share", [0.08, 0.4])
@pytest.mark.parametrize("jobs", JOBS)
@pytest.mark.parametrize(
    ("lengths", "plan"),
    [
        ([64 * 37 + 5], {}),
        ([64 * 20, 0, 1, 64 * 16 + 63, 65], {}),
        ([64 * 300], {"programs_per_processor": 3, "merge_tile": 4}),
        ([64 * 40 + 1], {"step_blocks": 1, "stages": 2}),
    ],
)
def test_a_union_gives_every_head_its_own_set(run, jobs, lengths, plan, share):
    heads, kv_heads = JOBS[jobs]
    generator = torch.Generator().manual_seed(len(lengths))
    B, S, D = len(lengths), max(lengths), 32
    q = torch.randn(B, 16, D, generator=generator) * 3
    k, v = (torch.randn(B, S, 4, D, generator=generator) for _ in range(2))
    rows, blocks = sum(len(job) for job in heads), -(-S // 64)
    # Blocks that many heads want, blocks of single heads, and the sinks' and the newest ones of all.
    common = torch.rand(B, 1, blocks, generator=generator) < share / 2
    mask = common | (torch.rand(B, rows, blocks, generator=generator) < share / 2)
    for b, length in enumerate(lengths):
        used = -(-length // 64)
        mask[b, :, 0] = mask[b, :, max(0, used - 2) : used] = True
        mask[b, :, used:] = False
        k[b, length:] = v[b, length:] = float("nan")
    words = mask_to_words(mask)
    for b, length in enumerate(lengths):
        words[b, :, words_of(length) :] = -1
    answer = run("grouped", {"q": q, "k": k, "v": v, "mask": words, "heads": heads, "kv_heads": kv_heads, "lengths": lengths,
                             "scale": D**-0.5, "plan": plan})  # fmt: skip
    assert answer["counters"] == 0
    (out, lse), (again, lse_again) = answer["results"]
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    used = [head for job in heads for head in job]
    rest = [head for head in range(16) if head not in used]
    assert (out[:, rest] == 7).all()
    ids, count = mask_to_ids(mask)
    singles = plan_attention(
        [(head,) for head in used], [kv for job, kv in zip(heads, kv_heads, strict=True) for _ in job], batch=B, head_dim=D, device="cpu"
    )
    exact, exact_lse = attend_selected(
        q.double(), k.double(), v.double(), plan=singles, lengths_B=torch.tensor(lengths, dtype=torch.int32), ids_BJN=ids, count_BJ=count,
        scale=D**-0.5, impl="reference",
    )  # fmt: skip
    active = [b for b, length in enumerate(lengths) if length]
    assert relative_error(out[active][:, used], exact[active][:, used]) < 1e-5
    torch.testing.assert_close(lse[:, used].double(), exact_lse[:, used].double(), atol=1e-4, rtol=1e-4)
    if blocks >= 16:
        kept, union = mask.float().mean(), mask[:, : len(heads[0])].any(1).float().mean()
        assert 0.05 <= kept <= 0.5
        assert len(heads[0]) == 1 or union < 0.9 * len(heads[0]) * mask[:, : len(heads[0])].float().mean()


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_a_union_of_a_million_tokens_compiles_into_shared_memory(capability):
    from rtpurbo.kernels.sparse_attention import kernel

    tokens = 1 << 20
    plan = plan_attention(
        [tuple(range(8))], [0], batch=1, head_dim=128, device="cpu", union_blocks=tokens // 64,
        pipeline_bytes=SHARED_BYTES[capability] - OTHER_BYTES,
    )  # fmt: skip
    q, k = torch.zeros(1, 8, 128, dtype=torch.bfloat16), torch.empty(1, tokens, 1, 128, dtype=torch.bfloat16, device="meta")
    mask, lengths = torch.zeros(1, 8, tokens // 64 // 32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch = kernel.describe(plan, q, k, k, lengths, None, None, 1.0, q, torch.zeros(1, 8), mask_BHW=mask)
    assert compile_for(launch, capability).metadata.shared <= SHARED_BYTES[capability]


def test_plans_and_masks_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 4, 32), torch.zeros(1, 640, 1, 32)
    common = {"lengths_B": torch.ones(1, dtype=torch.int32), "scale": 1.0}
    plan = plan_attention([(0, 1)], [0], batch=1, head_dim=32, device="cpu")
    with pytest.raises(ValueError, match="union_blocks"):
        attend_grouped(q, k, k, plan=plan, mask_BHW=torch.zeros(1, 2, 1, dtype=torch.int32), **common)
    plan = plan_attention([(0, 1)], [0], batch=1, head_dim=32, device="cpu", union_blocks=10)
    with pytest.raises(ValueError, match="2 heads"):
        attend_grouped(q, k, k, plan=plan, mask_BHW=torch.zeros(1, 3, 1, dtype=torch.int32), **common)
    with pytest.raises(ValueError, match="at most 16"):
        plan_attention([tuple(range(17))], [0], batch=1, head_dim=32, device="cpu", union_blocks=10)
    with pytest.raises(ValueError, match="32 blocks or more"):
        plan_selection((0,), num_sets=1, batch=1, capacity=4096, device="cpu", masks=True, part_blocks=16)


if __name__ == "__main__":
    serve(OPERATIONS)
