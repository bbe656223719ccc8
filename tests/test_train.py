"""train.py through its real command line, on data made here."""
import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

import train
import utils
from models.vamp_flow import BiCrossAttnFlow, CrossFlowVampVAE, perturb_
from utils import (
    MemoryImages,
    UserError,
    generate_images,
    hub_file,
    load_model,
    save_checkpoint,
    save_png,
    sha256_file,
    to_float,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--hidden_dims", "8", "12", "--latent_dim", "4", "--num_components", "5", "--flow_length", "2", "--flow_seq_len", "1",
        "--flow_embed_dim", "8", "--flow_heads", "2", "--flow_layers", "1", "--batch_size", "8", "--lpips_net", "none",
        "--fid_every", "0", "--save_every_s", "0", "--device", "cpu"]
# A flow of a size that the GPU's kernels take; all that makes a long run fast there.
WITH_KERNELS = ("--latent_dim", "16", "--flow_seq_len", "2", "--flow_embed_dim", "32", "--flow_heads", "2")
ON_A_GPU = ("--device", "cuda", *WITH_KERNELS, "--compile", "--cuda_graph", "--fused_flow")


def command(*flags, cwd, env=None):
    """Run train.py as a user would; returns the finished process."""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def main(monkeypatch, tmp_path, *flags):
    """train.main() in this process (no second import of torch); returns nothing, raises what main raises."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        train.main()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])


@pytest.fixture(scope="session")
def folder_of_images(tmp_path_factory):
    """40 training and 8 test images of 8x8 in class folders."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 8)):
        for i in range(n):
            path = root / split / f"class{i % 2}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            base = np.linspace(0, 200, 8)[None, :, None] * (i % 2) + rng.integers(0, 55, (8, 8, 3))
            Image.fromarray(base.astype(np.uint8)).save(path)
    return root


@pytest.fixture
def data(folder_of_images):
    return ["--dataset", "folder", "--data_dir", str(folder_of_images), "--img_size", "8", *TINY]


def history(folder):
    with open(folder / "history.csv", newline="") as f:
        return [{k: v for k, v in row.items() if k != "img_per_s"} for row in csv.DictReader(f)]


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    ours, theirs = weights(a / "last.pth"), weights(b / "last.pth")
    for key in ("model", "ema", "optimizer", "scheduler", "epoch", "step", "best_fid"):
        assert same(ours[key], theirs[key]), key
    assert history(a) == history(b)


# -- a whole run ------------------------------------------------------------------------------------------------------

