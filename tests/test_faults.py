"""Damaged and untrusted files, odd names, and flags nobody thought of.

The fuzz takes a good file of each kind that the scripts read, damages it, and runs the script. FAULT_SEED chooses the
damage, FAULT_SECONDS the time for each kind of file; a failure names both, with the number of the round. The slow variant
takes a minute for each.
"""
import html.parser
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import comparison
import csv_analysis
import PR_Calculate
import train
import utils
from models.vamp_flow import LIMITS, BiCrossAttnFlow, CrossFlowVampVAE, perturb_
from utils import UserError, cached_statistics, list_images, load_model, png_is_whole, read_checkpoint, read_image, write_json

# "import test" would find the standard library's package of that name.
spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
test_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_script)

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = os.environ.get("FAULT_SEED", "0")
SECONDS = float(os.environ.get("FAULT_SECONDS", "0.6"))

TINY = ["--hidden_dims", "8", "--latent_dim", "4", "--num_components", "3", "--flow_length", "1", "--flow_seq_len", "1",
        "--flow_embed_dim", "8", "--flow_heads", "2", "--flow_layers", "1", "--lpips_net", "none", "--fid_every", "0",
        "--img_size", "8", "--sample_every", "0", "--no-tensorboard", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *flags): a script's main as its command line would run it -> exit code, stdout, stderr."""
    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        capsys.readouterr()
        try:
            utils.run(main)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        finally:
            for s, handler in handlers:
                signal.signal(s, handler)
        return code, *capsys.readouterr()
    return run


def assert_refused(result, *words):
    """Exit code 2 and one line that begins with "error: " and holds the words."""
    code, _, stderr = result
    lines = [line for line in stderr.splitlines() if not line.startswith(("warning: ", "note: "))]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert all(str(w) in lines[0] for w in words), lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# Damage

def saved(save, *args, **kwargs):
    """What save(file, ...) writes."""
    save(buffer := io.BytesIO(), *args, **kwargs)
    return buffer.getvalue()


IMAGES = [saved(Image.new("RGB", (3, 3)).save, "PNG"), saved(Image.new("L", (8, 8)).save, "JPEG")]


def other_kinds():
    """Files of other kinds than the one that is expected."""
    with zipfile.ZipFile(empty := io.BytesIO(), "w"):
        pass
    return [b"hello\n", b"{}", b"[]", b"null", b"1e999", b"[" * 100_000, b'{"checksum": 1, "metrics": {"fid": 1}}', b"\0" * 500,
            b"a,b\n1,2\n", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", empty.getvalue(), pickle.dumps({"a": 1}), b"\xff\xfe\x00",
            *IMAGES, saved(np.savez, a=np.zeros(3)), saved(np.save, np.zeros(3)),
            saved(lambda f: torch.save({"model": torch.zeros(3)}, f)), saved(lambda f: torch.save(torch.zeros(2), f))]


OTHER_KINDS = other_kinds()
DAMAGE = ("truncated", "flipped", "empty", "other kind", "random bytes", "part repeated", "hole")


def damage(good, kind, rng):
    """A good file's bytes -> the same after an accident of that kind."""
    data = bytearray(good)
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == "truncated":
        return bytes(data[:i])
    if kind == "flipped":
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "empty":
        return b""
    elif kind == "other kind":
        return rng.choice(OTHER_KINDS)
    elif kind == "random bytes":
        n = rng.choice((1, 2, 8, 64, len(data)))
        data[i:i + n] = rng.randbytes(min(n, len(data) - i))
    elif kind == "part repeated":
        data[j:j] = data[i:j]
    elif kind == "hole":                                        # as after a power cut, where the size was written first
        data[i:j] = bytes(j - i)
    return bytes(data)


def test_damage_of_each_kind_changes_a_file():
    good = os.urandom(500)
    for kind in DAMAGE:
        assert sum(damage(good, kind, random.Random(i)) != good for i in range(50)) > 45, kind


def fuzz(name, path, run, seconds):
    """Damage the file at `path` in one way after another until the time is up, and judge what run() makes of it.

    run() -> exit code, standard error, numbers. Allowed: the numbers of the good file, silently or with a warning that
    names it; numbers left out with such a warning (numbers None); or one error line that names it.
    """
    good, counts, start, i = path.read_bytes(), Counter(), time.monotonic(), 0
    code, stderr, right = run()
    assert code == 0 and right is not None, f"{name}: the good file is not taken: {stderr}"
    while time.monotonic() - start < seconds or i < len(DAMAGE):
        kind = DAMAGE[i % len(DAMAGE)]
        data = damage(good, kind, random.Random(f"{SEED} {name} {i}"))
        if path.suffix == ".png" and data in IMAGES:            # nothing is wrong with another image
            data = b""
        where = f"{name}: round {i} of FAULT_SEED={SEED}, {kind}"
        path.write_bytes(data)
        try:
            code, stderr, numbers = run()
        except Exception as e:
            raise AssertionError(f"{where}: {type(e).__name__}: {e}") from e
        finally:
            path.write_bytes(good)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in stderr, where
        named = any(path.name in line for line in stderr.splitlines() if line.startswith("warning: "))
        if code == 0:
            assert not errors, (where, stderr)
            assert numbers == right or (numbers is None and named), (where, stderr, numbers)
            counts["left out with a warning" if numbers is None else "recomputed with a warning" if named else "harmless"] += 1
        else:
            assert code == 2 and len(errors) == 1 and path.name in errors[0], (where, code, stderr)
            counts["refused"] += 1
        i += 1
    print(f"{name:<24} {i:5d} files damaged: " + ", ".join(f"{v} {k}" for k, v in sorted(counts.items())))
    return counts


