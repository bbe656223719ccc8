"""Train one variant of CrossFlowVampVAE; see README.md for what each run leaves behind.

    python train.py --demo                                      handwritten digits, minutes on a laptop, no downloads
    python train.py --exp_name my_run                           CIFAR-10 with the published recipe
    python train.py --dataset folder --data_dir path/to/images  any images
    python train.py --exp_name my_run --resume auto             go on where it stopped (or start, if it never ran)
"""
import argparse
import contextlib
import copy
import math
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from models.vamp_flow import FLOW_CONTEXTS, FLOW_PRIORS, PRIORS, CrossFlowVampVAE, check_flow
from utils import (
    InceptionFeatures,
    LatentHealth,
    UserError,
    add_data_flags,
    add_device_flag,
    atomic_write,
    cached_statistics,
    check_saved_flags,
    extract_features,
    frechet_distance,
    generate_images,
    image_grid,
    load_data,
    load_hub_weights,
    mean_and_covariance,
    pick_device,
    read_checkpoint,
    run,
    save_checkpoint,
    save_png,
    seeded,
    to_float,
    to_uint8,
    true_false,
    writable_folder,
    write_json,
)

LPIPS_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

# What --demo changes; any flag beside it still wins.
DEMO = dict(exp_name="demo", dataset="digits", img_size=16, hidden_dims=[24, 48, 96], latent_dim=16, num_components=50,
            flow_length=2, flow_seq_len=2, flow_embed_dim=32, flow_heads=2, flow_layers=1, lpips_net="none", fid_every=0,
            epochs=30, warmup_epochs=0, beta_max=0.4, free_bits=0.0, lr=2e-3, ema_decay=0.99, batch_size=64,
            sample_every=10, threads=1, overwrite=True)

# Flags that may differ when a run is resumed; the rest define the result, and a different value is refused by name.
MAY_DIFFER = {"exp_name", "save_dir", "data_dir", "device", "resume", "overwrite", "stop_epoch", "demo", "threads", "amp",
              "num_workers", "tensorboard", "sample_every", "grid_images", "fid_every", "eval_batch_size",
              "save_every", "save_every_s", "check_every"}
# Of these, what a resumed run does not take over from the checkpoint.
NOT_INHERITED = {"exp_name", "save_dir", "device", "resume", "overwrite", "stop_epoch", "demo"}

