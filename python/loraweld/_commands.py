"""The commands as functions. What they take is what the command line takes, and comes from its own description."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Union

from . import _loraweld
from ._errors import InvalidError, LoraweldWarning
from ._loraweld import Adapter, Calibration

PathLike = Union[str, "os.PathLike[str]"]
Source = Union[PathLike, Adapter, Mapping[str, Any]]
"""An adapter: a path, one that is open, or tensors by their keys."""
Lora = Union[Source, "tuple[Source, float]"]
"""An adapter, or an adapter and its strength."""


class Progress(NamedTuple):
    """How far a long call is."""

    stage: str
    """What is being done, such as "merge"."""
    item: str
    """The layer or file that comes next; empty at the end."""
    done: int
    """Items that are done."""
    total: int
    """Items in all."""


@dataclass(frozen=True)
class Option:
    """What a command takes."""

    name: str
    """Its name as an argument of a function, such as `ridge_relative`."""
    help: str | None
    """What it does."""
    default: str | None
    """The default, as the command line spells it; `None` if the help tells it, or if there is none."""
    values: tuple[str, ...]
    """The words that it takes, if it takes no others."""
    value: str | None
    """What its value is called; `None` if it is true or false."""
    required: bool
    """Whether it has to be given."""
    heading: str | None
    """What it is an option of, if that is not the command as a whole."""
    adapter: bool = field(default=False, repr=False)
    many: bool = field(default=False, repr=False)
    positional: bool = field(default=False, repr=False)
    delimiter: str | None = field(default=None, repr=False)
    flag: bool = field(default=False, repr=False)

    @property
    def long(self) -> str:
        """The name that it has on the command line, without the dashes."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Method:
    """A method of merging."""

    name: str
    """Its name, such as "np-lora"."""
    summary: str
    """What it does."""
    options: dict[str, Option]
    """Its own options. `loraweld.options("merge", name)` also has those that every method takes."""


@functools.cache
def options(*command: str) -> dict[str, Option]:
    """What a command takes, by name.

    >>> options("merge", "np-lora")["mu"].value
    'MU'
    >>> options("bake")["round"].values
    ('nearest', 'stochastic')
    """
    described = json.loads(_loraweld.arguments(list(command)))
    found = {}
    for argument in described["arguments"]:
        name = argument.pop("name").replace("-", "_")
        argument["values"] = tuple(argument["values"])
        found[name] = Option(name=name, **argument)
    return found


def commands(*command: str) -> list[str]:
    """The commands, or those below one.

    >>> "inspect" in commands(), commands("calibration")
    (True, ['add', 'show'])
    """
    return json.loads(_loraweld.arguments(list(command)))["commands"]


def _places(*command: str) -> list[str]:
    """The names of the arguments that a command takes by their places."""
    return [option.name for option in options(*command).values() if option.positional]


def methods() -> dict[str, Method]:
    """The methods of merging, by name, from the table that the command line has them from.

    >>> list(methods())[:3]
    ['ssr', 'np-lora', 'linear']
    """
    found = {}
    for entry in json.loads(_loraweld.methods()):
        known = options("merge", entry["name"])
        own = {name: known[name] for name in (option.replace("-", "_") for option in entry["options"])}
        found[entry["name"]] = Method(entry["name"], entry["summary"], own)
    return found


