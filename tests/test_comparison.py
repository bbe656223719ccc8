"""comparison.py: statistics against SciPy and brute force, the report, and the command line."""
import base64
import html.parser
import io
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

import comparison
import utils
from comparison import METRICS, Axis, compare, distance_interval, order_names, percentile_interval, read_cache
from utils import UserError, sha256_file, write_json

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "comparison.py")


def sample(n, shift=0.0, seed=0):
    """A plausible cache: long tails, ratios below 1."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"lap_var": np.exp(rng.normal(-3.5 + shift, 0.8, n)),
                         "tenengrad": np.exp(rng.normal(-0.7 + shift, 0.6, n)),
                         "hf_ratio": rng.beta(2, 40, n), "hf_ratio_ac": rng.beta(4, 12, n)})


def write_caches(folder, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"cache_{name}.csv", index=False)
    return folder


def write_evaluation(folder, name, metrics, protocol, **more):
    write_json(folder / name, {"metrics": metrics, "protocol": protocol, **more})


class Page(html.parser.HTMLParser):
    """What a browser would see of a report."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag != "style":
            self.text += data

    def images(self):
        return [base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for t, a in self.tags if t == "img"]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

@pytest.mark.parametrize("n, m, ties", [(1, 1, False), (7, 4, False), (200, 300, False), (200, 150, True), (9, 1, True),
                                        (5000, 4000, False)])
def test_effect_sizes_match_scipy_and_brute_force(n, m, ties):
    rng = np.random.default_rng(n)
    x, y = rng.gamma(2, 1, n), rng.gamma(3, 1, m)
    if ties:
        x, y = x.round(), y.round()
    got = {k: e for k, (e, _) in compare(x[:, None], y[:, None], B=0)[0].items()}
    assert got["wasserstein"] == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-9)
    assert got["ks"] == pytest.approx(stats.ks_2samp(x, y).statistic, rel=1e-9)
    assert got["cliff"] == pytest.approx(np.sign(x[:, None] - y[None]).mean(), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101, 1234])
def test_estimates_match_numpy(n):
    x = np.random.default_rng(n).normal(size=n)
    got = compare(x[:, None], B=0)[0]
    assert got["mean"][0] == pytest.approx(x.mean()) and got["median"][0] == pytest.approx(np.median(x))
    want = np.sort(x)[[math.ceil(p * n / 100 - 1e-9) - 1 for p in range(1, 100)]]
    assert np.array_equal(got["percentiles"][0], want)


