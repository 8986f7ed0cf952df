"""decode_layer, every implementation, against the eager definition in fp64; on a CPU through Triton's interpreter."""

# B batch  S cached tokens  W ring slots  H query heads  K kv heads  D head dim  I index-key sets  R index dim
import pytest
import torch
from interpreter_process import serve
from kernel_compiler import compile_for

from rtpurbo.kernels.decode_layer import DecodeStep, choose_impl, decode_layer, plan_decode_layer
from rtpurbo.kernels.decode_layer.fused import describe, is_faster, plan_fused
from rtpurbo.kernels.decode_layer.plan import reads_once
from rtpurbo.kernels.division import next_power_of_2, num_processors_of
from rtpurbo.kernels.local_attention import attend_local, ring_positions
from rtpurbo.kernels.testing import error_bound, peaked_index, relative_error

pytest.importorskip("triton")

TENSORS = ("q_BHD", "index_q_BHR", "k_BSKD", "v_BSKD", "index_k_BSIR", "ring_k_BWKD", "ring_v_BWKD")


def run_layer(request, device="cpu"):
    """Two calls with one plan, outputs and scratch memory poisoned; the second finds what the first left behind."""
    plan = plan_decode_layer(**request["plan"], device=device)
    tensors = {name: None if request[name] is None else request[name].to(device) for name in TENSORS}
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device=device)
    results = []
    for _ in range(2):
        for part in (plan.selected, plan.everything, plan.local_window, plan.ring):
            if part is not None:
                part.acc_BLGD.fill_(float("nan"))
        if plan.fused is not None:
            for scratch in (plan.fused.block_max_BHN, plan.fused.block_sum_BHN, plan.fused.acc_LD, plan.fused.local_acc_LGD):
                scratch.fill_(float("nan"))
            plan.fused.histogram_BHPb.fill_(-(1 << 30))
        out = torch.full_like(tensors["q_BHD"], float("nan"))
        _, selection = decode_layer(
            **tensors, plan=plan, lengths_B=lengths, scale=request["scale"], index_scale=1.0, top_p=request["top_p"], out_BHD=out,
            impl=request["impl"],
        )  # fmt: skip
        results.append((out.cpu(), None if selection is None else tuple(x.cpu() for x in selection)))
    return {"results": results}


def run_scores(request, device="cpu"):
    """Block maxima of the one launch's first stretch alone."""
    index_q, index_k = (request[name].to(device) for name in ("index_q", "index_k"))
    plan = plan_fused(
        group_size=8, num_groups=3, retrieval_counts=(8, 8, 8), key_sets=request["key_sets"], batch=1, capacity=index_k.shape[1],
        head_dim=16, block_size=16, device=torch.device(device), tile_blocks=4,
    )  # fmt: skip
    q, cache = torch.zeros(1, 24, 16, device=device), torch.zeros(1, 16, 3, 16, device=device)
    step = DecodeStep(
        q_BHD=q, index_q_BHR=index_q, lengths_B=torch.tensor([index_k.shape[1]], dtype=torch.int32, device=device), k_BSKD=cache,
        v_BSKD=cache, index_k_BSIR=index_k, ring_k_BWKD=None, ring_v_BWKD=None, scale=1.0, index_scale=1.0, top_p=0.9, out_BHD=q,
    )  # fmt: skip
    ids, count = (
        torch.zeros(1, 24, plan.capacity_blocks, dtype=torch.int32, device=device),
        torch.zeros(1, 24, dtype=torch.int32, device=device),
    )
    plan.block_max_BHN.fill_(float("nan"))
    describe(plan, step, 160, 4, ids, count, 1).run()
    return plan.block_max_BHN.cpu()


def run_roles(request, device="cpu"):
    """What `roles` gives every program of a launch."""
    from role_kernel import store_roles

    results = []
    for case in request["cases"]:
        padded = next_power_of_2(case[0])
        out = torch.full((4, padded), -7, dtype=torch.int32, device=device)
        store_roles[(1,)](out, *case, PADDED=padded)
        results.append(out.cpu())
    return results


