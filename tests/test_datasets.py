"Batches: the same however they are read, whenever a run goes on, and wherever the pack lies; and patients that stay whole."

import multiprocessing
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ctbm import cohort, pack
from ctbm.datasets import TEST, TRAIN, VALID, EpochSampler, SliceDataset, limited, score_loader, split, train_loader
from ctbm.preprocess import Preprocess


@pytest.fixture(scope="module")
def slices(cohort_folder):
    return cohort.join_labels(cohort.scan(cohort_folder / "CTs", jobs=1), cohort_folder / "labels1.csv")


@pytest.fixture(scope="module")
def dataset(slices, tmp_path_factory):
    made = pack.build(slices, Preprocess(size=32), tmp_path_factory.mktemp("packs"), jobs=1)
    return SliceDataset(made.images, made.table.row.to_numpy(), made.table.label.to_numpy(dtype=int))


def same(one, two):
    assert len(one) == len(two) > 0
    return all(torch.equal(a, b) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True))


# Workers


def test_batches_do_not_depend_on_workers(dataset):
    alone = train_loader(dataset, 16, seed=5, epoch=1)
    helped = train_loader(dataset, 16, seed=5, epoch=1, workers=2, prefetch=3)
    assert same(list(alone), list(helped))
    for loader in (alone, helped): loader.sampler.set_epoch(7)
    assert same(list(alone), later := list(helped)), "workers that stay read the new epoch"
    assert same(later, list(train_loader(dataset, 16, seed=5, epoch=7)))
    assert same(list(score_loader(dataset, 50)), list(score_loader(dataset, 50, workers=2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_generator_of_the_program_alone(dataset, workers):
    before = torch.get_rng_state()
    for loader in (train_loader(dataset, 32, seed=1, workers=workers), score_loader(dataset, 32, workers=workers)): list(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_the_pack_is_mapped_in_every_process(dataset, start):
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000 < dataset.images.nbytes / 10
    arrived = pickle.loads(sent).images
    assert isinstance(arrived, np.memmap) and not arrived.flags.writeable and arrived.shape == dataset.images.shape
    with multiprocessing.get_context(start).Pool(1) as pool:
        images, labels = pool.apply(dataset.__getitems__, ([3, 1, 2],))
    assert same([(images, labels)], [dataset.__getitems__([3, 1, 2])])


def test_images_that_are_not_a_whole_file_travel_as_they_are(dataset):
    for images in (dataset.images[3:], np.array(dataset.images)):
        part = SliceDataset(images, [1, 0], [0, 1])
        assert torch.equal(pickle.loads(pickle.dumps(part)).__getitems__([0, 1])[0], part.__getitems__([0, 1])[0])


# Epochs


class Watching(LightningModule):
    "Writes down the labels and the pixels of what it is given"

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), {}

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.setdefault(self.current_epoch, []).append((images.double().mean((1, 2, 3)), labels))
        return self.layer(labels[:, None]).mean()

    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 0.1)


def trained(dataset, epochs, workers=0, goes_on=None, save=None):
    model = Watching()
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    trainer.fit(model, train_loader(dataset, 16, seed=3, workers=workers), ckpt_path=goes_on, weights_only=False)
    if save: trainer.save_checkpoint(save)
    return model.seen


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_draws_what_it_would_have_drawn(dataset, tmp_path):
    "Lightning sets the epoch, with and without workers, and after a checkpoint"
    whole = trained(dataset, 4)
    assert list(whole) == [0, 1, 2, 3] and not same(whole[0], whole[1])
    want = list(train_loader(dataset, 16, seed=3, epoch=2))
    assert same(whole[2], [(x.double().mean((1, 2, 3)), y) for x, y in want])
    trained(dataset, 2, save=tmp_path / "half.ckpt")
    rest = trained(dataset, 4, goes_on=tmp_path / "half.ckpt")
    assert list(rest) == [2, 3] and all(same(rest[epoch], whole[epoch]) for epoch in rest)
    helped = trained(dataset, 4, workers=2)
    assert all(same(helped[epoch], whole[epoch]) for epoch in whole)


def test_balance_and_permutation():
    labels = np.repeat([0, 1], [1900, 100])
    for seed in (0, 42):
        drawn = [labels[list(EpochSampler(labels, True, seed, epoch))].mean() for epoch in range(30)]
        assert abs(np.mean(drawn) - 0.5) < 0.01
        assert sorted(EpochSampler(labels, False, seed, 9)) == list(range(2000))
    assert list(EpochSampler(np.zeros(5), False, 1)) and list(EpochSampler(np.ones(5), True, 1)) # one class is enough to draw from


# Patients


def toy(seed=0, patients=400, positive=0.06):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"patient": np.repeat([f"P{i:04}" for i in range(patients)], rng.integers(1, 9, patients))})
    sick = set(rng.choice(table.patient.unique(), round(positive * patients), replace=False))
    table["label"] = (table.patient.isin(sick) & (rng.random(len(table)) < 0.7)).astype("Int64")
    table["slice_id"] = [f"S{i:05}" for i in range(len(table))]
    return table


