"""Writes the tables of BENCHMARKS.md from results: `python3 benches/report.py RESULTS.jsonl...`

A result that was measured again replaces the older one. `--print` prints the tables and leaves the file alone.
"""

import json
import math
import re
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "BENCHMARKS.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def load(paths):
    """Results by side and device, in the order that they came in."""
    devices = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            record = json.loads(line)
            key = tuple(record.get(k) for k in ("work", "shape", "variant", "operation", "over", "fixed", "x"))
            devices.setdefault((record["side"], record["device"]), {})[key] = record
    return devices


class Results:
    """What one side measured on one device."""

    def __init__(self, records):
        self.records = list((records or {}).values())
        self.machine = next((r for r in self.records if r["work"] == "machine"), {})

    def get(self, work, shape, variant):
        found = (r for r in self.records if (r["work"], r.get("shape"), r.get("variant")) == (work, shape, variant))
        return next(found, None)

    def measured(self):
        return [r for r in self.records if r["work"] not in ("machine", "scaling")]

    def shapes(self, work):
        return list(dict.fromkeys(r["shape"] for r in self.records if r["work"] == work))


def time(seconds):
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"


def rate(value, unit):
    return "–" if not value else f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def share(record):
    if not record.get("floor_seconds"):
        return "–"
    return f"{100 * record['floor_seconds'] / record['seconds']:.2g} % of {record['bound']}"


class Targets:
    """Rows of the table of targets."""

    HEADER = ["work", "loraweld", "error", "against", "takes", "times faster", "target", "met", "share of the limit"]

    def __init__(self):
        self.rows = []

    def add(self, label, ours, name, theirs, least=None, error=None):
        """`least`: times faster that `ours` must be than `theirs`; `error`: the most that it may have."""
        if ours is None:
            return
        seconds = theirs["seconds"] if theirs else None
        faster = seconds / ours["seconds"] if seconds else None
        wrong = ours.get("error")
        target = [] if least is None else [f"{least:g} times"]
        target += [] if error is None else [f"error {error:.0e}"]
        known = (least is None or faster is not None) and (error is None or wrong is not None)
        met = (least is None or (faster or 0) >= least) and (error is None or (wrong is not None and wrong <= error))
        self.rows.append(
            [
                label,
                time(ours["seconds"]),
                "–" if wrong is None else f"{wrong:.1e}",
                name,
                time(seconds) if seconds else "not measured",
                f"{faster:.3g}" if faster else "–",
                ", ".join(target) or "–",
                "–" if not target else "?" if not known else "yes" if met else "**no**",
                share(ours),
            ]
        )


def fastest(*records):
    return min((r for r in records if r), key=lambda r: r["seconds"], default=None)


def total(*records):
    """Several pieces of work, one after the other."""
    if None in records:
        return None
    keys = ("seconds", "floor_seconds")
    summed = {key: sum(r.get(key) or 0 for r in records) for key in keys}
    limits = max(records, key=lambda r: r.get("floor_seconds") or 0)
    errors = [r["error"] for r in records if r.get("error") is not None]
    return {**summed, "bound": limits.get("bound"), "error": max(errors, default=None)}


