"""The kernels in CUDA C++ on the CPU, by the compiler's own instructions instead of the GPU's, against the eager definition in fp64."""

# B batch  S cached tokens  H query heads  K kv heads  D head dim  I index-key sets  R index dim  N blocks
from dataclasses import replace

import pytest
import torch
from cpu_launch import COMPILER, on_cpu_plan, run_on_cpu
from test_decode_cuda import assert_scores_equal
from test_decode_layer import LAYERS, TENSORS, layer_request, run_layer, with_precision

from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.block_selection.cuda import describe as describe_selection
from rtpurbo.kernels.block_selection.cuda import plan_cuda_selection
from rtpurbo.kernels.decode_layer import DecodeStep
from rtpurbo.kernels.decode_layer.cuda import describe, plan_cuda
from rtpurbo.kernels.testing import error_bound, peaked_index, relative_error

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def decode(request, *, programs, launches=2, plan_batch=None, **macros):
    """Some launches with one plan; outputs poisoned, lists and counts of the last. macros: of tests/cuda_on_cpu."""
    facts = {name: value for name, value in request["plan"].items() if name not in ("window", "sinks", "dense")}
    facts["batch"] = plan_batch or facts["batch"]
    plan = on_cpu_plan(plan_cuda(**facts, device=torch.device("cpu"), programs=programs))
    B, H, N = len(request["lengths"]), plan.num_heads, plan.capacity_blocks
    outs = []
    for _ in range(launches):
        ids, count = torch.full((B, H, N), -7, dtype=torch.int32), torch.full((B, H), -7, dtype=torch.int32)
        step = DecodeStep(
            **{name: request[name] for name in TENSORS}, lengths_B=torch.tensor(request["lengths"], dtype=torch.int32),
            scale=request["scale"], index_scale=1.0, top_p=request["top_p"], out_BHD=torch.full_like(request["q_BHD"], float("nan")),
        )  # fmt: skip
        launch = describe(plan, step, request["plan"]["window"], request["plan"]["sinks"], ids, count)
        run_on_cpu(replace(launch, constants={**launch.constants, **macros}))
        outs.append((step.out_BHD, ids, count))
    assert all(torch.equal(mine, first) for mine, first in zip(outs[-1], outs[0], strict=True))
    return outs[-1]


def check(request, *, programs=16, plan_batch=None, **macros):
    out, ids, count = decode(request, programs=programs, plan_batch=plan_batch, **macros)
    lengths = request["lengths"]
    active, idle = [b for b, length in enumerate(lengths) if length > 0], [b for b, length in enumerate(lengths) if length == 0]
    eager, _ = run_layer(with_precision(request, request["q_BHD"].dtype))["results"][0]
    exact, (wanted_ids, wanted) = run_layer(with_precision(request, torch.float64))["results"][0]
    assert torch.equal(count, wanted)
    listed = torch.arange(ids.shape[2]) < count[..., None]
    assert torch.equal(ids[listed], wanted_ids[..., : ids.shape[2]][listed])
    assert (out[idle] == 0).all()
    assert relative_error(out[active], exact[active]) <= error_bound(eager[active], exact[active])
    return count[active]


