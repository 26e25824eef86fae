"""The nodes: what each takes and gives. What it does is a call of the wheel."""

from functools import partial
from pathlib import Path

import comfy.samplers
import folder_paths
import loraweld
from comfy_api.latest import io, ui

from . import calibrating, files, heatmap, widgets
from .loras import Bar, Lora, applied, apply, arguments, said, with_strengths

Adapters = io.Custom("LORAWELD_ADAPTERS")
Calibration = io.Custom("LORAWELD_CALIBRATION")
Options = io.Custom("LORAWELD_OPTIONS")

METHODS, STYLE_FIRST = widgets.merge_methods()
FOR_MERGES = widgets.of_every_merge()


# ---- What several nodes have


def node(cls, title, description, inputs, outputs, output=True):
    """A node's schema. What is an `output` runs though nothing follows it."""
    return io.Schema(
        node_id=cls.__name__, display_name=f"{title} (loraweld)", category="loraweld", description=description,
        inputs=inputs, outputs=outputs, is_output_node=output,
    )  # fmt: skip


def adapters_in(id="adapters", tooltip="The adapters, from Adapter or other nodes of loraweld.", optional=False):
    return Adapters.Input(id, tooltip=tooltip, optional=optional)


def calibration_in(optional=True, tooltip="What the layers read, to measure by it what the result loses."):
    return Calibration.Input("calibration", tooltip=tooltip, optional=optional)


def options_in(tooltip):
    return Options.Input("options", tooltip=tooltip, optional=True)


def save_as(default, folder="loras"):
    kept = "Without a name, the file is kept until ComfyUI starts again." if folder == "loras" else ""
    return io.String.Input("save_as", default=default, tooltip=f"The name in models/{folder}, to which a number is added. {kept}")


def model_and_clip_in():
    return [
        io.Model.Input("model", optional=True, tooltip="The model to apply the result to."),
        io.Clip.Input("clip", optional=True, tooltip="Its text encoders, for adapters that change them."),
    ]


def model_and_clip_out():
    return [io.Model.Output(display_name="model"), io.Clip.Output(display_name="clip")]


def adapters_out():
    return Adapters.Output(display_name="adapters")


def text_out():
    return io.String.Output(display_name="text")


def shown(*outputs, text):
    """Outputs, of which the last is a text; ComfyUI's history has it too."""
    return io.NodeOutput(*outputs, text, ui=ui.PreviewText(text))


def called(command, adapters, *args, **options):
    """What a command of the wheel makes of adapters, with ComfyUI's bar."""
    return command([lora.source for lora in adapters], *args, progress=Bar(), **arguments(adapters), **options)


def merged(result, model, clip):
    """What a node gives that merged adapters: the file, and the model with it."""
    model, clip, warnings = apply(result.output, model, clip)
    return shown(model, clip, [Lora(result.output)], text=said(result, *warnings))


def one(adapters):
    """The adapter, where a node takes no more."""
    if len(adapters) != 1:
        raise ValueError(f"this node takes one adapter, not {len(adapters)}: {', '.join(lora.name for lora in adapters)}")
    return adapters[0]


# ---- What goes into a merge


class LoraweldAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        about = loraweld.options("merge", METHODS[0])
        strength_for, blocks, model = (about[name] for name in ("strength_for", "blocks", "model"))
        return node(
            cls, "Adapter", "A LoRA, its strength, and what it is meant for. Several are chained.",
            [
                io.Combo.Input("lora_name", options=folder_paths.get_filename_list("loras")),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01),
                io.String.Input("strength_for", default="", multiline=True, optional=True,
                                placeholder="strength_for: PATTERN=W, one a line", tooltip=strength_for.help),
                io.String.Input("blocks", default="", optional=True, placeholder="blocks: W,W,...", tooltip=blocks.help),
                io.String.Input("model", default="", optional=True, placeholder="model: ID", tooltip=model.help),
                adapters_in(optional=True, tooltip="The adapters that come before this one."),
                io.Conditioning.Input("prompt", optional=True, tooltip="A prompt that it is meant for, for Calibrate."),
            ],
            [adapters_out()], output=False,
        )  # fmt: skip

    @classmethod
    def execute(cls, lora_name, strength, strength_for="", blocks="", model="", adapters=(), prompt=None):
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        lines = tuple(line.strip() for line in strength_for.splitlines() if line.strip())
        return io.NodeOutput([*(adapters or ()), Lora(path, strength, lines, blocks.strip(), model.strip(), prompt)])

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_):
        """A file that was changed is another adapter."""
        about = Path(folder_paths.get_full_path_or_raise("loras", lora_name)).stat()
        return f"{about.st_mtime_ns} {about.st_size}"


class OptionsNode(io.ComfyNode):
    """Options for Merge; a subclass says which."""

    TITLE, DESCRIPTION, OPTIONS = "", "", {}

    @classmethod
    def define_schema(cls):
        inputs = [*widgets.inputs(cls.OPTIONS), options_in("More options. Where both say something, this node counts.")]
        return node(cls, cls.TITLE, cls.DESCRIPTION, inputs, [Options.Output(display_name="options")], output=False)

    @classmethod
    def execute(cls, options=None, **values):
        return io.NodeOutput({**(options or {}), **widgets.chosen(cls.OPTIONS, values)})


