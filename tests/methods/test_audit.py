"""The audit raises on each defect it is for, and puts every bit back."""

import pytest
import torch
from reference.method_cases import RECIPES, assert_same, fingerprint, loss_of, outputs

import peft
from peft import AuditError
from peft.method import switched_off


def audited(model, message, loss=loss_of, error=AuditError):
    before, state = fingerprint(model), torch.get_rng_state()
    with pytest.raises(error, match=message):
        peft.gradient_audit(model, loss)
    assert_same(before, fingerprint(model))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_it_notices_a_layer_norm_left_trainable(tiny):
    model = peft.attach(tiny(), RECIPES["lora"])
    model.blocks[1].norm_feedforward.weight.requires_grad_(True)
    audited(model, r"blocks\.1\.norm_feedforward\.weight is trained, but no attached method declares it")


@pytest.mark.parametrize("name", ["lora", "houlsby", "prefix kv", "prefix hidden"])
def test_it_notices_a_layer_that_is_cut_off(tiny, name):
    model = peft.attach(tiny(), RECIPES[name])
    wrapper = model.blocks[1].attention
    wrapper.forward = lambda x, *rest, forward=wrapper.forward: forward(x, *rest).detach()
    audited(model, r"blocks\.\d\.\S+ should learn, but got no gradient")


def test_it_notices_a_declared_tensor_that_was_frozen_by_accident(tiny):
    model = peft.attach(tiny(), RECIPES["houlsby"])
    before = set(peft.trainable_parameters(model))
    model.blocks[0].attention.up_bias.requires_grad_(False)
    audited(model, r"blocks\.0\.attention\.up_bias")
    assert len(before) == len(peft.trainable_parameters(model)) + 1


@pytest.mark.parametrize("when", ["in training", "under no_grad only"])
@pytest.mark.parametrize("name", ["prefix hidden", "prefix mlp"])
def test_it_notices_a_prefix_that_is_computed_once_and_kept(tiny, name, when):
    """litgpt #1287: fine in the first step, no gradient (or a crash) after the first evaluation pass."""
    model = peft.attach(tiny(), RECIPES[name])
    for block in model.blocks:
        kept = []

        def prefix(compute=block.attention.prefix, kept=kept):
            if kept:
                return kept[0]
            made = compute()
            if when == "in training" or not torch.is_grad_enabled():
                kept.append(made)
            return made

        block.attention.prefix = prefix
    audited(model, "should learn, but got no gradient|computed once")


def test_it_notices_a_disabled_method(tiny):
    model = peft.attach(tiny(), RECIPES["houlsby"])
    peft.attach(model, RECIPES["lora"])
    with switched_off(*(block.attention for block in model.blocks)):
        audited(model, r"attention\.down_weight should learn")


def test_it_notices_a_loss_that_is_not_a_number(tiny):
    model = peft.attach(tiny(), RECIPES["lora"])
    audited(model, "NaN|not finite", loss=lambda m: loss_of(m) * float("nan"))


def test_an_exception_in_the_loss_leaves_the_model_as_it_was(tiny):
    model = peft.attach(tiny(), RECIPES["lora"])
    calls = []

    def loss(m):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("data ran out")
        return loss_of(m)

    audited(model, "data ran out", loss=loss, error=KeyError)


def test_buffers_that_the_loss_moves_are_put_back(tiny):
    model = peft.attach(tiny(), RECIPES["lora"])
    model.register_buffer("calls", torch.zeros(1))

    def loss(m):
        m.calls += 1
        return loss_of(m)

    peft.gradient_audit(model, loss)
    assert model.calls.item() == 0


def test_modes_and_buffers_that_the_loss_replaces_are_put_back(decoder):
    model = peft.attach(decoder().train(), RECIPES["lora"])
    model.register_buffer("calls", torch.zeros(1))
    before = fingerprint(model)

    def loss(m):
        m.eval().calls = m.calls + 1
        return loss_of(m)

    kept = model.calls
    peft.gradient_audit(model, loss)
    assert model.calls is kept and kept.item() == 0 and all(module.training for module in model.modules())
    assert_same(before, fingerprint(model))


def test_full_fine_tuning_can_be_audited(decoder):
    table = peft.gradient_audit(decoder(), loss_of)
    assert all(row.requires_grad and row.moved > 0 for row in table.rows)
    assert {row.layer for row in table.rows} == {None, 0, 1}


