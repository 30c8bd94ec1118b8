"The way from HU to a network's input: the published steps, and the laws of our own crop, windows and letterbox."

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ctbm import windowed
from ctbm.brain import brain_mask
from ctbm.lung import lung_mask
from ctbm.preprocess import (
    AIR_HU,
    FITS,
    PURPOSES,
    WINDOWS,
    Z_RANGE,
    NoSpacing,
    Preprocess,
    Unreadable,
    bounding_box,
    examples_grid,
    letterbox,
    published_mask,
    read_hu,
    resize,
    skull_crop,
    skull_mask,
    stages_figure,
    steps,
    window,
    windows_figure,
)

SERIES = [f"{number:02}" for number in range(1, 29)]


@pytest.fixture(scope="module")
def series(data):
    "A real head from the base of the skull to above the vertex"
    return {name: read_hu(data / "headct_ge_hispeed_tilt18p5" / f"{name}.dcm") for name in SERIES}


@pytest.fixture(scope="module")
def head(series):
    return series["15"]


def shifted(hu, rows, cols):
    "The picture moved, air where nothing was"
    out = np.full_like(hu, AIR_HU)
    height, width = hu.shape
    out[max(rows, 0) : height + min(rows, 0), max(cols, 0) : width + min(cols, 0)] = hu[
        max(-rows, 0) : height - max(rows, 0), max(-cols, 0) : width - max(cols, 0)
    ]
    return out


# The published steps, once more and independently


