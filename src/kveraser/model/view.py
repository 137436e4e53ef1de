"""Looking at a user's model without touching it.

Knows: `torch.nn.Module` trees, and how PEFT, `torch.compile` and Accelerate wrap them. Does not know about caches.

A *view* is a second tree of module objects over the very same parameters, buffers and hooks. It can run in eval mode,
or with some modules exchanged, while the user's own tree stays as it is, also for other threads that use it at the same
time. Making one costs about as much as walking the tree (1 ms for 400 modules); no tensor is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside `torch.compile`, DDP and PEFT wrappers; the user's LoRA layers stay active in it."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            return inner


def decoder(model: nn.Module) -> Any:
    """The part of a causal language model that fills the cache: everything but the output embedding."""
    inner = causal_lm(model)
    prefix = getattr(inner, "base_model_prefix", "")
    return getattr(inner, prefix) if prefix and hasattr(inner, prefix) else inner


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder."""
    config = causal_lm(model).config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def kv_shape(model: nn.Module) -> tuple[int, int, int]:
    """Layers, key heads and their dimensions, of a model's cache."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1  # of Falcon and GPT-BigCode; Falcon's new architecture caches every key once per query head
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, size


def model_device(model: nn.Module) -> torch.device:
    """Where the model's input embedding is."""
    weight: Tensor = causal_lm(model).get_input_embeddings().weight
    return weight.device


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type of the model's input embedding."""
    weight: Tensor = causal_lm(model).get_input_embeddings().weight
    return weight.dtype


def key_biases(model: nn.Module) -> list[Tensor]:
    """The biases of the projections that make keys (of fused ones: of all that they make). Large ones make rotating rounded keys dear."""
    named = model.named_modules()
    made = [module for name, module in named if name.rpartition(".")[2] in _KEY_PROJECTIONS]
    return [module.bias.detach() for module in made if isinstance(getattr(module, "bias", None), Tensor)]


def finish(device: torch.device) -> None:
    """Wait until an accelerator has done all that it was given: its work goes on behind a call, and a clock must wait for it."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """An attribute that refers to the module itself (Accelerate's hooks do), made to refer to its view."""
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, partial) and any(argument is old for argument in value.args):
        args = tuple(new if argument is old else argument for argument in value.args)
        return partial(value.func, *args, **value.keywords)
    return value


def shallow(module: M) -> M:
    """One module object anew: own attributes and own children table, shared parameters, buffers and hooks."""
    view = object.__new__(type(module))
    attributes = view.__dict__
    for name, value in module.__dict__.items():
        attributes[name] = _rebound(value, module, view) if callable(value) else value
    attributes["_modules"] = dict(module._modules)
    return view


def view(
    model: M, replace: Mapping[str, nn.Module] | None = None, *, attention: str | None = None, whole: bool = False
) -> M:
    """A view of `model` in eval mode.

    What the view has no reason to change is not copied: modules in eval mode without a replaced one below them are the
    user's own objects.

    Args:
        model: any module tree.
        replace: module name -> a module to stand there instead; it gets the view of the original module as its child
            `base_layer` (PEFT's name for it). The given module objects are not changed.
        attention: an attention implementation, by transformers' name, for the view to use instead of the model's.
        whole: copy every module.
    """
    replace = replace or {}
    seen: dict[int, nn.Module] = {}
    configs: dict[int, Any] = {}

    def visit(module: nn.Module, name: str) -> nn.Module:
        if id(module) in seen:
            return seen[id(module)]
        children = {
            key: None if child is None else visit(child, f"{name}.{key}" if name else key)
            for key, child in module._modules.items()
        }
        config = module.__dict__.get("config") if attention is not None else None
        attends = hasattr(config, "_attn_implementation")
        kept = all(children[key] is child for key, child in module._modules.items())
        if kept and not (whole or module.training or attends or name in replace):
            seen[id(module)] = module
            return module
        own = shallow(module)
        own.__dict__["training"] = False
        own.__dict__["_modules"] = children
        if attends:
            own.__dict__["config"] = configs.setdefault(id(config), _attending(config, attention))
        if name in replace:
            wrapper = shallow(replace[name])
            wrapper.__dict__["training"] = False
            wrapper.__dict__["_modules"]["base_layer"] = own
            own = wrapper
        seen[id(module)] = own
        return own

    return visit(model, "")  # type: ignore[return-value]


def _attending(config: Any, attention: str | None) -> Any:
    own = copy.copy(config)
    own._attn_implementation_internal = attention
    return own


def frozen(model: M, *, attention: str | None = None) -> M:
    """A view whose parameters (the same memory) take no gradients; `attention` as for `view`."""
    own = view(model, attention=attention, whole=True)
    for module in own.modules():
        module.__dict__["_parameters"] = {
            name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in module._parameters.items()
        }
    return own


def evaluating(model: M) -> M:
    """The model itself when it is in eval mode, else a view of it that is (dropout must not reach a cache)."""
    return view(model) if model.training else model


def as_batch(ids: Tensor | list[int], device: torch.device) -> Tensor:
    """Token ids as an int64 tensor `(batch, tokens)`."""
    tensor = torch.as_tensor(ids, dtype=torch.long, device=device)
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
