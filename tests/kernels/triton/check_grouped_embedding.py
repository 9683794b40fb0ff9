import pytest
import torch

from kernels import reference
from kernels.triton_ops.grouped_embedding import grouped_embedding
from tests.kernels.triton.agreement import assert_agree, operand


@pytest.mark.parametrize("shape", [(), (1,), (2, 5), (0,)])
@pytest.mark.parametrize("models", [(1, 3), (3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_equals_the_loop(shape, models, padding):
    ids = torch.randint(0, 11, (models[0], *shape))
    assert_agree(
        *(
            lambda ids, weight, function=function: function(ids, weight, padding)
            for function in (grouped_embedding, reference.grouped_embedding)
        ),
        ids,
        operand(models[1], 11, 7, strided=True),
    )


def test_narrow_ids():
    ids, weight = torch.randint(0, 11, (3, 4)), operand(3, 11, 7)
    assert torch.equal(grouped_embedding(ids.int(), weight), grouped_embedding(ids, weight))


def test_an_id_outside_of_the_table_shows():
    found = grouped_embedding(torch.tensor([[0, 4, -1]]), operand(2, 4, 3))
    assert found.isnan().any(2).tolist() == [[False, True, True]] * 2
