"""The token indexer: its shapes, its initialisation from data, and reading and writing its tensors."""

# L layers  H retrieval query heads  I index-key sets  D head dim  R index dim
from collections.abc import Sequence

import torch

from rtpurbo.converter.calibrate import Calibration

Indexer = dict[str, torch.Tensor]


def mean_rotation(rotary: torch.nn.Module, head_dim: int, first: int, last: int, device: str) -> torch.Tensor:
    """Mean over distances d in [first, last] of the matrix M_d with (RoPE_m q) . (RoPE_{m-d} k) = q^T M_d k, fp32 [D, D].

    Distances are weighted by the number of causal pairs that have them in a document of `last` tokens. From the model's own cos and
    sin tables, so RoPE scaling and its attention factor (squared) are inside. Fast pairs average to about 0: at long distance only
    the slow ones carry the logit.
    """
    distance_d = torch.arange(first, last + 1, device=device)
    weight_d = (last + 1 - distance_d).double()
    weight_d = (weight_d / weight_d.sum())[:, None]
    cos_dD, sin_dD = rotary(torch.zeros(1, 1, 1, device=device), distance_d[None])
    # The tables carry the attention factor once for q and once for k.
    factor = float(getattr(rotary, "attention_scaling", 1.0))
    half = head_dim // 2
    cos = (cos_dD[0, :, :half].double() * weight_d).sum(dim=0) * factor
    sin = (sin_dD[0, :, :half].double() * weight_d).sum(dim=0) * factor
    return torch.cat([torch.cat([torch.diag(cos), torch.diag(sin)], dim=1), torch.cat([torch.diag(-sin), torch.diag(cos)], dim=1)]).float()


def initial_indexer(
    calibration: Calibration,
    retrieval_heads: Sequence[Sequence[int]],
    key_sets: Sequence[Sequence[int]],
    rotation_DD: torch.Tensor,
    dim: int,
) -> Indexer:
    """W^Q, W^K that best approximate the long-distance logit q^T M k at rank `dim`, per key set, in closed form.

    For the heads h of one key set: B_h = Cq_h^{1/2} M Ck^{1/2} with Cq = E[q q^T] and Ck = Cov(k) (a constant added to all keys of a
    row does not change its softmax). V holds the first `dim` right singular vectors of the stacked B_h; W^K = (V / s)^T Ck^{-1/2} and
    W^Q_h = (M Ck^{1/2} V s)^T, with s balancing the two norms. This minimises sum_h E (q^T M k - iq . ik)^2. Source: ours.
    Keys are `layers.{i}.index_q` [H, R, D] and `layers.{i}.index_k` [I, R, D], fp32.
    """
    group_size = calibration.query_moment_LHDD.shape[1] // calibration.key_covariance_LKDD.shape[1]
    rotation = rotation_DD.double().cpu()
    indexer: Indexer = {}
    for layer, heads in enumerate(retrieval_heads):
        if not heads:
            continue
        index_q = torch.empty(len(heads), dim, rotation.shape[0])
        index_k = torch.empty(max(key_sets[layer]) + 1, dim, rotation.shape[0])
        for key_set in range(index_k.shape[0]):
            members = [n for n, s in enumerate(key_sets[layer]) if s == key_set]
            key_root = _root(calibration.key_covariance_LKDD[layer, heads[members[0]] // group_size])
            stacked = [_root(calibration.query_moment_LHDD[layer, heads[n]]) @ rotation @ key_root for n in members]
            V = torch.linalg.svd(torch.cat(stacked), full_matrices=False).Vh[:dim].T
            key_side = torch.linalg.pinv(key_root, rcond=1e-6, hermitian=True) @ V
            query_side = rotation @ key_root @ V
            balance = (query_side.norm(dim=0) / key_side.norm(dim=0).clamp_min(1e-12)).sqrt().clamp_min(1e-12)
            index_k[key_set] = (key_side * balance).T.float()
            for n in members:
                index_q[n] = (query_side / balance).T.float()
        indexer[f"layers.{layer}.index_q"], indexer[f"layers.{layer}.index_k"] = index_q, index_k
    return indexer


def random_indexer(shapes: dict[str, tuple[int, int, int]], seed: int) -> Indexer:
    """Gaussian projections with variance 1 / D: the baseline that the initialisation has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def index_scale(head_dim: int) -> float:
    """The indexer's logit scale: the attention's own, head_dim ** -0.5. RoPE's attention factor is inside the projections."""
    return head_dim**-0.5


def _root(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root in fp64; eigenvalues below 1e-8 of the largest are noise and are cut."""
    values, vectors = torch.linalg.eigh(matrix.double())
    values = torch.where(values > values.max() * 1e-8, values, 0.0)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
