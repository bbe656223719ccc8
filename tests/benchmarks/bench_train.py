"""Training: images a second of train.py's step against the plain way of writing it, measured in turns in one run.

    python tests/benchmarks/bench_train.py                                  the default network on this machine
    python tests/benchmarks/bench_train.py --batch_size 1024 --cases plain fast
    python tests/benchmarks/bench_train.py --parts --profile fast       where the time goes

Cases
    plain    float32, NCHW, eager; PIL images through torchvision transforms in a DataLoader with four workers; EMA in a
             Python loop; losses read at every step for a progress bar
    eager    train.py's step with --no-compile --no-channels_last --amp none
    layout   the same with --channels_last
    fast     the flags that train.py chooses on this device (bf16, channels_last, compile and cuda_graph on a GPU)
    no_graph    the same with --no-cuda_graph
    no_compile  the same with --no-compile
    no_fused_flow    the same with --no-fused_flow
    no_fused_lpips   the same with --no-fused_lpips
    own_limits  the same, compiled without train.DO_AGAIN
    compile  float32 with --channels_last --compile
    bf16     --amp bf16 --channels_last, else as eager: for a CPU that computes in bf16

One JSON line for each case (report.py says what stands in it), with the share of the device's measured matrix rate that the
counted operations come to (matrix_rate_share; tflops and matrix_tflops are the two rates). --beside: a line for what a run
does between its steps, the validation on --val_images held-out images and a checkpoint (FID has bench_fid.py). --parts: a
line for each part of a step, forward and backward by itself, not compiled (on a GPU a CUDA graph), with the precision and
layout of `fast`; the shares are of the parts' sum. --profile CASE: a line with the longest operations (on a GPU its
kernels): each one's share of the time of all, how often a step has it, and the share of the wall clock in which any ran
(busy; more than 1 where several run at once). LPIPS has the network of VGG16 with random weights: the arithmetic is the
same, and nothing is downloaded. The images are random: their content changes no speed. Flags of train.py (--hidden_dims,
...) are taken too.
"""
import argparse
import collections
import contextlib
import copy
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from report import print_line, report, rounded, synchronize, take_turns

import train
from utils import MemoryImages, pick_device, run

# --amp bf16, --channels_last, --compile, --cuda_graph, --fused_flow, --fused_lpips of each case; None: as train.py chooses on
# the device.
SETTINGS = {"eager": (False,) * 6, "layout": (False, True, False, False, False, False),
            "compile": (False, True, True, False, False, False), "bf16": (True, True, False, False, False, False),
            "fast": (None,) * 6,
            "no_graph": (None, None, None, False, None, None), "no_compile": (None, None, False, None, None, None),
            "no_fused_flow": (None, None, None, None, False, None), "no_fused_lpips": (None, None, None, None, None, False),
            "own_limits": (None,) * 6}


def random_lpips():
    """The lpips package's LPIPS."""
    import lpips
    return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).requires_grad_(False)


def make_trainer(args, flags, images, lpips, device, channels_last):
    """lpips: the package's, or None."""
    place = dict(device=device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.manual_seed(0)
    model = train.CrossFlowVampVAE(**train.model_args_of(flags)).to(**place)
    loss = None if lpips is None else train.Perceptual(copy.deepcopy(lpips), None).eval().to(**place)
    return train.Trainer(flags, model, loss, len(images) // args.batch_size, args.batch_size, Path("."), "")


class Fast:
    """train.py's own steps, for `steps` at a time."""

    def __init__(self, args, flags, images, lpips, device, amp, channels_last, compiled, graph, fused_flow,
                 fused_lpips):
        self.trainer, self.amp = make_trainer(args, flags, images, lpips, device, channels_last), amp
        self.data = MemoryImages(images, device)
        eager, before, blank = self.trainer.criterion, self.trainer.lpips, torch.zeros_like(self.data.images[:args.batch_size])
        start = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):            # they say what they do; standard output is for JSON
            fused_flow = fused_flow and train.can_fuse_flow(self.trainer.model.flow, device, amp)
            fused_lpips = fused_lpips and lpips is not None and train.can_fuse_lpips(flags, device, amp)
            train.speed_up(self.trainer, blank, amp, fused_flow, fused_lpips, compiled, graph)
        # It goes on without where one of them fails.
        flow = self.trainer.model.flow
        self.about = {"fused_flow": flow is not None and flow.fold_norms is not None,
                      "fused_lpips": self.trainer.lpips is not before,
                      "compiled": self.trainer.criterion is not eager, "cuda_graph": self.trainer.graph is not None,
                      "preparation_s": rounded(time.monotonic() - start)}
        self.trainer.model.train()

    def run(self, steps):
        size = self.trainer.batch_size
        order = torch.randint(len(self.data), (steps, size))
        for i, batch in enumerate(self.data.batches(order, self.trainer.device)):
            train.train_step(self.trainer, batch, self.amp)
            if (i + 1) % (1 if self.trainer.device.type == "cpu" else 50) == 0:
                self.trainer.read()


class Plain:
    """The same network and loss, written the usual way."""
    about = {}

    def __init__(self, args, flags, images, lpips, device):
        from PIL import Image
        from torchvision import transforms

        class PILImages(torch.utils.data.Dataset):
            def __init__(self, arrays, transform):
                self.arrays, self.transform = arrays, transform

            def __len__(self):
                return len(self.arrays)

            def __getitem__(self, i):
                return self.transform(Image.fromarray(self.arrays[i]))

        self.device, self.flags = device, flags
        self.lpips = None if lpips is None else copy.deepcopy(lpips).to(device)
        transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                        transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
        torch.manual_seed(0)
        self.model = train.CrossFlowVampVAE(**train.model_args_of(flags)).to(device)
        self.ema = {k: v.detach().clone() for k, v in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=flags.lr, weight_decay=flags.weight_decay)
        self.loader = torch.utils.data.DataLoader(PILImages(images.permute(0, 2, 3, 1).numpy(), transform), args.batch_size,
                                                  shuffle=True, drop_last=True, num_workers=4, persistent_workers=True,
                                                  pin_memory=device.type == "cuda")
        self.batches = iter(())

    def run(self, steps):
        for _ in range(steps):
            x = next(self.batches, None)
            if x is None:
                self.batches = iter(self.loader)
                x = next(self.batches)
            x = x.to(self.device)
            out = self.model(x, prior=self.model.prior_params())
            kl = self.model.kl_terms(out).kl.mean()
            pixel = (out.recon - x).abs().sum((1, 2, 3)).mean()
            perceptual = self.lpips(out.recon, x).mean() if self.lpips is not None else pixel.new_zeros(())
            loss = pixel + self.flags.lpips_weight * perceptual + 0.1 * kl
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.flags.grad_clip)
            self.optimizer.step()
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.ema[name].mul_(0.999).add_(p, alpha=0.001)
            _ = [v.item() for v in (loss, pixel, perceptual, kl)]


