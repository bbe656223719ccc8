"""Cost of training against batch size, K and flow length, and of the exact metrics and an epoch's batches against the number
of images: one JSON line a point, and a figure.

    python tests/benchmarks/bench_scaling.py --small --plot scaling.png             two CPU cores: some minutes
    python tests/benchmarks/bench_scaling.py --device cuda --plot scaling.png       the default recipe
    python tests/benchmarks/bench_scaling.py --panels components --components 100 1000 --latent_dim 32

Panels
    batch        a training step at several batch sizes, and the plain way of writing it (both as in bench_train.py)
    components   a step against K, the components of the prior
    flow         a step against the coupling layers
    images       precision, recall, density and coverage of N real and N generated points, the three bare matrix products
                 that they cannot do without (both as in bench_pr.py), and an epoch of batches from memory (bench_data.py)

All points of a panel take turns; the figure shows medians, with thin bars down to the best round. --lines FILE draws lines
that an earlier run has printed. --small is the network of train.py --demo instead of the default one; flags of train.py are
taken too. report.py says what stands in the lines.
"""
import argparse
import copy
import io
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from bench_data import epoch_from_memory
from bench_pr import bare_products, make
from bench_train import Fast, Plain, random_lpips
from PIL import Image
from report import report, take_turns

import train
from PR_Calculate import manifold_metrics
from utils import MemoryImages, pick_device, pyplot, run

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"           # told apart by the colour-blind, and by their markers
PANELS = ("batch", "components", "flow", "images")


def step(flags, device, plain=False, **changed):
    """One training step of train.py, or the plain way, with some flags changed -> (work, images of it)."""
    flags = copy.copy(flags)
    vars(flags).update(changed)
    cuda = device.type == "cuda"
    rng = np.random.default_rng(0)
    # Enough for one epoch of the steps of all rounds; their content changes no speed.
    images = torch.from_numpy(rng.integers(0, 256, (20 * flags.batch_size, 3, flags.img_size, flags.img_size), np.uint8))
    lpips = None if flags.lpips_net == "none" else random_lpips()
    if plain:
        run = Plain(flags, flags, images, lpips, device)
    else:                                                       # compiling each point would take longer than measuring it
        native = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        run = Fast(flags, flags, images, lpips, device, amp=native, channels_last=cuda, compiled=False, graph=cuda,
                   fused_flow=cuda, fused_lpips=cuda)
    steps = 20 if cuda else 1
    run.run(2)
    return lambda: run.run(steps), steps * flags.batch_size


def metric(N, dims, device, products_only=False):
    real, fake = (torch.from_numpy(x).to(device) for x in make("gauss", N, N, dims))
    if products_only:
        return lambda: bare_products(real, fake, 8192 if device.type == "cuda" else 4096), N
    return lambda: manifold_metrics(real, fake, device=device), N


def epoch(N, size, device):
    images = np.random.default_rng(0).integers(0, 256, (N, 3, size, size), np.uint8)
    data = MemoryImages(torch.from_numpy(images), device)
    return lambda: epoch_from_memory(data, device), N


def curves_of(panel, args, flags, device):
    """{label: {x: (work, images)}}, made when it is the panel's turn: all at once would not fit everywhere. The second curve,
    where there is one, is the plain way of the first."""
    size, dims = flags.img_size, args.dims
    if panel == "batch":
        return {"train.py": {x: step(flags, device, batch_size=x) for x in args.batch_sizes},
                "the plain way": {x: step(flags, device, plain=True, batch_size=x) for x in args.batch_sizes}}
    if panel == "components":
        return {f"batch of {flags.batch_size}": {x: step(flags, device, num_components=x) for x in args.components}}
    if panel == "flow":
        return {f"batch of {flags.batch_size}": {x: step(flags, device, flow_length=x) for x in args.flow_lengths}}
    return {f"precision, recall, density, coverage ({dims} features)": {x: metric(x, dims, device) for x in args.images},
            "their three bare matrix products": {x: metric(x, dims, device, True) for x in args.images},
            f"an epoch of batches, {size}x{size}": {x: epoch(x, size, device) for x in args.images}}


def measure(panel, args, flags, device):
    """The lines of a panel, each printed."""
    curves = curves_of(panel, args, flags, device)
    points = [(label, x, *what) for label, curve in curves.items() for x, what in curve.items()]
    timings = take_turns([work for _, _, work, _ in points], args.rounds, device)
    measured = {(label, x): timing for (label, x, *_), timing in zip(points, timings)}
    first, *others = curves
    lines = []
    for (label, x, _, count), timing in zip(points, timings):
        plain = measured[others[0], x] if others and label == first else None
        lines.append(report(panel, count, timing, device, plain, curve=label, value=x,
                            seconds=statistics.median(timing.seconds), img_size=flags.img_size, hidden_dims=flags.hidden_dims,
                            lpips=flags.lpips_net, batch_size=x if panel == "batch" else flags.batch_size))
    return lines


