"""Doctor tries, and believes nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from t2i_align.cli import build_app
from t2i_align.train import doctor


def test_json_has_versions_devices_and_a_verdict_for_each_backend() -> None:
    result = CliRunner().invoke(build_app(), ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["devices"]["cuda"] == torch.cuda.is_available()
    assert [b["name"] for b in found["backends"]] == [name for name, *_ in doctor.PROBES]
    assert {b["name"] for b in found["backends"] if b["works"]} >= {"sdpa", "fused AdamW"}


def test_a_failing_backend_is_a_verdict_with_the_reason_and_the_fix() -> None:
    def probe(device: str) -> str:
        raise RuntimeError(f"no kernel for {device}\nsecond line")

    found = doctor.attempt("x", probe, "cpu", "pip install x")
    assert str(found) == "not usable: no kernel for cpu; pip install x"
    assert not found.works


def test_a_package_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda dist: None)
    found = {b.name: str(b) for b in doctor.examine().backends}
    assert (
        found["bitsandbytes AdamW8bit"]
        == 'not usable: not installed; pip install "t2i-align[quant]"'
    )
    assert found["xformers"] == 'not usable: not installed; pip install "t2i-align[xformers]"'
    assert found["sdpa"].startswith("works")


def test_probes_look_at_results_not_only_at_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives NaN gradients is not usable."""
    functional = torch.nn.functional

    def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q + k + v) * float("nan")

    monkeypatch.setattr(functional, "scaled_dot_product_attention", broken)
    found = {b.name: str(b) for b in doctor.examine().backends}
    assert found["sdpa"] == "not usable: a gradient is missing or not finite"


def test_compile_is_tried_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled(module: torch.nn.Module) -> torch.nn.Module:
        asked.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    assert "torch.compile" not in [b.name for b in doctor.examine().backends]
    assert not asked
    assert doctor.examine(with_compile=True).backends[-1].works
    assert len(asked) == 1
