"""FID features: images a second of utils.InceptionFeatures against pytorch-fid's own loop, in turns in one run, and the
difference of the two distances. Random weights of the right shapes serve as well as the published ones for the speed.

    python tests/benchmarks/bench_fid.py --images 200                # two CPU cores: a minute or two
    python tests/benchmarks/bench_fid.py --images 50000 --device cuda
    python tests/benchmarks/bench_fid.py --images 5000 --device cuda --variants     how convolutions may be computed on a GPU

One JSON line (report.py says what stands in it), both sides decoded and measured. --variants: a line for each way of computing
the same features from decoded images that cuDNN has, with the relative difference of its distance from the first one's, which
is what the scripts do.
"""
import argparse
import contextlib
import copy
import itertools
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from report import ROOT, report, take_turns

sys.path.insert(0, str(ROOT / "tests"))

from conftest import FakeHub, write_images

from utils import (
    InceptionFeatures,
    decode_images,
    extract_features,
    frechet_distance,
    hub_file,
    list_images,
    mean_and_covariance,
    pick_device,
    run,
)


def report_variants(args, extractor, sides):
    ways = {}
    for tf32, search, layout in itertools.product((False, True), (False, True), ("contiguous_format", "channels_last")):
        network = copy.deepcopy(extractor)
        network.model.to(memory_format=getattr(torch, layout))

        def way(network=network, tf32=tf32, search=search):
            with torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=tf32):
                return [mean_and_covariance(torch.cat([network(x) for x in images.split(args.batch_size)]).numpy())
                        for images in sides]

        way()                                                    # the search, and kernels that are loaded at their first use
        ways[f"{'TF32' if tf32 else 'float32'}{', search' * search}, {layout}"] = way
    timings = dict(zip(ways, take_turns(ways.values(), args.rounds, extractor.device)))
    distances = {name: frechet_distance(*timing.result[0], *timing.result[1]) for name, timing in timings.items()}
    exact = next(iter(distances.values()))
    for name, timing in timings.items():
        report(f"fid features: {name}", 2 * args.images, timing, extractor.device, dims=args.dims, batch_size=args.batch_size,
               distance=distances[name], relative_difference=abs(distances[name] / exact - 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="on each of the two sides")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--dims", type=int, choices=(64, 192, 768, 2048), default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as tmp:
        if not hub_file("pt_inception-2015-12-05-6726825d.pth").is_file():
            os.environ["TORCH_HOME"] = str(Path(tmp, "hub"))
            FakeHub(Path(tmp, "hub")).inception()
        folders = [write_images(Path(tmp, name), args.images, args.size, seed, 20 * seed) for seed, name in enumerate("ab")]
        from pytorch_fid.fid_score import compute_statistics_of_path
        from pytorch_fid.inception import InceptionV3
        reference = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[args.dims]]).to(device)
        extractor = InceptionFeatures(device, args.dims)
        if args.variants:
            return report_variants(args, extractor, [decode_images(list_images(folder), progress=False) for folder in folders])

        def ours():
            statistics_of = []
            for folder in folders:
                images = decode_images(list_images(folder), progress=False)
                features = extract_features(extractor, images.split(args.batch_size), len(images), progress=False)
                statistics_of.append(mean_and_covariance(features))
            return statistics_of

        def theirs():
            with contextlib.redirect_stdout(sys.stderr):         # which it warns on
                return [compute_statistics_of_path(str(f), reference, args.batch_size, args.dims, device, 4) for f in folders]

        first = decode_images(list_images(folders[0])[:args.batch_size], progress=False)        # kernels are loaded and chosen
        extract_features(extractor, [first], len(first), progress=False)
        with torch.no_grad():
            reference.eval()(first.to(device) / 255)
        a, b = take_turns((ours, theirs), args.rounds, device)
        distances = [frechet_distance(*way.result[0], *way.result[1]) for way in (a, b)]
        report("fid features", 2 * args.images, a, device, b, dims=args.dims, batch_size=args.batch_size,
               distance=distances[0], relative_difference=abs(distances[0] / distances[1] - 1),
               largest_mean_difference=float(np.abs(a.result[0][0] - b.result[0][0]).max()))


if __name__ == "__main__":
    run(main)
