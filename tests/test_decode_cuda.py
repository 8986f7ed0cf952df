"""The launches in CUDA C++: what they are compiled from and divided into here, their results on a GPU against fp64."""

# B batch  S cached tokens  H query heads  K kv heads  R index dim  N blocks
import ctypes
import re

import pytest
import torch
from test_decode_layer import LAYERS, QWEN, check_smaller_batches, layer_request, run_layer, with_precision

import rtpurbo.kernels.cuda as kernels_cuda
from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import cuda as selection_in_cuda
from rtpurbo.kernels.block_selection import plan_selection, score_and_select
from rtpurbo.kernels.block_selection.cuda import describe as describe_selection
from rtpurbo.kernels.block_selection.cuda import part_items_for, plan_cuda_selection, readers_of
from rtpurbo.kernels.cuda import SOURCES, CudaKernel, TileMaps, nvrtc_obstacle, packed
from rtpurbo.kernels.decode_layer import DecodeStep, choose_impl, decode_layer, plan_decode_layer
from rtpurbo.kernels.decode_layer.cuda import describe, is_faster, obstacle, plan_cuda, share_local_heads, static_obstacle
from rtpurbo.kernels.testing import error_bound, peaked_index, relative_error

needs_nvrtc = pytest.mark.skipif(nvrtc_obstacle() is not None, reason="needs NVRTC (the wheel nvidia-cuda-nvrtc)")
LAYER = {
    "group_size": 8, "num_groups": 4, "retrieval_counts": (5,), "key_sets": (0, 1, 2, 3, 4), "batch": 1, "capacity": 1 << 17,
    "head_dim": 128, "block_size": 64,
}  # fmt: skip


def launches():
    """A launch of either kernel, described without a GPU."""
    plan = plan_cuda(**LAYER, device=torch.device("cpu"), programs=132)
    cache, index_k = torch.zeros(1, 256, 1, 128, dtype=torch.bfloat16), torch.zeros(1, 256, 5, 16, dtype=torch.bfloat16)
    ring, q = torch.zeros(1, 164, 3, 128, dtype=torch.bfloat16), torch.zeros(1, 32, 128, dtype=torch.bfloat16)
    lengths, index_q = torch.tensor([256], dtype=torch.int32), torch.zeros(1, 5, 16)
    ids, count = torch.zeros(1, 5, 4, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32)
    step = DecodeStep(
        q_BHD=q, index_q_BHR=index_q, lengths_B=lengths, k_BSKD=cache, v_BSKD=cache, index_k_BSIR=index_k, ring_k_BWKD=ring,
        ring_v_BWKD=ring, scale=1.0, index_scale=1.0, top_p=0.9, out_BHD=q,
    )  # fmt: skip
    selection = plan_cuda_selection((0, 1, 2, 3, 4), batch=1, capacity=256, device=torch.device("cpu"), block_size=64)
    assert selection is not None
    return [describe(plan, step, 160, 4, ids, count), describe_selection(selection, index_q, index_k, lengths, 1.0, 0.9, 4, ids, count)]


@needs_nvrtc
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    "change",
    [{}, {"HEAD_DIM": 64, "HALF_FLOAT": 1, "PART_ITEMS": 8, "INDEX_QUERY": "half_bits", "STAMPS": 1}, {"KEY_BITS": 8, "KEY_STRIDE": 16}],
    ids=str,
)
def test_both_kernels_compile(change, capability):
    for launch in launches():
        image = launch.kernel.compile(launch.constants | change, capability)
        assert image[:4] == b"\x7fELF"
        assert launch.kernel.name.encode() in image


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_again_where_its_file_was_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants, compiled = (("TOP_P", 0.875),), []
    compile_now = kernels_cuda._compile
    monkeypatch.setattr(kernels_cuda, "_compile", lambda *arguments: compiled.append(arguments[0]) or compile_now(*arguments))
    build = kernels_cuda._compiled.__wrapped__
    image = build("score_and_select", constants, 90)
    assert build("score_and_select", constants, 90) == image
    assert compiled == ["score_and_select"]
    (kept,) = tmp_path.rglob("*.cubin")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert build("score_and_select", constants, 90) == image
    build("score_and_select", (("TOP_P", 0.5),), 90)
    assert compiled == ["score_and_select"] * 3