TERMS = ("loss", "pixel", "LPIPS", "KL_Raw", "KL_optim", "log_q0", "log_det", "log_p", "under_floor", "grad_norm")
COLUMNS = ("epoch", "beta", "lr", "train_loss", "val_loss", "recon", "lpips", "kl_raw", "kl_optim", "log_q0", "log_det",
           "log_p", "floor_share", "grad_norm", "val_recon", "val_lpips", "val_kl_raw", "val_log_q0", "val_log_det",
           "val_log_p", "active_units", "effective_components", "dead_components", "fid", "img_per_s")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="digits and a small model; other flags still apply")
    group.add_argument("--exp_name", default="CrossVampVAE", help="the run's folder under save_dir")
    group.add_argument("--save_dir", default="./results", help="where runs are kept")
    group.add_argument("--resume", metavar="PATH", help="a checkpoint to go on from, or auto: the run's own last.pth")
    group.add_argument("--overwrite", action="store_true", help="start again in a folder that already holds a run")
    group.add_argument("--stop_epoch", type=int, default=0, help="end after epoch N, schedules unchanged; 0 = off")
    group.add_argument("--seed", type=int, default=0, help="of everything random in the run")
    add_device_flag(group)
    group.add_argument("--threads", type=int, default=0,
                       help="CPU threads, 0 = PyTorch's choice (1 is fastest for very small models)")
    group.add_argument("--amp", choices=("auto", "bf16", "none"), default="auto",
                       help="autocast; auto: bf16 on a CUDA GPU that has it, else none")
    group.add_argument("--tensorboard", action=switch, default=True, help="write TensorBoard events, if it is installed")

    group = add_data_flags(parser)
    group.add_argument("--flip", action=switch, default=None, help="random horizontal flips (default: on, digits off)")
    group.add_argument("--val_images", type=int, default=0, help="held-out images used for validation, 0 = all")

    group = parser.add_argument_group("model")
    group.add_argument("--latent_dim", type=int, default=128, help="D")
    group.add_argument("--hidden_dims", type=int, nargs="+", default=[64, 128, 256, 512], help="channels of each stage")
    group.add_argument("--blocks_per_stage", type=int, default=1, help="ResBlocks at each stage")
    group.add_argument("--prior", choices=PRIORS, default="vamp", help="vamp: learned pseudo-inputs; mog: free mixture")
    group.add_argument("--num_components", type=int, default=100, help="K, for vamp and mog")
    group.add_argument("--pseudo_init", choices=("data", "noise"), default="data", help="where the components start")
    group.add_argument("--pseudo_noise", type=float, default=0.05, help="std of the noise added to data, pixels in [-1, 1]")
    group.add_argument("--flow_length", type=int, default=8, help="coupling layers, 0 = no flow")
    group.add_argument("--flow_seq_len", type=int, default=8, help="tokens per latent half")
    group.add_argument("--flow_embed_dim", type=int, default=128, help="token width")
    group.add_argument("--flow_heads", type=int, default=4, help="attention heads")
    group.add_argument("--flow_layers", type=int, default=2, help="attention blocks per conditioner")
    group.add_argument("--flow_mlp_ratio", type=int, default=4, help="hidden width of the blocks' MLP over the token width")
    group.add_argument("--flow_prior", choices=FLOW_PRIORS, default="unflowed", help="does the prior follow the flow?")
    group.add_argument("--flow_context", choices=FLOW_CONTEXTS, default="none", help="encoder: amortised flow")
    group.add_argument("--scale_bound", type=float, default=2.0, help="bound of the flow's log-scales")
    group.add_argument("--logvar_clamp", type=float, nargs=2, default=[-10.0, 10.0], help="bounds of the log-variance")

    group = parser.add_argument_group("loss")
    group.add_argument("--recon_loss", choices=("l1", "mse"), default="l1", help="summed over pixels, mean over images")
    group.add_argument("--lpips_net", choices=(*LPIPS_FILES, "none"), default="vgg", help="trunk of LPIPS, none = off")
    group.add_argument("--lpips_weight", type=float, default=100.0, help="factor of LPIPS")
    group.add_argument("--lpips_linear", type=true_false, default=True, metavar="True|False",
                       help="lpips' learned channel weights; False: uniform ones (for a stand-in trunk)")
    group.add_argument("--beta_max", type=float, default=0.2, help="factor of the KL after warm-up")
    group.add_argument("--warmup_epochs", type=float, default=20, help="epochs over which beta rises from 0")
    group.add_argument("--free_bits", type=float, default=0.5, help="nats of KL per dimension that cost nothing, 0 = off")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=1000)
    group.add_argument("--batch_size", type=int, default=128, help="images a step")
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate at the start of the cosine")
    group.add_argument("--lr_min", type=float, default=0.0, help="learning rate at its end")
    group.add_argument("--weight_decay", type=float, default=1e-4, help="AdamW's, on weight matrices only")
    group.add_argument("--adam_betas", type=float, nargs=2, default=[0.9, 0.999])
    group.add_argument("--grad_clip", type=float, default=5000.0,
                       help="largest gradient norm, 0 = off (the loss sums over pixels: norms near 1000 are normal)")
    group.add_argument("--ema_decay", type=float, default=0.999, help="of the weights used for samples and FID, 0 = off")

    group = parser.add_argument_group("evaluation and saving")
    group.add_argument("--sample_every", type=int, default=10, help="pictures every N epochs and at the end, 0 = off")
    group.add_argument("--grid_images", type=int, default=64, help="images in a sample grid")
    group.add_argument("--fid_every", type=int, default=10, help="FID every N epochs and at the end, 0 = off")
    group.add_argument("--fid_samples", type=int, default=10000, help="generated images for FID")
    group.add_argument("--fid_dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="Inception features")
    group.add_argument("--eval_batch_size", type=int, default=0,
                       help="images at a time outside training, 0 = 500 of 32x32, fewer of larger ones")
    group.add_argument("--save_every", type=int, default=1, help="last.pth every N epochs (always at the end)")
    group.add_argument("--save_every_s", type=float, default=30.0, help="but not more often than this many seconds")
    group.add_argument("--check_every", type=int, default=50, help="flow self-check every N epochs, 0 = only at the start")
    return parser


def parse_args(argv=None):
    """(args, names of the flags that were given on the command line)."""
    parser = build_parser()
    silent = build_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(silent.parse_args(argv)))
    if parser.parse_args(argv).demo:
        # Running the demo twice is no accident; a run with a name or place of its own is not to be lost.
        parser.set_defaults(**{**DEMO, "overwrite": not given & {"exp_name", "save_dir"}})
    return parser.parse_args(argv), given


