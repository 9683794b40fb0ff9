import pytest
from hypothesis import given
from hypothesis import strategies as st

from soups.groups import group_tensors

NAMES = {
    "cls_token": 8,
    "patch_embed.proj.weight": 96,
    "stages.0.blocks.0.conv.weight": 10,
    "stages.0.blocks.0.conv.bias": 2,
    "stages.0.blocks.1.mlp.0.weight": 20,
    "blocks.3.mlp.0.weight": 20,
    "layer1.0.conv1.weight": 5,
    "layer1.0.downsample.0.weight": 5,
    "head.weight": 30,
    "head.bias": 3,
}


def test_blocks_are_the_numbered_modules():
    assert list(group_tensors(NAMES, "block")) == [
        "cls_token",
        "patch_embed",
        "stages.0.blocks.0",
        "stages.0.blocks.1",
        "blocks.3",
        "layer1.0",
        "head",
    ]


def test_layers_are_modules_and_a_bare_parameter_is_its_own_layer():
    groups = group_tensors(NAMES, "layer")
    assert groups["head"] == ("head.weight", "head.bias")
    assert groups["cls_token"] == ("cls_token",)
    assert groups["stages.0.blocks.0.conv"] == (
        "stages.0.blocks.0.conv.weight",
        "stages.0.blocks.0.conv.bias",
    )


def test_runs_stay_below_the_size_and_a_larger_tensor_is_alone():
    groups = group_tensors(NAMES, 4 * 25)
    assert groups["patch_embed.proj.weight"] == ("patch_embed.proj.weight",)
    for names in groups.values():
        assert len(names) == 1 or sum(NAMES[name] for name in names) <= 25


@pytest.mark.parametrize("grouping", ["model", "block", "layer", "tensor", 64, 10**9])
@given(
    numels=st.dictionaries(
        st.from_regex(r"[a-c](\.[a-c0-2]){0,4}", fullmatch=True), st.integers(1, 50)
    )
)
def test_every_tensor_is_in_exactly_one_group(grouping, numels):
    grouped = [name for names in group_tensors(numels, grouping).values() for name in names]
    assert sorted(grouped) == sorted(numels)