@needs_nvrtc
def test_macros_for_debugging_are_other_kernels_and_never_the_launchs_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = CudaKernel("decode_layer", 0), launches()[0].constants
    plain = kernel.compile(constants, 90)
    monkeypatch.setenv("RTPURBO_CUDA_MACROS", "EVERY_LANE=1")
    assert kernel.compile(constants, 90) != plain
    for wrong in ("STAMPS=1", "EVERY_LANE"):
        monkeypatch.setenv("RTPURBO_CUDA_MACROS", wrong)
        with pytest.raises(ValueError, match=f"RTPURBO_CUDA_MACROS: '{wrong}' is not NAME=VALUE of a macro that no launch sets"):
            kernel.compile(constants, 90)


@needs_nvrtc
def test_what_does_not_compile_is_said_in_one_sentence():
    with pytest.raises(ValueError, match=r"score_and_select.cu does not compile for capability 90: .*nonsense"):
        CudaKernel("score_and_select", 0).compile({"TOP_P": "nonsense"}, 90)


def test_arguments_are_those_of_the_source():
    """As many, and of the kinds, that the source declares."""
    kinds = {ctypes.c_void_p: "*", ctypes.c_int32: "int", ctypes.c_int64: "long", ctypes.c_float: "float"}
    for launch in launches():
        source = re.sub(r"//[^\n]*", "", (SOURCES / f"{launch.kernel.name}.cu").read_text())
        declared = re.search(r"__launch_bounds__\(THREADS, 1\) \w+\((.*?)\)\s*\{", source, re.DOTALL)
        assert declared is not None
        parameters = [parameter.strip() for parameter in declared.group(1).split(",")]
        assert len(parameters) == len(launch.arguments)
        for parameter, value in zip(parameters, launch.arguments, strict=True):
            if isinstance(value, TileMaps):
                assert "__grid_constant__ TensorMaps" in parameter
            elif kinds[type(packed(value))] == "*":
                assert "*" in parameter, parameter
            else:
                assert parameter.split()[0] == kinds[type(packed(value))], parameter


def test_heads_that_read_one_set_are_scored_by_eights():
    assert readers_of((0, 0, 1, 2, 2, 2)) == [(0, 0, 2, 0), (1, 2, 1, 0), (2, 3, 3, 0)]
    assert readers_of((0,) * 11) == [(0, 0, 8, 0), (0, 8, 3, 0)]


@pytest.mark.parametrize(
    ("rows", "blocks", "items"), [(5, 2048, 4), (8, 16384, 4), (8, 32768, 4), (16, 32768, 8), (40, 32768, None), (400, 2048, 4)]
)
def test_parts_of_all_heads_are_selected_at_once(rows, blocks, items):
    assert part_items_for(rows, blocks, 132) == items


@pytest.mark.parametrize(("batch", "counts", "group_size"), [(1, (5, 0, 0, 0), 8), (8, (2, 1, 1, 1), 4), (3, (8, 0), 8), (2, (4, 4), 4)])
@pytest.mark.parametrize("selectors", [5, 40, 100])
def test_every_place_of_the_local_heads_has_one_program(batch, counts, group_size, selectors):
    jobs = [(b, group) for b in range(batch) for group, count in enumerate(counts) if count < group_size]
    shares, places = share_local_heads(jobs, counts, selectors, 132)
    mine = [share for share in shares if share[0] < batch]
    assert len(shares) == 132
    assert sorted((share[5], share[3]) for share in mine) == [(job, place) for job in range(len(jobs)) for place in range(places)]
    assert all((share[0], share[1]) == jobs[share[5]] and share[2] == counts[share[1]] and share[4] == places for share in mine)
    apart = selectors * 3 <= 132 * 2 and 132 - selectors >= len(jobs)
    if apart:
        assert all(share[0] >= batch for share in shares[:selectors])
    assert places == (0 if not jobs else (132 - selectors if apart else 132) // len(jobs))


@pytest.mark.parametrize(
    ("change", "programs"),
    [
        ({"group_size": 2, "retrieval_counts": (2,), "key_sets": (0, 1), "capacity": 64 * 2049}, 4),
        ({"group_size": 4, "num_groups": 8, "retrieval_counts": (4,), "key_sets": (0, 0, 1, 1), "batch": 16, "capacity": 200_000}, 132),
        ({"num_groups": 8, "batch": 8, "capacity": 300_000}, 132),
    ],
    ids=str,
)
def test_every_job_has_a_place_whatever_the_number_of_parts(change, programs):
    layer = LAYER | change
    assert static_obstacle(**layer, programs=programs) is None
    assert plan_cuda(**layer, device=torch.device("cpu"), programs=programs).places_P.min() >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"head_dim": 96}, "heads of 96 in groups of 8"),
        ({"block_size": 128}, "blocks of 128"),
        ({"group_size": 16}, "groups of 16"),
        ({"key_sets": (1, 0, 2, 3, 4)}, "do not ascend"),
        ({"batch": 13}, "65 heads of all sequences"),
        ({"batch": 10, "capacity": 1 << 21}, "too many for 132 programs"),
        ({"batch": 12, "num_groups": 32}, "384 KV groups of all sequences have local heads"),
    ],
    ids=str,
)
def test_layers_that_do_not_suit_are_named(change, message):
    found = static_obstacle(**(LAYER | change), programs=132)
    assert (found is None) if message is None else message in found
    if message is not None and "batch" not in change:
        with pytest.raises(ValueError, match=re.escape(message)):
            plan_cuda(**(LAYER | change), device=torch.device("cpu"), programs=132)


