import pytest
import torch

from student_teacher.training import losses


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_knowledge_distillation_is_one_for_the_mean_of_normalised_features():
    features = random(4000, 6)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    assert losses.knowledge_distillation(torch.zeros_like(features), features).item() == pytest.approx(1)
    assert losses.knowledge_distillation(features, features) == 0


def test_metric_learning_equals_its_definition_triplet_by_triplet():
    anchors, positives = random(5, 3), random(5, 3, seed=1)

    def distance(a, b):
        return ((a - b) ** 2).mean().item()

    total = 0
    for i in range(5):
        others = [k for k in range(5) if k != i]
        negative = min(
            min(distance(anchors[i], anchors[k]) for k in others),
            min(distance(positives[i], anchors[k]) for k in others),
        )
        total += max(0, 1.5 + distance(anchors[i], positives[i]) - negative)
    assert losses.metric_learning(anchors, positives, margin=1.5).item() == pytest.approx(total / 5)


def test_metric_learning_is_zero_once_the_negatives_are_far():
    anchors = torch.eye(4) * 100
    assert losses.metric_learning(anchors, anchors + 0.01) == 0
    with pytest.raises(ValueError, match="two patches"):
        losses.metric_learning(anchors[:1], anchors[:1])


def test_compactness_is_the_correlation_between_dimensions_not_between_patches():
    descriptors = random(50, 4)
    expected = torch.corrcoef(descriptors.T).abs()
    expected = (expected.sum() - 4) / 12
    assert losses.compactness(descriptors).item() == pytest.approx(expected.item())
    # The same column twice, with another scale and sign, has correlation 1; equal patches don't matter.
    column = random(50, 1)
    assert losses.compactness(torch.cat([column, 3 - 2 * column], 1)).item() == pytest.approx(1)
    independent = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert losses.compactness(torch.cat([independent, independent])).item() == pytest.approx(0)
    with pytest.raises(ValueError, match="two descriptors"):
        losses.compactness(descriptors[:1])


def test_compactness_of_a_dimension_that_never_varies_is_finite():
    descriptors = torch.cat([random(10, 2), torch.ones(10, 1, dtype=torch.float64)], 1).requires_grad_()
    losses.compactness(descriptors).backward()
    assert descriptors.grad.isfinite().all()


def test_literal_distances_are_sums():
    a, b, maps, others = random(6, 5), random(6, 5, seed=1), random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = ((a - b) ** 2).sum(1).mean().item()
    assert losses.knowledge_distillation(a, b, literal=True).item() == pytest.approx(expected)
    expected = ((maps - others) ** 2).sum(1).mean().item()
    assert losses.regression(maps, others, literal=True).item() == pytest.approx(expected)


def test_a_literal_triplet_has_one_negative_with_anchor_swap():
    anchors, positives = random(4, 3), random(4, 3, seed=1)
    total = 0
    for i in range(4):
        negative = anchors[i - 1]
        near = min(((anchors[i] - negative) ** 2).sum().item(), ((positives[i] - negative) ** 2).sum().item())
        total += max(0, 1 + ((anchors[i] - positives[i]) ** 2).sum().item() - near)
    assert losses.metric_learning(anchors, positives, literal=True).item() == pytest.approx(total / 4)


def test_literal_compactness_is_the_sum_of_correlations():
    descriptors = random(50, 4)
    expected = torch.corrcoef(descriptors.T).sum() - 4
    assert losses.compactness(descriptors, literal=True).item() == pytest.approx(expected.item())


def test_regression_is_the_mean_square():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    assert losses.regression(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())
