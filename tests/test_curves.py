"The four training pictures from a history as a run writes it."
import matplotlib.image as mpimg
import numpy as np
import pandas as pd
import pytest

from ctbm import curves


@pytest.fixture
def history():
    rng, n = np.random.default_rng(0), 12
    figures = {column: rng.uniform(0, 1, n) for panel in curves.PANELS.values() for column in panel}
    return pd.DataFrame({"fold": 0, "stage": np.repeat(["warm_up", "layer4", "layer3"], [3, 4, 5]),
                         "epoch": [1, 2, 3, 1, 2, 3, 4, 1, 2, 3, 4, 5], **figures, "best": [True] * 5 + [False] * 7})


def drawn(figure):
    return [line.get_xydata().tolist() for ax in figure.axes for line in ax.lines]


def test_a_history_read_back_gives_the_same_pictures(history, tmp_path):
    history.to_csv(tmp_path / "history.csv", index=False)
    again = pd.read_csv(tmp_path / "history.csv")
    for draw in curves.PICTURES.values():
        assert np.allclose([np.sum(line) for line in drawn(draw(again))], [np.sum(line) for line in drawn(draw(history))])


def test_epochs_are_counted_through_all_stages_and_the_kept_one_is_marked(history):
    for ax in curves.training_curves(history).axes:
        plain = [line for line in ax.lines if len(line.get_xdata()) == len(history)]
        rings = [line for line in ax.lines if len(line.get_xdata()) == 1]
        assert all(list(line.get_xdata()) == list(range(1, 13)) for line in plain) and len(rings) == len(plain)
        assert [ring.get_ydata()[0] for ring in rings] == [line.get_ydata()[4] for line in plain] and rings[0].get_xdata()[0] == 5
        assert sorted(line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--") == [3.5, 7.5]


def test_the_four_files(history, tmp_path):
    written = curves.write(tmp_path / "models", history)
    names = ["training_curves.png", "f1_score_curve.png", "loss_curves.png", "sensitivity_specificity.png"]
    assert [path.name for path in written] == names
    assert all(mpimg.imread(path)[..., :3].std() > 0.05 for path in written)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {path.name for path in written}


def test_one_epoch_and_gaps_are_drawn(history, tmp_path):
    gaps = history.assign(val_f1=np.nan, val_separation=[np.nan] * 5 + [0.5] * 7, best=False)
    for i, odd in enumerate((gaps, history[:1])): curves.training_curves(odd).savefig(tmp_path / f"{i}.png", dpi=30)
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png"}


def test_what_cannot_be_drawn_writes_nothing(history, tmp_path):
    several = pd.concat([history, history.assign(fold="final")])
    slices = history.drop(columns=["val_specificity", "val_separation"])  # the history of another recipe
    for wrong, says in ((several, "of 2 networks"), (slices, "val_separation.*val_specificity"), (history[:0], "a row for each epoch")):
        with pytest.raises(ValueError, match=says): curves.write(tmp_path / "models", wrong)
    assert not (tmp_path / "models").exists()
