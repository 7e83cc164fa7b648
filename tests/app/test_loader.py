import random
from dataclasses import replace

import pytest
import timm
import torch
from timm.data import create_transform

from trady_triton.app.data import load_data
from trady_triton.app.loader import Batches, epoch_order, random_batches


@pytest.fixture
def make(npz):
    def batches(**options):
        net = timm.create_model("test_efficientnet", num_classes=3)
        return Batches.for_model(load_data(str(npz)), net, image_size=32, **{"batch_size": 5, **options})

    return batches


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("augment", [False, True])
def test_batches_depend_on_seed_and_epoch_alone(make, augment):
    first = list(make(augment=augment, seed=1).train(3))
    other = make(augment=augment, seed=1)
    list(other.train(2))
    torch.manual_seed(99)
    random.seed(99)
    assert same(first, other.train(3))
    assert not same(first, other.train(4))
    assert not same(first, make(augment=augment, seed=2).train(3))


def by_index(batches, epoch):
    images = torch.cat([inputs for inputs, _ in batches.train(epoch)])
    return dict(zip(epoch_order(24, batches.seed, epoch), images, strict=True))


def test_an_image_is_augmented_anew_in_every_epoch(make):
    batches = make(augment=True, batch_size=24)
    first, second = by_index(batches, 0), by_index(batches, 1)
    assert not any(torch.equal(first[i], second[i]) for i in range(24))


def test_without_augmentation_an_image_is_the_same_in_every_epoch(make):
    batches = make(batch_size=24)
    first, second = by_index(batches, 0), by_index(batches, 1)
    assert all(torch.equal(first[i], second[i]) for i in range(24))


def test_an_epoch_goes_on_where_it_was_left(make):
    batches = make(augment=True)
    assert same(list(batches.train(1))[2:], batches.train(1, first_step=2))


def test_workers_see_what_the_main_process_sees(make):
    assert same(make(augment=True).train(0), make(augment=True, workers=2).train(0))


def test_loading_leaves_the_random_state_alone(make):
    batches = make(augment=True)
    torch.manual_seed(5)
    random.seed(5)
    list(batches.train(0))
    after = torch.rand(1).item(), random.random()
    torch.manual_seed(5)
    random.seed(5)
    assert after == (torch.rand(1).item(), random.random())


def test_order_is_a_permutation_and_differs_between_epochs():
    orders = [epoch_order(50, 0, epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_an_epoch_shows_every_image_but_those_of_the_last_partial_batch(make):
    sizes = [len(labels) for _, labels in make().train(0)]
    assert sizes == [5, 5, 5, 5]
    assert make().train_steps == 4


def test_a_batch_larger_than_the_data_is_the_data(make):
    assert [len(labels) for _, labels in make(batch_size=100).train(0)] == [24]


def test_test_batches_are_what_timm_makes_of_the_images(make):
    batches = make()
    transform = create_transform(**batches.config, is_training=False)
    expected = torch.stack([transform(batches.data.test.open(i)) for i in range(8)])
    inputs, labels = (torch.cat(part) for part in zip(*batches.test(), strict=True))
    assert torch.allclose(inputs, expected, atol=1e-6)
    assert labels.tolist() == list(batches.data.test.labels)


def test_a_second_pass_decodes_nothing(make):
    batches = make()
    opened = []
    pictures = batches.data.train
    counting = replace(pictures, open=lambda i: opened.append(i) or pictures.open(i))
    batches = replace(batches, data=replace(batches.data, train=counting))
    first = list(batches.train(0))
    assert len(opened) == 20
    assert same(first, batches.train(0))
    assert len(opened) == 20


def test_drawings_are_shown_whole(npz):
    pytest.importorskip("sklearn")
    net = timm.create_model("test_efficientnet")
    batches = Batches.for_model(load_data("digits"), net, image_size=32, batch_size=2)
    assert batches.config["crop_pct"] == 1.0


def test_noise_batches_depend_on_the_seed_alone():
    first = list(random_batches(16, 4, batch_size=2, steps=3, seed=7))
    torch.manual_seed(1)
    assert same(first, random_batches(16, 4, batch_size=2, steps=3, seed=7))
    assert not same(first, random_batches(16, 4, batch_size=2, steps=3, seed=8))
