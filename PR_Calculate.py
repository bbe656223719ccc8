"""Precision, recall, density and coverage of generated images against real ones, with FID and KID on the same features.

    python PR_Calculate.py --real_dir data/real_cifar --fake_dir data/fake_cifar --device cuda --pca_dim 256
    python PR_Calculate.py --real_dir data/real_cifar --fake_dir data/fake_cifar --pca_dim 0 --out results/pr.json
    python PR_Calculate.py --real_dir data/real_cifar --fake_dir data/fake_cifar --features vgg16 --num_images 10000

Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991. Density and coverage: Naeem et al. 2020, arXiv
2002.09797. KID: Bińkowski et al. 2018, arXiv 1801.01401. FID: Heusel et al. 2017, arXiv 1706.08500.

The four manifold metrics equal, exactly, a float64 computation over all pairs by direct differences, ties and duplicate
images included, at the cost of float32 matrix products. Below: exact distances, bounds on distances from a product,
the pairs that the bounds leave open, the metrics, KID, PCA, features of folders, the command line.

Shapes: N real points, M fake points, F features, P pairs.
"""
import contextlib
import hashlib
import math
import platform
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils import (
    FEW_IMAGES,
    FlagParser,
    InceptionFeatures,
    UserError,
    add_device_flag,
    atomic_write,
    cpu_count,
    decode_images,
    extract_features,
    frechet_distance,
    is_fid,
    list_images,
    load_hub_weights,
    mean_and_covariance,
    pick_device,
    progress_bar,
    read_arrays,
    read_image,
    read_manifest,
    require_same_protocol,
    run,
    weights_title,
    writable_folder,
    write_json,
)

__all__ = ["squared_distances", "manifold_metrics", "kernel_distance", "fit_pca", "project", "VGG16Features"]

MANY_PAIRS = 1 << 19         # open pairs dealt with at a time; more than that in a block call for sharper bounds
CACHE_BYTES = 1 << 20        # float64 differences that a core holds at a time: they stay in its cache
TILE = 512                   # rows of a block that one core works on at a time


# ---------------------------------------------------------------------------------------------------------------------
# Exact distances

def squared_distances(x, y):
    """|x - y|^2 row by row, (P, F) and (P, F) -> (P,) float64: what "the distance" means everywhere in this file.

    Differences and squares in float64, summed by folding the last h = n // 2 of n terms onto the first h until one is
    left. Elementwise operations only, so the result depends on the two points alone: not on their order, the other
    rows, the device or the number of threads. Equal points are at 0, and d(x, y) == d(y, x) bit for bit.
    Two arrays or two tensors.
    """
    d = np.subtract(x, y, dtype=np.float64) if isinstance(x, np.ndarray) else x.double().sub(y)
    d *= d
    n = d.shape[1]
    while n > 1:
        h = n // 2
        d[:, :h] += d[:, n - h:n]
        n -= h
    return d[:, 0]


