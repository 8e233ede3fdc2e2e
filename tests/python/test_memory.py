"""How large the pool of a device becomes, with numbers in place of a device."""

import pytest
import torch

from slora import memory
from slora.errors import ConfigError
from slora.kernels import lora
from slora.models.config import ModelConfig

pytestmark = pytest.mark.cpu_only(reason="numbers in place of a device")


def config() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        }
    )


SIZES = {"max_batch_tokens": 8192, "max_running": 256, "max_rank": 256}


def pool_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> int:
    """With the workspace taken from what is free meanwhile."""
    left = [free]

    def allocate(num_bytes: int, device: torch.device) -> None:
        left[0] -= num_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left[0], 80 << 30))
    monkeypatch.setattr(memory, "_allocate", allocate)
    return memory.device_pool_bytes(config(), dtype="bfloat16", device="cuda", **SIZES)


def test_the_pool_takes_nine_tenths_of_what_steps_and_graphs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 60 << 30
    workspace = memory.workspace_bytes(config(), dtype="bfloat16", **SIZES)
    graphs = memory.graph_bytes(config(), dtype="bfloat16", max_running=256)
    spare = memory.spare_bytes(config(), 256)
    found = pool_bytes(monkeypatch, free)
    assert found % (2 << 20) == 0
    assert 0 <= (free - workspace - graphs - spare) * 0.9 - found < 2 << 20
    assert 2 << 30 < workspace < 5 << 30
    assert 432 << 20 < graphs < 512 << 20, "on a device they took 432 MiB"
    assert spare > 256 << 20


@pytest.mark.parametrize("max_rank", [16, 256, 1024])
@pytest.mark.parametrize("max_batch_tokens", [64, 1000, 1024, 2048, 4096, 8192])
def test_the_workspace_has_room_for_the_sums_of_large_ranks(max_batch_tokens: int, max_rank: int) -> None:
    """Of every size of step up to the largest: the fewer rows, the more sums each has."""
    sizes = {"max_batch_tokens": max_batch_tokens, "max_running": 256}
    without, with_sums = (
        memory.workspace_bytes(config(), dtype="bfloat16", max_rank=rank, **sizes) for rank in (1, max_rank)
    )
    for rows in range(1, max_batch_tokens + 1, 7):
        parts = 16 if rows <= 1024 else 8 if rows <= 4096 else 4
        assert with_sums - without >= rows * parts * 4 * (3 * max_rank - 16 * 3 - 2048 / parts)


@pytest.mark.parametrize("in_size", [64, 4096, 14336])
@pytest.mark.parametrize("max_ranks", [1, 16, 24, 64, 65, 768, 3000])
def test_a_rows_sums_have_room_without_clusters(in_size: int, max_ranks: int) -> None:
    """`chunk_columns` of cuda/lora_work.cuh, for every number of ranks up to the largest."""
    for ranks in range(1, max_ranks + 1):
        tiles = -(-ranks // 16)
        columns = (512 if in_size > 8192 else 256) * max(1, -(-tiles // 4))
        assert -(-in_size // columns) * tiles * 16 <= lora._sums_stride(in_size, max_ranks)


def test_a_device_without_room_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"1073741824 of 85899345920 bytes are free on cuda; a step of 8192 tokens"):
        pool_bytes(monkeypatch, 1 << 30)
