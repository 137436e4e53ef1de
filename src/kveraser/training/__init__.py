"""Training an eraser by self-distillation from full recomputation, in two stages.

`config` says what a run depends on, `stages` runs it, `loop` is one stage, `lessons` what is learnt from, `distill` turns
lessons into a loss.
"""

from kveraser.training.config import PRESETS, STAGES, EraserOptions, Stage, StageName, TrainConfig, read_config
from kveraser.training.progress import Progress, Validation
from kveraser.training.stages import train_eraser

__all__ = [
    "PRESETS",
    "STAGES",
    "EraserOptions",
    "Progress",
    "Stage",
    "StageName",
    "TrainConfig",
    "Validation",
    "read_config",
    "train_eraser",
]
