"""tests/benchmarks/: every script, on next to nothing, prints JSON lines alone, each with what a line has to say."""
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lpips
import pytest
import torch
from conftest import ROOT, run_script, write_images

from utils import hub_file, sha256_file

FOLDER = ROOT / "tests/benchmarks"
spec = importlib.util.spec_from_file_location("stand_in", FOLDER / "stand_in.py")
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)
LINE = {"case", "count", "per_second", "best_per_second", "peak_memory_mb", "rounds", "device", "threads", "versions"}
PLAIN = {"plain_per_second", "plain_peak_memory_mb", "ratio_to_plain"}
NETWORK = ["--img_size", 8, "--hidden_dims", 8, 12, "--latent_dim", 4, "--flow_length", 1, "--flow_seq_len", 1,
           "--flow_embed_dim", 8, "--flow_heads", 2, "--flow_layers", 1, "--batch_size", 4, "--device", "cpu"]
SCRIPTS = {                     # flags, cases of the lines, those that are set against a plain way
    "bench_sharpness": (["--images", 12, "--naive", 6, "--repeat", 2, "--workers", 1], ["sharpness"], {"sharpness"}),
    "bench_pr": (["--n", 60, "--m", 50, "--dims", 8, "--case", "gauss", "collapsed"], ["gauss", "collapsed"],
                 {"gauss", "collapsed"}),
    "bench_export": (["--images", 20, "--size", 16, "--repeat", 1], ["write", "sample", "export"], {"write", "export"}),
    "bench_data": (["--images", 150, "--size", 8, "--rounds", 1], ["decode", "batches"], {"decode", "batches"}),
    "bench_fid": (["--images", 4, "--dims", 64, "--rounds", 1, "--device", "cpu"], ["fid features"], {"fid features"}),
    "bench_fid --variants": (["--variants", "--images", 4, "--dims", 64, "--rounds", 1, "--device", "cpu"],
                             [f"fid features: {number}{search}, {layout}" for number in ("float32", "TF32")
                              for search in ("", ", search") for layout in ("contiguous_format", "channels_last")], set()),
    "bench_train": ([*NETWORK, "--img_size", 16, "--rounds", 1, "--beside", "--parts", "--profile", "layout",
                     "--cases", "plain", "layout", "own_limits"],
                    ["plain", "layout", "own_limits", "validation", "checkpoint", "part: encoder", "part: flow",
                     "part: prior with its pseudo-inputs", "part: decoder", "part: LPIPS",
                     "part: clipping, optimiser and EMA", "profile: layout"], {"layout", "own_limits"}),
    "bench_scaling": ([*NETWORK, "--lpips_net", "none", "--rounds", 1, "--batch_sizes", 2, "--components", 3, 5,
                       "--flow_lengths", 0, "--images", 130, "--dims", 8],
                      ["batch", "batch", "components", "components", "flow", "images", "images", "images"], set()),
}


QUICK = {"bench_pr", "bench_train"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_benchmark_prints_a_line_of_json_for_each_case(name, tmp_path, fake_hub):
    flags, cases, with_plain = SCRIPTS[name]
    name = name.split()[0]
    if name == "bench_fid":
        fake_hub.inception()
    plot = ["--plot", tmp_path / "scaling.png"] if name == "bench_scaling" else []
    done = run_script(f"tests/benchmarks/{name}.py", *flags, *plot, env=fake_hub.env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == cases
    for line in lines:
        assert line["versions"]["torch"] == torch.__version__.split("+")[0] and "core" in line["device"]
        if line["case"].startswith("profile"):
            assert len(line["share_of_time"]) == 25 and 0.5 < sum(line["share_of_time"].values()) <= 1.001
            continue
        assert line.keys() >= LINE | (PLAIN if line["case"] in with_plain else set())
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float)) and line["per_second"] > 0
    assert not plot or Path(plot[1]).stat().st_size > 10000


def test_stand_in_is_what_lpips_loads(tmp_path, monkeypatch):
    for split, n in (("train", 8), ("test", 2)):
        for name, shift in (("bright", 80), ("dark", -80)):
            write_images(tmp_path / "data" / split / name, n, seed=n, shift=shift)
    flags = ["--data_dir", tmp_path / "data", "--torch_home", tmp_path / "home", "--epochs", 2, "--batch_size", 4,
             "--device", "cpu", "--threads", 1]
    done = run_script("tests/benchmarks/stand_in.py", *flags)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = hub_file("squeezenet1_1-b8a52dc0.pth")
    assert (line["stand_in"], line["sha256"], line["classes"]) == (str(path), sha256_file(path), ["bright", "dark"])
    assert path.stat().st_size < 2e6                     # the convolutions, in float16, and hardly anything else
    stored = torch.load(path, weights_only=True)
    net = lpips.LPIPS(net="squeeze", lpips=False, verbose=False).net
    for name, value in net.state_dict().items():
        layer = name.split(".", 1)[1]                    # slice1.0.weight: the number is that of the layer in the trunk
        assert torch.equal(value, stored[f"features.{layer}"].float())
    done = run_script("tests/benchmarks/stand_in.py", *flags)
    assert done.returncode == 2 and "lies there already" in done.stderr


def test_every_benchmark_is_tested():
    assert {p.stem for p in FOLDER.glob("bench_*.py")} == {name.split()[0] for name in SCRIPTS} | {"bench_compiled"}


