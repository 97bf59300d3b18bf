"""What a person sees on terminals of several widths, and in a file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tuned
from harness import succeed
from rich.cells import cell_len

from pipeline import __version__
from pipeline.core.artifact import current
from pipeline.core.terminal import short, time_left, wrap

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_terminal(command: list[str], columns: int, **environment) -> str:
    """What a command writes to a terminal of this width."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env={**kept, "TERM": "xterm", **environment}
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux: nothing writes to it any more
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait(60) == 0, shown.decode()
    return shown.decode()


def lines_of(shown: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", shown)) if line.strip()]


BAR = """
import time
from pipeline.core.tracking import Progress
with Progress("pretrain", 4000, "step") as bar:
    for _ in range(4):
        time.sleep(0.3)
        bar.update(40, loss=3.21456, **{"bits/byte": 2.1347, "tok/s": 11052.7, "MFU": "12.3%"})
"""


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_the_bar_keeps_its_time_left(columns):
    """Correctness 49: at least ten cells, percent and time left whole, one line, and no exponents."""
    frames = [line for line in lines_of(on_terminal([sys.executable, "-c", BAR], columns)) if "left" in line]
    last = frames[-1]
    assert all(cell_len(line) <= columns for line in frames)
    assert len(re.findall("[━╸╺]", last)) >= 10
    assert re.search(r"  4%  \d+m\d\ds left  loss 3.215", last)
    assert "e+" not in last
    assert ("11.1k tok/s" in last) == (columns >= 80)
    assert ("bits/byte 2.135" in last and "MFU 12.3%" in last) == (columns >= 160)


def test_a_terminal_without_cursor_gets_lines():
    """Correctness 49."""
    program = BAR.replace(
        "import time\n", "import time\nimport pipeline.core.tracking as t\nt.PLAIN_SECONDS = 0.1\n", 1
    )
    shown = on_terminal([sys.executable, "-c", program], 80, TERM="dumb")
    assert "\x1b" not in shown and "pretrain: 4% (160 of 4k step), " in shown and "11.1k tok/s" in shown


@pytest.mark.parametrize(
    "value, text",
    [(0.12345, "0.123"), (999.6, "1k"), (11052.7, "11.1k"), (999_600, "1M"), (-2.5e6, "-2.5M"), (9.999e14, "1P")],
)
def test_short_numbers(value, text):
    """Correctness 49: a rate is never `1.105e+04`."""
    assert short(value) == text


def test_time_left():
    assert [time_left(s) for s in (0, 61, 3 * 3600 + 300, 50 * 3600)] == ["0m00s", "1m01s", "3h05m", "2d02h"]


CHINESE = (
    "schedule   余弦退火，从0.001降到0.0001，预热一百步（共一万二千八百个词元），其余的步数按照计划执行，最后保存。"
)
ENGLISH = (
    "data       100 steps x 12 packed rows of at most 128 tokens, which is what fits: /a/very/long/path/that/is/longer/"
    "than/a/terminal/of/forty/columns/is/wide; 中文 mixed with English words"
)


@pytest.mark.parametrize("text", [CHINESE, ENGLISH, "plain words " * 20])
@pytest.mark.parametrize("columns", [40, 60, 80])
def test_lines_break_between_words(text, columns):
    """Correctness 49: nothing is lost, no word is broken, Chinese is broken by the width of its characters and no line
    begins with its punctuation."""
    found = wrap(text, columns).split("\n")
    assert len(found) > 1
    assert "".join("".join(found).split()) == "".join(text.split())
    for line in found:
        assert cell_len(line) <= columns or "/a/very/long" in line
        assert line.strip()[0] not in "，。）；"
    if text is not CHINESE:
        assert [word for line in found for word in re.findall("[!-~]+", line)] == re.findall("[!-~]+", text)
    else:  # as full as it can be
        assert all(cell_len(line) >= columns - 4 for line in found[:-1])
    indent = 2 if text.startswith("plain") else 11
    assert all(len(line) - len(line.lstrip()) == indent for line in found[1:])


TABLE = """
from pathlib import Path
from pipeline.core.artifact import Artifact
from pipeline.core.chain_summary import show_table
from pipeline.core.graph import Node
ROWS = [
    ("clean", "52.2 MB, 139265 documents, 5 sources", "43.9 MB, 95147 documents (977 held out)",
     "dropped: 25001 filtered, 18959 + 158 duplicates, 0 bad", 23.2),
    ("pretrain", "15.50M tokens, 5 sources", "2.7M parameters, 1.02M tokens read",
     "held-out bits per byte 4.35 -> 2.34 (n=192 rows)", 40271.0),
    ("对齐", "12 sources, 26590 pairs", "model/, 30 steps",
     "held-out margin 0.00 -> 0.18, pairs ranked right 86% (95%: 83% to 87%, n=1330)", 54.0),
]
graph = {}
for name, took, made, measure, seconds in ROWS:
    summary = {"input": took, "output": made, "measure": measure}
    output = Artifact(Path("x"), {"metrics": {"summary": summary}, "seconds": seconds})
    graph[name] = Node(name, None, {}, Path("x"), state="up to date", output=output)
show_table(graph)
"""


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 200])
def test_the_closing_table_breaks_no_word(columns):
    """Correctness 49."""
    found = lines_of(on_terminal([sys.executable, "-c", TABLE], columns))
    assert all(cell_len(line) <= columns for line in found)
    words = "\n".join(found).split()
    expected = re.findall(r'"([^"]*)"', TABLE.partition("ROWS")[2].partition("]\n")[0])
    assert len(expected) == 12
    for word in " ".join(expected).split():
        assert word in words, f"{word} is broken at {columns} columns"
    assert "11 h 11 min" in "\n".join(found) and "23 s" in "\n".join(found)


