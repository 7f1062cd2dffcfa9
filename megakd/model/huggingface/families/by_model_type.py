"""All families, by the name that ``config.json`` has for them."""

from __future__ import annotations

from megakd.model.huggingface.families.llama import LLAMA
from megakd.model.huggingface.families.mistral import MISTRAL
from megakd.model.huggingface.families.mixtral import MIXTRAL
from megakd.model.huggingface.families.qwen2 import QWEN2
from megakd.model.huggingface.families.qwen3 import QWEN3
from megakd.model.huggingface.families.qwen3_moe import QWEN3_MOE
from megakd.model.huggingface.families.smollm3 import SMOLLM3
from megakd.model.huggingface.families.table import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, MIXTRAL, QWEN3_MOE)
}
