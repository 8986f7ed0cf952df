"""Router in Triton: softmax, the best experts and their weights, in one launch."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false, reportIndexIssue=false

# T tokens  E experts  X experts a token
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from rtpurbo.kernels.launch import Launch

FEW_TOKENS = 64  # Up to here a program takes one token.


def route_tokens(
    logits_TE: torch.Tensor,
    num_chosen: int,
    normalize: bool,
    *,
    early_launch: bool = False,
    run: Callable[[Launch], None] = Launch.run,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See rtpurbo.kernels.router.route_tokens; early_launch overlaps the launch with the end of the one before it."""
    T = logits_TE.shape[0]
    ids_TX = torch.empty(T, num_chosen, dtype=torch.int32, device=logits_TE.device)
    weights_TX = torch.empty(T, num_chosen, dtype=logits_TE.dtype, device=logits_TE.device)
    run(describe(logits_TE, ids_TX, weights_TX, normalize, early_launch=early_launch))
    return ids_TX, weights_TX


def describe(
    logits_TE: torch.Tensor, ids_TX: torch.Tensor, weights_TX: torch.Tensor, normalize: bool, *, early_launch: bool = False
) -> Launch:
    """The launch that fills ids and weights, both contiguous."""
    (T, E), num_chosen = logits_TE.shape, ids_TX.shape[1]
    rows = 1 if T <= FEW_TOKENS else 8
    return Launch(
        kernel=route_rows, grid=(triton.cdiv(T, rows),), arguments=(logits_TE, ids_TX, weights_TX, T, E, logits_TE.stride(0)),
        constants={
            "X": num_chosen, "X_PADDED": triton.next_power_of_2(num_chosen), "E_PADDED": triton.next_power_of_2(E), "ROWS": rows,
            "NORMALIZE": normalize, "EARLY_LAUNCH": early_launch,
        },
        num_warps=1 if rows == 1 else 4, early_launch=early_launch,
    )  # fmt: skip


@triton.jit
def route_rows(
    logits_ptr,  # [T, E], last axis contiguous
    ids_ptr,  # int32 [T, X]
    weights_ptr,  # [T, X]
    tokens,
    E,
    stride_lt,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    E_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EARLY_LAUNCH: tl.constexpr,
):
    if EARLY_LAUNCH:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert_e = tl.arange(0, E_PADDED)
    choice_x = tl.arange(0, X_PADDED)
    real_te = (token_t < tokens)[:, None] & (expert_e < E)[None, :]
    place_te = token_t.to(tl.int64)[:, None] * stride_lt + expert_e[None, :]
    logits_te = tl.load(logits_ptr + place_te, mask=real_te, other=float("-inf")).to(tl.float32)
    top_t = tl.max(logits_te, axis=1)
    total_t = tl.sum(tl.exp(logits_te - top_t[:, None]), axis=1)
    ids_tx = tl.zeros([ROWS, X_PADDED], tl.int32)
    weights_tx = tl.zeros([ROWS, X_PADDED], tl.float32)
    for choice in tl.static_range(X):
        best_t = tl.max(logits_te, axis=1)
        # The lowest id among equals; the clamp keeps ids in range where a row holds no number.
        id_t = tl.min(tl.where(logits_te == best_t[:, None], expert_e[None, :], E_PADDED), axis=1)
        id_t = tl.minimum(id_t, E - 1)
        here_1x = (choice_x == choice)[None, :]
        ids_tx = tl.where(here_1x, id_t[:, None], ids_tx)
        weights_tx = tl.where(here_1x, (tl.exp(best_t - top_t) / total_t)[:, None], weights_tx)
        logits_te = tl.where(expert_e[None, :] == id_t[:, None], float("-inf"), logits_te)
    if NORMALIZE:
        weights_tx = weights_tx / tl.sum(weights_tx, axis=1)[:, None]
    written_tx = (token_t < tokens)[:, None] & (choice_x < X)[None, :]
    place_tx = token_t.to(tl.int64)[:, None] * X + choice_x[None, :]
    tl.store(ids_ptr + place_tx, ids_tx, mask=written_tx)
    tl.store(weights_ptr + place_tx, weights_tx.to(weights_ptr.dtype.element_ty), mask=written_tx)
