"""The weights of a model's folder, read into a model on the meta device: one part after another, and of each parameter
only the rows that this process keeps, straight into its type.

    model, weights = build.skeleton(folder)             # no parameter has memory yet
    part.to_empty(device="cpu")
    weights(part, global_name)                          # what the engines call `fill`

Names and layouts in files are those of transformers, which renames some families' weights and stores experts one by
one. Its own rules (`get_model_conversion_mapping`) say what becomes of a tensor, so that the values are bit for bit
those of `from_pretrained`.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.core.errors import UserError
from pipeline.models import model_files

Fill = Callable[[torch.nn.Module, Callable[[str], str]], None]
"""fill(part, global_name): gives the parameters of a part of a model their values. global_name: name inside the part ->
name in the whole model."""


def keep_rows(parameter: torch.nn.Parameter, dim: int, start: int, stop: int) -> None:
    """Note that of a parameter only these indices of a dimension will be used, so that the others need not be read."""
    parameter.kept_rows = (dim, start, stop)


def kept_rows(parameter: torch.Tensor) -> tuple[int, int, int]:
    """(dimension, first index, end) of what is used of a parameter."""
    return getattr(parameter, "kept_rows", (0, 0, len(parameter) if parameter.dim() else 1))


@dataclass
class Source:
    """Where the values of a parameter, or of several that are converted together, are: names of tensors in files."""

    target: str
    """The parameter's name; of several the first one's."""
    tensors: dict[str, list[str]] = field(default_factory=dict)
    """By pattern of transformers' converter, in the order that it expects."""
    converter: object | None = None
    """transformers' WeightConverter; None: there is one tensor, which is the parameter."""


