"Checkpoint files: the original's layout in both directions, resuming to the last bit, and files that are not what they seem."
import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F
from torchvision.models import get_model

from ctbm import checkpoints

ORIGINAL = ["epoch", "model_state_dict", "optimizer_state_dict", "train_loss", "val_loss", "train_fbeta", "val_fbeta", "train_recall",
            "val_recall", "train_avg_precision", "val_avg_precision", "best_threshold"]
ROW = dict(
    fold=0, stage="all", epoch=3, epochs=20, lr=1e-4, train_loss=np.float32(0.5), val_loss=0.25,
    train_auprc=0.5, val_auprc=np.float64(0.75), train_fbeta=0.5, val_fbeta=0.625, train_recall=1,
    val_recall=0.875, val_precision=0.5, val_roc_auc=0.9, threshold=np.float64(0.4375), best=True, seconds=12.5)
IMAGES = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(seed=0, **args):
    torch.manual_seed(seed)
    network = timm.create_model("test_efficientnet", num_classes=1, **args)
    return network, torch.optim.Adam(network.parameters(), lr=1e-3)


def step(network, optimizer, seed=1):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(network.train()(IMAGES).squeeze(1), torch.tensor([0.0, 1, 0, 1])).backward()
    optimizer.step()


def frozen(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained(tmp_path):
    network, optimizer = build(drop_rate=0.3)
    step(network, optimizer)
    return network, optimizer, checkpoints.write(tmp_path / "checkpoints" / "best_model.pth", network, optimizer, ROW)


def test_keys_types_and_size(trained):
    network, _, path = trained
    content = torch.load(path, weights_only=True)
    assert list(content) == [key for key in ORIGINAL if key in content] and len(content) == len(ORIGINAL)
    figures = {key: value for key, value in content.items() if not key.endswith("_dict")}
    assert figures == dict(epoch=2, train_loss=0.5, val_loss=0.25, train_fbeta=0.5, val_fbeta=0.625, train_recall=1.0, val_recall=0.875,
                           train_avg_precision=0.5, val_avg_precision=0.75, best_threshold=0.4375)
    assert type(content["epoch"]) is int and all(type(v) is float for k, v in figures.items() if k != "epoch")
    assert equal(content["model_state_dict"], network.state_dict())
    assert [p.name for p in path.parent.iterdir()] == ["best_model.pth"]


def test_a_file_has_twelve_bytes_a_parameter(tmp_path):
    network = timm.create_model("resnet18", num_classes=1)
    optimizer = torch.optim.Adam(network.parameters())
    step(network, optimizer)
    parameters = sum(p.numel() for p in network.parameters())
    path = checkpoints.write(tmp_path / "one.pth", network, optimizer, ROW)
    assert path.stat().st_size == pytest.approx(12 * parameters, rel=0.05)


def test_resumed_to_the_last_bit(trained):
    network, optimizer, path = trained
    other, resumed = build(seed=9, drop_rate=0.3)
    assert checkpoints.load_checkpoint(other, path, resumed, device="cpu") == 2
    for seed in (2, 3):
        step(network, optimizer, seed)
        step(other, resumed, seed)
    assert equal(network.state_dict(), other.state_dict())


def test_an_interrupted_write_leaves_the_old_file(trained, monkeypatch):
    network, optimizer, path = trained
    before = path.read_bytes()
    def half(content, file): file.write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"): checkpoints.write(path, network, optimizer, ROW)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_a_file_of_the_original_s_loads_and_gives_its_output(tmp_path, prefix):
    torch.manual_seed(0)
    theirs = get_model("efficientnet_v2_s", num_classes=1)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d): module.momentum = 1.0
    with torch.no_grad(): theirs.train()(IMAGES)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=3e-4)
    figures = {key: np.float64(0.5) for key in ORIGINAL if not key.endswith("_dict")}
    torch.save(figures | {"epoch": 15, "model_state_dict": {prefix + k: v for k, v in theirs.state_dict().items()},
                          "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "best_model.pth")
    with pytest.raises(Exception, match="Weights only"): torch.load(tmp_path / "best_model.pth", weights_only=True)
    ours = timm.create_model("efficientnetv2_s", num_classes=1, bn_eps=1e-3)
    resumed = torch.optim.Adam(ours.parameters())
    assert checkpoints.load_checkpoint(ours, tmp_path / "best_model.pth", resumed) == 15
    assert resumed.param_groups[0]["lr"] == 3e-4
    with torch.no_grad(): a, b = ours.eval()(IMAGES), theirs.eval()(IMAGES)
    assert b.std() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'efficientnetv2_s', not 'tf_efficientnetv2_s'"), torch.device("meta"):
        checkpoints.load_checkpoint(timm.create_model("tf_efficientnetv2_s", num_classes=1), tmp_path / "best_model.pth")


def test_adam_s_moments_of_the_original_s_belong_to_the_same_parameters(tmp_path):
    "Both networks list their parameters in the same order, and an optimizer knows them by their place alone."
    names = checkpoints.torchvision_names("efficientnetv2_s")
    with torch.device("meta"):
        theirs, ours = get_model("efficientnet_v2_s"), timm.create_model("efficientnetv2_s")
    assert [names[name] for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]


def spoil(path, how):
    content = torch.load(path, weights_only=True)
    if how == "cut": path.write_bytes(path.read_bytes()[:-3000])
    elif how == "cut early": path.write_bytes(path.read_bytes()[:1000])
    elif how == "empty": path.write_bytes(b"")
    elif how == "text": path.write_text("epoch,loss\n1,0.5\n")
    elif how == "list": torch.save([1, 2], path)
    elif how == "object": torch.save(build()[0], path)
    elif how == "bare": torch.save(content["model_state_dict"], path)
    elif how == "tensor": torch.save(content | {"model_state_dict": content["model_state_dict"] | {"bn2.bias": torch.zeros(2)}}, path)
    elif how == "fewer": torch.save(content | {"model_state_dict": dict(list(content["model_state_dict"].items())[:-1])}, path)
    elif how == "optimizer":
        torch.save({key: value for key, value in content.items() if key != "optimizer_state_dict"}, path)


@pytest.mark.parametrize(("how", "says"), [
    ("cut", "damaged"), ("cut early", "damaged"), ("empty", "damaged"), ("text", "damaged"), ("list", "holds a list"),
    ("object", "more than tensors and plain values"), ("bare", "has no 'epoch'"), ("tensor", "1 of another shape .bn2.bias"),
    ("fewer", "1 missing .classifier.bias"), ("optimizer", "has no 'optimizer_state_dict'")])
def test_what_is_no_checkpoint_changes_nothing(trained, how, says):
    _, _, path = trained
    spoil(path, how)
    network, optimizer = build(seed=5)
    step(network, optimizer)
    before, steps = frozen(network), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(ValueError, match=says) as error: checkpoints.load_checkpoint(network, path, optimizer)
    assert str(path) in str(error.value) and len(str(error.value)) < 500
    assert equal(frozen(network), before) and torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], steps)