def test_resamples_are_those_of_whole_images():
    """Each resample equals the statistics of the images that it drew, computed the long way."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)).round(1), rng.normal(size=(30, 2)).round(1)
    drawn = []

    class Recorder:
        def __init__(self, seed):
            self.rng, self.mine = real_rng(seed), []
            drawn.append(self.mine)

        def integers(self, *args):
            self.mine.append(self.rng.integers(*args))
            return self.mine[-1]

    real_rng = np.random.default_rng
    try:
        np.random.default_rng = Recorder
        got = compare(x, y, B=20)
    finally:
        np.random.default_rng = real_rng
    for b, (i, k) in enumerate(zip(*drawn, strict=True)):
        assert len(i) == 40 and len(k) == 30
        for metric in range(2):
            g, xs, ys = {f: r[b] for f, (_, r) in got[metric].items()}, x[i, metric], y[k, metric]
            want = {"mean": xs.mean(), "median": np.median(xs), "ref_mean": ys.mean(), "ref_median": np.median(ys),
                    "cliff": np.sign(xs[:, None] - ys[None]).mean()}
            # How far the difference of the two distribution functions has moved, at every value.
            v = np.unique(np.concatenate([x[:, metric], y[:, metric]]))
            moved = sum(sign * (s[:, None] <= v).mean(0) for sign, s in ((1, xs), (-1, ys), (-1, x[:, metric]),
                                                                        (1, y[:, metric])))
            want |= {"wasserstein": (np.abs(moved)[:-1] * np.diff(v)).sum(), "ks": np.abs(moved).max()}
            for field, value in want.items():
                assert g[field] == pytest.approx(value, abs=1e-12), field
            assert np.array_equal(g["percentiles"][[9, 49]], np.sort(xs)[[3, 19]])
            assert np.array_equal(g["ref_percentiles"][[9, 49]], np.sort(ys)[[2, 14]])


def test_interval_of_the_mean_has_the_width_theory_gives():
    x = np.random.default_rng(1).normal(3, 2, (400, 1))
    estimate, resamples = compare(x, B=2000)[0]["mean"]
    low, high = percentile_interval(resamples, 95)
    standard_error = x.std(ddof=1) / 20
    assert low < estimate < high
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.08)
    narrow = np.diff(percentile_interval(resamples, 80))[0]
    assert narrow / 2 == pytest.approx(1.2816 * standard_error, rel=0.08)


def test_distance_interval():
    assert distance_interval(0.5, np.linspace(0, 0.2, 1001), 90, 1) == pytest.approx([0.32, 0.68])
    assert distance_interval(0.95, np.linspace(0, 0.2, 1001), 50, 1).tolist() == pytest.approx([0.85, 1.0])
    assert distance_interval(0.1, np.linspace(0, 0.2, 1001), 90, 1).tolist() == pytest.approx([0.0, 0.28])
    assert np.isnan(distance_interval(0.1, np.empty(0), 90, 1)).all()


@pytest.mark.parametrize("scale, w1, ks", [(1, 0, 0), (1.1, 0.2, 0.0516), (2, 2, 0.3608)])
def test_distance_interval_covers(scale, w1, ks):
    """Of samples of two gamma distributions whose distances are known; between equal ones, where a percentile or a basic
    interval of the resampled distances misses 0 far too often, and between nearly equal ones too."""
    grid = np.linspace(0, 60, 100001)
    apart = np.abs(stats.gamma(2).cdf(grid) - stats.gamma(2, scale=scale).cdf(grid))
    assert (w1, ks) == pytest.approx((apart.sum() * grid[1], apart.max()), abs=1e-3)
    covered = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        r = compare(rng.gamma(2, 1, (150, 1)), rng.gamma(2, scale, (150, 1)), B=200, key=(seed, "x", "y"))[0]
        intervals = [distance_interval(*r[name], 90, top) for name, top in (("wasserstein", math.inf), ("ks", 1))]
        covered.append([low <= truth <= high for (low, high), truth in zip(intervals, (w1, ks))])
    assert (np.mean(covered, 0) >= 0.84).all()                  # 90 % less three standard errors of 200 draws


def test_draws_depend_on_seed_and_names_only():
    x, y = sample(50).to_numpy(), sample(60, seed=1).to_numpy()
    first = compare(x, y, 30, (0, "a", "real"))
    again = compare(x[:, :2], y[:, :2], 30, (0, "a", "real"))
    for j in range(2):
        assert np.array_equal(first[j]["ks"][1], again[j]["ks"][1])
    for key in ((1, "a", "real"), (0, "b", "real")):
        assert not np.array_equal(first[0]["mean"][1], compare(x, y, 30, key)[0]["mean"][1])
    same = compare(x, x, 30, (0, "real", "real"))[0]            # even alike, the two sides are drawn independently
    assert not np.array_equal(same["mean"][1], same["ref_mean"][1])


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def test_order_names():
    names = ["real", "b", "VAE", "a"]
    assert order_names(names, "VAE, nix,real,VAE") == (["VAE", "real", "a", "b"], ["nix"])
    assert order_names(names, "") == (["VAE", "a", "b", "real"], [])


@pytest.mark.parametrize("text, what", [
    ("", "cannot be read"), ("lap_var,tenengrad,hf_ratio\n", "no rows"), ("lap_var,hf_ratio\n1,0.5\n", "tenengrad"),
    ("lap_var,tenengrad,hf_ratio\n1,1,0.5\n1,x,0.5\n", "row 2, column tenengrad: 'x'"),
    ("lap_var,tenengrad,hf_ratio\n1,,0.5\n", "row 1, column tenengrad"),
    ("lap_var,tenengrad,hf_ratio\nnan,1,0.5\n", "row 1, column lap_var"),
    ("lap_var,tenengrad,hf_ratio\ninf,1,0.5\n", "row 1, column lap_var"),
    ("lap_var,tenengrad,hf_ratio\n1e308,1,0.5\n", "'1e308'"),
    ("lap_var,tenengrad,hf_ratio\n-1,1,0.5\n", "'-1'"), ("lap_var,tenengrad,hf_ratio\n1,1,1.5\n", "'1.5'"),
    ("lap_var,tenengrad,hf_ratio,hf_ratio_ac\n1,1,0.5,-\n", "hf_ratio_ac"), ("\0\0\0", "column"),
])
def test_bad_caches_are_one_line_and_exit_code_2(tmp_path, script, text, what):
    folder = write_caches(tmp_path / "in", real=sample(5))
    (folder / "cache_bad.csv").write_text(text)
    with pytest.raises(UserError):
        read_cache(folder / "cache_bad.csv")
    code, stdout, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out")
    assert code == 2 and stdout == "" and not (tmp_path / "out").exists()
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and "cache_bad.csv" in stderr and what in stderr


@pytest.mark.parametrize("case", ["missing", "empty", "file", "out_is_a_file"])
def test_bad_folders_are_one_line_and_exit_code_2(tmp_path, script, case):
    folder, out = tmp_path / "in", tmp_path / "out"
    if case == "empty":
        folder.mkdir()
        (folder / "real_statistics.csv").write_text("x")
    elif case == "file":
        folder.write_text("x")
    elif case == "out_is_a_file":
        write_caches(folder, real=sample(5))
        out.write_text("x")
    code, stdout, stderr = script("--cache_dir", folder, "--out_dir", out)
    assert code == 2 and stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert str(out if case == "out_is_a_file" else folder) in stderr and not out.is_dir()


@pytest.mark.parametrize("flags", [("--bootstrap", "-1"), ("--confidence", "100"), ("--whiskers", "30", "99"),
                                   ("--scale", "cubic"), ("--dpi", "1")])
def test_flags_out_of_range_are_refused(tmp_path, script, flags):
    code, _, stderr = script("--cache_dir", write_caches(tmp_path / "in", real=sample(5)), "--out_dir",
                             tmp_path / "out", *flags)
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert code == 2 and flags[0] in stderr and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Figures

def test_axis_is_logarithmic_for_long_tails_only():
    rng = np.random.default_rng(0)
    assert Axis({"a": np.exp(rng.normal(0, 1, 500))}, "auto").log
    assert not Axis({"a": rng.normal(10, 1, 500)}, "auto").log
    assert not Axis({"a": np.exp(rng.normal(0, 1, 500)) * (rng.random(500) > 0.1)}, "auto").log     # a tenth is 0
    assert not Axis({"a": np.exp(rng.normal(0, 1, 500))}, "linear").log
    assert Axis({"a": rng.normal(10, 1, 500)}, "log").log
    zeros = Axis({"a": np.zeros(5)}, "log")
    assert not zeros.log and zeros.note.startswith("Linear, since no value is above 0.")
    beside = Axis({"a": np.zeros(5), "b": np.exp(rng.normal(0, 1, 500))}, "log")         # one such variant changes nothing
    assert beside.log and "a: 5 of 5 are 0" in beside.note and "Linear" not in beside.note
    for value in (0.0, 3.0):                                    # a constant still has an axis of some length around it
        axis = Axis({"a": np.full(5, value)}, "auto")
        assert axis.low < value < axis.high


def test_axis_says_what_it_leaves_out():
    values = np.exp(np.random.default_rng(0).normal(0, 0.7, 4000))
    assert Axis({"a": values}, "auto").note == "Every image is within the axis."
    values[:3], values[3] = 0, 1e6
    axis = Axis({"a": values, "b": values[4:]}, "auto")
    assert axis.log and "a: 3 of 4,000 are 0" in axis.note and "a: 1 of 4,000 (from 1e+06 to 1e+06)" in axis.note
    assert "b:" not in axis.note
    assert np.isnan(axis.place(values)).sum() == 4
    linear = Axis({"a": values}, "linear")
    assert np.isnan(linear.place(values)).sum() == 1 and "1 of 4,000" in linear.note and "are 0" not in linear.note


def test_box_figure_shows_quartiles_whiskers_and_every_outlier():
    values = np.exp(np.random.default_rng(0).normal(0, 1, 1000))
    samples = {"VAE": values, "real": values * 2}
    fig = comparison.box_figure("lap_var", samples, Axis(samples, "auto"), comparison.style_of(samples), (1, 99))
    ax = fig.axes[0]
    boxes = [p for p in ax.patches if p.get_width() > 0]
    for box, v in zip(boxes, samples.values()):
        assert [box.get_x(), box.get_x() + box.get_width()] == pytest.approx(np.percentile(v, [25, 75]))
    points = [c.get_offsets() for c in ax.collections if c.get_offsets().shape[0] > 1 and hasattr(c, "get_sizes")
              and len(c.get_sizes())]
    assert [len(p) for p in points] == [20, 20]                 # 1 % on either side
    assert ax.get_ylim()[0] > ax.get_ylim()[1]                  # the first variant on top
    assert "grey level²" in ax.get_xlabel() and "logarithmic" in ax.get_xlabel()
    plt.close(fig)


def test_density_is_a_density_on_the_data_only():
    t = np.random.default_rng(0).normal(0, 1, 20000)
    grid, d = comparison.density(t, -8, 8)
    assert d.max() == 1
    want = np.exp(-grid ** 2 / 2)
    inside = (grid > t.min() + 0.1) & (grid < t.max() - 0.1)
    assert np.abs(d - want)[inside].max() < 0.06
    assert (d[(grid < t.min() - 0.02) | (grid > t.max() + 0.02)] == 0).all()
    for flat in (np.full(5, 2.0), np.full(5, np.nan)):
        assert np.isfinite(comparison.density(flat, 1, 3)[1]).all()


@pytest.mark.parametrize("zeros", [0, 2, 10])
def test_difference_figure_shows_the_quantile_ratio_or_difference(zeros):
    x, y = sample(300, -0.5), sample(300, seed=1)
    y.loc[y.index < zeros, "lap_var"] = 0       # then the lowest percentiles have no ratio; of 2, only those of resamples
    result = compare(x[["lap_var"]].to_numpy(), y[["lap_var"]].to_numpy(), B=20)[0]
    fig, ratio, relative = comparison.difference_figure("lap_var", ["m"], {"m": result}, comparison.style_of("m"), 95)
    curve = fig.axes[0].lines[0].get_ydata()
    a, b = (np.sort(v["lap_var"])[3 * np.arange(1, 100) - 1] for v in (x, y))
    assert ratio == (not zeros) and relative and np.isfinite(fig.axes[0].collections[0].get_paths()[0].vertices).all()
    np.testing.assert_allclose(curve, a / b if ratio else a - b, rtol=1e-12)
    mean = fig.axes[1].lines[0].get_xdata()[0]
    assert mean == pytest.approx(100 * (x.lap_var.mean() / y.lap_var.mean() - 1))
    plt.close(fig)


def test_long_names_keep_both_ends_and_have_room():
    names = [f"CrossVampVAE_cifar10_flow_length_8_components_500_lr_{lr}_beta_0.2_warmup_20_seed_{s}" for lr in
             ("1e-3", "1e-4", "3e-4") for s in (0, 1)]
    assert len({comparison.plain(n) for n in names[:4]}) == 4
    for width in (16, 22, 30):
        texts = [comparison.plain(n, width) for n in names]
        assert all(len(t.splitlines()) <= 3 and max(map(len, t.splitlines())) <= width for t in texts)
        assert all(t.startswith("CrossVampVAE") and t.endswith(n[-4:]) for t, n in zip(texts, names))
    names.append("_begins with an underscore")
    assert comparison.plain("short") == "short" and comparison.plain(" ") == " "
    alike = [f"one_family_{'x' * 60}{i}{'x' * 60}_end" for i in "ab"]
    assert comparison.plain(*alike[:1]) == comparison.plain(*alike[1:])
    assert [t[-8:] for t in comparison.plain_names(["short", *alike])] == ["short", "_end (2)", "_end (3)"]
    x, y = sample(50)[["lap_var"]].to_numpy(), sample(50, seed=1)[["lap_var"]].to_numpy()
    fig, *_ = comparison.difference_figure("lap_var", names, {n: compare(x, y, B=5)[0] for n in names},
                                           comparison.style_of(names), 95)
    fig.draw_without_rendering()
    labels = [t.get_window_extent() for t in fig.axes[1].get_yticklabels()]
    assert all(upper.y0 - lower.y1 > 24 for upper, lower in zip(labels, labels[1:]))            # pixels: two lines of text
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [comparison.plain(n, 30) for n in names]
    legend = fig.legends[0].get_window_extent()
    assert legend.y0 >= 0 and legend.y1 < fig.axes[0].xaxis.label.get_window_extent().y0
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

ODD = "$x^2$ <b>&|_it_"


def test_command_writes_report_tables_and_figures(tmp_path):
    tables = {"VAE": sample(300, -1), "CrossVampVAE": sample(250, -0.3, 1), "real": sample(400, 0, 2),
              ODD: sample(60, 0.2, 3)[["lap_var", "tenengrad", "hf_ratio"]]}
    tables["VAE"].insert(0, "file", [f"{i},.png" for i in range(300)])
    folder = write_caches(tmp_path / "in", **tables)
    protocol = {"n_fake": 50000, "features": {"name": "inception"}, "k": 3, "note": "<i>"}
    write_evaluation(folder, "evaluation_VAE.json", {"fid": 91.25, "kid": 0.05, "kid_std": 0.002, "recall": None,
                                                     "precision": 0.625, "prior_gap": 12.5}, protocol)
    write_evaluation(folder, "pr_x.json", {"fid": 61.5, "coverage": 0.75}, protocol, tag="CrossVampVAE")
    (folder / "cache_VAE.json").write_text('{"definitions": 1}')
    (folder / "other.json").write_text("{")
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, SCRIPT, "--cache_dir", folder, "--out_dir", out, "--bootstrap", "60",
                           "--model_order", "VAE,nix,CrossVampVAE,real", "--dpi", "60", "--pdf"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: --model_order names nix") and done.stderr.count("\n") == 3
    assert "cache_VAE.json is no fingerprint" in done.stderr and "other.json is damaged" in done.stderr
    assert all(name in done.stderr for name in tables)

    figures = [f"{kind}_{metric}" for metric in METRICS for kind in ("box", "violin", "difference")]
    assert sorted(os.listdir(out)) == sorted(["report.html", "summary.csv", "summary.md", "evaluation.csv",
                                              *(f + ".png" for f in figures), *(f + ".pdf" for f in figures)])
    for f in figures:
        assert Image.open(out / f"{f}.png").size[0] == 432 and (out / f"{f}.pdf").read_bytes()[:5] == b"%PDF-"

    summary = pd.read_csv(out / "summary.csv")
    assert summary[summary.metric == "lap_var"].variant.tolist() == ["VAE", "CrossVampVAE", "real", ODD]
    assert summary[summary.metric == "hf_ratio_ac"].variant.tolist() == ["VAE", "CrossVampVAE", "real"]
    for _, row in summary.iterrows():
        x, y = tables[row.variant][row.metric], tables["real"][row.metric]
        assert row.n == len(x) and row["std"] == pytest.approx(x.std()) and row.p90 == pytest.approx(x.quantile(0.9))
        assert row.mean_low < row["mean"] < row.mean_high and row.median_low <= row["median"] <= row.median_high
        if row.variant == "real":
            assert math.isnan(row.wasserstein)
        else:
            assert row.wasserstein == pytest.approx(stats.wasserstein_distance(x, y))
            assert row.ks == pytest.approx(stats.ks_2samp(x, y).statistic)
            assert row.mean_difference == pytest.approx(x.mean() - y.mean())
            assert row.cliff_low <= row.cliff <= row.cliff_high

    page = Page(out / "report.html")
    assert page.images() == [(out / f"{f}.png").read_bytes() for f in figures]
    used = {tag for tag, _ in page.tags}
    assert not used & {"script", "link", "iframe", "b", "i", "base", "object"}
    assert not [a for t, a in page.tags if t != "img" and ("src" in a or "href" in a)]
    assert "http:" not in page.source and "https:" not in page.source and "url(" not in page.source
    for text in (ODD, "--model_order names nix", "B = 60", "seed 0", "n_fake: 50000", "note: <i>", "prior_gap = 12.5",
                 "0.05 ± 0.002", "95 % bootstrap", "has no hf_ratio_ac"):
        assert text in page.text, text
    assert "not comparable" not in page.text
    assert all(a["alt"] for t, a in page.tags if t == "img")

    evaluation = pd.read_csv(out / "evaluation.csv")
    assert evaluation.variant.tolist() == ["VAE", "CrossVampVAE"] and evaluation.fid.tolist() == [91.25, 61.5]
    assert math.isnan(evaluation.coverage[0]) and "recall" not in evaluation
    text = (out / "summary.md").read_text()
    assert re.search(r"\| VAE \| 91.25 \| 0.05 ± 0.002 \| 0.625 \| – \| evaluation\\_VAE.json \|", text)
    assert r"\$x^2\$ \<b\>\&\|\_it\_" in text
    for line in text.splitlines():
        if line.startswith("| VAE | 300"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 7


def test_without_real_there_are_no_differences(tmp_path, script):
    folder = write_caches(tmp_path / "in", VAE=sample(30))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "violin_lap_var.pdf").mkdir()           # somebody's own, whatever it is called
    for name in ("difference_lap_var.png", "box_hf_ratio.pdf", "evaluation.csv", "box_mine.png", "notes.txt"):
        (tmp_path / "out" / name).write_text("of an earlier comparison, or somebody's own")
    code, stdout, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    assert code == 0 and "no cache_real.csv" in stderr and "removed difference_lap_var.png" in stdout
    ours = [f"{kind}_{m}.png" for m in METRICS for kind in ("box", "violin")]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["violin_lap_var.pdf", "box_mine.png", "notes.txt", *ours,
                                                           "report.html", "summary.csv", "summary.md"])
    page = Page(tmp_path / "out" / "report.html")
    assert "No difference plot" in page.text and "no cache_real.csv" in page.text and "Wasserstein-1" in page.text
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert "ks" not in summary and summary.mean_low.isna().all() and not (tmp_path / "out" / "evaluation.csv").exists()


def test_tiny_constant_and_extreme_values_are_drawn(tmp_path, script):
    one = sample(1)
    zero = pd.DataFrame(np.zeros((40, 4)), columns=list(METRICS))
    wild = sample(300)
    wild.loc[0, "lap_var"], wild.loc[1, "lap_var"] = 1e9, 1e-30
    folder = write_caches(tmp_path / "in", one=one, zero=zero, wild=wild, real=sample(50, seed=5))
    code, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 5, "--dpi", 40)
    assert code == 0 and "Warning" not in stderr and "Traceback" not in stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 12
    assert "1e+09" in Page(tmp_path / "out" / "report.html").text


def test_evaluations_alone_are_compared(tmp_path, script):
    (tmp_path / "in").mkdir()
    flags = ("--cache_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--model_order", "b,a,real")
    code, _, stderr = script(*flags)
    assert code == 2 and "neither cache_*.csv nor evaluation JSONs" in stderr and not (tmp_path / "out").exists()
    for tag, fid in (("a", 1.0), ("b", 2.0)):
        write_evaluation(tmp_path / "in", f"evaluation_{tag}.json", {"fid": fid}, {"k": 3}, tag=tag)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.csv").write_text("of an earlier comparison")
    code, stdout, stderr = script(*flags)
    assert code == 0 and "2 variants" in stdout and stderr.count("\n") == 1 and "no cache_*.csv" in stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["evaluation.csv", "report.html", "summary.md"]
    assert pd.read_csv(tmp_path / "out" / "evaluation.csv").fid.tolist() == [2, 1]
    for text in (Page(tmp_path / "out" / "report.html").text, (tmp_path / "out" / "summary.md").read_text()):
        assert "Comparison of 2 variants" in text and "b, a" in text and "sharpness is not" in text and "Intervals" not in text
    code, _, stderr = script(*flags[:-1], "b,c")
    assert code == 0 and "--model_order names c, which has no evaluation; there are: b, a" in stderr


def test_distances_that_are_no_published_fid_are_said(tmp_path, script):
    """Of a stand-in for Inception, of other features, of few images."""
    published = {"name": "pytorch-fid InceptionV3 (pt_inception-2015-12-05-6726825d.pth)", "dims": 2048}
    many = {"real": {"images": 50000}, "fake": {"images": 50000}}
    cases = {"good": {"features": published, **many}, "few": {"features": published, **many, "fake": {"images": 8}},
             "stand_in": {"features": {**published, "name": f"InceptionV3 (x.pth, {utils.STAND_IN})"}, **many},
             "other": {"features": {**published, "dims": 64}, **many}}
    for tag, protocol in cases.items():
        (tmp_path / tag).mkdir()
        write_evaluation(tmp_path / tag, f"evaluation_{tag}.json", {"fid": 3.0}, protocol, tag=tag)
        code, _, stderr = script("--cache_dir", tmp_path / tag, "--out_dir", tmp_path / "out")
        assert code == 0
        assert ("of 8 fake images, fewer than 2,048" in stderr) == (tag == "few")
        assert ("no FID, and not comparable with published ones" in stderr) == (tag in ("stand_in", "other"))
        row = pd.read_csv(tmp_path / "out/evaluation.csv").iloc[0]
        assert row.get("fid", math.nan) == 3 or (row.frechet_distance == 3 and tag in ("stand_in", "other"))
        heading = "FID ↓" if tag in ("good", "few") else "Fréchet distance ↓"
        assert heading in Page(tmp_path / "out/report.html").text


def test_samples_that_were_not_drawn_alike_are_said(tmp_path, script):
    """Whichever script measured them; rows that say nothing of it are taken to be alike."""
    (tmp_path / "in").mkdir()
    manifest = {"kind": "samples", "temperature": 0.7, "weights": "raw"}
    for tag, protocol in (("pr", {"fake": {"folder": "f", "manifest": manifest}}), ("foreign", {"fake": {"folder": "f"}}),
                          ("ours", {"weights": "raw", "fake": {"temperature": 0.7}})):
        write_evaluation(tmp_path / "in", f"evaluation_{tag}.json", {"fid": 3.0}, protocol, tag=tag)
    flags = ("--cache_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--model_order", "ours,pr,foreign")
    assert "drawn alike" not in script(*flags)[2]
    write_evaluation(tmp_path / "in", "evaluation_ours.json", {"fid": 3.0}, {"weights": "ema", "fake": {"temperature": 1.0}},
                     tag="ours")
    _, _, stderr = script(*flags)
    for said in ("temperature differs: ours (evaluation_ours.json): 1.0; pr (evaluation_pr.json): 0.7",
                 "weights differs: ours (evaluation_ours.json): ema; pr (evaluation_pr.json): raw"):
        assert f"were not drawn alike, {said}" in stderr and said in Page(tmp_path / "out/report.html").text


def test_every_variant_is_counted_and_the_reference_is_none(tmp_path, script):
    write_caches(tmp_path / "in", a=sample(20), real=sample(20, seed=1))
    for tag in ("a", "b"):
        write_evaluation(tmp_path / "in", f"evaluation_{tag}.json", {"fid": 3.0}, {}, tag=tag)
    code, stdout, _ = script("--cache_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--dpi", 40, "--bootstrap", 5)
    assert code == 0 and "report.html: 2 variants, " in stdout
    assert "# Comparison of 2 variants\n\na, real, b\n" in (tmp_path / "out/summary.md").read_text()


def test_seed_is_that_of_the_samples(tmp_path, script):
    """PR_Calculate.py's own is of the subsets for KID."""
    (tmp_path / "in").mkdir()
    for tag, protocol in (("ours", {"seed": 1}), ("pr", {"seed": 0, "fake": {"folder": "f", "manifest": {"seed": 1}}}),
                          ("foreign", {"seed": 0, "fake": {"folder": "f"}})):
        write_evaluation(tmp_path / "in", f"evaluation_{tag}.json", {"fid": 3.0}, protocol, tag=tag)
    assert script("--cache_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--model_order", "ours,pr,foreign")[0] == 0
    assert pd.read_csv(tmp_path / "out/evaluation.csv").seed.fillna(-1).tolist() == [1, 1, -1]


