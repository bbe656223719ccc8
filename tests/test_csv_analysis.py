"""csv_analysis.py: the measures against their definitions, the cache, and the command line."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_images
from PIL import Image, PngImagePlugin
from scipy import ndimage

import comparison
import csv_analysis
from csv_analysis import METRICS, analyse, decode_grey, sharpness, statistics, to_grey
from utils import list_images, read_image, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "csv_analysis.py")


def command(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def direct(image, r0=0.25):
    """The four measures of one grey image in [0, 1], written down from their definitions in float64."""
    H, W = image.shape
    laplacian = ndimage.convolve(image, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0.0]]), mode="mirror")
    gx, gy = ndimage.sobel(image, axis=1, mode="mirror"), ndimage.sobel(image, axis=0, mode="mirror")
    power = np.abs(np.fft.fftshift(np.fft.fft2(image))) ** 2
    y, x = np.mgrid[:H, :W]
    high = np.hypot(y - H // 2, x - W // 2) > r0 * min(H, W) / 2
    ac = np.ones((H, W), bool)
    ac[H // 2, W // 2] = False
    ratios = (0, 0) if np.ptp(image) == 0 else (power[high].sum() / power.sum(), power[high].sum() / power[ac].sum())
    return laplacian.var(), (gx ** 2 + gy ** 2).mean(), *ratios


def some_images(n, H, W, seed=0):
    """Noise, smooth and low-contrast images, uint8 (n, H, W, 3)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, H, W, 3)).astype(float)
    for i in range(1, n, 3):
        images[i] = ndimage.gaussian_filter(images[i], (2, 2, 0))
    for i in range(2, n, 3):
        images[i] = 120 + images[i] / 64
    return images.round().astype(np.uint8)


def save_folder(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


def corrupt(path):
    path.write_bytes(path.read_bytes()[:60])


# ---------------------------------------------------------------------------------------------------------------------
# Core

def test_grey_is_bit_identical_to_pil():
    rgb = np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8)
    levels = np.arange(256, dtype=np.uint8)
    rgb[0, :256] = levels[:, None]                              # every grey, and the pure ramps
    for c in range(3):
        rgb[1 + c], rgb[1 + c, :256, c] = 0, levels
    assert np.array_equal(to_grey(rgb[None])[0], np.asarray(Image.fromarray(rgb).convert("L")))


@pytest.mark.parametrize("H, W", [(32, 32), (31, 33), (12, 7), (64, 48), (2, 2), (3, 2), (1, 6), (5, 1), (28, 28)])
@pytest.mark.parametrize("r0", [0.25, 0.6])
def test_sharpness_matches_direct_definitions(H, W, r0):
    images = some_images(9, H, W)
    grey = [np.asarray(Image.fromarray(i).convert("L"), np.float64) / 255 for i in images]
    want = np.array([direct(g, r0) for g in grey])
    got = sharpness(images, r0)
    assert tuple(got.columns) == METRICS
    np.testing.assert_allclose(got.to_numpy(), want, rtol=1e-6, atol=1e-13)
    assert np.array_equal(sharpness(to_grey(images), r0), got)


def test_constant_image_has_no_sharpness():
    images = np.stack([np.full((31, 30), level, np.uint8) for level in (0, 1, 77, 255)])
    assert (sharpness(images).to_numpy() == 0).all()


def test_radius_is_strict():
    # cos(pi x / 2) takes the values 1, 0, -1, 0: exact in 8 bits, all its power at radius 8 = 0.5 * 32 / 2.
    wave = 128 + 100 * np.array([1, 0, -1, 0] * 8)
    image = np.broadcast_to(wave, (1, 32, 32)).astype(np.uint8)
    assert sharpness(image, r0=0.5).hf_ratio_ac[0] < 1e-20
    assert sharpness(image, r0=0.499).hf_ratio_ac[0] == pytest.approx(1, abs=1e-12)


def test_only_hf_ratio_ac_ignores_brightness():
    image = np.random.default_rng(1).integers(0, 100, (1, 32, 32), dtype=np.uint8)
    dark, bright = sharpness(image).iloc[0], sharpness(image + np.uint8(120)).iloc[0]
    assert bright.hf_ratio < 0.5 * dark.hf_ratio
    np.testing.assert_allclose(bright[["lap_var", "tenengrad", "hf_ratio_ac"]].astype(float),
                               dark[["lap_var", "tenengrad", "hf_ratio_ac"]].astype(float), rtol=1e-12)


