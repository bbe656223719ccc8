"""test.py: exports, pictures, diagnostics, likelihood and evaluation of small models made here."""
import argparse
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image
from scipy.stats import laplace

import comparison
import PR_Calculate
import train
import utils
from models.vamp_flow import CrossFlowVampVAE, log_normal, perturb_
from utils import (
    LOCK,
    InceptionFeatures,
    MemoryImages,
    UserError,
    frechet_distance,
    generate_images,
    load_data,
    load_model,
    mean_and_covariance,
    read_json,
    save_checkpoint,
    seeded,
    to_float,
    to_uint8,
    write_json,
)

# "import test" would find the standard library's package of that name.
spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TINY = ["--hidden_dims", "8", "12", "--latent_dim", "4", "--num_components", "5", "--flow_length", "2", "--flow_seq_len", "1",
        "--flow_embed_dim", "8", "--flow_heads", "2", "--flow_layers", "1", "--lpips_net", "none", "--fid_every", "0"]
QUIET = ["--do_pictures", "False", "--device", "cpu"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A data folder with 60 training and 20 test images of 8x8."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 60, size=8, seed=1)
    write_images(root / "test", 20, size=8, seed=2)
    return root


@pytest.fixture
def data(images, tmp_path):
    """A data folder of the test's own that may be written to, with a space in its name."""
    root = tmp_path / "the data"
    root.mkdir()
    for split in ("train", "test"):
        (root / split).symlink_to(images / split)
    return root


def make_checkpoint(folder, data, *flags, name="last.pth", exp_name="run", seed=0):
    """A checkpoint as train.py writes it, of a small model with random weights whose EMA differs from them."""
    folder.mkdir(parents=True, exist_ok=True)
    args, _ = train.parse_args(["--dataset", "folder", "--data_dir", str(data), "--img_size", "8", *TINY,
                                "--exp_name", exp_name, *map(str, flags)])
    args.flip, args.in_channels = True, args.in_channels or 3
    training, _ = load_data(args, torch.device("cpu"))
    torch.manual_seed(seed)
    model = CrossFlowVampVAE(**train.model_args_of(args))
    perturb_(model, 0.3, torch.Generator().manual_seed(seed))
    model.project_()
    trainer = train.Trainer(args, model, None, 1, 8, folder, training.fingerprint)
    perturb_(model, 0.3, torch.Generator().manual_seed(seed + 1))
    model.project_()
    trainer.epoch = 3
    save_checkpoint(folder / name, trainer.state())
    return folder / name


@pytest.fixture
def checkpoint(tmp_path, data):
    return make_checkpoint(tmp_path / "results" / "run", data)


def main(monkeypatch, tmp_path, path, *flags):
    """test.main() in this process; raises what it raises."""
    monkeypatch.setattr(sys, "argv", ["test.py", "--resume", str(path), "--save_dir", str(tmp_path / "results"),
                                      *map(str, flags)])
    script.main()


def export(monkeypatch, tmp_path, path, *flags):
    """Only samples, 25 of them."""
    main(monkeypatch, tmp_path, path, *QUIET, "--do_real", "False", "--num_samples", 25, *flags)


def read(folder):
    """The images of an export, uint8 (N, C, H, W), and its manifest."""
    files = sorted(folder.glob("*.png"))
    arrays = []
    for f in files:
        with Image.open(f) as image:
            assert image.mode == "RGB"
            arrays.append(np.asarray(image))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), json.loads((folder / "manifest.json").read_text())


