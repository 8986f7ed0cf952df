"""mix_experts against a dense fp64 evaluation of its formula; on a CPU through Triton's interpreter."""

# T tokens  X experts a token  E experts  C hidden width  F expert width
import io
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from rtpurbo.kernels.experts import choose_impl, mix_experts
from rtpurbo.kernels.testing import error_bound, relative_error


@dataclass(frozen=True, kw_only=True)
class Case:
    T: int
    E: int = 8
    X: int = 2
    C: int = 64
    F: int = 48
    used: int | None = None  # only so many experts get tokens
    ids: torch.dtype = torch.int64


SMALL = {
    "one token": Case(T=1),
    "three tokens, odd widths": Case(T=3, C=56, F=40, X=3),
    "one expert a token": Case(T=2, X=1, ids=torch.int32),
    "five tokens": Case(T=5, ids=torch.int32),
    "an expert without tokens": Case(T=40, used=3),
    "all tokens to one pair of experts": Case(T=70, used=2),
    "more pairs than one program sorts": Case(T=150, X=4, F=40, C=56),
    "an odd number of experts": Case(T=33, E=5),
}
# The widths of Qwen3-Coder-30B-A3B, and others that no tile divides.
QWEN = Case(T=1, E=128, X=8, C=2048, F=768)
LARGE = {
    **{f"{T} tokens": replace(QWEN, T=T) for T in (1, 2, 3, 4, 5, 16, 33, 64, 257, 512, 1000, 4100)},
    "9000 tokens": replace(QWEN, T=9000, ids=torch.int32),
    "skewed": replace(QWEN, T=700, used=9),
    "odd widths, one token": Case(T=1, E=6, X=3, C=296, F=200),
    "odd widths, few": Case(T=19, E=6, X=3, C=296, F=200),
    "odd widths, many": Case(T=3000, E=6, X=3, C=296, F=200),
}


def build(case: Case, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(case.T)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device)

    x = random(case.T, case.C).to(dtype)
    gate_up = (2 * case.C**-0.5 * random(case.E, 2 * case.F, case.C)).to(dtype)
    down = (case.F**-0.5 * random(case.E, case.C, case.F)).to(dtype)
    ids = random(case.T, case.used or case.E).topk(case.X, dim=1).indices.to(case.ids)
    weights = random(case.T, case.X).softmax(1).to(dtype)
    return x, ids, weights, gate_up, down


def naive(x, ids, weights, gate_up, down, rows, working):
    """Every expert on every token, weighted with 0 where it was not chosen; `working` is the dtype of all values."""
    x, weights = x[rows].to(working), weights[rows].to(working)
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[e].to(working).T).chunk(2, dim=1)
        share = torch.where(ids[rows] == e, weights, 0).sum(1, keepdim=True)
        y += ((gate * torch.sigmoid(gate) * up) @ down[e].to(working).T) * share
    return y