def test_batches_change_nothing(monkeypatch):
    images = some_images(10, 16, 16)
    whole = sharpness(images)
    monkeypatch.setattr(csv_analysis, "BATCH_PIXELS", 3 * 256)
    assert np.array_equal(sharpness(images), whole)
    assert len(sharpness(images[:0])) == 0


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8), np.float32), np.zeros((8, 8), np.uint8),
                                    np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 0, 8), np.uint8)])
def test_sharpness_refuses_other_arrays(images):
    with pytest.raises(ValueError):
        sharpness(images)


def test_statistics():
    table = pd.DataFrame({m: np.array([1.0, 2, 3, 4, 10]) * (i + 1) for i, m in enumerate(METRICS)})
    got = statistics(table).set_index("metric")
    assert got.loc["tenengrad", ["n", "mean", "median", "p90"]].tolist() == pytest.approx([5, 8, 6, 15.2])
    assert got.loc["lap_var", "std"] == pytest.approx(np.sqrt((9 + 4 + 1 + 0 + 36) / 4))


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_fast_decoding_equals_read_image(tmp_path):
    rgb = some_images(1, 20, 24)[0]
    image = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6                                            # rotated by a quarter
    key = PngImagePlugin.PngInfo()
    key.add_text("note", "text after all")
    image.save(tmp_path / "plain.png")
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    image.save(tmp_path / "text.png", pnginfo=key)
    image.save(tmp_path / "turned.png", exif=exif)
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "jpeg_in_disguise.png", format="JPEG")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    files = list_images(tmp_path)
    assert len(files) == 11
    for path in files:
        assert np.array_equal(decode_grey(path, Path(path).read_bytes()), read_image(path, 1)), path
    assert decode_grey(tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes()).shape == (24, 20)


def test_processes_and_mixed_sizes_change_nothing(tmp_path):
    images = [*some_images(30, 16, 16), *some_images(20, 12, 20, seed=1), *some_images(1, 40, 40, seed=2)]
    np.random.default_rng(3).shuffle(order := list(range(len(images))))
    folder = save_folder(tmp_path / "images", [images[i] for i in order])
    corrupt(folder / "00007.png")
    files = list_images(folder)
    one, digests, sizes = analyse(files, skip_corrupt=True, workers=1)
    two, digests2, sizes2 = analyse(files, skip_corrupt=True, workers=2, batch_size=8)
    assert np.array_equal(one, two, equal_nan=True) and digests == digests2 and sizes == sizes2
    assert np.flatnonzero(np.isnan(one).any(1)).tolist() == [7] and sum(sizes.values()) == 50
    assert csv_analysis.file_digests(files, 2, 8) == digests
    for row, i in enumerate(order):
        if row != 7:
            np.testing.assert_array_equal(one[row], sharpness(images[i][None]).to_numpy()[0])


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def test_command_writes_cache_statistics_and_fingerprint(tmp_path):
    images = some_images(6, 16, 16)
    folder = save_folder(tmp_path / "gen" / "deep", images)
    Image.fromarray(images[0, :9]).save(tmp_path / "gen" / "a,b.png")
    out = tmp_path / "new" / "out"
    write_json(tmp_path / "gen" / "manifest.json", {"kind": "samples", "seed": 3})
    done = command("--gen", tmp_path / "gen", "--out_dir", out, "--tag", "CrossVampVAE")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "cache_CrossVampVAE.json").read_text())["manifest"]["seed"] == 3
    assert sorted(os.listdir(out)) == ["CrossVampVAE_statistics.csv", "cache_CrossVampVAE.csv",
                                       "cache_CrossVampVAE.json"]
    table = pd.read_csv(out / "cache_CrossVampVAE.csv").set_index("file")
    assert list(table.columns) == list(METRICS)
    assert list(table.index) == ["a,b.png", *(f"deep/{i:05d}.png" for i in range(6))]
    np.testing.assert_allclose(table.loc[[f"deep/{i:05d}.png" for i in range(6)]], sharpness(images), rtol=1e-12)
    got = pd.read_csv(out / "CrossVampVAE_statistics.csv", index_col="metric")
    np.testing.assert_allclose(got["p90"], [np.percentile(table[m], 90) for m in METRICS], rtol=1e-9)
    np.testing.assert_allclose(got["std"], table.std(ddof=1), rtol=1e-9)
    assert json.loads((out / "cache_CrossVampVAE.json").read_text())["sizes"] == {"16x16": 6, "16x9": 1}

    folder.joinpath("00001.png").write_bytes(b"not an image")
    done = command("--gen", tmp_path / "gen", "--out_dir", tmp_path / "other", "--tag", "CrossVampVAE")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "00001.png" in done.stderr
    assert os.listdir(tmp_path / "other") == []


