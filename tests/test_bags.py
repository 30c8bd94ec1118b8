"Bags of real series, the same however they are read, small in memory, and complete where patients are scored."
import pickle
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ctbm import cohort, pack
from ctbm.bags import BagDataset, Bags, PatientSampler, by_patient, in_order, train_loader
from ctbm.datasets import score_loader
from ctbm.preprocess import Preprocess


def toy(seed=0, patients=60, longest=30) -> pd.DataFrame:
    "Patients with one or two series of uneven length, about a third of them positive; files come in no order."
    rng, parts = np.random.default_rng(seed), []
    for i in range(patients):
        for series in range(1 + int(rng.random() < 0.3)):
            n = int(rng.integers(1, longest + 1))
            position = rng.permutation(n) * 5.0 if rng.random() < 0.8 else np.full(n, np.nan)
            label = (rng.random(n) < 0.15) & (i % 3 == 0)
            instance = [f"1.2.{i}.{series}.{k:03}" for k in range(n)]
            parts.append(pd.DataFrame({"patient": f"P{i:03}", "series": str(series), "position_mm": position, "instance": instance,
                                       "label": label}))
    table = pd.concat(parts, ignore_index=True).astype({"label": "Int64"}).sample(frac=1, random_state=seed)
    return table.assign(row=rng.permutation(len(table)))


