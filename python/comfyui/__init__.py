"""loraweld's nodes for ComfyUI. The README beside this file says what each does."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES


class Extension(ComfyExtension):
    async def get_node_list(self):
        return NODES


def comfy_entrypoint():
    return Extension()
