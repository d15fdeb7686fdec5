"""GlobalStudent: its predictions of whole maps, and its errors on images that it has not seen."""

import torch

from student_teacher.students import GlobalStudent as module
from student_teacher.students.GlobalStudent import GlobalStudent, left_out_weights

SHAPE = 3, 4, 5  # components, rows, columns


def mixtures(number, seed, patterns=3, noise=0.05):
    """Maps (number,3,4,5): random mixtures of a few fixed patterns, and noise."""
    fixed = torch.randn(patterns, *SHAPE, generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(number, patterns, generator=random)
    mixed = torch.einsum("np,pchw->nchw", weights, fixed)
    return mixed + noise * torch.randn(number, *SHAPE, generator=random) + 2


def ridge_errors(learned, tested, penalty):
    """Squared errors (m,h,w) of a mean and a ridge regression fitted to `learned` alone, in float64, by definition."""
    mean = learned.double().mean(0)
    x = (learned.double() - mean).flatten(1)
    y = (tested.double() - mean).flatten(1)
    weights = y @ x.T @ torch.linalg.inv(x @ x.T + penalty * torch.eye(len(x), dtype=torch.float64))
    return (y - weights @ x).view(-1, *SHAPE).square().sum(1)


def penalty_of(maps):
    centred = (maps - maps.mean(0)).flatten(1).double()
    return module.PENALTY * centred.square().sum(1).mean()


def test_left_out_errors_are_those_of_fits_to_the_others():
    maps = mixtures(12, seed=1)
    _, errors = GlobalStudent.fit(maps)
    penalty = penalty_of(maps)
    for index in range(12):
        others = torch.cat([maps[:index], maps[index + 1 :]])
        torch.testing.assert_close(
            errors[index].double(), ridge_errors(others, maps[index : index + 1], penalty)[0], rtol=1e-3, atol=1e-6
        )


def test_look_alikes_are_left_out_together():
    maps = mixtures(12, seed=1)
    maps[7] = maps[3] + 1e-3
    groups = [[3, 7], *[[index] for index in range(12) if index not in (3, 7)]]
    _, errors = GlobalStudent.fit(maps, groups)
    others = maps[[index for index in range(12) if index not in (3, 7)]]
    expected = ridge_errors(others, maps[[3, 7]], penalty_of(maps))
    torch.testing.assert_close(errors[[3, 7]].double(), expected, rtol=1e-3, atol=1e-6)
    _, alone = GlobalStudent.fit(maps)
    assert alone[3].sum() < 0.7 * errors[3].sum()


def test_new_images_are_predicted_as_by_ridge_regression():
    maps, new = mixtures(12, seed=1, noise=0.5), mixtures(5, seed=2, noise=0.5)
    student, _ = GlobalStudent.fit(maps)
    expected = ridge_errors(maps, new, penalty_of(maps))
    torch.testing.assert_close(student(new).double(), expected, rtol=0.05, atol=0.01 * expected.mean().item())


def test_new_good_images_are_predicted_and_others_are_not():
    student, errors = GlobalStudent.fit(mixtures(40, seed=1))
    assert student.explained > 0.9
    new = mixtures(5, seed=2)
    damaged = new.clone()
    damaged[:, :, 1, 2] += 3
    assert student(new).mean() < 2 * errors.mean()
    assert (student(damaged).flatten(1).argmax(1) == 1 * SHAPE[2] + 2).all()


def test_noise_is_not_explained():
    student, _ = GlobalStudent.fit(torch.randn(30, 3, 40, 50, generator=torch.Generator().manual_seed(3)))
    assert student.explained < 0.1


def test_two_images_and_equal_images_are_enough():
    for maps in (mixtures(2, seed=1), torch.ones(4, *SHAPE)):
        student, errors = GlobalStudent.fit(maps)
        assert errors.isfinite().all() and student(maps).isfinite().all()
        assert 0 <= student.explained <= 1


def test_left_out_errors_include_the_loss_of_truncation(monkeypatch):
    maps = mixtures(40, seed=1, patterns=12, noise=1.0)
    monkeypatch.setattr(module, "components_of", lambda number: 6)
    _, errors = GlobalStudent.fit(maps)
    expected = []
    for index in range(40):
        student, _ = GlobalStudent.fit(torch.cat([maps[:index], maps[index + 1 :]]))
        expected.append(student(maps[index : index + 1]).mean())
    assert abs(errors.mean() / torch.stack(expected).mean() - 1) < 0.2


def test_a_student_survives_its_checkpoint():
    maps = mixtures(12, seed=1)
    student, _ = GlobalStudent.fit(maps)
    restored = GlobalStudent.of_checkpoint(student.to_checkpoint())
    torch.testing.assert_close(restored(maps), student(maps), rtol=0.02, atol=1e-3)
    assert restored.explained == student.explained


def test_left_out_weights_need_no_particular_order():
    centred = mixtures(8, seed=1).flatten(1).double()
    centred -= centred.mean(0)
    gram = centred @ centred.T
    groups = [[0, 5], [1], [2, 3, 7], [4], [6]]
    found = left_out_weights(gram, torch.tensor(0.5), groups)
    again = left_out_weights(gram, torch.tensor(0.5), [group[::-1] for group in reversed(groups)])
    torch.testing.assert_close(found, again)


def test_a_state_dict_holds_all_that_predictions_depend_on():
    first, second = (GlobalStudent.fit(mixtures(12, seed))[0] for seed in (0, 1))
    first.load_state_dict(second.state_dict())
    maps = mixtures(3, 2)
    assert torch.equal(first(maps), second(maps))
