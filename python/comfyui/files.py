"""Where nodes read and write. A workflow names files of ComfyUI's folders, and no others."""

from pathlib import Path

import folder_paths

CALIBRATIONS = "loraweld_calibrations"
folder_paths.add_model_folder_path(CALIBRATIONS, str(Path(folder_paths.models_dir) / "calibrations"))

MODEL_FOLDERS = ("diffusion_models", "checkpoints")


def models():
    """The models that there are, each with its folder in front."""
    return [f"{folder}/{name}" for folder in MODEL_FOLDERS for name in folder_paths.get_filename_list(folder)]


def model(choice):
    """The path of one of `models`, and the folder that its name begins in."""
    folder, name = choice.split("/", 1)
    if folder not in MODEL_FOLDERS:
        raise ValueError(f"`{choice}` is in none of {', '.join(MODEL_FOLDERS)}")
    path = Path(folder_paths.get_full_path_or_raise(folder, name))
    return path, next(root for root in map(Path, folder_paths.get_folder_paths(folder)) if path.is_relative_to(root))


def lora(name):
    """A path for a new LoRA."""
    return new(folder_paths.get_folder_paths("loras")[0], name)


def calibration(name):
    return new(folder_paths.get_folder_paths(CALIBRATIONS)[0], name, ".calibration.safetensors")


def report():
    return new(folder_paths.get_output_directory(), "loraweld/report", ".html")


def new(root, name, ending=".safetensors"):
    """A path for a new file below a folder, numbered so that none is overwritten; without a name, below the folder for
    temporary files."""
    if not name.strip():
        root, name = folder_paths.get_temp_directory(), "loraweld"
    root = Path(root).absolute()
    root.mkdir(parents=True, exist_ok=True)
    place, stem, count, _, _ = folder_paths.get_save_image_path(name.strip(), str(root))
    return Path(place) / f"{stem}_{count:05}_{ending}"
