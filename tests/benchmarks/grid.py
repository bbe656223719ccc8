"""Train a grid of variants over several seeds through train.py and test.py, and put their numbers into one table.

    python tests/benchmarks/grid.py --out results/grid --preset digits --seeds 0 1 -- --epochs 40
    python tests/benchmarks/grid.py --out results/grid64 --seeds 0 1 2 --num_samples 10000 \\
        --distance "python my_distance.py {real} {fake}" --distance_key fd -- --dataset folder --data_dir path --img_size 64
    python tests/benchmarks/grid.py --out results/grid --preset digits --only VAE mine --extra "mine: --free_bits 0.1" -- \\
        --epochs 40
    python tests/benchmarks/grid.py --out results/grid --collect

What stands behind -- are flags of train.py that all variants share. The same command goes on where it stopped: what is
finished is not done again, a run that was interrupted resumes from its last.pth. One that fails is named, the others go on.

Writes to --out
    runs/NAME_sSEED/            a run of train.py, test.py's diagnostics below it in test/
    images/NAME_sSEED/          samples, reconstructions, bypassed (--distance: reconstructions without the flow)
    images/real_test, real_train_N
    sharpness/                  csv_analysis.py of the samples and of real_test, as comparison.py reads them
    logs/NAME_sSEED.txt         what the commands printed
    pairs/NAME_sSEED.json       every command with its seconds, attempts and commit, and the numbers, once finished
    grid.csv, grid.md           the table, a row per variant
    grid.json                   everything of every finished pair of variant and seed
    curves.png                  reconstruction, KL and effective components over the epochs
    samples.png, pseudo.png     the variants side by side, from the first finished seed of each
"""
import argparse
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train import parse_args as parse_train_flags
from utils import (
    MANIFEST,
    UserError,
    atomic_write,
    decode_images,
    frechet_distance,
    image_grid,
    list_images,
    load_model,
    mean_and_covariance,
    pyplot,
    read_image,
    read_json,
    run,
    save_figure,
    true_false,
    writable_folder,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]

# What each variant changes in the common flags. No flow at all is VampVAE; other lengths come from --flow_lengths.
VARIANTS = {
    "VAE": ["--prior", "standard", "--flow_length", "0"],
    "VampVAE": ["--flow_length", "0"],
    "CrossVampVAE": [],
    "amortised": ["--flow_context", "encoder"],
    "pushed": ["--flow_prior", "pushed"],
    "mog": ["--prior", "mog"],
    "K10": ["--num_components", "10"],
    "K500": ["--num_components", "500"],
}
NO_LPIPS = {"no_lpips": ["--lpips_net", "none", "--lpips_weight", "0"]}         # of which the common flags may have another

# Common flags, and flow lengths beside the default one of these flags.
PRESETS = {"none": ([], [4, 16]), "digits": (["--demo"], [1, 4, 8])}

# Before the common flags, which may differ: pictures at the end only, and no FID during training.
QUIET = ["--sample_every", "1000000", "--fid_every", "0"]
OWN_FLAGS = {"exp_name", "save_dir", "seed", "resume", "overwrite"}

HISTORY = ("val_loss", "val_recon", "val_kl_raw", "val_log_det", "active_units", "effective_components", "dead_components")
HEADINGS = {"val_loss": "val_loss", "val_recon": "reconstruction", "val_kl_raw": "KL_Raw, nats",
            "val_log_det": "E log det, nats", "active_units": "active units",
            "effective_components": "effective components", "dead_components": "dead components",
            "pixel_samples": "pixel FD samples", "pixel_recon": "pixel FD reconstructions",
            "pixel_real": "pixel FD training images", "sharpness_ratio": "sharpness / real", "train_s": "training, s",
            "parameters": "parameters"}
PICTURED = 32                # images of each variant in samples.png
PIXELS = 16                  # pixels a side that are left of an image for the pixel FD: 768 numbers


# ---------------------------------------------------------------------------------------------------------------------
# Commands

