"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model's linear layers, by peft, and what becomes of them.

The policy on disk is always whole: adapters are merged into it at the end of an update, and lie beside it in peft's own
format for engines that take adapters. The reference is the same base with the adapters off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from entropo_ray import config
from entropo_ray.train.experts import blocks

FOLDER = "adapter"  # beside the weights
_NAME = "default"


def inject(model: nn.Module, cfg: config.Fit) -> None:
    """Put adapters on the linear layers that `lora_targets` names, and train nothing else.

    ValueError for a target that no linear layer has as the last part of its name, and for a part of the MLPs in a
    mixture of experts: its experts are 3-D parameters, which adapters for linear layers would miss without a word.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in cfg.lora_targets:
        if not any(name.rpartition(".")[2] == target for name in names):
            known = sorted({name.rpartition(".")[2] for name in names if ".layers." in name})
            raise ValueError(
                f"lora_targets: {target} is no linear layer of {type(model).__name__}; it has {', '.join(known)}"
            )
    if blocks(model) and any(".mlp." in name and name.rpartition(".")[2] in cfg.lora_targets for name in names):
        raise ValueError(
            f"lora_targets: {type(model).__name__} has experts that are 3-D parameters, which adapters do not reach; "
            "name attention's layers alone, as in lora_targets=[q_proj,k_proj,v_proj,o_proj], or train all weights"
        )
    settings = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_targets))
    inject_adapter_in_model(settings, model, _NAME)
    for name, layer in layers(model).items():
        assert isinstance(layer, LoraLinear), f"{name} got a {type(layer).__name__}, which cannot be merged here"
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """The base alone."""
    wrapped = layers(model).values()
    for layer in wrapped:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in wrapped:
            layer.enable_adapters(True)
        # peft freezes an adapter that it switches off, and lets it learn again with the rest it switches on
        assert all(weight.requires_grad == ("lora_" in name) for name, weight in model.named_parameters())


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with every adapter added to its layer, under the names of the model without adapters."""
    whole = {name: weight for name, weight in state.items() if "lora_" not in name and ".base_layer." not in name}
    for name, layer in layers(model).items():
        up, down = (state[f"{name}.lora_{part}.{_NAME}.weight"].float() for part in ("B", "A"))
        base = state[f"{name}.base_layer.weight"]
        whole[f"{name}.weight"] = (base.float() + layer.scaling[_NAME] * (up @ down)).to(base.dtype)
        if f"{name}.base_layer.bias" in state:
            whole[f"{name}.bias"] = state[f"{name}.base_layer.bias"]
    return whole


def save(model: Any, state: Mapping[str, Tensor], cfg: config.Fit, base: Path, to: Path) -> None:
    """The adapters alone, as peft and vLLM read them."""
    to.mkdir(parents=True, exist_ok=True)
    found = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": weight.contiguous()
        for name, weight in state.items()
        if "lora_" in name
    }
    save_file(found, to / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=list(cfg.lora_targets),
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(to))
