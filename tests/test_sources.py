"What a user may point at, made from real files, and archives that mean harm."
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pandas as pd
import pytest
from pydicom import dcmread
from pydicom.fileset import FileSet

from ctbm import sources
from ctbm.cohort import images, kind, scan
from ctbm.preprocess import read_hu
from ctbm.sources import opened

HEAD = "headct_ge_hispeed_tilt18p5"


@pytest.fixture(scope="module")
def head(data, tmp_path_factory):
    "The first six slices of a real head, a folder within a folder with an accent."
    folder = tmp_path_factory.mktemp("head") / "Größe"
    (folder / "Müller 1").mkdir(parents=True)
    for path in sorted((data / HEAD).glob("*.dcm"))[:6]: shutil.copy(path, folder / "Müller 1")
    (folder / "empty" / "inner").mkdir(parents=True)
    (folder / "notes.txt").write_text("seen")
    return folder


@pytest.fixture
def zipped(head, tmp_path):
    return Path(shutil.make_archive(str(tmp_path / "scans"), "zip", head))


def make_zip(path, members, compression=ZIP_DEFLATED):
    with ZipFile(path, "w", compression) as archive:
        for name, content in members.items(): archive.writestr(name, content)
    return path


def problems(source): return {source.name(path): problem for path, problem in source.files if problem}


def test_a_zip_is_its_folder(head, zipped):
    "Same rows, same pixels, same names."
    plain, packed = scan(head), scan(zipped)
    assert len(images(packed)) == 6 and set(packed["path"]) == {path.replace(str(head), str(zipped)) for path in plain["path"]}
    pd.testing.assert_frame_equal(packed.drop(columns=["path", "folder"]), plain.drop(columns=["path", "folder"]))
    with opened(head) as folder, opened(zipped) as archive:
        assert [archive.name(path) for path, _ in archive.files] == [f"scans.zip/{folder.name(path)}" for path, _ in folder.files]
        assert [archive.name(path) for path in archive.empty] == ["scans.zip/empty"]
        assert [folder.name(path) for path in folder.empty] == ["empty"]
        first = [path for path, _ in archive.files if path.endswith(".dcm")][0]
        assert (read_hu(first) == read_hu(head / "Müller 1" / os.path.basename(first))).all()
        place = archive.root
    assert not place.exists()


def test_one_file_is_enough(head):
    path = next(head.rglob("*.dcm"))
    with opened(path) as source: assert source.files == [(str(path), None)] and source.name(path) == path.name and source.empty == []
    assert len(images(scan(path))) == 1


def make_disc(paths, folder):
    "A disc of real slices, with the tags that a DICOMDIR needs and anonymisation has taken."
    disc = FileSet()
    for path in paths:
        image = dcmread(path)
        image.StudyDate, image.StudyTime, image.StudyID = "20200101", "120000", "1"
        disc.add(image)
    disc.write(folder)


def test_a_dicomdir_names_its_files(head, tmp_path):
    make_disc(head.rglob("*.dcm"), tmp_path / "disc")
    (tmp_path / "disc" / "AUTORUN.INF").write_text("not named")
    table = scan(tmp_path / "disc" / "DICOMDIR")
    assert len(table) == len(images(table)) == 6
    whole = scan(tmp_path / "disc")  # a folder that holds one: its files, with a row for each
    assert len(whole) == 8 and len(images(whole)) == 6 and "not an image" in set(kind(whole["problem"]).dropna())
    lost, moved, *_ = sorted(images(table)["path"])
    os.remove(lost)
    os.rename(moved, Path(moved).with_name(Path(moved).name.lower()))
    with opened(tmp_path / "disc" / "DICOMDIR") as source:
        assert len(source.files) == 6
        assert problems(source) == {os.path.relpath(lost, tmp_path / "disc"): "no file: the DICOMDIR names it, but it is not there"}
    again = scan(tmp_path / "disc" / "DICOMDIR")
    assert len(images(again)) == 5 and kind(again["problem"]).dropna().tolist() == ["no file"]


def test_a_dicomdir_that_leads_elsewhere_or_is_cut_short(head, tmp_path):
    make_disc([next(head.rglob("*.dcm"))], tmp_path / "disc")
    path = tmp_path / "disc" / "DICOMDIR"
    whole = path.read_bytes()
    assert whole.count(b"PT000000\\ST000000") == 1
    path.write_bytes(whole.replace(b"PT000000\\ST000000", b"..\\..\\..\\etc\\abcd"))
    with opened(path) as source: assert [problem.split(",")[1] for _, problem in source.files] == [" outside its folder"]
    for end in (200, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="DICOMDIR is damaged"), opened(path): pass