@pytest.fixture
def cached(tmp_path, script):
    """A folder analysed once: -> (run again, folder, out)."""
    folder, out = save_folder(tmp_path / "gen", some_images(5, 16, 16)), tmp_path / "out"

    def again(*extra):
        return script("--gen", folder, "--out_dir", out, "--tag", "t", *extra)
    assert again()[0] == 0
    return again, folder, out


def test_unchanged_folder_reuses_the_cache(cached):
    again, folder, out = cached
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    os.utime(folder / "00000.png", (1, 1))                      # a new date is no new content
    (out / "t_statistics.csv").unlink()
    code, stdout, stderr = again()
    assert code == 0 and "up to date, 5 images" in stdout and stderr == ""
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    assert after[out / "t_statistics.csv"][1] == before[out / "t_statistics.csv"][1]
    assert after[out / "cache_t.csv"] == before[out / "cache_t.csv"]


def test_names_may_hold_whatever_ends_a_line_or_a_cell(tmp_path, script):
    names = ["a\rb.png", "a\nb.png", 'a"b.png', "a,b.png", " a.png", "a\r\nb.png"]
    folder = save_folder(tmp_path / "gen", some_images(len(names), 8, 8))
    for path, name in zip(sorted(folder.iterdir()), names):
        path.rename(folder / name)
    for said in ("6 images", "up to date, 6 images"):
        code, stdout, _ = script("--gen", folder, "--out_dir", tmp_path / "out", "--tag", "t")
        assert code == 0 and said in stdout
    assert len(comparison.read_cache(tmp_path / "out/cache_t.csv")) == 6


def test_a_reused_cache_says_where_the_images_lie_now(cached, script):
    _, folder, out = cached
    moved = folder.rename(folder.with_name("moved"))
    write_json(moved / "manifest.json", {"kind": "samples", "count": 5, "done": 5})
    code, stdout, stderr = script("--gen", moved, "--out_dir", out, "--tag", "t")
    record = read_json(out / "cache_t.json")
    assert code == 0 and "up to date" in stdout and stderr == ""
    assert record["folder"] == str(moved) and record["manifest"]["kind"] == "samples" and "cache_sha256" in record


def test_an_unfinished_export_is_said(cached, script):
    again, folder, out = cached
    for manifest, said in (({"count": 9, "done": 5}, "5 images of an export of 9, 5 of them finished; run its test.py command"),
                           ({"count": 5, "done": 3}, "5 images of an export of 5, 3 of them finished; run"),
                           ({"count": 6, "done": 6}, "5 images of an export of 6"), ({"count": 5, "done": 5}, None)):
        write_json(folder / "manifest.json", {"kind": "samples", **manifest})
        code, _, stderr = again()
        assert code == 0 and (said in stderr if said else stderr == "")


@pytest.mark.parametrize("change", ["pixels", "name", "added", "r0", "definition"])
def test_changed_folder_or_definition_is_measured_again(cached, change):
    again, folder, out = cached
    before, extra = (out / "cache_t.csv").read_text(), ()
    if change == "pixels":                                      # same name, size in bytes and date
        path = folder / "00002.png"
        size, stat = path.stat().st_size, path.stat()
        Image.fromarray(np.random.default_rng(9).integers(0, 2, (16, 16), dtype=np.uint8) * np.uint8(255)).save(path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))  # a decoder stops at the end of the PNG
        assert path.stat().st_size == size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        (folder / "00002.png").rename(folder / "00002b.png")           # in the same place of the order
    elif change == "added":
        Image.new("RGB", (8, 8)).save(folder / "y.png")
    elif change == "r0":
        extra = ("--r0", "0.5")
    else:
        record = json.loads((out / "cache_t.json").read_text())
        record["definitions"]["tenengrad"] = "as an older version had it"
        write_json(out / "cache_t.json", record)
    code, stdout, stderr = again(*extra)
    assert code == 0 and "up to date" not in stdout and stderr == ""
    assert ((out / "cache_t.csv").read_text() == before) == (change == "definition")
    assert "up to date" in again(*extra)[1]


