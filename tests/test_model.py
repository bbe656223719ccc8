"""The model: densities, the KL, priors, pseudo-inputs, sampling, shapes."""
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch import distributions as D

from models.vamp_flow import (
    CrossFlowVampVAE,
    GroupNorm,
    UpConv2d,
    attention,
    component_log_probs,
    fit_mixture,
    log_mixture,
    log_normal,
    perturb_,
)

SMALL = dict(in_channels=1, img_size=8, latent_dim=8, hidden_dims=(8, 12), num_components=5, flow_length=3, flow_seq_len=2,
             flow_embed_dim=16, flow_heads=2, flow_layers=1)


FULL = dict(prior="mog", mixture_covariance="full")
SPATIAL = dict(latent_layout="spatial")


def make(perturb=0.05, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    model = CrossFlowVampVAE(**{**SMALL, **kwargs}).to(dtype).eval()
    return perturb_(model, perturb, torch.Generator().manual_seed(1)) if perturb else model


def images(n=4, channels=1, size=8, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype) * 2 - 1


# -- blocks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_up_convolution_is_doubling_and_convolution(memory_format):
    """The image and all gradients."""
    torch.manual_seed(0)
    layer, plain = UpConv2d(5, 7).double(), torch.nn.Conv2d(5, 7, 3, padding=1).double()
    plain.load_state_dict(layer.state_dict())
    layer.to(memory_format=memory_format)
    x, grad = torch.randn(2, 5, 4, 3).double().requires_grad_(), torch.randn(2, 7, 8, 6).double()
    found = layer(x.contiguous(memory_format=memory_format))
    wanted = plain(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
    for a, b in zip([found, *torch.autograd.grad(found, [x, *layer.parameters()], grad)],
                    [wanted, *torch.autograd.grad(wanted, [x, *plain.parameters()], grad)]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- densities --------------------------------------------------------------------------------------------------------

def test_log_normal_matches_torch_distributions():
    torch.manual_seed(0)
    z, mu, logvar = (torch.randn(7, 5, dtype=torch.float64) for _ in range(3))
    expected = D.Independent(D.Normal(mu, (logvar / 2).exp()), 1).log_prob(z)
    assert torch.allclose(log_normal(z, mu, logvar), expected, rtol=0, atol=1e-12)


def test_log_mixture_matches_torch_distributions():
    torch.manual_seed(0)
    z, mu, logvar = torch.randn(7, 5).double(), torch.randn(3, 5).double(), torch.randn(3, 5).double()
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(3).double()),
                                  D.Independent(D.Normal(mu, (logvar / 2).exp()), 1))
    assert torch.allclose(log_mixture(z, mu, logvar), mixture.log_prob(z), rtol=0, atol=1e-12)
    assert component_log_probs(z, mu, logvar).shape == (7, 3)


def gaussians(mu_k, logvar_k, tril_k=None):
    """The components in torch.distributions."""
    if tril_k is None:
        return D.Independent(D.Normal(mu_k, (logvar_k / 2).exp()), 1)
    shear = torch.eye(mu_k.shape[1]).to(mu_k) + tril_k.detach().tril(-1)
    return D.MultivariateNormal(mu_k, precision_matrix=shear.mT @ torch.diag_embed((-logvar_k).exp()) @ shear)


def test_components_of_full_covariance_match_torch_distributions():
    """The densities, and draws by their covariance; what stands on and above the diagonal is ignored."""
    torch.manual_seed(0)
    z, mu, logvar, tril = (torch.randn(*shape).double() for shape in ((7, 4), (3, 4), (3, 4), (3, 4, 4)))
    components = gaussians(mu, logvar, tril)
    assert torch.allclose(component_log_probs(z, mu, logvar, tril), components.log_prob(z[:, None]), rtol=0, atol=1e-10)
    log_w = torch.log_softmax(torch.randn(3).double(), 0)
    mixture = D.MixtureSameFamily(D.Categorical(logits=log_w), components)
    assert torch.allclose(log_mixture(z, mu, logvar, log_w, tril), mixture.log_prob(z), rtol=0, atol=1e-10)
    model = make(latent_dim=4, num_components=3, **FULL)
    with torch.no_grad():
        model.prior_tril.copy_(tril)
        k, n = torch.arange(3).repeat(20_000), 20_000
        eps = torch.randn(3 * n, 4, generator=torch.Generator().manual_seed(0)).double()
        draws = model.component_draws(k, eps, (mu, logvar))
        for c in range(3):
            expected = components.covariance_matrix[c]
            error = (draws[k == c].T.cov() - expected).abs() / expected.diagonal().outer(expected.diagonal()).sqrt()
            assert error.max() < 6 / n ** 0.5 and expected.tril(-1).abs().max() > 0.5 * expected.diagonal().min()


def test_full_covariance_is_float32_under_autocast():
    torch.manual_seed(0)
    z, mu, logvar, tril = torch.randn(9, 64), torch.randn(5, 64), torch.full((5, 64), -6.0), torch.randn(5, 64, 64) / 8
    with torch.autocast("cpu", torch.bfloat16):
        got = component_log_probs(z, mu, logvar, tril)
    exact = component_log_probs(z.double(), mu.double(), logvar.double(), tril.double())
    assert got.dtype == torch.float32 and (got / exact - 1).abs().max() < 1e-5


@pytest.mark.parametrize("learn_weights", [True, False])
def test_em_is_that_of_scikit_learn(learn_weights):
    """From the same start, to the last step; and where the weights stay equal, the likelihood still rises."""
    generator = torch.Generator().manual_seed(0)
    truth = gaussians(*(2 * torch.randn(3, *shape, generator=generator).double() for shape in ((4,), (4,), (4, 4))))
    torch.manual_seed(1)
    z = truth.sample((400,)).flatten(0, 1) + 7

    def fitted(steps):
        mu, logvar, tril, log_w = fit_mixture(z, 3, steps, learn_weights, 0, torch.Generator().manual_seed(2))
        return gaussians(mu, logvar, tril), log_w, log_mixture(z, mu, logvar, log_w, tril).mean()

    (start, log_w, first), (found, _, last) = fitted(1), fitted(9)
    assert last > first + 0.01
    assert torch.allclose(log_w.exp().sum(), torch.tensor(1.0).double())
    if learn_weights:
        theirs = GaussianMixture(3, tol=0, reg_covar=0, max_iter=8, weights_init=log_w.exp().numpy(),
                                 means_init=start.mean.numpy(), precisions_init=start.precision_matrix.numpy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                   # that eight steps are not convergence
            theirs.fit(z.numpy())
        assert theirs.score(z.numpy()) == pytest.approx(last.item(), abs=1e-5)
        assert np.abs(theirs.means_ - found.mean.numpy()).max() < 1e-3


def test_em_bears_components_with_fewer_points_than_dimensions():
    """Held out, far better than the covariance of so few points alone, and no worse than one Gaussian of all by much."""
    torch.manual_seed(0)
    mixing = torch.randn(20, 20)
    z, other = torch.randn(300, 20) @ mixing, torch.randn(300, 20) @ mixing
    one, many = ([x for x in fit_mixture(z, K, 10, generator=torch.Generator().manual_seed(0))] for K in (1, 40))
    score = [log_mixture(other, mu, logvar, log_w, tril).mean() for mu, logvar, tril, log_w in (one, many)]
    assert all(torch.isfinite(x).all() for x in many) and score[1] > score[0] - 3
    with pytest.raises(ValueError, match="301 components cannot be fitted to 300 points"):
        fit_mixture(z, 301, 1)
    with pytest.raises(ValueError, match="in 0 steps"):
        fit_mixture(z, 2, 0)


@pytest.mark.parametrize("points", [
    lambda: torch.cat([torch.randn(300, 20), torch.zeros(300, 1)], 1), lambda: torch.ones(1, 5),
    lambda: torch.full((9, 5), -3.0), lambda: torch.randn(4000, 1) * torch.randn(256) + 1e-4 * torch.randn(4000, 256),
], ids=["a dimension that does not vary", "one point", "equal points", "256 dimensions that are all but one"])
def test_em_bears_points_without_spread(points):
    torch.manual_seed(0)
    points = points()
    mu, logvar, tril, log_w = fit_mixture(points, 1 if len(points) == 1 else 2, 3)
    assert all(torch.isfinite(x).all() for x in (mu, logvar, tril, log_w))
    diagonal = D.Independent(D.Normal(points.mean(0), points.std(0, unbiased=False) + 1e-3), 1)
    assert log_mixture(points, mu, logvar, log_w, tril).mean() > diagonal.log_prob(points).mean() - 1


@pytest.mark.parametrize("n", [1, 3, 50])
def test_draws_of_components_are_their_own(n):
    """More and fewer draws than components, each with its component's matrix."""
    model = make(0.5, **FULL)
    k, eps = torch.randint(model.num_components, (n,)), torch.randn(n, model.latent_dim).double()
    (mu, logvar), tril = model.prior_params(), model.prior_tril
    whitened = (torch.eye(model.latent_dim) + tril[k].tril(-1)) @ (model.component_draws(k, eps) - mu[k])[:, :, None]
    assert torch.allclose(whitened[:, :, 0], torch.exp(0.5 * logvar[k]) * eps, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_mixture_in_float32_is_within_a_thousandth_of_a_nat_at_the_smallest_sigma(autocast):
    torch.manual_seed(0)
    mu, logvar = torch.randn(20, 128), torch.full((20, 128), -10.0)
    z = mu[torch.randint(20, (64,))] + math.exp(-5) * torch.randn(64, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = log_mixture(z, mu, logvar)
    exact = log_mixture(z.double(), mu.double(), logvar.double())
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-3


@pytest.mark.parametrize("kwargs", [{}, dict(flow_prior="pushed"), dict(prior="mog"), dict(prior="standard"), FULL,
                                    dict(flow_length=0), dict(flow_context="encoder"), dict(mixture_weights="learned")])
def test_log_prior_is_a_density_and_the_one_kl_uses(kwargs):
    model = make(latent_dim=4, **kwargs)
    with torch.no_grad():
        x = images()
        out = model(x)
        assert torch.allclose(model.kl_terms(out).log_p, model.log_prior(out.zK), rtol=0, atol=1e-9)
        # Importance sampling with a wide Gaussian: the density integrates to one.
        generator = torch.Generator().manual_seed(0)
        samples = model.sample_latents(2000, generator=generator)
        mean, std = samples.mean(0), 1.5 * samples.std(0)
        z = mean + std * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
        weights = (model.log_prior(z) - log_normal(z, mean, 2 * std.log())).exp()
    assert abs(weights.mean() - 1) < 5 * weights.std() / len(z) ** 0.5 + 1e-3
    assert weights.std() / len(z) ** 0.5 < 0.05


def test_attention_on_a_cpu_is_computed_in_full_precision():
    q, k, v = torch.randn(3, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v, 2)
    assert y.dtype == torch.float32 and torch.allclose(y, attention(q.float(), k.float(), v.float(), 2), atol=1e-6)
    assert attention(q.double(), k.double(), v.double(), 2).dtype == torch.float64


def test_group_norms_are_computed_in_full_precision():
    norm, x = GroupNorm(8), 100 + torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = norm(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.allclose(y, torch.nn.functional.group_norm(x.bfloat16().float(), norm.num_groups), rtol=0, atol=1e-4)
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("channels, side", [(1, 4), (8, 4), (24, 3), (256, 2), (64, 1)])
def test_group_norms_from_the_moments_of_channels_are_group_norms(channels, side):
    """In values and gradients, with means of very different sizes; and a group's mean is not each channel's."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm, x, grad = GroupNorm(channels).double(), randn(3, channels, side, side), randn(3, channels, side, side)
    x = (3 * x + 10 * randn(1, channels, 1, 1)).to(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(randn(channels))
        norm.bias.copy_(randn(channels))
    wanted, found = norm(x), norm.by_channels(x)
    inputs = [x, norm.weight, norm.bias]
    for a, b in zip((wanted, *torch.autograd.grad(wanted, inputs, grad)), (found, *torch.autograd.grad(found, inputs, grad))):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-11)
    x = x.detach().float()
    torch.testing.assert_close(norm.float().by_channels(x), norm(x), rtol=1e-5, atol=1e-5)


def test_prior_with_a_flow_of_its_own_is_a_density_of_z0():
    model = make(latent_dim=4, decode_from="z0", mixture_weights="learned")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        samples = model.sample_latents(2000, generator=generator)
        mean, std = samples.mean(0), 1.5 * samples.std(0)
        z0 = mean + std * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
        zK, log_det = model.flow(z0)
        weights = (model.log_prior(zK) + log_det - log_normal(z0, mean, 2 * std.log())).exp()
        assert abs(weights.mean() - 1) < 5 * weights.std() / len(z0) ** 0.5 + 1e-3
        assert weights.std() / len(z0) ** 0.5 < 0.05
        # And the samples are of it: their image under the flow is a draw of the mixture.
        mu_k, logvar_k = model.prior_params()
        drawn = model.flow(samples)[0]
        expected = (model.log_weights().exp()[:, None] * mu_k).sum(0)
        assert torch.allclose(drawn.mean(0), expected, atol=5 * drawn.std(0).max().item() / 2000 ** 0.5)
        x = images()
        out = model(x)
        assert torch.allclose(out.recon, model.decode(out.z0)) and not torch.allclose(out.recon, model.decode(out.zK))
        assert torch.allclose(model.reconstruct(x), model.decode(model.encode(x)[0]))
        assert torch.allclose(model.decoder_latent(out.zK), out.z0, atol=1e-9)


def test_components_are_drawn_by_their_learned_weights():
    model = make(mixture_weights="learned", prior="mog", num_components=3, flow_length=0)
    with torch.no_grad():
        model.prior_logits.copy_(torch.tensor([0.0, math.log(3), math.log(6)]))
        model.prior_mu.copy_(torch.tensor([-10.0, 0.0, 10.0])[:, None].expand(3, 8))
        model.prior_logvar.fill_(-6)
        z = model.sample_latents(5000, generator=torch.Generator().manual_seed(0))[:, 0]
        shares = torch.stack([(z < -5).double().mean(), (z.abs() < 5).double().mean(), (z > 5).double().mean()])
        assert torch.allclose(shares, torch.tensor([0.1, 0.3, 0.6]).double(), atol=0.03)
        out = model(images())
        joint = component_log_probs(out.z0, *model.prior_params()) + torch.tensor([0.1, 0.3, 0.6]).double().log()
        assert torch.allclose(model.responsibilities(out), torch.softmax(joint, 1))


def test_fixed_posterior_width_is_everyones():
    model = make(posterior_std=0.2)
    with torch.no_grad():
        for logvar in (model.encode(images())[1], model.prior_params()[1], model(images()).logvar, model(images()).logvar_k):
            assert torch.allclose(logvar, torch.full_like(logvar, 2 * math.log(0.2)))


def test_covariance_of_each_component_is_averaged_with_that_of_all_points_which_counts_as_d():
    torch.manual_seed(0)
    parts = torch.randn(30, 4).double() * 3, torch.randn(50, 4).double() + torch.tensor([100.0, 0, 0, 0])
    z = torch.cat(parts)
    mu, logvar, tril, log_w = fit_mixture(z, 2, 5, generator=torch.Generator().manual_seed(0))
    order = mu[:, 0].argsort()
    covariance = gaussians(mu, logvar, tril).covariance_matrix
    for k, part in zip(order, parts):
        n, total = len(part), z.T.cov(correction=0)
        assert torch.allclose(covariance[k], (n * part.T.cov(correction=0) + 4 * total) / (n + 4), rtol=1e-3, atol=1e-3)
        assert torch.allclose(mu[k], part.mean(0)) and log_w[k].item() == pytest.approx(math.log(n / 80))


def test_em_starts_at_k_means_among_directions_seen_from_the_mean():
    torch.manual_seed(0)
    z = 5 + torch.randn(300, 3).double() * torch.where(torch.arange(300) < 5, 30.0, 1.0)[:, None]
    log_w = fit_mixture(z, 3, 1, generator=torch.Generator().manual_seed(1))[3]
    directions = torch.nn.functional.normalize(z - z.mean(0)).numpy()
    first = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                       # that ten steps are not convergence
        theirs = KMeans(3, init=directions[first], n_init=1, max_iter=10, tol=0).fit(directions)
    assert log_w.exp().numpy() == pytest.approx(np.bincount(theirs.labels_) / 300)


@pytest.mark.parametrize("learned", [False, True])
def test_em_of_the_model_keeps_uniform_weights_and_takes_over_learned_ones(learned):
    model = make(latent_dim=2, flow_length=0, num_components=2, mixture_weights="learned" if learned else "uniform", **FULL)
    torch.manual_seed(0)
    z = torch.cat([torch.randn(70, 2).double(), torch.randn(30, 2).double() + 2])
    model.fit_mixture_(z, 5, torch.Generator().manual_seed(3))
    mu, logvar, tril, log_w = fit_mixture(z, 2, 5, learned, generator=torch.Generator().manual_seed(3))
    for found, wanted in ((model.prior_mu, mu), (model.prior_logvar, logvar), (model.prior_tril, tril),
                          (model.log_weights(), log_w)):
        assert torch.allclose(found, wanted)
    assert (log_w.std() > 0.1) == learned


# -- the KL -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kwargs", [dict(prior="standard", flow_length=0), dict(prior="standard"), {}, dict(prior="mog"),
                                    dict(flow_prior="pushed"), dict(flow_context="encoder"),
                                    dict(mixture_weights="learned", decode_from="z0"), dict(posterior_std=0.3),
                                    {**FULL, "decode_from": "z0"}, {**SPATIAL, "decode_from": "z0"}, SPATIAL])
def test_kl_equals_a_long_monte_carlo_average(kwargs):
    """Against log q(zK|x) built independently: the base normal in torch.distributions, the autograd Jacobian of the
    flow, and the prior by torch.distributions; sample by sample, and on average over other samples."""
    model = make(**kwargs)
    x, n = images(1), 2_000
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        mu_k, logvar_k = model.prior_params()
        eps = torch.randn(n, 8, generator=generator, dtype=torch.float64)
        kl = model.kl_terms(model(x.expand(n, -1, -1, -1), eps, (mu_k, logvar_k))).kl
        mu, logvar, context = model.posterior(x)
    w_k = torch.ones(len(mu_k)).double() if model.prior_logits is None else model.prior_logits.detach().exp()
    prior = D.MixtureSameFamily(D.Categorical(w_k), gaussians(mu_k, logvar_k, model.prior_tril))
    base = D.Independent(D.Normal(mu, (logvar / 2).exp()), 1)

    def log_ratio(z0):
        """log q(zK|x) - log p(zK), (n, 8) -> (n,)"""
        zK, log_det = z0, 0.0
        if model.flow is not None:
            copies = z0.repeat_interleave(8, 0).requires_grad_(True)   # of each sample's eight, row i differentiates output i
            out = model.flow(copies, None if context is None else context.expand(8 * n, -1, -1))[0]
            jacobian = torch.autograd.grad(out, copies, torch.eye(8, dtype=torch.float64).repeat(n, 1))[0]
            log_det, zK = torch.linalg.slogdet(jacobian.view(n, 8, 8)).logabsdet, out[::8].detach()
        log_p = prior.log_prob(z0) - log_det if kwargs.get("flow_prior") == "pushed" else prior.log_prob(zK)
        return base.log_prob(z0) - log_det - log_p

    assert torch.allclose(log_ratio(mu + (logvar / 2).exp() * eps), kl, rtol=1e-9, atol=1e-9)
    values = log_ratio(base.sample((n,))[:, 0])
    error = values.std() / len(values) ** 0.5 + kl.std() / n ** 0.5
    assert abs(values.mean() - kl.mean()) < 4 * error
    if kwargs == dict(prior="standard", flow_length=0):
        exact = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum()
        assert abs(kl.mean() - exact) < 4 * kl.std() / n ** 0.5


def test_pushed_prior_reproduces_the_kl_without_a_flow():
    pushed = make(flow_prior="pushed")
    plain = make(flow_length=0)
    plain.load_state_dict({k: v for k, v in pushed.state_dict().items() if not k.startswith("flow.")})
    x, eps = images(), torch.randn(4, 8, dtype=torch.float64)
    a, b = pushed(x, eps), plain(x, eps)
    assert torch.allclose(pushed.kl_terms(a).kl, plain.kl_terms(b).kl, rtol=0, atol=1e-9)
    assert a.log_det.abs().max() > 0.01
    unflowed = make()
    unflowed.load_state_dict(pushed.state_dict())
    assert not torch.allclose(unflowed.kl_terms(unflowed(x, eps)).kl, plain.kl_terms(b).kl, atol=0.1)


def test_amortised_flow_depends_on_the_image():
    model = make(flow_context="encoder")
    with torch.no_grad():
        context = model.posterior(images(2))[2]
        zK, _ = model.flow(torch.zeros(2, 8, dtype=torch.float64), context)
    assert context.shape == (2, 4, 12) and (zK[0] - zK[1]).abs().max() > 1e-4
    assert make().posterior(images(2))[2] is None


# -- priors and pseudo-inputs -----------------------------------------------------------------------------------------

def test_prior_params_of_each_prior():
    for prior, shape in (("vamp", (5, 8)), ("mog", (5, 8)), ("standard", (1, 8))):
        model = make(prior=prior)
        mu, logvar = model.prior_params()
        assert mu.shape == logvar.shape == shape
        assert (model.pseudo_inputs is None) == (prior != "vamp")
        if prior == "standard":
            assert not mu.any() and not logvar.any()
    model = make()
    assert torch.equal(model.prior_params()[0], model.encode(model.pseudo_inputs)[0])


def test_pseudo_inputs_stay_in_range_and_saturated_entries_get_a_gradient():
    model = make()
    with torch.no_grad():
        model.pseudo_raw.mul_(10)
    assert model.pseudo_raw.abs().max() > 1 and model.pseudo_inputs.abs().max() == 1
    out = model(images())
    model.kl_terms(out).kl.mean().backward()
    saturated = model.pseudo_raw.detach().abs() >= 1
    assert saturated.any() and (model.pseudo_raw.grad[saturated] != 0).all()
    model.project_()
    assert model.pseudo_raw.abs().max() <= 1


@pytest.mark.parametrize("kwargs", [{}, dict(prior="mog"), dict(flow_context="encoder"), dict(prior="mog", decode_from="z0"),
                                    {**SPATIAL, "latent_dim": 16}])
def test_a_new_flow_changes_neither_kl_nor_images(kwargs):
    """Of a prior that has started at images, which lies in the latent space of the encoder."""
    flowed = make(perturb=0, **kwargs)
    bare = make(perturb=0, **{**kwargs, "flow_length": 0, "flow_context": "none", "decode_from": "zK"})
    bare.load_state_dict({k: v for k, v in flowed.state_dict().items() if k in bare.state_dict()}, strict=True)
    eps = torch.randn(4, bare.latent_dim, dtype=torch.float64)
    for model in (flowed, bare):
        model.init_prior(images(9))
    with torch.no_grad():
        ours, wanted = (m(images(), eps) for m in (flowed, bare))
        assert torch.allclose(ours.recon, wanted.recon, atol=1e-12)
        assert torch.allclose(flowed.kl_terms(ours).kl, bare.kl_terms(wanted).kl, atol=1e-9)


def test_prior_starts_at_images():
    for prior in ("vamp", "mog"):
        model = make(prior=prior)
        x = images(5)
        mu, logvar = model.encode(x)
        model.init_prior(x)
        if prior == "mog":                                # as wide as the mixture of these posteriors
            logvar = (logvar.exp().mean(0) + ((mu - mu.mean(0)) ** 2).mean(0)).log().expand(5, -1)
        assert torch.allclose(model.prior_params()[0], mu) and torch.allclose(model.prior_params()[1], logvar)


def test_batching_pseudo_inputs_with_images_changes_nothing():
    model = make()
    x, eps = images(), torch.randn(4, 8, dtype=torch.float64)
    together, apart = model(x, eps), model(x, eps, model.prior_params())
    for a, b in zip(together, apart):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_logvar_clamp_is_the_same_everywhere():
    model = make(logvar_clamp=(-0.01, 0.01))
    with torch.no_grad():
        model.encoder.head.weight.mul_(50)
    out = model(images())
    for logvar in (out.logvar, out.logvar_k, model.encode(images())[1], model.prior_params()[1]):
        assert logvar.min() >= -0.01 and logvar.max() <= 0.01 and logvar.abs().max() == 0.01


@pytest.mark.parametrize("kwargs", [dict(prior="mog"), FULL])
def test_logvar_clamp_holds_for_a_free_mixture_too(kwargs):
    model = make(logvar_clamp=(-0.5, 0.5), **kwargs)
    with torch.no_grad():
        model.prior_logvar[0], model.prior_logvar[1] = -9, 9
    logvar = model.prior_params()[1]
    assert logvar.min() == -0.5 and logvar.max() == 0.5


@pytest.mark.parametrize("prior", ["vamp", "mog"])
def test_components_start_apart(prior):
    mu = make(perturb=0, prior=prior).prior_params()[0]
    assert torch.cdist(mu, mu).fill_diagonal_(9).min() > 1e-3


@pytest.mark.parametrize("kwargs", [dict(prior="mog", flow_length=0), dict(prior="mog", flow_prior="pushed", flow_seq_len=1),
                                    dict(flow_length=0, **FULL)])
def test_responsibilities_are_bayes_rule_with_the_learned_weights(kwargs):
    model = make(latent_dim=2, mixture_weights="learned", perturb=0.5, **kwargs)
    with torch.no_grad():
        out = model.carry(*torch.randn(3, 20, 2).double())
        latent = out.z0 if model.flow else out.zK
        joint = gaussians(out.mu_k, out.logvar_k, model.prior_tril).log_prob(latent[:, None]) + model.log_weights()
        found = model.responsibilities(out)
        assert torch.allclose(found, torch.softmax(joint, 1), atol=1e-9)
        assert model.log_weights().std() > 0.1 and found.amax(1).min() < 0.9


def test_free_mixture_starts_as_wide_as_all_posteriors_together():
    model = make(prior="mog", num_components=4)
    x = images(9)
    model.init_prior(x)
    mu, logvar = model.encode(x)
    assert torch.allclose(model.prior_mu, mu[:4])
    assert torch.allclose(model.prior_logvar.exp(), (logvar.exp().mean(0) + mu.var(0, unbiased=False)).expand(4, -1))
    assert mu.var(0).mean() > 1e-3 * logvar.exp().mean()


def test_log_prior_of_a_pushed_mixture_has_its_learned_weights_and_covariances():
    model = make(latent_dim=4, flow_prior="pushed", mixture_weights="learned", perturb=0.3, **FULL)
    with torch.no_grad():
        out = model.carry(*torch.randn(3, 20, 4).double())
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=model.prior_logits), gaussians(out.mu_k, out.logvar_k, model.prior_tril))
        wanted = mixture.log_prob(out.z0) - out.log_det
        assert torch.allclose(model.log_prior(out.zK), wanted) and torch.allclose(model.kl_terms(out).log_p, wanted)


def test_fixed_posterior_width_is_not_clamped():
    logvar = make(posterior_std=1e-4, perturb=0.0).encode(images())[1]
    assert torch.allclose(logvar, torch.full_like(logvar, 2 * math.log(1e-4)))


# -- generation -------------------------------------------------------------------------------------------------------

def test_samples_of_the_default_prior_are_the_mixture_and_skip_the_flow():
    model = make(prior="mog", num_components=2)
    with torch.no_grad():
        model.prior_mu.copy_(torch.stack([torch.full((8,), -5.0), torch.full((8,), 5.0)]))
        model.prior_logvar.fill_(2 * math.log(0.1))
        z = model.sample_latents(4000, generator=torch.Generator().manual_seed(0))
    right = z[:, 0] > 0
    assert abs(right.float().mean() - 0.5) < 0.05
    assert torch.allclose(z[right].mean(0), torch.full((8,), 5.0).double(), atol=0.02)
    assert torch.allclose(z[right].std(0), torch.full((8,), 0.1).double(), atol=0.02)


def test_samples_of_the_pushed_prior_go_through_the_flow():
    model = make(flow_prior="pushed")
    with torch.no_grad():
        z = model.sample_latents(50, generator=torch.Generator().manual_seed(0))
        model.flow_prior = "unflowed"
        z0 = model.sample_latents(50, generator=torch.Generator().manual_seed(0))
        assert torch.equal(z, model.flow(z0)[0]) and not torch.allclose(z, z0)


def test_sampling_is_seeded_and_temperature_narrows_it():
    model = make()
    a, b, c = (model.sample(3, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (3, 1, 8, 8) and a.abs().max() <= 1
    with torch.no_grad():
        cold = model.sample_latents(200, temperature=0.0, generator=torch.Generator().manual_seed(0))
        mu_k = model.prior_params()[0]
    assert torch.cdist(cold, mu_k).min(1).values.max() < 1e-6


def test_temperature_is_a_factor_of_sigma():
    model = make(flow_length=0)
    with torch.no_grad():
        cold, warm, mean = (model.sample_latents(50, t, torch.Generator().manual_seed(0)) for t in (0.5, 1.0, 0.0))
    assert torch.allclose(cold - mean, 0.5 * (warm - mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{"prior": "mog"}, {"prior": "mog", "mixture_weights": "learned"},
                                    {"prior": "vamp", "flow_prior": "pushed"}], ids=str)
def test_refitted_weights_are_those_of_the_largest_likelihood(kwargs):
    """Whatever the weights were before; a component that no point is near gets none."""
    model = make(num_components=5, **kwargs)
    with torch.no_grad():
        if kwargs["prior"] == "mog":
            model.prior_mu[4] += 1000
        if model.prior_logits is not None:
            model.prior_logits.copy_(torch.tensor([-2.0, 1.0, 0.0, 2.0, 0.5]))
        mu_k, logvar_k = model.prior_params()
        k = torch.multinomial(torch.tensor([0.5, 0.25, 0.2, 0.05]), 4000, True, generator=torch.Generator().manual_seed(0))
        z = mu_k[k] + (0.5 * logvar_k[k]).exp() * torch.randn(4000, mu_k.shape[1], generator=torch.Generator().manual_seed(1),
                                                              dtype=mu_k.dtype)
        log_p = torch.stack([log_normal(z, m, v) for m, v in zip(mu_k, logvar_k)], 1)             # (N, K)
        model.fit_weights_(torch.softmax(log_p + model.log_weights(), 1), steps=500)
    w = model.log_weights().exp()
    best = torch.logsumexp(log_p + w.log(), 1).mean()
    # At the maximum of a concave function, no shift of weight towards any component gains.
    for towards in torch.eye(5, dtype=w.dtype):
        assert torch.logsumexp(log_p + ((1 - 1e-4) * w + 1e-4 * towards).log(), 1).mean() <= best + 1e-9
    assert best > torch.logsumexp(log_p - math.log(5), 1).mean() + 0.01
    if kwargs["prior"] == "mog":
        assert w[4] < 1e-12
        drawn = model.sample_latents(500, 0.0, torch.Generator().manual_seed(0))
        assert drawn.abs().max() < 900


def test_posterior_means_are_float32_under_autocast():
    model = CrossFlowVampVAE(img_size=8, hidden_dims=(8,), latent_dim=4, flow_length=0, num_components=2)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, h = model.encoder(x := torch.rand(3, 3, 8, 8))
        mu, _ = model.encode(x)
    assert mu.dtype == torch.float32
    torch.testing.assert_close(mu, torch.nn.functional.linear(h.float().flatten(1), model.encoder.head.weight,
                                                              model.encoder.head.bias)[:, :4])


def test_a_spatial_latent_is_a_map_of_the_encoders_last_positions():
    """Position after position, linear in the features there; decoded, it begins with a 3x3 convolution."""
    model = make(**SPATIAL, latent_dim=32, in_channels=3, img_size=16, hidden_dims=(8, 12))
    assert model.encoder.head.weight.shape == (2 * 32 // 16, 12) and model.decoder.stem.weight.shape == (12, 2, 3, 3)
    x = images(1, 3, 16)
    with torch.no_grad():
        _, _, h = model.encoder(x)
        mu, logvar = model.encode(x)
        wanted = torch.nn.functional.conv2d(h, model.encoder.head.weight[:, :, None, None], model.encoder.head.bias)
    stats = torch.cat([mu.unflatten(1, (16, 2)), logvar.unflatten(1, (16, 2))], 2)               # (1, S, 4)
    torch.testing.assert_close(stats, wanted.flatten(2).transpose(1, 2))
    model.decoder.stages = torch.nn.Identity()
    z = torch.zeros(1, 32, dtype=torch.float64)
    z[0, 2 * 6] = 1.0                                                                            # row 1, column 2 of 4x4
    with torch.no_grad():
        changed = (model.decode(z) - model.decode(torch.zeros_like(z))).abs().amax(1)[0] > 1e-9
    assert changed[:3, 1:].all() and changed.sum() == 9


def test_flow_of_the_model_has_the_sizes_asked_for():
    model = make(scale_bound=0.7, flow_mlp_ratio=3, perturb=3.0)
    with torch.no_grad():
        scales = model.flow.transform(torch.randn(50, 8).double())[1]
    assert 0.6 < scales.abs().max() <= 0.7 == model.flow.scale_bound
    assert {b.mlp[0].out_features for c in model.flow.couplings for b in c.cond_a.blocks} == {3 * 16}
    assert len(model.flow.couplings) == 3


def test_reconstructions_of_an_amortised_flow_go_through_each_images_own_flow():
    model, x = make(flow_context="encoder", perturb=0.3), images()
    with torch.no_grad():
        mu, _, context = model.posterior(x)
        wanted, other = (model.decode(model.flow(mu, c)[0]) for c in (context, context.flip(0)))
        assert torch.allclose(model.reconstruct(x), wanted) and not torch.allclose(wanted, other, atol=1e-4)


# -- shapes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size,channels,dims", [(32, 3, (8, 8, 8, 8)), (48, 1, (8, 12)), (16, 3, (10,)), (8, 1, (5, 7, 9))])
def test_any_size_that_divides(size, channels, dims):
    model = make(perturb=0, dtype=torch.float32, in_channels=channels, img_size=size, hidden_dims=dims)
    x = images(2, channels, size, torch.float32)
    out = model(x)
    assert out.recon.shape == x.shape and out.recon.abs().max() <= 1
    assert out.zK.shape == out.mu.shape == (2, 8) and out.log_det.shape == (2,)
    assert model.sample(2).shape == x.shape


def test_default_model_has_about_20_million_parameters():
    assert 18e6 < sum(p.numel() for p in CrossFlowVampVAE().parameters()) < 22e6


@pytest.mark.parametrize("kwargs,name", [
    (dict(img_size=10), "img_size 10"), (dict(latent_dim=6), "latent_dim 6"), (dict(num_components=0), "num_components"),
    (dict(flow_prior="pushed", flow_context="encoder"), "pushed"), (dict(prior="gauss"), "prior"),
    (dict(in_channels=2), "in_channels"), (dict(logvar_clamp=(1, -1)), "logvar_clamp"),
    (dict(latent_layout="map"), "latent_layout"), (dict(SPATIAL, latent_dim=6, flow_length=0), "latent_dim 6 .* 4 positions"),
    (dict(SPATIAL, latent_dim=12, flow_seq_len=1), "latent_dim 12 .* 2 \\* 4"),
    (dict(SPATIAL, img_size=2, hidden_dims=(15000,), latent_dim=2 ** 16, flow_length=0, blocks_per_stage=0), "single tensor"),
    (dict(latent_dim=2 ** 16, flow_length=1, flow_whiten=True), "single tensor"),
])
def test_constructor_refuses_by_name(kwargs, name):
    with pytest.raises(ValueError, match=name):
        make(**kwargs)


@pytest.mark.parametrize("prior", ["vamp", "mog"])
def test_images_as_they_lie_in_files_are_refused(prior):
    model = make(prior=prior)
    for entrance in (model, model.encode, model.reconstruct):
        with pytest.raises(TypeError, match="uint8"):
            entrance((images() * 127.5 + 127.5).to(torch.uint8))


def test_every_parameter_has_a_gradient():
    for kwargs in ({}, dict(flow_context="encoder"), dict(prior="mog"), SPATIAL):
        model = make(**kwargs)
        out = model(images())
        (model.kl_terms(out).kl.mean() + (out.recon - images()).abs().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_saturated_pixels_keep_a_gradient_under_autocast():
    model = CrossFlowVampVAE(img_size=8, hidden_dims=(8,), latent_dim=4, flow_length=0, num_components=2)
    last = model.decoder.stages[-1]
    with torch.no_grad():
        last.bias.fill_(5.0)
    with torch.autocast("cpu", torch.bfloat16):
        image = model.decode(torch.zeros(2, 4))
    image.sum().backward()
    assert image.dtype == torch.float32 and image.min() > 0.99 and (last.bias.grad > 0).all()


GOLDEN = [-0.16870913959773412, 0.25181759766157685, 0.28887901857422293, 0.04156508956045036, 1.2768610567702134,
          2.8032992825064564, -9.295649802836966, -0.29780645985014087, -11.80114262549328]


def test_a_checkpoint_of_yesterday_makes_the_same_numbers_today():
    """Weights from a plain sequence, so that they depend on nothing but their names' order: a change of what the layers
    compute, which would load older checkpoints and give other images, is seen."""
    model = CrossFlowVampVAE(img_size=8, latent_dim=8, hidden_dims=(64, 128), num_components=3, flow_length=2, flow_seq_len=2,
                             flow_embed_dim=16, flow_heads=2, flow_layers=1).double().eval()
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p.copy_((0.3 * torch.sin(torch.arange(start, start + p.numel(), dtype=torch.float64))).view_as(p))
            start += p.numel()
        generator = torch.Generator().manual_seed(0)
        for coupling in model.flow.couplings:                   # at that time the last layer's was like the others
            coupling.perm.copy_(torch.randperm(8, generator=generator))
        x = torch.sin(torch.arange(2 * 3 * 64, dtype=torch.float64)).view(2, 3, 8, 8)
        out = model(x, torch.sin(torch.arange(16, dtype=torch.float64)).view(2, 8))
        kl = model.kl_terms(out)
    found = [out.recon.mean().item(), out.recon.std().item(), out.mu.std().item(), out.logvar.mean().item(),
             out.zK.std().item(), *(t[0].item() for t in kl)]
    assert found == pytest.approx(GOLDEN, rel=1e-6)
