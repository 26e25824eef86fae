"""The nodes in ComfyUI's own code: its registry, its models, its loader of LoRAs, its samplers, its server.

COMFYUI names a checkout; the interpreter must be able to run it.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no checkout of ComfyUI", allow_module_level=True)

COMFYUI = Path(os.environ["COMFYUI"]).resolve()
HERE = Path(__file__).parent
FOLDER = HERE.parent / "comfyui"

import loraweld  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FLUX_LAYERS = {
    **{
        f"transformer_blocks.{i}.{layer}": shape
        for i in range(2)
        for layer, shape in {
            "attn.to_q": (32, 32), "attn.to_k": (32, 32), "attn.to_v": (32, 32), "attn.to_out.0": (32, 32),
            "attn.add_q_proj": (32, 32), "attn.add_k_proj": (32, 32), "attn.add_v_proj": (32, 32),
            "attn.to_add_out": (32, 32), "ff.net.0.proj": (128, 32), "ff.net.2": (32, 128),
            "ff_context.net.0.proj": (128, 32), "ff_context.net.2": (32, 128), "norm1.linear": (192, 32),
        }.items()
    },
    **{
        f"single_transformer_blocks.{i}.{layer}": shape
        for i in range(2)
        for layer, shape in {
            "attn.to_q": (32, 32), "attn.to_k": (32, 32), "attn.to_v": (32, 32), "proj_mlp": (128, 32),
            "proj_out": (32, 160), "norm.linear": (96, 32),
        }.items()
    },
}  # fmt: skip


# ---- ComfyUI in this process


class Comfy:
    """ComfyUI with a folder of its own, in which the nodes are."""

    def __init__(self, base):
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        comfy.cli_args.args.base_directory = str(base)
        import nodes

        self.base, self.nodes = base, nodes.NODE_CLASS_MAPPINGS
        self.loras, self.titles = base / "models/loras", nodes.NODE_DISPLAY_NAME_MAPPINGS
        for path in (base / "custom_nodes").iterdir():
            assert asyncio.run(nodes.load_custom_node(str(path))), f"{path} was not loaded"
        self.tiny = sys.modules[str(base / "custom_nodes/comfyui_tiny")]

    def run(self, node, **inputs):
        """A node's outputs. What it lacks has the default, as in a new node of the page."""
        kind = self.nodes[node]
        for about in kind.INPUT_TYPES().values():
            for name, (_, *more) in about.items() if isinstance(about, dict) else ():
                if more and "default" in more[0]:
                    inputs.setdefault(name, more[0]["default"])
        return kind.execute(**inputs).result

    def adapters(self, *files, prompts=None, **more):
        chain = None
        for at, (path, strength) in enumerate(files):
            extra = {name: values[at] for name, values in more.items()}
            prompt = prompts and prompts[at]
            name = str(path.relative_to(self.loras))
            (chain,) = self.run("LoraweldAdapter", lora_name=name, strength=strength, adapters=chain, prompt=prompt, **extra)
        return chain


def folder(base):
    """A base directory of ComfyUI with the nodes, and those of tests."""
    for name in ("custom_nodes", "models/loras", "models/diffusion_models", "models/checkpoints", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    shutil.copytree(FOLDER, base / "custom_nodes/loraweld", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "comfyui_tiny.py", base / "custom_nodes")
    return base


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    sys.path.insert(0, str(COMFYUI))
    return Comfy(folder(tmp_path_factory.mktemp("comfyui")))


@pytest.fixture
def not_loaded():
    """What ComfyUI says it has not loaded."""
    said = []

    class Handler(logging.Handler):
        def emit(self, record):
            if re.search("not loaded", record.getMessage(), re.I):
                said.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger().addHandler(handler)
    yield said
    logging.getLogger().removeHandler(handler)


# ---- Adapters of the tiny models


def random_lora(path, layers, seed, rank=4, alpha=None, spelling="peft", size=0.3):
    """Writes an adapter of random factors for {layer: (output, input)}."""
    generator = torch.Generator().manual_seed(seed)
    a_name, b_name = ("lora_A", "lora_B") if spelling == "peft" else ("lora_down", "lora_up")
    tensors = {}
    for layer, (output, *inputs) in layers.items():
        a = torch.randn(rank, *inputs, generator=generator)
        b = torch.randn(output, rank, *(1 for _ in inputs[1:]), generator=generator)
        tensors[f"{layer}.{a_name}.weight"] = a / a[0].numel() ** 0.5
        tensors[f"{layer}.{b_name}.weight"] = size * b / rank**0.5
        if alpha is not None:
            tensors[f"{layer}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


def weights(model, pattern):
    """{name of a linear layer or convolution in ComfyUI's model: shape}"""
    found = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in model.model.diffusion_model.state_dict().items()
        if name.endswith(".weight") and re.search(pattern, name) and value.ndim > 1
    }
    assert found
    return found


FLUX_PATTERN = r"(_attn\.(qkv|proj)|_mlp\.[02]|_mod\.lin|linear[12]|modulation\.lin)\.weight"
SDXL_PATTERN = r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|(in|out)_layers\.[23]|input_blocks\.3\.0\.op)\.weight"