def targets(ours, theirs):
    rows = Targets()
    for shape in ours.shapes("accumulate"):
        rank = int(re.search(r"r(\d+)", shape)[1])
        get = lambda side, variant: side.get("accumulate", shape, variant)
        plain = get(ours, "bf16, no matrix units")
        if (ours.machine.get("limits") or {}).get("matrix"):
            rows.add(f"accumulate {shape}", get(ours, "bf16"), "PyTorch f32", get(theirs, "f32"), 3, 2e-6)
            least = 2 if rank <= 128 else 1
            rows.add(f"accumulate {shape}", get(ours, "bf16"), "PyTorch TF32", get(theirs, "TF32"), least, 2e-6)
        else:
            plain = get(ours, "bf16")
        label = f"accumulate {shape}, no matrix units"
        rows.add(label, plain, "PyTorch f32", get(theirs, "f32"), 1, 2e-6)
    for shape in ours.shapes("solve"):
        get = lambda side, variant: side.get("solve", shape, variant)
        best = fastest(get(theirs, "f64, solve"), get(theirs, "f64, cholesky_solve"))
        rows.add(f"solve {shape}, f64", get(ours, "f64"), "PyTorch f64, LU or Cholesky", best, 1, 1e-10)
        double_single = get(ours, "double-single")
        rows.add(f"solve {shape}, double-single", double_single, "loraweld f64", get(ours, "f64"), 0.25, 1e-10)
    for shape in ours.shapes("ssr"):
        get = lambda side, variant: side.get("ssr", shape, variant)
        for part in ("accumulate", "solve and product"):
            rows.add(f"SSR {shape}, {part}", get(ours, part), "authors' formula", get(theirs, part))
        both = [total(*(get(side, part) for part in ("accumulate", "solve and product"))) for side in (ours, theirs)]
        rows.add(f"SSR {shape}, both", both[0], "authors' formula", both[1], 5)
        host = total(get(theirs, "accumulate, statistics on the host"), get(theirs, "solve and product"))
        rows.add(f"SSR {shape}, both", both[0], "with G and Q on the host, as published", host)
        rows.add(f"SSR {shape}, files to host", get(ours, "whole"), "authors' formula", get(theirs, "whole"))
    for shape in ours.shapes("projectors"):
        get = lambda side, variant: side.get("projectors", shape, variant)
        for place in ("factors on the device", "factors on the host"):
            mine = get(ours, place)
            rows.add(f"NP-LoRA projectors {shape}, {place}", mine, "PyTorch QR loop", get(theirs, f"QR, {place}"), 10)
            dense = get(theirs, "dense SVD")
            rows.add(f"NP-LoRA projectors {shape}, {place}", mine, "dense SVD, extrapolated", dense, 10_000)
        merged = ours.get("merge", shape, "np-lora")
        rows.add(f"NP-LoRA {shape}, files to host", merged, "PyTorch QR loop", theirs.get("merge", shape, "np-lora"))
    for shape in ours.shapes("selection"):
        mine = ours.get("selection", shape, "f16, kl")
        if mine is None:
            continue
        large = ours.machine["limits"]["copies"][-1]
        copy = {"seconds": mine["bytes"] / max(large["kernel"], large["command"])}
        rows.add(f"selection {shape}, f16", mine, "reading x and f0, writing the result", copy, 0.25)
        base = theirs.get("base layer", shape.rsplit(" ", 1)[0], "bf16")
        rows.add(f"selection {shape}, f16", mine, "the base layer, bf16", base)
        rows.add(f"selection {shape}, f16", mine, "PyTorch, written plainly", theirs.get("selection", shape, "f16, kl"))
    for shape in ours.shapes("slider"):
        limit = {"seconds": 0.010}
        rows.add(f"slider {shape}", ours.get("slider", shape, "np-lora"), "10 ms", limit, 1)
    return rows.rows


def curves(results):
    """Points (x, seconds, model) of each curve, by (operation, over, fixed)."""
    found = {}
    for r in results.records:
        if r["work"] == "scaling":
            points = found.setdefault((r["operation"], r["over"], r["fixed"]), [])
            points.append((r["x"], r["seconds"], r["model"]))
    return {key: sorted(points) for key, points in found.items()}


def exponents(points):
    """Measured and theoretical exponent by least squares on the last four points, where the device is full."""
    points = points[-4:]
    x = [math.log(p[0]) for p in points]
    mean = sum(x) / len(x)

    def slope(values):
        y = [math.log(v) for v in values]
        return sum((a - mean) * b for a, b in zip(x, y)) / sum((a - mean) ** 2 for a in x)

    return slope([p[1] for p in points]), slope([p[2] for p in points])


