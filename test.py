"""From a checkpoint of train.py to images on disk, pictures, diagnostics and numbers.

    python test.py --resume ./results/CrossVampVAE_Experiment/best_fid.pth --data_dir /path/to/data \\
        --save_dir ./results --num_samples 50000 --gen_batch_size 100 --real_dirname real_cifar \\
        --fake_dirname fake_cifar --do_recon False
    python test.py --resume results/demo/last.pth --num_samples 2000 --diagnose --nll --evaluate
    torchrun --nproc_per_node=4 test.py --resume results/my_run/last.pth --evaluate     shared out over four GPUs
    python test.py --resume results/demo/last.pth --do_real False --do_pictures False --seed 1 --fake_dirname fake_seed1

Writes to data_dir, or to export_dir (8-bit RGB PNG, 00000.png and up, with a manifest that says what they are)
    <real_dirname>      a split of the data set, as training decoded it
    <fake_dirname>      samples of the prior
    <recon_dirname>     reconstructions of a split, through the posterior's mean (--do_recon True)
and to save_dir/<name of the run>/test, with --tag another name for the numbers (nll_<tag>.json, ...)
    samples, components, interpolations, reconstructions, nearest, latent_map (PNG), test_log.txt
    diagnostics.json, diagnostics.png    --diagnose
    nll.json                             --nll
    evaluation_<tag>.json                --evaluate, of the first --eval_images samples of the seed, which are the first
                                         of the export; a copy goes to save_dir/single_image_quality for comparison.py

The model and the data set come from the checkpoint alone. An export that was cut short goes on where it stopped, a
complete one is used again, and one that does not match is never mixed with. A folder that another process is writing to
is refused.

Papers: importance-weighted bound, Burda et al. 2016 (arXiv 1509.00519); mutual information under the aggregate
posterior, Hoffman & Johnson 2016 (NIPS workshop, "ELBO surgery"); t-SNE, van der Maaten & Hinton 2008.

Shapes: N images; B batch; C, H, W image; D latent; K components; L coupling layers; S importance samples.
"""
import argparse
import contextlib
import hashlib
import math
import os
import platform
import re
import shlex
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch

from csv_analysis import safe_tag
from models.vamp_flow import check_flow
from PR_Calculate import (
    add_manifold_flags,
    check_neighbours,
    check_pca,
    fit_pca,
    kernel_distance,
    kernel_protocol,
    kernel_text,
    manifold_metrics,
    pca_protocol,
    project,
)
from utils import (
    DATA_CACHE,
    FEW_IMAGES,
    LATENT_BLOCK,
    LOCK,
    MANIFEST,
    TEMPORARY,
    UNSAID,
    FlagParser,
    InceptionFeatures,
    LatentHealth,
    UserError,
    add_data_flags,
    add_device_flag,
    brief,
    check_saved_flags,
    cpu_count,
    dead_note,
    exact_convolutions,
    frechet_distance,
    gather,
    generate_images,
    image_grid,
    is_fid,
    is_main,
    join_processes,
    load_data,
    load_model,
    lock_folder,
    mean_and_covariance,
    my_share,
    plain_text,
    progress_bar,
    pyplot,
    read_json,
    require_same_protocol,
    run,
    save_figure,
    save_png,
    seeded,
    sha256_file,
    spread,
    to_float,
    to_uint8,
    true_false,
    writable_folder,
    write_json,
)

FORMAT = 1                   # of the manifest
REFIT_IMAGES = 20000         # of --refit_weights
RECORD_S = 2.0               # the manifest is brought up to date this often; at most so much is written twice
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
EXPORTED = re.compile(r"\d{5,}\.png")
DATA_FLAGS = ("dataset", "data_dir", "img_size", "in_channels", "split_seed", "cache_gb", "num_workers")
QUALITY_DIR = "single_image_quality"                            # below save_dir, where comparison.py looks


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def build_parser():
    parser = FlagParser(description=__doc__)
    group = parser.add_argument_group("checkpoint and places")
    group.add_argument("--resume", required=True, metavar="PATH",
                       help="the checkpoint: best_fid.pth or last.pth of a run")
    group.add_argument("--weights", choices=("ema", "raw"), default="ema",
                       help="the averaged weights, or the last ones")
    group.add_argument("--data_dir", default=None,
                       help="where the data set is and the exports go (default: as in training)")
    group.add_argument("--export_dir", default=None, help="where the exports go instead (default: data_dir)")
    group.add_argument("--data_cache", action=argparse.BooleanOptionalAction, default=True,
                       help="keep many decoded image files in save_dir/data_cache, as train.py does")
    group.add_argument("--allow_other_data", action="store_true",
                       help="go on if these are not the images of the training")
    group.add_argument("--save_dir", default="./results",
                       help="pictures, numbers and logs go to save_dir/<name of the run>/test")
    group.add_argument("--tag", default=None,
                       help="name of the variant in tables, commands and file names (default: that of its run)")
    group.add_argument("--seed", type=int, default=0, help="of the samples and of every other draw")
    add_device_flag(group)

    group = parser.add_argument_group("export")
    for what, default in (("real", True), ("fake", True), ("recon", False)):
        group.add_argument(f"--do_{what}", type=true_false, default=default, metavar="True|False",
                           help=f"export {dict(real='real images', fake='samples', recon='reconstructions')[what]} "
                                f"(default {default})")
    for what in ("real", "fake", "recon"):
        group.add_argument(f"--{what}_dirname", default=f"{what}_cifar", help="folder below data_dir, or below export_dir")
    group.add_argument("--real_split", choices=("train", "test"), default="train", help="which real images")
    group.add_argument("--recon_split", choices=("train", "test"), default="train",
                       help="which images are reconstructed")
    group.add_argument("--recon_latent", choices=("mean", "sample"), default="mean",
                       help="reconstruct from the posterior's mean, or from a sample of it, as in training")
    group.add_argument("--recon_flow", choices=("used", "bypassed"), default="used",
                       help="bypassed: the decoder is given z0 as it is, which shows how much it leans on the flow")
    group.add_argument("--num_samples", type=int, default=50000, help="generated images")
    group.add_argument("--num_real", type=int, default=0, help="real images, evenly spaced in the split; 0 = all")
    group.add_argument("--num_recon", type=int, default=0, help="reconstructions, evenly spaced in the split; 0 = all")
    group.add_argument("--gen_batch_size", type=int, default=100, help="images at a time; changes the speed only")
    group.add_argument("--refit_weights", action="store_true",
                       help=f"draw the prior's components as often as the training images want them (EM on {REFIT_IMAGES:,}), "
                            f"not as trained: dead ones give no samples; of the samples and of every number")
    group.add_argument("--temperature", type=float, default=1.0,
                       help="factor of the components' sigma, 0 = their means")
    group.add_argument("--png_threads", type=int, default=0, help="threads that write images; 0 = the cores, at most 8")
    group.add_argument("--overwrite", action="store_true",
                       help="replace exports that do not match what is asked for, and numbers that were measured otherwise")

    group = parser.add_argument_group("pictures")
    group.add_argument("--do_pictures", type=true_false, default=True, metavar="True|False", help="(default True)")
    group.add_argument("--latent_map", choices=("pca", "tsne"), default="pca", help="how the latent map is flattened")
    group.add_argument("--map_images", type=int, default=2000,
                       help="held-out images in the latent map, with --diagnose at most --diagnose_images")

    group = parser.add_argument_group("diagnostics and likelihood")
    group.add_argument("--diagnose", action="store_true", help="health of the latent space, on held-out images")
    group.add_argument("--diagnose_images", type=int, default=0, help="held-out images for it, 0 = all")
    group.add_argument("--nll", action="store_true", help="importance-weighted bound on log p(x), on held-out images")
    group.add_argument("--nll_samples", type=int, default=64, help="importance samples of each image")
    group.add_argument("--nll_images", type=int, default=0, help="held-out images for it, 0 = all")
    group.add_argument("--nll_fit_images", type=int, default=500,
                       help="training images that the Laplace scale is fitted on")

    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", action="store_true",
                       help="FID, KID, precision, recall, density, coverage; three FIDs")
    group.add_argument("--eval_images", type=int, default=10000,
                       help="images on each side, at most as many as real_split has, 0 = all")
    group.add_argument("--eval_out", default=None, metavar="FILE.json",
                       help="(default: evaluation_<tag>.json beside the log)")
    group.add_argument("--fid_dims", type=int, choices=(2048, 768, 192, 64), default=2048,
                       help="Inception layer by its number of features; 2048 is the published FID")
    add_manifold_flags(group)
    return parser


