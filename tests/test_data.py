"""Images in and out: reading, resizing, splitting, listing, atomic files."""
import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image

import utils
from utils import (
    MANIFEST,
    LatentHealth,
    StreamedImages,
    UserError,
    atomic_write,
    decode_images,
    image_grid,
    list_images,
    load_data,
    my_share,
    progress_bar,
    read_image,
    save_png,
    seeded,
    spread,
    to_float,
    to_uint8,
)


def flags(root, **kwargs):
    return argparse.Namespace(**{**dict(dataset="folder", data_dir=str(root), img_size=8, in_channels=None, split_seed=0,
                                        cache_gb=4.0, num_workers=0), **kwargs})


def test_to_uint8_inverts_to_float_and_rounds():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.003, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("terminal, main_process, wanted, shown",
                         [(True, True, True, True), (False, True, True, False), (True, False, True, False),
                          (True, True, False, False)])
def test_progress_bars_are_for_a_terminal(monkeypatch, terminal, main_process, wanted, shown):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(utils, "is_main", lambda: main_process)
    with progress_bar(3, "reading", wanted=wanted) as bar:
        bar.update(3)
    assert ("reading" in stream.getvalue()) == shown


def test_png_round_trip_is_exact(tmp_path):
    image = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    save_png(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image.permute(1, 2, 0).numpy())
    assert image_grid(torch.stack([image, image, image]), 2).shape == (3, 2 * 11 + 2, 2 * 9 + 2)


