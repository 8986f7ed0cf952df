"""Inputs and tolerances for tests and benchmarks of the kernels: peaked index keys, error against fp64."""

# B batch  S cached tokens  H retrieval query heads  I index-key sets  R index dim
from collections.abc import Sequence

import torch


def peaked_index(
    key_set_H: Sequence[int],
    *,
    num_sets: int,
    batch: int,
    tokens: int,
    hot_share: float,
    logit: float = 12.0,
    index_dim: int = 16,
    block_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries [B, H, R] and keys [B, S, I, R] with about hot_share of the blocks holding one key of that logit.

    The other logits are standard normal (scale 1), so that the hot blocks hold more than 0.9 of the mass for a logit of
    12 and a share of a few percent. Hot blocks are drawn for each head.
    """
    generator = torch.Generator(device).manual_seed(seed)
    H = len(key_set_H)
    q_BHR = torch.randn(batch, H, index_dim, generator=generator, device=device)
    q_BHR *= index_dim**0.5 / q_BHR.norm(dim=-1, keepdim=True)
    k_BSIR = torch.randn(batch, tokens, num_sets, index_dim, generator=generator, device=device, dtype=torch.float32)
    k_BSIR *= index_dim**-0.5
    blocks = -(-tokens // block_size)
    hot = max(1, round(hot_share * blocks))
    for head, key_set in enumerate(key_set_H):
        for b in range(batch):
            block_n = torch.randperm(blocks, generator=generator, device=device)[:hot]
            token_n = block_n * block_size + torch.randint(0, block_size, (hot,), generator=generator, device=device)
            token_n = token_n.clamp(max=tokens - 1)
            jitter_n = torch.rand(hot, 1, generator=generator, device=device) * 0.1
            k_BSIR[b, token_n, key_set] = q_BHR[b, head] * ((logit + jitter_n) / index_dim)
    return q_BHR.to(dtype), k_BSIR.to(dtype)


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """norm(actual - wanted) / norm(wanted) in fp64; NaN anywhere gives NaN, which no bound accepts."""
    difference = actual.double() - wanted.double()
    return float(difference.norm() / wanted.double().norm())


def error_bound(eager: torch.Tensor, exact: torch.Tensor) -> float:
    """Twice the eager error plus one rounding of the eager dtype (both relative, against fp64)."""
    return 2.0 * relative_error(eager, exact) + torch.finfo(eager.dtype).eps