def test_a_variant_looks_the_same_in_every_figure(tmp_path, monkeypatch):
    """Where another one lacks a metric too."""
    write_caches(tmp_path / "in", a=sample(20).drop(columns="hf_ratio_ac"), b=sample(20), real=sample(20, seed=1))
    seen, plain = {}, comparison.violin_figure
    monkeypatch.setattr(comparison, "violin_figure", lambda metric, samples, axis, styles: seen.update(
        {metric: (list(samples), styles["b"])}) or plain(metric, samples, axis, styles))
    flags = ("--cache_dir", tmp_path / "in", "--out_dir", tmp_path / "out", "--dpi", 40, "--bootstrap", 5)
    comparison.main(list(map(str, flags)))
    assert seen["hf_ratio_ac"][0] == ["b", "real"] and seen["lap_var"][0] == ["a", "b", "real"]
    assert len({style for _, style in seen.values()}) == 1


def test_evaluations_with_different_protocols_are_not_comparable(tmp_path):
    base = {"real": {"images": 50000, "folder": "a", "content": "c"}, "features": {"name": "inception"}, "k": 3, "pca": "none",
            "checkpoint": "a", "checkpoint_sha256": "1", "fake": {"distinct_images": 9, "manifest": {"count": 9}}}
    same = {**base, "checkpoint_sha256": "2", "fake": {"distinct_images": 8, "manifest": {"count": 8}}, "seed": 5,
            "real": {"images": 50000, "folder": "b", "content": "c"}}
    for change in ({}, {"k": 5}, {"pca": "256 dimensions"}, {"features": {"name": "vgg16"}},
                   {"real": {"images": 10000, "content": "c"}}, {"real": {"images": 50000, "content": "other images"}}):
        for old in tmp_path.glob("*.json"):
            old.unlink()
        write_evaluation(tmp_path, "evaluation_a.json", {"fid": 1}, base)
        write_evaluation(tmp_path, "pr_b.json", {"fid": 2}, {**same, **change})
        write_evaluation(tmp_path, "bare.json", {"fid": True, "kid": "x", "recall": 0.5}, None)
        (tmp_path / "list.json").write_text("[1]")
        (tmp_path / "evaluation_c.json").write_text("[" * 100000)
        found, warnings = comparison.read_evaluations(tmp_path)
        assert [e["tag"] for e in found] == ["bare", "a", "b"] and found[0]["metrics"] == {"recall": 0.5}
        assert len(warnings) == 2 and "evaluation_c.json" in warnings[0] and "list.json" in warnings[1]
        differ = comparison.differing({e["tag"]: e["protocol"] for e in found}, comparison.evaluation_key_matters)
        assert len(differ) == len(change)
        if change:
            assert next(iter(differ)).startswith(next(iter(change)))


