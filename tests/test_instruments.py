"Instruments beside training: no weight moves, nothing is lost or doubled by a power cut, what loggers write can be read back."
import importlib.util
import logging
import warnings
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ctbm import instruments

matplotlib.use("Agg")
VOLATILE = ["resident_mb", "seconds", "waiting_s", "slices_per_second"]  # differ from one run to the next
installed = [name for name in instruments.LOGGERS if importlib.util.find_spec(name)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    plt.close("all")


class Module(LightningModule):
    def __init__(self, name="ft", fails=None):
        super().__init__()
        torch.manual_seed(7)
        self.stage, self.fails = SimpleNamespace(name=name, epochs=4), fails
        self.network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def on_train_epoch_start(self): torch.manual_seed(self.current_epoch)

    def step(self, batch):
        logits = self.network(batch[0]).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(logits, batch[1])
        return {"loss": loss, "value": loss.detach(), "logits": logits.detach(), "labels": batch[1]}

    def training_step(self, batch, index):
        if self.fails == (self.current_epoch, index):
            raise RuntimeError("the disk is full")
        return self.step(batch)

    def validation_step(self, batch, index): return self.step(batch) | {"loss": None}

    def on_validation_epoch_end(self):
        self.figures = {"val_threshold": 0.3 + self.current_epoch / 100}
        self.log_dict(self.figures)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Resume(Callback):
    "Save at an epoch's end, as a run that can be resumed does."
    def __init__(self, path, hook): self.path, self.hook = path, hook

    def on_validation_end(self, trainer, module): self.hook == "validation" and trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, module): self.hook == "train" and trainer.save_checkpoint(self.path)


def loader(n, seed):  # with a generator of its own: otherwise a new iterator takes a number from the one that dropout uses
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=draw) < 0.3).float()
    return DataLoader(TensorDataset(torch.randn(n, 6, generator=draw) + labels[:, None], labels), 16, generator=draw)


def fit(callbacks=(), module=None, resume=None, **more):
    module = module or Module()
    torch.manual_seed(7)
    trainer = Trainer(**{"max_epochs": 4, "accelerator": "cpu", "callbacks": [*callbacks], "logger": False, "enable_checkpointing": False,
                         "enable_progress_bar": False, "enable_model_summary": False} | more)
    trainer.fit(module, loader(150, 1), loader(70, 2), ckpt_path=resume, weights_only=True if resume else None)
    return module


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.network.state_dict().values(), b.network.state_dict().values(), strict=True))


def steady(tables): return {name: table.drop(columns=VOLATILE, errors="ignore") for name, table in tables.items()}


@pytest.mark.parametrize("how", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}, {"precision": "bf16-mixed"},
                                 {"num_sanity_val_steps": 2, "limit_val_batches": 3}], ids=str)
def test_instruments_change_nothing(how, tmp_path):
    watches = instruments.make("all")
    logs = instruments.loggers(installed, tmp_path / "run_1", "fold_0/ft")
    assert same(fit(**how), fit(watches, logger=logs, log_every_n_steps=3, **how))
    found = instruments.tables(watches)
    assert found["batches"].groupby("epoch").slices.sum().eq(150).all()
    validated = 48 if "limit_val_batches" in how else 70
    counts = found["epochs"].dropna(subset="tp")[["epoch", "side", "tp", "fp", "fn", "tn"]].set_index(["epoch", "side"]).sum(axis=1)
    assert (counts == counts.index.get_level_values("side").map({"train": 150, "validation": validated})).all() and len(counts) == 16


@pytest.mark.parametrize("hook", ["validation", "train"])
@pytest.mark.parametrize("batch", [0, 4])
def test_resumed_run_has_every_row_once(hook, batch, tmp_path):
    straight, broken, resumed = (instruments.make("all") for _ in range(3))
    whole = fit(straight)
    with pytest.raises(RuntimeError, match="disk is full"):
        fit([*broken, Resume(tmp_path / "last.ckpt", hook)], Module(fails=(2, batch)))
    seen = instruments.tables(broken)
    assert seen["epochs"].epoch.max() == 2
    assert (seen["batches"].epoch == 3).sum() == batch, "the batches until the error are kept"
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same(whole, fit(resumed, resume=tmp_path / "last.ckpt"))
    a, b = (steady(instruments.tables(watches)) for watches in (straight, resumed))
    assert list(a) == list(b) == list(instruments.TABLES)
    for name in a:
        pd.testing.assert_frame_equal(a[name], b[name])


def test_rows_are_plain_and_states_independent():
    watches = instruments.make("all")
    fit(watches)
    for watch in watches:
        assert {type(v) for rows in watch.state_dict().values() for row in rows for v in row.values()} <= {int, float, str}
        held = watch.state_dict()
        before = {name: len(rows) for name, rows in held.items()}
        again = type(watch)()
        again.load_state_dict(held)
        fit([again], Module("second"), max_epochs=1)
        assert {name: len(rows) for name, rows in held.items()} == before
        assert {row["stage"] for rows in again.rows.values() for row in rows} == {"ft", "second"}


def test_validating_alone_adds_nothing():
    watches = instruments.make("all")
    module = fit(watches)
    before = {name: len(table) for name, table in instruments.tables(watches).items()}
    Trainer(accelerator="cpu", callbacks=watches, logger=False, enable_progress_bar=False).validate(module, loader(70, 2), verbose=False)
    assert {name: len(table) for name, table in instruments.tables(watches).items()} == before


