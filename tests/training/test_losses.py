"""Losses in chunks are the plain ones: their values, and the gradients of hidden states, weight and bias."""

from __future__ import annotations

import functools

import pytest
import torch

from winnow.training import losses
from winnow.training.losses import Head, chunked, unchunked

N, H, V = 37, 16, 101  # positions, hidden, vocabulary
CHUNKS = {"several, the last ragged": 4 * V * 8, "one": 4 * V * 1000, "a position each": 1}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 5.0},
}
LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "forward_kl": functools.partial(losses.forward_kl, temperature=2.0),
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": functools.partial(losses.jensen_shannon, beta=0.3, temperature=1.5),
    "sampled_kl": losses.sampled_kl,
}


def others(name: str) -> tuple[torch.Tensor, ...]:
    """What the loss compares with: targets, a teacher's logits, or samples of a teacher's distribution."""
    if name == "cross_entropy":
        return (torch.randint(0, V, (N,)),)
    if name == "sampled_kl":
        return torch.randint(0, V, (N, 5)), torch.rand(N, 5).softmax(-1)
    return (3 * torch.randn(N, V),)


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_plain_loss(name: str, head: str, chunk: str) -> None:
    torch.manual_seed(0)
    compared = others(name)
    first = [torch.randn(N, H), torch.randn(V, H), torch.randn(V)]
    found = []
    for compute in (functools.partial(chunked, chunk_bytes=CHUNKS[chunk]), unchunked):
        hidden, weight, bias = (x.clone().requires_grad_() for x in first)
        settings = {**HEADS[head], "bias": bias if "bias" in HEADS[head] else None}
        total = compute(LOSSES[name], hidden, Head(weight, **settings), *compared)
        (0.37 * total).backward()  # losses are divided by a count before they are minimised
        found.append([total.detach(), *(x.grad for x in (hidden, weight, bias) if x.grad is not None)])
    assert len(found[0]) == (4 if "bias" in HEADS[head] else 3)
    for ours, reference in zip(*found, strict=True):
        assert difference(ours, reference) <= 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_the_references_are_the_formulas(name: str) -> None:
    """Against probabilities in double precision, written out."""
    torch.manual_seed(1)
    logits, compared = torch.randn(N, V), others(name)
    ours = LOSSES[name](logits, *compared).double()
    q = logits.double().softmax(-1)
    if name == "cross_entropy":
        expected = -q[torch.arange(N), compared[0]].log().sum()
    elif name == "sampled_kl":
        expected = -(compared[1] * q.gather(1, compared[0]).log()).sum()
    else:
        t = {"forward_kl": 2.0, "reverse_kl": 1.0, "jensen_shannon": 1.5}[name]
        q, p = ((x.double() / t).softmax(-1) for x in (logits, compared[0]))

        def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return t * t * (a * (a / b).log()).sum()

        m = 0.3 * p + 0.7 * q
        expected = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jensen_shannon": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        }[name]
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_under_autocast_products_are_in_16_bits_and_the_loss_is_not() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    exact = unchunked(losses.cross_entropy, hidden, Head(weight), targets)
    exact.backward()
    grads = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        total = chunked(losses.cross_entropy, hidden, Head(weight), targets, chunk_bytes=4 * V * 8)
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.01)
    for ours, reference in zip([hidden.grad, weight.grad], grads, strict=True):
        assert ours.dtype == torch.float32
        assert difference(ours, reference) < 0.02


def test_a_frozen_head_costs_no_gradient_of_it() -> None:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    chunked(losses.cross_entropy, hidden, Head(weight), torch.randint(0, V, (N,))).backward()
    assert weight.grad is None and hidden.grad is not None
