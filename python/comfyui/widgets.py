"""Options of loraweld's commands as widgets. Names, choices, defaults and explanations are the wheel's own."""

import loraweld
from comfy_api.latest import io

from . import files

UNSET = "default"
"""The choice that leaves an option out, where the wheel names no default."""

REPORT = "report"
"""The option that names a page; a widget only says whether there is to be one."""

CHOSEN_BY_NODES = {"calibration", "output", "force", "dry_run", "strength_for", "blocks", "model"}
"""Options that nodes give themselves: sockets, places on the disk, and what an adapter carries."""

FOR_EXPERTS = {"Reading", "Global options"}
"""Headings of options that a node folds away, where ComfyUI can."""


def of(*command, without=()):
    """The options of a command that are widgets of its node."""
    return {
        name: option
        for name, option in loraweld.options(*command).items()
        if not (option.adapter or option.positional or name in CHOSEN_BY_NODES or name in without)
    }


def merge_methods():
    """The methods that take adapters in any order, and that which takes a style first."""
    style_first = [name for name in loraweld.methods() if "style" in loraweld.options("merge", name)]
    return [name for name in loraweld.methods() if name not in style_first], style_first[0]


def of_every_merge():
    """The options that all methods have: those of one, without its own."""
    method = loraweld.methods()["linear"]
    return of("merge", method.name, without=method.options)


def inputs(options):
    """A widget for each option."""
    return [_input(option) for option in options.values()]


def _input(option):
    about = dict(tooltip=option.help, optional=True)
    if option.name == REPORT:
        about["tooltip"] = "Writes a page to look at, in the output folder."
        found = io.Boolean.Input(option.name, default=False, **about)
    elif option.flag:
        found = io.Boolean.Input(option.name, default=False, **about)
    elif option.value == "PATH":
        found = io.Combo.Input(option.name, options=[UNSET, *files.models()], default=UNSET, **about)
    elif option.values and not option.many:
        choices = list(option.values) if option.default else [UNSET, *option.values]
        found = io.Combo.Input(option.name, options=choices, default=option.default or UNSET, **about)
    else:
        if option.values:
            about["tooltip"] = f"{option.help or ''} Choices: {', '.join(option.values)}."
        if option.many:
            about["tooltip"] = f"{about['tooltip'] or ''} {_several(option)}"
        lines = option.many and not option.delimiter
        default = "" if option.many else option.default or ""
        found = io.String.Input(option.name, default=default, multiline=lines, placeholder=_shown(option), **about)
    if option.heading in FOR_EXPERTS:
        found.extra_dict["advanced"] = True
    return found


def _several(option):
    return f"Several are parted by `{option.delimiter}`." if option.delimiter else "One a line."


def _shown(option):
    return f"{option.name}: {option.value}, or nothing for the default"


def chosen(options, values):
    """What widgets say, as arguments of the wheel's functions. What is left at its default is left out."""
    return {name: value for name, option in options.items() if (value := _value(option, values.get(name))) is not None}


def ready(arguments):
    """The same for a call, which writes a page of its own if one is wanted."""
    return {**arguments, "report": files.report()} if arguments.get("report") else arguments


def given(options, values):
    """What the widgets of a node say, for its call."""
    return ready(chosen(options, values))


def _value(option, value):
    if value is None or value is False or value == UNSET:
        return None
    if option.flag or option.name == REPORT:
        return True
    text = str(value).strip()
    if option.many:
        parts = text.replace("\n", option.delimiter).split(option.delimiter) if option.delimiter else text.splitlines()
        return [part.strip() for part in parts if part.strip()] or None
    if not text or text == option.default:
        return None
    return files.model(text)[0] if option.value == "PATH" else text