def test_without_validation_the_training_side_is_measured():
    watches, module = instruments.make("all"), Module()
    Trainer(max_epochs=2, accelerator="cpu", callbacks=watches, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0).fit(module, loader(150, 1))
    epochs = instruments.tables(watches)["epochs"]
    assert set(epochs.side) == {"train"} and set(epochs["at"].dropna()) == {"published"} and len(epochs) == 2 * 2


def test_memory_of_a_gpu(monkeypatch):
    "What is measured where there is a GPU, with PyTorch's counters replaced by known ones."
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name, amount in (("memory_allocated", 3), ("memory_reserved", 7), ("max_memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda device, amount=amount: amount * 2**20)
    watch, module = instruments.Memory(), SimpleNamespace(device=torch.device("cuda", 0))
    watch.on_train_batch_start(None, module, None, 0)
    assert watch.at_batch(None, module, {}) == {"gpu_allocated_mb": 3, "gpu_reserved_mb": 7, "gpu_peak_mb": 5}


def test_each_instrument_alone_writes_what_it_measured(tmp_path):
    expected = {"learning_rate": {"steps"}, "gradient_norm": {"steps"}, "loss": {"loss"}, "memory": {"memory"},
                "throughput": {"throughput"}, "probabilities": {"probabilities"},
                "confusion": {"confusion_published", "confusion_best", "figures"}}
    assert set(expected) == set(instruments.INSTRUMENTS)
    for name, pictures in expected.items():
        fit(watches := instruments.make(name), max_epochs=1)
        found = {k: pd.concat([t.assign(fold=fold) for fold in (0, "final")]) for k, t in instruments.tables(watches).items()}
        instruments.write(tmp_path / name, found)
        assert {p.stem for p in (tmp_path / name).glob("*.png")} == pictures
        assert {p.stem for p in (tmp_path / name).glob("*.parquet")} == set(found)
        for path in (tmp_path / name).glob("*.parquet"):
            assert pd.read_parquet(path).fold.tolist()[0] == "0"


def test_at_most_twelve_confusion_matrices():
    epochs = pd.DataFrame({"fold": "0", "stage": "ft", "epoch": range(1, 41), "side": "validation", "at": "best", "threshold": 0.4,
                           "tp": 3, "fp": 0, "fn": 0, "tn": 1})
    axes = instruments.plot_confusion(epochs, "best").axes
    titles = [ax.get_title() for ax in axes]
    assert len(titles) == 12 and titles[0].startswith("ft 1,") and titles[-1].startswith("ft 40,")


@pytest.mark.skipif("tensorboard" not in installed, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_measured(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    fit(watches := instruments.make("all"), logger=instruments.loggers("tensorboard", tmp_path, "fold_0/ft"), log_every_n_steps=5)
    read = EventAccumulator(str(tmp_path / "tensorboard" / "fold_0" / "ft"))
    read.Reload()
    batches = instruments.tables(watches)["batches"]
    for name in ("lr", "gradient_norm", "loss"):
        events = read.Scalars(f"batch/{name}")
        assert [event.step for event in events] == [*range(5, 41, 5)]
        assert np.allclose([event.value for event in events], batches[name].iloc[4::5])
    assert [event.step for event in read.Scalars("validation/best/recall")] == [10, 20, 30, 40]
    assert {"train/loss", "validation/loss", "val_threshold"} <= set(read.Tags()["scalars"])


@pytest.mark.skipif("mlflow" not in installed, reason="mlflow is not installed")
def test_mlflow_reads_what_was_measured(tmp_path, monkeypatch):
    folder = tmp_path / "run_1.partial"
    fit(watches := instruments.make("all"), logger=instruments.loggers(["mlflow"], folder, "fold_0/ft"), log_every_n_steps=5)
    from mlflow.tracking import MlflowClient
    folder = folder.rename(tmp_path / "run_1")  # as a finished run is
    client = MlflowClient((folder / "mlruns").as_uri())
    run, = client.search_runs([client.get_experiment_by_name("run_1").experiment_id])
    assert (run.info.run_name, run.info.status) == ("fold_0/ft", "FINISHED")
    norms = client.get_metric_history(run.info.run_id, "batch/gradient_norm")
    assert [m.step for m in norms] == [*range(5, 41, 5)]
    assert np.allclose([m.value for m in norms], instruments.tables(watches)["batches"].gradient_norm.iloc[4::5])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    fit(watches[:1], logger=instruments.loggers(["mlflow"], tmp_path / "run_2", "fold_0/ft"), max_epochs=1, log_every_n_steps=1)
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "run_2").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(instruments, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mlflow-skinny"):
        instruments.loggers(["mlflow"], tmp_path, "fold_0/ft")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        instruments.loggers(["tensorboard"], tmp_path, "fold_0/ft")


def test_infinite_and_undefined_figures_reach_the_loggers(tmp_path):
    logs = instruments.loggers(installed, tmp_path / "run_1", "fold_0/ft")
    for number in (float("inf"), float("nan")):
        instruments.tell(SimpleNamespace(loggers=logs, global_step=1), "batch", {"gradient_norm": torch.tensor(number), "name": "ft"})
    watch = instruments.GradientNorm()
    watch.rows["batches"] = [{"stage": "ft", "epoch": 1, "batch": k, "gradient_norm": v} for k, v in enumerate((1.0, float("inf"), 2.0), 1)]
    instruments.write(tmp_path, {k: t.assign(fold=0) for k, t in instruments.tables([watch]).items()})
    assert np.isinf(pd.read_parquet(tmp_path / "batches.parquet").gradient_norm).sum() == 1
