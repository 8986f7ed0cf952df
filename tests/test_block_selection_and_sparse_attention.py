"""Fused selection and decode attention in Triton against their definitions; on a CPU through Triton's interpreter."""

# B batch  S cached tokens  H query heads  I index-key sets  K kv heads  D head dim  R index dim  N blocks
import pytest
import torch
from interpreter_process import serve
from kernel_compiler import compile_for

from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import mask_to_ids, plan_selection, score_and_select, select_blocks
from rtpurbo.kernels.block_selection.reference import block_mass, select_blocks_exact
from rtpurbo.kernels.division import stages_that_fit
from rtpurbo.kernels.local_attention import attend_local, write_ring
from rtpurbo.kernels.local_attention.decode_kernel import attend_slots
from rtpurbo.kernels.sparse_attention import attend_selected, plan_attention
from rtpurbo.kernels.testing import error_bound, peaked_index, relative_error

hypothesis = pytest.importorskip("hypothesis")
pytest.importorskip("triton")
st = hypothesis.strategies


def run_select(request, device="cpu"):
    """Two calls with one plan (the second finds what the first left behind); outputs and workspace poisoned in between."""
    q, k = request["q"].to(device), request["k"].to(device)
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device=device)
    plan = plan_selection(request["key_set"], num_sets=k.shape[2], batch=q.shape[0], capacity=k.shape[1], device=device, **request["plan"])
    results = []
    for _ in range(2):
        for scratch in (plan.block_max_BHN, plan.block_sum_BHN, plan.chunk_max_BHC):
            scratch.fill_(float("nan"))
        plan.histogram_BHPb.fill_(-(1 << 30))
        ids, count = score_and_select(
            q, k, plan=plan, lengths_B=lengths, scale=request["scale"], top_p=request["top_p"], sinks=4, impl="triton"
        )
        results.append((ids.cpu(), count.cpu()))
    return {"results": results, "counters": plan.counters.abs().sum().cpu()}


def run_attend(request, device="cpu"):
    """Two calls with one plan, outputs poisoned; heads that no job names must stay untouched."""
    q, k, v = (request[name].to(device) for name in "qkv")
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device=device)
    plan = plan_attention(request["heads"], request["kv_heads"], batch=q.shape[0], head_dim=q.shape[2], device=device, **request["plan"])
    results = []
    for _ in range(2):
        plan.acc_BLGD.fill_(float("nan"))
        out, lse = torch.full_like(q, 7.0), torch.full(q.shape[:2], 7.0, device=device)
        common = {"plan": plan, "lengths_B": lengths, "scale": request["scale"], "out_BHD": out, "lse_BH": lse, "impl": "triton"}
        if "ids" in request:
            attend_selected(q, k, v, ids_BJN=request["ids"].to(device), count_BJ=request["count"].to(device), **common)
        else:
            attend_slots(q, k, v, **common)
        results.append((out.cpu(), lse.cpu()))
    return {"results": results, "counters": plan.counters.abs().sum().cpu()}


OPERATIONS = {"select": run_select, "attend": run_attend}


def scores_of(request):
    lengths = torch.tensor(request["lengths"], dtype=torch.int32)
    maximum, total = block_scores(
        request["q"][:, None],
        request["k"].float().nan_to_num(0.0).to(request["k"].dtype),
        key_set_H=torch.tensor(request["key_set"]),
        visible_BT=lengths[:, None],
        scale=request["scale"],
    )
    return maximum[:, :, 0], total[:, :, 0]


def masks_of(answer, blocks):
    """The selections of both calls as masks, after checking that they agree, ascend and leave the counters at zero."""
    assert answer["counters"] == 0
    (ids, count), (ids_again, count_again) = answer["results"]
    assert torch.equal(count, count_again)
    mask = torch.zeros(*count.shape, blocks, dtype=torch.bool)
    for b in range(count.shape[0]):
        for h in range(count.shape[1]):
            chosen = ids[b, h, : count[b, h]]
            assert torch.equal(chosen, ids_again[b, h, : count[b, h]])
            assert (chosen.diff() > 0).all()
            mask[b, h, chosen.long()] = True
    return mask