def test_run_leaves_everything_behind(data, tmp_path):
    done = command(*data, "--exp_name", "a", "--epochs", 2, "--warmup_epochs", 1, "--sample_every", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "results" / "a"
    assert {p.name for p in run.iterdir()} >= {"args.json", "train_log.txt", "history.csv", "curves.png", "last.pth", "samples"}
    assert {p.name for p in (run / "samples").iterdir()} == {f"{n}_000{e}.png" for n in ("samples", "recon", "pseudo")
                                                             for e in (1, 2)}
    log = (run / "train_log.txt").read_text()
    assert all(key in log for key in ("LPIPS", "KL_Raw", "FID"))
    rows = history(run)
    assert [r["epoch"] for r in rows] == ["1", "2"] and set(train.COLUMNS) - set(rows[0]) == {"img_per_s"}
    row = {k: float(v) for k, v in rows[1].items() if v}
    assert row["kl_raw"] == pytest.approx(row["log_q0"] - row["log_det"] - row["log_p"], abs=1e-3)
    assert row["val_kl_raw"] == pytest.approx(row["val_log_q0"] - row["val_log_det"] - row["val_log_p"], abs=1e-3)
    assert row["val_loss"] == pytest.approx(row["val_recon"] + 0.2 * max(row["val_kl_raw"] - 0.5 * 4, 0), rel=1e-6)
    assert row["beta"] == 0.2 and row["lr"] == 0
    args = json.loads((run / "args.json").read_text())
    assert args["epochs"] == 2 and args["versions"]["torch"] == torch.__version__
    for word in ("40 training images", "8 for validation", "parameters", "cpu", "float32", "5 steps", "self-check"):
        assert word in done.stdout, word
    checkpoint = weights(run / "last.pth")
    assert {"model", "ema", "optimizer", "scheduler", "epoch", "step", "best_fid", "history", "model_args", "args"} <= set(
        checkpoint)
    assert not any("lpips" in k.lower() for k in checkpoint["model"])
    model, _ = load_model(run / "last.pth", "cpu")
    assert isinstance(model, CrossFlowVampVAE) and not model.training
    assert same(dict(model.state_dict()), checkpoint["ema"]) and not same(checkpoint["ema"], checkpoint["model"])


def test_tensorboard_gets_the_scalars_and_pictures(data, monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    main(monkeypatch, tmp_path, *data, "--epochs", 2)
    events = EventAccumulator(str(tmp_path / "results/CrossVampVAE/tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "recon", "pseudo"}
    row = history(tmp_path / "results/CrossVampVAE")[1]
    assert {"train_loss", "val_loss", "kl_raw", "active_units", "lr"} <= set(events.Tags()["scalars"])
    last = events.Scalars("val_loss")[-1]
    assert last.step == 2 and last.value == pytest.approx(float(row["val_loss"]), rel=1e-6)


def test_overfits_eight_images(monkeypatch, tmp_path):
    few = tmp_path / "few"
    for split, n in (("train", 8), ("test", 1)):
        (few / split).mkdir(parents=True)
        for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)):
            Image.fromarray(image).save(few / split / f"{i}.png")
    main(monkeypatch, tmp_path, "--dataset", "folder", "--data_dir", few, "--img_size", 8, *TINY, "--hidden_dims", 32, 32,
         "--latent_dim", 16, "--epochs", 120, "--lr", 3e-3, "--beta_max", 0.001, "--warmup_epochs", 0, "--exp_name", "o",
         "--sample_every", 0, "--save_every_s", 100, "--ema_decay", 0, "--no-tensorboard", "--no-flip", "--check_every", 0)
    rows = history(tmp_path / "results" / "o")
    assert float(rows[-1]["recon"]) < 0.1 * float(rows[0]["recon"])


@pytest.mark.parametrize("variant", [
    ["--prior", "mog"], ["--prior", "standard", "--flow_length", "0"], ["--flow_prior", "pushed"],
    ["--decode_from", "z0", "--mixture_weights", "learned", "--balance", "1"],
    ["--posterior_std", "0.1", "--prior", "standard"], ["--prior", "mog", "--mixture_covariance", "full"],
    ["--flow_context", "encoder"], ["--pseudo_init", "noise", "--num_components", "1"], ["--num_components", "60"],
    ["--ema_decay", "0", "--recon_loss", "mse", "--in_channels", "1", "--no-flip"], ["--cache_gb", "0", "--num_workers", "1"],
    ["--batch_size", "1", "--stop_epoch", "1"], ["--latent_dim", "2"], ["--amp", "bf16"], ["--batch_size", "1000"],
])
def test_variants_train(variant, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, *data, "--epochs", 1, "--warmup_epochs", 0, "--no-tensorboard", "--sample_every", 0, *variant)
    rows = history(tmp_path / "results" / "CrossVampVAE")
    assert len(rows) == 1 and all(np.isfinite(float(rows[0][k])) for k in ("train_loss", "val_loss", "kl_raw"))


def test_preset_is_its_flags_and_no_more(data, monkeypatch, tmp_path):
    for name, flags in train.PRESETS.items():
        plain, preset = (vars(train.parse_args(argv)[0]) for argv in ([], ["--preset", name]))
        assert {k: v for k, v in preset.items() if v != plain[k]} == {**flags, "preset": name}
        assert flags.keys() & train.MAY_DIFFER == set()
    assert train.parse_args(["--preset", "best", "--prior", "vamp"])[0].prior == "vamp"
    assert vars(train.parse_args(["--demo", "--preset", "best"])[0]).items() >= {**train.PRESETS["best"], **train.DEMO}.items()
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--no-tensorboard", "--preset", "best")
    main(monkeypatch, tmp_path, "--resume", "auto")
    found = weights(tmp_path / "results/CrossVampVAE/last.pth")
    assert found["epoch"] == 2
    assert {k for k, v in train.PRESETS["best"].items() if found["args"][k] != v} == {"hidden_dims"}         # which was given
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--no-tensorboard", "--exp_name", "plain")
    with pytest.raises(UserError, match="was trained with other values of --preset"):
        main(monkeypatch, tmp_path, "--exp_name", "plain", "--resume", "auto", "--preset", "best")


def test_preset_gives_way_to_flags_that_leave_a_part_of_it_without_a_meaning():
    for preset, flags, name, value in (("best", ["--flow_length", "0"], "decode_from", "zK"),
                                       ("best", ["--prior", "standard"], "mixture_weights", "uniform"),
                                       ("gmm", ["--prior", "vamp"], "mixture_covariance", "diag")):
        flags += ["--fit_prior", "x"] * (preset == "gmm")
        args, given = train.parse_args(["--preset", preset, *flags])
        train.check_flags(args, given)
        assert getattr(args, name) == value
        args, given = train.parse_args(["--preset", preset, *flags, f"--{name}", train.PRESETS[preset][name]])
        with pytest.raises(UserError, match=f"--{name} .*with {flags[0]}"):
            train.check_flags(args, given)


def test_demo_does_not_override_the_preset_of_a_second_stage(monkeypatch, tmp_path):
    """Nor where --resume auto finds nothing to go on with."""
    main(monkeypatch, tmp_path, "--demo", "--epochs", 1, "--flow_length", 0, "--sample_every", 0, "--exp_name", "first")
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(UserError, match="--preset gmm with --demo: leave --demo out"):
            main(monkeypatch, tmp_path, "--demo", "--fit_prior", tmp_path / "results/first/last.pth", "--preset", "gmm",
                 "--exp_name", "second", *more)


@pytest.mark.parametrize("flags, tokens", [
    ([], 8), (["--hidden_dims", "64", "128", "256"], 8), (["--latent_layout", "spatial"], 4),
    (["--latent_layout", "spatial", "--hidden_dims", "64", "128", "256"], 16),
    (["--latent_layout", "spatial", "--img_size", "64"], 16), (["--latent_layout", "spatial", "--flow_seq_len", "8"], 8),
    (["--latent_layout", "spatial", "--demo"], 2),
    (["--latent_layout", "spatial", "--preset", "gmm_flow", "--img_size", "16"], 16)])
def test_tokens_of_a_spatial_latent_are_its_positions(flags, tokens):
    assert train.parse_args(flags)[0].flow_seq_len == tokens


def test_the_plan_counts_every_parameter_where_it_belongs(data, monkeypatch, tmp_path, capsys):
    main(monkeypatch, tmp_path, *data, "--prior", "standard", "--flow_context", "encoder", "--epochs", 1, "--no-tensorboard")
    parts = re.search("^model .*", capsys.readouterr().out, re.M)[0]
    assert "flow" in parts and "prior" not in parts


def test_digits_need_nothing(monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, "--demo", "--epochs", 1, *TINY, "--batch_size", 400, "--no-tensorboard")
    assert len(history(tmp_path / "results" / "demo")) == 1
    assert not (tmp_path / "data").exists()


# -- FID and LPIPS through the libraries' own loading code, on seeded random weights ---------------------------------------

def test_training_fid_equals_pytorch_fid_on_exported_images(monkeypatch, tmp_path, fake_hub):
    fake_hub.inception()
    real, fake = tmp_path / "data" / "train", tmp_path / "fake"
    write_images(real, 90, size=8, seed=1)
    write_images(tmp_path / "data" / "test", 4, size=8, seed=2)
    flags = ["--dataset", "folder", "--data_dir", tmp_path / "data", "--img_size", 8, *TINY, "--fid_every", 1, "--fid_dims", 64,
             "--fid_samples", 80, "--epochs", 2, "--lr", 3e-3, "--sample_every", 0, "--no-tensorboard", "--batch_size", 30]
    main(monkeypatch, tmp_path, *flags)
    run = tmp_path / "results" / "CrossVampVAE"
    fids = [float(row["fid"]) for row in history(run)]
    best, last = weights(run / "best_fid.pth"), weights(run / "last.pth")
    assert best["best_fid"] == last["best_fid"] == min(fids) and best["optimizer"] is None
    assert best["epoch"] == 1 + fids.index(min(fids)) and best["history"][-1]["fid"] == min(fids)
    model, _ = load_model(run / "best_fid.pth", "cpu")
    fake.mkdir()
    images = torch.cat(list(generate_images(model, 80, batch_size=7, seed=0, purpose="fid")))
    for i, image in enumerate(images):
        save_png(fake / f"{i:05d}.png", image)
    done = subprocess.run([sys.executable, "-m", "pytorch_fid", real, fake, "--dims", "64", "--device", "cpu",
                           "--num-workers", "0"], capture_output=True, text=True, env=fake_hub.env)
    assert done.returncode == 0, done.stderr
    assert min(fids) == pytest.approx(float(done.stdout.split()[-1]), rel=1e-3)
    # The statistics of the training set are cached: a second run reads them.
    cached = list((tmp_path / "results" / "feature_cache").iterdir())
    assert len(cached) == 1
    before = cached[0].stat().st_mtime_ns
    main(monkeypatch, tmp_path, *flags, "--exp_name", "again")
    assert cached[0].stat().st_mtime_ns == before and [float(r["fid"]) for r in history(tmp_path / "results/again")] == fids


def test_fid_is_measured_every_so_many_epochs_and_at_the_end(data, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "InceptionFeatures", lambda *_: types.SimpleNamespace(key="", name="", sha256="", dims=2048))
    monkeypatch.setattr(train, "evaluate_fid", lambda *_: 1.0)
    main(monkeypatch, tmp_path, *data, "--epochs", 5, "--fid_every", 2, "--sample_every", 0, "--no-tensorboard")
    assert [bool(row["fid"]) for row in history(tmp_path / "results/CrossVampVAE")] == [False, True, False, True, True]


def test_a_run_says_at_its_end_that_components_are_dead(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(CrossFlowVampVAE, "init_prior", lambda model, _: model.prior_mu[1:].add_(100))
    said = {}
    for epochs, warmup in ((1, 0), (2, 2), (3, 2)):
        main(monkeypatch, tmp_path, *data, "--prior", "mog", "--epochs", epochs, "--warmup_epochs", warmup, "--sample_every", 0,
             "--no-tensorboard", "--exp_name", epochs)
        lines = capsys.readouterr().out.splitlines()
        said[epochs] = [i - len(lines) for i, line in enumerate(lines) if line.startswith("note: 4 of 5 components are dead")]
    assert said == {1: [-2], 2: [-2], 3: [-4, -2]}        # after the warm-up's last epoch, and before "done"


@pytest.mark.parametrize("bf16", [True, False], ids=["CPU with bf16", "CPU without"])
def test_lpips_is_part_of_the_loss_and_not_of_the_checkpoint(bf16, data, monkeypatch, tmp_path, fake_hub, capsys):
    import lpips
    fake_hub.squeezenet()
    monkeypatch.setattr(train, "cpu_computes_bf16", lambda: bf16)
    flags = [*data, "--img_size", 32, "--lpips_net", "squeeze", "--epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags, "--device", "cpu")
    assert ("this CPU computes in bf16 too" in capsys.readouterr().out) == bf16
    main(monkeypatch, tmp_path, *flags, "--exp_name", "first", "--prior", "standard", "--flow_length", 0, "--device", "cpu")
    capsys.readouterr()
    main(monkeypatch, tmp_path, "--fit_prior", tmp_path / "results/first/last.pth", "--prior", "mog", "--flow_length", 0,
         "--epochs", 1, "--sample_every", 0, "--no-tensorboard", "--exp_name", "second", "--device", "cpu")
    assert "this CPU computes in bf16 too" not in capsys.readouterr().out            # LPIPS is not in its steps
    row = {k: float(v) for k, v in history(tmp_path / "results/CrossVampVAE")[0].items() if v}
    assert row["lpips"] > 0
    assert row["train_loss"] == pytest.approx(row["recon"] + 100 * row["lpips"] + 0, rel=0.05)
    assert row["val_loss"] == pytest.approx(row["val_recon"] + 100 * row["val_lpips"], rel=1e-6)
    # Our grey images are shown to the network as RGB; the value is the library's.
    ours = train.build_lpips("squeeze", True, torch.device("cpu"), (1, 32, 32))
    a, b = torch.rand(2, 3, 1, 32, 32) * 2 - 1
    theirs = lpips.LPIPS(net="squeeze", verbose=False)(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)).flatten()
    assert torch.allclose(ours(a, b), theirs) and theirs.abs().max() > 0
    uniform = train.build_lpips("squeeze", False, torch.device("cpu"), (1, 32, 32))
    assert not torch.allclose(uniform(a, b), theirs)
    with pytest.raises(UserError, match="--lpips_net squeeze needs larger images"):
        train.build_lpips("squeeze", True, torch.device("cpu"), (1, 4, 4))


def test_stand_in_for_lpips_is_named_and_may_not_change_on_the_way(monkeypatch, tmp_path, fake_hub, capsys):
    fake_hub.squeezenet()
    content = hub_file("squeezenet1_1-b8a52dc0.pth").read_bytes()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))                     # other tests keep theirs
    path = hub_file("squeezenet1_1-b8a52dc0.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    flags = ["--dataset", "digits", "--img_size", 32, *TINY, "--lpips_net", "squeeze", "--epochs", 2, "--stop_epoch", 1,
             "--batch_size", 800, "--sample_every", 0, "--no-tensorboard", "--val_images", 20]
    main(monkeypatch, tmp_path, *flags)
    said = capsys.readouterr()
    assert "squeezenet1_1-b8a52dc0.pth is a stand-in, not the published file" in said.err
    assert "LPIPS-squeeze (squeezenet1_1-b8a52dc0.pth, a stand-in of that name)" in said.out
    folder, digest = tmp_path / "results/CrossVampVAE", sha256_file(path)
    assert json.loads((folder / "args.json").read_text())["lpips_sha256"] == digest == weights(folder / "last.pth")["lpips_id"]
    torch.save({k: v + 0.01 for k, v in torch.load(path).items()}, path)
    with pytest.raises(UserError, match=f"--lpips_net squeeze: .*last.pth was trained with other weights .*{digest[:8]}"):
        main(monkeypatch, tmp_path, "--resume", "auto")


def test_weights_of_fid_are_named_and_may_not_change_on_the_way(data, monkeypatch, tmp_path, fake_hub, capsys):
    fake_hub.inception()
    content = hub_file(utils.INCEPTION_FILE).read_bytes()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = hub_file(utils.INCEPTION_FILE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    flags = [*data, "--epochs", 5, "--sample_every", 0, "--no-tensorboard", "--fid_samples", 8, "--fid_dims", 64]
    main(monkeypatch, tmp_path, *flags, "--stop_epoch", 1, "--fid_every", 0)
    folder = tmp_path / "results/CrossVampVAE"
    assert weights(folder / "last.pth")["fid_id"] is None
    main(monkeypatch, tmp_path, "--resume", "auto", "--stop_epoch", 2, "--fid_every", 1)                 # the first FID
    said = capsys.readouterr().out
    assert f"({utils.INCEPTION_FILE}, a stand-in of that name), 64 dimensions" in said and "; no published FID" in said
    digest = sha256_file(path)
    assert json.loads((folder / "args.json").read_text())["fid_sha256"] == digest == weights(folder / "last.pth")["fid_id"]
    main(monkeypatch, tmp_path, "--resume", "auto", "--stop_epoch", 3, "--fid_every", 0)                 # is not forgotten
    assert json.loads((folder / "args.json").read_text())["fid_sha256"] == digest == weights(folder / "last.pth")["fid_id"]
    torch.save({k: v + 0.01 for k, v in torch.load(path).items()}, path)
    with pytest.raises(UserError, match=f"--fid_every 1: the FIDs in .*last.pth are of other weights .*{digest[:8]}"):
        main(monkeypatch, tmp_path, "--resume", "auto", "--fid_every", 1)
    main(monkeypatch, tmp_path, "--resume", "auto", "--stop_epoch", 4, "--fid_every", 0)
    assert weights(folder / "last.pth")["epoch"] == 4


# -- stopping and resuming --------------------------------------------------------------------------------------------

def test_resumed_run_equals_uninterrupted(data, monkeypatch, tmp_path):
    flags = [*data, "--epochs", 4, "--warmup_epochs", 2, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "whole")
    main(monkeypatch, tmp_path, *flags, "--exp_name", "parts", "--stop_epoch", 2)
    assert weights(tmp_path / "results/parts/last.pth")["epoch"] == 2
    # Flags that were not given again come from the checkpoint.
    main(monkeypatch, tmp_path, "--exp_name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "results/whole", tmp_path / "results/parts")


def test_resuming_with_another_memory_layout_goes_on_with_the_same_moments(data, monkeypatch, tmp_path):
    """Adam's moments belong to weights, not to places in memory, which --channels_last orders in another way."""
    flags = [*data, "--epochs", 4, "--warmup_epochs", 2, "--sample_every", 0, "--no-tensorboard", "--lr", 1e-2]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "whole")
    main(monkeypatch, tmp_path, *flags, "--exp_name", "parts", "--stop_epoch", 2)
    main(monkeypatch, tmp_path, "--exp_name", "parts", "--resume", "auto", "--channels_last")
    whole, parts = (weights(tmp_path / "results" / name / "last.pth")["model"] for name in ("whole", "parts"))
    assert max((whole[k] - parts[k]).abs().max().item() for k in whole) < 1e-3


def test_validation_takes_images_from_the_whole_of_the_held_out_set(data, monkeypatch, tmp_path):
    """Class folders come one after the other: the first images would be those of one class."""
    evaluate, seen = train.evaluate, []

    class Watched:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def batches(self, indices, device):
            seen.extend(i for batch in indices for i in batch.tolist())
            return self.data.batches(indices, device)

    monkeypatch.setattr(train, "evaluate", lambda trainer, lpips, data, stop: evaluate(trainer, lpips, Watched(data), stop))
    main(monkeypatch, tmp_path, *data, "--epochs", 1, "--val_images", 4, "--sample_every", 0, "--no-tensorboard")
    assert seen == [0, 2, 4, 6]


def test_the_last_line_names_what_was_left(data, monkeypatch, tmp_path, capsys):
    folder = Path("results/CrossVampVAE")
    for every, left in ((0, f" (curves in {folder / 'curves.png'})"),
                        (1, f" (pictures in {folder / 'samples'}, curves in {folder / 'curves.png'})")):
        main(monkeypatch, tmp_path, *data, "--epochs", 1, "--sample_every", every, "--overwrite", "--no-tensorboard")
        assert capsys.readouterr().out.splitlines()[-1] == f"done: {folder}{left}"
        assert (folder / "samples").exists() == bool(every) and (folder / "curves.png").exists()
    main(monkeypatch, tmp_path, *data, "--epochs", 9, "--stop_epoch", 1, "--overwrite", "--no-tensorboard")
    assert capsys.readouterr().out.splitlines()[-1] == f"done: {folder} (curves in {folder / 'curves.png'})"


def test_run_stopped_in_mid_epoch_resumes_to_the_same_bits(data, monkeypatch, tmp_path):
    flags = [*data, "--epochs", 4, "--warmup_epochs", 2, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "whole")
    step = train.train_step

    def step_then_signal(trainer, *rest):
        step(trainer, *rest)
        if trainer.step == 7:                        # two steps into the second epoch of five
            for _ in range(2):                       # as `timeout` does: once to the program, once to its group
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "train_step", step_then_signal)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, tmp_path, *flags, "--exp_name", "parts")
    assert stop.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(train, "train_step", step)
    checkpoint = weights(tmp_path / "results/parts/last.pth")
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 7)
    main(monkeypatch, tmp_path, "--resume", tmp_path / "results/parts/last.pth")
    assert_same_run(tmp_path / "results/whole", tmp_path / "results/parts")


