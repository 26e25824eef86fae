"""Many commands of a file."""

import json

import loraweld
import pytest


def test_a_batch_is_the_command_lines(tmp_path, loras, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cat, dog = loras
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps(["merge", "linear", f"{cat}:{{s}}", str(dog), "-o", "out-{s}.safetensors"]) + "\n")
    result = loraweld.batch(jobs, grid={"s": "0.5:1:0.5"}, device="cpu")
    assert [e["line"] for e in result.all("done")] == [1, 1] and "2 done" in str(result)
    again = loraweld.batch(jobs, grid={"s": "0.5:1:0.5"}, device="cpu")
    assert len(again.all("skipped")) == 2 and not again.all("done")
    one = loraweld.merge("linear", [(cat, 0.5), dog], output="alone.safetensors", device="cpu")
    assert one.output.read_bytes() == (tmp_path / "out-0.5.safetensors").read_bytes()
    jobs.write_text('"inspect missing.safetensors"\n')
    with pytest.raises(loraweld.LoraweldError, match="1 of 1 job failed: line 1"):
        loraweld.batch(jobs)
