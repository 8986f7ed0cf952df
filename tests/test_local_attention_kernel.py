"""The local attention kernels against a naive fp64 mask: in Triton's interpreter on the CPU, and compiled on the GPU."""

# B batch  T chunk tokens  S all tokens of a sequence  W ring slots  H query heads  K kv heads  D head dim
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from rtpurbo.kernels.local_attention import attend_local, choose_impl, write_ring


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A chunk of T rows on B sequences; lengths tokens are in the ring already, counts rows of the chunk are valid."""

    T: int
    window: int
    sinks: int = 4
    lengths: tuple[int, ...] = (0,)
    counts: tuple[int, ...] | None = None
    ring: bool = False
    K: int = 1
    group: int = 1
    D: int = 16
    fused: bool = False
    blocks: tuple[int, int] = (16, 16)
    by_position: bool = False


SMALL = {
    "one token": Case(T=1, window=8),
    "odd length, several tiles": Case(T=67, window=19),
    "window larger than the sequence": Case(T=45, window=1000),
    "no sinks": Case(T=50, window=17, sinks=0),
    "window of one": Case(T=40, window=1, sinks=2),
    "window of one, no sinks": Case(T=33, window=1, sinks=0),
    "more sinks than a key tile holds": Case(T=90, window=20, sinks=21),
    "more sinks than tokens": Case(T=20, window=3, sinks=40),
    "groups of 3": Case(T=35, window=16, K=2, group=3),
    "groups of 4": Case(T=35, window=16, K=2, group=4),
    "groups of 8": Case(T=20, window=9, group=8),
    "head dim 64": Case(T=40, window=16, D=64, blocks=(32, 16)),
    "ragged batch": Case(T=50, window=16, lengths=(0, 0, 0, 0), counts=(50, 1, 0, 33)),
    "chunk after a wrapped ring": Case(T=30, window=32, lengths=(100,), ring=True),
    "chunk longer than the window, wrapped ring": Case(T=70, window=32, lengths=(77,), ring=True),
    "chunk after a ring that just filled": Case(T=20, window=32, lengths=(36,), ring=True),
    "empty ring": Case(T=37, window=32, lengths=(0,), ring=True),
    "ring with fewer tokens than sinks": Case(T=60, window=16, sinks=9, lengths=(5,), ring=True),
    "ring filled exactly to the sinks": Case(T=60, window=16, sinks=5, lengths=(5,), ring=True),
    "sinks still inside the window": Case(T=20, window=64, lengths=(17,), ring=True),
    "ring smaller than a key tile": Case(T=20, window=7, sinks=3, lengths=(60,), ring=True),
    "ring with a window of one": Case(T=20, window=1, sinks=1, lengths=(9,), ring=True),
    "different lengths in one launch": Case(T=40, window=24, lengths=(0, 3, 29, 200), counts=(40, 39, 0, 17), ring=True, K=2, group=2),
    "views of one fused tensor": Case(T=50, window=24, lengths=(31, 64), ring=True, K=2, group=4, fused=True),
    "large query tile": Case(T=70, window=24, lengths=(50,), ring=True, blocks=(64, 16)),
    "large key tile": Case(T=70, window=24, lengths=(50,), ring=True, blocks=(16, 64)),
    "cache by position": Case(T=70, window=24, lengths=(50,), by_position=True, K=2, group=3),
    "cache by position, no sinks": Case(T=70, window=24, sinks=0, lengths=(51,), by_position=True),
    "cache by position, more sinks than a key tile holds": Case(T=70, window=24, sinks=21, lengths=(99,), by_position=True),
    "cache by position, ragged": Case(T=40, window=24, lengths=(0, 3, 29, 200), counts=(40, 39, 0, 17), by_position=True, K=2, group=2),
}

# The shape of issue anchors (32 query heads, 4 KV heads) and the borders of the 128 x 128 tiles.
LARGE = {
    "one token": Case(T=1, window=8192, K=4, group=8, D=128),
    "odd length": Case(T=1111, window=256, K=4, group=8, D=128),
    "just over a tile": Case(T=129, window=64, K=2, group=4, D=128),
    "window larger than the sequence": Case(T=700, window=8192, K=4, group=3, D=64),
    "no sinks": Case(T=2000, window=512, sinks=0, K=2, group=4, D=64),
    "window of one": Case(T=300, window=1, K=2, group=1, D=128),
    "many sinks": Case(T=900, window=130, sinks=200, K=2, group=4, D=128),
    "ragged batch": Case(T=1000, window=300, lengths=(0, 0, 0, 0), counts=(1000, 1, 0, 517), K=4, group=8, D=128),
    "chunk after a wrapped ring": Case(T=1024, window=1024, lengths=(5000,), ring=True, K=4, group=8, D=128),
    "chunk longer than the window": Case(T=1500, window=600, lengths=(4321,), ring=True, K=2, group=8, D=64),
    "different lengths in one launch": Case(
        T=700, window=500, lengths=(0, 3, 450, 3000), counts=(700, 650, 0, 333), ring=True, K=2, group=4, D=128
    ),
    "no sinks in the ring": Case(T=500, window=200, sinks=0, lengths=(777, 100), ring=True, K=2, group=4, D=128),
    "ring smaller than a key tile": Case(T=300, window=50, sinks=3, lengths=(640,), ring=True, K=2, group=4, D=128),
    "views of one fused tensor": Case(T=800, window=256, lengths=(300, 900), ring=True, K=4, group=8, D=128, fused=True),
    "cache by position": Case(T=1000, window=600, lengths=(4321,), by_position=True, K=2, group=3, D=128),
    "cache by position, ragged": Case(
        T=700, window=500, lengths=(0, 3, 450, 3000), counts=(700, 650, 0, 333), by_position=True, K=2, group=4, D=64
    ),
    "real window": Case(T=20000, window=8192, K=4, group=8, D=128),
    "real chunk": Case(T=8192, window=8192, lengths=(122880,), ring=True, K=4, group=8, D=128),
}


def attend_naively(q_THD, k_SKD, v_SKD, rows, offset, window, sinks, scale, working=torch.float64):
    """Softmax over the full mask for the chosen rows; `working` is the dtype of both products' inputs, sums are fp64 or fp32."""
    group = q_THD.shape[1] // k_SKD.shape[1]
    sums = torch.float64 if working == torch.float64 else torch.float32
    q, k, v = (x.to(working).to(sums) for x in (q_THD[rows], k_SKD, v_SKD))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    i = offset + torch.as_tensor(rows, device=q.device)[:, None]
    j = torch.arange(k.shape[0], device=q.device)[None, :]
    seen = (j <= i) & ((i - j < window) | (j < sinks))
    logits = torch.einsum("thd,shd->hts", q, k) * scale
    logits = logits.masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1).to(working).to(sums)
    return torch.einsum("hts,shd->thd", weights, v).to(working), logits.logsumexp(-1)


