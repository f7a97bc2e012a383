"""Linear layers in bfloat16 on the CPU, for modules that stay as they are: connectors, towers of native resolution."""

import torch
from torch import Tensor, nn

from mm_gpt.errors import MMGPTError
from mm_gpt.kernels.gemm import gemm, pack


class Bf16Linear(nn.Module):
    """x (..., K) to (..., N) in float32, multiplied in bfloat16, for inference alone. It keeps the packed weights."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        self.packed = pack(linear.weight.detach().float().numpy(), bias, "bf16")

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
        y = torch.from_numpy(gemm(rows.numpy(), self.packed, threads=torch.get_num_threads()))
        return y.view(*x.shape[:-1], -1) if x.numel() else y.view(*x.shape[:-1], self.packed.rows)

    def state_dict(self, *args: object, **options: object) -> dict[str, Tensor]:  # type: ignore[override]
        raise MMGPTError("linear layers are packed in bf16: to save them, load the model in fp32")


def pack_linears(module: nn.Module) -> None:
    """Every linear layer inside becomes a `Bf16Linear`; each one's weights are freed when it is packed."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            setattr(module, name, Bf16Linear(child))
        else:
            pack_linears(child)
