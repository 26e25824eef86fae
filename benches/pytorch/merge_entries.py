"""PEFT's own merges entry by entry, beside `ties` and `dare` of benches/merge.rs: two adapters of rank 32, whose merge keeps
that rank. PEFT forms every update and takes its SVD, layer by layer.

One layer of each shape of FLUX.1 is merged, from adapters on the device to one on the device, in f32; a whole adapter is
reckoned from those times and how many layers have each shape. The SVDs are thin ones, which PEFT does not take by itself
and which are faster.
"""

import sys
import time
from collections import Counter

import torch
from common import DEVICE, LAYERS, record, sized, tf32, wait

try:
    import peft
except ImportError as e:
    print(f"PEFT's merges are left out: {e}")
    sys.exit()

RANK = 32
NAMES = ["one", "two"]
DENSITY = 0.5


def model(width_in, width_out):
    """A layer with two adapters; PEFT makes B zero, here it is not."""
    torch.manual_seed(width_in + width_out)
    layer = torch.nn.Sequential(torch.nn.Linear(width_in, width_out, bias=False, device=DEVICE))
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    adapted = peft.PeftModel(layer, config, adapter_name=NAMES[0])
    adapted.add_adapter(NAMES[1], config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / max(parameter.shape) ** 0.5)
    return adapted


def merged(adapted, kind):
    """Seconds of one merge."""
    name = f"merged by {kind}"
    wait()
    start = time.perf_counter()
    adapted.add_weighted_adapter(
        NAMES, [1.0, 1.0], name, combination_type=kind, density=DENSITY, svd_full_matrices=False
    )
    wait()
    took = time.perf_counter() - start
    factors = [p for n, p in adapted.named_parameters() if f".{name}." in n]
    assert len(factors) == 2 and all(RANK in f.shape and f.any() for f in factors), "merged factors"
    return took


def main():
    tf32(False)
    counts = Counter(LAYERS)
    for kind in ["ties_svd", "dare_linear_svd", "dare_ties_svd"]:
        # Libraries load and clocks rise with the first.
        merged(model(*sized((1024, 1024), (64, 64))), kind)
        total = 0.0
        for (width_in, width_out), count in counts.items():
            took = merged(model(width_in, width_out), kind)
            record("merge", f"{width_in} to {width_out} r{RANK}", f"PEFT {kind}, one layer", took)
            total += count * took
        note = f"reckoned from one layer of each of {len(counts)} shapes; PEFT {peft.__version__}"
        record("merge", f"{len(LAYERS)} layers r{RANK}", f"PEFT {kind}", total, note=note)


main()
