"""Generation's fast form with methods attached: which of them keep it, and that each generates as its plain form."""

import pytest
import torch
from reference.method_cases import SETS, each_of, train_a_little
from reference.random_weights import randomize
from reference.tiny_models import LLAMA

import peft
from minitransformer import Transformer, TransformerConfig
from minitransformer.cache import KVCache
from minitransformer.fast.generation import fast_steps
from peft.functional import lora_update
from peft.method import linear_map, switched_off
from peft.methods.lora import LoRALinear
from peft.methods.prefix import PrefixAttention

CONFIG = {"vocab_size": 23, "max_len": 40, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9], [0, 0, 0, 2]])
REAL = torch.arange(4) >= torch.tensor([0, 2, 3])[:, None]
WORDS = torch.randint(23, (3, 3, 1), generator=torch.Generator().manual_seed(0))
# An adapter's activation stands between two maps, a gated prefix has a softmax of its own: they need the plain form.
SLOW = ("houlsby", "pfeiffer", "parallel", "inside_ffn", "gated", "adapter", "everything")


def with_methods(name, dtype=torch.float64, **changes):
    model = randomize(Transformer(TransformerConfig(**CONFIG, **changes)), std=0.5).to(dtype)
    for recipe in SETS[name]:
        peft.attach(model, recipe)
    return train_a_little(model).eval()


@torch.no_grad()
def compare(model, real=None):
    """Whether the fast form serves the model; if so, its steps give the plain form's logits."""
    caches = [KVCache(CONFIG["n_layers"]) for _ in range(2)]
    for cache in caches:
        model.hidden(TOKENS, real, cache=cache)
    fast = fast_steps(model, caches[0], 8)
    for words in WORDS if fast is not None else ():
        newest = None if real is None else torch.ones_like(words, dtype=torch.bool)
        expected = model.lm_head(model.hidden(words, newest, cache=caches[1])[:, -1])
        torch.testing.assert_close(fast(words), expected, rtol=1e-10, atol=1e-10)
    return fast is not None


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
@each_of("name", {name: name for name in SETS})
def test_methods_that_end_in_linear_maps_or_keys_keep_the_fast_form(name, real):
    assert compare(with_methods(name), real) == (not any(slow in name for slow in SLOW))


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
@each_of("name", {name: name for name in SETS})
def test_the_llama_family_keeps_it_with_the_same_methods(name, real):
    assert compare(with_methods(name, **LLAMA), real) == (not any(slow in name for slow in SLOW))


@each_of("name", {name: name for name in SETS})
def test_words_are_those_of_the_plain_form(name):
    model = with_methods(name)
    words = model.generate(TOKENS, 8, padding_mask=REAL)
    assert torch.equal(words, model.generate(TOKENS, 8, padding_mask=REAL, use_cache=False))


@pytest.mark.parametrize("name", ["lora all", "dora", "prefix kv", "bitfit", "ia3", "ln_tuning", "prompt"])
def test_disabled_methods_generate_as_the_base_does(name):
    model = with_methods(name)
    with peft.disabled(model):
        assert compare(model)
        without = model.generate(TOKENS, 8)
    assert not torch.equal(without, model.generate(TOKENS, 8))
    assert torch.equal(without, peft.detach(model).generate(TOKENS, 8))


@pytest.mark.parametrize("name", ["lora all", "dora"])
def test_merged_methods_generate_as_before_and_disabled_as_the_base(name):
    model = with_methods(name)
    before = model.generate(TOKENS, 8)
    peft.merge(model)
    assert compare(model) and torch.equal(model.generate(TOKENS, 8), before)
    with peft.disabled(model):
        assert compare(model)


@pytest.mark.parametrize("late", [False, True], ids=["attached to it", "made so afterwards"])
@pytest.mark.parametrize("name", ["lora", "dora", "bitfit", "ia3"])
def test_a_change_that_half_precision_would_round_away_keeps_the_plain_form(name, late):
    model = with_methods(name) if late else with_methods(name, torch.bfloat16)
    assert not compare(model.bfloat16() if late else model)
    with peft.disabled(model):
        assert linear_map(model.blocks[0].attention.value)[0].dtype == torch.bfloat16


class Squashed(LoRALinear):
    def forward(self, x):
        return self.base(x) + torch.tanh(lora_update(x, self.A, self.B, self.scale))


class TwiceThePrefix(PrefixAttention):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


@pytest.mark.parametrize("name, kind", [("lora", Squashed), ("prefix kv", TwiceThePrefix)])
def test_a_subclass_that_computes_otherwise_keeps_the_plain_form(name, kind):
    model = with_methods(name)
    for module in list(model.modules()):
        if isinstance(module, LoRALinear | PrefixAttention):
            module.__class__ = kind
    assert not compare(model)
    assert torch.equal(model.generate(TOKENS, 8), model.generate(TOKENS, 8, use_cache=False))


def test_two_changes_of_one_weight_keep_the_plain_form():
    model = with_methods("lora")
    query = model.blocks[0].attention.query
    outer = LoRALinear(query.base, query.recipe, torch.Generator().manual_seed(5)).double()
    outer.base = query
    with torch.no_grad():
        outer.B.normal_()
    model.blocks[0].attention.query = outer
    assert linear_map(outer) is None and not compare(model)
    with switched_off(outer):
        assert linear_map(outer)[0] is not query.base.weight and compare(model)


def test_what_wraps_an_unknown_module_is_unknown():
    model = with_methods("lora")
    lora = model.blocks[0].attention.query
    lora.base = torch.nn.Sequential(lora.base)
    assert linear_map(lora) is None


def test_rows_of_many_tasks_are_generated_as_in_the_plain_form():
    sources = {name: with_methods(name) for name in ("lora", "prefix kv", "houlsby")}
    bank = peft.TaskBank(randomize(Transformer(TransformerConfig(**CONFIG)), std=0.5).double(), sources)
    tasks = ["prefix kv", None, "lora"]
    together = bank.generate(TOKENS, 6, tasks=tasks)
    assert torch.equal(together, bank.generate(TOKENS, 6, tasks=tasks, use_cache=False))
