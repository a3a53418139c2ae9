"""An adapter (model/lora.py) as PEFT keeps one: adapter_model.safetensors and adapter_config.json.

Theirs is for each layer lora_A [r, in] and lora_B [out, r], by the name of the module whose weight it adapts; α and the
kind of scale are in the config, so that the arrays are those that were trained.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from model.families import Family
from model.lora import Lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of their names: of the object that holds the model
NAMES = (".lora_A.weight", ".lora_B.weight")
NAMES_LOOKED_UP = (".lora_embedding_A", ".lora_embedding_B")  # of an embedding, whose "in" is the vocabulary
LOOKED_UP = ("embed", "position")


def arrays(family: Family, c: Any, lora: Lora, *adapters: Any) -> dict[str, np.ndarray]:
    """{their name: [r, in] or [out, r]}. c: the run's config. Raises ValueError for what they keep in one array."""
    rows = {row.ours: row for row in family.table(c.model)}
    if fused := [name for name in lora.sites if rows[name].part is not None]:
        module = _module(next(iter(rows[fused[0]].places(c.model))))
        raise ValueError(
            f"{family.name} keeps {', '.join(fused)} in one array ({module}), and several adapters side by side "
            "are not one of their rank: export without --adapter, or train with another lora.pattern, as in "
            "attention/out|mlp"
        )
    found: dict[str, np.ndarray] = {}
    for name, pair in lora.pairs(*adapters).items():
        row, (a_name, b_name) = rows[name], NAMES_LOOKED_UP if name in LOOKED_UP else NAMES
        for theirs, place in row.places(c.model).items():
            a, b = (np.asarray(x[place]) for x in pair)
            found[PREFIX + _module(theirs) + a_name] = a.reshape(-1, lora.rank).T
            found[PREFIX + _module(theirs) + b_name] = b.reshape(lora.rank, -1).T
    return found


def config(family: Family, c: Any, names: Iterable[str], base: str) -> dict[str, Any]:
    """adapter_config.json. names: of `arrays`. base: the model that the adapter belongs to."""
    modules = (name.removeprefix(PREFIX).partition(".lora_")[0] for name in names)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": c.lora.rank,
        "lora_alpha": c.lora.alpha, "use_rslora": c.lora.rs, "lora_dropout": 0.0, "bias": "none", "use_dora": False,
        # A name's last two parts say which weight of a layer it is: of all layers, as ours are.
        "target_modules": sorted({".".join(module.split(".")[-2:]) for module in modules}),
        "fan_in_fan_out": family.name == "gpt2",  # whose linear maps are [in, out]
        "inference_mode": True, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip


def _module(name: str) -> str:
    return name.removesuffix(".weight")
