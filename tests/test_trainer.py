"""The parts of train.py by themselves: schedules, step, epoch, loss, held-out measures, pictures. No whole run."""
import argparse
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
    UserError,
    frechet_distance,
    generate_images,
    image_grid,
    mean_and_covariance,
    save_checkpoint,
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
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: next(clock, 2.0)))
    assert train.train_epoch(trainer, data, False, NO_STOP)[1] == pytest.approx(2 * 8 / 2.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_makes_a_step_faster_comes_in_its_order(processes, monkeypatch):
    done, trainer = [], make_trainer()
    for name in ("fuse_flow", "fuse_lpips", "round_together", "compile_step", "record_step"):
        monkeypatch.setattr(train, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(train, "process_count", lambda: processes)
    train.speed_up(trainer, images(8), True, True, True, True, True)
    assert done == ["fuse_flow", "fuse_lpips", *["round_together"] * (processes == 1), "compile_step", "record_step"]
    done.clear()
    for switch, name in enumerate(("fuse_flow", "fuse_lpips", "compile_step", "record_step")):
        train.speed_up(trainer, images(8), False, *(i == switch for i in range(4)))
        assert done == [name]
        done.clear()


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


@pytest.mark.parametrize("flags, dead, found", [
    ((), 2, None), ((), 3, "and --pseudo_init noise --warmup_epochs 0 keeps"), ((), "4", None), ((), None, None),
    (("--pseudo_init", "noise"), 3, "and --pseudo_init noise --warmup_epochs 0 keeps"),
    (("--lpips_net", "vgg"), 3, "and --pseudo_init noise --warmup_epochs 0 --balance 1 keeps"),
    (("--lpips_net", "vgg", "--pseudo_init", "noise", "--warmup_epochs", 0), 3, "and --balance 1 keeps"),
    (("--lpips_net", "vgg", "--pseudo_init", "noise", "--warmup_epochs", 0, "--balance", 0.5), 3, "from the start (README"),
    (("--pseudo_init", "noise", "--warmup_epochs", 0), 3, "; test.py --refit_weights draws by use, as "
     "--mixture_weights learned does from the start (README"),
    (("--prior", "mog"), 5, "does from the start (README"), (("--mixture_weights", "learned"), 5, None),
    (("--num_components", 16), 7, None), (("--num_components", 16), 8, "8 of 16"),
    (("--prior", "standard", "--flow_length", 0), 0, None)])
def test_samples_of_dead_components_are_said(flags, dead, found):
    trainer = make_trainer(*flags)
    row = {} if dead is None else {"dead_components": dead}
    note = utils.dead_note(trainer.model, vars(trainer.args), [{"dead_components": 5}, row])
    assert note is None if found is None else found in note
    assert utils.dead_note(trainer.model, {}, []) is None


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
    fake = torch.cat(list(generate_images(trainer.ema, 30, 500, 3, purpose="fid")))
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
    with torch.no_grad():
        means = to_uint8(trainer.ema.decode(trainer.ema.prior_params()[0]))
    white = torch.full_like(means, 255)
    pictures = torch.cat([to_uint8(trainer.ema.pseudo_inputs), white, means, white])               # five of ten in a row
    assert torch.equal(saved["pseudo_0000.png"], image_grid(pictures, 10))


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


def test_defaults_are_the_published_recipe_and_presets_what_the_readme_trained():
    plain = vars(train.parse_args([])[0])
    assert plain.items() >= dict(
        latent_dim=128, hidden_dims=[64, 128, 256, 512], blocks_per_stage=1, prior="vamp", num_components=100,
        pseudo_init="data", pseudo_noise=0.05, flow_length=8, flow_seq_len=8, flow_embed_dim=128, flow_heads=4, flow_layers=2,
        flow_mlp_ratio=4, flow_prior="unflowed", flow_context="none", decode_from="zK", scale_bound=2.0,
        logvar_clamp=[-10.0, 10.0],
        recon_loss="l1", lpips_net="vgg", lpips_weight=100.0, balance=0.0, beta_max=0.2, warmup_epochs=20, free_bits=0.5,
        epochs=1000, batch_size=128, lr=1e-4, lr_min=0.0, weight_decay=1e-4, adam_betas=[0.9, 0.999], grad_clip=5000.0,
        skip_grad_norm=0.0, ema_decay=0.999, fid_every=10, fid_samples=10000, fid_dims=2048, val_images=2000, seed=0).items()
    demo, gmm = train.DEMO, train.PRESETS["gmm"]
    assert (demo["lr"], demo["beta_max"], demo["free_bits"], demo["ema_decay"], demo["epochs"]) == (2e-3, 0.4, 0.0, 0.99, 30)
    assert train.PRESETS["best"] == dict(decode_from="z0", prior="mog", mixture_weights="learned", free_bits=0.0,
                                         hidden_dims=[64, 128, 256])
    assert (gmm["num_components"], gmm["beta_max"], gmm["epochs"], gmm["flow_length"]) == (30, 1.0, 4, 0)
    flow = train.PRESETS["gmm_flow"]
    assert [flow[k] for k in ("num_components", "freeze_mixture", "flow_length", "flow_seq_len", "flow_embed_dim", "flow_heads",
                              "flow_layers", "epochs", "batch_size", "lr")] == [10, True, 6, 16, 64, 2, 1, 24, 256, 2e-3]


def test_only_a_demo_without_a_name_or_place_of_its_own_overwrites():
    for flags in ([], ["--exp_name", "x"], ["--save_dir", "x"], ["--resume", "auto"]):
        assert bool(train.parse_args(["--demo", *flags])[0].overwrite) == (not flags), flags


def test_a_resumed_run_takes_over_all_that_is_not_the_machines_or_the_invocations():
    machine = {"device", "compile", "cuda_graph", "fused_flow", "fused_lpips", "channels_last"}
    invocation = {"exp_name", "save_dir", "resume", "overwrite", "stop_epoch", "demo"}
    assert train.NOT_INHERITED == machine | invocation <= train.MAY_DIFFER


def test_mean_gradient_norm_is_of_the_steps_that_were_taken(monkeypatch):
    trainer, norms = make_trainer("--skip_grad_norm", 10), iter([1.0, 100.0, 3.0, 50.0])
    monkeypatch.setattr(trainer, "gradient_norm", lambda: torch.tensor(next(norms)))
    means, _ = train.train_epoch(trainer, MemoryImages(images(32)), False, NO_STOP)
    assert (means["grad_norm"], means["skipped"]) == (2, 2)


@pytest.mark.parametrize("name", sorted({*train.TERMS} - {"under_floor", "skipped"}))
def test_a_term_that_is_no_number_is_named(name, tmp_path):
    trainer = make_trainer(folder=tmp_path)
    for step in (1.0, 2.0):
        trainer.count({term: torch.tensor(math.nan if (term, step) == (name, 2) else 1.0) for term in train.TERMS},
                      torch.tensor(step))
    with pytest.raises(UserError, match=f"^{name} became NaN or infinite at epoch 1, step 2.*a new run with a lower"):
        trainer.read()


def test_log_line_shows_the_columns_it_names():
    args = train.parse_args(["--epochs", "9", "--skip_grad_norm", "1"])[0]
    row = {column: float(i) for i, column in enumerate(train.COLUMNS, 1)}
    *parts, speed = train.log_line(args, row).split(" | ")
    assert {name: float(value) for name, value in (part.rsplit(" ", 1) for part in parts[1:])} == {
        name: row[column] for name, column in (
            ("beta", "beta"), ("lr", "lr"), ("train_loss", "train_loss"), ("val_loss", "val_loss"), ("pixel", "recon"),
            ("LPIPS", "lpips"), ("KL_Raw", "kl_raw"), ("log_det", "log_det"), ("active", "active_units"),
            ("components", "effective_components"), ("skipped", "skipped_steps"), ("FID", "fid"))}
    assert parts[0] == "epoch 1.0/9" and speed == f"{row['img_per_s']:.0f} img/s"


def test_columns_of_an_epoch_are_the_means_they_name():
    trainer = make_trainer("--lpips_net", "squeeze")
    means = {term: float(i) for i, term in enumerate(train.TERMS, 1)}
    row = train.epoch_row(trainer, means, 77.0)
    other = {"train_loss": "loss", "recon": "pixel", "lpips": "LPIPS", "kl_raw": "KL_Raw", "kl_optim": "KL_optim",
             "floor_share": "under_floor", "skipped_steps": "skipped"}
    same = ("log_q0", "log_det", "log_p", "balance", "grad_norm")
    assert {column: row[column] for column in (*other, *same)} == {
        **{column: means[term] for column, term in other.items()}, **{term: means[term] for term in same}}
    assert (row["epoch"], row["img_per_s"], row["lr"]) == (1, 77, 1e-4)


def test_loss_parts_are_means_over_the_batch():
    trainer = make_trainer("--balance", 1, "--prior", "mog", "--mixture_weights", "learned")
    out = trainer.model(to_float(images(6)))
    parts, usage = train.loss_parts(trainer.args, trainer.model, None, to_float(images(6)), out)
    terms = trainer.model.kl_terms(out)
    for name, term in (("KL_Raw", "kl"), ("log_q0", "log_q0"), ("log_det", "log_det"), ("log_p", "log_p")):
        assert torch.allclose(parts[name], getattr(terms, term).mean()) and getattr(terms, term).std() > 1e-3
    assert torch.allclose(usage, trainer.model.responsibilities(out).mean(0))


def test_a_wrong_flow_stops_the_run(monkeypatch):
    model, good = make_trainer().model, {"inverse_error": 1e-9, "log_det_error": 1e-9, "layer": 0, "scale_std": 0.1}
    train.self_check(model)
    for bad in ({"inverse_error": 2e-6}, {"log_det_error": 2e-6}, {"scale_std": 0.0}, {"inverse_error": float("inf")}):
        monkeypatch.setattr(train, "check_flow", lambda flow, bad=bad: good | bad)
        with pytest.raises(UserError, match="the flow fails its self-check"):
            train.self_check(model)


def test_pictures_are_due_every_so_many_epochs_and_at_the_end():
    trainer, due = make_trainer("--sample_every", 3, "--epochs", 8), []
    for step in range(33):
        trainer.epoch, trainer.step = step // 4, step
        due += [step] * bool(train.pictures_due(trainer))
    assert due == [12, 24, 32]


def test_nothing_of_an_old_run_is_left_beside_a_new_one(tmp_path):
    theirs = ["last.pth", "best_fid.pth", "step_000000005.pth", "args.json", "history.csv", "train_log.txt", "curves.png",
              "samples/recon_0010.png", "tensorboard/events.out.1"]
    kept = {"notes.txt", "test/diagnostics.json"}
    for name in [*theirs, *kept]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    train.remove_old_run(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == kept


# -- the second stage --------------------------------------------------------------------------------------------------

def first_stage(tmp_path, *flags):
    trainer = make_trainer("--decode_from", "z0", *flags)
    save_checkpoint(tmp_path / "first.pth", trainer.state())
    return trainer


def read(tmp_path, *flags):
    args, given = train.parse_args(["--fit_prior", str(tmp_path / "first.pth"), *map(str, flags)])
    return args, train.read_first_stage(args, given)


ODD = {"split_seed": 3, "cache_gb": 1.5, "lpips_weight": 7.0, "lpips_linear": False, "fid_samples": 50, "fid_dims": 64,
       "posterior_std": 0.3, "logvar_clamp": [-3.0, 4.0], "blocks_per_stage": 0, "scale_bound": 1.5, "flow_heads": 4,
       "flow_mlp_ratio": 2, "num_components": 6, "mixture_weights": "learned", "prior": "mog"}


def test_second_stage_takes_over_what_the_first_was_made_with(tmp_path):
    first = first_stage(tmp_path, *(str(x) for name, value in ODD.items()
                                    for x in (f"--{name}", *(value if isinstance(value, list) else [value]))))
    args, stage = read(tmp_path)
    assert {name: getattr(args, name) for name in ODD} == ODD
    assert (args.free_bits, args.warmup_epochs) == (0, 0)
    args.flip = first.args.flip
    assert {**train.model_args_of(args), "perm_seed": 0} == train.model_args_of(first.args)
    assert stage.prior and stage.flow_length == 2
    for flags in (["--scale_bound", 3], ["--flow_heads", 2], ["--flow_mlp_ratio", 4], ["--mixture_weights", "uniform"],
                  ["--num_components", 5], ["--prior", "vamp"]):
        _, stage = read(tmp_path, *flags)
        assert not stage.prior and f"starts anew, not from the first stage's: {flags[0]} {flags[1]}" in stage.note, flags
    for flags in (["--posterior_std", 0.2], ["--logvar_clamp", -3, 5], ["--blocks_per_stage", 1]):
        with pytest.raises(UserError, match=f"{flags[0]} .*first.pth has"):
            read(tmp_path, *flags)
    assert (read(tmp_path, "--warmup_epochs", 2)[0].warmup_epochs, read(tmp_path, "--free_bits", 1)[0].free_bits) == (2, 1)


def test_em_sees_posterior_samples_of_images_and_their_mirror_images_where_the_mixture_lives(monkeypatch):
    torch.manual_seed(0)
    model = CrossFlowVampVAE(3, 8, 4, (8,), num_components=3, flow_length=1, flow_seq_len=1, flow_embed_dim=8, flow_heads=2,
                             flow_layers=1, decode_from="z0", prior="mog", mixture_covariance="full")
    perturb_(model, 0.2, torch.Generator().manual_seed(0))
    stock, calls = torch.randn(30, 2, 4, 2), []
    stock[:, 1] = -30                                         # no noise to speak of
    monkeypatch.setattr(model, "fit_mixture_", lambda points, steps, *_: calls.append((points, steps)))
    train.start_mixture(argparse.Namespace(seed=0), model, MemoryImages(stock), False)
    (points, steps), = calls
    with torch.no_grad():
        wanted = model.flow(stock[:, 0].transpose(1, 2).flatten(0, 1))[0]
    assert steps == 20 and points.shape == (4 * 60, 4) and not torch.allclose(wanted, stock[:, 0].transpose(1, 2).flatten(0, 1))
    distance = (points[:, None] - wanted).abs().amax(2)
    assert distance.amin(0).max() < 1e-4 and distance.amin(1).max() < 1e-4
    stock[:, 1] = 2 * torch.tensor(0.5).log()
    train.start_mixture(argparse.Namespace(seed=0), model, MemoryImages(stock), False)
    points = calls[1][0]
    assert (points[:, None] - wanted).abs().amax(2).min() > 1e-3 and len(points.unique(dim=0)) == len(points)
