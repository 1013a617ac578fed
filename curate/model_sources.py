"""Where a model comes from: open_clip by name, the Hugging Face Hub, timm, or files of one's own.

open_clip and timm take seconds to import and are imported inside the functions.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from curate.checkpoints import file_sha256, load_strictly, read_state_dict
from curate.errors import ModelError
from curate.model_download import building, downloading

logger = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
DEFAULT_TAGS = {"ViT-B-32": "laion2b_s34b_b79k"}
RANDOM = ("random", "none")
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Network:
    """A model with its preprocessing, on the CPU; `identity` is what its results depend on."""

    module: torch.nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor] | None
    width: int
    identity: Mapping[str, Any]


def build_network(model: str, pretrained: str | None = None, *, precision: str = "fp32") -> Network:
    """Return the model of that name with its weights; see `curate.encoder.load_encoder`.

    Raises
    ------
    ModelError
        If the model or its weights are not known, cannot be downloaded or do not fit.
    """
    if model.startswith("timm:"):
        return _timm_network(model.removeprefix("timm:"), pretrained, precision)
    import open_clip

    if model.startswith("hf-hub:"):
        return _hub_network(model, pretrained, precision)
    # OpenAI writes "ViT-B/32", open_clip "ViT-B-32".
    name = model.replace("/", "-")
    if name in open_clip.list_models():
        return _named_network(name, pretrained, precision)
    path = Path(model.removeprefix("local-dir:"))
    if path.exists():
        return _local_network(path, pretrained, precision)
    raise _unknown_model(model, open_clip.list_models())


def _named_network(name: str, pretrained: str | None, precision: str) -> Network:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    weights = _choose_weights(name, pretrained, tags)
    config = open_clip.get_model_config(name)
    if isinstance(weights, str):
        tag = open_clip.get_pretrained_cfg(name, weights)
        # QuickGELU weights give wrong vectors in the plain model; open_clip only warns.
        quick_gelu = bool(tag.get("quick_gelu"))
        twin = f"{name}-quickgelu" if quick_gelu and not config.get("quick_gelu") else name
        with downloading(f"{name}:{weights}", repository=tag.get("hf_hub", ""), use_model=twin):
            module, transform = open_clip.create_model_from_pretrained(
                name, weights, precision=precision, force_quick_gelu=quick_gelu
            )
            tokenizer = open_clip.get_tokenizer(name)
        config["quick_gelu"] = quick_gelu or config.get("quick_gelu", False)
        return _open_clip_network(module, transform, tokenizer, config, f"{name}:{weights}")
    preprocess = _usual_preprocess(name, tags, warn=weights is not None)
    with _parts_of(name, config):
        module, source = _with_weights(name, weights, precision, force_preprocess_cfg=preprocess)
        tokenizer = open_clip.get_tokenizer(name)
    return _open_clip_network(module, None, tokenizer, config, source)


def _hub_network(model: str, pretrained: str | None, precision: str) -> Network:
    import open_clip

    if pretrained is not None:
        raise ModelError(f"{model} brings its own weights; leave out --pretrained {pretrained}")
    with downloading(model, repository=model.removeprefix("hf-hub:")):
        module, transform = open_clip.create_model_from_pretrained(model, precision=precision)
        tokenizer = open_clip.get_tokenizer(model)
        config = open_clip.get_model_config(model)
    return _open_clip_network(module, transform, tokenizer, config, model)


def _local_network(path: Path, pretrained: str | None, precision: str) -> Network:
    config_path = path / CONFIG_FILE if path.is_dir() else path
    config, preprocess = _read_config(config_path)
    if pretrained is None and path.is_dir():
        weights: Path | None = _weights_in(path)
    elif pretrained is None:
        raise ModelError(
            f"{path} describes a model but names no weights; give --pretrained FILE.safetensors"
        )
    else:
        weights = None if pretrained in RANDOM else Path(pretrained)
    # open_clip builds from a folder of its own layout without touching its global list of models.
    with tempfile.TemporaryDirectory() as folder, _parts_of(str(path), config):
        layout = {"model_cfg": config, "preprocess_cfg": preprocess}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(layout), encoding="utf-8")
        try:
            module, source = _with_weights(
                f"local-dir:{folder}", weights, precision, load_weights=False
            )
        except (TypeError, KeyError, AttributeError, AssertionError) as error:
            raise ModelError(
                f"open_clip cannot build the model of {config_path}: {error}"
            ) from error
        tokenizer = _local_tokenizer(config["text_cfg"], config_path.parent)
    return _open_clip_network(module, None, tokenizer, config, source)


def _open_clip_network(
    module: Any, transform: Any, tokenizer: Any, config: Mapping[str, Any], source: str
) -> Network:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = module.visual.preprocess_cfg
    identity = {
        "library": "open_clip",
        "config": dict(config),
        "weights": source,
        "preprocess": preprocess,
    }
    if transform is None:
        transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return Network(module, transform, tokenizer, int(config["embed_dim"]), identity)


def _with_weights(
    name: str, weights: Path | None, precision: str, **options: Any
) -> tuple[torch.nn.Module, str]:
    """Build an open_clip model and fill it from a file, or leave it as seeded."""
    import open_clip

    state = None if weights is None else read_state_dict(weights)
    with _seeded():
        module: torch.nn.Module = open_clip.create_model(
            name, precision=precision, pretrained_text=False, **options
        )
    if weights is None or state is None:
        return module, _untrained()
    load_strictly(module, _current_layout(module, state), source=str(weights))
    return module, _file_source(weights)


def _current_layout(
    module: torch.nn.Module, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Rename what older versions of open_clip wrote; no number changes."""
    from open_clip.model import convert_to_custom_text_state_dict

    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    own = module.state_dict()
    for name in ("logit_scale", "logit_bias"):  # a scalar in some versions, one element in others
        if name in state and name in own and state[name].numel() == own[name].numel():
            state[name] = state[name].reshape(own[name].shape)
    position_ids = "text.transformer.embeddings.position_ids"
    if position_ids not in own:  # a constant that transformers < 4.31 saved
        state.pop(position_ids, None)
    return state


