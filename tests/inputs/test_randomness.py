import torch

from inputs.randomness import generator


def test_the_seed_and_the_name_make_the_numbers():
    first = torch.rand(4, generator=generator(0, "fit"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "fit")))
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "fit")))
    assert not torch.equal(first, torch.rand(4, generator=generator(0, "tune")))


def test_the_numbers_stay_the_same_between_versions():
    # printf 0/fit | sha256sum, the first 8 bytes as a little-endian number, halved
    assert generator(0, "fit").initial_seed() == 4507622448732994233


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    torch.rand(2, generator=generator(0, "fit"))
    assert torch.equal(torch.rand(2), expected)
