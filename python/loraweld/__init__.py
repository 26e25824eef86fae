"""Merge LoRA adapters of diffusion models without training, on any Vulkan, Metal or DX12 GPU.

>>> import loraweld
>>> result = loraweld.merge(
...     "linear", [("cat.safetensors", 0.7), ("dog.safetensors", 0.5)], output="pets.safetensors", device="cpu"
... )  # doctest: +SKIP

- `open`, `Adapter`, `Layer`: what files hold, as numpy's arrays.
- `merge`, `compare`, `strengths`, `inspect`, `convert`, `resize`, `bake`, `extract`, `batch`: the commands, with their options by name; `run`
  runs any other.
- `Calibration`, and `Recorder`, which fills one while a model of torch runs.
- `methods` and `options`: what there is to choose from.

Errors are `LoraweldError`s, with a class for each kind. Long calls release the GIL, take a `progress` callback, and end
when Ctrl-C is pressed.
"""

import atexit as _atexit

from . import _loraweld, _vulkan
from ._commands import (
    Method,
    Option,
    Progress,
    Result,
    bake,
    batch,
    commands,
    compare,
    convert,
    devices,
    extract,
    inspect,
    merge,
    methods,
    options,
    resize,
    run,
    strengths,
)
from ._errors import (
    ArrayError,
    CancelledError,
    DeviceError,
    ExistsError,
    FileError,
    InvalidError,
    IoError,
    LayerError,
    LoraweldError,
    LoraweldWarning,
    NoPermissionError,
    NotFoundError,
    NotMergeableError,
    TensorError,
    UnnamedError,
)
from ._loraweld import Adapter, Calibration, Layer, __version__, open
from .recorder import Recorder

_vulkan.keep_apart()
_atexit.register(_loraweld.shut_down)

__all__ = [
    "Adapter",
    "ArrayError",
    "Calibration",
    "CancelledError",
    "DeviceError",
    "ExistsError",
    "FileError",
    "InvalidError",
    "IoError",
    "Layer",
    "LayerError",
    "LoraweldError",
    "LoraweldWarning",
    "Method",
    "NoPermissionError",
    "NotFoundError",
    "NotMergeableError",
    "Option",
    "Progress",
    "Recorder",
    "Result",
    "TensorError",
    "UnnamedError",
    "__version__",
    "bake",
    "batch",
    "commands",
    "compare",
    "convert",
    "devices",
    "extract",
    "inspect",
    "merge",
    "methods",
    "open",
    "options",
    "resize",
    "run",
    "strengths",
]
