import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fleet.capture import replay as replay_module
from fleet.capture.dependence import Dependence, dependences, phases
from fleet.capture.layout import merge_views, observe, reuse_memory
from fleet.capture.program import Program
from fleet.capture.replay import Arguments, capture, check
from fleet.capture.trace import CaptureError, trace


def numbers(*shape, dtype=torch.float64):
    draws = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draws, dtype=dtype)


def several(one, arguments):
    """`one` for all models of a chunk: in_dims by the kind of each tensor."""
    axes = [0] * len(arguments.stacked) + [None] * len(arguments.shared)
    axes += [0 if arguments.each else None] * len(arguments.inputs)
    return torch.func.vmap(one, in_dims=tuple(axes))


def loop(one, arguments):
    results = [one(*arguments.of(model)) for model in range(arguments.models)]
    return [torch.stack(outputs) for outputs in zip(*results, strict=True)]


def layers(first, second, shared, x):
    h = torch.tanh(x @ shared) * 2
    y = F.relu(h @ first + h.mean())
    return [y @ second.T, y.sum(1), h]


def arguments(models=7, each=False):
    inputs = [numbers(models, 5, 4) if each else numbers(5, 4)]
    return Arguments([numbers(models, 6, 3), numbers(models, 2, 3)], [numbers(4, 6)], inputs, each)


