"""Methods on the Llama family, where widths differ from layer to layer and positions turn the keys.

What must hold for every method is in `test_invariants_of_every_method.py`, for this family as well.
"""

import copy

import pytest
import torch
from reference import numpy_peft
from reference.bank_cases import TASKS, everything, rows_of
from reference.method_cases import RECIPES, batch, outputs, train_a_little
from reference.tiny_models import LLAMA, tiny_of

import peft
from minitransformer import TransformerConfig
from minitransformer.attention import written_out_attention
from minitransformer.cache import KVCache
from minitransformer.position import rotary, rotated
from peft import IA3, BitFit, LNTuning, LoRA, PrefixTuning, PromptTuning, VeRA

tiny = tiny_of(LLAMA | {"n_heads": 4, "n_kv_heads": 2})  # d_head 4, keys and values 8 wide
plain = tiny_of(LLAMA | {"n_heads": 4, "n_kv_heads": 2, "bias": "none"})  # as Llama has it
LEFT = torch.arange(6) >= torch.tensor([[0], [2], [4]])
METHODS = {name: recipe for name, recipe in RECIPES.items() if "layer" not in name and "normal" not in name}
METHODS["lora on the gate"] = LoRA(rank=2, targets=(*peft.ALL_LINEARS, "gate"))
EVERYTHING = ("houlsby", "inside_ffn", "lora all", "ia3", "prompt", "prefix hidden")
SETS = {name: [recipe] for name, recipe in METHODS.items()} | {"everything": [RECIPES[name] for name in EVERYTHING]}


def attached(recipes, build=tiny, **changes):
    model = build(**changes)
    for seed, recipe in enumerate(recipes):
        peft.attach(model, recipe, seed=seed)
    return model


@pytest.mark.parametrize("changes", [{}, {"head_dim": 6, "n_kv_heads": 1, "bias": "all"}], ids=["plain", "wide"])
@pytest.mark.parametrize("recipe", METHODS.values(), ids=METHODS.keys())
def test_counts_equal_the_closed_form(recipe, changes):
    model = attached([recipe], **changes)
    trained = sum(p.numel() for p in peft.trainable_parameters(model).values())
    assert trained == peft.expected_parameters(model.config, recipe)


def test_counts_of_smollm2_by_hand():
    sizes = {"d_model": 576, "n_heads": 9, "n_kv_heads": 3, "n_layers": 30, "d_ff": 1536}
    config = TransformerConfig(49_152, 8_192, **(LLAMA | sizes | {"bias": "none"}))
    assert peft.expected_parameters(config, LoRA(rank=8)) == 30 * 8 * (576 + 576 + 576 + 192) == 460_800
    assert peft.expected_parameters(config, PrefixTuning(length=16)) == 30 * 2 * 16 * 192 == 184_320
    assert peft.expected_parameters(config, PrefixTuning(length=16, at="hidden")) == 30 * 16 * 576
    assert peft.expected_parameters(config, PrefixTuning(length=16, gated=True)) == 184_320 + 30 * 9
    assert peft.expected_parameters(config, PromptTuning(length=16)) == 9_216
    assert peft.expected_parameters(config, IA3()) == 30 * (192 + 192 + 1536)
    assert peft.expected_parameters(config, LNTuning()) == (2 * 30 + 1) * 576
    assert peft.expected_parameters(config, VeRA(rank=64)) == 30 * (2 * 64 + 576 + 192)


@pytest.mark.parametrize("recipes", SETS.values(), ids=SETS.keys())
def test_cached_and_padded_rows_generate_what_they_generate_alone(recipes):
    model, tokens = train_a_little(attached(recipes)), batch()[0]
    together = model.generate(tokens, 3, padding_mask=LEFT)
    assert torch.equal(together, model.generate(tokens, 3, padding_mask=LEFT, use_cache=False))
    for row in range(3):
        alone = model.generate(tokens[row : row + 1, LEFT[row]], 3)[0, -3:]
        assert torch.equal(alone, together[row, -3:])


def concatenated(model, x):
    """A prefix in front of turned keys, by hand: each head of queries beside its head of keys, in NumPy."""
    wrapper, base, n_heads = model.blocks[1].attention, model.blocks[1].attention.base, model.config.n_heads
    angles = rotary(torch.arange(x.shape[1])[None], model.config.d_head, 10_000.0)
    q, k, v = (base.split_heads(part(x)) for part in (base.query, base.key, base.value))
    q, k = rotated(q, *angles), rotated(k, *angles)
    prefix = [base.split_heads(part.expand(3, -1, -1)) for part in wrapper.prefix()]  # not turned
    groups = torch.arange(n_heads) * k.shape[1] // n_heads
    return wrapper, q, *(part[:, groups] for part in (k, v, *prefix))