class Means:
    """Stands in for a feature network: the means of 4x4 squares."""
    dims, key, name, sha256 = 12, "means", "means", "0" * 64

    def __init__(self, device=None, *args, **kwargs):
        self.device = device

    def __call__(self, images):
        return torch.nn.functional.avg_pool2d(images.float(), 4).flatten(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images/ (12 of 8x8 and 3 to hold out) and runs/x, a run of two epochs stopped after the first."""
    root = tmp_path_factory.mktemp("trained")
    write_images(root / "images" / "train", 12, size=8, seed=1)
    write_images(root / "images" / "test", 3, size=8, seed=2)
    argv, handlers = sys.argv, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = ["train.py", *TINY, "--dataset", "folder", "--data_dir", str(root / "images"), "--batch_size", "12",
                "--epochs", "2", "--stop_epoch", "1", "--save_dir", str(root / "runs"), "--exp_name", "x"]
    try:
        train.main()
    finally:
        sys.argv = argv
        for s, handler in handlers:
            signal.signal(s, handler)
    return root


# Each target sets a script up and returns the file to damage, and run() for fuzz().

def of_train(call, trained, folder, monkeypatch):
    """train.py --resume CHECKPOINT, one epoch more."""
    monkeypatch.setattr(train, "save_curves", lambda *args: None)              # a picture, and slow
    path, out = folder / "last.pth", folder / "out"
    shutil.copy(trained / "runs" / "x" / "last.pth", path)

    def run():
        shutil.rmtree(out, ignore_errors=True)
        code, _, stderr = call(train.main, "--resume", path, "--save_dir", out, "--exp_name", "y", "--sample_every", 0,
                               "--stop_epoch", 2, "--threads", 1)
        last = out / "y" / "last.pth"
        assert last.exists() == (code == 0)
        return code, stderr, {k: v.tolist() for k, v in read_checkpoint(last)["model"].items()} if code == 0 else None
    return path, run


def of_test(call, trained, folder, monkeypatch, again=False):
    """test.py --resume CHECKPOINT: samples."""
    path, fake = folder / "last.pth", folder / "data" / "fake_cifar"
    shutil.copy(trained / "runs" / "x" / "last.pth", path)

    def run(again=False):
        if not again:
            shutil.rmtree(fake, ignore_errors=True)
        code, _, stderr = call(test_script.main, "--resume", path, "--data_dir", folder / "data", "--save_dir", folder / "out",
                               "--do_real", "False", "--do_pictures", "False", "--num_samples", 3, "--device", "cpu")
        assert again or fake.exists() == (code == 0)
        return code, stderr, [f.read_bytes() for f in sorted(fake.glob("*.png"))]
    return path, run


def of_manifest(call, trained, folder, monkeypatch):
    """test.py over an export that is there already."""
    _, run = of_test(call, trained, folder, monkeypatch)
    run()
    return folder / "data" / "fake_cifar" / "manifest.json", lambda: run(again=True)


def of_pr(call, trained, folder, monkeypatch, file):
    """PR_Calculate.py with an image, the manifest of a folder, or the feature cache."""
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    out, right = folder / "pr.json", {}
    write_images(folder / "fake", 6, size=8, seed=5)
    write_json(folder / "fake" / "manifest.json", {"kind": "samples", "count": 6, "seed": 0})

    def run():
        out.unlink(missing_ok=True)
        code, _, stderr = call(PR_Calculate.main, "--real_dir", trained / "images" / "train", "--fake_dir", folder / "fake",
                               "--pca_dim", 2, "--device", "cpu", "--feature_cache", folder / "cache", "--out", out)
        assert out.exists() == (code == 0)
        numbers = json.loads(out.read_text()) if code == 0 else {"metrics": right}
        assert not right or numbers["metrics"] == right
        right.update(numbers["metrics"])
        said = "has no checksum" in stderr or "is no manifest of test.py" in stderr
        return code, stderr, numbers if code == 0 and not said else None
    run()
    return sorted(folder.glob(file))[0], run


def of_csv(call, trained, folder, monkeypatch, file):
    """csv_analysis.py with an image, its cache, or its fingerprint."""
    write_images(folder / "gen", 4, size=8, seed=5)
    out = folder / "out"

    def run():
        code, stdout, stderr = call(csv_analysis.main, "--gen", folder / "gen", "--out_dir", out, "--tag", "t")
        numbers = [(out / n).read_text() for n in ("cache_t.csv", "t_statistics.csv")] if code == 0 else None
        return code, stderr, numbers and [*numbers, stdout.partition("\n")[2]]
    run()
    return folder / file, run


def of_comparison(call, trained, folder, monkeypatch, file):
    """comparison.py with a cache, its fingerprint, or an evaluation."""
    for name in ("box_figure", "violin_figure"):                # pictures, and slow
        monkeypatch.setattr(comparison, name, lambda *args: Figure())
    monkeypatch.setattr(comparison, "difference_figure", lambda *args: (Figure(), True, True))
    monkeypatch.setattr(comparison, "render", lambda *args: b"")
    for i, tag in enumerate(("a", "real")):
        write_images(folder / tag, 5, size=8, seed=i)
        assert call(csv_analysis.main, "--gen", folder / tag, "--out_dir", folder / "caches", "--tag", tag)[0] == 0
    write_json(folder / "caches" / "pr_a.json", {"tag": "a", "metrics": {"fid": 12.5, "recall": 0.75}, "protocol": {"k": 3}})
    out, good = folder / "out", None

    def run():
        nonlocal good
        shutil.rmtree(out, ignore_errors=True)
        code, _, stderr = call(comparison.main, "--cache_dir", folder / "caches", "--out_dir", out, "--bootstrap", 3)
        assert out.exists() == (code == 0)
        if code:
            return code, stderr, None
        numbers, text = (out / "summary.csv").read_text(), (out / "summary.md").read_text()
        good = good or numbers
        assert numbers == good                                  # whatever is left out, these are the caches'
        if any(said in stderr for said in ("left out", "has no checksum", "protocol of cache_a.csv is unknown")):
            return code, stderr, None
        return code, stderr, [numbers, (out / "evaluation.csv").read_text(), text]
    return folder / "caches" / file, run


def of_kept(call, folder, compute):
    """A file in `folder` that compute() -> numbers makes, or reads."""
    numbers = []

    def run():
        numbers.clear()
        code, _, stderr = call(lambda: numbers.append(compute()))
        return code, stderr, numbers[0]
    run()
    return next(folder.glob("*.npz")), run


def of_statistics(call, trained, folder, monkeypatch):
    """The Inception statistics of the training set, as train.py keeps them."""
    features = np.random.default_rng(0).standard_normal((20, 12)).astype(np.float32)
    return of_kept(call, folder, lambda: [a.tolist() for a in cached_statistics(folder, "key", lambda: features)])


def of_decoded(call, trained, folder, monkeypatch):
    """Decoded images, as train.py and test.py keep them."""
    monkeypatch.setattr(utils, "MANY_IMAGES", 4)
    write_images(folder / "data", 5, size=4)
    paths, cache = list_images(folder / "data"), folder / "cache"
    return of_kept(call, cache, lambda: utils.decode_kept(paths, folder / "data", 3, 4, "training", cache).tolist())


TARGETS = {
    "train.py checkpoint": (of_train,), "test.py checkpoint": (of_test,), "test.py manifest": (of_manifest,),
    "PR image": (of_pr, "fake/00002.png"), "PR manifest": (of_pr, "fake/manifest.json"), "PR features": (of_pr, "cache/*.npz"),
    "csv image": (of_csv, "gen/00002.png"), "csv cache": (of_csv, "out/cache_t.csv"),
    "csv fingerprint": (of_csv, "out/cache_t.json"), "comparison cache": (of_comparison, "cache_a.csv"),
    "comparison fingerprint": (of_comparison, "cache_a.json"), "comparison evaluation": (of_comparison, "pr_a.json"),
    "statistics": (of_statistics,), "decoded images": (of_decoded,),
}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_never_give_a_traceback_or_other_numbers(name, call, trained, tmp_path, monkeypatch):
    target, *file = TARGETS[name]
    fuzz(name, *target(call, trained, tmp_path, monkeypatch, *file), SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_for_a_minute_each(name, call, trained, tmp_path, monkeypatch):
    target, *file = TARGETS[name]
    fuzz(name, *target(call, trained, tmp_path, monkeypatch, *file), 60 * SECONDS)


KINDS_OF_IMAGE = {"a.png": {}, "a.JPG": {"format": "JPEG"}, "a.bmp": {}, "a.tif": {}, "lzw.tif": {"compression": "tiff_lzw"},
                  "jpeg.tiff": {"compression": "jpeg"}, "a.webp": {}, "a.ppm": {}, "a.pgm": {}, "a.gif": {}}


def test_damaged_images_of_every_kind_are_read_or_named(tmp_path):
    """Only PNG has checksums: there the pixels are the right ones. Elsewhere they may differ, but nothing else happens."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8))
    counts = Counter()
    for name, options in KINDS_OF_IMAGE.items():
        path = tmp_path / name
        picture.convert("L" if name == "a.pgm" else "RGB").save(path, **options, exif=exif)
        good, right = path.read_bytes(), read_image(path)
        start, i = time.monotonic(), 0
        while time.monotonic() - start < SECONDS / 3 or i < len(DAMAGE):
            path.write_bytes(damage(good, DAMAGE[i % len(DAMAGE)], random.Random(f"{SEED} {name} {i}")))
            try:
                image = read_image(path, size=12)
                assert image.shape == (12, 12, 3) and image.dtype == np.uint8
                if name == "a.png" and path.read_bytes() not in IMAGES:
                    assert np.array_equal(image, right), f"round {i} of FAULT_SEED={SEED}"
                counts["read"] += 1
            except UserError as e:
                assert str(path) in str(e)
                counts["refused"] += 1
            i += 1
    print(f"images of {len(KINDS_OF_IMAGE)} kinds: {dict(counts)}")


def test_png_checksums_are_those_of_the_format():
    data = saved(Image.new("RGB", (4, 4), "red").save, "PNG")
    assert png_is_whole(io.BytesIO(data)) and png_is_whole(io.BytesIO(data + b"more"))
    for i in range(8, len(data)):
        assert not png_is_whole(io.BytesIO(data[:i])) and not png_is_whole(io.BytesIO(data[:i] + b"?" + data[i + 1:])), i


def test_png_whose_pixels_changed_is_refused(tmp_path):
    """PIL reads some damaged files as other pictures, without a word."""
    path = tmp_path / "a.png"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)).resize((64, 64))
    data, found, rng = saved(picture.save, "PNG"), 0, random.Random(0)
    for _ in range(3000):
        i, flipped = rng.randrange(50, len(data) - 20), bytearray(data)
        flipped[i] ^= 1 << rng.randrange(8)
        try:
            other = np.asarray(Image.open(io.BytesIO(flipped)))
        except Exception:
            continue
        if not np.array_equal(other, np.asarray(picture)):
            found += 1
            path.write_bytes(flipped)
            for read in (read_image, lambda p: csv_analysis.decode_grey(p, p.read_bytes())):
                with pytest.raises(UserError, match="a.png: cannot be read"):
                    read(path)
    assert found


