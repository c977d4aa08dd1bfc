"""What holds on the CPU holds on the device at hand: a GPU (CUDA or MPS) where there is one, else the CPU once more.

Each test does the same on the CPU and there, in float32, and compares values and gradients.
"""

import copy

import pytest
import torch
from reference.method_cases import RECIPES, batch, train_a_little
from reference.random_weights import randomize

import peft
from minitransformer import SequenceClassifier, Transformer, TransformerConfig
from minitransformer.attention import recorded
from minitransformer.tasks import Dataset
from minitransformer.training import answer_loss, evaluate, fit, label_loss, loop, next_token_loss

CONFIG = TransformerConfig(vocab_size=23, max_len=40, d_model=16, n_heads=2, n_layers=2, d_ff=24, dropout=0.0)
STEP = loop.training_step
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # a GPU sums in another order, and may multiply in fewer bits
NAMES = ["lora all", "dora", "prefix kv", "prefix hidden", "prefix gated", "prompt", "houlsby"]
NAMES += ["bitfit", "ia3", "ln_tuning", "vera"]


def device_at_hand():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


DEVICE = device_at_hand()
ALWAYS = ("lora all", "prefix hidden", "houlsby")  # on a machine without a GPU the others show nothing new
SLOW = [pytest.mark.slow] if DEVICE.type == "cpu" else []
EACH = [pytest.param(name, marks=[] if name in ALWAYS else SLOW) for name in NAMES]


def both(build):
    """Two models that `build` makes: one stays on the CPU, one is moved to the device."""
    one = build()
    return one, copy.deepcopy(one).to(DEVICE)


def base(**changes):
    return randomize(Transformer(TransformerConfig(**(vars(CONFIG) | changes)))).eval()


def adapted(name, model=None):
    return train_a_little(peft.attach(base() if model is None else model, RECIPES[name])).eval()


def moved(data):
    return Dataset(data.tokens.to(DEVICE), data.padding_mask.to(DEVICE), data.targets.to(DEVICE))


def data(seed=0):
    tokens, mask = batch(rows=8, length=12, seed=seed)
    return Dataset(tokens, mask, tokens[:, 0] % 3)


def same(got, expected):
    torch.testing.assert_close(got.detach().cpu(), expected.detach(), **CLOSE)


def gradients(model, tokens, mask):
    logits = model(tokens, mask)
    loss = (logits[mask] * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).mean()
    trained = peft.trainable_parameters(model)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)) | {"loss": loss}


@pytest.mark.parametrize("name", EACH)
def test_a_method_is_attached_moved_differentiated_disabled_and_detached(name):
    cpu, there = both(lambda: adapted(name))
    built_there = adapted(name, base().to(DEVICE))
    tokens, mask = batch()
    expected = gradients(cpu, tokens, mask)
    for model in (there, built_there):
        assert {p.device.type for p in model.parameters()} == {DEVICE.type}
        got = gradients(model, tokens.to(DEVICE), mask.to(DEVICE))
        assert got.keys() == expected.keys()
        for part, value in expected.items():
            same(got[part], value)
    plain = base().to(DEVICE)
    with peft.disabled(there):
        assert torch.equal(there(tokens.to(DEVICE)), plain(tokens.to(DEVICE)))
    assert torch.equal(peft.detach(there)(tokens.to(DEVICE)), plain(tokens.to(DEVICE)))


@pytest.mark.parametrize("name", ["lora all", "dora", "vera"])
def test_a_merged_model_is_moved_disabled_and_unmerged(name):
    model, (tokens, _) = adapted(name), batch()
    expected, plain = model(tokens), base()(tokens)
    peft.merge(model)
    model.to(DEVICE)
    same(model(tokens.to(DEVICE)), expected)
    with peft.disabled(model):
        same(model(tokens.to(DEVICE)), plain)
    same(peft.unmerge(model)(tokens.to(DEVICE)), expected)
    same(peft.detach(model)(tokens.to(DEVICE)), plain)


@pytest.mark.parametrize("name", ["lora", "prefix kv", "prompt"])
def test_words_are_those_of_the_cpu(name):
    cpu, there = both(lambda: adapted(name))
    tokens, mask = batch()
    options = {"padding_mask": mask.flip(1)}
    expected = cpu.generate(tokens, 8, **options)
    for use_cache in (True, False):
        got = there.generate(tokens.to(DEVICE), 8, padding_mask=mask.flip(1).to(DEVICE), use_cache=use_cache)
        assert torch.equal(got.cpu(), expected)
    options |= {"stop": expected[:, -5:-2].flatten().tolist()}
    stopped = there.generate(tokens.to(DEVICE), 8, **options | {"padding_mask": mask.flip(1).to(DEVICE)})
    assert torch.equal(stopped.cpu(), cpu.generate(tokens, 8, **options))
    drawn = [there.generate(tokens.to(DEVICE), 8, temperature=1.0, top_k=5, top_p=0.9, seed=3) for _ in range(2)]
    assert torch.equal(*drawn)


