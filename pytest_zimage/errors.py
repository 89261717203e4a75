"""The one exception family of the project: every error names the thing and the mend."""

from __future__ import annotations


class ZImageError(Exception):
    """Something a person can act on.

    ``message`` names the thing (file, tensor, table, option) and what is wrong with it; ``mend`` says what to do.
    Errors cross the worker's pipe by ``kind``, the class name, so subclasses add no fields.
    """

    def __init__(self, message: str, *, mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.message}\n  mend: {self.mend}" if self.mend else self.message


class CatalogError(ZImageError):
    """A catalogue table that cannot be used: names file, table and key."""


class MissingFileError(ZImageError):
    """A file of the model set that is not there: names the folders searched."""


class CheckpointError(ZImageError):
    """A file that is there and cannot be trusted: names file and tensor."""


class UnsupportedError(ZImageError):
    """A sound file or option that this device or these package versions cannot serve."""


class BaselineError(ZImageError):
    """A stored baseline that cannot be read, judged against or written."""


class MemoryShortageError(ZImageError):
    """Too little memory, of the device or the host, to load or draw: names the need, what is free and who holds it."""


class EngineError(ZImageError):
    """An engine that died, hung or answered nonsense; carries its exit status and last words."""


class MeasurementError(ZImageError):
    """A measurement that does not mean what it says, e.g. a wrong number of transformer forwards."""