class Result:
    """What a command gave. As a string, it is what the command line would have printed."""

    command: str
    """The command, such as "merge ssr"."""
    events: list[dict[str, Any]]
    """Everything that it said: what `--json` prints."""
    warnings: list[str]
    """What is no failure but may not be what one wants; each was also given to `warnings.warn`."""
    output: Path | None
    """The file that was written; `None` if there is none, or if the result is in memory."""

    def __init__(
        self,
        command: str,
        events: list[dict[str, Any]],
        text: str,
        output: Path | None = None,
        *,
        adapter: Adapter | None = None,
        makes_adapter: bool = False,
    ) -> None:
        self.command, self.events, self.output = command, events, output
        self._makes_adapter = makes_adapter
        self.warnings = [event["message"] for event in self.all("warning")]
        self._text, self._adapter = text, adapter

    def all(self, event: str) -> list[dict[str, Any]]:
        """The events of this name."""
        return [e for e in self.events if e["event"] == event]

    @property
    def adapter(self) -> Adapter:
        """The adapter that was made: in memory, or opened from the file that was written."""
        if self._adapter is None:
            if self.output is None or not self._makes_adapter:
                raise InvalidError(f"{self.command} made no adapter")
            self._adapter = _loraweld.open(self.output)
        return self._adapter

    @property
    def report(self) -> dict[str, Any]:
        """What was done, and what each layer lost; empty for commands that report nothing."""
        return next((e["report"] for e in reversed(self.events) if isinstance(e.get("report"), dict)), {})

    @property
    def losses(self) -> dict[str, float] | None:
        """The loss of the merge, of the plain sum and of the average; `None` if there was nothing to measure by."""
        return self.report.get("losses")

    def save(self, path: PathLike, *, force: bool = False) -> None:
        """Writes the adapter to a file, whole or not at all."""
        self.adapter.save(path, force=force)

    def __str__(self) -> str:
        return self._text.rstrip("\n")

    def __repr__(self) -> str:
        where = f", {self.output}" if self.output else ""
        return f"<loraweld.Result of {self.command}{where}>"


