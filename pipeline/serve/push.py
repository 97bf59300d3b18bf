"""`alma push`: an exported model as a repository of the Hugging Face hub, or of ModelScope.

What is uploaded is the content of the output, which its manifest hashes, and the card: no logs, no manifests, no paths
of this machine.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import UserError
from pipeline.core.optional_packages import require
from pipeline.core.terminal import byte_size, plural, show
from pipeline.models.downloads import is_of_the_network
from pipeline.models.references import REPOSITORY
from pipeline.serve.target import resolve

CARD = "README.md"
MODELSCOPE = "modelscope:"  # as in names of models (models/references.py)


@dataclass(frozen=True)
class Upload:
    """Files of a folder, by their names in the repository."""

    folder: Path
    files: list[str]

    @property
    def size(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def upload_of(target: str) -> Upload:
    """What of a stage's output, or of a folder, is uploaded. Raises UserError for one that has no model, is damaged, or
    is an adapter, whose base is a path of this machine."""
    found = resolve(target)
    if (found.folder / "adapter_config.json").is_file():
        raise UserError(f"{found.title}: is an adapter; run stage export, which merges it, and push that")
    files = [path.relative_to(found.folder).as_posix() for path in artifact.content_files(found.folder)]
    if (found.folder / CARD).is_file():
        files.append(CARD)
    return Upload(found.folder, sorted(files))


def run(target: str, repository: str, private: bool, dry_run: bool) -> None:
    """Create the repository if there is none, and upload in one commit. repository: ORG/NAME of the Hugging Face hub,
    or modelscope:ORG/NAME. Raises UserError."""
    is_modelscope = repository.startswith(MODELSCOPE)
    plain_name = repository.removeprefix(MODELSCOPE)
    if not REPOSITORY.fullmatch(plain_name):
        raise UserError(f"{repository}: is not the name of a repository; expected ORG/NAME, or modelscope:ORG/NAME")
    if is_modelscope:
        require("modelscope", repository)
    upload = upload_of(target)
    for name in upload.files:
        show(f"  {byte_size((upload.folder / name).stat().st_size):>10}  {name}")
    if CARD not in upload.files:
        show(f"WARNING: there is no {CARD}, the model's card; the output of stage export has one")
    total = f"{plural(len(upload.files), 'file')}, {byte_size(upload.size)}"
    if dry_run:
        show(f"would push {total} to {repository}; nothing was sent")
        return
    push = _push_to_modelscope if is_modelscope else _push
    show(f"pushed {total} to {push(upload, plain_name, private)}")


def _push(upload: Upload, repository: str, private: bool) -> str:
    """The address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=upload.folder,
            allow_patterns=upload.files,
            commit_message="Upload with alma",
        )
    except LocalTokenNotFoundError:
        raise UserError("the hub asks who you are; run hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise UserError(
                f"{repository}: the hub refuses it ({code}); run hf auth login, or set HF_TOKEN to a token that may"
                " write there"
            ) from None
        raise UserError(f"{repository}: the hub answers {code}: {str(error).splitlines()[0][:200]}") from None
    except Exception as error:
        if not is_of_the_network(error):
            raise
        raise UserError(f"{repository}: the hub cannot be reached ({type(error).__name__}); try again") from None
    return commit.commit_url


def _push_to_modelscope(upload: Upload, repository: str, private: bool) -> str:
    """The address of the repository."""
    from modelscope.hub.api import HubApi

    api = HubApi()
    try:
        api.create_repo(repository, visibility="private" if private else "public", exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(upload.folder),
            allow_patterns=upload.files,
            commit_message="Upload with alma",
            use_cache=False,  # else it would leave a file in the published folder
        )
    except Exception as error:
        if not is_of_the_network(error) and not isinstance(error, ValueError):  # that of a missing token
            raise
        reason = " ".join(str(error).split())[:200] or "no message"
        raise UserError(
            f"{repository}: ModelScope cannot be reached or refuses it ({type(error).__name__}: {reason}); run"
            " modelscope login, or set MODELSCOPE_API_TOKEN to a token that may write there"
        ) from None
    return f"{api.endpoint}/models/{repository}"