def paths_in(value, path=()):
    """Every place in a nest of dicts and lists."""
    for key, v in value.items() if isinstance(value, dict) else enumerate(value):
        yield *path, key
        if isinstance(v, (dict, list)):
            yield from paths_in(v, (*path, key))


JUNK = [None, True, -1, 0, 3, 10 ** 30, 0.5, math.nan, math.inf, "x", "", [], [1, "x"], {}, {"x": 1}, torch.zeros(3),
        torch.zeros(1).expand(10 ** 12), torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()]


def rewritten(good, rng):
    """A checkpoint's dict -> a copy in which one or two entries are something else, and what was done."""
    value, done = torch.load(io.BytesIO(good), weights_only=True), []
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice(sorted(paths_in(value), key=str))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if rng.random() < 0.2:
            del parent[path[-1]]
            done.append((path, "deleted"))
        else:
            junk = rng.choice(JUNK)
            parent[path[-1]] = junk
            done.append((path, f"{type(junk).__name__} {str(junk):.30}" if not isinstance(junk, torch.Tensor) else junk.dtype))
    return value, done


@pytest.mark.parametrize("target", [of_train, of_test])
def test_checkpoints_with_other_content_are_taken_or_refused(target, call, trained, tmp_path, monkeypatch):
    """Whole files that train.py would not write: from another program, another version, or someone who means harm."""
    path, run = target(call, trained, tmp_path, monkeypatch)
    good, counts, start, i = path.read_bytes(), Counter(), time.monotonic(), 0
    while time.monotonic() - start < 2 * SECONDS:
        value, done = rewritten(good, random.Random(f"{SEED} {i}"))
        torch.save(value, path)
        try:
            code, stderr, _ = run()
        except Exception as e:
            raise AssertionError(f"round {i} of FAULT_SEED={SEED}: {done}: {type(e).__name__}: {e}") from e
        assert code == 0 or (code == 2 and stderr.count("error: ") == 1), (done, code, stderr)
        counts["taken" if code == 0 else "refused"] += 1
        i += 1
    print(f"{target.__name__}: {i} checkpoints rewritten: {dict(counts)}")


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted files

