"""Recording what the layers of a model of torch read. Skipped without torch."""

import gc
import weakref

import loraweld
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: LORAWELD_PYTHON_TORCH=1 installs it")


class Model(torch.nn.Module):
    """Two blocks of an attention's projections and a convolution; one layer is not adapted."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 16)}) for _ in range(2))
        self.conv_in = torch.nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.norm = torch.nn.Linear(16, 16)

    def forward(self, x):
        x = self.conv_in(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block["to_q"](input=x)
        return self.norm(x)


def adapter(name, seed):
    random = np.random.default_rng(seed)
    tensors = {}
    for layer, a, b in [
        ("blocks.0.to_q", (4, 16), (16, 4)),
        ("blocks.1.to_q", (4, 16), (16, 4)),
        ("conv_in", (4, 3, 3, 3), (16, 4, 1, 1)),
    ]:
        tensors[f"transformer.{layer}.lora_A.weight"] = random.standard_normal(a).astype("float32")
        tensors[f"transformer.{layer}.lora_B.weight"] = random.standard_normal(b).astype("float32")
    return loraweld.Adapter(tensors, name)


@pytest.fixture
def adapters():
    return [adapter("cat", 0), adapter("dog", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_are_those_of_hooks_of_our_own(adapters, dtype):
    torch.manual_seed(0)
    model, x = Model().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    seen = {}

    def keep(name, unfold=None):
        def hook(layer, args, kwargs):
            rows = args[0] if args else kwargs["input"]
            rows = torch.nn.functional.unfold(rows, 3, padding=1, stride=2).transpose(1, 2) if unfold else rows
            rows = rows.float() if dtype == torch.float64 else rows
            seen[name] = rows.detach().double().reshape(-1, rows.shape[-1])

        return hook

    for i, block in enumerate(model.blocks):
        block["to_q"].register_forward_pre_hook(keep(f"blocks.{i}.to_q"), with_kwargs=True)
    model.conv_in.register_forward_pre_hook(keep("conv_in", unfold=True), with_kwargs=True)

    with loraweld.Recorder(model, adapters, task="cat", device="cpu") as cat:
        model(x)
        assert cat.layers == ["blocks.0.to_q", "blocks.1.to_q", "conv_in"]
    model(x)  # Nobody listens any more.
    with loraweld.Recorder({"transformer": model}, cat.calibration, task="dog"):
        model(x)
    for name, rows in seen.items():
        a = torch.cat([torch.tensor(adapter[name].a.copy()) for adapter in adapters]).double()
        z = rows @ a.T
        for task in ("cat", "dog"):
            gram = cat.calibration.gram(task, name)
            np.testing.assert_allclose(gram, (z.T @ z).numpy(), rtol=1e-6, atol=1e-6)
            assert cat.calibration.tokens(task, name) == len(rows)
    merged = loraweld.merge("ssr", adapters, calibration=cat.calibration, device="cpu")
    assert merged.losses["merged"] < 1


def test_layers_may_go_by_other_names(adapters):
    """One layer of a model may be what adapters know as several."""
    model, x = Model(), torch.randn(2, 3, 8, 8)
    layer = model.blocks[0]["to_q"]
    with loraweld.Recorder(model, adapters, task="cat", device="cpu") as whole:
        model(x)
    names = {"transformer.blocks.0.to_q": layer, "blocks.1.to_q": layer}
    with loraweld.Recorder(names, adapters, task="cat", device="cpu") as named:
        assert named.layers == list(names)
        model(x)
    expected = whole.calibration.gram("cat", "blocks.0.to_q")
    np.testing.assert_array_equal(named.calibration.gram("cat", "blocks.0.to_q"), expected)
    assert named.calibration.tokens("cat", "blocks.1.to_q") == whole.calibration.tokens("cat", "blocks.0.to_q")


def test_no_input_is_kept(adapters):
    """However often the model runs, of what its layers read nothing is alive."""
    model, alive = Model(), []
    model.blocks[0]["to_q"].register_forward_pre_hook(
        lambda _, args, kwargs: alive.append(weakref.ref(kwargs["input"])), with_kwargs=True
    )
    with loraweld.Recorder(model, adapters, task=0, device="cpu"):
        for _ in range(3):
            model(torch.randn(1, 3, 8, 8))
            gc.collect()
            assert [x() for x in alive] == [None] * len(alive)
    assert len(alive) == 3


def test_a_model_without_the_layers_is_refused(adapters):
    with pytest.raises(loraweld.InvalidError, match="no layer that two or more of cat, dog change, such as blocks_0_to_q"):
        with loraweld.Recorder(torch.nn.Linear(4, 4), adapters, task="cat"):
            pass


def test_tensors_of_torch_are_read(adapters):
    x = torch.arange(-32, 32).reshape(4, 16).float()
    grams = []
    for kind in (x, x.half(), x.bfloat16(), x.T.contiguous().T):
        calibration = loraweld.Calibration(adapters, device="cpu")
        calibration.accumulate(0, "blocks.0.to_q", kind)
        grams.append(calibration.gram(0, "blocks.0.to_q"))
    for gram in grams[1:]:
        np.testing.assert_array_equal(gram, grams[0])
    tensors = {key: torch.tensor(value.copy()) for key, value in adapters[0].tensors().items()}
    made = loraweld.Adapter({key: tensor.bfloat16() for key, tensor in tensors.items()}, "cat")
    assert made.dtype == "bf16"
    bits = made.tensors(bits=True)
    for key, tensor in tensors.items():
        assert torch.equal(torch.from_numpy(bits[key].copy()).view(torch.bfloat16), tensor.bfloat16())