def two(comfy, model, kind):
    """Two adapters of a tiny model, in one of the spellings that people have."""
    name, spelling = kind.split("-")
    if spelling == "diffusers":
        layers, form, alpha = {f"transformer.{key}": shape for key, shape in FLUX_LAYERS.items()}, "peft", None
    elif spelling == "comfyui":
        found = weights(model, FLUX_PATTERN if name == "flux" else SDXL_PATTERN)
        layers, form, alpha = {f"diffusion_model.{key}": shape for key, shape in found.items()}, "peft", None
    else:
        found = weights(model, FLUX_PATTERN if name == "flux" else SDXL_PATTERN)
        layers = {f"lora_unet_{key.replace('.', '_')}": shape for key, shape in found.items()}
        form, alpha = "kohya", 2.0
    paths = []
    for seed, task in enumerate(("cat", "dog"), start=1):
        path = comfy.loras / f"{task}_{kind}.safetensors"
        if not path.exists():
            random_lora(path, layers, seed, rank=3 + seed, alpha=alpha, spelling=form)
        paths.append(path)
    return paths


KINDS = ["flux-diffusers", "flux-comfyui", "flux-kohya", "sdxl-kohya"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def forward(comfy, model, name, seed=5):
    """What a model makes of noise and a prompt in a step of ComfyUI's sampler."""
    import comfy.sample as sample

    channels = 16 if name.startswith("flux") else 4
    latent = sample.fix_empty_latent_channels(model, torch.zeros(1, channels, 8, 8))
    prompt = comfy.tiny.prompt(name.split("-")[0], seed)
    noise = sample.prepare_noise(latent, seed)
    return sample.sample(model, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=seed).double()


def apart(x, y):
    return ((x - y).norm() / y.norm()).item()


def loaded(model, files):
    """The model with files that ComfyUI's own node has loaded, one after the other."""
    import nodes

    for path, strength in files:
        model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, path.name, strength)[0]
    return model


# ---- Tests


def test_nodes_are_registered(comfy):
    assert [name for name in comfy.nodes if name.startswith("Loraweld")] == [
        "LoraweldAdapter", "LoraweldMerge", "LoraweldNpLora", "LoraweldMergeOptions",
        *(f"LoraweldOptionsOf_{n.replace('-', '_')}" for n, m in loraweld.methods().items() if m.options and n != "np-lora"),
        "LoraweldApply", "LoraweldCalibrate", "LoraweldLoadCalibration", "LoraweldCompare", "LoraweldStrengths",
        "LoraweldInspect", "LoraweldOverlap", "LoraweldResize", "LoraweldConvert", "LoraweldBake",
    ]  # fmt: skip
    assert comfy.titles["LoraweldMerge"] == "Merge (loraweld)"