def state(folder):
    """Everything below a folder: names, contents, times."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def data_set(data):
    args, _ = train.parse_args(["--dataset", "folder", "--data_dir", str(data), "--img_size", "8"])
    return load_data(args, torch.device("cpu"))


# -- export -----------------------------------------------------------------------------------------------------------

def test_documented_command(data, tmp_path):
    path = make_checkpoint(tmp_path / "results" / "CrossVampVAE_Experiment", data, name="best_fid.pth",
                           exp_name="CrossVampVAE_Experiment")
    done = subprocess.run([sys.executable, str(ROOT / "test.py"), "--resume", path, "--data_dir", data, "--save_dir",
                           tmp_path / "results", "--num_samples", "70", "--gen_batch_size", "100", "--real_dirname",
                           "real_cifar", "--fake_dirname", "fake_cifar", "--do_recon", "False"], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    real, manifest = read(data / "real_cifar")
    assert torch.equal(real, data_set(data)[0].images) and manifest["done"] == manifest["count"] == 60
    model, _ = load_model(path, "cpu")
    fake, manifest = read(data / "fake_cifar")
    assert torch.equal(fake, torch.cat(list(generate_images(model, 70, 100, 0))))
    assert sorted(p.name for p in (data / "fake_cifar").glob("*.png")) == [f"{i:05d}.png" for i in range(70)]
    assert manifest["kind"] == "samples" and manifest["weights"] == "ema" and manifest["seed"] == 0
    assert not (data / "recon_cifar").exists()
    folder = tmp_path / "results" / "CrossVampVAE_Experiment" / "test"
    assert {p.name for p in folder.iterdir()} == {"test_log.txt", *(f"{n}.png" for n in (
        "samples", "components", "interpolations", "reconstructions", "nearest", "latent_map"))}
    assert str(folder) in done.stdout and "test.py" in (folder / "test_log.txt").read_text().splitlines()[0]
    # The commands that follow are what a shell makes of them, spaces and all.
    commands = [shlex.split(line) for line in done.stdout.split("next:\n")[1].splitlines()]
    assert commands[0] == ["python", "-m", "pytorch_fid", str(data / "real_cifar"), str(data / "fake_cifar")]
    PR_Calculate.parse_args(commands[1][2:])
    assert commands[1][:6] == ["python", "PR_Calculate.py", "--real_dir", str(data / "real_cifar"), "--fake_dir",
                               str(data / "fake_cifar")]
    sharpness = {c[c.index("--tag") + 1]: c[c.index("--gen") + 1] for c in commands[2:4]}
    assert sharpness == {"CrossVampVAE_Experiment": str(data / "fake_cifar"), "real": str(data / "real_cifar")}
    assert commands[1][commands[1].index("--pca_dim") + 1] == "60"           # 256 need as many real images
    assert commands[4][1] == "comparison.py" and commands[4][-1] == "CrossVampVAE_Experiment,real"
    assert commands[4][3] == commands[2][commands[2].index("--out_dir") + 1]


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 1, 5, 7), (1, 3, 1, 1), (4, 3, 33, 2)])
def test_png_is_lossless_rgb(shape, tmp_path):
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    script.write_pngs(tmp_path, x, 0, shape[0])
    for i, image in enumerate(x):
        with Image.open(tmp_path / f"{i:05d}.png") as png:
            assert png.mode == "RGB" and png.format == "PNG"
            png.load()
            assert np.array_equal(np.asarray(png), image.expand(3, -1, -1).permute(1, 2, 0).numpy())


def test_names_sort_as_numbers():
    assert script.image_name(7, 50000) == "00007.png" and script.image_name(99999, 100000) == "99999.png"
    names = [script.image_name(i, 100001) for i in (9, 99999, 100000)]
    assert names == sorted(names) and script.EXPORTED.fullmatch(names[-1])


def test_same_seed_same_images_whatever_the_batch(checkpoint, data, monkeypatch, tmp_path):
    export(monkeypatch, tmp_path, checkpoint, "--gen_batch_size", 7, "--fake_dirname", "a", "--seed", 3)
    export(monkeypatch, tmp_path, checkpoint, "--gen_batch_size", 100, "--fake_dirname", "b", "--seed", 3)
    export(monkeypatch, tmp_path, checkpoint, "--fake_dirname", "c", "--seed", 4)
    a, b, c = (read(data / name)[0].int() for name in "abc")
    assert (a - b).abs().max() <= 1 and (a - c).abs().max() > 20


@pytest.mark.parametrize("flags", [(), ("--flow_prior", "pushed"), ("--prior", "standard", "--flow_length", "0")])
def test_first_samples_do_not_depend_on_how_many_follow(flags, data, tmp_path):
    model, _ = load_model(make_checkpoint(tmp_path / "run", data, *flags), "cpu")
    decoded = []
    model.decode = lambda z: decoded.append(z) or z

    def latents(n, batch_size, start=0):
        decoded.clear()
        sizes = [len(batch) for batch in generate_images(model, n, batch_size, seed=3, start=start)]
        assert all(size == batch_size for size in sizes[:-1]) and sum(sizes) == n - start
        return torch.cat(decoded) if decoded else torch.empty(0, 4)

    whole = latents(2500, 100)
    assert len(whole.unique(dim=0)) == 2500                     # no block repeats another
    for n, batch_size, start in ((1, 1, 0), (999, 7, 0), (1000, 1000, 0), (1001, 64, 0), (2000, 3000, 0),
                                 (2500, 1300, 0), (2500, 30, 1000), (2400, 100, 1990), (1500, 10, 1500)):
        assert torch.equal(latents(n, batch_size, start), whole[start:n]), (n, batch_size, start)


def test_weights_temperature_and_reconstructions(checkpoint, data, monkeypatch, tmp_path):
    export(monkeypatch, tmp_path, checkpoint, "--weights", "raw", "--temperature", 0.5, "--do_recon", "True", "--recon_split",
           "test")
    raw, _ = load_model(checkpoint, "cpu", "raw")
    ema, _ = load_model(checkpoint, "cpu", "ema")
    fake, manifest = read(data / "fake_cifar")
    assert torch.equal(fake, next(generate_images(raw, 25, 25, 0, 0.5)))
    assert not torch.equal(fake, next(generate_images(ema, 25, 25, 0, 0.5)))
    assert not torch.equal(fake, next(generate_images(raw, 25, 25, 0, 1.0)))
    assert (manifest["weights"], manifest["temperature"]) == ("raw", 0.5)
    x = to_float(data_set(data)[1].images)
    recon, manifest = read(data / "recon_cifar")
    assert torch.equal(recon, to_uint8(raw.decode(raw.apply_flow(raw.encode(x)[0])[0])))
    assert (manifest["kind"], manifest["split"], manifest["count"]) == ("reconstructions", "test", 20)


def test_samples_of_dead_components_are_said(checkpoint, data, monkeypatch, tmp_path, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    for dead in (0, 4):
        save_checkpoint(checkpoint, {**saved, "history": [{"dead_components": dead}]})
        export(monkeypatch, tmp_path, checkpoint, "--fake_dirname", f"fake{dead}")
        assert ("note: 4 of 5 components are dead" in capsys.readouterr().out) == (dead == 4)


def test_reconstructions_without_the_flow(checkpoint, data, monkeypatch, tmp_path):
    flags = [*QUIET, "--do_real", "False", "--do_fake", "False", "--do_recon", "True", "--recon_split", "test"]
    main(monkeypatch, tmp_path, checkpoint, *flags, "--recon_dirname", "used")
    main(monkeypatch, tmp_path, checkpoint, *flags, "--recon_dirname", "bypassed", "--recon_flow", "bypassed")
    model, _ = load_model(checkpoint, "cpu")
    mu = model.encode(to_float(data_set(data)[1].images))[0]
    (used, a), (bypassed, b) = read(data / "used"), read(data / "bypassed")
    assert torch.equal(bypassed, to_uint8(model.decode(mu))) and not torch.equal(bypassed, used)
    differing = {k for k in a if a[k] != b[k]} - {"checksum"}
    assert differing == {"latent"} and (a["latent"], b["latent"]) == ("posterior mean", "posterior mean, flow bypassed")
    # One is never taken for the other.
    for folder, flow in (("used", "bypassed"), ("bypassed", "used")):
        with pytest.raises(UserError, match="flow bypassed"):
            main(monkeypatch, tmp_path, checkpoint, *flags, "--recon_dirname", folder, "--recon_flow", flow)
    path = make_checkpoint(tmp_path / "results" / "plain", data, "--flow_length", 0)
    with pytest.raises(UserError, match="decodes without a flow"):
        main(monkeypatch, tmp_path, path, *flags, "--recon_dirname", "plain", "--recon_flow", "bypassed")


def test_reconstructions_from_a_sample_of_the_posterior(checkpoint, data, monkeypatch, tmp_path):
    flags = [*QUIET, "--do_real", "False", "--do_fake", "False", "--do_recon", "True", "--recon_split", "test", "--seed", 3]
    main(monkeypatch, tmp_path, checkpoint, *flags, "--recon_latent", "sample", "--gen_batch_size", 7)
    model, _ = load_model(checkpoint, "cpu")
    x = to_float(data_set(data)[1].images)
    eps = torch.randn(20, model.latent_dim, generator=seeded("cpu", 3, "reconstructions"))
    recon, manifest = read(data / "recon_cifar")
    # The batches differ in size, and with them the last bits.
    assert (recon.int() - to_uint8(model.reconstruct(x, eps)).int()).abs().max() <= 1
    assert not torch.equal(recon, to_uint8(model.reconstruct(x)))
    assert manifest["latent"] == "one sample of the posterior, seed 3"
    with pytest.raises(UserError, match="posterior mean"):
        main(monkeypatch, tmp_path, checkpoint, *flags)


def test_exports_go_where_they_are_sent(checkpoint, data, monkeypatch, tmp_path, capsys):
    before = state(data)
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--export_dir", tmp_path / "ex ports", "--num_samples", 5, "--do_recon",
         "True")
    folders = {kind: tmp_path / "ex ports" / f"{kind}_cifar" for kind in ("real", "fake", "recon")}
    assert {kind: len(read(folder)[0]) for kind, folder in folders.items()} == {"real": 60, "fake": 5, "recon": 60}
    assert state(data) == before
    commands = [shlex.split(line) for line in capsys.readouterr().out.split("next:\n")[1].splitlines()]
    assert commands[0][3:] == [str(folders["real"]), str(folders["fake"])]
    (tmp_path / "results" / "single_image_quality").mkdir()
    (tmp_path / "results" / "single_image_quality" / "cache_VAE.csv").write_text("")
    shutil.rmtree(folders["real"])                                   # what is not there is in no command
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--export_dir", tmp_path / "ex ports", "--num_samples", 5, "--do_real",
         "False", "--tag=-a b,$c$")
    commands = [shlex.split(line) for line in capsys.readouterr().out.split("next:\n")[1].splitlines()]
    assert [c[1] for c in commands] == ["csv_analysis.py", "comparison.py"]
    assert commands[0][2:4] == ["--gen", str(folders["fake"])] and commands[0][-1].startswith("run_-a_b__c__")
    assert commands[1][-1] == f"VAE,{commands[0][-1]}"
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--export_dir", tmp_path / "ex ports", "--num_samples", 5, "--tag", "real")
    commands = [shlex.split(line) for line in capsys.readouterr().out.split("next:\n")[1].splitlines()]
    measured = [c for c in commands if c[1] == "csv_analysis.py"]
    assert [(c[3], c[-1]) for c in measured] == [(str(folders["fake"]), "real_samples"), (str(folders["real"]), "real")]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--export_dir"):
        export(monkeypatch, tmp_path, checkpoint, "--export_dir", tmp_path / "file")


def test_other_exports_are_in_no_command(checkpoint, data, monkeypatch, tmp_path, capsys):
    """Their numbers would be taken for this checkpoint's."""
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--num_samples", 5)
    manifest = data / "fake_cifar" / "manifest.json"

    def measured(*flags):
        capsys.readouterr()
        main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--do_fake", "False", *flags)
        return re.findall(r"--gen \S*?(\w+)_cifar", capsys.readouterr().out.replace("the data", "the_data"))
    assert measured() == ["fake", "real"]
    for flags in (["--temperature", 0.5], ["--seed", 1], ["--weights", "raw"]):
        assert measured(*flags) == ["real"]
    assert measured("--real_split", "test") == ["fake"]
    write_json(manifest, {**read_json(manifest), "done": 3})
    assert measured() == ["real"]
    manifest = data / "real_cifar" / "manifest.json"
    write_json(manifest, {**read_json(manifest), "data": "of other images"})
    assert measured() == measured("--diagnose") == []


def test_part_of_a_split_is_spread_over_it(checkpoint, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_fake", "False", "--real_split", "test", "--num_real", 5)
    assert torch.equal(read(data / "real_cifar")[0], data_set(data)[1].images[::4])
    assert script.spread(0, 7).tolist() == list(range(7)) == script.spread(9, 7).tolist()


def test_killed_export_goes_on_where_it_stopped(checkpoint, data, monkeypatch, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "test.py"), "--resume", checkpoint, *QUIET, "--do_real", "False",
                                "--save_dir", tmp_path / "results", "--num_samples", "3000", "--gen_batch_size", "1"],
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder, deadline = data / "fake_cifar", time.monotonic() + 60
    while not (folder.is_dir() and len(os.listdir(folder)) > 100) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["done"] < 3000 and manifest["count"] == 3000
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--num_samples", 3000)
    fake, manifest = read(folder)
    assert len(fake) == 3000 == manifest["done"]
    model, _ = load_model(checkpoint, "cpu")
    whole = torch.cat(list(generate_images(model, 3000, 500, 0)))
    assert (fake.int() - whole.int()).abs().max() <= 1


def cut_short(folder, done):
    """Make an export what a kill leaves: a manifest that counts `done`, then one whole and one half-written image."""
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", manifest | {"done": done})
    (folder / ".manifest.json.abc_1234.tmp").write_text("{")
    (folder / LOCK).write_text("process 1 on nowhere")
    half = folder / f"{done + 1:05d}.png"
    half.write_bytes(half.read_bytes()[:40])
    for i in range(done + 2, manifest["count"]):
        (folder / f"{i:05d}.png").unlink()


def test_only_the_missing_images_are_made_again(checkpoint, data, monkeypatch, tmp_path, capsys):
    export(monkeypatch, tmp_path, checkpoint)
    folder = data / "fake_cifar"
    whole = read(folder)
    cut_short(folder, 10)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    decoded = []
    monkeypatch.setattr(CrossFlowVampVAE, "decode", lambda self, z, decode=CrossFlowVampVAE.decode: decoded.append(len(z))
                        or decode(self, z))
    capsys.readouterr()
    export(monkeypatch, tmp_path, checkpoint)
    assert "going on from 10" in capsys.readouterr().out and sum(decoded) == 15
    images, manifest = read(folder)
    assert (images.int() - whole[0].int()).abs().max() <= 1 and manifest == whole[1]
    changed = {p.name for p in folder.glob("*.png") if p.stat().st_mtime_ns != before.get(p.name)}
    assert changed == {f"{i:05d}.png" for i in range(10, 25)}
    assert {p.name for p in folder.iterdir()} == {*(f"{i:05d}.png" for i in range(25)), "manifest.json"}
    # A complete one is used as it is, one with a damaged file from there on.
    before = state(folder)
    export(monkeypatch, tmp_path, checkpoint)
    assert state(folder) == before and "complete and as asked for" in capsys.readouterr().out
    (folder / "00020.png").write_bytes(b"")
    export(monkeypatch, tmp_path, checkpoint)
    assert "going on from 20" in capsys.readouterr().out
    assert (read(folder)[0].int() - whole[0].int()).abs().max() <= 1