def test_the_same_reference_is_known_by_either_script_s_names(tmp_path):
    """test.py states split and content of the real images, PR_Calculate.py the manifest of their export and their pixels."""
    ours = {"real": {"images": 9, "split": "train", "content": "c"}, "lpips_sha256": None}
    theirs = {"real": {"images": 9, "manifest": {"split": "train", "data": "c"}, "pixels": "p"}, "lpips_sha256": "x"}
    other = {"real": {"images": 9, "manifest": {"split": "test", "data": "d"}, "pixels": "q"}}

    def differ(*protocols):
        flat = [comparison.one_way_to_say_it(comparison.flatten(p)) for p in protocols]
        return set(comparison.differing(dict(enumerate(flat)), comparison.evaluation_key_matters))
    assert differ(ours, theirs) == set()
    assert differ(ours, other) == {"real.split", "real.content"}
    assert differ({"real": {"pixels": "p"}}, {"real": {"pixels": "q"}}) == {"real.pixels"}


def test_files_of_different_models_under_one_tag_are_said(tmp_path, script):
    folder = write_caches(tmp_path / "in", a=sample(20), b=sample(20), real=sample(20, seed=1))
    for name, temperature in (("a", 1.0), ("b", 0.5)):
        write_json(folder / f"cache_{name}.json",
                   {"definitions": {"r0": 1}, "sizes": {"8x8": 20}, "skipped": [], "folder": "f",
                    "manifest": {"kind": "samples", "seed": 71, "checkpoint_sha256": "abc" * 20, "weights": "ema",
                                 "temperature": temperature},
                    "cache_sha256": sha256_file(folder / f"cache_{name}.csv")})
        write_evaluation(folder, f"evaluation_{name}.json", {"fid": 1.0}, {"checkpoint_sha256": "abc" * 20, "weights": "ema",
                                                                           "fake": {"temperature": temperature}, "seed": 0})
        write_evaluation(folder, f"pr_{name}.json", {"fid": 1.0},
                         {"fake": {"manifest": {"checkpoint_sha256": "abc" * 20, "weights": "ema",
                                                "temperature": temperature, "kind": "samples"}}})
    _, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    assert "not of one model" not in stderr
    write_evaluation(folder, "evaluation_a.json", {"fid": 1.0}, {"checkpoint_sha256": "d" * 60, "weights": "raw"})
    _, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    said = [line for line in stderr.splitlines() if "not of one model" in line]
    assert len(said) == 2 and all(line.startswith("warning: a: ") for line in said)
    assert "checkpoint_sha256 differs: abcabcabcabc in cache_a.csv, pr_a.json; dddddddddddd in evaluation_a.json" in said[0]
    write_evaluation(folder, "pr_b.json", {"fid": 1.0}, {"fake": {"manifest": {"kind": "reconstructions"}}})
    _, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    assert ("warning: b: its files are not of one model and one way of sampling it, kind differs: samples in cache_b.csv, "
            "evaluation_b.json; reconstructions in pr_b.json") in stderr


