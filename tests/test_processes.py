"""Several processes (torchrun, gloo on the CPU) do what one does: the same losses, the same files, one set of them."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from test_train import TINY, history, main, weights

import train
from utils import LatentHealth, UserError, decode_images, list_images


def torchrun(processes, *flags, cwd, script="train.py", env=None):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           str(processes), str(ROOT / script), *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**(env or os.environ), "OMP_NUM_THREADS": "1"})


@pytest.fixture
def flags(tmp_path):
    write_images(tmp_path / "data/train", 43, size=8, seed=0)
    write_images(tmp_path / "data/test", 9, size=8, seed=1)
    return ["--dataset", "folder", "--data_dir", tmp_path / "data", "--img_size", 8, *TINY, "--epochs", 2, "--warmup_epochs", 1,
            "--no-tensorboard", "--lr", 1e-3, "--free_bits", 0.05, "--sample_every", 2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them")
@pytest.mark.parametrize("ending", ["", "sys.exit(130)"])
def test_gloo_ends_before_the_interpreter(ending, tmp_path):
    """What the threads of the group still hold when Python is gone ends the process with SIGABRT, now and then."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import utils

def threads():
    return len(os.listdir("/proc/self/task"))

def main():
    global before
    before = threads()
    utils.join_processes("cpu")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.cycle = model
    model(torch.ones(1, 2)).sum().backward()
    print("during", threads() > before)
    {ending}

try:
    utils.run(main)
finally:
    if os.environ["RANK"] == "0":
        print("after", threads() > before)
