"""What a stage imports before it does anything: 1.2 s of the 2.6 s that the smallest run of `sft` takes.

The server process of tests/helpers/harness.py imports this module once; the stages that are forked from it start with
all of it in place. DeepSpeed is among it, because accelerate imports it where it is installed.
"""

import gc
import importlib
import pkgutil

import deepspeed  # noqa: F401
import numpy.ma  # noqa: F401
import pyarrow.parquet  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pipeline
import pipeline.core.stage  # noqa: F401
import pipeline.data.chat
import pipeline.models
import pipeline.rl
import pipeline.train

for package in (pipeline.data.chat, pipeline.models, pipeline.rl, pipeline.train):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for stage in (
    "assess",
    "clean",
    "dpo",
    "export",
    "grpo",
    "kto",
    "pack",
    "ppo",
    "pretrain",
    "reward",
    "sft",
    "tokenizer",
):
    importlib.import_module(f"pipeline.{stage}")

get_checkpoint_conversion_mapping("llama")  # transformers compiles 900 regular expressions at the first call
# Collections of garbage in the children need not look at what is imported here.
gc.collect()
gc.freeze()
