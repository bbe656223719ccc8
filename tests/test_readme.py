"""The Python that README.md shows runs as it stands there, and its comments are true; what it and the pages beside it link to,
and the flags that they name, exist."""
import re
import sys

import pytest
import torch
from conftest import ROOT, write_images
from test_train import main

import comparison
import csv_analysis
import PR_Calculate
import test
import train
import utils


def blocks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"<!-- tested: this block -->\n```python\n(.*?)```", readme, re.DOTALL)


def run(block):
    """The names that it leaves."""
    found = {}
    exec(compile(block, "README.md", "exec"), found)
    return found


@pytest.mark.parametrize("flags", [(), ("--preset", "best")], ids=" ".join)
def test_a_trained_model_from_python(flags, monkeypatch, tmp_path, one_thread):
    main(monkeypatch, tmp_path, "--demo", *flags, "--epochs", 1, "--sample_every", 0, "--no-tensorboard", "--device", "cpu")
    write_images(tmp_path / "path/to/images", 5, size=16)
    found = run(blocks()[0])
    assert found["images"].shape == (8, 1, 16, 16) and found["images"].abs().max() <= 1
    assert (tmp_path / "sample.png").is_file()
    out, kl, x = found["out"], found["kl"], found["x"]
    assert x.shape == (5, 1, 16, 16) and torch.equal(out.mu, found["mu"]) and torch.equal(out.logvar, found["logvar"])
    assert out.log_det.abs().min() > 0                                                          # the flow has been trained
    torch.testing.assert_close(found["z0"], out.z0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["log_det"], -out.log_det, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl.kl, kl.log_q0 - kl.log_det - kl.log_p)
    torch.testing.assert_close(found["component"].sum(1), torch.ones(5))
    assert found["component"].shape == (5, 50)
    torch.testing.assert_close(found["between"][[0, -1]], out.recon[[0, -1]], rtol=1e-3, atol=1e-3)


def test_flow_and_metrics_by_themselves(capsys):
    found = run(blocks()[1])
    assert found["zK"].shape == (16, 32) and found["log_det"].shape == (16,) and not found["log_det"].any()
    worst, metrics, distance = capsys.readouterr().out.splitlines()
    worst, metrics = (eval(line, {"nan": float("nan")}) for line in (worst, metrics))
    assert worst["inverse_error"] < 1e-9 and worst["log_det_error"] < 1e-8 and worst["scale_std"] > 0
    assert {"precision", "recall", "density", "coverage"} <= set(metrics) and float(distance) > 0


@pytest.mark.parametrize("script, flags", [
    (train, {"--latent_dim": "D (default: 128)", "--hidden_dims": "(default: 64 128 256 512)",
             "--warmup_epochs": "(default: 20)", "--data_dir": "(default: ./data)", "--flow_seq_len": "(default: 8; with"}),
    (test, {"--temperature": "(default: 1.0)", "--num_samples": "(default: 50000)"}),
    (PR_Calculate, {"--k": "(default: 3)", "--pca_dim": "(default: 256)"}),
    (csv_analysis, {"--r0": "(default: 0.25)"}),
    (comparison, {"--whiskers": "(default: 1.0 99.0)"})], ids=lambda x: getattr(x, "__name__", ""))
def test_help_names_every_flag_with_its_default(script, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    parsers = []
    monkeypatch.setattr(script, "FlagParser", lambda **more: parsers.append(utils.FlagParser(**more)) or parsers[-1])
    with pytest.raises(SystemExit) as ended:
        script.main()
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "(default: None)" not in text and "==SUPPRESS==" not in text
    entries = re.split(r" (?=--\w+ )", text)
    for flag, said in flags.items():
        assert any(entry.startswith(f"{flag} ") and said in entry for entry in entries), flag
    for action in parsers[0]._actions:
        assert action.help, action.option_strings


PAGES = [ROOT / "README.md", ROOT / "tests/benchmarks/RESULTS.md", ROOT / "tests/benchmarks/SPEED.md"]


def anchors(page):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_pictures_and_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert links
    for path, _, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), (path, anchor)
    sources = [*ROOT.glob("*.py"), *ROOT.glob("tests/benchmarks/*.py")]
    known = {flag for source in sources for flag in re.findall(r'"(--[a-z]\w*)"', source.read_text(encoding="utf-8"))}
    named = set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", text)) - {"--help", "--nproc_per_node"}
    assert len(named) > 5 and {flag.replace("--no-", "--") for flag in named} <= known