def check_flags(args):
    """Raise UserError on values out of range, naming the flag."""
    at_least = dict(seed=0, num_samples=1, num_real=0, num_recon=0, gen_batch_size=1, png_threads=0, map_images=3,
                    diagnose_images=0, nll_samples=1, nll_images=0, nll_fit_images=1, eval_images=0, k=1, nearest_k=1,
                    pca_dim=0, temperature=0)
    for name, low in at_least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be {low} or more")
    names = [args.real_dirname, args.fake_dirname, args.recon_dirname]
    for flag, name in zip(("real", "fake", "recon"), names):
        require_plain_name(f"--{flag}_dirname", name)
    if len(set(names)) < 3:
        raise UserError(f"--real_dirname, --fake_dirname and --recon_dirname must differ, not {', '.join(names)}")
    if args.tag is not None:
        require_plain_name("--tag", args.tag)
        if len(os.fsencode(args.tag)) > 200:
            raise UserError(f"--tag {args.tag[:20]!r}...: longer than 200 bytes, which file names of it would not bear")


def require_plain_name(what, name):
    if not name.strip() or name in (".", "..") or set(name) & set("/\\\0"):
        raise UserError(f"{what} {name!r}: must be a plain name")


def my_batches(n, size):
    """Slices of range(n), `size` long but for the last: this process's share of them, in whole batches, since rounding
    may depend on the size of a batch. All processes together have the batches of one."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)[my_share(-(-n // size))]]


# ---------------------------------------------------------------------------------------------------------------------
# Export

class Export(NamedTuple):
    """One folder of images to be made."""
    folder: Path
    flag: str                   # the flag that names the folder
    manifest: dict              # what the images depend on; an export with another one is another export
    count: int
    batches: Callable           # batches(start, stop) -> uint8 (B, C, H, W) of the images of these numbers


def encode_png(images):
    """uint8 (B, C, H, W), C 1 or 3 -> the bytes of B PNG files, 8-bit RGB.

    By hand since that takes half of the time of PIL, which builds an image object and a file's worth of Python calls
    for each: the "Sub" filter (each byte minus the one of the pixel to its left) is one NumPy call for the whole batch,
    and zlib works without the interpreter's lock.
    """
    B, _, H, W = images.shape
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).reshape(B, H, 3 * W).numpy()
    rows = np.empty((B, H, 1 + 3 * W), np.uint8)
    rows[:, :, 0] = 1                                           # the filter's number
    rows[:, :, 1:4] = pixels[:, :, :3]
    np.subtract(pixels[:, :, 3:], pixels[:, :, :-3], out=rows[:, :, 4:])

    def chunk(name, content):
        checksum = zlib.crc32(content, zlib.crc32(name))
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 2, 0, 0, 0))
    return [head + chunk(b"IDAT", zlib.compress(r, 1)) + PNG_END for r in rows]


def image_name(i, count):
    """00000.png and up; more digits, all the same, beyond 100,000 images, so that sorting by name is by number."""
    return f"{i:0{max(5, len(str(count - 1)))}d}.png"


def write_pngs(folder, images, first, count):
    """Write one file for each of the images; their number. A file that cannot be written to its end is removed."""
    for i, content in enumerate(encode_png(images), first):
        path = os.path.join(folder, image_name(i, count))
        try:
            with open(path, "wb") as f:
                f.write(content)
        except BaseException as e:
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(e, OSError) and e.filename is None:   # a full disk does not say which file it was
                e.filename = path
            raise
    return len(images)


def is_whole(path):
    """Does this file end as a PNG does? One cut short, or left empty by a power cut, does not."""
    try:
        with open(path, "rb") as f:
            f.seek(-len(PNG_END), os.SEEK_END)
            return f.read() == PNG_END
    except OSError:
        return False


def plan_export(export, overwrite):
    """Image number to go on from: 0 in a new folder, count in a complete one, -1 where another export has to go first.

    Changes nothing. Raises UserError where the folder holds anything but exported images, or (without overwrite)
    another export.
    """
    folder, flag, count = export.folder, export.flag, export.count
    if not folder.exists():
        return 0
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is a file; choose another name")
    names = [n for n in os.listdir(folder) if n != LOCK and not TEMPORARY.fullmatch(n)]
    images = {n for n in names if EXPORTED.fullmatch(n)}
    foreign = sorted(set(names) - images - {MANIFEST}) or (sorted(images) if MANIFEST not in names else [])
    if foreign:
        raise UserError(f"{flag}: {folder} holds files that are no export ({', '.join(foreign[:2])}); nothing was "
                        f"touched, move them away or choose another {flag}")
    if MANIFEST not in names:
        return 0
    way_out = f"--overwrite deletes it and exports anew, another {flag} keeps both"
    try:
        found = read_json(folder / MANIFEST)
        done = found.get("done")
        if not isinstance(done, int) or not 0 <= done <= count and found.get("count") == count:
            raise UserError("")
    except UserError:
        if overwrite:
            return -1
        raise UserError(f"{folder / MANIFEST}: damaged, so what these images are is not known; {way_out}") from None
    wanted, found = export.manifest, UNSAID | found
    differs = [f"{k} ({brief(found.get(k))}, not {brief(wanted[k])})" for k in wanted if found.get(k) != wanted[k]]
    beyond = sorted(images - {image_name(i, count) for i in range(count)})
    if differs or beyond:
        if overwrite:
            return -1
        what = (f"has another {', '.join(differs)}" if differs else
                f"also holds {beyond[0]}, which is none of its {count} images")
        raise UserError(f"{flag}: the export in {folder} {what}; {way_out}")
    return next((i for i in range(done) if not is_whole(folder / image_name(i, count))), done)


def delete_export(folder):
    """Remove the images and then the manifest: as long as one image is left, the folder says that it is an export."""
    for name in [n for n in os.listdir(folder) if EXPORTED.fullmatch(n)] + [MANIFEST]:
        os.unlink(folder / name)


def write_export(export, start, threads):
    """Make the folder's images from number `start` on, each process an equal share. Returns images a second.

    The manifest's `done` counts only images that lie on the disk whole, without a gap: whenever this is killed, the
    next run writes again what comes after, and a half-written file cannot survive. The main process has the first share
    and keeps the manifest.
    """
    folder, count = export.folder, export.count
    began = recorded = time.monotonic()

    def record(done):
        if is_main():
            write_json(folder / MANIFEST, {**export.manifest, "done": done})

    if is_main():
        if start < 0:
            delete_export(folder)
        folder.mkdir(parents=True, exist_ok=True)
    start = max(start, 0)
    record(start)
    gather("the folder is ready")
    mine = range(start, count)[my_share(count - start)]
    done, first, pending = mine.start, mine.start, deque()
    pool = ThreadPoolExecutor(threads)
    try:
        with progress_bar(mine.stop, f"writing {folder.name}") as bar:
            bar.update(mine.start)
            for batch in export.batches(mine.start, mine.stop):
                for part in batch.cpu().split(100):
                    pending.append(pool.submit(write_pngs, folder, part, first, count))
                    first += len(part)
                # A few parts may wait, so that writing and generating overlap and memory stays bounded.
                while pending and (pending[0].done() or len(pending) > 4 * threads):
                    done += pending[0].result()
                    pending.popleft()
                    bar.update(done - bar.n)
                if time.monotonic() - recorded > RECORD_S:
                    record(done)
                    recorded = time.monotonic()
            while pending:
                done += pending[0].result()
                pending.popleft()
                bar.update(done - bar.n)
    finally:
        pool.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):                      # on a full disk the older manifest stays, also true
            record(done)
    if done != mine.stop:
        raise ValueError(f"expected images up to number {mine.stop}, got {done}")
    gather("all images are written")
    record(count)
    return (count - start) / max(time.monotonic() - began, 1e-9)


def plan_exports(args, model, sets, identity):
    """The exports that are asked for. sets: {"train", "test"} of images; identity: manifest entries of the model."""
    exports = []

    def manifest(kind, count, **entries):
        return {"format": FORMAT, "kind": kind, "count": count, "image_size": model.img_size,
                "channels": model.in_channels, **entries}

    def add(what, manifest, batches):
        exports.append(Export(Path(args.export_dir, getattr(args, f"{what}_dirname")), f"--{what}_dirname", manifest,
                              manifest["count"], batches))

    if args.do_real:
        data = sets[args.real_split]
        chosen = spread(args.num_real, len(data))
        # Not of one checkpoint: all variants trained on these images share them.
        add("real", manifest("real", len(chosen), split=args.real_split, data=data.fingerprint),
            lambda start, stop: data.batches(chosen[start:stop].split(1000), torch.device("cpu")))
    if args.do_fake:
        add("fake", manifest("samples", args.num_samples, **identity, mixture_weights=mixture_weights_of(args),
                             seed=args.seed, temperature=args.temperature, latents=f"drawn in blocks of {LATENT_BLOCK}"),
            lambda start, stop: generate_images(model, stop, args.gen_batch_size, args.seed, args.temperature, start))
    if args.do_recon:
        if args.recon_flow == "bypassed" and not decodes_flow(model):
            raise UserError("--recon_flow bypassed: this model decodes without a flow anyway")
        flow = args.recon_flow == "used"
        source = sets[args.recon_split]
        picked = spread(args.num_recon, len(source))
        device = next(model.parameters()).device
        latent, noise = "posterior mean", None
        if args.recon_latent == "sample":
            latent = f"one sample of the posterior, seed {args.seed}"
            noise = torch.randn(len(picked), model.latent_dim, generator=seeded("cpu", args.seed, "reconstructions"))

        def reconstructions(start, stop):
            chosen = picked[start:stop].split(args.gen_batch_size)
            eps = [None] * len(chosen) if noise is None else noise[start:stop].to(device).split(args.gen_batch_size)
            for batch, e in zip(source.batches(chosen, device), eps):
                yield reconstruct(model, batch, e, flow)

        add("recon", manifest("reconstructions", len(picked), **identity, split=args.recon_split,
                              data=source.fingerprint, latent=latent + ("" if flow else ", flow bypassed")), reconstructions)
    return exports


def decodes_flow(model):
    """Does the decoder see what the flow makes?"""
    return model.flow is not None and model.decode_from == "zK"


@torch.no_grad()
def reconstruct(model, images, eps=None, flow=True):
    """uint8 (B, C, H, W) -> its reconstruction, uint8. eps (B, D): noise of z0, None = the posterior's mean; flow=False
    decodes z0 itself."""
    if flow:
        return to_uint8(model.reconstruct(to_float(images), eps))
    mu, logvar = model.encode(to_float(images))
    return to_uint8(model.decode(mu if eps is None else mu + torch.exp(0.5 * logvar) * eps))


# ---------------------------------------------------------------------------------------------------------------------
# The latent space

class Posterior(NamedTuple):
    """One posterior sample of each of N held-out images, on the CPU."""
    mu: torch.Tensor            # (N, D)
    logvar: torch.Tensor        # (N, D)
    z0: torch.Tensor            # (N, D)
    zK: torch.Tensor            # (N, D)
    zK_of_mu: torch.Tensor      # (N, D) the flow's image of mu
    kl: torch.Tensor            # (N,) one-sample KL, nats
    saturated: list             # (L,) share of |s| > 0.9 c in each coupling layer; empty without a flow
    round_trip: float           # largest |f^-1(f(z0)) - z0| / (1 + |z0|)
    health: dict                # LatentHealth.summary()


def latents(model, x, eps, prior):
    """VAEOutput of images x (B, C, H, W) with noise eps (B, D), nothing decoded, and the flow's context."""
    mu, logvar, context = model.posterior(x)
    return model.carry(mu, logvar, eps, prior, context), context


