"""What the tests share: adapters of the repository, and the command line to compare with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "tests/data"
# A custom node of ComfyUI, which only that can import.
collect_ignore = ["comfyui_tiny.py"]
SOURCES = {"cat": "concept_c3_mirror", "dog": "concept_c7_rot90"}


@pytest.fixture
def loras(tmp_path):
    """Two adapters, `cat.safetensors` and `dog.safetensors`."""
    paths = [tmp_path / f"{name}.safetensors" for name in SOURCES]
    for path, source in zip(paths, SOURCES.values()):
        shutil.copy(DATA / "loras" / f"{source}.safetensors", path)
    return paths


@pytest.fixture(scope="session")
def inputs():
    """What the layers of each read: files."""
    return [DATA / "activations/step1" / f"{source}.safetensors" for source in SOURCES.values()]


@pytest.fixture(scope="session")
def pets(tmp_path_factory, inputs):
    """A calibration of the two, which the command line made."""
    folder = tmp_path_factory.mktemp("calibration")
    path = folder / "pets.calibration.safetensors"
    sources = [DATA / "loras" / f"{source}.safetensors" for source in SOURCES.values()]
    command_line("calibrate", *sources, "--activations", *inputs, "-o", path, "--device", "cpu")
    return path


def command_line(*args, code=0):
    """Runs the command line in a process of its own: the program LORAWELD, or the package's."""
    program = [os.environ["LORAWELD"]] if "LORAWELD" in os.environ else [sys.executable, "-m", "loraweld"]
    done = subprocess.run([*program, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout
