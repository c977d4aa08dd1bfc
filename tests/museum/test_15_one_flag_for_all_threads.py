"""Which task is active, written on the model, while two threads ask.

A server answers several requests at a time. If "the active adapter" is an attribute of the model, a thread that sets it
and then calls the model may get the answer of whatever another thread has set meanwhile. Nothing is raised; the
answer is a good answer to another question.

Found in: adapter-hub/adapters, issue 165 (https://github.com/adapter-hub/adapters/issues/165)

The lesson: what a call needs belongs to the call, or to its thread.
"""

from threading import Thread

import torch
from exhibit import batch, caught, small_model

import peft


def trained(seed):
    model = peft.attach(small_model(), peft.LoRA(rank=2), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in peft.trainable_parameters(model).values():
            tensor.normal_(generator=generator)
    return model


class OneFlag:
    """The wrong way: `active` stands on the object that all threads share."""

    def __init__(self, models):
        self.models, self.active = models, None

    def ask(self, tokens, task, meanwhile):
        self.active = task
        meanwhile()
        return self.models[self.active](tokens)


class Bank:
    """Ours: the rows of a call are its own."""

    def __init__(self, models):
        self.bank = peft.TaskBank(small_model(), models)

    def ask(self, tokens, task, meanwhile):
        with self.bank.using([task] * len(tokens)) as model:
            meanwhile()
            return model(tokens)


def check_each_thread_gets_its_own_task(server):
    """The second thread asks just when the first one has said which task it wants."""
    models = {"a": trained(1), "b": trained(2)}
    asked, tokens = server(models), batch()[0]

    def another_thread():
        thread = Thread(target=asked.ask, args=(tokens, "b", lambda: None))
        thread.start()
        thread.join()

    with torch.no_grad():
        answer, expected = asked.ask(tokens, "a", another_thread), models["a"](tokens)
    assert torch.allclose(answer, expected, atol=1e-5), "the answer is another task's"


def test_two_threads():
    caught(check_each_thread_gets_its_own_task, OneFlag)
    check_each_thread_gets_its_own_task(Bank)
