"""rope_append in Triton: one program a head (or a set of index keys) and tile of tokens; it norms, projects, rotates and stores."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# B batch  T chunk tokens  M (H + 2 K) D  H query heads  K kv heads  D head dim  E half the head dim  S cached tokens
# W ring slots (sinks + window)  P retrieval heads  I index-key sets  R index dim  t tokens of a tile
import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.append.plan import AppendPlan
from rtpurbo.kernels.launch import Launch

TILE = 32


@triton.jit
def _project(first_tE, second_tE, weight_ptr, E: tl.constexpr, E_PADDED: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr):
    """[t, R]: the tile times the transposed weight [R, 2 E], in full fp32."""
    r_R = tl.arange(0, R_PADDED)
    e_E = tl.arange(0, E_PADDED)
    mask_RE = (r_R < R)[:, None] & (e_E < E)[None, :]
    place_RE = r_R[:, None] * (2 * E) + e_E[None, :]
    first_RE = tl.load(weight_ptr + place_RE, mask=mask_RE, other=0.0)
    second_RE = tl.load(weight_ptr + place_RE + E, mask=mask_RE, other=0.0)
    if first_tE.shape[0] == 1:
        out_tR = tl.sum(first_tE * first_RE + second_tE * second_RE, axis=1)[None, :]
    else:
        out_tR = tl.dot(first_tE, tl.trans(first_RE), input_precision="ieee")
        out_tR = tl.dot(second_tE, tl.trans(second_RE), out_tR, input_precision="ieee")
    return out_tR


@triton.jit
def _append_index(
    first_tE, second_tE, weight_ptr, index_k_ptr, key_set, position_t, valid_t, stride_is, stride_ii,
    E: tl.constexpr, E_PADDED: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Project the rows and store them as index keys of one set; index_k_ptr: of the sequence."""
    out_tR = _project(first_tE, second_tE, weight_ptr + key_set * (R * 2 * E), E, E_PADDED, R, R_PADDED)
    if IS_FP8:
        # The conversion itself makes NaN of what is out of range.
        out_tR = tl.minimum(tl.maximum(out_tR, -448.0), 448.0)
    r_R = tl.arange(0, R_PADDED)
    row_t = key_set * tl.cast(stride_ii, tl.int64) + position_t.to(tl.int64) * stride_is
    mask_tR = valid_t[:, None] & (r_R < R)[None, :]
    tl.store(index_k_ptr + row_t[:, None] + r_R[None, :], out_tR.to(index_k_ptr.dtype.element_ty), mask=mask_tR)


@triton.jit
def _store_halves(base_ptr, row_t, stride, first_tE, second_tE, valid_t, E: tl.constexpr, E_PADDED: tl.constexpr):
    e_E = tl.arange(0, E_PADDED)
    mask_tE = valid_t[:, None] & (e_E < E)[None, :]
    place_tE = base_ptr + row_t.to(tl.int64)[:, None] * stride + e_E[None, :]
    tl.store(place_tE, first_tE.to(base_ptr.dtype.element_ty), mask=mask_tE)
    tl.store(place_tE + E, second_tE.to(base_ptr.dtype.element_ty), mask=mask_tE)


