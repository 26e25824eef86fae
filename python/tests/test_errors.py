"""Errors are exceptions by kind, with the command line's messages."""

import loraweld
import numpy as np
import pytest
from conftest import command_line


def said(*args, code=1):
    """What the command line says of an error."""
    return command_line(*args, code=code).split("error: ", 1)[1].strip()


def test_kinds_and_messages(loras, tmp_path):
    cat, dog = loras
    missing = tmp_path / "nothing.safetensors"
    with pytest.raises(loraweld.NotFoundError) as error:
        loraweld.merge("linear", [cat, missing])
    assert str(error.value) == said("merge", "linear", cat, missing, "-o", tmp_path / "x")
    assert error.value.file == str(missing) and isinstance(error.value, (FileNotFoundError, loraweld.LoraweldError))

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(cat.read_bytes()[:-1000])
    with pytest.raises(loraweld.FileError) as error:
        loraweld.open(broken)
    assert str(error.value) == said("inspect", broken) and error.value.file == str(broken)

    with pytest.raises(loraweld.ExistsError) as error:
        loraweld.merge("linear", [cat, dog], output=broken)
    assert str(error.value) == said("merge", "linear", cat, dog, "-o", broken).replace("`--force`", "`force`")
    with pytest.raises(loraweld.FileError, match="never overwritten"):
        loraweld.merge("linear", [loraweld.open(cat), dog], output=cat, force=True)
    with pytest.raises(loraweld.FileError, match="never overwritten"):
        loraweld.open(cat).save(cat, force=True)

    with pytest.raises(loraweld.DeviceError, match="no such card") as error:
        loraweld.merge("linear", [cat, dog], device="no such card")
    assert str(error.value) == said("merge", "linear", cat, dog, "-o", missing, "--device", "no such card")


def test_tensors_are_named(loras):
    tensors = {k: v.copy() for k, v in loraweld.open(loras[0]).tensors().items()}
    key = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    tensors[key][3, 2] = np.nan
    with pytest.raises(loraweld.TensorError, match="row 3, column 2") as error:
        loraweld.merge("linear", [loraweld.Adapter(tensors, "cat"), loras[1]], device="cpu")
    assert (error.value.file, error.value.key) == ("cat", key)


def test_what_a_file_can_be_opened_with_is_told(tmp_path):
    a = np.ones((2, 8), "float32")
    tensors = {"blocks.0.to_q.lora_A.weight": a, "blocks.0.to_q.lora_B.weight": a.T, "blocks.0.norm.diff": a[0]}
    with pytest.raises(loraweld.NotMergeableError, match="`skip_unsupported` leaves such tensors out"):
        loraweld.Adapter(tensors, "cat")
    assert len(loraweld.Adapter(tensors, "cat", skip_unsupported=True)) == 1
    with pytest.raises(loraweld.InvalidError, match="there is no model `flux9`; known are .*flux1"):
        loraweld.Adapter(tensors, "cat", model="flux9")


def test_adapters_that_are_open_are_not_read_again(loras):
    with pytest.raises(loraweld.InvalidError, match="open already; alpha, .* are for `loraweld.open`"):
        loraweld.merge("linear", [loraweld.open(loras[0]), loras[1]], alpha=4)


def test_the_command_line_is_in_the_package():
    import subprocess
    import sys

    run = [sys.executable, "-m", "loraweld"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["loraweld", loraweld.__version__])
    done = subprocess.run([*run, "merge", "median"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized subcommand 'median'" in done.stderr


def test_what_it_says_to_do_next_names_the_command(tmp_path):
    import subprocess
    import sys

    run = [sys.executable, "-m", "loraweld", "demo", "--device", "cpu", "--out", str(tmp_path / "demo")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "\n  loraweld inspect " in done.stdout and sys.executable not in done.stdout
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "loraweld demo" in report and sys.executable not in report