def test_methods_and_options_are_those_of_the_wheel(comfy):
    def widgets(node):
        about = comfy.nodes[node].INPUT_TYPES()
        return {**about.get("required", {}), **about.get("optional", {})}

    choices = widgets("LoraweldMerge")["method"][1]["options"]
    assert choices == [name for name in loraweld.methods() if name != "np-lora"]
    for name, method in loraweld.methods().items():
        node = "LoraweldNpLora" if name == "np-lora" else f"LoraweldOptionsOf_{name.replace('-', '_')}"
        for option in method.options.values():
            kind, about = widgets(node)[option.name]
            assert about["tooltip"].startswith(option.help or "")
            if option.default and not option.many:
                assert about["default"] == option.default
            if option.values and not option.many:
                assert kind == "COMBO" and [c for c in about["options"] if c != "default"] == list(option.values)
    for command in ("compare", "strengths", "inspect", "resize", "convert", "bake"):
        node = f"Loraweld{command.capitalize()}"
        theirs = {o.name for o in loraweld.options(command).values() if not o.positional}
        left_out = theirs - widgets(node).keys() - {"calibration", "output", "force", "dry_run"}
        # What an adapter is, it is for every command.
        assert left_out <= widgets("LoraweldAdapter").keys(), (command, left_out)


def test_merge_is_the_sum_of_comfyuis_patches(comfy, kind, not_loaded):
    model = comfy.tiny.model(kind.split("-")[0])
    cat, dog = two(comfy, model, kind)
    options = comfy.run("LoraweldMergeOptions", dtype="f32")[0]
    patched, _, (merged,), text = comfy.run(
        "LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 0.8), (dog, -0.6)), model=model, options=options,
        save_as=f"merged/{kind}",
    )  # fmt: skip
    assert merged.path == comfy.loras / f"merged/{kind}_00001_.safetensors" and merged.path.exists()
    theirs = forward(comfy, loaded(model, [(cat, 0.8), (dog, -0.6)]), kind)
    assert not not_loaded and "warning: ComfyUI" not in text
    base, ours = forward(comfy, model, kind), forward(comfy, patched, kind)
    print(f"{kind}: {apart(ours, theirs):.1e} off, of a change by {apart(base, theirs):.1e}")
    assert apart(base, theirs) > 1e-3
    assert apart(ours, theirs) < 1e-5
    # The next one gets a number of its own.
    again = comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 1.0), (dog, 1.0)), save_as=f"merged/{kind}")
    assert again[2][0].path.name == f"{kind}_00002_.safetensors" and again[0] is None


def test_text_encoders_are_merged_and_applied(comfy, not_loaded):
    import nodes

    model, clip = comfy.tiny.model("sdxl"), comfy.tiny.clip()
    layers = {f"lora_unet_{key.replace('.', '_')}": shape for key, shape in weights(model, r"attn2\.to_k\.weight").items()}
    for i in range(2):
        for layer, shape in {"self_attn_q_proj": (32, 32), "mlp_fc1": (64, 32), "mlp_fc2": (32, 64)}.items():
            layers[f"lora_te1_text_model_encoder_layers_{i}_{layer}"] = shape
    files = [random_lora(comfy.loras / f"{name}_te.safetensors", layers, seed, alpha=2.0, spelling="kohya")
             for seed, name in enumerate(("cat", "dog"))]  # fmt: skip
    (options,) = comfy.run("LoraweldMergeOptions", dtype="f32")
    given = dict(method="linear", adapters=comfy.adapters((files[0], 0.8), (files[1], 0.5)), options=options, save_as="")
    patched, patched_clip, _, text = comfy.run("LoraweldMerge", model=model, clip=clip, **given)
    theirs, their_clip = model, clip
    for path, strength in zip(files, (0.8, 0.5)):
        theirs, their_clip = nodes.LoraLoader().load_lora(theirs, their_clip, path.name, strength, strength)
    assert not not_loaded and "warning: ComfyUI" not in text
    base, ours, expected = (comfy.tiny.encoded(c)[0].double() for c in (clip, patched_clip, their_clip))
    assert apart(base, expected) > 1e-2 and apart(ours, expected) < 1e-5
    assert apart(forward(comfy, patched, "sdxl"), forward(comfy, theirs, "sdxl")) < 1e-5
    # What is left out is told.
    _, _, _, text = comfy.run("LoraweldMerge", model=model, **given)
    assert f"ComfyUI's loader took {len(layers) - 6} of {len(layers)} layers" in text and "need a CLIP" in text
    assert not_loaded


