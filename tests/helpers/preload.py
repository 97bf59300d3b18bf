"""What a stage imports before it does anything: 1.2 s of the 2.6 s that the smallest run of `sft` takes.

The server process of tests/helpers/harness.py imports this module once; the stages that are forked from it start with
all of it in place. DeepSpeed is among it, because accelerate imports it where it is installed.
"""

import gc
import importlib
import os
import pkgutil

# Libraries read it when they are loaded: in a forked stage it would be too late. pytest's two workers share two cores.
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: E402, F401
import numpy.ma  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import pipeline  # noqa: E402
import pipeline.core.stage  # noqa: E402, F401
import pipeline.data.chat  # noqa: E402
import pipeline.models  # noqa: E402
import pipeline.rl  # noqa: E402
import pipeline.train  # noqa: E402

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