@pytest.fixture
def checkpoint(trained, tmp_path):
    """rewrite(change): a checkpoint whose dict change() was applied to -> its path."""
    def rewrite(change):
        content = torch.load(trained / "runs" / "x" / "last.pth", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "last.pth")
        return tmp_path / "last.pth"
    return rewrite


ABSURD = [("latent_dim", 10 ** 9), ("flow_length", 10 ** 9), ("img_size", 10 ** 6), ("hidden_dims", [10 ** 6]),
          ("hidden_dims", [8] * 10 ** 4), ("blocks_per_stage", 10 ** 9), ("num_components", 10 ** 12), ("flow_layers", 10 ** 9),
          ("flow_embed_dim", 10 ** 9), ("flow_mlp_ratio", 10 ** 9), ("flow_heads", 10 ** 9), ("flow_seq_len", 10 ** 30),
          ("perm_seed", 10 ** 30), ("latent_dim", 60_000), ("num_components", 10 ** 6),
          ("hidden_dims", [16_000]), ("hidden_dims", "8"), ("latent_dim", 4.0), ("latent_dim", None), ("scale_bound", math.inf)]


@pytest.mark.parametrize("name, value", ABSURD, ids=[f"{n}={v!s:.12}" for n, v in ABSURD])
def test_absurd_sizes_in_a_checkpoint_take_no_memory_and_no_time(name, value, checkpoint, call):
    path = checkpoint(lambda c: (c["model_args"].update({name: value}), c["args"].update({name: value})))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"last.pth: its weights and model_args do not fit"):
        load_model(path, "cpu")
    assert_refused(call(train.main, "--resume", path), path)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024           # KiB
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.pth"]


@pytest.mark.parametrize("name", LIMITS)
def test_sizes_above_the_limits_are_refused_by_name(name):
    value = LIMITS[name] + 1
    with pytest.raises(ValueError, match=f"{name} .*absurdly large"):
        CrossFlowVampVAE(**{name: (value,) if name == "hidden_dims" else value})


@pytest.mark.parametrize("sizes, message", [
    (dict(img_size=4096, hidden_dims=(8, 8)), "more than 256"), (dict(hidden_dims=(8,) * 14), "14 entries"),
    (dict(img_size=256, hidden_dims=(64,), latent_dim=65536), "tensor"),
    (dict(img_size=4096, hidden_dims=(8,) * 6, num_components=10 ** 6), "tensor"),
    (dict(flow_embed_dim=16384, flow_mlp_ratio=64), "tensor"),
])
def test_sizes_that_are_absurd_together_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        CrossFlowVampVAE(**sizes)


def test_tensors_that_claim_more_than_the_file_holds_are_refused(checkpoint):
    def expand(c):
        c["model"]["decoder.stem.0.weight"] = torch.zeros(1, 1).expand(2 ** 20, 2 ** 20)
    with pytest.raises(UserError, match="larger than the file"):
        read_checkpoint(checkpoint(expand))


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(epoch="1"), "epoch of another kind"), (lambda c: c.update(step=-1), "another kind"),
    (lambda c: c.update(ema=[1]), "ema of another kind"), (lambda c: c["model_args"].update(colour=3), "colour"),
    (lambda c: c["model"].pop("decoder.stem.0.weight"), "decoder.stem.0.weight"),
    (lambda c: c["ema"].update({"flow.couplings.0.perm": torch.zeros(4, dtype=torch.int64)}), "perm is no permutation"),
    (lambda c: c["model"].update({"encoder.head.bias": torch.zeros(8).to_sparse()}), "unknown kind"),
])
def test_checkpoints_that_are_not_of_this_program_are_refused(change, message, checkpoint):
    with pytest.raises(UserError, match=f"(?s)last.pth: .*{message}"):
        read_checkpoint(checkpoint(change))


@pytest.mark.parametrize("change", [
    {"lr": "x"}, {"hidden_dims": 8}, {"hidden_dims": []}, {"adam_betas": [0.9]}, {"dataset": "x"}, {"data_dir": None},
    {"img_size": "8"}, {"batch_size": 2.5}, {"flip": 1}, {"seed": True}])
def test_flags_in_a_checkpoint_are_held_to_the_command_line(change, checkpoint, call, tmp_path):
    path = checkpoint(lambda c: c["args"].update(change))
    assert_refused(call(train.main, "--resume", path), path, f"--{next(iter(change))}")
    if next(iter(change)) in test_script.DATA_FLAGS:
        assert_refused(call(test_script.main, "--resume", path, "--save_dir", tmp_path), path, f"--{next(iter(change))}")


def test_a_checkpoint_cannot_say_that_loading_replaces_the_parameters(checkpoint):
    def poison(c):
        c["model"] = OrderedDict(c["model"])
        c["model"]._metadata = {"": {"assign_to_params_buffers": True}, "encoder.head": {"assign_to_params_buffers": True}}
    state = read_checkpoint(checkpoint(poison))
    model = CrossFlowVampVAE(**state["model_args"])
    before = [id(p) for p in model.parameters()]
    model.load_state_dict(state["model"])
    assert [id(p) for p in model.parameters()] == before          # those that an optimiser was given