def test_every_method_runs_and_is_loaded_whole(comfy, not_loaded):
    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    adapters = comfy.adapters((cat, 1.0), (dog, 1.0))
    options = comfy.run("LoraweldMergeOptions", rank="6")[0]
    for method in loraweld.methods():
        if method != "np-lora":
            patched = comfy.run("LoraweldMerge", method=method, adapters=adapters, model=model, options=options, save_as="")[0]
            assert torch.isfinite(forward(comfy, patched, "flux")).all(), method
    assert not not_loaded


def test_options_reach_the_method(comfy):
    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    adapters = comfy.adapters((cat, 1.0), (dog, 1.0))
    (own,) = comfy.run("LoraweldOptionsOf_ties", density="0.3", lambda_=None, **{"as": "paper"})
    assert own == {"density": "0.3", "as": "paper"}
    (both,) = comfy.run("LoraweldMergeOptions", rank="5", dtype="f32", options=own)
    _, _, (merged,), _ = comfy.run("LoraweldMerge", method="ties", adapters=adapters, options=both, save_as="")
    expected = loraweld.merge("ties", [cat, dog], density=0.3, rank=5, dtype="f32", **{"as": "paper"})
    ours = loraweld.open(merged.path).tensors()
    assert all((ours[key] == value).all() for key, value in expected.adapter.tensors().items())
    with pytest.raises(TypeError, match="merge linear has no option `density`"):
        comfy.run("LoraweldMerge", method="linear", adapters=adapters, options=own, save_as="")


def test_strengths_of_layers_and_blocks(comfy, not_loaded):
    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-comfyui")
    # Of the cat, only the single blocks.
    part = load_file(cat)
    part = {key: value for key, value in part.items() if "single_blocks" in key}
    save_file(part, comfy.loras / "part.safetensors")
    theirs = forward(comfy, loaded(model, [(comfy.loras / "part.safetensors", 0.9), (dog, 1.0)]), "flux")
    for more in (
        dict(strength_for=["*=0\nsingle_*=1", ""]),
        dict(blocks=["SINGLE", "ALL"], model=["flux1", "flux1"]),
    ):
        adapters = comfy.adapters((cat, 0.9), (dog, 1.0), **more)
        (options,) = comfy.run("LoraweldMergeOptions", dtype="f32")
        patched = comfy.run("LoraweldMerge", method="linear", adapters=adapters, model=model, options=options, save_as="")[0]
        assert apart(forward(comfy, patched, "flux"), theirs) < 1e-5, more
        applied = comfy.run("LoraweldApply", adapters=adapters, model=model)[0]
        assert apart(forward(comfy, applied, "flux"), theirs) < 1e-5, more
    assert not not_loaded


def test_np_lora_gives_way_in_the_styles_directions(comfy, not_loaded):
    model = comfy.tiny.model("sdxl")
    style, subject = two(comfy, model, "sdxl-kohya")
    styles, subjects = comfy.adapters((style, 1.0)), comfy.adapters((subject, 1.0))
    (options,) = comfy.run("LoraweldMergeOptions", dtype="f32")
    run = lambda **more: comfy.run("LoraweldNpLora", style=styles, subject=subjects, model=model, options=options, save_as="", **more)  # noqa: E731
    hard, plain = run(hard=True), run(mu="0")
    assert apart(forward(comfy, plain[0], "sdxl"), forward(comfy, loaded(model, [(style, 1.0), (subject, 1.0)]), "sdxl")) < 1e-5
    assert apart(forward(comfy, hard[0], "sdxl"), forward(comfy, plain[0], "sdxl")) > 1e-4
    expected = loraweld.merge("np-lora", [style, subject], hard=True, dtype="f32").adapter.tensors()
    ours = loraweld.open(hard[2][0].path).tensors()
    assert all((ours[key] == value).all() for key, value in expected.items())
    assert not not_loaded
    with pytest.raises(ValueError, match="this node takes one adapter, not 2"):
        comfy.run("LoraweldNpLora", style=styles + subjects, subject=subjects, save_as="")


