"""The parts of train.py by themselves: schedules, step, epoch, loss, held-out measures, pictures. No whole run."""
import math
import types

import numpy as np
import pytest
import torch
from test_train import TINY

import train
import utils
from models.vamp_flow import CrossFlowVampVAE, perturb_
from utils import (
    MemoryImages,
    frechet_distance,
    generate_images,
    image_grid,
    mean_and_covariance,
    seeded,
    to_float,
    to_uint8,
)

NO_STOP = types.SimpleNamespace(signum=0, agreed=lambda: 0)


def images(n, seed=0):
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make_trainer(*flags, steps=4, folder=None):
    args, _ = train.parse_args([*TINY, "--dataset", "digits", "--img_size", "8", *map(str, flags)])
    args.in_channels, args.flip = 1, bool(args.flip)
    args.eval_batch_size = args.eval_batch_size or 500
    torch.manual_seed(0)
    model = perturb_(CrossFlowVampVAE(**train.model_args_of(args)), 0.05, torch.Generator().manual_seed(0))
    return train.Trainer(args, model, None, steps, 8, folder, "")


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")      # there is no step of the optimiser before
def test_beta_and_learning_rate_move_every_step_and_the_optimiser_has_its_flags():
    trainer = make_trainer("--epochs", 5, "--lr", 0.1, "--lr_min", 0.02, "--warmup_epochs", 2.5, "--beta_max", 0.4,
                           "--adam_betas", 0.5, 0.9, "--weight_decay", 0.3)
    for step in range(20):
        trainer.step = step
        assert trainer.beta() == pytest.approx(0.4 * min(step / 10, 1))
        assert trainer.now().lr == pytest.approx(0.02 + 0.08 * 0.5 * (1 + math.cos(math.pi * step / 20)))
        trainer.scheduler.step()
    assert [(g["betas"], g["weight_decay"]) for g in trainer.optimizer.param_groups] == [((0.5, 0.9), 0.3), ((0.5, 0.9), 0)]


def test_a_step_clips_the_gradient_and_brings_pseudo_inputs_back():
    trainer = make_trainer("--grad_clip", 0.5, "--lr", 0.1)
    with torch.no_grad():
        trainer.model.pseudo_raw.fill_(1.0)
    for p in trainer.parameters:
        p.grad = torch.full_like(p, -1.0)
    trainer.update_weights(trainer.gradient_norm(), 0.1)
    moments = torch.cat([s["exp_avg"].flatten() for s in trainer.optimizer.state.values()])
    assert moments.norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert trainer.model.pseudo_raw.max() == 1


def test_steps_mirror_half_of_the_images_left_to_right_and_draw_new_noise():
    trainer, seen = make_trainer("--flip"), []
    model = trainer.model
    trainer.network = lambda x, eps: seen.append((x, eps)) or model(x, eps)
    batch = images(8)
    for _ in range(20):
        train.train_step(trainer, batch, False)
    x = to_float(batch)
    mirrored = [torch.equal(a, b.flip(2)) for got, _ in seen for a, b in zip(got, x)]
    assert all(m or torch.equal(a, b) for m, (a, b) in zip(mirrored, ((a, b) for got, _ in seen for a, b in zip(got, x))))
    assert 0.35 < np.mean(mirrored) < 0.65
    assert not torch.equal(seen[0][1], seen[1][1])


def test_every_epoch_shows_all_images_in_another_order():
    trainer, data, seen = make_trainer(steps=5), MemoryImages(images(40)), []
    batches = data.batches
    data.batches = lambda rows, device: seen.append(rows.flatten().tolist()) or batches(rows, device)
    for trainer.epoch in (0, 1):
        train.train_epoch(trainer, data, False, NO_STOP)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(40))
    assert seen[0] != seen[1] and list(range(40)) not in seen


def test_images_a_second_count_the_steps_that_were_made(monkeypatch):
    trainer, data = make_trainer(steps=5), MemoryImages(images(40))
    clock = iter([0.0, 2.0])
    trainer.step = 3                                          # resumed: two steps are left
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock, 2.0))
    assert train.train_epoch(trainer, data, False, NO_STOP)[1] == pytest.approx(2 * 8 / 2.0)


def test_objective_is_what_the_readme_says():
    args = train.parse_args(["--latent_dim", "4", "--free_bits", "0.5"])[0]
    for kl, beyond in ((7.0, 5.0), (1.9, 0.0)):
        parts = {name: torch.tensor(value) for name, value in (("pixel", 3.0), ("LPIPS", 0.5), ("KL_Raw", kl))}
        terms = train.objective(args, parts, None, 0.2)
        assert terms["KL_optim"] == beyond and terms["loss"].item() == pytest.approx(3 + 100 * 0.5 + 0.2 * beyond)
    for loss, value in (("l1", 2 * 64.0), ("mse", 4 * 64.0)):
        trainer = make_trainer("--recon_loss", loss)
        x = torch.ones(3, 1, 8, 8)
        out = trainer.model(x)._replace(recon=-x)
        assert train.loss_parts(trainer.args, trainer.model, None, x, out)[0]["pixel"] == value