def test_an_optimizer_of_another_kind_or_for_other_parameters_is_refused(trained):
    _, _, path = trained
    network, _ = build(seed=5)
    before = frozen(network)
    for wrong, says in ((torch.optim.SGD(network.parameters()), "another kind"), (torch.optim.Adam([network.classifier.bias]), "groups of"),
                        (torch.optim.Adam(list(network.parameters())[::-1]), "another shape")):
        with pytest.raises(ValueError, match=says): checkpoints.load_checkpoint(network, path, wrong)
        assert equal(frozen(network), before)
    scheduled = torch.optim.AdamW(network.parameters())
    torch.optim.lr_scheduler.OneCycleLR(scheduled, 1e-3, 10)
    assert checkpoints.load_checkpoint(network, path, scheduled) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"): checkpoints.load_checkpoint(build()[0], tmp_path / "nowhere.pth")


STAGED = [dict(epoch=1, stage=f"stage{i + 1}", train_loss=np.float32(0.5), val_loss=0.5, val_f1=f1, val_recall=1, val_specificity=0.25,
               val_accuracy=np.float64(0.5), threshold=np.float64(0.35), val_separation=-0.125, lr=1e-3, best=True)
          for i, f1 in enumerate((0.5, 0.25, 0.85114))]


def in_stages(folder):
    "Three epochs, each a stage of its own that trains more than the one before."
    network, _ = build()
    names = ("classifier", "conv_head", "blocks")
    for i in range(3):
        groups = [{"params": list(getattr(network, name).parameters()), "lr": 10 ** -(3 + k)} for k, name in enumerate(names[: i + 1])]
        optimizer = torch.optim.Adam(groups)
        step(network, optimizer)
        checkpoints.write_staged(folder, network, optimizer, STAGED[: i + 1], i + 1, best=i != 1, last_of_stage=True)
    return network, optimizer


