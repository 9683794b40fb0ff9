import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fleet.recipes import Recipe
from fleet.training.bucket import Bucket, cuts
from fleet.training.step import Kernel, parts_of
from fleet.training.trainee import Trainee
from tests.fleet.training.plain_loop import DATA, ConvNet, Mlp, same


@given(st.integers(1, 200), st.integers(1, 100))
def test_cuts_take_everyone_once_and_few_sizes(count: int, width: int):
    found = list(cuts(count, width))
    taken = [place for start, own, _ in found for place in range(start, start + own)]
    assert taken == list(range(count))
    for _, own, size in found:
        assert 1 <= own <= width
        assert own <= size <= max(width, 2)
        assert size < 2 * own + 2, "most of what is computed is thrown away"
    assert (width == 1) == all(size == 1 for _, _, size in found)


@given(st.integers(2, 500))
def test_cuts_have_few_sizes(width: int):
    sizes = {size for count in range(1, width + 1) for _, _, size in cuts(count, width)}
    assert len(sizes) <= 2 * width.bit_length()


def trainee(index: int, make=Mlp, **recipe) -> Trainee:
    torch.manual_seed(index)
    model = make()
    made = Trainee(
        index, f"m{index}", Recipe(**{"batch_size": 10, **recipe}), DATA, classes=3,
        dtype=torch.float32,
    )  # fmt: skip
    made.bind({n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())})
    return made


def bucket_of(make=Mlp, width: int = 4, frozen: tuple[str, ...] = ()) -> Bucket:
    model = make()
    names = [n for n, _ in model.named_parameters() if n not in frozen]
    return Bucket(Kernel(model, parts_of(model, names)), width)


def enter(bucket: Bucket, trainees: list[Trainee]) -> None:
    bucket.enter([(one, one.release()) for one in trainees])
    for one in trainees:
        one.begin(bucket.kernel.parts.trained)


def copies(trainees: list[Trainee]) -> list[dict]:
    return [{name: tensor.clone() for name, tensor in one.state.items()} for one in trainees]


@pytest.mark.parametrize("make", [Mlp, ConvNet])
def test_weights_stay_when_others_enter_and_leave(make):
    trainees = [trainee(index, make) for index in range(7)]
    before = copies(trainees)
    bucket = bucket_of(make)
    enter(bucket, trainees[3:5])
    enter(bucket, trainees[:3])
    enter(bucket, trainees[5:])
    assert [one.index for one in bucket.trainees] == list(range(7))
    for one, expected in zip(trainees, before, strict=True):
        assert same(one.state, expected)
    bucket.leave([trainees[1], trainees[6]])
    assert [one.index for one in bucket.trainees] == [0, 2, 3, 4, 5]
    for index in (0, 2, 3, 4, 5):
        assert same(trainees[index].state, before[index])
    assert trainees[1].state == {}


def test_what_a_trainee_changes_is_its_own_slot():
    trainees = [trainee(index) for index in range(3)]
    bucket = bucket_of()
    enter(bucket, trainees)
    before = copies(trainees)
    trainees[1].state["head.weight"].fill_(7)
    assert (bucket.stacked["head.weight"][1] == 7).all()
    assert same(trainees[0].state, before[0])
    assert same(trainees[2].state, before[2])


def test_those_that_move_keep_copies():
    trainees = [trainee(index) for index in range(3)]
    bucket = bucket_of()
    enter(bucket, trainees)
    before = copies(trainees)
    bucket.leave([trainees[0], trainees[2]], keep=[trainees[2]])
    stacked = {tensor.untyped_storage().data_ptr() for tensor in bucket.stacked.values()}
    for tensor in trainees[2].state.values():
        assert tensor.untyped_storage().data_ptr() not in stacked
    assert same(trainees[2].state, before[2])


def test_the_optimizers_state_moves_along():
    trainees = [trainee(index, lr=0.1) for index in range(3)]
    alone = trainee(1, lr=0.1)
    one, other = bucket_of(), bucket_of()
    enter(one, trainees)
    enter(other, [alone])

    def step(model: Trainee, seed: int) -> None:
        draws = torch.Generator().manual_seed(seed)
        model.update(
            {n: torch.randn(p.shape, generator=draws) for n, p in model.parameters.items()}
        )

    for seed in range(4):
        step(trainees[1], seed)
        step(alone, seed)
        if seed == 1:
            one.leave([trainees[0]])
        if seed == 2:
            enter(one, [trainee(0)])
    assert same(trainees[1].state, alone.state)


def test_frozen_tensors_are_shared_while_they_are_the_same():
    trainees = [trainee(index) for index in range(3)]
    for one in trainees:
        one.state["body.weight"] = trainees[0].state["body.weight"].clone()
    bucket = bucket_of(frozen=("body.weight", "body.bias"))
    enter(bucket, trainees)
    assert set(bucket.shared) == {"body.weight"}
    assert "body.bias" in bucket.stacked
    stranger = trainee(5)
    theirs = stranger.state["body.weight"].clone()
    ours = trainees[0].state["body.weight"].clone()
    enter(bucket, [stranger])
    assert not bucket.shared
    assert torch.equal(stranger.state["body.weight"], theirs)
    assert torch.equal(trainees[2].state["body.weight"], ours)
    bucket.leave([stranger])
    assert set(bucket.shared) == {"body.weight"}


def test_chunks_have_one_number_of_rows_and_every_trainee_once():
    trainees = [
        trainee(index, batch_size=size)
        for index, size in enumerate([10, 10, 20, 10, 20, 30, 10, 10, 10])
    ]
    bucket = bucket_of(width=4)
    enter(bucket, trainees)
    slots = len(bucket.stacked["head.weight"])
    seen = []
    for chunk in bucket.chunks():
        assert len({one.rows for one in chunk.trainees}) == 1
        assert chunk.slots.start >= 0
        assert chunk.slots.stop <= slots
        assert chunk.skipped + len(chunk.trainees) <= chunk.size
        for place, one in enumerate(chunk.trainees, chunk.slots.start + chunk.skipped):
            assert (
                one.state["head.weight"].data_ptr()
                == bucket.stacked["head.weight"][place].data_ptr()
            )
            seen.append(one.index)
        views = bucket.views(chunk.slots)
        assert all(len(tensor) == chunk.size for tensor in views.values())
    assert sorted(seen) == list(range(9))


def test_the_order_does_not_depend_on_who_came_first():
    sizes = [20, 10, 20, 10, 30]
    orders = []
    for arrivals in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        bucket = bucket_of()
        for index in arrivals:
            enter(bucket, [trainee(index, batch_size=sizes[index])])
        orders.append([one.index for one in bucket.trainees])
    assert orders[0] == orders[1] == [1, 3, 0, 2, 4]


def test_empty_again():
    one, bucket = trainee(0), bucket_of()
    enter(bucket, [one])
    bucket.leave([one])
    assert not bucket.trainees
    assert not bucket.stacked
    assert list(bucket.chunks()) == []
