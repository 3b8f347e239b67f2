"""The int8 layout on disk, which is that of bitsandbytes, so that each can read what the other wrote.

An int8 layer is three tensors: `weight` int8 (out_features, in_features), also where the original is transposed; `SCB`
float32 (out_features,), the absmax of each row, which is 127 times its scale; and `weight_format`, a uint8: 0 means
that values are in plain row order. config.json says so under `quantization_config`.
Source: bitsandbytes, `Linear8bitLt._save_to_state_dict`; transformers, `BitsAndBytesConfig`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SCALES = "SCB"
FORMAT = "weight_format"
ROWS_AS_THEY_ARE = 0

LARGEST_INT8 = 127.0


def quantization_config(threshold: float, skipped: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a model in this layout; `skipped` are its linear layers that are not int8."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(threshold),
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def is_int8_config(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes weights in this layout."""
    stored = config.get("quantization_config")
    return (
        isinstance(stored, dict)
        and stored.get("quant_method") == "bitsandbytes"
        and bool(stored.get("load_in_8bit", stored.get("_load_in_8bit")))
        and not stored.get("load_in_4bit")
    )


def stored_threshold(config: Mapping[str, Any]) -> float | None:
    """The outlier threshold that the model was saved with, None where there is none that makes sense."""
    threshold = config.get("quantization_config", {}).get("llm_int8_threshold")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    return float(threshold) if is_number and 0 <= threshold < float("inf") else None


def stored_skips(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The modules that an int8 checkpoint leaves in 16-bit, by its config; None where that has no list of them, which
    to bitsandbytes means the head."""
    skipped = config["quantization_config"].get("llm_int8_skip_modules")
    return tuple(skipped) if isinstance(skipped, list) and all(isinstance(name, str) for name in skipped) else None


def scales_to_absmax(scale_R: "Tensor") -> "Tensor":
    """Scales as they are stored."""
    return scale_R * LARGEST_INT8


def absmax_to_scales(absmax_R: "Tensor", out_R: "Tensor") -> bool:
    """Stored scales as the kernels use them, into `out_R`. False if one is negative, NaN or infinite."""
    out_R.copy_(absmax_R / LARGEST_INT8)
    return bool(((out_R >= 0) & (out_R < float("inf"))).all())
