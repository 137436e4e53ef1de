"""Who has read a span: tokens whose attention went to it hold what an erase has to repair.

`observing` listens to a forward, `probes` tell queries from cached states, `masses` are what a token gave to a span,
`source` is a model and a cache as these see it, `calibration` finds all that is needed of a model, `files` and `known` keep it, `scan` applies it, `choice` picks tokens, `how_many` says of how many,
`neutral_keys` are written where nothing shall be attended to.

Knows: attention, cached keys and values, scores. Does not know what is erased, or how readers are repaired.
"""

from kveraser.readers.calibration import LEAST_TOKENS, MOST_TOKENS, Calibration, calibrate, lesson
from kveraser.readers.choice import RULE, choose, first_behind, residual, weights_of
from kveraser.readers.files import FILE_NAME, cached_file, read_calibration, write_calibration
from kveraser.readers.how_many import HOW_MANY, LEAST_READERS, READERS_PER_TOKEN, readers_for
from kveraser.readers.known import Text, calibration_for, known_calibration, remember
from kveraser.readers.probes import Turning
from kveraser.readers.scan import Scene
from kveraser.readers.source import ModelSource, Source, source_of

__all__ = [
    "FILE_NAME",
    "HOW_MANY",
    "LEAST_READERS",
    "LEAST_TOKENS",
    "MOST_TOKENS",
    "READERS_PER_TOKEN",
    "RULE",
    "Calibration",
    "ModelSource",
    "Scene",
    "Source",
    "Text",
    "Turning",
    "cached_file",
    "calibrate",
    "calibration_for",
    "choose",
    "first_behind",
    "known_calibration",
    "lesson",
    "read_calibration",
    "readers_for",
    "remember",
    "residual",
    "source_of",
    "weights_of",
    "write_calibration",
]
