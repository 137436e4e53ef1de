"""Training an eraser by self-distillation from full recomputation, in two stages.

`config` says what a run depends on, `run` runs it, `stage` is one stage. `lessons` are what is learnt from, `draws` says in which
order, `cases` are these with their states, `rereading` computes what an erase recomputes. `prepared` is all that never changes of
lessons, `store` keeps it on disk in `pieces`, `distill` turns it into a loss.

Knows: erasers, tasks, teachers, optimisers. Does not know about servers, engines, or how an eraser is used later.
"""

from kveraser.training.config import PRESETS, STAGES, EraserOptions, Stage, StageName, TrainConfig, read_config
from kveraser.training.progress import Progress, Validation
from kveraser.training.run import train_eraser
from kveraser.training.store import LIMIT

__all__ = [
    "LIMIT",
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