@pytest.mark.parametrize(
    ("layer", "dim", "dtype"),
    [
        *((layer, 64, torch.bfloat16) for layer in LAYERS),
        *((f"groups of {layer}", 128, torch.float16) for layer in ("8, one retained", "3, all retained")),
    ],
    ids=str,
)
def test_a_layer_equals_fp64_and_keeps_a_twentieth_to_half_of_its_blocks(layer, dim, dtype):
    lengths = [64 * 17 + 1, 0, 1100] if layer == "groups of 1" else [64 * 17 + 1]
    request = layer_request(**LAYERS[layer], lengths=lengths, dim=dim, dtype=dtype)
    request["index_k_BSIR"] = request["index_k_BSIR"].to(torch.bfloat16)
    count = check(request, programs=20)
    blocks = torch.tensor([-(-length // 64) for length in lengths if length > 0])[:, None]
    assert ((count >= 0.05 * blocks) & (count <= 0.5 * blocks)).all(), count


@pytest.mark.parametrize(
    ("length", "sinks", "window"), [(1, 4, 160), (17, 4, 160), (164, 4, 160), (165, 4, 160), (700, 20, 161), (900, 0, 1000)]
)
def test_windows_at_their_edges_equal_fp64(length, sinks, window):
    layer = LAYERS["groups of 4, differing counts"]
    check(layer_request(**layer, lengths=[length], seed=length, sinks=sinks, window=window, dim=64, dtype=torch.bfloat16))


def test_every_lane_may_come_to_barriers():
    """As compute-sanitizer's racecheck needs it."""
    check(layer_request(**LAYERS["groups of 4, differing counts"], lengths=[64 * 17, 300], dim=64, dtype=torch.bfloat16), EVERY_LANE=1)


def test_few_programs_attend_to_many_steps():
    """More steps than warps and slots: keys take a slot several times, and lists several chunks of a program."""
    layer = {"group_size": 2, "num_groups": 2, "counts": (2,), "key_sets": (0, 0)}
    request = layer_request(**layer, lengths=[64 * 60 + 5], capacity=64 * 61, window=700, dim=64, dtype=torch.bfloat16, hot_share=0.3)
    check(request, programs=4)


def test_one_program_attends_to_a_window_of_more_steps_than_a_warp_places_at_once():
    """Fifteen warps read, and know where 32 of their steps lie; of 500 steps of 16 keys the last ones weigh most."""
    layer = {"group_size": 2, "num_groups": 2, "counts": (2,), "key_sets": (0, 0)}
    request = layer_request(**layer, lengths=[64 * 125 + 5], capacity=64 * 126, window=7990, dim=64, dtype=torch.bfloat16)
    request["ring_k_BWKD"][:, 16 * 495 :] = request["q_BHD"][:, 2:].mean(dim=1)[:, None, None]
    check(request, programs=3)


def test_a_warp_that_begins_last_in_a_program_that_only_merges_knows_its_launch():
    """Program 5 neither selects nor attends, and merges the two parts of a local head."""
    layer = {"group_size": 4, "num_groups": 2, "counts": (1,), "key_sets": (0,)}
    check(layer_request(**layer, lengths=[1100], window=400, dim=64, dtype=torch.bfloat16), programs=12, LATE_PROGRAM=5)


@pytest.mark.parametrize(("lengths", "plan_batch"), [([300, 0, 1100], 3), ([700], 3)], ids=["three of three", "one of three"])
def test_programs_that_select_and_attend_equal_fp64(lengths, plan_batch):
    """Fifteen heads for twenty programs: those that select attend for local heads too."""
    layer = LAYERS["groups of 8, one retained"]
    check(layer_request(**layer, lengths=lengths, dim=64, dtype=torch.bfloat16), programs=20, plan_batch=plan_batch)


@pytest.mark.parametrize("layer", ["groups of 8, one retained", "groups of 4, differing counts"])
def test_a_layer_with_fp8_index_keys_equals_fp64(layer):
    request = layer_request(**LAYERS[layer], lengths=[64 * 17 + 1, 700], dim=64, dtype=torch.bfloat16)
    request["index_k_BSIR"] = request["index_k_BSIR"].to(torch.float8_e4m3fn)
    check(request)


def test_heads_in_parts_equal_fp64():
    layer = {"group_size": 2, "num_groups": 1, "counts": (2,), "key_sets": (0, 1)}
    request = layer_request(**layer, lengths=[64 * 2100 + 3], capacity=64 * 2101, window=64, dim=64, dtype=torch.bfloat16, hot_share=0.05)
    check(request, programs=8)


def test_few_programs_with_many_parts_attend_to_all_local_heads():
    """A capacity of two parts on four programs: with one part fewer select, and they attend all the same."""
    layer = {"group_size": 2, "num_groups": 4, "counts": (2,), "key_sets": (0, 1)}
    check(layer_request(**layer, lengths=[300], capacity=64 * 2049, dim=64, dtype=torch.bfloat16), programs=4)


def select(q, k, lengths, key_sets, *, capacity, top_p=0.9, scale=1.0, launches=1, plan_batch=None, programs=None, **macros):
    """The plan, and ids and counts of the last of some launches with it. macros: of tests/cuda_on_cpu."""
    batch, heads = q.shape[:2]
    plan = plan_cuda_selection(
        key_sets, batch=plan_batch or batch, capacity=capacity, device=torch.device("cpu"), block_size=64, programs=programs
    )
    assert plan is not None
    plan = on_cpu_plan(plan)
    ids, count = torch.zeros(batch, heads, plan.capacity_blocks, dtype=torch.int32), torch.zeros(batch, heads, dtype=torch.int32)
    for _ in range(launches):
        launch = describe_selection(plan, q, k, torch.tensor(lengths, dtype=torch.int32), scale, top_p, 4, ids, count)
        run_on_cpu(replace(launch, constants={**launch.constants, **macros}))
    return plan, ids, count


def check_selection(q, k, lengths, key_sets, *, capacity, scale=1.0, **options):
    """Scores, ids and counts of the second of two launches with one plan equal the definition's; returns the plan and the counts."""
    # What lies beyond the last key may be anything.
    beyond = torch.arange(k.shape[1]) >= torch.tensor(lengths)[:, None]
    k = torch.empty_like(k).copy_(k.float().masked_fill(beyond[:, :, None, None], float("nan")))
    plan, ids, count = select(q, k, lengths, key_sets, capacity=capacity, scale=scale, launches=2, **options)
    assert_scores_equal(plan.scores_BHN4, q, k, key_sets, lengths, scale)
    wanted_ids, wanted = score_and_select(
        q, k, plan=plan_selection(key_sets, num_sets=k.shape[2], batch=q.shape[0], capacity=capacity, device="cpu"),
        lengths_B=torch.tensor(lengths, dtype=torch.int32), scale=scale, top_p=0.9, sinks=4,
    )  # fmt: skip
    assert torch.equal(count, wanted)
    listed = torch.arange(ids.shape[2]) < count[..., None]
    assert torch.equal(ids[listed], wanted_ids[..., : ids.shape[2]][listed])
    return plan, count


def test_top_p_of_1_selects_every_block():
    q, k = torch.ones(1, 1, 16), torch.zeros(1, 64 * 40, 1, 16, dtype=torch.bfloat16)
    k[0, 700] = 8
    _, ids, _ = select(q, k, [64 * 40], (0,), capacity=64 * 40, top_p=1.0)
    assert ids[0, 0].tolist() == list(range(40))


def test_a_key_that_is_no_number_costs_no_block_that_is_always_taken():
    q, k = peaked_index((0,), num_sets=1, batch=1, tokens=64 * 20, hot_share=0.1, dtype=torch.float32, seed=5, device="cpu")
    k = k.to(torch.bfloat16)
    k[0, 64 * 19 + 3] = float("nan")
    _, ids, count = select(q, k, [64 * 20], (0,), capacity=64 * 20)
    assert {0, 18, 19} <= set(ids[0, 0, : count[0, 0]].tolist())


@pytest.mark.parametrize("keys", ["peaked", "equal", "one hot"])
@pytest.mark.parametrize("tokens", [1, 65, 64 * 513 + 1])
def test_a_selection_alone_equals_its_definition(tokens, keys):
    key_sets = (0, 0, 1)
    q, k = peaked_index(key_sets, num_sets=2, batch=2, tokens=tokens, hot_share=0.05, dtype=torch.float32, seed=tokens, device="cpu")
    if keys != "peaked":
        k = torch.zeros_like(k)
    if keys == "one hot":
        k[:, tokens // 2] = 3 * q[:, [0, 2]]
    check_selection(q, k.to(torch.bfloat16), [tokens, max(1, tokens // 3)], key_sets, capacity=tokens)


def test_a_selection_in_parts_equals_its_definition():
    """Three parts of one head and one of the other sequence's, whose blocks are no multiple of 32."""
    tokens = 64 * 4201 + 1
    q, k = peaked_index((0,), num_sets=1, batch=2, tokens=tokens, hot_share=0.05, dtype=torch.float32, seed=1, device="cpu")
    plan, count = check_selection(q, k.to(torch.bfloat16), [tokens, 64 * 600 + 5], (0,), capacity=tokens, programs=8)
    assert plan.most_parts == 3
    assert (count > 20).all()


@pytest.mark.parametrize("plan_batch", [1, 2])
@pytest.mark.parametrize(("sets", "tokens"), [((0,), 100), ((0,), 64 * 40), ((0,), 64 * 300 + 7), ((0, 1), 64 * 70 + 1)], ids=str)
def test_programs_that_only_select_equal_its_definition(sets, tokens, plan_batch):
    """One program in 16 selects, whichever starts last: the last one of the grid comes first, and there is room for no more at a time than
    those that select. As many tokens as the plan's, and half of them; as many sequences, and half of them."""
    q, k = peaked_index(sets, num_sets=len(sets), batch=1, tokens=tokens, hot_share=0.05, dtype=torch.float32, seed=tokens, device="cpu")
    k, rows = k.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2), plan_batch * len(sets)
    for length in (tokens, max(1, tokens // 2)):
        plan, count = check_selection(q, k, [length], sets, capacity=tokens, plan_batch=plan_batch, programs=16 * rows, ROOM=rows)
        assert plan.selectors == rows
        assert plan.started.item() == 0
        assert tokens < 64 * 40 or (count < 0.5 * -(-length // 64)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8])
def test_heads_that_share_a_set_of_keys_stored_token_by_token_equal_the_definition(heads, dtype):
    """Two sets side by side in memory, one of them read by so many heads."""
    key_sets, tokens = (*[0] * heads, 1), 64 * 19 + 33
    q, k = peaked_index(key_sets, num_sets=2, batch=1, tokens=tokens, hot_share=0.1, dtype=torch.float32, seed=heads, device="cpu")
    _, count = check_selection(q, k.to(dtype), [tokens], key_sets, capacity=tokens)
    assert ((count > 0.05 * 20) & (count < 0.5 * 20)).all()


@pytest.mark.parametrize("tokens", [1, 17, 63, 65, 130, 64 * 40 - 15])
@pytest.mark.parametrize("heads", [1, 2, 3], ids=lambda heads: f"{heads} heads")
def test_fp8_keys_equal_the_definition_at_the_edges_of_blocks(tokens, heads):
    key_sets = (0,) * heads
    q, k = peaked_index(key_sets, num_sets=1, batch=2, tokens=tokens, hot_share=0.1, dtype=torch.float32, seed=tokens, device="cpu")
    k = k.to(torch.float8_e4m3fn).transpose(1, 2).contiguous().transpose(1, 2)
    check_selection(q, k, [tokens, max(1, tokens // 2)], key_sets, capacity=tokens)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8], ids=lambda heads: f"{heads} heads")
def test_queries_of_any_size_select_the_same_of_fp8_keys(size, heads):
    """Beside heads of ordinary size; f16 alone would hold neither."""
    key_sets, tokens = (0,) * heads, 64 * 20
    q, k = peaked_index(key_sets, num_sets=1, batch=1, tokens=tokens, hot_share=0.1, dtype=torch.float32, seed=3, device="cpu")
    q[:, ::2] *= size
    _, count = check_selection(q, k.to(torch.float8_e4m3fn), [tokens], key_sets, capacity=tokens, scale=1 / size)
    assert ((count[:, ::2] > 2) & (count[:, ::2] < 10)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_queries_in_bf16_equal_the_definition(dtype):
    key_sets, tokens = (0, 1, 1, 1), 64 * 17
    q, k = peaked_index(key_sets, num_sets=2, batch=1, tokens=tokens, hot_share=0.1, dtype=torch.float32, seed=3, device="cpu")
    check_selection(q.to(torch.bfloat16), k.to(dtype), [tokens], key_sets, capacity=tokens)
