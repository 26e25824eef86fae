"""The programs in README.md and docs/python.md, word by word."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.S | re.M)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("path", ["README.md", "python/README.md", "docs/python.md"])
def test_programs_run(path, device, loras, inputs, pets, tmp_path, monkeypatch):
    import loraweld

    if device == "gpu":
        adapters = loraweld.devices()
        if not adapters:
            pytest.skip("there is no GPU, nor a software adapter such as lavapipe")
        # The programs say nothing of a device: `auto` takes this one.
        monkeypatch.setenv("WGPU_ADAPTER_NAME", adapters[0]["name"])
    elif loraweld.run("devices").all("chosen")[0]["index"] is not None:
        pytest.skip("`auto` takes a GPU here")
    for name, source in zip(("cat", "dog"), inputs):
        (tmp_path / "inputs" / name).mkdir(parents=True)
        shutil.copy(source, tmp_path / "inputs" / name)
    shutil.copy(pets, tmp_path / "pets.calibration.safetensors")
    monkeypatch.chdir(tmp_path)
    # What needs a pipeline is tested with models of our own.
    run = [program for program in programs(path) if "pipe." not in program]
    assert len(run) >= 1
    names = {}
    for program in run:
        exec(compile(program, path, "exec"), names)
    if path == "README.md":
        chosen = next(e["device"] for e in names["result"].all("device"))
        assert ("CPU" in chosen) == (device == "cpu"), chosen
        assert (tmp_path / "sum.safetensors").exists() and (tmp_path / "pets.safetensors").exists()


def test_every_public_name_has_a_docstring():
    import loraweld

    for name in loraweld.__all__:
        if name != "__version__":
            assert (getattr(loraweld, name).__doc__ or "").strip(), name


def test_examples_of_the_extension_run():
    """pytest looks for those of Python's modules itself."""
    import doctest

    from loraweld import _loraweld

    runner, ran = doctest.DocTestRunner(), 0
    for name, value in vars(_loraweld).items():
        ran += runner.run(doctest.DocTestParser().get_doctest(value.__doc__ or "", {}, name, None, 0)).attempted
    assert runner.summarize().failed == 0 and ran >= 3


def test_stubs_name_what_the_extension_has():
    import ast

    from loraweld import _loraweld

    stub = ast.parse((Path(_loraweld.__file__).parent / "_loraweld.pyi").read_text())
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            said = {n.name for n in node.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
            there = {n for n in vars(getattr(_loraweld, node.name)) if not n.startswith("__")}
            assert {n for n in said if not n.startswith("__")} == there, node.name
    said = {n.name for n in stub.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    assert said == {n for n in vars(_loraweld) if not n.startswith("_")}