def test_fewer_than_three_steps_and_nothing_to_train_are_refused(decoder):
    with pytest.raises(ValueError, match="three are needed"):
        peft.gradient_audit(peft.attach(decoder(), RECIPES["lora"]), loss_of, steps=2)
    with pytest.raises(ValueError, match="nothing to train"):
        peft.gradient_audit(decoder().requires_grad_(False), loss_of)


def test_the_audit_works_in_training_mode_with_dropout(tiny):
    model = peft.attach(tiny(dropout=0.2).train(), peft.LoRA(rank=2, dropout=0.3))
    peft.gradient_audit(model, loss_of)
    assert model.training and torch.equal(outputs(model.eval()), outputs(tiny()))


def test_the_norms_are_those_of_the_last_step_alone(decoder):
    """The oracle: the same three AdamW steps by hand."""
    model, twin = (peft.attach(decoder(), RECIPES["lora"]) for _ in range(2))
    table = peft.gradient_audit(model, loss_of, learning_rate=1e-2)
    start, optimizer = peft.state_dict(twin), torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(twin).backward()
        optimizer.step()
    learning = {row.tensor: row for row in table.rows if row.requires_grad}
    assert learning.keys() == peft.trainable_parameters(twin).keys()
    for name, p in peft.trainable_parameters(twin).items():
        assert learning[name].gradient_norm == pytest.approx(p.grad.norm().item(), rel=1e-5)
        assert learning[name].moved == pytest.approx((p.detach() - start[name]).abs().max().item(), rel=1e-5)
        assert learning[name].layer == int(name.split(".")[1])


def test_the_table_as_it_is_printed(decoder):
    table = peft.gradient_audit(peft.attach(decoder(n_layers=1), RECIPES["houlsby"]), loss_of)
    *rows, last = str(table).splitlines()
    learning = [row for row in table.rows if row.requires_grad]
    assert len(rows) == 1 + len(learning) and rows[0].split() == ["tensor", "gradient", "norm", "moved", "by"]
    for line, row in zip(rows[1:], learning, strict=True):
        assert line.split() == [row.tensor, f"{row.gradient_norm:.2e}", f"{row.moved:.1e}"]
    assert last == f"{len(table.rows) - len(learning)} other tensors: 0 got a gradient, 0 moved"


def test_a_frozen_tensor_that_moves_is_named_with_how_far(decoder):
    model = peft.attach(decoder(), RECIPES["lora"])

    def loss(m):
        with torch.no_grad():
            m.blocks[1].norm_feedforward.bias.add_(0.5)
        return loss_of(m)

    message = r"^blocks\.1\.norm_feedforward\.bias is frozen, but got a gradient or moved by 3\.0e\+00$"
    audited(model, message, loss=loss)


def test_a_frozen_tensor_that_gets_a_gradient_is_named(decoder):
    model = peft.attach(decoder(), RECIPES["lora"])
    weight = model.blocks[0].attention.output.weight

    def loss(m):
        if torch.is_grad_enabled():
            weight.grad = torch.zeros_like(weight)
        return loss_of(m)

    audited(model, r"^blocks\.0\.attention\.output\.weight is frozen, but got a gradient", loss=loss)


@pytest.mark.parametrize("n_layers", [2, 3, 4])
def test_five_problems_are_named_and_the_others_counted(decoder, n_layers):
    model = peft.attach(decoder(n_layers=n_layers), peft.LoRA(rank=2, targets=("query",)))
    with pytest.raises(AuditError) as raised:
        peft.gradient_audit(model, lambda m: 0.0 * loss_of(m))
    message = str(raised.value)
    assert message.count("should learn") == min(5, 2 * n_layers)
    hidden = max(0, 2 * n_layers - 5)
    assert message.endswith(f" (and {hidden} more)") if hidden else "more)" not in message


def test_gradients_of_the_callers_are_put_back(decoder):
    model = peft.attach(decoder(), RECIPES["lora"])
    loss_of(model).backward()
    before = {name: p.grad for name, p in peft.trainable_parameters(model).items()}
    values = {name: grad.clone() for name, grad in before.items()}
    peft.gradient_audit(model, loss_of)
    for name, p in peft.trainable_parameters(model).items():
        assert p.grad is before[name] and torch.equal(p.grad, values[name])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_at_which_nothing_moves_is_refused(decoder, rate):
    with pytest.raises(ValueError, match="choose a rate above 0"):
        peft.gradient_audit(peft.attach(decoder(), RECIPES["lora"]), loss_of, learning_rate=rate)
