"""Every error that ctxcomp-rag raises on purpose.

    CtxcompError
    ├── InputError(ValueError)            a document, file, column or argument is not usable
    │   └── PromptTooLongError            a prompt or its answer is longer than what may be read
    ├── SpanShapeError(ValueError)        tensors of a span do not fit together
    ├── IncompatibleSpanError(ValueError) a span was made for another decoder or compressor
    ├── SpanReferenceError(ValueError)    a reference to a span is forged, expired, or of another scope
    ├── SchedulerFullError(RuntimeError)  more requests are waiting than the scheduler takes
    ├── WorkerError(RuntimeError)         workers of a job died, or a cluster lacks what the job needs
    ├── UnsupportedModelError(ValueError) this architecture cannot do what was asked, with the reason
    ├── ModelLoadError(OSError)           a model, tokenizer or compressor cannot be loaded
    └── IndexFolderError(OSError)         an index folder is missing, damaged, or in use
        ├── IndexDamagedError
        ├── IndexLockedError
        └── IndexUnreachableError     an object store does not answer, or does not let us in

Each class also derives from the builtin that a caller would expect, so `except ValueError` works.
Messages are sentences: what was expected, what was found, what to type next.
"""

from __future__ import annotations


class CtxcompError(Exception):
    """Base of all errors raised by ctxcomp-rag."""


class InputError(CtxcompError, ValueError):
    """A document, file, column or argument is not usable."""


class PromptTooLongError(InputError):
    """A prompt takes more positions, or asks for a longer answer, than the decoder or a limit allows."""


class SpanShapeError(CtxcompError, ValueError):
    """The tensors of a memory span do not fit together."""


class IncompatibleSpanError(CtxcompError, ValueError):
    """A span or index was made for another decoder or by another compressor."""


class SpanReferenceError(CtxcompError, ValueError):
    """A reference to a span is malformed, forged, expired, revoked, or of another scope.

    The message never repeats the reference: logs are read by others.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SchedulerFullError(CtxcompError, RuntimeError):
    """More requests are waiting than the scheduler takes."""


class WorkerError(CtxcompError, RuntimeError):
    """Workers of a job died again and again, or a cluster lacks what the job needs."""


class UnsupportedModelError(CtxcompError, ValueError):
    """The model's architecture cannot do what was asked."""


class ModelLoadError(CtxcompError, OSError):
    """A model, tokenizer or compressor cannot be loaded."""


class IndexFolderError(CtxcompError, OSError):
    """An index folder is missing, cannot be written, or is not an index."""


class IndexDamagedError(IndexFolderError):
    """Stored bytes do not match their checksums."""


class IndexLockedError(IndexFolderError):
    """Another process is writing to the index."""


class IndexUnreachableError(IndexFolderError):
    """The object store of an index does not answer, or does not let us in."""
