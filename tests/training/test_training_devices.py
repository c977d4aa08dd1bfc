"""Training on an accelerator where there is one, else on the CPU: random state, runs that go on, nccl."""

import pytest
import torch
import torch.distributed as dist

import peft
from minitransformer import SequenceClassifier, Transformer, TransformerConfig
from minitransformer.randomness import generator_of
from minitransformer.tasks.dataset import Dataset
from minitransformer.training import answer_loss, evaluate, fit
from minitransformer.training import distributed as sharing

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "mps" if torch.backends.mps.is_available() else "cpu")
CONFIG = TransformerConfig(vocab_size=23, max_len=12, d_model=16, n_heads=2, n_layers=2, d_ff=24, dropout=0.2)
OPTIONS = {"steps": 6, "batch_size": 8, "progress": False}


def data(device):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(23, (20, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(2, 7, (20, 1), generator=generator)
    return Dataset(tokens.to(device), mask.to(device), tokens[:, 0].to(device))


def model(device):
    return peft.attach(Transformer(CONFIG, seed=5), peft.LoRA(rank=2, dropout=0.3), seed=6).to(device)


def trained(device, **options):
    own = model(device)
    history = fit(own, data(device), **(OPTIONS | options))
    return {name: p.detach().clone() for name, p in own.named_parameters()}, history.loss


def states():
    return [generator_of(device).get_state() for device in {torch.device("cpu"), DEVICE}]


def test_the_callers_random_state_is_left_alone_on_every_device():
    before = states()
    trained(DEVICE)
    own = model(DEVICE)
    peft.gradient_audit(own, lambda m: answer_loss(m, data(DEVICE)).loss)
    with DEVICE:  # PyTorch's layers then draw their first weights there
        SequenceClassifier(Transformer(CONFIG), n_classes=3)
    assert all(torch.equal(old, new) for old, new in zip(before, states(), strict=True))


def test_dropout_follows_from_the_seed_and_the_step():
    (weights, losses), (again, losses_again) = trained(DEVICE), trained(DEVICE)
    assert losses == losses_again and all(torch.equal(again[name], p) for name, p in weights.items())
    assert trained(DEVICE, seed=1)[1] != losses


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    import minitransformer.training.loop as training

    def stopped(*arguments, step=training.training_step):
        if arguments[6] == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    weights, losses = trained(DEVICE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "training_step", stopped)
        trained(DEVICE, checkpoint=tmp_path / "run", every=2)
    again, losses_again = trained(DEVICE, checkpoint=tmp_path / "run", every=2)
    assert losses == losses_again and all(torch.equal(again[name], p) for name, p in weights.items())


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an accelerator")
def test_a_file_of_the_cpu_serves_the_cpu_and_is_refused_elsewhere(tmp_path):
    weights, _ = trained("cpu", checkpoint=tmp_path / "run")
    again, _ = trained("cpu", checkpoint=tmp_path / "run")
    assert all(torch.equal(again[name], p) for name, p in weights.items())
    own = model(DEVICE)
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    with pytest.raises(ValueError, match="another devices"):
        fit(own, data(DEVICE), checkpoint=tmp_path / "run", **OPTIONS)
    assert all(torch.equal(p, before[name]) for name, p in own.named_parameters())


@pytest.mark.skipif(not CUDA, reason="nccl needs CUDA")
def test_scores_are_summed_under_nccl(tmp_path, monkeypatch):
    expected = evaluate(model(DEVICE), data(DEVICE))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        monkeypatch.setattr(sharing, "n_processes", lambda: 2)  # one process that thinks it is not alone
        assert sharing.total(1.5, 2) == [1.5, 2.0]
        monkeypatch.undo()
        assert evaluate(model(DEVICE), data(DEVICE)) == expected
    finally:
        dist.destroy_process_group()
