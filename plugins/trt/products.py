"""Dense products of many rows: torch's own (cuBLAS), because tensorrt-rtx rounds float32 products of two and more rows to TF32 unasked."""

# M rows  C inputs  O outputs
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Product:
    """y = x weight^T (+ bias), all contiguous; an operator hands it out like a Launch."""

    x_MC: torch.Tensor
    weight_OC: torch.Tensor
    bias_O: torch.Tensor | None
    y_MO: torch.Tensor

    @torch.no_grad()
    def run(self, stream: int | None = None) -> None:
        """Compute on a stream (its handle; None: torch's current one). float32 follows torch.backends.cuda.matmul: exact by default."""
        if stream is None or stream == torch.cuda.current_stream().cuda_stream:
            self._multiply()
            return
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            self._multiply()

    def _multiply(self) -> None:
        if self.bias_O is None:
            torch.mm(self.x_MC, self.weight_OC.t(), out=self.y_MO)
        else:
            torch.addmm(self.bias_O, self.x_MC, self.weight_OC.t(), out=self.y_MO)
