"""transformers + PEFT, one request at a time: what slora must equal."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM


class Oracle:
    """One base with several adapters, in float32 on the CPU."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        first, *others = adapters.items()
        self.model = PeftModel.from_pretrained(model, first[1], adapter_name=first[0], torch_device="cpu")
        for name, path in others:
            self.model.load_adapter(path, adapter_name=name, torch_device="cpu")
        self.model.eval()

    @torch.inference_mode()
    def log_probs(self, ids: list[int], adapter: str | None) -> Tensor:
        """[tokens, vocab]: of what follows each token."""
        if adapter is None:
            with self.model.disable_adapter():
                logits = self.model(torch.tensor([ids])).logits[0]
        else:
            self.model.set_adapter(adapter)
            logits = self.model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.float(), -1)
