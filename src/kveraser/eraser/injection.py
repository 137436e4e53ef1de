"""Which linear layers of a model get a LoRA, and the LoRA there, as PEFT makes it.

Knows: PEFT's injection, model views. Does not know about erasers or files.

PEFT builds its layers on a throw-away skeleton of the model that shares its weights; the user's model is never changed.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kveraser.eraser.lora import LoraLinear
from kveraser.errors import EraserMismatchError
from kveraser.model.view import causal_lm, frozen

_ADAPTER = "eraser"


def target_linears(model: nn.Module) -> list[str]:
    """The names of all linear layers of attention and MLP (seven on Llama)."""
    found = set()
    for name, module in causal_lm(model).named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in parts) and "lora_" not in name:
            found.add(parts[-2] if parts[-1] == "base_layer" else parts[-1])
    return sorted(found)


def lora_layers(model: nn.Module, lora_config: LoraConfig) -> dict[str, LoraLinear]:
    """The LoRA at every adapted module, by its name, as PEFT makes it on a skeleton of the model that shares its weights."""
    skeleton = frozen(causal_lm(model))
    skeleton.__dict__.pop("peft_config", None)
    _without_adapters(skeleton)
    inject_adapter_in_model(lora_config, skeleton, adapter_name=_ADAPTER)
    layers = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            parts: Any = (module.lora_A[_ADAPTER], module.lora_B[_ADAPTER])
            down, up = (part.weight.requires_grad_(False) for part in parts)
            layers[name] = LoraLinear(down, up, float(module.scaling[_ADAPTER]))
    if not layers:
        raise EraserMismatchError(
            f"the adapter's target modules {lora_config.target_modules} do not occur in this model"
        )
    return layers


def _without_adapters(module: nn.Module) -> None:
    """Take the user's own adapters out of a view."""
    for name, child in module._modules.items():
        while isinstance(child, BaseTunerLayer):
            child = child.get_base_layer()
        module._modules[name] = child
        if child is not None:
            _without_adapters(child)