def _pair_distances(x, y, i, j):
    """squared_distances(x[i], y[j]) for tensors x, y and lists of indices i, j of any length."""
    out = torch.empty(len(i), dtype=torch.float64, device=x.device)
    step = max(1, (CACHE_BYTES if x.device.type == "cpu" else 1 << 28) // (8 * x.shape[1]))
    starts = range(0, len(i), step)
    if x.device.type != "cpu":
        for s in starts:
            out[s:s + step] = squared_distances(x[i[s:s + step]], y[j[s:s + step]])
        return out
    # NumPy in threads of our own: the cores share out the steps instead of meeting after each operation.
    ax, ay, ai, aj, result = x.numpy(), y.numpy(), i.numpy(), j.numpy(), out.numpy()

    def measure(s):
        result[s:s + step] = squared_distances(ax[ai[s:s + step]], ay[aj[s:s + step]])

    if len(starts) < 4:
        for s in starts:
            measure(s)
    else:
        with ThreadPoolExecutor(cpu_count()) as pool:
            list(pool.map(measure, starts))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Bounds on distances from one matrix product

def _error_factor(features, dtype):
    """c such that |computed - exact| <= c (|a|^2 + |b|^2) for the squared distances of Cloud, at any summation order.

    With u the unit roundoff: the inner product of F + 2 terms is off by (F + 2) u (|a|^2 + |b|^2), twice that in the
    squared distance; rounding the centred points adds 4u, rounding the lifted norms 1u, and the float64 reference has
    an error of its own, which counts when dtype is float64 too. 4 (F + 16) u is above the sum of all of them.
    """
    u = torch.finfo(dtype).eps / 2
    g = 2 * (features + 16) * u
    return 2 * g / (1 - g)


def _frame(*sets):
    """Centre of the first set (F,), and the power of two that brings all centred sets into [-1, 1].

    Rounding errors grow with the norms, which are smallest about the mean; a power of two rounds nothing itself.
    """
    centre = sum(part.double().sum(0) for part in sets[0].split(8192)) / len(sets[0])
    largest = max(float((part.double() - centre).abs().max()) for x in sets for part in x.split(8192))
    return centre, math.ldexp(1.0, -max(math.frexp(largest)[1], -500))


class Cloud:
    """Points lifted so that a single product bounds every squared distance from below.

    With a = scale (x - centre) and h = (1 - c) |a|^2 / 2, the product of (a, -h, 1) and (b, 1, -h) is -L / 2, where
    L = |a - b|^2 - c (|a|^2 + |b|^2) <= |a - b|^2 <= L + 2 c (|a|^2 + |b|^2), rounding included. No further pass over
    the block is needed to turn products into distances or to add the margin.
    """

    def __init__(self, x, centre, scale):
        self.x, self.centre, self.scale = x, centre, scale
        self.lifted = torch.empty((len(x), x.shape[1] + 2), dtype=torch.float32, device=x.device)
        self.norms = torch.empty(len(x), dtype=torch.float64, device=x.device)
        for s in range(0, len(x), 4096):
            block = slice(s, min(s + 4096, len(x)))
            self.lifted[block], self.norms[block] = self.lift(block, torch.float32)

    def lift(self, block, dtype):
        """(a, 1, -h) and |a|^2 of the points in a slice, computed with c for that dtype."""
        a = ((self.x[block].double() - self.centre) * self.scale).to(dtype)
        norms = a.double().square().sum(1)
        h = norms * ((1 - _error_factor(a.shape[1], dtype)) / 2)
        return torch.cat((a, torch.ones_like(a[:, :1]), -h[:, None].to(dtype)), 1), norms


@contextlib.contextmanager
def _one_thread():
    """torch on one core within each thread, restored at the end; yields how many cores it used to take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


class Workspace:
    """Block-sized buffers, allocated once (fresh pages for each block would cost a tenth of the product), and threads.

    On a CPU a block is done in tiles of rows, each by one thread from the product to its last test, while it is in the
    cache. torch's own threads would meet after every operation: slower, and far slower while another program runs.
    """

    def __init__(self, chunk, device, cores):
        self.product_ = torch.empty(chunk * chunk, dtype=torch.float32, device=device)
        self.hit_ = torch.empty(chunk * chunk, dtype=torch.bool, device=device)
        self.spare_ = torch.empty(chunk * chunk, dtype=torch.bool, device=device)
        self.pool = ThreadPoolExecutor(cores) if device.type == "cpu" else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown()

    def tiles(self, function, n):
        """function(slice) over tiles of n rows."""
        if self.pool is None or n <= TILE:
            function(slice(0, n))
        else:
            list(self.pool.map(function, (slice(s, min(s + TILE, n)) for s in range(0, n, TILE))))

    def block(self, A, B, R, C, rows=None, columns=None):
        """p = -L / 2 of every pair of A's slice R and B's slice C, float32 (n, m), and, with thresholds, `within`.

        A point has no pair with itself: -inf on the diagonal.
        """
        left, right = _swap(A.lifted[R]), B.lifted[C].T
        n, m = len(left), right.shape[1]
        p, hit, spare = (buffer[:n * m].view(n, m) for buffer in (self.product_, self.hit_, self.spare_))
        same = A is B and R == C

        def tile(t):
            torch.matmul(left[t], right, out=p[t])
            if same:
                p[t, t].fill_diagonal_(-math.inf)
            if rows is not None:
                _test(p[t], rows[t], columns, hit[t], spare[t])

        self.tiles(tile, n)
        return p, hit

    def within(self, p, rows, columns):
        """Boolean (n, m): p >= rows[:, None] or p >= columns[None, :] (None: no column test)."""
        n, m = p.shape
        hit, spare = (buffer[:n * m].view(n, m) for buffer in (self.hit_, self.spare_))
        self.tiles(lambda t: _test(p[t], rows[t], columns, hit[t], spare[t]), n)
        return hit


def _test(p, rows, columns, hit, spare):
    torch.ge(p, rows[:, None], out=hit)
    if columns is not None:
        hit |= torch.ge(p, columns[None, :], out=spare)


def _swap(lifted):
    """(a, 1, -h) -> (a, -h, 1), a copy."""
    left = lifted.clone()
    left[:, -2], left[:, -1] = lifted[:, -1], lifted[:, -2]
    return left


def _true_words(hit):
    """Which words of eight elements of a contiguous boolean tensor hold a True; None if its size does not divide.

    Nearly all of a block is False, and this looks at eight elements at once.
    """
    return None if hit.numel() % 8 else hit.view(-1).view(torch.int64).nonzero()[:, 0]


def _true_positions(hit, words):
    """Flat indices of the True elements, ascending."""
    if words is None:
        return hit.view(-1).nonzero()[:, 0]
    word, byte = hit.view(-1, 8)[words].nonzero().unbind(1)
    return words[word] * 8 + byte


# ---------------------------------------------------------------------------------------------------------------------
# The pairs that the bounds leave open

def _near_pairs(A, B, R, C, bounds, work, p=None):
    """The pairs of block R x C that may lie within the bounds. p: the block of products, if it is there already.

    bounds() -> squared radii of all rows (len A,) and of all columns (len B,) or None; negative: no pair matters.
    Yields (i, j, lower, upper): indices into A and B, and float64 bounds on the squared distance, a limited number at
    a time. bounds is asked anew each time, so that what has been decided meanwhile makes the rest cheaper.
    """
    hit = None
    if p is None:
        p, hit = work.block(A, B, R, C, *_thresholds(bounds, A, R, C, torch.float32))
    c = _error_factor(A.x.shape[1], torch.float32)
    yield from _strip(A, B, R, C, p, hit, A.norms[R], B.norms[C], c, bounds, work)


def _strip(A, B, R, C, p, hit, row_norms, column_norms, c, bounds, work):
    if hit is None:
        hit = work.within(p, *_thresholds(bounds, A, R, C, p.dtype))
    n, m = p.shape
    words = _true_words(hit)
    if words is not None and len(words) == 0:
        return
    if int((hit if words is None else hit.view(-1, 8)[words]).count_nonzero()) > MANY_PAIRS:
        if p.dtype == torch.float32:
            # Ties, or points much closer to each other than to the centre: float64 products tell them apart, and
            # are cheaper than direct differences. What they leave open really is a tie.
            (left, row_norms), (right, column_norms) = A.lift(R, torch.float64), B.lift(C, torch.float64)
            p = torch.empty((n, m), dtype=torch.float64, device=p.device)
            left, right, out = _swap(left), right.T, p
            work.tiles(lambda t: torch.matmul(left[t], right, out=out[t]), n)
            if A is B and R == C:
                p.fill_diagonal_(-math.inf)
            c = _error_factor(A.x.shape[1], torch.float64)
            yield from _strip(A, B, R, C, p, None, row_norms, column_norms, c, bounds, work)
            return
        if n > 1:
            for s, e in ((0, n // 2), (n // 2, n)):
                yield from _strip(A, B, slice(R.start + s, R.start + e), C, p[s:e], None, row_norms[s:e], column_norms,
                                  c, bounds, work)
            return
    flat = _true_positions(hit, words)
    if len(flat) == 0:
        return
    i, j = flat // m, flat % m
    lower, lost = p[i, j].double() * -2, _underflow(A)
    upper = lower + (row_norms[i] + column_norms[j]) * (2 * c) + lost
    lower -= lost
    unit = A.scale ** -2
    yield i + R.start, j + C.start, lower * unit, upper * unit


def _thresholds(bounds, A, R, C, dtype):
    """The bounds on the rows and the columns of a block, as values of p."""
    rows, columns = bounds()
    return _threshold(rows[R], A, dtype), None if columns is None else _threshold(columns[C], A, dtype)


def _underflow(cloud):
    """What squared distances may lose where products are too small for float32; the norms say nothing of that."""
    return (cloud.x.shape[1] + 16) * 2.0 ** -124


def _threshold(squared_radius, cloud, dtype):
    """The value of p = -L / 2 from which on L <= squared_radius; rounded so that it never turns a pair away."""
    t = squared_radius * (cloud.scale ** 2 * -0.5 * (1 + 2.0 ** -20))
    t -= _underflow(cloud)
    t = t.to(dtype).clamp_min(torch.finfo(dtype).min)               # above the -inf that marks a point's own pair
    return t.masked_fill(squared_radius < 0, math.inf)


def _rounds(i, j, needed):
    """Positions in a list of pairs to be decided directly, in growing rounds; needed(positions) -> bool is asked before
    each. A round of a long list takes pairs along diagonals of the block, a few for every row and column: where many
    are tied, a few decide the row, and the rest need no look."""
    todo = torch.arange(len(i), device=i.device)
    todo = todo[needed(todo)]
    if len(todo) > 4096:
        lag = (j - i) % (int(j.max() - j.min()) + 1)
        width = 8
        while len(todo) > 4096:
            now = lag[todo] < width
            yield todo[now]
            todo = todo[~now]
            todo = todo[needed(todo)]
            width *= 4
    if len(todo):
        yield todo


def _blocks(n, chunk):
    """Slices of at most chunk points that cover range(n), of nearly equal size, a multiple of 8 where possible."""
    size = math.ceil(n / math.ceil(n / chunk))
    size = min(chunk, math.ceil(size / 8) * 8)
    return [slice(s, min(s + size, n)) for s in range(0, n, size)]


# ---------------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage

def _merge_smallest(best, ids, values):
    """best (N, k) keeps, per row, the k smallest values seen, ascending; takes in values (P,) for rows ids (P,)."""
    k = best.shape[1]
    keep = values < best[ids, -1]
    ids, values = ids[keep], values[keep]
    if len(ids) == 0:
        return
    order = values.argsort()
    order = order[ids[order].argsort(stable=True)]
    ids, values = ids[order], values[order]
    rows, row, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(ids), device=ids.device) - (counts.cumsum(0) - counts)[row]
    keep = rank < k
    new = best.new_full((len(rows), k), math.inf)
    new[row[keep], rank[keep]] = values[keep]
    best[rows] = torch.cat((best[rows], new), 1).sort(1).values[:, :k]


def _neighbour_distances(x, k, chunk, work, bar):
    """Exact squared distances to the k nearest other points, ascending: (N, F) -> (N, k) float64.

    Each pair is looked at once, for both its points. The product bounds it from below; only what lies below the k-th
    distance found so far is measured directly: about k (1 + log(N / chunk)) pairs per point.
    """
    cloud = Cloud(x, *_frame(x))
    best = torch.full((len(x), k), math.inf, dtype=torch.float64, device=x.device)
    ceiling = torch.full_like(best[:, 0], math.inf)           # an upper bound on the k-th distance, known before `best`
    blocks = _blocks(len(x), chunk)

    def radius():
        # Nothing is closer than 0: a point with k duplicates is done.
        return torch.minimum(ceiling, best[:, -1]).masked_fill_(best[:, -1] == 0, -1)

    def visit(R, C):
        twice, p = R != C, None
        if not twice and R.stop - R.start > k:
            p, _ = work.block(cloud, cloud, R, C)
            norms, c = cloud.norms[R], _error_factor(x.shape[1], p.dtype)

            def bound(t):
                top, at = p[t].topk(k, 1)
                top = top.double() * -2 + (norms[t, None] + norms[at]) * (2 * c)
                ceiling[R][t] = (top.amax(1) + _underflow(cloud)) * cloud.scale ** -2

            work.tiles(bound, len(p))

        def bounds():
            r = radius()
            return r, r if twice else None

        for i, j, lower, _ in _near_pairs(cloud, cloud, R, C, bounds, work, p):
            def needed(t, i=i, j=j, lower=lower):
                r = radius()
                return (lower[t] <= r[i[t]]) | (lower[t] <= r[j[t]]) if twice else lower[t] <= r[i[t]]

            for t in _rounds(i, j, needed):
                d = _pair_distances(x, x, i[t], j[t])
                _merge_smallest(best, i[t], d)
                if twice:
                    _merge_smallest(best, j[t], d)
        bar.update((R.stop - R.start) * (C.stop - C.start) * (1 + twice))

    for R in blocks:                                          # first, so that every point has a bound from the start
        visit(R, R)
    for n, R in enumerate(blocks):
        for C in blocks[n + 1:]:
            visit(R, C)
    return best


@contextlib.contextmanager
def _full_float32():
    """Matrix products in true float32: the bounds do not hold for TF32 or bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _as_points(features, name, device):
    """An (N, F) array or tensor -> tensor on the device, float32 kept, anything else exactly in float64."""
    x = torch.as_tensor(features)
    if x.ndim != 2 or not x.shape[1]:
        raise UserError(f"{name}: expected an array (points, features), got shape {tuple(x.shape)}")
    x = x.detach().to(device, x.dtype if x.dtype == torch.float32 else torch.float64).contiguous()
    for part in x.split(8192):
        if not bool((part.abs() < 1e150).all()):              # also false for NaN; squares must not overflow
            raise UserError(f"{name}: features must be finite and below 1e150")
    return x


@torch.no_grad()
def manifold_metrics(real, fake, k=3, k_density=5, device="cpu", chunk=None, progress=False):
    """Improved precision and recall, density and coverage of two sets of features, without approximation.

    real (N, F), fake (M, F): arrays or tensors, nothing is normalised. With r_k(i) the distance from real point i to
    its k-th nearest other real point, s_k(j) likewise among the fake points, and d(i, j) between the two sets:

        precision = share of j with d(i, j) <= r_k(i) for any i         (k neighbours; Kynkäänniemi et al. 2019)
        recall    = share of i with d(i, j) <= s_k(j) for any j
        density   = number of pairs with d(i, j) < r_kd(i), / (kd M)    (kd = k_density; Naeem et al. 2020)
        coverage  = share of i with d(i, j) < r_kd(i) for any j

    All in terms of squared_distances on the given values: the result is that of comparing all pairs in float64.
    chunk: points per side of a block (default 4096 on a CPU, 8192 on a GPU); sets memory, about 6 chunk^2 bytes and
    up to 20 chunk^2 where ties abound, beside a float32 copy of the points; it never changes the result.
    Returns a dict of four floats. Raises UserError on k out of range or features that are not finite.
    """
    device = torch.device(device)
    if device.type == "mps":
        device = torch.device("cpu")                          # MPS has no float64
    real, fake = _as_points(real, "real", device), _as_points(fake, "fake", device)
    N, M = len(real), len(fake)
    if real.shape[1] != fake.shape[1]:
        raise UserError(f"real points have {real.shape[1]} features, fake points {fake.shape[1]}")
    check_neighbours(k, k_density, N, M)
    chunk = chunk or (8192 if device.type == "cuda" else 4096)
    if chunk < 1:
        raise UserError(f"chunk {chunk}: must be positive")
    chunk = min(chunk, max(N, M))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_float32())
        bar = stack.enter_context(progress_bar(N * N + M * M + N * M, "pairs", "pair", progress, unit_scale=True))
        cores = stack.enter_context(_one_thread())
        work = stack.enter_context(Workspace(chunk, device, cores))
        near = _neighbour_distances(real, max(k, k_density), chunk, work, bar)
        r_k, r_kd = near[:, k - 1].clone(), near[:, k_density - 1].clone()
        s_k = _neighbour_distances(fake, k, chunk, work, bar)[:, -1].clone()
        return _compare(real, fake, r_k, r_kd, s_k, k_density, chunk, work, bar)