def build(case: Case, dtype: torch.dtype, device: str):
    """Chunk and ring of a case, with NaN in every row and slot that holds no token; and the whole history."""
    generator = torch.Generator(device).manual_seed(5)
    B, H = len(case.lengths), case.K * case.group
    counts = case.counts or (case.T,) * B
    S = max(case.lengths) + case.T

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    history_k, history_v = random(B, S, case.K, case.D), random(B, S, case.K, case.D)
    # Peaked logits, so that a wrong key is a large error.
    q = 3 * random(B, case.T, H, case.D)
    heads = H + 2 * case.K
    fused = torch.full((B, case.T, heads if case.fused else 0, case.D), float("nan"), device=device, dtype=dtype)
    k, v = (torch.full((B, case.T, case.K, case.D), float("nan"), device=device, dtype=dtype) for _ in range(2))
    if case.fused:
        q_view, k, v = fused.split([H, case.K, case.K], dim=2)
        q_view.copy_(q)
        q = q_view
    for b, count in enumerate(counts):
        k[b, :count] = history_k[b, case.lengths[b] : case.lengths[b] + count]
        v[b, :count] = history_v[b, case.lengths[b] : case.lengths[b] + count]
        q[b, count:] = float("nan")
    if case.by_position:
        k, v = (x.clone() for x in (history_k, history_v))
        for b, count in enumerate(counts):
            k[b, case.lengths[b] + count :] = v[b, case.lengths[b] + count :] = float("nan")
    rings = [None, None]
    if case.ring:
        rings = [torch.full((B, case.sinks + case.window, case.K, case.D), float("nan")).to(device, dtype) for _ in range(2)]
        for ring, history in zip(rings, (history_k, history_v), strict=True):
            for b, length in enumerate(case.lengths):
                for position in (*range(min(length, case.sinks)), *range(max(case.sinks, length - case.window), length)):
                    slot = position if position < case.sinks else case.sinks + (position - case.sinks) % case.window
                    ring[b, slot] = history[b, position]
    return q, k, v, rings, history_k, history_v, counts