def test_kinds_of_image(tmp_path):
    rng = np.random.default_rng(0)
    grey16 = rng.integers(0, 65536, (6, 6), np.uint16)
    Image.fromarray(grey16).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png", 1), (grey16 // 257).astype(np.uint8))
    rgb = rng.integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(np.dstack([rgb, np.zeros((4, 6), np.uint8)])).save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png"), rgb)
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # camera held on its side
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(rgb, -1))
    Image.fromarray(grey16[:4]).save(tmp_path / "deep_turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "deep_turned.png", 1), np.rot90(grey16[:4] // 257, -1))
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "print.JPG", quality=100)
    assert read_image(tmp_path / "print.JPG").shape == (4, 6, 3)
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (10, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert (read_image(tmp_path / "moving.webp") == 10).all()


def test_image_bomb_is_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb.png: more than 1,000 pixels"):
        read_image(tmp_path / "bomb.png")


def test_resize_keeps_the_centre_and_antialiases(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255                                             # only the centre square is white
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", size=10).min() > 200
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", size=16).astype(int)
    assert abs(small.mean() - 127.5) < 3 and small[:, 2:-2].std() < 3          # without antialias: all 0 or all 255


def test_listing_ignores_hidden_files_our_own_folders_and_loops(tmp_path, capsys):
    write_images(tmp_path / "a", 2, size=4)
    (tmp_path / "a" / "args.json").write_text("{}")                  # not all that a run has
    made = {"real_cifar": [MANIFEST], "my_run/samples": ["../args.json", "../train_log.txt"],
            "compare": ["report.html", "summary.csv"], "grid": ["grid.json", "grid.csv"], "my_test": ["test_log.txt"]}
    for name, marks in made.items():
        write_images(tmp_path / name, 3, size=4)
        for mark in marks:
            (tmp_path / name / mark).write_text('{"kind": "samples", "count": 3}')
    (tmp_path / "a" / MANIFEST).write_text('[{"file": "00000.png", "kind": 1, "count": 2}]')        # another program's
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "UPPER.JPG").write_bytes((tmp_path / "a" / "00000.png").read_bytes())
    found = [os.path.basename(p) for p in list_images(tmp_path, skip_made_here=True)]
    assert found == ["00000.png", "00001.png", "UPPER.JPG"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and "exported images (by its manifest.json)" in said[4]
    assert f"{tmp_path / 'my_run'}: a training run (by its args.json and train_log.txt), not among the images" in said
    assert len(list_images(tmp_path)) == 3
    assert len(list_images(tmp_path / "real_cifar")) == len(list_images(tmp_path / "my_run")) == 3
    with pytest.raises(UserError, match="no images there"):
        list_images(tmp_path / "real_cifar", skip_made_here=True)
    (tmp_path / "a" / "loop").unlink()
    capsys.readouterr()
    for name in ("x.tga", "y.TGA", "z.jp2", "labels.csv", "none"):
        (tmp_path / "a" / name).write_bytes(b"")
    for name in ("a.gif", "b.jfif", "c.JPE"):
        Image.new("RGB", (4, 4)).save(tmp_path / "a" / name, "GIF" if name == "a.gif" else "JPEG")
    files = list_images(tmp_path / "a")
    assert len(files) == 6 and decode_images(files).shape == (6, 3, 4, 4)
    assert capsys.readouterr().out == (f"{tmp_path / 'a'}: 3 files of formats that are not read here (.jp2, .tga), not among "
                                       f"the images\n")


@pytest.mark.parametrize("content, is_ours", [('{"kind": "samples", "count": 3}', True), ('{"kind": "sampl', True),
                                              ('{"format": "png", "count": 3, "kind": "photos"}', False), ("[]", False),
                                              ('{"audio": "a.wav"}\n{"audio": "b.wav"}', False), ('\ufeff{"count": 2}', False)])
def test_a_manifest_of_another_program_is_none(content, is_ours, tmp_path):
    path = tmp_path / MANIFEST
    path.write_text(content, encoding="utf-8")
    assert utils.is_manifest(path) == is_ours
    path.unlink()
    path.symlink_to("nowhere")
    assert not utils.is_manifest(path)


def test_folder_splits(tmp_path, capsys):
    write_images(tmp_path / "flat", 30, size=8)
    train, held = load_data(flags(tmp_path / "flat"), "cpu")
    assert (len(train), len(held)) == (27, 3) and train.shape == (3, 8, 8)
    joined = torch.cat([train.images, held.images]).flatten(1)
    assert len(joined.unique(dim=0)) == 30                           # nothing lost, nothing in both
    again = load_data(flags(tmp_path / "flat"), "cpu")
    assert torch.equal(again[1].images, held.images) and again[0].fingerprint == train.fingerprint
    other = load_data(flags(tmp_path / "flat", split_seed=1), "cpu")
    assert not torch.equal(other[1].images, held.images) and other[0].fingerprint != train.fingerprint
    write_images(tmp_path / "split" / "train" / "cat", 4, size=8)
    write_images(tmp_path / "split" / "val" / "cat", 2, size=8, seed=1)
    assert [len(x) for x in load_data(flags(tmp_path / "split"), "cpu")] == [4, 2]
    capsys.readouterr()
    (tmp_path / "split/train").rename(tmp_path / "split/TRAIN")
    (tmp_path / "split/val").rename(tmp_path / "split/Test")
    assert [len(x) for x in load_data(flags(tmp_path / "split"), "cpu")] == [4, 2]
    assert capsys.readouterr().out == f"{tmp_path / 'split'}: TRAIN and Test are taken as its splits\n"
    (tmp_path / "split/Test").rename(tmp_path / "split/Bus")              # and TRAIN may be a class beside it
    assert [len(x) for x in load_data(flags(tmp_path / "split"), "cpu")] == [5, 1] and capsys.readouterr().out == ""
    for name, number in (("Train", 7), ("train", 5), ("Test", 3), ("test", 2)):
        write_images(tmp_path / "both" / name, number, size=8)
    assert [len(x) for x in load_data(flags(tmp_path / "both"), "cpu")] == [5, 2]
    write_images(tmp_path / "one", 1, size=8)
    assert [len(x) for x in load_data(flags(tmp_path / "one"), "cpu")] == [1, 1]


def test_many_decoded_images_are_kept_for_the_next_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "MANY_IMAGES", 20)
    write_images(tmp_path / "data" / "train", 30, size=8)
    write_images(tmp_path / "data" / "test", 3, size=8, seed=1)
    cache, decoded = tmp_path / "results" / "data_cache", []
    monkeypatch.setattr(utils, "decode_images", lambda paths, *rest: decoded.append(len(paths)) or decode_images(paths, *rest))

    def load(**kwargs):
        decoded.clear()
        data = load_data(flags(tmp_path / "data", **kwargs), "cpu", cache)
        return data[0].fingerprint, [*decoded], capsys.readouterr()

    fingerprint, counts, said = load()
    assert counts == [30, 3] and "training images, kept in" in said.out
    kept, = cache.iterdir()
    assert load()[:2] == (fingerprint, [3])
    assert load_data(flags(tmp_path / "data"), "cpu")[0].fingerprint == fingerprint             # without: the same data
    assert load(img_size=4)[1] == [30, 3] and load(in_channels=1)[1] == [30, 3] and len(list(cache.iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:-300] + bytes(300))
    again = load()
    assert again[:2] == (fingerprint, [30, 3]) and again[2].err.count("damaged, computed again") == 1
    shutil.copyfile(tmp_path / "data" / "test" / "00000.png", tmp_path / "data" / "train" / "00000.png")
    changed, counts, _ = load()
    assert changed != fingerprint and counts == [30, 3] and not kept.exists() and len(list(cache.iterdir())) == 3
    path = tmp_path / "data" / "train" / "00001.png"                 # a rewrite that keeps size and time of the content
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load()[1] == [30, 3]
    path.write_bytes(content)
    with utils.lock_folder(cache, "--save_dir"):                     # another process is writing there
        assert load()[1] == [30, 3] and load()[1] == [30, 3]
    shutil.rmtree(cache)
    cache.write_text("in the way")
    changed_again, counts, said = load()
    assert changed_again == changed and counts == [30, 3] and said.out.startswith("note: ") and said.out.count("\n") == 1


def test_kept_images_serve_every_split_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MANY_IMAGES", 20)
    write_images(tmp_path / "data", 30, size=8)
    cache, decoded = tmp_path / "data_cache", []
    monkeypatch.setattr(utils, "decode_images", lambda paths, *rest: decoded.append(len(paths)) or decode_images(paths, *rest))
    for seed in (0, 1, 0):
        kept = load_data(flags(tmp_path / "data", split_seed=seed), "cpu", cache)
        streamed = load_data(flags(tmp_path / "data", split_seed=seed, cache_gb=0.0), "cpu")
        for a, b in zip(kept, streamed):
            assert torch.equal(a.images, torch.stack([b[i] for i in range(len(b))]))
    assert decoded == [30] and len(list(cache.iterdir())) == 1


def test_streamed_images_equal_cached_ones(tmp_path):
    write_images(tmp_path / "train", 7, size=12)
    write_images(tmp_path / "test", 2, size=12)
    cached, streamed = (load_data(flags(tmp_path, cache_gb=g), "cpu")[0] for g in (4.0, 0.0))
    assert isinstance(streamed, StreamedImages)
    order = torch.tensor([4, 0, 6, 2, 5]).split(2)
    for a, b in zip(cached.batches(order, torch.device("cpu")), streamed.batches(order, torch.device("cpu"))):
        assert torch.equal(a, b)
    assert torch.equal(cached.take([3, 1]), streamed.take([3, 1]))


def test_a_copy_of_streamed_images_is_the_same_data_set_and_other_images_are_not(tmp_path):
    write_images(tmp_path / "a/train", 7, size=12)
    write_images(tmp_path / "a/test", 2, size=12)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)              # new modification times

    def fingerprint(name):
        return load_data(flags(tmp_path / name, cache_gb=0.0), "cpu")[0].fingerprint

    first = fingerprint("a")
    assert fingerprint("b") == first
    path = tmp_path / "b/train/00003.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")                                             # of the same size
    assert fingerprint("b") != first
    path.write_bytes((tmp_path / "a/train/00003.png").read_bytes())
    path.rename(path.with_name("other.png"))
    assert fingerprint("b") != first


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_in_one_line(workers, tmp_path):
    write_images(tmp_path / "train", 3, size=8)
    write_images(tmp_path / "test", 1, size=8)
    streamed = load_data(flags(tmp_path, cache_gb=0.0, num_workers=workers), "cpu")[0]
    (tmp_path / "train" / "00001.png").unlink()
    with pytest.raises(UserError) as error:
        list(streamed.batches(torch.arange(3).split(3), torch.device("cpu")))
    assert str(error.value).startswith(f"{tmp_path / 'train' / '00001.png'}: it does not exist")


