"""select_prefill: the guarantee on the pooled softmax, in fp64, for the reference, the interpreted and the compiled kernel."""

# B batch  T chunk tokens  S cached tokens  H retrieval query heads  I index-key sets  R index dim  Q query blocks  N key blocks
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from rtpurbo.kernels.prefill_selection import select_prefill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    T: int
    lengths: tuple[int, ...] = (0,)
    counts: tuple[int, ...] | None = None
    key_sets: tuple[int, ...] = (0,)
    top_p: float = 0.9
    sinks: int = 4
    block: int = 16
    pooling: str = "mean"
    peak: float = 2.5


SMALL = {
    "one token": Case(T=1),
    "single shot": Case(T=600, key_sets=(0, 1)),
    "chunk at an offset": Case(T=128, lengths=(512,), key_sets=(0, 1, 2)),
    "shared keys, odd offset": Case(T=130, lengths=(515,), key_sets=(1, 0, 1)),
    "maximum": Case(T=128, lengths=(512,), pooling="max"),
    "ragged": Case(T=70, lengths=(0, 5, 300, 640), counts=(70, 64, 0, 33), key_sets=(0, 1)),
    "no sinks": Case(T=100, lengths=(400,), sinks=0),
    "many sinks": Case(T=100, lengths=(400,), sinks=50),
    "everything": Case(T=100, lengths=(400,), top_p=1.0),
    "block that is no power of two": Case(T=100, lengths=(800,), block=24),
}
SPARSE = ("chunk at an offset", "shared keys, odd offset", "maximum")

LARGE = {
    "single shot": Case(T=16384, key_sets=(0, 1, 2, 3, 4), block=128),
    "chunk near a million": Case(T=1024, lengths=((1 << 20) - 1024,), key_sets=(0, 0, 1), block=128, peak=3.0),
    "ragged, odd": Case(T=1000, lengths=(0, 5, 30000, 64001), counts=(1000, 999, 0, 517), key_sets=(0, 1), block=128),
    "maximum": Case(T=2048, lengths=(32768,), block=128, pooling="max"),
}


