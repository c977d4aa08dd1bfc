"""No fast form goes round what somebody changed: under every change, each gives what the plain form gives."""

import contextlib
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from reference.method_cases import RECIPES, SETS, each_of, train_a_little
from reference.random_weights import randomize
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.fast import loss as fast_loss
from minitransformer.fast.last_position import is_position_wise
from minitransformer.fast.stand_in import may_stand_in
from peft.methods.adapter import Adapter

CONFIG = {"vocab_size": 23, "max_len": 40, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [2, 7, 5, 9], [8, 6, 0, 2]])
TARGETS = TOKENS.roll(-1, dims=1)
ASKED = torch.tensor([3, 1, 0])


def decoder(**changes):
    model = Transformer(TransformerConfig(**(CONFIG | changes)))
    return randomize(model, std=0.5).double().eval()


def own_method(path, name, change):
    """Set a method on the module itself: what it gave, changed."""

    def apply(model):
        module = model.get_submodule(path)
        plain = getattr(module, name)
        setattr(module, name, lambda *inputs: change(plain(*inputs)))

    return apply


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class KnownToLinearOnly(torch.Tensor):
    """A stored weight of which no other function knows what it stands for: twice what it holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        if function in (torch.cat, torch.mm, torch.addmm, torch.Tensor.matmul):
            raise RuntimeError(f"{function} does not know this weight")
        return super().__torch_function__(function, types, args, kwargs or {})


class CalledTwice(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + super().__call__(x)


def replaced(path, make):
    def apply(model):
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, make(model.get_submodule(path)))

    return apply


def stored_otherwise(model):
    weight = model.blocks[1].attention.query.weight
    stored = weight.detach().as_subclass(KnownToLinearOnly)
    model.blocks[1].attention.query.weight = nn.Parameter(stored, requires_grad=False)


class SumOfAll(nn.Module):
    """Works on what a module gives, at each position with all those in front of it."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *inputs):
        return self.base(*inputs).cumsum(dim=1)


class SummedWrapper(peft.Wrapper):
    def forward(self, *inputs):
        return self.base(*inputs).cumsum(dim=1)


class SummedAdapter(Adapter):
    def added(self, h):
        return super().added(h).cumsum(dim=1)


class Convolution(nn.Module):
    """A feed-forward network that looks at the token in front as well."""

    def __init__(self, base):
        super().__init__()
        self.base, self.activation, self.up, self.down = base, base.activation, base.up, base.down

    def forward(self, x):
        return self.base(x + F.pad(x, (0, 0, 1, 0))[:, :-1])


def summed_adapter(model):
    train_a_little(peft.attach(model, RECIPES["houlsby"]))
    for block in model.blocks:
        block.feedforward.__class__ = SummedAdapter


QUERY, LAST = "blocks.1.attention.query", "blocks.1"
CHANGES = {
    "nothing": lambda model: None,
    "hook": lambda model: model.blocks[1].attention.query.register_forward_hook(lambda *seen: 2 * seen[-1]),
    "hook that is always called": lambda model: model.head.register_forward_hook(lambda *_: None, always_call=True),
    "hook in front": lambda model: model.blocks[1].feedforward.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "hook on the head": lambda model: model.head.register_forward_hook(lambda *seen: -seen[-1]),
    "own forward": own_method(QUERY, "forward", lambda q: 2 * q),
    "own attend": own_method(f"{LAST}.attention", "attend", lambda heads: 2 * heads),
    "own split_heads": own_method(f"{LAST}.attention", "split_heads", lambda heads: 2 * heads),
    "own keys_and_values": own_method(f"{LAST}.attention", "keys_and_values", lambda kv: (2 * kv[0], kv[1])),
    "own lm_head": own_method("", "lm_head", lambda logits: -logits),
    "own summed": own_method("embedding", "summed", lambda x: 2 * x),
    "own __call__": lambda model: setattr(model.blocks[1].feedforward.up, "__class__", CalledTwice),
    "parametrised": lambda m: parametrize.register_parametrization(m.get_submodule(QUERY), "weight", Halved()),
    "parametrised embedding": lambda m: parametrize.register_parametrization(m.embedding.token, "weight", Halved()),
    "parametrised norm": lambda m: parametrize.register_parametrization(m.norm, "weight", Halved()),
    "weight norm": lambda model: parametrizations.weight_norm(model.get_submodule(QUERY)),
    "pruned": lambda model: prune.l1_unstructured(model.get_submodule(QUERY), "weight", amount=0.5),
    "pruned embedding": lambda model: prune.l1_unstructured(model.embedding.token, "weight", amount=0.5),
    "weight that linear knows": stored_otherwise,
    "sum of all behind the FFN": replaced(f"{LAST}.feedforward", SumOfAll),
    "sum of all behind the query": replaced(QUERY, SumOfAll),
    "wrapper that sums behind the FFN": replaced(f"{LAST}.feedforward", SummedWrapper),
    "wrapper that sums behind a norm": replaced(f"{LAST}.norm_feedforward", SummedWrapper),
    "adapter that sums": summed_adapter,
    "convolution": replaced(f"{LAST}.feedforward", Convolution),
}
MIXES_POSITIONS = [name for name in CHANGES if "sum" in name.split() or "sums" in name.split()] + ["convolution"]


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in MIXES_POSITIONS])
def test_generation_gives_the_plain_forms_words(change):
    """A cache cannot know what mixes positions elsewhere than in attention: those changes are not asked here."""
    model = decoder()
    CHANGES[change](model)
    assert torch.equal(model.generate(TOKENS, 8), model.generate(TOKENS, 8, use_cache=False))