def test_pictures_and_the_asked_position_are_those_of_the_cpu():
    cpu, there = both(base)
    tokens, mask = batch()
    asked = mask.sum(dim=1) - 1
    same(
        there.hidden(tokens.to(DEVICE), mask.to(DEVICE), asked=asked.to(DEVICE)), cpu.hidden(tokens, mask, asked=asked)
    )
    with recorded(there) as weights:
        there(tokens.to(DEVICE), mask.to(DEVICE))
    for got, expected in zip(weights, cpu.attention_weights(tokens, mask), strict=True):
        same(got, expected)


@pytest.mark.parametrize(
    "objective, checkpointing", [(answer_loss, False), (next_token_loss, True), (label_loss, False)]
)
def test_three_steps_and_a_resumed_run_end_as_on_the_cpu(monkeypatch, tmp_path, objective, checkpointing):
    def build():
        model = base(gradient_checkpointing=checkpointing)
        if objective is label_loss:
            model = SequenceClassifier(model, 3)
        return train_a_little(peft.attach(model, peft.LoRA(rank=2)))

    cpu, there = both(build)
    killed = copy.deepcopy(there)
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "objective": objective, "progress": False}
    fit(cpu, data(), **settings)
    fit(there, moved(data()), **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "training_step", killed_at_step_2)
        fit(killed, moved(data()), **settings, checkpoint=tmp_path / "run", every=1)
    fit(killed, moved(data()), **settings, checkpoint=tmp_path / "run", every=1)
    for name, p in peft.trainable_parameters(cpu).items():
        for model in (there, killed):
            same(peft.trainable_parameters(model)[name], p)
    assert evaluate(there, moved(data(1)), objective) == pytest.approx(evaluate(cpu, data(1), objective), abs=1e-3)


def killed_at_step_2(*arguments):
    if arguments[6] == 2:
        raise KeyboardInterrupt
    return STEP(*arguments)


def test_rows_of_many_tasks_are_those_of_the_cpu():
    sources = {name: adapted(name) for name in ("lora", "prefix kv", "houlsby")}
    tokens, mask = batch()
    tasks = ["prefix kv", None, "lora"]
    expected = peft.TaskBank(base(), sources)(tokens, mask, tasks=tasks)
    bank = peft.TaskBank(base(), sources).to(DEVICE)
    same(bank(tokens.to(DEVICE), mask.to(DEVICE), tasks=tasks), expected)
    bank = peft.TaskBank(base().to(DEVICE), sources)
    same(bank(tokens.to(DEVICE), mask.to(DEVICE), tasks=tasks), expected)
    bank = peft.TaskBank(base().to(DEVICE), {name: model.to(DEVICE) for name, model in sources.items()})
    same(bank(tokens.to(DEVICE), mask.to(DEVICE), tasks=tasks), expected)


@pytest.mark.parametrize("name", EACH)
def test_a_file_goes_from_one_device_to_the_other(tmp_path, name):
    cpu, there = both(lambda: adapted(name))
    tokens, mask = batch()
    peft.save(there, tmp_path / "there.safetensors")
    peft.save(cpu, tmp_path / "cpu.safetensors")
    back, onto = base(), base().to(DEVICE)
    peft.load(back, tmp_path / "there.safetensors")
    peft.load(onto, tmp_path / "cpu.safetensors")
    assert torch.equal(back(tokens, mask), cpu(tokens, mask))
    same(onto(tokens.to(DEVICE), mask.to(DEVICE))[mask.to(DEVICE)], cpu(tokens, mask)[mask])


def test_the_device_has_the_same_fresh_weights_and_its_random_state_is_left_alone():
    if DEVICE.type != "cpu":
        random_state = getattr(torch, DEVICE.type).get_rng_state
        torch.rand(1, device=DEVICE)  # or there is no state yet
    else:
        random_state = torch.get_rng_state
    before = random_state().clone()
    with DEVICE:
        model = Transformer(CONFIG)
    classifier = SequenceClassifier(model, 3)
    peft.attach(classifier, peft.LoRA(rank=2), train_also=("head",))
    model.generate(torch.ones(1, 3, dtype=torch.long, device=DEVICE), 3, temperature=1.0)
    fit(classifier, moved(data()), steps=1, objective=label_loss, progress=False)
    assert torch.equal(random_state(), before)
    assert {p.device.type for p in classifier.parameters()} == {DEVICE.type}
    for got, expected in zip(
        peft.detach(classifier).transformer.parameters(), Transformer(CONFIG).parameters(), strict=True
    ):
        assert torch.equal(got.cpu(), expected)