@pytest.fixture(scope="session")
def calibrated(comfy):
    """By kind: the model, the adapters with their prompts, and a calibration."""
    made = {}

    def calibrate(kind):
        if kind not in made:
            name = kind.split("-")[0]
            model = comfy.tiny.model(name)
            prompts = [comfy.tiny.prompt(name, seed) for seed in (11, 12)]
            adapters = comfy.adapters(*((path, 1.0) for path in two(comfy, model, kind)), prompts=prompts)
            latent = {"samples": torch.zeros(1, 4, 8, 8)}
            calibration, text = comfy.run(
                "LoraweldCalibrate", model=model, adapters=adapters, latent_image=latent, scheduler="simple", save_as="",
                neutral=comfy.tiny.prompt(name, 13),
            )  # fmt: skip
            made[kind] = model, adapters, calibration, text
        return made[kind]

    return calibrate


def test_calibrate_records_what_layers_read(comfy, kind, calibrated):
    model, adapters, calibration, text = calibrated(kind)
    assert not calibration.missing() and "warning" not in text
    # The inputs of a layer, from a hook of this test: with the adapter on, at the same noise.
    name, target = {
        "flux": ("single_transformer_blocks.1.proj_out", "single_blocks.1.linear2"),
        "sdxl": ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k", "input_blocks.4.1.transformer_blocks.0.attn1.to_k"),
    }[kind.split("-")[0]]
    if name not in loraweld.open(adapters[0].path):
        (name,) = (layer for layer in calibration.layers if layer.endswith(target.replace(".", "_")))
    import comfy.sample as sample
    from comfy.utils import get_attr

    patched = loaded(model, [(adapters[0].path, 1.0)])
    seen = []
    handle = get_attr(model.model.diffusion_model, target).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    latent = sample.fix_empty_latent_channels(model, torch.zeros(1, 4, 8, 8))
    noise = sample.prepare_noise(latent, 0)
    prompt = adapters[0].prompt
    sample.sample(patched, noise, 20, 1.0, "euler", "simple", prompt, prompt, latent, last_step=1, disable_pbar=True, seed=0)
    handle.remove()
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    assert calibration.tokens(0, name) == len(x)
    layers = [loraweld.open(lora.path)[name] for lora in adapters]
    z = x @ torch.cat([torch.tensor(layer.a, dtype=torch.float64) for layer in layers]).T
    ours, theirs = torch.tensor(calibration.gram(0, name)), z.T @ z
    assert apart(ours, theirs) < 1e-5


def test_ssr_loses_less_than_the_sum(comfy, kind, calibrated):
    model, adapters, calibration, _ = calibrated(kind)
    (options,) = comfy.run("LoraweldMergeOptions", dtype="f32")
    given = dict(adapters=adapters, calibration=calibration, options=options, model=model, save_as="")
    ssr, _, _, text = comfy.run("LoraweldMerge", method="ssr", **given)
    plain, _, _, _ = comfy.run("LoraweldMerge", method="linear", **given)
    found = re.search(r"^loss\s+ssr\s+sum.*?^total\s+([\d.]+)\s+([\d.]+)", text, re.M | re.S)
    assert found, text
    assert float(found[1]) < 0.8 * float(found[2])
    # And the model itself, beside what it makes with each adapter alone, on other noise.
    name = kind.split("-")[0]
    losses = {"ssr": 0.0, "linear": 0.0}
    for seed, lora in zip((11, 12), adapters):
        alone = forward(comfy, loaded(model, [(lora.path, 1.0)]), name, seed)
        for method, merged in (("ssr", ssr), ("linear", plain)):
            losses[method] += (forward(comfy, merged, name, seed) - alone).norm().item() ** 2
    assert losses["ssr"] < losses["linear"]