@pytest.mark.parametrize("name", ["02", "10", "15", "27"])
@pytest.mark.parametrize("size", [256, 224])
def test_published_steps(series, name, size):
    hu = series[name].astype(np.float64)
    hu[hu <= np.quantile(hu, 0.01)] = -1024
    rows, cols = np.nonzero(hu > np.quantile(hu, 0.98))
    crop = hu[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    image = np.stack([np.clip((crop - low) / 30, 0, 1) for low in (0, 30, 60)])

    height, width = crop.shape
    scale = min(size / height, size / width)
    new_height, new_width = round(height * scale), round(width * scale)
    image = torch.from_numpy(image)[None].float()
    image = F.interpolate(image, size=(new_height, new_width), mode="bilinear", align_corners=False)[0]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    image = F.pad(image, (left, size - new_width - left, top, size - new_height - top))

    ours = Preprocess.published(size)(series[name])
    assert ours.shape == (3, size, size) and ours.dtype == np.float32
    assert np.abs(ours - image.numpy()).max() < 1e-4 # PyTorch takes its coordinates in single precision


@pytest.mark.parametrize(("rows", "cols"), [(256, 233), (100, 91), (600, 700), (1, 5)])
def test_bilinear_is_torchs(rows, cols):
    plane = np.random.default_rng(0).random((380, 347), np.float32)
    theirs = F.interpolate(torch.from_numpy(plane)[None, None], size=(rows, cols), mode="bilinear", align_corners=False)[0, 0]
    assert np.abs(resize(plane, rows, cols, "bilinear") - theirs.numpy()).max() < 1e-4


# Our crop


@pytest.mark.parametrize("name", SERIES)
def test_skull_is_inside_and_headrest_outside(series, name):
    "The headrest of this series is bright, touches an ear and reaches columns 60 and 450"
    box, hu = skull_crop(series[name]), series[name]
    assert 0 < box.top < box.bottom < 512 and 60 < box.left < box.right < 450
    dense = cv2.morphologyEx((hu > 400).astype(np.uint8), cv2.MORPH_OPEN, np.ones((9, 9), np.uint8)) # no shell is as thick
    thick = bounding_box(dense)
    assert box.top <= thick.top and box.left <= thick.left and box.bottom >= thick.bottom and box.right >= thick.right


def test_box_changes_little_from_slice_to_slice(series):
    boxes = np.array([skull_crop(series[name]) for name in SERIES])
    assert np.abs(np.diff(boxes[:26], axis=0)).max() <= 40 # the last slices leave the head, 7 mm each
    sides = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert min(side[:24].min() for side in sides) > 250 and min(side.min() for side in sides) > 80


@pytest.mark.parametrize("name", ["01", "10", "15", "25", "28"])
def test_stray_bright_pixels_do_not_move_the_box(series, name):
    hu = series[name].copy()
    rng = np.random.default_rng(0)
    hu[rng.integers(0, 512, 30), rng.integers(0, 40, 30)] = 3000
    hu[5:9, 480:484] = 3000 # an earring beside the head
    assert skull_crop(hu) == skull_crop(series[name])
    assert bounding_box(published_mask(hu)) != bounding_box(published_mask(series[name]))


@pytest.mark.parametrize("name", ["10", "15", "25", "28"])
@pytest.mark.parametrize("hu_of_rest", [-100, 300, 1000])
def test_a_headrest_does_not_move_the_box(series, name, hu_of_rest):
    hu = series[name].copy()
    rows, cols = np.ogrid[:512, :512]
    radius = np.hypot(rows - 200, cols - 256)
    rest = (radius > 295) & (radius < 307) & (rows > 250)
    hu[rest] = np.maximum(hu[rest], hu_of_rest)
    assert skull_crop(hu) == skull_crop(series[name])


@pytest.mark.parametrize("name", ["05", "15", "24"])
@pytest.mark.parametrize(("rows", "cols"), [(20, -16), (-12, 8), (24, 24)])
def test_the_box_goes_with_the_head(series, name, rows, cols):
    top, bottom, left, right = skull_crop(series[name])
    assert skull_crop(shifted(series[name], rows, cols)) == (top + rows, bottom + rows, left + cols, right + cols)


@pytest.mark.parametrize("name", ["10", "15", "25"])
def test_padding_is_not_tissue(series, name):
    hu, (rows, cols) = series[name].copy(), np.ogrid[:512, :512]
    hu[np.hypot(rows - 255.5, cols - 255.5) > 250] = AIR_HU
    assert skull_crop(hu) == skull_crop(series[name])


def test_a_removed_bone_flap_does_not_cut_the_brain(head):
    hu, box = head.copy(), skull_crop(head)
    flap = np.zeros_like(hu, bool)
    flap[150:380, 330:] = True
    hu[flap & (hu > 100)] = 40
    bone = bounding_box(hu > 300)
    assert skull_crop(hu).right >= box.right - 16 > bone.left


@pytest.mark.parametrize("hu", [AIR_HU, -1000])
def test_nothing_to_crop_is_the_whole_image(hu):
    blank = np.full((512, 384), hu, np.float32)
    assert skull_crop(blank) == bounding_box(published_mask(blank)) == (0, 512, 0, 384)
    for spec in (Preprocess(), Preprocess.published()): assert not spec(blank).any()


@pytest.mark.parametrize("side", [64, 96, 128, 200, 256, 300, 768, 1024])
def test_the_box_does_not_depend_on_the_matrix(head, side):
    box = np.array(skull_crop(cv2.resize(head, (side, side), interpolation=cv2.INTER_AREA), margin_px=0)) / side
    assert np.abs(box - np.array(skull_crop(head, margin_px=0)) / 512).max() <= 2 / 64


def test_margin(head):
    tight, loose = skull_crop(head, 0), skull_crop(head, 9)
    assert np.array_equal(np.subtract(tight, loose), [9, -9, 9, -9])
    assert skull_crop(head, 900) == (0, 512, 0, 512)
    assert skull_mask(head)[tight.top : tight.bottom, tight.left : tight.right].sum() == skull_mask(head).sum()


# Windows and letterbox


def test_published_windows_are_the_thirds_of_one():
    assert Preprocess(windows=("low", "mid", "high")) == Preprocess() == Preprocess(windows=[(15, 30), (45, 30), (75, 30)])
    hu = np.linspace(-100, 200, 301, dtype=np.float32)
    assert np.allclose(sum(window(hu, *WINDOWS[name]) for name in ("low", "mid", "high")) / 3, window(hu, 45, 90), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("contrast", 17.5, 52.5), ("baseline", 0, 80), ("oedema", -60, 140),
        ("lung", -1350, 150), ("embolism", -250, 450), ("mediastinum", -160, 240),
    ],
)
def test_windows_of_the_other_pipelines(name, low, high):
    assert window(np.array([low - 1, low, (low + high) / 2, high, high + 1]), *WINDOWS[name]).tolist() == [0, 0, 0.5, 1, 1]


FOCAL = {"contrast": (17.5, 52.5), "baseline": (0, 80), "oedema": (-60, 140)} # HU, from black to white