OPERATIONS = {"layer": run_layer, "scores": run_scores, "roles": run_roles}


def layer_request(
    *, group_size, num_groups, counts, key_sets, lengths, capacity=64 * 18, dim=32, window=160, sinks=4, top_p=0.9, dense=False,
    impl="composed", dtype=torch.float32, hot_share=0.15, seed=0, device="cpu", block_size=64, index_dim=16,
):  # fmt: skip
    """Peaked queries and index keys; NaN in every row and slot that may not be read. The rings hold the last positions."""
    generator = torch.Generator(device).manual_seed(seed)
    B, retained = len(lengths), num_groups if dense else len(counts)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    q = (normal(B, group_size * num_groups, dim) * 3).to(dtype)
    all_k, all_v = (normal(B, capacity, num_groups, dim).to(dtype) for _ in range(2))
    lengths_B = torch.tensor(lengths, device=device)
    position_BW = ring_positions(lengths_B, window, sinks)
    rings = [
        tensor[torch.arange(B, device=device)[:, None], position_BW.clamp(min=0)][:, :, retained:].masked_fill(
            (position_BW < 0)[:, :, None, None], float("nan")
        )
        for tensor in (all_k, all_v)
    ]
    caches = [tensor[:, :, :retained].clone() for tensor in (all_k, all_v)]
    index_q = index_k = None
    if counts and not dense:
        index_q, index_k = peaked_index(
            key_sets,
            num_sets=max(key_sets) + 1,
            batch=B,
            tokens=max(max(lengths), 1),
            hot_share=hot_share,
            dtype=torch.float32,
            seed=seed,
            device=device,
            block_size=block_size,
            index_dim=index_dim,
        )
        # As in the runtime: queries in fp32, keys as stored.
        index_k = index_k.to(dtype)
        index_k = torch.cat([index_k, index_k.new_zeros(B, capacity - index_k.shape[1], *index_k.shape[2:])], dim=1)
    for b, length in enumerate(lengths):
        for tensor in (*caches, *([] if index_k is None else [index_k])):
            tensor[b, length:] = float("nan")
    plan = {
        "group_size": group_size, "num_groups": num_groups, "retrieval_counts": counts, "key_sets": key_sets, "batch": B,
        "capacity": capacity, "head_dim": dim, "window": window, "sinks": sinks, "block_size": block_size, "dense": dense,
    }  # fmt: skip
    tensors = dict(zip(TENSORS, (q, index_q, *(caches if retained else (None, None)), index_k, *rings), strict=True))
    if retained == num_groups:
        tensors |= {"ring_k_BWKD": None, "ring_v_BWKD": None}
    return tensors | {"plan": plan, "lengths": lengths, "scale": dim**-0.5, "top_p": top_p, "impl": impl}


def with_precision(request, dtype):
    """The same request for the eager definition, attention in that dtype (the index stays as it is)."""
    cast = {name: request[name] if request[name] is None else request[name].to(dtype) for name in TENSORS if not name.startswith("index")}
    return request | cast | {"impl": "reference"}


def assert_equals_fp64(run, request, bound=1e-5):
    answer = run("layer", request)
    exact, selection = run_layer(with_precision(request, torch.float64))["results"][0]
    (out, chosen), (out_again, chosen_again) = answer["results"]
    active = [b for b, length in enumerate(request["lengths"]) if length > 0]
    assert torch.equal(out[active], out_again[active])
    assert relative_error(out[active], exact[active]) <= bound
    assert (chosen is None) == (selection is None)
    if selection is None:
        return None
    (ids, count), (wanted_ids, wanted_count) = chosen, selection
    assert torch.equal(count, wanted_count)
    assert torch.equal(count, chosen_again[1])
    listed = torch.arange(ids.shape[2]) < count[..., None]
    assert torch.equal(ids[..., : wanted_ids.shape[2]][listed], wanted_ids[listed])
    return count[active]


