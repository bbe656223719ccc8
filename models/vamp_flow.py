"""CrossFlowVampVAE: a VAE with a VampPrior and a bi-directional cross-attention flow on its latent.

    x -> encoder -> q(z0|x) = N(mu(x), diag sigma^2(x)) -> z0 -> BiCrossAttnFlow f -> zK -> decoder -> x'
    prior: p(zK) = sum_k w_k N(zK; mu(u_k), diag sigma^2(u_k)), the u_k being learned pseudo-inputs, w_k = 1/K
           (--prior mog learns the components themselves, --mixture_weights learned the w_k)

    log q(zK|x) = log N(z0; mu, sigma^2) - log|det dzK/dz0|
    KL          = E_q[ log q(zK|x) - log p(zK) ]                                     (one sample, in nats)

Papers: VAE, Kingma & Welling 2014 (arXiv 1312.6114); VampPrior, Tomczak & Welling 2018 (1705.07120); flows on the
posterior, Rezende & Mohamed 2015 (1505.05770); affine coupling, Dinh et al. 2017 (1605.08803); attention, Vaswani et
al. 2017 (1706.03762).

Shapes: B batch; C, H, W image; D latent; K components; T tokens of one latent half, d = D / 2T values in each;
E embedding; S, F positions and channels of the encoder's feature map. Images are in [-1, 1], densities in nats.
"""
import contextlib
import copy
import math
import operator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                     # comes with PyTorch for CUDA only
    triton = None

__all__ = ["log_normal", "component_log_probs", "log_mixture", "fit_mixture", "BiCrossAttnFlow", "check_flow", "check_fused",
           "Encoder", "Decoder", "VAEOutput", "CrossFlowVampVAE"]

PRIORS = ("vamp", "mog", "standard")
FLOW_PRIORS = ("unflowed", "pushed")
FLOW_CONTEXTS = ("none", "encoder")
MIXTURE_WEIGHTS = ("uniform", "learned")
MIXTURE_COVARIANCES = ("diag", "full")
DECODE_FROM = ("zK", "z0")
LATENT_LAYOUTS = ("vector", "spatial")

# Far above what any machine trains, far below what fills its memory or hours before a user can read why: a mistyped
# flag, or a checkpoint from somewhere, is refused by name instead. Largest value of each constructor argument.
LIMITS = dict(img_size=8192, latent_dim=2 ** 16, hidden_dims=2 ** 14, blocks_per_stage=64, num_components=2 ** 20,
              flow_length=256, flow_seq_len=2 ** 15, flow_embed_dim=2 ** 14, flow_heads=2 ** 10, flow_layers=16,
              flow_mlp_ratio=64, scale_bound=80.0)
MOST_STAGES = 13                    # halvings of the largest image
LARGEST_TENSOR = 2 ** 31            # numbers in one tensor of weights: 8 GiB
LARGEST_MAP = 256                   # pixels a side at the lowest resolution, where attention sees every pair of them