def test_failed_write_leaves_no_half_file_and_a_true_manifest(checkpoint, data, monkeypatch, tmp_path):
    """The disk fills up in the middle of image 17."""
    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:30])
            raise OSError(28, "No space left on device", self.file.name)

    monkeypatch.setattr(script, "open", lambda path, mode="r", **kwargs: Full(path, mode) if str(path).endswith("00017.png")
                        else open(path, mode, **kwargs), raising=False)
    with pytest.raises(OSError, match="No space"):
        export(monkeypatch, tmp_path, checkpoint, "--gen_batch_size", 5, "--png_threads", 1)
    folder = data / "fake_cifar"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["done"] == 15 and not (folder / "00017.png").exists()
    assert all(script.is_whole(p) for p in folder.glob("*.png"))
    monkeypatch.undo()
    export(monkeypatch, tmp_path, checkpoint)
    assert len(read(folder)[0]) == 25


def test_refitted_weights_are_of_all_samples_and_numbers_and_said(checkpoint, data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "REFIT_IMAGES", 30)             # of 60
    export(monkeypatch, tmp_path, checkpoint)
    plain, manifest = read(data / "fake_cifar")
    assert manifest["mixture_weights"] == "as trained"
    with pytest.raises(UserError, match=r"another mixture_weights \(as trained, not refitted\)"):
        export(monkeypatch, tmp_path, checkpoint, "--refit_weights")
    capsys.readouterr()
    export(monkeypatch, tmp_path, checkpoint, "--refit_weights", "--fake_dirname", "refitted")
    fake, manifest = read(data / "refitted")
    assert manifest["mixture_weights"] == "refitted" and not torch.equal(fake, plain)
    model, _ = load_model(checkpoint, "cpu")
    drawn = re.search(r"weights     of 30 training images: (\d+) of (\d+) components are drawn", capsys.readouterr().out)
    x = to_float(data_set(data)[0].images[::2])
    with torch.no_grad():
        mu, logvar = model.encode(x)
        z0 = mu + (0.5 * logvar).exp() * torch.randn(30, model.latent_dim, generator=utils.seeded("cpu", 0, "weights"))
        out = model(x)._replace(z0=z0, zK=model.apply_flow(z0)[0])
        model.fit_weights_(model.responsibilities(out))
    assert torch.equal(fake, next(generate_images(model, 25, 25, 0)))
    K = model.num_components
    assert (int(drawn[1]), int(drawn[2])) == ((model.log_weights().exp() > 0.1 / K).sum(), K)
    # An export and numbers of before there was this flag are of the weights as trained.
    path = data / "fake_cifar" / "manifest.json"
    old = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("mixture_weights", "checksum")}
    write_json(path, old)
    export(monkeypatch, tmp_path, checkpoint)
    with pytest.raises(UserError, match=r"another mixture_weights \(as trained, not refitted\)"):
        export(monkeypatch, tmp_path, checkpoint, "--refit_weights")
    flags = [*QUIET, "--do_real", "False", "--do_fake", "False", "--diagnose"]
    main(monkeypatch, tmp_path, checkpoint, *flags)
    kl = json.loads((checkpoint.parent / "test/diagnostics.json").read_text())["diagnostics"]["kl_raw"]
    with pytest.raises(UserError, match=r"diagnostics.json was measured with another mixture_weights \(as trained, not"):
        main(monkeypatch, tmp_path, checkpoint, *flags, "--refit_weights")
    main(monkeypatch, tmp_path, checkpoint, *flags, "--refit_weights", "--tag", "refitted")
    written = json.loads((checkpoint.parent / "test/diagnostics_refitted.json").read_text())
    assert written["protocol"]["mixture_weights"] == "refitted" and written["diagnostics"]["kl_raw"] != kl


def test_all_the_chosen_training_images_are_counted_for_the_weights(data, monkeypatch, tmp_path):
    path = make_checkpoint(tmp_path / "results" / "run", data, "--prior", "mog", "--num_components", 5)
    training = data_set(data)[0]
    x = to_float(training.images[::2])
    for batch_size in (7, 30):
        model, _ = load_model(path, "cpu")
        with torch.no_grad():                                   # every component is of some images
            zK = model.apply_flow(model.encode(x)[0])[0]
            model.prior_mu.copy_(zK[::6])
            model.prior_logvar.fill_(zK.var().log())
        monkeypatch.setattr(script, "REFIT_IMAGES", 30)
        assert script.refit_weights(model, training, batch_size) == 30
        found = model.log_weights().exp()
        model.prior_logits = None                               # as it was
        with torch.no_grad():
            mu, logvar = model.encode(x)
            noise = torch.randn(30, model.latent_dim, generator=utils.seeded("cpu", 0, "weights"))
            out = model.carry(mu, logvar, noise)
            model.fit_weights_(model.responsibilities(out))
        assert torch.allclose(found, model.log_weights().exp(), atol=1e-5)
        assert (found > 0.03).sum() > 2


def test_a_prior_without_a_mixture_has_no_weights_to_refit(data, monkeypatch, tmp_path):
    path = make_checkpoint(tmp_path / "results" / "run", data, "--prior", "standard", "--flow_length", 0)
    with pytest.raises(UserError, match="--refit_weights: the prior of .* has no mixture"):
        export(monkeypatch, tmp_path, path, "--refit_weights")
    assert not (data / "fake_cifar").exists()


@pytest.mark.parametrize("change", ["seed", "temperature", "weights", "count", "checkpoint", "latents", "beyond", "damaged",
                                    "no count"])
def test_another_export_is_never_mixed_with(change, checkpoint, data, monkeypatch, tmp_path):
    export(monkeypatch, tmp_path, checkpoint)
    folder, path = data / "fake_cifar", checkpoint
    flags = {"seed": ["--seed", 1], "temperature": ["--temperature", 0.9], "weights": ["--weights", "raw"],
             "count": ["--num_samples", 10]}.get(change, [])
    words = [str(folder), "--overwrite", "--fake_dirname", change]
    if change == "checkpoint":
        path = make_checkpoint(tmp_path / "results" / "run", data, seed=5)
    if change == "latents":                                     # an older export, whose latents were drawn otherwise
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["latents"]
        write_json(folder / "manifest.json", manifest)
    if change == "beyond":
        (folder / "00025.png").write_bytes((folder / "00000.png").read_bytes())
        words[-1] = "00025.png"
    if change == "damaged":
        (folder / "manifest.json").write_text("{")
    if change == "no count":
        (folder / "manifest.json").write_text('{"done": "many"}')
        words[-1] = "damaged"
    before = state(folder)
    with pytest.raises(UserError) as error:
        export(monkeypatch, tmp_path, path, *flags)
    assert all(w in str(error.value) for w in words), error.value
    assert state(folder) == before
    export(monkeypatch, tmp_path, path, *flags, "--overwrite")
    fake, manifest = read(folder)
    assert len(fake) == manifest["count"] == manifest["done"] == (10 if change == "count" else 25)
    assert sorted(p.name for p in folder.iterdir()) == [*(f"{i:05d}.png" for i in range(len(fake))), "manifest.json"]
    model, _ = load_model(path, "cpu", "raw" if change == "weights" else "ema")
    wanted = next(generate_images(model, len(fake), 25, int(change == "seed"), 0.9 if change == "temperature" else 1.0))
    assert torch.equal(fake, wanted)


HOLD = "import sys; from utils import lock_folder\nwith lock_folder(sys.argv[1], ''): print(flush=True); sys.stdin.read()"


@pytest.mark.parametrize("what", ["samples", "pictures"])
def test_two_processes_never_write_to_one_folder(what, checkpoint, data, monkeypatch, tmp_path):
    folder = data / "fake_cifar" if what == "samples" else tmp_path / "results" / "run" / "test"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    owner.stdout.readline()
    flags = ["--device", "cpu", "--num_samples", 5, "--do_pictures", what == "pictures"]
    with pytest.raises(UserError) as error:                     # at once, not when its turn comes
        main(monkeypatch, tmp_path, checkpoint, *flags)
    flag = "--fake_dirname" if what == "samples" else "--save_dir"
    assert all(word in str(error.value) for word in (f"{flag}: {folder} is being written by process {owner.pid} on", flag))
    assert not (data / "real_cifar").exists() and os.listdir(folder) == [LOCK]
    if what == "pictures":                                      # exports alone of one checkpoint may go side by side
        main(monkeypatch, tmp_path, checkpoint, *QUIET, "--num_samples", 5)
    owner.communicate()
    main(monkeypatch, tmp_path, checkpoint, *flags)
    assert len(read(data / "fake_cifar")[0]) == 5 and not list(tmp_path.rglob(LOCK))


def test_export_that_another_process_just_finished_is_used(checkpoint, data, monkeypatch, tmp_path, capsys):
    def lock(folder, flag):
        """As if the other process had held the folder until now."""
        monkeypatch.undo()
        export(monkeypatch, tmp_path, checkpoint)
        capsys.readouterr()
        before.update(state(data))
        return utils.lock_folder(folder, flag)

    before = {}
    monkeypatch.setattr(script, "lock_folder", lock)
    export(monkeypatch, tmp_path, checkpoint)
    assert "complete and as asked for" in capsys.readouterr().out and before and state(data) == before