def build(case: Case, device: str):
    """Index queries and keys whose pooled logits (times scale 0.25) are normal with deviation peak; NaN where no token is."""
    generator = torch.Generator().manual_seed(3)
    B, H, R = len(case.lengths), len(case.key_sets), 16
    counts = case.counts or (case.T,) * B
    S = max(case.lengths) + case.T
    amplitude = case.peak**0.5

    def blocks_and_noise(rows, sets):
        blocks = amplitude * torch.randn(B, -(-rows // case.block), sets, R, generator=generator)
        return blocks.repeat_interleave(case.block, dim=1)[:, :rows] + 0.05 * torch.randn(B, rows, sets, R, generator=generator)

    index_q, index_k = blocks_and_noise(case.T, H), blocks_and_noise(S, max(case.key_sets) + 1)
    for b, count in enumerate(counts):
        index_q[b, count:] = float("nan")
        index_k[b, case.lengths[b] + count :] = float("nan")
    return index_q.to(device), index_k.to(device), counts


def pool(rows: torch.Tensor, pooling: str) -> torch.Tensor:
    return rows.double().mean(0) if pooling == "mean" else rows.double().amax(0)


def check(case: Case, impl: str, device: str) -> dict[str, float]:
    """Share of the candidates that is kept, and asserts what is promised, list by list."""
    index_q, index_k, counts = build(case, device)
    lengths_B, counts_B = (torch.tensor(x, dtype=torch.int32, device=device) for x in (case.lengths, counts))
    key_set_H = torch.tensor(case.key_sets, dtype=torch.int32, device=device)
    ids, count = select_prefill(
        index_q, index_k, key_set_H=key_set_H, lengths_B=lengths_B, counts_B=counts_B, scale=0.25, top_p=case.top_p, sinks=case.sinks,
        block=case.block, pooling=case.pooling, impl=impl,
    )  # fmt: skip
    assert ids.dtype == count.dtype == torch.int32
    index_q, index_k, ids, count = (x.cpu() for x in (index_q, index_k, ids, count))
    kept = candidates = 0
    for b, valid in enumerate(counts):
        end = case.lengths[b] + valid
        starts = range(0, end, case.block)
        pooled_NIR = torch.stack([pool(index_k[b, m : min(m + case.block, end)], case.pooling) for m in starts]) if end else None
        query_blocks = range(count.shape[2]) if count.shape[2] <= 16 else (0, 1, 2, 7, count.shape[2] // 2, count.shape[2] - 1)
        for n in query_blocks:
            if n * case.block >= valid:
                assert (count[b, :, n] == 0).all()
                continue
            assert pooled_NIR is not None
            first, last = case.lengths[b] + n * case.block, case.lengths[b] + min((n + 1) * case.block, valid) - 1
            q_HR = pool(index_q[b, n * case.block : min((n + 1) * case.block, valid)], case.pooling)
            for h, key_set in enumerate(case.key_sets):
                logit = 0.25 * pooled_NIR[: last // case.block + 1, key_set] @ q_HR[h]
                chosen = ids[b, h, n, : count[b, h, n]].long()
                assert (chosen.diff() > 0).all()
                share = logit.softmax(0)
                m = torch.arange(len(logit))
                forced = (m * case.block < case.sinks) | (m >= first // case.block - 1)
                mask = torch.zeros(len(logit), dtype=torch.bool)
                mask[chosen] = True
                assert mask[forced].all()
                assert share[mask].sum() >= min(case.top_p, 1.0) - 1e-5
                # Every free block that was taken lies at most a bin (1/8) below the last one that the exact set needs.
                order = logit.masked_fill(forced, float("-inf")).argsort(descending=True)
                before = share[forced].sum() + share.masked_fill(forced, 0.0)[order].cumsum(0) - share.masked_fill(forced, 0.0)[order]
                needed = order[(before < case.top_p - 1e-5) & ~forced[order]]
                floor = logit[needed].min() - 0.125 - 1e-4 if len(needed) else float("inf")
                assert (logit[mask & ~forced] >= floor).all() or case.top_p >= 1
                kept, candidates = kept + len(chosen), candidates + len(logit)
    return {"kept": kept / candidates, "blocks": float(ids.shape[3])}


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_keeps_the_mass_and_little_more(name):
    result = check(SMALL[name], "reference", "cpu")
    assert (0.05 <= result["kept"] <= 0.5 and result["blocks"] >= 16) or name not in SPARSE


@pytest.fixture(scope="module")
def interpreter_results():
    """Results of the small cases from one process of its own, because the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SMALL)
def test_the_interpreted_kernel_keeps_the_mass_and_little_more(interpreter_results, name):
    result = interpreter_results[name]
    assert result == pytest.approx(check(SMALL[name], "reference", "cpu"), rel=0.02)


def test_lists_do_not_depend_on_how_the_prompt_was_cut():
    case = dataclasses.replace(SMALL["single shot"], T=640)
    index_q, index_k, _ = build(case, "cpu")
    rest = {"key_set_H": torch.tensor(case.key_sets), "scale": 0.25, "top_p": 0.9, "sinks": 4, "block": 16}
    whole, count = select_prefill(index_q, index_k, **rest, lengths_B=torch.tensor([0]), counts_B=torch.tensor([640]))
    for start in range(0, 640, 160):
        ids, part = select_prefill(
            index_q[:, start : start + 160],
            index_k[:, : start + 160],
            **rest,
            lengths_B=torch.tensor([start]),
            counts_B=torch.tensor([160]),
        )
        blocks = slice(start // 16, start // 16 + 10)
        assert torch.equal(part, count[:, :, blocks])
        used = torch.arange(ids.shape[3]) < part[..., None]
        assert torch.equal(ids[used], whole[:, :, blocks, : ids.shape[3]][used])


def test_what_does_not_fit_the_selection_is_refused():
    x, one = torch.zeros(1, 32, 2, 16), torch.ones(1, dtype=torch.int32)
    rest = {"lengths_B": one, "counts_B": one, "scale": 1.0, "sinks": 4}
    with pytest.raises(ValueError, match=r"key_set \(3,\) do not fit"):
        select_prefill(x, x, key_set_H=torch.zeros(3), top_p=0.9, **rest)
    with pytest.raises(ValueError, match="top_p 0 must be > 0"):
        select_prefill(x, x, key_set_H=torch.zeros(2), top_p=0, **rest)
    with pytest.raises(ValueError, match="pooling 'median' one of"):
        select_prefill(x, x, key_set_H=torch.zeros(2), top_p=0.9, pooling="median", **rest)
    with pytest.raises(ValueError, match="impl 'gluon' is not one of auto, triton, reference"):
        select_prefill(x, x, key_set_H=torch.zeros(2), top_p=0.9, impl="gluon", **rest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", LARGE)
def test_the_compiled_kernel_keeps_the_mass_and_little_more(name):
    result = check(LARGE[name], "triton", "cuda")
    assert result["kept"] <= 0.5 or name == "ragged, odd"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # Fills empty tensors.
    json.dump({name: check(case, "triton", "cpu") for name, case in SMALL.items()}, sys.stdout)