def test_flags_and_model_of_a_checkpoint_belong_together(checkpoint, call):
    """The model is built from the flags: they must not ask for more than the weights that were checked."""
    path = checkpoint(lambda c: c["args"].update(num_components=2 ** 19))
    assert_refused(call(train.main, "--resume", path), path, "describe two models")


def test_checkpoints_from_before_a_flag_are_taken(checkpoint, call, tmp_path):
    def older(c):
        for name in ("decode_from", "mixture_weights", "mixture_covariance", "posterior_std"):
            del c["args"][name], c["model_args"][name]
    path = checkpoint(older)
    assert read_checkpoint(path)["model_args"]["decode_from"] == "zK"
    for name, flags in (("more", ("--resume", path)), ("prior", (*TINY, "--fit_prior", path, "--flow_length", 0))):
        code, _, stderr = call(train.main, *flags, "--save_dir", tmp_path, "--exp_name", name)
        assert code == 0 or "its decoder takes what its flow makes" in stderr, stderr
    assert_refused(call(train.main, "--resume", path, "--mixture_covariance", "full"), path,
                   "was trained with other values of --mixture_covariance (diag, not full)")

    def before_presets(c):
        older(c)
        del c["args"]["preset"]
    path = checkpoint(before_presets)
    assert_refused(call(train.main, "--resume", path, "--preset", "best"), path,
                   "was trained with other values of --preset (None, not best)")
    assert call(train.main, "--resume", path, "--save_dir", tmp_path, "--exp_name", "again")[0] == 0


@pytest.mark.parametrize("change", [
    lambda c: c["optimizer"]["state"].update({7: torch.zeros(3)}), lambda c: c["optimizer"]["param_groups"][0].pop("betas"),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)), lambda c: c["scheduler"].update(base_lrs=["x", "y"]),
    lambda c: c["scheduler"].update(last_epoch=5), lambda c: c.update(step=40), lambda c: c.update(history=[{"epoch": "x"}]),
    lambda c: c.update(best_fid=None), lambda c: c.pop("epoch_sums"),
])
def test_a_training_state_that_is_none_is_refused(change, checkpoint, call, tmp_path):
    path = checkpoint(change)
    assert_refused(call(train.main, "--resume", path), path, "its weights do not fit this model")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_exports_below_a_folder_are_none_of_its_images(call, tmp_path, monkeypatch):
    """test.py exports below the data by default. What another program calls manifest.json marks nothing."""
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    write_images(tmp_path / "photos/cats", 6, size=8)
    (tmp_path / "photos/cats/manifest.json").write_text('[{"file": "00000.png"}]')
    fake = write_images(tmp_path / "photos/fake_cifar", 5, size=8, seed=1)
    write_json(fake / "manifest.json", {"kind": "samples", "count": 5, "done": 5})
    code, stdout, _ = call(PR_Calculate.main, "--real_dir", tmp_path / "photos", "--fake_dir", fake, "--pca_dim", 0, "--device",
                           "cpu", "--nearest_k", 3)
    assert code == 0 and "5 generated images against 6 real ones" in stdout
    assert stdout.count(f"{fake}: exported images (by its manifest.json), not among the images") == 1
    code, stdout, _ = call(csv_analysis.main, "--gen", tmp_path / "photos", "--out_dir", tmp_path / "out", "--tag", "t")
    assert code == 0 and "6 images" in stdout and "not among the images" in stdout
    (tmp_path / "photos/cats/manifest.json").write_text('{"checksum": "of mine"}')
    code, stdout, stderr = call(csv_analysis.main, "--gen", tmp_path / "photos/cats", "--out_dir", tmp_path / "out", "--tag",
                                "c")
    assert code == 0 and "6 images" in stdout
    assert stderr == f"warning: {tmp_path / 'photos/cats/manifest.json'} is no manifest of test.py and says nothing of these " \
                     "images here\n"


def test_json_without_a_checksum_is_taken_aloud(call, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    fake, caches = tmp_path / "fake", tmp_path / "caches"
    write_images(fake, 6, size=8)
    (fake / "manifest.json").write_text('{"kind": "samples", "count": 6}')
    _, _, stderr = call(PR_Calculate.main, "--real_dir", fake, "--fake_dir", fake, "--pca_dim", 0, "--device", "cpu")
    assert f"warning: {fake / 'manifest.json'} has no checksum" in stderr
    assert call(csv_analysis.main, "--gen", fake, "--out_dir", caches, "--tag", "real")[0] == 0
    (caches / "by_hand.json").write_text('{"metrics": {"fid": 1}}')
    assert "by_hand.json has no checksum" in "".join(comparison.read_evaluations(caches)[1])
    fingerprint = caches / "cache_real.json"
    record = json.loads(fingerprint.read_text())
    fingerprint.write_text(json.dumps({k: v for k, v in record.items() if k != "checksum"}))
    assert "cache_real.json is no fingerprint" in "".join(comparison.load_variants(caches, "")[2])
    code, stdout, stderr = call(csv_analysis.main, "--gen", fake, "--out_dir", caches, "--tag", "real")
    assert code == 0 and "6 images in" in stdout and "cache_real.json: damaged" in stderr


def test_checkpoints_packed_otherwise_are_refused(trained, tmp_path):
    """A compressed archive may be a bomb; of two glued together, zipfile and torch might read one each."""
    good, path = (trained / "runs" / "x" / "last.pth").read_bytes(), tmp_path / "last.pth"
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/data/999", bytes(10 ** 8))
    assert path.stat().st_size < 10 ** 6
    with zipfile.ZipFile(overlapping := io.BytesIO(), "w") as z:
        z.writestr("archive/data.pkl", bytes(10 ** 5))
        z.filelist += 10 * z.filelist                           # a thousandfold of this would be read for hours
    for content in (path.read_bytes(), overlapping.getvalue(), good + good, b"\0" * 64 + good):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"last.pth: packed otherwise"):
            read_checkpoint(path)
    path.write_bytes(good)
    assert read_checkpoint(path)["epoch"] == 1


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_malicious_checkpoints_and_caches_do_nothing(tmp_path, checkpoint, call, capsys):
    harm = tmp_path / "harm"
    good = checkpoint(lambda c: None)
    path = tmp_path / "bad.pth"
    for save in (lambda: torch.save(Payload(harm), path), lambda: path.write_bytes(pickle.dumps(Payload(harm))),
                 lambda: torch.save(torch.load(good, weights_only=True) | {"history": [Payload(harm)]}, path)):
        save()
        assert_refused(call(test_script.main, "--resume", path), path)
        assert_refused(call(train.main, "--resume", path), path)
    features = np.ones((4, 2), np.float32)
    right = cached_statistics(tmp_path / "cache", "key", lambda: features)
    file = next((tmp_path / "cache").iterdir())
    for content in (saved(np.savez, mu=right[0], sigma=np.array([Payload(harm)]), key="key"), pickle.dumps(Payload(harm)),
                    saved(np.savez, mu=right[0], sigma=right[1], key="of other images")):
        file.write_bytes(content)
        again = cached_statistics(tmp_path / "cache", "key", lambda: features)
        assert all(map(np.array_equal, again, right)) and f"{file}: damaged" in capsys.readouterr().err
    assert not harm.exists()