@pytest.mark.parametrize("kind", ["own pictures", "no manifest", "file"])
def test_other_peoples_files_are_never_deleted(kind, checkpoint, data, monkeypatch, tmp_path):
    folder = data / "fake_cifar"
    if kind == "file":
        folder.write_text("notes")
    elif kind == "no manifest":
        write_images(folder, 3)                                 # named as exports are
    else:
        export(monkeypatch, tmp_path, checkpoint)
        (folder / "thesis.pdf").write_text("years of work")
    before = state(data)
    for flags in ([], ["--overwrite"], ["--overwrite", "--seed", 1]):
        with pytest.raises(UserError, match="--fake_dirname"):
            # The real images would be exported first: not one is, if the samples cannot follow.
            main(monkeypatch, tmp_path, checkpoint, *QUIET, "--num_samples", 25, *flags)
        assert state(data) == before and not (data / "real_cifar").exists()


def test_variants_share_the_real_images(checkpoint, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_fake", "False")
    before = state(data / "real_cifar")
    other = make_checkpoint(tmp_path / "results" / "other", data, "--prior", "standard", "--flow_length", 0, exp_name="other")
    main(monkeypatch, tmp_path, other, *QUIET, "--do_fake", "False", "--seed", 7)
    assert state(data / "real_cifar") == before
    with pytest.raises(UserError, match="split .train, not test."):
        main(monkeypatch, tmp_path, other, *QUIET, "--do_fake", "False", "--real_split", "test")


def test_exports_never_become_training_data(images, monkeypatch, tmp_path):
    """A flat folder of images, which holds the exports beside them."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").glob("*.png"):
        (flat / f"photo{path.name}").write_bytes(path.read_bytes())
    path = make_checkpoint(tmp_path / "results" / "run", flat)
    for _ in range(2):
        main(monkeypatch, tmp_path, path, *QUIET, "--num_samples", 5)
    assert len(read(flat / "real_cifar")[0]) == 54


def test_samples_need_no_data(checkpoint, monkeypatch, tmp_path):
    export(monkeypatch, tmp_path, checkpoint, "--data_dir", tmp_path / "elsewhere")
    assert len(read(tmp_path / "elsewhere" / "fake_cifar")[0]) == 25


def test_part_of_the_reconstructions_is_spread_over_the_split(checkpoint, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--do_fake", "False", "--do_recon", "True",
         "--num_recon", 5)
    model, _ = load_model(checkpoint, "cpu")
    assert torch.equal(read(data / "recon_cifar")[0], script.reconstruct(model, data_set(data)[0].images[::12]))


def exports(checkpoint, sets, *flags, identity="a"):
    """{kind: Export} of a checkpoint."""
    model, _ = load_model(checkpoint, "cpu")
    args = script.build_parser().parse_args([
        "--resume", str(checkpoint), "--export_dir", "out", "--do_recon", "True", "--recon_latent", "sample",
        "--num_samples", "30", "--num_real", "17", "--num_recon", "23", "--gen_batch_size", "7", *map(str, flags)])
    return {e.flag.removeprefix("--").removesuffix("_dirname"): e for e in
            script.plan_exports(args, model, sets, {"checkpoint": identity})}


def test_an_export_that_goes_on_makes_the_images_that_the_whole_one_makes(checkpoint, data):
    sets = dict(zip(("train", "test"), data_set(data)))
    for kind, export in exports(checkpoint, sets).items():
        whole, end = (torch.cat(list(export.batches(start, export.count))).int() for start in (0, 11))
        assert len(whole) == export.count == {"real": 17, "fake": 30, "recon": 23}[kind]
        assert (whole[11:] - end).abs().max() <= 1, kind       # batches of another size round otherwise


def test_manifest_says_all_that_its_images_depend_on(checkpoint, data):
    sets = dict(zip(("train", "test"), data_set(data)))
    before = exports(checkpoint, sets)
    other = {split: MemoryImages(255 - whole.images) for split, whole in sets.items()}
    for flags, more, changed in (
            (["--seed", 1], {}, {"fake", "recon"}), (["--temperature", 0.5], {}, {"fake"}), ([], {"identity": "b"},
                                                                                           {"fake", "recon"}),
            (["--recon_latent", "mean"], {}, {"recon"}), (["--recon_flow", "bypassed"], {}, {"recon"}),
            (["--recon_split", "test"], {}, {"recon"}), (["--real_split", "test"], {}, {"real"}),
            (["--num_real", 9], {}, {"real"}), (["--gen_batch_size", 5], {}, set())):
        after = exports(checkpoint, sets, *flags, **more)
        assert {kind for kind in before if before[kind].manifest != after[kind].manifest} == changed, flags
    after = exports(checkpoint, other)
    assert {kind for kind in before if before[kind].manifest != after[kind].manifest} == {"real", "recon"}


# -- variants of the model --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, space", [
    (["--prior", "mog", "--in_channels", "1"], "zK"), (["--flow_prior", "pushed"], "z0"),
    (["--prior", "standard", "--flow_length", "0", "--ema_decay", "0"], "z0"), (["--flow_context", "encoder"], "zK"),
])
def test_variants(flags, space, data, monkeypatch, tmp_path, capsys):
    path = make_checkpoint(tmp_path / "results" / "run", data, *flags)
    main(monkeypatch, tmp_path, path, "--device", "cpu", "--num_samples", 12, "--do_recon", "True", "--diagnose", "--nll",
         "--nll_images", 3, "--nll_samples", 5, "--latent_map", "tsne" if "mog" in flags else "pca", "--map_images", 15,
         "--tag", "a$_$")                                            # no formula, which would be a broken one
    folder = tmp_path / "results" / "run" / "test"
    assert f"latent map at {space}" in capsys.readouterr().out
    assert all((folder / f"{n}.png").stat().st_size > 3000 for n in ("components", "nearest", "latent_map", "diagnostics_a$_$"))
    written = json.loads((folder / "diagnostics_a$_$.json").read_text())
    result, protocol = written["diagnostics"], written["protocol"]
    assert protocol["images"] == 20 and protocol["split"] == "test" and len(protocol["checkpoint_sha256"]) == 64
    assert protocol["weights"] == ("raw" if "0" in flags else "ema")
    assert result["kl_raw"] == pytest.approx(result["log_q0"] - result["log_det"] - result["log_p"], rel=1e-5)
    assert 0 <= result["mutual_information"] <= result["mutual_information_cap"] == math.log(20)
    gap = result["aggregate_posterior_gap_at_most"]
    assert gap is None if "encoder" in flags else gap == pytest.approx(result["kl_raw"] - result["mutual_information"])
    if "--flow_length" in flags:
        assert "saturated_share" not in result
    else:
        assert result["round_trip_error_float32"] < 1e-3 and result["round_trip_error_float64"] < 1e-10
        assert len(result["saturated_share_per_layer"]) == 2
    nll = json.loads((folder / "nll_a$_$.json").read_text())
    bound, elbo = nll["nll"]["importance_weighted"], nll["nll"]["negative_elbo"]
    assert bound["nats_per_image"] <= elbo["nats_per_image"]
    values = 64 * (1 if "--in_channels" in flags else 3)
    assert bound["bits_per_dim"] == pytest.approx(bound["nats_per_image"] / values / math.log(2))
    assert nll["protocol"]["importance_samples"] == 5 and "not trained for it alone" in nll["nll"]["what"]


def test_interpolations_end_at_the_posterior_samples(checkpoint, data):
    model, _ = load_model(checkpoint, "cpu")
    images = data_set(data)[1].images[:4]
    rows = script.interpolate(model, images, seed=0, steps=5)
    assert [len(r[1]) for r in rows] == [7, 7]
    eps = torch.randn(4, 4, generator=seeded("cpu", 0, "interpolation"))
    with torch.no_grad():
        out = model(to_float(images), eps)
        middle = to_uint8(model.decode((out.zK[2:3] + out.zK[3:4]) / 2))
    assert torch.equal(rows[1][1][0], images[2]) and torch.equal(rows[1][1][-1], images[3])
    ends = torch.stack([rows[1][1][1], rows[1][1][-2]]).int()
    assert (ends - to_uint8(out.recon[2:]).int()).abs().max() <= 1 and (rows[1][1][3] - middle.int()).abs().max() <= 1


@pytest.mark.parametrize("prior", ["unflowed", "pushed"])
def test_component_rows_are_the_most_used_ones(prior, data, tmp_path):
    path = make_checkpoint(tmp_path / "r", data, "--flow_prior", prior)
    model, _ = load_model(path, "cpu")
    rows = script.component_rows(model, [0.1, 0.0, 0.5, 0.3, 0.1], seed=0, temperature=1.0, most=3, each=4)
    assert [r[0] for r in rows] == ["k = 2, 50.0%", "k = 3, 30.0%", "k = 0, 10.0%"]
    assert torch.equal(rows[0][1][0], to_uint8(model.pseudo_inputs[2])) and len(rows[0][1]) == 6
    with torch.no_grad():
        mu = model.prior_params()[0][2:3]
        mean = to_uint8(model.decode(model.flow(mu)[0] if prior == "pushed" else mu))[0]
    assert (rows[0][1][1].int() - mean.int()).abs().max() <= 1


def test_nearest_image_is_exact():
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (300, 3, 9, 9), dtype=torch.uint8, generator=generator)
    base[200] = base[17]                                        # equally near: the first one counts
    queries = torch.cat([base[[17, 250]].flip(3), base[[17, 99]], base[5:6] // 2])
    index, distance = script.nearest_images(queries, MemoryImages(base), block=128)
    brute = (queries[:, None].long() - base[None].long()).square().flatten(2).sum(2)
    assert torch.equal(distance, brute.min(1).values) and torch.equal(index, brute.argmin(1))
    assert index[2] == 17 and distance[2] == 0
    assert all(map(torch.equal, script.nearest_images(queries, MemoryImages(base)), (index, distance)))
    rows, ours, theirs = script.nearest_rows(queries, queries[2:4], MemoryImages(base), mirror=True)
    assert torch.equal(rows[1][1][:4], queries[:4]) and rows[1][2][:4] == ["0.0"] * 4 and theirs == 0
    assert torch.equal(rows[0][1], queries)
    assert script.nearest_rows(queries, queries[2:4], MemoryImages(base), mirror=False)[0][1][2][0] != "0.0"


def test_nearest_image_takes_fewer_large_images_at_a_time(monkeypatch):
    taken = []
    monkeypatch.setattr(MemoryImages, "batches", lambda self, indices, device: (
        taken.append(len(i)) or self.images[i] for i in indices))
    for size, most in ((8, 2000), (128, 125)):                  # 47 MB of float64 each at most
        images = MemoryImages(torch.zeros(2100, 3, size, size, dtype=torch.uint8))
        script.nearest_images(images.images[:1], images)
        assert max(taken) == most and sum(taken) == 2100
        taken.clear()


def test_pictures_of_a_model_that_decodes_z0_go_back_through_the_flow(data, tmp_path):
    model, _ = load_model(make_checkpoint(tmp_path / "r", data, "--decode_from", "z0"), "cpu")
    x = data_set(data)[1].images[:2]
    row, = script.interpolate(model, x, seed=0, steps=3)
    eps = torch.randn(2, 4, generator=seeded("cpu", 0, "interpolation"))
    assert (row[1][[1, 3]].int() - to_uint8(model.reconstruct(to_float(x), eps)).int()).abs().max() <= 1
    mean = script.component_rows(model, [1, 0, 0, 0, 0], 0, 1.0, most=1)[0][1][1]
    with torch.no_grad():
        wanted = to_uint8(model.decode(model.flow.inverse(model.prior_params()[0][:1])[0]))[0]
    assert (mean.int() - wanted.int()).abs().max() <= 1


def test_pictures_obey_the_temperature_and_the_mirror(checkpoint, data, monkeypatch, tmp_path):
    model, _ = load_model(checkpoint, "cpu")
    saved, rows, nearest = {}, {}, []
    monkeypatch.setattr(script, "save_png", lambda path, grid, zoom: saved.update({path.name: grid}))
    monkeypatch.setattr(script, "save_rows", lambda path, title, r, *_, **__: rows.update({path.name: r}))
    search = script.nearest_rows
    monkeypatch.setattr(script, "nearest_rows", lambda *x: nearest.append(x) or search(*x))
    main(monkeypatch, tmp_path, checkpoint, "--device", "cpu", "--do_real", "False", "--do_fake", "False", "--temperature", 0)
    assert torch.equal(saved["samples.png"], script.image_grid(next(generate_images(model, 64, 64, 0, 0.0)), 8))
    _, images, _ = rows["components.png"][0]
    assert all(torch.equal(images[1], image) for image in images[2:])          # without temperature samples are the mean
    train, held_out = data_set(data)
    assert torch.equal(rows["reconstructions.png"][1][1], script.reconstruct(model, held_out.images)[:10])
    samples, shown, searched, mirror = nearest[0]
    assert searched.fingerprint == train.fingerprint and mirror is True


def test_medians_of_distances_are_of_samples_and_of_held_out_images():
    base = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    samples, held_out = torch.full((3, 1, 2, 2), 10, dtype=torch.uint8), torch.full((2, 1, 2, 2), 50, dtype=torch.uint8)
    assert script.nearest_rows(samples, held_out, MemoryImages(base), False)[1:] == (10, 50)


# -- diagnostics ------------------------------------------------------------------------------------------------------

def test_mutual_information_matches_definition_and_limits():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(50, 3, generator=generator) * 2, torch.randn(50, 3, generator=generator) - 1
    z = mu + torch.exp(0.5 * logvar) * torch.randn(50, 3, generator=generator)
    log_q = log_normal(z[:, None].double(), mu[None].double(), logvar[None].double())           # (i, j)
    brute = (log_q.diagonal() - (torch.logsumexp(log_q, 1) - math.log(50))).mean().item()
    assert 0.5 < brute < 3.5
    for block in (7, 50, 1000):
        assert script.mutual_information(z, mu, logvar, block) == pytest.approx(brute, abs=1e-9)
    assert script.mutual_information(z, torch.zeros(50, 3), torch.zeros(50, 3)) == pytest.approx(0, abs=1e-12)
    # The smallest sigma that the clamp allows, far apart: the cap, to the last digits that float64 has.
    far, small = 100 * torch.arange(50.0)[:, None].expand(50, 3), torch.full((50, 3), -10.0)
    assert script.mutual_information(far, far, small) == pytest.approx(math.log(50), abs=1e-6)


def test_saturation_and_round_trip_see_what_they_should(checkpoint, data):
    model, _ = load_model(checkpoint, "cpu")
    held_out = data_set(data)[1]
    posterior = script.collect_posterior(model, held_out, torch.arange(20), 7, seed=0)
    assert torch.equal(script.collect_posterior(model, held_out, torch.arange(20), 20, 0).z0.round(decimals=4),
                       posterior.z0.round(decimals=4))
    _, s = model.flow.transform(posterior.z0)
    assert posterior.saturated == pytest.approx((s.abs() > 1.8).double().mean((1, 2)).tolist(), abs=1e-9)
    assert torch.allclose(posterior.zK_of_mu, model.flow(posterior.mu)[0], atol=1e-4)
    with torch.no_grad():
        for coupling in model.flow.couplings[:1]:
            coupling.cond_a.head.bias[:2] = 100.0               # tanh at its end for one half, wherever the other is
    posterior = script.collect_posterior(model, held_out, torch.arange(20), 7, seed=0)
    assert posterior.saturated[0] >= 0.5
    model.flow.inverse = lambda z, context=None: (z + 0.1, 0.0)
    assert script.collect_posterior(model, held_out, torch.arange(20), 7, seed=0).round_trip > 0.01


def test_diagnosis_of_a_part_of_the_images_says_so(checkpoint, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--do_fake", "False", "--diagnose",
         "--diagnose_images", 10)
    written = json.loads((tmp_path / "results/run/test/diagnostics.json").read_text())
    model, _ = load_model(checkpoint, "cpu")
    mu = model.encode(to_float(data_set(data)[1].images[::2]))[0]
    assert written["diagnostics"]["mean_variance"] == pytest.approx(mu.var(0, unbiased=False).tolist(), rel=1e-4)
    assert written["protocol"]["images"] == 10 and written["diagnostics"]["mutual_information_cap"] == math.log(10)
    posterior = script.collect_posterior(model, data_set(data)[1], script.spread(10, 20), 100, 0)
    assert written["diagnostics"]["mutual_information"] == pytest.approx(
        script.mutual_information(posterior.z0, posterior.mu, posterior.logvar))
    assert posterior.kl.mean().item() == pytest.approx(written["diagnostics"]["kl_raw"], rel=1e-4)


def test_saturation_is_measured_at_the_models_own_bound(data, tmp_path):
    model, _ = load_model(make_checkpoint(tmp_path / "r", data, "--scale_bound", 0.5), "cpu")
    with torch.no_grad():
        model.flow.couplings[0].cond_a.head.bias[:2] = 100.0
    posterior = script.collect_posterior(model, data_set(data)[1], torch.arange(20), 7, seed=0)
    assert posterior.saturated[0] >= 0.5 and posterior.saturated[0] != posterior.saturated[1]
    assert script.diagnose(model, posterior)["saturated_share"] == pytest.approx(np.mean(posterior.saturated))


def test_latent_map_shows_what_it_names(checkpoint, data, monkeypatch, tmp_path):
    model, _ = load_model(checkpoint, "cpu")
    shown = []
    monkeypatch.setattr(script, "save_figure", lambda path, fig, **_: shown.extend(
        c.get_offsets().data for c in fig.axes[0].collections))
    posterior = script.collect_posterior(model, data_set(data)[1], torch.arange(20), 20, 0)
    health = {**posterior.health, "mean_responsibility": [0.6, 0.4, 0.0, 0.0, 0.0]}
    script.save_latent_map("", model, posterior._replace(health=health), 20, "pca", 0)
    from sklearn.decomposition import PCA
    pca = PCA(2).fit(posterior.zK_of_mu.double().numpy())
    components = pca.transform(model.prior_params()[0].detach().double().numpy())
    for found, wanted in zip(shown, (pca.transform(posterior.zK_of_mu.double().numpy()), components[:2], components[2:])):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_diagnostics_figure_shows_the_numbers(checkpoint, data, monkeypatch):
    model, _ = load_model(checkpoint, "cpu")
    posterior = script.collect_posterior(model, data_set(data)[1], torch.arange(20), 20, 0)
    result, figures = script.diagnose(model, posterior), []
    monkeypatch.setattr(script, "save_figure", lambda path, fig, **_: figures.append(fig))
    script.save_diagnostics("", result, posterior, "t")
    bars = [p.get_height() for p in figures[0].axes[3].patches]
    assert bars == pytest.approx([result["log_q0"], -result["log_det"], -result["log_p"], result["kl_raw"],
                                  result["mutual_information"]])
    assert sum(bars[:3]) == pytest.approx(bars[3], rel=1e-4)
    assert [p.get_height() for p in figures[0].axes[5].patches] == pytest.approx([100 * s for s in posterior.saturated])


# -- likelihood -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0, 300.0])
def test_laplace_bins_are_a_distribution(scale):
    levels = torch.arange(256.0, dtype=torch.float64)
    for mean in (0.0, 0.4999, 0.5, 0.7, 3.0, 100.25, 127.5, 254.5, 254.8, 255.0):
        log_p = script.log_laplace_bins(levels, torch.full_like(levels, mean), scale)
        assert torch.isfinite(log_p).all() and (log_p <= 0).all()
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
        edges = np.concatenate([[-np.inf], np.arange(0.5, 255), [np.inf]])
        p = np.diff(laplace.cdf(edges, mean, scale))
        assert log_p.exp().numpy() == pytest.approx(p, abs=1e-13)
        single = script.log_laplace_bins(levels.float(), torch.full((256,), mean), scale)
        assert torch.allclose(single.double(), log_p, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [0.8, 7.0, 60.0])
def test_fitted_scale_is_the_true_one(scale):
    rng = np.random.default_rng(0)
    mean = rng.uniform(0, 255, 40000)
    levels = np.clip(np.round(mean + rng.laplace(0, scale, 40000)), 0, 255)
    pairs = [(torch.tensor(levels[i::2]), torch.tensor(mean[i::2])) for i in (0, 1)]
    assert script.laplace_scale(pairs) == pytest.approx(scale, rel=0.03)


def small_model(flow_prior="unflowed", flow_context="none", flow_length=2):
    torch.manual_seed(3)
    model = CrossFlowVampVAE(img_size=8, latent_dim=2, hidden_dims=(8, 12), num_components=3, flow_length=flow_length,
                             flow_seq_len=1, flow_embed_dim=8, flow_heads=2, flow_layers=1, flow_prior=flow_prior,
                             flow_context=flow_context).eval().requires_grad_(False)
    perturb_(model, 0.1, torch.Generator().manual_seed(4))
    model.project_()
    # Wide posteriors close to each other: the importance weights of few samples are then enough.
    model.encoder.head.weight[:2] *= 0.3
    model.encoder.head.bias[2:] += 1
    return model


@pytest.mark.parametrize("variant", [{}, {"flow_prior": "pushed"}, {"flow_context": "encoder"}, {"flow_length": 0}])
def test_importance_bound_reaches_the_integral(variant):
    """log p(x) = log integral p(x|z) p(z) dz over a grid, two latent dimensions."""
    model, scale, step = small_model(**variant), 120.0, 0.2
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    axis = torch.arange(-16, 16, step)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = model.log_prior(grid)
    assert log_prior.exp().sum() * step ** 2 == pytest.approx(1, abs=1e-3)
    means = torch.cat([(model.decode(g) + 1) * 127.5 for g in grid.split(2000)])
    log_w = script.importance_weights(model, x, scale, 12000, [seeded("cpu", i) for i in range(2)], model.prior_params())
    iwae, elbo, effective = script.bounds_of(log_w)
    for i in range(2):
        log_x = script.log_laplace_bins(x[i].float().expand_as(means), means, scale).flatten(1).sum(1)
        exact = torch.logsumexp((log_x + log_prior).double(), 0).item() + 2 * math.log(step)
        assert effective[i] > 100 and elbo[i].item() < exact - 1
        assert iwae[i].item() == pytest.approx(exact, abs=4 / effective[i].sqrt().item())       # four standard errors


@pytest.mark.parametrize("variant", [{}, {"flow_context": "encoder"}])
def test_importance_bound_lies_above_elbo_and_ignores_batches(variant):
    model = small_model(**variant)
    prior = model.prior_params()
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    log_w = script.importance_weights(model, x, 30.0, 16, [seeded("cpu", i) for i in range(5)], prior)
    iwae, elbo, effective = script.bounds_of(log_w)
    assert (iwae > elbo).all() and ((effective >= 1) & (effective <= 16)).all()
    assert torch.equal(*script.bounds_of(log_w[:, :1])[:2])
    small = script.importance_weights(model, x[3:], 30.0, 16, [seeded("cpu", i) for i in (3, 4)], prior, chunk=5)
    assert torch.allclose(small, log_w[3:], rtol=1e-5, atol=1e-2)


def test_likelihood_is_of_held_out_images_with_a_scale_of_training_images(checkpoint, data, monkeypatch, tmp_path):
    seen = []

    def weights_of(model, batch, scale, samples, generators, *_):
        seen.append((batch, [g.initial_seed() for g in generators]))
        return batch.double().mean((1, 2, 3))[:, None] * torch.tensor([1.0, 1.1])

    fitted = []
    monkeypatch.setattr(script, "laplace_scale", lambda pairs: fitted.append(pairs) or 2.0)
    monkeypatch.setattr(script, "importance_weights", weights_of)
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--do_fake", "False", "--nll", "--nll_images", 10,
         "--nll_fit_images", 100, "--seed", 3)
    training, held_out = data_set(data)
    assert torch.equal(torch.cat([b for b, _ in seen]), held_out.images[::2])
    assert len(set(sum((s for _, s in seen), []))) == 10        # noise of its own for each image
    (levels, means), = fitted[0]
    model, _ = load_model(checkpoint, "cpu")
    eps = torch.randn(60, 4, generator=seeded("cpu", 3, "laplace"))
    assert torch.equal(levels, training.images.float())
    torch.testing.assert_close(means, (model.reconstruct(to_float(training.images), eps) + 1) * 127.5)
    written = json.loads((tmp_path / "results/run/test/nll.json").read_text())
    log_w = held_out.images[::2].double().mean((1, 2, 3))[:, None] * torch.tensor([1.0, 1.1])
    for name, bound in (("importance_weighted", log_w.logsumexp(1) - math.log(2)), ("negative_elbo", log_w.mean(1))):
        assert written["nll"][name]["nats_per_image"] == pytest.approx(-bound.mean().item())
        assert written["nll"][name]["standard_error"] == pytest.approx(bound.std().item() / 10 ** 0.5)
    assert 1 <= written["nll"]["effective_samples"] <= 2
    assert written["protocol"]["images"] == 10 and written["protocol"]["choice"] == "evenly spaced"
    assert written["protocol"]["scale_fitted_on"] == "60 training images"


# -- evaluation -------------------------------------------------------------------------------------------------------

def test_evaluation_equals_pr_calculate_on_the_exports(fake_hub, checkpoint, data, monkeypatch, tmp_path, capsys):
    fake_hub.inception()
    extractor = InceptionFeatures(torch.device("cpu"), 64)      # once: building it takes seconds
    for module in (script, PR_Calculate):
        monkeypatch.setattr(module, "InceptionFeatures", lambda device, dims, without: extractor)
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--num_samples", 16, "--num_real", 16, "--evaluate", "--eval_images", 16,
         "--fid_dims", 64, "--pca_dim", 8, "--k", 13, "--nearest_k", 14, "--tag", "ours", "--gen_batch_size", 16)
    assert "where quality is lost" in capsys.readouterr().out
    path = tmp_path / "results" / "run" / "test" / "evaluation_ours.json"
    written = json.loads(path.read_text())
    assert (tmp_path / "results" / "single_image_quality" / path.name).read_bytes() == path.read_bytes()
    flags = ["--fid_dims", "64", "--pca_dim", "8", "--batch_size", "16", "--device", "cpu", "--tag", "ours", "--k", "13",
             "--nearest_k", "14", "--out", str(tmp_path / "results/single_image_quality/pr_ours.json")]
    monkeypatch.setattr(sys, "argv", ["PR_Calculate.py", "--real_dir", str(data / "real_cifar"), "--fake_dir",
                                      str(data / "fake_cifar"), *flags])
    PR_Calculate.main()
    theirs = json.loads((tmp_path / "results/single_image_quality/pr_ours.json").read_text())
    assert theirs["metrics"].pop("kid_std") is written["metrics"]["kid_std"] is None            # one subset: all images
    for name, value in theirs["metrics"].items():
        assert written["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    # comparison.py reads both and finds nothing in which they must not differ.
    evaluations, warnings = comparison.read_evaluations(tmp_path / "results" / "single_image_quality")
    assert [e["tag"] for e in evaluations] == ["ours", "ours"] and not warnings
    assert not comparison.differing({e["file"]: e["protocol"] for e in evaluations}, comparison.evaluation_key_matters)
    assert 0 < theirs["metrics"]["density"] and 0 < theirs["metrics"]["precision"]
    # Where quality is lost: 16 of the 60 training images are the reference, 16 of the rest are decoded again.
    model, _ = load_model(checkpoint, "cpu")
    training = data_set(data)[0].images
    chosen = [i * 60 // 16 for i in range(16)]
    rest = [i for i in range(60) if i not in chosen]
    reference = mean_and_covariance(extractor(training[chosen]).numpy())
    mu, logvar = model.encode(to_float(training[[rest[i * 44 // 16] for i in range(16)]]))
    eps = torch.randn(16, 4, generator=seeded("cpu", 0, "evaluation"))
    with torch.no_grad():
        z0 = mu + torch.exp(0.5 * logvar) * eps
        for name, z in (("fid_reconstructed", model.flow(z0)[0]), ("fid_flow_bypassed", z0)):
            fid = frechet_distance(*reference, *mean_and_covariance(extractor(to_uint8(model.decode(z))).numpy()))
            assert written["metrics"][name] == pytest.approx(fid, rel=1e-4), name
    assert written["metrics"]["fid_reconstructed"] != pytest.approx(written["metrics"]["fid_flow_bypassed"], rel=1e-3)
    assert written["metrics"]["fid_prior_gap"] == pytest.approx(written["metrics"]["fid"] -
                                                                written["metrics"]["fid_reconstructed"])
    assert written["protocol"]["weights"] == "ema" and written["protocol"]["features"]["dims"] == 64
    assert written["protocol"]["training_data"] == data_set(data)[0].fingerprint
    assert written["protocol"]["data_is_training_data"] is True
    # Of other samples it is another evaluation, which replaces none unasked.
    flags = [*QUIET, "--do_real", "False", "--do_fake", "False", "--evaluate", "--eval_images", 16, "--fid_dims", 64,
             "--pca_dim", 8, "--tag", "ours", "--k", 13, "--nearest_k", 14]
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"evaluation_ours.json was measured with another seed \(0, not 1\), "
                                        r"fake.temperature \(1.0, not 0.5\); another --tag keeps both"):
        main(monkeypatch, tmp_path, checkpoint, *flags, "--temperature", 0.5, "--seed", 1)
    for name, value, said in (("eval_images", 20, r"real.images \(16, not 20\)"),
                              ("real_split", "test", r"real.split \(train, not test\)"), ("k", 2, r"k \(13, not 2\)"),
                              ("nearest_k", 3, r"nearest_k \(14, not 3\)"),
                              ("pca_dim", 4, r"pca \(8, not 4\)"), ("pca_dim", 0, r"pca \(8, not 0\)"),
                              ("fid_dims", 192, r"features.dims \(64, not 192\)"),
                              ("weights", "raw", r"weights \(ema, not raw\)")):
        with pytest.raises(UserError, match=f"evaluation_ours.json was measured with another {said}"):
            main(monkeypatch, tmp_path, checkpoint, *flags, f"--{name}", value)
    with monkeypatch.context() as patch:                        # a stand-in for Inception
        patch.setattr(utils.InceptionFeatures, "sha256", property(lambda _: "0" * 64, lambda *_: None), raising=False)
        with pytest.raises(UserError, match="evaluation_ours.json was measured with another features.sha256"):
            main(monkeypatch, tmp_path, checkpoint, *flags)
    quality = tmp_path / "results" / "single_image_quality" / path.name
    with pytest.raises(UserError, match="single_image_quality/evaluation_ours.json was measured with another seed"):
        main(monkeypatch, tmp_path, checkpoint, *flags, "--seed", 1, "--eval_out", tmp_path / "e.json")
    assert quality.read_bytes() == before
    for odd in ({"protocol": None}, {"protocol": [1]}, {"protocol": {"fake": None}}):
        write_json(tmp_path / "e.json", odd)
        with pytest.raises(UserError, match="e.json was measured with another checkpoint_sha256"):
            main(monkeypatch, tmp_path, checkpoint, *flags, "--eval_out", tmp_path / "e.json")
    main(monkeypatch, tmp_path, checkpoint, *flags)
    assert json.loads(path.read_text())["metrics"]["fid"] == pytest.approx(written["metrics"]["fid"], rel=1e-4)
    main(monkeypatch, tmp_path, checkpoint, *flags, "--temperature", 0.5, "--overwrite")
    assert json.loads(path.read_text())["protocol"]["fake"]["temperature"] == 0.5 and path.read_bytes() != before


def test_a_renamed_run_goes_by_its_new_name(checkpoint, monkeypatch, tmp_path, capsys):
    """Another run may have the old one, and results there."""
    renamed = checkpoint.parent.rename(checkpoint.parents[1] / "renamed") / checkpoint.name
    main(monkeypatch, tmp_path, renamed, *QUIET, "--do_real", "False", "--do_fake", "False", "--diagnose")
    written = json.loads((renamed.parent / "test/diagnostics.json").read_text())
    assert written["tag"] == "renamed" and not (tmp_path / "results/run").exists()
    capsys.readouterr()
    place = (tmp_path / "scratch").resolve()                    # reached through a link
    link = tmp_path / "results/linked"
    renamed.parent.rename(place)
    link.symlink_to(place)
    main(monkeypatch, tmp_path, link / renamed.name, *QUIET, "--do_real", "False", "--do_fake", "False", "--diagnose", "--seed",
         1, "--overwrite")
    assert json.loads((place / "test/diagnostics.json").read_text())["tag"] == "linked"
    renamed = place / renamed.name
    capsys.readouterr()
    moved = tmp_path / "elsewhere.pth"                          # in no folder of a run: by the name that it was trained under
    renamed.rename(moved)
    main(monkeypatch, tmp_path, moved, *QUIET, "--do_real", "False", "--num_samples", 5)
    assert "--tag run" in capsys.readouterr().out and (tmp_path / "results/run/test/test_log.txt").is_file()


def test_numbers_measured_otherwise_are_not_replaced(checkpoint, monkeypatch, tmp_path):
    flags = [*QUIET, "--do_real", "False", "--do_fake", "False", "--nll", "--nll_samples", 3, "--nll_images", 4, "--diagnose",
             "--diagnose_images", 12]
    folder = tmp_path / "results/run/test"
    for split, seed in (("train", 5), ("test", 6)):
        write_images(tmp_path / "others" / split, {"train": 60, "test": 20}[split], size=8, seed=seed)
    for _ in range(2):                                          # the same again is no loss
        main(monkeypatch, tmp_path, checkpoint, *flags)
    before = state(folder)
    for more, name, said in ((["--nll_samples", 2], "nll", r"importance_samples \(3, not 2\)"),
                             (["--nll_images", 5], "nll", r"images \(4, not 5\)"), (["--seed", 1], "nll", r"seed \(0, not 1\)"),
                             (["--weights", "raw"], "nll", r"weights \(ema, not raw\)"),
                             (["--nll_fit_images", 7], "nll", r"scale_fitted_on \(60 training images, not 7 training images\)"),
                             (["--data_dir", tmp_path / "others", "--allow_other_data"], "nll", r"data \(.*, not .*\)"),
                             (["--diagnose_images", 10], "diagnostics", r"images \(12, not 10\)")):
        with pytest.raises(UserError, match=f"test/{name}.json was measured with another {said}; another --tag keeps both"):
            main(monkeypatch, tmp_path, checkpoint, *flags, *more)
    assert {p: s for p, s in state(folder).items() if p.name != "test_log.txt"} == {
        p: s for p, s in before.items() if p.name != "test_log.txt"}
    main(monkeypatch, tmp_path, checkpoint, *flags, "--weights", "raw", "--tag", "raw")
    assert json.loads((folder / "nll_raw.json").read_text())["protocol"]["weights"] == "raw"
    assert json.loads((folder / "diagnostics_raw.json").read_text())["tag"] == "raw"
    assert (folder / "diagnostics_raw.png").is_file()
    main(monkeypatch, tmp_path, checkpoint, *flags, "--nll_samples", 2, "--overwrite")
    assert json.loads((folder / "nll.json").read_text())["protocol"]["importance_samples"] == 2


class Recorder:
    """A small network that keeps what it is shown."""
    dims, name, sha256 = 2, "recorder", "0" * 64

    def __init__(self):
        self.shown = []

    def __call__(self, images):
        self.shown.append(images)
        return torch.stack([images[:, :, i::2].float().mean((1, 2, 3)) for i in (0, 1)], 1)


def test_evaluation_is_of_the_first_exported_images(checkpoint, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--num_samples", 45, "--gen_batch_size", 10)
    exported, _ = read(data / "fake_cifar")
    model, _ = load_model(checkpoint, "cpu")
    for n in (16, 45, 50):
        args = script.build_parser().parse_args(["--resume", "x", "--num_samples", "45", "--eval_images", str(n),
                                                 "--gen_batch_size", "10", "--pca_dim", "0"])
        network = Recorder()
        features = script.evaluation_features(args, model, dict(zip(("train", "test"), data_set(data))), network)
        metrics, protocol = script.evaluate(args, model, data_set(data)[0], network, features)
        real, fake = torch.cat(network.shown)[:n], torch.cat(network.shown)[n:2 * n]
        assert torch.equal(real, data_set(data)[0].images[script.spread(n, 60)])
        assert torch.equal(fake[:45], exported[:n]) and len(fake) == n
        assert protocol["fake"]["images"] == n and f"the first {n} samples" in protocol["fake"]["choice"]
        statistics = [mean_and_covariance(network(x).numpy()) for x in (real, fake)]
        assert metrics["fid"] == pytest.approx(frechet_distance(*statistics[0], *statistics[1]))
        if n > 30:                                              # of 60, and 12 held out: no other n images are left
            assert metrics["fid_prior_gap"] is None and protocol["reconstructed"]["choice"] == script.PAIRED
            report = script.Report(tmp_path, io.StringIO(), "t", "", "", {})
            script.report_evaluation(args, report, model, data_set(data)[0], network, features, [tmp_path / "e.json"] * 2)
            assert "of the reference images themselves" in report.log.getvalue()
        else:
            assert metrics["fid_prior_gap"] == metrics["fid"] - metrics["fid_reconstructed"]


@pytest.mark.parametrize("real_split, eval_images, reconstructed", [("train", 16, "train"), ("test", 4, "test"),
                                                                    ("test", 0, "train"), ("train", 0, "paired")])
def test_no_reconstruction_is_compared_with_its_own_original(real_split, eval_images, reconstructed):
    args = argparse.Namespace(real_split=real_split, eval_images=eval_images)
    reference, split, sources, how = script.choose_images(args, {"train": range(60), "test": range(10)})
    assert len(reference) == len(sources) == (eval_images or {"train": 60, "test": 10}[real_split])
    if reconstructed == "paired":
        assert how == script.PAIRED and split == "train" and torch.equal(reference, sources)
    else:
        assert how != script.PAIRED and split == reconstructed
        assert len(sources.unique()) == len(sources) and sources.max() < {"train": 60, "test": 10}[split]
        assert split != real_split or not set(reference.tolist()) & set(sources.tolist())


def test_equal_images_have_equal_features():
    class Noisy:                                                # a network whose result depends on the place in the batch
        dims, calls = 2, 0

        def __call__(self, images):
            self.calls += len(images)
            return torch.stack([images.float().mean((1, 2, 3)), torch.arange(len(images)).float()], 1)

    x = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[4] = x[1]
    network = Noisy()
    features = script.distinct_features(network, x.split(3), 6, {}, "")
    assert network.calls == 5 and np.array_equal(features[4], features[1])
    assert features[:, 0] == pytest.approx(x.float().mean((1, 2, 3)).numpy())


@pytest.mark.parametrize("n, size, processes", [(43, 10, 2), (40, 10, 3), (5, 10, 2), (7, 1, 3), (0, 4, 2)])
def test_processes_together_have_the_batches_of_one(n, size, processes, monkeypatch):
    one = script.my_batches(n, size)
    assert [i for b in one for i in range(b.start, b.stop)] == list(range(n)) and all(b.start < b.stop for b in one)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(script, "my_share", lambda m, r=rank: slice(m * r // processes, m * (r + 1) // processes))
        shares.append(script.my_batches(n, size))
    assert sum(shares, []) == one and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_equal_images_have_equal_features_in_other_processes_too(monkeypatch):
    """The other process met two of this one's images and one of its own, and its network rounds differently."""
    x = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    key = [script.hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in x.numpy()]
    other = [key[1], key[3], key[0]], {k: np.full(2, 10.0 * i, np.float32) for i, k in ((1, key[1]), (3, key[3]), (0, key[0]))}

    def network(images):
        return images.float().mean((1, 2, 3))[:, None].expand(-1, 2)

    for order, expected in (((0, 1), [0, 1, 2, 1, 30, 0]), ((1, 0), [10, 30, 0, 0, 10, 2])):
        def both(mine, order=order):
            return [(mine, other)[i] for i in order]
        monkeypatch.setattr(script, "gather", both)
        seen = {}
        assert script.distinct_features(network, [x[:3]], 3, seen, "")[:, 0].tolist() == expected
        assert {seen[k][0] for k in key} == set(expected)


def evaluated(checkpoint, data, monkeypatch, tmp_path, *flags):
    """The network, what was written, of --evaluate with a Recorder as network."""
    network = Recorder()
    monkeypatch.setattr(script, "InceptionFeatures", lambda *_, **__: network)
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_real", "False", "--do_fake", "False", "--evaluate", "--pca_dim", 0,
         *flags)
    return network, json.loads((tmp_path / "results/run/test/evaluation_run.json").read_text())


