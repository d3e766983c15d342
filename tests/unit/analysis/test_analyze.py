from __future__ import annotations

import csv
import json
import warnings

import pytest
import torch

import tiny_models
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.attach import attach, detach
from lorakit.adapters.bind import bind_adapter
from lorakit.adapters.fold import merge
from lorakit.adapters.spec import LoraSpec
from lorakit.analysis.options import AnalyzeOptions
from lorakit.analysis.run import analyze
from lorakit.analysis.updates import Base, labels_of, read_source
from lorakit.analysis.write import write_analysis
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    OutputError,
    RequestError,
    StateError,
)
from lorakit.formats.peft import save_adapter
from lorakit.report.layer_figures import layer_of, leaf_of


def _save(model, spec, path, *, seed=7):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach_learned(model, spec, seed=seed)
    save_adapter(model, path)
    detach(model)
    return path


@pytest.fixture
def llama():
    return tiny_models.build("llama")


@pytest.fixture
def pair(llama, tmp_path):
    """Two ranks of one adapter's sites, scaling not 1, of a grouped attention (in != out)."""
    first = LoraSpec(r=3, alpha=7.5, targets="all-linear")
    second = LoraSpec(r=5, alpha=3.0, targets="all-linear", rank_pattern={"v_proj": 2})
    return (
        _save(llama, first, tmp_path / "a", seed=1),
        _save(llama, second, tmp_path / "b", seed=2),
    )


@pytest.mark.parametrize(
    ("architecture", "spec"),
    [
        ("llama", {"targets": "all-linear"}),
        ("llama", {"targets": "qv", "update": "dora"}),
        ("gpt2", {"targets": ("c_attn.q", "c_attn.v", "c_fc")}),
        ("gpt2", {"targets": ("c_attn.q", "c_attn.v"), "update": "dora"}),
        ("vit", {"targets": ("projection", "q_proj")}),
        ("vit", {"targets": ("projection",), "update": "dora"}),
        ("bert", {"targets": ("word_embeddings", "query")}),
    ],
)
def test_every_geometry_is_measured_as_the_change_that_merging_makes(architecture, spec, tmp_path):
    model = tiny_models.build(architecture)
    path = _save(model, LoraSpec(r=2, alpha=5.0, **spec), tmp_path / "adapter")
    base = Base(model)
    source = read_source(path, base=base)
    before = {site: base.weight(f).clone() for site, f in source.adapter.factors.items()}
    dense = {site: (update.dense(), update.svd) for site, update in source.updates.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bind_adapter(model, source.adapter)
        merge(model)
    for site, (change, (left, values, right)) in dense.items():
        changed = base.weight(source.adapter.factors[site]) - before[site]
        torch.testing.assert_close(change, changed, atol=1e-5, rtol=1e-4)
        n = left.shape[1]
        torch.testing.assert_close(
            (left * values[:n] @ right.T).float(), changed, atol=1e-4, rtol=1e-3
        )
        assert float(values.norm()) == pytest.approx(float(changed.norm()), rel=1e-4)


def test_one_adapter_is_measured_against_its_base(llama, pair):
    base = Base(llama)
    found = analyze([pair[0]], AnalyzeOptions(seed=3), base=base)
    assert found.measures == ("spectra", "amplification", "intruders")
    assert len(found.sites) == 14
    adapter = Adapter.load(pair[0])
    for site in found.sites:
        factors = adapter.factors[site.site]
        W = base.weight(factors).double()
        delta = factors.scaling * factors.B.double() @ factors.A.double()
        assert site.spectrum.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert site.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-5)
        left, values, rows = torch.linalg.svd(delta, full_matrices=False)
        amplified = site.amplification
        along = float((left[:, :3].T @ W @ rows[:3].T).norm())
        assert amplified.r == 3
        assert amplified.of_update == pytest.approx(along, rel=1e-4)
        assert amplified.of_base == pytest.approx(
            float(torch.linalg.svdvals(W)[:3].norm()), rel=1e-4
        )
        assert amplified.factor == pytest.approx(float(values.norm()) / along, rel=1e-4)
        assert site.intruders.looked_at == 10


