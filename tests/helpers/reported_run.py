"""A run's folder with the files that its stages record, written without running them: what `alma report` reads.
`tests/report/test_real_run.py` reports on a run that was made by stages."""

import json
import math
from pathlib import Path

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
DIGITS = "0123456789ab"
STEPS = 300


def manifest(stage: str, digest: str, config: dict, metrics: dict, parents: dict, **more) -> dict:
    record = {
        "schema_version": 1,
        "stage": stage,
        "kind": stage,
        "fingerprint": digest * 64,
        "identity": {"kind": stage, "config": config, "version": 1, "parents": {}},
        "parents": parents,
        "config": config | {"kind": stage},
        "files": {},
        "digest": digest * 64,
        "metrics": metrics,
        "seconds": 12.5,
        "started": "2026-05-01T10:00:00Z",
        "finished": "2026-05-01T10:01:00Z",
        "processes": 2,
        "resumed": 0,
        "software": {"git": "0123456789abcdef", "torch": "2.13.0"},
    }
    return record | more


def parent(stage: str, digest: str) -> dict:
    return {
        "stage": stage,
        "kind": stage,
        "digest": digest * 64,
        "fingerprint": digest * 64,
        "path": f"../{stage}/{digest * 12}",
    }


def publish(root: Path, record: dict, files: dict[str, str] | None = None) -> Path:
    folder = root / record["stage"] / record["fingerprint"][:12]
    folder.mkdir(parents=True)
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(record))
    (root / record["stage"] / "current").symlink_to(folder.name)
    return folder


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pretrain_rows(steps: int = STEPS, spike: int = 200) -> list[dict]:
    """A loss that falls from ln 1000, with one spike, one step that was not applied, and two evaluations."""
    rows = [{"step": 0, "time": 0.0, "heldout_loss": math.log(1000) + 0.1}]
    for step in range(1, steps + 1):
        loss = 3 + 4 * math.exp(-step / 60) + 0.01 * math.sin(step) + (5 if step == spike else 0)
        progress = (step - 1 - 10) / (steps - 10)
        rate = 1e-3 * (step / 10 if step <= 10 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
        rows.append(
            {
                "step": step,
                "time": float(step),
                "loss": loss,
                "grad_norm": 0.5,
                "applied": step != 250,
                "lr": rate,
                "tok_per_second": 1000.0,
                "peak_memory_gb": 1.5,
            }
        )
    rows.append({"step": steps, "time": steps + 1.0, "heldout_loss": 3.1})
    return rows


def clean_report() -> dict:
    sample = {"source": "web", "place": "a.jsonl:3", "value": 0.75, "excerpt": f"short {EVIL}"}
    copy = {"source": "web", "place": "a.jsonl:9", "alike": 0.9, "excerpt": "again", "of": {"excerpt": "the first"}}
    steps = {
        "web": {
            "en": {
                "bad": {"not utf-8": [2, 20, 0]},
                "filtered": {"few_letters": [30, 300, 0], "long_words": [5, 50, 0]},
                "duplicates": {"near": [13, 130, 0]},
                "kept": {"train": [140, 1400, 1400], "heldout": [10, 100, 100]},
            }
        }
    }
    bad = {"web": {"not utf-8": [{"place": "a.jsonl:1", "excerpt": "??"}]}}
    return {
        "funnel": {"steps": steps, "bad": bad, "duplicates": {"samples": {"near": [copy]}}},
        "rules": {"rules": {"few_letters": {"samples": [sample]}, "long_words": {"samples": []}}},
    }


PRETRAIN = {
    "model": {"family": "llama", "hidden_size": 64, "initializer_range": 0.02},
    "steps": STEPS,
    "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
    "schedule": {"kind": "cosine", "warmup_steps": 10, "min_ratio": 0.1},
}


def rollouts() -> list[dict]:
    """Responses of three iterations, as rl/rollout_log.py writes them."""
    rows = []
    for step in (1, 9, 20):
        for number in range(5):
            rows.append(
                {
                    "step": step,
                    "prompt": f"Why {number}? {EVIL}",
                    "score": step / 10,
                    "stopped": number != 1,
                    "length": 3,
                    "tokens": ["Be", f"cause {EVIL}", "<|im_end|>"],
                    "reward": [0.0, -0.01, step / 10],
                    "value": [0.5, 0.25, 1.0],
                    "kl": [0.0, 0.04, -0.01],
                    "advantage": [1.0, -1.0, 0.0],
                    "logprob": [-0.5, -2.0, -0.125],
                }
            )
    return rows


def write(root: Path, lr: float = 1e-3) -> Path:
    """clean, tokenizer, pretrain (resumed once), ppo and assess, all published."""
    summary = {"input": f"200 documents {EVIL}", "output": "150 documents", "measure": "dropped: 50"}
    publish(root, manifest("clean", "1", {}, {"summary": summary}, {}), {"report.json": json.dumps(clean_report())})
    measured = {"bytes_per_token": 3.21, "bytes_per_token_by_source": {"web": 3.21}, "vocab_size": 1000}
    publish(root, manifest("tokenizer", "2", {}, measured, {"data": parent("clean", "1")}))
    config = PRETRAIN | {"optimizer": PRETRAIN["optimizer"] | {"lr": lr}}
    metrics = {"loss_before": 7.0, "loss_after": 3.1, "flops": 1e15, "warnings": [f"careful {EVIL}"]}
    record = manifest("pretrain", "3", config, metrics, {"tokenizer": parent("tokenizer", "2")}, resumed=1)
    record["identity"]["config"] = {"optimizer": {"lr": lr}}
    rows = pretrain_rows()
    for row in rows:
        row.update({"lr": row["lr"] * lr / 1e-3} if "lr" in row else {})
    files = {
        "metrics.jsonl": lines(rows) + '{"step": 301, "lo',
        "logs/starts.jsonl": lines([{"step": 0, "time": 0.0}, {"step": 120, "time": 9.0}]),
    }
    publish(root, record, files)
    policy = []
    for step in range(1, 21):
        row = {"step": step, "reward": step / 10, "kl": step / 20, "entropy": 2.0, "eos_rate": 0.95, "lr": 1e-5}
        if step in (7, 12):
            row["alarm/kl_growth"] = 4.5 + step / 10
        policy.append(row | {"rollout_difference": 1e-7, "first_approx_kl": 0.0, "loss": 0.0, f"odd{EVIL}": 1})
    texts = []
    for when, reward in (("before", 0.5), ("after", 1.5)):
        texts.append(
            {
                "prompt": f"Why? {EVIL}",
                "answer": None,
                "sampled": f"{when} {EVIL}",
                "sampled_reward": reward,
                "when": when,
            }
        )
    measured = {"reward_before": 0.5, "reward_after": 1.5, "reward_half_after": 0.25}
    files = {"metrics.jsonl": lines(policy), "samples.jsonl": lines(texts), "logs/rollouts.jsonl": lines(rollouts())}
    publish(root, manifest("ppo", "4", {}, measured, {"policy": parent("pretrain", "3")}), files)
    rates = {"ppo over pretrain": {"rate": 0.75, "low": 0.6, "high": 0.875, "prompts": 40}}
    task = {
        "metrics": {"acc": {"value": 0.25, "stderr": 0.04, "low": 0.17, "high": 0.35}},
        "questions": 100,
        "few_shot": 5,
    }
    refused = {"harmful": {"rate": 0.5, "low": 0.3, "high": 0.7, "n": 32}}
    models = {"pretrain": {"reward": 0.5}, "ppo": {"reward": 1.5, "bits_per_byte": 1.25}}
    models["ppo"] |= {"tasks": {"kinds": {"kinds": task}}, "refusals": refused}
    measured = {"models": models, "win_rates": rates}
    publish(root, manifest("assess", "5", {}, measured, {"ppo": parent("ppo", "4")}))
    return root


def unfinished(root: Path, stage: str, **info) -> Path:
    """A run of a stage that has not published."""
    folder = root / stage / f"{DIGITS}.partial"
    folder.mkdir(parents=True)
    record = {
        "identity": {"kind": stage, "config": {}},
        "config": {"kind": stage},
        "parents": {},
        "kind": stage,
        "started": "2026-05-01T11:00:00Z",
        "resumed": 0,
        "seconds": 3.0,
        "restart": False,
    }
    (folder / "run.json").write_text(json.dumps(record | info))
    return folder
