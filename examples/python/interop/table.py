#!/usr/bin/env python3
"""loraweld together with the real packages, for every family: one row each, and exit code 1 if any is over a limit.

Each family has its own process, so that a crash or a lack of memory in one stops no other.
"""

import argparse
import importlib
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())  # Mesa complains without one.
warnings.filterwarnings("ignore")

import diffusers  # noqa: E402
import torch  # noqa: E402

import diffusers_loads  # noqa: E402
from families import FAMILIES  # noqa: E402
from tally import Tally, first_line  # noqa: E402

# Each with its module, and the variable that names the checkout it needs.
CHECKS = {
    "diffusers": ("diffusers_loads", None),
    "comfyui": ("comfyui_loads", "COMFYUI"),
    "encoders": ("encoders_load", "COMFYUI"),
    "kohya": ("kohya_loads", "SD_SCRIPTS"),
    "lycoris": ("lycoris_reads", None),
    "peft": ("peft_reads", None),
}
COLUMNS = ("family", "checked", "update", "output", "left over", "error")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loraweld", required=True, help="the program to test")
    parser.add_argument("--families", type=names_in(FAMILIES), help="only these, joined by commas")
    parser.add_argument("--skip", type=names_in(CHECKS), default=[], help=f"of {', '.join(CHECKS)}, joined by commas")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="families at once")
    parser.add_argument("--verbose", action="store_true", help="print every number of every family")
    args = parser.parse_args()
    args.loraweld = str(Path(args.loraweld).resolve())

    torch.set_num_threads(1)
    diffusers.utils.logging.disable_default_handler()
    logging.getLogger().setLevel(logging.WARNING)
    checks = {
        name: importlib.import_module(module)
        for name, (module, needs) in CHECKS.items()
        if name not in args.skip and (needs is None or os.environ.get(needs))
    }
    rows = []
    for name, tallies in each(args.families or list(FAMILIES), checks, args):
        rows.append(row(name, tallies))
        print(f"{name}: {'FAILED' if failed(tallies) else 'ok'}", file=sys.stderr, flush=True)
        for check, tally in tallies.items():
            for line in tally.lines if args.verbose else [line for line in tally.lines if line.startswith("FAIL")]:
                print(f"  {check}: {line}", file=sys.stderr, flush=True)
        rows[-1].append(failed(tallies))
    show(rows)
    bad = sum(row[-1] for row in rows)
    print(f"\n{len(rows) - bad} passed, {bad} failed")
    sys.exit(bool(bad))


def names_in(known):
    def parse(text):
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


def each(names, checks, args):
    """Yields (family, {check: tally}) in the order of the names, from processes that run side by side."""
    context = multiprocessing.get_context("fork")
    running, waiting = {}, list(names)
    for name in names:
        while waiting and len(running) < args.jobs or name not in running:
            following = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(following, checks, args, theirs))
            process.start()
            theirs.close()
            running[following] = process, ours
        process, ours = running.pop(name)
        try:
            tallies = ours.recv()
        except EOFError:
            process.join()
            tallies = {"process": crashed(f"ended by signal or exit code {process.exitcode}")}
        process.join()
        yield name, tallies


def work(name, checks, args, pipe):
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="loraweld-interop-") as folder:
        try:
            case = diffusers_loads.Case(name, args.loraweld, Path(folder))
            for check, module in checks.items():
                tally = guarded(lambda: module.check(case), args.verbose)
                if tally is not None:
                    tallies[check] = tally
        except Exception as error:
            tallies["script"] = crashed(first_line(error))
    pipe.send(tallies)


def guarded(check, verbose):
    try:
        return check()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        return crashed(first_line(error))


def crashed(reason):
    tally = Tally()
    tally.fails("script", reason)
    return tally


def failed(tallies):
    return any(tally.failed for tally in tallies.values())


def row(name, tallies):
    def worst(values):
        values = [value for value in values if value is not None]
        return f"{max(values):.0e}" if values else "-"

    checked = "; ".join(f"{check} {len(tally.checked)}" for check, tally in tallies.items() if tally.checked)
    error = next((f"{check}: {tally.error}" for check, tally in tallies.items() if tally.error), "")
    return [
        name,
        checked,
        worst(tally.worst_update for tally in tallies.values()),
        worst(tally.worst_forward for tally in tallies.values()),
        str(sum(tally.keys_left for tally in tallies.values())),
        error[:110],
    ]


def show(rows):
    rows = [[("FAIL " if row[-1] else "     ") + row[0], *row[1:-1]] for row in rows]
    widths = [max(len(line[i]) for line in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    for line in [["     family", *COLUMNS[1:]], *rows]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    main()