LAYERS = {
    "groups of 8, one retained": {"group_size": 8, "num_groups": 4, "counts": (5,), "key_sets": (0, 1, 2, 3, 4)},
    "groups of 8, all heads of one": {"group_size": 8, "num_groups": 2, "counts": (8,), "key_sets": (0,) * 8},
    "groups of 4, differing counts": {"group_size": 4, "num_groups": 3, "counts": (4, 1), "key_sets": (0, 0, 0, 0, 1)},
    "groups of 3, all retained": {"group_size": 3, "num_groups": 3, "counts": (3, 2, 1), "key_sets": (0, 0, 0, 1, 1, 2)},
    "groups of 1": {"group_size": 1, "num_groups": 4, "counts": (1, 1), "key_sets": (0, 1)},
    "all retrieval": {"group_size": 4, "num_groups": 2, "counts": (4, 4), "key_sets": tuple(range(8))},
}


@pytest.mark.parametrize("impl", ["composed", "fused"])
@pytest.mark.parametrize("hot_share", [0.1, 0.2, 0.3])
def test_steps_smaller_than_a_block_equal_fp64(run, hot_share, impl):
    """Blocks of 128 keys in steps of 64: shares of a list begin in the middle of a block."""
    layer = LAYERS["groups of 8, one retained"]
    request = layer_request(**layer, lengths=[128 * 30 + 7], capacity=128 * 31, block_size=128, hot_share=hot_share, impl=impl)
    assert assert_equals_fp64(run, request) is not None


