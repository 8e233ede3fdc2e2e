"""The base model as the Rust side sees it."""

from pathlib import Path

from slora import _core
from slora.models.config import ModelConfig

ANY_NUMBER_OF_PAGES = 2**31 - 1


def make_base(
    config: ModelConfig, path: Path, dtype: str, page_bytes: int, max_adapter_pages: int, max_rank: int | None = None
) -> _core.Base:
    """What adapters are checked against and packed for."""
    return _core.Base(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        dtype=dtype,
        page_bytes=page_bytes,
        max_adapter_pages=max_adapter_pages,
        max_rank=max_rank,
        name=path.absolute().name,
    )


def open_base(path: Path) -> _core.Base:
    """From the configuration alone, for checking adapters without an engine."""
    config = ModelConfig.from_dir(path)
    page_bytes = config.page_bytes(config.default_page_tokens(config.dtype), config.dtype)
    return make_base(config, path, config.dtype, page_bytes, ANY_NUMBER_OF_PAGES)
