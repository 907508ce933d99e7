"""Write README's tables anew, from what they report: recipes, results, chapter 53's output, the
list of chapters.

`python docs/tables.py` changes README.md; tests/book/test_readme.py fails while it would.
"""

import json
import re
from pathlib import Path

from query_detr.lab.experiments import (
    CLAIM,
    VARIANTS,
    compare,
    mean_curve,
    read_results,
    step_costs,
)
from query_detr.run.recipes import BACKBONES, RECIPES

ROOT = Path(__file__).parents[1]
README, RESULTS, NOTEBOOKS = ROOT / "README.md", ROOT / "results", ROOT / "nbs"

FAMILIES = {
    "conditional_detr": "Conditional DETR",
    "group_detr": "Group DETR",
    "dab_detr": "DAB-DETR",
    "group_dab_detr": "DAB-DETR + 11 groups",
    "dn_detr": "DN-DETR",
    "group_dn_detr": "DN-DETR + 11 groups",
}
BACKBONE_NAMES = dict(zip(BACKBONES, ("R50", "R101", "R50-DC5", "R101-DC5")))

PARTS = {  # chapters → what they are about
    "book": "the method: boxes, matching, losses, attention, queries, decoder, layout, noise, "
    "groups; and what the experiments say",
    "runs": "from pictures to a run: data, recipes, the step, evaluation, checkpoints, "
    "use of a model",
    "workshop": "fast on a CPU, timed steps, compared runs, equality with the references",
    "solutions": "solutions of the exercises",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]
    )


def chapters() -> str:
    """List the chapters by part."""
    rows = []
    for part, about in PARTS.items():
        paths = sorted((NOTEBOOKS / part).glob("[0-9]*.ipynb"))
        links = [f"[{path.stem.replace('_', ' ')}](nbs/{part}/{path.name})" for path in paths]
        rows.append([f"`nbs/{part}`", ", ".join(links), about])
    return table(["part", "chapters", "about"], rows)


def models() -> str:
    """List the recipes for COCO with what was published for them."""
    found = {}
    for recipe in RECIPES:
        if recipe.data == "coco":
            family, backbone, epochs = re.fullmatch(
                r"(.*?_detr)((?:_dc5)?(?:_r101)?)_(\d+)ep", recipe.name
            ).groups()
            found.setdefault((family, backbone), {})[epochs] = recipe

    def ap(own, epochs):
        return "" if epochs not in own else str(own[epochs].published_ap or "none")

    rows = [
        [
            FAMILIES[family],
            BACKBONE_NAMES[backbone],
            " ".join(f"`{recipe.name}`" for recipe in own.values()),
            ap(own, "12"),
            ap(own, "50"),
        ]
        for (family, backbone), own in found.items()
    ]
    return table(["model", "backbone", "recipes", "12 epochs", "50 epochs"], rows)


def ledger_lines() -> list[list[str]]:
    """Read the table that chapter 53 printed."""
    notebook = json.loads(
        (NOTEBOOKS / "workshop" / "53_equivalence.ipynb").read_text(encoding="utf-8")
    )
    printed = "".join(
        "".join(output["text"])
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.startswith("| ")
    ]
    return lines[1:]


def ledger() -> str:
    """Put the models side by side in chapter 53's table."""
    names, rows = ["conditional_detr", "group_detr", "dab_detr", "dn_detr"], {}
    for what, against, tolerance, seen, test in ledger_lines():
        model, _colon, what = (
            what.partition(": ") if ": " in what else ("conditional_detr", "", what)
        )
        rows.setdefault((what, against, tolerance, test), {})[model] = (
            "0" if float(seen) == 0 else seen
        )

    def limit(tolerance):
        return "0" if float(tolerance) == 0 else f"{float(tolerance):g}"

    return table(
        ["what", "against", "at most", *(FAMILIES[name] for name in names), "test"],
        [
            [what, against, limit(tolerance), *(own.get(name, "") for name in names), test]
            for (what, against, tolerance, test), own in rows.items()
        ],
    )


def claim() -> str:
    """Compare the stored runs, as chapter 14 does."""
    results = read_results(RESULTS, VARIANTS)
    costs, rows = step_costs({name: results[name] for name in CLAIM}, RESULTS), []
    for baseline in ("conditional", "dab"):
        for row in compare({name: results[name] for name in CLAIM}, costs, baseline):
            mean, least, most = row.whole
            rows.append(
                [
                    row.label,
                    f"{row.half[0]:.3f}",
                    f"{mean:.3f} ({least:.3f}–{most:.3f})",
                    f"{row.cost:.2f}",
                    f"{row.time:.2f}",
                ]
            )
    text = table(
        [
            "",
            "AP at half of the steps",
            "AP at the end",
            "cost of a step",
            "time until the baseline's last AP",
        ],
        rows,
    )

    def changed(name):
        return sum(point["matched"] for run in results[name] for point in run["instability"]) / sum(
            len(run["instability"]) for run in results[name]
        )

    steps, seeds = (
        mean_curve(results["conditional"])[-1][0],
        {run["seed"] for run in results["conditional"]},
    )
    sentences = [f"({steps:,} steps, seeds {', '.join(map(str, sorted(seeds)))}.)"]
    long, five = (
        next(run for run in results[name] if run["seed"] == 0)["curve"][-1]
        for name in ("conditional_long", "conditional_groups5")
    )
    sentences.append(
        "In about the time of the five groups a plain Conditional DETR takes "
        f"{long['step']:,} steps and ends at {long['AP']:.3f} (seed 0), they at "
        f"{five['AP']:.3f}."
    )

    def last(name):
        return f"{next(run for run in results[name] if run['seed'] == 0)['curve'][-1]['AP']:.3f}"

    sentences.append(
        "Seed 0 alone: 1, 3, 5 and 11 groups end at "
        f"{', '.join(map(last, ('conditional', 'conditional_groups3', 'conditional_groups5')))} "
        f"and {last('conditional_groups11')}; DAB-DETR at {last('dab')}, with denoising at "
        f"{last('dab_noise5')}, with denoising and 5 groups at "
        f"{last('dab_noise5_groups5')}; on the blood cells 1 group at {last('bccd')}, 5 at "
        f"{last('bccd_groups5')}."
    )
    sentences.append(
        f"Of the matched queries {changed('dab_noise5'):.2f} change their object from "
        f"epoch to epoch with denoising, {changed('dab'):.2f} without."
    )
    return text + "\n\n" + " ".join(sentences)


