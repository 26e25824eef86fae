"""`pytest examples/fleet`, with ray and loraweld installed: a local cluster of two workers gives what one pass gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

loraweld = pytest.importorskip("loraweld")
pytest.importorskip("ray", reason="Ray is not installed: `pip install ray`")
np = pytest.importorskip("numpy")

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "tests/data"
NAMES = ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"]
LORAS = [str(DATA / f"loras/{name}.safetensors") for name in NAMES]


def run(jobs, tmp_path):
    file, output = tmp_path / "jobs.jsonl", tmp_path / "all.calibration.safetensors"
    file.write_text("\n".join(map(json.dumps, jobs)))
    command = [sys.executable, HERE / "calibrate.py", file, *LORAS, "-o", output, "--shards", tmp_path / "shards"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done, output


def test_shards_add_up_to_one_pass(tmp_path):
    recorded = [(name, str(DATA / f"activations/{steps}/{name}.safetensors")) for steps in ("step1", "traj4") for name in NAMES]
    jobs = [{"task": name, "recorded": path} for name, path in recorded]
    done, output = run(jobs, tmp_path)
    assert done.returncode == 0, done.stderr
    one = loraweld.Calibration([loraweld.open(path) for path in LORAS], device="cpu")
    for name, path in recorded:
        one.accumulate_file(name, path)
    many = loraweld.Calibration.open(output)
    assert many.tasks == one.tasks and sorted(many.layers) == sorted(one.layers) and many.missing() == []
    for layer in one.layers:
        for task in one.tasks:
            assert many.tokens(task, layer) == one.tokens(task, layer)
            left, right = many.gram(task, layer), one.gram(task, layer)
            # Sums of the same numbers in another order: the last bits of f64.
            assert np.abs(left - right).max() <= 1e-14 * np.abs(right).max()
    # What was recorded is not recorded again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("concept_*")}
    assert len(before) == len(jobs)
    done, _ = run(jobs, tmp_path)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("concept_*")}


def test_wrong_jobs_are_told(tmp_path):
    for job, words in [
        ({"task": "cat", "recorded": "x"}, "its task is 'cat', but the adapters are concept_c3_mirror"),
        ({"task": NAMES[0], "prompts": ["x"]}, "which take a model"),
    ]:
        done, _ = run([job], tmp_path)
        assert done.returncode == 1 and words in done.stderr, done.stderr