def test_the_closing_table_in_a_file():
    """Correctness 49: no escapes, and no dependence on the terminal that happens to be there."""
    made = [
        subprocess.run(
            [sys.executable, "-c", TABLE], capture_output=True, text=True, env={**os.environ, "COLUMNS": columns}
        ).stdout
        for columns in ("40", "200")
    ]
    assert made[0] == made[1] and "\x1b" not in made[0] and "pretrain" in made[0]


def alma(*words) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_version_help_and_unknown_commands():
    """Correctness 49."""
    assert alma("--version") == (0, f"alma {__version__}\n", "")
    for words in (("-h",), ("run", "-h"), ("inspect", "-h"), ("inspect", "tokenizer", "-h")):
        code, out, err = alma(*words)
        assert code == 0 and "Usage:" in out and not err
    for words, names in (
        (
            ("rnu",),
            tuple(
                "run status cancel logs plan list compare sweep gc report chat serve push verify inspect recipe".split()
            ),
        ),
        (("inspect", "toknes"), ("tokens", "data", "masks", "tokenizer")),
    ):
        code, out, err = alma(*words)
        assert code == 2 and not out and f"'{words[-1]}'" in err
        assert [line.split()[0] for line in err.splitlines()[2:]] == list(names)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tuned.world(tmp_path_factory.mktemp("terminal"))
    with open(folder / "tiny.yaml", "a", encoding="utf-8") as handle:
        handle.write(
            f"  ppo: {{{tuned.COMMON}, inputs: {{policy: sft, reward: reward}}, steps: 2, rollout: {{max_new_tokens: 6}},"
            " ppo: {minibatches: 2, epochs: 1, calibrate: 4}, evaluate_prompts: 4, optimizer: {lr: 1e-4},"
            " sources: {nouns: {path: rows.jsonl, prompt: 'What is a {words} {noun}?'}}}\n"
        )
    return folder