class Commands:
    """Runs commands, several at once from as many threads. A signal that asks this program to stop is passed on to them
    (train.py then saves, a second one ends it at once), and nothing new is started."""

    def __init__(self):
        self.signum, self.running, self.lock = 0, set(), threading.Lock()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)
            if signum and not (name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN):       # nohup
                signal.signal(signum, self.ask)

    def ask(self, signum, _frame):
        # Threads hold the lock while they start a command, the main thread, which runs this, never does.
        with self.lock:
            self.signum = signum
            for process in self.running:
                process.send_signal(signum)

    def __call__(self, what, command, log, wants_output=False):
        """Run one command to its end, all that it prints going to the log; wants_output: its standard output, too.

        Raises UserError with the command's last words if it fails, Stopped if this program was asked to stop.
        """
        with open(log, "ab") as f:
            f.write(f"\n$ {shlex.join(command)}\n".encode())
            f.flush()
            start = f.tell()
            with self.lock:
                if self.signum:
                    raise Stopped
                # A session of its own: Ctrl-C in a terminal asks this program alone, which passes it on once.
                process = subprocess.Popen(executable(command), stdin=subprocess.DEVNULL, stderr=f, start_new_session=True,
                                           stdout=subprocess.PIPE if wants_output else f)
                self.running.add(process)
            output = process.communicate()[0] or b""
            with self.lock:
                self.running.discard(process)
            f.write(output)
        if process.returncode:
            if self.signum:
                raise Stopped
            raise UserError(f"{what}: {last_words(log, start) or f'exit code {process.returncode}'}")
        return output.decode(errors="replace")


class Stopped(Exception):
    """This program was asked to stop."""


def executable(command):
    """A command as written down, for this interpreter and from any folder: python and this repository's scripts."""
    if command[0] != "python":
        return command
    script = [str(ROOT / command[1])] if command[1] in ("train.py", "test.py", "csv_analysis.py") else command[1:2]
    return [sys.executable, *script, *command[2:]]


def last_words(log, start):
    """The last line with "error" that a command wrote to its log from byte `start` on, or else its last line."""
    with open(log, "rb") as f:
        f.seek(start)
        lines = [line.strip() for line in re.split(r"[\r\n]+", f.read().decode(errors="replace")) if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "")