def check_flags(args, given):
    """Raise UserError on values out of range and on pairs that make no sense, naming the flags."""
    at_least = dict(latent_dim=1, blocks_per_stage=0, num_components=1, flow_length=0, flow_seq_len=1, flow_embed_dim=1,
                    flow_heads=1, flow_layers=1, flow_mlp_ratio=1, epochs=1, batch_size=1, sample_every=0, grid_images=1,
                    fid_every=0, fid_samples=2, eval_batch_size=0, save_every=1, save_every_s=0, check_every=0,
                    val_images=0, stop_epoch=0, threads=0, weight_decay=0, lr_min=0, grad_clip=0, beta_max=0, warmup_epochs=0,
                    free_bits=0, lpips_weight=0, pseudo_noise=0, seed=0)
    for name, low in at_least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be {low} or more")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: must be positive")
    if args.seed >= 2 ** 63:
        raise UserError(f"--seed {args.seed}: must be below 2^63")
    if not all(0 <= beta < 1 for beta in args.adam_betas):
        raise UserError(f"--adam_betas {args.adam_betas}: both must be at least 0 and below 1")
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema_decay {args.ema_decay}: must be at least 0 (off) and below 1")
    if not args.exp_name or args.exp_name in (".", "..") or set(args.exp_name) & set("/\\\0"):
        raise UserError(f"--exp_name {args.exp_name!r}: must be a plain folder name")
    senseless = [
        (args.flow_length == 0 and args.flow_prior == "pushed", "--flow_prior pushed with --flow_length 0: no flow to push"),
        (args.flow_length == 0 and args.flow_context == "encoder", "--flow_context encoder with --flow_length 0: no flow"),
        (args.flow_prior == "pushed" and args.flow_context == "encoder",
         "--flow_prior pushed with --flow_context encoder: the prior needs one flow for all images"),
        (args.lpips_net == "none" and "lpips_weight" in given and args.lpips_weight > 0,
         "--lpips_weight with --lpips_net none: there is no LPIPS to weigh"),
        (args.lpips_net != "none" and args.lpips_weight == 0, "--lpips_weight 0: use --lpips_net none"),
        (args.stop_epoch > args.epochs, f"--stop_epoch {args.stop_epoch} lies after --epochs {args.epochs}"),
        (args.lr_min > args.lr, f"--lr_min {args.lr_min} is above --lr {args.lr}"),
        (args.resume and args.overwrite and "overwrite" in given, "--resume with --overwrite: go on, or start again?"),
    ]
    for wrong, message in senseless:
        if wrong:
            raise UserError(message)
    if args.warmup_epochs > args.epochs:
        print(f"note: beta reaches {args.beta_max * args.epochs / args.warmup_epochs:.3g}, not --beta_max {args.beta_max}: "
              f"--warmup_epochs {args.warmup_epochs:g} is longer than the run")


def resolve_resume(args, given):
    """Find the checkpoint to go on from and bring the flags into line with it.

    Returns its dict and its path, None twice for a fresh start.
    """
    def require_empty(folder, way_out):
        if not args.overwrite and ((folder / "history.csv").exists() or any(folder.glob("*.pth"))):
            raise UserError(f"{folder} already holds a run: {way_out}another --exp_name keeps both")

    own = Path(args.save_dir, args.exp_name)
    fresh = "--resume auto goes on with it, --overwrite starts again, "
    if args.resume is None:
        require_empty(own, fresh)
        return None, None
    path = own / "last.pth" if args.resume == "auto" else Path(args.resume)
    if args.resume == "auto" and not path.exists():
        require_empty(own, "it has no last.pth to go on from; --overwrite starts again, ")
        print(f"--resume auto: no {path} yet, starting from the beginning")
        return None, None
    checkpoint = read_checkpoint(path)
    if checkpoint.get("optimizer") is None:
        raise UserError(f"{path}: holds no optimiser state (best_fid.pth never does); resume from last.pth")
    saved = checkpoint["args"]
    check_saved_flags(build_parser(), saved, path)
    changed = sorted(k for k in given - MAY_DIFFER if k in saved and saved[k] != getattr(args, k))
    if changed:
        raise UserError(f"{path} was trained with other values of " + ", ".join(
            f"--{k} ({saved[k]}, not {getattr(args, k)})" for k in changed) + "; leave them out, or start a new run")
    for name, value in saved.items():
        if hasattr(args, name) and name not in given and name not in NOT_INHERITED:
            setattr(args, name, value)
    if args.resume != "auto":                               # what was not given comes from where the checkpoint lies
        source = path.absolute().parent
        args.save_dir = args.save_dir if "save_dir" in given else str(source.parent)
        args.exp_name = args.exp_name if "exp_name" in given else source.name
        if Path(args.save_dir, args.exp_name).absolute() != source:
            require_empty(Path(args.save_dir, args.exp_name), "--overwrite replaces it, ")
    return checkpoint, path


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss

def model_args_of(args):
    """The constructor arguments of CrossFlowVampVAE, as plain values for the checkpoint."""
    names = ("in_channels", "img_size", "latent_dim", "hidden_dims", "blocks_per_stage", "num_components", "prior",
             "flow_length", "flow_seq_len", "flow_embed_dim", "flow_heads", "flow_layers", "flow_mlp_ratio", "flow_prior",
             "flow_context", "scale_bound", "logvar_clamp")
    return {**{n: getattr(args, n) for n in names}, "perm_seed": args.seed}