def growth(ours):
    rows = []
    for (operation, over, fixed), points in curves(ours).items():
        if len(points) < 2:
            continue
        measured, theory = exponents(points)
        wanted = over in ("layers", "tokens", "width")
        met = "yes" if abs(measured - theory) <= 0.1 else "**no**"
        ends = f"{points[-4:][0][0]} to {points[-1][0]}"
        rows.append([operation, f"{over}, {ends}", fixed, f"{measured:.2f}", f"{theory:.2f}", met if wanted else "–"])
    return rows


def everything(ours):
    rows = []
    for r in ours.measured():
        moved = max(r["bytes"], r["link_bytes"])
        through = [rate(moved / r["seconds"], "B/s"), rate(r["flops"] / r["seconds"], "flop/s")]
        error = "–" if r["error"] is None else f"{r['error']:.1e}"
        rows.append([r["work"], r["shape"], r["variant"], time(r["seconds"]), *through, share(r), error])
    return rows


def all_of_pytorch(theirs):
    rows = []
    for r in theirs.measured():
        error = "–" if r["error"] is None else f"{r['error']:.1e}"
        rows.append([r["work"], r["shape"], r["variant"], time(r["seconds"]), error, r["note"] or ""])
    return rows


def section(device, ours, theirs, their_device):
    mine, other = ours.machine, theirs.machine
    text = [f"### {device}\n"]
    checked = ", **built with checks: not its speed**" if mine.get("checked") else ""
    through = f" through {mine['backend']}, driver {mine['driver']}" if mine.get("backend") else ""
    text.append(f"loraweld {mine.get('version', '?')}{through}{checked}")
    if other:
        where = "" if their_device == device else f" on {their_device}"
        text[-1] += f"; PyTorch {other['version']}, CUDA {other['cuda']}{where}"
    text[-1] += ".\n"
    limits = mine.get("limits") or {}
    copies = [("kernel", "a kernel that copies {} MiB"), ("command", "`copy_buffer_to_buffer` of {} MiB")]
    rows = [
        ["memory, read and written", rate(of[way], "B/s"), by.format(of["bytes"] >> 20)]
        for way, by in copies
        for of in limits.get("copies", [])
    ]
    rows += [
        ["memory, read and written", rate(other.get("copy"), "B/s"), "PyTorch's `copy_` of 512 MiB"],
        ["device to host", rate(limits.get("link"), "B/s"), "`copy_buffer_to_buffer`"],
        ["f32", rate(limits.get("f32"), "flop/s"), "multiply-adds in registers"],
        ["f64", rate(limits.get("f64"), "flop/s"), "multiply-adds in registers"],
        ["matrix units, f16 to f32", rate(limits.get("matrix"), "flop/s"), "products in registers"],
    ]
    text.append(table(["limit", "measured", "by"], [row for row in rows if row[1] != "–"]))
    if rows := targets(ours, theirs):
        text.append(table(Targets.HEADER, rows))
    if rows := growth(ours):
        text.append("Growth: exponents fitted to the last points of each curve, where the device is full.\n")
        text.append(table(["operation", "over", "at", "exponent", "operations'", "within 0.1"], rows))
    if rows := everything(ours):
        text.append("<details><summary>Everything that was measured</summary>\n")
        header = ["work", "shape", "variant", "time", "moved", "computed", "share of the limit", "error"]
        text.append(table(header, rows))
        if rows := all_of_pytorch(theirs):
            text.append(table(["in PyTorch", "shape", "variant", "time", "error", ""], rows))
        text.append("</details>\n")
    return "\n".join(text)


def main(arguments):
    devices = load(a for a in arguments if a != "--print")
    theirs = {device: records for (side, device), records in devices.items() if side == "pytorch"}
    sections = []
    for (side, device), records in devices.items():
        if side == "loraweld":
            other = device if device in theirs else next(iter(theirs), None)
            sections.append(section(device, Results(records), Results(theirs.get(other)), other))
    text = "\n".join(sections)
    if "--print" in arguments:
        return print(text)
    before, rest = FILE.read_text().split(BEGIN)
    _, after = rest.split(END)
    FILE.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