def check_sizes(args):
    """Raise ValueError if an entry of a dict of constructor arguments is no number, or above LIMITS."""
    if len(args["hidden_dims"]) > MOST_STAGES:
        raise ValueError(f"hidden_dims has {len(args['hidden_dims'])} entries, more than any image can be halved")
    for name, most in LIMITS.items():
        for value in args[name] if name == "hidden_dims" else [args[name]]:
            kind = "a number" if isinstance(most, float) else "an integer"
            if not isinstance(value, int if kind == "an integer" else (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be {kind}, not {value!r:.40}")
            if not value <= most:
                raise ValueError(f"{name} {value} is absurdly large; at most {most} is allowed")


# ---------------------------------------------------------------------------------------------------------------------
# Densities: always float32 or float64, whatever autocast does around them

def full_precision(x):
    """x in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


# Asked here, once: torch.compile cuts its graph in two where it meets the question (seen with torch 2.4 and 2.11).
HAVE_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def no_autocast(device_type):
    """Context in which autocast is off, on devices that have none too."""
    return torch.autocast(device_type, enabled=False) if device_type in HAVE_AUTOCAST else contextlib.nullcontext()


def log_normal(z, mu, logvar):
    """log N(z; mu, diag exp(logvar)), summed over the last axis: (..., D) three times -> (...), in nats."""
    z, mu, logvar = full_precision(z), full_precision(mu), full_precision(logvar)
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def component_log_probs(z, mu_k, logvar_k, tril_k=None):
    """log N(z; mu_k, diag exp(logvar_k)) for every pair: (B, D), (K, D), (K, D) -> (B, K), in nats.

    tril_k (K, D, D) gives the components a full covariance: T_k its strictly lower triangles (the rest is ignored),
    (I + T_k)(z - mu_k) has the covariance diag exp(logvar_k). The determinant stays that of the diagonal.

    By direct differences: the expanded quadratic z.z - 2 z.mu + mu.mu is a faster matrix product, and off by whole
    nats where sigma is small.
    """
    if tril_k is None:
        return log_normal(z[:, None], mu_k[None], logvar_k[None])
    with no_autocast(z.device.type):
        difference = full_precision(z) - full_precision(mu_k)[:, None]                          # (K, B, D)
        difference = difference + difference @ full_precision(tril_k).tril(-1).transpose(1, 2)
        return log_normal(difference, torch.zeros_like(mu_k)[:, None], logvar_k[:, None]).T


def log_mixture(z, mu_k, logvar_k, log_w=None, tril_k=None):
    """log sum_k w_k N(z; mu_k, diag exp(logvar_k)): (B, D), (K, D), (K, D), (K,) -> (B,), in nats; without log_w, w = 1/K;
    tril_k as above."""
    log_w = -math.log(len(mu_k)) if log_w is None else log_w
    return torch.logsumexp(component_log_probs(z, mu_k, logvar_k, tril_k) + log_w, dim=1)


def inverse_factor(covariance):
    """U lower triangular, U covariance U^T = I; small, so on the CPU in float64: (D, D) -> (D, D)."""
    lower = torch.linalg.cholesky(covariance.cpu().double())
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False)


def whitening(x):
    """The inverse_factor of the covariance of points (N, D) whose mean is 0, with a part of the unit matrix for directions that
    hardly vary, or not at all."""
    x = x.cpu().double()
    covariance = x.T @ x / len(x)
    return inverse_factor(covariance + 1e-6 * covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(len(covariance)))


@torch.no_grad()
def fit_mixture(z, K, steps, learn_weights=True, prior_count=None, generator=None, progress=iter):
    """EM for a mixture of Gaussians of full covariance: z (N, D) -> mu (K, D), logvar (K, D), tril (K, D, D), log_w (K,), as
    log_mixture takes them.

    It starts at the clusters of ten steps of k-means among the points' directions as seen from their mean (with the points
    themselves, the few that lie far out would get clusters of their own) and ends after so many steps. Every component's
    covariance is averaged with that of all points, which counts as prior_count points (the MAP estimate under an inverse
    Wishart; D unless given): of components with fewer points than dimensions the likelihood has no bound. The generator
    is of the CPU; progress (tqdm, for example) may show the steps. Raises ValueError where N < K, or without a step.
    """
    N, D = z.shape
    if N < K or steps < 1:
        raise ValueError(f"{K} components cannot be fitted to {N} points in {steps} steps")
    prior_count = D if prior_count is None else prior_count
    centre = z.mean(0)
    x = z - centre
    directions = F.normalize(x)
    means = directions[torch.randperm(N, generator=generator)[:K].to(x.device)]
    for _ in range(11):
        share = F.one_hot(torch.cdist(directions, means).argmin(1), K).to(x)                    # (N, K) responsibilities
        means = share.T @ directions / share.sum(0).clamp(min=1)[:, None]
    whiten = whitening(x)
    x = x @ whiten.T.to(x)
    for _ in progress(range(steps)):
        count = share.sum(0)
        log_w = (count.clamp(min=1e-6) / N).log() if learn_weights else torch.full_like(count, -math.log(K))
        mu = share.T @ x / count.clamp(min=1e-6)[:, None]
        factors, log_joint = [], torch.empty_like(share)
        for k in range(K):
            difference = x - mu[k]
            seen = share[:, k] > 1e-9                     # in many dimensions few points are of more than one component
            near, weight = difference[seen], share[seen, k:k + 1]
            scatter = (near * weight).T @ near
            factors.append(inverse_factor((scatter + prior_count * torch.eye(D).to(x)) / (count[k] + prior_count)))
            distance = (difference @ factors[k].T.to(x)).square().sum(1)
            log_joint[:, k] = log_w[k] + factors[k].diagonal().log().sum().to(x) - 0.5 * distance
        share = torch.softmax(log_joint, 1)
    upper = torch.stack(factors) @ whiten                                                       # of z - centre, float64
    scale = upper.diagonal(dim1=1, dim2=2)
    mu = torch.linalg.solve_triangular(whiten, mu.cpu().double().T, upper=False).T
    return centre + mu.to(z), (-2 * scale.log()).to(z), (upper / scale[:, :, None]).tril(-1).to(z), log_w


# ---------------------------------------------------------------------------------------------------------------------
# Blocks

class GroupNorm(nn.GroupNorm):
    """With as many groups as divide the channels, at most 32, each of four channels or more; in full precision, as autocast
    has it on CUDA (on a CPU it takes bf16 as it comes, which is slower too).

    Compiled for CUDA it takes the moments of each channel first and those of its group from them: with channels_last a
    group's values lie scattered, which made a whole training step a tenth slower.
    """

    def __init__(self, channels):
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (channels % g == 0 and channels // g >= 4))
        super().__init__(groups, channels)

    def forward(self, x):
        x = full_precision(x)
        return self.by_channels(x) if torch.compiler.is_compiling() and x.device.type == "cuda" else super().forward(x)

    def by_channels(self, x):
        """The same: (B, C, H, W) -> (B, C, H, W)."""
        var, mean = (m.unflatten(1, (self.num_groups, -1)) for m in torch.var_mean(x, (2, 3), correction=0))    # (B, G, C/G)
        centre = mean.mean(2, keepdim=True)                                                     # (B, G, 1)
        # (The mean of the channels' variances, and the variance of their means.)
        factor = torch.rsqrt((var + (mean - centre).square()).mean(2, keepdim=True) + self.eps)
        scale = self.weight * factor.expand_as(mean).flatten(1)                                 # (B, C)
        shift = self.bias - centre.expand_as(mean).flatten(1) * scale
        return x * scale[:, :, None, None] + shift[:, :, None, None]


def attention(q, k, v, heads):
    """softmax(q k^T / sqrt(E / heads)) v on every head: (B, Tq, E), (B, Tk, E), (B, Tk, E) -> (B, Tq, E)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))                # (B, heads, T, E / heads)
    if q.device.type == "cpu":                                  # where bf16 takes twice to four times as long
        with no_autocast("cpu"):
            h = F.scaled_dot_product_attention(full_precision(q), full_precision(k), full_precision(v))
    else:
        h = F.scaled_dot_product_attention(q, k, v)
    return h.transpose(1, 2).flatten(2)                                                        # (B, Tq, E)


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), 3x3 convolutions: (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class UpConv2d(nn.Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution with padding 1: (B, C, H, W) -> (B, C', 2H, 2W).

    Of the four pixels that a pixel becomes, each sees 2x2 different ones, so that the sums of neighbouring taps make it a
    transposed convolution of stride 2: 16 products a pixel instead of 36, and no enlarged copy of the input.
    """

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x):
        kernel = self.weight.transpose(0, 1)                                                    # (C, C', 3, 3)
        for dim in (2, 3):
            a, b, c = kernel.unbind(dim)
            kernel = torch.stack([c, b + c, a + b, a], dim)                                     # (C, C', 4, 4) at the end
        if not self.weight.is_contiguous():
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class SelfAttention2d(nn.Module):
    """x + attention among the positions of norm(x): (B, C, H, W) -> the same."""

    def __init__(self, channels, head_dim=64):
        super().__init__()
        self.heads = max(1, channels // head_dim) if channels % head_dim == 0 else 1
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                                        # (B, HW, C)
        h = self.out(attention(*self.qkv(tokens).chunk(3, dim=-1), self.heads))                 # (B, HW, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])                                  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Flow

class CrossAttnBlock(nn.Module):
    """h + attention(h -> tokens), then h + MLP(h), both on normalised inputs: (B, T, E), (B, S, E) -> (B, T, E)."""

    def __init__(self, embed_dim, heads, mlp_ratio):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.q = nn.Linear(embed_dim, embed_dim)
        # No biases: softmax is blind to one on the keys, and the one on the values is the output projection's.
        self.kv = nn.Linear(embed_dim, 2 * embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, mlp_ratio * embed_dim), nn.SiLU(),
                                 nn.Linear(mlp_ratio * embed_dim, embed_dim))

    def forward(self, h, tokens):
        k, v = self.kv(self.norm_kv(tokens)).chunk(2, dim=-1)                                   # (B, S, E) each
        h = h + self.out(attention(self.q(self.norm_q(h)), k, v, self.heads))
        return h + self.mlp(self.norm_mlp(h))


class CrossAttnConditioner(nn.Module):
    """The affine coefficients of one latent half, from the other half alone (and the context, if there is one).

        h = queries;  h = block(h -> tokens(other half), tokens(context)), `layers` times
        raw, t = head(h);  s = c tanh(raw / c)

    The queries are learned, one per target token: nothing of the target half enters, so the coupling stays invertible
    and its Jacobian triangular. The head alone starts at zero, which makes the flow the identity; whatever feeds it
    does not, so everything has a gradient from the second step on.
    """

    def __init__(self, half_dim, seq_len, embed_dim, heads, layers, mlp_ratio, scale_bound, context_dim):
        super().__init__()
        token_dim = half_dim // seq_len
        self.seq_len, self.scale_bound = seq_len, scale_bound
        self.embed = nn.Linear(token_dim, embed_dim)
        self.position = nn.Parameter(0.5 * torch.randn(seq_len, embed_dim))
        self.embed_context = nn.Linear(context_dim, embed_dim) if context_dim else None
        self.queries = nn.Parameter(0.5 * torch.randn(seq_len, embed_dim))
        self.blocks = nn.ModuleList(CrossAttnBlock(embed_dim, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 2 * token_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, half, context=None):
        """half (B, D/2), context (B, S, F) or None -> s, t, each (B, D/2), |s| < scale_bound."""
        tokens = self.embed(half.unflatten(1, (self.seq_len, -1))) + self.position              # (B, T, E)
        if self.embed_context is not None:
            tokens = torch.cat([tokens, self.embed_context(context)], dim=1)                    # (B, T + S, E)
        h = self.queries.expand(len(half), -1, -1)                                              # (B, T, E)
        for block in self.blocks:
            h = block(h, tokens)
        raw, t = full_precision(self.head(self.norm(h))).chunk(2, dim=-1)                       # (B, T, d) each
        return self.scale_bound * torch.tanh(raw.flatten(1) / self.scale_bound), t.flatten(1)   # (B, D/2) each


class BiCrossAttnCoupling(nn.Module):
    """One layer: a fixed permutation, then each half is transformed given the other.

        (a, b) = split(z[perm]);  b' = b exp(s_b(a)) + t_b(a);  a' = a exp(s_a(b')) + t_a(b')
        log|det| = sum s_b + sum s_a
    """

    def __init__(self, dim, perm, **conditioner):
        super().__init__()
        self.register_buffer("perm", perm)                                                      # (D,) int64
        self.cond_b = CrossAttnConditioner(dim // 2, **conditioner)
        self.cond_a = CrossAttnConditioner(dim // 2, **conditioner)

    def forward(self, z, context=None):
        a, b = z[:, self.perm].chunk(2, dim=1)                                                  # (B, D/2) each
        s_b, t_b = self.cond_b(a, context)
        b = b * torch.exp(s_b) + t_b
        s_a, t_a = self.cond_a(b, context)
        a = a * torch.exp(s_a) + t_a
        return torch.cat([a, b], dim=1), torch.cat([s_a, s_b], dim=1)                           # z', s: (B, D) each

    def inverse(self, z, context=None):
        a, b = z.chunk(2, dim=1)
        s_a, t_a = self.cond_a(b, context)
        a = (a - t_a) * torch.exp(-s_a)
        s_b, t_b = self.cond_b(a, context)
        b = (b - t_b) * torch.exp(-s_b)
        return torch.cat([a, b], dim=1)[:, self.perm.argsort()], torch.cat([s_a, s_b], dim=1)


class BiCrossAttnFlow(nn.Module):
    """zK = f(z0), a stack of bi-directional cross-attention couplings; log|det dzK/dz0| = sum of all s. A new one is the
    identity: the last layer's permutation undoes the others.

    With positions S > 1, z is a map of S positions with D / S channels each, and stays one: the permutations are of the
    channels, so that a half is half of the channels at every position, position after position. With T = S a token is a
    position, with fewer tokens neighbours, with more a part of one. The inverse is exact and costs the same as the forward
    pass. With `whiten` a constant linear map W, |det W| = 1, comes before the layers, of the channels at each position (the
    identity until set_whitening_): the halves of correlated channels tell a layer little but of their correlations. Raises
    ValueError on sizes that do not fit.
    """

    def __init__(self,
                 dim,                   # D, divisible by 2 * seq_len
                 length=8,              # coupling layers, 1 or more
                 seq_len=8,             # T, tokens per half
                 embed_dim=128,         # E, divisible by heads
                 heads=4,
                 layers=2,              # attention blocks per conditioner
                 context_dim=None,      # F of the amortised flow's context tokens, None = no context
                 mlp_ratio=4,           # hidden width of the blocks' MLP over E
                 scale_bound=2.0,       # c: |s| < c
                 perm_seed=0,           # the permutations' own generator
                 positions=1,           # S of a spatial latent; D is divisible by 2S then
                 whiten=False):
        super().__init__()
        if length < 1 or layers < 1 or mlp_ratio < 1:
            raise ValueError(f"flow length, layers and mlp_ratio must be at least 1, not {length}, {layers}, {mlp_ratio}")
        if seq_len < 1 or dim % (2 * seq_len):
            raise ValueError(f"latent_dim {dim} is not divisible by 2 * flow_seq_len = {2 * seq_len}")
        if positions < 1 or dim % (2 * positions):
            raise ValueError(f"latent_dim {dim} is not divisible by 2 * {positions}, two halves at each position")
        if heads < 1 or embed_dim % heads:
            raise ValueError(f"flow_embed_dim {embed_dim} is not divisible by flow_heads {heads}")
        if not scale_bound > 0:
            raise ValueError(f"scale_bound must be positive, not {scale_bound}")
        self.dim, self.scale_bound, self.context_dim, self.positions = dim, scale_bound, context_dim, positions
        self.whiten = whiten
        if whiten:                                        # W = diag(exp(log_scale)) (I + tril), (D/S, D/S)
            channels = dim // positions
            self.register_buffer("log_scale", torch.zeros(channels))                            # sums to 0
            self.register_buffer("tril", torch.zeros(channels, channels))                       # strictly lower triangular
        generator = torch.Generator().manual_seed(perm_seed)
        # The values of z0 as a layer finds them, position after position (S, D/S), and where: in a map first, then in the
        # halves (2, S, D/2S) that a layer leaves. The last layer brings all back to their places: a new flow is the identity,
        # and a VampPrior's components, which come from the encoder as z0 does, start where the latents are.
        # (The device is named since utils builds models on the meta device, to learn their sizes.)
        values = lie = torch.arange(dim, device="cpu").unflatten(0, (positions, -1))
        self.couplings = nn.ModuleList()
        for layer in range(length):
            last = layer == length - 1
            channels = values[0].argsort() if last else torch.randperm(dim // positions, generator=generator, device="cpu")
            perm = torch.cat([half.flatten() for half in lie[:, channels].chunk(2, dim=1)])
            self.couplings.append(BiCrossAttnCoupling(
                dim, perm, seq_len=seq_len, embed_dim=embed_dim, heads=heads, layers=layers, mlp_ratio=mlp_ratio,
                scale_bound=scale_bound, context_dim=context_dim))
            values = values[:, channels]
            lie = self.join_halves(torch.arange(dim, device="cpu")[None])[0].unflatten(0, (positions, -1))
        self.fold_norms = None                            # a FoldNorms: train with the kernels at the end of this file

    def forward(self, z0, context=None):
        """z0 (B, D), context (B, S, F) or None -> zK (B, D), log|det dzK/dz0| (B,)."""
        z, scales = self.transform(z0, context)
        return z, scales.sum((0, 2))

    def inverse(self, zK, context=None):
        """zK (B, D), context (B, S, F) or None -> z0 (B, D), log|det dz0/dzK| (B,)."""
        z, log_det = full_precision(zK).unflatten(1, (self.positions, 2, -1)).transpose(1, 2).flatten(1), 0.0
        for coupling in reversed(self.couplings):
            z, s = coupling.inverse(z, context)
            log_det = log_det - s.sum(1)
        return self.unwhitened(z) if self.whiten else z, log_det

    def transform(self, z0, context=None):
        """As forward, with every layer's log-scales: zK (B, D), s (length, B, D)."""
        if self.whiten:
            z0 = self.whitened(z0)
        if self.fold_norms is not None and self.training:
            z, scales = fused_transform(self, z0)
            return self.join_halves(z), scales
        z, scales = full_precision(z0), []
        for coupling in self.couplings:
            z, s = coupling(z, context)
            scales.append(s)
        return self.join_halves(z), torch.stack(scales)

    @torch.no_grad()
    def set_whitening_(self, z0):
        """Let the map before the couplings be the one after which the channels of points (N, D), seen from the mean of their
        position, are uncorrelated and vary alike: their Cholesky factor's inverse, but for a number that makes log|det| 0."""
        z = z0.unflatten(1, (self.positions, -1))
        matrix = whitening((z - z.mean(0)).flatten(0, 1))                                       # (D/S, D/S)
        scale = matrix.diagonal()
        # (In steps that floating-point numbers of any size hold: the sum of all is 0, not nearly.)
        log_scale = ((scale.log() - scale.log().mean()) * 1024).round()
        log_scale[0] -= log_scale.sum()
        self.log_scale.copy_(log_scale / 1024)
        self.tril.copy_((matrix / scale[:, None]).tril(-1))

    def whitened(self, z):
        """(B, D) -> W z of each position, (B, D)."""
        with no_autocast(z.device.type):
            z = full_precision(z).unflatten(1, (self.positions, -1))                            # (B, S, D/S)
            return ((z + z @ self.tril.T.to(z)) * torch.exp(self.log_scale.to(z))).flatten(1)

    def unwhitened(self, z):
        """Its inverse: (B, D) -> (B, D)."""
        z = (z.unflatten(1, (self.positions, -1)) * torch.exp(-self.log_scale.to(z))).flatten(0, 1)     # (B S, D/S)
        z = torch.linalg.solve_triangular(self.tril.to(z), z.T, upper=False, unitriangular=True).T
        return z.unflatten(0, (-1, self.positions)).flatten(1)

    def join_halves(self, z):
        """The two halves that the last layer leaves (B, D) as a map, position after position: (B, D)."""
        return z.unflatten(1, (2, self.positions, -1)).transpose(1, 2).flatten(1)


JACOBIAN_NUMBERS = 2 ** 20           # of check_flow at a time: copies times the numbers in the queries of all blocks


@torch.no_grad()
def perturb_(module, std, generator):
    """Add N(0, std^2) to every parameter, in place: at its identity initialisation any flow passes any check."""
    for p in module.parameters():
        p.add_(std * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


def check_flow(flow, batch=2, context_tokens=4, perturb=0.05, seed=0):
    """Is the flow invertible, and is its log-determinant the Jacobian's? Checked on a float64 copy on the CPU.

    Round trips and the inverse's log-determinant with the weights as they are and once more perturbed by N(0, perturb^2),
    with which autograd's Jacobian of one sample is compared too: it takes most of the time, and the perturbed weights
    show more. The copy has a generator of its own, so nothing outside is disturbed. Returns a dict of the worst values:
    `inverse_error` and `log_det_error` (relative to 1 + |z| and 1 + |log det|), `layer` (1-based, the layer with the
    largest round-trip error of its own; 0 if the whole flow's is below 1e-9) and `scale_std` (the spread of s with
    perturbed weights, which must not be 0 for the check to mean anything).
    """
    generator = torch.Generator().manual_seed(seed)
    probe = copy.deepcopy(flow).cpu().double().eval().requires_grad_(False)
    B, D = batch, flow.dim

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def relative(x, y):
        error = (x - y).abs() / (1 + y.abs())
        return float("inf") if not torch.isfinite(error).all() else error.max().item()

    worst = {"inverse_error": 0.0, "log_det_error": 0.0, "layer": 0, "scale_std": 0.0}
    layer_error = -1.0
    for std in (0.0, perturb):
        if std:
            perturb_(probe, std, generator)
        z0 = randn(B, D)
        context = randn(B, context_tokens, flow.context_dim) if flow.context_dim else None
        zK, scales = probe.transform(z0, context)
        log_det = scales.sum((0, 2))
        back, inverse_log_det = probe.inverse(zK, context)
        inverse_error = relative(back, z0)
        worst["inverse_error"] = max(worst["inverse_error"], inverse_error)
        worst["log_det_error"] = max(worst["log_det_error"], relative(-inverse_log_det, log_det))
        worst["scale_std"] = scales.std().item()
        z = z0
        for i, coupling in enumerate(probe.couplings if inverse_error >= 1e-9 else []):
            z_next, _ = coupling(z, context)
            error = relative(coupling.inverse(z_next, context)[0], z)
            if error > layer_error:
                worst["layer"], layer_error = i + 1, error
            z = z_next
    # The first sample's Jacobian: row i of copies of it is differentiated for output i, as many rows at a time as keep the
    # activations within some hundred MB.
    jacobian = []
    numbers = sum(len(m.blocks) * m.queries.numel() for m in probe.modules() if isinstance(m, CrossAttnConditioner))
    for rows in torch.eye(D, dtype=torch.float64).split(max(1, JACOBIAN_NUMBERS // numbers)):
        with torch.enable_grad():
            copies = z0[0].expand(len(rows), D).clone().requires_grad_(True)
            out, _ = probe(copies, None if context is None else context[0].expand(len(rows), -1, -1))
        jacobian.append(torch.autograd.grad(out, copies, rows)[0])
    jacobian = torch.cat(jacobian)
    worst["log_det_error"] = max(worst["log_det_error"], relative(log_det[0], torch.linalg.slogdet(jacobian).logabsdet))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Encoder and decoder

def require_float(x):
    if not x.is_floating_point():
        raise TypeError(f"images must be floating-point numbers in [-1, 1] (utils.to_float makes them), not {x.dtype}")


class Encoder(nn.Module):
    """ResNet encoder: at each stage a stride-2 3x3 convolution, GroupNorm, SiLU and ResBlocks, then self-attention.

    mu and logvar are linear in the whole feature map, those of a spatial latent, position by position, in the features there.
    """

    def __init__(self, in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage, spatial):
        super().__init__()
        self.spatial = spatial
        layers, c_in = [], in_channels
        for c in hidden_dims:
            layers += [nn.Conv2d(c_in, c, 3, stride=2, padding=1), GroupNorm(c), nn.SiLU()]
            layers += [ResBlock(c) for _ in range(blocks_per_stage)]
            c_in = c
        self.stages = nn.Sequential(*layers, SelfAttention2d(c_in), GroupNorm(c_in), nn.SiLU())
        side = img_size // 2 ** len(hidden_dims)
        self.head = nn.Linear(c_in, 2 * latent_dim // side ** 2) if spatial else nn.Linear(c_in * side ** 2, 2 * latent_dim)

    def forward(self, x):
        """x (B, C, H, W) -> mu, logvar (B, D) in full precision, feature map (B, F, h, w)."""
        require_float(x)
        h = self.stages(x)
        with no_autocast(x.device.type):                        # mu in bf16 would be rounded by more than a small sigma
            features = h.flatten(2).transpose(1, 2) if self.spatial else h.flatten(1)           # (B, S, F) or (B, F S)
            mu, logvar = self.head(full_precision(features)).chunk(2, dim=-1)                   # (B, S, D/S) or (B, D) each
        return mu.flatten(1), logvar.flatten(1), h


class Decoder(nn.Module):
    """The encoder mirrored: nearest-neighbour doubling and a 3x3 convolution at each stage, tanh at the end.

    Self-attention after the first stage; no ResBlock at full resolution, where one costs as much as four below it.
    """

    def __init__(self, out_channels, img_size, latent_dim, hidden_dims, blocks_per_stage, spatial):
        super().__init__()
        self.spatial, self.side = spatial, img_size // 2 ** len(hidden_dims)
        side, c_in = self.side, hidden_dims[-1]
        if spatial:
            self.stem = nn.Conv2d(latent_dim // side ** 2, c_in, 3, padding=1)
        else:
            self.stem = nn.Sequential(nn.Linear(latent_dim, c_in * side * side), nn.Unflatten(1, (c_in, side, side)))
        layers = [] if len(hidden_dims) > 1 else [SelfAttention2d(c_in)]
        widths = [*reversed(hidden_dims[:-1]), hidden_dims[0]]
        for i, c in enumerate(widths):
            # (The identity: in checkpoints the layers are numbered as they were when doubling was one of its own.)
            layers += [nn.Identity(), UpConv2d(c_in, c), GroupNorm(c), nn.SiLU()]
            if i < len(widths) - 1:
                layers += [ResBlock(c) for _ in range(blocks_per_stage)]
                layers += [SelfAttention2d(c)] if i == 0 else []
            c_in = c
        self.stages = nn.Sequential(*layers, nn.Conv2d(c_in, out_channels, 3, padding=1))

    def forward(self, z):
        """z (B, D) -> image (B, C, H, W) in [-1, 1]."""
        if self.spatial:                                                                        # (B, D/S, h, w)
            z = z.unflatten(1, (self.side ** 2, -1)).transpose(1, 2).unflatten(2, (self.side, self.side))
        h = self.stages(self.stem(z))
        return torch.tanh(full_precision(h))                    # in bf16 it is 1 from 3.5 on, and without a gradient


# ---------------------------------------------------------------------------------------------------------------------
# The model

class VAEOutput(NamedTuple):
    recon: torch.Tensor | None  # (B, C, H, W) in [-1, 1], None where nothing is decoded
    mu: torch.Tensor            # (B, D) of q(z0|x)
    logvar: torch.Tensor        # (B, D) of q(z0|x)
    z0: torch.Tensor            # (B, D) sample of q(z0|x)
    zK: torch.Tensor            # (B, D) = f(z0)
    log_det: torch.Tensor       # (B,) log|det dzK/dz0|
    mu_k: torch.Tensor          # (K, D) of the prior's components
    logvar_k: torch.Tensor      # (K, D)


class KLTerms(NamedTuple):
    """One-sample KL of each image, in nats: kl = log_q0 - log_det - log_p, each (B,)."""
    kl: torch.Tensor
    log_q0: torch.Tensor        # log N(z0; mu, sigma^2)
    log_det: torch.Tensor       # log|det dzK/dz0|
    log_p: torch.Tensor         # log p(zK)


class CrossFlowVampVAE(nn.Module):
    """The whole model; see the module's docstring for the equations. Raises ValueError on sizes that do not fit.

    flow_prior  unflowed: the mixture lives at zK, the flow carries the aggregated posterior to it.
                pushed:   the mixture lives at z0 and is carried along: log p(zK) = log p0(z0) - log|det|, so that the
                          log-determinants cancel and the KL is that of the model with no flow.
    flow_context  encoder: the flow also attends to the encoder's feature map (amortised flow).
    decode_from  zK: the decoder sees what the flow makes. z0: it sees z0, and the flow is part of the prior alone,
                 p(z0) = p(f(z0)) |det df/dz0|, which sampling inverts. The KL is the same expression in both.
    latent_layout  vector: each latent value depends on the whole feature map. spatial: z is a map as large as the encoder's
                   last, position after position (S, D/S); with flow_seq_len = S the flow's tokens are positions.
    """

    def __init__(self,
                 in_channels=3,                     # 1 or 3
                 img_size=32,                       # H = W, divisible by 2^(number of stages)
                 latent_dim=128,                    # D
                 hidden_dims=(64, 128, 256, 512),   # channels of each encoder stage
                 blocks_per_stage=1,                # ResBlocks
                 num_components=100,                # K, for the vamp and mog priors
                 prior="vamp",                      # vamp | mog | standard
                 flow_length=8,                     # coupling layers, 0 = no flow
                 flow_seq_len=8,                    # tokens per latent half
                 flow_embed_dim=128,
                 flow_heads=4,
                 flow_layers=2,                     # attention blocks per conditioner
                 flow_mlp_ratio=4,
                 flow_whiten=False,                 # a linear map before the couplings, found by a second stage
                 flow_prior="unflowed",             # unflowed | pushed
                 flow_context="none",               # none | encoder
                 decode_from="zK",                  # zK | z0
                 latent_layout="vector",            # vector | spatial: D is divisible by S, with a flow by 2S
                 mixture_weights="uniform",         # uniform | learned, of the vamp and mog priors
                 mixture_covariance="diag",         # diag | full, of the mog prior
                 posterior_std=0.0,                 # sigma of q(z0|x) and so of vamp's components, 0 = the encoder's
                 scale_bound=2.0,                   # bound of the flow's log-scales
                 logvar_clamp=(-10.0, 10.0),        # of q(z0|x) and so of the prior's components
                 perm_seed=0):                      # of the flow's fixed permutations
        super().__init__()
        hidden_dims = tuple(hidden_dims)
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, not {in_channels}")
        check_sizes(dict(img_size=img_size, latent_dim=latent_dim, hidden_dims=hidden_dims, blocks_per_stage=blocks_per_stage,
                         num_components=num_components, flow_length=flow_length, flow_seq_len=flow_seq_len,
                         flow_embed_dim=flow_embed_dim, flow_heads=flow_heads, flow_layers=flow_layers,
                         flow_mlp_ratio=flow_mlp_ratio, scale_bound=scale_bound))
        if not hidden_dims or min(hidden_dims) < 1:
            raise ValueError("hidden_dims needs at least one positive width")
        if img_size < 1 or img_size % 2 ** len(hidden_dims):
            raise ValueError(f"img_size {img_size} is not divisible by 2^{len(hidden_dims)} = {2 ** len(hidden_dims)} "
                             f"(one halving per entry of hidden_dims)")
        if latent_dim < 1 or blocks_per_stage < 0 or flow_length < 0:
            raise ValueError(f"latent_dim must be 1 or more, blocks_per_stage and flow_length 0 or more, not "
                             f"{latent_dim}, {blocks_per_stage}, {flow_length}")
        for name, value, choices in (("prior", prior, PRIORS), ("flow_prior", flow_prior, FLOW_PRIORS),
                                     ("flow_context", flow_context, FLOW_CONTEXTS), ("decode_from", decode_from, DECODE_FROM),
                                     ("latent_layout", latent_layout, LATENT_LAYOUTS),
                                     ("mixture_weights", mixture_weights, MIXTURE_WEIGHTS),
                                     ("mixture_covariance", mixture_covariance, MIXTURE_COVARIANCES)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        if mixture_covariance == "full" and prior != "mog":
            raise ValueError(f"mixture_covariance 'full' needs prior 'mog', not {prior!r}")
        if prior != "standard" and num_components < 1:
            raise ValueError(f"num_components must be at least 1, not {num_components}")
        if flow_prior == "pushed" and flow_context == "encoder":
            raise ValueError("flow_prior 'pushed' needs one flow for all images, flow_context 'encoder' gives each its own")
        if decode_from == "z0" and (flow_prior == "pushed" or flow_context == "encoder"):
            raise ValueError("decode_from 'z0' needs a flow that is the prior's own: no flow_prior 'pushed', which would leave "
                             "it idle, and no flow_context 'encoder', without which a sample could not be inverted")
        if not 0 <= posterior_std < math.inf:
            raise ValueError(f"posterior_std must be 0 (learned) or positive, not {posterior_std}")
        if len(logvar_clamp) != 2 or not logvar_clamp[0] < logvar_clamp[1]:
            raise ValueError(f"logvar_clamp must be two ascending numbers, not {logvar_clamp}")

        side = img_size // 2 ** len(hidden_dims)
        if side > LARGEST_MAP:
            raise ValueError(f"img_size {img_size} leaves {side} pixels a side after {len(hidden_dims)} halvings, more than "
                             f"{LARGEST_MAP}; give hidden_dims more entries")
        spatial = latent_layout == "spatial"
        if spatial and latent_dim % side ** 2:
            raise ValueError(f"latent_dim {latent_dim} is not divisible by the {side ** 2} positions of a spatial latent")
        ends = 9 * latent_dim // side ** 2 if spatial else 2 * latent_dim * side ** 2           # of the encoder, the decoder
        largest = max(ends * hidden_dims[-1], 9 * max(hidden_dims) ** 2,
                      flow_mlp_ratio * flow_embed_dim ** 2, num_components * in_channels * img_size ** 2 * (prior == "vamp"),
                      num_components * latent_dim ** 2 * (mixture_covariance == "full"),
                      (latent_dim // (side ** 2 if spatial else 1)) ** 2 * (flow_whiten and flow_length > 0))
        if largest > LARGEST_TENSOR:
            raise ValueError(f"a single tensor of this model would hold {largest:,} numbers, more than {LARGEST_TENSOR:,}")

        self.in_channels, self.img_size, self.latent_dim = in_channels, img_size, latent_dim
        self.num_components = 1 if prior == "standard" else num_components
        self.prior, self.flow_prior, self.flow_context = prior, flow_prior, flow_context
        self.decode_from, self.posterior_std = decode_from, posterior_std
        self.logvar_clamp = tuple(logvar_clamp)
        self.encoder = Encoder(in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage, spatial)
        self.flow, self.context_position = None, None
        if flow_length:
            context_dim = hidden_dims[-1] if flow_context == "encoder" else None
            self.flow = BiCrossAttnFlow(latent_dim, flow_length, flow_seq_len, flow_embed_dim, flow_heads, flow_layers,
                                        context_dim, flow_mlp_ratio, scale_bound, perm_seed, side ** 2 if spatial else 1,
                                        flow_whiten)
            if context_dim:
                self.context_position = nn.Parameter(0.5 * torch.randn(side * side, context_dim))
        self.decoder = Decoder(in_channels, img_size, latent_dim, hidden_dims, blocks_per_stage, spatial)
        if prior == "vamp":
            self.pseudo_raw = nn.Parameter((0.5 * torch.randn(num_components, in_channels, img_size, img_size)).clamp(-1, 1))
        elif prior == "mog":
            self.prior_mu = nn.Parameter(torch.randn(num_components, latent_dim))
            self.prior_logvar = nn.Parameter(torch.zeros(num_components, latent_dim))
        full = mixture_covariance == "full"
        self.prior_tril = nn.Parameter(torch.zeros(num_components, latent_dim, latent_dim)) if full else None
        learned = mixture_weights == "learned" and prior != "standard"
        self.prior_logits = nn.Parameter(torch.zeros(num_components)) if learned else None

    # -- prior ------------------------------------------------------------------------------------------------------

    @property
    def pseudo_inputs(self) -> torch.Tensor | None:
        """The VampPrior's learned inputs (K, C, H, W), clamped to [-1, 1]; None for the other priors.

        The clamp's gradient is the identity: an entry at the border can still move back.
        """
        if self.prior != "vamp":
            return None
        return self.pseudo_raw.detach().clamp(-1, 1) + (self.pseudo_raw - self.pseudo_raw.detach())

    @torch.no_grad()
    def project_(self):
        """Bring the pseudo-inputs back into [-1, 1]; called after each optimiser step (projected gradient)."""
        if self.prior == "vamp":
            self.pseudo_raw.clamp_(-1, 1)

    @torch.no_grad()
    def init_prior(self, images):
        """Start the K components at the first K of these images (K or more, C, H, W): as pseudo-inputs, or (mog) at their
        posteriors' means, each as wide as all the images' posteriors together, since of narrow ones the widest would take
        all responsibility."""
        if self.prior == "vamp":
            self.pseudo_raw.copy_(images[:self.num_components].clamp(-1, 1))
        elif self.prior == "mog":
            mu, logvar = self.encode(images)
            self.prior_mu.copy_(mu[:self.num_components])
            self.prior_logvar.copy_((logvar.exp().mean(0) + mu.var(0, unbiased=False)).log())

    def prior_params(self):
        """mu_k, logvar_k of the prior's components, (K, D) each; (1, D) of zeros for the standard prior."""
        if self.prior == "vamp":
            return self.encode(self.pseudo_inputs)
        return self._free_prior_params()

    def _free_prior_params(self):
        """The components that need no encoder: mog, standard."""
        if self.prior == "mog":
            return self.prior_mu, self.prior_logvar.clamp(*self.logvar_clamp)
        zeros = self.encoder.head.weight.new_zeros(1, self.latent_dim)
        return zeros, zeros

    def log_weights(self):
        """log w_k of the prior's components, (K,)."""
        if self.prior_logits is None:
            return self.encoder.head.weight.new_full((self.num_components,), -math.log(self.num_components))
        return torch.log_softmax(full_precision(self.prior_logits), 0)

    def component_draws(self, k, eps, prior=None):
        """Draws (n, D) of the components k (n,) from standard normal noise eps (n, D), where the mixture lives."""
        mu_k, logvar_k = self.prior_params() if prior is None else prior
        offset = torch.exp(0.5 * logvar_k[k]) * eps
        if self.prior_tril is not None:                   # (I + T_k) offset' = offset; as many matrices at a time as there are
            offset = torch.cat([torch.linalg.solve_triangular(self.prior_tril[some].to(part), part[:, :, None], upper=False,
                                                              unitriangular=True)[:, :, 0]
                                for some, part in zip(k.split(self.num_components), offset.split(self.num_components))])
        return mu_k[k] + offset

    @torch.no_grad()
    def fit_mixture_(self, zK, steps, generator=None, progress=iter):
        """Set the full-covariance mixture to what fit_mixture finds for points (N, D) of where it lives."""
        learned = self.prior_logits is not None
        mu, logvar, tril, log_w = fit_mixture(zK, self.num_components, steps, learned, generator=generator, progress=progress)
        self.prior_mu.copy_(mu)
        self.prior_logvar.copy_(logvar)
        self.prior_tril.copy_(tril)
        if learned:
            self.prior_logits.copy_(log_w)

    @torch.no_grad()
    def fit_weights_(self, responsibilities, steps=50):
        """Give the components the weights under which points are likeliest, by EM, everything else staying as it is: a
        component that none of them needs is drawn no more. responsibilities: the points' under the present weights, (N, K). On
        the CPU, as not every device has float64."""
        # Up to a factor for each point, which cancels.
        likelihoods = responsibilities.cpu().double() / self.log_weights().cpu().double().exp().clamp(min=1e-30)
        w = likelihoods.new_full((self.num_components,), 1 / self.num_components)
        for _ in range(steps):
            share = likelihoods * w
            w = (share / share.sum(1, keepdim=True)).mean(0)
        self.prior_logits = nn.Parameter(w.clamp(min=1e-30).log().to(self.encoder.head.weight))

    def log_prior(self, zK):
        """log p(zK) in nats: (B, D) -> (B,)."""
        mu_k, logvar_k = self.prior_params()
        if self.flow is not None and self.flow_prior == "pushed":
            z0, inverse_log_det = self.flow.inverse(zK)
            return log_mixture(z0, mu_k, logvar_k, self.log_weights(), self.prior_tril) + inverse_log_det
        return log_mixture(zK, mu_k, logvar_k, self.log_weights(), self.prior_tril)

    # -- posterior --------------------------------------------------------------------------------------------------

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> mu, logvar of q(z0|x), (B, D) each."""
        mu, logvar, _ = self.encoder(x)
        return mu, self.bound(logvar)

    def bound(self, logvar):
        """The encoder's log-variance as it is used everywhere: clamped, or replaced by posterior_std."""
        if self.posterior_std:
            return torch.full_like(logvar, 2 * math.log(self.posterior_std))
        return logvar.clamp(*self.logvar_clamp)

    def context(self, features):
        """The amortised flow's context tokens (B, S, F) of an encoder feature map (B, F, h, w); None if not amortised."""
        if self.context_position is None:
            return None
        return features.flatten(2).transpose(1, 2) + self.context_position

    def apply_flow(self, z0, context=None):
        """zK (B, D) and log|det dzK/dz0| (B,); z0 itself and zeros where there is no flow."""
        return (z0, z0.new_zeros(len(z0))) if self.flow is None else self.flow(z0, context)

    def posterior(self, x):
        """x (B, C, H, W) -> mu, logvar of q(z0|x), (B, D) each, and the flow's context or None."""
        mu, logvar, features = self.encoder(x)
        return mu, self.bound(logvar), self.context(features)

    def decode(self, z):
        """The decoder's latent (B, D), zK unless decode_from is z0, -> image (B, C, H, W) in [-1, 1]."""
        return self.decoder(z)

    def seen_by_decoder(self, z0, zK):
        """The one of the two, (B, D) each, that the decoder takes."""
        return zK if self.decode_from == "zK" else z0

    def decoder_latent(self, zK):
        """What the decoder takes of zK (B, D): itself, or z0 = f^-1(zK) (B, D)."""
        return zK if self.flow is None or self.decode_from == "zK" else self.flow.inverse(zK)[0]

    def from_mixture(self, z):
        """What the decoder takes of a draw of the mixture (B, D), wherever the mixture lives: (B, D)."""
        return self.apply_flow(z)[0] if self.flow_prior == "pushed" else self.decoder_latent(z)

    @torch.no_grad()
    def reconstruct(self, x, eps=None):
        """x (B, C, H, W) in [-1, 1] -> its reconstruction, at the posterior's mean, or at mu + sigma eps for eps (B, D)."""
        mu, logvar, context = self.posterior(x)
        z0 = mu if eps is None else mu + torch.exp(0.5 * logvar) * eps
        return self.decode(self.seen_by_decoder(z0, self.apply_flow(z0, context)[0]))

    def forward(self, x, eps=None, prior=None):
        """x (B, C, H, W) in [-1, 1] -> VAEOutput.

        eps (B, D) is the standard normal noise of z0 = mu + sigma eps, drawn here if not given. prior, (mu_k, logvar_k)
        from prior_params(), spares encoding the pseudo-inputs again; without it they go through the encoder in one
        batch with x. Raises TypeError on images of integers: in that batch they would become floating-point numbers, and
        nobody has brought them to [-1, 1].
        """
        require_float(x)
        B = len(x)
        if prior is None and self.prior == "vamp":
            mu, logvar, features = self.encoder(torch.cat([x, self.pseudo_inputs]))              # (B + K, ...)
            logvar = self.bound(logvar)
            (mu, mu_k), (logvar, logvar_k) = mu.split([B, len(mu) - B]), logvar.split([B, len(mu) - B])
            context = self.context(features[:B])
        else:
            mu, logvar, context = self.posterior(x)
            mu_k, logvar_k = self._free_prior_params() if prior is None else prior
        out = self.carry(mu, logvar, torch.randn_like(mu) if eps is None else eps, (mu_k, logvar_k), context)
        # (Not out._replace: torch.compile fails at it in torch 2.11.)
        return VAEOutput(self.decode(self.seen_by_decoder(out.z0, out.zK)), *out[1:])

    def carry(self, mu, logvar, eps, prior=None, context=None):
        """Posteriors (B, D), (B, D) and noise (B, D) -> VAEOutput without recon: all that the KL and the prior need."""
        z0 = mu + torch.exp(0.5 * logvar) * eps                                                  # (B, D)
        zK, log_det = self.apply_flow(z0, context)
        return VAEOutput(None, mu, logvar, z0, zK, log_det, *(self.prior_params() if prior is None else prior))

    def mixture_latent(self, out):
        """The latent at which the mixture lives: zK, or z0 where the prior is pushed through the flow. (B, D)"""
        return out.z0 if self.flow_prior == "pushed" else out.zK

    def kl_terms(self, out):
        """The one-sample KL of a VAEOutput and its parts, in nats per image: KLTerms of (B,)."""
        log_q0 = log_normal(out.z0, out.mu, out.logvar)
        log_p = log_mixture(self.mixture_latent(out), out.mu_k, out.logvar_k, self.log_weights(), self.prior_tril)
        if self.flow_prior == "pushed":
            log_p = log_p - out.log_det
        return KLTerms(log_q0 - out.log_det - log_p, log_q0, out.log_det, log_p)

    def responsibilities(self, out):
        """p(k | z) of the prior's components for a VAEOutput: (B, K)."""
        log_p_k = component_log_probs(self.mixture_latent(out), out.mu_k, out.logvar_k, self.prior_tril)
        return torch.softmax(log_p_k + self.log_weights(), 1)

    # -- generation -------------------------------------------------------------------------------------------------

    def sample_latents(self, n, temperature=1.0, generator=None, prior=None):
        """n draws from the prior, k by its weights, N(mu_k, temperature^2 Sigma_k), as what the decoder takes -> (n, D).

        Drawn on the generator's device (the CPU without one), so that a seed gives the same latents on any device.
        prior, (mu_k, logvar_k) from prior_params(), spares encoding the pseudo-inputs again.
        """
        mu_k, logvar_k = self.prior_params() if prior is None else prior
        device = generator.device if generator is not None else "cpu"
        if self.prior_logits is None:
            k = torch.randint(len(mu_k), (n,), generator=generator, device=device).to(mu_k.device)
        else:
            weights = self.log_weights().exp().to(device)
            k = torch.multinomial(weights, n, replacement=True, generator=generator).to(mu_k.device)
        eps = torch.randn(n, self.latent_dim, generator=generator, device=device).to(mu_k)
        return self.from_mixture(self.component_draws(k, temperature * eps, (mu_k, logvar_k)))

    @torch.no_grad()
    def sample(self, n, temperature=1.0, generator=None):
        """n images of the prior, (n, C, H, W) in [-1, 1]."""
        return self.decode(self.sample_latents(n, temperature, generator))


# ---------------------------------------------------------------------------------------------------------------------
# The same flow on a GPU, one Triton kernel a layer and pass: a layer is two hundred small operations, which take a GPU far
# longer to start than to do. The matrices are bfloat16, as autocast's; sums, norms and the latent are float32. Latent
# halves, tokens and heads never leave the chip; what the gradients of the weights need is kept, and they are batched
# matrix products of all layers at once.
#
# A program of a kernel has R = IMAGES T rows, a row being a token of an image; N = B T rows in all. c = 2 layer + half
# counts the conditioners, cond_b's (half 0) before cond_a's, and cb = c BLOCKS + block their blocks.

if triton is not None:
    @triton.jit
    def _tile(at, rows, columns, stride, mask):
        """(rows, columns) of a matrix with so many elements a row; 0 where a mask, if there is one, is False."""
        at += rows[:, None] * stride + columns[None, :]
        if mask is None:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=mask, other=0.0)
        return x

    @triton.jit
    def _dot(a, b):
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _normalised(x, E: tl.constexpr):
        """(x - mean) / std of each row, and 1 / std; LayerNorm's factors are in the weights that follow (fold)."""
        x = x - (tl.sum(x, 1) / E)[:, None]
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / E + 1e-5)
        return x * scale[:, None], scale

    @triton.jit
    def _normalised_backward(grad, x, scale, E: tl.constexpr):
        return scale[:, None] * (grad - (tl.sum(grad, 1) / E)[:, None] - x * (tl.sum(grad * x, 1) / E)[:, None])

    @triton.jit
    def _attention(q, k, same, scale):
        """Of each token to those of its image."""
        score = tl.where(same, _dot(q, tl.trans(k)) * scale, float("-inf"))
        p = tl.exp(score - tl.max(score, 1)[:, None])
        return p / tl.sum(p, 1)[:, None]

    @triton.jit
    def _rows(layer, B, w, D: tl.constexpr, T: tl.constexpr, W: tl.constexpr, IMAGES: tl.constexpr):
        """This program's rows: N; their numbers, tokens, and whether they are among the N; which pairs of them are of one
        image; where in a half their values w lie, and which of these exist; where the latent (layer, image) of each begins."""
        R: tl.constexpr = IMAGES * T
        N = tl.cast(B, tl.int64) * T                                                             # so are offsets of rows
        row = tl.program_id(0) * R + tl.arange(0, R)
        image, token, inside = row // T, row % T, row < N
        same = image[:, None] == image[None, :]
        cell = token[:, None] * W + w[None, :]
        real = inside[:, None] & (w < W)[None, :]
        return N, row, token, inside, same, cell, real, (layer * B + image)[:, None] * D

    @triton.jit(do_not_specialize=["layer", "B"])
    def _layer_forward(layer, B, perm, z, s, embed, position, queries, wq, bq, wkv, bkv, wo, bo, w1, b1, w2, b2, wh, bh,
                       kept_x, kept_tokens, kept_f, kept_q, kept_a, kept_m, q_, kv_, u_, scale_t, scale_f, scale_q, scale_m,
                       bound: tl.constexpr, D: tl.constexpr, T: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
                       E: tl.constexpr, M: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, IMAGES: tl.constexpr,
                       CHUNK: tl.constexpr, KEEP: tl.constexpr):
        """Reads z[layer], writes z[layer + 1] and s[layer]; with KEEP, what the backward pass needs. W = D / 2T values a
        token, in WP places."""
        HALF: tl.constexpr = D // 2
        HD: tl.constexpr = E // HEADS
        kind = wq.dtype.element_ty
        e, w, o = tl.arange(0, E), tl.arange(0, WP), tl.arange(0, HD)
        N, row, token, inside, same, cell, real, at = _rows(layer, B, w, D, T, W, IMAGES)
        rows_e, here = row[:, None] * E + e[None, :], inside[:, None]
        x = tl.load(z + at + tl.load(perm + layer * D + cell, mask=real, other=0), mask=real, other=0.0)
        y = tl.load(z + at + tl.load(perm + layer * D + HALF + cell, mask=real, other=0), mask=real, other=0.0)
        for half in range(2):
            c = 2 * layer + half
            x16 = x.to(kind)
            tokens = _dot(x16, tl.trans(_tile(embed + c * E * W, e, w, W, (w < W)[None, :])))
            tokens += tl.load(position + (c * T + token[:, None]) * E + e[None, :])
            tokens, scale = _normalised(tokens, E)
            tokens16 = tokens.to(kind)
            if KEEP:
                tl.store(kept_x + (c * N + row)[:, None] * W + w[None, :], x16, mask=real)
                tl.store(kept_tokens + c * N * E + rows_e, tokens16, mask=here)
                tl.store(scale_t + c * N + row, scale, mask=inside)
            h = tl.load(queries + (c * T + token[:, None]) * E + e[None, :])
            for block in range(BLOCKS):
                cb = c * BLOCKS + block
                n, scale = _normalised(h, E)
                n16 = n.to(kind)
                if KEEP:
                    tl.store(kept_q + cb * N * E + rows_e, n16, mask=here)
                    tl.store(scale_q + cb * N + row, scale, mask=inside)
                h += tl.load(bo + cb * E + e)[None, :]
                for head in range(HEADS):
                    f = head * HD + o
                    q = _dot(n16, tl.trans(_tile(wq + cb * E * E, f, e, E, None))) + tl.load(bq + cb * E + f)[None, :]
                    k = _dot(tokens16, tl.trans(_tile(wkv + 2 * cb * E * E, f, e, E, None)))
                    k += tl.load(bkv + 2 * cb * E + f)[None, :]
                    v = _dot(tokens16, tl.trans(_tile(wkv + (2 * cb + 1) * E * E, f, e, E, None)))
                    v += tl.load(bkv + (2 * cb + 1) * E + f)[None, :]
                    q16, k16, v16 = q.to(kind), k.to(kind), v.to(kind)
                    p = _attention(q16, k16, same, HD ** -0.5)
                    a16 = _dot(p.to(kind), v16).to(kind)
                    h += _dot(a16, tl.trans(_tile(wo + cb * E * E, e, f, E, None)))
                    if KEEP:
                        rows_f = row[:, None] * E + f[None, :]
                        tl.store(q_ + cb * N * E + rows_f, q16, mask=here)
                        tl.store(kv_ + 2 * cb * N * E + row[:, None] * 2 * E + f[None, :], k16, mask=here)
                        tl.store(kv_ + 2 * cb * N * E + row[:, None] * 2 * E + E + f[None, :], v16, mask=here)
                        tl.store(kept_a + cb * N * E + rows_f, a16, mask=here)
                n, scale = _normalised(h, E)
                n16 = n.to(kind)
                if KEEP:
                    tl.store(kept_m + cb * N * E + rows_e, n16, mask=here)
                    tl.store(scale_m + cb * N + row, scale, mask=inside)
                h += tl.load(b2 + cb * E + e)[None, :]
                for chunk in range(M // CHUNK):
                    m = chunk * CHUNK + tl.arange(0, CHUNK)
                    u = _dot(n16, tl.trans(_tile(w1 + cb * M * E, m, e, E, None))) + tl.load(b1 + cb * M + m)[None, :]
                    h += _dot((u * tl.sigmoid(u)).to(kind), tl.trans(_tile(w2 + cb * E * M, e, m, M, None)))
                    if KEEP:
                        tl.store(u_ + cb * N * M + row[:, None] * M + m[None, :], u.to(kind), mask=here)
            n, scale = _normalised(h, E)
            n16 = n.to(kind)
            if KEEP:
                tl.store(kept_f + c * N * E + rows_e, n16, mask=here)
                tl.store(scale_f + c * N + row, scale, mask=inside)
            raw = _dot(n16, tl.trans(_tile(wh + 2 * c * W * E, w, e, E, (w < W)[:, None])))
            raw += tl.load(bh + 2 * c * W + w, mask=w < W, other=0.0)[None, :]
            t = _dot(n16, tl.trans(_tile(wh + (2 * c + 1) * W * E, w, e, E, (w < W)[:, None])))
            t += tl.load(bh + (2 * c + 1) * W + w, mask=w < W, other=0.0)[None, :]
            log_scale = bound * (2 * tl.sigmoid(2 / bound * raw) - 1)                             # bound tanh(raw / bound)
            tl.store(s + at + (1 - half) * HALF + cell, log_scale, mask=real)
            x, y = y * tl.exp(log_scale) + t, x
        at += B * D
        tl.store(z + at + cell, x, mask=real)
        tl.store(z + at + HALF + cell, y, mask=real)

    @triton.jit(do_not_specialize=["layer", "B"])
    def _layer_backward(layer, B, perm, z, s, grad_z, grad_s, embed, wq, wkv, wo, w1, w2, wh,
                        kept_tokens, kept_f, kept_q, kept_m, q_, kv_, u_, scale_t, scale_f, scale_q, scale_m,
                        g_tokens, g_queries, g_q, g_kv, g_o, silu_, g_u, g_2, g_head,
                        bound: tl.constexpr, D: tl.constexpr, T: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
                        E: tl.constexpr, M: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr, IMAGES: tl.constexpr,
                        CHUNK: tl.constexpr):
        """Reads grad_z[layer + 1], writes grad_z[layer] and the gradients of what each matrix multiplication gave (g_...)."""
        R: tl.constexpr = IMAGES * T
        HALF: tl.constexpr = D // 2
        HD: tl.constexpr = E // HEADS
        kind = wq.dtype.element_ty
        e, w, o = tl.arange(0, E), tl.arange(0, WP), tl.arange(0, HD)
        N, row, token, inside, same, cell, real, at = _rows(layer, B, w, D, T, W, IMAGES)
        rows_e, here = row[:, None] * E + e[None, :], inside[:, None]
        perm_a = tl.load(perm + layer * D + cell, mask=real, other=0)
        perm_b = tl.load(perm + layer * D + HALF + cell, mask=real, other=0)
        y, next_y = tl.load(z + at + perm_a, mask=real, other=0.0), tl.load(z + at + perm_b, mask=real, other=0.0)
        grad_y = tl.load(grad_z + at + B * D + cell, mask=real, other=0.0)
        grad_x = tl.load(grad_z + at + B * D + HALF + cell, mask=real, other=0.0)
        for i in range(2):                                # y' = y exp(s(x)) + t(x): first a' of b', then b' of a
            c = 2 * layer + 1 - i
            log_scale = tl.load(s + at + i * HALF + cell, mask=real, other=0.0)
            factor = tl.exp(log_scale)
            g_s = tl.load(grad_s + at + i * HALF + cell, mask=real, other=0.0) + grad_y * y * factor
            g_raw16 = (g_s * (1 - log_scale * log_scale / (bound * bound))).to(kind)
            g_t16 = grad_y.to(kind)
            head_at = g_head + 2 * c * N * W + row[:, None] * 2 * W + w[None, :]
            tl.store(head_at, g_raw16, mask=real)
            tl.store(head_at + W, g_t16, mask=real)
            g = _dot(g_raw16, _tile(wh + 2 * c * W * E, w, e, E, (w < W)[:, None]))
            g += _dot(g_t16, _tile(wh + (2 * c + 1) * W * E, w, e, E, (w < W)[:, None]))
            n = tl.load(kept_f + c * N * E + rows_e, mask=here, other=0.0).to(tl.float32)
            g = _normalised_backward(g, n, tl.load(scale_f + c * N + row, mask=inside, other=0.0), E)
            g_n_tokens = tl.zeros((R, E), tl.float32)
            for back in range(BLOCKS):
                cb = c * BLOCKS + BLOCKS - 1 - back
                g16 = g.to(kind)
                tl.store(g_2 + cb * N * E + rows_e, g16, mask=here)
                g_n = tl.zeros((R, E), tl.float32)
                for chunk in range(M // CHUNK):
                    m = chunk * CHUNK + tl.arange(0, CHUNK)
                    rows_m = cb * N * M + row[:, None] * M + m[None, :]
                    u = tl.load(u_ + rows_m, mask=here, other=0.0).to(tl.float32)
                    sigmoid = tl.sigmoid(u)
                    g_silu = _dot(g16, _tile(w2 + cb * E * M, e, m, M, None))
                    g_u16 = (g_silu * sigmoid * (1 + u * (1 - sigmoid))).to(kind)
                    g_n += _dot(g_u16, _tile(w1 + cb * M * E, m, e, E, None))
                    tl.store(silu_ + rows_m, (u * sigmoid).to(kind), mask=here)
                    tl.store(g_u + rows_m, g_u16, mask=here)
                n = tl.load(kept_m + cb * N * E + rows_e, mask=here, other=0.0).to(tl.float32)
                g += _normalised_backward(g_n, n, tl.load(scale_m + cb * N + row, mask=inside, other=0.0), E)
                g16 = g.to(kind)
                tl.store(g_o + cb * N * E + rows_e, g16, mask=here)
                g_n = tl.zeros((R, E), tl.float32)
                for head in range(HEADS):
                    f = head * HD + o
                    rows_f = cb * N * E + row[:, None] * E + f[None, :]
                    rows_kv = 2 * cb * N * E + row[:, None] * 2 * E + f[None, :]
                    q = tl.load(q_ + rows_f, mask=here, other=0.0)
                    k = tl.load(kv_ + rows_kv, mask=here, other=0.0)
                    v = tl.load(kv_ + rows_kv + E, mask=here, other=0.0)
                    p = _attention(q, k, same, HD ** -0.5)
                    g_a = _dot(g16, _tile(wo + cb * E * E, e, f, E, None)).to(kind)
                    g_v = _dot(tl.trans(p.to(kind)), g_a).to(kind)
                    g_p = _dot(g_a, tl.trans(v))
                    g_score = (p * (g_p - tl.sum(g_p * p, 1)[:, None]) * HD ** -0.5).to(kind)
                    g_query = _dot(g_score, k).to(kind)
                    g_k = _dot(tl.trans(g_score), q).to(kind)
                    tl.store(g_q + rows_f, g_query, mask=here)
                    tl.store(g_kv + rows_kv, g_k, mask=here)
                    tl.store(g_kv + rows_kv + E, g_v, mask=here)
                    g_n += _dot(g_query, _tile(wq + cb * E * E, f, e, E, None))
                    g_n_tokens += _dot(g_k, _tile(wkv + 2 * cb * E * E, f, e, E, None))
                    g_n_tokens += _dot(g_v, _tile(wkv + (2 * cb + 1) * E * E, f, e, E, None))
                n = tl.load(kept_q + cb * N * E + rows_e, mask=here, other=0.0).to(tl.float32)
                g += _normalised_backward(g_n, n, tl.load(scale_q + cb * N + row, mask=inside, other=0.0), E)
            tl.store(g_queries + c * N * E + rows_e, g.to(kind), mask=here)
            n = tl.load(kept_tokens + c * N * E + rows_e, mask=here, other=0.0).to(tl.float32)
            g = _normalised_backward(g_n_tokens, n, tl.load(scale_t + c * N + row, mask=inside, other=0.0), E)
            g16 = g.to(kind)
            tl.store(g_tokens + c * N * E + rows_e, g16, mask=here)
            grad_x += _dot(g16, _tile(embed + c * E * W, e, w, W, (w < W)[None, :]))
            grad_x, grad_y, y = grad_y * factor, grad_x, next_y
        tl.store(grad_z + at + perm_a, grad_y, mask=real)
        tl.store(grad_z + at + perm_b, grad_x, mask=real)


def fold(factor, offset, weight, bias=None):
    """Of x -> weight (factor x + offset) + bias, weight and bias without factor and offset: (..., out, in) and (..., out)."""
    shift = (weight * offset[..., None, :]).sum(-1)
    return weight * factor[..., None, :], shift if bias is None else shift + bias


class FoldNorms(nn.Module):
    """What stacked_weights gives -> what the kernels take: the LayerNorms' factors and offsets folded into the matrices that
    follow, and all matrices as `dtype`. (A module so that it can be compiled.)"""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, embed, embed_bias, position, queries, norm_q, norm_q_bias, q, q_bias, norm_kv, norm_kv_bias, kv,
                out, out_bias, norm_mlp, norm_mlp_bias, mlp, mlp_bias, mlp_out, mlp_out_bias, norm, norm_bias, head, head_bias):
        q, q_bias = fold(norm_q, norm_q_bias, q, q_bias)
        kv, kv_bias = fold(norm_kv, norm_kv_bias, kv)
        mlp, mlp_bias = fold(norm_mlp, norm_mlp_bias, mlp, mlp_bias)
        head, head_bias = fold(norm, norm_bias, head, head_bias)
        embed, q, kv, out, mlp, mlp_out, head = (x.to(self.dtype) for x in (embed, q, kv, out, mlp, mlp_out, head))
        return (embed, position + embed_bias[:, None], queries, q, q_bias, kv, kv_bias, out, out_bias, mlp, mlp_bias,
                mlp_out, mlp_out_bias, head, head_bias)


def stacked_weights(flow):
    """A flow's weights, all conditioners' (C, ...) and all blocks' (C, BLOCKS, ...) in one tensor a kind."""
    conditioners = [c for coupling in flow.couplings for c in (coupling.cond_b, coupling.cond_a)]
    blocks = [b for c in conditioners for b in c.blocks]

    def of_all(*names):
        return [torch.stack([operator.attrgetter(name)(c) for c in conditioners]) for name in names]

    def of_blocks(*names):
        stacked = [torch.stack([operator.attrgetter(name)(b) for b in blocks]) for name in names]
        return [x.unflatten(0, (len(conditioners), -1)) for x in stacked]

    return [*of_all("embed.weight", "embed.bias", "position", "queries"),
            *of_blocks("norm_q.weight", "norm_q.bias", "q.weight", "q.bias", "norm_kv.weight", "norm_kv.bias", "kv.weight",
                       "out.weight", "out.bias", "norm_mlp.weight", "norm_mlp.bias", "mlp.0.weight", "mlp.0.bias",
                       "mlp.2.weight", "mlp.2.bias"),
            *of_all("norm.weight", "norm.bias", "head.weight", "head.bias")]


class FusedCouplings(torch.autograd.Function):
    """z0 (B, D) float32, perms (length, D), what fused_sizes returns, weights from FoldNorms -> zK (B, D), s (length, B, D)."""

    @staticmethod
    def forward(ctx, z0, perms, sizes, *weights):
        (L, D), B, (C, blocks, E, _), M = perms.shape, len(z0), weights[3].shape, weights[9].shape[2]
        N, W, kind = B * sizes["T"], sizes["W"], weights[3].dtype

        def empty(*shape, dtype=kind):
            return torch.empty(shape, dtype=dtype, device=z0.device)

        z, s = empty(L + 1, B, D, dtype=torch.float32), empty(L, B, D, dtype=torch.float32)
        z[0] = z0
        keep = any(ctx.needs_input_grad)
        per_conditioner, per_block = ((C, N), (C, blocks, N)) if keep else ((0, 0), (0, 0, 0))
        x = empty(*per_conditioner, W)
        kept = [*(empty(*per_conditioner, E) for _ in range(2)), *(empty(*per_block, E) for _ in range(3)),
                empty(*per_block, E), empty(*per_block, 2 * E), empty(*per_block, M)]
        scales = [*(empty(*per_conditioner, dtype=torch.float32) for _ in range(2)),
                  *(empty(*per_block, dtype=torch.float32) for _ in range(2))]
        # (Fastest on an H100 of what was tried: for few rows as many programs as they make, for many half of them. The matrices
        # of wider tokens fit into a program's memory one at a time: compiled for it, not timed.)
        rows, warps, stages = (16, 8, 1) if E > 128 else (16, 8, 3) if N <= 2048 else (32, 4, 3)
        sizes = sizes | dict(D=D, E=E, M=M, BLOCKS=blocks, IMAGES=max(1, rows // sizes["T"]), num_warps=warps,
                             num_stages=stages)
        grid = (-(-N // (sizes["IMAGES"] * sizes["T"])),)
        for layer in range(L):
            _layer_forward[grid](layer, B, perms, z, s, *weights, x, *kept, *scales, **sizes, KEEP=keep)
        ctx.save_for_backward(perms, z, s, *weights, x, *kept, *scales)
        ctx.sizes, ctx.grid = sizes, grid
        return z[L], s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_zK, grad_s):
        perms, z, s, *saved = ctx.saved_tensors
        embed, position, queries, wq, bq, wkv, bkv, wo, bo, w1, b1, w2, b2, wh, bh = saved[:15]
        x, tokens, f, n_q, a, n_m, q, kv, u, *scales = saved[15:]
        L, B, D = s.shape
        grad_z, grad_s = torch.empty_like(z), grad_s.contiguous()
        grad_z[L] = grad_zK
        g_tokens, g_queries, g_head = torch.empty_like(tokens), torch.empty_like(tokens), x.new_empty(*x.shape[:2], len(bh[0]))
        g_q, g_kv, g_o, silu, g_u, g_2 = (torch.empty_like(t) for t in (q, kv, a, u, u, a))
        for layer in reversed(range(L)):
            _layer_backward[ctx.grid](
                layer, B, perms, z, s, grad_z, grad_s, embed, wq, wkv, wo, w1, w2, wh, tokens, f, n_q, n_m, q, kv,
                u, *scales, g_tokens, g_queries, g_q, g_kv, g_o, silu, g_u, g_2, g_head, **ctx.sizes)

        def products(grad, given):
            """The gradient of each matrix: (..., N, out), (..., N, in) -> (..., out, in)."""
            return grad.transpose(-1, -2) @ given

        def over_rows(grad):
            return grad.sum(-2, dtype=torch.float32)

        def over_images(grad):
            return grad.unflatten(1, (B, -1)).sum(1, dtype=torch.float32)

        return (grad_z[0], None, None, products(g_tokens, x), over_images(g_tokens), over_images(g_queries),
                products(g_q, n_q), over_rows(g_q), products(g_kv, tokens[:, None]), over_rows(g_kv),
                products(g_o, a), over_rows(g_o), products(g_u, n_m), over_rows(g_u), products(g_2, silu), over_rows(g_2),
                products(g_head, f), over_rows(g_head))


def fused_sizes(flow):
    """What the kernels are compiled for, or None where they cannot be: no Triton, an amortised flow, or sizes that are no
    powers of two or too small for matrix units."""
    first = flow.couplings[0].cond_b
    T, E, heads, hidden = first.seq_len, first.head.in_features, first.blocks[0].heads, first.blocks[0].mlp[0].out_features
    powers = all(n & (n - 1) == 0 for n in (T, E, heads, hidden))
    if triton is None or flow.context_dim or not powers or E < 16 * heads or hidden < 16 or T > 64:
        return None
    W = flow.dim // (2 * T)
    return dict(bound=flow.scale_bound, T=T, W=W, WP=max(16, 1 << (W - 1).bit_length()), HEADS=heads, CHUNK=min(64, hidden))


def fused_transform(flow, z0):
    """BiCrossAttnFlow.transform by the kernels."""
    with no_autocast(z0.device.type):
        return FusedCouplings.apply(full_precision(z0).contiguous(), torch.stack([c.perm for c in flow.couplings]),
                                    fused_sizes(flow), *flow.fold_norms(*stacked_weights(flow)))


def check_fused(flow, batch, perturb=0.05, seed=0):
    """Do the kernels compute what the layers do? Relative errors, each of the worst kind of weight or output: of the kernels in
    bf16, and of autocast, which rounds as much; both against float32, on a perturbed copy on the flow's device."""
    device = next(flow.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    probe = perturb_(copy.deepcopy(flow).cpu(), perturb, generator).to(device).train()
    probe.whiten = False                                  # no work of the kernels; z0 is as what it gives
    z0, grad_zK, grad_s = (torch.randn(*shape, batch, flow.dim, generator=generator).to(device)
                           for shape in ((), (), (len(flow.couplings),)))

    def results(fold_norms, amp):
        """{kind: values}"""
        probe.fold_norms, z = fold_norms, z0.clone().requires_grad_()
        probe.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            zK, s = probe.transform(z)
        torch.autograd.backward([zK, s], [grad_zK, grad_s])
        found = {"zK": [zK.detach()], "s": [s.detach()], "z0": [z.grad]}
        for name, p in probe.named_parameters():
            found.setdefault(name.split(".", 3)[-1], []).append(p.grad)
        return {kind: torch.cat([x.flatten() for x in values]) for kind, values in found.items()}

    with no_autocast(device.type):
        exact = results(None, False)
        return tuple(max(((found[kind] - x).norm() / x.norm()).item() for kind, x in exact.items())
                     for found in (results(FoldNorms(torch.bfloat16), False), results(None, True)))
