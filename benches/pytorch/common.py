"""What the scripts share: the device, timing as the Rust benches do it, and results as JSON lines.

Without CUDA the scripts run tiny shapes on the CPU, to see that they work.
"""

import json
import os
import statistics
import time

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAME = torch.cuda.get_device_name() if CUDA else "CPU"

DOUBLE = [(3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 18432)] * 2
SINGLE = [(3072, 21504), (15360, 3072), (3072, 9216)]
# Widths (in, out) of the 304 layers of a LoRA for FLUX.1; without CUDA those of two small blocks.
LAYERS = DOUBLE * 19 + SINGLE * 38 if CUDA else [(i // 24, o // 24) for i, o in DOUBLE + SINGLE]


def sized(large, small):
    return large if CUDA else small


def wait():
    if CUDA:
        torch.cuda.synchronize()


def write(**record):
    record = {"side": "pytorch", "device": NAME, **record}
    if path := os.environ.get("LORAWELD_BENCH_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


def seconds(call, warm_up=0.3, total=1.0, samples=10):
    """Median of several timings of many calls, which are waited for once: a device that is kept busy."""
    if not CUDA:
        warm_up, total, samples = 0.0, 0.0, 1
    call()
    wait()
    spent, once = 0.0, 0.0
    while spent <= warm_up:
        start = time.perf_counter()
        call()
        wait()
        once = time.perf_counter() - start
        spent += once
    calls = max(1, int(total / samples / once))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def measure(work, shape, variant, call, calls=1, error=None, note=None, **how):
    """Times `call`, which does the work `calls` times."""
    took = seconds(call, **how) / calls
    record(work, shape, variant, took, error, note)
    return took


def record(work, shape, variant, took, error=None, note=None):
    more = f", error {error:.1e}" if error is not None else ""
    print(f"{work} {shape} [{variant}]: {took * 1e3:.4f} ms{more}{', ' + note if note else ''}", flush=True)
    write(work=work, shape=shape, variant=variant, seconds=took, error=error, note=note)


def tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = on


def many(tokens, width, dtype):
    """Activations, as many as it takes for the caches to hold none of them when their turn comes again."""
    one = tokens * width * torch.empty(0, dtype=dtype).element_size()
    count = sized(max(2, -(-(256 << 20) // one)), 1)
    return [(2 * torch.rand(tokens, width, device=DEVICE) - 1).to(dtype) for _ in range(count)]


def relative(got, want):
    return (torch.linalg.norm(got.double() - want) / torch.linalg.norm(want)).item()


def machine():
    """What this runs on, and what a copy of 512 MiB reaches, bytes read and written."""
    source = torch.empty(sized(512 << 20, 1 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), total=0.3)
    print(f"{torch.__version__}, {NAME}: a copy moves {copy / 1e9:.0f} GB/s", flush=True)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    write(work="machine", version=torch.__version__, cuda=torch.version.cuda, copy=copy, date=today)


torch.manual_seed(0)
machine()