@pytest.mark.parametrize("signum, step", [(signal.SIGINT, 2), (signal.SIGPIPE, 5)])
def test_a_run_without_a_reader_of_its_output_is_saved(signum, step, data, monkeypatch, tmp_path):
    """In `python train.py 2>&1 | tee log` Ctrl-C ends tee as well. Without a signal, as with head, the first line that finds
    no reader, that of the epoch, ends the run."""
    train_step, bars = train.train_step, train.tqdm
    read, write = os.pipe()

    def step_then_signal(trainer, *rest):
        train_step(trainer, *rest)
        if trainer.step == 2:
            os.close(read)
            if signum == signal.SIGINT:
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(train, "train_step", step_then_signal)
    monkeypatch.setattr(train, "tqdm", lambda *args, **kwargs: bars(*args, **{**kwargs, "delay": 0, "mininterval": 0}))
    with io.TextIOWrapper(open(write, "wb", buffering=0), write_through=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, tmp_path, *data, "--epochs", 3, "--no-tensorboard", "--save_every", 3, "--exp_name", "t")
        assert sys.stderr is sys.stdout is stream
    assert stop.value.code == 128 + signum and weights(tmp_path / "results/t/last.pth")["step"] == step


def test_run_stopped_in_its_evaluation_evaluates_again(data, monkeypatch, tmp_path):
    flags = [*data, "--epochs", 2, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "whole")
    evaluate = train.evaluate

    def signal_then_evaluate(trainer, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, *rest)

    monkeypatch.setattr(train, "evaluate", signal_then_evaluate)
    with pytest.raises(SystemExit):
        main(monkeypatch, tmp_path, *flags, "--exp_name", "parts")
    checkpoint = weights(tmp_path / "results/parts/last.pth")
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["history"]) == (0, 5, [])
    monkeypatch.setattr(train, "evaluate", evaluate)
    main(monkeypatch, tmp_path, "--exp_name", "parts", "--resume", "auto")
    assert_same_run(tmp_path / "results/whole", tmp_path / "results/parts")
    with open(tmp_path / "results/parts/history.csv", newline="") as f:
        speeds = [row["img_per_s"] for row in csv.DictReader(f)]
    assert speeds[0] == "" and float(speeds[1]) > 0       # no step of the first epoch was left


def test_run_killed_before_its_first_checkpoint_starts_again(data, monkeypatch, tmp_path):
    run = tmp_path / "results/CrossVampVAE"
    run.mkdir(parents=True)
    (run / "history.csv").write_text("epoch\n1\n")
    flags = [*data, "--epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    with pytest.raises(UserError, match="already holds a run"):
        main(monkeypatch, tmp_path, *flags)
    main(monkeypatch, tmp_path, *flags, "--resume", "auto")
    assert [row["epoch"] for row in history(run)] == ["1"]
    (run / "last.pth").rename(run / "best_fid.pth")              # a result, whatever became of the rest
    with pytest.raises(UserError, match="no last.pth to go on from"):
        main(monkeypatch, tmp_path, *flags, "--resume", "auto")
    assert (run / "best_fid.pth").exists()


def test_best_checkpoint_missing_after_a_kill_is_made_again(data, monkeypatch, tmp_path, fake_hub):
    fake_hub.inception()
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--sample_every", 0, "--no-tensorboard",
         "--fid_every", 1, "--fid_dims", 64, "--fid_samples", 10)
    run = tmp_path / "results/CrossVampVAE"
    best = weights(run / "best_fid.pth")
    (run / "best_fid.pth").unlink()
    monkeypatch.setattr(train, "evaluate_fid", lambda *_: best["best_fid"] + 1)
    main(monkeypatch, tmp_path, "--resume", "auto")
    again = weights(run / "best_fid.pth")
    assert again["epoch"] == 1 and again["best_fid"] == best["best_fid"] and same(best["ema"], again["ema"])
    # A better one of a later epoch outlives going back to an older checkpoint, whose own best is worse.
    torch.save(best | {"best_fid": best["best_fid"] - 1}, run / "best_fid.pth")
    main(monkeypatch, tmp_path, "--resume", run / "step_000000005.pth")
    assert {weights(run / f"{name}.pth")["best_fid"] for name in ("best_fid", "last")} == {best["best_fid"] - 1}


def test_resuming_into_another_folder_copies_the_best_and_spares_a_run_there(data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--exp_name", "a", "--no-tensorboard")
    last = tmp_path / "results/a/last.pth"
    best = weights(last) | {"best_fid": 3.5, "optimizer": None}
    torch.save(best, tmp_path / "results/a/best_fid.pth")
    (tmp_path / "results/b").mkdir()
    (tmp_path / "results/b/last.pth").write_bytes(b"another run")
    with pytest.raises(UserError, match="b already holds a run"):
        main(monkeypatch, tmp_path, "--resume", last, "--exp_name", "b")
    assert (tmp_path / "results/b/last.pth").read_bytes() == b"another run"
    main(monkeypatch, tmp_path, "--resume", last, "--exp_name", "c", "--save_dir", tmp_path / "results")
    assert weights(tmp_path / "results/c/last.pth")["epoch"] == 2 and weights(last)["epoch"] == 1
    assert {weights(tmp_path / f"results/c/{name}.pth")["best_fid"] for name in ("best_fid", "last")} == {3.5}
    # The folder of the checkpoint is the run's, also where only save_dir is repeated, in whatever spelling.
    main(monkeypatch, tmp_path, "--resume", last, "--save_dir", tmp_path / "results/b/../../results")
    assert weights(last)["epoch"] == 2
    torch.save(weights(last) | {"history": [{"epoch": 1}, {"epoch": 2}]}, last)                 # from elsewhere
    main(monkeypatch, tmp_path, "--resume", last)


def test_checkpoints_and_self_checks_come_when_they_are_due(data, monkeypatch, tmp_path):
    saved, checked, epochs = [], [], []
    monkeypatch.setattr(train.Trainer, "save", lambda trainer: saved.append(trainer.epoch))
    monkeypatch.setattr(train, "write_epoch", lambda trainer, *_: epochs.append(trainer.epoch))
    monkeypatch.setattr(train, "self_check", lambda model: checked.append(len(epochs)))
    for seconds, due in ((0, [2, 4, 5]), (1e9, [5])):
        main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 5, "--save_every", 2,
             "--save_every_s", seconds, "--check_every", 2, "--exp_name", seconds)
        assert saved == due and checked == [0, 2, 4]
        saved.clear(), checked.clear(), epochs.clear()


def test_interrupt_saves_and_says_how_to_resume(data, tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *data, "--epochs", "100000", "--save_every_s", "1000",
                                "--exp_name", "i"],
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "results/i/history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in out and "Traceback" not in err
    assert weights(tmp_path / "results/i/last.pth")["step"] > 0