def _timm_network(name: str, pretrained: str | None, precision: str) -> Network:
    import timm

    on_hub = name.startswith("hf-hub:")
    if not on_hub and not timm.is_model(name):
        raise _unknown_model(name, timm.list_models(), prefix="timm:")
    architecture = name.partition(".")[0]
    full = [] if on_hub else timm.list_pretrained(f"{architecture}.*")
    tags = [entry.partition(".")[2] for entry in full]
    weights: str | Path | None
    if pretrained is None and (on_hub or "." in name or tags):
        weights = "default"
    else:
        weights = _choose_weights(f"timm:{name}", pretrained, tags)
        name = f"{architecture}.{weights}" if isinstance(weights, str) else name
    download = isinstance(weights, str)
    state = read_state_dict(weights) if isinstance(weights, Path) else None
    with downloading(f"timm:{name}") if download or on_hub else building(), _seeded():
        module = timm.create_model(name, pretrained=download, num_classes=0).eval()
    cfg = module.pretrained_cfg
    if state is not None:
        classifier = cfg.get("classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        # The file may be a classifier's; the encoder ends before the classes.
        dropped = tuple(f"{head}." for head in heads)
        own = module.state_dict()
        state = {k: v for k, v in state.items() if k in own or not k.startswith(dropped)}
        load_strictly(module, state, source=str(weights))
    if download:
        source = f"timm:{name}" if on_hub else f"timm:{cfg['architecture']}.{cfg.get('tag', '')}"
    else:
        source = _file_source(weights) if isinstance(weights, Path) else _untrained()
    data = timm.data.resolve_model_data_config(module)
    with torch.inference_mode():
        width = module(torch.zeros(1, *data["input_size"])).shape[-1]
    module.to(dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))
    transform = timm.data.create_transform(**data, is_training=False)
    identity = {"library": "timm", "config": architecture, "weights": source, "preprocess": data}
    return Network(module, transform, None, width, identity)