def check_neighbours(k, k_density, N, M):
    for name, value, points in (("k", k, {"real": N, "fake": M}), ("nearest_k", k_density, {"real": N})):
        if value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
        for which, n in points.items():
            if value >= n:
                raise UserError(f"--{name} {value}: needs at least {value + 1} {which} images, there are {n}")


def _compare(real, fake, r_k, r_kd, s_k, k_density, chunk, work, bar):
    """The four metrics from the squared radii r_k, r_kd (N,) and s_k (M,)."""
    N, M = len(real), len(fake)
    frame = _frame(real, fake)
    A, B = Cloud(real, *frame), Cloud(fake, *frame)
    flags = {"dtype": torch.bool, "device": real.device}
    precise, recalled, covered = torch.zeros(M, **flags), torch.zeros(N, **flags), torch.zeros(N, **flags)
    inside = 0                                                # pairs with d < r_kd
    strict = r_kd.masked_fill(r_kd == 0, -1)                  # nothing is closer than 0
    either = torch.maximum(strict, r_k)

    for R in _blocks(N, chunk):
        for C in _blocks(M, chunk):
            def bounds(R=R, C=C):
                # What is decided for the whole block is asked no more; density has to count every pair.
                return (strict if bool(precise[C].all()) else either,
                        None if bool(recalled[R].all()) else s_k)

            for i, j, lower, upper in _near_pairs(A, B, R, C, bounds, work):
                sure = upper < r_kd[i]
                inside += int(sure.sum())
                covered[i[sure]] = True
                precise[j[upper <= r_k[i]]] = True
                recalled[i[upper <= s_k[j]]] = True
                maybe_in = ~sure & (lower <= strict[i])
                maybe_precise, maybe_recalled = lower <= r_k[i], lower <= s_k[j]

                def needed(t, i=i, j=j, a=maybe_in, b=maybe_precise, c=maybe_recalled):
                    return a[t] | (b[t] & ~precise[j[t]]) | (c[t] & ~recalled[i[t]])

                for t in _rounds(i, j, needed):
                    it, jt = i[t], j[t]
                    d = _pair_distances(real, fake, it, jt)
                    now_in = maybe_in[t] & (d < r_kd[it])
                    inside += int(now_in.sum())
                    covered[it[now_in]] = True
                    precise[jt[d <= r_k[it]]] = True
                    recalled[it[d <= s_k[jt]]] = True
            bar.update((R.stop - R.start) * (C.stop - C.start))
    return {
        "precision": int(precise.sum()) / M,
        "recall": int(recalled.sum()) / N,
        "density": inside / (k_density * M),
        "coverage": int(covered.sum()) / N,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance and PCA

@torch.no_grad()
def kernel_distance(real, fake, subsets=100, subset_size=1000, seed=0, device="cpu"):
    """KID: unbiased squared MMD with the kernel (x.y / F + 1)^3, (N, F), (M, F) -> (mean, standard deviation).

    Over `subsets` pairs of random subsets of min(subset_size, N, M) points each, drawn without replacement by a
    generator seeded with `seed`; float64. The deviation is that between subsets (not of the mean, and not N - 1); NaN
    where every subset would be all points of both sides, which are then measured once.
    Raises UserError below two points on a side.
    """
    m = min(subset_size, len(real), len(fake))
    if m < 2:
        raise UserError("KID needs at least two images on each side")
    if subsets < 1:
        raise UserError(f"KID needs at least one subset, not {subsets}")
    subsets = 1 if m == len(real) == len(fake) else subsets
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    rng = np.random.default_rng(seed)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = (s[torch.from_numpy(rng.choice(len(s), m, replace=False))].to(device, torch.float64) for s in (real, fake))
        own = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y)))
        values.append(float(own / (m * (m - 1)) - 2 * kernel(x, y).mean()))
    return float(np.mean(values)), float(np.std(values)) if subsets > 1 else math.nan