def test_junk_in_an_archive_costs_a_row(zipped):
    inner = zipped.with_name("inner.zip")
    make_zip(inner, {"a.dcm": b"x"})
    with ZipFile(zipped, "a") as archive:
        archive.write(inner, "Müller 1/inner.zip")
        archive.writestr("__MACOSX/._1.dcm", b"x")
        archive.writestr("__MACOSX/._2.dcm", b"x")
        archive.writestr(".DS_Store", b"\0\0\0\1Bud1")
        archive.writestr("../../../evil.dcm", b"x")
        archive.writestr("/etc/evil.dcm", b"x")
        archive.writestr("C:\\evil.dcm", b"x")
        with pytest.warns(UserWarning): archive.writestr("notes.txt", b"another")
        archive.writestr("x" * 300 + ".dcm", b"x")
    table = scan(zipped)
    aside = table[table["problem"].notna()]
    assert len(images(table)) == 6 and sorted(zip(aside["slice_id"], kind(aside["problem"]), strict=True)) == sorted([
        ("inner", "not DICOM"), ("__MACOSX", "hidden folder"), (".DS_Store", "not DICOM"), ("notes", "not DICOM"),
        ("notes", "not unpacked"), *[("evil", "not unpacked")] * 3, ("x" * 300, "not unpacked")])
    assert aside["problem"].str.contains("leads out of the archive").sum() == 3 and "a zip among other files" in "".join(aside["problem"])
    assert not list(zipped.parent.rglob("evil.dcm"))


def test_names_from_a_mac_and_from_dos(head, tmp_path):
    slice_ = next(head.rglob("*.dcm")).read_bytes()
    for code in ("utf-8", "cp437"):
        name = "Müller/1.dcm".encode(code)
        path = make_zip(tmp_path / "names.zip", {"X" * len(name): slice_})
        path.write_bytes(path.read_bytes().replace(b"X" * len(name), name))  # without the mark that says UTF-8
        with opened(path) as source: assert [source.name(file) for file, _ in source.files] == ["names.zip/Müller/1.dcm"]


def test_a_damaged_member_costs_that_member(zipped):
    with ZipFile(zipped) as archive: info = archive.getinfo("Müller 1/03.dcm")
    raw = bytearray(zipped.read_bytes())
    start = info.header_offset + 200
    raw[start : start + 2000] = bytes(2000)
    zipped.write_bytes(raw)
    table = scan(zipped)
    assert len(images(table)) == 5 and table.set_index("slice_id").loc["03", "problem"].startswith("not unpacked: ")


def test_archives_that_cannot_be_opened(zipped, tmp_path):
    whole = zipped.read_bytes()
    zipped.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="scans.zip is no zip, damaged or cut short"), opened(zipped): pass
    with pytest.raises(ValueError, match="empty.zip holds no file"), opened(make_zip(tmp_path / "empty.zip", {})): pass
    for name in ("scans.rar", "scans.7z", "scans.tar.gz", "head.nii.gz"):
        (tmp_path / name).write_bytes(b"Rar!\x1a\x07\x01\0" + bytes(500))
        with pytest.raises(ValueError, match=f"{name} is no DICOM file: give a folder, a .zip"), opened(tmp_path / name): pass


def test_an_encrypted_archive(tmp_path):
    path = make_zip(tmp_path / "secret.zip", {"1.dcm": bytes(500)})
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag of encryption, in both headers
        place = raw.index(mark) + offset
        struct.pack_into("<H", raw, place, struct.unpack_from("<H", raw, place)[0] | 1)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="secret.zip holds no file.*1.dcm: not unpacked: protected by a password"), opened(path): pass


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "bomb.zip", {"1.dcm": bytes(50_000_000)})
    with opened(path) as source: assert len(source.files) == 1  # small: harmless whatever its ratio
    monkeypatch.setattr(sources, "HARMLESS", 1_000_000)
    with pytest.raises(ValueError, match="bomb.zip holds 0.0 MB and would unpack to 50 MB"), opened(path, tmp_path / "place"): pass
    assert not [file for file in (tmp_path / "place").rglob("*") if file.is_file()]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(ValueError, match="has 0 MB left"), opened(make_zip(tmp_path / "a.zip", {"1": b"0123456789"}, ZIP_STORED)): pass


def test_an_interrupted_unpacking_goes_on(zipped, tmp_path, monkeypatch):
    copied, real = [], shutil.copyfileobj

    def stop_after_three(packed, plain, size):
        copied.append(packed.name)
        if len(copied) == 4: raise KeyboardInterrupt
        real(packed, plain, size)

    monkeypatch.setattr(shutil, "copyfileobj", stop_after_three)
    with pytest.raises(KeyboardInterrupt), opened(zipped, tmp_path / "place"): pass
    with opened(zipped, tmp_path / "place") as source:
        assert len(copied) == 4 + 4 and len([path for path, problem in source.files if not problem]) == 7  # three were there
    with opened(zipped, tmp_path / "place") as source: assert len(copied) == 8 and source.root.is_dir()
    assert len([each for each in (tmp_path / "place").iterdir() if each.is_dir()]) == 1
    make_zip(zipped, {"1.dcm": b"other"})  # another archive of the same name does not find the files of the first
    with opened(zipped, tmp_path / "place") as source: assert [source.name(path) for path, _ in source.files] == ["scans.zip/1.dcm"]


def test_an_error_of_the_caller_passes(head, zipped):
    for path in (head, zipped):
        with pytest.raises(ZeroDivisionError), opened(path): 1 / 0  # noqa: B018


def test_scan_takes_a_zip_from_the_shell(zipped):
    done = subprocess.run([sys.executable, "-m", "ctbm.cli", "scan", str(zipped)], capture_output=True, text=True)
    assert done.returncode == 0 and "6 usable" in done.stdout, done.stderr
