"""Compare the sharpness caches of several variants: box plots, violins, differences to the real images, a report.

    python comparison.py --cache_dir ./results/single_image_quality --out_dir ./results/compare \\
        --model_order "VAE,CrossVampVAE,real"
    python comparison.py --cache_dir ./results/single_image_quality --scale linear --bootstrap 2000 --pdf

Reads every cache_<variant>.csv in cache_dir (from csv_analysis.py, or older ones with only lap_var, tenengrad and
hf_ratio) and every evaluation JSON there (from test.py --evaluate and PR_Calculate.py --out); one of the two kinds will do.
Writes to out_dir
    report.html                     everything below in one file that needs nothing else
    summary.csv, summary.md         statistics, and effect sizes against the variant called real (.csv: if there are caches)
    evaluation.csv                  FID, KID, precision, recall, density, coverage, if there are evaluation JSONs
    box_, violin_, difference_<metric>.png
Files of these names that an earlier comparison left there and this one does not make are removed.

Intervals come from the bootstrap over images, real and model resampled independently. They say how far the numbers
could move with other images from the same model, not with another training run.

Shapes: n images of a variant, m of real, B resamples, V distinct values of both together.
"""
import argparse
import base64
import html
import io
import json
import math
import re
import sys
import textwrap
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.ndimage import gaussian_filter1d
from scipy.stats import skew

from utils import (
    FEW_IMAGES,
    FlagParser,
    UserError,
    atomic_write_all,
    cpu_count,
    is_fid,
    plain_text,
    progress_bar,
    pyplot,
    read_json,
    run,
    sha256_file,
    writable_folder,
)

plt = pyplot()

REFERENCE = "real"
REQUIRED = ("lap_var", "tenengrad", "hf_ratio")
METRICS = {                                                     # name: (title, unit, what it is)
    "lap_var": ("Laplacian variance", "grey level², grey in [0, 1]",
                "Variance of the 4-neighbour Laplacian of the grey image: fine detail, and noise as well."),
    "tenengrad": ("Tenengrad", "grey level², grey in [0, 1]",
                  "Mean squared Sobel gradient (kernels not normalised): strength of edges."),
    "hf_ratio": ("High-frequency ratio", "share of power, 0 to 1",
                 "Share of the spectrum's power at high frequencies, the DC term included, so that a bright image "
                 "scores lower than a dark one."),
    "hf_ratio_ac": ("High-frequency ratio without DC", "share of power, 0 to 1",
                    "Share of the spectrum's power at high frequencies, the DC term left out, so that brightness does "
                    "not enter."),
}
EVALUATION = {                                                  # name: (title, better)
    "fid": ("FID", "↓"), "kid": ("KID", "↓"), "precision": ("Precision", "↑"), "recall": ("Recall", "↑"),
    "density": ("Density", "↑"), "coverage": ("Coverage", "↑"),
}
# Entries of a protocol that must agree before two rows may be compared; a checkpoint or a folder may differ.
MUST_AGREE = re.compile(r"feature|extractor|network|sha256|dims|resize|pca|split|subset|nearest|size"
                        r"|(^|[._ ])(n|k|num|count|images)([._ ]|$)")
MAY_DIFFER = re.compile(r"checkpoint|training|lpips|folder|path|content|manifest|_dir|distinct|batch|seconds|version")
# The real images, which decide what a distance to them means, must agree whatever their folder is called: as what they were
# taken from (content: of the data set), or as pixels.
SAME_REAL = re.compile(r"^real\.(content|split|pixels)$")
DRAWN = ("weights", "mixture_weights", "temperature")        # how samples were drawn from their model
# What all files of one tag must have been made with, where they say so.
OF_MODEL = ("checkpoint_sha256", *DRAWN)
OF_TAG = (*OF_MODEL, "kind")                                 # samples, reconstructions
# Of the manifest of an export, what the report shows.
MADE_BY = ("kind", "split", "checkpoint_sha256", *DRAWN, "seed", "latent")

PERCENTILES = np.arange(1, 100)
# Okabe and Ito's colours, told apart by readers of any colour vision; black is kept for real.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "----", "++++", "||||", "oo", "**")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = "osD^vP*X<>"
OUTPUT = re.compile(rf"(box|violin|difference)_({'|'.join(METRICS)})\.(png|pdf)|(evaluation|summary)\.csv")


# ---------------------------------------------------------------------------------------------------------------------
# Core: samples in, numbers out

