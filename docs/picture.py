"""Draw README's picture: `python docs/picture.py [FILE.png]`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from PIL import Image

from query_detr.layout import QueryLayout
from query_detr.use.plots import NOISE, OTHER_GROUP, PREDICTION, show_visibility

N, K, SETS, SLOTS = 8, 4, 2, 5
MODELS = {
    "Conditional DETR, DAB-DETR": QueryLayout(N),
    "DN-DETR": QueryLayout(N, 1, SETS, SLOTS),
    "Group DETR": QueryLayout(N, K),
    "DN-DETR + groups": QueryLayout(N, K, SETS, SLOTS),
}


def draw(file: Path) -> None:
    """Draw who sees whom in the models of the book."""
    figure, axes = plt.subplots(1, 4, figsize=(12, 4.3))
    figure.subplots_adjust(left=0.055, right=0.995, top=0.79, bottom=0.3, wspace=0.3)
    for ax, (name, layout) in zip(axes, MODELS.items()):
        sets = [
            *((f"noise {s + 1}", SLOTS) for s in range(layout.sets)),
            *((f"group {k}", N) for k in range(layout.groups)),
        ]
        show_visibility(layout.visible(), sets, ax, name)
        ax.set(xlabel="", ylabel="")
    axes[0].set_ylabel("a query of … (row) may look at … (column)", fontsize=8)
    figure.suptitle(
        "One rule for all models: a query sees its own set, and noise also sees group 0",
        fontsize=14,
        y=0.97,
    )
    roles = {
        "noise queries: spoilt objects, answers known": NOISE,
        "group 0: all that is left at inference": PREDICTION,
        "further groups: each is matched for itself": OTHER_GROUP,
    }
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in roles.items()],
        loc="lower center",
        ncol=3,
        frameon=False,
        fontsize=10.5,
        bbox_to_anchor=(0.5, 0.0),
    )
    figure.savefig(file, dpi=110, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("overview.png")))