def test_a_calibration_is_saved_and_opened(comfy, calibrated):
    model, adapters, calibration, _ = calibrated("flux-kohya")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    comfy.run("LoraweldCalibrate", model=model, adapters=adapters, latent_image=latent, scheduler="simple", save_as="pets")
    name = "pets_00001_.calibration.safetensors"
    assert (comfy.base / "models/calibrations" / name).exists()
    (opened,) = comfy.run("LoraweldLoadCalibration", calibration_name=name)
    assert opened.tasks == calibration.tasks
    layer = opened.layers[0]
    assert (opened.gram(0, layer) == calibration.gram(0, layer)).all()


def test_calibrate_wants_a_prompt_and_the_right_model(comfy):
    flux = comfy.tiny.model("flux")
    pair = [(path, 1.0) for path in two(comfy, flux, "flux-kohya")]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    with pytest.raises(ValueError, match="cat_flux-kohya has no prompt"):
        comfy.run("LoraweldCalibrate", model=flux, adapters=comfy.adapters(*pair), latent_image=latent, scheduler="simple")
    prompts = [comfy.tiny.prompt("sdxl", 1)] * 2
    sdxl = comfy.tiny.model("sdxl")
    with pytest.raises(ValueError, match="finds none of its .* layers in SDXL|the model has no layer that two or more"):
        adapters = comfy.adapters(*pair, prompts=prompts)
        comfy.run("LoraweldCalibrate", model=sdxl, adapters=adapters, latent_image=latent, scheduler="simple")
    with pytest.raises(ValueError, match="finds none of its .* layers in SDXL"):
        comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters(*pair), model=sdxl, save_as="")


def test_compare_and_strengths(comfy, calibrated):
    model, adapters, calibration, _ = calibrated("flux-diffusers")
    (text,) = comfy.run("LoraweldCompare", adapters=adapters, calibration=calibration, methods="ssr, linear,ties")
    assert re.findall(r"^(ssr|linear|ties|dare) +[\d.]+ ", text, re.M) == ["ssr", "linear", "ties"]
    for per_block in (False, True):
        better, text = comfy.run("LoraweldStrengths", adapters=adapters, calibration=calibration, per_block=per_block)
        loss = float(re.search(r"loss ([\d.]+)", text)[1])
        _, _, _, said = comfy.run("LoraweldMerge", method="linear", adapters=better, calibration=calibration, save_as="", model=model)
        # What they lose beside the adapters as they were given is for the command to know; here, that they were given.
        if per_block:
            assert all(lora.strength == 1 and len(lora.strength_for) == 4 for lora in better)
        else:
            assert all(0 < lora.strength < 1 for lora in better)
        assert loss < 1 and said


def test_inspect_and_overlap(comfy):
    model = comfy.tiny.model("flux")
    adapters = comfy.adapters(*((path, 1.0) for path in two(comfy, model, "flux-diffusers")))
    (text,) = comfy.run("LoraweldInspect", adapters=adapters, norms=True)
    assert "38 layers" in re.sub(r"layers\s+38", "38 layers", text)
    image, text = comfy.run("LoraweldOverlap", adapters=adapters)
    assert image.shape[0] == 1 and image.shape[3] == 3 and 0 <= image.min() < image.max() <= 1
    assert "also reads" in text
    with pytest.raises(ValueError, match="two LoRA files or more"):
        comfy.run("LoraweldOverlap", adapters=adapters[:1])


def test_resize_and_convert(comfy, not_loaded):
    model = comfy.tiny.model("flux")
    cat, _ = two(comfy, model, "flux-diffusers")
    adapters = comfy.adapters((cat, 0.7), model=["flux1"])
    (small,), _ = comfy.run("LoraweldResize", adapters=adapters, rank="4", dtype="f32", save_as="resized")
    # Of rank 4 as before: the same update, at the strength given.
    theirs = forward(comfy, loaded(model, [(cat, 0.7)]), "flux")
    patched = comfy.run("LoraweldApply", adapters=[small], model=model)[0]
    assert apart(forward(comfy, patched, "flux"), theirs) < 1e-5
    (spelled,), _ = comfy.run("LoraweldConvert", adapters=adapters, format="kohya", dtype="f32", save_as="spelled")
    assert all(key.startswith("lora_unet_double_blocks") or "single_blocks" in key for key in load_file(spelled.path))
    assert apart(forward(comfy, loaded(model, [(place(comfy, spelled.path), 0.7)]), "flux"), theirs) < 1e-5
    assert not not_loaded


