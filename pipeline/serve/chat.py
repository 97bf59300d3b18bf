"""`alma chat`: a conversation with one or two models on the terminal, or line by line through a pipe.

Answers go to standard output and everything else to standard error, so that a script reads answers alone.
"""

import sys
import time
from dataclasses import dataclass, field, replace

from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.core.terminal import plural, show
from pipeline.serve.generator import Generator, Sampling, Token
from pipeline.serve.target import Target

COMMANDS = """\
/reset          forget the conversation
/system TEXT    set the system prompt, and forget the conversation; without a text: none
/exit           end, as Ctrl-D does; Ctrl-C stops an answer
/help           this list"""


@dataclass
class Speaker:
    """One model and what was said with it."""

    target: Target
    generator: Generator
    sampling: Sampling
    options: dict
    """Variables of the chat template."""
    system: str = ""
    messages: list[dict] = field(default_factory=list)

    @property
    def chats(self) -> bool:
        return self.generator.chat is not None

    def describe(self) -> list[str]:
        generator, sampling = self.generator, self.sampling
        how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
        if sampling.temperature and sampling.top_p < 1:
            how += f", top-p {sampling.top_p:g}"
        if sampling.temperature and sampling.top_k:
            how += f", top-k {sampling.top_k}"
        parts = [f"{generator.num_parameters / 1e6:.1f}M parameters", f"{generator.dtype} on {generator.device}"]
        if generator.positions is not None:
            parts.append(f"{generator.positions:,} positions")
        lines = [f"{self.target.title}: {', '.join(parts)}, {how}"]
        if not self.chats:
            lines.append(
                f"{self.target.title}: has no chat template, so it is a base model: it continues the text that you"
                " write instead of answering it, and remembers nothing of earlier texts"
            )
        return lines

    def answer(self, text: str, seed: int, write) -> tuple[int, str]:
        """Answer a message, or continue a text; write(text) is called as it comes. Returns (tokens, why it ended).
        Raises UserError if the model cannot be asked; the conversation is then as it was. What was said until a
        KeyboardInterrupt is kept."""
        if self.chats:
            asked = [*self.messages, {"role": "user", "content": text}]
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = self.generator.prompt(system + asked, options=self.options)
        else:
            prompt = self.generator.text_prompt(text)
        tokens: list[Token] = []

        def on_token(row: int, token: Token) -> None:
            tokens.append(token)
            write(token.text)

        try:
            self.generator.generate(prompt, self.sampling, [seed], on_token)
        finally:
            if tokens and self.chats:
                said = "".join(token.text for token in tokens)
                self.messages = [*asked, {"role": "assistant", "content": said}]
        return len(tokens), tokens[-1].finish


@dataclass
class Conversation:
    """What was typed, given to one or more models."""

    speakers: list[Speaker]
    seed: int
    interactive: bool
    turn: int = 0

    def take(self, line: str) -> bool:
        """A line: a command, or a message. Returns whether to go on. Raises UserError."""
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        if command == "/help":
            note(COMMANDS)
        elif command == "/reset":
            self._reset()
            note("the conversation is forgotten")
        elif command == "/system":
            self._set_system(rest.strip())
        elif command.startswith("/") and command[1:].isalpha() and self.interactive:
            raise UserError(f"{command} is no command; these are:\n{COMMANDS}")
        elif line.strip():
            self.ask(line)
        return True

    def ask(self, text: str) -> None:
        """Each model's answer, one after the other, each to its own conversation."""
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                print(f"{speaker.target.title}:", flush=True)
            self._ask(speaker, text)
        self.turn += 1

    def _ask(self, speaker: Speaker, text: str) -> None:
        begin = time.monotonic()
        try:
            count, finish = speaker.answer(text, derive(self.seed, "chat", self.turn), _write)
        except KeyboardInterrupt:
            print(flush=True)
            if not self.interactive:
                raise
            note("stopped")
            return
        print(flush=True)
        if finish == "length":
            note(f"{speaker.target.title}: cut off after {plural(count, 'token')}")
        if self.interactive:
            note(f"[{plural(count, 'token')}, {count / max(time.monotonic() - begin, 1e-9):.0f} per second]")

    def _reset(self) -> None:
        for speaker in self.speakers:
            speaker.messages = []
        self.turn = 0

    def _set_system(self, text: str) -> None:
        for speaker in self.speakers:
            if not speaker.chats:
                raise UserError(f"{speaker.target.title}: has no chat template, so it has no system prompt")
        for speaker in self.speakers:
            speaker.system = text
        self._reset()
        note("the system prompt is set" if text else "there is no system prompt")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def note(text: str) -> None:
    """A line that is not part of an answer."""
    sys.stdout.flush()
    show(text, sys.stderr)


def speaker(target: Target, given: dict, options: dict, system: str, device: str, dtype: str) -> Speaker:
    """A model that is ready to answer. given: settings of Sampling, None for what the model's own settings decide.
    Raises UserError."""
    generator = Generator(target.folder, device, dtype)
    chosen = Sampling(**generator.defaults())
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    found = Speaker(target, generator, chosen, options, system)
    if not found.chats and (system or options):
        raise UserError(f"{target.title}: has no chat template, so it takes no --system and no --option")
    if found.chats:  # a template that cannot write this is found before anything is typed
        example = [{"role": "user", "content": "1"}]
        generator.prompt([{"role": "system", "content": system}] * bool(system) + example, options=options)
    return found


def run(speakers: list[Speaker], seed: int, once: bool) -> None:
    """Talk until the input ends. once: all of standard input is one message."""
    interactive = sys.stdin.isatty() and not once
    conversation = Conversation(speakers, seed, interactive)
    for one in speakers:
        for line in one.describe():
            note(line)
    if once:
        conversation.ask(sys.stdin.read().rstrip("\n"))
    elif interactive:
        note("/help lists commands; Ctrl-D ends")
        _interactive(conversation)
    else:
        for line in sys.stdin:
            if not conversation.take(line.rstrip("\n")):
                return


def _interactive(conversation: Conversation) -> None:
    import readline  # noqa: F401  (lets input() edit and repeat lines)

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D ends")
            continue
        try:
            if not conversation.take(line):
                return
        except UserError as error:  # the next message may be better
            note(str(error))