def test_seed_decides_everything(data, monkeypatch, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(monkeypatch, tmp_path, *data, "--epochs", 1, "--seed", seed, "--exp_name", name, "--no-tensorboard",
             "--sample_every", 0)
    a, b, c = (weights(tmp_path / f"results/{n}/last.pth")["model"] for n in "abc")
    assert same(a, b) and not same(a, c)


def test_seed_decides_the_first_weights(data, monkeypatch, tmp_path):
    for seed in (0, 1):
        main(monkeypatch, tmp_path, *data, "--epochs", 1, "--lr", 1e-30, "--seed", seed, "--exp_name", seed, "--no-tensorboard",
             "--sample_every", 0)
    a, b = (weights(tmp_path / f"results/{seed}/last.pth")["model"]["decoder.stem.0.weight"] for seed in (0, 1))
    assert not torch.allclose(a, b)


def test_resume_refuses_other_values_by_name(data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--exp_name", "r", "--no-tensorboard")
    with pytest.raises(UserError, match=r"--lr \(0.0001, not 0.1\).*--prior \(vamp, not mog\)"):
        main(monkeypatch, tmp_path, "--exp_name", "r", "--resume", "auto", "--lr", "0.1", "--prior", "mog")
    path = tmp_path / "results/r/last.pth"
    whole = weights(path)
    older = {k: v for k, v in whole["args"].items() if k not in ("balance", "recon_loss", "flip", "in_channels", "fit_prior")}
    save_checkpoint(path, {**whole, "args": older})       # of a time without these flags: what they are by default now
    for given, named in ((["--balance", 5, "--recon_loss", "mse"], r"--balance \(0.0, not 5.0\), --recon_loss \(l1, not mse\)"),
                         (["--fit_prior", path], r"--fit_prior \(None, not ")):
        with pytest.raises(UserError, match=named):
            main(monkeypatch, tmp_path, "--exp_name", "r", "--resume", "auto", *given)
    main(monkeypatch, tmp_path, "--exp_name", "r", "--resume", "auto", "--sample_every", 1, "--batch_size", 8,
         "--recon_loss", "l1", "--flip", "--in_channels", 3)
    assert weights(path)["epoch"] == 2


def test_resume_refuses_other_images(data, monkeypatch, tmp_path, folder_of_images):
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--exp_name", "r", "--no-tensorboard")
    with pytest.raises(UserError, match="not the images"):
        main(monkeypatch, tmp_path, "--exp_name", "r", "--resume", "auto", "--data_dir", folder_of_images / "train" / "class0")


def test_new_run_never_overwrites_an_old_one_unasked(data, monkeypatch, tmp_path):
    flags = [*data, "--epochs", 1, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags)
    before = (tmp_path / "results/CrossVampVAE/last.pth").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        main(monkeypatch, tmp_path, *flags)
    assert (tmp_path / "results/CrossVampVAE/last.pth").read_bytes() == before
    (tmp_path / "results/CrossVampVAE/best_fid.pth").write_bytes(b"of the old run")
    main(monkeypatch, tmp_path, *flags, "--overwrite", "--seed", 1)
    assert (tmp_path / "results/CrossVampVAE/last.pth").read_bytes() != before
    assert not (tmp_path / "results/CrossVampVAE/best_fid.pth").exists()
    # Neither is a run that kept only its best checkpoint, nor one with a name of its own by --demo.
    last = tmp_path / "results/CrossVampVAE/last.pth"
    last.rename(last.with_name("best_fid.pth"))
    for more in ([], ["--resume", "auto"]):
        with pytest.raises(UserError, match="already holds a run"):
            main(monkeypatch, tmp_path, *flags, *more)
    for name, more in (("CrossVampVAE", ["--exp_name", "CrossVampVAE"]), ("demo", ["--resume", "auto"])):
        last = last.parent.rename(last.parents[1] / name) / "last.pth"
        with pytest.raises(UserError, match="already holds a run"):
            main(monkeypatch, tmp_path, "--demo", *TINY, *more)
    assert last.with_name("best_fid.pth").exists()


def test_the_demo_replaces_itself_and_no_other(monkeypatch, tmp_path):
    flags = ["--demo", *TINY, "--batch_size", 400, "--sample_every", 0, "--no-tensorboard", "--epochs", 1]
    for more in ([], ["--threads", 1]):                         # the second replaces the first
        main(monkeypatch, tmp_path, *flags, *more)
    last = tmp_path / "results/demo/last.pth"
    before = last.read_bytes()
    for more, said in ((["--seed", 1], r"--seed \(0, not 1\)"), (["--epochs", 2], r"--epochs \(1, not 2\)"),
                       (["--preset", "best"], r"--prior \(vamp, not mog\)")):
        with pytest.raises(UserError, match=f"results/demo holds a demo with other flags: .*{said}.*--overwrite replaces it"):
            main(monkeypatch, tmp_path, *flags, *more)
    with pytest.raises(UserError, match=r"--in_channels \(1, not 3\)"):
        main(monkeypatch, tmp_path, *flags, "--in_channels", 3)
    assert last.read_bytes() == before
    main(monkeypatch, tmp_path, *flags, "--seed", 1, "--overwrite")
    assert last.read_bytes() != before
    with pytest.raises(UserError, match=r"--seed \(1, not 0\)"):
        main(monkeypatch, tmp_path, *flags)
    for path in last.parent.glob("*.pth"):                      # nothing can be lost
        path.unlink()
    main(monkeypatch, tmp_path, *flags, "--flow_length", 0)
    last.parent.rename(tmp_path / "results/first")
    for _ in range(2):                                          # by a path that args.json does not have
        main(monkeypatch, tmp_path, *flags, "--fit_prior", "results/first/last.pth")


def test_a_checkpoint_by_another_name_goes_on_where_it_is_told_to(data, monkeypatch, tmp_path):
    """Beside it may lie the checkpoints of another run."""
    flags = ["--epochs", 2, "--stop_epoch", 1, "--warmup_epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *data, *flags)
    models = tmp_path / "models"
    models.mkdir()
    other = models / "mine.pth"
    for path in (other, models / "last.pth"):
        shutil.copy(tmp_path / "results/CrossVampVAE/last.pth", path)
    before = (models / "last.pth").read_bytes()
    with pytest.raises(UserError, match="mine.pth: no name that a run gives its checkpoints; say with --exp_name"):
        main(monkeypatch, tmp_path, "--resume", other)
    with pytest.raises(UserError, match="mine.pth: no name that a run gives its checkpoints"):
        main(monkeypatch, tmp_path, "--resume", other, "--save_dir", "results")
    with pytest.raises(UserError, match="models already holds a run"):
        main(monkeypatch, tmp_path, "--resume", other, "--exp_name", "models", "--save_dir", tmp_path)
    with pytest.raises(UserError, match=f"{models}: a folder, not a checkpoint; name a file in it, {models / 'last.pth'}"):
        main(monkeypatch, tmp_path, "--resume", models)
    assert (models / "last.pth").read_bytes() == before
    # What a failed attempt left there, all but a checkpoint, is no run.
    again = tmp_path / "results/again"
    again.mkdir()
    (again / "history.csv").write_text("epoch\n")
    main(monkeypatch, tmp_path, "--resume", other, "--exp_name", "again")
    main(monkeypatch, tmp_path, "--resume", tmp_path / "results/CrossVampVAE/last.pth")
    assert_same_run(again, tmp_path / "results/CrossVampVAE")


def test_a_tilde_is_the_home_folder(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    args, _ = train.parse_args(["--save_dir=~/results", "--data_dir", "~", "--fit_prior", "a~b"])
    assert (args.save_dir, args.data_dir, args.fit_prior) == (str(tmp_path / "home/results"), str(tmp_path / "home"), "a~b")


def test_tensorboard_that_is_missing_is_said_where_it_was_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for asked, said in ((False, ""), (True, "note: --tensorboard needs TensorBoard (pip install tensorboard); going on without "
                                            "it\n")):
        assert train.open_tensorboard(argparse.Namespace(tensorboard=True), tmp_path, 0, asked) is None
        assert capsys.readouterr().out == said


def test_what_cannot_be_looked_at_stops_no_run(data, monkeypatch, tmp_path):
    folder = tmp_path / "results" / "CrossVampVAE"
    folder.mkdir(parents=True)
    (folder / "best.pth").symlink_to("nowhere.pth")
    main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--overwrite")
    assert (folder / "last.pth").exists()
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [self / "removed.pth"])
    assert train.files_of_run(folder) == {}


def test_a_checkpoint_that_came_in_between_is_left_alone(data, monkeypatch, tmp_path):
    load, best = train.load_data, tmp_path / "results/CrossVampVAE/best_fid.pth"

    def slow(*rest):
        best.parent.mkdir(parents=True)
        best.write_bytes(b"of another run")
        return load(*rest)

    monkeypatch.setattr(train, "load_data", slow)
    with pytest.raises(UserError, match="another process has written to"):
        main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1)
    assert [p.name for p in best.parent.iterdir()] == ["best_fid.pth"]


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]], ids=["fresh", "resumed"])
def test_a_run_that_came_in_between_is_left_alone(resume, data, monkeypatch, tmp_path):
    """The folder is looked at first and locked last, when data and weights are at hand; another process may be faster."""
    flags = [*data, "--sample_every", 0, "--no-tensorboard"]
    if resume:
        main(monkeypatch, tmp_path, *flags, "--epochs", 3, "--stop_epoch", 1)
    load, last = train.load_data, tmp_path / "results/CrossVampVAE/last.pth"

    def slow(*rest):
        monkeypatch.setattr(train, "load_data", load)
        main(monkeypatch, tmp_path, *flags, "--epochs", 3, "--stop_epoch", 2, *resume)
        return load(*rest)

    monkeypatch.setattr(train, "load_data", slow)
    with pytest.raises(UserError, match="--exp_name CrossVampVAE: another process has written to .*; run again"):
        main(monkeypatch, tmp_path, *flags, "--epochs", 3, *resume)
    assert weights(last)["epoch"] == 2
    main(monkeypatch, tmp_path, *flags, "--epochs", 3, "--resume", "auto")
    assert weights(last)["epoch"] == 3


# -- optimisation -----------------------------------------------------------------------------------------------------

def test_decay_is_on_weight_matrices_only():
    model = CrossFlowVampVAE(hidden_dims=(8, 8), latent_dim=4, num_components=3, flow_length=1, flow_seq_len=1,
                             flow_embed_dim=8, flow_heads=1)
    decayed, free = train.weight_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    assert all(p.ndim in (2, 4) and names[id(p)].endswith("weight") for p in decayed["params"])
    free_names = {names[id(p)] for p in free["params"]}
    assert "pseudo_raw" in free_names and any(n.endswith("queries") for n in free_names)
    assert all(n.endswith(("bias", "queries", "position", "pseudo_raw")) or "norm" in n or model.get_parameter(n).ndim == 1
               for n in free_names)
    assert len(names) == len(decayed["params"]) + len(free["params"])