def test_focal_windows_on_a_real_slice(head):
    "Three channels in this order, each linear between its two ends and flat beyond them"
    stack = Preprocess(size=512, crop="none", windows=tuple(FOCAL))(head) # 512 to 512: no resampling
    for plane, (low, high) in zip(stack, FOCAL.values(), strict=True):
        assert np.allclose(plane, (np.clip(head, low, high) - low) / (high - low), atol=1e-6)
        assert (plane[head <= low] == 0).all() and (plane[head >= high] == 1).all()
        assert 0 < ((head > low) & (head < high)).mean() < 1 and plane.min() == 0 and plane.max() == 1


def test_windows_figure_on_a_real_slice(head, tmp_path):
    fig = windows_figure(head, tuple(FOCAL), "slice 15")
    fig.savefig(tmp_path / "windows.png", dpi=60)
    assert (tmp_path / "windows.png").stat().st_size > 10_000
    for ax, (name, (low, high)) in zip(fig.axes, FOCAL.items(), strict=True):
        assert np.array_equal(ax.images[0].get_array(), window(head, *WINDOWS[name]))
        assert ax.get_title().startswith(name) and f"{low:g} to {high:g} HU" in ax.get_title()
        assert PURPOSES[name] in ax.get_xlabel().replace("\n", " ")
    with pytest.raises(ValueError, match="'oedema'"): windows_figure(head, ["edema"])


def test_window_before_resize(head):
    "The other order would show brain where bone and air meet"
    spec = Preprocess(crop="none", windows=("brain",))
    other = window(resize(head, 256, 256), *WINDOWS["brain"])
    assert np.abs(spec(head)[0] - other).max() > 0.3


@pytest.mark.parametrize("crop", ["skull", "published", "none"])
@pytest.mark.parametrize("shape", [(512, 512), (300, 512), (512, 301)])
def test_output_is_a_square_in_range(head, crop, shape):
    out = Preprocess(size=97, crop=crop, windows=("brain", "bone"))(head[: shape[0], : shape[1]])
    assert out.shape == (2, 97, 97) and out.dtype == np.float32 and out.min() >= 0 and out.max() <= 1 and out.flags.c_contiguous


def test_letterbox_is_centred_and_keeps_proportions():
    for rows, cols in ((400, 301), (301, 400), (7, 500), (512, 512), (1, 1000)):
        place = letterbox((rows, cols), 256)
        assert max(place.rows, place.cols) == 256 and min(place.rows, place.cols) >= 1
        assert 0 <= 256 - place.rows - 2 * place.top <= 1 and 0 <= 256 - place.cols - 2 * place.left <= 1


def test_pixels_that_are_not_square(data, head):
    squeezed = read_hu(data / "odd_derived" / "08_nonsquare_pixels.dcm")
    spec, square = Preprocess(crop="none"), Preprocess(crop="none")(head)
    with_spacing = spec(squeezed, spacing_mm=(0.4882812, 0.9765624))
    assert np.abs(with_spacing - square).mean() < 0.02 < np.abs(spec(squeezed) - square).mean()
    for wrong in ((0, 1), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="spacing_mm"): spec(squeezed, wrong)


def test_only_the_ratio_of_spacings_matters(head):
    spec = Preprocess()
    assert np.array_equal(spec(head), spec(head, (0.49, 0.49))) and np.array_equal(spec(head), spec(head, (3, 3)))


# Millimetres


def test_published_focal_order(head):
    "1 mm first, bilinear; then windows; then squeezed into the square by area"
    spec = Preprocess(size=224, crop="none", windows=("baseline",), resample_mm=1, fit="squeeze")
    spacing = 0.4882812 # of a field of view of 250 mm
    at_1_mm = F.interpolate(torch.from_numpy(head)[None, None], size=(250, 250), mode="bilinear", align_corners=False)[0, 0].numpy()
    want = cv2.resize(np.clip(at_1_mm / 80, 0, 1), (224, 224), interpolation=cv2.INTER_AREA)
    assert np.abs(spec(head, (spacing, spacing))[0] - want).max() < 1e-4


@pytest.mark.parametrize("crop", ["skull", "none"])
@pytest.mark.parametrize("fit", FITS)
def test_a_matrix_of_half_the_pixels_is_the_same_head(head, crop, fit):
    "What a spec makes of a head depends on the head in mm, not on the matrix it was stored in"
    spec = Preprocess(size=224, crop=crop, windows=("oedema",), resample_mm=1, fit=fit, margin_px=0)
    half = resize(head, 256, 256)
    assert np.abs(spec(head, (0.48, 0.48)) - spec(half, (0.96, 0.96))).mean() < 0.04


