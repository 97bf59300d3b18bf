"""The CPU image, built by buildah (no daemon, no Docker) and used: a chain of five stages runs in it as its own user.

The base image comes from its registry, or else Debian's packages are unpacked in its place by mmdebstrap, which shows
that every step of the Dockerfile works, and not that the base image has what it needs. Needs root, buildah, and half an
hour at most; skipped with the reason elsewhere. `ALMA_TEST_IMAGE=1` makes a skip a failure.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from test_package import RECIPE, write_inputs

pytestmark = pytest.mark.slow
BASE = "docker.io/library/python:3.12-slim-bookworm"
PACKAGES = "ca-certificates,python3,python3-venv"
SECONDS = 2400


def skip(reason: str) -> None:
    if os.environ.get("ALMA_TEST_IMAGE"):
        pytest.fail(reason)
    pytest.skip(reason)


class Buildah:
    """buildah with its images and containers in a folder of its own."""

    def __init__(self, folder: Path):
        self.words = ["buildah", "--root", str(folder / "root"), "--runroot", str(folder / "run")]
        self.words += ["--storage-driver", "vfs"]

    def __call__(self, *words, seconds: float = SECONDS, code: int | None = 0, cwd: Path = ROOT) -> str:
        command = [*self.words, *(str(word) for word in words)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=cwd)
        text = answer.stdout + answer.stderr
        assert code is None or answer.returncode == code, f"{' '.join(command)}: {answer.returncode}\n{text[-4000:]}"
        return text if answer.returncode == 0 else f"error: {text}"


@pytest.fixture(scope="module")
def buildah(tmp_path_factory) -> Buildah:
    if not shutil.which("buildah"):
        skip("no buildah; on Debian: apt-get install --no-install-recommends buildah mmdebstrap")
    if os.geteuid() != 0:
        skip("building with chroot needs root")
    return Buildah(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def base(buildah, tmp_path_factory) -> str:
    """Name of the base image."""
    try:
        pulled = buildah("pull", BASE, seconds=120, code=None)
    except subprocess.TimeoutExpired:
        pulled = "error: no answer within 120 s"
    if not pulled.startswith("error: "):
        return BASE
    if not shutil.which("mmdebstrap"):
        skip(f"the registry of {BASE} cannot be reached, and there is no mmdebstrap: {pulled.strip()[-200:]}")
    folder = tmp_path_factory.mktemp("base")
    words = ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder / "base.tar"]
    made = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    if made.returncode:
        skip(f"neither the registry of {BASE} nor a mirror of Debian can be reached: {made.stderr[-300:]}")
    (folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    buildah("bud", "--isolation", "chroot", "--tag", "localhost/base", folder)
    return "localhost/base"


def settings_of_pip(folder: Path) -> list[str]:
    """Options of buildah that give pip in the build the indices and certificates that it has here."""
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    settings, mounted = {}, set()
    for line in answer.stdout.splitlines():
        key, _, value = line.partition("=")
        text = value.strip("'\"").replace("\\n", " ")
        name = key.rpartition(".")[2]
        if name not in ("cert", "constraint", "find-links", "index-url", "extra-index-url"):
            continue
        settings[name] = text
        for word in text.split():
            place = Path(word.removeprefix("file://"))
            if place.is_absolute() and place.exists():
                mounted.add(place.parent if place.name == "simple" else place)  # its files lie beside it
    lines = [f"{name} = {text}\n" for name, text in settings.items()]
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    options = [f"--volume={folder / 'pip.conf'}:/etc/pip.conf:ro"]
    return options + [f"--volume={place}:{place}:ro" for place in sorted(mounted)]


@pytest.fixture(scope="module")
def image(buildah, base, tmp_path_factory) -> str:
    options = ["--isolation", "chroot", "--network", "host", "--format", "docker", "--pull-never"]
    options += settings_of_pip(tmp_path_factory.mktemp("pip"))
    arguments = [f"--build-arg=BASE={base}", "--build-arg=EXTRAS="]
    buildah("bud", *options, *arguments, "--tag", "localhost/alma", "-f", ROOT / "docker/Dockerfile.cpu", ROOT)
    return "localhost/alma"


def test_it_is_started_by_its_own_user_with_alma(buildah, image):
    config = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    assert config["Entrypoint"] == ["alma"] and config["User"] == "1000" and config["WorkingDir"] == "/work"


def test_a_chain_runs_in_it(buildah, image, tmp_path):
    write_inputs(tmp_path)
    assert "run: {processes: 2}" in RECIPE
    for path in (tmp_path, *tmp_path.iterdir()):
        os.chown(path, 1000, 1000)
    tmp_path.chmod(0o755)
    container = buildah("from", "--pull-never", image).split()[-1]
    words = ["run", "--isolation", "chroot", "--volume", f"{tmp_path}:/work", "--env", "OMP_NUM_THREADS=1", container]
    text = buildah(*words, "--", "alma", "run", "mine.yaml")
    assert "logits differ by" in text
    model = tmp_path / "runs/mine/export/current/model.safetensors"
    assert model.is_file() and model.stat().st_uid == 1000
    assert "quickstart" in buildah(*words, "--", "alma", "recipe", "list")
    # any other user, as with `docker run --user`
    other = [*words[:-1], "--user", "12345:12345", container]
    assert "up to date" in buildah(*other, "--", "alma", "status", "mine.yaml")