def test_ema_follows_the_weights(data, monkeypatch, tmp_path):
    seen = []
    step = train.train_step

    def watch(trainer, *rest):
        before = [p.clone() for p in trainer.ema.parameters()]
        step(trainer, *rest)
        decay = min(0.5, (1 + trainer.step) / (10 + trainer.step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(before, trainer.model.parameters())]
        seen.append(max((e - p).abs().max().item() for e, p in zip(expected, trainer.ema.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(trainer.model.buffers(), trainer.ema.buffers()))

    monkeypatch.setattr(train, "train_step", watch)
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--ema_decay", 0.5, "--sample_every", 0, "--no-tensorboard")
    assert len(seen) == 10 and max(seen) < 1e-6


def test_free_bits_floor_acts_on_the_mean(data, monkeypatch, tmp_path):
    """Under the floor the KL gives no gradient: with beta at work or not, the weights are the same."""
    for name, beta in (("a", 0.0), ("b", 5.0)):
        main(monkeypatch, tmp_path, *data, "--epochs", 1, "--warmup_epochs", 0, "--beta_max", beta, "--free_bits", 1e6,
             "--exp_name", name, "--sample_every", 0, "--no-tensorboard")
    a, b = (weights(tmp_path / f"results/{n}/last.pth")["model"] for n in "ab")
    assert same(a, b)
    assert all(float(r["floor_share"]) == 1 and float(r["kl_optim"]) == 0 for r in history(tmp_path / "results/b"))


def test_balance_is_the_entropy_missing_from_the_usage():
    args = train.parse_args(["--balance", "2", "--free_bits", "0", "--lpips_net", "none"])[0]
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    usage = torch.softmax(logits, 1).mean(0)
    parts = dict.fromkeys(("pixel", "LPIPS", "KL_Raw", "log_q0", "log_det", "log_p"), torch.zeros((), dtype=torch.float64))
    terms = train.objective(args, parts, usage, 0.2)
    expected = np.log(4) - torch.distributions.Categorical(usage).entropy()
    assert terms["balance"].item() == pytest.approx(expected.item()) and terms["loss"].item() == pytest.approx(
        2 * expected.item())
    ours, = torch.autograd.grad(terms["loss"], logits, retain_graph=True)
    theirs, = torch.autograd.grad(2 * expected, logits)
    assert torch.allclose(ours, theirs, atol=1e-12) and ours.abs().max() > 1e-3


@pytest.mark.parametrize("term", ["pixel", "log_det"])
def test_nan_names_the_term_and_keeps_the_good_checkpoint(term, data, monkeypatch, tmp_path):
    parts = train.loss_parts

    def poisoned(args, model, lpips, x, out):
        result, usage = parts(args, model, lpips, x, out)
        if model.training and poisoned.calls == 7:
            result[term] = result[term] * float("nan")
        poisoned.calls += model.training
        return result, usage

    poisoned.calls = 0
    monkeypatch.setattr(train, "loss_parts", poisoned)
    with pytest.raises(UserError, match=rf"{term} .*epoch 2, step 8; last good checkpoint: .*last.pth"):
        main(monkeypatch, tmp_path, *data, "--epochs", 3, "--sample_every", 0, "--no-tensorboard")
    checkpoint = weights(tmp_path / "results/CrossVampVAE/last.pth")
    assert checkpoint["epoch"] == 1 and all(v.isfinite().all() for v in checkpoint["model"].values())


# -- what a user can get wrong ----------------------------------------------------------------------------------------

def bad(kind, data, tmp_path):
    """Flags and the words the message must contain."""
    empty = tmp_path / "empty"
    empty.mkdir()
    if kind == "missing folder":
        return [*data, "--data_dir", tmp_path / "nowhere"], "nowhere: no such folder"
    if kind == "empty folder":
        return [*data, "--data_dir", empty], "no images there"
    if kind == "damaged image":
        (empty / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
        return [*data, "--data_dir", empty], "bad.png: cannot be read as an image"
    if kind == "size":
        return [*data, "--img_size", "10"], "img_size 10"
    if kind == "latent":
        return [*data, "--latent_dim", "5"], "latent_dim 5"
    if kind == "components":
        return [*data, "--num_components", "0"], "--num_components 0"
    if kind == "no gpu":
        return [*data, "--device", "cuda"], "--device cuda: no CUDA GPU"
    if kind == "lpips weights":
        return [*data, "--lpips_net", "vgg"], "vgg16-397923af.pth", "--lpips_net none", str(tmp_path / "hub")
    if kind == "inception weights":
        return [*data, "--fid_every", "1"], "pt_inception-2015-12-05-6726825d.pth", "--fid_every 0"
    if kind == "no cifar":
        return [*TINY, "--data_dir", empty], "cifar-10-python.tar.gz", "--dataset digits"
    if kind == "pushed":
        return [*data, "--flow_prior", "pushed", "--flow_context", "encoder"], "--flow_prior pushed"
    if kind == "no flow":
        return [*data, "--flow_prior", "pushed", "--flow_length", "0"], "--flow_length 0"
    if kind == "no checkpoint":
        return [*data, "--resume", tmp_path / "no.pth"], "no.pth: no such checkpoint"
    if kind == "damaged hub file":
        path = tmp_path / "hub" / "hub" / "checkpoints" / "vgg16-397923af.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not weights")
        return [*data, "--lpips_net", "vgg"], "vgg16-397923af.pth: damaged"
    if kind == "file as folder":
        (tmp_path / "file").write_text("")
        return [*data, "--save_dir", tmp_path / "file"], "--save_dir"
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["missing folder", "empty folder", "damaged image", "size", "latent", "components", "no gpu",
                                  "lpips weights", "inception weights", "no cifar", "pushed", "no flow", "no checkpoint",
                                  "damaged hub file", "file as folder"])
def test_user_errors_are_one_line_and_leave_nothing(kind, data, tmp_path, monkeypatch, capsys):
    if kind == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags, *words = bad(kind, data, tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")          # whatever would be downloaded cannot be
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        train.run(lambda: main(monkeypatch, tmp_path, *flags))
    err = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("Downloading")]
    assert stop.value.code == 2
    assert err[-1].startswith("error: ") and all(w in err[-1] for w in words), err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("content", ["empty", "text", "pickle", "other shapes", "truncated", "flipped", "foreign"])
def test_bad_checkpoints_are_refused(content, data, monkeypatch, tmp_path):
    path = tmp_path / "results/x/last.pth"
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--stop_epoch", 1, "--exp_name", "x", "--no-tensorboard")
    good = path.read_bytes()
    touched = tmp_path / "touched"
    if content == "other shapes":
        checkpoint = weights(path)
        checkpoint["model"]["decoder.stem.0.weight"] = torch.zeros(3, 3)
        torch.save(checkpoint, path)
    elif content == "pickle":
        class Malicious:
            def __reduce__(self):
                return Path.touch, (touched,)
        torch.save({"model": Malicious()}, path)
    elif content == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": good[:len(good) // 2], "flipped": flipped}[content])
    with pytest.raises(UserError, match=re.escape("last.pth")):
        main(monkeypatch, tmp_path, "--exp_name", "x", "--resume", "auto")
    assert not touched.exists()


def test_error_reaches_the_shell_as_one_line_and_code_2(data, tmp_path):
    done = command(*data, "--num_components", 0, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: --num_components 0: must be 1 or more"]
    done = command("--flow_prior", "sideways", cwd=tmp_path)
    assert done.returncode == 2 and "sideways" in done.stderr


# -- the second stage ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prior", [["--prior", "vamp"], ["--prior", "standard"],
                                   ["--prior", "mog", "--flow_length", 0, "--pseudo_init", "noise"]])
def test_second_stage_fits_the_prior_and_nothing_else(prior, data, monkeypatch, tmp_path):
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--warmup_epochs", 0, "--lr", 3e-3, "--beta_max", 1,
             "--free_bits", 0]
    main(monkeypatch, tmp_path, *flags, "--epochs", 10, "--beta_max", 1e-3, "--prior", "standard", "--flow_length", 0,
         "--exp_name", "first")
    first = tmp_path / "results/first/last.pth"
    second = [*flags, *prior, "--epochs", 8, "--exp_name", "second"]
    main(monkeypatch, tmp_path, *second, "--fit_prior", first, "--stop_epoch", 4)
    main(monkeypatch, tmp_path, "--exp_name", "second", "--resume", "auto")
    before, after = weights(first)["ema"], weights(tmp_path / "results/second/last.pth")
    for which in ("model", "ema"):
        for name, value in before.items():
            if name.startswith(("encoder.", "decoder.")):
                assert torch.equal(value, after[which][name]), name
    rows = history(tmp_path / "results/second")
    assert len(rows) == 8 and len({row["val_recon"] for row in rows}) == 1       # the decoder sees the same latents throughout
    assert float(rows[-1]["kl_raw"]) < float(rows[0]["kl_raw"])    # (of held-out images it need not fall: there are 40 others)
    model, _ = load_model(tmp_path / "results/second/last.pth", "cpu")
    assert model.sample(3, generator=torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("flip", [False, True])
def test_second_stage_trains_on_the_posteriors_of_images_and_their_mirror_images(flip):
    torch.manual_seed(0)
    model = CrossFlowVampVAE(3, 8, 4, (8,), num_components=3, flow_length=1, flow_seq_len=1, flow_embed_dim=8,
                                   flow_heads=2, flow_layers=1, decode_from="z0")
    perturb_(model, 0.05, torch.Generator().manual_seed(0))
    images = MemoryImages(torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8))
    stock = train.encode_all(argparse.Namespace(flip=flip, img_size=8, cache_gb=4.0), model, images, torch.device("cpu"))
    x, eps = to_float(images.images), torch.randn(7, 4)
    network = train.PriorFit(model)
    for seen, stored in [(x, stock.images)] + [(x.flip(3), stock.images.flip(3))] * flip:
        found, wanted = network(stored, eps), model(seen, eps)
        assert found.recon is None
        for ours, theirs in zip(model.kl_terms(found), model.kl_terms(wanted)):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert stock.shape == (2, 4, 1 + flip)
    if flip:
        assert not torch.allclose(stock.images[..., 0], stock.images[..., 1], atol=1e-3)


@pytest.mark.parametrize("prior, latent", [
    ("vamp", []), ("mog", []), ("standard", []), ("mog", ["--latent_layout", "spatial", "--latent_dim", 8])])
