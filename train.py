"""Train one variant of CrossFlowVampVAE; see README.md for what each run leaves behind.

    python train.py --demo                                      handwritten digits, minutes on a laptop, no downloads
    python train.py --exp_name my_run                           CIFAR-10 with the default recipe
    python train.py --dataset folder --data_dir path/to/images  any images
    python train.py --exp_name my_run --resume auto             go on where it stopped (or start, if it never ran)
    torchrun --nproc_per_node=4 train.py --exp_name my_run      the same run on four GPUs, batch_size being their sum
"""
import argparse
import contextlib
import copy
import functools
import inspect
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models.vamp_flow import (
    DECODE_FROM,
    FLOW_CONTEXTS,
    FLOW_PRIORS,
    LATENT_LAYOUTS,
    MIXTURE_COVARIANCES,
    MIXTURE_WEIGHTS,
    PRIORS,
    CrossFlowVampVAE,
    FoldNorms,
    UpConv2d,
    check_flow,
    check_fused,
    fused_sizes,
)
from utils import (
    DATA_CACHE,
    FEW_IMAGES,
    INCEPTION_FILE,
    LATENT_BLOCK,
    FlagParser,
    InceptionFeatures,
    LatentHealth,
    MemoryImages,
    UserError,
    add_data_flags,
    add_device_flag,
    all_mean,
    atomic_write,
    cached_statistics,
    check_saved_flags,
    dead_note,
    exact_convolutions,
    extract_features,
    frechet_distance,
    gather,
    generate_images,
    hub_file,
    image_grid,
    is_fid,
    is_main,
    join_processes,
    load_data,
    load_hub_weights,
    lock_folder,
    mean_and_covariance,
    my_share,
    name_again,
    process_count,
    progress_bar,
    pyplot,
    read_checkpoint,
    read_json,
    remove_temporary_files,
    require_finite,
    run,
    save_checkpoint,
    save_figure,
    save_png,
    seeded,
    spread,
    to_float,
    to_uint8,
    true_false,
    weights_title,
    writable_folder,
    write_json,
)

LPIPS_FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}

# What --demo changes; any flag beside it still wins.
DEMO = dict(exp_name="demo", dataset="digits", img_size=16, hidden_dims=[32, 64], latent_dim=16, num_components=50,
            flow_length=2, flow_seq_len=2, flow_embed_dim=32, flow_heads=2, flow_layers=1, lpips_net="none", fid_every=0,
            epochs=30, warmup_epochs=0, beta_max=0.4, free_bits=0.0, lr=2e-3, ema_decay=0.99, batch_size=64,
            val_images=0, sample_every=10, threads=1)

# What --preset changes in the default recipe; --demo and any flag beside it still win. best: the last halving, to 2x2
# pixels of 32, costs time and quality. gmm: a second stage, the Gaussian mixture of Ghosh et al. 2020; gmm_flow: with a flow
# before it; what these name is not taken from the first stage.
PRESETS = {
    "best": dict(decode_from="z0", prior="mog", mixture_weights="learned", free_bits=0.0, hidden_dims=[64, 128, 256]),
    "gmm": dict(prior="mog", mixture_weights="learned", mixture_covariance="full", num_components=30, flow_length=0,
                beta_max=1.0, epochs=4),
    "gmm_flow": dict(prior="mog", mixture_weights="learned", mixture_covariance="full", num_components=10, freeze_mixture=True,
                     flow_length=6, flow_seq_len=16, flow_embed_dim=64, flow_heads=2, flow_layers=1, flow_whiten=True,
                     decode_from="z0", beta_max=1.0, epochs=24, batch_size=256, lr=2e-3),
}
SECOND_STAGES = ("gmm", "gmm_flow")     # of the presets

# Steps from which on the compiler's minute or two pays.
WORTH_COMPILING = 10_000

# Flags that may differ when a run is resumed; the rest define the result, and a different value is refused by name.
MAY_DIFFER = {"exp_name", "save_dir", "data_dir", "device", "resume", "overwrite", "stop_epoch", "demo", "threads", "amp",
              "compile", "cuda_graph", "fused_flow", "fused_lpips", "channels_last", "deterministic", "num_workers",
              "tensorboard", "sample_every", "grid_images", "fid_every", "eval_batch_size", "save_every", "save_every_s",
              "keep", "check_every", "data_cache"}
# Of these, what a resumed run does not take over from the checkpoint.
NOT_INHERITED = {"exp_name", "save_dir", "device", "compile", "cuda_graph", "fused_flow", "fused_lpips", "channels_last",
                 "resume", "overwrite", "stop_epoch", "demo"}

TERMS = ("loss", "pixel", "LPIPS", "KL_Raw", "KL_optim", "log_q0", "log_det", "log_p", "balance", "under_floor",
         "grad_norm", "skipped")
COLUMNS = ("epoch", "beta", "lr", "train_loss", "val_loss", "recon", "lpips", "kl_raw", "kl_optim", "log_q0", "log_det",
           "log_p", "balance", "floor_share", "grad_norm", "skipped_steps", "val_recon", "val_lpips", "val_kl_raw",
           "val_log_q0", "val_log_det", "val_log_p", "active_units", "effective_components", "dead_components", "fid",
           "img_per_s")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def build_parser():
    parser = FlagParser(description=__doc__)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("run")
    group.add_argument("--demo", action="store_true", help="digits and a small model; other flags still apply")
    group.add_argument("--preset", choices=PRESETS, default=None,
                       help="best: a prior that keeps its components and a network that learns faster, at less cost; "
                            "gmm: with --fit_prior, Gaussians of full covariance as the prior of a finished model; "
                            "gmm_flow: the same with a flow before them, fewer nats but samples hardly nearer; other flags "
                            "still apply (README.md, Results)")
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
                       help="autocast; auto: bf16 on a CUDA GPU that has it, else none (on a CPU that has it, bf16 pays "
                            "with LPIPS above all)")
    group.add_argument("--compile", action=switch, default=None,
                       help=f"torch.compile (default: on CUDA, for runs of {WORTH_COMPILING:,} steps or more)")
    group.add_argument("--cuda_graph", action=switch, default=None,
                       help="a training step as one CUDA graph, so that Python does not set the pace (default: on CUDA, one "
                            "process)")
    group.add_argument("--fused_flow", action=switch, default=None,
                       help="the flow's layers as one kernel each (default: on CUDA in bf16, where Triton is installed)")
    group.add_argument("--fused_lpips", action=switch, default=None,
                       help="each convolution of LPIPS and its ReLU as one cuDNN call (default: on CUDA in bf16, without "
                            "--deterministic)")
    group.add_argument("--channels_last", action=switch, default=None,
                       help="memory layout of the convolutions (default: on CUDA only)")
    group.add_argument("--deterministic", action="store_true",
                       help="the same bits every time on the same device and versions; slower on a GPU")
    group.add_argument("--tensorboard", action=switch, default=True, help="write TensorBoard events, if it is installed")

    group = add_data_flags(parser)
    group.add_argument("--data_cache", action=switch, default=True,
                       help="keep many decoded image files in save_dir/data_cache, so that the next start need not decode")
    group.add_argument("--flip", action=switch, default=None, help="random horizontal flips (default: on, digits off)")
    group.add_argument("--val_images", type=int, default=2000,
                       help="held-out images, evenly spread, for the validation after every epoch; 0 = all")

    group = parser.add_argument_group("model")
    group.add_argument("--fit_prior", metavar="PATH", default=None,
                       help="a second stage: encoder and decoder of this checkpoint, frozen; the mixture and a flow of the "
                            "prior's own are fitted to its posteriors, from its own prior on if that has a flow, else anew "
                            "(free_bits and warmup_epochs are then 0 unless given)")
    group.add_argument("--latent_dim", type=int, default=128, help="D")
    group.add_argument("--latent_layout", choices=LATENT_LAYOUTS, default="vector",
                       help="spatial: a map with D / S channels at each of the S positions of the lowest resolution")
    group.add_argument("--hidden_dims", type=int, nargs="+", default=[64, 128, 256, 512], help="channels of each stage")
    group.add_argument("--blocks_per_stage", type=int, default=1, help="ResBlocks at each stage")
    group.add_argument("--prior", choices=PRIORS, default="vamp", help="vamp: learned pseudo-inputs; mog: free mixture")
    group.add_argument("--num_components", type=int, default=100, help="K, for vamp and mog")
    group.add_argument("--pseudo_init", choices=("data", "noise"), default="data",
                       help="where the components start; vamp keeps more of them alive on real images from noise, and with "
                            "--warmup_epochs 0")
    group.add_argument("--pseudo_noise", type=float, default=0.05, help="std of the noise added to data, pixels in [-1, 1]")
    group.add_argument("--flow_length", type=int, default=8, help="coupling layers, 0 = no flow")
    group.add_argument("--flow_seq_len", type=int, default=8,
                       help="tokens per latent half (default: 8; with a spatial latent S, a token is a position)")
    group.add_argument("--flow_embed_dim", type=int, default=128, help="token width")
    group.add_argument("--flow_heads", type=int, default=4, help="attention heads")
    group.add_argument("--flow_layers", type=int, default=2, help="attention blocks per conditioner")
    group.add_argument("--flow_mlp_ratio", type=int, default=4, help="hidden width of the blocks' MLP over the token width")
    group.add_argument("--flow_whiten", action=switch, default=False,
                       help="with --fit_prior and full covariances: a constant linear map before the flow, after which the "
                            "latents' channels (at each position) are uncorrelated")
    group.add_argument("--flow_prior", choices=FLOW_PRIORS, default="unflowed", help="does the prior follow the flow?")
    group.add_argument("--flow_context", choices=FLOW_CONTEXTS, default="none", help="encoder: amortised flow")
    group.add_argument("--decode_from", choices=DECODE_FROM, default="zK",
                       help="what the decoder sees; z0: the flow belongs to the prior alone")
    group.add_argument("--mixture_weights", choices=MIXTURE_WEIGHTS, default="uniform", help="of the prior's components")
    group.add_argument("--mixture_covariance", choices=MIXTURE_COVARIANCES, default="diag",
                       help="of the components of --prior mog; with --fit_prior, full ones start by EM")
    group.add_argument("--freeze_mixture", action=switch, default=False,
                       help="with --fit_prior and full covariances: the mixture stays as EM leaves it, and only the flow is "
                            "trained, at whatever learning rate that wants")
    group.add_argument("--posterior_std", type=float, default=0.0, help="one sigma for every posterior, 0 = the encoder's")
    group.add_argument("--scale_bound", type=float, default=2.0, help="bound of the flow's log-scales")
    group.add_argument("--logvar_clamp", type=float, nargs=2, default=[-10.0, 10.0], metavar=("LOW", "HIGH"),
                       help="bounds of the log-variance")

    group = parser.add_argument_group("loss")
    group.add_argument("--recon_loss", choices=("l1", "mse"), default="l1", help="summed over pixels, mean over images")
    group.add_argument("--lpips_net", choices=(*LPIPS_FILES, "none"), default="vgg", help="trunk of LPIPS, none = off")
    group.add_argument("--lpips_weight", type=float, default=100.0, help="factor of LPIPS")
    group.add_argument("--lpips_linear", type=true_false, default=True, metavar="True|False",
                       help="lpips' learned channel weights; False: uniform ones (for a stand-in trunk)")
    group.add_argument("--balance", type=float, default=0.0,
                       help="factor of log K - H(mean responsibility of a batch), against dead components, 0 = off")
    group.add_argument("--beta_max", type=float, default=0.2, help="factor of the KL after warm-up")
    group.add_argument("--warmup_epochs", type=float, default=20, help="epochs over which beta rises from 0")
    group.add_argument("--free_bits", type=float, default=0.5, help="nats of KL per dimension that cost nothing, 0 = off")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, default=1000, help="passes over the training images")
    group.add_argument("--batch_size", type=int, default=128, help="images a step, of all processes together")
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate at the start of the cosine")
    group.add_argument("--lr_min", type=float, default=0.0, help="learning rate at its end")
    group.add_argument("--weight_decay", type=float, default=1e-4, help="AdamW's, on weight matrices only")
    group.add_argument("--adam_betas", type=float, nargs=2, default=[0.9, 0.999], metavar=("B1", "B2"), help="of AdamW")
    group.add_argument("--grad_clip", type=float, default=5000.0,
                       help="largest gradient norm, 0 = off (the loss sums over pixels: norms near 1000 are normal)")
    group.add_argument("--skip_grad_norm", type=float, default=0.0,
                       help="steps with a larger gradient norm are left out and counted, 0 = off")
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
    group.add_argument("--keep", type=int, default=2,
                       help="checkpoints kept: last.pth and, as step_<N>.pth, those before it")
    group.add_argument("--check_every", type=int, default=50, help="flow self-check every N epochs, 0 = only at the start")
    return parser


