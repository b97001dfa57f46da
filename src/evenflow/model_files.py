"""Where a model's files are: a directory, a Hugging Face name, or the built-in demo. Loads no tensor."""

import json
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
METADATA = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_model(model: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """The directory that holds the model's files, downloaded if `model` is a Hugging Face name.

    Raises ValueError that names the cause: no such directory, no such name, no network.
    """
    if model == "demo":
        from evenflow.demo import MODEL_DIR

        return MODEL_DIR
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model directory {model!r} has no config.json; it is no Hugging Face model directory")
        return path
    if path.is_file():
        raise ValueError(f"model {model!r} is a file; pass the Hugging Face model directory that holds config.json")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ValueError(f"model directory {model!r} does not exist (a Hugging Face name has the form owner/name)")
    return _download(model, revision, (*METADATA, *WEIGHTS) if with_weights else METADATA)


def _download(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ValueError(f"model {model!r} is neither a directory nor a Hugging Face name: {error}") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"model {model!r} is not in the local cache and the Hugging Face hub cannot be reached; "
            "check the network, or pass a local directory"
        ) from None
    except HfHubHTTPError as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"the Hugging Face hub refused model {model!r} (revision {revision or 'main'}): {cause}"
        ) from None
    except OSError as error:
        raise ValueError(f"model {model!r} could not be downloaded: {error}; check network and disk") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or {} where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, those that the index names if there is one. Raises ValueError."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map; download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (directory / name).is_file():
                raise ValueError(f"{index.name} names {name!r}, which is not in {directory}; download it again")
        return [directory / name for name in names]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    if pickles := sorted(path.name for pattern in PICKLES for path in directory.glob(pattern)):
        raise ValueError(
            f"{directory} holds only pickle weights ({pickles[0]}), which can run code when loaded; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
        )
    raise ValueError(f"{directory} has no *.safetensors file; use load_format='dummy' for random weights")