def select_request(q, k, key_set, lengths, *, scale=1.0, top_p=0.9, **plan):
    """Keys beyond each length are NaN: nothing may depend on them."""
    k = k.clone()
    for b, length in enumerate(lengths):
        k[b, length:] = float("nan")
    return {"q": q, "k": k, "key_set": key_set, "lengths": lengths, "scale": scale, "top_p": top_p, "plan": plan}


def assert_same_selection(run, request):
    maximum, total = scores_of(request)
    wanted = select_blocks(maximum[:, :, None], total[:, :, None], top_p=request["top_p"], sinks=4)[:, :, 0]
    actual = masks_of(run("select", request), wanted.shape[-1])
    assert torch.equal(actual, wanted)
    return wanted


def assert_guarantee(mask, maximum, total, top_p, tolerance=1e-5):
    """Forced blocks are in, the kept mass reaches top_p, and the set exceeds the exact one by at most the rest of a bin."""
    valid = total > 0
    mass = block_mass(maximum, total).double()
    kept = torch.where(mask, mass, 0.0).sum(-1)
    assert (kept >= (top_p - tolerance) * mass.sum(-1)).all()
    assert not (mask & ~valid).any()
    exact = select_blocks_exact(maximum[:, :, None], total[:, :, None], top_p, 4, 64)[:, :, 0]
    lowest_exact = torch.where(exact, maximum, float("inf")).amin(-1)
    excess = mask & ~exact & (maximum < lowest_exact[..., None] - 0.125 * (1 + 1e-4) - 1e-5)
    assert not excess.any()


@pytest.mark.parametrize(
    ("key_set", "lengths", "plan"),
    [
        ((0, 1, 2, 3, 4), [64 * 37 + 1], {}),
        ((0, 0, 0, 0, 0, 0, 0, 0), [64 * 40], {"tile_blocks": 16}),
        ((0, 0, 1, 2, 3), [64 * 33], {"select_tile": 16, "part_blocks": 16}),
        ((2, 0, 1, 3, 4, 5, 6), [64 * 18 + 1], {"sets_a_group": 3}),
        ((1, 0, 1), [64 * 21 + 63, 64 * 16, 1500], {"select_tile": 8, "part_blocks": 4, "tile_blocks": 4, "num_warps": 4}),
    ],
)
def test_the_fused_selection_equals_the_reference_on_peaked_keys(run, key_set, lengths, plan):
    q, k = peaked_index(key_set, num_sets=max(key_set) + 1, batch=len(lengths), tokens=max(lengths), hot_share=0.15, dtype=torch.float32)
    mask = assert_same_selection(run, select_request(q, k, key_set, lengths, **plan))
    for b, length in enumerate(lengths):
        blocks = -(-length // 64)
        kept = mask[b].sum(-1) / blocks
        assert blocks >= 16
        assert ((kept >= 0.05) & (kept <= 0.5)).all(), kept


def test_sums_of_a_full_tile_of_equal_blocks_fit_their_limbs(run):
    """2048 blocks of 64 and 1024 of 128 keys that all have the largest score: the largest sum that a tile can hold."""
    for block, blocks in ((64, 2048), (128, 1024)):
        tokens = block * blocks
        request = select_request(torch.zeros(1, 1, 4), torch.zeros(1, tokens, 1, 4), (0,), [tokens], block_size=block)
        maximum, total = torch.zeros(1, 1, blocks), torch.full((1, 1, blocks), float(block))
        wanted = select_blocks(maximum[:, :, None], total[:, :, None], top_p=0.9, sinks=4, block_size=block)[:, :, 0]
        assert torch.equal(masks_of(run("select", request), blocks), wanted)


@pytest.mark.parametrize("top_p", [0.9, 0.97, 0.99])
def test_the_last_bin_is_found_where_no_high_limb_tells_it(run, top_p):
    """One hot block and hundreds whose masses lie below the high limb's unit: only exact sums say which of them are taken."""
    blocks = 520
    score_n = torch.full((blocks,), -9.05)
    score_n[::2] = -9.6
    score_n[7] = 0.0
    k = torch.full((1, blocks, 64, 1, 16), -40.0)
    k[0, :, 5, 0, 0] = score_n
    k[..., 1:] = 0.0
    q = torch.zeros(1, 1, 16)
    q[..., 0] = 1.0
    request = select_request(q, k.flatten(1, 2), (0,), [blocks * 64], top_p=top_p)
    kept = assert_same_selection(run, request)
    assert kept.sum() == {0.9: 4, 0.97: 4 + 258, 0.99: blocks}[top_p]


def test_tiles_whose_sums_could_overflow_are_refused():
    with pytest.raises(ValueError, match="tiles of 1024"):
        plan_selection((0,), num_sets=1, batch=1, capacity=1 << 18, device="cpu", block_size=128, select_tile=2048)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_with_narrow_keys_queries_count_as_bf16(run, dtype):
    """Two keys that tie for the rounded query, and are 8 nats apart for the given one."""
    q = torch.zeros(1, 1, 16)
    q[..., 0], q[..., 1] = 1.0, 1.0 + 2**-9
    k = torch.zeros(1, 64 * 20, 1, 16)
    k[:, 300, :, 0] = k[:, 700, :, 1] = 64.0
    request = select_request(q, k.to(dtype), (0,), [64 * 20], scale=64.0)
    assert assert_same_selection(run, request)[0, 0].nonzero().flatten().tolist() == [0, 4, 10, 18, 19]
    assert assert_same_selection(run, request | {"k": request["k"].float()})[0, 0].nonzero().flatten().tolist() == [0, 10, 18, 19]


@pytest.mark.parametrize("lengths", [[0], [1], [63], [64], [65], [128, 1, 129], [191, 0, 300]])
def test_ugly_lengths_select_what_the_reference_selects(run, lengths):
    q, k = peaked_index((0, 1, 1), num_sets=2, batch=len(lengths), tokens=320, hot_share=0.3, dtype=torch.float32)
    assert_same_selection(run, select_request(q, k, (0, 1, 1), lengths, select_tile=2))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.999, 1.0])