def parse_args(argv=None):
    """(args, names of the flags that were given on the command line)."""
    parser = build_parser()
    first = parser.parse_args(argv)                             # --help ends here, with the recipe's defaults
    silent = build_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(silent.parse_args(argv)))
    parser.set_defaults(**PRESETS.get(first.preset, {}))
    if first.demo:
        # Running the demo twice is no accident (see require_the_same_demo); a run with a name or place of its own is not to
        # be lost.
        parser.set_defaults(**{**DEMO, "overwrite": not given & {"exp_name", "save_dir", "resume"}})
    args = parser.parse_args(argv)
    drop_the_meaningless(args, given)
    make_tokens_positions(args, given)
    return args, given


def drop_the_meaningless(args, given):
    """Set back what a preset or a first stage brought along and another flag leaves without a meaning."""
    full = args.prior == "mog" and args.mixture_covariance == "full"
    for name, meaningless in (("decode_from", args.flow_length == 0), ("mixture_weights", args.prior == "standard"),
                              ("mixture_covariance", args.prior != "mog"), ("flow_whiten", args.flow_length == 0 or not full)):
        if meaningless and name not in given:
            setattr(args, name, build_parser().get_default(name))


def make_tokens_positions(args, given):
    """As many tokens of a flow as a spatial latent has positions, unless a flag, the preset or --demo says how many."""
    named = {*given, *PRESETS.get(args.preset, ()), *(DEMO if args.demo else ())}
    if args.latent_layout == "spatial" and args.flow_length and "flow_seq_len" not in named:
        args.flow_seq_len = max(1, args.img_size // 2 ** len(args.hidden_dims)) ** 2


def check_flags(args, given, fresh=True):
    """Raise UserError on values out of range and on pairs that make no sense, naming the flags."""
    at_least = dict(latent_dim=1, blocks_per_stage=0, num_components=1, flow_length=0, flow_seq_len=1, flow_embed_dim=1,
                    flow_heads=1, flow_layers=1, flow_mlp_ratio=1, epochs=1, batch_size=1, sample_every=0, grid_images=1,
                    fid_every=0, fid_samples=2, eval_batch_size=0, save_every=1, save_every_s=0, check_every=0, keep=1,
                    val_images=0, stop_epoch=0, threads=0, weight_decay=0, lr_min=0, grad_clip=0, skip_grad_norm=0, balance=0,
                    posterior_std=0, beta_max=0, warmup_epochs=0, free_bits=0, lpips_weight=0, pseudo_noise=0, seed=0)
    for name, low in at_least.items():
        value = getattr(args, name)
        if not low <= value < math.inf:
            raise UserError(f"--{name} {value}: must be {low} or more{', and finite' * (value == math.inf)}")
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
    of_preset = "" if "freeze_mixture" in given else f" (of --preset {args.preset})"
    senseless = [
        (args.flow_length == 0 and args.flow_prior == "pushed", "--flow_prior pushed with --flow_length 0: no flow to push"),
        (args.flow_length == 0 and args.flow_context == "encoder", "--flow_context encoder with --flow_length 0: no flow"),
        (args.preset in SECOND_STAGES and not args.fit_prior,
         f"--preset {args.preset}: a second stage, which needs --fit_prior PATH"),
        (args.preset in SECOND_STAGES and args.demo and fresh,
         f"--preset {args.preset} with --demo: leave --demo out, the second stage takes data and model from the first"),
        (args.freeze_mixture and not args.fit_prior, "--freeze_mixture: needs --fit_prior PATH, to whose posteriors EM fits "
         "the mixture"),
        (args.freeze_mixture and args.mixture_covariance == "diag", f"--freeze_mixture{of_preset} with --mixture_covariance "
         f"{args.mixture_covariance}: only full covariances are fitted by EM"),
        (args.freeze_mixture and args.flow_length == 0, f"--freeze_mixture{of_preset} with --flow_length 0: nothing would be "
         f"trained"),
        (args.flow_whiten and not args.fit_prior, "--flow_whiten: needs --fit_prior PATH, whose latents it is found from"),
        (args.flow_whiten and args.mixture_covariance == "diag", f"--flow_whiten with --mixture_covariance "
         f"{args.mixture_covariance}: diagonal components start at the latents as they are"),
        (args.flow_whiten and args.flow_length == 0, "--flow_whiten with --flow_length 0: there is no flow"),
        (args.fit_prior and args.prior == "standard" and args.flow_length == 0, "--fit_prior: nothing to fit in a standard "
         "prior without a flow"),
        (args.flow_length == 0 and args.decode_from == "z0", "--decode_from z0 with --flow_length 0: zK is z0 there"),
        (args.prior == "standard" and args.mixture_weights == "learned", "--mixture_weights with --prior standard: no mixture"),
        (args.prior != "mog" and args.mixture_covariance == "full", f"--mixture_covariance full with --prior {args.prior}: "
         f"needs --prior mog"),
        (args.prior == "standard" and args.balance > 0, "--balance with --prior standard: no mixture"),
        (args.flow_prior == "pushed" and args.flow_context == "encoder",
         "--flow_prior pushed with --flow_context encoder: the prior needs one flow for all images"),
        (args.lpips_net == "none" and "lpips_weight" in given and args.lpips_weight > 0,
         "--lpips_weight with --lpips_net none: there is no LPIPS to weigh"),
        (args.lpips_net != "none" and args.lpips_weight == 0, "--lpips_weight 0: use --lpips_net none"),
        (args.stop_epoch > args.epochs, f"--stop_epoch {args.stop_epoch} lies after --epochs {args.epochs}"),
        (args.lr_min > args.lr, f"--lr_min {args.lr_min} is above --lr {args.lr}"),
        (args.resume and args.overwrite, "--resume with --overwrite: go on, or start again?"),
    ]
    for wrong, message in senseless:
        if wrong:
            raise UserError(message)
    if args.warmup_epochs > args.epochs and args.beta_max:
        print(f"note: beta reaches {args.beta_max * args.epochs / args.warmup_epochs:.3g}, not --beta_max {args.beta_max}: "
              f"--warmup_epochs {args.warmup_epochs:g} is longer than the run")


def files_of_run(folder):
    """{name: what changes when it is written} of the files that say how far a run has come."""
    found = {}
    for path in [*folder.glob("*.pth"), *folder.glob("history.csv")]:
        with contextlib.suppress(FileNotFoundError):      # a run that is going on removes its older checkpoints
            stat = path.lstat()
            found[path.name] = stat.st_size, stat.st_mtime_ns
    return found


def require_the_same_demo(args, folder):
    """Raise UserError if the demo that lies there, which --demo replaces, was trained with other flags."""
    if not (any(folder.glob("*.pth")) and (folder / "args.json").exists()):
        return
    saved = read_json(folder / "args.json")
    changed = sorted(k for k, v in vars(args).items() if k in saved and k not in MAY_DIFFER and saved[k] != v)
    if changed:
        raise UserError(f"{folder} holds a demo with other flags: " + ", ".join(
            f"--{k} ({saved[k]}, not {getattr(args, k)})" for k in changed) + "; another --exp_name keeps both, --overwrite "
            "replaces it")


def resolve_resume(args, given):
    """Find the checkpoint to go on from and bring the flags into line with it.

    Returns its dict and its path, None twice for a fresh start, and files_of_run of the run's folder when it was looked at:
    only later, with everything else at hand, is the folder locked.
    """
    def require_empty(folder, way_out, what=("*.pth", "history.csv")):
        if not args.overwrite and any(any(folder.glob(pattern)) for pattern in what):
            raise UserError(f"{folder} already holds a run: {way_out}another --exp_name keeps both")

    own = Path(args.save_dir, args.exp_name)
    fresh = "--resume auto goes on with it, --overwrite starts again, "
    if args.resume is None:
        seen = files_of_run(own)
        require_empty(own, fresh)
        return None, None, seen
    path = own / "last.pth" if args.resume == "auto" else Path(args.resume)
    seen = files_of_run(path.parent)
    if args.resume == "auto" and not path.exists():
        # A history alone is what is left of a run that was killed before its first checkpoint: nothing can be lost.
        require_empty(own, "it has no last.pth to go on from; --overwrite starts again, ", what=["*.pth"])
        print(f"--resume auto: no {path} yet, starting from the beginning")
        return None, None, seen
    checkpoint = read_checkpoint(path, resumable=True)
    if checkpoint.get("optimizer") is None:
        raise UserError(f"{path}: holds no optimiser state (best_fid.pth never does); resume from last.pth")
    saved = checkpoint["args"]
    check_saved_flags(build_parser(), saved, path)
    # An older one lacks newer flags: it was trained with what are their defaults, where these do not depend on the data.
    defaults = {k: v for k, v in vars(build_parser().parse_args([])).items() if k not in ("flip", "in_channels")}
    known = {**defaults, **checkpoint["model_args"], **saved}
    changed = sorted(k for k in given - MAY_DIFFER if k in known and known[k] != getattr(args, k)
                     and not (k == "fit_prior" and known[k] and os.path.realpath(known[k]) == os.path.realpath(args.fit_prior)))
    if changed:
        raise UserError(f"{path} was trained with other values of " + ", ".join(
            f"--{k} ({known[k]}, not {getattr(args, k)})" for k in changed) + "; leave them out, or start a new run")
    for name, value in known.items():
        if hasattr(args, name) and name not in given and name not in NOT_INHERITED:
            setattr(args, name, value)
    if args.resume != "auto":                               # what was not given comes from where the checkpoint lies
        source = path.absolute().parent
        in_its_run = re.fullmatch(r"last\.pth|step_\d+\.pth", path.name)
        if not in_its_run and "exp_name" not in given:
            raise UserError(f"--resume {path}: no name that a run gives its checkpoints; say with --exp_name how the run that "
                            f"goes on from it is called (in --save_dir {args.save_dir})")
        args.save_dir = args.save_dir if "save_dir" in given or not in_its_run else str(source.parent)
        args.exp_name = args.exp_name if "exp_name" in given else source.name
        if not in_its_run or Path(args.save_dir, args.exp_name).resolve() != source.resolve():
            seen = files_of_run(Path(args.save_dir, args.exp_name))
            require_empty(Path(args.save_dir, args.exp_name), "", what=["*.pth"])       # as above: a history alone is nothing
    return checkpoint, path, seen


# Unless given: its images, and what reconstructions and samples are measured with.
TAKEN_FROM_FIRST_STAGE = ("dataset", "data_dir", "split_seed", "cache_gb", "flip", "recon_loss", "lpips_net", "lpips_weight",
                          "lpips_linear", "fid_every", "fid_samples", "fid_dims")
SHARED_WITH_FIRST_STAGE = ("in_channels", "img_size", "latent_dim", "latent_layout", "hidden_dims", "blocks_per_stage",
                           "posterior_std", "logvar_clamp")
# What the first stage's mixture and flow can only be taken over with, beside a flow that is not longer than the new one.
SHAPE_OF_MIXTURE = ("prior", "num_components", "mixture_weights", "mixture_covariance")
SHAPE_OF_FLOW = ("flow_seq_len", "flow_embed_dim", "flow_heads", "flow_layers", "flow_mlp_ratio", "flow_whiten", "scale_bound")
# Of --mixture_covariance full in a second stage: so many latents at most, and of few images as many draws of each posterior
# as make some for each dimension, without which their covariance would lack directions.
EM_STEPS, EM_POINTS, EM_POINTS_A_DIMENSION = 20, 2 ** 17, 50


class FirstStage(NamedTuple):
    """What --fit_prior starts from: weights by their names in the model."""
    data_id: str                # the fingerprint of its training images
    cache_gb: float             # which that depends on
    frozen: dict                # of the encoder and the decoder
    prior: dict                 # of the mixture and the flow; without those that start anew
    flow_length: int            # layers of that flow
    note: str                   # for the screen


def read_first_stage(args, given):
    """--fit_prior: the FirstStage, the flags brought into line with it. Ex-post density estimation: Dai & Wipf 2019 (arXiv
    1903.05789), Ghosh et al. 2020 (1903.12436)."""
    checkpoint = read_checkpoint(args.fit_prior)
    check_saved_flags(build_parser(), checkpoint["args"], args.fit_prior)
    if Path(args.fit_prior).resolve().parent == Path(args.save_dir, args.exp_name).resolve():
        raise UserError(f"--exp_name {args.exp_name}: would replace the first stage, --fit_prior {args.fit_prior}; choose "
                        f"another name")
    first = checkpoint["model_args"]
    if first["flow_length"] and first["decode_from"] == "zK":
        raise UserError(f"--fit_prior {args.fit_prior}: its decoder takes what its flow makes; the first stage needs "
                        f"--flow_length 0 or --decode_from z0")
    for name in SHARED_WITH_FIRST_STAGE:
        if name in given and getattr(args, name) != first[name]:
            raise UserError(f"--{name} {getattr(args, name)}: --fit_prior {args.fit_prior} has {first[name]}")
        setattr(args, name, first[name])
    for name in set(TAKEN_FROM_FIRST_STAGE) - given - ({"data_dir"} if "dataset" in given else set()):
        setattr(args, name, checkpoint["args"].get(name, getattr(args, name)))
    make_tokens_positions(args, given)
    if first["flow_length"]:
        for name in {"flow_length", *SHAPE_OF_MIXTURE, *SHAPE_OF_FLOW} - given - {*PRESETS.get(args.preset, ())}:
            setattr(args, name, first[name])
    drop_the_meaningless(args, given)
    if args.flow_length:
        if "decode_from" in given and args.decode_from != "z0":
            raise UserError(f"--decode_from {args.decode_from}: --fit_prior keeps the decoder, which takes z0")
        args.decode_from = "z0"
    # With nothing but the prior to learn, there is nothing to warm up and no floor to stand on.
    for name in {"free_bits", "warmup_epochs"} - given:
        setattr(args, name, 0.0)
    weights = checkpoint["ema"] or checkpoint["model"]
    require_finite(weights, args.fit_prior)
    data = checkpoint.get("data_id"), checkpoint["args"].get("cache_gb", args.cache_gb)
    frozen = {name: value for name, value in weights.items() if name.startswith(("encoder.", "decoder."))}
    if not first["flow_length"]:
        return FirstStage(*data, frozen, {}, 0, "the prior starts anew")
    prior = {name: value for name, value in weights.items() if name not in frozen}
    layers = f"the first stage's, {first['flow_length']} of {args.flow_length} flow layers"
    other_flow = [name for name in SHAPE_OF_FLOW if getattr(args, name) != first[name]]
    other_flow += ["flow_length"] * (args.flow_length < first["flow_length"])
    other_mixture = [name for name in SHAPE_OF_MIXTURE if getattr(args, name) != first[name]]
    differ = ", ".join(f"--{name} {getattr(args, name)} (there {first[name]})" for name in other_mixture + other_flow)
    if other_flow or (other_mixture and args.mixture_covariance == "diag"):
        return FirstStage(*data, frozen, {}, 0, f"the prior starts anew, not from the first stage's: {differ}")
    if other_mixture or args.freeze_mixture:    # by EM, wherever the flow has brought the latents; other beginnings need it
        flow = {name: value for name, value in prior.items() if name.startswith("flow.")}                      # at rest
        return FirstStage(*data, frozen, flow, first["flow_length"],
                          f"the flow goes on from {layers}, the mixture starts anew: {differ or '--freeze_mixture'}")
    return FirstStage(*data, frozen, prior, first["flow_length"], f"the prior goes on from {layers}")


# ---------------------------------------------------------------------------------------------------------------------
# Model and loss

def model_args_of(args):
    """The constructor arguments of CrossFlowVampVAE, as plain values for the checkpoint."""
    names = ("in_channels", "img_size", "latent_dim", "hidden_dims", "blocks_per_stage", "num_components", "prior",
             "flow_length", "flow_seq_len", "flow_embed_dim", "flow_heads", "flow_layers", "flow_mlp_ratio", "flow_prior",
             "flow_whiten", "flow_context", "decode_from", "latent_layout", "mixture_weights", "mixture_covariance",
             "posterior_std", "scale_bound", "logvar_clamp")
    return {**{n: getattr(args, n) for n in names}, "perm_seed": args.seed}


class Perceptual(torch.nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): an lpips.LPIPS for images (B, C, H, W) in [-1, 1], C 1 or 3 -> (B,)."""

    def __init__(self, library, sha256):
        super().__init__()
        self.library, self.sha256 = library, sha256

    def forward(self, a, b):
        return self.library(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).flatten()


def build_lpips(net, linear, device, shape, memory_format=torch.contiguous_format):
    """The Perceptual distance of images (C, H, W); its attribute sha256 is that of its trunk's weights."""
    if net == "none":
        return None
    import lpips
    library, digest = load_hub_weights(LPIPS_FILES[net], "use --lpips_net none",
                                       lambda: lpips.LPIPS(net=net, lpips=linear, verbose=False))
    loss = Perceptual(library, digest).eval().requires_grad_(False)
    try:                                # before it goes to the device, where much else can fail
        loss(*torch.zeros(2, 1, *shape))
    except RuntimeError:
        raise UserError(f"--lpips_net {net} needs larger images than --img_size {shape[1]}; use another net or none") from None
    return loss.to(device, memory_format=memory_format)


@torch.library.custom_op("crossvampvae::conv_relu", mutates_args=(),
                         schema="(Tensor x, Tensor weight, Tensor bias, int[] stride, int[] padding) -> Tensor")
def conv_relu(x, weight, bias, stride, padding):
    """relu(conv2d(x)), (B, C, H, W) -> (B, C', H', W') in channels_last, for weights without gradients.

    An operation of its own, as the compiler leaves it alone then: on CUDA one call of cuDNN does it, without writing
    what is before the ReLU.
    """
    if x.device.type == "cuda":
        h = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
    else:
        h = torch.nn.functional.conv2d(x, weight, bias, stride, padding).relu()
    return h.contiguous(memory_format=torch.channels_last)


@conv_relu.register_fake
def _(x, weight, bias, stride, padding):
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding).contiguous(memory_format=torch.channels_last)