def numbered(table: pd.DataFrame) -> np.ndarray:
    "Images that say which row of the pack they are."
    row = np.arange(len(table))
    return np.stack([row // 256, row % 256], 1).astype(np.uint8)[:, :, None, None] * np.ones((1, 1, 2, 2), np.uint8)


def rows_of(batch: Bags) -> np.ndarray:
    return batch.images[:, 0, 0, 0].numpy().astype(int) * 256 + batch.images[:, 1, 0, 0].numpy()


def same(one, two) -> bool:
    assert len(one) == len(two) > 0
    return all(torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> BagDataset:
    "A capped dataset of a memory-mapped file."
    table, file = toy(), tmp_path_factory.mktemp("bags") / "images.npy"
    np.save(file, numbered(table))
    return BagDataset(np.load(file, mmap_mode="r"), table, cap=6)


# Real series


def test_real_series_become_bags_in_order(data, tmp_path):
    "A tilted head and a phantom whose names are not in the order of their slices; files come shuffled."
    table = pd.concat([cohort.scan(data / name, jobs=1) for name in ("headct_ge_hispeed_tilt18p5", "phantom_philips_brain5mm")])
    made = pack.build(table.sample(frac=1, random_state=0), Preprocess(size=32), tmp_path, jobs=1)
    slices = made.table.assign(label=(made.table.slice_id == "17").astype("Int64"))
    dataset, ordered = BagDataset(made.images, slices, cap=5), in_order(slices)
    patients = by_patient(slices)
    assert sorted(patients.slices) == [8, 28] and patients.label.sum() == 1
    head, phantom = patients.slices.argmax(), patients.slices.argmin()
    bag = dataset.__getitems__([head])
    assert ordered.slice_id[ordered.patient == patients.patient[head]].tolist() == [f"{n:02}" for n in range(1, 29)]
    assert ordered.slice_id[ordered.patient == patients.patient[phantom]].tolist() == [f"I{n}" for n in range(50, 130, 10)]
    assert bag.slice_labels.nonzero().flatten().tolist() == [16] and bag.labels.tolist() == [1]
    assert np.array_equal(bag.images, made.images[ordered.row[ordered.patient == patients.patient[head]]])
    both = dataset.__getitems__([(head, 1), (phantom, 2)])
    assert both.sizes.tolist() == [5, 5] and both.slice_labels[:5].sum() == 1 and both.labels.tolist() == [1, 0]


# Nobody is lost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_scoring_sees_every_patient_and_every_slice(seed, batch_size):
    table = toy(seed)
    dataset = BagDataset(numbered(table), table, cap=3)
    batches = list(score_loader(dataset, batch_size))
    patients = table.groupby("patient").label.agg(["max", "size"])
    assert torch.cat([b.labels for b in batches]).tolist() == patients["max"].tolist()
    assert torch.cat([b.sizes for b in batches]).tolist() == patients["size"].tolist()
    rows = np.concatenate([rows_of(b) for b in batches])
    assert sorted(rows) == list(range(len(table)))
    assert rows.tolist() == in_order(table).row.tolist()
    assert np.array_equal(torch.cat([b.slice_labels for b in batches]), table.set_index("row").label[rows].astype(float))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [True, False])
def test_training_shows_true_bags(seed, keep):
    "Slices of the right patient, in order, with the right labels; a positive one wherever that was promised."
    table = toy(seed)
    dataset, ordered, missed = BagDataset(numbered(table), table, cap=4, keep_positive=keep), in_order(table), 0
    place = pd.Series(np.arange(len(ordered)), index=ordered.row)
    labels, owner = ordered.set_index("row").label, ordered.set_index("row").patient
    for epoch in range(3):
        for batch in train_loader(dataset, 8, seed, 1.5, epoch):
            for rows, label in zip(np.split(rows_of(batch), batch.sizes.cumsum(0)[:-1]), batch.labels, strict=True):
                assert owner[rows].nunique() == 1 and 1 <= len(rows) <= 4 and place[rows].is_monotonic_increasing
                assert label == labels[owner[rows].iloc[0] == owner].max()
                missed += bool(label == 1 and labels[rows].max() == 0)
            assert np.array_equal(batch.slice_labels, labels[rows_of(batch)].astype(float))
    assert missed == 0 if keep else missed > 0


def test_ratio_is_kept_in_training():
    table = toy()
    patients, dataset = by_patient(table), BagDataset(numbered(table), table)
    positive, negative = int(patients.label.sum()), int((patients.label == 0).sum())
    for ratio, expected in ((0.5, positive // 2), (1.5, int(1.5 * positive)), (50, negative), (None, negative)):
        seen = torch.cat([batch.labels for batch in train_loader(dataset, 1, 0, ratio)])
        assert (int(seen.sum()), int((seen == 0).sum())) == (positive, expected)
    drawn = np.bincount([i for epoch in range(300) for i, _ in PatientSampler(patients.label, 3, 1.5, epoch)], minlength=len(patients))
    assert (drawn[patients.label == 1] == 300).all()
    assert (abs(drawn[patients.label == 0] - 300 * int(1.5 * positive) / negative) < 60).all(), "every negative has its turn"


# Epochs and workers


def test_batches_do_not_depend_on_workers(mapped):
    alone, helped = (train_loader(mapped, 5, seed=5, negative_ratio=1.5, epoch=1, workers=n) for n in (0, 2))
    before = torch.get_rng_state()
    assert same(list(alone), list(helped))
    for loader in (alone, helped): loader.sampler.set_epoch(7)
    assert same(list(alone), later := list(helped)), "workers that stay read the new epoch"
    np.random.seed(0); torch.manual_seed(1)
    assert same(later, list(train_loader(mapped, 5, seed=5, negative_ratio=1.5, epoch=7))), "nothing but seed and epoch counts"
    assert not same(later[:1], list(train_loader(mapped, 5, seed=6, negative_ratio=1.5, epoch=7))[:1])
    torch.set_rng_state(before)
    assert same(list(score_loader(mapped, 9)), list(score_loader(mapped, 9, workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_travels_not_the_pixels(mapped):
    arrived = pickle.loads(pickle.dumps(mapped))
    assert isinstance(arrived.images, np.memmap) and not arrived.images.flags.writeable
    items = [3, (0, 11), 2]
    assert same([arrived.__getitems__(items)], [mapped.__getitems__(items)])


class Watching(LightningModule):
    "Writes down what it is given."

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), {}

    def training_step(self, batch, _):
        assert isinstance(batch, Bags)
        self.seen.setdefault(self.current_epoch, []).append((batch.images.clone(), batch.sizes, batch.labels))
        return self.layer(batch.labels[:, None]).mean()

    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)


def trained(dataset, epochs, goes_on=None, save=None) -> dict:
    model = Watching()
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(model, train_loader(dataset, 8, seed=3, negative_ratio=1.0), ckpt_path=goes_on, weights_only=False)
    if save: trainer.save_checkpoint(save)
    return model.seen


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(mapped, tmp_path):
    "Lightning sets the epoch, also after a checkpoint."
    whole = trained(mapped, 4)
    assert not same(whole[0][:1], whole[1][:1])
    trained(mapped, 2, save=tmp_path / "half.ckpt")
    rest = trained(mapped, 4, goes_on=tmp_path / "half.ckpt")
    assert list(rest) == [2, 3] and all(same(rest[epoch], whole[epoch]) for epoch in rest)


# Memory


def test_memory_grows_with_the_cap_not_with_the_longest_patient(tmp_path):
    "Two patients of 20 slices and one of 600, 64 kB each."
    table = pd.DataFrame({"patient": np.repeat(["A", "B", "C"], [600, 20, 20]), "position_mm": np.arange(640.0), "row": np.arange(640)})
    table["label"] = (table.index % 20 == 0).astype(int)
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (640, 1, 256, 256)).flush()
    images = np.load(tmp_path / "images.npy", mmap_mode="r")

    def peak(cap):
        dataset = BagDataset(images, table, cap)
        tracemalloc.start()
        batch = dataset.__getitems__([(0, 1), (1, 2), (2, 3)])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, len(batch.images)

    slice_bytes = 256 * 256
    for cap, slices in ((4, 12), (8, 24), (16, 48), (None, 640)):
        most, shown = peak(cap)
        assert shown == slices and slices * slice_bytes <= most < slices * slice_bytes + 500_000


# Faults


def test_slices_that_belong_to_nobody_are_refused():
    table = toy()
    for bad in (table.assign(label=table.label.where(table.patient != "P007")), table.assign(patient=table.patient.where(table.row != 5)),
                table.assign(label=2)):
        with pytest.raises(ValueError, match=r"slice\(s\) without a patient"): BagDataset(numbered(table), bad)
    for ratio in (0, 0.01):
        with pytest.raises(ValueError, match="negative_ratio"): PatientSampler([1, 0, 0], 0, ratio)


def test_a_patient_keeps_the_label_of_slices_that_are_not_shown():
    "Bags of the negative slices alone: who is ill stays ill, in training, in scoring and in the sampler."
    table = toy()
    told = table.assign(patient_label=table.groupby("patient").label.transform("max"))
    rest, images = told[told.label == 0], numbered(table)
    whole, part = by_patient(told).set_index("patient").label, BagDataset(images, rest, cap=4)
    assert by_patient(rest).set_index("patient").label.equals(whole[by_patient(rest).patient]) and whole.sum() > 3
    assert part.labels.sum() == by_patient(rest).label.sum() > 0 == part.slice_labels.sum()
    assert len(PatientSampler(part.labels.numpy(), 0, 1.0)) == 2 * part.labels.sum()
    for wrong in (0, told.label):
        with pytest.raises(ValueError, match="patient_label"): in_order(told.assign(patient_label=wrong))