def test_the_intruders_are_those_of_the_tuned_weight(llama, tmp_path):
    path = _save(llama, LoraSpec(r=2, alpha=400.0, targets="qv"), tmp_path / "loud")
    base, adapter = Base(llama), Adapter.load(path)
    found = analyze([path], base=base)
    for site in found.sites:
        factors = adapter.factors[site.site]
        weight = base.weight(factors).double()
        u0 = torch.linalg.svd(weight).U[:, : min(weight.shape)]
        tuned = torch.linalg.svd(weight + factors.delta().double()).U
        expected = [k for k in range(10) if max(abs(u0.T @ tuned[:, k])) < 0.5]
        assert site.intruders.positions == expected
    # A change far larger than the weight leads with directions of its own.
    assert sum(len(site.intruders.positions) for site in found.sites) >= 2


def test_two_adapters_are_compared_site_by_site(llama, pair):
    found = analyze(pair, base=None)
    assert found.measures == ("spectra", "subspaces", "agreement")
    one, other = Adapter.load(pair[0]), Adapter.load(pair[1])
    for phi in found.subspaces:
        a1, a2 = one.factors[phi.site].A, other.factors[phi.site].A
        assert phi.phi.shape == (a1.shape[0], a2.shape[0]) == phi.control.shape
        # All of the directions: the projection of one row space on the other.
        q1 = torch.linalg.qr(a1.double().T).Q
        q2 = torch.linalg.qr(a2.double().T).Q
        whole = float((q1.T @ q2).norm() ** 2) / min(q1.shape[1], q2.shape[1])
        assert phi.whole == pytest.approx(whole, rel=1e-5)
    for both in found.agreement:
        d1, d2 = one.factors[both.site].delta(), other.factors[both.site].delta()
        cosine = float((d1 * d2).sum() / (d1.norm() * d2.norm()))
        assert both.cosine == pytest.approx(cosine, abs=1e-5)
        smaller = torch.minimum(d1.abs(), d2.abs())
        conflict = float(smaller[d1 * d2 < 0].sum() / smaller.sum())
        assert both.sign_conflict == pytest.approx(conflict, abs=1e-5)


def test_an_adapter_agrees_with_itself_and_not_with_its_negation(pair, tmp_path):
    adapter = Adapter.load(pair[0])
    factors = {
        n: type(f)(**{**{k: getattr(f, k) for k in f.__slots__}, "B": -f.B})
        for n, f in adapter.factors.items()
    }
    Adapter(spec=adapter.spec, factors=factors, config=adapter.config).save(tmp_path / "not")
    same = analyze([pair[0], pair[0]])
    turned = analyze([pair[0], tmp_path / "not"], AnalyzeOptions(of="delta-out"))
    assert [a.cosine for a in same.agreement] == pytest.approx([1.0] * 14)
    assert [a.sign_conflict for a in same.agreement] == [0.0] * 14
    assert [a.cosine for a in turned.agreement] == pytest.approx([-1.0] * 14)
    assert [a.sign_conflict for a in turned.agreement] == pytest.approx([1.0] * 14)
    assert [s.whole for s in turned.subspaces] == pytest.approx([1.0] * 14)


def test_directions_of_the_change_do_not_depend_on_the_split(pair, tmp_path):
    adapter = Adapter.load(pair[0])
    mix = torch.randn(3, 3) + 2 * torch.eye(3)
    factors = {
        n: type(f)(
            **{
                **{k: getattr(f, k) for k in f.__slots__},
                "B": f.B @ mix,
                "A": torch.linalg.solve(mix, f.A),
            }
        )
        for n, f in adapter.factors.items()
    }
    mixed = Adapter(spec=adapter.spec, factors=factors, config=adapter.config)
    mixed.save(tmp_path / "mixed")
    paths = [pair[0], tmp_path / "mixed"]
    for of in ("delta-in", "delta-out"):
        for found in analyze(paths, AnalyzeOptions(of=of)).subspaces:
            diagonal = found.phi.diagonal()
            torch.testing.assert_close(diagonal, torch.ones_like(diagonal), atol=1e-4, rtol=0)
    factor = analyze(paths, AnalyzeOptions(of="A")).subspaces
    assert min(found.first for found in factor) < 0.9
    assert [found.whole for found in factor] == pytest.approx([1.0] * 14, abs=1e-4)