def test_a_worker_names_the_unreadable_image_in_one_line(tmp_path):
    write_images(tmp_path / "train", 3, size=8)
    write_images(tmp_path / "test", 1, size=8)
    streamed = load_data(flags(tmp_path, cache_gb=0.0, num_workers=1), "cpu")[0]
    (tmp_path / "train" / "00001.png").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        list(streamed.batches(torch.arange(3).split(3), torch.device("cpu")))
    assert str(error.value) == f"{tmp_path / 'train' / '00001.png'}: cannot be read as an image; delete or replace it"


def test_digits_are_whole_and_need_no_folder():
    train, held = load_data(flags("/nonexistent", dataset="digits"), "cpu")
    assert len(train) + len(held) == 1797 and train.shape == (1, 8, 8) and train.images.max() == 255
    assert load_data(flags("/nonexistent", dataset="digits", img_size=16, in_channels=3), "cpu")[0].shape == (3, 16, 16)


def test_one_size_is_needed_where_none_is_given(tmp_path):
    write_images(tmp_path / "a", 1, size=8)
    write_images(tmp_path / "b", 1, size=9)
    with pytest.raises(UserError, match="9x9 pixels"):
        decode_images(list_images(tmp_path))


@pytest.mark.parametrize("channels", [1, 3])
def test_many_files_are_decoded_by_processes_to_the_same_images(channels, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    write_images(folder, 21, size=24)
    files = list_images(folder)
    alone = decode_images(files, channels, 16)
    assert torch.equal(alone, torch.stack([torch.tensor(read_image(f, channels, 16)).reshape(16, 16, channels)
                                           for f in files]).permute(0, 3, 1, 2))
    monkeypatch.setattr(utils, "MANY_IMAGES", 20)
    monkeypatch.setattr(utils, "CHUNK", 4)
    monkeypatch.setattr(utils, "cpu_count", lambda: 2)
    assert torch.equal(decode_images(files, channels, 16), alone)
    (folder / "00013.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="00013.png: cannot be read as an image"):
        decode_images(files, channels, 16)
    (folder / "00009.png").unlink()
    with pytest.raises(FileNotFoundError) as error:       # with its name and number, which run() turns into a line
        decode_images(files, channels, 16)
    assert error.value.filename == str(folder / "00009.png")
    write_images(tmp_path / "other", 1, size=9)
    with pytest.raises(UserError, match="9x9 pixels, but .*24x24"):
        decode_images([*files[:8], *list_images(tmp_path / "other"), *files[14:], *files[:8]], channels)


def start_workers(work, items):
    """A program that calls in_processes with `work`, the body of a function of `item`, on two processes."""
    program = (f"import os, signal, time, utils\ndef work(item):\n{textwrap.indent(work, '    ')}\n"
               f"def main():\n    print(sum(utils.in_processes(work, list(range({items})), 2)))\nutils.run(main)\n")
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def running(pid):
    """Is there such a process, and not only its remains?"""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_workers_end_with_their_killed_owner(tmp_path):
    owner = start_workers(f"open(f'{tmp_path}/{{os.getpid()}}', 'w').close()\ntime.sleep(0.1)\nreturn item", 3000)
    for _ in range(600):
        if len(workers := [int(p.name) for p in tmp_path.iterdir()]) == 2 or owner.poll() is not None:
            break
        time.sleep(0.1)
    assert len(workers) == 2 and all(map(running, workers))
    owner.kill()
    owner.communicate()
    for _ in range(300):
        if not any(map(running, workers)):
            break
        time.sleep(0.1)
    assert not any(map(running, workers))


def test_results_of_workers_come_in_order_and_a_killed_worker_is_one_line():
    assert start_workers("time.sleep(0.2 * (item == 0))\nreturn item", 4).communicate(timeout=300) == ("6\n", "")
    assert list(utils.in_processes(str, [3, 1, 2], 2)) == ["3", "1", "2"]
    out, err = start_workers("if item == 2:\n    os.kill(os.getpid(), signal.SIGKILL)\nreturn item", 4).communicate(timeout=300)
    assert out == "" and err.startswith("error: a worker process was killed") and err.count("\n") == 1


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_write(path) as f:
        f.write(b"half")
        raise RuntimeError("in the middle")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    with atomic_write(path) as f:
        f.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_seeded_generators():
    draw = [torch.rand(3, generator=seeded("cpu", *key)) for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[3])


def test_latent_health_against_hand_made_numbers():
    """Two of three units vary over x; two of four components share all the responsibility."""
    from models.vamp_flow import CrossFlowVampVAE, KLTerms, VAEOutput
    mu = torch.zeros(100, 3)
    mu[:, 0], mu[:, 1] = torch.linspace(-2, 2, 100), 3 * torch.cat([torch.ones(50), -torch.ones(50)])
    logvar = torch.log(torch.full((100, 3), 0.25))
    mu_k = torch.tensor([[0.0, 3, 0], [0, -3, 0], [90, 0, 0], [-90, 0, 0]])
    out = VAEOutput(mu, mu, logvar, mu, mu, torch.full((100,), 2.0), mu_k, torch.zeros(4, 3))
    health = LatentHealth()
    # A model that is asked for nothing but what it makes of out.
    model = CrossFlowVampVAE(1, 4, 3, (4,), num_components=4, flow_length=0)
    for part in (slice(0, 30), slice(30, 100)):                      # unequal batches
        piece = VAEOutput(*(x[part] for x in out[:6]), *out[6:])
        values = torch.arange(100.0)[part]
        health.add(model, piece, KLTerms(values, values + 1, piece.log_det, values * 0))
    summary = health.summary()
    assert summary["active_units"] == 2
    assert summary["signal_share"] == pytest.approx([mu[:, 0].var(unbiased=False).item() /
                                                     (mu[:, 0].var(unbiased=False).item() + 0.25), 9 / 9.25, 0], rel=1e-5)
    assert summary["effective_components"] == pytest.approx(2, rel=1e-3) and summary["dead_components"] == 2
    assert summary["kl_raw"] == pytest.approx(49.5) and summary["log_q0"] == pytest.approx(50.5)
    assert summary["log_det"] == pytest.approx(2)


def test_cifar10_keeps_its_splits_and_its_pixels(monkeypatch):
    import torchvision
    rng = np.random.default_rng(0)
    sets = {train: rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for train, n in ((True, 5), (False, 3))}
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: types.SimpleNamespace(data=sets[train]))
    for found, split in zip(load_data(flags("x", dataset="cifar10", img_size=32), "cpu"), (True, False)):
        assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), sets[split])