def parse_number(output, key):
    """The number under `key` in the last line of a command's output that is a JSON object."""
    for line in reversed(output.splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            if isinstance(value.get(key), (int, float)) and math.isfinite(value[key]):
                return value[key]
            raise UserError(f"--distance_key {key}: no such number among {', '.join(value)}")
    raise UserError("--distance: printed no line that is a JSON object")


def commit():
    """The commit of this working tree, with -dirty if it was changed; unknown outside git."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                          capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# One pair of variant and seed

class Pair:
    """What is known of one pair, kept in pairs/NAME_sSEED.json: its steps in the order in which they ran."""

    def __init__(self, grid, variant, seed):
        self.grid, self.variant, self.seed, self.name = grid, variant, seed, f"{variant}_s{seed}"
        self.path = grid.out / "pairs" / f"{self.name}.json"
        self.run = grid.out / "runs" / self.name
        self.images = grid.out / "images" / self.name
        self.log = grid.out / "logs" / f"{self.name}.txt"
        flags, common = shlex.join(grid.variants[variant]), shlex.join(grid.common)
        self.record = read_json(self.path) if self.path.exists() else {}
        if (self.record.get("common"), self.record.get("flags")) != (common, flags):
            if (self.run / "last.pth").exists():
                raise UserError(f"was trained with other flags ({self.record.get('flags', 'not known which') or 'none'}, not "
                                f"{flags or 'none'}); give the variant another name, or use another --out")
            self.record = {"variant": variant, "seed": seed, "common": common, "flags": flags, "finished": False,
                           "steps": {}, "values": {}}

    def save(self):
        write_json(self.path, self.record)

    def is_done(self, step, command):
        entry = self.record["steps"].get(step)
        # A finished training stays finished where --out was moved to; its flags have been compared by then.
        return bool(entry and entry["done"] and (entry["command"] == shlex.join(command) or step == "train"))

    def do(self, step, command, distance_key=None):
        """Run a step unless this very command was run before.

        Whatever was made after an earlier version of this step may depend on it and is forgotten. The seconds add up
        over interruptions.
        """
        steps = self.record["steps"]
        if self.is_done(step, command):
            return
        entry = steps.get(step)
        if entry is None or entry["command"] != shlex.join(command):
            entry = {"command": shlex.join(command), "done": False, "seconds": 0.0, "attempts": 0}
        names = list(steps)
        for name in names[names.index(step):] if step in names else ():
            del steps[name]
        steps[step] = entry
        entry.update(attempts=entry["attempts"] + 1, commit=self.grid.commit)
        self.record["finished"] = False
        self.save()
        start = time.monotonic()
        try:
            output = self.grid.commands(step, command, self.log, wants_output=distance_key is not None)
            if distance_key is not None:
                entry["value"] = parse_number(output, distance_key)
            entry["done"] = True
        finally:
            entry["seconds"] += time.monotonic() - start
            self.save()
        self.grid.say(f"{self.name}: {step}, {entry['seconds']:.0f} s")

    def work(self):
        """All steps that are not done yet, and the numbers."""
        grid, args = self.grid, self.grid.args
        if self.record["finished"] and not self.missing():
            grid.say(f"{self.name}: finished before")
            return
        self.do("train", self.train_command())
        grid.export_real(self)
        for step, command, key in self.later_steps():
            self.do(step, command, distance_key=key)
            if step == "export":
                self.require_same_data()
        self.record["last_epoch"] = pd.read_csv(self.run / "history.csv").iloc[-1].to_dict()
        self.record["values"] = self.measure()
        self.record["machine"] = {k: self.args()[k] for k in ("versions", "device_used")}
        self.record["num_samples"] = args.num_samples
        self.record["finished"] = True
        self.save()

    def missing(self):
        wanted = [("train", self.train_command(), None), *self.later_steps()]
        return [step for step, command, _ in wanted if not self.is_done(step, command)]

    def args(self):
        return read_json(self.run / "args.json")

    def train_command(self):
        return ["python", "train.py", *QUIET, *self.grid.common, *self.grid.variants[self.variant], "--exp_name", self.name,
                "--save_dir", str(self.grid.out / "runs"), "--seed", str(self.seed), "--resume", "auto"]

    def test_command(self, *flags):
        return ["python", "test.py", "--resume", str(self.run / "last.pth"), "--save_dir", str(self.grid.out / "runs"),
                "--device", self.grid.device, "--seed", str(self.seed), *flags]

    def later_steps(self):
        """(step, command, key of the number that it prints or None) after the training, in order."""
        grid, args, real = self.grid, self.grid.args, self.grid.real
        # These folders are the grid's own: an older export in them, of fewer samples perhaps, may be replaced.
        # Reconstructions are of training images, and as far from the held-out ones as the samples of a prior that equals the
        # aggregated posterior would be. Those of the held-out images themselves would share the chance of their originals
        # and come out nearer than any other images can.
        export = ["--export_dir", str(self.images), "--overwrite", "--do_real", "False", "--do_recon", "True",
                  "--recon_split", "train", "--num_recon", str(args.num_samples), "--recon_latent", "sample"]
        steps = [("export", self.test_command(*export, "--fake_dirname", "samples", "--num_samples", str(args.num_samples),
                                              "--recon_dirname", "reconstructions", "--do_pictures", str(args.do_pictures),
                                              "--diagnose"), None),
                 ("sharpness", grid.sharpness_command(self.images / "samples", self.name), None)]
        if args.distance:
            against = {"samples": ("samples", real("test")), "recon": ("reconstructions", real("test")),
                       "train": ("samples", real("train"))}
            if self.args()["flow_length"] and self.args()["decode_from"] == "zK":
                steps.append(("bypass", self.test_command(*export, "--do_fake", "False", "--recon_dirname", "bypassed",
                                                          "--recon_flow", "bypassed", "--do_pictures", "False"), None))
                against["bypassed"] = ("bypassed", real("test"))
            for what, (folder, reference) in against.items():
                command = [part.replace("{real}", str(reference)).replace("{fake}", str(self.images / folder))
                           for part in args.distance]
                steps.append((f"{args.distance_key}_{what}", command, args.distance_key))
        return steps

    def require_same_data(self):
        found = read_json(self.run / "test" / "diagnostics.json")["protocol"]["data"]
        if found != read_json(self.grid.real("test") / MANIFEST)["data"]:
            raise UserError("its held-out images are not those of the rest of the grid: the data have changed; use another "
                            "--out")

    def measure(self):
        """The numbers of a finished pair, by column."""
        sharpness = self.grid.out / "sharpness"
        ours, real = (pd.read_csv(sharpness / f"{tag}_statistics.csv").set_index("metric")["mean"]["lap_var"]
                      for tag in (self.name, "real"))
        model, _ = load_model(self.run / "last.pth", "cpu")
        steps = self.record["steps"]
        held_out = pixel_statistics(self.grid.real("test"))
        pixel_folders = {"samples": self.images / "samples", "recon": self.images / "reconstructions",
                         "real": self.grid.real("train")}
        return {**{name: self.record["last_epoch"][name] for name in HISTORY},
                **{step: entry["value"] for step, entry in steps.items() if "value" in entry},
                **{f"pixel_{what}": frechet_distance(*held_out, *pixel_statistics(folder))
                   for what, folder in pixel_folders.items()},
                "sharpness_ratio": ours / real if real else None, "train_s": steps["train"]["seconds"],
                "parameters": sum(p.numel() for p in model.parameters())}


def pixel_statistics(folder):
    """Mean and covariance of the images of a folder as vectors of RGB in [0, 1], reduced to PIXELS a side by averaging."""
    pixels, paths = [], list_images(folder)
    for start in range(0, len(paths), 1000):                    # the folder need not fit into memory
        x = decode_images(paths[start:start + 1000], progress=False).float() / 255
        pixels.append(F.adaptive_avg_pool2d(x, min(PIXELS, x.shape[-1])).flatten(1).numpy())
    return mean_and_covariance(np.concatenate(pixels))


# ---------------------------------------------------------------------------------------------------------------------
# The grid

class Grid:
    """What all pairs share."""

    def __init__(self, args, common):
        self.args, self.common, self.out = args, common, args.out
        parsed, given = parse_train_flags(common)               # ends the program if train.py does not know them
        if given & OWN_FLAGS:
            raise UserError(f"--{sorted(given & OWN_FLAGS)[0]} is not for all variants to share: it is this program's")
        self.device, self.commit = parsed.device, commit()
        self.variants = choose_variants(args, parsed)
        for path in sorted((self.out / "pairs").glob("*.json")):
            other, wanted = read_json(path)["common"], shlex.join(common)
            if other != wanted and (self.out / "runs" / path.stem / "last.pth").exists():
                raise UserError(f"{path.stem} in --out {self.out} was trained with other common flags "
                                f"({other or 'none'}, not {wanted or 'none'}); repeat those, or use another --out")
        for name in ("pairs", "runs", "images", "sharpness", "logs"):
            writable_folder(self.out / name, "--out")
        self.commands, self.real_lock = Commands(), threading.Lock()

    def say(self, text):
        print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)

    def real(self, split):
        """Where the real images of a split are: all held-out ones, and as many training images as there are samples."""
        return self.out / "images" / ("real_test" if split == "test" else f"real_train_{self.args.num_samples}")

    def sharpness_command(self, images, tag):
        return ["python", "csv_analysis.py", "--gen", str(images), "--out_dir", str(self.out / "sharpness"), "--tag", tag]

    def export_real(self, pair):
        """The real images, once for all pairs, by means of the first one that has a checkpoint."""
        with self.real_lock:
            for split, count in (("test", 0), ("train", self.args.num_samples)):
                folder = self.real(split)
                manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {"done": 0, "count": -1}
                if manifest["done"] != manifest["count"]:
                    self.commands(f"real {split} images", pair.test_command(
                        "--export_dir", str(folder.parent), "--do_fake", "False", "--do_pictures", "False", "--real_split",
                        split, "--real_dirname", folder.name, "--num_real", str(count)), pair.log)
            if not (self.out / "sharpness" / "real_statistics.csv").exists():
                self.commands("real sharpness", self.sharpness_command(self.real("test"), "real"), pair.log)

    def work(self, variant, seed):
        """One pair -> None, or why it failed."""
        try:
            Pair(self, variant, seed).work()
        except (UserError, OSError) as e:
            self.say(f"{variant}_s{seed}: FAILED, {e}")
            return str(e)

    def run_all(self):
        """Every pair of variant and seed, --jobs at once. {pair: why it failed}."""
        pairs = [(variant, seed) for seed in self.args.seeds for variant in self.variants]     # each seed a whole table
        self.say(f"{len(pairs)} pairs in {self.out}: {', '.join(self.variants)}; seeds {', '.join(map(str, self.args.seeds))}")
        with ThreadPoolExecutor(self.args.jobs) as pool:
            futures = {f"{v}_s{s}": pool.submit(self.work, v, s) for v, s in pairs}
        stopped = [name for name, future in futures.items() if isinstance(future.exception(), Stopped)]
        if stopped:
            print(f"stopped; the same command goes on, --collect makes the table of what is finished ({len(stopped)} pairs "
                  f"are not)", file=sys.stderr)
            sys.exit(128 + self.commands.signum)
        return {name: future.result() for name, future in futures.items() if future.result()}


def choose_variants(args, parsed):
    """{name: flags of train.py} of what is to be trained. parsed: the common flags."""
    lengths = PRESETS[args.preset][1] if args.flow_lengths is None else args.flow_lengths
    known = {**VARIANTS, **{f"flow_{n}": ["--flow_length", str(n)] for n in lengths},
             **(NO_LPIPS if parsed.lpips_net != "none" else {})}
    for text in args.extra:
        name, colon, flags = text.partition(":")
        name = name.strip()
        # The name goes into file names and into comparison.py's --model_order.
        if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}", name):
            raise UserError(f'--extra {text!r}: must look like "NAME: --flag value", the name of letters, digits and _ . + -')
        if name in known or name == "real":
            raise UserError(f"--extra {text!r}: there is a variant of that name")
        known[name] = shlex.split(flags)
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such variant here; there are {', '.join(known)}")
    return {name: known[name] for name in args.only or known}


# ---------------------------------------------------------------------------------------------------------------------
# The table

def finished_pairs(out):
    """The records of all finished pairs, variants in the order of VARIANTS, the others by name."""
    records = [read_json(path) for path in sorted((out / "pairs").glob("*.json"))]
    order = {name: i for i, name in enumerate(VARIANTS)}

    def key(record):                                            # flow_4 before flow_16
        name = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", record["variant"])]
        return order.get(record["variant"], len(order)), name, record["seed"]

    finished = [r for r in records if r["finished"]]
    # Until there was a distance of the training images, reconstructions were of the held-out images themselves.
    older = [f"{r['variant']}_s{r['seed']}" for r in finished if "pixel_real" not in r["values"]]
    if older:
        print(f"left out, measured otherwise by an older version of this program: {', '.join(older)}; its command, run again, "
              f"measures them anew", file=sys.stderr)
    return sorted((r for r in finished if "pixel_real" in r["values"]), key=key)


def table_of(records):
    """A row per variant: seeds, then mean and standard deviation (N - 1, NaN for one seed) of every value."""
    columns = [*HISTORY, *dict.fromkeys(name for r in records for name in r["values"] if name not in HEADINGS),
               "pixel_samples", "pixel_recon", "pixel_real", "sharpness_ratio", "train_s", "parameters"]
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        of_variant = [r for r in records if r["variant"] == variant]
        row = {"variant": variant, "seeds": " ".join(str(r["seed"]) for r in of_variant)}
        for name in columns:
            values = np.array([r["values"].get(name) for r in of_variant], float)              # None becomes NaN
            row[name] = values.mean()
            row[f"{name}_std"] = values.std(ddof=1) if len(values) > 1 else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def cell(mean, std):
    """mean ± std for a reader: four digits and two, never as powers of ten, without a spread that is 0 or unknown, empty where
    nothing was measured."""
    def text(value, digits):
        return f"{value:,.0f}" if abs(value) >= min(10 ** digits - 0.5, 1000) else f"{value:.{digits}g}"
    if math.isnan(mean):
        return ""
    return text(mean, 4) + (f" ± {text(std, 2)}" if std > 0 else "")


def markdown(table, records, out):
    """The table, what its numbers are, and where they come from."""
    names = [n for n in table.columns if n not in ("variant", "seeds") and not n.endswith("_std")]
    rows = [["variant", "seeds", *(HEADINGS.get(n, n) for n in names)], ["---"] * (len(names) + 2)]
    rows += [[row["variant"], row["seeds"], *(cell(row[n], row[f"{n}_std"]) for n in names)] for _, row in table.iterrows()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Mean ± standard deviation over the seeds (N - 1; from two or three seeds it is itself uncertain). Held-out "
              "images and EMA weights at the end of the training, columns as in history.csv (a val_loss without LPIPS lacks "
              "that term, one with --fit_prior is the prior's alone). Pixel FD: Fréchet distance to the held-out images in "
              "their pixels "
              f"(reduced to {PIXELS} a side): means and covariances of colours, contrast and coarse shapes, no content. "
              "Reconstructions are of training images, from posterior samples, so that no image is compared with its own "
              "original: a perfect prior's samples would be as far. "
              "sharpness / real: mean Laplacian variance of the samples over that of the held-out images. Seconds "
              "of the wall clock, start and validation included."]

    def distinct(values, quote="`"):
        """What the pairs have in common, or all of it where they differ."""
        found = [f"{quote}{v or 'none'}{quote}" for v in dict.fromkeys(values)]
        return ("**not the same for all:** " if len(found) > 1 else "") + "; ".join(found)

    def without_folders(command):
        return shlex.join([part for part in shlex.split(command) if str(out / "images") not in part])

    steps = [entry for r in records for entry in r["steps"].values()]
    distances = [without_folders(entry["command"]) for entry in steps if "value" in entry]
    if distances:
        held_out = len(list((out / "images" / "real_test").glob("*.png")))
        lines += ["", f"Distances: to the {held_out:,} held-out images (_samples: prior samples; _recon: reconstructions of "
                  f"training images; _bypassed: these without the flow), and of the samples to training images (_train). A "
                  f"Fréchet distance depends on the number of images on each side. Command, folders left out: "
                  f"{distinct(distances)}"]
    samples = list(dict.fromkeys(r["num_samples"] for r in records))
    fewer = {n: m for n in samples if 0 < (m := len(list((out / "images" / f"real_train_{n}").glob("*.png")))) < n}
    lines += ["", f"- samples: {distinct(samples, '')}",
              *(f"- **but {m:,} training images and reconstructions**, all that there are, to {n:,} samples: a distance is the "
                f"larger the fewer images it is of" for n, m in fewer.items()),
              f"- common flags: {distinct(r['common'] for r in records)}",
              f"- commit: {distinct([entry['commit'] for entry in steps], '')}",
              f"- torch: {distinct([r['machine']['versions']['torch'] for r in records], '')}",
              f"- device: {distinct([r['machine']['device_used'] for r in records], '')}"]
    lines += [f"- {name}: `{flags or 'none'}`" for name, flags in {r["variant"]: r["flags"] for r in records}.items()]
    return "\n".join(lines) + "\n"


def save_panels(path, title, panels):
    """A picture of labelled images (H, W, 3), four in a row."""
    plt = pyplot()
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    height = 4 * max(image.shape[0] / image.shape[1] for _, image in panels)                    # inches
    fig, axes = plt.subplots(rows, columns, figsize=(4 * columns, rows * (height + 0.3) + 0.4), squeeze=False,
                             constrained_layout=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (label, image) in zip(axes.flat, panels):
        ax.imshow(image, interpolation="nearest")
        ax.set_title(label, fontsize=10)
    fig.suptitle(title, fontsize=10)
    save_figure(path, fig, dpi=120)


def save_pictures(out, records):
    """samples.png and pseudo.png, the first finished seed of each variant. Names of what was written."""
    def sheet(folder, step):
        files = list_images(folder)[::step][:PICTURED]
        return image_grid(decode_images(files, progress=False), 8).permute(1, 2, 0).numpy()

    first = {r["variant"]: r for r in reversed(records)}
    first = [first[name] for name in dict.fromkeys(r["variant"] for r in records)]
    samples, pseudo = [], []
    real = out / "images" / "real_test"
    if real.is_dir():                                           # spread over the split, whose files may be sorted by class
        samples.append(("held-out images", sheet(real, max(1, len(list_images(real)) // PICTURED))))
    for r in first:
        name = f"{r['variant']}_s{r['seed']}"
        label = f"{r['variant']}, seed {r['seed']}"
        if (out / "images" / name / "samples").is_dir():
            samples.append((label, sheet(out / "images" / name / "samples", 1)))
        pictures = sorted((out / "runs" / name / "samples").glob("pseudo_*.png"))
        if pictures:
            pseudo.append((label, read_image(pictures[-1])))
    written = []
    means = "Pseudo-inputs, below each row the decoded means of their components (mog: decoded means alone)"
    for file, title, panels in (("samples.png", f"The first {PICTURED} samples of each variant", samples),
                                ("pseudo.png", means, pseudo)):
        if panels:
            save_panels(out / file, title, panels)
            written.append(file)
    return written


CURVES = {"val_recon": "reconstruction, sum over pixels", "val_kl_raw": "KL, nats per image",
          "effective_components": "effective components"}


def save_curves(path, out, records):
    """A panel for each of CURVES over the epochs: a colour for each variant, a line for each of its seeds."""
    plt = pyplot()
    variants = list(dict.fromkeys(r["variant"] for r in records))
    styles = [(colour, dash) for dash in ("-", "--", ":") for colour in plt.get_cmap("tab10").colors]
    fig, axes = plt.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 4.5), constrained_layout=True)
    for r in records:
        history = pd.read_csv(out / "runs" / f"{r['variant']}_s{r['seed']}" / "history.csv")
        i = variants.index(r["variant"])
        first = r is next(other for other in records if other["variant"] == r["variant"])
        for ax, column in zip(axes, CURVES):
            ax.plot(history["epoch"], history[column], color=styles[i % len(styles)][0], linestyle=styles[i % len(styles)][1],
                    label=r["variant"] if first else None, marker="o" if len(history) < 15 else None, markersize=3)
    for ax, title in zip(axes, CURVES.values()):
        ax.set(title=title, xlabel="epoch")
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    fig.suptitle("Held-out images, EMA weights; a line for each seed", fontsize=10)
    save_figure(path, fig, dpi=90)


def collect(out, records):
    """The table and the pictures of finished pairs."""
    table = table_of(records)
    text = markdown(table, records, out)
    with atomic_write(out / "grid.csv", "w", newline="", encoding="utf-8") as f:
        table.to_csv(f, index=False)
    with atomic_write(out / "grid.md", "w", encoding="utf-8") as f:
        f.write(text)
    pairs = []
    for r in records:
        name = f"{r['variant']}_s{r['seed']}"
        found = out / "runs" / name / "test" / "diagnostics.json"
        pairs.append({**r, "diagnostics": read_json(found)["diagnostics"] if found.exists() else None})
    write_json(out / "grid.json", {"pairs": pairs})
    save_curves(out / "curves.png", out, records)
    pictures = ["curves.png", *save_pictures(out, records)]
    print(text)
    print(f"{len(records)} finished pairs; in {out}: grid.csv, grid.md, grid.json, {', '.join(pictures)}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="grid.py --out FOLDER [flags] [-- flags of train.py that all variants share]")
    group = parser.add_argument_group("what is trained")
    group.add_argument("--out", required=True, help="where everything goes")
    group.add_argument("--seeds", type=int, nargs="+", default=[0], help="each variant is trained once with each")
    group.add_argument("--preset", choices=PRESETS, default="none", help="digits: train.py --demo, minutes for each pair")
    group.add_argument("--only", nargs="+", metavar="NAME", help="these variants only (default: all)")
    group.add_argument("--extra", action="append", default=[], metavar='"NAME: FLAGS"', help="one more variant, repeatable")
    group.add_argument("--flow_lengths", type=int, nargs="*", default=None, metavar="N",
                       help="one variant flow_N each (default: 4 16; digits: 1 4 8)")
    group.add_argument("--jobs", type=int, default=1, help="pairs at once")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--num_samples", type=int, default=2000,
                       help="samples of each run, and training images that they are compared with")
    group.add_argument("--distance", default=None, metavar='"COMMAND {real} {fake}"',
                       help="prints one JSON object about two folders of images")
    group.add_argument("--distance_key", default="fd", help="the number in it that goes into the table")
    group.add_argument("--do_pictures", type=true_false, default=False, metavar="True|False",
                       help="test.py's pictures of every run (default False)")
    group.add_argument("--collect", action="store_true", help="train nothing, make the table of what is finished")
    args = parser.parse_args(argv)
    args.out = Path(args.out).resolve()
    return args


def check_flags(args):
    """Raise UserError on values that make no sense, naming the flag; --distance becomes its parts."""
    for name in ("jobs", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be 1 or more")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: must differ and be 0 or more")
    if args.distance is not None:
        if not all(place in args.distance for place in ("{real}", "{fake}")):
            raise UserError(f"--distance {args.distance!r}: must contain {{real}} and {{fake}}")
        args.distance = shlex.split(args.distance)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", args.distance_key):
        raise UserError(f"--distance_key {args.distance_key!r}: must be a plain word")


def main():
    own, common = sys.argv[1:], []
    if "--" in own:
        own, common = own[:own.index("--")], own[own.index("--") + 1:]
    args = parse_args(own)
    check_flags(args)
    failed = {}
    if not args.collect:
        failed = Grid(args, [*PRESETS[args.preset][0], *common]).run_all()
    records = finished_pairs(args.out)
    if records:
        collect(args.out, records)
    elif not failed:
        raise UserError(f"--out {args.out}: no pair is finished yet")
    if failed:
        raise UserError(f"{len(failed)} failed (logs in {args.out / 'logs'}): "
                        + "; ".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    run(main)