def place(comfy, path):
    assert path.parent == comfy.loras
    return path


def test_bake_adds_to_a_file(comfy):
    from comfy.lora import calculate_weight

    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-comfyui")
    before = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    save_file(before, comfy.base / "models/diffusion_models/base.safetensors")
    name, text = comfy.run(
        "LoraweldBake", checkpoint="diffusion_models/base.safetensors", adapters=comfy.adapters((cat, 0.8), (dog, -0.5)),
        save_as="baked",
    )  # fmt: skip
    after = load_file(comfy.base / "models/diffusion_models" / name)
    patched = loaded(model, [(cat, 0.8), (dog, -0.5)])
    assert after.keys() == before.keys()
    for key in before:
        whole = f"diffusion_model.{key}"
        expected = before[key]
        if whole in patched.patches:
            expected = calculate_weight(patched.patches[whole], expected.clone(), whole)
        assert apart(after[key].double(), expected.double()) < 1e-6 if expected.norm() else not after[key].any(), key
    with pytest.raises(ValueError, match="is in none of"):
        comfy.run("LoraweldBake", checkpoint="../x.safetensors", adapters=comfy.adapters((cat, 1.0)), save_as="baked")


def test_files_stay_in_comfyuis_folders(comfy):
    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    with pytest.raises(Exception, match="outside the output folder is not allowed"):
        comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 1.0), (dog, 1.0)), save_as="../../escaped")


def test_a_report_is_written_in_the_output_folder(comfy):
    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    (options,) = comfy.run("LoraweldMergeOptions", report=True)
    for number in (1, 2):  # The node with the options is not run again.
        comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 1.0), (dog, 1.0)), options=options, save_as="")
        assert "<html" in (comfy.base / f"output/loraweld/report_0000{number}_.html").read_text()


@pytest.fixture
def cancelled_at_once(comfy):
    """The user cancels as soon as the bar moves."""
    import comfy.model_management as management
    import comfy.utils as utils

    moves = []

    def hook(value, total, *_, **__):
        moves.append((value, total))
        management.interrupt_current_processing()

    utils.set_progress_bar_global_hook(hook)
    yield moves
    utils.set_progress_bar_global_hook(None)
    management.interrupt_current_processing(False)


def test_cancelling_ends_a_merge_without_a_file(comfy, cancelled_at_once):
    import comfy.model_management as management

    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    with pytest.raises(management.InterruptProcessingException):
        comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 1.0), (dog, 1.0)), save_as="cancelled")
    assert len(cancelled_at_once) == 1 and cancelled_at_once[0][1] == 38
    time.sleep(0.5)
    assert not list(comfy.loras.glob("cancelled*"))


def test_cancelling_ends_calibrate_between_layers(comfy, calibrated, cancelled_at_once):
    import comfy.model_management as management

    model, adapters, _, _ = calibrated("flux-diffusers")
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    with pytest.raises(management.InterruptProcessingException):
        comfy.run("LoraweldCalibrate", model=model, adapters=adapters, latent_image=latent, scheduler="simple")
    layers = [layer for layer in model.model.modules() if layer._forward_pre_hooks]
    assert not layers, "hooks are left behind"


def test_the_bar_moves_to_its_end(comfy):
    import comfy.utils as utils

    model = comfy.tiny.model("flux")
    cat, dog = two(comfy, model, "flux-diffusers")
    moves = []
    utils.set_progress_bar_global_hook(lambda value, total, *_, **__: moves.append((value, total)))
    try:
        comfy.run("LoraweldMerge", method="linear", adapters=comfy.adapters((cat, 1.0), (dog, 1.0)), save_as="")
    finally:
        utils.set_progress_bar_global_hook(None)
    assert moves == sorted(moves) and moves[-1] == (38, 38)