def test_every_top_p_selects_what_the_reference_selects(run, top_p):
    q, k = peaked_index((0,), num_sets=1, batch=1, tokens=64 * 18 + 7, hot_share=0.2, logit=7.0, dtype=torch.float32)
    mask = assert_same_selection(run, select_request(q, k, (0,), [64 * 18 + 7], top_p=top_p))
    assert mask.all() if top_p == 1.0 else mask.sum() <= max(4, top_p * 20)


def test_equal_keys_one_hot_key_and_huge_scores_keep_the_set_of_the_reference(run):
    tokens = 64 * 17
    q = torch.ones(3, 1, 16)
    k = torch.ones(3, tokens, 1, 16)
    k[1, 700] = 4.0
    k[2] = torch.linspace(-1e30, 1e30, tokens)[:, None, None]
    assert_same_selection(run, select_request(q, k, (0,), [tokens, tokens, tokens - 1], scale=1e6))


def test_keys_stored_set_by_set_give_the_same_selection(run):
    q, k = peaked_index((0, 1), num_sets=2, batch=2, tokens=64 * 17, hot_share=0.2, dtype=torch.float32)
    request = select_request(q, k, (0, 1), [64 * 17, 1000])
    request["k"] = request["k"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_selection(run, request)


@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 64 * 20), min_size=1, max_size=2),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 50.0, 1e4]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99]),
    rounded=st.booleans(),
)
def test_the_selection_keeps_its_guarantee_for_any_scores(interpreted, seed, lengths, spread, top_p, rounded):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), 2, 16, generator=generator)
    k = torch.randn(len(lengths), 64 * 20, 1, 16, generator=generator) * spread
    if rounded:
        q, k = q.round(), k.round()
    request = select_request(q, k, (0, 0), lengths, top_p=top_p, select_tile=8, part_blocks=4)
    maximum, total = scores_of(request)
    assert_guarantee(masks_of(interpreted("select", request), maximum.shape[-1]), maximum, total, top_p)