@pytest.mark.parametrize("name, content", [("cache_t.csv", "file,lap_var\nx,1\n"), ("cache_t.json", "{"),
                                           ("cache_t.json", "{}"), ("cache_t.json", "[" * 100000)])
def test_damaged_cache_is_measured_again_aloud(cached, name, content):
    again, _, out = cached
    before = (out / "cache_t.csv").read_text()
    (out / name).write_text(content)
    code, stdout, stderr = again()
    assert code == 0 and stderr.startswith("warning: ") and name in stderr and stderr.count("\n") == 1
    assert "up to date" not in stdout and (out / "cache_t.csv").read_text() == before


def test_corrupt_images_stop_or_are_counted(cached):
    again, folder, out = cached
    corrupt(folder / "00001.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    before = {p: p.read_bytes() for p in out.iterdir()}
    code, stdout, stderr = again()
    assert code == 2 and stderr.count("\n") == 1 and "00001.png" in stderr and stdout == ""
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    for expected in ("4 images in", "up to date, 4 images"):
        code, stdout, stderr = again("--skip_corrupt")
        assert code == 0 and expected in stdout and "2 of 6 files" in stderr and "00001.png" in stderr
    assert json.loads((out / "cache_t.json").read_text())["skipped"] == ["00001.png", "gone.png"]
    assert "00001.png" not in (out / "cache_t.csv").read_text()
    assert again()[0] == 2                                      # what was skipped then still stops a run that may not


@pytest.mark.parametrize("files", [0, 1, 2])
def test_full_disk_leaves_the_old_results(files, cached, monkeypatch):
    """The disk is full after so many files."""
    again, _, out = cached
    before = {p: p.read_bytes() for p in out.iterdir()}
    written = []

    def full(fd):
        written.append(fd)
        if len(written) > files:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    code, _, stderr = again("--r0", "0.5")
    assert code == 2 and len(written) == files + 1 and "disk is full" in stderr and stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("tag", ["", "a/b", "../up", "a,b", "a b", ".hidden", "-x", "cache_x", "ü", "x" * 101, "a\nb"])
def test_odd_tags_are_refused(tmp_path, script, tag):
    save_folder(tmp_path / "gen", some_images(1, 8, 8))
    code, _, stderr = script("--gen", tmp_path / "gen", "--out_dir", tmp_path / "out", f"--tag={tag}")
    assert code == 2 and "--tag" in stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["missing", "empty", "file", "all_corrupt", "out_is_a_file", "float"])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, script, case):
    gen, out = tmp_path / "gen", tmp_path / "out"
    if case == "file":
        gen.write_text("x")
    elif case != "missing":
        gen.mkdir()
        (gen / "notes.txt").write_text("x")
    if case == "all_corrupt":
        (gen / "0.png").write_bytes(b"x")
    if case == "out_is_a_file":
        save_folder(gen, some_images(1, 8, 8))
        out.write_text("x")
    if case == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(gen / "0.tif")
    code, stdout, stderr = script("--gen", gen, "--out_dir", out, "--tag", "t", *(["--skip_corrupt"]
                                                                                  if case == "all_corrupt" else []))
    assert code == 2 and stdout == ""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(out if case == "out_is_a_file" else gen) in stderr
    assert not out.is_dir() or os.listdir(out) == []


@pytest.mark.parametrize("flag, value", [("--r0", "1"), ("--r0", "-0.1"), ("--workers", "0"), ("--batch_size", "0"),
                                         ("--r0", "nan")])
def test_flags_out_of_range_are_refused(tmp_path, script, flag, value):
    code, _, stderr = script("--gen", tmp_path, "--out_dir", tmp_path / "o", "--tag", "t", flag, value)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert code == 2 and flag in stderr and not (tmp_path / "o").exists()


def test_fingerprint_counts_the_images_that_were_measured(tmp_path, monkeypatch):
    write_images(tmp_path / "g", 3, size=8)
    (tmp_path / "g/bad.png").write_bytes(b"no")
    csv_analysis.main(["--gen", str(tmp_path / "g"), "--out_dir", str(tmp_path / "o"), "--tag", "t", "--skip_corrupt"])
    record = json.loads((tmp_path / "o/cache_t.json").read_text())
    assert (record["files"], record["images"]) == (4, 3)
