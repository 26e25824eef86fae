"""Merges, and all that a file becomes of a file: to the bit what the command line makes."""

import json
import os
import subprocess
import sys

import loraweld
import numpy as np
import pytest
from conftest import DATA, command_line

# Options besides the defaults, one set for each method, as the command line spells them and as Python does.
OPTIONS = {
    "ssr": ["--calibration={pets}", "--ridge-relative=1e-2", "--prior=sum", "--task-weights=1,0.5"],
    "np-lora": ["--mu=0.25", "--directions=4"],
    "linear": ["--rank=6", "--dtype=f16"],
    "svd": ["--rank=5"],
    "ties": ["--density=0.4", "--strength-for=*to_q=0.5"],
    "dare": ["--seed=7", "--density=0.5"],
    "knots": ["--rule=dare", "--seed=3"],
    "core": ["--sv-fro=0.9"],
    "tsv": ["--keep=all"],
    "iso-c": ["--rank=8", "--format=kohya"],
}
PYTHON = {
    "ssr": {"ridge_relative": 1e-2, "prior": "sum", "task_weights": [1, 0.5]},
    "np-lora": {"mu": 0.25, "directions": 4},
    "linear": {"rank": 6, "dtype": "f16"},
    "svd": {"rank": 5},
    "ties": {"density": 0.4, "strength_for": {"*to_q": 0.5}},
    "dare": {"seed": 7, "density": 0.5},
    "knots": {"rule": "dare", "seed": 3},
    "core": {"sv_fro": 0.9},
    "tsv": {"keep": "all"},
    "iso-c": {"rank": 8, "format": "kohya"},
}


def test_every_method_has_a_test():
    assert list(loraweld.methods()) == list(OPTIONS)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_merge_is_the_command_lines_to_the_bit(method, loras, pets, tmp_path):
    cat, dog = loras
    adapters = ["--style", f"{cat}:0.7", "--subject", dog] if method == "np-lora" else [f"{cat}:0.7", dog]
    expected, output = tmp_path / "expected.safetensors", tmp_path / "output.safetensors"
    options = [option.format(pets=pets) for option in OPTIONS[method]]
    command_line("merge", method, *adapters, *options, "-o", expected, "--device", "cpu")

    options = {**PYTHON[method], "calibration": pets} if method == "ssr" else PYTHON[method]
    result = loraweld.merge(method, [(cat, 0.7), dog], output=output, device="cpu", **options)
    assert output.read_bytes() == expected.read_bytes()
    assert result.output == output and result.report["method"] == method

    # In memory, of adapters that are open, and with a calibration that is.
    if method == "ssr":
        options["calibration"] = loraweld.Calibration.open(pets)
    opened = [(loraweld.open(cat), 0.7), loraweld.open(dog)]
    result = loraweld.merge(method, opened, device="cpu", **options)
    output.unlink()
    result.save(output)
    assert output.read_bytes() == expected.read_bytes()


def test_a_merge_of_arrays_has_the_values_of_a_merge_of_files(loras):
    expected = loraweld.merge("ties", loras, device="cpu").adapter.tensors()
    opened = [loraweld.open(path) for path in loras]
    made = [loraweld.Adapter(a.tensors(), a.name, metadata=a.metadata) for a in opened]
    found = loraweld.merge("ties", made, device="cpu").adapter.tensors()
    assert list(found) == list(expected)
    for key, array in found.items():
        np.testing.assert_array_equal(array, expected[key])
    # Tensors alone say nothing of their alphas, which are the ranks then.
    plain = loraweld.merge("linear", [a.tensors() for a in opened], device="cpu")
    assert plain.adapter.name == "merged" and len(plain.adapter) == 24


MEMORY = """
import sys, numpy, loraweld

def memory(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

width, rank, layers = 2048, 32, 64
random = numpy.random.default_rng(0)

def tensors():
    made = {}
    for i in range(layers):
        for side, shape in ("A", (rank, width)), ("B", (width, rank)):
            made[f"transformer.blocks.{i}.attn.to_q.lora_{side}.weight"] = random.standard_normal(shape, "float32")
    return made

inputs = [tensors(), tensors()]
loraweld.merge(sys.argv[1], [{k: v[:1] if "A" in k else v[:, :1].copy() for k, v in t.items()} for t in inputs], device="cpu")
size = sum(array.nbytes for adapter in inputs for array in adapter.values()) / 2**20
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
loraweld.merge(sys.argv[1], inputs, output=sys.argv[2], device="cpu", dtype="f16")
print(size, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the most that was held")
@pytest.mark.parametrize("method", ["linear", "ssr-data-free"])
def test_a_merge_of_arrays_holds_one_copy_of_them(method, tmp_path):
    """In a process of its own: beside the arrays, their copy and what a few layers need."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, method, tmp_path / "out.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    size, held = map(float, done.stdout.split())
    print(f"{method}: {held:.0f} MiB beside {size:.0f} MiB of arrays")
    # A second copy would be as much again.
    assert size > 60 and held < 1.5 * size


def test_results_are_views(loras):
    adapter = loraweld.merge("linear", loras, device="cpu").adapter
    again = adapter.tensors()
    for key, array in adapter.tensors().items():
        assert not array.flags.owndata and not array.flags.writeable and np.shares_memory(array, again[key])
    layer = adapter["transformer_blocks.0.attn.to_q"]
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    assert layer.a.shape == (24, 128) and np.shares_memory(layer.a, again[key])
    del adapter, layer
    assert np.isfinite(again[key]).all()


def test_bf16_is_widened_or_seen_as_bits(loras):
    adapter = loraweld.open(loras[0])
    assert adapter.dtype == "bf16"
    bits = adapter.tensors(bits=True)
    for key, array in adapter.tensors().items():
        assert array.dtype == np.float32 and bits[key].dtype == np.uint16
        np.testing.assert_array_equal(array.view(np.uint32), bits[key].astype(np.uint32) << 16)