@pytest.mark.parametrize("name", ["prefix kv", "prefix hidden", "prefix mlp", "prefix gated", "prefix gated hidden"])
def test_a_prefix_stands_unturned_in_front_of_turned_keys(name):
    model = train_a_little(attached([RECIPES[name]]).double())
    read, seen = [], []
    model.blocks[1].attention.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.blocks[1].attention.register_forward_hook(lambda *given: seen.append(given[2]))
    model.hidden(batch()[0])
    wrapper, *tensors = concatenated(model, read[0])
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].numpy()
    q, k, v, *prefix = (t.detach().numpy() for t in tensors)
    if "gated" in name:
        own = written_out_attention(*tensors[:3], torch.from_numpy(mask)).detach().numpy()
        heads = numpy_peft.gated_prefix(own, q, *prefix, wrapper.gate.detach().numpy())
    else:
        heads = numpy_peft.prefix_attention(q, k, v, *prefix, mask)
    expected = wrapper.base.output(torch.from_numpy(heads).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(seen[0], expected, atol=1e-10, rtol=1e-8)


def test_the_tensors_of_a_prefix_are_as_wide_as_keys_and_values():
    shapes = {name: {tuple(t.shape) for t in peft.state_dict(attached([RECIPES[name]])).values()} for name in RECIPES}
    assert shapes["prefix kv"] == {(3, 8)}
    assert shapes["prefix hidden"] == {(3, 16)}
    assert shapes["prefix gated"] == {(3, 8), (4,)}


@pytest.mark.parametrize("gated", [False, True])
def test_a_prefix_of_real_words_is_those_words_before_the_text(gated):
    """*A prefix is a learned KV cache*: exactly so, positions included."""
    words, tokens = (4, 9, 2), batch()[0]
    by_hand = tiny().hidden(torch.cat([torch.tensor(words).expand(3, -1), tokens], dim=1))[:, 3:]
    model = peft.attach(tiny(), PrefixTuning(length=3, init_tokens=words, gated=gated))
    assert torch.allclose(model.hidden(tokens), by_hand, atol=1e-5) == (not gated)


def test_behind_a_cache_of_the_same_words_every_layer_sees_the_same():
    words, model, cache = (4, 9, 2), peft.attach(tiny(), PrefixTuning(length=3, init_tokens=(4, 9, 2))), KVCache(2)
    tiny().hidden(torch.tensor([words]), cache=cache)
    for block, layer in zip(model.blocks, cache.layers, strict=True):
        key, value = (part.unflatten(-1, (-1, 4)).transpose(0, 1) for part in block.attention.prefix())
        back = rotary(torch.full((1, 3), -3), 4, 10_000.0)  # the words stand at 0, 1, 2 there, and here at -3, -2, -1
        torch.testing.assert_close(key, rotated(layer.key, *back)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(value, layer.value[0], atol=1e-6, rtol=1e-5)


def test_a_prompt_of_real_words_is_those_words_before_the_text():
    words, tokens = (5, 1, 7), batch()[0]
    for mask in (None, LEFT):
        rows, real = torch.tensor(words).expand(3, -1), torch.ones(3, 3, dtype=torch.bool)
        whole = None if mask is None else torch.cat([real, mask], dim=1)
        by_hand = tiny().hidden(torch.cat([rows, tokens], dim=1), whole)[:, 3:]
        model = peft.attach(tiny(), PromptTuning(length=3, init_tokens=words))
        chosen = torch.ones(3, 6, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(model.hidden(tokens, mask)[chosen], by_hand[chosen], atol=1e-5, rtol=1e-5)


def test_where_there_is_no_bias_bitfit_says_so():
    model = plain()
    for asked in (lambda: peft.attach(model, BitFit()), lambda: peft.expected_parameters(model.config, BitFit())):
        with pytest.raises(ValueError, match=r"there is no bias to train: .*: LNTuning trains the norms' gains"):
            asked()
    assert not peft.attached(model)
    peft.attach(model, LNTuning())  # the cure


def test_bitfit_trains_the_biases_of_keys_where_positions_turn_them():
    """Nothing cancels in the softmax: their gradient is not zero."""
    model = peft.attach(tiny().double(), BitFit())
    names = {name.removesuffix(".delta_bias").split(".", 2)[2] for name in peft.trainable_parameters(model)}
    assert names == {"attention.query", "attention.key", "attention.value"}
    outputs_of = model.hidden(batch()[0])
    (outputs_of * torch.randn_like(outputs_of)).sum().backward()
    for name, p in peft.trainable_parameters(model).items():
        assert p.grad.abs().max() > 1e-3, name


@pytest.mark.parametrize("name", ["lora all", "dora", "vera"])
def test_merged_as_before(name):
    model = train_a_little(attached([RECIPES[name]], plain).double())
    before = outputs(model)
    torch.testing.assert_close(outputs(peft.merge(model)), before, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(outputs(peft.unmerge(model)), before, atol=0, rtol=0)


@pytest.mark.parametrize("recipes", SETS.values(), ids=SETS.keys())
def test_a_file_gives_the_same_model_and_is_refused_by_another_base(recipes, tmp_path):
    model = train_a_little(attached(recipes))
    peft.save(model, tmp_path / "method.safetensors")
    again = peft.load(tiny(), tmp_path / "method.safetensors")
    assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(ValueError, match="another base model"):
        peft.load(tiny(rope_theta=9_999.0), tmp_path / "method.safetensors")


def test_rows_of_many_tasks_in_one_batch():
    model, (tokens, real) = tiny(max_len=20).double(), rows_of(len(TASKS) + 1, side="left")
    models = everything(model) | {None: model}
    bank = peft.TaskBank(copy.deepcopy(model), {task: single for task, single in models.items() if task})
    logits, words = bank(tokens, real, tasks=[*models]), bank.generate(tokens, 4, padding_mask=real, tasks=[*models])
    for row, (task, single) in enumerate(models.items()):
        own = slice(row, row + 1)
        torch.testing.assert_close(logits[own][real[own]], single(tokens[own], real[own])[real[own]], msg=task)
        assert torch.equal(words[own], single.generate(tokens[own], 4, padding_mask=real[own])), task