def _choose_weights(name: str, pretrained: str | None, tags: list[str]) -> str | Path | None:
    """Return a tag, a file, or None for an untrained model."""
    pretrained = pretrained or DEFAULT_TAGS.get(name) or (tags[0] if len(tags) == 1 else None)
    if pretrained in RANDOM:
        return None
    if pretrained in tags:
        return pretrained
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    known = f"known: {', '.join(tags)}" if tags else "no weights are published for it"
    if pretrained is None:
        raise ModelError(f"{name} needs --pretrained TAG or FILE.safetensors; {known}")
    close = get_close_matches(pretrained, tags, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ModelError(
        f"--pretrained {pretrained!r} is neither a file nor a tag of {name}{hint}; {known}"
    )


def _usual_preprocess(name: str, tags: list[str], *, warn: bool) -> dict[str, Any]:
    """Return the preprocessing of most published weights of that model.

    A file does not say how its images were prepared, and open_clip's default is wrong for SigLIP
    and others, whose tags carry their own.
    """
    import open_clip

    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    kinds = Counter(tuple((key, cfg.get(key)) for key in _PREPROCESS_KEYS) for cfg in configs)
    if warn and len(kinds) > 1:
        logger.warning("%s: published weights differ in preprocessing; using the commonest", name)
    twin = f"{name}-quickgelu"
    if warn and twin in open_clip.list_models():
        logger.warning(
            "%s: for weights trained with QuickGELU (OpenAI's) use --model %s", name, twin
        )
    return dict(kinds.most_common(1)[0][0]) if kinds else {}


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's and the preprocessing's part of an open_clip configuration."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a readable open_clip model config (JSON): {error}"
        ) from error
    content = content if isinstance(content, dict) else {}
    config = content.get("model_cfg", content)
    preprocess = content.get("preprocess_cfg", {})
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ModelError(f"{path} is not an open_clip model config: {', '.join(missing)} missing")
    return {k: v for k, v in config.items() if k != "preprocess_cfg"}, preprocess


def _weights_in(folder: Path) -> Path:
    for name in ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"{folder} has {len(found)} .safetensors files; say which with --pretrained FILE"
    )


def _local_tokenizer(text: Mapping[str, Any], folder: Path) -> Any:
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = dict(text.get("tokenizer_kwargs", {}))
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **options)
    source = str(folder) if (folder / "tokenizer.json").is_file() else name
    mode = text.get("tokenizer_mode")
    return HFTokenizer(source, context_length=length, tokenizer_mode=mode, **options)


def _unknown_model(model: str, known: list[str], *, prefix: str = "") -> ModelError:
    by_lower = {name.lower(): name for name in known}
    close = [by_lower[name] for name in get_close_matches(model.lower(), by_lower, n=3, cutoff=0.5)]
    hint = f" Close: {', '.join(prefix + name for name in close)}." if close else ""
    library = "timm" if prefix else "open_clip"
    return ModelError(
        f"--model {prefix}{model} is not a model of {library}"
        + ("." if prefix else ", nor a config file or folder.")
        + f'{hint} List them: python -c "import {library}; print({library}.list_models())"'
        + ("" if prefix else "; others: timm:NAME, hf-hub:ORG/NAME")
    )


def _parts_of(name: str, config: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Ask the hub only for a model whose text tower or tokenizer lies there."""
    text = config["text_cfg"]
    remote = "hf_model_name" in text or "hf_tokenizer_name" in text or "siglip" in name.lower()
    return downloading(f"the text model or tokenizer of {name}") if remote else building()


@contextmanager
def _seeded() -> Iterator[None]:
    """Give the initial parameters a seed of their own and leave the caller's random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _untrained() -> str:
    logger.warning("the model is untrained (random weights): its embeddings mean little")
    return "random:0"


def _file_source(path: Path) -> str:
    return f"sha256:{file_sha256(path)}"