def ranks(n):
    """The order statistics that are the percentiles 1 to 99 of n values, counted from 1: ceil(p n / 100)."""
    return -(-PERCENTILES * n // 100)


def summarise(counts, cumulative, values):
    """mean, median and percentiles 1 to 99 of the sample that has counts[i] members equal to values[i], ascending."""
    n = cumulative[-1]
    middle = values[cumulative.searchsorted([(n + 1) // 2, n // 2 + 1])]
    # einsum, not @, which would start BLAS threads for every resample: far dearer than what they do.
    return np.einsum("i,i->", counts, values) / n, middle.mean(), values[cumulative.searchsorted(ranks(n))]


def distances(cumulative_x, at_x, cumulative_y, at_y, gaps, expected, block=8192):
    """Wasserstein-1, Kolmogorov-Smirnov and Cliff's delta of two samples.

    cumulative[at[v]] members lie at or below the v-th of V ascending values, at (V,); gaps: between them, (V - 1,).
    W1 = integral |F - G - expected|, in the values' unit; KS = max |F - G - expected|; delta = P(X > Y) - P(X < Y), ties
    counting for neither. F and G are the empirical distribution functions of x and y; expected (V,) is 0 for the distances
    themselves, and their difference in the original samples for how far a resample is from it.
    """
    w1, ks, cliff, f, g = 0.0, 0.0, -1.0, 0.0, 0.0              # f, g: F and G just below the block
    for i in range(0, len(at_x), block):                        # in blocks that stay in the processor's cache
        F = cumulative_x[at_x[i:i + block]] / cumulative_x[-1]
        G = cumulative_y[at_y[i:i + block]] / cumulative_y[-1]
        apart, gap = np.abs(F - G - expected[i:i + block]), gaps[i:i + block]
        w1 += (apart[:len(gap)] * gap).sum()
        ks = max(ks, apart.max())
        # Each x against the share of y below it and the share at or below it.
        cliff += (F[0] - f) * (g + G[0]) + ((F[1:] - F[:-1]) * (G[1:] + G[:-1])).sum()
        f, g = F[-1], G[-1]
    return w1, ks, cliff


FIELDS = ("mean", "median", "percentiles", "ref_mean", "ref_median", "ref_percentiles", "wasserstein", "ks", "cliff")


def compare(x, y=None, B=1000, key=(0, "x", "y"), tick=lambda: None):
    """Estimates and bootstrap resamples of one variant's metrics, alone or against a reference.

    x: (n, M) values of M metrics, y: (m, M) or None; key: (seed, name of x, name of y), what the draws depend on,
    so that a variant's numbers do not change with the company it is in. Images are resampled whole: the metrics
    of a resample belong together. tick is called after each resample.
    Returns a list of M dicts: field -> (estimate, resamples (B, ...)), fields as in FIELDS, the first three without y. What
    distance_interval takes stands in place of the resamples of the two distances: how far F* - G* is from F - G.
    """
    seed, name_x, name_y = key
    rng_x, rng_y = (np.random.default_rng([seed, zlib.crc32(name.encode("utf-8", "surrogateescape")), role])
                    for role, name in enumerate((name_x, name_y)))
    M = x.shape[1]
    samples = [x] if y is None else [x, y]
    metrics = []
    for j in range(M):
        order = [s[:, j].argsort() for s in samples]
        ascending = [s[o, j] for s, o in zip(samples, order)]
        common = np.unique(np.concatenate(ascending))                                           # (V,)
        at_or_below = [a.searchsorted(common, "right") for a in ascending]
        shares = [at / len(s) for at, s in zip(at_or_below, samples)]                           # F and G
        metrics.append((order, ascending, at_or_below, np.diff(common), shares[0] - shares[-1]))

    def measure(metric, counts, resampled):
        """counts: how often a resample holds each image of x (n,), and of y (m,)."""
        order, ascending, at_or_below, gaps, difference = metric
        out, steps = (), []
        for o, a, at, c in zip(order, ascending, at_or_below, counts):
            c = c[o]
            cumulative = np.zeros(len(c) + 1, np.int64)
            np.cumsum(c, out=cumulative[1:])
            out += summarise(c, cumulative[1:], a)
            steps += [cumulative, at]
        return out if y is None else out + distances(*steps, gaps, difference if resampled else 0 * difference)

    estimates = [measure(metric, [np.ones(len(s), np.int64) for s in samples], False) for metric in metrics]
    resamples = [[np.empty((B, *np.shape(e))) for e in estimate] for estimate in estimates]
    for b in range(B):
        counts = [np.bincount(rng.integers(0, len(s), len(s)), minlength=len(s))
                  for s, rng in zip(samples, (rng_x, rng_y))]
        for metric, resample in zip(metrics, resamples):
            for out, value in zip(resample, measure(metric, counts, True)):
                out[b] = value
        tick()
    return [dict(zip(FIELDS, zip(e, r))) for e, r in zip(estimates, resamples)]


def percentile_interval(resamples, confidence):
    """The middle `confidence` per cent of the resamples along their first axis; NaN without resamples."""
    if len(resamples) == 0:
        return np.full((2, *resamples.shape[1:]), np.nan)
    tail = (100 - confidence) / 2
    return np.percentile(resamples, [tail, 100 - tail], axis=0)


def distance_interval(estimate, deviations, confidence, top):
    """The estimate of W1 or KS, plus and minus what `confidence` per cent of the deviations do not exceed, cut to [0, top].

    Both are norms of F - G, so that by the triangle inequality the distance of two samples is off by at most the same norm
    of the error of F - G, whose distribution is that of a resample's deviation (B,), (F* - G*) - (F - G). That holds
    between two samples of one distribution too, where intervals from the resampled distances fail: a distance is never
    negative, and resampling inflates it.
    """
    if len(deviations) == 0:
        return np.full(2, np.nan)
    reach = np.percentile(deviations, confidence)
    return np.clip([estimate - reach, estimate + reach], 0, top)


def summary_row(values, result, confidence):
    """One metric of one variant: values (n,), result from compare -> dict of numbers, intervals _low and _high."""
    row = {"n": len(values), "zeros": int((values == 0).sum())}

    def put(name, estimate, interval):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = float(estimate), float(interval[0]), float(interval[1])

    for name in ("mean", "median"):
        estimate, resamples = result[name]
        put(name, estimate, percentile_interval(resamples, confidence))
    row["p90"] = float(np.percentile(values, 90))
    row["std"] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    if "ks" in result:
        for name in ("mean", "median"):
            (estimate, resamples), (reference, ref_resamples) = result[name], result[f"ref_{name}"]
            put(f"{name}_difference", estimate - reference,
                percentile_interval(resamples - ref_resamples, confidence))
        for name, top in (("wasserstein", math.inf), ("ks", 1)):
            put(name, result[name][0], distance_interval(*result[name], confidence, top))
        put("cliff", result["cliff"][0], percentile_interval(result["cliff"][1], confidence))
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_cache(path):
    """A cache file -> DataFrame with the columns of METRICS that it has. Raises UserError that names file and row."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8",
                            encoding_errors="surrogateescape", usecols=lambda c: c in METRICS)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a CSV file ({str(e).strip()[:120]})") from None
    missing = [m for m in REQUIRED if m not in table]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; make it with csv_analysis.py, or move it elsewhere")
    if table.empty:
        raise UserError(f"{path}: no rows; make it again with csv_analysis.py, or move it elsewhere")
    columns = {}
    for m in (m for m in METRICS if m in table):
        values = pd.to_numeric(table[m], errors="coerce").to_numpy(float)
        top = 1 + 1e-9 if m.startswith("hf_") else 1e12         # far above any unit of grey levels; squares stay finite
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0) & (values <= top)))
        if len(bad):
            cell = str(table[m].iloc[bad[0]])
            raise UserError(f"{path}: row {bad[0] + 1}, column {m}: {cell[:40]!r} is not a value it can have")
        columns[m] = values
    return pd.DataFrame(columns)


def read_protocol(path):
    """The fingerprint beside a cache -> (dict or None, warning or None). Raises UserError if it or the cache is damaged."""
    fingerprint = path.with_suffix(".json")
    if not fingerprint.exists():
        return None, None                                       # an older cache
    record = read_json(fingerprint)
    if "checksum" not in record:
        return None, f"{fingerprint.name} is no fingerprint of csv_analysis.py; the protocol of {path.name} is unknown"
    try:
        if record["cache_sha256"] != sha256_file(path):
            raise UserError(f"{path}: damaged, or edited since csv_analysis.py wrote it; make it again (or delete "
                            f"{fingerprint.name}, if the edit is meant: its protocol is then unknown)")
        return {"definitions": dict(record["definitions"]), "sizes": dict(record["sizes"]),
                "skipped": len(record["skipped"]), "folder": str(record["folder"]),
                "made_by": {k: v for k, v in (record.get("manifest") or {}).items() if k in MADE_BY}}, None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{fingerprint}: no fingerprint of csv_analysis.py; delete it, or make the cache again") from None


def order_names(names, wanted):
    """(names in the wanted order, the rest alphabetically; wanted names that do not exist)."""
    wanted = list(dict.fromkeys(w.strip() for w in wanted.split(",") if w.strip()))
    return [w for w in wanted if w in names] + sorted(set(names) - set(wanted)), [w for w in wanted if w not in names]


def read_evaluations(folder):
    """The evaluation JSONs of a folder -> list of dicts (tag, file, metrics, other, protocol), and warnings.

    An evaluation has a "metrics" object; other JSON files are passed over.
    """
    found, warnings = [], []
    for path in sorted(folder.glob("*.json")):
        prefixed = re.match(r"(evaluation|pr)_", path.stem)
        try:
            value = read_json(path)
        except (UserError, OSError):
            warnings.append(f"{path.name} is damaged, or not a JSON object, and is left out")
            continue
        if not isinstance(value.get("metrics"), dict):
            continue
        if "checksum" not in value:
            warnings.append(f"{path.name} has no checksum: damage to it, or an edit, would not show")
        tag = value.get("tag")
        if not isinstance(tag, str) or not tag.strip():
            tag = path.stem[prefixed.end():] if prefixed else path.stem
        numbers = {str(k): float(v) for k, v in value["metrics"].items()
                   if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) <= sys.float_info.max}
        known = {k: v for k, v in numbers.items() if k in EVALUATION or k == "kid_std"}
        protocol = value.get("protocol")
        found.append({"tag": tag.strip(), "file": path.name, "metrics": known,
                      "other": {k: v for k, v in numbers.items() if k not in known},
                      "protocol": flatten(protocol) if isinstance(protocol, dict) else {}})
    return found, warnings


def flatten(value, prefix=""):
    """Nested dicts -> one dict with dotted keys and short texts."""
    out = {}
    for key, v in value.items():
        if isinstance(v, dict):
            out.update(flatten(v, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
    return out


def differing(protocols, must_agree=lambda key: True):
    """{name: {key: text}} -> {key: {text: [names]}} for the keys that not all of those that state them agree on."""
    out = {}
    for key in sorted({k for p in protocols.values() for k in p if must_agree(k)}):
        stated = {}
        for name, protocol in protocols.items():
            if key in protocol:
                stated.setdefault(str(protocol[key]), []).append(name)
        if len(stated) > 1:
            out[key] = stated
    return out


def one_way_to_say_it(protocol):
    """A flat protocol of PR_Calculate.py, with what it knows from manifests under the names that test.py has for it too."""
    names = {"real.manifest.split": "real.split", "real.manifest.data": "real.content",
             **{f"fake.manifest.{name}": name for name in OF_TAG}, "fake.temperature": "temperature"}
    return {**{names[key]: text for key, text in protocol.items() if key in names}, **protocol}


def mixed_models(protocols, evaluations):
    """Warnings for tags whose sharpness and evaluations are of different models."""
    made = {}                                                   # {tag: {file: what it was made with}}
    for tag, protocol in protocols.items():
        made.setdefault(tag, {})[f"cache_{tag}.csv"] = flatten((protocol or {}).get("made_by", {}))
    for e in evaluations:
        kind = {"kind": "samples"} if "checkpoint_sha256" in e["protocol"] else {}              # test.py measures no others
        made.setdefault(e["tag"], {})[e["file"]] = kind | one_way_to_say_it(e["protocol"])
    warnings = []
    for tag, files in made.items():
        if tag != REFERENCE:
            for key, stated in differing(files, OF_TAG.__contains__).items():
                short = 12 if key == "checkpoint_sha256" else None
                texts = "; ".join(f"{text[:short]} in {', '.join(where)}" for text, where in stated.items())
                warnings.append(f"{tag}: its files are not of one model and one way of sampling it, {key} differs: {texts}")
    return warnings


def evaluation_key_matters(key):
    key = key.lower()
    return bool(SAME_REAL.search(key) or MUST_AGREE.search(key) and not MAY_DIFFER.search(key))


# ---------------------------------------------------------------------------------------------------------------------
# Figures

class Axis:
    """The value axis that all variants of a metric share: linear or logarithmic, and where it ends.

    Logarithmic (scale "auto") where nearly all values are positive and the tail is long: skewness above 1, and a
    range of at least half a decade. The axis reaches at most 1.5 times the width of the central 98 % beyond them,
    so that one stray image does not flatten the rest. What lies beyond, and zeros on a logarithmic axis, are counted
    in `note`. scale "log" is refused, in `note`, only where no value is positive.
    """

    def __init__(self, samples, scale):
        positive = [v[v > 0] for v in samples.values()]
        if scale == "auto":
            possible = all(len(p) for p in positive)
            skewed = possible and float(np.median([skew(v) if np.ptp(v) else 0 for v in samples.values()])) > 1
            mostly = all(len(p) >= 0.99 * len(v) for p, v in zip(positive, samples.values()))
            wide = possible and max(p.max() for p in positive) > 3.16 * min(p.min() for p in positive)
            self.log = skewed and mostly and wide
        else:
            self.log = scale == "log" and any(len(p) for p in positive)
        shown = [np.log10(p) for p in positive if len(p)] if self.log else list(samples.values())
        centre = np.array([np.percentile(s, [1, 99]) for s in shown])
        low, high = centre[:, 0].min(), centre[:, 1].max()
        reach = 1.5 * (high - low)
        low, high = max(min(s.min() for s in shown), low - reach), min(max(s.max() for s in shown), high + reach)
        if low == high:
            low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
        self.low, self.high = low, high
        refused = "Linear, since no value is above 0. " if scale == "log" and not self.log else ""
        self.note = refused + self._note(samples)

    def place(self, values):
        """Values -> positions on the axis (log10 where it is logarithmic), NaN for those not on it."""
        if self.log:
            t = np.full(len(values), np.nan)
            np.log10(values, out=t, where=values > 0)
        else:
            t = np.asarray(values, float)
        return np.where((t >= self.low) & (t <= self.high), t, np.nan)

    def clip(self, value):
        """One number -> where it is drawn, at the axis' end if beyond."""
        t = (math.log10(value) if value > 0 else -math.inf) if self.log else value
        t = min(max(t, self.low), self.high)
        return 10 ** t if self.log else t

    def _note(self, samples):
        parts = []
        for name, values in samples.items():
            zeros = int((values == 0).sum()) if self.log else 0
            outside = values[np.isnan(self.place(values)) & ~((values == 0) & self.log)]
            if zeros:
                parts.append(f"{name}: {zeros:,} of {len(values):,} are 0")
            if len(outside):
                parts.append(f"{name}: {len(outside):,} of {len(values):,} (from {outside.min():.4g} to "
                             f"{outside.max():.4g})")
        if not parts:
            return "Every image is within the axis."
        return "Beyond the axis and not drawn, but part of every number: " + "; ".join(parts) + "."

    def apply(self, ax, label):
        pad = 0.03 * (self.high - self.low)
        low, high = self.low - pad, self.high + pad
        if self.log:
            ax.set_xscale("log")
            ax.set_xlim(10 ** low, 10 ** high)
            log_ticks(ax.xaxis, high - low)
            label += ", logarithmic"
        else:
            ax.set_xlim(low, high)
        ax.set_xlabel(label)


def log_ticks(axis, decades):
    """Plain numbers at 1 2 5 where the axis is short, at the decades where it is long."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def plain(name, width=22):
    """A variant's name as figure text: wrapped to three lines at most, and never read as a formula. A longer one loses
    its middle, since names of one family differ at their ends."""
    lines, keep = textwrap.wrap(name, width), 3 * width
    while len(lines) > 3:
        lines, keep = textwrap.wrap(f"{name[:keep // 2]}…{name[-(keep // 2):]}", width), keep - 2
    return plain_text("\n".join(lines or [" "]))


def plain_names(names, width=22):
    """The same of several variants: those that look alike without their middle are numbered by their place."""
    texts = [plain(name, width) for name in names]
    return [f"{text} ({i})" if texts.count(text) > 1 else text for i, text in enumerate(texts, 1)]


def line_count(texts):
    return max(text.count("\n") + 1 for text in texts)


def style_of(names):
    """{name: (colour, hatch, dash, marker)}: by position, real always in grey, or black as a line."""
    others = [n for n in names if n != REFERENCE]
    styles = {n: (COLOURS[i % len(COLOURS)], HATCHES[1 + i % (len(HATCHES) - 1)], DASHES[i % len(DASHES)],
                  MARKERS[i % len(MARKERS)]) for i, n in enumerate(others)}
    styles[REFERENCE] = ("#BBBBBB", "", "-", "o")
    return styles


def name_rows(ax, samples):
    """One row per variant, the first on top."""
    labels = [f"{name}\nn = {len(v):,}" for name, v in zip(plain_names(samples), samples.values())]
    ax.set_yticks(range(len(samples)), labels)
    ax.set_ylim(len(samples) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)


def rows_figure(samples):
    row = 0.47 + 0.19 * line_count(map(plain, samples))
    return plt.subplots(figsize=(7.2, 1.2 + row * len(samples)), layout="constrained")


def box_figure(metric, samples, axis, styles, whiskers):
    """Box: quartiles and median; whiskers: percentiles; diamond: mean; a point for every image beyond the whiskers."""
    fig, ax = rows_figure(samples)
    title, unit, _ = METRICS[metric]
    rng = np.random.default_rng(0)                              # only spreads the points over the row's height
    for row, (name, values) in enumerate(samples.items()):
        colour, hatch, _, _ = styles[name]
        low, q1, median, q3, high = np.percentile(values, [whiskers[0], 25, 50, 75, whiskers[1]])
        beyond = values[((values < low) | (values > high)) & ~np.isnan(axis.place(values))]
        ax.scatter(beyond, row + rng.uniform(-0.13, 0.13, len(beyond)), s=3, color="#444444", alpha=0.35, linewidths=0,
                   rasterized=True)
        low, q1, median, q3, high, mean = (axis.clip(v) for v in (low, q1, median, q3, high, values.mean()))
        ax.hlines(row, low, q1, color="black", linewidth=1)
        ax.hlines(row, q3, high, color="black", linewidth=1)
        ax.vlines([low, high], row - 0.14, row + 0.14, color="black", linewidth=1)
        ax.barh(row, q3 - q1, left=q1, height=0.52, color=colour, edgecolor="black", linewidth=0.9, hatch=hatch)
        # A white rim keeps the median and mean visible on any colour and hatch.
        ax.vlines(median, row - 0.26, row + 0.26, color="white", linewidth=4.5)
        ax.vlines(median, row - 0.26, row + 0.26, color="black", linewidth=2)
        ax.plot(mean, row, "D", markersize=5.5, markerfacecolor="white", markeredgecolor="black")
    name_rows(ax, samples)
    axis.apply(ax, f"{title} ({unit})")
    return fig


def violin_figure(metric, samples, axis, styles):
    """Density of the values along the axis, each variant scaled to the same height; dashed: real's."""
    fig, ax = rows_figure(samples)
    title, unit, _ = METRICS[metric]
    densities = {name: density(axis.place(values), axis.low, axis.high) for name, values in samples.items()}
    for row, (name, values) in enumerate(samples.items()):
        colour, hatch, _, _ = styles[name]
        t, d = densities[name]
        x = 10 ** t if axis.log else t
        ax.fill_between(x, row - 0.42 * d, row + 0.42 * d, facecolor=colour, edgecolor="black", linewidth=0.8,
                        hatch=hatch, where=d > 0)
        if name != REFERENCE and REFERENCE in densities:
            t, d = densities[REFERENCE]
            for sign in (-1, 1):
                ax.plot(10 ** t if axis.log else t, row + sign * 0.42 * np.where(d > 0, d, np.nan), color="black",
                        linewidth=1.1, linestyle=(0, (4, 2)))
        q1, median, q3 = (axis.clip(v) for v in np.percentile(values, [25, 50, 75]))
        ax.hlines(row, q1, q3, color="white", linewidth=7)
        ax.hlines(row, q1, q3, color="black", linewidth=4)
        ax.plot(median, row, "o", markersize=6, markerfacecolor="white", markeredgecolor="black")
    name_rows(ax, samples)
    axis.apply(ax, f"{title} ({unit})")
    return fig


def density(t, low, high, bins=1024):
    """Positions t (NaN left out) -> a grid on [low, high] and a Gaussian kernel estimate there, largest value 1.

    Bandwidth 0.9 min(std, IQR / 1.34) n^(-1/5) (Silverman 1986), at least one bin; none of it beyond the data.
    """
    t = t[~np.isnan(t)]
    edges = np.linspace(low, high, bins + 1)
    grid = (edges[1:] + edges[:-1]) / 2
    if len(t) == 0:
        return grid, np.zeros(bins)
    counts = np.histogram(t, edges)[0].astype(float)
    spread = [s for s in (t.std(), np.subtract(*np.percentile(t, [75, 25])) / 1.34) if s > 0]
    width = 0.9 * min(spread, default=0) * len(t) ** -0.2
    d = gaussian_filter1d(counts, max(width * bins / (high - low), 1), mode="constant")
    half = (high - low) / bins
    d[(grid < t.min() - half) | (grid > t.max() + half)] = 0
    return grid, d / d.max()


def above_zero(estimate, resamples):
    return np.min(estimate) > 0 and np.min(resamples, initial=math.inf) > 0


def difference_figure(metric, names, results, styles, confidence):
    """Left: quantile by quantile, model against real, with the interval as a band; right: mean and median.

    The left is a ratio (logarithmic if it spans much) where every percentile is positive, of real in every resample
    too, else a difference.
    Returns the figure and whether the left is a ratio and the right relative.
    """
    title, unit, _ = METRICS[metric]
    row_labels, legend_labels = plain_names(names, 16), plain_names(names, 30)
    columns = min(len(names), 3 if max(map(len, names)) <= 16 else 2)
    legend_lines = max(sum(label.count("\n") + 1.2 for label in column) for column in np.array_split(legend_labels, columns))
    height = max(3.6, 1.9 + len(names) * max(0.5, 0.12 + 0.19 * line_count(row_labels)))
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, height + 0.18 * legend_lines), layout="constrained",
                                      gridspec_kw={"width_ratios": (1.25, 1)})
    # What is divided by must be positive in every resample too, or the band would have holes.
    ratio = all(r["percentiles"][0].min() > 0 and above_zero(*r["ref_percentiles"]) for r in results.values())
    relative = all(above_zero(*r["ref_mean"]) and above_zero(*r["ref_median"]) for r in results.values())

    ends = []
    for name, label in zip(names, legend_labels):
        r, (colour, _, dash, marker) = results[name], styles[name]
        (x, xs), (y, ys) = r["percentiles"], r["ref_percentiles"]
        curve, resamples = (x / y, xs / ys) if ratio else (x - y, xs - ys)
        low, high = percentile_interval(resamples, confidence)
        left.fill_between(PERCENTILES, low, high, color=colour, alpha=0.3, linewidth=0)
        left.plot(PERCENTILES, curve, color=colour, linestyle=dash, linewidth=2, marker=marker, markevery=(9, 20),
                  markersize=6, markeredgecolor="black", markeredgewidth=0.6, label=label)
        ends += [curve.min(), curve.max()]
    left.axhline(1 if ratio else 0, color="black", linewidth=1.2)
    if ratio and max(ends) > 3 * min(ends):
        left.set_yscale("log")
        log_ticks(left.yaxis, math.log10(max(*ends, 1) / min(*ends, 1)))
    left.set_xlabel("percentile of the images (%)")
    left.set_ylabel("model / real, same percentile (1 = equal)" if ratio
                    else f"model − real, same percentile\n({unit})")
    left.set_xlim(0, 100)
    left.grid(color="#DDDDDD", linewidth=0.6)
    left.set_title("Quantile by quantile", fontsize=10)

    for row, name in enumerate(names):
        r, (colour, _, _, marker) = results[name], styles[name]
        for field, shift, filled in (("mean", -0.15, True), ("median", 0.15, False)):
            (x, xs), (y, ys) = r[field], r[f"ref_{field}"]
            d, ds = (100 * (x / y - 1), 100 * (xs / ys - 1)) if relative else (x - y, xs - ys)
            low, high = percentile_interval(ds, confidence)
            right.hlines(row + shift, low, high, color="black", linewidth=2)
            right.plot(d, row + shift, marker, markersize=7, markeredgecolor="black",
                       markerfacecolor=colour if filled else "white")
    right.axvline(0, color="black", linewidth=1.2)
    right.set_yticks(range(len(names)), row_labels)
    right.set_ylim(len(names) - 0.45, -0.55)
    right.tick_params(axis="y", length=0)
    right.margins(x=0.12)
    right.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    right.set_axisbelow(True)
    right.set_xlabel("difference to real (% of real)" if relative else f"difference to real\n({unit})")
    right.set_title("Mean (filled) and median (open)", fontsize=10, loc="right")       # over the names, where they are long
    fig.suptitle(title, fontsize=11)
    # The texts afterwards: Matplotlib leaves out labels that begin with an underscore, 3.8 even those it is given.
    legend = fig.legend(left.lines[:len(names)], [name.lstrip("_") or "-" for name in legend_labels],
                        loc="outside lower center", frameon=False, handlelength=4, ncols=columns)
    for text, label in zip(legend.get_texts(), legend_labels):
        text.set_text(label)
    return fig, ratio, relative


def render(fig, kind, dpi):
    """A figure -> the bytes of a file, the same for the same figure."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, dpi=dpi, metadata={"CreationDate": None} if kind == "pdf" else None)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Text

def short(value):
    """A number to four significant digits, an en dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def with_interval(row, name):
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return short(row[name]) + (f" [{short(low)}, {short(high)}]" if math.isfinite(low) else "")


def metric_tables(rows):
    """[(name, summary_row)] -> [(header, cells)], as texts: statistics, and effect sizes where real is there."""
    tables = [(["variant", "n", "mean", "median", "p90", "std"],
               [[name, f"{row['n']:,}", with_interval(row, "mean"), with_interval(row, "median"), short(row["p90"]),
                 short(row["std"])] for name, row in rows])]
    against = [(name, row) for name, row in rows if "ks" in row]
    if against:
        std = dict(rows)[REFERENCE]["std"]
        tables.append((["against real", "mean − real", "median − real", "Wasserstein", "W / std of real", "KS",
                        "Cliff's δ"],
                       [[name, with_interval(row, "mean_difference"), with_interval(row, "median_difference"),
                         with_interval(row, "wasserstein"), short(row["wasserstein"] / std if std > 0 else None),
                         with_interval(row, "ks"), with_interval(row, "cliff")] for name, row in against]))
    return tables


def gives_fid(evaluation):
    """Is its Fréchet distance a FID? An evaluation that does not state its features is taken at its word."""
    protocol = evaluation["protocol"]
    return is_fid(protocol.get("features.name", ""), protocol.get("features.dims", "2048"))


def evaluation_table(evaluations):
    columns = [c for c in EVALUATION if any(c in e["metrics"] for e in evaluations)]
    titles = {c: EVALUATION[c][0] for c in columns}
    if not all(gives_fid(e) for e in evaluations if "fid" in e["metrics"]):
        titles["fid"] = "Fréchet distance"
    header = ["variant", *(f"{titles[c]} {EVALUATION[c][1]}" for c in columns), "file"]
    cells = []
    for e in evaluations:
        line = [short(e["metrics"].get(c)) for c in columns]
        if "kid" in columns and "kid" in e["metrics"] and "kid_std" in e["metrics"]:
            line[columns.index("kid")] += f" ± {short(e['metrics']['kid_std'])}"
        cells.append([e["tag"], *line, e["file"]])
    return header, cells


# Of a protocol, the columns of evaluation.csv; the report has all of it.
PROTOCOL_COLUMNS = {"real.images": "real_images", "fake.images": "fake_images", "real.split": "real_split",
                    "features.name": "features", "features.dims": "dims", "k": "k", "nearest_k": "nearest_k", "pca": "pca",
                    **{name: name for name in OF_MODEL}}


def evaluation_record(e):
    """A row of evaluation.csv: a Fréchet distance of other features than FID's has a column of its own."""
    metrics, protocol = {c: e["metrics"].get(c) for c in [*EVALUATION, "kid_std"]}, one_way_to_say_it(e["protocol"])
    if not gives_fid(e):
        metrics = {"frechet_distance": metrics["fid"], **metrics, "fid": None}
    # Of samples; what PR_Calculate.py calls seed is that of KID's subsets.
    seed = protocol.get("fake.manifest.seed", None if "fake.folder" in protocol else protocol.get("seed"))
    return {"variant": e["tag"], **metrics, **{name: protocol.get(key) for key, name in PROTOCOL_COLUMNS.items()},
            "seed": seed, "file": e["file"]}


def markdown(text):
    """Text that Markdown leaves as it is: no markup, links, HTML or table cells of its own."""
    return re.sub(r"([\\`*_<>!|$&~]|(?<=\])\()", r"\\\1", " ".join(str(text).split()))


def markdown_table(header, cells):
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in [header, *cells]]
    lines.insert(1, "|" + " --- |" + " ---: |" * (len(header) - 1))
    return "\n".join(lines)


def html_table(header, cells):
    def cell(text):                                             # an interval goes on a line of its own
        return re.sub(r"^(\S+) (\[\S+, \S+\])$", r"\1<br><small>\2</small>", html.escape(text))

    head = "".join(f"<th scope='col'>{html.escape(h)}</th>" for h in header)
    body = "".join(f"<tr><th scope='row'>{html.escape(first)}</th>" + "".join(f"<td>{cell(c)}</td>" for c in rest)
                   + "</tr>\n" for first, *rest in cells)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid #999; }
h3 { font-size: 1.05rem; margin-bottom: 0.3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ccc; text-align: right; vertical-align: top;
         overflow-wrap: normal; }
td, thead th { white-space: nowrap; }
thead th { border-bottom: 2px solid #111; }
tbody th, thead th:first-child { text-align: left; min-width: 7rem; overflow-wrap: anywhere; }
small { color: #444; }
figure { margin: 1.2rem 0; } figcaption { font-size: 0.88rem; color: #333; }
img { width: 100%; max-width: 50rem; height: auto; display: block; }
.warning { border: 2px solid #b00; padding: 0.4rem 1rem; margin: 1rem 0; }
dl { font-size: 0.88rem; } dt { font-weight: 600; margin-top: 0.5rem; } dd { margin-left: 1.2rem; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } table { font-size: 6.5pt; }
               th, td { padding: 0.12rem 0.25rem; } figure, table, .warning { break-inside: avoid; }
               h2, h3 { break-after: avoid; } .wide { overflow: visible; } }
"""


def html_report(title, sections):
    """sections: list of HTML fragments. One page without scripts that loads nothing."""
    return ("<!DOCTYPE html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
            "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
            "style-src 'unsafe-inline'\">\n"
            f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            f"<h1>{html.escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n")


def html_figure(png, caption, alt):
    data = base64.b64encode(png).decode("ascii")
    return (f"<figure><img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def html_warnings(warnings):
    if not warnings:
        return ""
    return "<div class='warning'>" + "".join(f"<p><strong>{html.escape(w)}</strong></p>" for w in warnings) + "</div>"


def html_details(items):
    """[(term, [texts])] as a definition list."""
    return "<dl>" + "".join(f"<dt>{html.escape(t)}</dt>" + "".join(f"<dd>{html.escape(x)}</dd>" for x in texts)
                            for t, texts in items) + "</dl>"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse_args(argv=None):
    def number(kind, low, high):
        def parse(text):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"expected {low} to {high}, not {text}")
            return value
        parse.__name__ = kind.__name__
        return parse

    parser = FlagParser(description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--cache_dir", default="./results/single_image_quality",
                       help="folder of the caches and evaluation JSONs")
    group.add_argument("--out_dir", default="./results/compare", help="where the report goes")
    group.add_argument("--model_order", default="",
                       help='variants in the order they are shown, as "VAE,CrossVampVAE,real"; the rest follow by name')
    group = parser.add_argument_group("statistics")
    group.add_argument("--bootstrap", type=number(int, 0, 100000), default=1000,
                       help="resamples for the intervals, 0 = no intervals")
    group.add_argument("--confidence", type=number(float, 50, 99.9), default=95.0,
                       help="per cent that an interval should cover")
    group.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0,
                       help="seed of the resamples")
    group = parser.add_argument_group("figures")
    group.add_argument("--scale", choices=("auto", "log", "linear"), default="auto",
                       help="value axis; auto: log for positive values with a long tail")
    group.add_argument("--whiskers", type=number(float, 0, 100), nargs=2, default=(1.0, 99.0), metavar=("LOW", "HIGH"),
                       help="percentiles the whiskers reach to")
    group.add_argument("--dpi", type=number(int, 40, 1200), default=160,
                       help="dots per inch of the PNG files, 7.2 inches wide")
    group.add_argument("--pdf", action="store_true", help="write each figure as PDF too")
    group = parser.add_argument_group("run time")
    group.add_argument("--workers", type=number(int, 1, 1024), default=None,
                       help="threads for the resamples; changes no number (default: the cores)")
    args = parser.parse_args(argv)
    if not args.whiskers[0] <= 25 or not args.whiskers[1] >= 75:
        parser.error("--whiskers: LOW must be at most 25 and HIGH at least 75, or they would end inside the box")
    return args


def load_variants(folder, model_order):
    """(tables in order, protocols, warnings), empty without caches. Raises UserError for one that cannot be used."""
    if not folder.is_dir():
        raise UserError(f"--cache_dir {folder}: no such folder")
    paths = {p.stem[len("cache_"):]: p for p in sorted(folder.glob("cache_*.csv"))}
    if not paths:
        return {}, {}, ["There is no cache_*.csv: the images' sharpness is not compared. Make them with csv_analysis.py."]
    names, unknown = order_names(paths, model_order)
    warnings = [f"--model_order names {u}, which has no cache; there are: {', '.join(sorted(paths))}" for u in unknown]
    tables, protocols = {}, {}
    for name in names:
        tables[name] = read_cache(paths[name])
        protocols[name], warning = read_protocol(paths[name])
        warnings += [warning] if warning else []
        if protocols[name] and protocols[name]["skipped"]:
            warnings.append(f"{name}: {protocols[name]['skipped']:,} unreadable files were left out of its cache")
    known = {n: {**p["definitions"], "image sizes (pixels)": ", ".join(p["sizes"])}
             for n, p in protocols.items() if p}
    for key, stated in differing(known).items():
        texts = "; ".join(f"{', '.join(who)}: {text}" for text, who in stated.items())
        warnings.append(f"The caches are not comparable, {key} differs: {texts}")
    if REFERENCE not in tables:
        warnings.append(f"There is no cache_{REFERENCE}.csv: no differences and effect sizes are given. Make it with "
                        f"csv_analysis.py --tag {REFERENCE}.")
    return tables, protocols, warnings


def analyse(tables, args):
    """{metric: {name: result of compare}} for every variant, against real where it is there."""
    reference = tables.get(REFERENCE)
    results = {m: {} for m in METRICS if any(m in t for t in tables.values())}

    def work(name):
        table = tables[name]
        out = {}
        # hf_ratio_ac is absent from older caches; the metrics that both sides have share their resamples.
        alone = name == REFERENCE or reference is None
        shared = [m for m in table if alone or m in reference]
        for columns, y in ((shared, None if alone else reference), ([m for m in table if m not in shared], None)):
            if columns:
                pairs = compare(table[columns].to_numpy(), None if y is None else y[columns].to_numpy(),
                                args.bootstrap, (args.seed, name, REFERENCE), tick=lambda: bar.update(1))
                out.update(zip(columns, pairs))
        return name, out

    with progress_bar(args.bootstrap * len(tables), "bootstrap", "resample", sum(map(len, tables.values())) >= 20000) as bar, \
            ThreadPoolExecutor(args.workers or cpu_count()) as pool:
        for name, out in pool.map(work, tables):
            for metric, result in out.items():
                results[metric][name] = result
    return results


def protocol_lines(tables, protocols, args):
    lines = []
    if args.bootstrap:
        kind = "percentile intervals; those of Wasserstein and KS reach as far as the same norm of the error of the two "\
               "distribution functions' difference, and hold between equal distributions too"
        lines.append(f"Intervals: {args.confidence:g} % bootstrap over images, B = {args.bootstrap:,} resamples of all "
                     f"n images (no subsampling), model and real resampled independently, seed {args.seed}, {kind}.")
    else:
        lines.append("Intervals: none (--bootstrap 0).")
    lines.append("Differences are variant minus real. Wasserstein: the Wasserstein-1 distance in the metric's unit. "
                 "KS: the Kolmogorov-Smirnov distance, 0 to 1. Cliff's δ: the chance that an image of the variant has "
                 "a larger value than a real one, minus the chance of a smaller one, −1 to 1. std is with N − 1.")
    items = []
    for name, table in tables.items():
        p = protocols[name]
        text = [f"N = {len(table):,}"]
        if p:
            r0 = p["definitions"].get("r0", "?")
            text.append(f"folder {p['folder']}; sizes {', '.join(f'{k} ({v:,})' for k, v in p['sizes'].items())}; "
                        f"{p['skipped']:,} unreadable files skipped; r0 = {r0}")
            if p["made_by"]:
                text.append("exported as " + ", ".join(f"{k} {str(v)[:12] if k == 'checkpoint_sha256' else v}"
                                                       for k, v in p["made_by"].items()))
        else:
            text.append("no fingerprint: definitions and folder unknown")
        items.append((name, text))
    return lines, items


def protocol_warnings(evaluations):
    """Sentences on what keeps evaluations from being compared, with one another or with published ones."""
    said = {f"{e['tag']} ({e['file']})": one_way_to_say_it(e["protocol"]) for e in evaluations}
    warnings = []
    for key, stated in differing(said, evaluation_key_matters).items():
        texts = "; ".join(f"{', '.join(who)}: {text}" for text, who in stated.items())
        warnings.append(f"The rows below are not comparable, {key} differs: {texts}")
    for key, stated in differing(said, DRAWN.__contains__).items():
        texts = "; ".join(f"{', '.join(who)}: {text}" for text, who in stated.items())
        warnings.append(f"The samples of the rows below were not drawn alike, {key} differs: {texts}")
    for e in evaluations:
        if "fid" in e["metrics"] and not gives_fid(e):
            dims, name = (e["protocol"].get(f"features.{key}", "?") for key in ("dims", "name"))
            warnings.append(f"{e['file']}: its Fréchet distance is of {dims} features of {name}, not of the published "
                            f"Inception's 2048: no FID, and not comparable with published ones")
        few = {side: e["protocol"].get(f"{side}.images", "") for side in ("real", "fake")}
        few = [f"{n} {side} images" for side, n in few.items() if n.isdecimal() and int(n) < FEW_IMAGES]
        if "fid" in e["metrics"] and few:
            warnings.append(f"{e['file']}: of {' and '.join(few)}, fewer than {FEW_IMAGES:,}: its distance is too high")
    return warnings


def evaluation_part(evaluations, warnings):
    """Table and protocols of the evaluations: HTML pieces, Markdown pieces, {file name: content}."""
    header, cells = evaluation_table(evaluations)
    details = [(f"{e['tag']} ({e['file']})",
                [f"{k}: {v}" for k, v in e["protocol"].items()] or ["no protocol stated"]) for e in evaluations]
    for (_, texts), e in zip(details, evaluations):
        if e["other"]:
            texts.append("also in this file: " + ", ".join(f"{k} = {short(v)}" for k, v in e["other"].items()))
    sections = ["<h2>Whole sets of images</h2>", html_warnings(warnings), html_table(header, cells),
                "<p>↓ lower is better, ↑ higher is better. Protocol of each row:</p>", html_details(details)]
    md = ["## Whole sets of images", *(f"**{markdown(w)}**" for w in warnings), markdown_table(header, cells),
          "\n".join(f"- {markdown(t)}: {markdown('; '.join(texts))}" for t, texts in details)]
    frame = pd.DataFrame([evaluation_record(e) for e in evaluations])
    return sections, md, {"evaluation.csv": frame.dropna(axis=1, how="all").to_csv(index=False, lineterminator="\n")}


def metric_figures(metric, samples, by_name, styles, args):
    """[(kind, figure, caption)] of one sharpness metric: samples {variant: values}, by_name as analyse has it, styles of
    style_of."""
    axis = Axis(samples, args.scale)
    figures = [("box", box_figure(metric, samples, axis, styles, args.whiskers),
                f"Box: quartiles and median; whiskers: percentiles {args.whiskers[0]:g} and {args.whiskers[1]:g}; "
                f"diamond: mean; a point for every image beyond the whiskers. {axis.note}"),
               ("violin", violin_figure(metric, samples, axis, styles),
                "Density along the axis, each scaled to the same height; bar: quartiles; circle: median"
                + ("; dashed: real. " if REFERENCE in samples else ". ") + axis.note)]
    against = {n: by_name[n] for n in samples if "ks" in by_name[n]}
    if against:
        fig, ratio, relative = difference_figure(metric, list(against), against, styles, args.confidence)
        caption = (("Left: the model's percentile divided by the same percentile of real" if ratio else
                    "Left: the model's percentile minus the same percentile of real")
                   + "; right: mean (filled) and median (open) minus real's"
                   + (", in per cent of real's." if relative else ".")
                   + (f" Bands and bars: {args.confidence:g} % bootstrap intervals, pointwise." if args.bootstrap else ""))
        figures.append(("difference", fig, caption))
    return figures


def metric_part(metric, by_name, tables, args):
    """Tables and figures of one sharpness metric: HTML pieces, Markdown pieces, {file name: content}, rows of summary.csv."""
    title, unit, meaning = METRICS[metric]
    names = [n for n in tables if n in by_name]
    samples = {n: tables[n][metric].to_numpy() for n in names}
    rows = [(n, summary_row(samples[n], by_name[n], args.confidence)) for n in names]
    numbers, figures = metric_tables(rows), metric_figures(metric, samples, by_name, style_of(tables), args)
    notes = [f"{n} has no {metric} in its cache (made by an older version) and is left out here."
             for n in tables if n not in by_name]
    if REFERENCE not in samples:
        notes.append(f"No difference plot: there is no {REFERENCE} to compare with.")
    sections = [f"<h2>{html.escape(title)} <small>({html.escape(metric)}, {html.escape(unit)})</small></h2>",
                f"<p>{html.escape(meaning)}</p>", *(html_table(*t) for t in numbers),
                *(f"<p>{html.escape(n)}</p>" for n in notes)]
    md = [f"## {title} ({markdown(metric)}, {markdown(unit)})", *(markdown_table(*t) for t in numbers), *map(markdown, notes)]
    files = {}
    for kind, fig, caption in figures:
        files[f"{kind}_{metric}.png"] = png = render(fig, "png", args.dpi)
        if args.pdf:
            files[f"{kind}_{metric}.pdf"] = render(fig, "pdf", args.dpi)
        plt.close(fig)
        sections.append(html_figure(png, caption, f"{kind} plot of {title} for {', '.join(names)}"))
    return sections, md, files, [{"metric": metric, "unit": unit, "variant": n, **row} for n, row in rows]


def write_report(out, files):
    """Write {name: content} into the folder, all or none: figures of this run beside tables of the last one would look like
    one result; what an earlier comparison left there besides is removed."""
    atomic_write_all({out / name: content if isinstance(content, bytes) else content.encode("utf-8", "replace")
                      for name, content in files.items()})
    for old in sorted(p for p in out.iterdir() if OUTPUT.fullmatch(p.name) and p.name not in files and p.is_file()):
        old.unlink(missing_ok=True)
        print(f"removed {old.name}, of an earlier comparison")


def main(argv=None):
    args = parse_args(argv)
    folder = Path(args.cache_dir)
    tables, protocols, warnings = load_variants(folder, args.model_order)
    evaluations, more = read_evaluations(folder)
    if not tables and not evaluations:
        raise UserError(f"--cache_dir {folder}: neither cache_*.csv nor evaluation JSONs there; make them with csv_analysis.py "
                        f"and test.py --evaluate")
    warnings += more + mixed_models(protocols, evaluations)
    tags, unknown = order_names([e["tag"] for e in evaluations], args.model_order)
    if not tables:                                        # else load_variants has said it
        warnings += [f"--model_order names {u}, which has no evaluation; there are: {', '.join(tags)}" for u in unknown
                     if u != REFERENCE]
    evaluations.sort(key=lambda e: (tags.index(e["tag"]), e["file"]))
    not_comparable = protocol_warnings(evaluations)
    out = writable_folder(args.out_dir, "--out_dir")
    for w in warnings + not_comparable:
        print("warning: " + " ".join(w.split()), file=sys.stderr)

    results = analyse(tables, args)
    variants = list(dict.fromkeys([*tables, *(e["tag"] for e in evaluations)]))
    counted = len(set(variants) - {REFERENCE})
    counted = f"{counted} variant{'s' if counted != 1 else ''}"
    heading = f"Comparison of {counted}"
    sections = [f"<p>{html.escape(', '.join(variants))}</p>", html_warnings(warnings)]
    md = [f"# {heading}", markdown(", ".join(variants)), *(f"**{markdown(w)}**" for w in warnings)]
    files, records = {}, []

    def add(more_sections, more_md, more_files=(), more_records=()):
        sections.extend(more_sections)
        md.extend(more_md)
        files.update(more_files)
        records.extend(more_records)

    if evaluations:
        add(*evaluation_part(evaluations, not_comparable))
    for metric, by_name in results.items():
        add(*metric_part(metric, by_name, tables, args))
    if tables:
        lines, items = protocol_lines(tables, protocols, args)
        add(["<h2>Protocol</h2>", *(f"<p>{html.escape(line)}</p>" for line in lines), html_details(items)],
            ["## Protocol", *map(markdown, lines),
             "\n".join(f"- {markdown(n)}: {markdown('; '.join(texts))}" for n, texts in items)])
        files["summary.csv"] = pd.DataFrame(records).to_csv(index=False, lineterminator="\n")
    files["summary.md"] = "\n\n".join(md) + "\n"
    files["report.html"] = html_report(heading, sections)
    write_report(out, files)

    sizes = Counter(Path(name).suffix[1:] for name in files)
    print(f"{out / 'report.html'}: {counted}, {len(results)} metrics, {sizes['png']} figures")


if __name__ == "__main__":
    run(main)