@torch.no_grad()
def refit_weights(model, data, batch_size):
    """Weigh the prior's components by what training images want of them (ex-post density estimation, arXiv 1903.12436, of
    the weights alone). Returns how many images there were."""
    device, chosen = next(model.parameters()).device, spread(REFIT_IMAGES, len(data))
    # Whatever --seed: the prior is the model's, and samples of all seeds are of one.
    noise = torch.randn(len(chosen), model.latent_dim, generator=seeded("cpu", 0, "weights"))
    prior, mine = model.prior_params(), my_batches(len(chosen), batch_size)
    found = [torch.zeros(0, model.num_components)]              # of more processes than batches some have none
    for batch, b in zip(data.batches([chosen[b] for b in mine], device), mine):
        out, _ = latents(model, to_float(batch), noise[b].to(device), prior)
        found.append(model.responsibilities(out).cpu())
    model.fit_weights_(torch.cat([share for shares in gather(found) for share in shares]))
    return len(chosen)


@torch.no_grad()
def collect_posterior(model, data, indices, batch_size, seed):
    """A pass over the images of these indices -> Posterior."""
    device, N = next(model.parameters()).device, len(indices)
    prior, health = model.prior_params(), LatentHealth()
    noise = torch.randn(N, model.latent_dim, generator=seeded("cpu", seed, "posterior"))
    parts, saturated, round_trip, n = [], 0.0, 0.0, 0
    with progress_bar(N, "posterior") as bar:
        for batch in data.batches(indices.split(batch_size), device):
            out, context = latents(model, to_float(batch), noise[n:n + len(batch)].to(device), prior)
            kl = model.kl_terms(out)
            health.add(model, out, kl)
            if model.flow is not None:
                _, s = model.flow.transform(out.z0, context)                                    # (L, B, D)
                saturated = saturated + (s.abs() > 0.9 * model.flow.scale_bound).cpu().double().mean(2).sum(1)
                back, _ = model.flow.inverse(out.zK, context)
                round_trip = max(round_trip, ((back - out.z0).abs() / (1 + out.z0.abs())).max().item())
            at_mu = model.apply_flow(out.mu, context)[0]
            parts.append([t.float().cpu() for t in (out.mu, out.logvar, out.z0, out.zK, at_mu, kl.kl)])
            n += len(batch)
            bar.update(len(batch))
    layers = [] if model.flow is None else (saturated / N).tolist()
    return Posterior(*map(torch.cat, zip(*parts)), layers, round_trip, health.summary())


def mutual_information(z0, mu, logvar, block=1024):
    """I = E_i[log q(z_i|x_i) - log 1/N sum_j q(z_i|x_j)] of N Gaussian posteriors with one sample z_i each, in nats.

    All N^2 pairs, in float64, where the expanded quadratic is exact enough to be a matrix product. Never above log N:
    near that cap it only says "at least". (N, D) three times -> float.
    """
    z0, mu, logvar = (t.double() for t in (z0, mu, logvar))
    N, precision = len(z0), torch.exp(-logvar)
    constant = (mu.square() * precision + logvar).sum(1)                                        # (N,)
    total = 0.0
    for i in range(0, N, block):
        z = z0[i:i + block]
        log_q = -0.5 * (z.square() @ precision.T - 2 * (z @ (mu * precision).T) + constant)     # (block, N)
        total += (log_q.diagonal(i) - torch.logsumexp(log_q, 1) + math.log(N)).sum().item()     # 2 pi cancels
    return total / N


def diagnose(model, posterior):
    """The numbers of diagnostics.json but the protocol; lists for the figure included."""
    N, health = len(posterior.mu), dict(posterior.health)
    information = mutual_information(posterior.z0, posterior.mu, posterior.logvar)
    amortised = model.context_position is not None
    result = {
        **{k: health.pop(k) for k in ("kl_raw", "log_q0", "log_det", "log_p")},
        "mutual_information": information, "mutual_information_cap": math.log(N),
        "mutual_information_of": "x and z0, the base posterior; the flow depends on the image, so z_K may carry more"
        if amortised else "x and the latent (z0 or z_K: one invertible flow for all images changes nothing)",
        # KL = I(x; z) + KL(aggregate posterior || prior), as long as the flow is one for all; the information is at
        # least its estimate, so the rest is at most this.
        "aggregate_posterior_gap_at_most": None if amortised else posterior.health["kl_raw"] - information,
        "latent_dim": model.latent_dim, "components": model.num_components, **health,
    }
    result["mean_variance"] = posterior.mu.double().var(0, unbiased=False).tolist()
    if model.flow is not None:
        result["saturated_share"] = float(np.mean(posterior.saturated))
        result["saturated_share_per_layer"] = posterior.saturated
        result["round_trip_error_float32"] = posterior.round_trip
        checked = check_flow(model.flow)
        result["round_trip_error_float64"] = checked["inverse_error"]
        result["log_det_error_float64"] = checked["log_det_error"]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood

def log_laplace_bins(levels, mean, scale):
    """log P(v) of a Laplace(mean, scale) rounded to whole grey levels 0..255; its tails belong to 0 and 255.

    P(v) = F(v + 1/2) - F(v - 1/2), F the Laplace distribution function; never as a difference of two numbers near 0 or
    1. levels (...) whole numbers, mean (...), scale a number, all in grey levels -> (...), nats.
    """
    h = 0.5 / scale
    d = (levels - mean).abs()
    # log sinh h and, where the mean lies inside the bin, log(1 - exp(-h) cosh(d / scale)).
    outside = h + math.log(-math.expm1(-2 * h)) - math.log(2) - d / scale
    near = d.clamp_max(0.5)
    inside = torch.log(-0.5 * (torch.expm1((near - 0.5) / scale) + torch.expm1((-near - 0.5) / scale)))
    middle = torch.where(d >= 0.5, outside, inside)
    # Everything beyond the border between the last bin and the one before it, which lies at distance t from the mean.
    t = torch.where(levels == 0, mean - 0.5, 254.5 - mean)
    edge = torch.where(t >= 0, -t.clamp_min(0) / scale - math.log(2),
                       torch.log1p(-0.5 * torch.exp(t.clamp_max(0) / scale)))
    return torch.where((levels == 0) | (levels == 255), edge, middle)