def test_second_stage_goes_on_from_the_prior_of_the_first(prior, latent, data, monkeypatch, tmp_path, capsys):
    """With more layers too, and to the same density; flags that are not given are the first stage's."""
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--lr", 1e-3, *latent]
    own = ["--prior", prior, "--flow_length", 2] + ["--mixture_weights", "learned"] * (prior != "standard")
    main(monkeypatch, tmp_path, *flags, *own, "--decode_from", "z0", "--exp_name", "first")
    path = tmp_path / "results/first/last.pth"
    checkpoint = torch.load(path, weights_only=True)
    first = CrossFlowVampVAE(**checkpoint["model_args"])
    perturb_(first, 0.1, torch.Generator().manual_seed(0))
    save_checkpoint(path, {**checkpoint, "model": first.state_dict(), "ema": first.state_dict()})

    args, given = train.parse_args([*map(str, flags), "--fit_prior", str(path), "--flow_length", "5", "--seed", "1"])
    stage = train.read_first_stage(args, given)
    assert (args.prior, args.mixture_weights) == (prior, "uniform" if prior == "standard" else "learned")
    assert args.latent_layout == ("spatial" if latent else "vector")
    model = CrossFlowVampVAE(**train.model_args_of(args))
    train.load_first_stage(model, stage)
    x = to_float(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)).double()
    eps = torch.randn(6, args.latent_dim, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = (m.double().kl_terms(m(x, eps)) for m in (model, first))
    for ours, theirs in zip(found, wanted):
        assert torch.allclose(ours, theirs, atol=1e-9)
    assert wanted.log_det.std() > 0.01

    capsys.readouterr()
    main(monkeypatch, tmp_path, *flags, "--fit_prior", path, "--flow_length", 5, "--exp_name", "longer")
    said = capsys.readouterr().out
    assert "goes on from the first stage's, 2 of 5 flow layers" in said and "loss        beta max(" in said
    row, = history(tmp_path / "results/longer")
    assert float(row["val_loss"]) == pytest.approx(0.2 * float(row["val_kl_raw"]))             # as train_loss: the prior alone
    main(monkeypatch, tmp_path, *flags, "--fit_prior", path, "--flow_embed_dim", 16, "--exp_name", "other")
    assert "starts anew, not from the first stage's: --flow_embed_dim 16 (there 8)" in capsys.readouterr().out


def test_second_stage_with_full_covariances_starts_by_em(data, monkeypatch, tmp_path, capsys):
    """On the first stage's flow, nearer to the latents than the first stage's mixture; it goes on from itself, with the same
    bits after an interruption."""
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--lr", 1e-3]
    main(monkeypatch, tmp_path, *flags, "--preset", "best", "--flow_length", 2, "--exp_name", "first",
         "--epochs", 20, "--beta_max", 0.001, "--ema_decay", 0.5)
    first = tmp_path / "results/first/last.pth"
    second = ["--mixture_covariance", "full", "--num_components", 2, "--epochs", 2, "--lr", 1e-5]
    main(monkeypatch, tmp_path, *flags, "--fit_prior", first, *second, "--exp_name", "second")
    said = capsys.readouterr().out
    assert "the flow goes on from the first stage's, 2 of 2 flow layers, the mixture starts anew: --num_components 2 " in said
    assert "EM          20 steps for 2 components of full covariance, on 240 latents, 3 draws of each posterior" in said
    before, after = history(tmp_path / "results/first")[-1], history(tmp_path / "results/second")[0]
    assert float(after["kl_raw"]) < 0.8 * float(before["kl_raw"])
    state = weights(tmp_path / "results/second/last.pth")
    assert state["model"]["prior_tril"].tril(-1).abs().max() > 0.01
    for name, value in weights(first)["ema"].items():         # (the flow is trained with a rate of 1e-5)
        if not name.startswith("prior"):
            assert torch.allclose(state["model"][name], value, atol=1e-3), name

    main(monkeypatch, tmp_path, *flags, "--fit_prior", first, *second, "--stop_epoch", 1, "--exp_name", "stopped")
    main(monkeypatch, tmp_path, "--exp_name", "stopped", "--resume", "auto", "--stop_epoch", 2)
    assert_same_run(tmp_path / "results/second", tmp_path / "results/stopped")
    capsys.readouterr()
    main(monkeypatch, tmp_path, *flags, "--fit_prior", tmp_path / "results/second/last.pth", "--num_components", 2,
         "--exp_name", "third")
    said = capsys.readouterr().out
    assert "the prior goes on from the first stage's, 2 of 2 flow layers" in said and "EM " not in said
    again = [*flags, "--fit_prior", tmp_path / "results/second/last.pth", "--exp_name"]     # what other priors have no use for
    for prior in ("vamp", "standard"):                                                      # is not taken over for them
        main(monkeypatch, tmp_path, *again, prior, "--prior", prior)
        taken = json.loads((tmp_path / "results" / prior / "args.json").read_text())
        assert (taken["mixture_covariance"], taken["mixture_weights"]) == ("diag", "learned" if prior == "vamp" else "uniform")
    with pytest.raises(UserError, match="--num_components 81: only 80 latents"):
        main(monkeypatch, tmp_path, *flags, "--fit_prior", first, *second, "--num_components", 81, "--exp_name", "x")
    with pytest.raises(UserError, match="--mixture_covariance full with --prior vamp: needs --prior mog"):
        main(monkeypatch, tmp_path, *flags, "--mixture_covariance", "full", "--exp_name", "x")


def test_preset_gmm_is_a_second_stage_for_whatever_came_first(data, monkeypatch, tmp_path, capsys):
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1]
    main(monkeypatch, tmp_path, *flags, "--prior", "standard", "--flow_length", 0, "--exp_name", "plain")
    main(monkeypatch, tmp_path, *flags, "--preset", "best", "--flow_length", 1, "--exp_name", "best")
    for first in ("plain", "best"):
        main(monkeypatch, tmp_path, "--fit_prior", tmp_path / "results" / first / "last.pth", "--preset", "gmm",
             "--exp_name", f"{first} gmm", "--device", "cpu", "--no-tensorboard", "--sample_every", 0)
        saved = weights(tmp_path / f"results/{first} gmm/last.pth")
        assert saved["args"].items() >= {**train.PRESETS["gmm"], "free_bits": 0.0}.items()
        assert saved["epoch"] == 4 and not any(name.startswith("flow") for name in saved["model"])
        assert "EM          20 steps for 30 components of full covariance" in capsys.readouterr().out
        main(monkeypatch, tmp_path, "--fit_prior", tmp_path / "results" / first / "last.pth", "--preset", "gmm_flow",
             "--exp_name", f"{first} flow", "--device", "cpu", "--no-tensorboard", "--sample_every", 0, "--flow_seq_len", 2,
             "--batch_size", 40, "--epochs", 2)
        saved = weights(tmp_path / f"results/{first} flow/last.pth")
        assert saved["args"].items() >= {**train.PRESETS["gmm_flow"], "flow_seq_len": 2, "batch_size": 40, "epochs": 2}.items()
        assert "EM          20 steps for 10 components of full covariance" in capsys.readouterr().out
    for preset in train.SECOND_STAGES:
        with pytest.raises(UserError, match=f"--preset {preset}: a second stage, which needs --fit_prior PATH"):
            main(monkeypatch, tmp_path, *flags, "--preset", preset, "--exp_name", "x")
        with pytest.raises(UserError, match=f"--preset {preset} with --demo: leave --demo out"):
            main(monkeypatch, tmp_path, "--demo", "--fit_prior", tmp_path / "results/plain/last.pth", "--preset", preset)


def test_a_frozen_mixture_stays_as_em_leaves_it_while_the_flow_is_trained(data, monkeypatch, tmp_path, capsys):
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 4, "--lr", 1e-3]
    main(monkeypatch, tmp_path, *flags, "--prior", "standard", "--flow_length", 0, "--exp_name", "first")
    second = [*flags, "--fit_prior", tmp_path / "results/first/last.pth", "--prior", "mog", "--mixture_covariance", "full",
              "--mixture_weights", "learned", "--num_components", 2, "--flow_length", 2]

    def states(name):
        """After each half of the run, which is interrupted between them; prior's weights, and the others'."""
        for more in (["--stop_epoch", 2], ["--resume", "auto"]):
            given = second if "--stop_epoch" in more else []
            frozen = ["--freeze_mixture"] * (name == "frozen" and bool(given))
            main(monkeypatch, tmp_path, *given, *frozen, *more, "--exp_name", name)
            checkpoint = weights(tmp_path / f"results/{name}/last.pth")
            for state in (checkpoint["model"], checkpoint["ema"]):
                yield [{k: v for k, v in state.items() if k.startswith(part)} for part in ("prior_", "flow.")]

    for name in ("frozen", "trained"):
        (early, flow), (early_mean, _), (late, flow_then), (late_mean, _) = states(name)
        assert len(early) == 4                                          # means, log-variances, triangles, weights
        for k in early:
            same = [torch.equal(early[k], x[k]) for x in (late, early_mean, late_mean)]
            assert same == [name == "frozen"] * 3, (name, k)
        assert not all(torch.equal(flow[k], flow_then[k]) for k in flow)
    for name in ("once more", "and again"):            # on a mixture that EM had not found, and on the one it finds itself
        main(monkeypatch, tmp_path, *second, "--decode_from", "z0", "--freeze_mixture", "--epochs", 1, "--exp_name", name,
             "--fit_prior", tmp_path / f"results/{'trained' if name == 'once more' else 'once more'}/last.pth")
        said = capsys.readouterr().out
        assert "the flow goes on from the first stage's, 2 of 2 flow layers, the mixture starts anew: --freeze_mixture" in said
        assert "EM          20 steps for 2 components" in said and "2 components, frozen; flow of 2 layers of 1 tokens" in said
    with pytest.raises(UserError, match=r"--freeze_mixture \(of --preset gmm_flow\) with --flow_length 0: nothing"):
        main(monkeypatch, tmp_path, *second, "--preset", "gmm_flow", "--flow_length", 0, "--exp_name", "x")
    args, given = train.parse_args([*map(str, second), "--freeze_mixture"])
    train.check_flags(args, given)
    for name, value, message in (("fit_prior", None, "needs --fit_prior PATH"), ("flow_length", 0, "nothing would be trained"),
                                 ("mixture_covariance", "diag", "only full covariances are fitted by EM")):
        with pytest.raises(UserError, match=f"--freeze_mixture.*{message}"):
            train.check_flags(argparse.Namespace(**{**vars(args), name: value}), given)