def timed(name: str) -> dict:
    """Read what `python -m query_detr.lab.bench … --output results/speed/NAME.json` wrote."""
    return json.loads((RESULTS / "speed" / f"{name}.json").read_text())


def speed() -> str:
    """Sum up the stored measurements of chapter 51's command."""

    def rate(found):
        own = [
            rate
            for name, rate in found["rate"].items()
            if name.startswith(found.get("workload", {}).get("amp") or "fp32")
        ]
        return " or ".join(f"{one / 1e12:.2f}" for one in own)

    steps = []
    for name, how in dict(
        step0="no dropout", step01="dropout 0.1", bf16="no dropout, `--amp bf16`"
    ).items():
        found = timed(name)
        seconds, operations = found["step"]["step"]["median"], found["operations"]["step"]
        steps.append(
            [
                how,
                f"{seconds:.2f} s",
                f"{operations / seconds / 1e12:.2f}",
                rate(found),
                f"{found['peak_memory'] / 1e9:.1f} GB",
            ]
        )
    rivals = [
        [
            kind,
            how,
            *(
                f"{timed(name)[part]['ours']['median']:.2f} s, {timed(name)[part]['ratio']:.2f}×"
                for part in ("step", "inference")
            ),
            rate(timed(name)),
        ]
        for name, kind, how in (
            ("conditional0.1", "Conditional DETR", "dropout 0.1"),
            ("conditional0", "Conditional DETR", "no dropout"),
            ("dab0.1", "DAB-DETR", "dropout 0.1"),
            ("dab0", "DAB-DETR", "no dropout"),
        )
    ]
    matching = [
        [
            str(row["boxes"]),
            *(f"{1000 * row[way]['median']:.0f} ms" for way in ("plain", "ours")),
            f"{row['plain']['median'] / row['ours']['median']:.1f}×",
        ]
        for row in timed("matching")["rows"]
    ]
    return "\n\n".join(
        [
            "A training step of `group_detr_12ep`:",
            table(["", "median", "TFLOP/s", "machine's TFLOP/s", "peak memory"], steps),
            "Beside transformers' models with the same weights, inputs and dropout, in "
            "turns (how many times longer theirs takes):",
            table(
                ["", "", "our step, theirs", "our inference, theirs", "machine's TFLOP/s"], rivals
            ),
            "Matching alone, the plain way (layer by layer, all queries with all objects "
            "of the batch) and ours, the same pairs (matrices at "
            f"{rate(timed('matching'))} TFLOP/s):",
            table(["boxes per image", "plain", "ours", "ratio"], matching),
            growth(),
        ]
    )


def growth() -> str:
    """Sum up how a step grows with groups, boxes and cells of the feature map."""
    lines = []
    for name, kind in (
        ("growth", "groups"),
        ("growth_boxes", "boxes per image"),
        ("growth_size", "cells of the feature map"),
    ):
        found = timed(name)
        counts = (
            [size // found["sizes"][0] for size in found["sizes"]]
            if name == "growth"
            else found["sizes"]
        )
        listed, times = (
            f"{', '.join(map(str, some[:-1]))} and {some[-1]}"
            for some in (counts, [f"{one / found['seconds'][0]:.1f}" for one in found["seconds"]])
        )
        lines.append(f"With {listed} {kind} a step takes {times} times as long")
    fit = timed("growth")["fit"]
    lines[0] += (
        f": {fit['seconds']['constant']:.2f} s and {1000 * fit['seconds']['per_unit']:.2f} "
        f"s per thousand queries; {fit['bytes']['constant'] / 1e9:.2f} GB and "
        f"{fit['bytes']['per_unit'] / 1e6:.2f} GB"
    )
    return ". ".join(lines) + "."


def written(text: str) -> str:
    """Give README's text with every part between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in dict(
        chapters=chapters, models=models, ledger=ledger, claim=claim, speed=speed
    ).items():
        text, count = re.subn(
            rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}",
            text,
        )
        if count != 1:
            raise SystemExit(
                f"README.md: the marks <!-- {name} --> and <!-- /{name} --> must be there once"
            )
    return text


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
