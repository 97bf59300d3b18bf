"""Conversations, pairs and prompts that the tiny chain's tuning stages read."""

from pathlib import Path

import tiny
import tuned

TUNING = (
    "batch_size: 8, sequence_length: 64, precision: fp32, steps: 4, save: {every_steps: 2, keep: 1}, optimizer: {lr:"
    " 1e-3}"
)


PROMPT = "prompt: 'What is a {words} {noun}?', answer: '{kind}'"


RECIPE = f"""
name: whole
seed: 1
model: {{family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}}
sources: {{nouns: {{path: rows.jsonl}}}}
stages:
  clean:
    sources:
      animals: {{path: animals.txt, sample_by: line}}
      nouns: {{path: rows.jsonl, text: "a {{words}} {{noun}} is a {{kind}}, and the {{noun}} is {{words}}; {{kind}} {{noun}} {{words}} {{noun}}, {{words}} {{kind}}"}}
    holdout: 0.1
    workers: 1
    filters: {{max_repeated_shingles: 1.0}}
  tokenizer: {{algorithm: byte-bpe, vocab_size: 320}}
  pack: {{workers: 1}}
  pretrain: {{sequence_length: 64, batch_size: 8, steps: 6, precision: fp32, heldout_rows: 8, optimizer: {{lr: 3e-3}}, save: {{every_steps: 3}}}}
  sft: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.CHAT}}}}}, max_prompts: 8, max_new_tokens: 4}}
  reward: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.PAIR}}}}}}}
  dpo: {{{TUNING}, sources: {{nouns: {{from: nouns, {tuned.PAIR}}}}}}}
  ppo: {{{TUNING}, sources: {{nouns: {{from: nouns, {PROMPT}}}}}, inputs: {{policy: sft}}, holdout: 0.1, rollout: {{max_new_tokens: 4}}, evaluate_prompts: 8, ppo: {{epochs: 1, calibrate: 8}}}}
  assess:
    inputs: {{tokens: pack, reward: reward, pretrain: pretrain, sft: sft, dpo: dpo, ppo: ppo}}
    sequence_length: 64
    max_rows: 8
    sources: {{nouns: {{from: nouns, {PROMPT}}}}}
    compare: [[dpo, sft], [ppo, sft]]
    max_prompts: 12
    max_new_tokens: 4
    bootstrap: 200
  export: {{inputs: {{model: ppo}}}}
"""


def rows_of(folder: Path) -> None:
    tuned.write_rows(folder / "rows.jsonl")
    (folder / "animals.txt").write_text("\n".join(tiny.texts(0, 150)) + "\n", encoding="utf-8")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