def test_decoded_data_sets_are_resized_and_greyed_as_files_are():
    """Within a level of PIL, which read_image uses."""
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    x[1] = 255 * (np.indices((32, 32)).sum(0) % 2)[:, :, None]
    x[2, :, 16:], x[2, :, :16] = 255, 0                          # an edge, at which bicubic overshoots
    ours = torch.from_numpy(x).permute(0, 3, 1, 2)
    for size in (12, 40):
        pil = np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.BICUBIC)) for i in x]).astype(int)
        off = np.abs(utils._resize(ours, size).permute(0, 2, 3, 1).numpy() - pil)
        # (PIL clips between its two passes, which shows where noise is enlarged.)
        assert off[2 if size > 32 else 0:].max() <= 1 and off.mean() < 0.3
    grey = np.stack([np.asarray(Image.fromarray(i).convert("L")) for i in x]).astype(int)
    assert np.abs(utils._set_channels(ours, 1)[:, 0].numpy() - grey).max() <= 1
    rgb = utils._set_channels(ours[:, :1], 3)
    assert all(torch.equal(rgb[:, c], ours[:, 0]) for c in range(3))


def test_kept_images_of_another_size_or_colour_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "MANY_IMAGES", 20)
    write_images(tmp_path / "d", 30, size=8)
    for size, channels in ((8, 3), (4, 3), (4, 1)):
        train, _ = load_data(flags(tmp_path / "d", img_size=size, in_channels=channels), "cpu", tmp_path / "cache")
        assert train.shape == (channels, size, size)


