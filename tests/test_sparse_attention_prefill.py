"""attend_prefill against a naive fp64 mask: reference, interpreted kernel and compiled kernels, dense and with lists of blocks."""

# B batch  T chunk tokens  S all tokens of a sequence  K kv heads  G query heads per kv head  D head dim  H = K * G
# Q query blocks  N key blocks
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from rtpurbo.kernels.local_attention import attend_local
from rtpurbo.kernels.sparse_attention import attend_prefill, choose_prefill_impl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A chunk of T rows after `lengths` tokens; keep: share of the blocks that a list names (None: dense)."""

    T: int
    lengths: tuple[int, ...] = (0,)
    counts: tuple[int, ...] | None = None
    keep: float | None = None
    K: int = 1
    G: int = 1
    D: int = 16
    block: int = 16
    tile: int = 16
    sliced: bool = False


SMALL = {
    "dense, one token": Case(T=1),
    "dense, odd length": Case(T=67),
    "dense, chunk at an odd offset": Case(T=35, lengths=(61,), K=2, G=3),
    "dense, ragged": Case(T=40, lengths=(0, 3, 29, 100), counts=(40, 39, 0, 17), K=2, G=2),
    "dense, heads of a view": Case(T=40, lengths=(30,), K=2, G=2, sliced=True),
    "listed": Case(T=64, lengths=(256,), keep=0.3, G=2),
    "listed, odd length": Case(T=51, lengths=(256,), keep=0.3),
    "listed, odd offset": Case(T=51, lengths=(263,), keep=0.3, K=2, G=2),
    "listed, ragged": Case(T=40, lengths=(0, 3, 290, 300), counts=(40, 39, 0, 17), keep=0.4, K=2, G=2),
    "listed, half a block a tile": Case(T=70, lengths=(515,), keep=0.3, G=2, block=32),
    "listed, nothing": Case(T=40, lengths=(100,), keep=0.0),
    "listed, heads of a view": Case(T=40, lengths=(300,), keep=0.3, K=2, G=2, sliced=True),
}

LARGE = {
    "dense, one token": Case(T=1, K=4, G=8, D=128),
    "dense, just over a tile": Case(T=129, K=2, G=5, D=128),
    "dense, odd length": Case(T=1111, K=1, G=5, D=128),
    "dense, chunk at an offset": Case(T=700, lengths=(4321,), K=2, G=3, D=64),
    "dense, ragged": Case(T=700, lengths=(0, 3, 450, 3000), counts=(700, 650, 0, 333), K=2, G=4, D=128),
    "dense, heads of a view": Case(T=500, lengths=(300,), K=4, G=2, D=128, sliced=True),
    "listed": Case(T=2048, lengths=(4096,), keep=0.2, K=1, G=5, D=128),
    "listed, from the start": Case(T=5000, keep=0.3, K=1, G=2, D=64),
    "listed, odd offset": Case(T=1000, lengths=(4321,), keep=0.2, K=2, G=3, D=128),
    "listed, ragged": Case(T=700, lengths=(0, 3, 4500, 3000), counts=(700, 650, 0, 333), keep=0.3, K=2, G=4, D=128),
    "listed, nothing": Case(T=300, lengths=(1000,), keep=0.0, K=1, G=2, D=128),
    "listed, heads of a view": Case(T=500, lengths=(3000,), keep=0.2, K=4, G=2, D=128, sliced=True),
}


def build(case: Case, dtype: torch.dtype, device: str):
    """q, cache and lists, with NaN in rows without token and ids out of range in unused places."""
    generator = torch.Generator().manual_seed(7)
    B, H = len(case.lengths), case.K * case.G
    counts = case.counts or (case.T,) * B
    S = max(case.lengths) + case.T + 3
    # Peaked logits, so that a wrong key is a large error.
    q = 3 * torch.randn(B, case.T, case.K, 2 * case.G if case.sliced else case.G, case.D, generator=generator)
    k, v = (torch.randn(B, S, case.K, case.D, generator=generator) for _ in range(2))
    for b, count in enumerate(counts):
        q[b, count:] = k[b, case.lengths[b] + count :] = v[b, case.lengths[b] + count :] = float("nan")
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    q = q[:, :, :, : case.G]
    if case.keep is None:
        return q, k, v, counts, None, None
    blocks = -(-S // case.block)
    draw = torch.rand(B, H, -(-case.T // case.block), blocks, generator=generator) < case.keep
    for b, count in enumerate(counts):
        for n in range(draw.shape[2]):
            last = case.lengths[b] + min((n + 1) * case.block, count) - 1
            draw[b, :, n, last // case.block + 1 :] = False
            # Most lists name the queries' own blocks, as a selection does; head 0 keeps what was drawn.
            if case.keep:
                draw[b, 1:, n, (case.lengths[b] + n * case.block) // case.block : last // case.block + 1] = True
            if n * case.block >= count:
                draw[b, :, n] = False
    count_BHQ = draw.sum(-1).int()
    ids = torch.where(draw, torch.arange(blocks), blocks + 99).sort(-1).values.int()
    return q, k, v, counts, ids.to(device), count_BHQ.to(device)


def attend_naively(q_tKGD, k_SKD, v_SKD, seen_KGtS, scale, working):
    """Softmax over the mask; `working` is the dtype of both products' inputs, sums are fp64 or fp32; rows that see nothing give 0."""
    sums = torch.float64 if working == torch.float64 else torch.float32
    q, k, v = (x.to(working).to(sums) for x in (q_tKGD, k_SKD, v_SKD))
    logits = torch.einsum("tkgd,skd->kgts", q, k) * scale
    logits = logits.masked_fill(~seen_KGtS, float("-inf"))
    weights = logits.softmax(-1).nan_to_num().to(working).to(sums)
    return torch.einsum("kgts,skd->tkgd", weights, v).to(working), logits.logsumexp(-1)


