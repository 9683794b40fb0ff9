"""That the tests find what has another type or shape than its annotation."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import jaxtyping
import pytest
import torch

CODE = """
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from fractions import Fraction


def plain(count: int, names: Sequence[str] = (), *rest: int, text: str = "") -> int:
    return count if count >= 0 else "negative"


def shaped(x: Float[Tensor, "rows in"], y: Float[Tensor, "in out"]) -> Float[Tensor, "rows out"]:
    return (x @ y).T


def sequence(xs: Sequence[Float[Tensor, " n"]]) -> None: ...


def unknown(fraction: Fraction, count: int) -> Fraction:
    return fraction


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


def outer(factor: int):
    def inner(count: int) -> int:
        return factor * count

    return inner


@dataclass(frozen=True)
class Plain:
    count: int

    @property
    def half(self) -> int:
        return self.count / 2

    @classmethod
    def of(cls, count: int) -> Plain:
        return cls(count)


@dataclass(frozen=True)
class Counted:
    # With the field of Plain: the code of `__init__` is the same.

    count: str


@dataclass
class Shaped:
    a: Float[Tensor, " n"]
    b: Float[Tensor, " n"]
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("code")
    (folder / "code_with_types.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    try:
        with jaxtyping.install_import_hook("code_with_types", "beartype.beartype"):
            yield importlib.import_module("code_with_types")
    finally:
        sys.path.remove(str(folder))


def test_what_is_right_passes(code: ModuleType):
    assert code.plain(1, ["a"], 2, 3, text="b") == 1
    assert code.shaped(torch.zeros(2, 3), torch.zeros(3, 2)).shape == (2, 2)
    assert code.unknown("anything", 1) == "anything"
    assert list(code.numbers(2)) == [0, 1]
    assert code.outer(2)(3) == 6
    assert code.Plain.of(3) == code.Plain(3)
    assert code.Counted("3").count == "3"
    code.Shaped(torch.zeros(2), torch.zeros(2))
    assert code.plain.__annotations__["count"] == "int"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda code: code.plain("1"),
        lambda code: code.plain(-1),
        lambda code: code.plain(1, [2]),
        lambda code: code.plain(1, [], "2"),
        lambda code: code.plain(1, text=2),
        lambda code: code.shaped(torch.zeros(2, 3), torch.zeros(4, 2)),
        lambda code: code.shaped(torch.zeros(2, 3), torch.zeros(3, 4)),
        lambda code: code.sequence([torch.zeros(2, 3)]),
        lambda code: code.unknown("anything", "1"),
        lambda code: code.numbers("2"),
        lambda code: code.outer("2")("3"),
        lambda code: code.Plain("3"),
        lambda code: code.Plain(3).half,
        lambda code: code.Plain.of("3"),
        lambda code: code.Counted(3),
        lambda code: code.Shaped(torch.zeros(2), torch.zeros(3)),
    ],
)
def test_what_is_wrong_is_found(code: ModuleType, wrong):
    with pytest.raises(jaxtyping.TypeCheckError):
        wrong(code)


def test_it_can_be_turned_off(code: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert code.plain(-1) == "negative"
    code.shaped(torch.zeros(2, 3), torch.zeros(3, 4))
