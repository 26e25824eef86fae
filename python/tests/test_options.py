"""Methods, options and defaults are the command line's."""

import re

import loraweld
import pytest
from conftest import command_line


@pytest.mark.parametrize("method", loraweld.methods())
def test_options_are_those_of_help(method):
    """Names, values and defaults, as the program itself prints them."""
    text = command_line("merge", method, "--help")
    # An option begins a line; what is said of it follows, further to the right.
    parts = re.split(r"^\s{2,6}(?:-\w, )?--(?=[a-z])", text.split("Options:", 1)[1], flags=re.M)[1:]
    printed = {}
    for part in parts:
        name, rest = re.match(r"([a-z-]+)(.*)", part, re.S).groups()
        value, default = re.match(r"[ =]\[?<([^>]+)>", rest), re.search(r"\[default: ([^\]]*)\]\s", rest + "\n")
        is_placed = name in ("style", "subject")
        # Examples, which repeat names, come last.
        printed.setdefault(name.replace("-", "_"), None if is_placed else (value and value[1], default and default[1]))
    for about_terminals in ("json", "quiet", "verbose", "help"):
        printed.pop(about_terminals)
    found = {}
    for option in loraweld.options("merge", method).values():
        if not option.positional:
            found[option.name] = (option.value, option.default) if not option.adapter else None
    said_in_help = {name: pair for name, pair in printed.items() if pair and found[name] and pair != found[name]}
    # Where the help tells the default in words of its own, there is none to compare.
    for name, (value, default) in said_in_help.items():
        assert (value, found[name][1]) == (found[name][0], None), (name, default)
    assert printed.keys() == found.keys()
    assert loraweld.methods()[method].options.keys() <= found.keys()


def test_several_defaults_are_told_as_they_are_given(loras, pets):
    default = loraweld.options("compare")["methods"].default
    assert default.split(",")[:2] == ["ssr", "ssr-data-free"] and set(loraweld.methods()) <= set(default.split(","))
    printed = re.search(r"--methods.*?\[default: ([^\]]*)\]", command_line("compare", "--help"), re.S)[1]
    assert re.split(r"[\s,]+", printed) == default.split(",")
    given, left_out = (loraweld.compare(loras, pets, device="cpu", **kw) for kw in ({"methods": default.split(",")}, {}))
    names = [[event["method"] for event in result.all("method")] for result in (given, left_out)]
    assert names[0] == names[1] == default.split(",")


def test_methods_are_those_of_help():
    listed = re.findall(r"^  ([a-z-]+)  ", command_line("merge", "--help").split("Options:")[0], re.M)
    assert [name for name in listed if name != "help"] == list(loraweld.methods())


def test_every_command_can_be_described():
    for command in loraweld.commands():
        below = loraweld.commands(command)
        for name in below or [None]:
            assert loraweld.options(*filter(None, (command, name))), command


def test_opening_takes_what_commands_take():
    """`loraweld.open` names the options itself."""
    import inspect

    reading = {o.name for o in loraweld.options("inspect").values() if o.heading == "Reading"}
    for function in (loraweld.open, loraweld.Adapter):
        given = inspect.signature(function).parameters
        assert reading == {name for name, p in given.items() if p.kind is p.KEYWORD_ONLY}


def test_wrong_options_are_told_with_those_that_there_are(loras):
    with pytest.raises(TypeError, match="merge ties has no option `densty`; expected one of density"):
        loraweld.merge("ties", loras, densty=0.5)
    with pytest.raises(TypeError, match="`force` is 1; expected True or False"):
        loraweld.merge("ties", loras, force=1)
    with pytest.raises(loraweld.InvalidError, match="'density <SHARE>': is 3; expected a share above 0"):
        loraweld.merge("ties", loras, density=3)
    with pytest.raises(loraweld.InvalidError, match=r"merge svd needs rank N, one of sv_\* or a budget"):
        loraweld.merge("svd", loras)
    with pytest.raises(loraweld.InvalidError, match="`median`, but it is one of ssr, np-lora"):
        loraweld.merge("median", loras)
