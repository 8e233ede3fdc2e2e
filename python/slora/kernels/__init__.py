"""The operations of a step, by device. A backend is a module with the functions of `Backend`.

`reference` (torch, any device that torch has) serves the CPU and is every other backend's oracle.
"""

from typing import Any, Protocol, cast

from torch import Tensor

from slora.kernels import reference

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741 (the paper's letter)
"""The groups of a layer's LoRA modules: one `project` call each."""


class Backend(Protocol):
    """What a backend provides to the model. `batch` is what its runner made of the plan, once for all layers of a step.

    A *delta* is the LoRA part of a linear's output: it is made from the linear's input, and the consumer of the output
    adds it. It is a tensor or whatever else the backend's own consumer understands; None: no row has one.
    """

    def pack_linear(self, weight: Tensor) -> Tensor:
        """A linear weight [out, in] in the layout that `project` likes best; may be the weight itself."""

    def project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, batch: Any, layer: int, group: int
    ) -> tuple[Tensor, Any]:
        """A linear and its delta: x [rows, in] -> both [rows, out], the group's modules side by side."""

    def head(self, x: Tensor, weight: Tensor) -> Tensor:
        """Logits in fp32: x [rows, hidden] -> [rows, vocab]."""

    def rms_norm(
        self, x: Tensor, residual: Tensor | None, delta: Any, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """residual + x + delta, and its norm: (normed, residual). May write into x."""

    def rope_kv(self, qkv: Tensor, delta: Any, batch: Any, layer: int, qk_norm: Tensor | None, eps: float) -> Tensor:
        """Add delta, norm the heads of q and k, rotate, write K and V to their slots: q [rows, heads, head_dim]."""

    def paged_attention(self, q: Tensor, batch: Any, layer: int) -> Tensor:
        """Causal attention of every row over its request's pages: [rows, heads * head_dim]."""

    def silu_mul(self, gate_up: Tensor, delta: Any) -> Tensor:
        """silu(gate) * up of gate_up + delta: [rows, intermediate]. May write into gate_up."""


def backend(device: str) -> Backend:
    """The backend for a torch device."""
    from slora.errors import ConfigError

    match device.split(":")[0]:
        case "cpu":
            return cast(Backend, reference)
        case "cuda":
            from slora.kernels import cuda

            return cast(Backend, cuda)
    raise ConfigError(f"device = {device!r} is not supported; hint: cpu or cuda")