def test_it_is_chosen_only_where_it_was_measured_faster():
    assert is_faster((9, 0), 1, 1 << 15)
    assert is_faster((9, 0), 1, (1 << 20) + 256)
    assert not is_faster((9, 0), 1, 1 << 14)
    assert not is_faster((9, 0), 1, 1 << 21)
    assert is_faster((9, 0), 2, 1 << 13)
    assert is_faster((9, 0), 4, 1 << 18)
    assert not is_faster((9, 0), 4, 1 << 12)
    assert not is_faster((9, 0), 5, 1 << 15)
    assert not is_faster((9, 0), 4, 1 << 19)
    assert not is_faster((9, 0), 8, 1 << 17)
    assert not is_faster((12, 0), 1, 1 << 17)


@pytest.mark.parametrize(("batch", "faster"), [(1, True), (16, True), (17, False)])
def test_a_selection_alone_is_chosen_only_where_it_was_measured_faster(batch, faster):
    index_k = torch.zeros(batch, 2, 64, 16).transpose(1, 2)
    assert selection_in_cuda.is_faster((9, 0), batch, index_k, 0.9) == faster
    assert not selection_in_cuda.is_faster((9, 0), batch, index_k, 1.0)
    assert not selection_in_cuda.is_faster((12, 0), batch, index_k, 0.9)
    assert not selection_in_cuda.is_faster((9, 0), batch, torch.zeros(batch, 64, 2, 16), 0.9)


def test_tensors_that_do_not_suit_are_named():
    plan = plan_cuda(**LAYER, device=torch.device("cpu"), programs=132)
    q, index_q, index_k = (
        torch.zeros(1, 32, 128, dtype=torch.bfloat16),
        torch.zeros(1, 5, 16),
        torch.zeros(1, 64, 5, 16, dtype=torch.bfloat16),
    )
    cache = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16)

    def found(*, q=q, out=q, index_k=index_k, cache=cache, capability=(9, 0)):
        return obstacle(plan, capability, q, out, index_q, index_k, (cache, cache, None, None)) or ""

    assert found() in ("", nvrtc_obstacle())
    assert "compute capability 9.0 or later, found 8.6" in found(capability=(8, 6))
    assert "out holds torch.float32, and q torch.bfloat16" in found(out=q.float())
    assert "a cache holds torch.float16, and q torch.bfloat16" in found(cache=cache.half())
    assert "heads in 16 bits, found torch.float32" in found(q=q.float())
    assert "less than 16777216 bytes apart" in found(index_k=index_k.as_strided((1, 1, 5, 16), (1 << 25, 1 << 23, 16, 1)))
    assert "16 index dimensions in bf16 or fp8 e4m3, found 16 of torch.float32" in found(index_k=index_k.float())
    assert "out needs a contiguous last axis and other strides in multiples of 4 bytes" in found(
        out=torch.zeros(1, 32 * 128 + 1, dtype=torch.bfloat16)[:, 1:].view(1, 32, 128)
    )
    assert "a cache needs a contiguous last axis" in found(cache=cache.transpose(1, 3).contiguous().transpose(1, 3))


