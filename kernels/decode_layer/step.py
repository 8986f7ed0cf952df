"""What one decode step of a layer works on."""

# B batch  S cached tokens  W ring slots (sinks + window)  H query heads  K kv heads  D head dim
# I index-key sets  R index dim
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """The arguments of `kernels.decode_layer.decode_layer`, which describes them."""

    q_BHD: torch.Tensor
    index_q_BHR: torch.Tensor | None
    lengths_B: torch.Tensor
    k_BSKD: torch.Tensor | None
    v_BSKD: torch.Tensor | None
    index_k_BSIR: torch.Tensor | None
    ring_k_BWKD: torch.Tensor | None
    ring_v_BWKD: torch.Tensor | None
    scale: float
    index_scale: float
    top_p: float
    out_BHD: torch.Tensor

    @property
    def cache(self) -> Pair:
        """Keys and values by position, of a layer with retained groups."""
        assert self.k_BSKD is not None
        assert self.v_BSKD is not None
        return self.k_BSKD, self.v_BSKD

    @property
    def ring(self) -> Pair:
        """Keys and values of the rings, of a layer with local groups."""
        assert self.ring_k_BWKD is not None
        assert self.ring_v_BWKD is not None
        return self.ring_k_BWKD, self.ring_v_BWKD

    @property
    def index(self) -> Pair:
        """Index queries and keys, of a layer that selects."""
        assert self.index_q_BHR is not None
        assert self.index_k_BSIR is not None
        return self.index_q_BHR, self.index_k_BSIR
