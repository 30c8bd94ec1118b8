"Exported files in the hands of others: other programs, other machines, damaged, incomplete."
import builtins
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

from ctbm import bundle, evaluate, export, pack, runs
from ctbm.preprocess import read_hu
from tests.conftest import ROOT

PROGRAM = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
score, features = session.run(["score", "features"], {"images": np.load(sys.argv[2])})
about = session.get_modelmeta().custom_metadata_map
print(json.dumps({"score": score.tolist(), "features": features.shape, "type": str(score.dtype), "about": about,
                  "torch": "torch" in sys.modules or "ctbm" in sys.modules}))
"""


@pytest.fixture(scope="module")
def held(small_run) -> pd.DataFrame:
    table = pd.read_parquet(small_run / "features_df_split.parquet")
    return table[table.test].reset_index(drop=True)


@pytest.fixture(scope="module")
def images(small_run, held) -> np.ndarray:
    spec = bundle.load(small_run).preprocess
    return np.stack([pack.pixels(read_hu(row.path, row.frame), row, spec) for row in held.itertuples()])


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory) -> Path:
    "A folder with everything, 8 bits included."
    return export.write(small_run, tmp_path_factory.mktemp("exported") / "site" / "bundle", int8=True, jobs=1)


def scored(run: Path, slices: pd.DataFrame) -> np.ndarray:
    return pd.read_csv(run / "test_predictions.csv").set_index("id").prob[slices.slice_id].to_numpy()


def moved(exported: Path, place: Path) -> Path:
    return Path(shutil.copytree(exported, place / "moved"))


def test_onnxruntime_alone_gives_the_scores_of_the_test_set(small_run, exported, held, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", PROGRAM, str(exported / "model.onnx"), str(tmp_path / "images.npy")]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert np.abs(np.array(found["score"]) - scored(small_run, held)).max() < 1e-4
    assert found["type"] == "float32" and not found["torch"] and found["features"][0] == len(images)
    about = found["about"]
    assert json.loads(about["preprocess"]) == runs.read_json(small_run / "model.json")["preprocess"]
    assert json.loads(about["thresholds"])["slices"] == runs.read_json(small_run / "threshold_selection.json")["threshold"]
    assert about["weights_sha256"] == bundle.load(small_run).sha256 and "research use only" in about["use"]
    assert not [word for word in ("/", "SYN-") if word in json.dumps(about)]


def test_no_folder_of_this_machine_leaves(exported):
    with zipfile.ZipFile(exported / "model.pt2") as packed: inside = b"".join(map(packed.read, packed.namelist()))
    for content in (inside, (exported / "model.onnx").read_bytes(), (exported / "model.int8.onnx").read_bytes()):
        assert str(ROOT).encode() not in content and b"site-packages" not in content


def test_what_export_json_says_can_be_found_again(small_run, exported, held, images):
    told, made = runs.read_json(exported / "export.json"), bundle.load(exported)
    truth = scored(small_run, held)
    assert set(told["engines"]) == {"torch", "bf16", "onnx", "int8"} and set(told["parity"]) == {"model.onnx", "model.pt2"}
    assert told["measured_on"] == f"the test set: {len(held)} slices of {held.patient.nunique()} patients"
    assert told["torch_beside_the_run"] < 1e-6
    for name in ("onnx", "int8"):
        score, features = export.engine(made, name)(images)
        row = told["engines"][name]
        assert np.abs(score - truth).max() == pytest.approx(row["largest_difference"], abs=1e-6)
        area = evaluate.score(held.label, score, groups=held.patient, resamples=10)["roc_auc"]["estimate"]
        assert area == pytest.approx(row["roc_auc"]) and area - row["change"] == pytest.approx(told["engines"]["torch"]["roc_auc"])
        assert features.shape == made.look(images)[1].shape
    assert 0 < told["engines"]["int8"]["largest_difference"] < 0.1
    assert (exported / "model.int8.onnx").stat().st_size < 0.3 * (exported / "model.onnx").stat().st_size


def test_the_same_answers_in_another_place_without_the_data(exported, small_run, held, images, tmp_path):
    there = moved(exported, tmp_path)
    again = export.write(there, tmp_path / "again.zip", formats=["torch"])
    told = runs.read_json((made := bundle.load(again)).folder / "export.json")
    assert "no table of the slices" in told["no_auroc"] and told["measured_on"] == "4 synthetic heads"
    assert "change" not in told["engines"]["onnx"]
    assert {"model.onnx", "model.int8.onnx", "model.pt2"} <= set(zipfile.ZipFile(again).namelist())
    for name in ("torch", "onnx"): assert np.abs(export.engine(made, name)(images)[0] - scored(small_run, held)).max() < 1e-4
    with pytest.raises(FileNotFoundError, match="export the run itself"): export.write(there, tmp_path / "more", [], int8=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.zip", "moved"]


def test_nothing_of_the_patients_leaves(exported, held):
    texts = "".join(path.read_text() for path in exported.glob("*.json"))
    assert not [name for name in {*held.patient, *held.slice_id} if name in texts]
    assert not [path for path in exported.rglob("*") if path.suffix in (".parquet", ".csv", ".png", ".html")]


@pytest.mark.parametrize("how", ["cut", "text", "empty", "flipped"])
def test_a_damaged_file_is_named(exported, tmp_path, how):
    there = moved(exported, tmp_path)
    for file in (there / "model.onnx", there / "model.pt2"):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes({"cut": content[:middle], "text": b"not a network", "empty": b"",
                          "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]}[how])
    with pytest.raises(ValueError, match=r"model\.(onnx|pt2) is missing or not what it was"): bundle.load(there)
    if how == "flipped": return
    for read, name in ((export.from_onnx, "model.onnx"), (export.from_torch, "model.pt2")):
        with pytest.raises(ValueError, match=f"{name} is damaged"): read(there / name)


def test_a_file_of_other_weights_is_refused(small_run, exported, tmp_path):
    there = Path(shutil.copytree(small_run, tmp_path / "run"))
    model = onnx.load(exported / "model.onnx")
    onnx.helper.set_model_props(model, {"weights_sha256": "0" * 64})
    onnx.save(model, there / "model.onnx")
    with pytest.raises(ValueError, match="not made from these weights"): export.engine(bundle.load(there), "onnx")


def test_a_graph_that_differs_leaves_no_file(small_run, tmp_path, monkeypatch):
    class Wrong(export.SliceGraph):
        def forward(self, images):
            score, features, logit = super().forward(images)
            return score, features, logit + 0.01
    monkeypatch.setitem(export.GRAPHS, "slice", Wrong)
    made = bundle.load(small_run)
    for write, name in ((export.to_onnx, "model.onnx"), (export.to_torch, "model.pt2")):
        with pytest.raises(ValueError, match="differs from the network"): write(made, tmp_path / name)
    with pytest.raises(ValueError, match="differs"): export.write(small_run, tmp_path / "out", jobs=1)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_is_named(small_run, exported, tmp_path, monkeypatch):
    plain = builtins.__import__
    def missing(name, *args, **more):
        if name.partition(".")[0].startswith("onnx"): raise ModuleNotFoundError(name)
        return plain(name, *args, **more)
    monkeypatch.setattr(export, "import_module", lambda name: missing(name))
    made = bundle.load(exported)
    for do in (lambda: export.to_onnx(made, tmp_path / "model.onnx"), lambda: export.engine(made, "int8"),
               lambda: export.write(small_run, tmp_path / "out", jobs=1)):
        with pytest.raises(ImportError, match=r"pip install 'ctbm\[export\]'"): do()
    assert export.write(small_run, tmp_path / "torch_only", ["torch"], jobs=1).is_dir()


def test_what_exists_stays(small_run, exported, tmp_path):
    before = (exported / "export.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists"): export.write(small_run, exported)
    assert (exported / "export.json").read_bytes() == before
    (tmp_path / "file.zip").write_text("mine")
    with pytest.raises(FileExistsError): export.write(small_run, tmp_path / "file.zip")
    assert (tmp_path / "file.zip").read_text() == "mine"


def test_changed_or_missing_data_is_not_measured_on(small_run, held, tmp_path):
    there, root = Path(shutil.copytree(small_run, tmp_path / "run")), Path(runs.read_json(small_run / "manifest.json")["data_root"])
    data = Path(shutil.copytree(root, tmp_path / "data"))
    victim = data / Path(held.path[0]).relative_to(root)
    victim.write_bytes(victim.read_bytes()[:-2] + b"!!")
    with pytest.raises(FileNotFoundError, match="has changed"): export.write(there, tmp_path / "out", [], data_root=data, jobs=1)
    victim.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 120"): export.write(there, tmp_path / "out", [], data_root=data, jobs=1)
    assert not (tmp_path / "out").exists()