def test_evaluation_obeys_seed_temperature_and_split(checkpoint, data, monkeypatch, tmp_path):
    network, written = evaluated(checkpoint, data, monkeypatch, tmp_path, "--seed", 3, "--temperature", 0.5, "--real_split",
                                 "test", "--eval_images", 10, "--num_samples", 10)
    model, _ = load_model(checkpoint, "cpu")
    held_out = data_set(data)[1].images
    real, fake, recon = (torch.cat(network.shown)[10 * i:10 * i + 10] for i in range(3))
    assert torch.equal(real, held_out[::2])
    assert torch.equal(fake, next(generate_images(model, 10, 100, 3, 0.5)))
    eps = torch.randn(10, 4, generator=seeded("cpu", 3, "evaluation"))
    assert torch.equal(recon, to_uint8(model.reconstruct(to_float(held_out[1::2]), eps)))
    protocol = written["protocol"]
    assert (protocol["seed"], protocol["fake"]["temperature"], protocol["epoch"], protocol["training_seed"]) == (3, 0.5, 3, 0)
    assert (protocol["real"]["split"], protocol["real"]["choice"]) == ("test", "10 evenly spaced")


def test_kid_of_an_evaluation_obeys_the_seed(checkpoint, data, monkeypatch, tmp_path):
    seen = []
    kernel = script.kernel_distance
    monkeypatch.setattr(script, "kernel_distance", lambda *x, seed=0, **k: seen.append(seed) or kernel(*x, seed=seed, **k))
    evaluated(checkpoint, data, monkeypatch, tmp_path, "--seed", 3)
    assert seen == [3]


