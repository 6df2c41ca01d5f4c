"""Mixtures of experts: what ZeRO-3 must be told about them, and how evenly their routers spread tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a router (`gate`) and its experts."""
    return [m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module) and hasattr(m, "gate")]


class Load:
    """Tokens of each expert since the last reading, counted by hooks on the routers."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: list[Tensor] = []
        for number, block in enumerate(blocks(model)):
            gate: Any = block.gate
            self.counts.append(torch.zeros(int(gate.weight.shape[0] or gate.num_experts), dtype=torch.float64))
            gate.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled():  # a scoring pass; recomputation counts every token twice, which is even
                return
            chosen = next(part for part in output if torch.is_tensor(part) and not part.is_floating_point())
            counts = self.counts[number]
            counts += torch.bincount(chosen.flatten().cpu(), minlength=len(counts)).double()

        return hook

    def read(self) -> Tensor:
        """[layers, experts] tokens, and start again."""
        found = torch.stack(self.counts) if self.counts else torch.zeros(0, 0, dtype=torch.float64)
        for counts in self.counts:
            counts.zero_()
        return found


def spread(counts: Tensor) -> dict[str, float]:
    """Of [layers, experts] tokens: entropy of the loads over that of even ones, greatest load over the mean, idle ones.

    Means over layers; nothing without experts or tokens.
    """
    total = counts.sum(dim=1, keepdim=True) if counts.numel() else counts
    if not counts.numel() or not bool((total > 0).all()):
        return {}
    share = counts / total
    entropy = -(share * share.clamp(min=1e-300).log()).sum(dim=1) / math.log(counts.shape[1])
    return {
        "expert_entropy": float(entropy.mean()),
        "expert_load_max": float((share.amax(dim=1) * counts.shape[1]).mean()),
        "experts_idle": float((counts == 0).double().mean()),
    }