@pytest.mark.parametrize("width", [4, 8, 24])
def test_index_keys_of_other_widths_than_a_matrix_unit_has_select_as_the_reference(run, width):
    q, k = peaked_index((0, 1, 1), num_sets=2, batch=2, tokens=64 * 20, hot_share=0.15, dtype=torch.float32, index_dim=width)
    assert_same_selection(run, select_request(q, k, (0, 1, 1), [64 * 20, 777]))


@pytest.mark.parametrize(
    ("key_set", "width", "dtype"),
    [((0, 1, 2, 3, 4), 16, torch.float32), ((0, 1, 2, 3, 4), 16, torch.bfloat16), ((0, 1), 4, torch.bfloat16), ((0,), 64, torch.float32)],
)
def test_the_selection_compiles_into_the_shared_memory_of_hopper(key_set, width, dtype):
    plan = plan_selection(key_set, num_sets=max(key_set) + 1, batch=1, capacity=4096, device="cpu")
    q = torch.zeros(1, len(key_set), width, dtype=dtype)
    k = torch.zeros(1, max(key_set) + 1, 4096, width, dtype=dtype).transpose(1, 2)
    ids, count = torch.zeros(1, len(key_set), plan.capacity_blocks, dtype=torch.int32), torch.zeros(1, len(key_set), dtype=torch.int32)
    launch = selection_kernel().describe(plan, q, k, torch.zeros(1, dtype=torch.int32), 1.0, 0.9, 4, ids, count)
    assert compile_for(launch).metadata.shared <= 227 << 10


def selection_kernel():
    from rtpurbo.kernels.block_selection import kernel

    return kernel