def kernel_protocol(width, N, M):
    """What kernel_distance does with its defaults to N and M points of `width` features, in words."""
    m = min(1000, N, M)
    which = f"all {m} images of each side, no subsets" if m == N == M else \
        f"100 subsets of {m}; kid_std is the deviation between subsets"
    return f"polynomial kernel (x.y/{width} + 1)^3, unbiased, before PCA, {which}"


def pca_protocol(dims, kept):
    """What is done to the features before the manifold metrics, in words."""
    return f"{dims} dimensions fitted on the real features, no whitening, {kept:.2%} of the variance kept" if dims else "none"


def kernel_text(metrics, digits):
    """KID as a text, with its deviation if it has one."""
    deviation = f" ± {metrics['kid_std']:.{digits}f}" if math.isfinite(metrics["kid_std"]) else ""
    return f"{metrics['kid']:.{digits}f}{deviation}"


def check_pca(dims, N, width):
    if dims > min(N, width):
        raise UserError(f"--pca_dim {dims}: too large for {N} real images of {width} features; "
                        f"use at most {min(N, width)}, or 0 for no PCA")


def fit_pca(features, dims):
    """PCA by the eigenvectors of the covariance: (N, F) -> mean (F,), components (F, dims), share of variance kept.

    Raises UserError if dims is more than N or F.
    """
    check_pca(dims, *features.shape)
    mu, sigma = mean_and_covariance(features)
    values, vectors = np.linalg.eigh(sigma)
    total = values.clip(0).sum()
    kept = values[::-1][:dims].clip(0).sum()
    return mu, vectors[:, ::-1][:, :dims].copy(), float(kept / total) if total > 0 else 1.0


