"""Rows that end at their stop tokens, nucleus sampling, and words that come one column at a time."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from reference.method_cases import train_a_little
from reference.random_weights import randomize

import peft
from minitransformer import Transformer, TransformerConfig, generation
from minitransformer.cache import KVCache
from minitransformer.call import CALL
from minitransformer.fast.generation import fast_steps
from minitransformer.generation import next_word, probabilities, stream

CONFIG = {"vocab_size": 23, "max_len": 40, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24}
TOKENS = torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9], [0, 0, 0, 2], [7, 7, 8, 5]])
REAL = torch.arange(4) >= torch.tensor([0, 2, 3, 0])[:, None]
SAMPLING = [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.5, "top_p": 0.7}]
T = TOKENS.shape[1]


def decoder(**changes):
    return randomize(Transformer(TransformerConfig(**(CONFIG | changes))), std=0.5).double()


def cut(tokens, stop, pad):
    """What a row is cut to at its first stop token behind the beginning, written out for lists."""
    rows = []
    for row in tokens.tolist():
        end = next((i for i in range(T, len(row)) if row[i] in stop), len(row) - 1)
        rows.append(row[: end + 1])
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def steps_of(monkeypatch):
    """How many rows each step computes."""
    seen = []
    monkeypatch.setattr(generation, "next_word", lambda x, *a, **k: seen.append(len(x)) or next_word(x, *a, **k))
    return seen


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("padding", [None, REAL], ids=["no padding", "left padding"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("n", [4, 20], ids=["plain", "fast"])
def test_each_row_ends_at_its_own_stop_token_and_changes_no_other(monkeypatch, options, padding, use_cache, n):
    model = decoder()
    options = options | {"padding_mask": padding, "use_cache": use_cache}
    free = model.generate(TOKENS, n, **options)

    def lengths(stop):
        return [next((i + 1 for i, word in enumerate(row[T:]) if word in stop), n) for row in free.tolist()]

    pairs = itertools.combinations(set(free[:, T:].flatten().tolist()), 2)
    stop = max(pairs, key=lambda stop: len(set(lengths(stop))))
    assert len(set(lengths(stop))) > 2
    seen = steps_of(monkeypatch)
    assert torch.equal(model.generate(TOKENS, n, stop=stop, **options), cut(free, stop, 0))
    assert seen == [sum(length > step for length in lengths(stop)) for step in range(max(lengths(stop)))]


@pytest.mark.parametrize("kind", [int, list, tuple, set])
def test_stop_is_a_number_or_several(kind):
    model = decoder()
    free = model.generate(TOKENS[:1], 12)
    word = int(free[0, T + 3])
    stop = word if kind is int else kind([word, 22])
    got = model.generate(TOKENS[:1], 12, stop=stop)
    assert torch.equal(got, cut(free, [word, 22], 0)) and got[0, -1] in (word, 22)


@pytest.mark.parametrize("n", [4, 20], ids=["plain", "fast"])
def test_rows_together_are_the_rows_alone(n):
    model = decoder()
    free = model.generate(TOKENS, n, padding_mask=REAL)
    stop = [int(free[0, T + 1]), int(free[2, T + 3])]
    together = model.generate(TOKENS, n, padding_mask=REAL, stop=stop, pad_id=21)
    for row in range(len(TOKENS)):
        alone = model.generate(TOKENS[row, REAL[row]][None], n, stop=stop)[0, REAL[row].sum() :]
        assert torch.equal(together[row, T : T + len(alone)], alone)
        assert (together[row, T + len(alone) :] == 21).all()


def test_a_stop_token_of_the_beginning_ends_nothing():
    model = decoder()
    free = model.generate(TOKENS, 6)
    unused = next(word for word in TOKENS.flatten().tolist() if word not in free[:, T:])
    assert torch.equal(model.generate(TOKENS, 6, stop=unused), free)


@pytest.mark.parametrize("name", ["prompt", "prefix", "prefix below", "lora", "houlsby"])
def test_rows_leave_under_methods_and_tasks(name):
    recipes = {
        "prompt": peft.PromptTuning(length=3),
        "prefix": peft.PrefixTuning(length=3),
        "prefix below": peft.PrefixTuning(length=2, layers=(0,)),
        "lora": peft.LoRA(rank=2),
        "houlsby": peft.BottleneckAdapter(bottleneck=3),
    }
    single = train_a_little(peft.attach(decoder(), recipes[name])).eval()
    free = single.generate(TOKENS, 20, padding_mask=REAL)
    stop = int(free[0, T + 1])
    expected = cut(free, [stop], 0)
    assert torch.equal(single.generate(TOKENS, 20, padding_mask=REAL, stop=stop), expected)
    if name == "prompt":
        return
    bank = peft.TaskBank(decoder(), {"a": single, "b": train_a_little(peft.attach(decoder(), recipes[name]), size=3.0)})
    tasks = ["a", None, "b", "a"]
    free = bank.generate(TOKENS, 10, padding_mask=REAL, tasks=tasks)
    stop = [int(free[0, T + 1]), int(free[2, T + 2])]
    assert torch.equal(bank.generate(TOKENS, 10, padding_mask=REAL, tasks=tasks, stop=stop), cut(free, stop, 0))


@pytest.mark.parametrize("real", [None, REAL], ids=["no padding", "left padding"])
def test_a_cache_and_the_fast_form_keep_rows(real):
    model, on = decoder(), torch.tensor([1, 3])
    cache, plain = KVCache(2), KVCache(2)
    with torch.no_grad():
        for own in (cache, plain):
            model.hidden(TOKENS, real, cache=own)
        fast = fast_steps(model, cache, 8)
        word = torch.tensor([[5], [6]])
        for _ in range(2):
            for part in (cache, plain, fast):
                part.keep(on)
            newest = None if real is None else torch.ones_like(word, dtype=torch.bool)
            expected = model.lm_head(model.hidden(word, newest, cache=plain)[:, -1])
            torch.testing.assert_close(fast(word), expected, rtol=1e-11, atol=1e-11)
            assert plain.layers[1].key.shape[0] == fast.blocks[1].seen.shape[0] == len(word)
            on, word = torch.tensor([1]), word[1:]


def nucleus(logits, temperature, top_k, top_p):
    """The distribution of one row, in NumPy, by Holtzman et al. 2020, equations 2 and 3."""
    p = np.exp((logits - logits.max()) / temperature)
    p = p / p.sum()
    order = sorted(range(len(p)), key=lambda word: (-logits[word], word))[:top_k]
    total, kept, mass = sum(p[word] for word in order), [], 0.0
    for word in order:
        if top_p is not None and mass >= top_p:
            break
        kept.append(word)
        mass += p[word] / total
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.75, 1.0])
def test_probabilities_are_those_of_the_numpy_twin(temperature, top_k, top_p):
    logits = torch.randn(6, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[3] = logits[3].round()  # equal ones
    logits[4] = -math.inf
    logits[4, :3] = 0.0
    got = probabilities(logits, temperature, top_k, top_p)
    expected = np.stack([nucleus(row, temperature, top_k, top_p) for row in logits.numpy()])
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)
    assert ((got > 0) == torch.from_numpy(expected > 0)).all()


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_sixteen_bits_find_the_same_nucleus(top_p):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = probabilities(logits, 1.0, None, top_p) > 0
    expected = np.stack([nucleus(row, 1.0, None, top_p) for row in logits.double().numpy()]) > 0
    assert ((kept.sum(dim=-1) - torch.from_numpy(expected.sum(axis=-1))).abs() <= 1).all()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, expected in [(0.5, [0, 1, 0, 0]), (0.51, [1 / 3, 2 / 3, 0, 0]), (0.8, [2 / 7, 4 / 7, 1 / 7, 0])]:
        got = probabilities(logits, 1.0, None, top_p)
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_words_are_drawn_as_by_hand(options):
    """An oracle that knows no cache, no fast form and no stream: one whole pass for each word."""
    model = decoder().eval()
    generator, tokens = torch.Generator().manual_seed(options.get("seed", 0)), TOKENS
    for _ in range(8):
        logits = model(tokens)[:, -1].detach()
        word = logits.argmax(dim=-1, keepdim=True)
        if options:
            args = options["temperature"], options.get("top_k"), options.get("top_p")
            p = np.stack([nucleus(row, *args) for row in logits.numpy()])
            word = torch.multinomial(torch.from_numpy(p), 1, generator=generator)
        tokens = torch.cat([tokens, word], dim=1)
    assert torch.equal(model.generate(TOKENS, 8, **options), tokens)


@pytest.mark.parametrize("options", [*SAMPLING, {"stop": 3}, {"use_cache": False}], ids=str)
def test_a_stream_gives_generates_columns_one_at_a_time(options):
    model = decoder()
    expected = model.generate(TOKENS, 9, padding_mask=REAL, **options)[:, T:]
    columns = []
    for column in model.stream(TOKENS, 9, padding_mask=REAL, **options):
        assert column.shape == (4,) and not column.is_inference()
        columns.append(column.clone())
        column.fill_(22)  # the reader's own
    assert torch.equal(torch.stack(columns, dim=1), expected)


def test_nothing_is_computed_before_it_is_asked_for(monkeypatch):
    seen, model = steps_of(monkeypatch), decoder()
    words = model.stream(TOKENS, 9)
    assert seen == []
    next(words)
    assert seen == [4]


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("how", ["close", "forget", "throw", "end", "never begun"])
def test_the_models_mode_comes_back_however_it_ends(how):
    model = decoder(dropout=0.3).train()
    model.blocks[0].eval()
    before, words = modes(model), model.stream(TOKENS, 5)
    assert modes(model) == before
    if how != "never begun":
        next(words)
        assert not any(modes(model))
    if how == "throw":
        with pytest.raises(KeyError):
            words.throw(KeyError("stopped"))
    elif how == "end":
        list(words)
    elif how != "forget":
        words.close()
    del words
    assert modes(model) == before


def test_between_columns_the_thread_is_the_readers_own():
    model = peft.attach(decoder(), peft.LoRA(rank=2))
    with peft.disabled(model):
        words = model.stream(TOKENS, 5)
        next(words)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not CALL.told
    assert next(words).grad_fn is None and not CALL.told
    assert model(TOKENS).requires_grad


@pytest.mark.parametrize("n", [3, 9], ids=["plain", "fast"])
def test_what_is_off_is_what_was_off_when_the_stream_was_made(n):
    model = train_a_little(peft.attach(decoder(), peft.LoRA(rank=4, targets=peft.ALL_LINEARS)), size=1.0)
    on = model.generate(TOKENS, n)
    with peft.disabled(model):
        off = model.generate(TOKENS, n)
        words = model.stream(TOKENS, n)
    assert not torch.equal(on, off)
    assert torch.equal(torch.stack(list(words), dim=1), off[:, T:])
    words = model.stream(TOKENS, n)
    with peft.disabled(model):
        assert torch.equal(torch.stack(list(words), dim=1), on[:, T:])


def test_streams_of_one_model_do_not_disturb_each_other():
    model = decoder(dropout=0.5).train()
    beginnings = TOKENS.flip(0), TOKENS, TOKENS + 1
    expected = [model.generate(tokens, 8, stop=3) for tokens in beginnings]
    longest = max(map(len, [row for tokens in expected for row in tokens])) - T
    streams = [model.stream(tokens, 8, stop=3) for tokens in beginnings]
    columns = [[] for _ in streams]
    for _ in range(longest):
        for own, words in zip(columns, streams, strict=True):
            own.extend(column for column in [next(words, None)] if column is not None)
    for words in streams:
        words.close()
    for own, tokens in zip(columns, expected, strict=True):
        assert torch.equal(torch.stack(own, dim=1), tokens[:, T:])
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda tokens: model.generate(tokens, 8, stop=torch.tensor(3)), beginnings * 5))
    assert all(torch.equal(got, want) for got, want in zip(together, expected * 5, strict=True))
    assert all(modes(model))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stop": 23}, "stop=23 must be a whole number, at least 0 and at most 22"),
        ({"stop": [1, -1]}, "stop=-1 must be a whole number, at least 0 and at most 22"),
        ({"stop": 1.0}, "stop=1.0 must be a whole number, at least 0 and at most 22"),
        ({"stop": True}, "stop=True must be"),
        ({"stop": torch.tensor(23)}, "stop=23 must be a whole number, at least 0 and at most 22"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number, at least 0"),
        ({"stop": "a"}, "stop='a' must be"),
        ({"stop": []}, "stop names no word, so it would be ignored; leave it out"),
        ({"stop": 1, "pad_id": 23}, "pad_id=23 must be a whole number, at least 0 and at most 22"),
        ({"pad_id": 0}, "pad_id=0 would be ignored"),
        ({"top_p": 0.5}, "top_p=0.5 would be ignored: give a temperature above 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is a probability above 0, and at most 1, got 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is a probability"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p is a probability"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5 must be a whole number, at least 1"),
        ({"temperature": 1.0, "seed": None}, "seed=None must be a whole number, at least 0"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused_at_once(options, message):
    for call in (decoder().generate, lambda *a, **k: stream(decoder(), *a, **k)):
        with pytest.raises(ValueError, match=message):
            call(TOKENS, **({"max_new_tokens": 2} | options))


@pytest.mark.parametrize("n", [3, 9], ids=["plain", "fast"])
def test_no_graph_of_the_passes_is_kept(monkeypatch, n):
    seen, model = [], decoder()
    monkeypatch.setattr(
        generation, "next_word", lambda x, *a, **k: seen.append(x.requires_grad) or next_word(x, *a, **k)
    )
    for _ in model.stream(TOKENS, n):
        assert torch.is_grad_enabled()
    assert seen == [False] * n


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 3 / 4096}], ids=str)
def test_of_many_equal_words_the_first_are_kept(options):
    p = probabilities(torch.zeros(2, 4096), 1.0, **options)
    assert p.nonzero().tolist() == [[row, word] for row in range(2) for word in range(3)]