def test_the_test_folder_comes_before_others(tmp_path):
    for name, n in (("train", 4), ("test", 3), ("val", 2)):
        write_images(tmp_path / name, n, size=8)
    assert len(load_data(flags(tmp_path), "cpu")[1]) == 3


def test_thresholds_of_active_units_and_dead_components():
    health, std = LatentHealth(), torch.tensor([0.0099, 0.0101]).sqrt()
    usage = torch.tensor([0.0249, 0.0251, 0.5, 0.45], dtype=torch.float64)             # dead below a tenth of a fourth
    health.mu, health.var, health.parts = [torch.stack([-std, std])], [torch.ones(2, 2)], [torch.zeros(4)]
    health.responsibility, health.count = 2 * usage, 2
    summary = health.summary()
    assert (summary["active_units"], summary["dead_components"]) == (1, 1)
    assert summary["effective_components"] == pytest.approx(torch.distributions.Categorical(usage).entropy().exp().item())


def test_spread_reaches_the_end_and_shares_leave_nothing_out(monkeypatch):
    assert spread(4, 10).tolist() == [0, 2, 5, 7] and spread(7, 12).tolist() == [0, 1, 3, 5, 6, 8, 10]
    monkeypatch.setattr(utils, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(utils, "rank", lambda process=process: process)
        shares += [[*range(11)[my_share(11)]]]
    assert sum(shares, []) == [*range(11)] and {len(s) for s in shares} == {3, 4}


def test_seeds_make_the_numbers_they_made_before():
    """Another derivation would change every sample of every published checkpoint."""
    def draw(*key):
        return torch.randint(10 ** 6, (3,), generator=seeded("cpu", *key)).tolist()

    assert draw(0, "samples", 0) == [242486, 989179, 360817] and draw(3, "step", 7) == [992105, 129359, 748206]
    assert draw(1, 11) != draw(11, 1) and draw(1, "1") != draw("1", 1) != draw(11)


def test_split_seed_shuffles():
    halves = {seed: utils._hold_out(50, seed) for seed in (0, 1)}
    assert halves[0] != halves[1] and [*range(5)] not in [held for _, held in halves.values()]
    for kept, held in halves.values():
        assert len(held) == 5 and sorted(kept + held) == [*range(50)] and kept == sorted(kept) and held == sorted(held)


def test_files_of_a_folder_stay_together(tmp_path):
    """As a sort of whole paths would not keep them: a-b/ stands before a/ there, and a.png between them."""
    for name in ("a", "a-b", "a b"):
        write_images(tmp_path / name, 2, size=4)
    (tmp_path / "a.png").write_bytes((tmp_path / "a" / "00000.png").read_bytes())
    found = [os.path.relpath(p, tmp_path).replace(os.sep, "/") for p in list_images(tmp_path)]
    assert found == ["a/00000.png", "a/00001.png", "a b/00000.png", "a b/00001.png", "a-b/00000.png", "a-b/00001.png", "a.png"]


def test_16_bits_become_8_and_resizing_is_bicubic(tmp_path):
    levels = np.array([0, 256, 257, 32896, 65278, 65279, 65535], np.uint16)[None]
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 1).tolist() == [[0, 0, 1, 128, 254, 254, 255]]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    image.save(tmp_path / "image.png")
    wanted = np.asarray(image.resize((12, 8), Image.BICUBIC).crop((2, 0, 10, 8)))
    assert np.array_equal(read_image(tmp_path / "image.png", 3, 8), wanted)