def build_lpips(net, linear, device, shape):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) as loss(a, b) -> (B,), for images (B, C, H, W) in [-1, 1]."""
    if net == "none":
        return None
    import lpips
    model = load_hub_weights(LPIPS_FILES[net], "use --lpips_net none",
                             lambda: lpips.LPIPS(net=net, lpips=linear, verbose=False))
    model = model.to(device).requires_grad_(False)

    def loss(a, b):
        return model(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).flatten()

    try:
        loss(*torch.zeros(2, 1, *shape, device=device))
    except RuntimeError:
        raise UserError(f"--lpips_net {net} needs larger images than --img_size {shape[1]}; use another net or none") from None
    return loss


def loss_terms(args, model, lpips, x, out, beta):
    """All terms of the objective for one batch, each a scalar tensor, by the names of TERMS.

    loss = recon (sum over pixels, mean over images) + w LPIPS + beta max(KL - free_bits D, 0), the floor acting on the
    mean KL of the batch (free bits: Kingma et al. 2016, arXiv 1606.04934).
    """
    recon = out.recon.float()
    difference = (recon - x).abs() if args.recon_loss == "l1" else (recon - x).square()
    pixel = difference.sum((1, 2, 3)).mean()
    perceptual = lpips(recon, x).mean() if lpips else pixel.new_zeros(())
    kl, log_q0, log_det, log_p = (part.mean() for part in model.kl_terms(out))
    floor = args.free_bits * args.latent_dim
    kl_optim = (kl - floor).clamp_min(0)
    loss = pixel + args.lpips_weight * perceptual + beta * kl_optim
    return {"loss": loss, "pixel": pixel, "LPIPS": perceptual, "KL_Raw": kl, "KL_optim": kl_optim, "log_q0": log_q0,
            "log_det": log_det, "log_p": log_p, "under_floor": (kl < floor).float()}


def weight_groups(model, weight_decay):
    """AdamW groups: decay on the matrices of linear and convolution layers; biases, norms, tokens and priors without."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    decayed = [p for p in model.parameters() if id(p) in matrices]
    free = [p for p in model.parameters() if id(p) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def start_prior(args, model, data):
    """--pseudo_init data: each component starts at a training image plus a little noise; images repeat if K > N."""
    if args.prior == "standard" or args.pseudo_init == "noise":
        return
    generator = seeded("cpu", args.seed, "components")
    chosen = torch.randperm(len(data), generator=generator)[torch.arange(args.num_components) % len(data)]
    images = to_float(data.take(chosen).cpu())
    noise = args.pseudo_noise * torch.randn(images.shape, generator=generator)
    model.init_prior((images + noise).to(next(model.parameters()).device))


# ---------------------------------------------------------------------------------------------------------------------
# Everything that a checkpoint holds, and where it goes

def same_kind(a, b):
    """Are two nests of dicts and lists alike but for the numbers? a may hold more keys than b."""
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() >= b.keys() and all(same_kind(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(same_kind, a, b))
    return type(a) is type(b) or (type(a), type(b)) == (int, float)


class Trainer:
    """Weights, optimiser, schedule, history and position of one training run."""

    def __init__(self, args, model, steps_per_epoch, folder, data_id):
        self.args, self.model, self.folder, self.data_id = args, model, folder, data_id
        self.steps_per_epoch = steps_per_epoch
        self.device = next(model.parameters()).device
        self.epoch, self.step, self.best_fid, self.history = 0, 0, math.inf, []
        self.ema = copy.deepcopy(model).eval().requires_grad_(False) if args.ema_decay else None
        self.optimizer = torch.optim.AdamW(weight_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.adam_betas),
                                           fused=self.device.type in ("cuda", "cpu"))
        total, low = args.epochs * steps_per_epoch, args.lr_min / args.lr
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1))))
        self.sums = torch.zeros(len(TERMS), device=self.device)         # of this epoch's steps so far
        self.first_bad = torch.zeros(len(TERMS), device=self.device)    # step (from 1) at which a term was not finite
        self.last_saved = time.monotonic()

    @property
    def best_weights(self):
        """The model to sample and evaluate with: EMA, or the raw one where EMA is off; always in eval mode."""
        return (self.ema or self.model).eval()

    def beta(self):
        progress = self.step / self.steps_per_epoch / self.args.warmup_epochs if self.args.warmup_epochs else 1.0
        return self.args.beta_max * min(progress, 1.0)

    @torch.no_grad()
    def update_ema(self):
        if self.ema is not None:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def require_finite(self):
        """Raise UserError if any term of any step so far was NaN or infinite; called before anything is saved."""
        # The causes before what is computed from them.
        order = ("pixel", "log_q0", "log_det", "log_p", "LPIPS", "KL_Raw", "KL_optim", "grad_norm")
        first_bad = dict(zip(TERMS, self.first_bad.tolist()))
        bad = [(int(first_bad[name]), i, name) for i, name in enumerate(order) if first_bad[name]]
        if bad:
            step, _, name = min(bad)
            good = self.folder / "last.pth"
            raise UserError(f"{name} became NaN or infinite at epoch {(step - 1) // self.steps_per_epoch + 1}, step {step}; "
                            + (f"last good checkpoint: {good}" if good.exists() else "no checkpoint was written yet")
                            + "; a lower --lr or --grad_clip may help")

    def state(self, optimizer=True):
        """The checkpoint: plain values and tensors only."""
        return {
            "model": self.model.state_dict(), "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict() if optimizer else None,
            "scheduler": self.scheduler.state_dict() if optimizer else None,
            "epoch": self.epoch, "step": self.step, "best_fid": self.best_fid, "history": self.history,
            "model_args": model_args_of(self.args), "args": vars(self.args),
            "data_id": self.data_id, "epoch_sums": self.sums.cpu(),
        }

    def save(self, name="last.pth", optimizer=True):
        self.require_finite()
        save_checkpoint(self.folder / name, self.state(optimizer))
        if name == "last.pth":
            self.last_saved = time.monotonic()

    def restore(self, checkpoint, path):
        if checkpoint.get("data_id") != self.data_id:
            raise UserError(f"--data_dir {self.args.data_dir}: not the images that {path} was trained on")
        groups, schedule = self.optimizer.state_dict()["param_groups"], self.scheduler.state_dict()
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict({k: v for k, v in checkpoint["scheduler"].items() if k in schedule})
            self.sums.copy_(checkpoint["epoch_sums"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best_fid, self.history = float(checkpoint["best_fid"]), checkpoint["history"]
            moments = [{k: v.shape for k, v in self.optimizer.state[p].items()} for p in self.model.parameters()]
            shapes = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in self.model.parameters()]
            if not (same_kind(self.optimizer.state_dict()["param_groups"], groups)
                    and same_kind(self.scheduler.state_dict(), schedule) and self.scheduler.last_epoch == self.step
                    and (moments == shapes or self.step == 0)
                    and 0 <= self.step - self.epoch * self.steps_per_epoch <= self.steps_per_epoch
                    and all(type(v) in (int, float, type(None)) for row in self.history for v in row.values())):
                raise ValueError("optimiser, schedule, history and position are not those of one run")
        except Exception as e:                                # what a file from elsewhere holds can raise anything
            raise UserError(f"{path}: its weights do not fit this model ({str(e)[:200]})") from None
        best, source = self.folder / "best_fid.pth", path.parent / "best_fid.pth"
        if not best.exists():
            if source.exists():                           # resumed into another folder: the best goes along
                shutil.copyfile(source, best)
            else:
                self.best_fid = math.inf


def train_step(trainer, lpips, batch, amp):
    """One optimiser step on a uint8 batch (B, C, H, W). Nothing here waits for the device.

    Flips and noise depend on (seed, step, position in the batch) alone, so that a resumed run repeats them.
    """
    args, model = trainer.args, trainer.model
    generator = seeded(trainer.device, args.seed, "step", trainer.step)
    x = to_float(batch)
    if args.flip:
        flipped = torch.rand(len(x), 1, 1, 1, generator=generator, device=trainer.device) < 0.5
        x = torch.where(flipped, x.flip(3), x)
    eps = torch.randn(len(x), args.latent_dim, generator=generator, device=trainer.device)
    with torch.autocast(trainer.device.type, torch.bfloat16) if amp else contextlib.nullcontext():
        out = model(x, eps)
        terms = loss_terms(args, model, lpips, x, out, trainer.beta())
    trainer.optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    terms["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    trainer.optimizer.step()
    trainer.scheduler.step()
    model.project_()
    trainer.step += 1
    trainer.update_ema()
    values = torch.stack([terms[name].detach().float() for name in TERMS])
    trainer.sums += values
    trainer.first_bad = torch.where((trainer.first_bad == 0) & ~values.isfinite(), trainer.step, trainer.first_bad)


def train_epoch(trainer, lpips, data, amp, stop):
    """The rest of the current epoch. Returns (means of TERMS, images a second), or None if a signal asked to stop."""
    args, first = trainer.args, trainer.step - trainer.epoch * trainer.steps_per_epoch
    size = min(args.batch_size, len(data))
    order = torch.randperm(len(data), generator=seeded("cpu", args.seed, "order", trainer.epoch))
    rest = order[first * size:trainer.steps_per_epoch * size]       # empty if only the evaluation was interrupted
    batches = data.batches(rest.split(size) if len(rest) else (), trainer.device)
    # Reading the losses waits for the device: often enough to see, seldom enough to cost nothing.
    read_every = 1 if trainer.device.type == "cpu" else 50
    if first == 0:
        trainer.sums.zero_()
    trainer.model.train()
    start, done, tty = time.monotonic(), 0, sys.stderr.isatty()
    with tqdm(total=trainer.steps_per_epoch, initial=first, desc=f"epoch {trainer.epoch + 1}/{args.epochs}", unit="step",
              mininterval=0.5 if tty else 30, delay=0 if tty else 30, leave=False) as bar:
        for batch in batches:
            train_step(trainer, lpips, batch, amp)
            done += 1
            if done % read_every == 0 or stop.signum:
                trainer.require_finite()
                mean = dict(zip(TERMS, (trainer.sums / (first + done)).tolist()))
                bar.set_postfix({k: f"{mean[k]:.4g}" for k in ("loss", "pixel", "LPIPS", "KL_Raw")}, refresh=False)
            bar.update()
            if stop.signum and first + done < trainer.steps_per_epoch:
                return None
    trainer.require_finite()
    means = dict(zip(TERMS, (trainer.sums / trainer.steps_per_epoch).tolist()))
    return means, done * size / (time.monotonic() - start)


class Stopped(Exception):
    """A signal asked to stop during an evaluation, which a resumed run does again."""


def until_stopped(batches, stop):
    for batch in batches:
        if stop.signum:
            raise Stopped
        yield batch


@torch.no_grad()
def evaluate(trainer, lpips, data, stop):
    """Held-out loss with beta_max and the health of the latent space, of the weights that are sampled from."""
    args, model = trainer.args, trainer.best_weights
    n = min(args.val_images or len(data), len(data))
    # The same noise at every epoch and in every run: differences are the model's.
    eps = torch.randn(n, args.latent_dim, generator=seeded("cpu", "validation")).to(trainer.device)
    prior = model.prior_params()
    health, pixel, perceptual, done = LatentHealth(), 0.0, 0.0, 0
    for batch in until_stopped(data.batches(torch.arange(n).split(args.eval_batch_size), trainer.device), stop):
        x = to_float(batch)
        out = model(x, eps[done:done + len(x)], prior)
        terms = loss_terms(args, model, lpips, x, out, args.beta_max)
        pixel, perceptual = pixel + terms["pixel"].item() * len(x), perceptual + terms["LPIPS"].item() * len(x)
        health.add(model, out, model.kl_terms(out))
        done += len(x)
    summary = health.summary()
    pixel, perceptual = pixel / n, perceptual / n
    floor = args.free_bits * args.latent_dim
    loss = pixel + args.lpips_weight * perceptual + args.beta_max * max(summary["kl_raw"] - floor, 0.0)
    return {"val_loss": loss, "val_recon": pixel, "val_lpips": perceptual if lpips else None,
            **{f"val_{k}": summary[k] for k in ("kl_raw", "log_q0", "log_det", "log_p")},
            **{k: summary[k] for k in ("active_units", "effective_components", "dead_components")}}


@torch.no_grad()
def evaluate_fid(trainer, extractor, data, stop):
    """FID of --fid_samples images of the prior against the whole training set, unflipped."""
    args = trainer.args

    def real():
        batches = data.batches(torch.arange(len(data)).split(args.eval_batch_size), trainer.device)
        return extract_features(extractor, until_stopped(batches, stop), len(data), "features of the training set")

    reference = cached_statistics(Path(args.save_dir, "feature_cache"), f"{data.fingerprint}-{extractor.key}", real)
    images = generate_images(trainer.best_weights, args.fid_samples, args.eval_batch_size, args.seed)
    fake = extract_features(extractor, until_stopped(images, stop), args.fid_samples, "features of samples")
    return frechet_distance(*reference, *mean_and_covariance(fake))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

@torch.no_grad()
def save_images(trainer, held_out, writer):
    """samples/: images of the prior, reconstructions below their originals, pseudo-inputs (mog: decoded means)."""
    args, model = trainer.args, trainer.best_weights
    folder = trainer.folder / "samples"
    folder.mkdir(exist_ok=True)
    grids = {"samples": (to_uint8(model.sample(args.grid_images, generator=seeded("cpu", args.seed, "grid"))), 8)}
    n = min(32, len(held_out))
    originals = held_out.take(range(n)).to(trainer.device)
    mu, _, context = model.posterior(to_float(originals))
    decoded = to_uint8(model.decode(model.apply_flow(mu, context)[0]))
    rows = [x for i in range(0, n, 8) for x in (originals[i:i + 8], decoded[i:i + 8])]
    grids["recon"] = torch.cat([torch.cat([r, r.new_full((8 - len(r), *r.shape[1:]), 255)]) for r in rows]), 8
    if args.prior == "vamp":
        grids["pseudo"] = to_uint8(model.pseudo_inputs[:100]), 10
    elif args.prior == "mog":
        grids["pseudo"] = to_uint8(model.decode(model.prior_params()[0][:100])), 10
    for name, (images, columns) in grids.items():
        grid = image_grid(images.cpu(), columns)
        save_png(folder / f"{name}_{trainer.epoch:04d}.png", grid, zoom=max(1, 64 // args.img_size))
        if writer:
            writer.add_image(name, grid, trainer.epoch)


def save_curves(history, path):
    """curves.png from the rows of history.csv."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = pd.DataFrame(history, columns=COLUMNS).astype(float)
    panels = [
        ("loss", {"train_loss": "training", "val_loss": "held out (beta_max)"}),
        ("reconstruction, sum over pixels", {"recon": "training", "val_recon": "held out"}),
        ("LPIPS", {"lpips": "training", "val_lpips": "held out"}),
        ("KL, nats per image", {"kl_raw": "training", "val_kl_raw": "held out", "kl_optim": "above the floor"}),
        ("parts of the KL, nats (held out)", {"val_log_q0": "E log q(z0|x)", "val_log_det": "E log|det|",
                                              "val_log_p": "E log p(zK)"}),
        ("latent space (held out)", {"active_units": "active units", "effective_components": "effective components",
                                     "dead_components": "dead components"}),
        ("FID", {"fid": "prior samples"}),
        ("schedules, share of their maximum", {"beta": "beta", "lr": "learning rate", "floor_share": "steps under floor"}),
    ]
    fig, axes = plt.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    for ax, (title, lines) in zip(axes.flat, panels):
        for (column, label), style in zip(lines.items(), ("-", "--", ":")):
            y = table[column] / (table[column].max() or 1) if column in ("beta", "lr") else table[column]
            known = y.notna()
            if known.any():
                ax.plot(table["epoch"][known], y[known], style, label=label, marker="o" if known.sum() < 15 else None)
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend()
        else:
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=80)
    plt.close(fig)


def save_history(history, path):
    with atomic_write(path, "w", newline="") as f:
        pd.DataFrame(history, columns=COLUMNS).to_csv(f, index=False)


def log_line(args, row):
    """One line of train_log.txt."""
    lpips, fid = ("off" if v is None else f"{v:.4f}" for v in (row["lpips"], row["fid"]))
    return (f"epoch {row['epoch']}/{args.epochs} | beta {row['beta']:.4f} | lr {row['lr']:.3g} | train_loss "
            f"{row['train_loss']:.3f} | val_loss {row['val_loss']:.3f} | pixel {row['recon']:.3f} | LPIPS {lpips} | "
            f"KL_Raw {row['kl_raw']:.3f} | log_det {row['log_det']:.3f} | active {row['active_units']} | components "
            f"{row['effective_components']:.1f} | FID {fid if row['fid'] is not None else '-'} | {row['img_per_s']:.0f} img/s")


def open_tensorboard(args, folder, epoch):
    """A SummaryWriter, or None where TensorBoard is off or not installed."""
    if not args.tensorboard:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)


def remove_old_run(folder):
    """Delete what an earlier run left in the folder: a stale best_fid.pth beside a new run would be mistaken for its."""
    for pattern in ("*.pth", "args.json", "history.csv", "train_log.txt", "curves.png", "samples/*.png", "tensorboard/events*"):
        for path in folder.glob(pattern):
            path.unlink()


class StopRequest:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one ends the program at once."""

    def __init__(self):
        self.signum = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.ask)

    def ask(self, signum, _frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)
        print(f"\n{signal.Signals(signum).name}: finishing the step and saving", file=sys.stderr)


def print_plan(args, model, data, held_out, device, amp, steps, folder):
    """What is about to happen, before it does."""
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    parts["prior"] = sum(p.numel() for p in model.parameters()) - sum(parts.values())
    left_out = len(data) - steps * min(args.batch_size, len(data))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    kept = data.images.device.type if hasattr(data, "images") else "streamed"
    n_val = min(args.val_images or len(held_out), len(held_out))
    fid = f"every {args.fid_every} epochs, {args.fid_samples:,} samples" if args.fid_every else "off"
    print(f"""\
run         {folder} (seed {args.seed})
data        {args.dataset}: {len(data):,} training images, {n_val:,} for validation, {'x'.join(map(str, data.shape))}, \
kept on {kept}, flips {'on' if args.flip else 'off'}
model       {sum(parts.values()) / 1e6:.2f} M parameters: {', '.join(f'{k} {v / 1e6:.2f}' for k, v in parts.items() if v)}
prior       {args.prior}{f', {model.num_components} components' if args.prior != 'standard' else ''}; flow \
{f'of {args.flow_length} layers, prior {args.flow_prior}, context {args.flow_context}' if args.flow_length else 'off'}
loss        {args.recon_loss} + {f'{args.lpips_weight:g} LPIPS-{args.lpips_net}' if args.lpips_net != 'none' else 'no LPIPS'} \
+ beta max(KL - {args.free_bits * args.latent_dim:g}, 0), beta to {args.beta_max:g} over {args.warmup_epochs:g} epochs
training    {args.epochs} epochs of {steps} steps of {min(args.batch_size, len(data))} images\
{f' ({left_out} images, others each time, left out of an epoch)' if left_out else ''}
device      {device} ({name}), {'bf16 autocast' if amp else 'float32'}, torch {torch.__version__}
FID         {fid}""")


def main():
    # -- flags, data, everything that could be missing later ------------------------------------------------------
    args, given = parse_args()
    checkpoint, resumed_from = resolve_resume(args, given)
    if args.flip is None:
        args.flip = args.dataset != "digits"
    args.in_channels = args.in_channels or (1 if args.dataset == "digits" else 3)
    args.eval_batch_size = args.eval_batch_size or max(1, min(500, 500 * 32 ** 2 // max(args.img_size, 1) ** 2))
    check_flags(args, given)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.amp == "bf16" and device.type == "mps":
        raise UserError("--amp bf16: not supported on MPS")
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)      # else bf16 is emulated
    amp = args.amp == "bf16" or (args.amp == "auto" and native)
    torch.manual_seed(args.seed)
    if checkpoint is not None and checkpoint["model_args"] != model_args_of(args):
        raise UserError(f"{resumed_from}: its args and its model_args describe two models; not a checkpoint of train.py")
    try:
        model = CrossFlowVampVAE(**model_args_of(args))
    except ValueError as e:
        raise UserError(f"the model's flags do not fit: {e}") from None
    lpips = build_lpips(args.lpips_net, args.lpips_linear, device, (args.in_channels, args.img_size, args.img_size))
    extractor = InceptionFeatures(device, args.fid_dims) if args.fid_every else None
    if extractor and args.fid_samples < 2048:
        print(f"note: FID from {args.fid_samples} samples is far too high (its covariance has at most that rank); "
              f"compare it only with itself")
    data, held_out = load_data(args, device)
    if extractor and len(data) < 2:
        raise UserError(f"--data_dir {args.data_dir}: FID needs at least two training images; use --fid_every 0")
    folder = writable_folder(Path(args.save_dir, args.exp_name), "--save_dir")

    # -- model, optimiser, position -------------------------------------------------------------------------------
    steps = max(1, len(data) // args.batch_size)
    model.to(device)
    start_prior(args, model, data)
    trainer = Trainer(args, model, steps, folder, data.fingerprint)
    if checkpoint is not None:
        trainer.restore(checkpoint, resumed_from)
    else:
        remove_old_run(folder)
    print_plan(args, model, data, held_out, device, amp, steps, folder)
    self_check(model)
    if checkpoint is not None:
        print(f"resumed at epoch {trainer.epoch}, step {trainer.step}")
        if trainer.history:                               # whatever came after the checkpoint's writing may be missing
            save_history(trainer.history, folder / "history.csv")
            save_curves(trainer.history, folder / "curves.png")
    stop = StopRequest()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(folder / "args.json", {**vars(args), "versions": versions, "device_used": str(device)})
    writer = open_tensorboard(args, folder, trainer.epoch)
    log = open(folder / "train_log.txt", "a" if checkpoint is not None else "w", encoding="utf-8", errors="backslashreplace")
    print(shlex.join(["python", *sys.argv]), file=log, flush=True)

    # -- the epochs -----------------------------------------------------------------------------------------------
    last_epoch = args.stop_epoch or args.epochs
    while trainer.epoch < last_epoch:
        trained = train_epoch(trainer, lpips, data, amp, stop)
        if trained is None:
            break
        means, speed = trained
        row = dict.fromkeys(COLUMNS)
        row.update(epoch=trainer.epoch + 1, beta=trainer.beta(), lr=trainer.scheduler.get_last_lr()[0],
                   train_loss=means["loss"], recon=means["pixel"], lpips=means["LPIPS"] if lpips else None,
                   kl_raw=means["KL_Raw"], kl_optim=means["KL_optim"], floor_share=means["under_floor"], img_per_s=speed,
                   **{k: means[k] for k in ("log_q0", "log_det", "log_p", "grad_norm")})
        at_end = trainer.epoch + 1 == args.epochs
        try:
            row.update(evaluate(trainer, lpips, held_out, stop))
            if args.fid_every and ((trainer.epoch + 1) % args.fid_every == 0 or at_end):
                row["fid"] = evaluate_fid(trainer, extractor, data, stop)
        except Stopped:
            break
        trainer.epoch += 1
        trainer.history.append(row)
        is_best = row["fid"] is not None and row["fid"] < trainer.best_fid
        if is_best:
            trainer.best_fid = row["fid"]
            trainer.save("best_fid.pth", optimizer=False)
        due = trainer.epoch % args.save_every == 0 and time.monotonic() - trainer.last_saved >= args.save_every_s
        if due or is_best or trainer.epoch == last_epoch or stop.signum:
            trainer.save()
        save_history(trainer.history, folder / "history.csv")
        line = log_line(args, row)
        print(line, flush=True)
        print(line, file=log, flush=True)
        if writer:
            for name, value in row.items():
                if value is not None and name != "epoch":
                    writer.add_scalar(name, value, trainer.epoch)
        if args.sample_every and (trainer.epoch % args.sample_every == 0 or at_end):
            save_images(trainer, held_out, writer)
            save_curves(trainer.history, folder / "curves.png")
        if args.check_every and trainer.epoch % args.check_every == 0:
            self_check(model)
        if stop.signum:
            break
    if writer:
        writer.close()
    if stop.signum:
        trainer.save()
        print(f"stopped at epoch {trainer.epoch}, step {trainer.step}; go on with: "
              f"python train.py --resume {shlex.quote(str(folder / 'last.pth'))}")
        sys.exit(128 + stop.signum)
    print(f"done: {folder} (pictures in {folder / 'samples'}, curves in {folder / 'curves.png'})")


def self_check(model):
    """The flow's inverse and log-determinant against autograd, in float64; see check_flow. Stops the run if wrong."""
    if model.flow is None:
        return
    result = check_flow(model.flow)
    if max(result["inverse_error"], result["log_det_error"]) > 1e-6 or not result["scale_std"] > 0:
        raise UserError(f"the flow fails its self-check, worst in layer {result['layer']} (inverse error "
                        f"{result['inverse_error']:.1e}, log-det error {result['log_det_error']:.1e}, bound 1e-6); a smaller "
                        f"--scale_bound or --flow_length keeps it well conditioned")
    print(f"self-check  flow round trip {result['inverse_error']:.1e}, log-det {result['log_det_error']:.1e} "
          f"(relative, float64), s spreads by {result['scale_std']:.2f}")


if __name__ == "__main__":
    run(main)
