"""rope_append, add_norm, norm_linear and gated_silu in Triton against loops in fp64; on a CPU through Triton's interpreter."""

# B batch  T chunk tokens  M (H + 2 K) D  H query heads  K kv heads  D head dim  S cached tokens  W ring slots
# P retrieval heads  I index-key sets  R index dim  C hidden
import pytest
import torch
from interpreter_process import interpreting, serve

from rtpurbo.kernels.append import plan_append, rope_append
from rtpurbo.kernels.gated_silu import gated_silu
from rtpurbo.kernels.norm import add_norm
from rtpurbo.kernels.norm_linear import choose_impl, linear, norm_linear

pytest.importorskip("triton")


def run_append(request, device="cpu"):
    """All tensors that the call may write, and its returns."""
    tensors = {name: None if x is None else x.to(device) for name, x in request["tensors"].items()}
    index_k = request["index_k"].to(device)
    plan = plan_append(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in request["plan"].items()}, device=device)
    # Index keys lie set by set in memory.
    stored = index_k.transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v, index_q = rope_append(
        plan=plan, index_k_BSIR=stored if plan.index_k_IRD is not None else None, impl=request["impl"], **tensors, **request["options"]
    )
    written = {name: x for name, x in tensors.items() if name[:2] in ("k_", "v_", "ri") and x is not None}
    answer = {"q": q, "k": k, "v": v, "index_k": stored, **written}
    return {name: x.cpu() for name, x in answer.items()} | {"index_q": None if index_q is None else index_q.cpu()}


def run_separate(request, device="cpu"):
    """What the launch writes into poisoned tensors of its own: the rotated heads and the index queries."""
    from rtpurbo.kernels.append import kernel

    tensors = {name: None if x is None else x.to(device) for name, x in request["tensors"].items()}
    plan = plan_append(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in request["plan"].items()}, device=device)
    qkv, options = tensors["qkv_BTM"], request["options"]
    out = torch.full_like(qkv, float("nan"))
    index_q = torch.full((*qkv.shape[:2], *request["plan"]["index_q_PRD"].shape[:2]), float("nan"), device=device)
    stores = [tensors.get(name) for name in ("k_BSKD", "v_BSKD")], [tensors.get(name) for name in ("ring_k_BWKD", "ring_v_BWKD")]
    inputs = [tensors[name] for name in ("cos_SE", "sin_SE", "lengths_B", "counts_B")]
    kernel.describe(
        qkv, plan, *inputs, *stores[0], request["index_k"].to(device), *stores[1], options["window"], options["sinks"], index_q, out,
        early_launch=False,
    ).run()  # fmt: skip
    H, K, D = request["plan"]["num_heads"], request["plan"]["num_groups"], request["plan"]["head_dim"]
    q, k, v = out.unflatten(2, (-1, D)).split((H, K, K), dim=2)
    return {"q": q.cpu(), "k": k.cpu(), "v": v.cpu(), "index_q": index_q.cpu()}


def run_norm(request, device="cpu"):
    residual = None if request["residual"] is None else request["residual"].to(device)
    out, residual = add_norm(request["x"].to(device), request["weight"].to(device), 1e-6, residual_TC=residual, impl=request["impl"])
    return {"out": out.cpu(), "residual": residual.cpu()}


def run_linear(request, device="cpu"):
    x, weight, bias, norm, residual = (None if t is None else t.to(device) for t in request["tensors"])
    if norm is None:
        return {"out": linear(x, weight, bias, impl=request["impl"]).cpu()}
    out, total, normed = norm_linear(x, norm, 1e-6, weight, bias, residual_TC=residual, impl=request["impl"])
    return {"out": out.cpu(), "sum": total.cpu(), "normed": normed.cpu()}


def run_silu(request, device="cpu"):
    return {"out": gated_silu(request["x"].to(device), impl=request["impl"]).cpu()}


OPERATIONS = {"append": run_append, "separate": run_separate, "norm": run_norm, "silu": run_silu, "linear": run_linear}


@pytest.fixture(scope="module")
def interpreted():
    with interpreting(__file__) as call:
        yield lambda operation, request: call(operation, request | {"impl": "triton"})