def largest_error(case: Case, impl: str, dtype: torch.dtype, device: str, parts: int | None = None) -> float:
    """Error over the allowed one (twice that of eager products in the same dtype, plus one rounding); must stay below 1."""
    q, k, v, counts, ids, count_BHQ = build(case, dtype, device)
    lengths_B, counts_B = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.lengths, counts))
    scale = case.D**-0.5
    out = torch.full((*q.shape[:3], 2 * case.G, case.D), float("nan"), dtype=dtype, device=device)[:, :, :, case.G :]
    if impl == "interpreter":
        from rtpurbo.kernels.local_attention import kernel
        from rtpurbo.kernels.local_attention.tiles import UNBOUNDED

        lse = torch.full((len(counts), case.K * case.G, case.T), float("nan"))
        kernel.describe(
            q, k, v, lengths_B, counts_B, None, None, out, lse, scale=scale, window=UNBOUNDED.value, sinks=0, by_position=True,
            lists=None if ids is None or count_BHQ is None else (ids, count_BHQ), block_queries=case.block, block_keys=case.tile,
        ).run()  # fmt: skip
    elif parts is not None:
        from rtpurbo.kernels.local_attention import hopper_kernel
        from rtpurbo.kernels.local_attention.tiles import UNBOUNDED

        lse = torch.full((len(counts), case.K * case.G, case.T), float("nan"), device=device)
        lists = None if ids is None or count_BHQ is None else (ids, count_BHQ)
        hopper_kernel.launch(
            q, k, v, lengths_B, counts_B, None, None, out, lse, window=UNBOUNDED.value, sinks=0, scale=scale, by_position=True,
            lists=lists, parts=parts,
        )  # fmt: skip
    else:
        _, lse = attend_prefill(
            q, k, v, lengths_B=lengths_B, counts_B=counts_B, scale=scale, ids_BHQN=ids, count_BHQ=count_BHQ, block=case.block,
            out_BTKGD=out, return_lse=True, impl=impl,
        )  # fmt: skip
        assert lse is not None
    worst = 0.0
    for b, count in enumerate(counts):
        assert (out[b, count:] == 0).all()
        assert (lse[b, :, count:] == float("-inf")).all()
        if count == 0:
            continue
        picked = torch.randint(count, (60,), generator=torch.Generator().manual_seed(b)).tolist()
        rows = torch.tensor(sorted({0, min(127, count - 1), min(128, count - 1), count - 1, *picked}), device=device)
        end = case.lengths[b] + count
        j = torch.arange(end, device=device)
        seen = (j <= case.lengths[b] + rows[:, None]).expand(case.K, case.G, -1, -1)
        if ids is not None and count_BHQ is not None:
            listed = torch.zeros(*ids.shape[1:3], ids.shape[3] + 100, dtype=torch.bool, device=device)
            listed.scatter_(2, ids[b].long(), True)
            # Unused places name blocks beyond the cache.
            listed = listed[:, rows // case.block][..., j // case.block]
            seen = seen & listed.unflatten(0, (case.K, case.G))
        arguments = (q[b, rows], k[b, :end], v[b, :end], seen, scale)
        exact, exact_lse = attend_naively(*arguments, torch.float64)
        rounded, _ = attend_naively(*arguments, dtype)
        allowed = 2 * (rounded - exact).norm() + torch.finfo(dtype).eps * exact.norm() + 1e-30
        error = ((out[b, rows].double() - exact).norm() / allowed).item()
        empty = exact_lse == float("-inf")
        got_lse = lse[b][:, rows].unflatten(0, (case.K, case.G)).double()
        assert (got_lse[empty] == float("-inf")).all()
        lse_error = (got_lse - exact_lse)[~empty].abs().max().item() / 1e-4 if (~empty).any() else 0.0
        worst = max(worst, error, lse_error) if error == error and lse_error == lse_error else float("nan")
    return worst


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_matches_the_naive_mask(name):
    assert largest_error(SMALL[name], "reference", torch.float32, "cpu") < 1


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


def test_parts_over_disjoint_keys_merge_to_the_whole(interpreter_errors):
    assert interpreter_errors["merged parts"] < 1e-5


def test_work_is_cut_along_the_keys_only_where_that_fills_the_gpu():
    from rtpurbo.kernels.local_attention.merge import parts_for

    unit_bytes = 4 * 128 * 128
    # 3 rounds of 132 for 320 pieces, 5 half rounds when cut in two.
    assert parts_for(320, 132, 1 << 20, unit_bytes) == 2
    assert parts_for(264, 132, 1 << 20, unit_bytes) == 1
    assert parts_for(320, 132, 4096, unit_bytes) == 1
    assert parts_for(132 * 6 + 1, 132, 1 << 20, unit_bytes) == 1


def test_the_sparse_cases_keep_a_part_of_many_blocks():
    for name in ("listed", "listed, odd offset", "listed, heads of a view"):
        *_, ids, count = build(SMALL[name], torch.float32, "cpu")
        assert ids is not None
        assert count is not None
        assert ids.shape[3] >= 16
        assert 0.05 < count.float().mean() / ids.shape[3] < 0.5


def test_lists_that_do_not_fit_are_refused():
    q, k, v, _, ids, count = build(SMALL["listed"], torch.float32, "cpu")
    assert ids is not None
    some = {"lengths_B": torch.tensor([256]), "counts_B": torch.tensor([64]), "scale": 1.0}
    with pytest.raises(ValueError, match="give ids and count together"):
        attend_prefill(q, k, v, **some, ids_BHQN=ids)
    with pytest.raises(ValueError, match="wanted int32"):
        attend_prefill(q, k, v, **some, ids_BHQN=ids.long(), count_BHQ=count, block=16)
    with pytest.raises(ValueError, match=r"wanted int32 \(1, 2, 1, 'N'\)"):
        attend_prefill(q, k, v, **some, ids_BHQN=ids, count_BHQ=count, block=128)


def test_a_prefill_kernel_that_cannot_run_says_why():
    pytest.importorskip("triton")
    q, k = torch.zeros(1, 4, 1, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 4, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="impl 'gluon' cannot run: it needs all tensors on one NVIDIA GPU, found cpu"):
        choose_prefill_impl(q, k, k, impl="gluon")
    with pytest.raises(ValueError, match="impl 'triton' cannot run: lists of blocks of 64, wanted 128"):
        choose_prefill_impl(q, k, k, block=64, impl="triton")
    with pytest.raises(ValueError, match="impl 'cuda' is not one of auto, reference, triton, gluon"):
        choose_prefill_impl(q, k, k, impl="cuda")
    assert choose_prefill_impl(q, k, k) == "reference"


def test_the_crossover_is_chosen_by_device_mask_and_prompt(monkeypatch):
    from rtpurbo.kernels.local_attention import crossover

    device = torch.device("cuda")
    for name, wanted in (("NVIDIA H200", True), ("NVIDIA GeForce RTX 4090", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert crossover.prefers_fa4(device, "dense", 1 << 17, 1 << 17) is wanted
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert not crossover.prefers_fa4(device, "dense", 1 << 16, 1 << 16)
    assert not crossover.prefers_fa4(device, "dense", 1 << 17, 1 << 18)
    assert not crossover.prefers_fa4(device, "window", 1 << 20, 1 << 20)


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
    assert largest_error(dataclasses.replace(LARGE[name], block=128), impl, dtype, "cuda") < 1


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    "name", ["dense, odd length", "dense, ragged", "listed", "listed, odd offset", "listed, ragged", "listed, nothing"]
)
def test_the_hopper_kernel_cut_along_the_keys_matches_the_naive_mask(name, parts):
    assert largest_error(dataclasses.replace(LARGE[name], block=128), "gluon", torch.bfloat16, "cuda", parts) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER or importlib.util.find_spec("flash_attn") is None, reason="needs Hopper and flash-attn-4")
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("offset", [None, 1111])
def test_flash_attention_4_matches_the_own_kernel(offset, window):
    T, K, G = 1000, 2, 3
    S = T + (offset or 0) + (0 if offset is None else 77)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, T, K, G, 128), (2, S, K, 128), (2, S, K, 128))
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for shape in shapes)
    counts = torch.tensor([T, 333], dtype=torch.int32, device="cuda")
    lengths = None if offset is None else torch.tensor([offset, 5], dtype=torch.int32, device="cuda")
    results = []
    for impl in ("gluon", "fa4"):
        if window is None:
            out, lse = attend_prefill(q, k, v, lengths_B=lengths, counts_B=counts, scale=0.3, return_lse=True, impl=impl)
        else:
            out, lse = attend_local(
                q, k, v, window=window, sinks=4, scale=0.3, lengths_B=lengths, counts_B=counts, by_position=offset is not None, impl=impl
            )  # fmt: skip
        assert lse is not None
        results.append((out.double(), lse))
    (own, own_lse), (other, other_lse) = results
    assert (other - own).norm() < 8e-3 * own.norm()
    assert (other[1, 333:] == 0).all()
    torch.testing.assert_close(other_lse, own_lse, atol=1e-3, rtol=0)


