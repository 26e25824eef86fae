"""What the scripts share: the command line, running loraweld, and checks that print what they saw."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import diffusers
import tiny
import torch
import transformers

ROOT = Path(__file__).resolve().parents[3]


def parse_args(doc, **options):
    """`options`: the script's own arguments, each with its add_argument()."""
    parser = argparse.ArgumentParser(description=doc)
    built = next(
        (p for kind in ("release", "debug") if (p := ROOT / "target" / kind / "loraweld").exists()), "loraweld"
    )
    parser.add_argument("--loraweld", default=built, help="the program to test [%(default)s]")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where PyTorch computes"
    )
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    args = parser.parse_args()
    if shutil.which(args.loraweld) is None:
        parser.error(f"{args.loraweld} is no program; build it with `cargo build --release`, or name it by --loraweld")
    hush()
    return args


def hush():
    """Of PyTorch's world, only errors: its libraries warn of what is meant to be here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def run(*command):
    """Runs a program; if it fails, shows what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def load(pipe, path, name):
    """Loads a LoRA file into a pipeline."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)


def pipeline(name, device):
    """A tiny pipeline, the same every time."""
    return tiny.PIPELINES[name]().to(device)


@contextmanager
def scratch():
    """A folder that is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="loraweld-interop-") as folder:
        yield Path(folder)


class Checks:
    """Prints each number beside its limit, and exits with 1 at the end if any was over."""

    def __init__(self):
        self.failed = 0

    def at_most(self, what, value, limit):
        self.say(value <= limit, f"{what}: {value:.2e} (at most {limit:g})")  # NaN fails.

    def at_least(self, what, value, limit):
        self.say(value >= limit, f"{what}: {value:.2e} (at least {limit:g})")

    def true(self, what, value):
        self.say(value, what)

    def fails(self, what, reason):
        self.say(False, f"{what}: {reason}")

    def say(self, good, text):
        self.failed += not good
        print("ok  " if good else "FAIL", text, flush=True)

    def finish(self):
        if self.failed:
            sys.exit(f"{self.failed} failed")
