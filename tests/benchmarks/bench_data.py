"""Data: decoding a folder once, and batches from memory, against a DataLoader over PIL images, in turns in one run.

    python tests/benchmarks/bench_data.py                           # 5,000 JPEG files of 32x32, made for the purpose
    python tests/benchmarks/bench_data.py --folder path/to/images --size 64

One JSON line per case (report.py says what stands in it).
decode   utils.decode_images (a process a core from 4,096 files on) and a loop of PIL over the same files
batches  batches of 128 with random flips, as train.py takes them from memory, and from a DataLoader with four workers
         and torchvision's transforms, which decodes the files again in every epoch
"""
import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import report, take_turns

from utils import MemoryImages, decode_images, list_images, run, seeded, to_float


class Files(torch.utils.data.Dataset):
    def __init__(self, paths, size):
        from torchvision import transforms
        self.paths = paths
        self.transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size),
                                             transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                             transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def write_files(folder, n, size):
    rng = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((size, size), Image.BICUBIC).save(folder / f"{i:05d}.jpg", quality=75)


def epoch_from_memory(data, device):
    """One epoch of batches of 128 with random flips, as train.py takes them; here the last may be smaller, so that all images
    are served."""
    for i, batch in enumerate(data.batches(torch.randperm(len(data)).split(128), device)):
        x = to_float(batch)
        flipped = torch.rand(len(x), 1, 1, 1, generator=seeded(device, i), device=device) < 0.5
        torch.where(flipped, x.flip(3), x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        if args.folder is None:
            write_files(Path(tmp), args.images, args.size)
        paths = list_images(args.folder or tmp, "--folder")[:args.images]
        n, cpu = len(paths), torch.device("cpu")
        data = MemoryImages(decode_images(paths, 3, args.size, progress=False))
        loader = torch.utils.data.DataLoader(Files(paths, args.size), 128, shuffle=True, num_workers=4, persistent_workers=True)

        cases = {
            "decode": (lambda: decode_images(paths, 3, args.size, progress=False),
                       lambda: [np.asarray(Image.open(p).convert("RGB")) for p in paths]),
            "batches": (lambda: epoch_from_memory(data, cpu), lambda: [None for _ in loader]),
        }
        for name, ways in cases.items():
            ours, plain = take_turns(ways, args.rounds, cpu)
            report(name, n, ours, cpu, plain, size=args.size)


if __name__ == "__main__":
    run(main)