def draw(path, lines, note):
    """The figure of these lines: one panel each, with axes that tell the law of growth."""
    from matplotlib.ticker import LogLocator, NullFormatter
    plt = pyplot()
    results = {}
    for line in lines:
        results.setdefault(line["case"], {}).setdefault(line["curve"], []).append(line)
    titles = {
        "batch": ("Training: batch size", "images in a batch", "ms per image"),
        "components": ("Training: components of the prior", "K", "ms per step"),
        "flow": ("Training: flow length", "coupling layers", "ms per step"),
        "images": ("Number of images", "N images (of the metrics: on each side)", "seconds"),
    }
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.5 * rows + 0.5), constrained_layout=True, squeeze=False)
    for ax in axes.flat[len(results):]:
        ax.set_axis_off()
    for ax, (panel, curves) in zip(axes.flat, results.items()):
        title, xlabel, ylabel = titles[panel]
        for (label, curve), colour, marker, style in zip(curves.items(), (BLUE, ORANGE, GREEN), "osD", ("-", "--", ":")):
            x = [line["value"] for line in curve]
            # What a point's seconds are of: an image, a step (of which a point may be several), or all that is counted.
            parts = [{"batch": line["count"], "images": 1e3}.get(panel, line["count"] / line["batch_size"]) for line in curve]
            middle = np.array([1e3 * line["seconds"] / part for line, part in zip(curve, parts)])
            best = np.array([1e3 * line["count"] / line["best_per_second"] / part for line, part in zip(curve, parts)])
            ax.errorbar(x, middle, [(middle - best).clip(0), 0 * best], color=colour, marker=marker, linestyle=style,
                        markersize=5, elinewidth=0.8, capsize=2, label=label)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if panel in ("batch", "images"):
            ax.set(xscale="log", yscale="log")
        else:
            ax.set(ylim=(0, None))
        if panel == "batch":                                    # less than two decades
            ax.set_xticks(x, x)
            ax.set_xticks([], minor=True)
            ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
        if panel == "images":                                   # the metrics compare all pairs, an epoch sees each once
            ax.margins(x=0.12)
            ax.set_ylim(top=10 * ax.get_ylim()[1])              # room for the legend
            metrics, _, epoch_of = curves.values()
            for curve, power, law in ((metrics, 2, "N²"), (epoch_of, 1, "N")):
                y = [curve[-1]["seconds"] * (n / x[-1]) ** power for n in x]
                ax.plot(x, y, color="#999999", linewidth=0.8, zorder=0)
                ax.annotate(law, (x[0], y[0]), (-4, 0), textcoords="offset points", ha="right", va="center", color="#666666")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=7, frameon=False, loc="upper right" if panel == "batch" else "upper left")
    about = lines[0]
    machine = f"{about['device']}, {about['threads']} thread{'s' * (about['threads'] > 1)}{', ' + note if note else ''}"
    network = f"{about['img_size']}x{about['img_size']} images, channels {', '.join(map(str, about['hidden_dims']))}"
    fig.suptitle(f"{machine}; {network}, {'no LPIPS' if about['lpips'] == 'none' else 'LPIPS'}\n"
                 f"medians of {about['rounds']} rounds, the bars reach down to the best", fontsize=9)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(64).save(path, "PNG", optimize=True)            # a third of the size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)          # --batch_size and --flow_length are train.py's
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=PANELS)
    parser.add_argument("--small", action="store_true", help="the network of train.py --demo")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--components", type=int, nargs="+", default=[10, 50, 100, 200, 500, 1000])
    parser.add_argument("--flow_lengths", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--dims", type=int, default=256, help="features of the metrics")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", default=None, metavar="FILE.png")
    parser.add_argument("--lines", default=None, metavar="FILE.jsonl", help="measure nothing, draw these")
    parser.add_argument("--note", default="", help="words about the machine for the figure's title")
    args, rest = parser.parse_known_args()
    flags, _ = train.parse_args([*(["--demo"] if args.small else []), *rest])
    flags.in_channels, flags.flip = 3, True
    device = pick_device(args.device)
    if args.lines:
        lines = [json.loads(line) for line in Path(args.lines).read_text().splitlines() if line.strip()]
    else:
        lines = sum((measure(panel, args, flags, device) for panel in args.panels), [])
    if args.plot:
        draw(args.plot, lines, args.note)


if __name__ == "__main__":
    run(main)
