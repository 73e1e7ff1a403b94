"""Views: which weights score, and that looking through one leaves the others alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i_align.errors import ModelError
from t2i_align.generators.adapters import LoraOptions
from t2i_align.generators.views import add_lora, build_views, linear_names


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_frozen_copy_does_not_follow_the_policy() -> None:
    views = build_views(network(), None, [], 0, reference=True)
    x = torch.randn(3, 4)
    with torch.no_grad():
        with views.use("reference") as net:
            before = net(x)
        views.module[0].weight.add_(1.0)  # type: ignore[index, union-attr, operator]
        with views.use("reference") as net:
            assert torch.equal(net(x), before)
        with views.use("policy") as net:
            assert not torch.equal(net(x), before)
    assert views.reference is not None
    assert not any(p.requires_grad for p in views.reference.parameters())


def test_scoring_is_deterministic_despite_dropout() -> None:
    views = build_views(network(), None, [], 0, reference=False)
    x = torch.randn(3, 4)
    with views.use("policy") as net:
        assert torch.equal(net(x), net(x))


def test_ema_view_swaps_and_restores() -> None:
    views = build_views(network(), None, [], 0, reference=False)
    live = {k: p.detach().clone() for k, p in views.module.named_parameters()}
    views.ema = {k: torch.zeros_like(v) for k, v in live.items()}
    with views.use("ema") as net:
        assert net(torch.ones(1, 4)).abs().sum().item() == 0
    for k, p in views.module.named_parameters():
        assert torch.equal(p, live[k])


def test_adapters_start_at_the_base_from_their_seed() -> None:
    a, b, c = network(), network(), network()
    for net, seed in ((a, 1), (b, 1), (c, 2)):
        add_lora(net, LoraOptions(r=2, target_modules="all-linear"), [], seed)
    x, base = torch.randn(3, 4), network().eval()
    assert torch.equal(a.eval()(x), base(x))
    first = {k: v for k, v in a.state_dict().items() if "lora_A" in k}
    assert len(first) == 2
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in first.items())
    assert not any(torch.equal(v, c.state_dict()[k]) for k, v in first.items())
    assert linear_names(base) == ["0", "2"]


def test_unmatched_targets_and_missing_views_are_named() -> None:
    with pytest.raises(ModelError, match=r"target_modules=\['to_x'\] matches no layer") as caught:
        add_lora(network(), LoraOptions(target_modules=["to_x"]), [], 0)
    assert "use 'attention', 'all-linear'" in str(caught.value)
    views = build_views(network(), None, [], 0, reference=False)
    for view, text in (("reference", "no reference"), ("ema", "ema_decay"), ("old", "known:")):
        with pytest.raises(ValueError, match=text), views.use(view):  # type: ignore[arg-type]
            pass


def test_averaged_weights_do_not_leak_into_the_policy_under_autocast() -> None:
    """Autocast caches cast weights by tensor; each view is scored in a block of its own."""
    views = build_views(network(), None, [], 0, reference=False)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), views.use("policy") as net:
        before = net(x)
    views.ema = {k: torch.zeros_like(p) for k, p in views.module.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16), views.use("ema") as net:
        assert net(x).abs().sum().item() == 0
    with torch.autocast("cpu", torch.bfloat16), views.use("policy") as net:
        assert torch.equal(net(x), before)