def test_scale_cuts_and_pads_about_the_centre(head):
    for size, spacing in ((224, 0.48), (400, 0.48), (97, 0.3), (301, 0.7)):
        spec = Preprocess(size=size, crop="none", windows=("bone",), resample_mm=1, fit="scale")
        side = round(512 * spacing)
        whole, out = resize(window(head, *WINDOWS["bone"]), side, side), spec(head, (spacing, spacing))[0]
        start = abs((size - side) // 2)
        if size < side: assert np.allclose(out, whole[start : start + size, start : start + size])
        else:
            assert np.allclose(out[start : start + side, start : start + side], whole)
            assert out.sum() == pytest.approx(whole.sum(), rel=1e-5), "black beyond the picture"


@pytest.mark.parametrize("fit", FITS)
def test_millimetres_need_a_spacing(head, fit):
    spec = Preprocess(resample_mm=1, fit=fit)
    for wrong in (None, (0, 1), (0.5, float("nan")), (0.5, -1)):
        with pytest.raises(NoSpacing, match="no pixel spacing.*set resample_mm to None"): spec(head, wrong)
    with pytest.raises(NoSpacing, match="another unit"): spec(head, (488, 488))


def test_squeeze_fills_the_square(head):
    spec = Preprocess(size=97, crop="none", windows=("brain",), fit="squeeze")
    part = head[100:300]
    assert np.array_equal(spec(part)[0], np.minimum(resize(window(part, *WINDOWS["brain"]), 97, 97), 1))
    assert np.array_equal(spec(part), spec(part, (0.5, 0.7))) # proportions are lost whatever they were


# The spec


def test_spec_survives_json_and_keys_a_table():
    in_mm = Preprocess(resample_mm=1, fit="scale")
    for spec in (Preprocess(), Preprocess.published(224), Preprocess(windows=("brain", (0.5, 3)), crop="none", margin_px=0), in_mm):
        copy = Preprocess.from_dict(json.loads(json.dumps(asdict(spec))))
        assert copy == spec and hash(copy) == hash(spec)
    assert len({Preprocess(), Preprocess(size=224), Preprocess.published()}) == 3
    assert json.dumps(asdict(in_mm)) == json.dumps(asdict(Preprocess(resample_mm=1.0, fit="scale"))) # one key, however it is written
    with pytest.raises(FrozenInstanceError): Preprocess().size = 3


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"sizes": 1}, "'size'"),
        ({"crop": "scull"}, "'skull'"),
        ({"resize": "bilinaer"}, "'bilinear'"),
        ({"floor": "publish"}, "'published'"),
        ({"windows": ["bran"]}, "'brain'"),
        ({"windows": []}, "windows"),
        ({"windows": [[40, 0]]}, "windows"),
        ({"size": 0}, "size"),
        ({"margin_px": -1}, "margin_px"),
        ({"fit": "squeezed"}, "'squeeze'"),
        ({"fit": "scale"}, "resample_mm"),
        ({"resample_mm": 0}, "resample_mm"),
        ({"resample_mm": float("nan")}, "resample_mm"),
    ],
)
def test_mistakes_are_named(values, nearest):
    with pytest.raises(ValueError, match=nearest): Preprocess.from_dict(values)


def test_calls_do_not_change_the_image_and_repeat(head):
    before = head.copy()
    for spec in (Preprocess(), Preprocess.published()):
        assert np.array_equal(spec(head), spec(head)) and np.array_equal(spec(head), spec(head.astype(np.int16)))
    assert np.array_equal(head, before)


# Pictures


IN_MM = Preprocess(windows=tuple(FOCAL), resample_mm=1, fit="scale")


@pytest.mark.parametrize("spec", [Preprocess(), Preprocess.published(), Preprocess(windows=("brain",)), IN_MM])
def test_steps_and_their_picture(series, spec, tmp_path):
    spacing = (0.5, 0.5)
    stages, count = steps(series["20"], spec, spacing), len(spec.windows)
    assert list(stages) == ["raw", "mask", "crop", *(f"w{i + 1}" for i in range(count))]
    assert np.array_equal(np.stack(list(stages.values())[3:]), spec(series["20"], spacing))
    fig = examples_grid([series["10"], series["20"]], ["10", "20"], spec, [spacing] * 2)
    fig.savefig(tmp_path / "grid.png", dpi=50)
    assert len(fig.axes) == 2 * (3 + count) and (tmp_path / "grid.png").stat().st_size > 10_000


