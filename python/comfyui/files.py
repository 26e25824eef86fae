"""Where nodes read and write. A workflow names files of ComfyUI's folders, and no others."""

from pathlib import Path

import folder_paths

CALIBRATIONS = "loraweld_calibrations"
folder_paths.add_model_folder_path(CALIBRATIONS, str(Path(folder_paths.models_dir) / "calibrations"))

MODEL_FOLDERS = ("diffusion_models", "checkpoints")


def models():
    """The models that there are, each with its folder in front."""
    return [f"{folder}/{name}" for folder in MODEL_FOLDERS for name in folder_paths.get_filename_list(folder)]


def model_path(choice):
    """The path of one of `models`."""
    folder, name = choice.split("/", 1)
    if folder not in MODEL_FOLDERS:
        raise ValueError(f"`{choice}` is in none of {', '.join(MODEL_FOLDERS)}")
    return folder_paths.get_full_path_or_raise(folder, name)


def new(folder, name, ending=".safetensors"):
    """A path for a new file of one of ComfyUI's folders, numbered so that none is overwritten; without a name, of its
    folder for temporary files."""
    if not name.strip():
        root, name = folder_paths.get_temp_directory(), "loraweld"
    elif folder == "output":
        root = folder_paths.get_output_directory()
    else:
        root = folder_paths.get_folder_paths(folder)[0]
    root = Path(root).absolute()
    root.mkdir(parents=True, exist_ok=True)
    place, stem, count, _, _ = folder_paths.get_save_image_path(name.strip(), str(root))
    return Path(place) / f"{stem}_{count:05}_{ending}"