class Count(TorchDispatchMode):
    """How many numbers go through each operation."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            name = function.overloadpacket.__name__
            self.elements[name] = self.elements.get(name, 0) + result.numel()
        return result


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("width", [None, 1, 2, 3, 5, 7])
def test_chunks_of_any_width(width, each, monkeypatch):
    given = arguments(each=each)
    monkeypatch.setattr(replay_module, "_width", lambda *_: width or 1)
    with torch.no_grad():
        replayed = capture(layers, several(layers, given) if width else None, given)
        for found, wanted in zip(replayed(given), loop(layers, given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        again = Arguments(given.stacked, given.shared, [given.inputs[0] * 2], each)
        for found, wanted in zip(replayed(again), loop(layers, again), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_what_all_models_share_is_computed_once_for_all_chunks(monkeypatch):
    given = arguments()
    monkeypatch.setattr(replay_module, "_width", lambda *_: 1)
    with torch.no_grad():
        replayed = capture(layers, None, given)
        replayed(given)
        with Count() as count:
            replayed(given)
    assert count.elements["tanh_"] == 5 * 6
    assert count.elements["mm"] == 5 * 6 + 7 * (5 * 3 + 5 * 2)


def test_what_depends_on_weights_alone_is_computed_when_they_are_loaded():
    def one(weight, x):
        return [x @ weight.exp().softmax(0)]

    given = Arguments([numbers(3, 4, 5)], [], [numbers(2, 4)], False)
    with torch.no_grad():
        replayed = capture(one, several(one, given), given)
        assert replayed.kept_bytes == 0
        for _ in range(2):
            with Count() as count:
                (found,) = replayed(given)
        torch.testing.assert_close(found, loop(one, given)[0], rtol=1e-12, atol=0)
        assert "exp" not in count.elements
        assert replayed.kept_bytes == 3 * 4 * 5 * 8
        given.stacked[0].mul_(2)
        replayed.release()
        assert replayed.kept_bytes == 0
        torch.testing.assert_close(replayed(given)[0], loop(one, given)[0], rtol=1e-12, atol=0)


def test_views_of_weights_are_not_counted():
    def one(weight, x):
        return [x @ weight.T]

    given = Arguments([numbers(3, 5, 4)], [], [numbers(2, 4)], False)
    with torch.no_grad():
        replayed = capture(one, several(one, given), given)
        replayed(given)
    assert replayed.kept_bytes == 0


def test_large_products_run_one_model_after_another():
    def one(weight, x):
        return [x @ weight]

    small = Arguments([numbers(4, 8, 8)], [], [numbers(2, 8)], False)
    large = Arguments([numbers(4, 256, 256)], [], [numbers(256, 256)], False)
    with torch.no_grad():
        for given, width in ((small, 4), (large, None)):
            assert capture(one, several(one, given), given)._width == width


def optimised(function, tensors, kinds):
    """The graph after all steps, and the program."""
    module = trace(function, tensors)
    facts = observe(module, tensors)
    when = phases(dependences(module.graph, kinds))
    merge_views(module.graph, facts, when)
    reuse_memory(module.graph, facts, when)
    return module.graph, Program(module, when)


def run(program, tensors, parts=4):
    values = dict(zip(program.placeholders, tensors, strict=True)) | program.constants
    for now in list(program.parts)[::-1][:parts]:
        if now < 3:
            values |= program.run(now, values)
    body = program.parts[3]
    return list(body(*[values[node] for node in body.inputs]))


MODEL, INPUT = Dependence.MODEL, Dependence.INPUT


def in_place(graph):
    return [str(n.target) for n in graph.nodes if "_." in str(n.target)]


def test_memory_is_used_again_where_nothing_needs_it():
    def function(w, x):
        return [F.relu(F.gelu(x @ w) + x)]

    tensors = [numbers(4, 4), numbers(3, 4)]
    graph, program = optimised(function, tensors, [MODEL, INPUT])
    assert in_place(graph) == ["aten.gelu_.default", "aten.add_.Tensor", "aten.relu_.default"]
    kept = tensors[1].clone()
    torch.testing.assert_close(run(program, tensors)[0], function(*tensors)[0], rtol=1e-12, atol=0)
    assert torch.equal(tensors[1], kept)


def test_a_gradient_is_masked_in_place_and_is_not_copied_into_the_format_it_has():
    def function(w, x):
        copied = (x @ w).clone(memory_format=torch.contiguous_format)
        return [torch.ops.aten.threshold_backward(copied, x, 0.5), x @ w]

    tensors = [numbers(4, 4), numbers(3, 4)]
    graph, program = optimised(function, tensors, [MODEL, INPUT])
    names = [str(node.target) for node in graph.nodes]
    assert "aten.clone.default" not in names
    assert "aten.threshold_backward.grad_input" in names
    for found, wanted in zip(run(program, tensors), function(*tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: [F.relu(y := x @ w), y],
        lambda w, x: [(y := x @ w).clone(memory_format=torch.preserve_format), F.relu(y)],
        lambda w, x: [torch.ops.aten.threshold_backward(y := x @ w, x, 0.0), y],
        lambda w, x: [F.relu(y := x @ w) * y],
        lambda w, x: [(y := x @ w)[:1] + 1, F.relu(y)],
        lambda w, x: [(v := (y := x @ w).T).sum(0) + F.relu(y).sum(1) + v.sum(0)],
        lambda w, x: [F.relu(x.expand(2, 3, 4)) + w.sum()],
        lambda w, x: [F.relu((x.sum(0) + w[0]).expand(3, 4))],
        lambda w, x: [F.relu(x) + w[0], F.gelu(w) + x.sum()],
        lambda w, x: [(y := x @ w).add(y)],
        lambda w, x: [x @ w + (x[0] @ w), torch.add(x @ w, x, alpha=3), 2 - (x @ w)],
        lambda w, x: [(x @ w).double() + 1, (x @ w) + torch.ones(3, 4, dtype=torch.complex128)],
    ],
)
def test_memory_is_not_used_again_where_something_needs_it(function):
    tensors = [numbers(4, 4), numbers(3, 4)]
    kept = [tensor.clone() for tensor in tensors]
    _, program = optimised(function, tensors, [MODEL, INPUT])
    for _ in range(2):
        for found, wanted in zip(run(program, tensors), function(*kept), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, tensors, kept))


def test_what_all_models_share_is_not_overwritten_before_the_last_model():
    """A shared value that each model reads, and that a later shared step could overwrite."""

    def function(w, x):
        h = x * 2
        return [h @ w, F.relu(h) @ w]

    given = Arguments([numbers(3, 4, 5)], [], [numbers(2, 4)], False)
    with torch.no_grad():
        replayed = capture(function, None, given)
        for found, wanted in zip(replayed(given), loop(function, given), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_chains_of_views_are_one_step():
    def function(w, x):
        y = (x @ w).view(3, 2, 2).permute(1, 0, 2).unsqueeze(0)
        q, k = y.unbind(1)
        return [q.transpose(1, 2).reshape(2, 3) * 2, k + 1, y[..., 1]]

    tensors = [numbers(4, 4), numbers(3, 4)]
    graph, program = optimised(function, tensors, [MODEL, INPUT])
    names = [str(node.target) for node in graph.nodes]
    assert not any("permute" in n or "unsqueeze" in n or "unbind" in n for n in names)
    for found, wanted in zip(run(program, tensors), function(*tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_values_are_let_go_after_their_last_use():
    def function(w, x):
        return [((x @ w).exp().sin() @ w).cos()]

    _, program = optimised(function, [numbers(4, 4), numbers(3, 4)], [MODEL, INPUT])
    lines = program.parts[3].source.splitlines()[1:-1]
    assert all("= None" in line for line in lines)


def test_numbers_that_have_no_literal():
    def function(w, x):
        return [torch.where(x > 0, x, -math.inf) + w, x.clamp(max=math.inf), x.nan_to_num(math.nan)]

    tensors = [numbers(3, 4), numbers(3, 4)]
    _, program = optimised(function, tensors, [MODEL, INPUT])
    for found, wanted in zip(run(program, tensors), function(*tensors), strict=True):
        assert torch.equal(found, wanted)


def test_check():
    same = [torch.tensor([1.0, math.nan, math.inf])]
    check(same, [same[0].clone()])
    check([torch.ones(3) + 5e-6], [torch.ones(3)])
    for found, wanted, reason in (
        (torch.ones(3) * 1.01, torch.ones(3), "differs"),
        (torch.ones(3), torch.tensor([1.0, 1.0, math.nan]), "differs"),
        (torch.ones(3), torch.ones(4), r"\[3\] when replayed and .* \[4\]"),
        (torch.ones(3).double(), torch.ones(3), "float64 .* when replayed"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs"),
    ):
        with pytest.raises(CaptureError, match=reason):
            check([found], [wanted])