def error_over_bound(case: Case, impl: str, dtype: torch.dtype, device: str) -> float:
    """Error against fp64 over twice that of a plain evaluation in the same dtype, plus one rounding; must stay below 1."""
    tensors = build(case, dtype, device)
    torch.use_deterministic_algorithms(device == "cpu")  # Fills empty tensors with NaN there, which the CPU allocator would not keep.
    for size in (case.T * case.C, case.T * case.X * case.C, case.T * case.X * case.F):
        poison = torch.full((size,), float("nan"), dtype=dtype, device=device)
        del poison  # The allocator hands this memory to the next empty tensor of its size: a value that is not written reads NaN.
    first, second = (mix_experts(*tensors, impl=impl) for _ in range(2))
    assert first.shape == tensors[0].shape
    assert first.dtype == dtype
    assert torch.equal(first, second), "equal inputs must give equal bits"
    picked = torch.randint(case.T, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = list(range(case.T)) if case.T <= 70 else sorted({0, 1, case.T - 1, *picked})
    exact = naive(*tensors, rows, torch.float64)
    return relative_error(first[rows], exact) / error_bound(naive(*tensors, rows, dtype), exact)


@pytest.fixture(scope="module")
def interpreter_errors():
    """Errors of all small cases from one process of its own, because the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return torch.load(io.BytesIO(done.stdout))


@pytest.mark.parametrize("name", SMALL)
def test_the_interpreted_experts_match_the_formula(interpreter_errors, name):
    # fp32 sums in another order than the plain evaluation's.
    assert interpreter_errors[name] < 2


@pytest.mark.parametrize("name", [f"{rows} rows, swap {swap}" for rows in (16, 32, 64) for swap in (False, True)])
def test_every_interpreted_tile_matches_the_formula(interpreter_errors, name):
    assert interpreter_errors[name] < 2


def test_the_interpreted_sort_is_stable_and_maps_every_tile(interpreter_errors):
    assert interpreter_errors["sort"] == "as wanted"


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_matches_the_formula(name):
    assert error_over_bound(SMALL[name], "reference", torch.float32, "cpu") < 2


def test_no_token_gives_no_row():
    tensors = build(replace(SMALL["one token"], T=2), torch.float32, "cpu")
    empty = [t[:0] for t in tensors[:3]]
    assert mix_experts(*empty, *tensors[3:]).shape == (0, 64)


def test_shapes_that_do_not_fit_are_named():
    x, ids, weights, gate_up, down = build(SMALL["one token"], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"gate_up \(8, 48, 64\) and down \(8, 64, 48\) do not fit"):
        mix_experts(x, ids, weights, gate_up[:, :48], down)
    with pytest.raises(ValueError, match=r"ids \(1, 1\) and weights \(1, 2\)"):
        mix_experts(x, ids[:, :1], weights, gate_up, down)
    with pytest.raises(ValueError, match=r"ids are torch.float32"):
        mix_experts(x, ids.float(), weights, gate_up, down)


def test_an_implementation_that_is_unknown_or_cannot_run_says_why():
    pytest.importorskip("triton")
    tensors = build(SMALL["one token"], torch.bfloat16, "cpu")
    assert choose_impl(*tensors) == "reference"
    with pytest.raises(ValueError, match="impl 'cutlass' is not one of auto, reference, triton, gluon, library"):
        mix_experts(*tensors, impl="cutlass")
    with pytest.raises(ValueError, match="impl 'triton' cannot run: it needs all tensors on one NVIDIA GPU, found cpu"):
        mix_experts(*tensors, impl="triton")
    with pytest.raises(ValueError, match=r"found|wanted all torch.bfloat16"):
        mix_experts(*build(SMALL["one token"], torch.float32, "cpu"), impl="library")


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("pairs", [80, 4096, 16000, 65536])
def test_the_experts_kernels_compile_into_the_shared_memory_of_each_gpu(capability, pairs):
    pytest.importorskip("triton")
    from rtpurbo.kernels.experts import kernel

    hopper = capability == 90
    tiles = replace(kernel.tiles_for(pairs, 128, hopper=hopper), descriptors=False)
    for function, product in ((kernel.up_grouped, tiles.up), (kernel.down_grouped, tiles.down)):
        constants = {
            "X": 8, "M": tiles.rows, "N": product.columns, "K": product.step, "EVEN_N": True, "EVEN_K": True,
            "SWAP": tiles.swap, "DESCRIPTORS": False, "EARLY_LAUNCH": hopper,
        }  # fmt: skip
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        compiled = compile_for(function, constants, {"weight": "*bf16"}, capability, product.warps, product.stages)
        assert compiled.metadata.shared <= (227 if hopper else 99) * 1024
        assert (".local" in compiled.asm["ptx"]) is False


@pytest.mark.parametrize("capability", [80, 90])
def test_the_experts_kernels_for_a_few_tokens_compile(capability):
    pytest.importorskip("triton")
    from rtpurbo.kernels.experts import few_kernel, sorting

    few = {"C": 2048, "F": 768, "X": 8, "X_PADDED": 8, "ROWS": 4, "STEP": 256, "EVEN": True, "EARLY_LAUNCH": capability == 90}
    sort = {"PAIRS": 256, "COLUMNS": 128, "SUB": 64, "ROWS": 16, "ONE_BLOCK": False, "EARLY_LAUNCH": capability == 90}
    for function, constants in ((few_kernel.up_few, few), (few_kernel.down_few, few), (sorting.place_pairs, sort)):
        names = {name: value for name, value in constants.items() if name in function.arg_names and function.params[
            function.arg_names.index(name)].is_constexpr}  # fmt: skip
        compile_for(function, names, {}, capability, 4, 2)


@pytest.mark.parametrize("gated", [True, False])
def test_the_hopper_experts_compile_to_tensor_core_instructions(gated):
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.experimental.gluon")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from rtpurbo.kernels.experts import hopper_kernel as hopper

    function = hopper._grouped_product
    constants = {"M": hopper.M, "N": hopper.N, "K": hopper.K, "STAGES": hopper.STAGES, "GATED": gated}
    types = {"tiles_ptr": "*i32", "out_ptr": "*bf16"}
    for name, rows in (("left_desc", hopper.M), ("weight_desc", hopper.N // 2)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, hopper.K], gl.bfloat16)  # pyright: ignore[reportCallIssue]
        types[name] = f"tensordesc<bf16[{rows},{hopper.K}],{layout!r}>"
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in ("out_ptr", "tiles_ptr", "out_columns")}
    source = GluonASTSource(function, signature, values, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024


def compile_for(function, constants, types, capability, warps, stages):
    """The kernel for bf16 tensors, built without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    integers = ("ids_ptr", "pair_ptr", "row_ptr", "tiles_ptr", "counts_ptr", "ends_ptr")
    types = {**dict.fromkeys(integers, "*i32"), **types}
    signature = {name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = (
        n for n, name in enumerate(names) if name not in constants and (signature[name][0] == "*" or name in ("C", "F", "stride_xt"))
    )
    hints = {(n,): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(function, signature, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param("triton", torch.bfloat16, marks=gpu),
        pytest.param("triton", torch.float16, marks=gpu),
        pytest.param("gluon", torch.bfloat16, marks=[*gpu, hopper]),
        pytest.param("gluon", torch.float16, marks=[*gpu, hopper]),
        pytest.param("library", torch.bfloat16, marks=gpu),
    ],
)
def test_the_compiled_experts_match_the_formula(impl, dtype, name):
    if impl == "gluon" and "odd widths" in name:
        pytest.skip("the Hopper kernel takes multiples of 256 and 128")
    assert error_over_bound(LARGE[name], impl, dtype, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("T", [1, 64, 1000])
def test_experts_in_a_cuda_graph_follow_new_inputs(T):
    first, second = (build(replace(QWEN, T=T, used=used), torch.bfloat16, "cuda") for used in (None, 20))
    held = [t.clone() for t in first]
    mix_experts(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mix_experts(*held)
    for tensors in (first, second):
        for kept, new in zip(held, tensors, strict=True):
            kept.copy_(new)
        graph.replay()
        assert torch.equal(out, mix_experts(*tensors))


def sorted_as_wanted(pairs: int, experts: int, tile_rows: int) -> bool:
    from rtpurbo.kernels.experts.sorting import sort_pairs

    ids = torch.randint(0, max(1, experts - 2), (pairs, 1), generator=torch.Generator().manual_seed(pairs))
    found = sort_pairs(ids, experts, tile_rows=tile_rows, early_launch=False)
    order = torch.sort(ids[:, 0], stable=True).indices
    ends = torch.bincount(ids[:, 0], minlength=experts).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    tiles = [[e, row, int(ends[e])] for e in range(experts) for row in range(int(starts[e]), int(ends[e]), tile_rows)]
    return (
        torch.equal(found.pair_P.long(), order)
        and torch.equal(found.row_P.long()[order], torch.arange(pairs))
        and torch.equal(found.ends_E.long(), ends)
        and found.tiles_N3[: len(tiles)].tolist() == tiles
        and bool((found.tiles_N3[len(tiles) :, 0] == -1).all())
    )


def interpreted() -> dict[str, object]:
    from rtpurbo.kernels.experts import kernel

    answers: dict[str, object] = {name: error_over_bound(case, "triton", torch.float32, "cpu") for name, case in SMALL.items()}
    tensors = build(Case(T=45, C=56), torch.float32, "cpu")
    exact = naive(*tensors, range(45), torch.float64)
    for rows in (16, 32, 64):
        for swap in (False, True):
            product = kernel.Product(columns=32, step=16, warps=4, stages=2)
            tiles = kernel.GroupedTiles(rows=rows, swap=swap, up=product, down=product)
            error = relative_error(kernel.mix_experts(*tensors, tiles=tiles), exact)
            answers[f"{rows} rows, swap {swap}"] = error / error_bound(naive(*tensors, range(45), torch.float32), exact)
    wanted = [sorted_as_wanted(*shape) for shape in ((1, 5, 16), (255, 128, 16), (257, 3, 32), (700, 9, 64))]
    answers["sort"] = "as wanted" if all(wanted) else f"wrong: {wanted}"
    return answers


if __name__ == "__main__":
    buffer = io.BytesIO()
    torch.save(interpreted(), buffer)
    sys.stdout.buffer.write(buffer.getvalue())