def test_only_the_published_features_make_a_fid(tmp_path, script):
    folder = write_caches(tmp_path / "in", a=sample(20), real=sample(20, seed=1))
    for dims, title in ((2048, "FID ↓"), (64, "Fréchet distance ↓")):
        write_evaluation(folder, "evaluation_a.json", {"fid": 1.0}, {"features": {"dims": dims}})
        _, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
        assert f"| variant | {title} | file |" in (tmp_path / "out" / "summary.md").read_text()
        for said in (stderr, Page(tmp_path / "out" / "report.html").text):
            assert ("evaluation_a.json: its Fréchet distance is of 64 features" in said) == (dims == 64)
        row, = pd.read_csv(tmp_path / "out" / "evaluation.csv").to_dict("records")
        assert row == {"variant": "a", "fid" if dims == 2048 else "frechet_distance": 1.0, "dims": dims,
                       "file": "evaluation_a.json"}


def test_different_protocols_are_said_visibly(tmp_path, script):
    folder = write_caches(tmp_path / "in", a=sample(20), real=sample(20, seed=1))
    for name, r0, size in (("a", 0.25, "32x32"), ("real", 0.5, "64x64")):
        write_evaluation(folder, f"evaluation_{name}.json", {"fid": 1.0}, {"k": 3 if name == "a" else 5})
        write_json(folder / f"cache_{name}.json",
                   {"definitions": {"r0": r0}, "sizes": {size: 20}, "skipped": ["x"], "folder": "f",
                    "manifest": {"kind": "samples", "seed": 71, "checkpoint_sha256": "abc" * 20, "count": 5},
                    "cache_sha256": sha256_file(folder / f"cache_{name}.csv")})
    code, _, stderr = script("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    page = Page(tmp_path / "out" / "report.html")
    for said in (stderr, page.text, (tmp_path / "out" / "summary.md").read_text()):
        assert "not comparable, k differs" in said and "not comparable, r0 differs" in said
        assert "image sizes" in said and "1 unreadable files were left out" in said
    assert "exported as kind samples, seed 71, checkpoint_sha256 abcabcabcabc" in page.text
    assert code == 0 and sum(a.get("class") == "warning" for _, a in page.tags) == 2

    good = (folder / "cache_real.json").read_text()
    (folder / "cache_real.json").write_text("[" * 100000)
    with pytest.raises(UserError, match="cache_real.json: damaged"):
        comparison.load_variants(folder, "")
    (folder / "cache_real.json").write_text(good)
    (folder / "cache_a.csv").write_text((folder / "cache_a.csv").read_text() + "1,1,0.5,0.5\n")
    with pytest.raises(UserError, match="cache_a.csv: damaged, or edited"):
        comparison.load_variants(folder, "")
    (folder / "cache_a.json").unlink()                          # the way to use an edit that is meant
    assert comparison.load_variants(folder, "")[1]["a"] is None


def test_same_input_gives_the_same_report(tmp_path, script):
    folder = write_caches(tmp_path / "in", a=sample(40), b=sample(30, seed=4), real=sample(20, seed=1))
    for out, workers in (("one", 1), ("two", 3)):
        assert script("--cache_dir", folder, "--out_dir", tmp_path / out, "--bootstrap", 20, "--dpi", 40, "--workers",
                      workers, "--seed", 7, "--pdf")[0] == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
        assert b"/CreationDate" not in path.read_bytes(), path.name


@pytest.mark.parametrize("files", [0, 8])
def test_full_disk_is_one_line_and_leaves_the_old_report(files, tmp_path, script, monkeypatch):
    """The disk is full after so many files."""
    folder = write_caches(tmp_path / "in", real=sample(20))
    flags = ("--cache_dir", folder, "--out_dir", tmp_path / "out", "--bootstrap", 0, "--dpi", 40)
    assert script(*flags)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    written = []

    def full(fd):
        written.append(fd)
        if len(written) > files:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    code, _, stderr = script(*flags, "--scale", "linear", "--seed", 1)
    assert code == 2 and "disk is full" in stderr and stderr.count("\n") == 1 and len(written) == files + 1
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_png_bytes_are_images():
    fig, _ = plt.subplots()
    data = comparison.render(fig, "png", 50)
    plt.close(fig)
    assert Image.open(io.BytesIO(data)).format == "PNG"


@pytest.mark.parametrize("fonts, missing", [(("No such font",), True), (("No such font", "STIXGeneral"), False)])
def test_a_name_that_the_usual_font_lacks_is_drawn_in_one_that_has_it(fonts, missing, monkeypatch):
    monkeypatch.setattr(utils, "CHINESE_FONTS", fonts)
    with plt.rc_context(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fig, ax = utils.pyplot.__wrapped__().subplots()
        ax.set_title("\N{APL FUNCTIONAL SYMBOL I-BEAM}")
        fig.savefig(io.BytesIO(), format="png")
        plt.close(fig)
    assert any(" missing from " in str(w.message) for w in caught) == missing
    assert not [w for w in caught if "No such font" in str(w.message)]


def test_difference_figure_has_the_intervals_that_were_asked_for():
    x, y = sample(300, -0.5), sample(300, seed=1)
    result = compare(x[["lap_var"]].to_numpy(), y[["lap_var"]].to_numpy(), B=50)[0]
    fig, _, _ = comparison.difference_figure("lap_var", ["m"], {"m": result}, comparison.style_of("m"), 80)
    left, right = fig.axes
    band = left.collections[0].get_paths()[0].vertices
    low, high = percentile_interval(result["percentiles"][1] / result["ref_percentiles"][1], 80)
    for p in (10, 50, 90):
        assert sorted(band[band[:, 0] == p, 1])[::len(band[band[:, 0] == p]) - 1] == pytest.approx([low[p - 1], high[p - 1]])
    bars = [c.get_segments()[0][:, 0] for c in right.collections]
    for bar, line, field in zip(bars, right.lines, ("mean", "median")):
        (a, draws), (b, ref) = result[field], result[f"ref_{field}"]
        assert line.get_xdata()[0] == pytest.approx(100 * (a / b - 1))
        assert bar == pytest.approx(percentile_interval(100 * (draws / ref - 1), 80))
    plt.close(fig)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_violin_figure_shows_each_density_where_it_lies_and_reals_over_it(scale):
    rng = np.random.default_rng(0)
    samples = {"VAE": np.exp(rng.normal(0, 0.3, 800)), "real": np.exp(rng.normal(1, 0.3, 800))}
    axis = Axis(samples, scale)
    fig = comparison.violin_figure("lap_var", samples, axis, comparison.style_of(samples))
    ax = fig.axes[0]
    bodies = [c.get_paths()[0].vertices for c in ax.collections if hasattr(c, "get_paths") and len(c.get_paths()) and
              len(c.get_paths()[0].vertices) > 100]
    curves = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) > 100]
    real = None
    for row, (body, v) in enumerate(zip(bodies, samples.values())):
        t, d = comparison.density(axis.place(v), axis.low, axis.high)
        top = (10 ** t if axis.log else t)[d.argmax()]
        assert body[np.abs(body[:, 1] - row).argmax(), 0] == pytest.approx(top, rel=0.02)
        real = top
    for curve in curves:                                         # dashed, over the variant: real's
        assert curve[np.nanargmax(np.abs(curve[:, 1])), 0] == pytest.approx(real, rel=0.02)
    assert len(curves) == 2
    plt.close(fig)


