"""Convert one linear layer to int8 by hand: what it saves, and what it costs in accuracy.

python examples/one_layer.py
"""

import torch

from bigint8 import make_int8_linear


def nbytes(layer: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


torch.manual_seed(0)
linear = torch.nn.Linear(4096, 1024, dtype=torch.float16)
int8 = make_int8_linear(linear)
print(f"float16: {nbytes(linear):,} bytes; int8: {nbytes(int8):,} bytes")

x = torch.randn(64, 4096, dtype=torch.float16)
x[:, 7] *= 40  # an outlier column, as large models have: LLM.int8() multiplies it in 16-bit
with torch.no_grad():
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = (int8(x).double() - exact).norm() / exact.norm()
print(f"relative error: {error:.4f}")