def test_a_cpu_is_refused():
    plan = plan_decode_layer(**(LAYER | {"capacity": 256}), window=160, sinks=4, device="cpu")
    with pytest.raises(ValueError, match=r"needs tensors on an NVIDIA GPU|impl 'cuda' cannot run"):
        choose_impl(plan, torch.zeros(1, 32, 128), top_p=0.9, impl="cuda")


def gpu(capability=(9, 0)):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < capability:
        pytest.skip("needs an NVIDIA GPU of compute capability 9.0 or later")


def poison(plan):
    """Not a number wherever a record has no launch's number yet."""
    for records in (plan.scores_BHN4, plan.parts_L, plan.local_parts_L, plan.tops_L, plan.histograms_L):
        records[..., :3] = float("nan")


def assert_scores_equal(records_BHN4, q_BHR, k_BSIR, key_sets, lengths, scale):
    """A launch's records of the blocks that have a key: the definition's maxima and sums."""
    key_set_H, visible_B1 = torch.tensor(key_sets, device=q_BHR.device), torch.tensor(lengths, device=q_BHR.device)[:, None]
    wanted = block_scores(q_BHR[:, None], k_BSIR, key_set_H=key_set_H, visible_BT=visible_B1, scale=scale)
    for b, length in enumerate(lengths):
        for n in range(2):
            mine, other = records_BHN4[b, :, : -(-length // 64), n], wanted[n][b, :, 0, : -(-length // 64)]
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def check(request, *, again=3):
    """The selection of the definition (a block at a bin's edge apart), and the error of attention within twice that of eager 16 bits."""
    gpu()
    lengths = torch.tensor(request["lengths"], dtype=torch.int32, device="cuda")
    tensors = {name: request[name] for name in request if name.endswith(("BHD", "BHR", "BSKD", "BSIR", "BWKD"))}
    plan = plan_decode_layer(**request["plan"], device="cuda", cuda=True)
    assert plan.cuda is not None
    poison(plan.cuda)
    outs = []
    for _ in range(again):
        out = torch.full_like(request["q_BHD"], float("nan"))
        _, selection = decode_layer(
            **tensors,
            plan=plan,
            lengths_B=lengths,
            scale=request["scale"],
            index_scale=1.0,
            top_p=request["top_p"],
            out_BHD=out,
            impl="cuda",
        )
        assert selection is not None
        outs.append((out, *selection))
    out, ids, count = outs[0]
    for other in outs[1:]:
        assert torch.equal(out, other[0])
        assert torch.equal(count, other[2])
    active = [b for b, length in enumerate(request["lengths"]) if length > 0]
    idle = [b for b, length in enumerate(request["lengths"]) if length == 0]
    assert (out[idle] == 0).all()
    dtype = request["q_BHD"].dtype
    eager, _ = run_layer(with_precision(request, dtype), "cuda")["results"][0]
    exact, (wanted_ids, wanted) = run_layer(with_precision(request, torch.float64), "cuda")["results"][0]
    count = count.cpu()
    assert (count - wanted)[active].abs().max() <= 1, (count, wanted)
    for b, h in [(b, h) for b in active for h in range(count.shape[1]) if count[b, h] == wanted[b, h]]:
        assert torch.equal(ids[b, h, : count[b, h]].cpu(), wanted_ids[b, h, : count[b, h]])
    assert relative_error(out.cpu()[active], exact[active]) <= error_bound(eager[active], exact[active])
    return count[active]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("lengths", [[64 * 17 + 1], [64 * 16, 1100, 0, 64 * 18]], ids=["one", "batch"])
def test_layers_equal_fp64_and_keep_a_twentieth_to_half_of_their_blocks(layer, dim, dtype, lengths):
    gpu()
    request = layer_request(**LAYERS[layer], lengths=lengths, dim=dim, dtype=dtype, device="cuda")
    request["index_k_BSIR"] = request["index_k_BSIR"].to(torch.bfloat16)
    count = check(request)
    blocks = torch.tensor([-(-length // 64) for length in lengths if length > 0])[:, None]
    assert ((count >= 0.05 * blocks) & (count <= 0.5 * blocks)).all(), count


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("lengths", [[64 * 17 + 1], [64 * 16, 1100, 0, 64 * 18]], ids=["one", "batch"])
def test_layers_with_fp8_index_keys_equal_fp64(layer, lengths):
    gpu()
    request = layer_request(**LAYERS[layer], lengths=lengths, dim=128, dtype=torch.bfloat16, device="cuda")
    request["index_k_BSIR"] = request["index_k_BSIR"].to(torch.float8_e4m3fn)
    check(request)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
def test_queries_of_any_size_select_the_same(heads, dtype, size):
    """Every second head's, beside a set of one head; stored token by token. Block scores, too, equal their definition."""
    gpu()
    key_sets, tokens = (*[0] * heads, 1), 64 * 300 + 33
    q, k = peaked_index(key_sets, num_sets=2, batch=1, tokens=tokens, hot_share=0.1, dtype=torch.float32, seed=heads, device="cuda")
    plan = plan_selection(key_sets, num_sets=2, batch=1, capacity=tokens, device="cuda", cuda=True)
    options = {"plan": plan, "lengths_B": torch.tensor([tokens], dtype=torch.int32, device="cuda"), "top_p": 0.9, "sinks": 4}
    k = k.to(getattr(torch, dtype))
    q[:, ::2] *= size
    ids, count = score_and_select(q, k, **options, scale=1 / size, impl="cuda")
    wanted_ids, wanted = score_and_select(q, k, **options, scale=1 / size, impl="reference")
    assert plan.cuda is not None
    assert_scores_equal(plan.cuda.scores_BHN4, q, k, key_sets, [tokens], 1 / size)
    assert (count - wanted).abs().max() <= 1
    assert ((count[:, ::2] > 0.05 * 301) & (count[:, ::2] < 0.5 * 301)).all()
    for h in [h for h in range(heads + 1) if count[0, h] == wanted[0, h]]:
        assert torch.equal(ids[0, h, : count[0, h]], wanted_ids[0, h, : count[0, h]])


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 163, 164, 165, 700])
def test_short_sequences_and_windows_at_their_edges_equal_fp64(length):
    gpu()
    check(layer_request(
        **LAYERS["groups of 4, differing counts"], lengths=[length, 300], seed=length, dim=64, dtype=torch.bfloat16, device="cuda"
    ))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("sinks", "window"), [(0, 1000), (0, 100), (16, 160), (20, 161), (64, 64)])
def test_sinks_and_windows_of_any_size_equal_fp64(sinks, window):
    gpu()
    layer = LAYERS["groups of 4, differing counts"]
    check(layer_request(**layer, lengths=[900, 64 * 18], sinks=sinks, window=window, dim=128, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [64 * 511, 64 * 512 + 1, 64 * 2048, 64 * 2048 + 1, 64 * 5000 + 33])
@pytest.mark.parametrize("counts", [(5,), (8,)], ids=str)
def test_selections_of_one_program_and_in_parts_equal_fp64(tokens, counts):
    gpu()
    sets = (0, 1, 2, 3, 4) if counts == (5,) else (0,) * 8
    check(layer_request(
        group_size=8, num_groups=2, counts=counts, key_sets=sets, lengths=[tokens], capacity=64 * 5002, dim=64, window=256,
        dtype=torch.bfloat16, hot_share=0.05, device="cuda",
    ))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "key_sets"), [((5,), (0, 1, 2, 3, 4)), ((2, 1, 1, 1), (0, 0, 1, 2, 3)), ((8,), (0,) * 8)], ids=["A", "B", "C"]
)
@pytest.mark.parametrize("lengths", [[1], [32768], [131071, 0, 9000]], ids=["1", "32K", "batch"])
def test_real_shapes_equal_fp64(counts, key_sets, lengths):
    gpu()
    capacity = max(*lengths, 8192)
    check(layer_request(
        **QWEN, counts=counts, key_sets=key_sets, lengths=lengths, capacity=capacity, dtype=torch.bfloat16, hot_share=0.05, device="cuda"
    ))  # fmt: skip


@pytest.mark.gpu
def test_one_plan_serves_smaller_batches_in_any_order():
    gpu()
    check_smaller_batches("cuda", dim=64)


@pytest.mark.gpu
def test_launches_on_two_streams_wait_for_each_other():
    """All programs of a launch run at once or none: neither of two launches may hold what the other waits for."""
    gpu()
    requests = [layer_request(**QWEN, counts=(5,), key_sets=(0, 1, 2, 3, 4), lengths=[20000 + n], capacity=20480, dtype=torch.bfloat16,
                              hot_share=0.05, seed=n, device="cuda") for n in range(2)]  # fmt: skip
    plans = [plan_decode_layer(**request["plan"], device="cuda", cuda=True) for request in requests]
    streams, results = [torch.cuda.Stream() for _ in requests], [[], []]
    torch.cuda.synchronize()
    for _ in range(40):
        for request, plan, stream, outs in zip(requests, plans, streams, results, strict=True):
            tensors = {name: request[name] for name in request if name.endswith(("BHD", "BHR", "BSKD", "BSIR", "BWKD"))}
            with torch.cuda.stream(stream):
                lengths = torch.tensor(request["lengths"], dtype=torch.int32, device="cuda")
                outs.append(decode_layer(**tensors, plan=plan, lengths_B=lengths, scale=0.1, index_scale=1.0, top_p=0.9, impl="cuda")[0])
    torch.cuda.synchronize()
    for outs in results:
        assert outs[0].isfinite().all()
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
def test_selections_on_two_streams_do_not_wait_for_each_other():
    """Programs that only select wait for programs that started before them: launches may share the GPU in any way."""
    gpu()
    key_sets, streams, results, calls = (0, 1, 2, 3, 4), [torch.cuda.Stream() for _ in range(2)], [[], []], []
    for n in range(2):
        tokens = 131072 - 1000 * n
        q, k = peaked_index(key_sets, num_sets=5, batch=1, tokens=tokens, hot_share=0.05, dtype=torch.float32, seed=n, device="cuda")
        k = k.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
        plan = plan_selection(key_sets, num_sets=5, batch=1, capacity=131072, device="cuda", cuda=True)
        assert plan.cuda is not None
        assert plan.cuda.selectors == 5
        calls.append({"plan": plan, "lengths_B": torch.tensor([tokens], dtype=torch.int32, device="cuda"), "q": q, "k": k})

    def select(call, impl):
        options = {name: call[name] for name in ("plan", "lengths_B")}
        return score_and_select(call["q"], call["k"], **options, scale=1.0, top_p=0.9, sinks=4, impl=impl)

    wanted = [select(call, "triton")[1] for call in calls]
    torch.cuda.synchronize()
    for _ in range(100):
        for call, stream, outs in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                outs.append(select(call, "cuda"))
    torch.cuda.synchronize()
    for outs, count in zip(results, wanted, strict=True):
        assert (outs[0][1] - count).abs().max() <= 1
        assert all(torch.equal(other[1], outs[0][1]) for other in outs)
        for h in range(5):
            assert all(torch.equal(other[0][0, h, : other[1][0, h]], outs[0][0][0, h, : outs[0][1][0, h]]) for other in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000, 64 * 512, 64 * 2048 + 5, 1 << 20])