def test_flow_of_a_second_stage_is_whitened_once_and_before_em(data, monkeypatch, tmp_path, capsys):
    """By the latents of all images; a stage that goes on from it keeps the map, with more layers too."""
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1]
    main(monkeypatch, tmp_path, *flags, "--prior", "standard", "--flow_length", 0, "--exp_name", "first")
    white, em, found = BiCrossAttnFlow.set_whitening_, train.CrossFlowVampVAE.fit_mixture_, []
    monkeypatch.setattr(BiCrossAttnFlow, "set_whitening_", lambda flow, z0: found.append(z0) or white(flow, z0))
    monkeypatch.setattr(train.CrossFlowVampVAE, "fit_mixture_",
                        lambda model, zK, *rest: found.append((model.flow, zK)) or em(model, zK, *rest))
    second = ["--prior", "mog", "--mixture_covariance", "full", "--num_components", 2, "--flow_whiten"]
    main(monkeypatch, tmp_path, *flags, *second, "--fit_prior", tmp_path / "results/first/last.pth", "--exp_name", "second")
    z0, (flow, zK) = found
    assert "flow on whitened channels, of 2 layers" in capsys.readouterr().out
    assert torch.allclose(zK, flow.whitened(z0), atol=1e-5) and not torch.allclose(zK, z0, atol=0.1)
    maps = weights(tmp_path / "results/second/last.pth")["ema"]
    maps = {k: maps[k] for k in ("flow.log_scale", "flow.tril")}
    assert maps["flow.tril"].abs().max() > 0
    for name, more in (("third", []), ("longer", ["--flow_length", 3]), ("again", ["--freeze_mixture"])):
        main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--exp_name", name,
             *more, "--fit_prior", tmp_path / "results/second/last.pth")
        state = weights(tmp_path / f"results/{name}/last.pth")["ema"]
        assert all(torch.equal(state[k], v) for k, v in maps.items()), name
    assert [isinstance(f, tuple) for f in found] == [False, True, True, True, True]          # EM for each, 5 components each
    main(monkeypatch, tmp_path, "--preset", "gmm", "--fit_prior", tmp_path / "results/second/last.pth", "--exp_name", "gmm",
         "--num_components", 2, "--epochs", 1, "--no-tensorboard", "--device", "cpu")
    assert weights(tmp_path / "results/gmm/last.pth")["args"]["flow_whiten"] is False
    args = train.parse_args(["--preset", "gmm_flow", "--fit_prior", "x.pth", "--prior", "vamp", "--no-freeze_mixture"])[0]
    assert (args.flow_whiten, args.mixture_covariance) == (False, "diag")
    args, given = train.parse_args([*map(str, [*flags, *second]), "--fit_prior", "x.pth"])
    train.check_flags(args, given)
    for name, value, message in (("fit_prior", None, "needs --fit_prior PATH"), ("flow_length", 0, "there is no flow"),
                                 ("mixture_covariance", "diag", "diagonal components start at the latents")):
        with pytest.raises(UserError, match=f"--flow_whiten.*{message}"):
            train.check_flags(argparse.Namespace(**{**vars(args), name: value}), given)


def test_second_stage_says_what_the_clamp_takes_from_em(data, monkeypatch, tmp_path, capsys):
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1]
    main(monkeypatch, tmp_path, *flags, "--flow_length", 0, "--logvar_clamp", -0.1, 3, "--exp_name", "first")
    capsys.readouterr()
    for clamp, bounds in (("first", "-0.1 3"), ("wide", None)):
        if clamp == "wide":
            main(monkeypatch, tmp_path, *flags, "--flow_length", 0, "--exp_name", "wide")
        main(monkeypatch, tmp_path, *flags, "--fit_prior", tmp_path / "results" / clamp / "last.pth", "--prior", "mog",
             "--mixture_covariance", "full", "--num_components", 2, "--exp_name", f"second {clamp}")
        said = capsys.readouterr().out
        assert ("of the mixture's 8 log-variances lie outside" in said) == (bounds is not None)
        assert bounds is None or f"--logvar_clamp {bounds}, the first stage's" in said


def test_em_of_fewer_latents_than_dimensions_knows_how_wide_they_are(data, monkeypatch, tmp_path):
    """By several draws of each posterior: of one each, there are directions without any extent."""
    main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--prior", "standard",
         "--flow_length", 0, "--latent_dim", 96, "--exp_name", "first")
    for name, prior in (("full", ["--preset", "gmm"]), ("diag", ["--prior", "mog"])):
        main(monkeypatch, tmp_path, *prior, "--num_components", 2, "--epochs", 1, "--flow_length", 0, "--sample_every", 0,
             "--no-tensorboard", "--fit_prior", tmp_path / "results/first/last.pth", "--exp_name", name)
    full, diag = (float(history(tmp_path / f"results/{name}")[0]["kl_raw"]) for name in ("full", "diag"))
    assert 0 < full < 2 * diag


def test_second_stage_takes_data_and_measure_from_the_first(data, monkeypatch, tmp_path):
    """Else it would ask for the weights of LPIPS or FID that the first did without, or fit the prior to other images."""
    main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--flow_length", 0, "--no-flip",
         "--recon_loss", "mse", "--exp_name", "first")
    path = str(tmp_path / "results/first/last.pth")
    first = torch.load(path, weights_only=True)["args"]
    names = ("dataset", "data_dir", "flip", "recon_loss", "lpips_net", "fid_every")

    def taken(*flags):
        args, given = train.parse_args(["--fit_prior", path, *flags])
        train.read_first_stage(args, given)
        return {name: getattr(args, name) for name in names}
    assert taken() == {name: first[name] for name in names} and first["dataset"] == "folder" and first["flip"] is False
    assert taken("--flip", "--lpips_net", "alex", "--data_dir", "x") == {**taken(), "flip": True, "lpips_net": "alex",
                                                                         "data_dir": "x"}
    assert taken("--dataset", "cifar10") == {**taken(), "dataset": "cifar10", "data_dir": "./data"}
    main(monkeypatch, tmp_path, *data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--flow_length", 0,
         "--latent_layout", "spatial", "--exp_name", "map")
    path_of_map = str(tmp_path / "results/map/last.pth")
    for flags, tokens in (([], 4), (["--preset", "gmm_flow"], 16), (["--flow_seq_len", "2"], 2)):
        args, given = train.parse_args(["--fit_prior", path_of_map, *flags])
        train.read_first_stage(args, given)
        assert (args.latent_layout, args.flow_seq_len) == ("spatial", tokens)
    main(monkeypatch, tmp_path, "--fit_prior", path, "--flow_seq_len", 1, "--flow_length", 1, "--epochs", 1,
         "--device", "cpu", "--no-tensorboard", "--exp_name", "second")
    assert len(history(tmp_path / "results/second")) == 1