def test_staged_files_have_the_original_s_names_and_keys(tmp_path):
    network, optimizer = in_stages(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model_f1_0.5000.pth", "checkpoint_epoch01_stage1_f1_0.5000.pth", "checkpoint_epoch02_stage2_f1_0.2500.pth",
        "best_model_f1_0.8511.pth", "checkpoint_epoch03_stage3_f1_0.8511.pth"}
    content = torch.load(tmp_path / "best_model_f1_0.8511.pth", weights_only=True)
    assert content["epoch"] == 3 and content["optimal_threshold"] == 0.35
    assert content["val_metrics"] == {"f1": 0.85114, "sensitivity": 1.0, "specificity": 0.25, "accuracy": 0.5}
    assert content["history"]["val_f1"] == [0.5, 0.25, 0.85114] and content["history"]["separation"] == [-0.125] * 3
    assert list(content["history"]) == ["train_loss", "val_loss", "val_f1", "val_sensitivity", "val_specificity", "optimal_threshold",
                                        "separation"]
    assert equal(content["model_state_dict"], network.state_dict())
    assert checkpoints.write_staged(tmp_path / "none", network, optimizer, STAGED, 3, best=False, last_of_stage=False) == []
    assert not (tmp_path / "none").exists()


def test_a_stage_s_optimizer_comes_back_with_its_groups_and_not_into_another_stage_s(tmp_path):
    network, optimizer = in_stages(tmp_path)
    other, _ = build(seed=3)
    groups = [{"params": list(getattr(other, name).parameters())} for name in ("classifier", "conv_head", "blocks")]
    resumed = torch.optim.Adam(groups)
    assert checkpoints.load_checkpoint(other, tmp_path / "checkpoint_epoch03_stage3_f1_0.8511.pth", resumed) == 3
    assert [group["lr"] for group in resumed.param_groups] == [1e-3, 1e-4, 1e-5]
    step(network, optimizer, 7)
    step(other, resumed, 7)
    assert equal(network.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="groups of"):
        checkpoints.load_checkpoint(other, tmp_path / "checkpoint_epoch01_stage1_f1_0.5000.pth", resumed)


def test_a_folder_in_a_table(tmp_path, trained):
    in_stages(tmp_path / "staged")
    table = checkpoints.summary(tmp_path / "staged")
    assert list(table) == ["file", "epoch", "stage", "f1", "sensitivity", "specificity", "accuracy", "threshold", "MB", "best"]
    assert list(table.epoch) == [1, 1, 2, 3, 3] == list(table.stage) and list(table.file[table.best]) == ["best_model_f1_0.8511.pth"]
    (tmp_path / "staged" / "checkpoint_epoch03_stage3_f1_0.8511.pth").unlink()
    assert list(checkpoints.summary(tmp_path / "staged").stage) == [1, 1, 2, 3]
    table = checkpoints.summary(trained[2].parent)
    assert dict(table.iloc[0][["epoch", "fbeta", "sensitivity", "threshold", "best"]]) == dict(
        epoch=3, fbeta=0.625, sensitivity=0.875, threshold=0.4375, best=True)
    (tmp_path / "empty").mkdir()
    assert checkpoints.summary(tmp_path / "empty").empty
    (tmp_path / "staged" / "broken.pth").write_bytes(trained[2].read_bytes()[:-3000])
    with pytest.raises(ValueError, match="broken.pth is damaged"): checkpoints.summary(tmp_path / "staged")


def test_a_file_in_words(tmp_path, trained):
    network, _ = in_stages(tmp_path / "staged")
    words = checkpoints.describe(tmp_path / "staged" / "best_model_f1_0.8511.pth")
    tensors = f"{len(network.state_dict())} tensors"
    for part in ("epoch 3", "f1 0.8511", "sensitivity 1.0000", "threshold 0.3500", "0.2500 .. 0.8511", tensors, "at 0.001"):
        assert part in words, part
    words = checkpoints.describe(trained[2])
    assert "epoch 3" in words and "fbeta 0.6250" in words and "f1" not in words
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert checkpoints.describe(tmp_path / "bare.pth").count("\n") == 1
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert checkpoints.describe(tmp_path / "old.pth").split("\n")[1] == checkpoints.describe(tmp_path / "bare.pth").split("\n")[1]


def test_a_summary_leaves_the_tensors_on_the_disk(trained, monkeypatch):
    load, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options["mmap"]) or load(*args, **options))
    checkpoints.summary(trained[2].parent)
    checkpoints.describe(trained[2])
    checkpoints.read(trained[2])
    assert asked == [True, True, False]
    assert equal(checkpoints.read(trained[2], lazily=True)["model_state_dict"], trained[0].state_dict())
