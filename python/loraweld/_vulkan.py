"""Vulkan's loader in processes that have other functions of the same names."""

import os
import sys


def keep_apart() -> None:
    """Opens Vulkan's loader so that it calls its own functions.

    A library that was loaded with its symbols for all, as ComfyUI loads ANGLE on Linux, has functions of Vulkan in it. The
    loader, opened later, would call those in place of its own, which ends the process when devices are listed.
    """
    if sys.platform != "linux" or not hasattr(os, "RTLD_DEEPBIND"):
        return
    import ctypes

    if hasattr(ctypes.CDLL(None), "vkGetInstanceProcAddr"):
        try:
            ctypes.CDLL("libvulkan.so.1", mode=os.RTLD_NOW | os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        except OSError:
            pass  # Without the loader there is no Vulkan, and nothing to keep apart.