def options_node(name, title, description, found):
    return type(name, (OptionsNode,), {"TITLE": title, "DESCRIPTION": description, "OPTIONS": found, "__module__": __name__})


OPTIONS_NODES = [
    options_node("LoraweldMergeOptions", "Options of every method", "Ranks, types and spelling of what Merge gives.", FOR_MERGES),
    *(
        options_node(f"LoraweldOptionsOf_{name.replace('-', '_')}", f"Options of {name}", method.summary, method.options)
        for name, method in loraweld.methods().items()
        if name in METHODS and method.options
    ),
]


# ---- Merging


class LoraweldMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        explained = "\n".join(f"{name}: {loraweld.methods()[name].summary}" for name in METHODS)
        return node(
            cls, "Merge", "Merges LoRAs into one, saves it, and applies it to the model.",
            [
                io.Combo.Input("method", options=METHODS, default=METHODS[0], tooltip=explained),
                adapters_in(),
                save_as("loraweld/merged"),
                calibration_in(tooltip="What the layers read. ssr solves for it, and follows a proxy without; "
                                       "for the other methods it measures what they lose."),
                options_in("From the nodes with the options of every method, and of this one."),
                *model_and_clip_in(),
            ],
            [*model_and_clip_out(), adapters_out(), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, method, adapters, save_as, calibration=None, options=None, model=None, clip=None):
        needed = loraweld.options("merge", method)["calibration"].required
        result = called(
            partial(loraweld.merge, method), adapters, output=files.lora(save_as),
            calibration="none" if needed and calibration is None else calibration, **widgets.ready(options or {}),
        )  # fmt: skip
        return merged(result, model, clip)


class LoraweldNpLora(io.ComfyNode):
    METHOD = loraweld.methods()[STYLE_FIRST]

    @classmethod
    def define_schema(cls):
        return node(
            cls, "NP-LoRA style × subject", cls.METHOD.summary,
            [
                adapters_in("style", "The adapter that is kept whole."),
                adapters_in("subject", "What gives way to it. A second subject also gives way to the first."),
                *widgets.inputs(cls.METHOD.options),
                save_as("loraweld/styled"),
                calibration_in(),
                options_in("From the node with the options of every method."),
                *model_and_clip_in(),
            ],
            [*model_and_clip_out(), adapters_out(), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, style, subject, save_as, calibration=None, options=None, model=None, clip=None, **values):
        chosen = {**(options or {}), **widgets.chosen(cls.METHOD.options, values)}
        result = called(
            partial(loraweld.merge, cls.METHOD.name), [one(style), *subject], output=files.lora(save_as),
            calibration=calibration, **widgets.ready(chosen),
        )  # fmt: skip
        return merged(result, model, clip)


class LoraweldApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node(
            cls, "Apply", "Applies adapters to the model at their strengths, those of layers included.",
            [adapters_in(), *model_and_clip_in()], model_and_clip_out(), output=False,
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, model=None, clip=None):
        model, clip, _ = applied(adapters, model, clip)
        return io.NodeOutput(model, clip)


# ---- Calibrations


class LoraweldCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node(
            cls, "Calibrate",
            "Runs the sampler's first step with each adapter and its prompt, and sums up what the layers read.",
            [
                io.Model.Input("model", tooltip="The model without any of the adapters."),
                adapters_in(tooltip="The adapters, each with a prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size that images will have."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The steps of the schedule. Only the first is run."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS)),
                io.String.Input("save_as", default="", tooltip="A name in models/calibrations. Without, nothing is saved."),
                io.Conditioning.Input("neutral", optional=True,
                                      tooltip="A prompt where a merge should change nothing; see neutral_weight of ssr."),
            ],
            [Calibration.Output(display_name="calibration"), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, adapters, latent_image, seed, steps, scheduler, save_as, neutral=None):
        calibration, lines = calibrating.calibrate(model, adapters, latent_image, seed, steps, scheduler, neutral)
        if save_as.strip():
            path = files.calibration(save_as)
            calibration.save(path)
            lines.append(f"saved {path}")
        return shown(calibration, text="\n".join(lines))


class LoraweldLoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return node(
            cls, "Load calibration", "Opens a calibration that Calibrate or the command line saved in models/calibrations.",
            [io.Combo.Input("calibration_name", options=folder_paths.get_filename_list(files.CALIBRATIONS))],
            [Calibration.Output(display_name="calibration")], output=False,
        )  # fmt: skip

    @classmethod
    def execute(cls, calibration_name):
        return io.NodeOutput(loraweld.Calibration.open(folder_paths.get_full_path_or_raise(files.CALIBRATIONS, calibration_name)))


class LoraweldCompare(io.ComfyNode):
    OPTIONS = widgets.of("compare")

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Compare", "Merges by several methods, and tells what each loses.",
            [adapters_in(), calibration_in(optional=False), *widgets.inputs(cls.OPTIONS)], [text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, calibration, **values):
        return shown(text=said(called(loraweld.compare, adapters, calibration, **widgets.given(cls.OPTIONS, values))))


class LoraweldStrengths(io.ComfyNode):
    OPTIONS = widgets.of("strengths")

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Strengths", "Finds the strengths at which the sum of the adapters loses least, and gives them these.",
            [adapters_in(), calibration_in(optional=False), *widgets.inputs(cls.OPTIONS)], [adapters_out(), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, calibration, **values):
        result = called(loraweld.strengths, adapters, calibration, **widgets.given(cls.OPTIONS, values))
        return shown(with_strengths(adapters, result.all("strengths")[0]["blocks"]), text=said(result))


# ---- Looking


class LoraweldInspect(io.ComfyNode):
    OPTIONS = widgets.of("inspect")

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Inspect", "Tells what files hold, and which of their layers match.",
            [adapters_in(), *widgets.inputs(cls.OPTIONS)], [text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, **values):
        return shown(text=said(inspected(adapters, **widgets.given(cls.OPTIONS, values))))


def inspected(adapters, **values):
    return loraweld.run("inspect", loras=[lora.path for lora in adapters], progress=Bar(), **values)


class LoraweldOverlap(io.ComfyNode):
    OPTIONS = widgets.of("inspect", without={"norms", "overlap"})

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Overlap", "Draws how far adapters are in each other's way, for the files and by block and module.",
            [adapters_in(), *widgets.inputs(cls.OPTIONS)], [io.Image.Output(display_name="image"), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, **values):
        result = inspected(adapters, overlap=True, **widgets.given(cls.OPTIONS, values))
        if not (found := result.all("overlap")):
            raise ValueError("there is nothing to overlap: connect two adapters or more with layers in common")
        image = heatmap.image([lora.name for lora in adapters], found[0])
        return io.NodeOutput(image, said(result), ui=ui.PreviewImage(image, cls=cls))


# ---- Files


class LoraweldResize(io.ComfyNode):
    OPTIONS = widgets.of("resize")

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Resize", "Lowers the rank of an adapter, by the singular values of its updates.",
            [adapters_in(), *widgets.inputs(cls.OPTIONS), save_as("loraweld/resized"), calibration_in()],
            [adapters_out(), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, save_as, calibration=None, **values):
        result = loraweld.resize(
            one(adapters).source, output=files.lora(save_as), progress=Bar(), calibration=calibration,
            **arguments(adapters), **widgets.given(cls.OPTIONS, values),
        )  # fmt: skip
        return shown([Lora(result.output, model=adapters[0].model, prompt=adapters[0].prompt)], text=said(result))


class LoraweldConvert(io.ComfyNode):
    OPTIONS = widgets.of("convert", without={"format"})

    @classmethod
    def define_schema(cls):
        spelling = loraweld.options("convert")["format"]
        return node(
            cls, "Convert", "Spells a LoRA as another program does, or makes a LoRA of a LoHa, LoKr or DoRA.",
            [
                adapters_in(),
                io.String.Input("format", default="comfyui", tooltip=spelling.help),
                *widgets.inputs(cls.OPTIONS),
                save_as("loraweld/converted"),
            ],
            [adapters_out(), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, adapters, format, save_as, **values):
        lora = one(adapters)
        result = loraweld.convert(
            lora.path, format.strip(), output=files.lora(save_as), progress=Bar(),
            **arguments(adapters), **widgets.given(cls.OPTIONS, values),
        )  # fmt: skip
        return shown([Lora(result.output, lora.strength, model=lora.model, prompt=lora.prompt)], text=said(result))


class LoraweldBake(io.ComfyNode):
    OPTIONS = widgets.of("bake")

    @classmethod
    def define_schema(cls):
        return node(
            cls, "Bake to file", "Adds adapters to the weights of a model, and saves it in the folder where that is.",
            [
                io.Combo.Input("checkpoint", options=files.models()),
                adapters_in(),
                io.String.Input("save_as", default="loraweld/baked", tooltip="The file's name, to which a number is added."),
                *widgets.inputs(cls.OPTIONS),
            ],
            [io.String.Output(display_name="name"), text_out()],
        )  # fmt: skip

    @classmethod
    def execute(cls, checkpoint, adapters, save_as, **values):
        if not save_as.strip():
            raise ValueError("save_as is empty; a baked model needs a name")
        path, root = files.model(checkpoint)
        output = files.new(root, save_as)
        result = called(partial(loraweld.bake, path), adapters, output, **widgets.given(cls.OPTIONS, values))
        return shown(result.output.name, text=said(result))


NODES = [
    LoraweldAdapter, LoraweldMerge, LoraweldNpLora, *OPTIONS_NODES, LoraweldApply, LoraweldCalibrate,
    LoraweldLoadCalibration, LoraweldCompare, LoraweldStrengths, LoraweldInspect, LoraweldOverlap, LoraweldResize,
    LoraweldConvert, LoraweldBake,
]  # fmt: skip
