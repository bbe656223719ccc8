"""Train a stand-in for the LPIPS trunk where the published weights cannot be had, and put it where the library looks.

    python tests/benchmarks/stand_in.py --net squeeze --data_dir data --torch_home stand_in      CPU, minutes
    python tests/benchmarks/stand_in.py --net vgg --data_dir data --torch_home stand_in          GPU, minutes
    TORCH_HOME=stand_in python train.py --lpips_net squeeze --lpips_linear False ...

The convolutions of torchvision's network, followed by a maximum over the picture and one linear layer, learn to classify
the images of --data_dir (train/<class>/, test/<class>/, as train.py --dataset folder reads them), in the normalisation of
LPIPS. They are written in float16 under the name of the published file; the published network's own fully connected
layers, which LPIPS never runs, are zeros. train.py recognises such a file by its checksum and says so. lpips' linear
weights belong to the published network: use --lpips_linear False with a stand-in.

Prints a JSON line: accuracy on the held-out images, seconds, and what was trained on what.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train import LPIPS_FILES
from utils import (
    UserError,
    add_device_flag,
    atomic_write,
    decode_images,
    list_images,
    pick_device,
    relative_names,
    run,
    seeded,
    sha256_file,
    to_float,
    writable_folder,
)

NETWORKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}

# lpips.ScalingLayer, for images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Classifier(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> logits (B, classes)."""

    def __init__(self, net, size, classes):
        super().__init__()
        trunk = getattr(torchvision.models, NETWORKS[net])(weights=None).features
        # The maximum over the picture makes a last pooling idle, and without it VGG takes images of 16x16.
        self.trunk = trunk[:-1] if isinstance(trunk[-1], nn.MaxPool2d) else trunk
        for m in self.trunk.modules():                    # torchvision's own start is too small for 16 layers without norms
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        with torch.no_grad():
            width = self.trunk(torch.zeros(1, 3, size, size)).shape[1]
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.trunk((x - self.shift) / self.scale).amax((2, 3)))


def load_classes(folder, size, device):
    """Images (N, 3, size, size) uint8 below a folder of class folders, the number of each one's class, the classes' names."""
    paths = list_images(folder, skip_made_here=True)
    parts = [name.split("/") for name in relative_names(paths, folder)]
    names = sorted({part[0] for part in parts})
    if any(len(part) == 1 for part in parts) or len(names) < 2:
        raise UserError(f"{folder}: needs a folder of images for each class, two or more")
    images = decode_images(paths, 3, size, f"decoding {folder.name} images").to(device)
    return images, torch.tensor([names.index(part[0]) for part in parts], device=device), names


def augment(x, generator):
    """Flipped and shifted by up to an eighth, each image its own way."""
    B, _, H, W = x.shape
    x = torch.where(torch.rand(B, 1, 1, 1, generator=generator).to(x.device) < 0.5, x.flip(3), x)
    padded = F.pad(x, [W // 8, W // 8, H // 8, H // 8], mode="reflect")
    top, left = (torch.randint(0, 2 * (s // 8) + 1, (B, 1), generator=generator) for s in (H, W))
    rows, columns = (top + torch.arange(H)).to(x.device), (left + torch.arange(W)).to(x.device)   # (B, H), (B, W)
    return padded[torch.arange(B, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def published_state(net, trunk):
    """The state dict of the whole published network with this trunk, as small as it can be stored."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in getattr(torchvision.models, NETWORKS[net])(weights=None).state_dict().items()}
    features = {f"features.{k}": v.detach().half().cpu() for k, v in trunk.state_dict().items()}
    # One stored zero stands for all of them.
    return {k: features.get(k, torch.zeros(1, dtype=torch.float16).expand(shape)) for k, shape in shapes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETWORKS, default="squeeze")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--torch_home", required=True, help="the file goes to TORCH_HOME/hub/checkpoints/")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that lies there")
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4, help="the highest of AdamW's one cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    add_device_flag(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    target = Path(args.torch_home, "hub", "checkpoints", LPIPS_FILES[args.net])
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} lies there already; --overwrite replaces it")
    if min(args.epochs, args.batch_size) < 1:
        raise UserError(f"--epochs {args.epochs}, --batch_size {args.batch_size}: both must be 1 or more")
    writable_folder(target.parent, "--torch_home")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    root = Path(args.data_dir)
    train, y, names = load_classes(root / "train", args.img_size, device)
    test, y_test, others = load_classes(root / "test", args.img_size, device)
    if names != others:
        raise UserError(f"--data_dir {root}: train/ and test/ hold different classes")
    try:
        model = Classifier(args.net, args.img_size, len(names))
    except RuntimeError:
        raise UserError(f"--net {args.net} needs larger images than --img_size {args.img_size}") from None
    model.to(device, memory_format=torch.channels_last)
    args.batch_size = min(args.batch_size, len(train))
    steps = len(train) // args.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)

    start = time.monotonic()
    for epoch in range(args.epochs):
        generator = seeded("cpu", args.seed, "stand-in", epoch)
        order = torch.randperm(len(train), generator=generator)[:steps * args.batch_size].view(steps, -1)
        bar = tqdm(order.to(device), desc=f"epoch {epoch + 1}/{args.epochs}", mininterval=10)
        for i, chosen in enumerate(bar):
            logits = model(augment(to_float(train[chosen]), generator))
            loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if i % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    with torch.no_grad():
        found = torch.cat([model(to_float(batch)).argmax(1) for batch in test.split(500)])
    accuracy = (found == y_test).double().mean().item()

    with atomic_write(target) as f:
        torch.save(published_state(args.net, model.trunk), f)
    print(json.dumps({"stand_in": str(target), "sha256": sha256_file(target), "net": NETWORKS[args.net],
                      "held_out_accuracy": round(accuracy, 4), "images": len(train), "classes": names, "epochs": args.epochs,
                      "seconds": round(time.monotonic() - start), "device": str(device), "torch": torch.__version__}))


if __name__ == "__main__":
    run(main)
