"""The CUDA kernel for linears of few rows on the CPU, lane by lane (`tests/emulator`): needs g++, no device."""

import ctypes
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from slora.kernels import few_rows

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
VARIANTS = [
    *product(TOLERANCE, [few_rows.LAYOUT]),
    (torch.bfloat16, few_rows.Layout(warps=4, stages=5, group=16, is_ahead=True, far=3)),
]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.cpu_only(reason="an emulated device; a real one is in tests/gpu"),
]


class Emulated:
    def __init__(self, dtype: torch.dtype, layout: few_rows.Layout, folder: Path) -> None:
        for source in (ROOT / "cuda", ROOT / "tests" / "emulator"):
            shutil.copytree(source, folder, dirs_exist_ok=True)
        values = {"__CUDA_ARCH__": 900, "DTYPE": few_rows._DTYPE_MACRO[dtype], **layout.macros}
        macros = [f"-D{name}={value}" for name, value in values.items()]
        macros.append("-U_FORTIFY_SOURCE")  # it takes a jump to another fiber's stack for an error
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "few_rows.cpp", "-o", "few_rows.so"]
        subprocess.run(command, cwd=folder, check=True)
        self.dtype, self.layout, self.library = dtype, layout, ctypes.CDLL(str(folder / "few_rows.so"))

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, num_blocks: int = 2
    ) -> torch.Tensor:
        """With NaN behind the end of all that is read, which must stay behind the end of what is written, too."""
        (rows, in_size), out_size = x.shape, weight.shape[0]
        guarded = [torch.cat([t.flatten(), t.new_full((4096,), torch.nan)]) for t in (x, weight)]
        y = x.new_full((rows * out_size + 64,), torch.nan)
        pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (*guarded, bias, y)]
        self.library.run(*pointers, rows, in_size, out_size, num_blocks)
        assert y[rows * out_size :].isnan().all()
        return y[: rows * out_size].view(rows, out_size)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(*request.param, tmp_path_factory.mktemp("emulator"))


def make(emulated: Emulated, rows: int, in_size: int, out_size: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows + in_size + out_size)
    sizes = ((rows, in_size), (out_size, in_size), (out_size,))
    return tuple(torch.randn(size).to(emulated.dtype) for size in sizes)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
@pytest.mark.parametrize(
    ("in_size", "out_size", "num_blocks"), [(64, 8, 1), (1792, 136, 2), (2112, 24, 3), (4160, 40, 1)]
)
def test_linear_is_the_definition(emulated: Emulated, in_size: int, out_size: int, num_blocks: int, rows: int) -> None:
    x, weight, bias = make(emulated, rows, in_size, out_size)
    for seed, added in enumerate((None, bias)):
        emulated.library.seed(seed)
        want = torch.nn.functional.linear(x.float(), weight.float(), None if added is None else added.float())
        got = emulated.linear(x, weight, added, num_blocks).float()
        assert (got - want).norm() <= TOLERANCE[emulated.dtype] * want.norm(), f"seed {seed}"


def test_a_row_depends_on_nothing_else(emulated: Emulated) -> None:
    """Neither on its neighbours, nor on the features beside it, nor on how many blocks share them."""
    x, weight, bias = make(emulated, 16, 2368, 160)
    together = emulated.linear(x, weight, bias)
    for num_blocks in (1, 3):
        assert torch.equal(emulated.linear(x, weight, bias, num_blocks), together)
    for rows in (slice(2, 3), slice(5, 14)):
        assert torch.equal(emulated.linear(x[rows].contiguous(), weight, bias), together[rows])
    assert torch.equal(emulated.linear(x, weight[40:64].contiguous(), bias[40:64]), together[:, 40:64])


def test_the_host_knows_the_size(emulated: Emulated) -> None:
    assert emulated.library.shared_bytes() == emulated.layout.shared_bytes
