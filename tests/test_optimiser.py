import pytest
import torch
from torch import nn

from student_teacher.training.optimiser import ADAM_FRACTION, MUON_WEIGHT_DECAY, Optimiser, orthogonal


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 16, 3), nn.LeakyReLU(), nn.Conv2d(16, 4, 1))


def learn(network, optimiser, steps, first=0):
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        optimiser.zero_grad()
        network(torch.randn(4, 3, 8, 8, generator=random)).square().mean().backward()
        optimiser.step(1 / (step + 1))


def test_kernels_move_as_torch_s_muon_moves_matrices():
    network = net()
    before = {name: value.clone() for name, value in network.named_parameters()}
    learn(network, Optimiser([network], "muon", 0.1), 1)
    for number in (2, 4):
        kernel = network[number].weight
        matrix = nn.Parameter(before[f"{number}.weight"].detach().clone().flatten(1))
        matrix.grad = kernel.grad.flatten(1)
        torch.optim.Muon([matrix], 0.1, weight_decay=MUON_WEIGHT_DECAY).step()
        moved, expected = (after.flatten(1) - before[f"{number}.weight"].flatten(1) for after in (kernel, matrix))
        assert (moved - expected).norm() < 0.05 * expected.norm()  # torch's rounds to bfloat16


def test_an_orthogonal_matrix_has_the_same_directions():
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    for shape in (matrix, matrix.T):
        left, _, right = torch.linalg.svd(shape, full_matrices=False)
        turned = left.T @ orthogonal(shape) @ right.T
        torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-5)
        assert turned.diagonal().min() > 0.6 and turned.diagonal().max() < 1.3


def test_the_first_layer_and_biases_are_adam_s():
    network = net()
    before = {name: value.clone() for name, value in network.named_parameters()}
    learn(network, Optimiser([network], "muon", 0.1), 1)
    for name in ("0.weight", "0.bias", "2.bias"):
        step = (network.get_parameter(name) - before[name]).abs()
        assert step.max().item() == pytest.approx(0.1 * ADAM_FRACTION, rel=1e-2), name  # Adam's first step is its rate


def test_adam_is_the_paper_s():
    ours, theirs = net(), net()
    learn(ours, Optimiser([ours], "adam", 0.01), 1)
    adam = torch.optim.Adam(theirs.parameters(), 0.01, weight_decay=1e-5)
    theirs(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    adam.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("kind", ("muon", "adam"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_it_resumes_to_the_same_weights(kind, layout):
    whole, halves = net().to(memory_format=layout), net().to(memory_format=layout)
    learn(whole, Optimiser([whole], kind, 0.1), 4)
    first = Optimiser([halves], kind, 0.1)
    learn(halves, first, 2)
    second = Optimiser([halves], kind, 0.1)
    second.load_state_dict(first.state_dict())
    learn(halves, second, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


def test_another_optimiser_is_refused():
    with pytest.raises(ValueError, match="sgd"):
        Optimiser([net()], "sgd", 0.1)