def _keep_for_backward(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, weight, output)


def _conv_relu_backward(ctx, grad):
    x, weight, output = ctx.saved_tensors
    grad = torch.ops.aten.convolution_backward(grad * (output > 0), x, weight, None, ctx.stride, ctx.padding, (1, 1), False,
                                               (0, 0), 1, (True, False, False))[0]
    return grad, None, None, None, None


conv_relu.register_autograd(_conv_relu_backward, setup_context=_keep_for_backward)


class ConvReLU(torch.nn.Module):
    """A convolution of constant weights and the ReLU behind it, in bf16: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, conv):
        super().__init__()
        self.register_buffer("weight", conv.weight.detach().to(torch.bfloat16, memory_format=torch.channels_last))
        self.register_buffer("bias", conv.bias.detach().to(torch.bfloat16))
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x):
        return conv_relu(x.to(self.weight.dtype), self.weight, self.bias, self.stride, self.padding)


class HalvedByMax(torch.autograd.Function):
    """max_pool2d(x, 2), (B, C, 2H, 2W) -> (B, C, H, W), with the same gradients: each value asks whether it is the first
    largest of its four, which the compiler can fuse with what follows. PyTorch's own backward pass scatters into a float32
    tensor of its own."""

    @staticmethod
    def forward(ctx, x):
        a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        largest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        first = torch.where(a == largest, 0, torch.where(b == largest, 1, torch.where(c == largest, 2, 3)))
        ctx.save_for_backward(first.to(torch.uint8))
        return largest

    @staticmethod
    def backward(ctx, grad):
        first, = ctx.saved_tensors
        number = torch.arange(4, dtype=torch.uint8, device=grad.device).view(2, 1, 2)
        grad = torch.where(first[:, :, :, None, :, None] == number, grad[:, :, :, None, :, None], 0)    # (B, C, H, 2, W, 2)
        return grad.flatten(4).flatten(2, 3)


class MaxPool(torch.nn.MaxPool2d):
    """Of 2x2 pixels each: (B, C, H, W) -> (B, C, H // 2, W // 2)."""

    def forward(self, x):
        even = x.shape[2] % 2 == x.shape[3] % 2 == 0
        return HalvedByMax.apply(x) if even and torch.compiler.is_compiling() else super().forward(x)


class WeightedSum(torch.nn.Module):
    """A 1x1 convolution to one channel, without a bias: (B, C, H, W) -> (B, 1, H, W). A product and a sum, which the compiler
    joins to what is around them."""

    def __init__(self, conv):
        super().__init__()
        self.register_buffer("weight", conv.weight.detach())

    def forward(self, x):
        return (x * self.weight).sum(1, keepdim=True)


def with_fused_layers(lpips):
    """A copy of a Perceptual that computes in bf16 in fewer and larger pieces, to train with."""
    lpips = copy.deepcopy(lpips)
    for layers in [m for m in lpips.library.net.modules() if isinstance(m, torch.nn.Sequential)]:
        named = list(layers.named_children())
        for (name, conv), (behind, relu) in zip(named, named[1:]):
            if isinstance(conv, torch.nn.Conv2d) and isinstance(relu, torch.nn.ReLU):
                assert conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
                setattr(layers, name, ConvReLU(conv))
                setattr(layers, behind, torch.nn.Identity())
        for name, pool in named:
            if isinstance(pool, torch.nn.MaxPool2d) and (pool.kernel_size, pool.stride) == (2, 2):
                assert pool.padding == 0 and pool.dilation == 1 and not pool.ceil_mode
                setattr(layers, name, MaxPool(2))
    if lpips.library.lpips:                               # weighted channels (linear)
        for i, linear in enumerate(lpips.library.lins):
            lpips.library.lins[i] = WeightedSum(linear.model[-1])
    return lpips


def check_fused_lpips(lpips, fused, shape, seed=0):
    """Relative errors of the distances and their gradients, the larger of the two: of a with_fused_layers in autocast, and of
    autocast without; both against float32, on images (n, C, H, W) on the network's device."""
    device, generator = next(lpips.buffers()).device, torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    x = torch.tanh(x)

    def results(network, amp):
        recon = torch.tanh(x + 0.3 * noise).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            distance = network(recon, x).float()
        return distance.detach(), torch.autograd.grad(distance.sum(), recon)[0]

    with exact_convolutions():
        exact = results(lpips, False)
        return tuple(max(((found - wanted).norm() / wanted.norm()).item()
                         for found, wanted in zip(results(network, True), exact)) for network in (fused, lpips))


def require_near(error, allowed):
    """Raise RuntimeError if what is to replace a part of the network is less exact than autocast is (NaN: too)."""
    if not error <= 2 * allowed + 0.01:
        raise RuntimeError(f"relative error {error:.3f}, of autocast {allowed:.3f}")


def fuse_lpips(trainer, blank):
    """Let a with_fused_layers train instead of LPIPS, if it computes here what that does; a note says if not."""
    def checked():
        fused = with_fused_layers(trainer.lpips)
        require_near(*check_fused_lpips(trainer.lpips, fused, (min(len(blank), 32), *blank.shape[1:])))
        return fused

    fused, problem = tried(checked)
    if problem:
        print(f"note: the fused layers of LPIPS do not work here ({problem}); going on without them")
    else:
        trainer.lpips, trainer.criterion = fused, functools.partial(loss_parts, trainer.args, trainer.model, fused)


def reconstruction_error(args, lpips, x, recon):
    """(pixel, LPIPS), means over the batch: the --recon_loss summed over an image's pixels; LPIPS, 0 where it is off."""
    recon = recon.float()
    difference = (recon - x).abs() if args.recon_loss == "l1" else (recon - x).square()
    pixel = difference.sum((1, 2, 3)).mean()
    return pixel, lpips(recon, x).float().mean() if lpips else pixel.new_zeros(())


def loss_parts(args, model, lpips, x, out):
    """What the objective is made of, each the mean over the batch: the reconstruction_error (0 where nothing was decoded,
    --fit_prior), and the one-sample KL with its parts, in nats; and, for --balance, the mean responsibilities (K,)."""
    pixel = perceptual = out.mu.new_zeros(())
    if out.recon is not None:
        pixel, perceptual = reconstruction_error(args, lpips, x, out.recon)
    kl, log_q0, log_det, log_p = (part.mean() for part in model.kl_terms(out))
    usage = model.responsibilities(out).mean(0) if args.balance else None                       # (K,)
    return {"pixel": pixel, "LPIPS": perceptual, "KL_Raw": kl, "log_q0": log_q0, "log_det": log_det, "log_p": log_p}, usage


def objective(args, parts, usage, beta):
    """loss = recon + w LPIPS + beta max(KL - free_bits D, 0) + balance (log K - H(usage)), and what else TERMS names,
    from the loss_parts.

    The floor acts on the mean KL of the global batch (free bits: Kingma et al. 2016, arXiv 1606.04934), and so does the
    entropy H. Each process has the mean of its own share; of the others it needs the comparison with the floor and the
    logarithm of the usage, neither of which passes a gradient: the mean of what all return is the loss.
    """
    kl, floor = parts["KL_Raw"], args.free_bits * args.latent_dim
    under_floor = (all_mean(kl.detach()) < floor).float()
    kl_optim = (kl - floor) * (1 - under_floor)
    loss = parts["pixel"] + args.lpips_weight * parts["LPIPS"] + beta * kl_optim
    balance = kl.new_zeros(())
    if args.balance:
        balance = math.log(len(usage)) + (usage * all_mean(usage.detach()).clamp_min(1e-12).log()).sum()
        loss = loss + args.balance * balance
    return {"loss": loss, **parts, "KL_optim": kl_optim, "balance": balance, "under_floor": under_floor}


def weight_groups(model, weight_decay):
    """AdamW groups: decay on the matrices of linear and convolution layers; biases, norms, tokens and priors without."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) in matrices]
    free = [p for p in trained if id(p) not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@torch.no_grad()
def start_prior(args, model, data):
    """--pseudo_init data: each component starts at a training image plus a little noise; images repeat if K > N. Those of
    mog are as wide as the latents of more images."""
    if args.prior == "standard" or args.pseudo_init == "noise":
        return
    generator = seeded("cpu", args.seed, "components")
    images = max(args.num_components, min(len(data), 256)) if args.prior == "mog" else args.num_components
    chosen = torch.randperm(len(data), generator=generator)[torch.arange(images) % len(data)]
    images = to_float(data.take(chosen).cpu())
    noise = args.pseudo_noise * torch.randn(images.shape, generator=generator)
    model.init_prior((images + noise).to(next(model.parameters()).device))


@torch.no_grad()
def load_first_stage(model, first):
    """Put the weights of a FirstStage into the model, whose flow may have more layers.

    The new layers come before the old ones and are the identity but for their permutations, which the first old one's
    undoes: the density is the first stage's.
    """
    state = dict(first.frozen)
    if first.prior:
        new = len(model.flow.couplings) - first.flow_length
        order = torch.arange(model.latent_dim)            # z as it leaves the new layers is z0[:, order]
        for coupling in model.flow.couplings[:new]:
            order = order[coupling.perm.cpu()]
        for name, value in first.prior.items():
            if name.startswith("flow.couplings."):
                _, _, layer, rest = name.split(".", 3)
                value = order.argsort()[value] if (layer, rest) == ("0", "perm") else value
                name = f"flow.couplings.{int(layer) + new}.{rest}"
            state[name] = value
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected


@torch.no_grad()
def start_mixture(args, model, posteriors, whiten):
    """--fit_prior with --mixture_covariance full: EM on samples of posteriors (N, 2, D, F), as encode_all leaves them; before
    it, if asked for, the flow's whitening from the same samples."""
    generator = seeded("cpu", args.seed, "mixture")
    views = posteriors.images.shape[-1]
    chosen = torch.randperm(len(posteriors) * views, generator=generator)[:EM_POINTS]
    if len(chosen) < model.num_components:
        raise UserError(f"--num_components {model.num_components}: only {len(chosen)} latents to fit them to")
    draws = -(-min(EM_POINTS, EM_POINTS_A_DIMENSION * model.latent_dim) // len(chosen))
    chosen = chosen.repeat(draws)
    device, points = next(model.parameters()).device, []
    for some in chosen.split(LATENT_BLOCK):
        mu, logvar = posteriors.images[some // views, ..., some % views].to(device).unbind(1)
        points.append(mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator).to(device))
    if whiten:
        model.flow.set_whitening_(torch.cat(points))
    points = [model.apply_flow(z0)[0] for z0 in points]   # the flow is the prior's own: the mixture lives at zK
    print(f"EM          {EM_STEPS} steps for {model.num_components} components of full covariance, on {len(chosen)} latents\
{f', {draws} draws of each posterior' if draws > 1 else ''}")
    model.fit_mixture_(torch.cat(points), EM_STEPS, generator,
                       lambda steps: progress_bar(len(steps), "EM", "step", iterable=steps))
    if process_count() > 1:     # whose posteriors, and so their clusters, may differ by rounding
        for name, value in model.state_dict().items():
            if name.startswith("prior_") or name in ("flow.log_scale", "flow.tril"):
                torch.distributed.broadcast(value, 0)
    low, high = model.logvar_clamp
    outside = ((model.prior_logvar < low) | (model.prior_logvar > high)).sum().item()
    if outside:
        print(f"note: {outside} of the mixture's {model.prior_logvar.numel()} log-variances lie outside --logvar_clamp {low:g} "
              f"{high:g}, the first stage's, and are held there")


class PriorFit(torch.nn.Module):
    """What a training step of --fit_prior calls: the model between its frozen encoder and decoder."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, eps):
        """x (B, 2, D, F), mu and logvar as encode_all leaves them, the first of the F; eps (B, D) -> VAEOutput."""
        return self.model.carry(*x[..., 0].unbind(1), eps)


@torch.no_grad()
def encode_all(args, model, data, device):
    """The posteriors of a data set, float32 (N, 2, D, F): mu and logvar of the image and, with --flip, of its mirror
    image. A second stage trains on them, since the encoder no longer moves; flipping the last axis flips the image."""
    size = images_at_a_time(args.img_size)                # not --eval_batch_size, which may change when a run is resumed
    posteriors = []
    with progress_bar(len(data), "encoding") as bar:
        for batch in data.batches(torch.arange(len(data)).split(size), device):
            x = to_float(batch)
            views = [x, x.flip(3)] if args.flip else [x]
            posteriors.append(torch.stack([torch.stack(model.encode(y), 1) for y in views], 3).cpu())
            bar.update(len(batch))
    posteriors = torch.cat(posteriors)
    return MemoryImages(posteriors, device if posteriors.nbytes <= args.cache_gb * 2 ** 30 else "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Everything that a checkpoint holds, and where it goes

def same_kind(a, b):
    """Are two nests of dicts and lists alike but for the numbers? a may hold more keys than b."""
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() >= b.keys() and all(same_kind(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return isinstance(a, (list, tuple)) and len(a) == len(b) and all(map(same_kind, a, b))
    return type(a) is type(b) or (type(a), type(b)) == (int, float)


@torch.no_grad()
def lie_together(tensors):
    """Move tensors, in place, into one block of memory, each as it lay by itself: what is then done to the block, which is
    returned (N,), is done to all of them in one operation. None if there are none."""
    if not tensors:
        return None
    room = [-(-t.numel() // 64) * 64 for t in tensors]    # matrix units want their matrices aligned
    block = tensors[0].new_zeros(sum(room))
    for t, part in zip(tensors, block.split(room)):
        assert t.numel() == 0 or 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) == t.numel(), "has gaps"
        t.data = part.as_strided(t.shape, t.stride()).copy_(t)
    return block


class Now(NamedTuple):
    """What changes from step to step: numbers, or tensors of one number where a CUDA graph reads them."""
    beta: float
    lr: float
    ema_share: float            # of the weights in their moving average
    step: int                   # from 1


class Trainer:
    """Weights, optimiser, schedule, history and position of one training run.

    network and criterion are what a training step calls: the model and its loss, compiled and distributed where asked; lpips
    is the Perceptual that this loss has.
    graph is the StepGraph that does the whole of it, if there is one; rounded the RoundedWeights.
    """

    def __init__(self, args, model, lpips, steps_per_epoch, batch_size, folder, data_id, fid_id=None):
        self.args, self.model, self.folder, self.data_id, self.fid_id = args, model, folder, data_id, fid_id
        self.lpips_id = lpips.sha256 if lpips else None
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.device = next(model.parameters()).device
        self.network, self.lpips, self.criterion = model, lpips, functools.partial(loss_parts, args, model, lpips)
        self.graph = self.rounded = None
        self.epoch, self.step, self.best_fid, self.history = 0, 0, math.inf, []
        self.ema = copy.deepcopy(model).eval().requires_grad_(False) if args.ema_decay else None
        self.fused = self.device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(weight_groups(model, args.weight_decay), lr=args.lr, betas=tuple(args.adam_betas),
                                           fused=self.fused)
        total, low = args.epochs * steps_per_epoch, args.lr_min / args.lr
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1))))
        # Walking through the modules at every step would cost a GPU more than the update itself.
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.averages = [a for a, p in zip(self.ema.parameters(), model.parameters()) if p.requires_grad] if self.ema else []
        if self.ema is not None:
            assert all(a.stride() == p.stride() for a, p in zip(self.averages, self.parameters))
            self.all_parameters, self.all_averages = lie_together(self.parameters), lie_together(self.averages)
        self.sums = torch.zeros(len(TERMS), device=self.device)         # of this epoch's steps so far, all processes
        self.unread = torch.zeros(len(TERMS), device=self.device)       # of this process's steps since the last read()
        self.first_bad = torch.zeros(len(TERMS), device=self.device)    # step (from 1) at which a term was not finite
        self.last_saved = time.monotonic()

    @property
    def best_weights(self):
        """The model to sample and evaluate with, not compiled and in eval mode: EMA, or a copy of the raw one where EMA is
        off."""
        return self.ema or copy.deepcopy(self.model).eval()

    def beta(self):
        progress = self.step / self.steps_per_epoch / self.args.warmup_epochs if self.args.warmup_epochs else 1.0
        return self.args.beta_max * min(progress, 1.0)

    def now(self):
        """Of the step that comes next."""
        step = self.step + 1
        return Now(self.beta(), self.optimizer.param_groups[0]["lr"],
                   1 - min(self.args.ema_decay, (1 + step) / (10 + step)), step)

    @torch.no_grad()
    def gradient_norm(self):
        """Of all gradients together."""
        return torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])).norm()

    @torch.no_grad()
    def update_weights(self, norm, ema_share):
        """Clipping to --grad_clip, optimiser, projection and EMA; True (on the device) where --skip_grad_norm leaves the step
        out. norm: of the gradients."""
        args, skipped = self.args, ~(norm <= (self.args.skip_grad_norm or math.inf))
        excess = (norm / args.grad_clip).clamp(min=1) if args.grad_clip else None
        if self.fused:                                    # the kernels divide by one and look at the other: nothing waits
            self.optimizer.grad_scale, self.optimizer.found_inf = excess, skipped.float() if args.skip_grad_norm else None
        elif args.grad_clip:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], excess)
        if self.fused or not (args.skip_grad_norm and skipped):
            self.optimizer.step()
        self.model.project_()
        if self.ema is not None:
            self.all_averages.lerp_(self.all_parameters, ema_share)
        return skipped

    @torch.no_grad()
    def count(self, terms, step):
        """Add a step's terms to the sums, on the device."""
        values = torch.stack([terms[name].detach().float() for name in TERMS])
        self.unread += values
        self.first_bad.copy_(torch.where((self.first_bad == 0) & ~values.isfinite(), step, self.first_bad))

    def read(self):
        """Bring the sums up to date over all processes, which waits for the device.

        Raises UserError if any term of any step so far was NaN or infinite: called before anything is saved.
        """
        self.sums += all_mean(self.unread)
        self.unread.zero_()
        # The causes before what is computed from them.
        order = ("pixel", "log_q0", "log_det", "log_p", "LPIPS", "KL_Raw", "KL_optim", "balance", "loss", "grad_norm")
        first_bad = {name: min((b for b in steps if b), default=0)
                     for name, *steps in zip(TERMS, *gather(self.first_bad.tolist()))}
        bad = [(int(first_bad[name]), i, name) for i, name in enumerate(order) if first_bad[name]]
        if bad:
            step, _, name = min(bad)
            good = self.folder / "last.pth"
            raise UserError(f"{name} became NaN or infinite at epoch {(step - 1) // self.steps_per_epoch + 1}, step {step}; "
                            + (f"last good checkpoint: {good}" if good.exists() else "no checkpoint was written yet")
                            + "; a new run with a lower --lr or --grad_clip, or with --skip_grad_norm, may help")
        return dict(zip(TERMS, self.sums.tolist()))

    def state(self, optimizer=True):
        """The checkpoint: plain values and tensors only."""
        def weights(model):                               # each by itself in the file, where it is one in the block
            return {name: value.clone() for name, value in model.state_dict().items()}

        return {
            "model": weights(self.model), "ema": weights(self.ema) if self.ema else None,
            "optimizer": self.optimizer.state_dict() if optimizer else None,
            "scheduler": self.scheduler.state_dict() if optimizer else None,
            "epoch": self.epoch, "step": self.step, "best_fid": self.best_fid, "history": self.history,
            "model_args": model_args_of(self.args), "args": vars(self.args),
            "data_id": self.data_id, "lpips_id": self.lpips_id, "fid_id": self.fid_id,
            "epoch_sums": self.sums.cpu(),
        }

    def save(self):
        """last.pth, and the --keep newest of its kind under names of their own."""
        self.read()
        if is_main():
            path = self.folder / "last.pth"
            save_checkpoint(path, self.state())
            if self.args.keep > 1:
                name_again(path, self.folder / f"step_{self.step:09d}.pth")
            kept = {int(p.stem[5:]): p for p in self.folder.glob("step_*.pth") if p.stem[5:].isdigit()}
            current = sorted(step for step in kept if step <= self.step)
            # A later step was left by a damaged or abandoned continuation of this very run.
            for step in kept.keys() - set(current[-self.args.keep:] if self.args.keep > 1 else ()):
                kept[step].unlink()
        self.last_saved = time.monotonic()

    def save_best(self):
        """best_fid.pth, which cannot be resumed from and is a third of the size."""
        self.read()
        if is_main():
            save_checkpoint(self.folder / "best_fid.pth", self.state(optimizer=False))

    def restore(self, checkpoint, path):
        if checkpoint.get("data_id") != self.data_id:
            raise UserError(f"--data_dir {self.args.data_dir}: not the images that {path} was trained on")
        if self.lpips_id and checkpoint.get("lpips_id", self.lpips_id) != self.lpips_id:
            raise UserError(f"--lpips_net {self.args.lpips_net}: {path} was trained with other weights than those in "
                            f"{hub_file(LPIPS_FILES[self.args.lpips_net])} (SHA-256 {str(checkpoint['lpips_id'])[:8]}...)")
        fid_id = checkpoint.get("fid_id")                     # none where no FID was asked for yet
        if fid_id and self.fid_id and fid_id != self.fid_id:
            raise UserError(f"--fid_every {self.args.fid_every}: the FIDs in {path} are of other weights than those in "
                            f"{hub_file(INCEPTION_FILE)} (SHA-256 {str(fid_id)[:8]}...); with 0 the run goes on without FID")
        self.fid_id = self.fid_id or fid_id
        groups, schedule = self.optimizer.state_dict()["param_groups"], self.scheduler.state_dict()
        try:
            self.model.load_state_dict(checkpoint["model"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"])
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = self.fused               # the device's, which may be another than then
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scheduler.load_state_dict({k: v for k, v in checkpoint["scheduler"].items() if k in schedule})
            self.sums.copy_(checkpoint["epoch_sums"])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.best_fid, self.history = float(checkpoint["best_fid"]), checkpoint["history"]
            moments = [{k: v.shape for k, v in self.optimizer.state[p].items()} for p in self.parameters]
            shapes = [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in self.parameters]
            # The parameters' memory layout, which --channels_last or the device may have changed: loading keeps the
            # saved one, and a fused optimiser pairs elements by their place in memory.
            for p in self.parameters:
                for k, v in self.optimizer.state[p].items():
                    if v.shape == p.shape and v.stride() != p.stride():
                        self.optimizer.state[p][k] = torch.empty_like(p, dtype=v.dtype).copy_(v)
            if not (same_kind(self.optimizer.state_dict()["param_groups"], groups)
                    and same_kind(self.scheduler.state_dict(), schedule) and self.scheduler.last_epoch == self.step
                    and (moments == shapes or self.step == 0)
                    and 0 <= self.step - self.epoch * self.steps_per_epoch <= self.steps_per_epoch
                    and all(type(v) in (int, float, type(None)) for row in self.history for v in row.values())):
                raise ValueError("optimiser, schedule, history and position are not those of one run")
        except Exception as e:                                # what a file from elsewhere holds can raise anything
            raise UserError(f"{path}: its weights do not fit this model ({str(e)[:200]})") from None
        self.restore_best(path)

    def restore_best(self, path):
        """Bring best_fid.pth into line with the checkpoint at `path` that the run goes on from."""
        best, source = self.folder / "best_fid.pth", path.parent / "best_fid.pth"
        if is_main() and not best.exists() and source.exists():
            name_again(source, best)                          # resumed into another folder: the best goes along
        found = gather(read_checkpoint(best)["best_fid"] if is_main() and best.exists() else None)[0]
        if self.history and self.history[-1].get("fid") == self.best_fid < (math.inf if found is None else found):
            self.save_best()                                  # killed before it was written; this is the best
        else:
            # Missing: the next is the best. Of a later epoch than an older checkpoint that is resumed: it stays the best.
            self.best_fid = math.inf if found is None else min(found, self.best_fid)


def can_fuse_flow(flow, device, amp):
    return device.type == "cuda" and amp and flow is not None and fused_sizes(flow) is not None


def can_fuse_lpips(args, device, amp):
    return (device.type == "cuda" and amp and args.lpips_net != "none" and not args.fit_prior
            and not args.deterministic)                   # the call knows no such promise


def tried(work):
    """What work() returns, and a line about what it failed with in this process or another, "" if in none: all use what it
    prepares, or none. (A compiler can fail in any way; training need not.)"""
    result = problem = ""
    try:
        result = work()
    except Exception as e:
        problem = one_line(e)
    return result, max(gather(problem))


def fuse_flow(flow, batch_size):
    """Let Triton's kernels train the flow, if they compute here what its layers do; a note says if not."""
    print("kernels     for the flow (compiled at their first use)", flush=True)
    start = time.monotonic()
    _, problem = tried(lambda: require_near(*check_fused(flow, batch_size)))
    if problem:
        print(f"note: the flow's kernels do not work here ({problem}); going on without them")
    else:
        flow.fold_norms = FoldNorms(torch.bfloat16)
        print(f"kernels     checked against its layers, in {time.monotonic() - start:.0f} s")


def parts_to_compile(model):
    if model.flow is None:
        return [model.encoder, model.decoder]
    return [model.encoder, model.decoder, *(model.flow.couplings if model.flow.fold_norms is None else [model.flow.fold_norms])]


# Up to how much work the compiler does again rather than write its result to memory and read it back. By its own limits,
# the backward pass of a norm and the SiLU behind it writes a float32 gradient to memory, though what it is computed from is
# read again anyway: the networks' passes would move 1.4 times as much memory.
DO_AGAIN = {"realize_reads_threshold": 16, "realize_acc_reads_threshold": 32, "realize_opcount_threshold": 200}


def compile_step(trainer, batch, amp):
    """torch.compile for the parts of the network and for the criterion, tried on a blank batch; eager if that fails. The
    weights stay as they are.

    Part by part, since the flow's layers are alike: one is compiled for all of them, which takes a third of the time.
    """
    print("compiling   (up to a minute or two; --no-compile starts at once)", flush=True)
    start, eager, parts = time.monotonic(), trainer.criterion, parts_to_compile(trainer.model)
    networks = {trainer.model.encoder, trainer.model.decoder} if trainer.device.type == "cuda" else ()

    def compiled():
        known = torch._inductor.list_options()
        options = {name: value for name, value in DO_AGAIN.items() if name in known}           # another version may lack one
        for part in parts:
            part.compile(dynamic=False, **({"options": options} if part in networks else {}))
        trainer.criterion = torch.compile(eager, dynamic=False)
        trainer.model.train()                             # as the steps do, or the first of them would compile it again
        x, eps = prepared(batch, None), torch.zeros(len(batch), trainer.args.latent_dim, device=trainer.device)
        terms, usage = forward(trainer, x, eps, amp)
        sum([*terms.values(), *([] if usage is None else [usage.sum()])]).backward()

    _, problem = tried(compiled)
    if problem:
        trainer.criterion = eager
        for part in parts:
            part._compiled_call_impl = None               # (what Module.compile sets; nothing public takes it back)
        print(f"note: torch.compile fails here ({problem}); going on without it")
    else:
        print(f"compiled    in {time.monotonic() - start:.0f} s")
    trainer.optimizer.zero_grad(set_to_none=True)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


class RoundedWeights:
    """bf16 copies of the weights that autocast rounds: all are rounded together, and their gradients brought back together.
    Autocast does so one by one, a thousand small kernels a step; the numbers are the same."""

    def __init__(self, network, model):
        # Not those whose weights it does not round, but what is made of them, or nothing: the encoder's head (no_autocast),
        # the decoder's up-convolutions and a flow of kernels.
        fused = model.flow is not None and model.flow.fold_norms is not None
        others = {model.encoder.head, *(m for m in model.decoder.modules() if isinstance(m, UpConv2d)),
                  *(model.flow.modules() if fused else ())}
        layers = [(name, m) for name, m in network.named_modules()
                  if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and m not in others]
        named = {f"{layer}.{name}": p for layer, m in layers for name, p in m.named_parameters() if p.requires_grad}
        self.weights = list(named.values())
        self.copies = {name: torch.empty_like(p, dtype=torch.bfloat16).requires_grad_() for name, p in named.items()}

    @torch.no_grad()
    def renewed(self):
        """The copies of the weights as they are now, by their names in the network, without gradients."""
        torch._foreach_copy_(list(self.copies.values()), self.weights)
        for copy_ in self.copies.values():
            copy_.grad = None
        return self.copies

    def bring_back(self):
        """Give the weights the gradients of their copies."""
        found = [(p, copy_.grad) for p, copy_ in zip(self.weights, self.copies.values()) if copy_.grad is not None]
        for p, _ in found:
            assert p.grad is None, "used outside the network too"
            p.grad = torch.empty_like(p)
        torch._foreach_copy_([p.grad for p, _ in found], [grad for _, grad in found])


def round_together(trainer):
    """Let RoundedWeights do what autocast would; call before anything is compiled."""
    rounded = RoundedWeights(trainer.network, trainer.model)
    if rounded.weights:                                   # none with --fit_prior and no flow
        trainer.rounded = rounded


def as_cuda_graph(work, device):
    """work() as a torch.cuda.CUDAGraph, after two rehearsals: what is done for the first time (kernels loaded and chosen, the
    optimiser's moments made) cannot be recorded. Both elsewhere than on the default stream, which recording needs."""
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # (The outer one comes back from the other stream also if recording fails.)
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph, stream=aside):
        work()
    return graph


class StepGraph:
    """A whole training step, optimiser and EMA included, recorded as one CUDA graph: its thousands of kernels start each
    other, and Python only says what changes. Recorded on a blank batch; the weights stay as they are.

    PyTorch's documentation calls it whole-network capture. Gradients and everything between lie in the graph's own memory.
    """

    def __init__(self, trainer, batch, amp):
        args, device, n = trainer.args, trainer.device, len(batch)
        self.batch, self.eps = batch, torch.zeros(n, args.latent_dim, device=device)
        self.flipped = torch.zeros(n, 1, 1, 1, dtype=torch.bool, device=device) if args.flip else None
        self.now = Now(*torch.zeros(len(Now._fields), device=device).unbind())

        def step():
            whole_step(trainer, self.batch, self.flipped, self.eps, self.now, amp)
            optimizer.zero_grad(set_to_none=True)

        optimizer, groups = trainer.optimizer, [dict(group) for group in trainer.optimizer.param_groups]
        before = {id(p): {k: v.clone() for k, v in optimizer.state[p].items()} for p in trainer.parameters}
        weights = [*trainer.parameters, *trainer.averages]
        saved = [w.detach().clone() for w in weights]
        trainer.model.train()
        try:
            for group in optimizer.param_groups:
                group.update(lr=self.now.lr, capturable=True)
            self.graph = as_cuda_graph(step, device)
            trainer.unread.zero_()
            self.graph.replay()
            if not trainer.unread.any():
                raise RuntimeError("the recording is empty")
        finally:
            for group, kept in zip(optimizer.param_groups, groups):
                group.update(kept)
            with torch.no_grad():                         # in place: the graph knows where they lie
                for w, kept in zip(weights, saved):
                    w.copy_(kept)
                for p in trainer.parameters:
                    for name, value in optimizer.state[p].items():
                        value.copy_(before[id(p)].get(name, torch.zeros_like(value)))
                trainer.unread.zero_()
                trainer.first_bad.zero_()

    def __call__(self, batch, flipped, eps, now):
        self.batch.copy_(batch)
        self.eps.copy_(eps)
        if self.flipped is not None:
            self.flipped.copy_(flipped)
        for kept, value in zip(self.now, now):
            kept.fill_(value)
        self.graph.replay()


def record_step(trainer, batch, amp):
    """Let a StepGraph do the steps; without one, more slowly, if that fails."""
    start = time.monotonic()
    try:
        trainer.graph = StepGraph(trainer, batch, amp)
        print(f"CUDA graph  recorded in {time.monotonic() - start:.0f} s")
    except Exception as e:                                # as for the compiler
        trainer.optimizer.zero_grad(set_to_none=True)
        while e.__context__ is not None:                  # the end of a recording that failed raises too
            e = e.__context__
        print(f"note: no CUDA graph can be recorded here ({one_line(e)}); going on without it")


def speed_up(trainer, blank, amp, fused_flow, fused_lpips, compiled, graph):
    """All that makes a step faster, in the order in which each needs what comes before it. blank: a batch, see prepared."""
    if fused_flow:
        fuse_flow(trainer.model.flow, len(blank))
    if fused_lpips:
        fuse_lpips(trainer, blank)
    if amp and process_count() == 1:                      # before compiling: other types of weights would compile it all again
        round_together(trainer)
    if compiled:
        compile_step(trainer, blank, amp)
    if graph:
        record_step(trainer, blank, amp)


def prepared(batch, flipped):
    """What the network takes of a batch, uint8 images (B, C, H, W) or posteriors as encode_all leaves them; those for which
    flipped (B, 1, 1, 1) holds are mirrored."""
    x = to_float(batch) if batch.dtype == torch.uint8 else batch
    return x if flipped is None else torch.where(flipped, x.flip(3), x)


def forward(trainer, x, eps, amp):
    """loss_parts of one batch x (B, C, H, W) in [-1, 1] with noise eps (B, D); lets go of the last step's gradients."""
    trainer.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(trainer.device.type, torch.bfloat16) if amp else contextlib.nullcontext():
        if trainer.rounded is None:
            out = trainer.network(x, eps)
        else:
            out = torch.func.functional_call(trainer.network, trainer.rounded.renewed(), (x, eps))
        return trainer.criterion(x, out)


def backward(trainer, x, eps, amp, beta):
    """The gradients of one batch -> the TERMS it knows."""
    terms = objective(trainer.args, *forward(trainer, x, eps, amp), beta)
    terms["loss"].backward()
    if trainer.rounded is not None:
        trainer.rounded.bring_back()
    return terms


def whole_step(trainer, batch, flipped, eps, now, amp):
    """All that the device does in a training step. Nothing here waits for it."""
    terms = backward(trainer, prepared(batch, flipped), eps, amp, now.beta)
    norm = trainer.gradient_norm()
    skipped = trainer.update_weights(norm, now.ema_share)
    if trainer.args.skip_grad_norm:                       # counted, instead of spoiling the mean
        norm = torch.where(skipped, 0.0, norm)
    trainer.count(terms | {"grad_norm": norm, "skipped": skipped}, now.step)


def train_step(trainer, batch, amp):
    """One optimiser step on this process's share of a batch, as prepared() takes it.

    Flips and noise depend on (seed, step, position in the global batch) alone, so that a resumed run repeats them,
    whatever the number of processes. (On the kind of device too: the CPU and CUDA draw other numbers from a seed.)
    """
    args, device = trainer.args, trainer.device
    generator = seeded(device, args.seed, "step", trainer.step)
    n, mine = trainer.batch_size, my_share(trainer.batch_size)
    flipped = torch.rand(n, 1, 1, 1, generator=generator, device=device)[mine] < 0.5 if args.flip else None
    eps = torch.randn(n, args.latent_dim, generator=generator, device=device)[mine]
    if trainer.graph:
        trainer.graph(batch, flipped, eps, trainer.now())
    else:
        whole_step(trainer, batch, flipped, eps, trainer.now(), amp)
    trainer.scheduler.step()
    trainer.step += 1


def train_epoch(trainer, data, amp, stop):
    """The rest of the current epoch. Returns (means of TERMS, images a second), or None if a signal asked to stop."""
    args, first, size = trainer.args, trainer.step - trainer.epoch * trainer.steps_per_epoch, trainer.batch_size
    order = torch.randperm(len(data), generator=seeded("cpu", args.seed, "order", trainer.epoch))
    order = order[:trainer.steps_per_epoch * size].view(-1, size)   # (steps, images of a global batch)
    batches = data.batches(order[first:, my_share(size)], trainer.device)
    # Reading the losses waits for the device: often enough to see, seldom enough to cost nothing.
    read_every = 1 if trainer.device.type == "cpu" else 50
    if first == 0:
        trainer.sums.zero_()
    trainer.model.train()
    start, done, tty = time.monotonic(), 0, sys.stderr.isatty()
    with tqdm(total=trainer.steps_per_epoch, initial=first, desc=f"epoch {trainer.epoch + 1}/{args.epochs}", unit="step",
              mininterval=0.5 if tty else 30, delay=0 if tty else 30, leave=False, disable=not is_main()) as bar:
        for batch in batches:
            train_step(trainer, batch, amp)
            done += 1
            if (first + done) % read_every == 0 or (stop.signum and process_count() == 1):
                sums = trainer.read()
                bar.set_postfix({k: f"{sums[k] / (first + done):.4g}" for k in ("loss", "pixel", "LPIPS", "KL_Raw")},
                                refresh=False)
                if stop.agreed() and first + done < trainer.steps_per_epoch:
                    return None
            bar.update()
    sums = trainer.read()
    taken = max(1.0, trainer.steps_per_epoch - sums["skipped"])
    means = {name: value / (taken if name == "grad_norm" else trainer.steps_per_epoch) for name, value in sums.items()}
    speed = done * size / (time.monotonic() - start) if done else None     # resumed at the end of an epoch's steps
    return means | {"skipped": round(sums["skipped"])}, speed


def epoch_row(trainer, means, speed):
    """The columns of an epoch that its training steps make, from what train_epoch returns; the others are None."""
    args = trainer.args
    decoded = not args.fit_prior
    row = dict.fromkeys(COLUMNS)
    row.update(epoch=trainer.epoch + 1, beta=trainer.beta(), lr=trainer.scheduler.get_last_lr()[0], train_loss=means["loss"],
               recon=means["pixel"] if decoded else None,
               lpips=means["LPIPS"] if decoded and args.lpips_net != "none" else None,
               kl_raw=means["KL_Raw"], kl_optim=means["KL_optim"], floor_share=means["under_floor"],
               skipped_steps=means["skipped"], img_per_s=speed,
               **{k: means[k] for k in ("log_q0", "log_det", "log_p", "balance", "grad_norm")})
    return row


def images_at_a_time(img_size):
    """How many images fit where no gradient is kept: 500 of 32x32, fewer of larger ones."""
    return max(1, min(500, 500 * 32 ** 2 // max(img_size, 1) ** 2))


class Stopped(Exception):
    """A signal asked to stop during an evaluation, which a resumed run does again."""


def until_stopped(batches, stop):
    for batch in batches:
        if stop.signum and process_count() == 1:       # several finish together: none may leave the others waiting
            raise Stopped
        yield batch


@torch.no_grad()
def evaluate(trainer, lpips, data, stop):
    """Held-out loss with beta_max and the health of the latent space, of the weights that are sampled from."""
    args, model = trainer.args, trainer.best_weights
    chosen = spread(args.val_images, len(data))
    n = len(chosen)
    # The same noise at every epoch and in every run: differences are the model's.
    mine = my_share(n)
    eps = torch.randn(n, args.latent_dim, generator=seeded("cpu", "validation"))[mine].to(trainer.device)
    prior = model.prior_params()
    health, pixel, perceptual, done = LatentHealth(), 0.0, 0.0, 0
    indices = [i for i in chosen[mine].split(args.eval_batch_size) if len(i)]
    for batch in until_stopped(data.batches(indices, trainer.device), stop):
        x = to_float(batch)
        out = model(x, eps[done:done + len(x)], prior)
        errors = [error.item() * len(x) for error in reconstruction_error(args, lpips, x, out.recon)]
        pixel, perceptual = pixel + errors[0], perceptual + errors[1]
        health.add(model, out, model.kl_terms(out))
        done += len(x)
    summary = LatentHealth.together(gather(health)).summary()
    pixel, perceptual = (sum(gather(value)) / n for value in (pixel, perceptual))
    floor = args.free_bits * args.latent_dim
    loss = args.beta_max * max(summary["kl_raw"] - floor, 0.0)
    if not args.fit_prior:                                # which trains on nothing else; the reconstruction stays as it is
        loss += pixel + args.lpips_weight * perceptual
    return {"val_loss": loss, "val_recon": pixel, "val_lpips": perceptual if lpips else None,
            **{f"val_{k}": summary[k] for k in ("kl_raw", "log_q0", "log_det", "log_p")},
            **{k: summary[k] for k in ("active_units", "effective_components", "dead_components")}}


@torch.no_grad()
def evaluate_fid(trainer, extractor, data, stop):
    """FID of --fid_samples images of the prior against the whole training set, unflipped."""
    args = trainer.args

    def features(batches, total, desc):                   # of this process's share; all of them, in order
        return np.concatenate(gather(extract_features(extractor, until_stopped(batches, stop), total, desc,
                                                      progress=is_main())))

    def real():
        mine = torch.arange(len(data))[my_share(len(data))]
        return features(data.batches(mine.split(args.eval_batch_size), trainer.device), len(mine),
                        "features of the training set")

    reference = cached_statistics(Path(args.save_dir, "feature_cache"), f"{data.fingerprint}-{extractor.key}", real)
    mine = range(args.fid_samples)[my_share(args.fid_samples)]
    images = generate_images(trainer.best_weights, mine.stop, args.eval_batch_size, args.seed, start=mine.start, purpose="fid")
    fake = features(images, len(mine), "features of samples")
    return frechet_distance(*reference, *mean_and_covariance(fake))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

def rows_in_turn(above, below, columns):
    """Rows of the one, each above the same row of the other, the last ones filled up with white: (N, C, H, W) twice -> the
    images of an image_grid with so many columns."""
    rows = [row for pair in zip(above.split(columns), below.split(columns)) for row in pair]
    return torch.cat([torch.cat([r, r.new_full((columns - len(r), *r.shape[1:]), 255)]) for r in rows])


@torch.no_grad()
def save_images(trainer, held_out, writer):
    """samples/: images of the prior; reconstructions below their originals; what the means of the prior's components decode to,
    for a VampPrior below their pseudo-inputs."""
    args, model = trainer.args, trainer.best_weights
    folder = trainer.folder / "samples"
    folder.mkdir(exist_ok=True)
    grids = {"samples": (to_uint8(model.sample(args.grid_images, generator=seeded("cpu", args.seed, "grid"))), 8)}
    chosen = spread(32, len(held_out)).tolist()
    originals = held_out.take(chosen).to(trainer.device)
    grids["recon"] = rows_in_turn(originals, to_uint8(model.reconstruct(to_float(originals))), 8), 8
    if args.prior != "standard":
        means = to_uint8(model.decode(model.from_mixture(model.prior_params()[0][:50 if args.prior == "vamp" else 100])))
        grids["pseudo"] = (rows_in_turn(to_uint8(model.pseudo_inputs[:50]), means, 10) if args.prior == "vamp" else means), 10
    for name, (images, columns) in grids.items():
        grid = image_grid(images.cpu(), columns)
        save_png(folder / f"{name}_{trainer.epoch:04d}.png", grid, zoom=max(1, 64 // args.img_size))
        if writer:
            writer.add_image(name, grid, trainer.epoch)


def save_curves(history, path):
    """curves.png from the rows of history.csv."""
    import pandas as pd
    plt = pyplot()
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
    save_figure(path, fig, dpi=80)


def save_history(history, path):
    """history.csv. Here, and not at the top, pandas is imported after the first epoch and not before the first step."""
    import pandas as pd
    with atomic_write(path, "w", newline="") as f:
        pd.DataFrame(history, columns=COLUMNS).to_csv(f, index=False)


def pictures_due(trainer):
    """At the end of an epoch that leaves pictures behind?"""
    args, epoch = trainer.args, trainer.epoch
    return (args.sample_every and epoch and (epoch % args.sample_every == 0 or epoch == args.epochs)
            and trainer.step == epoch * trainer.steps_per_epoch)


def write_epoch(trainer, row, held_out, log, writer):
    """Everything that an epoch leaves behind beside its checkpoint."""
    args = trainer.args
    save_history(trainer.history, trainer.folder / "history.csv")
    line = log_line(args, row)
    print(line, flush=True)
    print(line, file=log, flush=True)
    if writer:
        for name, value in row.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, trainer.epoch)
    if pictures_due(trainer):
        save_images(trainer, held_out, writer)
    if pictures_due(trainer) or trainer.epoch == (args.stop_epoch or args.epochs):
        save_curves(trainer.history, trainer.folder / "curves.png")


def log_line(args, row):
    """One line of train_log.txt."""
    skipped = f" | skipped {row['skipped_steps']}" if args.skip_grad_norm else ""
    pixel, lpips = ("off" if v is None else f"{v:.4f}" for v in (row["recon"], row["lpips"]))
    fid = "-" if row["fid"] is None else f"{row['fid']:.4f}"
    speed = "-" if row["img_per_s"] is None else f"{row['img_per_s']:.0f}"
    return (f"epoch {row['epoch']}/{args.epochs} | beta {row['beta']:.4f} | lr {row['lr']:.3g} | train_loss "
            f"{row['train_loss']:.3f} | val_loss {row['val_loss']:.3f} | pixel {pixel} | LPIPS {lpips} | "
            f"KL_Raw {row['kl_raw']:.3f} | log_det {row['log_det']:.3f} | active {row['active_units']} | components "
            f"{row['effective_components']:.1f}{skipped} | FID {fid} | {speed} img/s")


def open_tensorboard(args, folder, epoch, asked):
    """A SummaryWriter, or None where TensorBoard is off or not installed, which is said where it was asked for."""
    if not args.tensorboard:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if asked:
            print("note: --tensorboard needs TensorBoard (pip install tensorboard); going on without it")
        return None
    default = threading.excepthook
    # Its thread's trouble with files comes to the main thread at the next write, which then says it in one line.
    threading.excepthook = lambda problem: None if issubclass(problem.exc_type, OSError) else default(problem)
    return SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)


def remove_old_run(folder):
    """Delete what an earlier run left in the folder: a stale best_fid.pth beside a new run would be mistaken for its."""
    for pattern in ("*.pth", "args.json", "history.csv", "train_log.txt", "curves.png", "samples/*.png", "tensorboard/events*"):
        for path in folder.glob(pattern):
            path.unlink()


class Unbreakable:
    """A stream into a pipe that may lose its reader: in `python train.py 2>&1 | tee log` Ctrl-C ends tee too. What finds no
    reader is dropped, so that the run can save, and lost() is called."""

    def __init__(self, stream, lost=lambda: None):
        self.stream, self.lost = stream, lost

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.lost()

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.lost()


class StopRequest:
    """SIGINT and SIGTERM ask for a stop after the current step; a second one ends the program at once."""

    def __init__(self):
        self.signum, self.when = 0, 0.0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.ask)

    def ask(self, signum, _frame):
        if self.signum:
            # Not asked twice: `timeout` signals its program and then the program's group, and torchrun passes on the Ctrl-C
            # that the terminal has sent to every process already.
            if time.monotonic() - self.when < (2 if process_count() > 1 else 0.5):
                return
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum, self.when = signum, time.monotonic()
        if is_main():
            print(f"\n{signal.Signals(signum).name}: finishing the step and saving", file=sys.stderr)

    def nobody_reads(self):
        """The reader of the output has gone, as `head` does: the run ends as by a signal, and saves."""
        self.signum = self.signum or 13                       # SIGPIPE, which Windows has no name for

    def agreed(self):
        """The signal, if any of the processes got one; they must all call this at the same point."""
        self.signum = max(gather(self.signum))
        return self.signum


def print_plan(args, trainer, data, held_out, amp, extractor):
    """What is about to happen, before it does."""
    model, device, steps = trainer.model, trainer.device, trainer.steps_per_epoch
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    if model.context_position is not None:
        parts["flow"] += model.context_position.numel()
    parts["prior"] = sum(p.numel() for p in model.parameters()) - sum(parts.values())
    left_out = len(data) - steps * trainer.batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    kept = data.images.device.type if hasattr(data, "images") else "streamed"
    n_val = min(args.val_images or len(held_out), len(held_out))
    fid = "off"
    if extractor:
        fid = f"every {args.fid_every} epochs, {args.fid_samples:,} samples, {extractor.name}"
        fid += "" if is_fid(extractor.name, extractor.dims) else "; no published FID, to be compared with itself alone"
    options = [f"{process_count()} processes"] * (process_count() > 1) + ["bf16 autocast" if amp else "float32"]
    options += [n for n in ("channels_last", "fused_flow", "fused_lpips", "compile", "cuda_graph", "deterministic")
                if getattr(args, n)]
    lpips = "no LPIPS"
    if args.lpips_net != "none":
        lpips = f"{args.lpips_weight:g} LPIPS-{args.lpips_net} ({weights_title(LPIPS_FILES[args.lpips_net], trainer.lpips_id)})"
    reconstruction = "" if args.fit_prior else f"{args.recon_loss} + {lpips} + "
    flow = (f"{'on whitened channels, ' * args.flow_whiten}of {args.flow_length} layers of {args.flow_seq_len} tokens, "
            f"prior {args.flow_prior}, context {args.flow_context}")
    positions = (args.img_size // 2 ** len(args.hidden_dims)) ** 2 if args.latent_layout == "spatial" else 0
    print(f"""\
run         {trainer.folder} (seed {args.seed})
data        {args.dataset}: {len(data):,} training images, {n_val:,} for validation, {'x'.join(map(str, data.shape))}, \
kept on {kept}, flips {'on' if args.flip else 'off'}
model       {sum(parts.values()) / 1e6:.2f} M parameters: {', '.join(f'{k} {v / 1e6:.2f}' for k, v in parts.items() if v)}
latent      {args.latent_dim} values{f', {positions} positions of {args.latent_dim // positions} channels' if positions else ''}
prior       {args.prior}{f', {model.num_components} components' if args.prior != 'standard' else ''}\
{', frozen' if args.freeze_mixture else ''}; flow {flow if args.flow_length else 'off'}
loss        {reconstruction}beta max(KL - {args.free_bits * args.latent_dim:g}, 0), \
beta to {args.beta_max:g} over {args.warmup_epochs:g} epochs\
{f' + {args.balance:g} balance' if args.balance else ''}
training    {args.epochs} epochs of {steps} steps of {trainer.batch_size} images\
{f' ({left_out} images, others each time, left out of an epoch)' if left_out else ''}
device      {device} ({name}), {', '.join(options)}, torch {torch.__version__}
FID         {fid}""")


def main():
    with contextlib.ExitStack() as stack:                     # lets go of the run's folder and the streams, whatever happens
        train(stack)


def cpu_computes_bf16():
    """Whether this CPU has instructions for bf16, without which it is emulated; None where the system does not say."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text(errors="replace")     # avx512_bf16, amx_bf16; on ARM bf16
    except OSError:
        return None


def settle(args, device):
    """Set torch up as the flags say (threads, determinism, seed), and decide for this device on channels_last and cuda_graph,
    in args, and on bf16 autocast: returned."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.amp == "bf16" and device.type == "mps":
        print("note: --amp bf16 is not supported on MPS; going on in float32")
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)      # else bf16 is emulated
    if device.type == "cpu" and args.amp == "bf16" and cpu_computes_bf16() is False:
        print("note: --amp bf16 is many times slower than float32 on this CPU, which has no instructions for it (avx512_bf16)")
    if device.type == "cuda" and args.amp == "bf16" and not native:
        print("note: --amp bf16 may be slower than float32 on this GPU, which only emulates it")
    with_lpips = args.lpips_net != "none" and not args.fit_prior          # a second stage only measures with it
    if device.type == "cpu" and args.amp == "auto" and with_lpips and cpu_computes_bf16():
        print("note: this CPU computes in bf16 too: with --amp bf16 --channels_last a step takes about two thirds of the time")
    recordable = device.type == "cuda" and process_count() == 1
    if args.cuda_graph and not recordable:
        print("note: --cuda_graph needs a CUDA GPU and a single process; going on without it")
    args.channels_last = device.type == "cuda" if args.channels_last is None else args.channels_last
    args.cuda_graph = recordable and args.cuda_graph is not False
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                            # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic   # every step has the same shapes: worth a search, once each
    torch.manual_seed(args.seed)
    return (args.amp == "bf16" and device.type != "mps") or (args.amp == "auto" and native)


def require_first_stages_data(args, given, first, data):
    """Raise UserError if a second stage has other images than its first had, or say so where they were asked for."""
    if first.data_id == data.fingerprint:
        return
    problem = f"--data_dir {args.data_dir}: not the images that {args.fit_prior} was trained on"
    if args.cache_gb != first.cache_gb:
        print(f"note: with --cache_gb {args.cache_gb:g} (there {first.cache_gb:g}) it is not known whether these are "
              f"the images that {args.fit_prior} was trained on")
    elif not given & {"dataset", "data_dir", "split_seed"}:
        raise UserError(f"{problem}; name the data with --data_dir to take these nevertheless")
    else:
        print(f"note: {problem}, which may have seen some of those that are held out now")


def train(stack):
    # -- flags, data, everything that could be missing later ------------------------------------------------------
    args, given = parse_args()
    device = join_processes(args.device)
    checkpoint, resumed_from, seen = resolve_resume(args, given)
    found = gather(None if checkpoint is None else checkpoint["step"])
    if len(set(found)) > 1:
        raise UserError(f"--resume {args.resume}: the processes find checkpoints of steps {found} (None: none); --save_dir "
                        "must be one folder that all machines share")
    first_stage = read_first_stage(args, given) if args.fit_prior and checkpoint is None else None
    if args.flip is None:
        args.flip = args.dataset != "digits"
    args.in_channels = args.in_channels or (1 if args.dataset == "digits" else 3)
    args.eval_batch_size = args.eval_batch_size or images_at_a_time(args.img_size)
    check_flags(args, given, fresh=checkpoint is None)
    amp = all(gather(settle(args, device)))
    if checkpoint is not None and checkpoint["model_args"] != model_args_of(args):
        raise UserError(f"{resumed_from}: its args and its model_args describe two models; not a checkpoint of train.py")
    try:
        model = CrossFlowVampVAE(**model_args_of(args))
    except ValueError as e:
        raise UserError(f"the model's flags do not fit: {e}") from None
    fusible = all(gather(can_fuse_flow(model.flow, device, amp)))          # all processes, or none
    if args.fused_flow and not fusible:
        print("note: --fused_flow needs a CUDA GPU, bf16, Triton and a flow whose sizes are powers of two; going on without it")
    args.fused_flow = fusible and args.fused_flow is not False
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    lpips = build_lpips(args.lpips_net, args.lpips_linear, device, (args.in_channels, args.img_size, args.img_size),
                        memory_format)
    fusible = all(gather(can_fuse_lpips(args, device, amp)))
    if args.fused_lpips and not fusible:
        print("note: --fused_lpips needs LPIPS in the training, a CUDA GPU, bf16 and no --deterministic; going on without it")
    args.fused_lpips = fusible and args.fused_lpips is not False
    extractor = InceptionFeatures(device, args.fid_dims) if args.fid_every else None
    if extractor and args.fid_samples < FEW_IMAGES:
        print(f"note: FID from {args.fid_samples} samples is far too high (its covariance has at most that rank); "
              f"compare it only with itself")
    data, held_out = load_data(args, device, Path(args.save_dir, DATA_CACHE) if args.data_cache else None)
    if first_stage:
        require_first_stages_data(args, given, first_stage, data)
    if "fit_prior" in given:                                  # as it is kept: the same file from whatever folder
        args.fit_prior = os.path.abspath(args.fit_prior)
    if args.demo and checkpoint is None and args.overwrite and "overwrite" not in given:
        require_the_same_demo(args, Path(args.save_dir, args.exp_name))
    if extractor and len(data) < 2:
        raise UserError(f"--data_dir {args.data_dir}: FID needs at least two training images; use --fid_every 0")
    batch_size = min(args.batch_size, len(data))
    if args.compile is None:
        args.compile = device.type == "cuda" and args.epochs * (len(data) // batch_size) >= WORTH_COMPILING
    if batch_size % process_count():
        raise UserError(f"--batch_size: {batch_size} images a step cannot be shared equally by {process_count()} processes")
    folder = writable_folder(args.save_dir, "--save_dir") / args.exp_name
    gather(None)                                              # all have seen the run's folder before one of them writes to it
    if is_main():
        stack.enter_context(lock_folder(folder, "--exp_name"))
        if files_of_run(folder) != seen:
            raise UserError(f"--exp_name {args.exp_name}: another process has written to {folder} since this one started; "
                            f"run again")
        if (folder / "samples").is_dir():
            remove_temporary_files(folder / "samples")

    # -- model, optimiser, position -------------------------------------------------------------------------------
    model.to(device, memory_format=memory_format)
    if args.fit_prior:
        model.encoder.requires_grad_(False)
        model.decoder.requires_grad_(False)
    if args.freeze_mixture:
        for name, p in model.named_parameters():
            if name.startswith("prior_"):
                p.requires_grad_(False)
    if first_stage:
        load_first_stage(model, first_stage)
        print(f"fit_prior   {first_stage.note}")
    posteriors = None                                     # what a second stage trains on
    if first_stage and args.mixture_covariance == "full" and "prior_tril" not in first_stage.prior:
        posteriors = encode_all(args, model, data, device)
        start_mixture(args, model, posteriors, args.flow_whiten and not first_stage.prior)
    elif not (first_stage and first_stage.prior):
        start_prior(args, model, data)
    trainer = Trainer(args, model, lpips, len(data) // batch_size, batch_size, folder, data.fingerprint,
                      extractor.sha256 if extractor else None)
    if checkpoint is not None:
        trainer.restore(checkpoint, resumed_from)
    elif is_main():
        remove_old_run(folder)
    print_plan(args, trainer, data, held_out, amp, extractor)
    self_check(model)
    if checkpoint is not None:
        print(f"resumed at epoch {trainer.epoch}, step {trainer.step}")
        if trainer.history and is_main():                 # whatever came after the checkpoint's writing may be missing
            save_history(trainer.history, folder / "history.csv")
            save_curves(trainer.history, folder / "curves.png")
            if pictures_due(trainer):
                save_images(trainer, held_out, None)
    if args.fit_prior:
        trainer.network = PriorFit(model)
        posteriors = encode_all(args, model, data, device) if posteriors is None else posteriors
    training_set = posteriors if args.fit_prior else data
    stack.enter_context(contextlib.redirect_stderr(Unbreakable(sys.stderr)))
    stop = StopRequest()
    stack.enter_context(contextlib.redirect_stdout(Unbreakable(sys.stdout, stop.nobody_reads)))
    speed_up(trainer, torch.zeros(batch_size // process_count(), *training_set.shape, device=device,
                                  dtype=torch.float32 if args.fit_prior else torch.uint8),
             amp, args.fused_flow, args.fused_lpips, args.compile, args.cuda_graph)
    if process_count() > 1:
        parallel = torch.nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers" in inspect.signature(parallel).parameters
        trainer.network = parallel(                       # the flow's permutations and whitening, its buffers, are constant
            trainer.network, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            **{"forward_sync_buffers" if new else "broadcast_buffers": False})
    if is_main():
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        write_json(folder / "args.json", {**vars(args), "versions": versions, "device_used": str(device),
                                          "processes": process_count(), "lpips_sha256": trainer.lpips_id,
                                          "fid_sha256": trainer.fid_id})
    writer = open_tensorboard(args, folder, trainer.epoch, "tensorboard" in given) if is_main() else None
    log = open(folder / "train_log.txt" if is_main() else os.devnull, "w" if checkpoint is None else "a", encoding="utf-8",
               errors="backslashreplace")
    print(shlex.join(["python", *sys.argv]), file=log, flush=True)

    # -- the epochs -----------------------------------------------------------------------------------------------
    last_epoch, warned_at = args.stop_epoch or args.epochs, 0
    while trainer.epoch < last_epoch:
        trained = train_epoch(trainer, training_set, amp, stop)
        if trained is None:
            break
        row = epoch_row(trainer, *trained)
        at_end = trainer.epoch + 1 == args.epochs
        try:
            row.update(evaluate(trainer, lpips, held_out, stop))
            if args.fid_every and ((trainer.epoch + 1) % args.fid_every == 0 or at_end):
                row["fid"] = gather(evaluate_fid(trainer, extractor, data, stop))[0]      # to the last bit everyone's
        except Stopped:
            break
        trainer.epoch += 1
        trainer.history.append(row)
        is_best = row["fid"] is not None and row["fid"] < trainer.best_fid
        if is_best:
            trainer.best_fid = row["fid"]
        waited = max(gather(time.monotonic() - trainer.last_saved))
        due = trainer.epoch % args.save_every == 0 and waited >= args.save_every_s
        if due or is_best or trainer.epoch == last_epoch or stop.agreed():
            trainer.save()
        if is_best:                                       # after last.pth, from which restore() can make it again
            trainer.save_best()
        if is_main():
            write_epoch(trainer, row, held_out, log, writer)
        if args.check_every and trainer.epoch % args.check_every == 0:
            self_check(model)
        note = dead_note(model, vars(args), trainer.history)
        if note and not warned_at and trainer.epoch >= args.warmup_epochs:
            print(note)
            warned_at = trainer.epoch
        if stop.agreed():
            break
    if writer:
        writer.close()

    # -- the end --------------------------------------------------------------------------------------------------
    if stop.agreed():
        trainer.save()
        print(f"stopped at epoch {trainer.epoch}, step {trainer.step}; go on with: "
              f"python train.py --resume {shlex.quote(str(folder / 'last.pth'))}")
        sys.exit(128 + stop.signum)
    left = [f"{what} in {folder / name}" for what, name, found in (("pictures", "samples", "samples/*.png"),
                                                                   ("curves", "curves.png", "curves.png"))
            if any(folder.glob(found))]
    note = dead_note(model, vars(args), trainer.history)
    if note and warned_at != trainer.epoch:               # else it was said just now
        print(note)
    print(f"done: {folder}" + (f" ({', '.join(left)})" if left else ""))


def self_check(model):
    """The flow's inverse and log-determinant against autograd, in float64; see check_flow. Stops the run if wrong."""
    if model.flow is None:
        return
    result = check_flow(model.flow)
    if max(result["inverse_error"], result["log_det_error"]) > 1e-6 or not result["scale_std"] > 0:
        where = f", worst in layer {result['layer']}" if result["layer"] else ""
        raise UserError(f"the flow fails its self-check{where} (inverse error {result['inverse_error']:.1e}, log-det error "
                        f"{result['log_det_error']:.1e}, bound 1e-6); a smaller --scale_bound or --flow_length keeps it well "
                        f"conditioned")
    print(f"self-check  flow round trip {result['inverse_error']:.1e}, log-det {result['log_det_error']:.1e} "
          f"(relative, float64), s spreads by {result['scale_std']:.2f}")


if __name__ == "__main__":
    run(main)