def test_no_torch_and_no_matplotlib_needed():
    code = "import sys, ctbm.preprocess; assert not {'torch', 'matplotlib', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


# Brain only, and z-scores


def z_of(planes):
    return planes * 2 * Z_RANGE - Z_RANGE


def test_switched_off_is_what_it_was(head):
    "The new fields at their defaults, by name, and left out"
    for kind in (Preprocess(), Preprocess.published(), IN_MM):
        old = {name: value for name, value in asdict(kind).items() if name not in ("mask", "intensity")}
        assert Preprocess.from_dict(old) == kind, "a run of an older version names neither field"
        assert np.array_equal(kind(head, (0.5, 0.5)), Preprocess(**old, mask="none", intensity="window")(head, (0.5, 0.5)))


@pytest.mark.parametrize("name", ["10", "15", "24"])
def test_outside_the_brain_is_black_in_every_window(series, name):
    hu, mm = series[name], (0.488, 0.488)
    brain, spec = brain_mask(hu, spacing_mm=mm), Preprocess(size=512, crop="none", windows=("oedema", "bone", "brain"), mask="brain")
    out, without = spec(hu, mm), Preprocess(size=512, crop="none", windows=("oedema", "bone", "brain"))(hu, mm)
    assert not out[:, ~brain].any() and np.array_equal(out[:, brain], without[:, brain])
    assert without[0][~brain].any(), "a window below 0 HU shows water grey"


@pytest.mark.parametrize("crop", ["none", "skull"])
@pytest.mark.parametrize("mask", ["none", "brain"])
def test_z_over_the_brain(head, crop, mask):
    mm = (0.488, 0.488)
    brain = brain_mask(head, spacing_mm=mm)
    grey = window(head, *WINDOWS["brain"]) * (brain if mask == "brain" else 1)
    want = np.clip((grey - grey[brain].mean()) / grey[brain].std(), -Z_RANGE, Z_RANGE)
    box = skull_crop(head, 0) if crop == "skull" else bounding_box(head > -2000)
    rows, cols = box.bottom - box.top, box.right - box.left
    spec = Preprocess(size=max(rows, cols), crop=crop, margin_px=0, windows=("brain",), mask=mask, intensity="zscore_brain") # no resampling
    place = letterbox((rows, cols), spec.size)
    out = z_of(spec(head, mm)[0])[place.top : place.top + rows, place.left : place.left + cols]
    assert np.abs(out - box.cut(want)).max() < 1e-3, "the scale is that of the whole slice's brain, wherever the crop is"
    assert np.abs(np.rint(spec(head, mm) * 255) / 255 - spec(head, mm)).max() * 2 * Z_RANGE < 0.016 + 1e-6, "half of a step of 0.03"


def test_z_over_the_slice_as_published(head):
    "Mask, window, z-score with air, then resize: the order of the original; ours resizes first, which is the same inside the range"
    mm = (0.488, 0.488)
    grey = window(head, *WINDOWS["brain"]) * brain_mask(head, spacing_mm=mm)
    z = ((grey - grey.mean()) / (grey.std() + 1e-8)).astype(np.float32)
    want = F.interpolate(torch.from_numpy(z)[None, None], size=(256, 256), mode="bilinear", align_corners=False)[0, 0].numpy()
    spec = Preprocess(crop="none", windows=("brain",), resize="bilinear", mask="brain", intensity="zscore_slice")
    assert np.abs(z_of(spec(head, mm)[0]) - np.clip(want, -Z_RANGE, Z_RANGE)).max() < 2e-3


def test_z_does_not_change_with_scale_and_offset(head):
    "Another calibration of the scanner, as long as no window clips it"
    spec = Preprocess(crop="none", windows=((40, 4000),), intensity="zscore_slice")
    assert np.abs(spec(head) - spec(0.9 * head + 20)).max() < 1e-4


def test_padding_of_the_letterbox_is_black_not_grey(head):
    spec = Preprocess(size=200, crop="none", windows=("brain",), mask="brain", intensity="zscore_slice")
    out = spec(head[100:400], (0.488, 0.488))[0]
    assert np.allclose(out[:5], out[100, 0], atol=1e-5) and out[:5].max() < 0.5


