import pytest
import torch

from kernels import grouped_embedding, reference
from kernels.errors import KernelError
from tests.kernels.grouped import assert_agree, operand, unchecked  # noqa: F401


@pytest.mark.parametrize("shared", [(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("rows", [(), (1,), (4, 6), (0,)])
@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_the_loop_whatever_is_shared(shared, rows, padding_idx, dtype):
    ids = torch.randint(5, (1 if shared[0] else 3, *rows), dtype=dtype)
    functions = (
        lambda weight, function=function: function(ids, weight, padding_idx)
        for function in (grouped_embedding, reference.grouped_embedding)
    )
    assert_agree(*functions, operand(3, 5, 7, shared=shared[1], strided=True))


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("padding_idx", [1, -2])
def test_the_padding_row_has_no_gradient(models, padding_idx):
    ids = torch.arange(3).expand(models, 3)
    weight = operand(3, 3, 2).requires_grad_()
    grouped_embedding(ids, weight, padding_idx).sum().backward()
    assert torch.equal(weight.grad[:, 1], torch.zeros(3, 2).double())
    assert torch.equal(weight.grad[:, [0, 2]], torch.ones(3, 2, 2).double())


@pytest.mark.parametrize("outside", [-1, 5, 9])
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("tables", [1, 3])
def test_an_id_outside_of_its_own_table(outside, models, tables):
    ids = torch.zeros(models, 4, dtype=torch.int64)
    ids[0, 2] = outside
    with pytest.raises(IndexError):
        grouped_embedding(ids, torch.zeros(tables, 5, 2))


@pytest.mark.usefixtures("unchecked")
def test_operands_that_do_not_fit():
    ids, weight = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 5, 2)
    with pytest.raises(KernelError, match=r"ids \[3, 4\], weight \[2, 5, 2\]; wanted a leading"):
        grouped_embedding(ids, weight[:2])
    with pytest.raises(KernelError, match=r"weight \[5, 2\]; wanted ids"):
        grouped_embedding(ids, weight[0])
    with pytest.raises(KernelError, match=r"ids torch.float32.*; wanted ids of int64"):
        grouped_embedding(ids.float(), weight)
    with pytest.raises(KernelError, match="padding_idx 5 among 5 entries"):
        grouped_embedding(ids, weight, 5)
