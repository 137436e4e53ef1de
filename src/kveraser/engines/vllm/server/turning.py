"""How the engine's model rotates keys, as its workers have noted it in the store for whoever looks at the states there.

Knows: the store's folder. Does not know who notes it, or what for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from kveraser.engines.vllm.server.store import EditStore
from kveraser.errors import CalibrationError
from kveraser.files import write_atomically
from kveraser.readers import Turning


def write_turning(store: EditStore, turning: Turning) -> None:
    """Note how the model of this engine rotates keys, for whoever looks at its states."""
    about = {"rotary": turning.rotary, "pairing": turning.pairing, "inv_freq": turning.inv_freq.tolist()}
    write_atomically(_turning_file(store), json.dumps(about).encode(), private=True)


def read_turning(store: EditStore) -> Turning:
    """What a worker has noted.

    Raises:
        CalibrationError: nothing, since the model has no rotary embedding, or several.
    """
    try:
        about = json.loads(_turning_file(store).read_text(encoding="utf-8"))
        frequencies = torch.tensor(about["inv_freq"], dtype=torch.float64)
        return Turning(tuple(about["rotary"]), about["pairing"], frequencies)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"how this model rotates its keys is not known, readers cannot be told: {error}"
        ) from error


def _turning_file(store: EditStore) -> Path:
    return store.folder / f"turning-{hashlib.sha256(store.geometry.model.encode()).hexdigest()[:16]}.json"