@pytest.mark.parametrize("impl", ["composed", "fused"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("lengths", [[64 * 17 + 1], [64 * 16, 1100, 0, 64 * 18]], ids=["one", "batch"])
def test_a_decode_layer_equals_fp64_and_keeps_a_twentieth_to_half_of_its_blocks(run, layer, lengths, impl):
    request = layer_request(**LAYERS[layer], lengths=lengths, impl=impl)
    count = assert_equals_fp64(run, request)
    assert count is not None
    blocks = torch.tensor([-(-length // 64) for length in lengths if length > 0])[:, None]
    assert (blocks >= 16).all()
    assert ((count >= 0.05 * blocks) & (count <= 0.5 * blocks)).all(), count


@pytest.mark.parametrize("impl", ["composed", "fused"])
def test_a_selection_in_several_parts_equals_fp64(run, impl):
    """Blocks of 16, so that a few thousand tokens are more blocks than a tile of the selection."""
    request = layer_request(
        group_size=2, num_groups=2, counts=(2, 1), key_sets=(0, 0, 1), lengths=[16 * 2200 + 3, 16 * 290, 0], capacity=16 * 2304, dim=16,
        block_size=16, window=64, impl=impl,
    )  # fmt: skip
    count = assert_equals_fp64(run, request)
    assert count is not None
    assert ((count >= torch.tensor([[0.05 * 2201], [0.05 * 291]])) & (count <= torch.tensor([[0.5 * 2201], [0.5 * 291]]))).all(), count


@pytest.mark.parametrize("impl", ["composed", "fused"])
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 129, 163, 164, 165, 700])
def test_rings_that_are_not_full_just_full_and_wrapped_equal_fp64(run, length, impl):
    assert_equals_fp64(run, layer_request(**LAYERS["groups of 4, differing counts"], lengths=[length, 300], seed=length, impl=impl))


@pytest.mark.parametrize(
    ("change", "lengths"),
    [
        ({"counts": (), "key_sets": ()}, [700, 0, 5]),
        ({"counts": (), "key_sets": (), "dense": True}, [64 * 17 + 3, 0, 1]),
        ({"top_p": 1.0}, [64 * 17 + 3, 0, 1]),
    ],
    ids=["all local", "dense", "top_p 1"],
)
def test_layers_without_a_selection_equal_fp64(run, change, lengths):
    assert assert_equals_fp64(run, layer_request(**(LAYERS["groups of 4, differing counts"] | change), lengths=lengths)) is None


@pytest.mark.parametrize("impl", ["composed", "fused"])
def test_without_sinks_and_with_a_window_beyond_the_length_the_layer_equals_fp64(run, impl):
    assert_equals_fp64(
        run, layer_request(**LAYERS["groups of 4, differing counts"], lengths=[900, 64 * 18], sinks=0, window=1000, impl=impl)
    )


def test_local_heads_of_the_definition_are_those_of_local_attention():
    request = layer_request(group_size=2, num_groups=2, counts=(1,), key_sets=(0,), lengths=[500], capacity=500, top_p=1.0)
    out, _ = run_layer(with_precision(request, torch.float64))["results"][0]
    q, k, v = (request[name].double() for name in ("q_BHD", "k_BSKD", "v_BSKD"))
    all_q = torch.zeros(1, 500, 2, 32, dtype=torch.float64)
    all_q[:, -1] = q[:, :2]
    local, _ = attend_local(all_q, k, v, window=160, sinks=4, scale=32**-0.5)
    assert relative_error(out[:, 1], local[:, -1, 1]) <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl"),
        ({"impl": "composed"}, "GPU"),
        ({"top_p": 0.0}, "top_p"),
        ({"lengths_B": torch.ones(1)}, "int32"),
        ({"index_q_BHR": None}, "index_q None"),
        ({"index_k_BSIR": None}, "index_k None"),
        ({"k_BSKD": None}, "k None"),
        ({"ring_v_BWKD": torch.zeros(1, 7, 1, 32)}, "7 slots"),
    ],
)
def test_inputs_that_do_not_fit_the_plan_are_refused(change, message):
    request = layer_request(group_size=2, num_groups=2, counts=(1,), key_sets=(0,), lengths=[100])
    arguments = {name: request[name] for name in TENSORS} | {"plan": plan_decode_layer(**request["plan"], device="cpu")}
    arguments |= {"lengths_B": torch.tensor([100], dtype=torch.int32), "scale": 1.0, "index_scale": 1.0, "top_p": 0.9}
    with pytest.raises(ValueError, match=message):
        decode_layer(**(arguments | change))


def test_a_plan_with_too_many_retrieval_heads_is_refused():
    request = layer_request(group_size=2, num_groups=2, counts=(1,), key_sets=(0,), lengths=[100])
    with pytest.raises(ValueError, match="do not fit"):
        plan_decode_layer(**(request["plan"] | {"retrieval_counts": (3,)}), device="cpu")


def test_the_definition_runs_on_the_cpu():
    request = layer_request(group_size=2, num_groups=2, counts=(1,), key_sets=(0,), lengths=[100])
    assert choose_impl(plan_decode_layer(**request["plan"], device="cpu"), request["q_BHD"], top_p=0.9) == "reference"


@pytest.mark.parametrize(
    ("change", "faster"),
    [
        ({}, True),
        ({"capability": (8, 0)}, False),
        ({"dtype": torch.float32}, False),
        ({"batch": 8}, False),
        ({"batch": 8, "capacity": 1 << 15}, True),
        ({"batch": 64, "capacity": 1 << 15}, False),
        ({"batch": 64, "capacity": 1 << 12}, False),
    ],
)
def test_one_launch_is_chosen_only_where_it_was_measured_faster(change, faster):
    measured = {"capability": (9, 0), "dtype": torch.bfloat16, "batch": 1, "capacity": 1 << 20, "head_dim": 128}
    assert is_faster(**(measured | change)) == faster


@pytest.mark.parametrize(("capacity", "dtype"), [(4096, torch.float32), (1 << 17, torch.bfloat16)])
def test_the_programs_of_one_launch_fit_hopper_together(capacity, dtype):
    request = layer_request(
        group_size=8, num_groups=4, counts=(5,), key_sets=(0, 1, 2, 3, 4), lengths=[1], capacity=64, dim=128, dtype=dtype
    )
    plan = plan_decode_layer(**(request["plan"] | {"capacity": capacity}), device="cpu").fused
    assert plan is not None
    tensors = {name: request[name] for name in TENSORS} | {
        "index_k_BSIR": request["index_k_BSIR"].transpose(1, 2).contiguous().transpose(1, 2)
    }
    step = DecodeStep(
        **tensors, lengths_B=torch.tensor([1], dtype=torch.int32), scale=1.0, index_scale=1.0, top_p=0.9, out_BHD=request["q_BHD"]
    )
    ids, count = torch.zeros(1, 5, step.index[1].shape[1], dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)
    compiled = compile_for(describe(plan, step, 160, 4, ids, count, 0))
    programs = plan.programs // num_processors_of(torch.device("cpu"))
    # A program's registers, at most 255 a thread, and its shared memory, of which the system takes 1 KiB.
    assert programs * plan.num_warps * 32 * 255 <= 1 << 16
    assert programs * (compiled.metadata.shared + 1024) <= 228 << 10


def test_three_groups_of_key_sets_score_as_many_tiles_as_a_million_tokens_have(run):
    """2048 tiles: more than a table padded to four groups may be multiplied with in 32 bits by a careless bound."""
    generator = torch.Generator().manual_seed(0)
    key_sets, tokens = sorted([0, 1, 2] * 8), 2048 * 64
    q, k = torch.randn(1, 24, 4, generator=generator), torch.randn(1, tokens, 3, 4, generator=generator)
    maximum = run("scores", {"index_q": q, "index_k": k, "key_sets": key_sets})
    wanted = torch.einsum("bhr,bshr->bhs", q, k[:, :, key_sets]).unflatten(-1, (-1, 16)).amax(-1)
    torch.testing.assert_close(maximum, wanted)


@pytest.mark.parametrize("layer", ["groups of 8, one retained", "groups of 8, all heads of one", "groups of 4, differing counts"])
@pytest.mark.parametrize("lengths", [[64 * 17 + 5], [64 * 16, 0, 700]], ids=["one", "batch"])
def test_blocks_read_once_for_a_group_equal_fp64(run, layer, lengths):
    request = layer_request(**LAYERS[layer], lengths=lengths, impl="composed")
    request["plan"]["read_once"] = True
    assert_equals_fp64(run, request)


@pytest.mark.parametrize("index_dim", [4, 24])
@pytest.mark.parametrize("impl", ["composed", "fused"])
def test_narrow_index_keys_decode_as_in_fp64(run, impl, index_dim):
    request = layer_request(**LAYERS["groups of 4, differing counts"], lengths=[64 * 17, 700], impl=impl, index_dim=index_dim)
    assert_equals_fp64(run, request)


def test_every_program_has_one_role_and_one_turn(interpreted):
    shapes = [(264, 132), (132, 132), (16, 8), (396, 132), (528, 132), (8, 8)]
    cases = [
        (*shape, jobs, scorers, batch, num_local, units * num_local)
        for shape in shapes for jobs in (1, 5, 80, 136, 150, 700) for scorers in (1, shape[0] // 2, shape[0])
        for batch, num_local, units in ((1, 4, 513), (3, 4, 1026), (1, 0, 0), (1, 9, 0), (1, 3, 7))
    ]  # fmt: skip
    for case, found in zip(cases, interpreted("roles", {"cases": cases}), strict=True):
        programs, _, jobs, _, batch, num_local, _ = case
        selector, worker, turn = (row[:programs] for row in found[:3])
        selectors, workers, strands = found[3, :3].tolist()
        assert torch.equal(turn.sort().values, torch.arange(programs, dtype=torch.int32)), case
        assert torch.equal(worker[worker < workers].sort().values, torch.arange(workers, dtype=torch.int32)), case
        assert torch.equal(selector[selector >= 0].sort().values, torch.arange(min(selectors, programs), dtype=torch.int32)), case
        assert 1 <= strands <= workers <= programs, case
        assert selectors in (jobs, programs), case
        assert strands == 1 or (batch == 1 and strands == num_local), case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_one_plan_serves_smaller_batches_in_any_order():
    check_smaller_batches("fused", dim=32)


def check_smaller_batches(impl, *, dim):
    lengths, layer = [64 * 17 + 5, 64 * 16, 700], LAYERS["groups of 4, differing counts"]
    request = layer_request(**layer, lengths=lengths, impl=impl, dim=dim, dtype=torch.bfloat16, device="cuda")
    plan = plan_decode_layer(**request["plan"], device="cuda", cuda=impl == "cuda")
    first = {}
    for batch in [3, 1, 3, 2, 2, 1, 1, 3] * 4:
        step = {name: None if request[name] is None else request[name][:batch] for name in TENSORS}
        out, (ids, count) = decode_layer(
            **step, plan=plan, lengths_B=torch.tensor(lengths[:batch], dtype=torch.int32, device="cuda"), scale=request["scale"],
            index_scale=1.0, top_p=0.9, impl=impl,
        )  # fmt: skip
        listed = torch.where(torch.arange(ids.shape[2], device="cuda") < count[..., None], ids, -1)
        again, whole = first.setdefault(batch, (out, listed, count)), first[3]
        assert all(torch.equal(mine, before) for mine, before in zip((out, listed, count), again, strict=True))
        assert all(torch.equal(mine, all_[:batch]) for mine, all_ in zip((listed, count), whole[1:], strict=True))
        # How work is divided depends on the batch, and the order of sums with it.
        torch.testing.assert_close(out, whole[0][:batch], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    ("counts", "tokens", "once"),
    [
        ((8,), 1 << 20, True), ((8, 8), 1 << 20, True), ((8,), 1 << 19, False), ((5,), 1 << 21, False), ((8, 5), 1 << 21, False),
        ((), 1 << 21, False),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_are_read_once_where_a_group_shares_many(counts, tokens, once):
    assert reads_once(counts, 8, tokens) == once


def test_an_idle_sequence_of_one_launch_gives_zeros(run):
    request = layer_request(**LAYERS["groups of 8, one retained"], lengths=[0, 64 * 16 + 3], impl="fused")
    out = run("layer", request)["results"][0][0]
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()


@pytest.mark.parametrize("max_parts", [1, 2])
def test_parts_that_would_hold_too_many_blocks_are_refused(max_parts):
    with pytest.raises(ValueError, match=r"wanted at least 2 of at most 4096 blocks"):
        plan_fused(
            group_size=8, num_groups=1, retrieval_counts=(8,), key_sets=(0,) * 8, batch=1, capacity=1 << 20, head_dim=16, block_size=64,
            device=torch.device("cpu"), max_parts=max_parts,
        )  # fmt: skip


QWEN = {"group_size": 8, "num_groups": 4, "dim": 128, "window": 8192}


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["composed", "fused"])
@pytest.mark.parametrize(
    ("counts", "key_sets"), [((5,), (0, 1, 2, 3, 4)), ((2, 1, 1, 1), (0, 0, 1, 2, 3)), ((8,), (0,) * 8)], ids=["A", "B", "C"]
)
@pytest.mark.parametrize("lengths", [[1], [32768], [131071, 0, 9000]], ids=["1", "32K", "batch"])
def test_real_shapes_decode_as_well_as_eager_bf16_on_a_gpu(impl, counts, key_sets, lengths):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    check_on_gpu(impl, counts, key_sets, lengths)


def check_on_gpu(impl, counts, key_sets, lengths):
    """The same selection in both, then the error of attention against fp64 within twice that of eager bf16."""
    capacity = max(max(lengths), 8192)
    request = layer_request(
        **QWEN,
        counts=counts,
        key_sets=key_sets,
        lengths=lengths,
        capacity=capacity,
        dtype=torch.bfloat16,
        hot_share=0.05,
        impl=impl,
        device="cuda",
    )
    answer = run_layer(request, "cuda")
    active = [b for b, length in enumerate(lengths) if length > 0]
    (out, (_, count)), (out_again, _) = answer["results"]
    assert torch.equal(out[active], out_again[active])
    eager, _ = run_layer(with_precision(request, torch.bfloat16), "cuda")["results"][0]
    exact, (_, wanted) = run_layer(with_precision(request, torch.float64), "cuda")["results"][0]
    assert (count[active] - wanted[active]).abs().max() <= 1, (count, wanted)
    assert relative_error(out[active], exact[active]) <= error_bound(eager[active], exact[active])


if __name__ == "__main__":
    serve(OPERATIONS)