def largest_error(case: Case, impl: str, dtype: torch.dtype, device: str) -> float:
    """Error over the allowed one (twice that of eager products in the same dtype, plus one rounding); must stay below 1."""
    q, k, v, (ring_k, ring_v), history_k, history_v, counts = build(case, dtype, device)
    lengths_B, counts_B = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.lengths, counts))
    scale = case.D**-0.5
    poison = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    del poison  # The allocator hands this memory to the next empty tensor of its size: an unwritten row reads NaN.
    if impl == "interpreter":
        from rtpurbo.kernels.local_attention import kernel

        torch.use_deterministic_algorithms(True)  # Fills empty tensors with NaN, which the CPU allocator would not keep.
        out, lse = torch.empty(q.shape, dtype=dtype), torch.empty(len(counts), q.shape[2], case.T)
        kernel.describe(
            q, k, v, lengths_B, counts_B, ring_k, ring_v, out, lse, scale=scale, window=case.window, sinks=case.sinks,
            by_position=case.by_position, block_queries=case.blocks[0], block_keys=case.blocks[1],
        ).run()  # fmt: skip
    else:
        out, lse = attend_local(
            q, k, v, window=case.window, sinks=case.sinks, scale=scale, lengths_B=lengths_B, counts_B=counts_B,
            ring_k_BWKD=ring_k, ring_v_BWKD=ring_v, by_position=case.by_position, impl=impl,
        )  # fmt: skip
    assert lse is not None
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert lse.shape == (len(counts), q.shape[2], case.T)
    worst = 0.0
    for b, count in enumerate(counts):
        assert (out[b, count:] == 0).all()
        assert (lse[b, :, count:] == float("-inf")).all()
        if count == 0:
            continue
        generator = torch.Generator().manual_seed(b)
        picked = torch.randint(count, (40,), generator=generator).tolist()
        rows = list(range(count)) if count <= 200 else sorted({0, 1, 127, 128, count - 129, count - 1, *picked})
        end = case.lengths[b] + count
        arguments = (q[b], history_k[b, :end], history_v[b, :end], rows, case.lengths[b], case.window, case.sinks, scale)
        exact, exact_lse = attend_naively(*arguments)
        rounded, _ = attend_naively(*arguments, working=dtype)
        allowed = 2 * (rounded - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        error = (out[b, rows].double() - exact).norm() / allowed
        lse_error = (lse[b, :, rows].double() - exact_lse).abs().max() / 1e-4
        assert torch.isfinite(error)
        assert torch.isfinite(lse_error)
        worst = max(worst, error.item(), lse_error.item())
    return worst


@pytest.fixture(scope="module")
def interpreter_errors():
    """Errors of all small cases from one process of its own, because the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SMALL)
def test_the_interpreted_kernel_matches_the_naive_mask(interpreter_errors, name):
    assert interpreter_errors[name] < 1


def test_an_interpreted_chunk_without_ring_sees_only_itself(interpreter_errors):
    assert interpreter_errors["no ring, offset"] < 1e-5


@pytest.mark.parametrize("window", [1, 100, 128, 300, 1000])
@pytest.mark.parametrize("sinks", [0, 4, 200])
def test_the_block_lists_of_flash_attention_4_cover_the_mask_and_no_more(interpreter_errors, window, sinks):
    assert interpreter_errors[f"lists {window} {sinks}"] == 0


def test_an_unknown_implementation_is_refused_by_name():
    x = torch.zeros(1, 4, 1, 64)
    with pytest.raises(ValueError, match="impl 'cuda' is not one of auto, reference, triton, gluon"):
        attend_local(x, x, x, window=2, sinks=0, scale=1.0, impl="cuda")


def test_a_requested_kernel_that_cannot_run_says_why():
    pytest.importorskip("triton")
    x = torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl 'triton' cannot run: it needs all tensors on one NVIDIA GPU, found cpu"):
        attend_local(x, x, x, window=2, sinks=0, scale=1.0, impl="triton")
    with pytest.raises(ValueError, match="impl 'fa4' cannot run"):
        attend_local(x, x, x, window=2, sinks=0, scale=1.0, impl="fa4")
    with pytest.raises(ValueError, match=r"wanted all torch.float16 or torch.bfloat16"):
        attend_local(x.float(), x.float(), x.float(), window=2, sinks=0, scale=1.0, impl="gluon")


def test_the_cpu_is_given_the_reference():
    x = torch.zeros(1, 4, 1, 64)
    assert choose_impl(x, x, x) == "reference"


@pytest.mark.parametrize("capability", [80, 86, 89])
@pytest.mark.parametrize("D", [64, 128])
def test_the_portable_kernel_compiles_into_the_shared_memory_of_older_gpus(capability, D):
    triton = pytest.importorskip("triton")
    from triton.compiler import ASTSource

    from rtpurbo.kernels.local_attention import kernel

    function = kernel._prefill
    constants = {"M": 128, "N": 64, "D": D, "HAS_RING": True, "BY_POSITION": False, "LISTED": False, "HAS_LSE": True}
    constants |= {"PRECISION": "tf32"}
    constants |= {name: 1 for name in function.arg_names if name.startswith("stride_") and name.endswith("d")}
    compiled = compile_for(triton, ASTSource, function, constants, {}, capability, num_warps=4 if D == 64 else 8, num_stages=2)
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.parametrize(
    ("D", "keys"), [(64, "ring"), (128, "chunk"), (128, "ring"), (128, "by position"), (128, "listed"), (64, "listed")]
)
def test_the_hopper_kernel_compiles_to_tensor_core_instructions(D, keys):
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from rtpurbo.kernels.local_attention import hopper_kernel

    function = hopper_kernel._prefill_hopper
    constants = {"M": 128, "N": 128, "D": D, "STAGES": 2, "HAS_RING": keys == "ring", "PING_PONG": True}
    constants |= {"BY_POSITION": keys in ("by position", "listed"), "LISTED": keys == "listed", "HAS_LSE": keys != "listed"}
    constants |= {"PARTED": keys == "by position"}
    descriptors = {}
    for name in (name for name in function.arg_names if name.endswith("_desc")):
        block = [1, 1, 1, 64, D] if name == "q_desc" else [1, 1, 128, D]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # pyright: ignore[reportCallIssue]
        descriptors[name] = f"tensordesc<bf16[{','.join(map(str, block))}],{layout!r}>"
    compiled = compile_for(triton, GluonASTSource, function, constants, descriptors, 90, num_warps=4)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert compiled.metadata.num_warps == 12


def compile_for(triton, source, function, constants, types, capability, **options):
    """The kernel for bf16 tensors, built without a GPU."""
    from triton.backends.compiler import GPUTarget

    names = function.arg_names
    scalars = {"lse_ptr": "*fp32", "scale_log2": "fp32", **types}
    scalars |= {f"{name}_ptr": "*i32" for name in ("lengths", "counts", "ids", "listed")}
    signature = {
        name: "constexpr" if name in constants else scalars.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = (n for n, name in enumerate(names) if name not in constants and (name.endswith("_ptr") or name.startswith("stride_")))
    hints = {(n,): [["tt.divisibility", 16]] for n in aligned}
    return triton.compile(source(function, signature, values, hints), target=GPUTarget("cuda", capability, 32), options=options)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(
    "impl",
    [
        pytest.param("triton", marks=gpu),
        pytest.param("gluon", marks=[*gpu, pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")]),
    ],
)
def test_the_compiled_kernel_matches_the_naive_mask(impl, name, dtype):
    assert largest_error(LARGE[name], impl, dtype, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_chunks_through_the_ring_give_the_single_shot_result():
    T, step, window, sinks, K, H, D = 3000, 700, 1000, 4, 2, 8, 128
    q = torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, T, K, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    whole, whole_lse = attend_local(q, k, v, window=window, sinks=sinks, scale=D**-0.5)
    rings = [torch.full((1, sinks + window, K, D), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for start in range(0, T, step):
        part = slice(start, min(start + step, T))
        lengths = torch.tensor([start], dtype=torch.int32, device="cuda")
        counts = torch.tensor([part.stop - start], dtype=torch.int32, device="cuda")
        out, lse = attend_local(
            q[:, part], k[:, part], v[:, part], window=window, sinks=sinks, scale=D**-0.5, lengths_B=lengths,
            ring_k_BWKD=rings[0], ring_v_BWKD=rings[1],
        )  # fmt: skip
        for ring, chunk in zip(rings, (k[:, part], v[:, part]), strict=True):
            write_ring(ring, chunk, lengths, counts, window=window, sinks=sinks)
        assert (out.double() - whole[:, part].double()).norm() < 8e-3 * whole[:, part].double().norm()
        assert lse is not None
        assert whole_lse is not None
        torch.testing.assert_close(lse, whole_lse[:, :, part], atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
def test_a_misaligned_view_goes_to_the_portable_kernel():
    fused = torch.randn(1, 300, 4, 132, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused[..., 4:], fused[:, :, :2, 4:], fused[:, :, :2, 4:]
    assert choose_impl(q, k, v) == "triton"
    assert choose_impl(q.contiguous(), k.contiguous(), v.contiguous()) == "gluon"
    out, _ = attend_local(q, k, v, window=100, sinks=4, scale=0.1)
    same, _ = attend_local(q.contiguous(), k.contiguous(), v.contiguous(), window=100, sinks=4, scale=0.1)
    assert (out.double() - same.double()).norm() < 8e-3 * same.double().norm()


def interpreted_chunk_without_ring() -> float:
    from rtpurbo.kernels.local_attention import kernel, reference

    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    lengths, counts = torch.tensor([7], dtype=torch.int32), torch.tensor([33], dtype=torch.int32)
    wanted, _ = reference.attend_local(q, k, v, lengths, counts, None, None, 12, 10, 0.25)
    out = torch.empty_like(q)
    kernel.describe(
        q, k, v, lengths, counts, None, None, out, None, scale=0.25, window=12, sinks=10, block_queries=16, block_keys=16
    ).run()  # fmt: skip
    return (out - wanted).norm().item()


def wrong_blocks(window: int, sinks: int) -> int:
    """How many (query block, key block) pairs `list_blocks` puts in the wrong list, at even and odd offsets and a ragged end."""
    from rtpurbo.kernels.local_attention.fa4 import list_blocks

    lengths, counts, T = (0, 0, 256, 777, 1300), (700, 130, 700, 333, 0), 700
    S = max(lengths) + T
    lists = list_blocks(*(torch.tensor(x, dtype=torch.int32) for x in (lengths, counts)), T, S, window, sinks)
    wrong = 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for m in range(-(-T // 128)):
            i = length + torch.arange(m * 128, max(m * 128, min((m + 1) * 128, count)))[:, None]
            j = torch.arange(-(-S // 128) * 128)
            seen = ((j <= i) & ((i - j < window) | (j < sinks))).unflatten(1, (-1, 128))
            some = set(seen.any(2).any(0).nonzero().flatten().tolist())
            masked, full = (ids[b, 0, m, : counts_M[b, 0, m]].tolist() for counts_M, ids in (lists[:2], lists[2:]))
            wrong += len(set(masked + full) ^ some) + (len(masked + full) - len(set(masked + full)))
            wrong += sum(not seen[:, n].all() for n in full)
            # A block seen whole may be listed as seen in part, but the bulk must not be: it would pay for its mask.
            wrong += max(0, len(masked) - 6 - -(-sinks // 128))
    return wrong


if __name__ == "__main__":
    errors = {name: largest_error(case, "interpreter", torch.float32, "cpu") for name, case in SMALL.items()}
    lists = {f"lists {window} {sinks}": wrong_blocks(window, sinks) for window in (1, 100, 128, 300, 1000) for sinks in (0, 4, 200)}
    json.dump({**errors, **lists, "no ring, offset": interpreted_chunk_without_ring()}, sys.stdout)
