"""Training an eraser by self-distillation from full recomputation.

`distill` turns one example into a loss, `losses` holds its terms, `loop` is a plain loop over examples.
"""

from kveraser.training.distill import Prepared, prepare, student_loss
from kveraser.training.loop import Progress, TrainConfig, train_eraser

__all__ = ["Prepared", "Progress", "TrainConfig", "prepare", "student_loss", "train_eraser"]