@pytest.fixture(params=["reference", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request):
    if request.param == "reference":
        return lambda operation, message: OPERATIONS[operation](message | {"impl": "reference"})
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        return lambda operation, message: OPERATIONS[operation](message | {"impl": "triton"}, "cuda")
    return request.getfixturevalue("interpreted")


CASES = {
    "decode, rings and cache": {"lengths": [37], "T": 1, "heads": [0, 1, 4], "sets": [0, 0, 1]},
    "decode of several sequences, one inactive": {"lengths": [3, 40, 11], "counts": [1, 0, 1], "T": 1, "heads": [1], "sets": [0]},
    "decode at every border of sinks and window": {"lengths": [0, 3, 4, 5, 12, 13, 20], "T": 1, "retained": 0},
    "chunk, written to the cache only": {"lengths": [5, 0], "counts": [19, 7], "T": 19, "heads": [0, 5], "sets": [0, 1], "ring": False},
    "chunk over several tiles": {"lengths": [11], "T": 67, "heads": [0, 1, 2, 3], "sets": [0, 0], "ring": False, "norms": False},
    "chunk longer than the ring": {"lengths": [7], "T": 33, "retained": 0},
    "all groups retained, shared keys": {"lengths": [9], "T": 1, "K": 3, "retained": 3, "heads": [0, 1, 2, 3, 4, 5], "sets": [0, 1, 2]},
    "head dim 12, group of 1": {"lengths": [6], "T": 2, "H": 2, "K": 2, "D": 12, "heads": [0], "sets": [0], "R": 5},
    "empty sequence": {"lengths": [0], "T": 1, "heads": [2], "sets": [0], "norms": False},
}


def make_append(case, dtype, seed=0):
    H, K, D, R = case.get("H", 6), case.get("K", 2), case.get("D", 16), case.get("R", 16)
    heads, sets, retained = case.get("heads", []), case.get("sets", []), case.get("retained", 1)
    B, T, window, sinks = len(case["lengths"]), case["T"], 9, 4
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens = max(case["lengths"]) + T
    angles = torch.outer(torch.arange(tokens).double(), 10000.0 ** -(torch.arange(D // 2).double() * 2 / D))
    cache = {"k_BSKD": random(B, tokens, retained, D), "v_BSKD": random(B, tokens, retained, D)}
    ring = {f"ring_{x}_BWKD": random(B, sinks + window, K - retained, D) for x in "kv"}
    tensors = {
        "qkv_BTM": random(B, T, (H + 2 * K) * D),
        "cos_SE": (1.25 * angles.cos()).to(dtype),
        "sin_SE": (1.25 * angles.sin()).to(dtype),
        "lengths_B": torch.tensor(case["lengths"], dtype=torch.int32),
        "counts_B": torch.tensor(case.get("counts", [T] * B), dtype=torch.int32),
        **(cache if retained else {}),
        **(ring if retained < K and case.get("ring", True) else {}),
    }
    plan = {"num_heads": H, "num_groups": K, "head_dim": D, "eps": 1e-6, "retrieval_heads": heads, "key_groups": sets}
    if case.get("norms", True):
        plan |= {"q_norm_D": random(D), "k_norm_D": random(D)}
    if heads:
        plan |= {"index_q_PRD": random(len(heads), R, D, dtype=torch.float32)}
        plan |= {"index_k_IRD": random(len(sets), R, D, dtype=torch.float32)}
    options = {"window": window, "sinks": sinks, "index_queries": bool(heads)}
    return {"tensors": tensors, "plan": plan, "options": options, "index_k": random(B, tokens, max(1, len(sets)), R)}


def by_loops(request):
    """The wanted state of every tensor, token by token in fp64; NaN where anything may stand."""
    tensors, plan, options = request["tensors"], request["plan"], request["options"]
    H, K, D = plan["num_heads"], plan["num_groups"], plan["head_dim"]
    x = tensors["qkv_BTM"].double().unflatten(2, (-1, D))
    B, T = x.shape[:2]
    want = {name: t.double().clone() for name, t in tensors.items() if name[:2] in ("k_", "v_", "ri")}
    want |= {"q": x[:, :, :H] * torch.nan, "k": x[:, :, H : H + K] * torch.nan, "v": x[:, :, H + K :] * torch.nan}
    want["index_k"] = request["index_k"].double().clone()
    if options["index_queries"]:
        want["index_q"] = torch.full((B, T, *plan["index_q_PRD"].shape[:2]), torch.nan, dtype=torch.float64)
    retained = want["k_BSKD"].shape[2] if "k_BSKD" in want else 0
    for b in range(B):
        start, count = int(tensors["lengths_B"][b]), int(tensors["counts_B"][b])
        for t in range(count):
            position = start + t
            turn = torch.complex(tensors["cos_SE"][position].double(), tensors["sin_SE"][position].double())
            for h in range(H + K):
                y = x[b, t, h]
                if "q_norm_D" in plan:
                    y = y / (y.square().mean() + plan["eps"]).sqrt() * plan["q_norm_D" if h < H else "k_norm_D"].double()
                if h in plan["retrieval_heads"] and options["index_queries"]:
                    place = plan["retrieval_heads"].index(h)
                    want["index_q"][b, t, place] = plan["index_q_PRD"][place].double() @ y
                for i, group in enumerate(plan["key_groups"]):
                    if h == H + group:
                        want["index_k"][b, position, i] = plan["index_k_IRD"][i].double() @ y
                turned = torch.complex(y[: D // 2], y[D // 2 :]) * turn
                y = torch.cat([turned.real, turned.imag])
                want["q" if h < H else "k"][b, t, h if h < H else h - H] = y
            want["v"][b, t] = x[b, t, H + K :]
            for name in "kv":
                if f"{name}_BSKD" in want:
                    want[f"{name}_BSKD"][b, position] = want[name][b, t, :retained]
                if f"ring_{name}_BWKD" in want:
                    window, sinks = options["window"], options["sinks"]
                    slot = position if position < sinks else sinks + (position - sinks) % window
                    want[f"ring_{name}_BWKD"][b, slot] = want[name][b, t, retained:]
    return want


def assert_near(got, want, tolerance):
    specified = ~want.isnan()
    assert (got.double() - want)[specified].abs().max() <= tolerance * max(1.0, float(want[specified].abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_append_writes_what_loops_write_and_nothing_else(run, name):
    request = make_append(CASES[name], torch.float32)
    want, got = by_loops(request), run("append", request)
    for key, value in want.items():
        assert_near(got[key], value, 1e-5)
    for key in ("k_BSKD", "v_BSKD", "ring_k_BWKD", "ring_v_BWKD"):
        if key in want:
            before = request["tensors"][key]
            untouched = want[key] == before.double()
            assert torch.equal(got[key][untouched], before[untouched])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("heads")])
def test_append_fills_tensors_of_its_own_with_zeros_beyond_the_count(interpreted, name):
    request = make_append(CASES[name], torch.float32)
    want, got = by_loops(request), interpreted("separate", request)
    for key, value in got.items():
        assert_near(value, want[key], 1e-5)
        for b, count in enumerate(request["tensors"]["counts_B"].tolist()):
            assert not value[b, count:].any(), (key, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 130])
def test_append_in_16_bits_rounds_once(dtype, T):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    case = {"lengths": [1000, 3], "counts": [T, T - 1 or 1], "T": T, "H": 32, "K": 4, "D": 128, "heads": [0, 1, 2, 8], "sets": [0, 0, 0, 1]}
    request = make_append(case | {"retained": 2, "ring": T == 1}, dtype)
    want, got = by_loops(request), run_append(request | {"impl": "triton"}, "cuda")
    for key, value in want.items():
        assert_near(got[key], value, 1e-4 if key == "index_q" else torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_append_saturates_index_keys_in_float8():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    request = make_append(CASES["decode, rings and cache"] | {"D": 64}, torch.float32)
    request["plan"]["index_k_IRD"] *= 100
    request["index_k"] = request["index_k"].to(torch.float8_e4m3fn)
    got = [run_append(request | {"impl": impl}, device)["index_k"] for impl, device in (("triton", "cuda"), ("reference", "cpu"))]
    assert got[1][0, 37].float().abs().max() == 448
    assert torch.equal(got[0].float(), got[1].float())


def test_append_refuses_what_does_not_fit():
    request = make_append(CASES["decode, rings and cache"], torch.float32)
    for change, message in (
        ({"qkv_BTM": torch.zeros(1, 1, 100)}, "qkv"),
        ({"cos_SE": torch.zeros(50, 3)}, "cos"),
        ({"lengths_B": torch.zeros(1)}, "lengths"),
        ({"v_BSKD": None}, "k and v of the cache together"),
        ({"ring_k_BWKD": torch.zeros(1, 12, 1, 16), "ring_v_BWKD": torch.zeros(1, 12, 1, 16)}, "rings of 13 slots"),
    ):
        with pytest.raises(ValueError, match=message):
            run_append({**request, "tensors": request["tensors"] | change, "impl": "reference"})
    with pytest.raises(ValueError, match="wanted an even number"):
        plan_append(num_heads=2, num_groups=1, head_dim=15, device="cpu")
    index = {"index_q_PRD": torch.zeros(1, 4, 16), "index_k_IRD": torch.zeros(1, 4, 16), "retrieval_heads": (0,), "key_groups": (2,)}
    with pytest.raises(ValueError, match=r"groups of the keys \[2\] do not fit"):
        plan_append(num_heads=4, num_groups=2, head_dim=16, device="cpu", **index)
    with pytest.raises(ValueError, match="both norms or none"):
        plan_append(num_heads=2, num_groups=1, head_dim=16, q_norm_D=torch.ones(16), device="cpu")


@pytest.mark.parametrize(("T", "C"), [(1, 48), (5, 1000), (3, 16)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_norm_is_the_sum_and_its_rms_norm(run, T, C, with_residual):
    x, weight, residual = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(T, C), (C,), (T, C)]))
    total = x.double() + (residual.double() if with_residual else 0)
    want = total / (total.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = run("norm", {"x": x, "weight": weight, "residual": residual if with_residual else None})
    assert_near(got["residual"], total, 1e-6)
    assert_near(got["out"], want, 1e-5)


@pytest.mark.parametrize(("T", "F"), [(1, 768), (4, 1500), (7, 3)])
def test_gated_silu_multiplies_up_with_silu_of_gate(run, T, F):
    x = 4 * torch.randn(T, 2 * F, generator=torch.Generator().manual_seed(0))
    gate, up = x.double().chunk(2, dim=1)
    assert_near(run("silu", {"x": x})["out"], gate / (1 + (-gate).exp()) * up, 1e-5)


@pytest.mark.parametrize(("T", "C", "M"), [(1, 48, 5), (2, 1000, 19), (4, 16, 1025), (3, 4096, 7)])
@pytest.mark.parametrize(
    ("norm", "residual", "bias"), [(True, True, False), (True, False, True), (False, False, True), (False, False, False)]
)
def test_norm_linear_is_a_product_with_the_normed_sum(run, T, C, M, norm, residual, bias):
    shapes = [(T, C), (M, C), (M,), (C,), (T, C)]
    x, weight, b, n, r = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes))
    total = x.double() + (r.double() if residual else 0)
    normed = total / (total.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * n.double() if norm else x.double()
    want = normed @ weight.double().T + (b.double() if bias else 0)
    tensors = (x, weight, b if bias else None, n if norm else None, r if residual else None)
    got = run("linear", {"tensors": tensors})
    assert_near(got["out"], want, 1e-5)
    if norm:
        assert_near(got["sum"], total, 1e-6)
        assert_near(got["normed"], normed, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize(("C", "M"), [(2048, 5120), (4096, 2048), (2048, 128), (2560, 301)])
def test_norm_linear_in_16_bits_is_as_exact_as_its_parts(T, C, M):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, n, r = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in ((T, C), (M, C), (C,), (T, C)))
    assert choose_impl(x, weight) == ("triton" if T == 1 else "reference")
    got = norm_linear(x, n, 1e-6, weight, residual_TC=r.clone(), impl="triton")
    want = norm_linear(x, n, 1e-6, weight, residual_TC=r.clone(), impl="reference")
    assert torch.equal(got[1], want[1])
    assert (got[2] - want[2]).abs().max() <= 2**-7 * want[2].abs().max()
    exact = got[2].double() @ weight.double().T
    assert (got[0].double() - exact).norm() <= 2**-8 * exact.norm()
    assert (linear(r, weight, impl="triton").double() - r.double() @ weight.double().T).norm() <= 2**-8 * exact.norm()


def test_norm_and_gated_silu_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="weight"):
        add_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, residual_TC=torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"\[T, 2 F\]"):
        gated_silu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="weight"):
        norm_linear(torch.zeros(2, 8), torch.zeros(8), 1e-6, torch.zeros(3, 9))
    with pytest.raises(ValueError, match="residual"):
        norm_linear(torch.zeros(2, 8), torch.zeros(8), 1e-6, torch.zeros(3, 8), residual_TC=torch.zeros(1, 8))
    with pytest.raises(ValueError, match="bias"):
        linear(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        linear(torch.zeros(5, 8), torch.zeros(3, 8), impl="triton")


if __name__ == "__main__":
    serve(OPERATIONS)