def gflop(work):
    """What is counted of a piece of work, a multiply-add being two operations."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def parts_of_step(trainer, amp):
    """{name: work} of the parts of a step on one batch, each forward and backward by itself."""
    model, lpips, device, B = trainer.model, trainer.lpips, trainer.device, trainer.batch_size
    x = torch.zeros(B, trainer.args.in_channels, model.img_size, model.img_size, device=device)
    with torch.no_grad():
        out = model(x, torch.zeros(B, model.latent_dim, device=device), model.prior_params())
        context = model.posterior(x)[2]
    z, recon = (t.detach().requires_grad_() for t in (out.mu, out.recon))

    def flow():
        zK, log_det = model.apply_flow(z, context)
        return zK.sum() + log_det.sum()

    def prior():
        mu_k, logvar_k = model.prior_params()
        return model.kl_terms(out._replace(z0=z, zK=z, mu_k=mu_k, logvar_k=logvar_k)).kl.sum()

    forward = {
        "encoder": lambda: sum(t.sum() for t in model.posterior(x)[:2]),
        **({} if model.flow is None else {"flow": flow}),
        "prior with its pseudo-inputs": prior,
        "decoder": lambda: model.decode(z).sum(),
        **({} if lpips is None else {"LPIPS": lambda: lpips(recon, x).sum()}),
    }

    def both(part):
        with torch.autocast(device.type, torch.bfloat16) if amp else contextlib.nullcontext():
            value = part()
        value.backward()

    def optimiser():
        trainer.update_weights(trainer.gradient_norm(), 1e-3)

    return {**{name: lambda p=part: both(p) for name, part in forward.items()}, "clipping, optimiser and EMA": optimiser}


def matrix_rate(device, amp):
    """Measured TFLOP/s of a large matrix product: on a GPU in the case's precision, which for float32 is the TF32 of its
    convolutions; on a CPU in float32 always."""
    torch.backends.cuda.matmul.allow_tf32 = True
    n, dtype = (8192, torch.bfloat16 if amp else torch.float32) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * n ** 3 / (time.perf_counter() - start) / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = False
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--cases", nargs="+", default=["plain", "eager", "layout", "fast"],
                        choices=("plain", *SETTINGS))
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=0, help="a round; 0 = 100 on a GPU, 2 on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_lpips", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--beside", action="store_true", help="lines for the validation and a checkpoint too")
    parser.add_argument("--parts", action="store_true", help="a line for each part of a step too")
    parser.add_argument("--profile", default=None, choices=("plain", *SETTINGS),
                        help="the longest operations of one of the cases")
    parser.add_argument("--longest", type=int, default=25, help="of them in the line")
    args, rest = parser.parse_known_args()
    args.cases += [args.profile] * (args.profile not in (None, *args.cases))
    device = pick_device(args.device)
    flags, _ = train.parse_args(rest)
    args.no_lpips |= flags.lpips_net == "none"
    flags.in_channels, flags.flip, cuda = 3, True, device.type == "cuda"
    native = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    torch.backends.cudnn.benchmark = True                       # as train.py; the plain way has it too
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (50 * args.batch_size, 3, flags.img_size, flags.img_size), np.uint8))
    lpips = None if args.no_lpips else random_lpips()
    trainer = make_trainer(args, flags, images, lpips, device, False)
    x = torch.zeros(args.batch_size, *images.shape[1:], device=device)
    eps = torch.zeros(args.batch_size, flags.latent_dim, device=device)
    each = gflop(lambda: train.backward(trainer, x, eps, False, 0.1)) / args.batch_size
    settings = {name: tuple(on if on is not None else native if i == 0 else cuda for i, on in enumerate(flags_of_case))
                for name, flags_of_case in SETTINGS.items()}
    runs = {}
    for case in args.cases:
        with mock.patch.object(train, "DO_AGAIN", {} if case == "own_limits" else train.DO_AGAIN):
            runs[case] = (Plain(args, flags, images, lpips, device) if case == "plain" else
                          Fast(args, flags, images, lpips, device, *settings[case]))
        runs[case].run(3)                                       # warm-up: kernels chosen, workers started
    steps = args.steps or (100 if cuda else 2)
    count = steps * args.batch_size
    timings = dict(zip(runs, take_turns([lambda r=run: r.run(steps) for run in runs.values()], args.rounds, device)))
    about = {"batch_size": args.batch_size, "lpips": "none" if args.no_lpips else "vgg, random weights"}
    for case, timing in timings.items():
        rate = count / statistics.median(timing.seconds) * each / 1e3
        top = matrix_rate(device, case != "plain" and settings[case][0])
        report(case, count, timing, device, timings.get("plain") if case != "plain" else None,
               rates=[rounded(count / t) for t in timing.seconds], gflop_each=rounded(each),
               tflops=rounded(rate), matrix_tflops=rounded(top), matrix_rate_share=rounded(rate / top),
               **runs[case].about, **about)
    if args.beside:
        held_out = MemoryImages(images[:flags.val_images or None], device)
        flags.eval_batch_size = flags.eval_batch_size or train.images_at_a_time(flags.img_size)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(args, flags, images, lpips, device, settings["fast"][1])
            trainer.folder = Path(folder)
            going_on = types.SimpleNamespace(signum=None)
            train.train_step(trainer, images[:args.batch_size].to(device), False)             # AdamW has its moments then
            works = (lambda: train.evaluate(trainer, trainer.lpips, held_out, going_on)), trainer.save
            for work in works:                                  # a warm-up
                work()
            validation, checkpoint = take_turns(works, args.rounds, device)
            report("validation", len(held_out), validation, device, **about)
            report("checkpoint", 1, checkpoint, device, **about)
    if args.parts:
        amp, layout, *_ = settings["fast"]
        trainer = make_trainer(args, flags, images, lpips, device, layout)
        counts = {name: gflop(work) for name, work in parts_of_step(trainer, amp).items()}      # of what is fused, nothing is
        if train.can_fuse_flow(trainer.model.flow, device, amp):
            train.fuse_flow(trainer.model.flow, args.batch_size)
        if lpips is not None and train.can_fuse_lpips(flags, device, amp):
            train.fuse_lpips(trainer, images[:args.batch_size])
        works = parts_of_step(trainer, amp)
        for group in trainer.optimizer.param_groups:
            group["capturable"] = cuda
        for work in works.values():                             # a warm-up
            work()
        if cuda:                                                # as a step is recorded: else Python sets the pace
            works = {name: train.as_cuda_graph(work, device).replay for name, work in works.items()}
        timings = dict(zip(works, take_turns(works.values(), args.rounds, device)))
        seconds = {name: statistics.median(t.seconds) for name, t in timings.items()}
        top = matrix_rate(device, amp)
        for name, timing in timings.items():
            report(f"part: {name}", args.batch_size, timing, device, share=rounded(seconds[name] / sum(seconds.values())),
                   gflop_each=rounded(counts[name] / args.batch_size),
                   matrix_rate_share=rounded(counts[name] / 1e3 / seconds[name] / top), **about)
    if args.profile:
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as profile:
            start = time.perf_counter()
            runs[args.profile].run(steps)
            synchronize(device)
            wall = 1e6 * (time.perf_counter() - start)
        times, counts = collections.Counter(), collections.Counter()
        for e in profile.key_averages():
            if not cuda or e.device_type == torch.autograd.DeviceType.CUDA:
                times[e.key[:120]] += e.self_device_time_total if cuda else e.self_cpu_time_total
                counts[e.key[:120]] += e.count
        total, longest = times.total(), [key for key, _ in times.most_common(args.longest)]
        print_line({"case": f"profile: {args.profile}", "us_a_step": rounded(wall / steps), "busy": rounded(total / wall),
                    "operations_a_step": rounded(counts.total() / steps),
                    "share_of_time": {key: rounded(times[key] / total) for key in longest},
                    "times_a_step": {key: rounded(counts[key] / steps) for key in longest}, **about}, device)


if __name__ == "__main__":
    run(main)