def test_strengths_and_styles_are_in_order(loras):
    heart, shade = DATA / "loras/content_heart.safetensors", DATA / "loras/style_shade.safetensors"
    result = loraweld.merge("np-lora", [shade, (heart, -0.5)], hard=True, device="cpu")
    assert [(i["name"], i["strength"]) for i in result.report["inputs"]] == [("style_shade", 1), ("content_heart", -0.5)]
    with pytest.raises(loraweld.InvalidError, match="a style and a subject or more; there is 1"):
        loraweld.merge("np-lora", [shade])


def test_losses_are_measured(loras, pets):
    measured = loraweld.merge("linear", loras, calibration=pets, device="cpu")
    assert measured.losses["merged"] == pytest.approx(measured.losses["sum"]) and measured.losses["sum"] > 0.5
    assert loraweld.merge("ssr", loras, calibration=pets, device="cpu").losses["merged"] < measured.losses["average"]
    assert loraweld.merge("linear", loras, device="cpu").losses is None
    with pytest.warns(loraweld.LoraweldWarning, match="data-free proxy"):
        loraweld.merge("ssr-data-free", loras, device="cpu")


def test_compare_is_the_command_lines(loras, pets, tmp_path):
    args = ["--methods", "ssr,linear,ties-paper", "--calibration", pets, "--device", "cpu"]
    expected = [json.loads(line) for line in command_line("compare", *loras, *args, "--json").splitlines()]
    result = loraweld.compare(loras, pets, methods=["ssr", "linear", "ties-paper"], device="cpu")

    def rows(events):
        return [{**e, "seconds": 0} for e in events if e["event"] == "method"]

    assert rows(result.events) == rows(expected) and len(rows(expected)) == 3
    assert str(result).splitlines()[-3].startswith("ssr")


def test_strengths_are_the_command_lines(loras, pets):
    for options, flags in [({}, []), ({"per_block": True}, ["--per-block"])]:
        expected = command_line("strengths", *loras, "--calibration", pets, "--device", "cpu", "--json", *flags)
        expected = [event for line in expected.splitlines() if (event := json.loads(line))["event"] == "strengths"]
        assert loraweld.strengths(loras, pets, device="cpu", **options).all("strengths") == expected
    assert expected[0]["loss"] <= expected[0]["given"] and len(expected[0]["blocks"]) > 1


def test_inspect_is_the_command_lines(loras):
    expected = [json.loads(line) for line in command_line("inspect", *loras, "--json").splitlines()]
    assert loraweld.inspect(*loras).events == expected
    assert loraweld.inspect(loraweld.open(loras[0])).events == expected[:1]


def test_convert_resize_and_extract_are_the_command_lines(loras, tmp_path):
    cat, dog = loras
    pairs = [
        (["convert", cat, "--format=peft", "--dtype=f16"], loraweld.convert(cat, "peft", dtype="f16")),
        (["resize", dog, "--rank=3", "--device=cpu"], loraweld.resize(dog, rank=3, device="cpu")),
    ]
    for args, result in pairs:
        expected = tmp_path / "expected.safetensors"
        command_line(*args, "-o", expected, "--force")
        result.save(tmp_path / "found.safetensors", force=True)
        assert (tmp_path / "found.safetensors").read_bytes() == expected.read_bytes()
        assert str(tmp_path) not in str(result) and result.output is None


def test_a_dry_run_writes_nothing(loras, tmp_path):
    result = loraweld.merge("linear", loras, dry_run=True)
    (plan,) = result.all("plan")
    assert len(plan["layers"]) == 24 and plan["bytes"] > 0 and result.output is None
    with pytest.raises(loraweld.InvalidError, match="merge linear made no adapter"):
        result.adapter  # noqa: B018
    assert "nothing was written" in str(result)


def test_any_command_can_be_run(loras, pets):
    assert loraweld.run("calibration", "show", file=pets).all("calibration")
    result = loraweld.run("schedule", "k-lora", subject=loras[0], style=loras[1], output=loras[0].with_suffix(".json"))
    assert json.loads(result.output.read_text())


def checkpoint(path, seed):
    """A checkpoint of one block, of random weights."""
    random = np.random.default_rng(seed)
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    weights = {f"{name}": random.standard_normal((128, 128), "float32") for name in names}
    header, data = {}, b""
    for name, w in weights.items():
        header[name] = {"dtype": "F32", "shape": [128, 128], "data_offsets": [len(data), len(data) + w.nbytes]}
        data += w.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_bake_and_extract_go_there_and_back(loras, tmp_path):
    base, tuned, expected = (tmp_path / f"{n}.safetensors" for n in ("base", "tuned", "expected"))
    checkpoint(base, 0)
    command_line("bake", base, f"{loras[1]}:0.5", "-o", expected, "--skip-unmatched")
    with pytest.warns(loraweld.LoraweldWarning, match="found no tensor"):
        baked = loraweld.bake(base, [(loras[1], 0.5)], tuned, skip_unmatched=True)
    assert tuned.read_bytes() == expected.read_bytes() and baked.report
    with pytest.raises(loraweld.InvalidError, match="bake made no adapter"):
        baked.adapter  # noqa: B018
    extracted = loraweld.extract(tuned, base, rank=16, dtype="f32").adapter
    found, dog = extracted["transformer_blocks.0.attn.to_q"], loraweld.open(loras[1])["transformer_blocks.0.attn.to_q"]
    update = 0.5 * dog.scale * dog.b @ dog.a
    np.testing.assert_allclose(found.scale * found.b @ found.a, update, atol=1e-5 * abs(update).max())