def test_devices_are_listed_beside_angle():
    """ComfyUI's nodes for shaders load ANGLE, whose functions of Vulkan then come before the loader's own."""
    pytest.importorskip("comfy_angle")
    listing = """
import ctypes, comfy_angle
for path in (comfy_angle.get_egl_path(), comfy_angle.get_glesv2_path()):
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
import loraweld
loraweld.devices()
"""
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- ComfyUI's server


class Server:
    def __init__(self, base):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", base / "log"
        options = ["--cpu", "--port", port, "--base-directory", base, "--disable-auto-launch"]
        options += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
        self.process = subprocess.Popen(
            [sys.executable, "main.py", *map(str, options)], cwd=COMFYUI, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )

    def get(self, path, data=None):
        request = urllib.request.Request(self.url + path, data and json.dumps(data).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def wait(self, path, found, seconds=300):
        """Asks again and again until the answer is what is looked for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if (answer := found(self.get(path))) is not None:
                    return answer
            except urllib.error.HTTPError:
                raise
            except OSError:
                pass
            time.sleep(0.3)
        pytest.fail(f"{path}: no answer\n{self.log.read_text()[-4000:]}")


@pytest.fixture
def server(tmp_path, comfy):
    base = folder(tmp_path / "server")
    for path, name in zip(two(comfy, comfy.tiny.model("sdxl"), "sdxl-kohya"), ("cat", "dog")):
        shutil.copy(path, base / f"models/loras/{name}.safetensors")
    running = Server(base)
    running.base = base
    yield running
    running.process.terminate()
    running.process.wait(30)


API = json.loads((FOLDER / "api/calibrate_and_merge.api.json").read_text())


def tiny(node, **inputs):
    return {"class_type": node, "inputs": inputs}


def test_the_server_runs_the_example(server):
    about = server.wait("/object_info", lambda answer: answer)
    assert {node["class_type"] for node in API.values()} <= about.keys()
    assert "Cannot import" not in server.log.read_text() and "IMPORT FAILED" not in server.log.read_text()
    # The example with a tiny model, prompts without text encoders, and nothing that decodes images.
    graph = {key: json.loads(json.dumps(node)) for key, node in API.items()}
    by_title = {node["_meta"]["title"]: key for key, node in graph.items()}
    graph[by_title["The model"]] = tiny("TinyModel", name="sdxl")
    for seed, title in enumerate(("The cat's prompt", "The dog's prompt", "Both", "Nothing")):
        graph[by_title[title]] = tiny("TinyPrompt", name="sdxl", seed=seed)
    graph[by_title["The size of images"]]["inputs"].update(width=64, height=64)
    sampler = next(key for key, node in graph.items() if node["class_type"] == "KSampler")
    graph[sampler]["inputs"]["steps"] = 2
    del graph[by_title["Merge"]]["inputs"]["clip"], graph[by_title["VAEDecode"]]
    graph[by_title["SaveImage"]] = tiny("SaveLatent", samples=[sampler, 0], filename_prefix="pets")

    queued = server.get("/prompt", {"prompt": graph})["prompt_id"]
    done = server.wait(f"/history/{queued}", lambda answer: answer.get(queued))
    assert done["status"]["status_str"] == "success", done["status"]
    said = done["outputs"][by_title["Merge"]]["text"][0]
    losses = re.search(r"^total\s+([\d.]+)\s+([\d.]+)", said, re.M)
    assert float(losses[1]) < float(losses[2])
    assert done["outputs"][by_title["What it lost"]]["text"] == [said]
    assert done["outputs"][by_title["Are they in each other's way?"]]["images"]
    assert done["outputs"][by_title["What do the layers read?"]]["text"] == ["calibrated 337 layers of cat, dog"]
    assert (server.base / "models/loras/loraweld/pets_00001_.safetensors").exists()
    assert list((server.base / "output").glob("pets*.latent"))


def test_the_workflow_of_the_page_is_that_of_the_api():
    page = json.loads((FOLDER / "example_workflows/calibrate_and_merge.json").read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    nodes = {str(node["id"]): node for node in page["nodes"]}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in API.items()}
    for key, node in API.items():
        linked = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        found = {i["name"]: links[i["link"]] for i in nodes[key].get("inputs", []) if i.get("link") is not None}
        assert found == linked