@pytest.mark.parametrize("seed", range(5))
def test_single_split(seed):
    table = toy(seed)
    made = split(table, 0.15, 1, seed, valid_size=0.15 / 0.85)
    assert made.index.equals(table.index) and made.groupby("patient").fold.nunique().max() == 1
    patients = made.groupby("patient").agg(fold=("fold", "first"), label=("label", "max"))
    for _, part in patients.groupby("label"): # stratified: every share holds in both classes, to a patient
        counts = part.fold.value_counts()
        assert np.abs(counts.loc[[TEST, VALID, TRAIN]] - np.array([0.15, 0.15, 0.70]) * len(part)).max() <= 1
    shuffled = split(table.sample(frac=1, random_state=1), 0.15, 1, seed, valid_size=0.15 / 0.85)
    assert shuffled.sort_index().fold.equals(made.fold)
    assert not split(table, 0.15, 1, seed + 1, valid_size=0.15 / 0.85).fold.equals(made.fold)


def test_folds_are_not_touched_by_the_single_split():
    table = toy()
    assert split(table, 0.15, 5, 42).fold.equals(split(table, 0.15, 5, 42, valid_size=0.2).fold)
    assert (split(table, 0.15, 5, 42).fold == TEST).equals(split(table, 0.15, 1, 42, valid_size=0.2).fold == TEST)


@pytest.mark.parametrize("valid_size", [None, 0, 1, -0.1, float("nan")])
def test_a_single_split_needs_a_size(valid_size):
    with pytest.raises(ValueError, match="valid_size.*folds=1"): split(toy(), folds=1, valid_size=valid_size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [120, 400, 1200])
def test_limited(seed, limit):
    table = toy(seed)
    kept = limited(table, limit, seed)
    assert kept.index.equals(table.index) and kept.dtype == bool and limit - 16 <= kept.sum() <= limit
    assert not set(table.patient[kept]) & set(table.patient[~kept])
    sick = table.groupby("patient").label.max()
    share = sick[table.patient[kept].unique()].mean()
    assert sick[table.patient[kept].unique()].sum() >= 4 and (abs(share - sick.mean()) < 0.02 or limit == 120)
    table.index = table.index[::-1] # labels of rows in another order, and the rows too
    assert limited(table, limit, seed).to_numpy().tolist() == kept.tolist()
    mixed = limited(table.sample(frac=1, random_state=2), limit, seed)
    assert mixed.loc[table.index].to_numpy().tolist() == kept.tolist()


def test_limited_to_everything_and_to_too_little():
    table = toy()
    assert limited(table, len(table), 0).all() and limited(table[table.label == 0], 50, 0).any()
    for limit in (0, 8):
        with pytest.raises(ValueError, match=f"limit {limit} is too small.*use at least"): limited(table, limit, 0)