def test_a_large_folder_without_a_test_split_loses_no_image(tmp_path, monkeypatch):
    """The images that are kept are moved together a thousand at a time."""
    numbers = torch.stack([torch.arange(2600) // 256, torch.arange(2600) % 256], 1).byte()[:, :, None, None]
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(utils, "list_images", lambda *_, **__: [str(n) for n in range(2600)])
    monkeypatch.setattr(utils, "decode_kept", lambda *_: numbers)
    train, held = (256 * x.images[:, 0, 0, 0].int() + x.images[:, 1, 0, 0] for x in load_data(flags(tmp_path), "cpu"))
    kept, out = utils._hold_out(2600, 0)
    assert train.tolist() == kept and held.tolist() == out


def test_written_files_are_on_the_disk_before_they_take_their_name_and_are_readable_by_others(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: done.append(name) or real(*args))
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o022))
        with atomic_write(tmp_path / "a") as f:
            f.write(b"a")
        utils.atomic_write_all({tmp_path / "b": b"b", tmp_path / "c": b"c"})
    assert done == ["fsync", "replace", "fsync", "fsync", "replace", "replace"]
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "abc"} == {0o644}


def test_digits_are_scaled_to_all_of_8_bits():
    from sklearn.datasets import load_digits
    found = utils._load_digits()[:, 0].numpy()
    assert (found.min(), found.max()) == (0, 255) and np.array_equal(found, np.round(load_digits().images * 255 / 16))


def test_convolutions_of_features_are_not_searched_for(monkeypatch):
    """The fastest of a search differs from start to start, and with it the last bits."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    with utils.exact_convolutions():
        assert not cudnn.benchmark and not cudnn.allow_tf32
    assert cudnn.benchmark


def test_both_splits_together_decide_what_is_kept_in_memory(tmp_path):
    for split, n in (("train", 5), ("test", 3)):
        write_images(tmp_path / split, n, size=8)
    whole = 8 * 3 * 8 ** 2 / 2 ** 30
    for gib, kind in ((whole, utils.MemoryImages), (0.99 * whole, utils.StreamedImages)):
        assert {type(images) for images in load_data(flags(tmp_path, cache_gb=gib), torch.device("cpu"))} == {kind}