def test_a_cache_that_reads_less_than_it_holds_is_damaged(tmp_path, capsys):
    """numpy checks a sum only where it has read to the end, and a damaged header can stop it before."""
    features = np.random.default_rng(0).standard_normal((60, 40))
    right = cached_statistics(tmp_path, "key", lambda: features)
    file = next(tmp_path.iterdir())
    data = file.read_bytes()
    assert data.count(b"(40, 40)") == 1
    file.write_bytes(data.replace(b"(40, 40)", b"(40, 10)"))
    with np.load(file) as f:
        assert f["sigma"].shape == (40, 10)                     # what would have been trusted
    assert all(map(np.array_equal, cached_statistics(tmp_path, "key", lambda: features), right))
    assert "damaged, computed again" in capsys.readouterr().err


def test_image_bombs_are_refused_by_name(tmp_path):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    bomb, line = tmp_path / "bomb.png", tmp_path / "line.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    Image.new("L", (3_000_000, 1)).save(line)                   # few pixels, until its shorter side is made 32
    for path, size in ((bomb, None), (bomb, 8), (line, 32)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=f"{path.name}: more than .* pixels"):
            read_image(path, size=size)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert read_image(line, size=1).shape == (1, 1, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_of_image_is_read(mode, tmp_path):
    suffix = {"CMYK": "tif", "YCbCr": "jpg", "PA": "png"}.get(mode, "png")
    path = tmp_path / f"a.{suffix.upper()}"
    picture = Image.new("L", (6, 4), 255)
    picture = Image.new("I;16", (6, 4), 65535) if mode == "I;16" else picture.convert("P" if mode == "PA" else mode)
    picture.save(path, **({"transparency": 0} if mode in ("P", "PA") else {}))
    for channels in (1, 3):
        image = read_image(path, channels)
        assert image.shape == ((4, 6) if channels == 1 else (4, 6, 3)) and image.min() >= 254


# ---------------------------------------------------------------------------------------------------------------------
# Names and links

ODD_NAMES = ["a\nb.png", "tab\t.png", "quote'\".png", "-rf.png", "--out_dir.png", "$HOME.png", "<b>&amp;.PNG", "a,b.png",
             "ü.png", "\u202egnp.png", os.fsdecode(b"\xff\xfe.png"), "x" * 251 + ".png", " .png", "%s{0}.png"]


def odd_folder(folder):
    """Images with odd names, links of every sort, and what has to be passed over -> how many there are to read."""
    write_images(folder, 1, size=8)
    data = (folder / "00000.png").read_bytes()
    for i, name in enumerate(ODD_NAMES):
        write_images(folder.parent / f"one{i}", 1, size=8, seed=i)
        (folder.parent / f"one{i}" / "00000.png").rename(folder / name)
    elsewhere = folder.parent / "elsewhere"
    write_images(elsewhere, 2, size=8, seed=50)
    (folder / "link.png").symlink_to(folder / "00000.png")
    (folder / "folder link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (elsewhere / "loop back").symlink_to(folder)
    (folder / ".hidden.png").write_bytes(b"not an image")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(data)
    (folder / "a folder.png").mkdir()
    (folder / "notes.txt").write_bytes(data)
    return len(ODD_NAMES) + 4


def test_odd_names_and_links_are_read_by_every_script(tmp_path, call, monkeypatch):
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    folder = tmp_path / os.fsdecode(b"odd \xff\nfolder")
    n = odd_folder(folder)
    code, stdout, stderr = call(csv_analysis.main, "--gen", folder, "--out_dir", folder / "out", "--tag", "odd")
    assert code == 0 and f"{n} images" in stdout and stderr == ""
    assert f"up to date, {n} images" in call(csv_analysis.main, "--gen", folder, "--out_dir", folder / "out", "--tag", "odd")[1]
    code, stdout, _ = call(PR_Calculate.main, "--real_dir", folder, "--fake_dir", folder, "--pca_dim", 0, "--device", "cpu",
                           "--out", folder / "pr.json", "--feature_cache", folder / "cache")
    assert code == 0 and f"{n} generated images against {n} real ones" in stdout
    exported = folder / os.fsdecode(b"exported \xfe")
    write_images(exported, 2, size=8)
    write_json(exported / "manifest.json", {"kind": "samples", "count": 2})
    for gb in (4, 0):                                           # kept, and streamed
        code, stdout, stderr = call(train.main, *TINY, "--dataset", "folder", "--data_dir", folder, "--epochs", 1, "--cache_gb",
                                    gb, "--num_workers", 0, "--save_dir", folder / "runs", "--exp_name", f"run {gb}")
        assert code == 0 and "exported images" in stdout, stderr
    last = folder / "runs" / "run 0" / "last.pth"
    code, stdout, stderr = call(test_script.main, "--resume", last, "--save_dir", folder / "runs", "--do_pictures", "False",
                                "--num_samples", 2, "--device", "cpu")
    assert code == 0 and len(list((folder / "real_cifar").glob("*.png"))) == n - n // 10, stderr


@pytest.mark.parametrize("name", ["a\nb.png", os.fsdecode(b"\xff.png"), "-x.PNG", "link.png", "loop.png", "x" * 251 + ".png"])
def test_bad_files_with_odd_names_are_named_in_one_line(name, tmp_path, call, trained, monkeypatch):
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    folder = tmp_path / "images"
    write_images(folder, 6, size=8)
    if name == "link.png":
        (folder / name).symlink_to(folder / "nowhere.png")
    elif name == "loop.png":
        (folder / name).symlink_to(folder / name)
    else:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    words = name.encode("utf-8", "backslashreplace").decode().split()
    assert_refused(call(csv_analysis.main, "--gen", folder, "--out_dir", tmp_path / "out", "--tag", "t"), *words)
    pr = ("--real_dir", folder, "--fake_dir", folder, "--pca_dim", 0, "--device", "cpu")
    assert_refused(call(PR_Calculate.main, *pr), *words)
    data = ("--dataset", "folder", "--data_dir", folder, "--save_dir", tmp_path / "runs")
    assert_refused(call(train.main, *TINY, *data), *words)
    assert not (tmp_path / "runs").exists()


def test_names_that_are_too_long_are_said_in_one_line(tmp_path, call, trained, monkeypatch):
    monkeypatch.setattr(PR_Calculate, "InceptionFeatures", Means)
    folder, out = trained / "images" / "train", tmp_path / ("x" * 250 + ".json")
    pr = ("--real_dir", folder, "--fake_dir", folder, "--pca_dim", 0, "--device", "cpu", "--out", out)
    assert_refused(call(PR_Calculate.main, *pr), out.name, "name is too long")
    data = ("--dataset", "folder", "--data_dir", trained / "images", "--save_dir", tmp_path, "--exp_name", "x" * 300)
    assert_refused(call(train.main, *TINY, *data), "too long")
    assert list(tmp_path.iterdir()) == []


class Tags(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
        self.found = [*getattr(self, "found", []), (tag, dict(attributes))]


def test_reports_escape_names_of_files_and_tags(tmp_path, call):
    caches = tmp_path / "caches"
    caches.mkdir()
    evil = "'\"><script>alert(1)</script><img src=x onerror=y>\n| # [a](javascript:b) `c`"
    rng = np.random.default_rng(0)
    for name in (evil.replace("/", "\u2215"), os.fsdecode(b"\xff\xfe"), "real"):
        rows = "".join(f"{a},{b},{c}\n" for a, b, c in rng.uniform(0.1, 0.9, (6, 3)))
        (caches / f"cache_{name}.csv").write_text("lap_var,tenengrad,hf_ratio\n" + rows)
    write_json(caches / f"pr_{evil}.json".replace("/", "\u2215"),
               {"tag": evil, "metrics": {"fid": 1.0, "kid": 10 ** 400, evil: 3},
                "protocol": {evil: evil, "n": {"\ud800": [evil]}}})
    code, _, stderr = call(comparison.main, "--cache_dir", caches, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    assert code == 0 and stderr == "", stderr
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Tags()
    page.feed(source)
    assert {tag for tag, _ in page.found}.isdisjoint({"script", "a", "iframe", "link"})
    assert all(a["src"].startswith("data:image/png;base64,") and "onerror" not in a for tag, a in page.found if tag == "img")
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(script|img)|(?<!\\)`c|\](?<!\\)\(java", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):       # no name ends a cell or a row
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


# ---------------------------------------------------------------------------------------------------------------------
# Properties

def one_of(*values):
    return st.sampled_from(values)


def sensible(flags):
    """Take out what makes no sense together."""
    if flags["flow_length"] == 0:
        flags |= {"flow_prior": "unflowed", "flow_context": "none"}
    if flags["flow_prior"] == "pushed":
        flags |= {"flow_context": "none"}
    if flags["flow_length"] == 0 or flags["flow_prior"] == "pushed" or flags["flow_context"] == "encoder":
        flags |= {"decode_from": "zK"}
    if flags["prior"] != "mog":
        flags |= {"mixture_covariance": "diag"}
    if flags["latent_dim"] % (2 * (flags["img_size"] // 2 ** len(flags["hidden_dims"])) ** 2):
        flags |= {"latent_layout": "vector"}
    return flags | ({"mixture_weights": "uniform", "balance": 0} if flags["prior"] == "standard" else {})


GOOD_FLAGS = st.fixed_dictionaries({
    "img_size": one_of(4, 8, 12), "in_channels": one_of(1, 3), "hidden_dims": one_of([1], [6], [5, 7], [8, 4]),
    "latent_dim": one_of(8, 16, 24), "latent_layout": one_of("vector", "spatial"), "blocks_per_stage": one_of(0, 1, 2),
    "prior": one_of("vamp", "mog", "standard"),
    "num_components": one_of(1, 3, 8), "pseudo_init": one_of("data", "noise"), "pseudo_noise": one_of(0, 0.05, 10),
    "flow_length": one_of(0, 1, 3), "flow_seq_len": one_of(1, 2, 4), "flow_embed_dim": one_of(4, 12),
    "flow_heads": one_of(1, 2, 4), "flow_layers": one_of(1, 2), "flow_mlp_ratio": one_of(1, 3),
    "flow_prior": one_of("unflowed", "pushed"), "decode_from": one_of("zK", "z0"), "balance": one_of(0, 3),
    "mixture_weights": one_of("uniform", "learned"), "mixture_covariance": one_of("diag", "full"),
    "posterior_std": one_of(0, 0.1, 3), "skip_grad_norm": one_of(0, 1e3),
    "flow_context": one_of("none", "encoder"), "scale_bound": one_of(1e-3, 2, 50), "recon_loss": one_of("l1", "mse"),
    "logvar_clamp": one_of((-10, 10), (-1, 0), (0, 1)), "beta_max": one_of(0, 0.2, 100), "warmup_epochs": one_of(0, 0.5, 20),
    "free_bits": one_of(0, 0.5, 1e9), "batch_size": one_of(1, 4, 9), "lr": one_of(1e-4, 0.1), "weight_decay": one_of(0, 0.1),
    "adam_betas": one_of((0, 0), (0.9, 0.999)), "grad_clip": one_of(0, 1e-3, 5000), "ema_decay": one_of(0, 0.5, 0.999),
    "seed": one_of(0, 7, 2 ** 63 - 1), "flip": one_of(True, False),
}).map(sensible)
WILD = [("img_size", 7), ("img_size", 0), ("img_size", 10 ** 6), ("hidden_dims", (0, 4)), ("hidden_dims", (8,) * 12),
        ("latent_dim", -8), ("latent_dim", 7), ("latent_dim", 10 ** 9), ("blocks_per_stage", 10 ** 9), ("num_components", 0),
        ("num_components", 10 ** 9), ("flow_length", -1), ("flow_length", 10 ** 9), ("flow_seq_len", 3), ("flow_seq_len", 0),
        ("flow_embed_dim", 10 ** 9), ("flow_heads", 5), ("flow_layers", 0), ("flow_mlp_ratio", 10 ** 9),
        ("stop_epoch", 10 ** 9), ("logvar_clamp", (1, -1)), ("logvar_clamp", (1000, 1000)), ("seed", 2 ** 63),
        ("seed", -1), ("epochs", 0),
        ("lr_min", 1), ("lpips_weight", 1), ("batch_size", 10 ** 9), ("logvar_clamp", (-1000, 1000)), ("adam_betas", (1, 0)),
        *((name, value) for name in ("scale_bound", "pseudo_noise", "beta_max", "free_bits", "lr", "weight_decay", "grad_clip",
                                     "ema_decay", "warmup_epochs", "lr_min", "balance", "posterior_std",
                                     "skip_grad_norm") for value in (-1, math.nan, math.inf))]
ANY_FLAGS = st.tuples(GOOD_FLAGS, st.lists(st.sampled_from(WILD), max_size=2).map(dict))


def train_one_step(good, wild):
    """parse_args, check_flags, the model, one step and samples, as train.main would: trained, or a wild flag refused."""
    argv = ["--no-tensorboard"]
    for name, value in {**good, **wild, "lpips_net": "none", "fid_every": 0}.items():
        if isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{name}")
        elif isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    try:
        args, given = train.parse_args(argv)
        args.flip = bool(args.flip)
        train.check_flags(args, given)
        try:
            model = CrossFlowVampVAE(**train.model_args_of(args))
        except ValueError as e:
            raise UserError(str(e)) from None
    except UserError as e:
        assert any(name in str(e) for name in wild), (str(e), wild)
        return "refused"
    data = utils.MemoryImages(torch.randint(0, 256, (6, args.in_channels, args.img_size, args.img_size), dtype=torch.uint8))
    train.start_prior(args, model, data)
    size = min(args.batch_size, len(data))
    trainer = train.Trainer(args, model, None, len(data) // size, size, ROOT, data.fingerprint)
    train.train_step(trainer, data.take(range(size)), False)
    trainer.read()
    assert len(trainer.sums) == trainer.sums.isfinite().sum()
    images = trainer.best_weights.sample(3, generator=torch.Generator().manual_seed(0))
    assert images.shape == (3, *data.shape) and images.isfinite().all() and images.abs().max() <= 1
    return "trained"


QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=2000, derandomize=False)


@pytest.mark.parametrize("flag", WILD, ids=str)
def test_each_wild_flag_is_refused_or_trains(flag):
    good = {"img_size": 4, "in_channels": 1, "hidden_dims": [4], "latent_dim": 4, "num_components": 2, "flow_length": 1,
            "flow_seq_len": 1, "flow_embed_dim": 4, "flow_heads": 2, "flow_layers": 1}
    train_one_step(good, dict([flag]))


@QUICK
@given(ANY_FLAGS)
def test_any_flags_are_refused_or_train(flags):
    event(train_one_step(*flags))


@pytest.mark.slow
@LONG
@given(ANY_FLAGS)
def test_any_flags_are_refused_or_train_many_times(flags):
    event(train_one_step(*flags))


def check_shapes(length, seq_len, token_dim, heads, head_dim, layers, context, mlp_ratio, seed):
    """A flow of these shapes with perturbed weights: exact inverse, and autograd's log-determinant, in float64."""
    torch.manual_seed(seed)
    flow = BiCrossAttnFlow(2 * seq_len * token_dim, length, seq_len, heads * head_dim, heads, layers, context and context[0],
                           mlp_ratio).double()
    perturb_(flow, 0.05, torch.Generator().manual_seed(seed)).requires_grad_(False)
    z = torch.randn(1, flow.dim, dtype=torch.float64)
    tokens = torch.randn(1, context[1], context[0], dtype=torch.float64) if context else None
    zK, scales = flow.transform(z, tokens)
    back, inverse_log_det = flow.inverse(zK, tokens)
    log_det = flow(z, tokens)[1]
    assert scales.abs().max() > 1e-4                            # else it is still the identity and nothing is tested
    assert ((back - z).abs() / (1 + z.abs())).max() < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None], tokens)[0][0], z[0])
    exact = torch.linalg.slogdet(jacobian).logabsdet
    assert abs(log_det - exact) < 1e-8 and abs(inverse_log_det + exact) < 1e-8


SHAPES = dict(length=st.integers(1, 5), seq_len=st.integers(1, 4), token_dim=st.integers(1, 4), heads=st.integers(1, 4),
              head_dim=st.integers(2, 6), layers=st.integers(1, 3), mlp_ratio=st.integers(1, 4), seed=st.integers(0, 2 ** 32),
              context=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 5)))


@QUICK
@given(**SHAPES)
def test_flow_of_any_shape_is_exact(**shape):
    check_shapes(**shape)


@pytest.mark.slow
@LONG
@given(**SHAPES)
def test_flow_of_any_shape_is_exact_many_times(**shape):
    check_shapes(**shape)
