"""The errors that kveraser raises, all of them:

    KVEraserError
    +-- SpanError (ValueError)
    +-- UnsupportedCacheError (TypeError)
    +-- CacheMismatchError (ValueError)
    +-- EraserMismatchError (ValueError)
    +-- CalibrationError (ValueError)
    +-- RestoreError (ValueError)
    +-- ContextError (ValueError)
    |   +-- ContextLengthError
    +-- SessionFileError (ValueError)
    +-- DamagedError (ValueError)
    +-- BackboneError (RuntimeError)
    +-- OptionError (ValueError)
    +-- TrainingError
    +-- EngineError (RuntimeError)
    +-- StoreError (RuntimeError)
    +-- SessionNotFoundError
    +-- QueueFullError
    +-- NotYetError
    |   +-- OwnerBusyError
    +-- JobTimeoutError
    +-- JobCancelledError
    +-- ApiError
    +-- BadCallError (ValueError)
    +-- SchemaError (ValueError)
    +-- UnknownCallError (ValueError)

Knows: names and what each one means. Does not know who raises them; the messages, with the offending value and the
remedy, are written where the mistake is found.
"""


class KVEraserError(Exception):
    """Base of every error that kveraser raises on purpose."""


class SpanError(KVEraserError, ValueError):
    """A span that cannot be erased: out of range, empty, reversed, overlapping another or an already erased one,
    or a text that does not occur, or occurs more than once."""


class UnsupportedCacheError(KVEraserError, TypeError):
    """A model or cache whose states cannot be edited in place (sliding window, quantised, linear attention, MLA,
    cross-attention, dynamic-NTK and LongRoPE position scaling, ...)."""


class CacheMismatchError(KVEraserError, ValueError):
    """Model, cache, token ids, attention mask and position ids that do not belong together."""


class EraserMismatchError(KVEraserError, ValueError):
    """An eraser that was made for another model, is damaged, or does not exist for this model."""


class CalibrationError(KVEraserError, ValueError):
    """Who has read a span cannot be told: too little text to calibrate on, probes of another model or damaged, or a
    model whose keys and values say too little about its queries."""


class RestoreError(KVEraserError, ValueError):
    """A receipt that cannot be restored: of another cache, restored before, purged, or with later edits on top."""


class ContextError(KVEraserError, ValueError):
    """A context that cannot do what was asked of it: empty, no tokenizer, a chat template that is not prefix-stable."""


class ContextLengthError(ContextError):
    """More tokens than the model can see at once. `param`: the field of a request that they come from, where known."""

    param: str | None = None


class SessionFileError(KVEraserError, ValueError):
    """A saved session that is missing, truncated, altered, of a newer format, or of another model."""


class DamagedError(KVEraserError, ValueError):
    """A sealed or checksummed file that is truncated or altered, of a newer format, or opened with another key. Whoever reads a session
    makes a `SessionFileError` of it."""


class BackboneError(KVEraserError, RuntimeError):
    """A backbone that cannot be found, converted or loaded."""


class OptionError(KVEraserError, ValueError):
    """An option with an impossible value, or the name of a method or task that does not exist."""


class TrainingError(KVEraserError):
    """A training run that cannot go on: a checkpoint of another run, a full disk, a loss that is no number."""


class EngineError(KVEraserError, RuntimeError):
    """An inference engine that is missing, of another version than the pinned one, or refuses what it was asked."""


class StoreError(KVEraserError, RuntimeError):
    """An entry of a store of edited states that is missing, damaged, of another model, or too large."""


class SessionNotFoundError(KVEraserError):
    """A server has no session of this owner with that id."""


class QueueFullError(KVEraserError):
    """Too many requests wait for a server's worker already. `retry_after`: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class NotYetError(KVEraserError):
    """The memory that a request needs is taken by replies that are being made; nothing was changed, and it waits until one of them is done."""


class OwnerBusyError(NotYetError):
    """A request must change conversations in which replies are being made; nothing was changed. It waits until these are done, and what comes
    later from the same owner waits behind it."""


class JobTimeoutError(KVEraserError):
    """A request took longer than it may, waiting included."""


class JobCancelledError(KVEraserError):
    """Nobody waits for the result of a request any more, or the server is stopping."""


class ApiError(KVEraserError):
    """What a server refuses, with the HTTP status it is answered with. `code`, `param`: of the answer's body, where there is more to say."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class BadCallError(KVEraserError, ValueError):
    """A call of a tool that is not sent as one, or a choice of tools that none can meet."""


class SchemaError(KVEraserError, ValueError):
    """A tool whose parameters are no JSON schema; `index` is the tool's."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"no JSON schema that can be used: {reason}")
        self.index = index


class UnknownCallError(KVEraserError, ValueError):
    """A result of no call; `index` is its message's."""

    def __init__(self, index: int, call_id: str) -> None:
        super().__init__(f"there is no call {call_id!r} before this result")
        self.index = index