""")
    done = torchrun(2, cwd=tmp_path, script=script)
    assert done.stdout.split("\n")[:2] == ["during True", "after False"], done.stdout + done.stderr


def numbers(rows, column):
    return [float(row[column]) for row in rows]


def assert_close_runs(a, b):
    ours, theirs = history(a), history(b)
    assert len(ours) == len(theirs) and ours[0].keys() == theirs[0].keys()
    for column in ours[0]:
        if ours[0][column]:
            assert numbers(ours, column) == pytest.approx(numbers(theirs, column), rel=2e-4, abs=1e-4), column
    first, second = weights(a / "last.pth"), weights(b / "last.pth")
    for which in ("model", "ema"):
        for name, value in first[which].items():
            torch.testing.assert_close(value, second[which][name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("fid, device", [(False, "cpu"), pytest.param(True, "cpu", marks=pytest.mark.slow), pytest.param(
    True, "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")])])
def test_two_processes_train_as_one(fid, device, flags, monkeypatch, tmp_path, fake_hub):
    """Losses, held-out measures, FID, weights; then one process goes on with what two have begun. On GPUs over NCCL, and in
    float32, without TF32: how the library rounds otherwise depends on the size of the batch."""
    flags = [*flags, "--device", device, "--amp", "none"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if fid:
        fake_hub.inception()
        flags = [*flags, "--fid_every", 1, "--fid_dims", 64, "--fid_samples", 21]
    main(monkeypatch, tmp_path, *flags, "--exp_name", "one")
    two = torchrun(2, *flags, "--exp_name", "two", "--stop_epoch", 1, "--save_dir", "elsewhere", "--resume", "auto",
                   cwd=tmp_path, env={**fake_hub.env, "NVIDIA_TF32_OVERRIDE": "0"})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("self-check") == two.stdout.count("starting from the beginning") == 1
    assert "2 processes" in two.stdout
    run = tmp_path / "elsewhere/two"
    assert {p.name for p in run.iterdir()} >= {"last.pth", "history.csv", "args.json", *(["best_fid.pth"] if fid else [])}
    main(monkeypatch, tmp_path, "--resume", run / "last.pth")
    assert_close_runs(tmp_path / "results/one", run)
    assert any(numbers(history(run), "floor_share")) and not all(v == 1 for v in numbers(history(run), "floor_share"))


@pytest.mark.parametrize("more", [[], ["--refit_weights"], ["--refit_weights", "--gen_batch_size", 8]], ids=str)
def test_two_processes_export_what_one_does(more, flags, monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, *flags, "--epochs", 1)
    common = ["--resume", "results/CrossVampVAE/last.pth", "--num_samples", 1501, "--do_recon", True, "--do_pictures", False,
              "--gen_batch_size", 64, *more]
    one = subprocess.run([sys.executable, ROOT / "test.py", *map(str, common), "--export_dir", "one"], cwd=tmp_path)
    two = torchrun(2, *common, "--export_dir", "two", cwd=tmp_path, script="test.py")
    assert one.returncode == two.returncode == 0, two.stderr
    for name, count in (("real_cifar", 43), ("fake_cifar", 1501), ("recon_cifar", 43)):
        a, b = (decode_images(list_images(tmp_path / where / name)).int() for where in ("one", "two"))
        assert len(a) == len(b) == count and (a - b).abs().max() <= 1
        manifests = [(tmp_path / where / name / "manifest.json").read_text() for where in ("one", "two")]
        assert manifests[0] == manifests[1]


@pytest.mark.slow
@pytest.mark.parametrize("batch, more", [(4, ["--diagnose"]), (50, ["--do_pictures", False])],
                         ids=["many batches", "more processes than batches"])
def test_two_processes_measure_what_one_does(batch, more, flags, monkeypatch, tmp_path, fake_hub):
    """--evaluate, --nll, --diagnose and the pictures. Seven images occur twice, once in each share: ties would show."""
    fake_hub.inception()
    images = tmp_path / "data/train"
    for i in range(7):
        shutil.copy(images / f"{3 * i:05d}.png", images / f"{42 - 3 * i:05d}.png")
    main(monkeypatch, tmp_path, *flags, "--epochs", 1)
    common = ["--resume", "results/CrossVampVAE/last.pth", "--do_real", False, "--do_fake", False, "--num_samples", 50,
              "--evaluate", "--fid_dims", 64, "--pca_dim", 8, "--nll", "--nll_samples", 8, "--nll_fit_images", 20,
              "--gen_batch_size", batch, "--device", "cpu", *more]
    one = subprocess.run([sys.executable, ROOT / "test.py", *map(str, common), "--save_dir", "one"], cwd=tmp_path,
                         capture_output=True, text=True, env=fake_hub.env)
    two = torchrun(2, *common, "--save_dir", "two", cwd=tmp_path, script="test.py", env=fake_hub.env)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("evaluation  ") == two.stdout.count("likelihood  -log") == two.stdout.count("next:") == 1
    files = [sorted(str(p.relative_to(tmp_path / where)) for p in (tmp_path / where).rglob("*")) for where in ("one", "two")]
    assert files[0] == files[1] and ("latent_map.png" in str(files[0])) == ("--diagnose" in more)
    keys = {"evaluation_CrossVampVAE": "metrics", "nll": "nll", "diagnostics": "diagnostics"}
    for name, key in list(keys.items())[:3 if "--diagnose" in more else 2]:
        a, b = (json.loads((tmp_path / where / f"CrossVampVAE/test/{name}.json").read_text()) for where in ("one", "two"))
        assert a["protocol"] == b["protocol"]
        assert a[key].keys() == b[key].keys()
        for number, value in a[key].items():
            if isinstance(value, str | None):
                assert value == b[key][number], number
            elif isinstance(value, dict):
                assert value == pytest.approx(b[key][number], rel=1e-6), number
            else:
                assert value == pytest.approx(b[key][number], rel=1e-4, abs=1e-4), number


def test_two_processes_fit_a_flow_before_one_frozen_mixture(flags, monkeypatch, tmp_path):
    """Also where EM and the whitening end elsewhere in the second process, as they may on other rounding."""
    main(monkeypatch, tmp_path, *flags, "--prior", "standard", "--flow_length", 0, "--latent_layout", "spatial",
         "--latent_dim", 8, "--exp_name", "first")
    second = ["--fit_prior", "results/first/last.pth", "--preset", "gmm_flow", "--flow_length", 2, "--flow_seq_len", 2,
              "--num_components", 2, "--batch_size", 8, "--epochs", 2, "--ema_decay", 0.5, "--no-tensorboard",
              "--sample_every", 0, "--device", "cpu"]
    (tmp_path / "wrapped.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
fit = train.CrossFlowVampVAE.fit_mixture_
def elsewhere(model, *rest):
    fit(model, *rest)
    if os.environ["RANK"] == "1":
        model.prior_mu.data += 1
        model.flow.tril *= 2
train.CrossFlowVampVAE.fit_mixture_ = elsewhere
train.run(train.main)
""")
    main(monkeypatch, tmp_path, *second, "--exp_name", "one")
    two = torchrun(2, *second, "--exp_name", "two", cwd=tmp_path, script=tmp_path / "wrapped.py")
    assert two.returncode == 0, two.stderr
    assert_close_runs(tmp_path / "results/one", tmp_path / "results/two")
    assert len({row["val_kl_raw"] for row in history(tmp_path / "results/two")}) == 2