def test_a_pipeline_takes_the_stages_that_fit_into_shared_memory():
    assert [stages_that_fit(4, step << 10, 196 << 10) for step in (8, 64, 96, 160, 200)] == [4, 4, 3, 2, 1]
    assert stages_that_fit(4, 64 << 10, 98 << 10) == 2


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    tokens=st.one_of(st.integers(1, 4096), st.integers(1, 1 << 21)),
    kind=st.sampled_from(["any", "ties", "one hot", "equal", "wide"]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999]),
)
def test_the_definition_keeps_its_guarantee_up_to_two_million_tokens(seed, tokens, kind, top_p):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // 64)
    maximum = torch.randn(1, 1, blocks, generator=generator)
    total = 1 + 63 * torch.rand(1, 1, blocks, generator=generator)
    if kind == "ties":
        maximum = maximum.round()
    elif kind == "one hot":
        maximum[..., seed % blocks] = 1e30
    elif kind == "equal":
        maximum[:], total[:] = -3.0, 64.0
    elif kind == "wide":
        maximum *= 1e4
    mask = select_blocks(maximum[:, :, None], total[:, :, None], top_p=top_p, sinks=4)[:, :, 0]
    assert_guarantee(mask, maximum, total, top_p, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ties", "one hot", "equal", "wide"])
@pytest.mark.parametrize("tokens", [777, 64 * 2049 + 1, 1 << 21])
def test_ties_hot_equal_and_wide_keys_keep_the_guarantee_on_a_gpu(tokens, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.Generator("cuda").manual_seed(tokens)
    q = torch.randn(1, 2, 16, generator=generator, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, tokens, 1, 16, generator=generator, device="cuda", dtype=torch.bfloat16)
    if kind == "ties":
        q, k = q.round(), k.round()
    elif kind == "one hot":
        k[:, tokens // 3] = q[:, :1] * 40
    elif kind == "equal":
        k[:] = 0.5
    elif kind == "wide":
        k *= 4
    check_selection_on_gpu(q, k, (0, 0), 0.9)


def attend_inputs(batch, tokens, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    """Peaked attention: queries scaled up, so that a wrong set of keys changes the result."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, dim, generator=generator) * 3
    k, v = (torch.randn(batch, tokens, kv_heads, dim, generator=generator) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact_attention(request, keys_of):
    """fp64 attention head by head; keys_of(batch, job) gives the positions that the job's heads see."""
    q, k, v = (request[name].double() for name in "qkv")
    out = torch.full(q.shape, 7.0, dtype=torch.float64)
    lse = torch.full(q.shape[:2], 7.0, dtype=torch.float64)
    for b in range(q.shape[0]):
        for job, (heads, kv_head) in enumerate(zip(request["heads"], request["kv_heads"], strict=True)):
            keys = keys_of(b, job)
            logits = q[b, list(heads)] @ k[b, keys, kv_head].T * request["scale"]
            out[b, list(heads)] = torch.softmax(logits, -1) @ v[b, keys, kv_head] if len(keys) else 0.0
            lse[b, list(heads)] = torch.logsumexp(logits, -1)
    return out, lse


def assert_attention(run, request, keys_of, bound):
    answer = run("attend", request)
    assert answer["counters"] == 0
    (out, lse), (out_again, lse_again) = answer["results"]
    assert torch.equal(out, out_again)
    assert torch.equal(lse, lse_again)
    exact_out, exact_lse = exact_attention(request, keys_of)
    assert relative_error(out, exact_out) <= bound
    finite = exact_lse.isfinite()
    assert torch.equal(lse[~finite].double(), exact_lse[~finite])
    torch.testing.assert_close(lse[finite].double(), exact_lse[finite], atol=2e-3 if bound > 1e-4 else 1e-4, rtol=1e-4)


def poison(request, unused):
    """NaN where no key may be read."""
    for name in "kv":
        request[name] = request[name].clone()
        for b, rows in enumerate(unused):
            request[name][b, rows] = float("nan")


@pytest.mark.parametrize(("dim", "programs"), [(64, 1), (128, 2), (80, 1)])
def test_attention_over_selected_blocks_equals_fp64(run, dim, programs):
    lengths = [64 * 18 + 5, 64 * 16, 0]
    heads, kv_heads = [(1,), (0,), (4,)], [0, 0, 1]
    q, k, v = attend_inputs(3, 64 * 20, 5, 2, dim)
    mask = torch.rand(3, 3, 20, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.3, 0.1, 0.5])[:, None]
    for b, length in enumerate(lengths):
        mask[b, :, -(-length // 64) :] = False
        mask[b, :, max(0, -(-length // 64) - 1)] = length > 0
    ids, count = mask_to_ids(mask)
    request = {"q": q, "k": k, "v": v, "lengths": lengths, "heads": heads, "kv_heads": kv_heads, "scale": dim**-0.5}
    request |= {"ids": ids.masked_fill(ids < 0, 1 << 30), "count": count, "plan": {"programs_per_processor": programs}}
    poison(request, [slice(length, None) for length in lengths])

    def keys_of(b, job):
        token = torch.arange(64 * 20)
        return token[(token < lengths[b]) & mask[b, job][token // 64]]

    assert_attention(run, request, keys_of, 1e-5)


def test_a_list_longer_than_a_program_holds_at_a_time_equals_fp64(run):
    block, blocks, dim = 16, 640, 32
    q, k, v = attend_inputs(1, block * blocks, 2, 1, dim)
    mask = torch.rand(1, 1, blocks, generator=torch.Generator().manual_seed(2)) < 0.9
    ids, count = mask_to_ids(mask)
    # The interpreter has eight processors: every program has 70 blocks or so, and the last block of the cache is not full.
    request = {"q": q, "k": k, "v": v, "lengths": [block * blocks - 5], "heads": [(1,)], "kv_heads": [0], "scale": dim**-0.5}
    request |= {"ids": ids, "count": count, "plan": {"programs_per_processor": 1, "block_size": block, "step_blocks": 2}}

    def keys_of(b, job):
        token = torch.arange(block * blocks - 5)
        return token[mask[b, job][token // block]]

    assert_attention(run, request, keys_of, 1e-5)


@pytest.mark.parametrize("length", [1, 3, 70, 164, 165, 400])
def test_ring_decode_equals_local_attention_after_the_token_was_written(run, length):
    window, sinks, dim = 160, 4, 64
    heads, kv_heads = [(0, 1, 2), (5, 3, 4, 6, 7)], [0, 1]
    q, k, v = attend_inputs(1, length, 8, 2, dim, seed=length)
    rings = []
    for tensor in (k, v):
        ring = torch.full((1, window + sinks, 2, dim), float("nan"))
        for start in range(0, length, 100):
            chunk = tensor[:, start : start + 100]
            write_ring(ring, chunk, torch.tensor([start]), torch.tensor([chunk.shape[1]]), window=window, sinks=sinks)
        rings.append(ring)
    request = {"q": q, "k": rings[0], "v": rings[1], "lengths": [length], "heads": heads, "kv_heads": kv_heads}
    request |= {"scale": dim**-0.5, "plan": {"programs_per_processor": 1}}
    answer = run("attend", request)
    permuted = [0, 1, 2, 5, 3, 4, 6, 7]
    padded_k, padded_v = (torch.cat([t[:, :, :1]] * 3 + [t[:, :, 1:]] * 5, dim=2).double() for t in (k, v))
    all_q = torch.zeros(1, length, 8, dim, dtype=torch.float64)
    all_q[:, -1] = q[:, permuted].double()
    wanted, wanted_lse = attend_local(all_q, padded_k, padded_v, window=window, sinks=sinks, scale=dim**-0.5)
    out, lse = answer["results"][0]
    assert relative_error(out[:, permuted], wanted[:, -1]) <= 1e-5
    torch.testing.assert_close(lse[:, permuted].double(), wanted_lse[..., -1].double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(out, answer["results"][1][0])


def test_dense_decode_of_a_group_equals_fp64(run):
    lengths = [64 * 9 + 3, 1]
    q, k, v = attend_inputs(2, 64 * 10, 8, 1, 64)
    request = {"q": q, "k": k, "v": v, "lengths": lengths, "heads": [tuple(range(8))], "kv_heads": [0], "scale": 0.125}
    request["plan"] = {"programs_per_processor": 1, "merge_tile": 4}
    poison(request, [slice(length, None) for length in lengths])
    assert_attention(run, request, lambda b, job: torch.arange(lengths[b]), 1e-5)


def test_the_reference_path_agrees_with_fp64_and_leaves_other_heads_alone():
    lengths = [64 * 17 + 9]
    q, k, v = attend_inputs(1, 64 * 18, 4, 2, 32)
    key_set = (0, 1)
    index_q, index_k = peaked_index(key_set, num_sets=2, batch=1, tokens=64 * 18, hot_share=0.2, dtype=torch.float32)
    plan = plan_selection(key_set, num_sets=2, batch=1, capacity=64 * 18, device="cpu")
    device_lengths = torch.tensor(lengths, dtype=torch.int32)
    ids, count = score_and_select(index_q, index_k, plan=plan, lengths_B=device_lengths, scale=1.0, top_p=0.9, sinks=4)
    request = {"q": q, "k": k, "v": v, "lengths": lengths, "heads": [(3,), (0,)], "kv_heads": [1, 0], "scale": 32**-0.5}
    attend_plan = plan_attention(request["heads"], request["kv_heads"], batch=1, head_dim=32, device="cpu")
    out, lse = attend_selected(
        q, k, v, plan=attend_plan, lengths_B=device_lengths, ids_BJN=ids, count_BJ=count, scale=request["scale"],
        out_BHD=torch.full_like(q, 7.0), lse_BH=torch.full((1, 4), 7.0),
    )  # fmt: skip

    def keys_of(b, job):
        token = torch.arange(lengths[b])
        return token[torch.isin(token // 64, ids[b, job, : count[b, job]].long())]

    exact, exact_lse = exact_attention(request, keys_of)
    assert relative_error(out, exact) <= 1e-5
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"top_p": 0.0}, "top_p"), ({"impl": "cuda"}, "impl"), ({"lengths_B": torch.zeros(1)}, "int32")],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    plan = plan_selection((0,), num_sets=1, batch=1, capacity=128, device="cpu")
    arguments = {"plan": plan, "lengths_B": torch.ones(1, dtype=torch.int32), "scale": 1.0, "top_p": 0.9, "sinks": 4}
    with pytest.raises(ValueError, match=message):
        score_and_select(torch.zeros(1, 1, 16), torch.zeros(1, 128, 1, 16), **(arguments | change))


def test_plans_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="every set"):
        plan_selection((0, 2), num_sets=3, batch=1, capacity=128, device="cpu")
    with pytest.raises(ValueError, match="'window' is not one of list"):
        plan_attention([(0,)], [0], batch=1, head_dim=64, device="cpu", reads="window")
    with pytest.raises(ValueError, match="do not fit"):
        plan_attention([(0,), (0,)], [0, 0], batch=1, head_dim=64, device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000, 32768, 131072, 1048576, 2097152])
@pytest.mark.parametrize(("key_set", "dtype"), [((0, 1, 2, 3, 4), "bf16"), ((0,) * 8, "bf16"), ((0, 0, 1, 2, 3), "fp8")])
def test_real_shapes_keep_the_guarantee_on_a_gpu(tokens, key_set, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    q, k = peaked_index(
        key_set, num_sets=max(key_set) + 1, batch=1, tokens=tokens, hot_share=0.1, device="cuda", logit=9.0, seed=tokens,
        dtype=torch.float32,
    )  # fmt: skip
    check_selection_on_gpu(q, k.to(torch.float8_e4m3fn if dtype == "fp8" else torch.bfloat16), key_set, 0.9)


def check_selection_on_gpu(q, k, key_set, top_p):
    """Guarantee on the stored keys in fp64, and the set of the reference but for decisions within rounding."""
    tokens = k.shape[1]
    request = {"q": q, "k": k, "key_set": key_set, "lengths": [tokens], "scale": 1.0, "top_p": top_p, "plan": {}}
    answer = run_select(request, "cuda")
    maximum, total = (
        score.cpu()
        for score in block_scores(
            q[:, None], k, key_set_H=torch.tensor(key_set, device="cuda"),
            visible_BT=torch.full((1, 1), tokens, device="cuda"), scale=1.0,
        )
    )  # fmt: skip
    mask = masks_of(answer, maximum.shape[-1])
    assert_guarantee(mask, maximum[:, :, 0], total[:, :, 0], top_p, 1e-4)
    wanted = select_blocks(maximum, total, top_p=top_p, sinks=4)[:, :, 0]
    assert (mask != wanted).sum() <= 2 + 1e-3 * wanted.sum()
    return mask


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 1000, 32768, 262144])
def test_real_shapes_attend_as_well_as_eager_bf16_on_a_gpu(tokens):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    check_attention_on_gpu(tokens)


def check_attention_on_gpu(tokens):
    q, k, v = (tensor.cuda() for tensor in attend_inputs(1, tokens, 32, 2, 128, torch.bfloat16))
    blocks = -(-tokens // 64)
    mask = torch.rand(1, 5, blocks, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.1
    mask[..., -2:] = True
    ids, count = mask_to_ids(mask)
    lengths = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    jobs = [((3,), (4,), (0,), (9,), (20,)), (0, 0, 0, 1, 1)]
    errors = {}
    for name, (heads, kv_heads) in {"selected": jobs, "slots": ((tuple(range(3)), tuple(range(8, 16))), (0, 1))}.items():
        plan = plan_attention(heads, kv_heads, batch=1, head_dim=128, device="cuda")
        used = [head for job in heads for head in job]
        results = []
        for cast, impl in (
            (torch.bfloat16, "triton"),
            (torch.bfloat16, "triton"),
            (torch.bfloat16, "reference"),
            (torch.float64, "reference"),
        ):
            common = {"plan": plan, "lengths_B": lengths, "scale": 128**-0.5, "impl": impl}
            inputs = (q.to(cast), k.to(cast), v.to(cast))
            if name == "selected":
                results.append(attend_selected(*inputs, ids_BJN=ids, count_BJ=count, **common))
            else:
                results.append(attend_slots(*inputs, **common))
        (out, lse), (out_again, _), (eager, _), (exact, exact_lse) = results
        assert torch.equal(out, out_again)
        errors[name] = (relative_error(out[:, used], exact[:, used]), error_bound(eager[:, used], exact[:, used]))
        assert errors[name][0] <= errors[name][1], errors
        torch.testing.assert_close(lse[:, used], exact_lse[:, used].float(), atol=5e-3, rtol=1e-3)
    return errors


if __name__ == "__main__":
    serve(OPERATIONS)
