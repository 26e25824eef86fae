"""The kinds of errors. Each has the message that the command line prints."""

from __future__ import annotations


class LoraweldError(Exception):
    """Something that loraweld refuses or cannot do; the classes below say what kind of thing."""

    file: str | None = None
    """The file that it is about, if it is about one."""
    key: str | None = None
    """The key of the tensor that it is about."""
    layer: str | None = None
    """The layer that it is about."""


class InvalidError(LoraweldError, ValueError):
    """An option or an argument makes no sense, or options do not fit together."""


class ArrayError(LoraweldError, TypeError, ValueError):
    """An array has a type, shape or place that cannot be used."""


class IoError(LoraweldError, OSError):
    """The operating system refused a file operation."""


class NotFoundError(IoError, FileNotFoundError):
    """A file does not exist."""


class NoPermissionError(IoError, PermissionError):
    """A file may not be read or written."""


class FileError(LoraweldError, ValueError):
    """A file is not what it should be."""


class TensorError(FileError):
    """A tensor of a file cannot be used."""


class NotMergeableError(FileError):
    """A file holds what is no plain LoRA, and was not opened so that it can be read as one."""


class ExistsError(LoraweldError, FileExistsError):
    """An output exists, and is not to be overwritten."""


class LayerError(LoraweldError, ValueError):
    """A layer cannot be computed."""


class UnnamedError(LayerError):
    """Layers have no known name in the spelling that was asked for."""


class DeviceError(LoraweldError, RuntimeError):
    """No device fits, or it failed."""


class CancelledError(LoraweldError):
    """A call was ended from outside."""


class LoraweldWarning(UserWarning):
    """Something that is no failure but may not be what one wants."""


def _made(name: str, message: str, fields: dict[str, str | None]) -> LoraweldError:
    """An error for Rust to raise."""
    error = globals()[name](message)
    for field, value in fields.items():
        setattr(error, field, value)
    return error
