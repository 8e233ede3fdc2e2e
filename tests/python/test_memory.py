"""How large the pool of a device becomes, with numbers in place of a device."""

import pytest
import torch

from slora import memory
from slora.errors import ConfigError
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


SIZES = {"max_batch_tokens": 8192, "max_running": 256}


def pool_bytes(monkeypatch: pytest.MonkeyPatch, free: int, **sizes: int) -> int:
    """With the workspace taken from what is free meanwhile."""
    left = [free]

    def allocate(num_bytes: int, device: torch.device) -> None:
        left[0] -= num_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (left[0], 80 << 30))
    monkeypatch.setattr(memory, "_allocate", allocate)
    return memory.device_pool_bytes(config(), dtype="bfloat16", device="cuda", **SIZES, **sizes)


def test_the_pool_takes_nine_tenths_of_what_a_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 60 << 30
    workspace = memory.workspace_bytes(config(), dtype="bfloat16", **SIZES)
    graphs = memory.graph_bytes(config(), dtype="bfloat16", max_running=256)
    found = pool_bytes(monkeypatch, free)
    assert found % (2 << 20) == 0
    assert 0 <= (free - workspace - graphs) * 0.9 - found < 2 << 20
    assert 2 << 30 < workspace < 5 << 30
    assert 432 << 20 < graphs < 512 << 20, "on a device they took 432 MiB"


def test_larger_ranks_take_from_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four sums for each of the ranks of three linears, in fp32."""
    usual, large = (pool_bytes(monkeypatch, 60 << 30, max_rank=rank) for rank in (256, 1024))
    assert (usual - large) / 0.9 == pytest.approx(768 * 3 * 4 * 4 * (8192 + 512), rel=0.01)


def test_a_device_without_room_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"1073741824 of 85899345920 bytes are free on cuda; a step of 8192 tokens"):
        pool_bytes(monkeypatch, 1 << 30)
