"""Having a server find out, once for its model, what tells who has read a span.

Knows: a server with our connector, the lesson that a model is calibrated on. Does not know how it is calibrated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kveraser.engines.vllm.client.http import VLLMClient
from kveraser.engines.vllm.protocol import Demand, Learn, Save
from kveraser.errors import EngineError
from kveraser.readers import LEAST_TOKENS, MOST_TOKENS, lesson

log = logging.getLogger(__name__)


def teach(client: VLLMClient, model: str, text: Sequence[int], most: int) -> None:
    """Have the server read some text twice, the second time without some of it; where it cannot, that is logged.

    Args:
        text: ids of any text.
        most: tokens that a request may have.
    """
    ids = list(text)[: min(MOST_TOKENS, most - 1)]
    if len(ids) < LEAST_TOKENS:
        return
    whole, gone = lesson(torch.tensor([ids]))
    kept: list[str] = []
    try:
        for part, observe in ((whole[0], True), (whole[0, ~gone], False)):
            demand = Demand(save=(Save(0, len(part)),), observe=observe)
            kept += client.complete(model, part.tolist(), max_tokens=1, demand=demand).said["saved"]
        learn = Learn(len(ids), tuple(kept[:-1]), kept[-1])
        client.complete(model, [0], max_tokens=1, demand=Demand(learn=learn, drop=tuple(kept)))
    except (EngineError, LookupError, TypeError) as error:
        client.forget(model, kept)
        log.warning("readers cannot be told by this server, the next tokens are recomputed instead: %s", error)