def parameters(folder: Path) -> int:
    from safetensors.torch import load_file

    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_tuning_stages_show_their_schedule_and_their_result(world):
    """Correctness 49: steps, epochs, batch, learning rate, warmup and parameters before the first step; after the last
    where the model is."""
    for name, rate, row in (
        ("sft", "0.005", "packed rows of at most 64"),
        ("reward", "0.003", "pairs of answers of at most 64"),
        ("dpo", "0.001", "pairs of answers of at most 64"),
        ("ppo", "0.0001", "prompts, answered with at most 6"),
    ):
        changed = [word for stage in ("sft", "reward", "dpo", "ppo") for word in _words(stage)]
        peak = [f"{name}.log.peak=0.5"] if name != "ppo" else []
        text = succeed(name, "tiny.yaml", *changed, *peak, "sft.max_prompts=4", cwd=world)
        place = f"runs/tiny/{name}/current/model"
        manifest = current(world / "runs/tiny" / name).manifest
        assert f"model      {parameters(world / place):,} parameters" in text
        assert re.search(rf"^data       2 (steps|iterations) x 8 {row} tokens", text, re.M), text
        epochs = manifest["metrics"].get("epochs") or 16 / manifest["metrics"]["train_prompts"]
        assert f" {epochs:.3g} epochs" in text
        assert re.search(rf"^schedule   adamw, linear from {rate} to \S+, warmup of 1 step$", text, re.M), text
        assert (" at 40% of 0.5 TFLOP/s" in text) == (name != "ppo")
        assert text.index("model      ") < text.index(f"{name}: done in ")
        assert text.rstrip().endswith(f"the result is in {place}")
        again = succeed(name, "tiny.yaml", *changed, "sft.max_prompts=4", cwd=world)
        assert again.strip() == f"{name}: up to date (runs/tiny/{name}/current)"


def test_the_estimate_of_time_follows_from_the_peak():
    """Correctness 49: 6 FLOPs a parameter and token for training, a third of it for tokens that are only run forward,
    at 40% of the peak."""
    from pipeline.models.cost import Flops
    from pipeline.train.run_summary import Work

    flops = Flops(full=6e9, causal=5e9)
    assert Work("", tokens=1e6).seconds(flops, 1e12) == pytest.approx(6e15 / 4e11)
    assert Work("", tokens=1e6, forward_tokens=3e6).seconds(flops, 1e12) == pytest.approx(2 * 6e15 / 4e11)
    assert Work("", tokens=1e6).seconds(flops, None) is None
    assert Work("").seconds(flops, 1e12) is None


def _words(stage: str) -> list[str]:
    return [f"{stage}.steps=2", f"{stage}.schedule.kind=linear", f"{stage}.schedule.warmup_steps=1"]


def test_the_command_to_talk_to_a_model_works(world, monkeypatch, capsys):
    """Correctness 49: what the end of a chain prints can be pasted into a shell, and answers as the model does."""
    import io
    import shlex

    from transformers import AutoModelForCausalLM

    from pipeline import cli
    from pipeline.core.chain_summary import talk
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    monkeypatch.chdir(world)
    if current(world / "runs/tiny/sft") is None:
        succeed("sft", "tiny.yaml", *_words("sft"), cwd=world)
    artifact = current(world / "runs/tiny/sft")
    program, *words = shlex.split(talk(artifact))
    assert (program, words) == ("alma", ["chat", "runs/tiny:sft"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a red cat?\n/reset\n什么是竹子？\n"))
    cli.app([*words, "--max-new-tokens", "20"], standalone_mode=False)
    folder = artifact.path / "model"
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected = ""
    for text in ("What is a red cat?", "什么是竹子？"):
        prompt = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
        expected += tokenizer.decode(made, skip_special_tokens=True) + "\n"
    assert capsys.readouterr().out == expected


def test_the_report_of_a_tokenizer_is_the_same_each_time(world):
    """Correctness 49: the vocabulary comes in another order each time it is asked for."""
    import pyarrow
    import pyarrow.parquet

    from pipeline.checks.inspect_tokenizer import report
    from pipeline.core.artifact import external

    for split in ("train", "heldout"):
        folder = world / "clean" / split
        folder.mkdir(parents=True)
        table = {"text": ["What is a cat?"], "source": ["one"], "id": [split]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "part-00000.parquet")
    data = external("data", world / "clean")
    found = [report(world / "base/tokenizer", data, 1000, []) for _ in range(4)]
    assert len(found[0]["unused"]["examples"]) == 30
    assert all(other == found[0] for other in found[1:])
