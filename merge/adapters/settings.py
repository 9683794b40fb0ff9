"""What adapter_config.json says, checked; and which kinds of LoRA are not plain ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from merge.checkpoints.files import HEADER_BYTES_LIMIT, InputFile
from merge.checkpoints.strict_json import parse_json
from merge.errors import MergeError

CONFIG_NAME = "adapter_config.json"

# Settings of PEFT under which the weights are not W + s·B·A, and why.
REFUSED = {
    "use_dora": "DoRA rescales the sum by a trained magnitude",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal LoRA keeps its factors in blocks",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA also changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "layer_replication": "the adapter belongs to a base with repeated layers",
    "target_parameters": "the adapter is on bare parameters, not on modules",
    "trainable_token_indices": "single rows of an embedding were trained beside it",
}
# Initialisations after which training ran on a base with other weights.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """The settings of an adapter that its weights depend on, as PEFT names them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: str
    r: PositiveInt = 8
    lora_alpha: Alpha = 8
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """`s` in W + s·B·A: alpha / r, or alpha / √r with `use_rslora` (2312.03732)."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """The checked settings of the adapter in `folder`, and all that its config file holds.

    Raises MergeError where it is missing, no JSON, or not of a plain LoRA.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise MergeError(
            f"{folder}: has no {CONFIG_NAME}; wanted the folder that PEFT's save_pretrained wrote"
        )
    file = InputFile(path)
    try:
        if file.size > HEADER_BYTES_LIMIT:
            raise MergeError(
                f"{path}: has {file.size} bytes, at most {HEADER_BYTES_LIMIT} are read"
            )
        content = parse_json(file.read_bytes(0, file.size), str(path))
    finally:
        file.close()
    if not isinstance(content, dict):
        raise MergeError(f"{path}: is {type(content).__name__}, wanted a JSON object")
    kind = content.get("peft_type")
    if kind != "LORA":
        raise MergeError(f"{path}: peft_type is {kind!r}, only 'LORA' is read")
    _refuse_variants(path, content)
    # Older versions of PEFT write null for what was not set.
    given = {key: value for key, value in content.items() if value is not None}
    try:
        config = AdapterConfig.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r:.60})"
            for e in error.errors(include_url=False)
        )
        raise MergeError(f"{path}: {problems}") from error
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            raise MergeError(
                f"{path}: the pattern {pattern!r} is no regular expression: {error}"
            ) from error
    return config, content


def _refuse_variants(path: Path, content: Mapping[str, Any]) -> None:
    for key, reason in REFUSED.items():
        if content.get(key):
            raise MergeError(
                f"{path}: has {key}: {reason}; wanted a plain LoRA. Merge it with PEFT "
                "(merge_and_unload) and give the merged model"
            )
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise MergeError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights too; save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of `module` matches, in whole components."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
