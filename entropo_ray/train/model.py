"""A policy's weights from disk and back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from entropo_ray import config
from entropo_ray.records import Policy
from entropo_ray.train import memory

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
logging.disable_progress_bar()


def load(policy: Policy, cfg: config.Fit) -> Any:
    """The model of a policy in the precision that it is trained in."""
    _repeatable(cfg.deterministic)
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(str(policy.path), dtype=dtype)
    if cfg.checkpointing:
        model.gradient_checkpointing_enable(memory.options(keep_attention=cfg.keep_attention))
    if cfg.mlp_tokens:
        memory.tile_mlps(model, cfg.mlp_tokens)
    return model


def _repeatable(wanted: bool) -> None:
    """Whether every kernel of this process must give the same bits each time."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(wanted)
    # else torch fills all fresh memory first; nothing here reads what it did not write
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def save(model: Any, state: Mapping[str, Tensor], policy: Policy, to: Path) -> None:
    """A Hugging Face directory: `state` as the weights of `model`, the tokenizer of `policy`."""
    model.save_pretrained(to, state_dict=dict(state))
    source = Path(policy.path)
    if not source.is_dir():  # a hub name
        AutoTokenizer.from_pretrained(str(source)).save_pretrained(to)
        return
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, to / file.name)
