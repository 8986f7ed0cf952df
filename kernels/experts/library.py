"""Experts through torch.nn.functional.grouped_mm, with the own sort before it and the own sum after it."""

# T tokens  X experts a token  P pairs, as rows sorted by expert  E experts  C hidden width  F expert width
import torch
import torch.nn.functional as F_

from rtpurbo.kernels.experts.kernel import sum_choices
from rtpurbo.kernels.experts.sorting import sort_pairs


def mix_experts(
    x_TC: torch.Tensor, ids_TX: torch.Tensor, weights_TX: torch.Tensor, gate_up_EGC: torch.Tensor, down_ECF: torch.Tensor
) -> torch.Tensor:
    """See rtpurbo.kernels.experts.mix_experts."""
    E, C, F = down_ECF.shape
    sorted_pairs = sort_pairs(ids_TX, E, tile_rows=128, early_launch=False)
    x_PC = x_TC.index_select(0, sorted_pairs.pair_P // ids_TX.shape[1])
    gate_PF, up_PF = F_.grouped_mm(x_PC, gate_up_EGC.transpose(1, 2), offs=sorted_pairs.ends_E).split(F, dim=1)
    z_PC = F_.grouped_mm(F_.silu(gate_PF) * up_PF, down_ECF.transpose(1, 2), offs=sorted_pairs.ends_E)
    return sum_choices(z_PC, weights_TX, sorted_pairs)
