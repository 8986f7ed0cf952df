"""The eager definitions in kernels/: ring positions, local attention, block scores, selection and selected attention."""

# B batch  T query tokens  S cached tokens  H query heads  K kv heads  D head dim  R index dim  N blocks
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.kernels.block_scores import block_scores
from rtpurbo.kernels.block_selection import mask_to_ids, select_blocks
from rtpurbo.kernels.block_selection.reference import NUM_BINS, select_blocks_exact
from rtpurbo.kernels.local_attention import attend_local, ring_positions, write_ring
from rtpurbo.kernels.sparse_attention import attend_blocks


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence in fp64: q [T, H, D], k and v [S, H, D], visible [H, T, S]; rows that see nothing give 0."""
    logits = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf), dim=-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v.double())


def local_mask(tokens: int, window: int, sinks: int) -> torch.Tensor:
    return torch.tensor([[j <= i and (i - j < window or j < sinks) for j in range(tokens)] for i in range(tokens)])


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_ring_positions_equal_a_simulation_that_writes_token_by_token(window: int, sinks: int) -> None:
    slots = [-1] * (sinks + window)
    for length in range(40):
        assert ring_positions(torch.tensor([length]), window, sinks).tolist() == [slots]
        slots[length if length < sinks else sinks + (length - sinks) % window] = length


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    window=st.integers(1, 9),
    sinks=st.integers(0, 6),
    chunks=st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=2), min_size=1, max_size=5),
)
def test_a_ring_written_in_chunks_holds_the_keys_that_its_positions_name(window: int, sinks: int, chunks: list[list[int]]) -> None:
    ring, lengths = torch.full((2, sinks + window, 1, 1), math.nan), torch.zeros(2, dtype=torch.int32)
    for counts in chunks:
        width = max(counts)
        chunk = (lengths[:, None] + torch.arange(width))[:, :, None, None].float()
        write_ring(ring, chunk, lengths, torch.tensor(counts, dtype=torch.int32), window=window, sinks=sinks)
        lengths = lengths + torch.tensor(counts, dtype=torch.int32)
        wanted = ring_positions(lengths, window, sinks)
        filled = wanted >= 0
        assert torch.equal(ring[:, :, 0, 0][filled], wanted[filled].float())
        assert ring[:, :, 0, 0][~filled].isnan().all()


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (7, 0), (16, 4), (5, 20), (200, 4)])
def test_local_attention_equals_a_full_mask_in_fp64(group: int, window: int, sinks: int) -> None:
    tokens, kv_heads, dim = 67, 2, 8
    q, k, v = random(1, tokens, kv_heads * group, dim, scale=3), random(1, tokens, kv_heads, dim, seed=1), random(1, tokens, 2, dim)
    out, lse = attend_local(q, k, v, window=window, sinks=sinks, scale=0.5)
    keys, values = k[0].repeat_interleave(group, 1), v[0].repeat_interleave(group, 1)
    visible = local_mask(tokens, window, sinks)
    assert (out[0] - naive(q[0], keys, values, visible, 0.5)).abs().max() < 1e-5
    logits = torch.einsum("thd,shd->hts", q[0].double(), keys.double()) * 0.5
    assert (lse[0] - logits.masked_fill(~visible, -math.inf).logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 50, [50], [7, 1, 30, 12], [16, 16, 18]])
@pytest.mark.parametrize(("window", "sinks"), [(1, 2), (8, 0), (8, 4), (64, 4)])
def test_chunked_local_attention_equals_the_whole_though_empty_slots_are_nan(sizes: list[int], window: int, sinks: int) -> None:
    q, k, v = (random(2, 50, heads, 4, seed=seed, scale=2) for seed, heads in enumerate((4, 2, 2)))
    whole, whole_lse = attend_local(q, k, v, window=window, sinks=sinks, scale=1.0)
    rings = [torch.full((2, sinks + window, 2, 4), math.nan) for _ in range(2)]
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        lengths, counts = torch.full((2,), begin, dtype=torch.int32), torch.full((2,), size, dtype=torch.int32)
        out, lse = attend_local(
            q[:, part], k[:, part], v[:, part], window=window, sinks=sinks, scale=1.0,
            lengths_B=lengths, counts_B=counts, ring_k_BWKD=rings[0], ring_v_BWKD=rings[1],
        )  # fmt: skip
        assert (out - whole[:, part]).abs().max() < 1e-4
        assert (lse - whole_lse[:, :, part]).abs().max() < 1e-4
        for ring, chunk in zip(rings, (k, v), strict=True):
            write_ring(ring, chunk[:, part], lengths, counts, window=window, sinks=sinks)
        begin += size


def test_rows_beyond_a_sequences_count_give_zero_and_minus_infinity() -> None:
    q, k, v = random(2, 6, 2, 4), random(2, 6, 1, 4), random(2, 6, 1, 4)
    k[0, 2:] = v[0, 2:] = math.nan
    out, lse = attend_local(q, k, v, window=3, sinks=1, scale=1.0, counts_B=torch.tensor([2, 6]))
    alone, _ = attend_local(q[:1, :2], k[:1, :2], v[:1, :2], window=3, sinks=1, scale=1.0)
    assert torch.equal(out[:1, :2], alone)
    assert (out[0, 2:] == 0).all()
    assert (lse[0, :, 2:] == -math.inf).all()


@pytest.mark.parametrize(("keys", "key_set"), [(3, [0, 1, 2]), (1, [0, 0, 0]), (2, [0, 1, 1])])
def test_block_scores_equal_the_maximum_and_sum_of_each_block(keys: int, key_set: list[int]) -> None:
    q, k = random(2, 2, 3, 4, scale=3), random(2, 37, keys, 4, seed=1)
    visible = torch.tensor([[1, 16], [17, 37]])
    most, total = block_scores(q, k, key_set_H=torch.tensor(key_set), visible_BT=visible, scale=0.7, block_size=16)
    assert most.shape == total.shape == (2, 3, 2, 3)
    for b in range(2):
        for h in range(3):
            for t in range(2):
                logits = (k[b, :, key_set[h]].double() @ q[b, t, h].double() * 0.7)[: int(visible[b, t])]
                for n in range(3):
                    block = logits[n * 16 : (n + 1) * 16]
                    if len(block) == 0:
                        assert most[b, h, t, n] == -math.inf
                        assert total[b, h, t, n] == 0
                    else:
                        assert float(most[b, h, t, n]) == pytest.approx(float(block.max()), rel=1e-5, abs=1e-5)
                        assert float(total[b, h, t, n]) == pytest.approx(float((block - block.max()).exp().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_block_scores_read_index_keys_in_their_stored_dtype_and_round_queries_to_bfloat16_with_them(dtype: torch.dtype) -> None:
    given, k = random(1, 1, 2, 4), random(1, 20, 2, 4, seed=1).to(dtype)
    for stored, q in ((k, given.to(torch.bfloat16).float()), (k.float(), given)):
        most, _ = block_scores(given, stored, key_set_H=torch.tensor([1, 0]), visible_BT=torch.tensor([[20]]), scale=1.0, block_size=8)
        wanted = (k[0, :, [1, 0]].float() * q[0]).sum(-1).T
        assert (most[0, :, 0] - torch.stack([wanted[:, i : i + 8].amax(1) for i in (0, 8, 16)], 1)).abs().max() < 1e-5


SCORES = st.floats(-60, 60, width=32) | st.sampled_from([0.0, 5.0, 5.0625, 5.125, -1e30, 1e30])
BLOCKS = st.lists(st.tuples(SCORES, st.floats(1, 64, width=32)), min_size=1, max_size=60)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(blocks=BLOCKS, top_p=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]), sinks=st.sampled_from([0, 4, 40]))
def test_a_selection_keeps_its_mass_and_at_most_one_bin_more_than_the_exact_set(
    blocks: list[tuple[float, float]], top_p: float, sinks: int
) -> None:
    most, total = (torch.tensor(column)[None, None, None] for column in zip(*blocks, strict=True))
    kept = select_blocks(most, total, top_p=top_p, sinks=sinks, block_size=16)[0, 0, 0]
    exact = select_blocks_exact(most, total, top_p, sinks, 16)[0, 0, 0]
    count = len(blocks)
    forced = torch.tensor([n * 16 < sinks or n >= count - 2 for n in range(count)])
    assert kept[forced].all()
    assert exact[forced].all()
    assert kept[exact].all()
    mass = total[0, 0, 0].double() * (most - most.amax())[0, 0, 0].double().exp()
    assert float(mass[kept].sum()) >= top_p * float(mass.sum()) * (1 - 1e-6)
    bins = ((most.amax() - most)[0, 0, 0] * 8).clamp(max=NUM_BINS - 1).floor().long()
    extra = kept & ~exact
    assert len(set(bins[extra].tolist())) <= 1
    if extra.any() and (exact & ~forced).any():
        assert bins[extra].max() == bins[exact & ~forced].max()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(blocks=BLOCKS, top_p=st.sampled_from([0.5, 0.9]))
def test_the_exact_set_is_the_shortest_prefix_that_reaches_the_mass(blocks: list[tuple[float, float]], top_p: float) -> None:
    most, total = (torch.tensor(column)[None, None, None] for column in zip(*blocks, strict=True))
    kept = set(select_blocks_exact(most, total, top_p, 0, 16)[0, 0, 0].nonzero().flatten().tolist())
    count, below_top = len(blocks), (most - most.amax())[0, 0, 0].tolist()
    mass = [round(2**32 * math.exp(m) * s) for m, (_, s) in zip(below_top, blocks, strict=True)]
    wanted = set(range(max(0, count - 2), count))
    for n in sorted(range(count), key=lambda n: (-blocks[n][0], n)):
        if sum(mass[i] for i in wanted) < math.ceil(sum(mass) * top_p):
            wanted.add(n)
    assert kept == wanted


def select(most: list[float], top_p: float, sinks: int = 0) -> list[int]:
    scores = torch.tensor(most)[None, None, None]
    return select_blocks(scores, torch.where(scores > -math.inf, 1.0, 0.0), top_p=top_p, sinks=sinks)[0, 0, 0].nonzero().flatten().tolist()


def test_one_hot_key_selects_its_block_and_the_forced_ones() -> None:
    assert select([0.0] * 7 + [40.0] + [0.0] * 22, 0.9, sinks=4) == [0, 7, 28, 29]


def test_equal_blocks_fall_into_one_bin_and_are_all_taken() -> None:
    assert select([3.0] * 20, 0.5) == list(range(20))


def test_forced_blocks_count_towards_the_mass() -> None:
    assert select([0.0, 5.0, 9.0, 40.0, 2.0], 0.9) == [3, 4]


def test_top_p_of_one_selects_every_visible_block_and_no_other() -> None:
    assert select([0.0, -200.0, 5.0, -math.inf], 1.0) == [0, 1, 2]


def test_a_single_block_is_selected() -> None:
    assert select([-1e30], 0.01) == [0]


def test_a_query_that_sees_nothing_selects_nothing() -> None:
    assert select([-math.inf] * 4, 0.9) == []


def test_blocks_beyond_the_visible_ones_are_not_the_newest() -> None:
    assert select([1.0, 50.0, 1.0, 1.0, 1.0, -math.inf, -math.inf], 0.9) == [1, 3, 4]


def test_mask_to_ids_lists_blocks_ascending_and_fills_with_minus_one() -> None:
    mask = torch.tensor([[[True, False, True, True], [False, False, False, False]]])
    ids, counts = mask_to_ids(mask)
    assert ids.tolist() == [[[0, 2, 3, -1], [-1, -1, -1, -1]]]
    assert counts.tolist() == [[3, 0]]
    assert ids.dtype == counts.dtype == torch.int32


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_attention_over_blocks_equals_a_mask_per_head_in_fp64(group: int) -> None:
    heads, tokens, stored, dim, block = 2 * group, 2, 45, 8, 16
    q, k, v = random(2, tokens, heads, dim, scale=3), random(2, stored, 2, dim, seed=1), random(2, stored, 2, dim, seed=2)
    k[0, 33:] = v[0, 33:] = math.nan
    visible = torch.tensor([[20, 33], [44, 45]])
    selected = torch.rand((2, heads, tokens, 3), generator=torch.Generator().manual_seed(3)) < 0.5
    selected[..., 0] = True
    kv_head = torch.arange(heads) // group
    out, lse = attend_blocks(q, k, v, kv_head_H=kv_head, visible_BT=visible, selected_BHTN=selected, scale=0.4, block_size=block)
    position = torch.arange(stored)
    for b in range(2):
        mask = selected[b][..., position // block] & (position < visible[b][None, :, None])
        keys, values = k[b].nan_to_num(0)[:, kv_head], v[b].nan_to_num(0)[:, kv_head]
        assert (out[b] - naive(q[b], keys, values, mask, 0.4)).abs().max() < 1e-5
        logits = torch.einsum("thd,shd->hts", q[b].double(), keys.double()) * 0.4
        assert (lse[b] - logits.masked_fill(~mask, -math.inf).logsumexp(-1)).abs().max() < 1e-5


def test_attention_over_no_block_gives_zero_and_minus_infinity() -> None:
    out, lse = attend_blocks(
        random(1, 1, 2, 4), random(1, 8, 1, 4), random(1, 8, 1, 4), kv_head_H=torch.tensor([0, 0]),
        visible_BT=torch.tensor([[8]]), selected_BHTN=torch.zeros(1, 2, 1, 2, dtype=torch.bool), scale=1.0, block_size=4,
    )  # fmt: skip
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_scores_selection_and_attention_together_keep_few_peaked_blocks() -> None:
    stored, block = 32 * 16, 16
    k = random(1, stored, 1, 4, seed=1)
    k[0, 100] = 12 * k[0, 100] / k[0, 100].norm()
    most, total = block_scores(
        k[:, 100:101], k, key_set_H=torch.tensor([0]), visible_BT=torch.tensor([[stored]]), scale=1.0, block_size=block
    )
    kept = select_blocks(most, total, top_p=0.9, sinks=4, block_size=block)[0, 0, 0]
    assert kept.nonzero().flatten().tolist() == [0, 6, 30, 31]


@pytest.mark.parametrize(
    "call",
    [
        lambda: attend_local(random(1, 2, 3, 4), random(1, 2, 2, 4), random(1, 2, 2, 4), window=1, sinks=0, scale=1.0),
        lambda: attend_local(random(1, 2, 2, 4), random(1, 2, 2, 4), random(1, 2, 2, 4), window=0, sinks=0, scale=1.0),
        lambda: select_blocks(random(1, 1, 1, 2), random(1, 1, 1, 3), top_p=0.9, sinks=0),
        lambda: select_blocks(random(1, 1, 1, 2), random(1, 1, 1, 2), top_p=0.0, sinks=0),
        lambda: block_scores(
            random(1, 1, 2, 4), random(2, 8, 2, 4), key_set_H=torch.tensor([0, 1]), visible_BT=torch.tensor([[1]]), scale=1.0
        ),
    ],
    ids=["heads", "window", "shapes", "top_p", "batch"],
)
def test_shapes_and_options_that_do_not_fit_are_refused(call) -> None:
    with pytest.raises(ValueError, match=r"^(attend_local|select_blocks|block_scores): "):
        call()
