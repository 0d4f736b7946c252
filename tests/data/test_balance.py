"""Class weights against scikit-learn's, and what torch's own weighted loss does to ranks.

python -m pytest tests/data/test_balance.py
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from nanofinetune.data.balance import WeighedLoss, balanced, weighted_loss


@pytest.mark.parametrize("counts", [(3, 1), (50, 7, 1), (5, 5, 5), (2, 0, 9)])
def test_balanced_weights_match_sklearn(counts):
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = np.repeat(np.arange(len(counts)), counts)
    present = np.unique(labels)
    expected = sklearn.compute_class_weight("balanced", classes=present, y=labels)
    mine = balanced(labels, len(counts))
    torch.testing.assert_close(mine[present], torch.tensor(expected, dtype=torch.float32))
    assert mine[[k for k, count in enumerate(counts) if not count]].tolist() == [1.0] * counts.count(0)
    assert mine[labels].mean().item() == pytest.approx(1.0)


def test_weighted_ranks_equal_one_process():
    """Means of two ranks, weighted by their rows, are the mean of one process; torch's weighted means are not."""
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(8, 2), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), torch.tensor([0.5, 3.0])
    whole = weighted_loss(logits, labels, weights)
    parts = [slice(0, 5), slice(5, 8)]
    ours = sum(weighted_loss(logits[part], labels[part], weights) * len(labels[part]) for part in parts) / 8
    torch.testing.assert_close(ours, whole)
    theirs = sum(cross_entropy(logits[part], labels[part], weights) * len(labels[part]) for part in parts) / 8
    assert abs(theirs - cross_entropy(logits, labels, weights)) > 0.1


def test_weights_of_one_are_the_models_own_loss():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])
    torch.testing.assert_close(weighted_loss(logits, labels, torch.ones(3)), cross_entropy(logits, labels))
    assert weighted_loss(logits[:1], torch.tensor([-100]), torch.ones(3)).isnan()


def test_the_hook_weighs_a_models_loss_and_its_gradients():
    from conftest import tiny_bert

    model = tiny_bert(dropout=0.0)
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    logits = model(**batch).logits
    expected = (cross_entropy(logits, batch["labels"], reduction="none") * torch.tensor([2.0, 0.5])).mean()
    (wanted,) = torch.autograd.grad(expected, model.classifier.weight)
    model.register_forward_hook(WeighedLoss(torch.tensor([2.0, 0.5])), with_kwargs=True)
    output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model.classifier.weight.grad, wanted)
    assert model(input_ids=batch["input_ids"]).loss is None