@pytest.mark.parametrize("intensity", ["zscore_brain", "zscore_slice"])
def test_nothing_to_measure(intensity):
    for value in (AIR_HU, 40, 3000):
        out = Preprocess(mask="brain", intensity=intensity)(np.full((300, 200), value, np.float32))
        assert (out == 0.5).all() and np.isfinite(out).all()


def test_millimetres_and_masks(head):
    spec = Preprocess(size=224, crop="none", windows=("oedema",), resample_mm=1, mask="brain")
    for fit in FITS:
        one, half = (Preprocess(**asdict(spec) | {"fit": fit})(hu, (mm, mm)) for hu, mm in ((head, 0.48), (resize(head, 256, 256), 0.96)))
        assert np.abs(one - half).mean() < 0.02 and (one == 0).mean() > 0.3


def test_stages_of_masks_and_z_scores(series, tmp_path):
    spec = Preprocess(windows=("brain", "high"), mask="brain", intensity="zscore_brain")
    stages = steps(series["15"], spec)
    assert list(stages) == ["raw", "mask", "crop", "z1", "z2"]
    assert np.array_equal(stages["mask"], brain_mask(series["15"])) and (stages["crop"] == AIR_HU).mean() > 0.2
    fig = stages_figure([series["15"], series["20"]], ["15", "20"], spec, notes=["fine", "fine"])
    fig.savefig(tmp_path / "stages.png", dpi=40)
    assert np.array_equal(fig.axes[4].images[0].get_array(), spec(series["15"])[0]), "the last picture is the exact input"
    examples_grid([series["15"]], ["15"], spec).savefig(tmp_path / "grid.png", dpi=40)
    for wrong in ({"mask": "brian"}, {"intensity": "zscore"}):
        with pytest.raises(ValueError, match="did you mean"): Preprocess(**wrong)


# JPEG of three windows


@pytest.fixture
def jpeg(data, tmp_path):
    "A real chest slice as the competition publishes it, and the slice"
    hu, path = read_hu(data / "chest_lungdx" / "1-13.dcm"), tmp_path / "012_1.2.3.jpg"
    how = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    cv2.imwrite(str(path), windowed.colours(resize(hu, 256, 256))[..., ::-1], how)
    return path, hu


def test_a_jpeg_gives_the_pixels_of_its_slice(jpeg):
    path, hu = jpeg
    spec = Preprocess(crop="none", windows=("lung", "embolism", "mediastinum"))
    assert read_hu(path).dtype == np.float32 and read_hu(path).shape == (256, 256) and read_hu(str(path)).min() >= AIR_HU
    apart = np.abs(spec(read_hu(path)) - spec(resize(hu, 256, 256))) * 255
    assert apart.mean(axis=(1, 2)).max() < 3


def test_a_jpeg_that_is_not_windows_says_so(jpeg, data, tmp_path):
    path, _ = jpeg
    cut, grey, empty = (tmp_path / name for name in ("cut.jpg", "grey.jpeg", "empty.JPG"))
    cut.write_bytes(path.read_bytes()[:4000])
    cv2.imwrite(str(grey), cv2.imread(str(path))[..., 0])
    empty.write_bytes(b"")
    head = data / "ich_ctich_3patients" / "491.jpg" # one window
    for file, why in ((cut, "cut short"), (grey, "grey picture"), (empty, "0 bytes"), (head, "grey picture")):
        with pytest.raises(Unreadable, match=why) as caught: read_hu(file)
        assert caught.value.path == file and not caught.value.reason.startswith(str(file))
    with pytest.raises(FileNotFoundError): read_hu(tmp_path / "gone.jpg")


def test_chest_windows_on_a_real_slice(data, tmp_path):
    hu = read_hu(data / "chest_lungdx" / "1-13.dcm")
    fig = windows_figure(hu, ("lung", "embolism", "mediastinum"), "a real chest")
    fig.savefig(tmp_path / "chest.png", dpi=40)
    lung, embolism, mediastinum = (ax.images[0].get_array()[lung_mask(hu)] for ax in fig.axes)
    assert 0.2 < np.median(lung) < 0.5 and np.median(embolism) == np.median(mediastinum) == 0, "only one window shows what is in the lung"
    with pytest.raises(ValueError, match="did you mean 'lung'"): Preprocess(organ="lungs")
