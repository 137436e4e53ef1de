"""The eraser: a LoRA on the user's own model, kept apart from it.

Knows: PEFT's layers and file format, model views. Does not know about caches or spans.

PEFT builds the LoRA layers on a throw-away skeleton of the model that shares its weights. They are then kept by module
name, and stand in a *view* of the model during a pass (`model_view`). The user's model is never changed, not even for
the time of a pass, so that other threads may go on using it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor, nn

from kveraser.cache import Tokens, Window, check_model
from kveraser.eraser.adapter_files import CONFIG, KEY_PREFIX, WEIGHTS, find_folder, read_lora_config, read_weights, tidy
from kveraser.eraser.config import FILE_NAME, ActsOn, Choose, EraserConfig, Values
from kveraser.eraser.injection import lora_layers, target_linears
from kveraser.eraser.lora import LoraLinear
from kveraser.eraser.neutral import write_neutral
from kveraser.errors import CalibrationError, EraserMismatchError, OptionError
from kveraser.files import write_atomically
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import causal_lm, model_device, model_dtype, view
from kveraser.readers import FILE_NAME as READERS
from kveraser.readers import LEAST_READERS, Calibration, calibrate, read_calibration, write_calibration
from kveraser.spans import Span

if TYPE_CHECKING:
    from os import PathLike

_VALUES = "v_proj"
_REMEDY = "use method='full-recompute', or train an eraser for this model with `kveraser train`"
_UNVERIFIED = (
    "{path} has no {file}, so nothing says which model it was made for: it is taken as an eraser of this {model} that sees the "
    "whole prefix and recomputes nothing (kv.Steering(eraser, repair={repair}) also recomputes readers)"
)


class KVEraser:
    """An eraser for one backbone: a LoRA, or (neutral) states that nothing attends to.

    Make one with `KVEraser.new` (to train it), `KVEraser.from_pretrained` (a PEFT folder or hub id with a
    `kveraser.json`) or `KVEraser.neutral`.

    Attributes:
        config: window, repair and the backbone's fingerprint.
        lora_config: PEFT's configuration; None for a neutral eraser.
        layers: module name in the backbone -> the LoRA there (without its base layer); none for a neutral eraser.
        calibration: what tells readers of a span on this backbone; None leaves it to the cache folder, or to the first
            erase that needs it.
    """

    def __init__(
        self,
        config: EraserConfig,
        lora_config: LoraConfig | None,
        layers: dict[str, LoraLinear],
        calibration: Calibration | None = None,
    ) -> None:
        self.config = config
        self.lora_config = lora_config
        self.layers = layers
        self.calibration = calibration
        self._checked: ReferenceType[nn.Module] | None = None

    def __repr__(self) -> str:
        kind = "neutral" if self.lora_config is None else f"rank={self.lora_config.r}, layers={len(self.layers)}"
        return f"KVEraser({kind}, window={self.window}, repair={self.repair})"

    # -- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def new(
        cls,
        model: nn.Module,
        *,
        rank: int = 16,
        alpha: int = 32,
        window: Window | None = None,
        repair: int | None = 0,
        choose: Choose = "readers",
        acts_on: ActsOn = "spans",
        values: Values = "own",
        seed: int = 42,
        target_modules: list[str] | None = None,
    ) -> KVEraser:
        """A fresh eraser, which changes nothing yet (LoRA B is zero).

        Args:
            model: the backbone.
            rank, alpha: of the LoRA; 16 and 32 in the paper.
            window: `(sink, local)` slots it attends to besides the span; None for the whole prefix.
            repair: tokens behind the span to recompute after steering; None: as many as a span of its length deserves.
            choose: which ones: "readers" of the span, or the "next" ones.
            acts_on: where the LoRA runs: on the "spans", or on the "readers" that are recomputed.
            values: of the spans' states: the model's "own", changed by the LoRA, or "learned" ones, which the LoRA makes alone.
            seed: of LoRA A's random start; the global random state is left alone.
            target_modules: names of the linears to adapt; None for all of attention and MLP.

        Raises:
            UnsupportedCacheError: a model whose cache cannot be edited.
            OptionError: learned values on readers, or for a model that has no projection of its own for values.
        """
        check_model(model)
        if rank < 1 or (repair or 0) < 0 or (window is not None and min(window) < 0):
            raise OptionError(f"rank={rank} must be at least 1, repair={repair} and window={window} not negative")
        lora_config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=target_modules or target_linears(model),
            task_type="CAUSAL_LM",
            base_model_name_or_path=causal_lm(model).config._name_or_path or None,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also sets every accelerator's
            layers = lora_layers(model, lora_config)
        if values == "learned" and (acts_on == "readers" or not any(map(_makes_values, layers))):
            raise OptionError(
                "values='learned' is for erasers that act on spans, of models with a projection of its own for values "
                f"({_VALUES}); acts_on={acts_on!r}, and the LoRA is on: {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}"
            )
        config = EraserConfig(Fingerprint.of(model), window, repair, choose, acts_on, values)
        return cls(config, lora_config, layers)

    @classmethod
    def neutral(cls, model: nn.Module, *, repair: int | None = None, ids: list[int] | Tensor | None = None) -> KVEraser:
        """An eraser without LoRA and without training: it writes states that nothing attends to, and repairs readers.

        Per layer and key head it is one constant key that no query likes, and a zero value. The idea is ours.

        Args:
            model: the backbone.
            repair: readers of a span to recompute; None: as many as a span of its length deserves (`readers.how_many`).
            ids: `(tokens,)` of any text, at least 256, to calibrate on now; None leaves it to the first erase.

        Raises:
            UnsupportedCacheError: a model whose cache cannot be edited.
            CalibrationError: too little text.
        """
        check_model(model)
        if repair is not None and repair < 0:
            raise OptionError(f"repair={repair} must be at least 0 tokens")
        calibration = None if ids is None else calibrate(model, ids)
        return cls(EraserConfig(Fingerprint.of(model), None, repair), None, {}, calibration)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], model: nn.Module, *, check_weights: bool = True) -> KVEraser:
        """Load an eraser from a folder or a hub id.

        Args:
            path: PEFT folder or hub id that also holds a `kveraser.json`. Without one it is taken as the paper's authors
                publish theirs (`Graph-COM/KVEraser`): the whole prefix is seen, nothing is recomputed unless asked for,
                and a warning says that nobody can tell whether it was made for this backbone.
            model: the backbone.
            check_weights: False accepts a backbone of the same shape with other weights (a fine-tune of it).

        Raises:
            EraserMismatchError: not an eraser, damaged, or made for another backbone.
        """
        folder = find_folder(str(path))
        if (folder / FILE_NAME).is_file():
            config = EraserConfig.read(folder / FILE_NAME)
        else:
            config = EraserConfig(Fingerprint.of(model))
            warnings.warn(
                _UNVERIFIED.format(
                    path=path, file=FILE_NAME, model=type(causal_lm(model)).__name__, repair=LEAST_READERS
                ),
                stacklevel=2,
            )
        difference = config.fingerprint.difference(model)
        if difference is not None and (check_weights or "weights" not in difference):
            name = type(causal_lm(model)).__name__
            raise EraserMismatchError(
                f"the eraser in {path} was made for another model than this {name}: {difference}; {_REMEDY}"
            )
        lora_config = read_lora_config(folder, str(path))
        eraser = cls(config, lora_config, lora_layers(model, lora_config), _calibration(folder, config))
        eraser.load_weights(folder, causal_lm(model).base_model_prefix)
        if not check_weights:
            eraser._checked = ref(causal_lm(model))
        return eraser

    @property
    def is_neutral(self) -> bool:
        """Whether it has no LoRA at all."""
        return self.lora_config is None

    @property
    def steers_spans(self) -> bool:
        """Whether its LoRA makes the states of erased tokens; else these are neutral."""
        return not self.is_neutral and self.config.acts_on == "spans"

    @property
    def steers_readers(self) -> bool:
        """Whether its LoRA computes the tokens that are recomputed."""
        return not self.is_neutral and self.config.acts_on == "readers"

    @property
    def kind(self) -> str:
        """ "trained" or "neutral"."""
        return "neutral" if self.is_neutral else "trained"

    # -- using it ------------------------------------------------------------------------------------------------

    @property
    def window(self) -> Window | None:
        """`(sink, local)` slots it attends to besides the span; None for the whole prefix."""
        return self.config.window

    @property
    def repair(self) -> int | None:
        """Tokens behind the span to recompute after steering; None: by the span's length."""
        return self.config.repair

    @property
    def choose(self) -> Choose:
        """Which of them: "readers" or "next"."""
        return self.config.choose

    def check_model(self, model: nn.Module) -> None:
        """Raise `EraserMismatchError` unless the eraser was made for `model`."""
        base = causal_lm(model)
        if self._checked is not None and self._checked() is base:
            return
        difference = self.config.fingerprint.difference(model)
        if difference is not None:
            raise EraserMismatchError(
                f"the eraser was made for another model than this {type(base).__name__}: {difference}; {_REMEDY}"
            )
        self._checked = ref(base)

    def hide(self, backend: Any, tokens: Tokens, spans: Sequence[Span], calibration: Callable[[], Calibration]) -> int:
        """Write neutral states into some slots of a transformers cache; returns the bytes written.

        Args:
            calibration: gives the neutral keys.
        """
        return write_neutral(backend.model, backend.cache, tokens, spans, calibration().neutral)

    def attached(self, model: nn.Module, *, first: int | None = None) -> nn.Module:
        """A view of `model` with the eraser active; `model` itself is left alone. Valid until the model changes.

        Args:
            first: how many tokens of every row it changes, from the first on; None for all.
        """
        self.to(model_device(model), model_dtype(model), training_too=False)
        layers = self.layers
        if first is not None:
            layers = {name: layer.for_first(first) for name, layer in layers.items()}
        if self.config.values == "learned":
            layers = {name: layer.by_itself() if _makes_values(name) else layer for name, layer in layers.items()}
        attached: nn.Module = view(causal_lm(model), layers)
        return attached

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """LoRA A and B by PEFT's names."""
        for name, layer in self.layers.items():
            yield f"{KEY_PREFIX}{name}.lora_A.weight", layer.down
            yield f"{KEY_PREFIX}{name}.lora_B.weight", layer.up

    def matrices(self, module: str) -> tuple[nn.Parameter, nn.Parameter, float]:
        """A `(rank, in)`, B `(out, rank)` and the scaling of their product, of the adapted module with that name."""
        layer = self.layers[module]
        return layer.down, layer.up, layer.scaling

    def parameters(self) -> list[nn.Parameter]:
        """The trainable weights."""
        return [parameter for _, parameter in self.named_parameters()]

    def to(self, device: torch.device, dtype: torch.dtype, *, training_too: bool = True) -> KVEraser:
        """Move the weights; those that are being trained only when `training_too`."""
        for _, parameter in self.named_parameters():
            wanted = parameter.dtype if parameter.requires_grad and not training_too else dtype
            if parameter.device != device or parameter.dtype != wanted:
                parameter.data = parameter.data.to(device, wanted)
        return self

    def train(self, mode: bool = True) -> KVEraser:
        """Make the weights trainable (float32) or not."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(mode)
            if mode:
                parameter.data = parameter.data.float()
        return self

    # -- files ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """LoRA A and B by PEFT's names, on the CPU."""
        return {name: parameter.detach().cpu().contiguous() for name, parameter in self.named_parameters()}

    def save_pretrained(
        self, folder: str | PathLike[str], *, dtype: torch.dtype = torch.float16, notes: dict[str, Any] | None = None
    ) -> Path:
        """Write PEFT's adapter files, `kveraser.json` and what tells readers (if it is there) into `folder`.

        Raises:
            OptionError: a neutral eraser, which has nothing to save.
        """
        if self.lora_config is None:
            raise OptionError("a neutral eraser has no weights to save; make it again with KVEraser.neutral(model)")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.lora_config.save_pretrained(str(target))
        tidy(target / CONFIG)
        weights = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        write_atomically(target / WEIGHTS, save(weights))
        replace(self.config, notes={**self.config.notes, **(notes or {})}).write(target)
        if self.calibration is not None:
            write_calibration(target / READERS, self.calibration)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str | PathLike[str] | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the eraser to the Hugging Face hub; returns the URL of the commit.

        Args:
            folder: where it was saved, to upload everything there is (a model card, say); None uploads what
                `save_pretrained` writes.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            source = str(folder or self.save_pretrained(temporary))
            return str(api.upload_folder(repo_id=repo_id, folder_path=source))

    def load_weights(self, folder: str | PathLike[str], body: str = "model") -> None:
        """Take over the weights of an eraser of the same shape.

        Args:
            body: what the causal model calls the model below its head; an adapter may have been saved for that alone.

        Raises:
            EraserMismatchError: unreadable, or of another shape.
        """
        names = [name for name, _ in self.named_parameters()]
        self.load_state_dict(read_weights(Path(folder), names, body), str(folder))

    def load_state_dict(self, weights: dict[str, Tensor], source: str) -> None:
        """Take over what `state_dict` gave of an eraser of the same shape, else `EraserMismatchError`, which names its `source`."""
        own, rank = dict(self.named_parameters()), self.lora_config.r if self.lora_config else 0
        missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or extra:
            raise EraserMismatchError(
                f"the adapter in {source} lacks {len(missing)} and has {len(extra)} tensors too many for this model "
                f"(first: {(missing + extra)[0]}); {_REMEDY}"
            )
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise EraserMismatchError(
                    f"{name} in {source} has shape {tuple(weights[name].shape)}, rank {rank} on this model "
                    f"needs {tuple(parameter.shape)}; adapter_config.json and {WEIGHTS} do not belong together"
                )
            parameter.data = weights[name].to(parameter)


def _makes_values(module: str) -> bool:
    """Whether the module of that name makes values, and nothing else."""
    return module.rpartition(".")[2] == _VALUES


def _calibration(folder: Path, config: EraserConfig) -> Calibration | None:
    """What tells readers, from an eraser's folder; None when it holds none."""
    file = folder / READERS
    if not file.exists():
        return None
    try:
        found = read_calibration(file)
    except CalibrationError as error:
        raise EraserMismatchError(str(error)) from error
    difference = config.fingerprint.difference_to(found.fingerprint)
    if difference is not None:
        raise EraserMismatchError(f"{file} was made for another model than the eraser beside it: {difference}")
    return found
