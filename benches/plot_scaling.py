"""Draws docs/scaling.png from the results of benches/scaling.rs, and prints the exponents:
`python3 benches/plot_scaling.py RESULTS.jsonl... [--device NAME] [-o PICTURE]`. Needs matplotlib."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import Results, curves, exponents, load

COLUMNS = [("layers",), ("tokens",), ("width",), ("rank", "order"), ("adapters",)]
MEASURED, THEORY, TEXT = "#0b6e99", "#b0b0b0", "#404040"


def draw(axes, over, fixed, points):
    x, seconds, model = zip(*points)
    measured, theory = exponents(points)
    # The theory meets the last point.
    scale = seconds[-1] / model[-1]
    axes.loglog(x, [1e3 * scale * m for m in model], color=THEORY, lw=2, label=f"operations: {theory:.2f}")
    axes.loglog(x, [1e3 * s for s in seconds], "o-", color=MEASURED, ms=3.5, lw=1.2, label=f"measured: {measured:.2f}")
    axes.set_xlabel(f"{over}\n({fixed})", fontsize=7, color=TEXT)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=7, frameon=False, loc="upper left", handlelength=1.2)
    axes.tick_params(labelsize=7, colors=TEXT)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.25)
    return measured, theory


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--device", help="part of the name of the device; the first with curves by default")
    parser.add_argument("-o", default=Path(__file__).parent.parent / "docs" / "scaling.png")
    arguments = parser.parse_args()
    ours = {device: Results(r) for (side, device), r in load(arguments.results).items() if side == "loraweld"}
    found = {device: curves(r) for device, r in ours.items() if (arguments.device or "") in device}
    device, found = next(((d, c) for d, c in found.items() if c), (None, None))
    if not found:
        raise SystemExit("no curves in these results: run benches/scaling.rs with LORAWELD_BENCH_RESULTS")
    operations = list(dict.fromkeys(operation for operation, _, _ in found))
    figure, grid = plt.subplots(
        len(operations), len(COLUMNS), figsize=(2.5 * len(COLUMNS), 2.3 * len(operations)), squeeze=False
    )
    for row, operation in zip(grid, operations):
        first = True
        for axes, overs in zip(row, COLUMNS):
            curve = next(((k, p) for k, p in found.items() if k[0] == operation and k[1] in overs and len(p) > 1), None)
            if curve is None:
                axes.set_visible(False)
                continue
            (_, over, fixed), points = curve
            measured, theory = draw(axes, over, fixed, points)
            print(f"{operation:<11} {over:<9} exponent {measured:.2f}, of operations {theory:.2f}  ({fixed})")
            if first:
                axes.set_ylabel(f"{operation}\nms", fontsize=8, color=TEXT)
                first = False
    title = f"Time on {device}. Exponents are fitted to the last four points, where the device is full."
    figure.suptitle(title, fontsize=9, color=TEXT)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(arguments.o, dpi=130)


if __name__ == "__main__":
    main()