def test_box_figure_marks_the_mean_and_the_whiskers_asked_for():
    values = np.exp(np.random.default_rng(0).normal(0, 1, 1000))
    fig = comparison.box_figure("lap_var", {"a": values}, Axis({"a": values}, "linear"), comparison.style_of("a"), (5, 90))
    ax = fig.axes[0]
    assert ax.lines[0].get_xdata()[0] == pytest.approx(values.mean())
    ends = [s[0, 0] for c in ax.collections if hasattr(c, "get_segments") for s in c.get_segments() if s[0, 0] == s[1, 0]]
    assert {*np.percentile(values, [5, 90]).round(9)} <= {round(e, 9) for e in ends}
    plt.close(fig)


def test_bandwidth_is_silvermans():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 0.1, 900), rng.uniform(-8, 8, 100)])      # IQR far below the standard deviation
    grid, d = comparison.density(values, -8, 8)
    assert np.ptp(grid[d > 0.5]) < 0.4


def test_tables_obey_confidence_and_seed_and_hold_what_their_headers_say(tmp_path):
    folder = write_caches(tmp_path / "in", b=sample(60), a=sample(50, 0.4, 1), real=sample(25, 1, 2))
    table = pd.read_csv(folder / "cache_b.csv")
    table.loc[:2, "lap_var"], table["tenengrad"] = 0, table["tenengrad"] * 100
    table.to_csv(folder / "cache_b.csv", index=False)
    protocol = {"real": {"images": 7, "split": "test"}, "fake": {"images": 5}, "k": 3, "nearest_k": 5, "seed": 9}
    write_evaluation(folder, "evaluation_a.json", {"fid": 1.0}, protocol)
    write_evaluation(folder, "evaluation_b.json", {"fid": 2.0}, protocol)
    rows = {}
    for name, more in (("95", []), ("60", ["--confidence", "60"]), ("seed", ["--seed", "1"])):
        comparison.main(["--cache_dir", str(folder), "--out_dir", str(tmp_path / name), "--bootstrap", "200", "--dpi", "40",
                         "--model_order", "b,a,real", *more])
        rows[name] = pd.read_csv(tmp_path / name / "summary.csv")
    wide, narrow, other = (rows[n].iloc[0] for n in ("95", "60", "seed"))
    for column in ("mean", "median", "wasserstein", "ks", "cliff", "mean_difference"):
        assert narrow[f"{column}_high"] - narrow[f"{column}_low"] < wide[f"{column}_high"] - wide[f"{column}_low"]
        assert (wide[f"{column}_low"], wide[f"{column}_high"]) != (other[f"{column}_low"], other[f"{column}_high"])
    assert wide.zeros == 3 and rows["95"].iloc[1].zeros == 0
    x, y = table.lap_var, sample(25, 1, 2).lap_var
    error = np.hypot(x.std() / 60 ** 0.5, y.std() / 25 ** 0.5)               # both sides vary
    assert (wide.mean_difference_high - wide.mean_difference_low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    b = rows["95"].query("variant == 'b' and metric == 'tenengrad'").iloc[0]
    assert b.wasserstein_high > b.wasserstein > b.wasserstein_low > 1
    lines = (tmp_path / "95/summary.md").read_text().splitlines()
    line = next(t for t in lines if t.startswith("| b | ") and not t.startswith("| b | 60 ") and "evaluation" not in t)
    cells = [c.split(" [")[0].replace("\\", "") for c in line.split(" | ")][1:]
    wanted = [wide.mean_difference, wide.median_difference, wide.wasserstein, wide.wasserstein / y.std(), wide.ks, wide.cliff]
    assert [float(c.strip("| ").split(" ")[0]) for c in cells] == pytest.approx(wanted, rel=1e-3)
    evaluation = pd.read_csv(tmp_path / "95/evaluation.csv")
    assert evaluation.variant.tolist() == ["b", "a"] and evaluation.fid.tolist() == [2, 1]
    found = evaluation.iloc[0][["real_images", "fake_images", "real_split", "k", "nearest_k", "seed"]].tolist()
    assert found == [7, 5, "test", 3, 5, 9]
