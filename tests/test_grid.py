"""tests/benchmarks/grid.py: tiny grids through its real command line, and the table made of them."""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

import train
from csv_analysis import sharpness
from utils import UserError, write_json

SCRIPT = str(ROOT / "tests" / "benchmarks" / "grid.py")
spec = importlib.util.spec_from_file_location("grid", SCRIPT)
grid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grid)

OWN = ["--preset", "digits", "--num_samples", "40"]
COMMON = ["--", "--epochs", "2", "--hidden_dims", "8", "12", "--latent_dim", "4", "--num_components", "5",
          "--flow_seq_len", "1", "--flow_embed_dim", "8", "--no-tensorboard"]
GOOD = ["CrossVampVAE"]

# The distance of mean images: quick, and easily computed again.
DISTANCE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
real, fake = (np.mean([np.asarray(Image.open(p), float) for p in Path(f).glob("*.png")], 0) for f in sys.argv[1:])
print("some other words")
print(json.dumps({"gap": np.abs(real - fake).mean()}))
"""


def call(*arguments):
    """grid.py in this process, which spares an import of torch; all that it runs are processes of their own.
    -> exit code, standard output, standard error."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before, handlers, code = sys.argv, [signal.getsignal(s) for s in signals], 0
    sys.argv = [SCRIPT, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            grid.run(grid.main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
        for s, handler in zip(signals, handlers):
            signal.signal(s, handler)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of a broken variant and a good one after it: its folder, exit code and what it printed. The good one finds
    what a run leaves that was killed before its first checkpoint."""
    out = tmp_path_factory.mktemp("grid") / "out"
    lost = out / "runs" / "CrossVampVAE_s0"
    lost.mkdir(parents=True)
    (lost / "history.csv").write_text("epoch\n1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        result = call("--out", out, *OWN, "--only", "broken", *GOOD, "--extra", "broken: --latent_dim -3", *COMMON)
    return argparse.Namespace(out=out, **dict(zip(("code", "stdout", "stderr"), result)))


def pair(out, name):
    return json.loads((out / "pairs" / f"{name}.json").read_text())


def images(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def gaussian_distance(a, b):
    """The Fréchet distance of two sets of points without any covariance: the trace of the matrix square root is the sum of
    the singular values of the centred points' inner products."""
    x, y = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross


def test_pixel_distance_sees_contrast_and_colour(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(65, 186, (50, 16, 16, 3)).repeat(3, 1).repeat(3, 2)                 # 48x48: three pixels to one
    variants = {"a": a, "loud": 2 * (a - 125) + 125, "red": a + [30, 0, 0]}
    for name, arrays in variants.items():
        (tmp_path / name).mkdir()
        for i, x in enumerate(arrays):
            Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    found = {name: grid.pixel_statistics(tmp_path / name) for name in variants}
    assert found["a"][1].shape == (768, 768)
    assert grid.frechet_distance(*found["a"], *found["a"]) == pytest.approx(0, abs=1e-6)
    assert grid.frechet_distance(*found["a"], *found["red"]) == pytest.approx(256 * (30 / 255) ** 2, rel=1e-3)
    centred = (a[:, ::3, ::3] / 255).reshape(50, -1)
    spread = np.trace(np.cov(centred.T))
    shift = ((centred.mean(0) - 125 / 255) ** 2).sum()
    assert grid.frechet_distance(*found["a"], *found["loud"]) == pytest.approx(spread + shift, rel=1e-3)


def state(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts}


@pytest.mark.slow
def test_interrupted_pair_is_resumed(finished, tmp_path):
    """And ends with the numbers of the pair that was not interrupted."""
    def start():
        return subprocess.Popen([sys.executable, SCRIPT, "--out", tmp_path, *OWN, "--only", *GOOD, *COMMON], text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})

    log, deadline = tmp_path / "runs/CrossVampVAE_s0/train_log.txt", time.monotonic() + 120
    process = start()
    while not log.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in stderr and "Traceback" not in stderr
    record = pair(tmp_path, "CrossVampVAE_s0")
    assert list(record["steps"]) == ["train"] and not record["steps"]["train"]["done"] and not record["finished"]
    process = start()
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    step = int((tmp_path / "logs/CrossVampVAE_s0.txt").read_text().split("resumed at epoch 0, step ")[1].split("\n")[0])
    steps = pair(tmp_path, "CrossVampVAE_s0")["steps"]
    assert 0 < step < 25 and steps["train"]["attempts"] == 2 and steps["export"]["attempts"] == 1
    resumed, whole = (pd.read_csv(out / "grid.csv").set_index("variant") for out in (tmp_path, finished.out))
    assert resumed.loc[GOOD, list(grid.HISTORY)].equals(whole.loc[GOOD, list(grid.HISTORY)])


def test_run_killed_before_it_saved_starts_again(finished):
    """Such a run has a history but nothing to resume from."""
    assert pd.read_csv(finished.out / "runs/CrossVampVAE_s0/history.csv")["epoch"].tolist() == [1, 2]


def test_run_with_an_older_checkpoint_alone_is_named_and_left_as_it_is(finished, tmp_path):
    """step_*.pth is what a lost or damaged last.pth leaves to go on from."""
    run = tmp_path / "runs/CrossVampVAE_s0"
    run.mkdir(parents=True)
    shutil.copy(finished.out / "runs/CrossVampVAE_s0/last.pth", run / "step_000000025.pth")
    shutil.copy(finished.out / "runs/CrossVampVAE_s0/history.csv", run)
    before = state(run)
    code, _, error = call("--out", tmp_path, *OWN, "--only", *GOOD, *COMMON)
    assert code == 2 and "CrossVampVAE_s0: train: error: " in error and "no last.pth" in error and state(run) == before


def check_table(out, variants):
    """grid.csv and grid.md against the files that the runs left, and the pictures."""
    table = pd.read_csv(out / "grid.csv").set_index("variant")
    assert table.index.tolist() == variants
    text = (out / "grid.md").read_text()
    for name, row in table.iterrows():
        last = pd.read_csv(out / f"runs/{name}_s0/history.csv").iloc[-1]
        for column in grid.HISTORY:
            assert row[column] == pytest.approx(last[column], rel=1e-12), column
            assert math.isnan(row[f"{column}_std"])             # one seed
        assert f"| {name} | 0 | {last['val_loss']:.4g} |" in text
        checkpoint = torch.load(out / f"runs/{name}_s0/last.pth", weights_only=True)
        moments = checkpoint["optimizer"]["state"].values()     # one for each parameter, none for a buffer
        assert row["parameters"] == sum(m["exp_avg"].numel() for m in moments)
        fake, real = (sharpness(images(out / "images" / folder))["lap_var"].mean()
                      for folder in (f"{name}_s0/samples", "real_test"))
        assert row["sharpness_ratio"] == pytest.approx(fake / real, rel=1e-9)
        for what, folder in (("samples", f"{name}_s0/samples"), ("recon", f"{name}_s0/reconstructions"),
                             ("real", "real_train_40")):
            a, b = (images(out / "images" / where).reshape(-1, 16 * 16 * 3) / 255 for where in ("real_test", folder))
            assert row[f"pixel_{what}"] == pytest.approx(gaussian_distance(a, b), rel=1e-4)
        record = pair(out, f"{name}_s0")
        assert 0 < row["train_s"] == pytest.approx(record["steps"]["train"]["seconds"], rel=1e-12)
        counts = {d: len(images(out / "images" / f"{name}_s0" / d)) for d in ("samples", "reconstructions")}
        assert counts == {"samples": 40, "reconstructions": 40}
        manifest = json.loads((out / f"images/{name}_s0/reconstructions/manifest.json").read_text())
        assert (manifest["split"], manifest["latent"]) == ("train", "one sample of the posterior, seed 0")
    diagnostics = [p["diagnostics"] for p in json.loads((out / "grid.json").read_text())["pairs"]]
    assert [d["latent_dim"] for d in diagnostics] == [4] * len(variants)
    for name, panels in (("samples.png", 1 + len(variants)), ("pseudo.png", 1)):
        with Image.open(out / name) as picture:
            assert picture.width == 480 * panels
    with Image.open(out / "curves.png") as picture:
        assert picture.size == (3 * 450, 405) and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_table_holds_the_numbers_of_the_runs(finished):
    check_table(finished.out, GOOD)


def test_failed_variant_is_named_and_the_others_go_on(finished):
    assert finished.code == 2
    assert "1 failed" in finished.stderr and "broken_s0: train: error: --latent_dim -3" in finished.stderr
    lines = finished.stdout.splitlines()
    failure = next(i for i, line in enumerate(lines) if "FAILED" in line)
    assert "broken_s0" in lines[failure] and any("CrossVampVAE_s0: train" in line for line in lines[failure:])
    assert not pair(finished.out, "broken_s0")["finished"]


def test_second_invocation_does_nothing_again(finished):
    before = {name: state(finished.out / name) for name in ("runs", "images", "sharpness", "pairs")}
    table = (finished.out / "grid.csv").read_bytes()
    code, printed, _ = call("--out", finished.out, *OWN, "--only", *GOOD, *COMMON)
    assert code == 0 and printed.count("finished before") == 1
    assert {name: state(finished.out / name) for name in before} == before
    assert (finished.out / "grid.csv").read_bytes() == table
    (finished.out / "grid.csv").unlink()
    assert call("--out", finished.out, "--collect")[0] == 0
    assert (finished.out / "grid.csv").read_bytes() == table
    assert {name: state(finished.out / name) for name in before} == before


def test_runs_with_other_flags_are_never_mixed(finished):
    before = state(finished.out / "runs")
    code, _, error = call("--out", finished.out, *OWN, "--only", *GOOD, *COMMON, "--lr", "0.001")
    assert code == 2 and "other common flags" in error and "--lr 0.001" in error
    record = finished.out / "pairs" / "CrossVampVAE_s0.json"
    kept = record.read_text()
    write_json(record, json.loads(kept) | {"flags": "--flow_length 3"})
    code, _, error = call("--out", finished.out, *OWN, "--only", *GOOD, *COMMON)
    record.write_text(kept)
    assert code == 2 and "CrossVampVAE_s0: was trained with other flags (--flow_length 3" in error
    code, _, error = call("--out", finished.out, *OWN, "--only", *GOOD, *COMMON, "--exp_name", "x")
    assert code == 2 and "--exp_name" in error
    assert state(finished.out / "runs") == before


@pytest.mark.slow
def test_distances_and_another_variant_are_added(finished, tmp_path, monkeypatch):
    """Asked for later: what is trained is not trained again, each distance is that of the right two folders."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "distance.py").write_text(DISTANCE)
    before = state(finished.out / "runs/CrossVampVAE_s0")
    distance = ["--distance", f"python '{tmp_path / 'distance.py'}' {{real}} {{fake}}", "--distance_key", "gap"]
    code, _, error = call("--out", finished.out, *OWN, "--jobs", 2, "--only", "CrossVampVAE", "VAE", *distance, *COMMON)
    assert code == 0, error
    check_table(finished.out, ["VAE", "CrossVampVAE"])
    after = state(finished.out / "runs/CrossVampVAE_s0")
    assert {p for p in before if before[p] != after[p]} <= {p for p in before if p.parent.name == "test"}
    table = pd.read_csv(finished.out / "grid.csv").set_index("variant")
    folder = finished.out / "images"
    for name in ("VAE", "CrossVampVAE"):
        for column, real, fake in (("gap_samples", "real_test", "samples"), ("gap_recon", "real_test", "reconstructions"),
                                   ("gap_train", "real_train_40", "samples"), ("gap_bypassed", "real_test", "bypassed")):
            if (name, fake) == ("VAE", "bypassed"):             # which has no flow
                assert math.isnan(table.loc[name, column]) and not (folder / f"{name}_s0" / fake).exists()
                continue
            a, b = (images(folder / f).astype(float).mean(0) for f in (real, f"{name}_s0/{fake}"))
            assert table.loc[name, column] == pytest.approx(np.abs(a - b).mean(), rel=1e-9)
    manifest = json.loads((folder / "CrossVampVAE_s0" / "bypassed" / "manifest.json").read_text())
    assert manifest["latent"] == "one sample of the posterior, seed 0, flow bypassed"
    assert table.loc["VAE", "val_log_det"] == 0 != table.loc["CrossVampVAE", "val_log_det"]
    assert len(images(folder / "real_train_40")) == 40 and "distance.py" in (finished.out / "grid.md").read_text()


@pytest.mark.parametrize("length, decode_from, seen", [(2, "zK", True), (2, "z0", False), (0, "zK", False)])
def test_the_flow_is_bypassed_only_where_the_decoder_sees_it(length, decode_from, seen, monkeypatch):
    args = argparse.Namespace(distance=["d", "{real}", "{fake}"], distance_key="fd", num_samples=4, do_pictures=False)
    monkeypatch.setattr(grid.Pair, "args", lambda _: {"flow_length": length, "decode_from": decode_from})
    of = object.__new__(grid.Pair)
    of.name, of.seed, of.run, of.images = "x_s0", 0, Path("run"), Path("images")
    of.grid = argparse.Namespace(args=args, real=lambda split: Path(split), device="cpu", out=Path("out"),
                                 sharpness_command=lambda *_: [])
    steps = [name for name, _, _ in of.later_steps()]
    assert [s for s in steps if "bypass" in s] == ["bypass", "fd_bypassed"] * seen
    assert {"fd_samples", "fd_recon", "fd_train"} <= set(steps)


def test_parse_number():
    assert grid.parse_number('loading\n{"fd": 2.5, "n": 3}\n{"fd": 1.5}\nbye', "fd") == 1.5
    for output, words in (('{"a": 1, "b": 2}', "among a, b"), ('{"fd": NaN}', "no such number"), ("1.5", "JSON object")):
        with pytest.raises(UserError, match=words):
            grid.parse_number(output, "fd")


def test_mean_and_spread_over_seeds():
    def record(variant, seed, **values):
        names = (*grid.HISTORY, "sharpness_ratio", "train_s", "parameters")
        return {"variant": variant, "seed": seed, "values": dict.fromkeys(names, 1.0) | values}

    table = grid.table_of([record("b", 0, val_loss=1.0, fd_recon=3.0), record("b", 1, val_loss=2.0, fd_recon=3.0),
                           record("b", 4, val_loss=6.0, fd_recon=3.0), record("a", 0, val_loss=5.0)]).set_index("variant")
    assert table.index.tolist() == ["b", "a"] and table["seeds"].tolist() == ["0 1 4", "0"]
    assert table.loc["b", "val_loss"] == 3 and table.loc["b", "val_loss_std"] == pytest.approx(math.sqrt(7))
    assert (table.loc["b", "fd_recon"], table.loc["b", "fd_recon_std"]) == (3, 0)
    assert all(math.isnan(table.loc["a", c]) for c in ("val_loss_std", "fd_recon", "fd_recon_std"))
    cells = [grid.cell(29.53499, 0.1234), grid.cell(12345.6, 0.0), grid.cell(0.5, math.nan), grid.cell(math.nan, math.nan),
             grid.cell(2361, 120.4), grid.cell(999.96, 99.6)]
    assert cells == ["29.53 ± 0.12", "12,346", "0.5", "", "2,361 ± 120", "1000 ± 100"]


def test_variants():
    def choose(lpips="vgg", **flags):
        args = argparse.Namespace(**{"preset": "none", "flow_lengths": None, "only": None, "extra": [], **flags})
        return grid.choose_variants(args, argparse.Namespace(lpips_net=lpips))

    assert {"flow_4", "flow_16", "no_lpips"} <= set(choose()) and "no_lpips" not in choose("none")
    assert {"flow_1", "flow_4", "flow_8"} <= set(choose(preset="digits")) and "flow_16" not in choose(preset="digits")
    assert choose(flow_lengths=[3], only=["flow_3", "mine"], extra=["mine: --lr 1 --prior mog"]) == {
        "flow_3": ["--flow_length", "3"], "mine": ["--lr", "1", "--prior", "mog"]}
    for flags, words in ((dict(only=["VEA"]), "VEA"), (dict(extra=["VAE: --lr 1"]), "there is a variant"),
                         (dict(extra=["../x: --lr 1"]), "NAME"), (dict(extra=["--lr 1"]), "NAME")):
        with pytest.raises(UserError, match=words):
            choose(**flags)
    # Every variant is one that train.py takes, whatever is common to all.
    for flags in choose().values():
        train.check_flags(*grid.parse_train_flags(["--lpips_net", "squeeze", "--lpips_weight", "20", "--lpips_linear", "False",
                                                   *flags]))


def some_pair(monkeypatch, variant="VAE", seed=7):
    """A Pair of a model with a flow, of which nothing lies on the disk."""
    monkeypatch.setattr(grid.Pair, "args", lambda _: {"flow_length": 2, "decode_from": "zK"})
    args = argparse.Namespace(distance=["d", "{real}", "{fake}"], distance_key="fd", num_samples=4, do_pictures=False)
    of = object.__new__(grid.Pair)
    of.name, of.variant, of.seed, of.run, of.images = f"{variant}_s{seed}", variant, seed, Path("run"), Path("images")
    of.grid = argparse.Namespace(args=args, real=lambda split: Path(f"real_{split}"), device="cpu", out=Path("out"),
                                 sharpness_command=lambda *_: [], common=["--epochs", "3", "--prior", "mog"],
                                 variants=grid.VARIANTS)
    return of


def flag(command, name):
    return command[command.index(f"--{name}") + 1]


def test_each_distance_is_of_the_folders_it_names(monkeypatch):
    steps = {step: command for step, command, _ in some_pair(monkeypatch).later_steps()}
    assert {step: command[1:] for step, command in steps.items() if step.startswith("fd_")} == {
        "fd_samples": ["real_test", "images/samples"], "fd_recon": ["real_test", "images/reconstructions"],
        "fd_train": ["real_train", "images/samples"], "fd_bypassed": ["real_test", "images/bypassed"]}
    for step, folder, flow in (("export", "reconstructions", None), ("bypass", "bypassed", "bypassed")):
        command = steps[step]
        assert [flag(command, f"recon_{name}") for name in ("split", "latent", "dirname")] == ["train", "sample", folder]
        assert flag(command, "num_recon") == "4"
        assert flow is None or flag(command, "recon_flow") == flow


def test_each_seed_and_variant_is_trained_and_sampled_as_such(monkeypatch):
    for seed in (0, 7):
        pair = some_pair(monkeypatch, "VAE", seed)
        assert flag(pair.train_command(), "seed") == flag(pair.test_command(), "seed") == str(seed)
        args = train.parse_args(pair.train_command()[2:])[0]
        assert (args.seed, args.prior, args.flow_length, args.epochs, args.exp_name) == (seed, "standard", 0, 3, f"VAE_s{seed}")


def test_variants_change_what_their_names_say():
    plain = vars(train.parse_args([])[0])
    changes = {name: {k: v for k, v in vars(train.parse_args(flags)[0]).items() if v != plain[k]}
               for name, flags in (grid.VARIANTS | grid.NO_LPIPS).items()}
    assert changes == {"VAE": {"prior": "standard", "flow_length": 0}, "VampVAE": {"flow_length": 0}, "CrossVampVAE": {},
                       "amortised": {"flow_context": "encoder"}, "pushed": {"flow_prior": "pushed"}, "mog": {"prior": "mog"},
                       "K10": {"num_components": 10}, "K500": {"num_components": 500},
                       "no_lpips": {"lpips_net": "none", "lpips_weight": 0}}


def test_table_has_finished_pairs_only_variants_in_their_order_and_numbers_as_numbers(tmp_path, capsys):
    (tmp_path / "pairs").mkdir()
    for variant, seed, finished in (("mog", 0, True), ("flow_16", 0, True), ("flow_4", 10, True), ("flow_4", 9, True),
                                    ("VAE", 1, True), ("VAE", 0, False)):
        write_json(tmp_path / f"pairs/{variant}_s{seed}.json", {"variant": variant, "seed": seed, "finished": finished,
                                                                "values": {"pixel_real": 0.1}})
    write_json(tmp_path / "pairs/old_s3.json", {"variant": "old", "seed": 3, "finished": True, "values": {"pixel_recon": 1}})
    assert [(r["variant"], r["seed"]) for r in grid.finished_pairs(tmp_path)] == [
        ("VAE", 1), ("mog", 0), ("flow_4", 9), ("flow_4", 10), ("flow_16", 0)]
    assert "left out, measured otherwise by an older version of this program: old_s3;" in capsys.readouterr().err


def test_readers_table_has_mean_and_spread_under_each_heading(tmp_path):
    columns = (*grid.HISTORY, "pixel_samples", "pixel_recon", "pixel_real", "sharpness_ratio", "train_s", "parameters")
    records = [{"variant": "VAE", "seed": seed, "flags": "", "common": "", "steps": {}, "num_samples": 1,
                "machine": {"versions": {"torch": "2"}, "device_used": "cpu"},
                "values": {name: 10.0 * i + seed for i, name in enumerate(columns)}} for seed in (0, 2)]
    head, _, row, *_ = (line.strip("| ").split(" | ") for line in grid.markdown(grid.table_of(records), records, tmp_path)
                        .splitlines())
    assert row[:2] == ["VAE", "0 2"] and dict(zip(head[2:], row[2:])) == {
        heading: f"{10 * columns.index(name) + 1} ± 1.4" for name, heading in {
            **{n: grid.HEADINGS[n] for n in columns}, "val_loss": "val_loss", "val_recon": "reconstruction",
            "val_kl_raw": "KL_Raw, nats", "pixel_samples": "pixel FD samples", "pixel_recon": "pixel FD reconstructions",
            "pixel_real": "pixel FD training images",
            "sharpness_ratio": "sharpness / real", "train_s": "training, s", "parameters": "parameters"}.items()}


def test_held_out_images_of_other_data_are_refused(tmp_path, monkeypatch):
    pair = some_pair(monkeypatch)
    pair.run, pair.grid.real = tmp_path / "run", lambda split: tmp_path / split
    (tmp_path / "run/test").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    write_json(tmp_path / "test/manifest.json", {"data": "a"})
    for data in "ab":
        write_json(tmp_path / f"{data}.json", {"protocol": {"data": data}})
    diagnostics = tmp_path / "run/test/diagnostics.json"
    (tmp_path / "a.json").rename(diagnostics)
    pair.require_same_data()
    (tmp_path / "b.json").rename(diagnostics)
    with pytest.raises(UserError, match="not those of the rest of the grid"):
        pair.require_same_data()