@pytest.mark.slow
def test_three_processes_with_a_streamed_data_set_train_as_one(flags, tmp_path):
    flags = [*flags, "--cache_gb", 0, "--num_workers", 1, "--batch_size", 9, "--flip"]
    one = subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags), "--exp_name", "one"], cwd=tmp_path)
    three = torchrun(3, *flags, "--exp_name", "three", cwd=tmp_path)
    assert one.returncode == three.returncode == 0, three.stderr
    assert_close_runs(tmp_path / "results/one", tmp_path / "results/three")


@pytest.mark.slow
@pytest.mark.parametrize("end, said", [("raise train.UserError('no more of this')", "error: process 1: no more of this"),
                                       ("raise RuntimeError('our fault')", "RuntimeError: our fault"),
                                       ("os.kill(os.getpid(), 9)", "SIGKILL")], ids=["error", "traceback", "killed"])
def test_one_process_that_fails_ends_all_with_its_message(end, said, flags, monkeypatch, tmp_path):
    """In the second epoch, of seven steps each; resumed by two, one or three processes it ends as an undisturbed run."""
    flags = [*flags, "--batch_size", 6]
    (tmp_path / "wrapped.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train
step = train.train_step
def failing(trainer, *rest):
    if trainer.step == 9 and os.environ["RANK"] == "1":
        {end}
    step(trainer, *rest)
train.train_step = failing
train.run(train.main)
""")
    done = torchrun(2, *flags, cwd=tmp_path, script=tmp_path / "wrapped.py")
    run = tmp_path / "results/CrossVampVAE"
    assert done.returncode != 0 and said in done.stderr, done.stderr
    assert len(history(run)) == 1 and weights(run / "last.pth")["step"] == 7
    assert torchrun(2, *flags, "--resume", "auto", "--overwrite", cwd=tmp_path).returncode != 0     # both at once make no sense
    main(monkeypatch, tmp_path, *flags, "--exp_name", "whole")
    for processes in (1, 3) if said == "SIGKILL" else (2,):
        name = f"by_{processes}"
        shutil.copytree(run, tmp_path / "results" / name)
        again = torchrun(processes, *flags, "--resume", f"results/{name}/last.pth", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert_close_runs(tmp_path / "results/whole", tmp_path / "results" / name)


def test_machines_without_a_common_folder_are_told(flags, monkeypatch, tmp_path):
    """Of which one would go on from its checkpoint, and the other start anew."""
    main(monkeypatch, tmp_path, *flags, "--stop_epoch", 1)
    monkeypatch.setattr(train, "gather", lambda value: [value, None])
    with pytest.raises(UserError, match=r"--resume auto: the processes find checkpoints of steps \[\d+, None\]"):
        main(monkeypatch, tmp_path, *flags, "--resume", "auto")


def test_batch_that_cannot_be_shared_is_refused(flags, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--batch_size: 7 images a step cannot be shared equally by 2 processes"):
        main(monkeypatch, tmp_path, *flags, "--batch_size", 7)
    assert not (tmp_path / "results/CrossVampVAE").exists()


def test_health_of_shares_is_the_health_of_the_whole():
    torch.manual_seed(0)
    mu, var, r = torch.randn(10, 3), torch.rand(10, 3), torch.softmax(torch.randn(10, 4), 1).double()
    parts = torch.rand(4, 10, dtype=torch.float64)

    def health(rows):
        h = LatentHealth()
        h.mu, h.var, h.parts = [mu[rows]], [var[rows]], [parts[:, rows].sum(1)]
        h.responsibility, h.count = r[rows].sum(0), len(mu[rows])
        return h

    whole = health(slice(None)).summary()
    shared = LatentHealth.together([health(slice(0, 3)), health(slice(3, 10)), LatentHealth()]).summary()
    for name, value in whole.items():
        assert np.allclose(value, shared[name]), name
