"""Upload of an export to the Hugging Face hub, with the user's own token."""

from pathlib import Path

from cap_pretrain.errors import UserError


def check(repo: str, *, token: bool) -> None:
    """Raise UserError if nothing could be uploaded to `repo`, "OWNER/NAME"; sends nothing.

    With `token`, one must be there; it is never shown.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError as e:
        raise UserError(
            "--to: the hub needs the package huggingface_hub; run pip install 'cap_pretrain[hub]'."
        ) from e
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f"--repo: {repo!r} is not a name on the hub, as OWNER/NAME: {e}") from e
    if token and not huggingface_hub.get_token():
        raise UserError(
            "--to: the hub needs a token with write access; run `hf auth login` once, or set the "
            "variable HF_TOKEN."
        )


def listing(folder: Path) -> list[tuple[str, int]]:
    """Return the files of an export, as paths inside it, and their bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def upload(folder: Path, repo: str) -> str:
    """Upload the files of `listing` as one commit; return the URL of the repository.

    A repository that does not exist is created as a private one. Raises UserError if the hub
    refuses or cannot be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload from cap_pretrain"
        )
    except Exception as e:  # the library lets errors of its HTTP client pass, which vary
        reason = str(e).strip().split("\n")[-1] or type(e).__name__
        reason = reason.replace(huggingface_hub.get_token() or "\0", "…")
        raise UserError(f"--repo: the hub did not take the files for {repo!r}: {reason}") from e
    return str(url)
