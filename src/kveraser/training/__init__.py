"""Training an eraser by self-distillation from full recomputation, in two stages.

`config` says what a run depends on, `run` runs it, `stage` is one stage. `lessons` are what is learnt from, `cases` these with
their states, `rereading` computes what an erase recomputes, `distill` turns all of it into a loss.

Knows: erasers, tasks, teachers, optimisers. Does not know about servers, engines, or how an eraser is used later.
"""

from kveraser.training.config import PRESETS, STAGES, EraserOptions, Stage, StageName, TrainConfig, read_config
from kveraser.training.progress import Progress, Validation
from kveraser.training.run import train_eraser

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