class FolderWeights:
    """Fills a model like `skeleton` from the files in a folder. Raises UserError for a folder without some of its
    weights; `optional` may be missing and start with the family's initial values, drawn from `seed`.

    new_rows: id of a token that the folder's model does not have -> ids of the tokens that its text was before
    (models/vocabulary.py). `then`: what is done with a part after it was read, in this order.
    """

    def __init__(self, folder: Path, skeleton, seed: int = 0, optional: Collection[str] = ()):
        self.folder, self.skeleton, self.seed = folder, copy.deepcopy(skeleton), seed
        self.shapes = {name: value.shape for name, value in self.skeleton.state_dict().items()}
        self.tables = _tables(self.skeleton)
        self.new_rows: dict[int, list[int]] = {}
        self.then: list[Fill] = []
        self.files: dict[str, Path] = {}
        for path in model_files.weight_files(folder):
            self.files |= dict.fromkeys(model_files.tensors(path), path)
        self.sources = _sources(self.skeleton, self.shapes, self.files)
        self.ties = _ties(self.skeleton)
        missing = [name for name in self.shapes if self._source(name) is None and name not in optional]
        missing = [name for name in missing if not _may_be_missing(self.skeleton, name)]
        if missing:
            raise UserError(
                f"{folder}: the weights of {', '.join(sorted(missing)[:3])} are missing for a"
                f" {type(skeleton).__name__}; publish the model again, or name another folder"
            )

    def has_two_tables(self) -> bool:
        """Whether the files have both of two weights that the configuration ties. transformers compares them and ties
        them only if they are equal."""
        return any(name in self.sources and other in self.sources for name, other in self.ties.items())

    def __call__(self, part: torch.nn.Module, global_name: Callable[[str], str] = str) -> None:
        """Fill a part, which has memory with any content. Its types may differ from those in the files."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            self._initialise(part, global_name)
            read = Files(self.files, stack)
            converted: dict[str, torch.Tensor] = {}
            tensors = dict(part.named_parameters(remove_duplicate=False)) | dict(part.named_buffers())
            for inner, tensor in tensors.items():
                name = global_name(inner)
                if name not in self.shapes or self._source(name) is None:
                    continue
                self._fill_tensor(name, tensor, read, converted)
        for step in self.then:
            step(part, global_name)

    def _source(self, name: str) -> Source | None:
        """Where a parameter's values are; those of a tied one may be under the other's name."""
        return self.sources.get(name) or self.sources.get(self.ties.get(name, ""))

    def _initialise(self, part: torch.nn.Module, global_name: Callable[[str], str]) -> None:
        """What is computed and in no file, such as rotary frequencies, and what is missing in them. transformers' own
        functions fill a module at a time; parameters that are in the files are read over it afterwards."""
        with torch.random.fork_rng(devices=[]):
            for prefix, module in part.named_modules():
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                names = [global_name(f"{prefix}.{name}".removeprefix(".")) for name, _ in own]
                if any(self._source(name) is None for name in names if not name.endswith(ADDED)):
                    torch.manual_seed(self.seed)
                    self.skeleton._init_weights(module)

    def _fill_tensor(self, name: str, tensor: torch.Tensor, read: "Files", converted: dict) -> None:
        source, shape = self._source(name), self.shapes[name]
        dim, start, stop = kept_rows(tensor)
        if source.converter is not None:
            self._fill_converted(name, source, tensor, read, converted)
            return
        (keys,) = source.tensors.values()
        found = read.shape(keys[0])
        if found != list(shape):
            raise UserError(
                f"{self.folder}: {keys[0]} has the shape {found}, and the model has {list(shape)} for {name}; give the"
                " configuration that belongs to these weights"
            )
        if not tensor.dim():
            tensor.copy_(read.rows(keys[0]))
            return
        if name in self.tables:
            stop = min(stop, shape[0])  # new rows follow
        if start < stop:
            tensor.narrow(dim, start, stop - start).copy_(read.rows(keys[0], dim, start, stop))
        if name in self.tables and len(tensor) > shape[0]:
            tensor[shape[0] :].zero_()
        if name in self.tables:
            self._fill_new_rows(keys[0], tensor, read)

    def _fill_new_rows(self, key: str, tensor: torch.Tensor, read: "Files") -> None:
        _, start, stop = kept_rows(tensor)
        for index, parts in self.new_rows.items():
            if start <= index < stop:
                rows = torch.cat([read.rows(key, 0, part, part + 1) for part in parts])
                tensor[index] = rows.float().mean(0)

    def _fill_converted(self, name: str, source: Source, tensor: torch.Tensor, read: "Files", converted: dict):
        dim, start, stop = kept_rows(tensor)
        if _merges_experts(source, self.shapes[name], read) and dim == 0:
            chosen = {pattern: keys[start:stop] for pattern, keys in source.tensors.items()}
            if start < stop:
                values = self._convert(source, chosen, read)
                tensor[start:stop].copy_(values[name])
            return
        if name not in converted:
            converted |= self._convert(source, source.tensors, read)
        tensor.narrow(dim, start, stop - start).copy_(converted.pop(name).narrow(dim, start, stop - start))

    def _convert(self, source: Source, tensors: dict[str, list[str]], read: "Files") -> dict[str, torch.Tensor]:
        """transformers' conversion of some tensors: parameter's name -> value."""
        from concurrent.futures import Future

        converter = copy.deepcopy(source.converter)
        for pattern, keys in tensors.items():
            for key in keys:
                value: Future = Future()
                value.set_result(read.rows(key))
                converter.add_tensor(source.target, key, pattern, value)
        values = converter.convert(source.target, model=self.skeleton, config=self.skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


ADDED = (".lora_A", ".lora_B", ".lora_magnitude")  # parameters that no folder has (models/lora.py)


class Files:
    """Tensors of safetensors files, which are open until `stack` is closed."""

    def __init__(self, files: dict[str, Path], stack: contextlib.ExitStack):
        self.files, self.stack = files, stack
        self.handles: dict[Path, object] = {}

    def _slice(self, key: str):
        from safetensors import safe_open

        path = self.files[key]
        if path not in self.handles:
            self.handles[path] = self.stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        return self.handles[path].get_slice(key)

    def shape(self, key: str) -> list[int]:
        return list(self._slice(key).get_shape())

    def rows(self, key: str, dim: int = 0, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Indices start to stop of a dimension of a tensor, by default all."""
        if start is None:
            return self._slice(key)[...]
        return self._slice(key)[(slice(None),) * dim + (slice(start, stop),)]


def _sources(model, shapes: dict, keys) -> dict[str, Source]:
    """Where the values of each parameter are, by its name, as transformers' `from_pretrained` finds them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, Source] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = rename_source_key(key, [], [], prefix, shapes)
        if name not in shapes:
            continue  # of another head, or superfluous; from_pretrained ignores it too
        if pattern is None:
            sources[name] = Source(name, {"": [key]})
            continue
        converter = by_pattern[pattern]
        source = sources.setdefault(name, Source(name, {}, converter))
        source.tensors.setdefault(pattern, []).append(key)
        for target in converter.target_patterns[1:]:
            sources[name.replace(converter.target_patterns[0], target)] = source
    return sources


def _ties(model) -> dict[str, str]:
    """Names of tied parameters -> names of the other one, in both directions."""
    ties = dict(model.all_tied_weights_keys)
    return ties | {other: name for name, other in ties.items()}


def _tables(model) -> set[str]:
    """Names of the parameters that have a row for each token."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if any(module is table for table in modules)
        for key, _ in module.named_parameters(recurse=False)
    }


def _may_be_missing(model, name: str) -> bool:
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _merges_experts(source: Source, shape: torch.Size, read: Files) -> bool:
    """Whether a parameter [experts, ...] is stacked of one tensor for each expert, so that some can be left out."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = source.converter.operations
    if not (isinstance(first, MergeModulelist) and first.dim == 0 and len(shape) == 3):
        return False
    if not all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others):
        return False
    is_each = all(len(keys) == shape[0] for keys in source.tensors.values())
    return is_each and all(len(read.shape(keys[0])) == 2 for keys in source.tensors.values())