# -- what a user can get wrong ----------------------------------------------------------------------------------------

def bad(kind, checkpoint, data, tmp_path):
    """Checkpoint, flags, and the words that the message must contain."""
    if kind == "best beside last":
        return checkpoint.with_name("best_fid.pth"), [], ["best_fid.pth: no such checkpoint", "last.pth"]
    if kind == "no folder":
        return tmp_path / "nowhere" / "x.pth", [], ["x.pth: no such checkpoint"]
    if kind == "damaged checkpoint":
        path = tmp_path / "bad.pth"
        path.write_bytes(checkpoint.read_bytes()[:1000])
        return path, [], ["bad.pth: truncated or not a checkpoint"]
    if kind == "other architecture":
        path, content = tmp_path / "bad.pth", torch.load(checkpoint, weights_only=True)
        content["model_args"]["latent_dim"] = 8
        torch.save(content, path)
        return path, [], ["bad.pth: its weights and model_args do not fit"]
    if kind in ("args", "diverged"):
        path, content = tmp_path / "bad.pth", torch.load(checkpoint, weights_only=True)
        if kind == "args":
            content["args"] = 5
        else:
            content["ema"]["decoder.stem.0.weight"][0, 0] = math.nan
        torch.save(content, path)
        return path, [], ["bad.pth:", "args of another kind" if kind == "args" else "not finite"]
    if kind == "escaping name":
        path, content = tmp_path / "bad.pth", torch.load(checkpoint, weights_only=True)
        content["args"]["exp_name"] = "../../elsewhere"
        torch.save(content, path)
        return path, [], ["exp_name", "must be a plain name"]
    if kind == "missing data":
        return checkpoint, ["--data_dir", tmp_path / "nowhere"], ["nowhere: no such folder"]
    if kind == "other data":
        other = tmp_path / "other"
        write_images(other / "train", 4, size=8)
        write_images(other / "test", 2, size=8)
        return checkpoint, ["--data_dir", other], ["not the images", "--allow_other_data"]
    if kind == "data dir is a file":
        return checkpoint, ["--data_dir", checkpoint, "--do_real", "False", *QUIET], ["--data_dir", "cannot write there"]
    if kind == "save dir is a file":
        return checkpoint, ["--save_dir", checkpoint], ["--save_dir", "cannot write there"]
    if kind == "no inception":
        return checkpoint, ["--evaluate"], ["pt_inception-2015-12-05-6726825d.pth", "leave out --evaluate"]
    if kind == "long name":
        return checkpoint, ["--fake_dirname", "x" * 300], ["the name is too long"]
    if kind == "no gpu":
        return checkpoint, ["--device", "cuda"], ["--device cuda: no CUDA GPU"]
    flags = {"no samples": ["--num_samples", "0"], "batch": ["--gen_batch_size", "-1"], "cold": ["--temperature", "nan"],
             "nll samples": ["--nll_samples", "0"], "path as name": ["--fake_dirname", "a/b"],
             "dots": ["--fake_dirname", ".."], "no number": ["--num_samples", "many"],
             "unknown flag": ["--fake_dri", "x"], "same names": ["--real_dirname", "x", "--fake_dirname", "x"]}[kind]
    return checkpoint, flags, [flags[0]]


