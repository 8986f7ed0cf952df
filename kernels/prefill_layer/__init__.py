"""prefill_layer: the whole attention of one layer for a chunk of queries, every head by its role."""

# B batch  T chunk tokens  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  G query heads per kv head
# D head dim  I index-key sets  R index dim
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rtpurbo.kernels.local_attention import attend_local
from rtpurbo.kernels.prefill_selection import select_prefill
from rtpurbo.kernels.sparse_attention import attend_prefill

__all__ = ["prefill_layer"]

# Block lists of one piece of queries, in bytes: the longest chunk is worked through in pieces whose lists fit.
LIST_BYTES = 96 << 20


def prefill_layer(
    q_BTHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKD: torch.Tensor,
    *,
    retrieval_counts: Sequence[int],
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    newest: int,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    pattern: Literal["dense", "topp"] = "dense",
    index_q_BTHR: torch.Tensor | None = None,
    index_k_BSIR: torch.Tensor | None = None,
    key_sets: Sequence[int] = (),
    index_scale: float | None = None,
    top_p: float | None = None,
    prefill_block: int = 128,
    dense: bool = False,
    from_start: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Local heads attend to window + sinks, retrieval heads to everything ("dense") or to selected blocks ("topp"); all causal.

    Heads are in run-time order: retained KV groups first, retrieval heads first inside each. One launch for the heads of local
    groups, and at most two for a run of retained groups with equal retrieval counts; keys and values are read where they lie.

    Args:
        q_BTHD, k_BTKD, v_BTKD: the chunk of all heads, post-RoPE; row t of sequence b is position lengths_B[b] + t.
        retrieval_counts: retrieval heads (>= 1) of every retained group; () for a layer of local heads only.
        lengths_B, counts_B: int32, tokens before the chunk and its valid rows (the first ones); rows beyond return 0.
        newest: no sequence has lengths + counts above this (on the host).
        k_BSKD, v_BSKD: the retained groups' cache by position, the chunk ALREADY written.
        ring_k_BWKD, ring_v_BWKD: the local groups' rings (see `attend_local`), the chunk NOT yet written; None only where there are none.
        window, sinks, scale: see `attend_local`.
        pattern: how retrieval heads attend. "topp" wants the next five: index queries of the retrieval heads (run-time order),
            index keys by position with the chunk written, the set that each retrieval head reads, logit scale, share of mass.
        prefill_block: queries and keys per block of the selection.
        dense: every group is retained and every head attends to everything; roles and pattern are not looked at.
        from_start: the host knows that no sequence has tokens before this chunk: rings and cache are not read, the chunk holds every
            key, with finite values in all rows.
        impl: passed on to the parts, see `attend_local`, `attend_prefill` and `select_prefill`.

    Returns out [B, T, H, D] in q's dtype. Raises ValueError for inputs that do not fit. Source: arXiv 2605.16928 section 3;
    "topp": ours.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    if K == 0 or H % K or k_BTKD.shape != (B, T, K, D):
        raise ValueError(f"prefill_layer: q {tuple(q_BTHD.shape)} and k {tuple(k_BTKD.shape)} do not fit")
    G = H // K
    counts_K = (G,) * K if dense else tuple(retrieval_counts)
    retained = len(counts_K)
    if from_start:
        k_BSKD, v_BSKD, ring_k_BWKD, ring_v_BWKD = k_BTKD[:, :, :retained], v_BTKD[:, :, :retained], None, None
    _check_keys(counts_K, K, G, None if v_BSKD is None else k_BSKD, None if ring_v_BWKD is None else ring_k_BWKD, from_start)
    if pattern not in ("dense", "topp"):
        raise ValueError(f"prefill_layer: pattern {pattern!r} is neither dense nor topp")
    select = None
    if pattern == "topp" and not dense and retained:
        if index_q_BTHR is None or index_k_BSIR is None or index_scale is None or top_p is None or len(key_sets) != sum(counts_K):
            raise ValueError(
                f"prefill_layer: pattern 'topp' wants index_q, index_k, index_scale, top_p and {sum(counts_K)} key_sets, "
                f"found {len(key_sets)} key_sets"
            )
        select = Selection(
            index_q_BTHR=index_q_BTHR, index_k_BSIR=index_k_BSIR[:, :newest], key_sets=tuple(key_sets), scale=index_scale, top_p=top_p,
            block=prefill_block, sinks=sinks,
        )  # fmt: skip
    out_BTHD = torch.empty((B, T, H, D), dtype=q_BTHD.dtype, device=q_BTHD.device)
    out_BTKGD, q_BTKGD = out_BTHD.unflatten(2, (K, G)), q_BTHD.unflatten(2, (K, G))
    start_B = None if from_start else lengths_B
    attend = functools.partial(
        attend_local, window=window, sinks=sinks, scale=scale, lengths_B=start_B, counts_B=counts_B, return_lse=False, impl=impl
    )  # fmt: skip
    if retained < K:
        k, v, out = (x[:, :, retained:] for x in (k_BTKD, v_BTKD, out_BTKGD))
        attend(q_BTKGD[:, :, retained:], k, v, ring_k_BWKD=ring_k_BWKD, ring_v_BWKD=ring_v_BWKD, out=out)
    first_head = 0
    for groups, n in runs_of(counts_K):
        assert k_BSKD is not None
        assert v_BSKD is not None
        keys = slice(0, T if from_start else newest)
        k, v = k_BSKD[:, keys, groups], v_BSKD[:, keys, groups]
        q, out = q_BTKGD[:, :, groups], out_BTKGD[:, :, groups]
        heads = slice(first_head, first_head + n * q.shape[2])
        first_head = heads.stop
        if select is None:
            attend_prefill(
                q[..., :n, :], k, v, lengths_B=start_B, counts_B=counts_B, scale=scale, out_BTKGD=out[..., :n, :], impl=impl
            )  # fmt: skip
        else:
            _attend_selected(q[..., :n, :], k, v, lengths_B, counts_B, scale, select, heads, out[..., :n, :], impl)
        if n < G:
            attend(q[..., n:, :], k, v, by_position=not from_start, out=out[..., n:, :])
    return out_BTHD


def _check_keys(
    counts_K: tuple[int, ...], K: int, G: int, k_BSKD: torch.Tensor | None, ring_k_BWKD: torch.Tensor | None, from_start: bool
) -> None:
    """Counts are in range, and every group has its keys: a ring for local ones, a cache by position for retained ones."""
    retained = len(counts_K)
    if retained > K or not all(1 <= count <= G for count in counts_K):
        raise ValueError(f"prefill_layer: retrieval_counts {counts_K}, wanted at most {K} numbers from 1 to {G}")
    if not from_start and retained < K and ring_k_BWKD is None:
        raise ValueError(f"prefill_layer: {K - retained} local groups of {K} want ring_k and ring_v")
    if retained and (k_BSKD is None or k_BSKD.shape[2] != retained):
        found = None if k_BSKD is None else tuple(k_BSKD.shape)
        raise ValueError(f"prefill_layer: {retained} retained groups want k and v by position for as many KV heads, found {found}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the selection of a layer's retrieval heads reads, see `prefill_layer`."""

    index_q_BTHR: torch.Tensor
    index_k_BSIR: torch.Tensor
    key_sets: tuple[int, ...]
    scale: float
    top_p: float
    block: int
    sinks: int


def _attend_selected(
    q_BTKGD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    scale: float,
    select: Selection,
    heads: slice,
    out_BTKGD: torch.Tensor,
    impl: str,
) -> None:
    """The retrieval heads of one run of groups over selected blocks; rows `heads` of the layer's selection."""
    B, T = q_BTKGD.shape[:2]
    # A copy to the device that the host does not wait for.
    key_set_H = torch.tensor(select.key_sets[heads], dtype=torch.int32).to(q_BTKGD.device, non_blocking=True)
    blocks = -(-k_BSKD.shape[1] // select.block)
    step = max(1, LIST_BYTES // (4 * B * len(key_set_H) * blocks)) * select.block
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        offset_B, valid_B = lengths_B + start, (counts_B - start).clamp(0, rows.stop - start)
        ids_BHQN, count_BHQ = select_prefill(
            select.index_q_BTHR[:, rows, heads], select.index_k_BSIR, key_set_H=key_set_H, lengths_B=offset_B, counts_B=valid_B,
            scale=select.scale, top_p=select.top_p, sinks=select.sinks, block=select.block,
            impl="reference" if impl == "reference" else "auto",
        )  # fmt: skip
        attend_prefill(
            q_BTKGD[:, rows], k_BSKD, v_BSKD, lengths_B=offset_B, counts_B=valid_B, scale=scale, ids_BHQN=ids_BHQN,
            count_BHQ=count_BHQ, block=select.block, out_BTKGD=out_BTKGD[:, rows], impl=impl,
        )  # fmt: skip
        # Otherwise the lists of two pieces would exist at once.
        del ids_BHQN, count_BHQ


def runs_of(counts_K: tuple[int, ...]) -> list[tuple[slice, int]]:
    """Neighbouring groups with equal counts: (groups, count)."""
    starts = [g for g, count in enumerate(counts_K) if g == 0 or counts_K[g - 1] != count]
    stops = [*starts[1:], len(counts_K)][: len(starts)]
    return [(slice(start, stop), counts_K[start]) for start, stop in zip(starts, stops, strict=True)]