@pytest.mark.parametrize("change", CHANGES)
def test_the_asked_position_is_that_of_the_whole_pass(change):
    model = decoder()
    CHANGES[change](model)
    expected = model.hidden(TOKENS)[torch.arange(3), ASKED]
    torch.testing.assert_close(model.hidden(TOKENS, asked=ASKED)[:, 0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", CHANGES)
def test_the_loss_is_the_cross_entropy_of_the_logits(monkeypatch, change):
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    model = decoder()
    CHANGES[change](model)
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(model.loss(TOKENS, TARGETS), expected, rtol=1e-10, atol=1e-10)


class Doubling(torch.overrides.TorchFunctionMode):
    """Takes every call of PyTorch's linear function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.linear else out


AROUND = {
    "a function mode": Doubling,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a transform": lambda: torch.autograd.forward_ad.dual_level(),
}


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_pass_is_around_its_fast_forms(monkeypatch, around):
    monkeypatch.setattr(fast_loss, "WORTH_IT", 1)
    model = decoder().float()
    with AROUND[around]():
        assert not may_stand_in(torch.ones(2), model)
        whole = model.hidden(TOKENS)[torch.arange(3), ASKED]
        torch.testing.assert_close(model.hidden(TOKENS, asked=ASKED)[:, 0], whole)
        torch.testing.assert_close(
            model.loss(TOKENS, TARGETS), F.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())
        )
        assert torch.equal(model.generate(TOKENS, 8), model.generate(TOKENS, 8, use_cache=False))
    assert may_stand_in(torch.ones(2), model)


def test_a_compiler_traces_the_plain_form(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not may_stand_in(torch.ones(2))


def test_a_sparse_weight_is_not_ordinary():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)
    assert not may_stand_in(torch.ones(2), layer) and not may_stand_in(torch.eye(3).to_sparse())


@each_of("name", {name: name for name in SETS})
def test_every_method_says_that_it_works_position_by_position(name):
    model = decoder()
    for recipe in SETS[name]:
        peft.attach(model, recipe)
    assert all(is_position_wise(module) for module in model.blocks[-1].modules())


def test_disabled_in_this_thread_only_is_seen_by_generation():
    model = decoder()
    plain = model.generate(TOKENS, 8)
    train_a_little(peft.attach(model, peft.LoRA(rank=4, targets=peft.ALL_LINEARS)), size=1.0)
    on = model.generate(TOKENS, 8)
    assert not torch.equal(on, plain)
    found = {}

    def generate(name, around):
        with around(model):
            found[name] = [model.generate(TOKENS, 8) for _ in range(5)]

    workers = [Thread(target=generate, args=pair) for pair in (("off", peft.disabled), ("on", contextlib.nullcontext))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(words, plain) for words in found["off"])
    assert all(torch.equal(words, on) for words in found["on"])
