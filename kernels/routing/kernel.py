"""Routing in Triton: one program a token takes the largest probability, num_chosen times."""
# Triton's compiler, not Python's type rules, decides what the jitted functions mean:
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAssignmentType=false

# T tokens  E experts  X experts a token
import torch
import triton
import triton.language as tl


@triton.jit
def _route(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e_E = tl.arange(0, E_PADDED)
    x_X = tl.arange(0, X_PADDED)
    logit_E = tl.load(logits_ptr + row * E + e_E, mask=e_E < E, other=float("-inf")).to(tl.float32)
    p_E = tl.exp(logit_E - tl.max(logit_E, axis=0))
    p_E = p_E / tl.sum(p_E, axis=0)
    # Taken ones are below every probability, padding below those.
    p_E = tl.where(e_E < E, p_E, -2.0)
    ids_X = tl.zeros([X_PADDED], tl.int32)
    weight_X = tl.zeros([X_PADDED], tl.float32)
    for x in tl.static_range(X):
        best = tl.max(p_E, axis=0)
        # NaN equals nothing: the id stays in range.
        chosen = tl.minimum(tl.min(tl.where(p_E == best, e_E, E), axis=0), E - 1)
        ids_X = tl.where(x_X == x, chosen, ids_X)
        weight_X = tl.where(x_X == x, best, weight_X)
        p_E = tl.where(e_E == chosen, -1.0, p_E)
    if NORMALIZE:
        weight_X = weight_X / tl.sum(weight_X, axis=0)
    tl.store(ids_ptr + row * X + x_X, ids_X, mask=x_X < X)
    tl.store(weights_ptr + row * X + x_X, weight_X.to(weights_ptr.dtype.element_ty), mask=x_X < X)


def launch(logits_TE: torch.Tensor, num_chosen: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.routing.route`."""
    T, E = logits_TE.shape
    ids_TX = torch.empty(T, num_chosen, dtype=torch.int32, device=logits_TE.device)
    weights_TX = torch.empty(T, num_chosen, dtype=logits_TE.dtype, device=logits_TE.device)
    if T:
        _route[(T,)](
            logits_TE,
            ids_TX,
            weights_TX,
            E=E,
            E_PADDED=triton.next_power_of_2(E),
            X=num_chosen,
            X_PADDED=triton.next_power_of_2(num_chosen),
            NORMALIZE=normalize,
            num_warps=1,
        )
    return ids_TX, weights_TX