def project(features, mu, components):
    """(N, F) -> (N, dims) float32: centred, rotated, not whitened; the sums in float64."""
    out = np.empty((len(features), components.shape[1]), np.float32)
    for s in range(0, len(features), 4096):
        out[s:s + 4096] = (features[s:s + 4096].astype(np.float64) - mu) @ components
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Features of folders

class VGG16Features:
    """torchvision's VGG16 up to fc2 after its ReLU, as a feature extractor like utils.InceptionFeatures.

    Kynkäänniemi et al. use the same layer of another port of the network: numbers are close to theirs, not equal.
    """
    FILE = "vgg16-397923af.pth"

    def __init__(self, device):
        from torchvision.models import VGG16_Weights, vgg16
        net, self.sha256 = load_hub_weights(self.FILE, "use --features inception",
                                            lambda: vgg16(weights=VGG16_Weights.IMAGENET1K_V1))
        net.classifier = net.classifier[:5]                   # fc1, ReLU, dropout, fc2, ReLU
        self.model, self.device, self.dims = net.to(device).eval(), device, 4096
        self.name = (f"torchvision VGG16 ({weights_title(self.FILE, self.sha256)}), fc2 after ReLU, bilinear 224 with "
                     f"antialias, ImageNet normalisation")
        self.key = f"vgg16-fc2-bilinear224aa-{self.sha256}"
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (B, 3, H, W) -> float32 (B, 4096) on the CPU."""
        x = images.to(self.device).float() / 255
        x = F.interpolate(x, (224, 224), mode="bilinear", antialias=True, align_corners=False)
        return self.model((x - self.mean) / self.std).float().cpu()


# What a folder holds: readable files, a hash of each one's pixels, the common size, the number of corrupt files left out,
# the manifest of its export (checkpoint, weights, split) if it has one, and which of its files these are, in words.
Survey = namedtuple("Survey", "folder paths digests size skipped manifest choice")


def survey_folder(folder, flag, num_images=0, seed=0, skip_corrupt=False, progress=False, paths=None):
    """Decode every image of a folder once -> Survey, before any long work is spent on it.

    num_images: only that many, a random choice by the seed (0 = all). paths: its list_images, where known. Raises
    UserError that names a file that cannot be read (skip_corrupt: it is left out and counted) or differs in size.
    """
    paths = list_images(folder, flag) if paths is None else paths
    manifest = read_manifest(folder, len(paths))
    choice = "all"
    if 0 < num_images < len(paths):
        choice = f"random {num_images} by the seed"
        chosen = np.random.default_rng(seed).permutation(len(paths))[:num_images]
        paths = [paths[i] for i in sorted(chosen)]

    def look(path):
        try:
            image = read_image(path)
        except UserError:
            if not skip_corrupt:
                raise
            return None
        return path, image.shape[:2], hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()

    found = []
    with ThreadPoolExecutor(cpu_count()) as pool, progress_bar(len(paths), f"reading {Path(folder).name}",
                                                               wanted=progress) as bar:
        for s in range(0, len(paths), 1024):                  # an error stops the work at the next thousand
            found += pool.map(look, paths[s:s + 1024])
            bar.update(len(paths[s:s + 1024]))
    good = [f for f in found if f is not None]
    if not good:
        raise UserError(f"{flag} {folder}: none of its {len(paths)} images can be read")
    size = good[0][1]
    for path, shape, _ in good:
        if shape != size:
            raise UserError(f"{path}: {shape[1]}x{shape[0]} pixels, but {good[0][0]} has {size[1]}x{size[0]}; "
                            f"images of one folder must have one size here")
    return Survey(str(folder), [g[0] for g in good], [g[2] for g in good], size, len(found) - len(good), manifest,
                  choice)


def folder_features(extractor, surveys, batch_size, cache=None, progress=False):
    """Features of the distinct images of several folders (D, F) float32, and for each folder its rows in that table.

    An image that occurs twice passes the network once: that equal images have equal features, to the last bit, is what
    ties between distances rest on, and kernels do not promise it for different places in a batch.
    cache: a folder to keep each folder's features in (None: nowhere), named by content, weights and preprocessing.
    """
    row, parts = {}, []
    for survey in surveys:
        first = {}                                            # digest -> the first file with it
        for path, digest in zip(survey.paths, survey.digests):
            first.setdefault(digest, path)
        file, part = None, None
        new = [digest for digest in first if digest not in row]
        if cache:
            key = f"{extractor.key} {extractor.device} {torch.__version__} {batch_size}".encode()
            key = hashlib.sha256(key + b"".join(first)).hexdigest()
            file = Path(cache) / f"features-{key[:32]}.npz"
            cached = read_arrays(file, key) if file.is_file() else None
            if cached is not None:
                part = cached["features"][[n for n, digest in enumerate(first) if digest not in row]]
        computed = part is None
        if computed:
            paths = [first[digest] for digest in new]
            # Decoded a few batches at a time, or a quarter of a GiB: the folder need not fit into memory.
            size = read_image(paths[0]).size if paths else 1             # none where all are in a folder before this one
            block = max(4, 2 ** 28 // (batch_size * size)) * batch_size
            blocks = (decode_images(paths[s:s + block], progress=False) for s in range(0, len(paths), block))
            batches = (batch for block in blocks for batch in block.split(batch_size))
            part = extract_features(extractor, batches, len(paths), f"features of {Path(survey.folder).name}", progress)
        row |= {digest: len(row) + n for n, digest in enumerate(new)}
        parts.append(part)
        if file and computed:
            with atomic_write(file) as f:
                np.savez(f, key=key, features=np.concatenate(parts)[[row[digest] for digest in first]])
    return np.concatenate(parts), [np.array([row[digest] for digest in survey.digests]) for survey in surveys]


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def add_manifold_flags(group):
    group.add_argument("--k", type=int, default=3, help="neighbours of precision and recall")
    group.add_argument("--nearest_k", type=int, default=5, help="neighbours of density and coverage")
    group.add_argument("--pca_dim", type=int, default=256,
                       help="PCA dimensions, fitted on the real features, for these four (changes them; FID and KID never use "
                            "it), at most --fid_dims; 0 = off")


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    group = parser.add_argument_group("images")
    group.add_argument("--real_dir", required=True, help="folder of real images")
    group.add_argument("--fake_dir", required=True, help="folder of generated images")
    group.add_argument("--num_images", type=int, default=0,
                       help="at most this many from each folder, a random choice by the seed; 0 = all")
    group.add_argument("--skip_corrupt", action="store_true", help="leave unreadable images out and count them")

    group = parser.add_argument_group("features")
    group.add_argument("--features", choices=("inception", "vgg16"), default="inception",
                       help="inception: pytorch-fid's network; vgg16: torchvision's fc2 after ReLU")
    group.add_argument("--fid_dims", type=int, choices=(2048, 768, 192, 64), default=None,
                       help="inception: layer by its number of features; 2048 is the published FID (default: 2048)")
    group.add_argument("--batch_size", type=int, default=64, help="images a batch in the network")
    group.add_argument("--feature_cache", default=None, metavar="DIR",
                       help="keep features in this folder and reuse them while images and weights are the same")

    group = parser.add_argument_group("metrics")
    add_manifold_flags(group)
    group.add_argument("--seed", type=int, default=0, help="seed of KID's subsets and of --num_images")

    group = parser.add_argument_group("run time")
    add_device_flag(group)
    group.add_argument("--chunk", type=int, default=0,
                       help="points per side of a block of distances; bounds the memory, not the result; 0 = 4096 on a CPU, "
                            "8192 on a GPU")

    group = parser.add_argument_group("output")
    group.add_argument("--out", default=None, metavar="FILE.json", help="write the metrics and their protocol here")
    group.add_argument("--overwrite", action="store_true", help="replace an --out of other images or another protocol")
    group.add_argument("--tag", default=None, help="name of the variant in the output (default: the fake folder's name)")
    args = parser.parse_args(argv)

    for name, least in (("num_images", 0), ("batch_size", 1), ("k", 1), ("nearest_k", 1), ("pca_dim", 0), ("seed", 0),
                        ("chunk", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.features == "vgg16" and args.fid_dims is not None:
        raise UserError("--fid_dims chooses an Inception layer; leave it out with --features vgg16")
    return args


def describe_folder(survey):
    """What the protocol says of one side, with the manifest of its export (checkpoint, weights, split) if it has one."""
    return {
        "folder": survey.folder,
        "images": len(survey.paths),
        "distinct_images": len(set(survey.digests)),
        "corrupt_left_out": survey.skipped,
        "size": f"{survey.size[1]}x{survey.size[0]}",
        "choice": survey.choice,
        "pixels": hashlib.sha256(b"".join(sorted(survey.digests))).hexdigest(),      # in whatever order and by whatever names
        "manifest": survey.manifest,
    }


def evaluate(args, device, extractor, real, fake, progress=False):
    """Surveys of both sides -> (metrics, protocol)."""
    sides = {name: describe_folder(side) for name, side in (("real", real), ("fake", fake))}
    table, (real_rows, fake_rows) = folder_features(extractor, (real, fake), args.batch_size, args.feature_cache, progress)
    real_features, fake_features = table[real_rows], table[fake_rows]

    fid = frechet_distance(*mean_and_covariance(real_features), *mean_and_covariance(fake_features))
    kid, kid_std = kernel_distance(real_features, fake_features, seed=args.seed, device=device)
    kept = None
    if args.pca_dim:
        mu, components, kept = fit_pca(real_features, args.pca_dim)
        table = project(table, mu, components)                # before the rows are copied out: duplicates stay equal
        real_features, fake_features = table[real_rows], table[fake_rows]
    metrics = {"fid": fid, "kid": kid, "kid_std": kid_std}
    metrics |= manifold_metrics(real_features, fake_features, args.k, args.nearest_k, device, args.chunk or None, progress)
    protocol = sides | {
        "features": {"name": extractor.name, "sha256": extractor.sha256, "dims": extractor.dims},
        "fid": "on all features, before PCA, float64",
        "kid": kernel_protocol(extractor.dims, len(real_rows), len(fake_rows)),
        "k": args.k,
        "nearest_k": args.nearest_k,
        "pca": pca_protocol(args.pca_dim, kept),
        "seed": args.seed,
        "device": str(device),
        "versions": {"python": platform.python_version(), "numpy": np.__version__}
        | {name: version(name) for name in ("torch", "torchvision", "pytorch-fid")},
    }
    return metrics, protocol


def show(tag, metrics, protocol):
    """The table on the screen: every number with what it rests on."""
    real, fake, features = protocol["real"], protocol["fake"], protocol["features"]
    fid = "FID" if is_fid(features["name"], features["dims"]) else "Fréchet distance"
    print(f"\n{tag}: {fake['images']:,} generated images against {real['images']:,} real ones")
    lines = [(fid, f"{metrics['fid']:.4f}", "" if fid == "FID" else "not comparable with the published FID"),
             ("KID", f"{metrics['kid']:.6f}", f"± {metrics['kid_std']:.6f} between subsets"
              if math.isfinite(metrics["kid_std"]) else "of all images, no subsets"),
             ("precision", f"{metrics['precision']:.4f}", f"k = {protocol['k']}"),
             ("recall", f"{metrics['recall']:.4f}", f"k = {protocol['k']}"),
             ("density", f"{metrics['density']:.4f}", f"k = {protocol['nearest_k']}"),
             ("coverage", f"{metrics['coverage']:.4f}", f"k = {protocol['nearest_k']}")]
    for name, value, note in lines:
        print(f"  {name:<17} {value:>12}  {note}".rstrip())
    for name in ("real", "fake"):
        side = protocol[name]
        skipped = f", {side['corrupt_left_out']} corrupt left out" if side["corrupt_left_out"] else ""
        same = side["images"] - side["distinct_images"]
        print(f"  {name:<9} {side['folder']}: {side['choice']}, {side['size']} pixels"
              f"{f', {same} of them duplicates' if same else ''}{skipped}")
    print(f"  features  {features['name']}, SHA-256 {features['sha256'][:16]}")
    print(f"  PCA       {protocol['pca']} (precision, recall, density, coverage)")
    print(f"  seed      {protocol['seed']}")


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.out is not None:
        out = Path(args.out)
        if out.is_dir():
            raise UserError(f"--out {args.out!r}: is a folder; name a file")
        writable_folder(out.parent, "--out")
    if args.feature_cache:
        writable_folder(args.feature_cache, "--feature_cache")

    # What can be known before the network runs is checked before it runs.
    folders = [(args.real_dir, "--real_dir"), (args.fake_dir, "--fake_dir")]
    listed = [list_images(folder, flag) for folder, flag in folders]
    check_neighbours(args.k, args.nearest_k, *(min(len(paths), args.num_images or len(paths)) for paths in listed))
    extractor = (VGG16Features(device) if args.features == "vgg16" else
                 InceptionFeatures(device, args.fid_dims or 2048, without="use --features vgg16"))
    real, fake = [survey_folder(folder, flag, args.num_images, args.seed, args.skip_corrupt, True, paths)
                  for (folder, flag), paths in zip(folders, listed)]
    check_neighbours(args.k, args.nearest_k, len(real.paths), len(fake.paths))          # again, without the corrupt
    check_pca(args.pca_dim, len(real.paths), extractor.dims)
    if args.out is not None and not args.overwrite:
        sides = {f"{name}.pixels": describe_folder(side)["pixels"] for name, side in (("fake", fake), ("real", real))}
        require_same_protocol(out, {
            **sides, "features.dims": extractor.dims, "features.sha256": extractor.sha256, "k": args.k,
            "nearest_k": args.nearest_k, "pca": str(args.pca_dim), "seed": args.seed}, "another --out")
    for survey, flag in zip((real, fake), ("--real_dir", "--fake_dir")):
        if survey.skipped:
            print(f"warning: {flag}: {survey.skipped} corrupt images left out", file=sys.stderr)
        if len(survey.paths) < FEW_IMAGES:
            singular = (f", and a covariance of {extractor.dims} features from fewer images is singular"
                        if len(survey.paths) <= extractor.dims else "")
            print(f"warning: {flag}: only {len(survey.paths)} images, fewer than {FEW_IMAGES}. FID is biased upwards on "
                  f"small samples{singular}: do not compare it with other numbers", file=sys.stderr)

    if real.size != fake.size:
        print(f"warning: --real_dir has images of {real.size[1]}x{real.size[0]} pixels, --fake_dir of {fake.size[1]}x"
              f"{fake.size[0]}: what they differ in is then their size first", file=sys.stderr)

    start = time.perf_counter()
    metrics, protocol = evaluate(args, device, extractor, real, fake, progress=True)
    tag = args.tag or Path(args.fake_dir).resolve().name
    show(tag, metrics, protocol)
    print(f"  time      {time.perf_counter() - start:.1f} s on {device}")
    if args.out is not None:
        write_json(args.out, {"tag": tag, "metrics": metrics, "protocol": protocol})
        print(f"  written   {args.out}")


if __name__ == "__main__":
    run(main)
