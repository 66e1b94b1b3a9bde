"""Draws docs/layers.svg: the layers of the package, and how many modules of each import from which.

    python docs/draw_layers.py     # or make docs

The layers and their order are those that `make lint` holds (`pyproject.toml`), the sentences those with which the packages open.
"""

from __future__ import annotations

import ast
import math
import sys
import tomllib
from collections import Counter
from html import escape
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "winnow"
PICTURE = REPOSITORY / "docs" / "layers.svg"
COMMANDS = "train.py  compress.py  evaluate.py  search.py"
ROW, TOP, LEFT, BOX, RIGHT = 46, 20, 20, 760, 300  # pixels


def layers() -> list[str]:
    """The names of the layers, the highest first."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    names: list[str] = next(c["layers"] for c in settings["contracts"] if c["type"] == "layers")
    return names


def described(layer: str) -> tuple[str, int, int]:
    """The first sentence of a layer, and how many modules and lines it has."""
    folder = PACKAGE / layer
    head = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    files = [file for file in folder.rglob("*.py") if file.stat().st_size] if folder.is_dir() else [head]
    text = ast.get_docstring(ast.parse(head.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).replace("`", "")
    return sentence, len(files), sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def imports() -> Counter[tuple[str, str]]:
    """How many imports there are from each layer to each lower one."""
    sys.path.insert(0, str(PACKAGE.parent))
    graph = grimp.build_graph("winnow", cache_dir=None)
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            upper, lower = ([*name.split("."), ""][1] for name in (module, imported))
            if upper and lower and upper != lower:
                counts[upper, lower] += 1
    return counts


def picture() -> str:
    """The SVG."""
    names, counts = layers(), imports()
    centre = {name: TOP + ROW * (row + 1) + ROW // 2 for row, name in enumerate(names)}
    height = TOP + ROW * (len(names) + 1) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + BOX + RIGHT}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="100%" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT + 12}" y="{TOP + ROW // 2 + 4}" font-weight="bold" fill="#444444">{COMMANDS}</text>',
    ]
    for (upper, lower), count in sorted(counts.items(), key=lambda item: item[1]):
        start, end, x = centre[upper], centre[lower], LEFT + BOX
        bend = x + min(RIGHT - 20, 20 + 22 * math.sqrt((end - start) / ROW * 4))
        parts.append(
            f'<path d="M{x} {start} C{bend:.0f} {start} {bend:.0f} {end} {x} {end}" fill="none" stroke="#3b6ea5" '
            f'stroke-opacity="0.45" stroke-width="{0.6 + math.sqrt(count) / 2:.1f}"><title>{upper} imports from {lower}: '
            f"{count}</title></path>"
        )
    for name in names:
        sentence, modules, lines = described(name)
        y = centre[name] - ROW // 2 + 3
        size = f"{modules} modules, {lines:,} lines" if modules > 1 else f"{lines} lines"
        parts += [
            f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{ROW - 6}" rx="5" fill="#eef3f9" stroke="#b9cbe0"/>',
            f'<text x="{LEFT + 12}" y="{y + 17}" font-weight="bold" fill="#1d3f66">{name}</text>',
            f'<text x="{LEFT + BOX - 12}" y="{y + 17}" text-anchor="end" fill="#777777" font-size="11">{size}</text>',
            f'<text x="{LEFT + 12}" y="{y + 33}" fill="#333333" font-size="12">{escape(sentence)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE.relative_to(REPOSITORY))