@pytest.mark.parametrize("kind", ["best beside last", "no folder", "damaged checkpoint", "other architecture", "escaping name",
                                  "missing data", "other data", "data dir is a file", "save dir is a file", "no inception",
                                  "no gpu", "no samples", "batch", "cold", "nll samples", "path as name", "dots", "same names",
                                  "args", "diverged", "long name", "no number", "unknown flag"])
def test_user_errors_are_one_line_and_leave_nothing(kind, checkpoint, data, tmp_path, monkeypatch, capsys):
    if kind == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    path, flags, words = bad(kind, checkpoint, data, tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")      # whatever would be downloaded cannot be
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    before = state(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.run(lambda: main(monkeypatch, tmp_path, path, "--num_samples", 5, *flags))
    err = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Downloading")]
    assert stop.value.code == 2
    assert err[-1].startswith("error: ") and all(w in err[-1] for w in words), err
    assert state(tmp_path) == before and not (tmp_path / "results" / "run" / "test").exists()
    assert not list(tmp_path.rglob("*_cifar"))


def test_other_data_are_accepted_aloud(checkpoint, data, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    write_images(other / "train", 6, size=8)
    write_images(other / "test", 2, size=8)
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--num_samples", 5, "--data_dir", other, "--allow_other_data")
    assert "warning:" in capsys.readouterr().err and len(read(other / "real_cifar")[0]) == 6
    main(monkeypatch, tmp_path, checkpoint, *QUIET, "--do_fake", "False", "--do_real", "False", "--data_dir", other,
         "--allow_other_data", "--diagnose")
    folder = tmp_path / "results" / "run" / "test"
    assert "warning: --data_dir" in (folder / "test_log.txt").read_text()
    protocol = json.loads((folder / "diagnostics.json").read_text())["protocol"]
    assert protocol["data_is_training_data"] is False and protocol["training_data"] == data_set(data)[0].fingerprint


def test_a_single_held_out_image_has_a_map(monkeypatch, tmp_path, data, checkpoint, recwarn):
    model, _ = load_model(checkpoint, "cpu")
    posterior = script.collect_posterior(model, data_set(data)[1], torch.tensor([0]), 1, 0)
    script.save_latent_map(tmp_path / "map.png", model, posterior, 10, "pca", 0)
    assert (tmp_path / "map.png").is_file() and not [w for w in recwarn if "divide" in str(w.message)]
