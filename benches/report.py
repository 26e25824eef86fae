"""Writes the tables of BENCHMARKS.md from results: `python3 benches/report.py RESULTS.jsonl...`

The table that opens it is of the device that was measured last; the tables of everything are of every device. A result that
was measured again replaces the older one. `--print` prints the tables and leaves the file alone.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

FILE = Path(__file__).parent.parent / "BENCHMARKS.md"

# Seconds on the device that a call of selection should take at most, by widths in and out: with kl, and with fixed weights.
SELECTION = {
    "3072 to 3072": {"kl": 90e-6, "fixed": 50e-6},
    "3072 to 12288": {"kl": 220e-6, "fixed": 130e-6},
    "12288 to 3072": {"kl": 140e-6, "fixed": 80e-6},
}
FLUX = "304 layers"


def load(paths):
    """Results by side and device, in the order that they came in."""
    devices = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            record = json.loads(line)
            # What is submitted is bound by the device, by whose timestamps it counts where it has them.
            if record.get("device_seconds"):
                record |= {"seconds": record["device_seconds"], "wall_seconds": record["seconds"]}
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


def rounded(value):
    return float(f"{value:.3g}")


def rate(value, unit):
    return "–" if not value else f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def share(record):
    if not record.get("floor_seconds"):
        return "–"
    return f"{100 * record['floor_seconds'] / record['seconds']:.2g} % of {record['bound']}"


@dataclass
class Comparison:
    """A piece of work beside those who do the same."""

    label: str
    ours: dict
    # Names and results: of what does the same, of which the fastest counts; and of what is told besides.
    peers: list = field(default_factory=list)
    beside: list = field(default_factory=list)
    # What was asked for: times as fast as the fastest peer, or seconds.
    least: float | None = None
    at_most: float | None = None
    # Whether it is in the table that opens BENCHMARKS.md.
    opening: bool = True

    def peer(self):
        """The fastest peer, if any was measured: its name and its result."""
        measured = [(name, result) for name, result in self.peers if result]
        return min(measured, key=lambda peer: peer[1]["seconds"], default=None)

    def ratio(self, result):
        return rounded(result["seconds"] / self.ours["seconds"])

    def met(self):
        """By the digits that are shown. `None` without a goal, or where what it takes to tell was not measured."""
        if self.at_most is not None:
            return rounded(self.ours["seconds"]) <= self.at_most
        if self.least is not None and (peer := self.peer()):
            return self.ratio(peer[1]) >= self.least
        return None

    def goal(self):
        if self.at_most is None and self.least is None:
            return "–"
        goal = f"ratio ≥ {self.least:g}" if self.at_most is None else f"≤ {time(self.at_most)}"
        return goal + {True: ": met", False: ": **missed**", None: ": not measured"}[self.met()]


def total(*records):
    """Several pieces of work, one after the other."""
    if None in records:
        return None
    keys = ("seconds", "floor_seconds")
    summed = {key: sum(r.get(key) or 0 for r in records) for key in keys}
    limits = max(records, key=lambda r: r.get("floor_seconds") or 0)
    errors = [r["error"] for r in records if r.get("error") is not None]
    return {**summed, "bound": limits.get("bound"), "error": max(errors, default=None)}


def comparisons(ours, theirs):
    """Everything that is compared and was measured here."""
    made = [*of_accumulate(ours, theirs), *of_solve(ours, theirs), *of_ssr(ours, theirs), *of_np_lora(ours, theirs)]
    made += [*of_entries(ours, theirs), *of_selection(ours, theirs), *of_recording(ours), *of_slider(ours)]
    return [comparison for comparison in made if comparison.ours]


def of_accumulate(ours, theirs):
    units = (ours.machine.get("limits") or {}).get("matrix")
    for shape in ours.shapes("accumulate"):
        width, rank, _ = map(int, re.findall(r"\d+", shape))
        mine = lambda variant: ours.get("accumulate", shape, variant)
        peer = lambda variant: (f"PyTorch {variant}", theirs.get("accumulate", shape, variant))
        label = f"accumulate, {width} wide, rank {rank}"
        with_units = [peer("TF32"), peer("f32")]
        if units:
            least = 1 if rank <= 128 else 0.8
            yield Comparison(label, mine("bf16"), with_units[:1], with_units[1:], least=least)
            fast = mine("bf16, fast, A of bf16")
            yield Comparison(f"{label}, A of bf16, fast", fast, with_units[:1], with_units[1:], least=1)
            for more in ("A of bf16", "q, k and v"):
                own = [("loraweld, A of f32, each its own X", mine("bf16"))]
                yield Comparison(f"{label}, {more}", mine(f"bf16, {more}"), with_units[:1], own, opening=False)
        plain = mine("bf16, no matrix units" if units else "bf16")
        yield Comparison(f"{label}, without matrix units", plain, [peer("f32")], least=1)


def of_solve(ours, theirs):
    for shape in ours.shapes("solve"):
        count, order = shape.split("x")
        f64 = ours.get("solve", shape, "f64")
        ways = ("solve", "cholesky_solve")
        peers = [(f"PyTorch `{way}`", theirs.get("solve", shape, f"f64, {way}")) for way in ways]
        label = f"solve, {count} of order {order}"
        yield Comparison(label, f64, peers, least=1)
        double_single = ours.get("solve", shape, "double-single")
        own = [("loraweld in f64", f64)]
        yield Comparison(f"{label}, in double-single", double_single, own, opening=False)


def of_ssr(ours, theirs):
    parts = ("accumulate", "solve and product")
    for shape in ours.shapes("ssr"):
        get = lambda side, variant: side.get("ssr", shape, variant)
        label, formula = f"SSR, {shape.split(' k')[0]}", "authors' formula"
        for part in parts:
            yield Comparison(f"{label}: {part}", get(ours, part), [(formula, get(theirs, part))], opening=False)
        mine, other = (total(*(get(side, part) for part in parts)) for side in (ours, theirs))
        host = total(get(theirs, "accumulate, statistics on the host"), get(theirs, "solve and product"))
        published = [(f"{formula}, G and Q on the host as published", host)]
        yield Comparison(f"{label}: statistics, solve and product", mine, [(formula, other)], published, least=5)
        whole = get(ours, "whole")
        yield Comparison(f"{label}: files to host", whole, [(formula, get(theirs, "whole"))], least=1)
        unhashed = [(f"{formula}, without hashes", get(theirs, "whole, without hashes"))]
        yield Comparison(f"{label}: files to host, hashes here alone", whole, unhashed)


def of_np_lora(ours, theirs):
    for shape in ours.shapes("projectors"):
        label = f"NP-LoRA, {shape.split(' r')[0]}"
        dense = [("dense SVD, extrapolated", theirs.get("projectors", shape, "dense SVD"))]
        for place in ("factors on the device", "factors on the host"):
            mine, loop = ours.get("projectors", shape, place), theirs.get("projectors", shape, f"QR, {place}")
            yield Comparison(f"{label}: projectors, {place}", mine, [("PyTorch's QR loop", loop)], dense, least=10)
    for shape in ours.shapes("merge"):
        mine, loop = (side.get("merge", shape, "np-lora") for side in (ours, theirs))
        yield Comparison(f"NP-LoRA, {shape.split(' r')[0]}: files to host", mine, [("PyTorch's QR loop", loop)])


def of_entries(ours, theirs):
    """Methods that merge entry by entry, and KnOTS, which does so in a smaller space and which PEFT has not."""
    for shape in ours.shapes("merge"):
        mine = lambda method: ours.get("merge", shape, method)
        peft = lambda kind: [(f"PEFT `{kind}`, reckoned", theirs.get("merge", shape, f"PEFT {kind}"))]
        label = lambda method: f"merge {method}, {shape.split(' r')[0]}: files to host"
        at_most = 2.0 if shape.startswith(FLUX) else None
        yield Comparison(label("ties"), mine("ties"), peft("ties_svd"), at_most=at_most)
        dare = peft("dare_linear_svd"), peft("dare_ties_svd")
        yield Comparison(label("dare"), mine("dare"), *dare, at_most=at_most)
        yield Comparison(label("knots"), mine("knots"), at_most=at_most)


def of_selection(ours, theirs):
    for shape in ours.shapes("selection"):
        widths, tokens, _ = shape.rsplit(" ", 2)
        base = theirs.get("base layer", f"{widths} {tokens}", "bf16")
        for how, label in (("kl", "by kl"), ("fixed", "with fixed weights")):
            for dtype in ("f16", "bf16"):
                mine = ours.get("selection", shape, f"{dtype}, {how}")
                beside = [("the base layer, bf16", base)]
                if mine and (limits := ours.machine.get("limits")):
                    large = limits["copies"][-1]
                    copy = {"seconds": mine["bytes"] / max(large["kernel"], large["command"])}
                    beside.append(("reading x and f0, writing the result", copy))
                peer = [("PyTorch, written plainly", theirs.get("selection", shape, f"{dtype}, {how}"))]
                at_most = SELECTION.get(widths, {}).get(how)
                yield Comparison(f"selection {label}, {widths}, {dtype}", mine, peer, beside, at_most=at_most)


def of_recording(ours):
    """The goal is for the best way that there is."""
    for shape in ours.shapes("encode"):
        ways = [r for r in ours.measured() if (r["work"], r["shape"]) == ("encode", shape)]
        best = min(ways, key=lambda r: r["seconds"])
        for way in ways:
            at_most = 2e-3 if way is best and shape.startswith(FLUX) else None
            yield Comparison(f"recording selection for {shape}, {way['variant']}", way, at_most=at_most)


def of_slider(ours):
    for shape in ours.shapes("slider"):
        yield Comparison(f"slider, {shape.split(' r')[0]}", ours.get("slider", shape, "np-lora"), at_most=10e-3)


OPENING = ["work", "loraweld", "best peer", "ratio", "goal", "limit"]


def opening(made):
    rows = []
    for comparison in filter(lambda comparison: comparison.opening, made):
        mine, peer = comparison.ours, comparison.peer()
        # Errors tell something where the other side has one.
        both = peer and mine.get("error") and peer[1].get("error")
        wrong = lambda result: f", error {result['error']:.0e}" if both else ""
        took = lambda result: time(result["seconds"]) + wrong(result)
        beside = ["not measured" if comparison.peers else "–", "–"]
        if peer:
            beside = [f"{peer[0]}: {took(peer[1])}", f"{comparison.ratio(peer[1]):.3g}"]
        limit = f"{time(mine['floor_seconds'])}, {mine['bound']}" if mine.get("floor_seconds") else "–"
        rows.append([comparison.label, took(mine), *beside, comparison.goal(), limit])
    return rows


DETAILS = ["work", "loraweld", "error", "against", "takes", "ratio", "share of the limit"]


def details(made):
    """A row for each rival."""
    rows = []
    for comparison in made:
        mine = comparison.ours
        wrong = "–" if mine.get("error") is None else f"{mine['error']:.1e}"
        for name, result in comparison.peers + comparison.beside:
            takes = [time(result["seconds"]), f"{comparison.ratio(result):.3g}"] if result else ["not measured", "–"]
            rows.append([comparison.label, time(mine["seconds"]), wrong, name, *takes, share(mine)])
    return rows


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
        apart = [time(r[key]) if r.get(key) else "–" for key in ("wall_seconds", "host_seconds")]
        rows.append([r["work"], r["shape"], r["variant"], time(r["seconds"]), *apart, *through, share(r), error])
    return rows


def all_of_pytorch(theirs):
    rows = []
    for r in theirs.measured():
        error = "–" if r["error"] is None else f"{r['error']:.1e}"
        rows.append([r["work"], r["shape"], r["variant"], time(r["seconds"]), error, r["note"] or ""])
    return rows


def measured_with(device, ours, theirs, their_device):
    """What was measured, and on what."""
    mine, other = ours.machine, theirs.machine
    checked = ", **built with checks: not its speed**" if mine.get("checked") else ""
    through = f" through {mine['backend']}, driver {mine['driver']}" if mine.get("backend") else ""
    text = f"loraweld {mine.get('version', '?')}{through}{checked}"
    if other:
        where = "" if their_device == device else f" on {their_device}"
        text += f"; PyTorch {other['version']}, CUDA {other['cuda']}{where}"
        text += f"; measured on {other['date']}" if other.get("date") else ""
    return f"{text}.\n"


def summary(device, ours, theirs, their_device):
    made = comparisons(ours, theirs)
    asked = [comparison.met() for comparison in made if comparison.opening and comparison.met() is not None]
    text = [f"On {device}: {measured_with(device, ours, theirs, their_device)}", table(OPENING, opening(made))]
    if asked:
        text.append(f"Of {len(asked)} goals, {asked.count(False)} are missed.\n")
    return "\n".join(text)


def grown(device, ours):
    """The exponents of the curves, if there are any."""
    header = ["operation", "over", "at", "exponent", "operations'", "within 0.1"]
    if rows := growth(ours):
        return f"Exponents on {device}:\n\n{table(header, rows)}"


def section(device, ours, theirs, their_device):
    mine, other = ours.machine, theirs.machine
    text = [f"### {device}\n", measured_with(device, ours, theirs, their_device)]
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
    if rows := details(comparisons(ours, theirs)):
        text.append(table(DETAILS, rows))
    if rows := everything(ours):
        text.append("<details><summary>Everything that was measured</summary>\n")
        header = ["work", "shape", "variant", "time", "by the clock", "to record", "moved", "computed"]
        header += ["share of the limit", "error"]
        text.append(table(header, rows))
        if rows := all_of_pytorch(theirs):
            text.append(table(["in PyTorch", "shape", "variant", "time", "error", ""], rows))
        text.append("</details>\n")
    return "\n".join(text)


def between(text, name, replacement):
    """The text with what stands between two markers replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        sys.exit(f"{FILE} has no place for the tables: no `{begin}` and `{end}`")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{replacement}{end}{after}"


def main(arguments):
    devices = load(a for a in arguments if a != "--print")
    theirs = {device: records for (side, device), records in devices.items() if side == "pytorch"}
    measured = []
    for (side, device), records in devices.items():
        if side == "loraweld":
            other = device if device in theirs else next(iter(theirs), None)
            measured.append((device, Results(records), Results(theirs.get(other)), other))
    if not measured:
        sys.exit("no results of loraweld's own")
    tables = {"in short": summary(*measured[-1]), "measured": "\n".join(section(*of) for of in measured)}
    # Growth takes long and is seldom measured again: without it, what is there stays.
    for device, ours, *_ in measured:
        if curves_grown := grown(device, ours):
            tables["growth"] = curves_grown
    if "--print" in arguments:
        return print(*tables.values(), sep="\n")
    text = FILE.read_text()
    for name, written in tables.items():
        text = between(text, name, written)
    FILE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
