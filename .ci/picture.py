"Draw nbs/images/ctbm.png, the picture that the README opens with, from a finished run: python .ci/picture.py outputs/run_..."
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ctbm import preprocess, runs, thresholds

ROOT = Path(__file__).parents[1]
LEVEL, WIDTH = preprocess.WINDOWS["brain"]


def panel(figure, place, title):
    ax = figure.add_subplot(place)
    ax.set_title(title, fontsize=11, loc="left")
    return ax


def picture(run: Path) -> plt.Figure:
    "A slice, what the network sees of it, the folds, and what came out."
    split, test = pd.read_parquet(run / "features_df_split.parquet"), pd.read_csv(run / "test_predictions.csv")
    best = test[test.label == 1].sort_values("prob").id.iloc[-1]
    row = split[split.slice_id == best].iloc[0]
    hu, spec = preprocess.read_hu(row.path), preprocess.Preprocess.from_dict(runs.read_json(run / "model.json")["preprocess"])
    figure = plt.figure(figsize=(13, 3.6), layout="constrained")
    grid = figure.add_gridspec(3, 4, width_ratios=(1.15, 0.42, 1.1, 1.35))
    ax = panel(figure, grid[:, 0], "DICOM, in HU")
    ax.imshow(hu, cmap="gray", vmin=LEVEL - WIDTH / 2, vmax=LEVEL + WIDTH / 2)
    box = preprocess.crop_box(hu, spec.crop, spec.margin_px)
    ax.add_patch(plt.Rectangle((box.left, box.top), box.right - box.left, box.bottom - box.top, fill=False, ec="#E69F00", lw=1.5))
    ax.axis("off")
    for i, (image, (level, width)) in enumerate(zip(spec(hu, (row.row_mm, row.col_mm)), spec.windows, strict=True)):
        ax = figure.add_subplot(grid[i, 1])
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(f"{level - width / 2:g} to {level + width / 2:g} HU", fontsize=8, pad=2)
        ax.axis("off")
    scores = runs.scores_name(runs.read_json(run / "effective_config.json")["k_folds"])
    draw_folds(panel(figure, grid[:, 2], "patients, each on one side (orange: positive)"), split, single=scores == "validation")
    ax = panel(figure, grid[:, 3], f"a threshold from {scores} scores")
    chosen = runs.read_json(run / "threshold_selection.json")["threshold"]
    thresholds.plot_tradeoff(pd.read_csv(run / "cv_thresholds_summary.csv"), chosen, ax)
    ax.legend(loc="lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def draw_folds(ax, split, single):
    "One dot for each patient, by side and by label."
    names = {-1: "test, once"} | ({0: "validation", 1: "training"} if single else {})
    sides = split.groupby("patient").agg(fold=("fold", "first"), label=("label", "max"))
    for y, fold in enumerate(sorted(sides.fold.unique(), reverse=True)):
        labels = np.sort(sides.label[sides.fold == fold])[::-1]
        x, row = np.arange(len(labels)) % 34, np.arange(len(labels)) // 34
        ax.scatter(x, y - 0.11 * row, s=7, c=np.where(labels == 1, "#D55E00", "#0072B2"), lw=0)
        ax.text(-1, y, names.get(fold, f"fold {fold}"), ha="right", va="center", fontsize=9)
    ax.set(xlim=(-11, 34), ylim=(-0.6, len(sides.fold.unique()) - 0.4))
    ax.axis("off")


if __name__ == "__main__":
    target = ROOT / "nbs" / "images" / "ctbm.png"
    target.parent.mkdir(exist_ok=True)
    picture(Path(sys.argv[1])).savefig(target, dpi=110)