def test_a_zero_update_is_said_and_not_drawn(llama, tmp_path):
    attach(llama, LoraSpec(r=3, targets="qv"))
    save_adapter(llama, tmp_path / "zero")
    detach(llama)
    found = analyze([tmp_path / "zero"], base=Base(llama))
    assert any(n.startswith("updates of zero that are zero: 4,") for n in found.notes)
    assert [site.amplification.factor for site in found.sites] == [None] * 4
    write_analysis(found, tmp_path / "out")


def test_what_cannot_be_is_refused(llama, pair, tmp_path):
    with pytest.raises(RequestError, match="no site of this adapter"):
        analyze([pair[0]], AnalyzeOptions(sites=("c_attn",)))
    with pytest.raises(RequestError, match="one or two adapters"):
        analyze([])
    with pytest.raises(RequestError, match="amplification cannot be measured"):
        analyze([pair[0]], AnalyzeOptions(measures=("amplification",)))
    with pytest.raises(RequestError, match="subspaces cannot be measured"):
        analyze([pair[0]], AnalyzeOptions(measures=("subspaces",)))
    with pytest.raises(RequestError, match="norms cannot be measured"):
        analyze([pair[0]], AnalyzeOptions(measures=("norms",)))
    with pytest.raises(RequestError, match="did you mean 'spectra'"):
        AnalyzeOptions(measures=("spectrum",))
    with pytest.raises(RequestError, match="no such directions"):
        AnalyzeOptions(of="C")  # pyright: ignore[reportArgumentType]
    gpt2 = tiny_models.build("gpt2")
    other = _save(gpt2, LoraSpec(r=2, targets="qv"), tmp_path / "gpt2")
    with pytest.raises(RequestError, match="no site in common"):
        analyze([pair[0], other], AnalyzeOptions(any_base=True))
    with pytest.raises(BaseMismatchError):
        analyze([pair[0]], base=Base(gpt2))
    with pytest.raises(AdapterFileError, match="a layer that the base does not have"):
        analyze([pair[0]], AnalyzeOptions(any_base=True), base=Base(gpt2))
    dora = _save(llama, LoraSpec(r=2, targets="qv", update="dora"), tmp_path / "dora")
    with pytest.raises(StateError, match="depends on the base weight"):
        analyze([dora])


def test_the_files_hold_the_numbers_and_the_page_draws_them(llama, pair, tmp_path):
    measures = ("amplification", "subspaces", "agreement")
    found = analyze(pair, AnalyzeOptions(measures=measures), base=Base(llama))
    files = write_analysis(found, tmp_path / "out", command="lorakit analyze a b")
    assert files == [
        "agreement.csv",
        "analysis.json",
        "report.html",
        "singular_values.csv",
        "sites.csv",
        "subspaces.csv",
    ]
    out = tmp_path / "out"
    record = json.loads((out / "analysis.json").read_text())
    rows = list(csv.DictReader((out / "sites.csv").read_text().splitlines()))
    assert len(rows) == len(record["sites"]) == 28
    assert float(rows[0]["norm"]) == record["sites"][0]["spectrum"]["norm"]
    assert float(rows[0]["amplification"]) == record["sites"][0]["amplification"]["factor"]
    phi = list(csv.DictReader((out / "subspaces.csv").read_text().splitlines()))
    assert len(phi) == sum(s.phi.numel() for s in found.subspaces)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "#010203" not in page
    assert 'src="http' not in page
    assert 'href="http' not in page
    with pytest.raises(OutputError, match="not empty"):
        write_analysis(found, out)


def test_names_of_sites_are_read_by_layer():
    assert leaf_of("model.layers.11.self_attn.q_proj") == "self_attn.q_proj"
    assert layer_of("model.layers.11.self_attn.q_proj") == 11
    assert leaf_of("transformer.h.0.attn.c_attn.q") == "attn.c_attn.q"
    assert leaf_of("lm_head") == "lm_head"
    assert layer_of("lm_head") is None
    assert labels_of(["runs/a/adapter", "runs/b/adapter"]) == ["a/adapter", "b/adapter"]
    assert labels_of(["x", "x"]) == ["1: x", "2: x"]