@triton.jit
def _rope_append(
    qkv_ptr,
    out_ptr,  # may be qkv_ptr
    source_ptr,  # int32 [H + 2 K], which head of qkv each head is; used with HAS_ORDER
    cos_ptr,
    sin_ptr,
    lengths_ptr,
    counts_ptr,
    norms_ptr,
    index_q_weight_ptr,
    index_k_weight_ptr,
    place_ptr,
    group_ptr,  # int32 [I], the KV group of every set of index keys
    index_q_ptr,
    k_ptr,
    v_ptr,
    index_k_ptr,
    ring_k_ptr,
    ring_v_ptr,
    T,
    stride_kb,
    stride_ks,
    stride_ib,
    stride_is,
    stride_ii,
    stride_rb,
    stride_rw,
    retained,
    num_places,
    num_sets,
    window,
    sinks,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    R: tl.constexpr,
    R_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    HAS_RING: tl.constexpr,
    HAS_INDEX_K: tl.constexpr,
    HAS_INDEX_Q: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SEPARATE: tl.constexpr,
    IS_FP8: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    # Behind the heads, where the heads stay as they are: one program for each set of index keys, which takes the key head of its group
    # through the norm once more. In place a key head has all sets of its group, before it changes.
    key_set = head - (H + 2 * K)
    if HAS_INDEX_K and SEPARATE:  # noqa: SIM102
        if key_set >= 0:
            head = H + tl.load(group_ptr + key_set)
    b = tl.program_id(2).to(tl.int64)
    length, count = tl.load(lengths_ptr + b), tl.load(counts_ptr + b)
    t_t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid_t, inside_t = t_t < count, t_t < T
    position_t = length + t_t
    e_E = tl.arange(0, E_PADDED)
    mask_tE = valid_t[:, None] & (e_E < E)[None, :]
    # Rows beyond the count load as zeros, and zeros is what a tensor of its own gets there; in place they stay as they are.
    written_tE = (inside_t if SEPARATE else valid_t)[:, None] & (e_E < E)[None, :]
    row_tE = b * T * ((H + 2 * K) * 2 * E) + t_t.to(tl.int64)[:, None] * ((H + 2 * K) * 2 * E) + e_E[None, :]
    x_ptr = qkv_ptr + row_tE + (tl.load(source_ptr + head) if HAS_ORDER else head) * (2 * E)
    written_ptr = out_ptr + row_tE + head * (2 * E)
    first_tE = tl.load(x_ptr, mask=mask_tE, other=0.0).to(tl.float32)
    second_tE = tl.load(x_ptr + E, mask=mask_tE, other=0.0).to(tl.float32)
    if head < H + K:
        if HAS_NORM:
            weight_ptr = norms_ptr + tl.where(head < H, 0, 2 * E)
            square_t = tl.sum(first_tE * first_tE, axis=1) + tl.sum(second_tE * second_tE, axis=1)
            scale_t = tl.rsqrt(square_t / (2 * E) + eps)
            first_tE *= scale_t[:, None] * tl.load(weight_ptr + e_E, mask=e_E < E, other=0.0)[None, :]
            second_tE *= scale_t[:, None] * tl.load(weight_ptr + E + e_E, mask=e_E < E, other=0.0)[None, :]
        r_R = tl.arange(0, R_PADDED)
        if HAS_INDEX_Q:
            place = tl.load(place_ptr + head, mask=head < H, other=-1)
            if place >= 0:
                out_tR = _project(first_tE, second_tE, index_q_weight_ptr + place * (R * 2 * E), E, E_PADDED, R, R_PADDED)
                row_t = ((b * T + t_t) * num_places + place) * R
                tl.store(index_q_ptr + row_t[:, None] + r_R[None, :], out_tR, mask=inside_t[:, None] & (r_R < R)[None, :])
        # Nested: the outer conditions are decided when the kernel is compiled.
        if HAS_INDEX_K:
            if SEPARATE:
                if key_set >= 0:
                    _append_index(
                        first_tE, second_tE, index_k_weight_ptr, index_k_ptr + b * stride_ib, key_set, position_t, valid_t,
                        stride_is, stride_ii, E, E_PADDED, R, R_PADDED, IS_FP8,
                    )  # fmt: skip
                    return
            else:
                for own in range(0, tl.where(head >= H, num_sets, 0)):
                    if tl.load(group_ptr + own) == head - H:
                        _append_index(
                            first_tE, second_tE, index_k_weight_ptr, index_k_ptr + b * stride_ib, own, position_t, valid_t,
                            stride_is, stride_ii, E, E_PADDED, R, R_PADDED, IS_FP8,
                        )  # fmt: skip
        angle_tE = position_t.to(tl.int64)[:, None] * E + e_E[None, :]
        cos_tE = tl.load(cos_ptr + angle_tE, mask=mask_tE, other=0.0).to(tl.float32)
        sin_tE = tl.load(sin_ptr + angle_tE, mask=mask_tE, other=0.0).to(tl.float32)
        rotated_tE = first_tE * cos_tE - second_tE * sin_tE
        second_tE = second_tE * cos_tE + first_tE * sin_tE
        first_tE = rotated_tE
        tl.store(written_ptr, first_tE.to(out_ptr.dtype.element_ty), mask=written_tE)
        tl.store(written_ptr + E, second_tE.to(out_ptr.dtype.element_ty), mask=written_tE)
    elif SEPARATE:
        tl.store(written_ptr, first_tE.to(out_ptr.dtype.element_ty), mask=written_tE)
        tl.store(written_ptr + E, second_tE.to(out_ptr.dtype.element_ty), mask=written_tE)
    if head >= H:
        group = (head - H) % K
        if HAS_CACHE:  # noqa: SIM102
            if group < retained:
                offset = b * stride_kb + group * (2 * E)
                if head < H + K:
                    _store_halves(k_ptr + offset, position_t, stride_ks, first_tE, second_tE, valid_t, E, E_PADDED)
                else:
                    _store_halves(v_ptr + offset, position_t, stride_ks, first_tE, second_tE, valid_t, E, E_PADDED)
        if HAS_RING:  # noqa: SIM102
            if group >= retained:
                offset = b * stride_rb + (group - retained) * (2 * E)
                in_ring_t = sinks + (position_t - sinks) % window
                slot_t = tl.where(position_t < sinks, position_t, in_ring_t)
                # Of the rows of one slot only the newest is written.
                kept_t = valid_t & ((position_t < sinks) | (position_t >= length + count - window))
                if head < H + K:
                    _store_halves(ring_k_ptr + offset, slot_t, stride_rw, first_tE, second_tE, kept_t, E, E_PADDED)
                else:
                    _store_halves(ring_v_ptr + offset, slot_t, stride_rw, first_tE, second_tE, kept_t, E, E_PADDED)


def describe(
    qkv_BTM: torch.Tensor,
    plan: AppendPlan,
    cos_SE: torch.Tensor,
    sin_SE: torch.Tensor,
    lengths_B: torch.Tensor,
    counts_B: torch.Tensor,
    k_BSKD: torch.Tensor | None,
    v_BSKD: torch.Tensor | None,
    index_k_BSIR: torch.Tensor | None,
    ring_k_BWKD: torch.Tensor | None,
    ring_v_BWKD: torch.Tensor | None,
    window: int,
    sinks: int,
    index_q_BTPR: torch.Tensor | None,
    out_BTM: torch.Tensor,
    source_O: torch.Tensor | None = None,
    *,
    early_launch: bool,
) -> Launch:
    """The launch that writes the rotated heads to out, which may be qkv itself. source_O (int32): out's head o is head source[o] of qkv.

    Rows beyond counts are zeros in index_q, and in out where it is a tensor of its own.
    """
    B, T, _ = qkv_BTM.shape
    P = len(plan.retrieval_heads)
    R = 1 if plan.index_q_PRD is None else plan.index_q_PRD.shape[1]
    half = plan.head_dim // 2
    tile = 1 if T == 1 else TILE
    strides_k = (0, 0) if k_BSKD is None else k_BSKD.stride()[:2]
    strides_i = (0, 0, 0) if index_k_BSIR is None else index_k_BSIR.stride()[:3]
    strides_r = (0, 0) if ring_k_BWKD is None else ring_k_BWKD.stride()[:2]
    sets, separate = 0 if index_k_BSIR is None else index_k_BSIR.shape[2], out_BTM is not qkv_BTM
    # A pointer that no branch reads still has to be one.
    unused = qkv_BTM
    return Launch(
        kernel=_rope_append,
        grid=(triton.cdiv(T, tile), plan.num_heads + 2 * plan.num_groups + (sets if separate else 0), B),
        arguments=(
            qkv_BTM, out_BTM, unused if source_O is None else source_O, cos_SE, sin_SE, lengths_B, counts_B,
            *(unused if x is None else x for x in (plan.norms_2D, plan.index_q_PRD, plan.index_k_IRD)), plan.place_H, plan.group_I,
            *(unused if x is None else x for x in (index_q_BTPR, k_BSKD, v_BSKD, index_k_BSIR, ring_k_BWKD, ring_v_BWKD)),
            T, *strides_k, *strides_i, *strides_r, 0 if k_BSKD is None else k_BSKD.shape[2], P, sets, window, sinks, plan.eps,
        ),
        constants={
            "H": plan.num_heads, "K": plan.num_groups, "E": half, "E_PADDED": max(16, triton.next_power_of_2(half)), "R": R,
            "R_PADDED": max(16, triton.next_power_of_2(R)), "TILE": tile, "HAS_NORM": plan.norms_2D is not None,
            "HAS_CACHE": k_BSKD is not None, "HAS_RING": ring_k_BWKD is not None, "HAS_INDEX_K": index_k_BSIR is not None,
            "HAS_INDEX_Q": index_q_BTPR is not None, "HAS_ORDER": source_O is not None, "SEPARATE": separate,
            "IS_FP8": index_k_BSIR is not None and index_k_BSIR.dtype == torch.float8_e4m3fn,
            "EARLY_LAUNCH": early_launch,
        },
        num_warps=1 if tile == 1 else 4, early_launch=early_launch,
    )  # fmt: skip