@pytest.mark.parametrize("keys", ["peaked", "equal", "one hot"])
@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (1, "float8_e4m3fn")])
def test_a_selection_alone_holds_its_guarantee(tokens, keys, batch, dtype):
    """Against the definition on the same keys; equal keys fill one bin, one hot key leaves the rest empty. Of one sequence up to 128K
    tokens the last programs only select."""
    gpu()
    key_sets, lengths = (0, 0, 1, 1, 1, 2), [tokens, max(1, tokens // 3)][:batch]
    q, k = peaked_index(key_sets, num_sets=3, batch=batch, tokens=tokens, hot_share=0.05, dtype=torch.float32, seed=tokens, device="cuda")
    if keys != "peaked":
        k = torch.zeros_like(k)
    if keys == "one hot":
        k[:, tokens // 2] = 3 * q[:, [0, 2, 5]]
    k = k.to(getattr(torch, dtype))
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    plan = plan_selection(key_sets, num_sets=3, batch=batch, capacity=max(tokens, 64), device="cuda", cuda=True)
    results = {}
    for impl in ("cuda", "cuda", "triton", "reference"):
        ids, count = score_and_select(q, k, plan=plan, lengths_B=lengths_B, scale=1.0, top_p=0.9, sinks=4, impl=impl)
        listed = torch.arange(ids.shape[2], device="cuda") < count[..., None]
        assert (ids[..., 1:] > ids[..., :-1])[listed[..., 1:]].all()
        if impl in results:
            assert torch.equal(count, results[impl][1])
        results[impl] = torch.where(listed, ids, -1), count
    assert torch.equal(results["cuda"][0], results["triton"][0][..., : results["cuda"][0].shape[2]])
    assert (results["cuda"][1] - results["reference"][1]).abs().max() <= 1
