"""Draw docs/architecture.svg: folders by the table of imports, and the path of a gradient.

pip install matplotlib; python scripts/draw_architecture.py
"""

import itertools
import re
import runpy
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "hvdtrain"  # the same file on each run
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
IMPORTS = runpy.run_path(str(ROOT / "tests/test_layout.py"))["IMPORTS"]
DOCUMENT = (ROOT / "docs/architecture.md").read_text()


def rows() -> list[list[str]]:
    """Place each folder below all that import it: the row is the longest chain of imports under it."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max(map(depth_of, IMPORTS[name]), default=-1)
        return depth[name]

    found: dict[int, list[str]] = {}
    for name in IMPORTS:
        found.setdefault(depth_of(name), []).append(name)
    return [sorted(found[row]) for row in sorted(found)]


def path_of_a_gradient() -> list[str]:
    """Return the folders on the path, in order, from the lists in the document."""
    files: list[str] = []
    for name in ("trace", "mpi"):
        (block,) = re.findall(rf"```text {name}\n(.*?)```", DOCUMENT, re.DOTALL)
        files += block.split()
    folders = [file.partition("/")[0] for file in files]
    return [name for index, name in enumerate(folders) if index == 0 or name != folders[index - 1]]


def main() -> None:
    """Draw the figure."""
    layers = rows()
    widest = max(map(len, layers))
    figure, axes = plt.subplots(figsize=(1.25 * widest, 0.95 * len(layers)))
    place = {}
    for row, names in enumerate(layers):
        for column, name in enumerate(names):
            place[name] = ((column + 0.5) * widest / len(names) * 1.25, row)
    for name, others in IMPORTS.items():
        for other in others:
            axes.plot(*zip(place[name], place[other], strict=True), color="0.85", linewidth=0.8, zorder=1)
    path = path_of_a_gradient()
    for index, (start, end) in enumerate(itertools.pairwise(path)):
        axes.annotate(
            "",
            place[end],
            place[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "tab:blue",
                "linewidth": 1.8,
                "shrinkA": 14,
                "shrinkB": 14,
                "connectionstyle": f"arc3,rad={0.12 if index % 2 else -0.12}",
            },
            zorder=2,
        )
    for name, (x, y) in place.items():
        style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.4"}
        if name in path:
            style |= {"edgecolor": "tab:blue", "facecolor": "aliceblue"}
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox=style, zorder=3)
    axes.set_xlim(0, widest * 1.25)
    axes.set_ylim(-0.5, len(layers) - 0.5)
    axes.axis("off")
    figure.savefig(ROOT / "docs/architecture.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
