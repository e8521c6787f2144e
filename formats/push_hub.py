"""Uploads an export to the Hugging Face Hub.

check_push("me/lille")                                     # before the work
push({"README.md": card, "lille.gguf": path}, "me/lille", public=False)
"""

from pathlib import Path

from common.errors import MALFORMED_ANSWER, UserError
from formats.pretrained import HUB_ID


def check_push(repo_id: str) -> None:
    """Raises UserError for what is no id of a repository, and when nobody is logged in."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"--push={repo_id}: give the name of a repository, as in user/name")
    if not get_token():
        raise UserError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN")


def files_to_push(target: Path) -> dict[str, Path]:
    """The files of an export, a folder or a file, by their path in the repository."""
    if target.is_file():
        return {target.name: target}
    files = (path for path in sorted(target.rglob("*")) if path.is_file())
    return {path.relative_to(target).as_posix(): path for path in files}


def is_stale(path: str, files: dict[str, Path | str]) -> bool:
    """Whether a file on the hub is of an earlier push of such an export, and not of this one."""
    folders = {name.partition("/")[0] for name in files if "/" in name}
    return path not in files and path.partition("/")[0] in folders and "/" in path


def push(files: dict[str, Path | str], repo_id: str, public: bool) -> str:
    """Uploads files, or texts, in one commit; makes the repository, private unless `public`.

    Graphs and library files of an earlier push are removed; other files there stay. Returns the
    repository's address. Raises UserError when the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    operations = [
        CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)
        for path, content in files.items()
    ]
    try:
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo_id).private:
            raise UserError(f"{repo_id} is public already: add --public, or push to another one")
        stale = [path for path in api.list_repo_files(repo_id) if is_stale(path, files)]
        operations += [CommitOperationDelete(path) for path in stale]
        api.create_commit(repo_id, operations, commit_message="Upload a Lille")
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, *MALFORMED_ANSWER) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = " ".join(str(error).split())
        if status in (401, 403):
            reason = f"HTTP {status}: log in with a token that may write there"
        raise UserError(
            f"cannot push to {repo_id} ({reason[:200]}): the export is kept, run again to retry"
        ) from None
    return str(url)
