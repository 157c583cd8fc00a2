"""The host as its own compute device: weights are bound where they lie, nothing is copied."""

import torch
from torch import Tensor


class CpuDevice:
    name = "cpu"
    torch_device = torch.device("cpu")
    h2d_bytes = 0
    d2h_bytes = 0

    def fetch(self, unit: int, weights: dict[int, Tensor]) -> dict[int, Tensor]:
        return weights

    def native_bf16(self) -> bool:
        # without AVX512-BF16 or AMX, bf16 matrix products are emulated and several times slower than fp32
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def peak_bytes(self) -> int:
        return 0
