import pytest
import torch

from minitransformer.tasks.dataset import Dataset
from minitransformer.tasks.real.batches import batches_of_like_length
from peft.experiments.tasks import EPOCH, TASKS

N = 70


@pytest.fixture
def dataset():
    """Row i starts with token i and has a length of its own; target i."""
    lengths = torch.randint(1, 20, (N,), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20)[None] < lengths[:, None]
    return Dataset(torch.arange(N)[:, None] * mask, mask, torch.arange(N))


def test_an_epoch_walks_the_rows_once_and_the_next_one_differently(dataset):
    batch_at = batches_of_like_length(dataset, batch_size=8, seed=3)
    epochs = [[batch_at(8 * epoch + step).targets.tolist() for step in range(8)] for epoch in range(2)]
    for batches in epochs:
        rows = [row for batch in batches for row in batch]
        assert len(rows) == len(set(rows)) == 64
    assert epochs[0] != epochs[1]


def test_rows_stay_whole(dataset):
    batch = batches_of_like_length(dataset, batch_size=8)(0)
    rows = dataset.rows(batch.targets)
    assert torch.equal(batch.tokens, rows.tokens[:, : batch.tokens.shape[1]])
    assert torch.equal(batch.padding_mask.sum(dim=1), rows.padding_mask.sum(dim=1))


def test_there_is_less_padding_than_in_random_batches(dataset):
    batch_at = batches_of_like_length(dataset, batch_size=8)
    sorted_size = sum(batch_at(step).tokens.numel() for step in range(8))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:64].split(8)
    random_size = sum(dataset.rows(rows).trimmed().tokens.numel() for rows in order)
    assert sorted_size < 0.75 * random_size


def test_the_seed_decides_and_a_step_can_be_asked_for_again(dataset):
    first, same, other = (batches_of_like_length(dataset, 8, seed) for seed in (0, 0, 1))
    late = first(20).targets
    assert torch.equal(first(20).targets, same(20).targets)
    first(0)
    assert torch.equal(late, first(20).targets)
    assert not torch.equal(first(0).targets, other(0).targets)


@pytest.mark.parametrize("options", [{"batch_size": 71}, {"window": 0}])
def test_too_few_rows_or_no_window_is_refused(dataset, options):
    with pytest.raises(ValueError, match="give at least one batch of rows and a window of at least 1"):
        batches_of_like_length(dataset, **options)


def test_the_comparison_knows_how_many_batches_each_of_its_tasks_has(task, reuters, quiz):
    whole = {own.name: len(own.train) // TASKS[own.name].batch_size for own in (task, reuters, quiz)}
    assert whole == EPOCH
