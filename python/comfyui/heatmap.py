"""How far adapters are in each other's way, as an image."""

import re

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LINE = 28, 2, 16
FONT = ImageFont.load_default()
SCALE = numpy.array([(255, 255, 229), (254, 217, 118), (253, 141, 60), (227, 26, 28), (128, 0, 38)], float)
"""From no overlap to all of it; the numbers are what cannot be seen."""
INK, PAPER, NOTHING = (20, 20, 20), (255, 255, 255), (235, 235, 235)


def split(layer):
    """The block that a layer is in, and its name there."""
    found = re.match(r"(.*?[._]\d+)[._](.+)", layer)
    return (found[1], found[2]) if found else ("", layer)


def image(names, overlap):
    """Two maps below each other: adapters × adapters, and blocks × modules with the largest share of any two."""
    pairs = [[None if i == j else cell["disturbs"] for j, cell in enumerate(row)] for i, row in enumerate(overlap["all"])]
    found = {}
    for layer in overlap["layers"]:
        shares = [cell["disturbs"] for i, row in enumerate(layer["pairs"]) for j, cell in enumerate(row) if i != j]
        at = split(layer["layer"])
        found[at] = max([found.get(at, 0.0), *shares])
    blocks, modules = (in_order([at[side] for at in found]) for side in (0, 1))
    inside = [[found.get((block, module)) for module in modules] for block in blocks]
    maps = [
        drawn("Share of an update (row) that also reads what another adapter (column) reads, in %", names, names, pairs),
        drawn("The same by block and module: the largest share of any two adapters, in %", blocks, modules, inside),
    ]
    whole = Image.new("RGB", (max(m.width for m in maps), sum(m.height for m in maps)), PAPER)
    top = 0
    for part in maps:
        whole.paste(part, (0, top))
        top += part.height
    return torch.from_numpy(numpy.asarray(whole, numpy.float32) / 255)[None]


def in_order(names):
    """Each name once: kinds as they come, and those of a kind by their numbers."""
    kinds = list(dict.fromkeys(re.sub(r"\d+", "0", name) for name in names))
    return sorted(set(names), key=lambda name: (kinds.index(re.sub(r"\d+", "0", name)), [int(n) for n in re.findall(r"\d+", name)]))


def drawn(title, rows, columns, values):
    """A map with a title, names and numbers."""
    left = LINE + max((width(row) for row in rows), default=0) + LINE // 2
    head = max((width(column) for column in columns), default=0) + LINE // 2
    size = (max(left + len(columns) * CELL, LINE + width(title)) + LINE, 2 * LINE + LINE // 2 + head + len(rows) * CELL + LINE)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((LINE, LINE // 2), title, fill=INK, font=FONT)
    top = 2 * LINE + head
    for at, column in enumerate(columns):
        upright(sheet, column, (left + at * CELL, top - LINE // 2))
    for y, row in enumerate(rows):
        draw.text((left - width(row) - LINE // 2, top + y * CELL + 8), row, fill=INK, font=FONT)
        for x, value in enumerate(values[y]):
            box = (left + x * CELL, top + y * CELL, left + (x + 1) * CELL - GAP, top + (y + 1) * CELL - GAP)
            draw.rectangle(box, fill=colour(value))
            if value is not None:
                text = f"{100 * value:.0f}"
                ink = PAPER if value > 0.6 else INK
                draw.text((box[0] + (CELL - GAP - width(text)) / 2, box[1] + 7), text, fill=ink, font=FONT)
    return sheet


def upright(sheet, text, foot):
    """Writes a column's name, from below to above."""
    strip = Image.new("RGB", (width(text) + 2, LINE), PAPER)
    ImageDraw.Draw(strip).text((0, 2), text, fill=INK, font=FONT)
    turned = strip.rotate(90, expand=True)
    sheet.paste(turned, (foot[0] + (CELL - LINE) // 2, foot[1] - turned.height))


def width(text):
    return int(FONT.getlength(text)) + 1


def colour(value):
    if value is None:
        return NOTHING
    place = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    return tuple(int(c) for c in SCALE[low] + (SCALE[low + 1] - SCALE[low]) * (place - low))
