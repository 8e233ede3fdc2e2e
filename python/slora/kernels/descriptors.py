"""Descriptors of the running adapters on the device."""

import numpy as np
import torch

from slora.kernels import nvrtc
from slora.kernels.adapters import MODULE_WORDS, NUM_MODULES
from slora.kernels.lora import UNIT_RANKS
from slora.kernels.nvrtc import Argument
from slora.memory import PagePool
from slora.plan import DevicePlan, StepPlan

THREADS = 256


class DeviceTables:
    """`modules` [max_adapters, layers * 7, 12] and `pages` [max_adapters, max_adapter_pages], int32 on the device.

    They change only by what a plan carries, in the order of the compute stream: behind every launched step that reads
    them, before the step that brings the change.
    """

    def __init__(self, pool: PagePool, max_adapters: int, max_adapter_pages: int) -> None:
        self.pool = pool
        self.num_modules = pool.config.num_layers * NUM_MODULES
        shape = (max_adapters, self.num_modules, MODULE_WORDS)
        self.modules = torch.zeros(shape, dtype=torch.int32, device=pool.device)
        self.pages = torch.zeros((max_adapters, max_adapter_pages), dtype=torch.int32, device=pool.device)
        self._kernel = nvrtc.load("descriptors").kernel("update_descriptors")
        self._large_rows = set[int]()
        """Whose adapters have a linear of more than UNIT_RANKS ranks."""

    def update(self, plan: StepPlan, mirror: DevicePlan) -> None:
        """Take over the rows that a plan changes, which was uploaded to its mirror."""
        if not plan.counts.num_changed:
            return
        names = ("changed_rows", "changed_pages_indptr", "changed_pages", "changed_modules")
        sizes = (self.num_modules * MODULE_WORDS, self.pages.shape[1])
        args: tuple[Argument, ...] = (*(mirror[name] for name in names), *sizes, self.modules, self.pages)
        self._kernel(plan.counts.num_changed, THREADS, args)
        rows = plan.array("changed_rows").tolist()
        words = plan.array("changed_modules")[: len(rows) * self.num_modules * MODULE_WORDS]
        ranks = words.reshape(len(rows), self.num_modules, MODULE_WORDS)[..., 0].max(1)
        self._large_rows.difference_update(rows)
        self._large_rows.update(row for row, rank in zip(rows, ranks, strict=True) if rank > UNIT_RANKS)

    def has_large(self, plan: StepPlan) -> bool:
        """Whether one of the plan's adapters has a linear of more than UNIT_RANKS ranks."""
        return bool(self._large_rows) and bool(np.isin(plan.array("seg_adapter"), list(self._large_rows)).any())