class _Call:
    """Arguments of a command, and what stands for paths in them."""

    def __init__(self, *command: str) -> None:
        self.command, self.known = command, options(*command)
        self.named: list[str] = []
        self.positional: list[str] = []
        self.adapters: list[tuple[str, Adapter]] = []
        self.calibrations: list[tuple[str, Calibration]] = []
        self.reads = False

    def give(self, name: str, value: Any) -> None:
        """Gives an option by its name in Python."""
        option = self.known.get(name)
        if option is None:
            near = get_close_matches(name, self.known, n=3) or sorted(self.known)
            command = " ".join(self.command)
            raise TypeError(f"{command} has no option `{name}`; expected one of {', '.join(near)}")
        if value is None:
            return
        if option.flag:
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` is {value!r}; expected True or False")
            if value:
                self.named.append(f"--{option.long}")
            return
        self.reads |= option.heading == "Reading"
        texts = self._texts(option, value)
        if option.positional:
            self.positional += texts
        elif option.delimiter:
            self.named.append(f"--{option.long}={option.delimiter.join(texts)}")
        else:
            self.named += [f"--{option.long}={text}" for text in texts]

    def _texts(self, option: Option, value: Any) -> list[str]:
        if option.adapter:
            return [self._lora(lora) for lora in _list(value)]
        if isinstance(value, Mapping):
            return [f"{key}={_text(option.name, inner)}" for key, inner in value.items()]
        if option.many and isinstance(value, Iterable) and not isinstance(value, (str, os.PathLike)):
            return [_text(option.name, item) for item in value]
        if isinstance(value, Calibration):
            return [self._stand_in(self.calibrations, "calibration", value)]
        return [_text(option.name, value)]

    def _lora(self, lora: Any) -> str:
        source, strength = lora if isinstance(lora, tuple) else (lora, None)
        if isinstance(source, Mapping):
            source = Adapter(dict(source), f"adapter {len(self.adapters) + 1}")
        if isinstance(source, Adapter):
            path = self._stand_in(self.adapters, "adapter", source)
        else:
            path = os.fspath(source)
        if strength is None and _would_have_strength(path):
            strength = 1.0
        return path if strength is None else f"{path}:{float(strength)!r}"

    def _stand_in(self, known: list[tuple[str, Any]], what: str, value: Any) -> str:
        path = os.fspath(value.path) if isinstance(value, Adapter) and value.path else None
        if path is None or any(path == other for other, _ in known):
            path = f"<{what} {len(known)}>"
        known.append((path, value))
        return path

    def run(self, progress: Callable[[Progress], Any] | None, stacklevel: int) -> tuple[list[dict[str, Any]], str]:
        """Runs the command."""
        if self.reads and self.adapters:
            reading = ", ".join(name for name, option in self.known.items() if option.heading == "Reading")
            raise InvalidError(f"an adapter is open already; {reading} are for `loraweld.open`")
        call = None if progress is None else lambda *step: progress(Progress(*step))
        # A path may begin with dashes.
        args = [*self.command, *self.named, *(["--", *self.positional] if self.positional else [])]
        lines, text = _loraweld.run(args, self.adapters, self.calibrations, call)
        events = [json.loads(line) for line in lines]
        for event in events:
            if event["event"] == "warning":
                warnings.warn(event["message"], LoraweldWarning, stacklevel=stacklevel + 1)
        return events, text


def _would_have_strength(path: str) -> bool:
    """Whether the command line would take the end of a path that does not exist for a strength."""
    _, colon, tail = path.rpartition(":")
    try:
        return bool(colon) and float(tail) is not None and not os.path.exists(path)
    except ValueError:
        return False


def opened(source: Source) -> Adapter:
    """An adapter, opened if it is not."""
    if isinstance(source, Adapter):
        return source
    return Adapter(dict(source)) if isinstance(source, Mapping) else _loraweld.open(source)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _text(name: str, value: Any) -> str:
    """A value as the command line spells it."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise TypeError(f"`{name}` is {value!r}; expected a number, a word or a path")


def _run(
    command: Sequence[str],
    given: Mapping[str, Any],
    progress: Callable[[Progress], Any] | None,
    *,
    output: PathLike | None = None,
    makes: str | None = None,
) -> Result:
    """Runs a command. What `makes` an adapter of this name makes it in memory if no output is named."""
    call = _Call(*command)
    for name, value in given.items():
        call.give(name, value)
    name = " ".join(command)
    if output is not None:
        call.give("output", output)
    if output is not None or makes is None or given.get("dry_run"):
        events, text = call.run(progress, stacklevel=3)
        makes_adapter = makes is not None and not given.get("dry_run")
        return Result(name, events, text, None if output is None else Path(output), makes_adapter=makes_adapter)
    # The file is mapped, and needs no name then.
    with tempfile.TemporaryDirectory(prefix="loraweld-", ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, f"{makes}.safetensors")
        call.give("output", path)
        events, text = call.run(progress, stacklevel=3)
        adapter = Adapter._taken(path)
    lines = [line for line in text.splitlines(keepends=True) if path not in line]
    return Result(name, events, "".join(lines), adapter=adapter, makes_adapter=True)


def run(*command: str, progress: Callable[[Progress], Any] | None = None, **options: Any) -> Result:
    """Runs any command of the command line, with its arguments by name.

    >>> result = run("check", loras=["cat.safetensors"], loader="comfyui")  # doctest: +SKIP
    """
    output = options.pop("output", None)
    return _run(command, options, progress, output=output)


def merge(
    method: str,
    adapters: Sequence[Lora],
    *,
    output: PathLike | None = None,
    calibration: PathLike | Calibration | None = None,
    device: str = "auto",
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Merges adapters into one.

    `method` is one of `loraweld.methods()`. `adapters` are paths, open adapters or tensors by their keys, each alone or with
    its strength: `[("cat.safetensors", 0.8), dog]`. np-lora takes the style first.

    `calibration` is a `Calibration` or the path of one. ssr solves for it, and takes "none" for a proxy; the other methods
    measure by it what they lose.

    `options` are those of the command line, with underscores: `rank=16, dtype="f16", ridge_relative=1e-3`.
    `loraweld.options("merge", method)` lists them. What is given for several layers is a dict:
    `strength_for={"single_transformer_blocks.*": 0.5}`.

    With `output`, the result is written to that file. Without, it is in memory: `result.adapter`.

    `progress` is called with a `Progress`. An exception that it raises ends the merge, as Ctrl-C does.
    """
    known = methods()
    if method not in known:
        proxies = {entry["without_calibration"]: entry["name"] for entry in json.loads(_loraweld.methods())}
        if method is None or method not in proxies:
            raise InvalidError(f"method: `{method}`, but it is one of {', '.join(known)}")
        method, calibration = proxies[method], "none"
    command = ("merge", method)
    loras = list(adapters)
    if places := _places(*command):
        given: dict[str, Any] = {places[0]: loras}
    elif len(loras) < 2:
        raise InvalidError(f"{method} takes a style and a subject or more; there is {len(loras)} adapter")
    else:
        given = {"style": loras[:1], "subject": loras[1:]}
    given |= {"calibration": calibration, "device": device, **options}
    return _run(command, given, progress, output=output, makes="merged")


def compare(
    adapters: Sequence[Lora],
    calibration: PathLike | Calibration,
    *,
    methods: Sequence[str] | None = None,
    output: PathLike | None = None,
    device: str = "auto",
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Merges by several methods, and measures what each loses on the same calibration.

    `result.all("method")` has a dict for each method, with its loss; `print(result)` shows the table. `output` names a JSON
    file for it.
    """
    given = {_places("compare")[0]: list(adapters), "calibration": calibration, "methods": methods, "device": device, **options}
    return _run(("compare",), given, progress, output=output)


def strengths(
    adapters: Sequence[Lora],
    calibration: PathLike | Calibration,
    *,
    per_block: bool = False,
    device: str = "auto",
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Finds the strengths at which the plain sum of adapters loses least, for the whole file or for each block.

    `result.all("strengths")[0]` has them in `blocks`, with the loss there, at the strengths given and of the average.
    """
    given = {
        _places("strengths")[0]: list(adapters),
        "calibration": calibration,
        "per_block": per_block,
        "device": device,
        **options,
    }
    return _run(("strengths",), given, progress)


def inspect(*adapters: Source, **options: Any) -> Result:
    """Tells what files hold, and which of their layers match.

    `result.all("adapter")` has a dict for each file, and `result.all("match")` one for how they match; `print(result)` shows
    them as the command line does.
    """
    return _run(("inspect",), {_places("inspect")[0]: list(adapters), **options}, None)


def convert(
    adapter: Source,
    format: str,
    *,
    output: PathLike | None = None,
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Spells a LoRA as another tool does ("peft", "kohya", "comfyui", "bfl", "xlabs", or "same"), or makes one of a LoHa,
    LoKr or DoRA."""
    given = {_places("convert")[0]: [adapter], "format": format, **options}
    return _run(("convert",), given, progress, output=output, makes="converted")


def resize(
    adapter: Lora,
    *,
    output: PathLike | None = None,
    device: str = "auto",
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Lowers the rank of an adapter, by the singular values of its updates: `rank=16`, or `sv_fro=0.95`."""
    given = {_places("resize")[0]: [adapter], "device": device, **options}
    return _run(("resize",), given, progress, output=output, makes="resized")


def bake(
    checkpoint: PathLike,
    adapters: Sequence[Lora],
    output: PathLike,
    *,
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Adds LoRAs to the weights of a model: a file, the index of a sharded one, or a folder of diffusers."""
    given = {**dict(zip(_places("bake"), (checkpoint, list(adapters)))), **options}
    return _run(("bake",), given, progress, output=output)


def extract(
    tuned: PathLike,
    base: PathLike,
    *,
    output: PathLike | None = None,
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Makes a LoRA of what two checkpoints differ by, of the rank that is asked for: `rank=64`, or `sv_fro=0.95`."""
    given = {**dict(zip(_places("extract"), (tuned, base))), **options}
    return _run(("extract",), given, progress, output=output, makes="extracted")


def batch(
    jobs: PathLike,
    *,
    grid: Mapping[str, str] | None = None,
    shard: str | None = None,
    results: PathLike | None = None,
    device: str = "auto",
    progress: Callable[[Progress], Any] | None = None,
    **options: Any,
) -> Result:
    """Runs many commands, one a line of a file, or the share of them that `shard` names ("1/4"); done ones are skipped.

    `grid` has the numbers that names in braces stand for: `{"cat": ".4:1:.2"}`. Raises a `LoraweldError` at the end if jobs
    failed; the folder of results says which and why.
    """
    given = {
        _places("batch")[0]: jobs,
        "grid": grid,
        "shard": shard,
        "results": results,
        "device": device,
        **options,
    }
    return _run(("batch",), given, progress)


def devices(**options: Any) -> list[dict[str, Any]]:
    """The devices, and what each can do."""
    return _run(("devices",), options, None).all("adapter")
