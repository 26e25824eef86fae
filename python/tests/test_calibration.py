"""Calibrations of arrays of every kind, and their files."""

import array
import ctypes

import loraweld
import numpy as np
import pytest

LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def adapters(loras):
    return [loraweld.open(path) for path in loras]


def new(adapters):
    return loraweld.Calibration(adapters, device="cpu")


def expected(adapters, x):
    """The formula: A of all adapters, one above the other."""
    z = x.astype("float64") @ np.concatenate([a[LAYER].a.astype("float64") for a in adapters]).T
    return z.T @ z


def test_sums_are_the_formula(adapters):
    x = np.random.default_rng(0).standard_normal((2, 5, 128), "float32")
    calibration = new(adapters)
    for part in x:
        calibration.accumulate("cat", LAYER, part)
    calibration.accumulate(1, f"transformer.{LAYER}", x)
    calibration.accumulate(None, LAYER, x[0])
    rows = x.reshape(-1, 128)
    np.testing.assert_allclose(calibration.gram("cat", LAYER), expected(adapters, rows), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(calibration.gram("dog", LAYER), calibration.gram(0, LAYER), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(calibration.gram("neutral", LAYER), expected(adapters, x[0]), rtol=1e-9, atol=1e-6)
    assert [calibration.tokens(task, LAYER) for task in ("cat", 1, None)] == [10, 10, 5]
    assert calibration.tasks == ["cat", "dog"] and len(calibration.layers) == 24
    assert ("transformer_blocks_0_attn_to_k", "dog") in calibration.missing() and len(calibration.missing()) == 46
    assert calibration.gram("cat", "transformer_blocks.1.attn.to_q") is None
    assert calibration.takes(LAYER) and not calibration.takes("norm")


class Foreign:
    """An array that gives nothing but a DLPack capsule, with any strides and type."""

    def __init__(self, x, strides=None, dtype=None, device=1):
        self.x, self.strides, self.device = x, strides, device
        self.dtype = dtype or (2, x.dtype.itemsize * 8)

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self):
        class Tensor(ctypes.Structure):
            _fields_ = [
                ("data", ctypes.c_void_p),
                ("device", ctypes.c_int32 * 2),
                ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8),
                ("bits", ctypes.c_uint8),
                ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)),
                ("byte_offset", ctypes.c_uint64),
                ("context", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p),
            ]

        n, step = self.x.ndim, self.x.dtype.itemsize
        shape = (ctypes.c_int64 * n)(*self.x.shape)
        strides = (ctypes.c_int64 * n)(*(s // step for s in self.x.strides))
        self.kept = Tensor(self.x.ctypes.data - step, (1, 0), n, *self.dtype, 1, shape, strides, step, None, None)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.kept), b"dltensor", None)


def test_arrays_of_every_kind_are_read(adapters):
    """Each has whole numbers, which every type holds."""
    x = np.random.default_rng(1).integers(-8, 9, (6, 128)).astype("float32")
    bits = (x.view("uint32") >> 16).astype("uint16")
    wide = np.zeros((6, 256), "float32")
    wide[:, ::2] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    kinds = {
        "numpy": x,
        "float16": x.astype("float16"),
        "strides": wide[:, ::2],
        "columns first": np.asfortranarray(x),
        "read-only": frozen,
        "memoryview": memoryview(x),
        "dlpack": Foreign(x),
        "dlpack of float16": Foreign(x.astype("float16")),
        "dlpack of bfloat16": Foreign(bits, dtype=(4, 16)),
        "dlpack with strides": Foreign(wide[:, ::2]),
        "dlpack, columns first": Foreign(np.asfortranarray(x)),
    }
    for name, kind in kinds.items():
        calibration = new(adapters)
        calibration.accumulate(0, LAYER, kind)
        found = calibration.gram(0, LAYER)
        np.testing.assert_allclose(found, expected(adapters, x), rtol=1e-9, atol=1e-6, err_msg=name)


def test_arrays_that_cannot_be_read_are_refused(adapters):
    calibration = new(adapters)
    x = np.ones((2, 128), "float32")
    for bad, message in [
        (x.astype("float64"), "x is of float64; expected float32, float16 or bfloat16"),
        (x.astype("int32"), "x is of int32; expected"),
        (x.astype(">f4"), "x is of float32 in another byte order"),
        (Foreign(x.astype("float64")), "x is of float64; expected"),
        (Foreign(x, device=2), r"x is not in the CPU's memory; move it there first, as `x.cpu\(\)` does"),
        (x[0], r"x has the shape \[128\]; expected \[tokens, width\]"),
        ([1.0], "x is of type list; expected an array with DLPack or a buffer"),
        (array.array("d", [1.0]), "x is of float64"),
    ]:
        with pytest.raises(loraweld.ArrayError, match=f"layer `{LAYER}`: {message}"):
            calibration.accumulate(0, LAYER, bad)
    for bad in (np.ones((2, 64), "float32"), np.full((1, 128), np.nan, "float32"), np.ones((0, 128), "float32")):
        with pytest.raises(loraweld.LayerError):
            calibration.accumulate(0, LAYER, bad)
    with pytest.raises(loraweld.LayerError, match="the nearest are `transformer_blocks_0_attn_to_k`") as error:
        calibration.accumulate(0, "transformer_blocks.0.attn.to_w", x)
    assert error.value.layer == "transformer_blocks.0.attn.to_w"
    with pytest.raises(loraweld.InvalidError, match="no task `bird`; expected one of cat, dog, or `neutral`"):
        calibration.accumulate("bird", LAYER, x)
    with pytest.raises(loraweld.InvalidError, match="no task 2"):
        calibration.accumulate(2, LAYER, x)


def test_files_are_the_command_lines(adapters, inputs, pets, tmp_path):
    calibration = loraweld.Calibration([loraweld.open(a.path) for a in adapters], device="cpu")
    for task, path in enumerate(inputs):
        calibration.accumulate_file(task, path)
    calibration.save(tmp_path / "pets.safetensors")
    with pytest.raises(loraweld.ExistsError, match="`force` overwrites it"):
        calibration.save(tmp_path / "pets.safetensors")
    opened = loraweld.Calibration.open(tmp_path / "pets.safetensors")
    known = loraweld.Calibration.open(pets)
    assert opened.tasks == ["cat", "dog"]
    for layer in opened.layers:
        for task in range(2):
            np.testing.assert_array_equal(opened.gram(task, layer), known.gram(task, layer))
    with pytest.raises(loraweld.InvalidError, match="takes no activations"):
        opened.accumulate(0, LAYER, np.ones((1, 128), "float32"))


def test_calibrations_add_up(adapters):
    x = np.random.default_rng(2).standard_normal((8, 128), "float32")
    whole, first, second = new(adapters), new(adapters), new(adapters)
    whole.accumulate(0, LAYER, x)
    first.accumulate(0, LAYER, x[:3])
    second.accumulate(0, LAYER, x[3:])
    first.add(second)
    np.testing.assert_allclose(first.gram(0, LAYER), whole.gram(0, LAYER), rtol=1e-12)
    assert first.tokens(0, LAYER) == 8