def interpreted_merge() -> float:
    """Largest error of out and lse of three parts, one of which sees nothing for some queries; and of a query that sees nothing."""
    from rtpurbo.kernels.local_attention.merge import merge_parts

    B, T, K, G, D, S = 2, 37, 2, 3, 16, 30
    logits, v = 3 * torch.randn(B, K * G, T, S), torch.randn(B, S, K * G, D)
    logits[:, :, 5:9, 10:20] = float("-inf")
    logits[:, :, 20] = float("-inf")
    outs, lses = [], []
    for keys in (slice(0, 10), slice(10, 20), slice(20, 30)):
        outs.append(torch.einsum("bhts,bshd->bthd", logits[..., keys].softmax(-1).nan_to_num(), v[:, keys]))
        lses.append(logits[..., keys].logsumexp(-1))
    out, lse = torch.full((B, T, K, 2 * G, D), float("nan"))[:, :, :, :G], torch.full((B, K * G, T), float("nan"))
    merge_parts(torch.stack(outs), torch.stack(lses), out, lse)
    wanted = torch.einsum("bhts,bshd->bthd", logits.softmax(-1).nan_to_num(), v).unflatten(2, (K, G))
    assert (lse[:, :, 20] == float("-inf")).all()
    rows = [t for t in range(T) if t != 20]
    return max((out - wanted).abs().max().item(), (lse - logits.logsumexp(-1))[:, :, rows].abs().max().item())


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # Fills empty tensors with NaN.
    errors = {name: largest_error(case, "interpreter", torch.float32, "cpu") for name, case in SMALL.items()}
    json.dump({**errors, "merged parts": interpreted_merge()}, sys.stdout)