def test_second_stage_refuses_what_it_cannot_continue(data, monkeypatch, tmp_path):
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "first")
    first = tmp_path / "results/first/last.pth"
    with pytest.raises(UserError, match="its decoder takes what its flow makes"):
        main(monkeypatch, tmp_path, *flags, "--exp_name", "second", "--fit_prior", first)
    main(monkeypatch, tmp_path, *flags, "--exp_name", "other", "--decode_from", "z0")
    other = tmp_path / "results/other/last.pth"
    with pytest.raises(UserError, match="--latent_dim 8: --fit_prior .* has 4"):
        main(monkeypatch, tmp_path, *flags, "--exp_name", "second", "--fit_prior", other, "--latent_dim", 8)
    with pytest.raises(UserError, match="nothing to fit"):
        main(monkeypatch, tmp_path, *flags, "--exp_name", "second", "--fit_prior", other, "--prior", "standard",
             "--flow_length", 0)
    assert not (tmp_path / "results/second").exists()
    before = other.read_bytes()
    for more in (["--exp_name", "other", "--overwrite"], ["--exp_name", "other", "--save_dir", tmp_path / "results"]):
        with pytest.raises(UserError, match="already holds a run" if "--overwrite" not in more else
                           "--exp_name other: would replace the first stage, --fit_prior .*; choose another name"):
            main(monkeypatch, tmp_path, *flags, *more, "--fit_prior", other)
    main(monkeypatch, tmp_path, *flags, "--flow_length", 0, "--exp_name", "demo")
    with pytest.raises(UserError, match="--exp_name demo: would replace the first stage"):
        main(monkeypatch, tmp_path, "--demo", *flags, "--fit_prior", "results/demo/last.pth", "--overwrite")
    checkpoint = weights(other)
    checkpoint["ema"]["encoder.head.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "diverged.pth", checkpoint)
    with pytest.raises(UserError, match="diverged.pth: its weights are not finite, the training diverged"):
        main(monkeypatch, tmp_path, *flags, "--exp_name", "second", "--fit_prior", tmp_path / "diverged.pth")
    assert other.read_bytes() == before and not (tmp_path / "results/second").exists()


def test_second_stage_on_other_images_is_refused_or_said(data, monkeypatch, tmp_path, folder_of_images, capsys):
    """Its held-out images may be some that the first stage was trained on."""
    folder = tmp_path / "images"
    shutil.copytree(folder_of_images, folder)
    data[data.index("--data_dir") + 1] = str(folder)
    quick = ["--epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *data, *quick, "--flow_length", 0, "--exp_name", "first")
    second = [*TINY, *quick, "--exp_name", "second", "--fit_prior", "results/first/last.pth"]
    (folder / "train" / "class0" / "000.png").rename(folder / "test" / "class0" / "999.png")
    with pytest.raises(UserError, match="not the images that results/first/last.pth was trained on; name the data"):
        main(monkeypatch, tmp_path, *second)
    assert not (tmp_path / "results/second").exists()
    main(monkeypatch, tmp_path, *second, "--data_dir", folder)
    assert "note: --data_dir" in capsys.readouterr().out
    main(monkeypatch, tmp_path, *second, "--data_dir", folder_of_images, "--overwrite", "--epochs", 2, "--stop_epoch", 1)
    assert "note: --data_dir" not in capsys.readouterr().out
    # On resuming, the same file may be named in another way, and from elsewhere.
    (tmp_path / "link").symlink_to("results/first/last.pth")
    (tmp_path / "elsewhere").mkdir()
    main(monkeypatch, tmp_path / "elsewhere", "--save_dir", "../results", "--exp_name", "second", "--resume", "auto",
         "--fit_prior", "../link")
    assert len(history(tmp_path / "results/second")) == 2


def test_second_stage_knows_streamed_images_again(data, monkeypatch, tmp_path, capsys):
    quick = ["--epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *data, *quick, "--flow_length", 0, "--cache_gb", 0, "--exp_name", "first")
    second = [*TINY, *quick, "--fit_prior", "results/first/last.pth", "--overwrite"]
    main(monkeypatch, tmp_path, *second)
    assert "was trained on" not in capsys.readouterr().out
    main(monkeypatch, tmp_path, *second, "--cache_gb", 1)
    assert "note: with --cache_gb 1 (there 0) it is not known whether these are the images" in capsys.readouterr().out


def test_posteriors_too_large_for_the_device_stay_on_the_cpu(monkeypatch):
    model, device, places = CrossFlowVampVAE(3, 8, 4, (8,), num_components=3, flow_length=0), torch.device("cpu"), []
    images = MemoryImages(torch.zeros(7, 3, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(train, "MemoryImages", lambda posteriors, place: places.append(place))
    for gib in (7 * 2 * 4 * 4 / 2 ** 30, 7 * 2 * 4 * 4 / 2 ** 30 - 1e-9):
        train.encode_all(argparse.Namespace(flip=False, img_size=8, cache_gb=gib), model, images, device)
    assert places[0] is device and places[1] == "cpu" and places[1] is not device


def test_a_mixture_that_goes_on_is_not_started_again(data, monkeypatch, tmp_path):
    start, started = train.start_prior, []
    monkeypatch.setattr(train, "start_prior", lambda *args: started.append(1) or start(*args))
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--epochs", 1, "--prior", "mog"]
    main(monkeypatch, tmp_path, *flags, "--decode_from", "z0", "--exp_name", "first")
    first = tmp_path / "results/first/last.pth"
    main(monkeypatch, tmp_path, *flags, "--fit_prior", first, "--lr", 1e-7, "--exp_name", "on")
    assert len(started) == 1
    before, after = weights(first)["ema"], weights(tmp_path / "results/on/last.pth")["model"]
    assert all((before[name] - after[name]).abs().max() < 1e-5 for name in before)
    main(monkeypatch, tmp_path, *flags, "--fit_prior", first, "--flow_embed_dim", 16, "--exp_name", "anew")
    assert len(started) == 2


# -- spikes, extremes, determinism --------------------------------------------------------------------------------------

def test_spike_is_skipped_and_counted(data, monkeypatch, tmp_path):
    parts, step, before, moved = train.loss_parts, train.train_step, [], []

    def spiked(args, model, lpips, x, out):
        result, usage = parts(args, model, lpips, x, out)
        if model.training and len(moved) in (3, 4):
            result["pixel"] = result["pixel"] * (1e6 if len(moved) == 3 else 1e30)     # the second overflows the norm
        return result, usage

    def watched(trainer, *rest):
        old = [p.detach().clone() for p in trainer.parameters]
        moments = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]
        step(trainer, *rest)
        moved.append(not same(old, [p.detach() for p in trainer.parameters]))
        before.append(same(moments, [s["exp_avg"] for s in trainer.optimizer.state.values()]))

    monkeypatch.setattr(train, "loss_parts", spiked)
    monkeypatch.setattr(train, "train_step", watched)
    main(monkeypatch, tmp_path, *data, "--epochs", 2, "--skip_grad_norm", 1e5, "--sample_every", 0, "--no-tensorboard")
    assert moved == [i not in (3, 4) for i in range(10)] and before == [i in (3, 4) for i in range(10)]
    run = tmp_path / "results/CrossVampVAE"
    assert [row["skipped_steps"] for row in history(run)] == ["2", "0"]
    assert all(float(row["grad_norm"]) < 1e4 for row in history(run))
    assert "skipped 2" in (run / "train_log.txt").read_text()


@pytest.mark.parametrize("flags", [
    ("--num_components", 1, "--batch_size", 37), ("--num_components", 100, "--batch_size", 2, "--stop_epoch", 1),
    ("--latent_dim", 2, "--flow_context", "encoder"), ("--hidden_dims", 8, "--blocks_per_stage", 0),
], ids=lambda flags: " ".join(map(str, flags)))
def test_extreme_sizes_train(flags, data, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, *data, *flags, "--epochs", 1, "--sample_every", 0, "--no-tensorboard")
    row = history(tmp_path / "results/CrossVampVAE")[0]
    assert all(np.isfinite(float(row[k])) for k in ("train_loss", "val_loss", "val_kl_raw"))


@pytest.mark.parametrize(("count", "pixels"), [(1, 0), (20, 128)])
def test_constant_images_and_a_single_image_train(count, pixels, monkeypatch, tmp_path):
    for i in range(count):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), pixels, np.uint8)).save(path)
    main(monkeypatch, tmp_path, "--dataset", "folder", "--data_dir", tmp_path / "images", "--img_size", 8, *TINY,
         "--epochs", 2, "--no-tensorboard")
    rows = history(tmp_path / "results/CrossVampVAE")
    assert all(np.isfinite(float(row[k])) for row in rows for k in ("train_loss", "val_loss", "val_kl_raw"))


@pytest.mark.parametrize("flags", [(), pytest.param(ON_A_GPU, marks=pytest.mark.gpu)], ids=" ".join)
def test_deterministic_runs_are_equal_and_say_so(flags, data, monkeypatch, tmp_path, capsys):
    """One of them is interrupted and goes on."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")           # the user's own setting stays
    seen = []
    step = train.train_step

    def watched(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        step(*arguments)

    monkeypatch.setattr(train, "train_step", watched)
    try:
        for name, *stops in (("a",), ("b", "--stop_epoch", 1), ("b", "--resume", "auto")):
            main(monkeypatch, tmp_path, *data, *flags, "--epochs", 2, "--warmup_epochs", 1, "--deterministic", "--exp_name",
                 name, "--sample_every", 0, "--no-tensorboard", *stops)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen and all(seen) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    out = capsys.readouterr().out
    assert "deterministic" in out and "note: " not in out           # nothing of what the GPU is to use was given up
    assert_same_run(tmp_path / "results/a", tmp_path / "results/b")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--compile", "--channels_last"), ("--channels_last",)], ids=" ".join)
def test_fast_paths_learn_the_same(flags, data, monkeypatch, tmp_path):
    """The losses of 200 steps agree to within rounding that grows with the steps."""
    common = [*data, "--epochs", 40, "--lr", 1e-3, "--warmup_epochs", 0, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *common, "--exp_name", "eager")
    main(monkeypatch, tmp_path, *common, "--exp_name", "fast", *flags)
    ours, theirs = history(tmp_path / "results/eager"), history(tmp_path / "results/fast")
    for column in ("train_loss", "val_loss", "kl_raw"):
        for a, b in zip(ours, theirs):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-2), (column, a["epoch"])


@pytest.mark.parametrize("flags", [pytest.param(("--device", "cpu", "--amp", "bf16"), marks=pytest.mark.slow),
                                   pytest.param(ON_A_GPU, marks=pytest.mark.gpu)], ids=" ".join)
def test_bf16_learns_what_float32_does(flags, data, monkeypatch, tmp_path, capsys):
    """Over 200 steps bf16 (on a GPU with compiler, CUDA graph and the flow's kernels) stays far nearer to the plain float32
    run of the same seed than another seed does, and ends no worse."""
    common = [*data, *WITH_KERNELS, "--epochs", 40, "--lr", 1e-3, "--warmup_epochs", 0, "--sample_every", 0, "--no-tensorboard"]
    float32 = ["--device", flags[1], "--amp", "none", "--no-compile", "--no-channels_last", "--no-cuda_graph",
               "--no-fused_flow"]
    runs = {"float32": float32, "other seed": [*float32, "--seed", 1], "fast": flags}
    for name, own in runs.items():
        main(monkeypatch, tmp_path, *common, *own, "--exp_name", name)
    assert "going on without" not in capsys.readouterr().out
    for column in ("train_loss", "val_loss", "kl_raw"):
        exact, other, fast = (np.array([float(row[column]) for row in history(tmp_path / "results" / name)]) for name in runs)
        away, noise = np.abs(fast - exact).mean(), np.abs(other - exact).mean()
        print(f"{column}: {exact[0]:.3f} -> {exact[-1]:.3f}, fast {fast[-1]:.3f}; differs by {away:.4f}, seeds {noise:.4f}")
        assert 0 < away < 0.5 * noise, column
        assert fast[-1] == pytest.approx(exact[-1], rel=0.03), column


@pytest.mark.parametrize("flag, possible, fused", [((), True, True), (("--no-fused_lpips",), True, False),
                                                   ((), False, False), (("--fused_lpips",), False, False)])
def test_lpips_is_fused_where_it_can_be(flag, possible, fused, data, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(train, "can_fuse_lpips", lambda *_: possible)
    monkeypatch.setattr(train, "speed_up", lambda _trainer, _blank, _amp, _flow, lpips, *_: asked.append(lpips))
    main(monkeypatch, tmp_path, *data, *flag, "--epochs", 1, "--sample_every", 0, "--exp_name", "a")
    assert asked == [fused] == [json.loads((tmp_path / "results/a/args.json").read_text())["fused_lpips"]]
    said = capsys.readouterr().out
    assert ("note: --fused_lpips needs LPIPS" in said) == ("--fused_lpips" in flag) and (" fused_lpips" in said) == fused


@pytest.mark.parametrize("computes", [True, False, None])
def test_bf16_on_a_cpu_is_said_to_be_slow_where_it_is(computes, data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "cpu_computes_bf16", lambda: computes)
    for amp in ("bf16", "auto"):
        main(monkeypatch, tmp_path, *data, "--device", "cpu", "--amp", amp, "--epochs", 1, "--sample_every", 0,
             "--exp_name", amp)
        said = capsys.readouterr().out
        assert ("many times slower" in said) == (amp == "bf16" and computes is False)
        assert "this CPU computes in bf16 too" not in said                    # without LPIPS it gains little


@pytest.mark.parametrize("device, capability, amp, wanted, said", [
    ("mps", None, "bf16", False, "note: --amp bf16 is not supported on MPS; going on in float32"),
    ("mps", None, "auto", False, ""),
    ("cuda", (7, 5), "bf16", True, "note: --amp bf16 may be slower than float32 on this GPU, which only emulates it"),
    ("cuda", (7, 5), "auto", False, ""), ("cuda", (8, 0), "bf16", True, ""), ("cuda", (8, 0), "auto", True, ""),
    ("cuda", (8, 0), "none", False, "")])
def test_bf16_by_device(device, capability, amp, wanted, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    args = train.parse_args(["--amp", amp])[0]
    assert train.settle(args, torch.device(device)) is wanted
    assert capsys.readouterr().out.strip() == said


@pytest.mark.parametrize("flow_length", [0, 1])
def test_second_stage_in_bf16(flow_length, data, monkeypatch, tmp_path):
    """Without a flow none of the trained weights is one that autocast rounds."""
    flags = [*data, "--sample_every", 0, "--no-tensorboard", "--flow_length", 0, "--prior", "mog"]
    main(monkeypatch, tmp_path, *flags, "--epochs", 1, "--exp_name", "first")
    main(monkeypatch, tmp_path, "--fit_prior", tmp_path / "results/first/last.pth", "--fid_every", 0, "--epochs", 2,
         "--prior", "mog", "--batch_size", 8, "--sample_every", 0, "--no-tensorboard", "--flow_length", flow_length,
         "--flow_seq_len", 1, "--flow_embed_dim", 8, "--flow_heads", 2, "--flow_layers", 1, "--amp", "bf16",
         "--exp_name", "second")
    losses = [float(row["train_loss"]) for row in history(tmp_path / "results/second")]
    assert losses[1] < losses[0]


def test_failing_compiler_is_a_note(data, monkeypatch, tmp_path, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", broken)
    flags = [*data, "--epochs", 1, "--sample_every", 0, "--no-tensorboard"]
    main(monkeypatch, tmp_path, *flags, "--compile", "--exp_name", "a")
    assert "note: torch.compile fails here (RuntimeError: no compiler here); going on without it" in capsys.readouterr().out
    main(monkeypatch, tmp_path, *flags, "--exp_name", "b")
    assert_same_run(tmp_path / "results/a", tmp_path / "results/b")