def test_pseudo_inputs_start_at_training_images_or_at_noise():
    data = MemoryImages(images(40))
    for init, found in (("data", 5), ("noise", 0)):
        trainer = make_trainer("--pseudo_init", init, "--pseudo_noise", 0)
        train.start_prior(trainer.args, trainer.model, data)
        equal = (trainer.model.pseudo_inputs[:, None] == to_float(data.images)[None]).flatten(2).all(2)
        assert equal.any(1).sum() == found and equal.any(0).sum() == found         # five different ones
    trainer = make_trainer("--pseudo_noise", 0.2)
    before = torch.zeros(5, 1, 8, 8, dtype=torch.uint8) + 127
    train.start_prior(trainer.args, trainer.model, MemoryImages(before))
    assert trainer.model.pseudo_inputs.std().item() == pytest.approx(0.2, rel=0.2)


def test_held_out_loss_is_of_the_averaged_weights_with_all_of_beta_and_the_same_noise_in_every_run():
    trainer = make_trainer("--warmup_epochs", 10, "--epochs", 20, "--free_bits", 0.1, "--eval_batch_size", 3, "--beta_max", 0.7,
                           "--seed", 5)
    perturb_(trainer.model, 0.3, torch.Generator().manual_seed(1))
    held_out = MemoryImages(images(8))
    got = train.evaluate(trainer, None, held_out, NO_STOP)
    x, eps = to_float(held_out.images), torch.randn(8, 4, generator=seeded("cpu", "validation"))
    with torch.no_grad():
        out = trainer.ema(x, eps)
        kl = trainer.ema.kl_terms(out).kl.mean().item()
    recon = (out.recon - x).abs().sum((1, 2, 3)).mean().item()
    assert got["val_recon"] == pytest.approx(recon, rel=1e-4) and got["val_kl_raw"] == pytest.approx(kl, rel=1e-3)
    assert kl > 0.4 and got["val_loss"] == pytest.approx(recon + 0.7 * (kl - 0.4), rel=1e-4)


def test_statistics_of_other_images_or_another_network_are_not_taken_for_these(tmp_path):
    class Network:
        dims = 2

        def __init__(self, key, step):
            self.key, self.step = key, step

        def __call__(self, x):
            return torch.stack([x.float()[:, :, i::self.step].mean((1, 2, 3)) for i in (0, 1)], 1)

    trainer = make_trainer("--save_dir", tmp_path, "--fid_samples", 30, "--seed", 3)
    fake = torch.cat(list(generate_images(trainer.ema, 30, 500, 3)))
    for data, network in ((MemoryImages(images(30)), Network("a", 2)), (MemoryImages(images(30, 1)), Network("a", 2)),
                          (MemoryImages(images(30)), Network("b", 3))):
        expected = frechet_distance(*(v for x in (data.images, fake) for v in mean_and_covariance(network(x).numpy())))
        assert train.evaluate_fid(trainer, network, data, NO_STOP) == pytest.approx(expected, rel=1e-5)


def test_pictures_are_of_the_averaged_weights(monkeypatch, tmp_path):
    trainer, saved = make_trainer("--grid_images", 9, folder=tmp_path), {}
    perturb_(trainer.model, 0.3, torch.Generator().manual_seed(1))
    monkeypatch.setattr(train, "save_png", lambda path, grid, zoom: saved.update({path.name: grid}))
    held_out = MemoryImages(images(8))
    train.save_images(trainer, held_out, None)
    samples = to_uint8(trainer.ema.sample(9, generator=seeded("cpu", 0, "grid")))
    recon = to_uint8(trainer.ema.reconstruct(to_float(held_out.images)))
    assert torch.equal(saved["samples_0000.png"], image_grid(samples, 8))
    assert torch.equal(saved["recon_0000.png"], image_grid(torch.cat([held_out.images, recon]), 8))
    assert torch.equal(saved["pseudo_0000.png"], image_grid(to_uint8(trainer.ema.pseudo_inputs), 10))


def test_curves_show_the_columns_they_name(monkeypatch, tmp_path):
    plt = utils.pyplot()
    monkeypatch.setattr(plt, "close", lambda fig: None)
    rows = [dict(zip(train.COLUMNS, [e, *range(10 * e, 10 * e + len(train.COLUMNS) - 1)])) for e in (1, 2)]
    train.save_curves(rows, tmp_path / "c.png")
    panels = {ax.get_title(): {line.get_label(): line.get_ydata().tolist() for line in ax.lines} for ax in plt.gcf().axes}
    for panel, label, column in (("loss", "training", "train_loss"), ("loss", "held out (beta_max)", "val_loss"),
                                 ("reconstruction, sum over pixels", "training", "recon"),
                                 ("reconstruction, sum over pixels", "held out", "val_recon"),
                                 ("KL, nats per image", "training", "kl_raw"), ("KL, nats per image", "held out", "val_kl_raw"),
                                 ("parts of the KL, nats (held out)", "E log|det|", "val_log_det"),
                                 ("latent space (held out)", "active units", "active_units"), ("FID", "prior samples", "fid")):
        assert panels[panel][label] == [row[column] for row in rows], label
    monkeypatch.undo()
    plt.close("all")


def test_what_defines_the_result_may_not_differ_on_resuming():
    names = {"seed", "split_seed", "dataset", "img_size", "flip", "batch_size", "epochs", "lr", "lr_min", "weight_decay",
             "adam_betas", "grad_clip", "ema_decay", "free_bits", "beta_max", "warmup_epochs", "lpips_net", "lpips_weight",
             "recon_loss", "balance", "pseudo_init", "fid_samples", "fid_dims", "val_images", *train.model_args_of(
                 make_trainer().args)}
    assert names & train.MAY_DIFFER == set()
