"""What a pass is told belongs to its thread; what is computed again for a gradient is told, and drops, the same."""

from threading import Thread

import pytest
import torch
from reference.method_cases import train_a_little
from torch.utils.checkpoint import checkpoint

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.call import CALL, telling
from minitransformer.checkpointing import _malloc_trim, checkpointed, checkpoints, give_memory_back

CONFIG = {"vocab_size": 23, "max_len": 12, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [2, 7, 5, 9]])


def in_another_thread(run):
    found = []
    thread = Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_entries_nest_end_with_an_exception_and_stay_in_their_thread():
    with pytest.raises(KeyError), telling({"a": 1, "b": 1}):
        with telling({"a": 2}):
            assert CALL.told == {"a": 2, "b": 1} and in_another_thread(lambda: CALL.told) == {}
        assert CALL.told == {"a": 1, "b": 1}
        raise KeyError
    assert CALL.told == {}


@pytest.mark.parametrize("told", [{}, {"task": "a"}], ids=str)
@pytest.mark.parametrize("where", ["here", "another thread", "told otherwise"])
def test_what_is_computed_again_is_told_the_same(where, told):
    seen, x = [], torch.ones(1, requires_grad=True)
    with telling(told):
        out = checkpointed(lambda x: seen.append(dict(CALL.told)) or x * x, x)
    if where == "another thread":
        in_another_thread(out.backward)
    else:
        with telling({"task": "b", "other": 1} if where == "told otherwise" else {}):
            out.backward()
    assert seen == [told] * 2 and x.grad == 2 and CALL.told == {}


def gradients(**changes):
    model = Transformer(TransformerConfig(**CONFIG, dropout=0.3, **changes)).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = model(TOKENS).square().sum() + model.hidden(TOKENS, asked=torch.tensor([3, 0])).sum()
        torch.rand(5)  # the random state is elsewhere by the time of the backward pass
        return torch.autograd.grad(loss, list(model.parameters()))


def test_what_is_computed_again_drops_the_same():
    expected = gradients()
    for gradient, other in zip(gradients(gradient_checkpointing=True), expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("recipe", [peft.LoRA(rank=2), peft.PrefixTuning(length=3)], ids=str)
def test_a_backward_pass_inside_disabled_computes_the_adapted_blocks_again(recipe):
    found = []
    for checkpointing in (False, True):
        model = Transformer(TransformerConfig(**CONFIG, gradient_checkpointing=checkpointing))
        trained = peft.trainable_parameters(train_a_little(peft.attach(model, recipe)))
        loss = model(TOKENS).square().sum()
        with peft.disabled(model):
            found.append(torch.autograd.grad(loss, list(trained.values())))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_readers_own_checkpoint_is_right_with_the_context_inside(checkpointing):
    model = Transformer(TransformerConfig(**CONFIG, gradient_checkpointing=checkpointing))
    train_a_little(peft.attach(model, peft.PrefixTuning(length=3)))
    weight = model.embedding.token.weight.requires_grad_(True)

    def off(tokens):
        with peft.disabled(model):
            return model(tokens).square().sum()

    expected = torch.autograd.grad(off(TOKENS), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(checkpoint(off, TOKENS, use_reentrant=False), weight)[0], expected)


def test_memory_is_given_back_where_the_c_library_can(monkeypatch):
    _malloc_trim.cache_clear()
    assert _malloc_trim() is None or _malloc_trim()(0) in (0, 1)
    for platform in ("win32", "darwin", "emscripten"):
        monkeypatch.setattr("sys.platform", platform)
        _malloc_trim.cache_clear()
        assert _malloc_trim() is None
        give_memory_back()
    _malloc_trim.cache_clear()


@pytest.mark.parametrize(
    "kind, size, given_back", [("cpu", 2**18, True), ("cpu", 2**18 - 1, False), ("meta", 2**18, False)]
)
def test_memory_is_given_back_on_a_cpu_behind_large_blocks_alone(monkeypatch, kind, size, given_back):
    called = []
    monkeypatch.setattr("minitransformer.checkpointing.give_memory_back", lambda: called.append(1))
    steps = checkpoints([lambda x: 2 * x] * 5)  # one of every four, counted from the last
    x = torch.ones(size, device=kind, requires_grad=True)
    for step in steps:
        x = step(x)
    assert len(called) == 2 * given_back
