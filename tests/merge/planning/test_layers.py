"""Layers from names: every naming scheme in use, positions, gradients, other layers' names."""

from __future__ import annotations

import pytest

from merge.errors import MergeError
from merge.planning.layers import Layers


def llama(layers: int) -> list[str]:
    inside = ["self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"]
    return sorted(
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.norm.weight",
            *(f"model.layers.{k}.{name}" for k in range(layers) for name in inside),
        ]
    )


@pytest.mark.parametrize(
    ("names", "stem", "count"),
    [
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.ln_1.weight"], "transformer.h", 2),
        (["h.0.attn.c_attn.weight", "h.1.ln_1.weight", "wte.weight"], "h", 2),
        (["bert.encoder.layer.0.output.dense.bias"], "bert.encoder.layer", 1),
        (["visual.transformer.resblocks.11.ln_1.bias"], "visual.transformer.resblocks", 1),
        (["blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight", "blocks.1.mlp.0.weight"], "blocks", 2),
        (["stages.0.blocks.0.w.x", "stages.0.blocks.1.w.x", "stages.1.blocks.0.w.x"], "stages", 3),
        (["layer1.0.conv1.weight", "layer1.1.bn1.bias", "layer4.0.conv1.weight"], "layer", 3),
        (["blocks.0.0.conv.weight", "blocks.1.0.conv.weight", "bn1.weight"], "blocks", 2),
        (["s1.b1.conv1.conv.weight", "s1.b2.conv1.conv.weight", "stem.conv.weight"], "s", 2),
        (["layer1.weight", "layer2.weight", "layer10.weight"], "layer", 3),
        (["0.weight", "2.weight", "4.weight"], "", 3),
        (["features.0.weight", "features.3.weight", "classifier.0.weight"], "features", 2),
        (
            ["backbone.0.body.layers.0.w.x", "backbone.0.body.layers.1.w.x"],
            "backbone.0.body.layers",
            2,
        ),
        (
            [f"model.layers.{k}.mlp.experts.{e}.w1.weight" for k in range(2) for e in range(8)],
            "model.layers",
            2,
        ),
        (
            [f"encoder.block.{k}.layer.{j}.w.weight" for k in range(3) for j in range(2)],
            "encoder.block",
            3,
        ),
    ],
)
def test_the_list_of_layers_is_found(names: list[str], stem: str, count: int) -> None:
    layers = Layers.of(names)
    assert list(layers.sequences) == [stem]
    assert layers.count == count


def test_positions_of_a_language_model() -> None:
    layers = Layers.of(llama(3))
    assert layers.count == 3
    assert layers.position("model.embed_tokens.weight") == "before"
    assert layers.position("model.norm.weight") == "after"
    assert layers.position("lm_head.weight") == "after"
    assert layers.position("model.layers.1.input_layernorm.weight") == 1
    assert layers.index("lm_head.weight") is None


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("cls_token", "before"),
        ("pos_embed", "before"),
        ("patch_embed.norm.weight", "before"),
        ("visual.conv1.weight", "before"),
        ("visual.ln_pre.weight", "before"),
        ("bert.embeddings.LayerNorm.weight", "before"),
        ("shared.weight", "before"),
        ("gpt_neox.embed_in.weight", "before"),
        ("gpt_neox.embed_out.weight", "after"),
        ("visual.ln_post.weight", "after"),
        ("visual.proj", "after"),
        ("transformer.ln_f.weight", "after"),
        ("cls.predictions.bias", "after"),
        ("head.norm.weight", "after"),
        ("fc_norm.weight", "after"),
        ("classification_head.bias", "after"),
        ("logit_scale", "after"),
        ("bert.pooler.dense.weight", "after"),
    ],
)
def test_words_tell_what_is_before_and_after(name: str, side: str) -> None:
    assert Layers.of([name, "blocks.0.w.weight", "blocks.1.w.weight"]).position(name) == side


def test_without_a_telling_word_the_order_of_the_names_counts() -> None:
    layers = Layers.of(["alpha", "blocks.0.w.weight", "blocks.1.w.weight", "omega"])
    assert layers.position("alpha") == "before"
    assert layers.position("omega") == "after"


def test_blocks_are_counted_through_the_stages() -> None:
    layers = Layers.of(
        [
            "stem.0.weight",
            "stages.1.downsample.0.weight",
            "stages.0.blocks.0.conv_dw.weight",
            "stages.0.blocks.1.conv_dw.weight",
            "stages.1.blocks.0.conv_dw.weight",
            "stages.1.blocks.10.conv_dw.weight",
            "stages.1.blocks.2.conv_dw.weight",
        ]
    )
    assert layers.index("stages.0.blocks.1.conv_dw.weight") == 1
    assert layers.index("stages.1.blocks.2.conv_dw.weight") == 3
    assert layers.index("stages.1.blocks.10.conv_dw.weight") == 4
    assert layers.index("stages.1.downsample.0.weight") == 2  # with the stage's first block
    assert layers.position("stem.0.weight") == "before"


def test_depth_and_gradients_run_over_a_models_own_layers() -> None:
    layers = Layers.of(llama(5))
    inside = [f"model.layers.{k}.mlp.up_proj.weight" for k in range(5)]
    assert [layers.depth(name) for name in inside] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [layers.fraction(name) for name in inside] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert layers.depth("model.embed_tokens.weight") == 0.0
    assert layers.depth("lm_head.weight") == 1.0
    assert layers.fraction("lm_head.weight") == 0.0


def test_a_single_layer_is_at_the_end() -> None:
    layers = Layers.of(llama(1))
    assert layers.fraction("model.layers.0.mlp.up_proj.weight") == 1.0


def test_towers_count_on_their_own() -> None:
    layers = Layers.of(
        [f"transformer.resblocks.{k}.ln_1.weight" for k in range(3)]
        + [f"visual.transformer.resblocks.{k}.ln_1.weight" for k in range(5)]
    )
    assert layers.count == 5
    assert layers.fraction("transformer.resblocks.1.ln_1.weight") == 0.5
    assert layers.fraction("visual.transformer.resblocks.1.ln_1.weight") == 0.25
    with pytest.raises(MergeError, match=r"'transformer.resblocks' \(3\).*models instead"):
        layers.rename("transformer.resblocks.1.ln_1.weight", 0)


def test_a_layer_gets_another_number() -> None:
    layers = Layers.of(llama(3))
    found = layers.rename("model.layers.1.mlp.up_proj.weight", 17)
    assert found == "model.layers.17.mlp.up_proj.weight"
    with pytest.raises(MergeError, match=r"'lm_head\.weight': is in no layer"):
        layers.rename("lm_head.weight", 0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fc1.weight", "fc2.weight"], "numbered layers"),
        (["layer1.0.conv1.weight", "layer2.0.conv1.weight"], "one of stages"),
        (["net.0.weight", "net.2.weight"], "from 0, 'net' has 0, 2"),
    ],
)
def test_what_cannot_be_sliced_says_why(names: list[str], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        Layers.of(names).rename(names[0], 1)


def test_no_numbers_no_layers() -> None:
    layers = Layers.of(["fc1.weight", "fc2.weight"])
    assert layers.count == 0
    assert layers.index("fc1.weight") is None
    assert Layers.of([]).count == 0