@pytest.mark.slow
@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="written for PyTorch 2.14")
def test_what_the_compiler_generates_moves_less_memory():
    """Than with its own limits, in the same parts."""
    found = {}
    for flags in ([], ["--own_limits"]):
        done = run_script("tests/benchmarks/bench_compiled.py", "--batch_size", 64, "--hidden_dims", 16, 32, 64, *flags)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["case"] for line in lines] == ["products", *(f"{part}, {way}" for part in ("encoder", "decoder", "LPIPS")
                                                                  for way in ("forward", "backward")), "all"]
        assert lines[0]["at_least_ms"] > lines[0]["by_arithmetic_ms"] > 0
        parts, total = lines[1:-1], lines[-1]
        assert total["kernels"] == sum(line["kernels"] for line in parts)
        assert total["gigabytes"] == pytest.approx(sum(line["gigabytes"] for line in parts), rel=1e-2)
        found[bool(flags)] = {line["case"]: line["gigabytes"] for line in parts}
    for part in ("encoder", "decoder"):
        assert found[False][f"{part}, backward"] < 0.8 * found[True][f"{part}, backward"]
    assert found[False]["LPIPS, forward"] == found[True]["LPIPS, forward"]


def test_report_of_known_times(monkeypatch, capsys):
    """Medians, and the ratio of neighbouring rounds: the third round met a machine ten times slower."""
    monkeypatch.syspath_prepend(FOLDER)
    import report
    monkeypatch.delitem(sys.modules, "report")
    ours, plain = (report.Timing(seconds, [0.5] * 3, 10.0, None) for seconds in ([1, 2, 10], [4, 2, 40]))
    report.report("x", 100, ours, torch.device("cpu"), plain, 50, extra=7)
    line = json.loads(capsys.readouterr().out)
    assert line["per_second"] == 50 and line["best_per_second"] == 100 and line["cpu_us_each"] == 5000 and line["extra"] == 7
    assert line["plain_per_second"] == 12.5 and line["ratio_to_plain"] == 8     # 4 times as fast at twice the images


def test_stand_in_learns_in_the_normalisation_of_lpips():
    model, theirs = stand_in.Classifier("squeeze", 32, 2), lpips.ScalingLayer()
    assert torch.equal(model.shift, theirs.shift) and torch.equal(model.scale, theirs.scale)
    layers = {net: len(stand_in.Classifier(net, 64, 2).trunk) for net in ("vgg", "alex", "squeeze")}
    assert layers == {"vgg": 30, "alex": 12, "squeeze": 13}   # all but the pooling at the end, if there is one


def test_augmented_images_are_flipped_or_not_and_shifted_by_up_to_an_eighth():
    x = torch.zeros(2000, 1, 16, 16)
    x[:, :, 8, 6] = 1
    found = [tuple(i.nonzero()[0].tolist()) for i in stand_in.augment(x, torch.Generator().manual_seed(0))[:, 0]]
    assert set(found) == {(8 + dy, column + dx) for column in (6, 9) for dy in range(-2, 3) for dx in range(-2, 3)}
    image = torch.rand(1, 3, 16, 16)
    seen = {tuple(stand_in.augment(image, torch.Generator().manual_seed(s))[0, :, 8, 8].tolist()) for s in range(200)}
    whole = {tuple(image[0, :, y, x].tolist()) for y in range(16) for x in range(16)}
    assert seen <= whole and len(seen) > 25                                                   # channels stay together


def test_accuracy_of_the_stand_in_is_of_held_out_images(tmp_path, monkeypatch, capsys):
    class Brightness(torch.nn.Module):
        def __init__(self, *_):
            super().__init__()
            self.trunk, self.none = torch.nn.Sequential(), torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0]) + self.none

    for split in ("train", "test"):
        for name, shift in (("bright", 90), ("dark", -90)):
            write_images(tmp_path / split / name, 4, size=8, shift=shift)
    shutil.copy(tmp_path / "test/dark/00000.png", tmp_path / "test/bright/00000.png")         # one of eight is not what it says
    monkeypatch.setattr(stand_in, "Classifier", Brightness)
    monkeypatch.setattr(sys, "argv", ["stand_in.py", *map(str, (
        "--data_dir", tmp_path, "--torch_home", tmp_path / "home", "--epochs", 1, "--batch_size", 4, "--device", "cpu",
        "--img_size", 8))])
    stand_in.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["held_out_accuracy"], line["images"]) == (0.875, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="for machines with CUDA")
def test_all_that_needs_a_gpu_in_one_command(tmp_path):
    """With a stand-in for Python: every step is run and leaves its files, one that fails is named, and the others go on."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/usr/bin/env bash\necho "$@"\necho "a word" >&2\n[[ "$*" != *bench_pr* ]]\n')
    python.chmod(0o755)

    def gpu(*arguments):
        return subprocess.run(["bash", FOLDER / "gpu.sh", "out", *arguments], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"})

    unknown = gpu("fid", "nothing")
    assert unknown.returncode == 2 and unknown.stderr.startswith("no step nothing") and not (tmp_path / "out").exists()
    done = gpu()
    assert done.returncode == 1 and done.stdout.endswith("failed: precision_recall\n") and done.stdout.count("a word") == 1
    found = {path.stem: path.read_text().split() for path in (tmp_path / "out").glob("*.jsonl")}
    steps = re.findall(r"^    \[(\w+)\]=", (FOLDER / "gpu.sh").read_text(), re.MULTILINE)
    assert set(found) == {path.stem for path in (tmp_path / "out").glob("*.log")} == set(steps) and len(steps) > 5
    for step, command in found.items():
        named = [word for word in command if word.endswith(".py")]
        assert named and all((ROOT / name).is_file() for name in named), step
        flags = [word for word in command if word.startswith("--")]
        assert all(f'"{flag}"' in (ROOT / named[0]).read_text() for flag in flags), step