def golden_section(function, low, high, steps=40):
    """Where a function with a single minimum in [low, high] has it."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2


def laplace_scale(pairs):
    """The scale of the highest likelihood, in grey levels, of a list of (levels, means), tensors of one shape each."""
    def loss(log_scale):
        return -sum(log_laplace_bins(v, m, math.exp(log_scale)).sum().item() for v, m in pairs)

    # Over the logarithm: the likelihood has one maximum there, and the scale is positive by itself.
    return math.exp(golden_section(loss, math.log(0.01), math.log(1000)))


@torch.no_grad()
def fit_scale(model, data, indices, batch_size, seed):
    """laplace_scale of the images of these indices, the means being decoded from one posterior sample each."""
    device = next(model.parameters()).device
    noise = torch.randn(len(indices), model.latent_dim, generator=seeded("cpu", seed, "laplace"))
    pairs, n = [], 0
    for batch in data.batches(indices.split(batch_size), device):
        mean = model.reconstruct(to_float(batch), noise[n:n + len(batch)].to(device))
        pairs.append((batch.float(), (mean.float() + 1) * 127.5))
        n += len(batch)
    return laplace_scale(pairs)


@torch.no_grad()
def importance_weights(model, batch, scale, samples, generators, prior, chunk=512):
    """log w_s = log p(x|zK) + log p(zK) - log q(zK|x), zK ~ q(zK|x): uint8 (B, C, H, W) -> (B, S) float64 on the CPU.

    One generator for each image: its weights depend on neither the batch nor the device. prior: prior_params(). chunk:
    latents decoded at once.
    """
    device = next(model.parameters()).device
    mu, logvar, context = model.posterior(to_float(batch))
    out = torch.empty(len(batch), samples, dtype=torch.float64)
    images = max(1, chunk // samples)                                                           # decoded together
    for i in range(0, len(batch), images):
        these = slice(i, min(i + images, len(batch)))
        noise = torch.stack([torch.randn(samples, model.latent_dim, generator=g) for g in generators[these]])
        for s in range(0, samples, chunk):
            eps = noise[:, s:s + chunk].to(device)                                              # (b, s, D)
            b, S, D = eps.shape
            m, v = (t[these, None].expand(b, S, D).reshape(b * S, D) for t in (mu, logvar))
            c = None if context is None else context[these, None].expand(-1, S, -1, -1).flatten(0, 1)
            latent = model.carry(m, v, eps.reshape(b * S, D), prior, c)
            kl = model.kl_terms(latent).kl                                                      # log q - log p of zK
            mean = (model.decode(model.seen_by_decoder(latent.z0, latent.zK)).float() + 1) * 127.5
            levels = batch[these, None].expand(-1, S, -1, -1, -1).flatten(0, 1).float()
            log_x = log_laplace_bins(levels, mean, scale).flatten(1).sum(1)
            out[these, s:s + S] = (log_x - kl).view(b, S).cpu().double()
    return out


def bounds_of(log_w):
    """log-weights (N, S) -> IWAE log 1/S sum w and ELBO mean log w, (N,) each, and the effective number of samples
    (sum w)^2 / sum w^2: near 1 the bound rests on one sample."""
    iwae = torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])
    effective = (2 * torch.logsumexp(log_w, 1) - torch.logsumexp(2 * log_w, 1)).exp()
    return iwae, log_w.mean(1), effective


@torch.no_grad()
def estimate_nll(args, model, sets):
    """The numbers of nll.json but the protocol; the held-out images are shared out over the processes."""
    train, test = sets["train"], sets["test"]
    device = next(model.parameters()).device
    scale = fit_scale(model, train, spread(args.nll_fit_images, len(train)), args.gen_batch_size, args.seed)
    scale = gather(scale)[0]                                    # to the last bit everyone's
    indices = spread(args.nll_images, len(test))
    mine = [indices[b] for b in my_batches(len(indices), args.gen_batch_size)]
    parts, n, prior = [], len(indices), model.prior_params()
    with progress_bar(sum(map(len, mine)), f"log p(x), {args.nll_samples} samples each") as bar:
        for batch, which in zip(test.batches(mine, device), mine):
            for part, these in zip(batch.split(8), which.split(8)):                             # so that the bar moves
                generators = [seeded("cpu", args.seed, "importance", i) for i in these.tolist()]
                parts.append(importance_weights(model, part, scale, args.nll_samples, generators, prior))
                bar.update(len(part))
    iwae, elbo, effective = bounds_of(torch.cat(sum(gather(parts), [])))
    values = math.prod(test.shape)

    def numbers(bound):
        error = bound.std().item() / math.sqrt(n) if n > 1 else None
        return {"nats_per_image": -bound.mean().item(), "standard_error": error,
                "bits_per_dim": -bound.mean().item() / values / math.log(2)}

    return {
        "what": "upper bounds on -log p(x) of 8-bit images, the decoder's output read as the mean of a discretised "
                "Laplace distribution over 256 levels with one scale for all; the model was not trained for it alone",
        "importance_weighted": numbers(iwae), "negative_elbo": numbers(elbo),
        "effective_samples": effective.mean().item(), "laplace_scale_grey_levels": scale,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def distinct_features(extractor, batches, total, seen, desc):
    """Features (N, F) of uint8 batches, `total` images in them; with several processes, of the batches of all, in order.

    An image that occurs twice has one row of features (seen: content -> its features), whichever processes met it: equal
    images must be equal points to the last bit, or ties between distances break at random.
    """
    keys, found = [], {}
    with progress_bar(total, desc) as bar:
        for batch in batches:
            batch = batch.cpu()
            these = [hashlib.blake2b(x.tobytes(), digest_size=16).digest() for x in batch.numpy()]
            new = {key: i for i, key in enumerate(these) if key not in seen and key not in found}
            if new:
                found.update(zip(new, extractor(batch[list(new.values())]).numpy()))
            keys += these
            bar.update(len(batch))
    shares = gather((keys, found))
    for _, others in shares:
        for key, row in others.items():
            seen.setdefault(key, row)                           # of the first process that met the image
    return np.stack([seen[key] for share, _ in shares for key in share])


PAIRED = "the reference images themselves: neither split has enough others"


def choose_images(args, sets):
    """Indices of the reference images, the split and the indices of those that are reconstructed, and in words how.

    Others than the reference where there are enough: a reconstruction shares the chance of its own original, samples of
    the prior do not, and the difference of their FIDs would count that as the prior's fault.
    """
    split, other = args.real_split, "test" if args.real_split == "train" else "train"
    reference = spread(args.eval_images, len(sets[split]))
    n = len(reference)
    rest = torch.ones(len(sets[split]), dtype=torch.bool).index_fill(0, reference, False).nonzero()[:, 0]
    if len(rest) >= n:
        return reference, split, rest[spread(n, len(rest))], "other images of the same split than the reference"
    if len(sets[other]) >= n:
        return reference, other, spread(n, len(sets[other])), f"images of the {other} split"
    return reference, split, reference, PAIRED


def project_equally(features, mu, components):
    """PR_Calculate.project with equal rows for equal rows, which a matrix product alone does not promise."""
    table, rows = np.unique(features, axis=0, return_inverse=True)
    return project(table, mu, components)[rows.reshape(-1)]


def evaluation_features(args, model, sets, extractor):
    """One pass over all images that --evaluate measures, shared out over the processes -> features (N, F) of real images
    and of samples, (mean, covariance) of those of reconstructions by "used" or "bypassed", how they were chosen."""
    device, batch, seen = next(model.parameters()).device, args.gen_batch_size, {}
    reference, split, sources, how = choose_images(args, sets)
    data = sets[args.real_split]
    n = len(reference)                                          # on every side, so that the FIDs share their bias
    noise = torch.randn(n, model.latent_dim, generator=seeded("cpu", args.seed, "evaluation"))
    mine = my_batches(n, batch)
    total = sum(b.stop - b.start for b in mine)

    def reconstructions(flow):
        for images, b in zip(sets[split].batches([sources[b] for b in mine], device), mine):
            yield reconstruct(model, images, noise[b].to(device), flow)

    def samples():
        # In the batches of the export, since rounding may depend on the size of a batch.
        first = mine[0].start if mine else 0
        for b, images in zip(mine, generate_images(model, max(n, args.num_samples), batch, args.seed, args.temperature,
                                                   first)):
            yield images[:b.stop - b.start]

    real = distinct_features(extractor, data.batches([reference[b] for b in mine], torch.device("cpu")), total, seen,
                             "features of real images")
    fake = distinct_features(extractor, samples(), total, seen, "features of samples")
    reconstructed = {}
    for flow in ("used", "bypassed") if decodes_flow(model) else ("used",):
        features = distinct_features(extractor, reconstructions(flow == "used"), total, {},
                                     f"features of reconstructions, flow {flow}")
        reconstructed[flow] = mean_and_covariance(features)
    return real, fake, reconstructed, how


def evaluate(args, model, data, extractor, features):
    """(metrics, protocol) of samples against real images, and the three FIDs that show where quality is lost: prior
    samples, decode(f(z0)) with z0 ~ q(z0|x), decode(z0). features: evaluation_features()."""
    device = next(model.parameters()).device
    real, fake, reconstructed, how = features
    n, statistics = len(real), mean_and_covariance(real)
    kid, kid_std = kernel_distance(real, fake, seed=args.seed, device=device)
    metrics = {"fid": frechet_distance(*statistics, *mean_and_covariance(fake)), "kid": kid, "kid_std": kid_std,
               "fid_reconstructed": frechet_distance(*statistics, *reconstructed["used"])}
    if "bypassed" in reconstructed:
        metrics["fid_flow_bypassed"] = frechet_distance(*statistics, *reconstructed["bypassed"])
    metrics["fid_prior_gap"] = metrics["fid"] - metrics["fid_reconstructed"] if how != PAIRED else None
    kept = None
    if args.pca_dim:
        mu, components, kept = fit_pca(real, args.pca_dim)
        real, fake = (project_equally(x, mu, components) for x in (real, fake))
    metrics |= manifold_metrics(real, fake, args.k, args.nearest_k, device, progress=True)
    size = f"{model.img_size}x{model.img_size}"
    protocol = {
        "real": {"images": n, "split": args.real_split, "choice": "all" if n == len(data) else f"{n} evenly spaced",
                 "size": size, "content": data.fingerprint},
        "fake": {"images": n, "choice": f"the first {n} samples of the seed, as --do_fake exports them", "size": size,
                 "temperature": args.temperature},
        "reconstructed": {"images": n, "choice": how, "latent": "z0 ~ q(z0|x), one sample"},
        "features": {"name": extractor.name, "sha256": extractor.sha256, "dims": extractor.dims},
        "fid": "on all features, before PCA, float64",
        "kid": kernel_protocol(extractor.dims, n, n),
        "k": args.k, "nearest_k": args.nearest_k, "pca": pca_protocol(args.pca_dim, kept),
    }
    return metrics, protocol


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def figure(*args, **kwargs):
    return pyplot().subplots(*args, constrained_layout=True, **kwargs)


def save_rows(path, title, rows, group=1, headings=None):
    """A picture of labelled rows of images: rows of (label, uint8 (n, C, H, W), texts under the images or None).

    group: rows that belong together; headings: {column: text} above the first row.
    """
    columns = max(len(images) for _, images, _ in rows)
    _, C, H, W = rows[0][1].shape
    parts, middles, texts, y = [], [], [], 0
    for i, (_, images, below) in enumerate(rows):
        blank = images.new_full((columns - len(images), C, H, W), 255)
        strip = image_grid(torch.cat([images, blank]).cpu(), columns)                           # (C, H + 4, width)
        middles.append(y + strip.shape[1] / 2)
        texts += [(j * (W + 2) + 2 + W / 2, y + strip.shape[1], text) for j, text in enumerate(below or ())]
        gap = (0.5 if below else 0.2 if (i + 1) % group == 0 and group > 1 else 0) * H
        parts += [strip, strip.new_full((C, math.ceil(gap), strip.shape[2]), 255)]
        y += strip.shape[1] + math.ceil(gap)
    picture = torch.cat(parts, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    inch = 0.6 / (W + 2)                                                                        # of a pixel
    fig, ax = figure(figsize=(max(6.0, picture.shape[1] * inch + 1.6), picture.shape[0] * inch + 0.9))
    ax.imshow(picture, interpolation="nearest")
    ax.set_yticks(middles, [label for label, _, _ in rows], fontsize=8)
    ax.set_xticks([j * (W + 2) + 2 + W / 2 for j in headings or ()], list((headings or {}).values()), fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    for x, bottom, text in texts:
        ax.text(x, bottom, text, ha="center", va="top", fontsize=7)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title, fontsize=9, loc="left", wrap=True)
    save_figure(path, fig, dpi=110)


@torch.no_grad()
def component_rows(model, usage, seed, temperature, most=20, each=8):
    """Rows for save_rows: what a component stands for (a VampPrior's pseudo-input), its decoded mean, samples of it."""
    prior = mu_k, _ = model.prior_params()
    order = torch.tensor(usage).argsort(descending=True, stable=True)[:most]
    noise = torch.randn(len(order), each, model.latent_dim, generator=seeded("cpu", seed, "components")).to(mu_k)
    rows = []
    for k, eps in zip(order.tolist(), noise):
        draws = model.component_draws(torch.full((each,), k, device=mu_k.device), temperature * eps, prior)
        z = torch.cat([mu_k[k:k + 1], draws])
        images = to_uint8(model.decode(model.from_mixture(z)))
        if model.pseudo_inputs is not None:
            images = torch.cat([to_uint8(model.pseudo_inputs[k:k + 1]), images])
        rows.append((f"k = {k}, {usage[k]:.1%}", images, None))
    return rows


@torch.no_grad()
def interpolate(model, images, seed, steps=9):
    """Rows for save_rows: images 0 and 1, 2 and 3, ... and straight lines in zK between a posterior sample of each."""
    eps = torch.randn(len(images), model.latent_dim, generator=seeded("cpu", seed, "interpolation")).to(images.device)
    zK = latents(model, to_float(images), eps, (None, None))[0].zK
    t, rows = torch.linspace(0, 1, steps, device=zK.device)[:, None], []
    for i in range(0, len(images) - 1, 2):
        line = model.decode(model.decoder_latent((1 - t) * zK[i] + t * zK[i + 1]))
        rows.append((f"pair {i // 2 + 1}", torch.cat([images[i:i + 1], to_uint8(line), images[i + 1:i + 2]]), None))
    return rows


def nearest_images(queries, data, block=None):
    """Index of the image of `data` nearest to each query in pixel L2, and the squared distance, (Q,) int64 each.

    uint8 (Q, C, H, W). Exact: in float64 every sum is a whole number below 2^53. Of equally near ones the first. block:
    images at a time, None = as many as 2,000 of 32x32 pixels come to, for memory.
    """
    block = block or max(1, min(2000, 2000 * 3 * 32 ** 2 // math.prod(queries.shape[1:])))
    device = queries.device if queries.device.type != "mps" else torch.device("cpu")            # which has no float64
    q = queries.to(device).flatten(1).double()
    best, start = torch.full((len(q),), math.inf, dtype=torch.float64, device=device), 0
    index = torch.zeros(len(q), dtype=torch.int64, device=device)
    with progress_bar(len(data), "nearest training images") as bar:
        for batch in data.batches(torch.arange(len(data)).split(block), device):
            x = batch.flatten(1).double()
            d = q.square().sum(1, keepdim=True) + x.square().sum(1) - 2 * q @ x.T               # (Q, block)
            least, at = d.min(1)
            closer = least < best
            best[closer], index[closer] = least[closer], at[closer] + start
            start += len(batch)
            bar.update(len(batch))
    return index.cpu(), best.long().cpu()


def nearest_rows(samples, held_out, data, mirror):
    """Rows for save_rows, samples over their nearest training images, and medians of the RMS distance of samples and of
    held-out images, in grey levels. mirror: training saw mirrored images too, so they are searched as well."""
    n, values = len(samples), math.prod(samples.shape[1:])
    queries = torch.cat([samples, held_out.to(samples.device)])
    index, distance = nearest_images(torch.cat([queries, queries.flip(3)]) if mirror else queries, data)
    found = data.take(index.tolist()).cpu()
    if mirror:
        flipped = distance[len(queries):] < distance[:len(queries)]
        found = torch.where(flipped[:, None, None, None], found[len(queries):].flip(3), found[:len(queries)])
        distance = torch.minimum(distance[:len(queries)], distance[len(queries):])
    rms = (distance.double() / values).sqrt()
    rows = []
    for i in range(0, n, 10):
        j = min(i + 10, n)
        rows += [("samples", samples[i:j].cpu(), None), ("nearest", found[i:j], [f"{r:.1f}" for r in rms[i:j]])]
    return rows, rms[:n].median().item(), rms[n:].median().item()


def save_latent_map(path, model, posterior, n, method, seed):
    """Posterior means of n images and the prior's components in the space where the mixture lives, flattened to two
    dimensions. Returns in words which space that is."""
    chosen = spread(n, len(posterior.mu))
    shared = model.flow is None or model.flow_prior == "pushed"
    where = "z0: posterior means" if shared else "zK: posterior means carried by the flow, f(mu(x))"
    means = (posterior.mu if shared else posterior.zK_of_mu)[chosen].double().numpy()
    with torch.no_grad():
        components = model.prior_params()[0].cpu().double().numpy()
    usage = np.array(posterior.health["mean_responsibility"])
    if method == "tsne":
        from sklearn.manifold import TSNE
        both = np.concatenate([means, components])              # t-SNE has no map for points that come later
        perplexity = min(30.0, (len(both) - 1) / 3)
        flat = TSNE(2, perplexity=perplexity, init="pca" if both.shape[1] > 1 else "random",
                    random_state=seed % 2 ** 32).fit_transform(both.astype(np.float32))
        points, marks = flat[:len(means)], flat[len(means):]
        labels = f"t-SNE 1 (perplexity {perplexity:.0f}, no scale)", "t-SNE 2"
    else:
        from sklearn.decomposition import PCA
        fitted, whose = (means, "means") if len(means) > 1 else (np.concatenate([means, components]), "mean and components")
        pca = PCA(min(2, fitted.shape[1], len(fitted))).fit(fitted)
        points, marks = (np.pad(pca.transform(x), ((0, 0), (0, 2 - pca.n_components_))) for x in (means, components))
        share = [*pca.explained_variance_ratio_, 0.0]
        labels = (f"principal component 1 of the {whose} ({share[0]:.0%} of their variance)",
                  f"principal component 2 ({share[1]:.0%})")
    name = {"vamp": "means of the pseudo-inputs", "mog": "means of the components", "standard": "mean of the prior"}
    fig, ax = figure(figsize=(7.5, 6.5))
    ax.scatter(*points.T, s=6, c="#0072B2", alpha=0.35, linewidths=0,
               label=f"posterior means, {len(points):,} held-out images")
    dead = usage < 0.1 / len(usage)
    size = 25 + 250 * usage / usage.max()
    ax.scatter(*marks[~dead].T, s=size[~dead], c="#E69F00", marker="D", edgecolors="black", linewidths=0.8,
               label=f"{name[model.prior]}, sized by use ({(~dead).sum()})")
    if dead.any():
        ax.scatter(*marks[dead].T, s=25, facecolors="none", edgecolors="black", marker="D", linewidths=0.8,
                   label=f"the same, dead ({dead.sum()})")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_title(f"Latent map at {where}", fontsize=10, loc="left")
    legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    ax.grid(alpha=0.2)
    save_figure(path, fig, dpi=110)
    return where


def save_pictures(args, model, sets, posterior, folder, flip):
    """All pictures; returns lines for the log."""
    train, held_out = sets["train"], sets["test"]
    device, zoom = next(model.parameters()).device, max(1, 64 // model.img_size)
    samples = next(generate_images(model, 64, 64, args.seed, args.temperature))
    save_png(folder / "samples.png", image_grid(samples.cpu(), 8), zoom)

    usage = posterior.health["mean_responsibility"]
    rows = component_rows(model, usage, args.seed, args.temperature)
    first = ["pseudo-input"] if model.prior == "vamp" else []
    headings = dict(enumerate([*first, "mean", "samples"]))
    which = f"the {len(rows)} most used of {len(usage)}" if len(rows) < len(usage) else f"all {len(usage)}"
    at = "" if args.temperature == 1 else f", temperature {args.temperature:g}"
    save_rows(folder / "components.png", f"Samples of the prior's components, {which}{at}\n(share: mean responsibility for "
              f"{len(posterior.mu):,} held-out images)", rows, headings=headings)

    chosen = held_out.take(spread(16, len(held_out)).tolist()).to(device)
    if len(chosen) > 1:
        save_rows(folder / "interpolations.png", "Straight lines in zK between posterior samples of held-out images",
                  interpolate(model, chosen, args.seed), headings={0: "original", 1: "z_A", 9: "z_B", 10: "original"})

    shown = held_out.take(spread(30, len(held_out)).tolist()).to(device)
    decoded = reconstruct(model, shown)
    rows = [row for i in range(0, len(shown), 10) for row in (("original", shown[i:i + 10].cpu(), None),
                                                              ("reconstruction", decoded[i:i + 10].cpu(), None))]
    save_rows(folder / "reconstructions.png", "Held-out images and their reconstructions (posterior mean)", rows, 2)

    rows, ours, theirs = nearest_rows(samples[:30], shown, train, flip)
    medians = f"samples {ours:.1f}, held-out images {theirs:.1f}"
    title = (f"Samples{at} over their nearest training images{', mirrored or not' if flip else ''} (pixel L2;\n"
             f"RMS distance in grey levels below). Median: {medians};\ncopies of training images would lie near 0")
    save_rows(folder / "nearest.png", title, rows, group=2)

    where = save_latent_map(folder / "latent_map.png", model, posterior, args.map_images, args.latent_map, args.seed)
    return [f"nearest training image, median RMS distance in grey levels: {medians}", f"latent map at {where}"]


def save_diagnostics(path, result, posterior, title):
    """diagnostics.png."""
    fig, axes = figure(2, 3, figsize=(15, 8))
    blue, orange, grey = "#0072B2", "#E69F00", "#666666"
    (a, b, c), (d, e, f) = axes

    usage = sorted(result["mean_responsibility"], reverse=True)
    a.bar(range(1, len(usage) + 1), usage, width=1.0 if len(usage) > 30 else 0.8, color=blue)
    a.axhline(1 / len(usage), color=orange, label=f"equal shares, 1/K = {1 / len(usage):.3g}")
    a.axhline(0.1 / len(usage), color=grey, linestyle="--", label="dead below 0.1/K")
    a.set(title=f"Components: {result['effective_components']:.1f} effective of {len(usage)}, "
                f"{result['dead_components']} dead", xlabel="component, sorted", ylabel="mean responsibility")

    share = sorted(result["signal_share"], reverse=True)
    b.plot(range(1, len(share) + 1), share, color=blue, marker="o" if len(share) < 40 else None)
    b.set(title="Signal share of each dimension", xlabel="dimension, sorted", ylim=(-0.02, 1.02),
          ylabel="Var mu / (Var mu + E sigma²)")

    spread_of = sorted(result["mean_variance"], reverse=True)
    c.semilogy(range(1, len(spread_of) + 1), np.maximum(spread_of, 1e-12), color=blue,
               marker="o" if len(spread_of) < 40 else None)
    c.axhline(0.01, color=orange, linestyle="--", label="active above 0.01")
    c.set(title=f"Active units: {result['active_units']} of {result['latent_dim']}", xlabel="dimension, sorted",
          ylabel="variance of mu over images")

    at_cap = result["mutual_information"] > result["mutual_information_cap"] - 0.1
    parts = [("E log q(z0|x)", result["log_q0"]), ("- E log|det|", -result["log_det"]), ("- E log p", -result["log_p"]),
             ("= KL", result["kl_raw"]),
             ("mutual information" + (",\nat least (at its cap)" if at_cap else ""), result["mutual_information"])]
    bars = d.bar([n for n, _ in parts], [v for _, v in parts], color=[blue] * 3 + [orange] * 2)
    d.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    d.axhline(result["mutual_information_cap"], color=grey, linestyle="--",
              label=f"cap of the information, log N = {result['mutual_information_cap']:.2f}")
    d.axhline(0, color="black", linewidth=0.8)
    d.margins(y=0.12)
    d.tick_params(axis="x", labelsize=8)
    d.set(title="KL and its parts, mutual information", ylabel="nats per image")

    e.hist(posterior.kl.numpy(), bins=min(60, max(5, len(posterior.kl) // 4)), color=blue)
    e.axvline(result["kl_raw"], color=orange, label=f"mean {result['kl_raw']:.1f}")
    e.set(title="KL of single images (one sample each)", xlabel="nats", ylabel="images")

    if posterior.saturated:
        bars = f.bar(range(1, len(posterior.saturated) + 1), [100 * v for v in posterior.saturated], color=blue)
        f.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
        top = max(1.0, 120 * max(posterior.saturated))
        f.set(title=f"Scale saturation; float32 round trip {result['round_trip_error_float32']:.1e}",
              xlabel="coupling layer", ylabel="values with |s| > 0.9 c, %", ylim=(0, top))
        f.set_xticks(range(1, len(posterior.saturated) + 1))
    else:
        f.set_axis_off()
        f.text(0.5, 0.5, "no flow", ha="center", transform=f.transAxes)
    for ax in axes.flat:
        ax.grid(alpha=0.25, axis="y")
        ax.set_axisbelow(True)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    fig.suptitle(plain_text(title))
    save_figure(path, fig, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------
# What comes next, and main

def is_export(folder, **entries):
    """Does the folder hold a finished export that says so of itself?"""
    try:
        manifest = UNSAID | read_json(folder / MANIFEST)
    except (OSError, UserError):
        return False
    return manifest.get("done") == manifest.get("count") and all(manifest.get(k) == v for k, v in entries.items())


def common_tag(tag):
    """What csv_analysis.py and comparison.py can call this run: its tag, or another one if they would refuse that."""
    try:
        return safe_tag("real_samples" if tag == "real" else tag)
    except argparse.ArgumentTypeError:
        return safe_tag(f"run_{re.sub(r'[^A-Za-z0-9_.+-]', '_', tag)[:80]}_{zlib.crc32(os.fsencode(tag)):08x}")


def next_commands(args, tag, device, real_images, samples):
    """The commands that turn the exports into numbers and figures, ready for a shell; those whose folders are there, and are
    what this command would have exported: with these manifest entries."""
    real, fake = (Path(args.export_dir, name) for name in (args.real_dirname, args.fake_dirname))
    there = {real: is_export(real, kind="real", **real_images), fake: is_export(fake, kind="samples", **samples)}
    quality, compare = (Path(args.save_dir, name) for name in (QUALITY_DIR, "compare"))
    tag, commands = common_tag(tag), []
    if all(there.values()):
        number = sum(EXPORTED.fullmatch(name) is not None for name in os.listdir(real))
        commands += [["-m", "pytorch_fid", real, fake],
                     ["PR_Calculate.py", "--real_dir", real, "--fake_dir", fake, "--device", device.type, "--pca_dim",
                      min(args.pca_dim, number), "--tag", tag, "--out", Path(quality, f"pr_{tag}.json")]]
    folders = {name: folder for name, folder in ((tag, fake), ("real", real)) if there[folder]}
    commands += [["csv_analysis.py", "--gen", folder, "--out_dir", quality, "--tag", name] for name, folder in folders.items()]
    if folders:
        known = ["VAE"] if Path(quality, "cache_VAE.csv").exists() else []
        commands.append(["comparison.py", "--cache_dir", quality, "--out_dir", compare, "--model_order",
                         ",".join(dict.fromkeys([*known, *folders]))])
    return [shlex.join(["python", *map(str, c)]) for c in commands]


def open_data(args, checkpoint, model, device):
    """{"train": ..., "test": ...} of the checkpoint's data set, wherever it lies now, and a warning if it is not the one that
    the model was trained on. Without --allow_other_data that is a UserError."""
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    check_saved_flags(parser, checkpoint["args"], args.resume)
    flags = argparse.Namespace(**{k: checkpoint["args"][k] for k in DATA_FLAGS})
    flags.data_dir = args.data_dir
    train, test = load_data(flags, device, Path(args.save_dir, DATA_CACHE) if args.data_cache else None)
    if tuple(train.shape) != (model.in_channels, model.img_size, model.img_size):
        raise UserError(f"--data_dir {args.data_dir}: images of shape {tuple(train.shape)}, the model's are "
                        f"{(model.in_channels, model.img_size, model.img_size)}")
    if train.fingerprint != checkpoint.get("data_id"):
        problem = f"--data_dir {args.data_dir}: not the images that {args.resume} was trained on"
        if not args.allow_other_data:
            raise UserError(f"{problem} ({len(train):,} training images there); find those, or accept others with "
                            f"--allow_other_data")
        return {"train": train, "test": test}, f"{problem}; every number below mixes two data sets"
    return {"train": train, "test": test}, None


def main():
    args = build_parser().parse_args()
    check_flags(args)
    with contextlib.ExitStack() as locks:
        export_and_measure(args, locks)


class Report(NamedTuple):
    """Where the numbers of a run of this script go, and what stands beside each of them."""
    folder: Path                # save_dir/<name of the run>/test
    log: TextIO                 # test_log.txt in it
    tag: str
    suffix: str                 # of the names of files of numbers: of a --tag that is not the run's name
    position: str               # which weights of which epoch, in words
    provenance: dict            # the part of every protocol that says which model and data

    def say(self, text):
        print(text, flush=True)
        print(text, file=self.log, flush=True)


def mixture_weights_of(args):
    """Where the weights of the prior's components come from, in words."""
    return "refitted" if args.refit_weights else UNSAID["mixture_weights"]


def fitted_on(args, sets):
    """What the Laplace scale of the likelihood is fitted on, in words."""
    return f"{min(args.nll_fit_images, len(sets['train']))} training images"


def report_likelihood(args, report, model, sets):
    """nll.json. All processes share the work."""
    result = estimate_nll(args, model, sets)
    n = len(spread(args.nll_images, len(sets["test"])))
    protocol = {"images": n, "split": "test", "choice": "all" if n == len(sets["test"]) else "evenly spaced",
                "importance_samples": args.nll_samples, "data": sets["test"].fingerprint,
                "scale_fitted_on": fitted_on(args, sets), **report.provenance}
    if is_main():
        write_json(report.folder / f"nll{report.suffix}.json", {"tag": report.tag, "nll": result, "protocol": protocol})
    for name, words in (("importance_weighted", f"-log p(x) at most, {args.nll_samples} importance samples"),
                        ("negative_elbo", "-ELBO")):
        report.say(f"likelihood  {words}: {result[name]['nats_per_image']:.1f} nats per image, "
                   f"{result[name]['bits_per_dim']:.4f} bits per dimension")
    report.say(f"            discretised Laplace of scale {result['laplace_scale_grey_levels']:.2f} grey levels, {n:,} "
               f"held-out images; the model was not trained for this alone")


def report_evaluation(args, report, model, data, extractor, features, paths):
    """The evaluation's JSON, at each of the paths."""
    metrics, protocol = evaluate(args, model, data, extractor, features)
    for path in paths:
        write_json(path, {"tag": common_tag(report.tag), "metrics": metrics, "protocol": protocol | report.provenance})
    of = protocol["features"]
    name = "FID" if is_fid(of["name"], of["dims"]) else f"Fréchet distance on {of['dims']} features of {of['name']}"
    report.say(f"evaluation  {name} {metrics['fid']:.3f}, KID {kernel_text(metrics, 5)}, "
               + ", ".join(f"{m} {metrics[m]:.4f}" for m in ("precision", "recall", "density", "coverage")))
    bypassed = f", flow bypassed {metrics['fid_flow_bypassed']:.3f}" if "fid_flow_bypassed" in metrics else ""
    gap = metrics["fid_prior_gap"]
    report.say(f"            where quality is lost: samples {metrics['fid']:.3f}, reconstructions "
               f"{metrics['fid_reconstructed']:.3f}{bypassed}; "
               + (f"the prior's gap is {gap:.3f}" if gap is not None else "the last are of the reference images themselves, "
                  "nearer to them than others could be, so that the difference is not the prior's gap"))
    report.say(f"            {protocol['real']['images']:,} real and {protocol['fake']['images']:,} generated images; "
               f"written to {paths[0]} and, for comparison.py, to {paths[1]}")


def report_latent_space(args, report, model, sets, flip):
    """The pictures, and diagnostics.json and .png. flip: the training saw mirrored images."""
    held_out = sets["test"]
    # Enough for the pictures; all that --diagnose_images asks for where it is asked.
    chosen = spread(args.diagnose_images if args.diagnose else max(args.map_images, 2000), len(held_out))
    posterior = collect_posterior(model, held_out, chosen, max(args.gen_batch_size, 100), args.seed)
    if args.do_pictures:
        for line in save_pictures(args, model, sets, posterior, report.folder, flip):
            report.say(f"pictures    {line}")
    if not args.diagnose:
        return
    result = diagnose(model, posterior)
    protocol = {"images": len(chosen), "split": "test", "data": held_out.fingerprint,
                "choice": "all" if len(chosen) == len(held_out) else "evenly spaced",
                "noise": "one posterior sample of each image", **report.provenance}
    path = report.folder / f"diagnostics{report.suffix}.json"
    write_json(path, {"tag": report.tag, "diagnostics": result, "protocol": protocol})
    save_diagnostics(path.with_suffix(".png"), result, posterior,
                     f"{report.tag}, {report.position}, {len(chosen):,} held-out images")
    report.say(f"diagnosis   KL {result['kl_raw']:.2f} nats, mutual information {result['mutual_information']:.2f} (cap "
               f"log N = {result['mutual_information_cap']:.2f}), active units {result['active_units']} of "
               f"{result['latent_dim']}, components {result['effective_components']:.1f} effective, "
               f"{result['dead_components']} dead of {result['components']}")
    if model.flow is not None:
        report.say(f"            |s| > 0.9 c: {result['saturated_share']:.2%}, round trip "
                   f"{result['round_trip_error_float32']:.1e} in float32, "
                   f"{result['round_trip_error_float64']:.1e} in float64")


@exact_convolutions()                                           # a GPU's pixels within one grey level of a CPU's
def export_and_measure(args, locks):
    """locks: an ExitStack that keeps the folders which are written to locked until the end."""
    # -- everything that could be missing later, before anything is written ---------------------------------------
    device = join_processes(args.device)
    model, checkpoint = load_model(args.resume, device, args.weights)
    missing = [k for k in (*DATA_FLAGS, "exp_name", "flip") if k not in checkpoint["args"]]
    if missing:
        raise UserError(f"{args.resume}: its args lack {', '.join(missing)}; not a checkpoint of this train.py")
    exp_name = str(checkpoint["args"]["exp_name"])
    place = Path(args.resume).absolute().parent
    if place.parent.resolve() == Path(args.save_dir).resolve():         # a run that was renamed goes by its new name
        exp_name = place.name
    require_plain_name(f"{args.resume}: exp_name", exp_name)
    tag = args.tag or exp_name
    suffix = f"_{tag}" if tag != exp_name else ""
    args.data_dir = args.data_dir or checkpoint["args"]["data_dir"]
    exports_flag = "--export_dir" if args.export_dir else "--data_dir"
    args.export_dir = args.export_dir or args.data_dir
    weights = "raw" if checkpoint["ema"] is None else args.weights
    identity = {"checkpoint_sha256": sha256_file(args.resume), "weights": weights}
    of_prior = {**identity, "mixture_weights": mixture_weights_of(args)}
    if args.refit_weights and model.prior == "standard":
        raise UserError(f"--refit_weights: the prior of {args.resume} has no mixture")
    samples = {**of_prior, "temperature": args.temperature, "seed": args.seed}
    extractor = InceptionFeatures(device, args.fid_dims, without="leave out --evaluate") if args.evaluate else None
    if args.eval_out and Path(args.eval_out).is_dir():
        raise UserError(f"--eval_out {args.eval_out}: is a folder; name a file")
    measured = args.do_pictures or args.diagnose or args.nll or args.evaluate
    uses_data = args.do_real or args.do_recon or measured or args.refit_weights
    sets, mixed = open_data(args, checkpoint, model, device) if uses_data else ({}, None)
    if args.evaluate:
        N = len(spread(args.eval_images, len(sets[args.real_split])))
        check_neighbours(args.k, args.nearest_k, N, N)
        check_pca(args.pca_dim, N, extractor.dims)
        if N < FEW_IMAGES and is_main():
            print(f"warning: --evaluate on {N} images a side, fewer than {FEW_IMAGES}. FID is biased upwards on small "
                  f"samples, and its covariance may be singular: do not compare it with other numbers", file=sys.stderr)
    exports = plan_exports(args, model, sets, identity)
    starts = [plan_export(e, args.overwrite) for e in exports]
    if exports:
        writable_folder(args.export_dir, exports_flag)
    folder = writable_folder(Path(args.save_dir, exp_name, "test"), "--save_dir")
    if args.evaluate:
        eval_out = Path(args.eval_out or folder / f"evaluation_{tag}.json")
        writable_folder(eval_out.parent, "--eval_out")
        quality = writable_folder(Path(args.save_dir, QUALITY_DIR), "--save_dir")
        evaluations = [eval_out]
        if eval_out.parent.resolve() != quality.resolve():    # where comparison.py finds it, once
            evaluations.append(quality / f"evaluation_{tag}.json")
        for path in evaluations if not args.overwrite else ():
            require_same_protocol(path, {
                **of_prior, "seed": args.seed, "fake.temperature": args.temperature, "real.images": N,
                "real.split": args.real_split, "real.content": sets[args.real_split].fingerprint,
                "features.dims": args.fid_dims, "features.sha256": extractor.sha256, "k": args.k,
                "nearest_k": args.nearest_k, "pca": str(args.pca_dim)}, "another --tag")
    if args.nll and not args.overwrite:
        require_same_protocol(folder / f"nll{suffix}.json", {
            **of_prior, "seed": args.seed, "data": sets["test"].fingerprint, "scale_fitted_on": fitted_on(args, sets),
            "images": len(spread(args.nll_images, len(sets["test"]))), "importance_samples": args.nll_samples},
            "another --tag")
    if args.diagnose and not args.overwrite:
        require_same_protocol(folder / f"diagnostics{suffix}.json", {
            **of_prior, "seed": args.seed, "data": sets["test"].fingerprint,
            "images": len(spread(args.diagnose_images, len(sets["test"])))}, "another --tag")

    if measured and is_main():                                  # else only lines are added to the log
        locks.enter_context(lock_folder(folder, "--save_dir"))
    for i, export in enumerate(exports):
        if starts[i] != export.count and is_main():
            locks.enter_context(lock_folder(export.folder, export.flag))
            starts[i] = plan_export(export, args.overwrite)     # again: another process may have written until now

    starts = gather(starts)[0]
    log = open(folder / "test_log.txt" if is_main() else os.devnull, "a", encoding="utf-8", errors="backslashreplace")
    provenance = {"checkpoint": str(args.resume), **of_prior, "epoch": checkpoint["epoch"], "seed": args.seed,
                  "training_seed": checkpoint["args"].get("seed"), "training_data": checkpoint.get("data_id"),
                  "data_is_training_data": not mixed, "lpips_sha256": checkpoint.get("lpips_id"),
                  "device": str(device),
                  "versions": {"python": platform.python_version(), "numpy": np.__version__}
                  | {name: version(name) for name in ("torch", "torchvision", "pytorch-fid")}}
    position = f"epoch {checkpoint['epoch']}, {weights.replace('ema', 'EMA')} weights"
    report = Report(folder, log, tag, suffix, position, provenance)
    print(shlex.join(["python", *sys.argv]), file=log, flush=True)
    report.say(f"checkpoint  {args.resume} ({position}, SHA-256 {identity['checkpoint_sha256'][:12]})")
    note = dead_note(model, checkpoint["args"], checkpoint["history"])
    if note and not args.refit_weights:
        report.say(note)
    if sets:
        report.say(f"data        {checkpoint['args']['dataset']} in {args.data_dir}: {len(sets['train']):,} training and "
                   f"{len(sets['test']):,} held-out images, {'x'.join(map(str, sets['train'].shape))}")
    if mixed:
        for place in (sys.stderr, log) if is_main() else ():
            print(f"warning: {mixed}", file=place, flush=True)
    if args.refit_weights:
        n = refit_weights(model, sets["train"], args.gen_batch_size)
        share = model.log_weights().exp()
        report.say(f"weights     of {n:,} training images: {int((share > 0.1 / len(share)).sum())} of {len(share)} components "
                   f"are drawn")
    report.say(f"results     {folder}")

    # -- images on disk -------------------------------------------------------------------------------------------
    for export, start in zip(exports, starts):
        what = f"{export.folder}: {export.count:,} images"
        if start == export.count:
            report.say(f"export      {what}, complete and as asked for, used as they are")
            continue
        if start > 0:
            report.say(f"export      {what}, going on from {start:,}")
        rate = write_export(export, start, args.png_threads or min(cpu_count(), 8))
        report.say(f"export      {what}{', an older export replaced' if start < 0 else ''}, {rate:,.0f} a second")

    # -- numbers and pictures -------------------------------------------------------------------------------------
    if args.nll:
        report_likelihood(args, report, model, sets)
    if args.evaluate:
        features = evaluation_features(args, model, sets, extractor)
    if not is_main():       # what follows takes one process, and comes last so that no other has to wait until it is done
        return
    if args.evaluate:
        report_evaluation(args, report, model, sets[args.real_split], extractor, features, evaluations)
    if args.do_pictures or args.diagnose:
        report_latent_space(args, report, model, sets, checkpoint["args"]["flip"])

    real_images = {"split": args.real_split}
    if sets or args.real_split == "train":                      # else it is not known which they would be
        real_images["data"] = sets[args.real_split].fingerprint if sets else checkpoint.get("data_id")
    if commands := next_commands(args, tag, device, real_images, samples):
        print("\nnext:", *commands, sep="\n  ")


if __name__ == "__main__":
    run(main)
