"""The pruning methods by name: one class, one line here. Importing this file imports no torch.

A method's class extends `PruningMethod` of lib/methods/base.py, which documents its hooks. A class
in a user's file is named FILE.py:CLASS, and imports `langprune.methods.base`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..util.errors import UserError, first_line
from .sparsity import EXPERTS, NEURONS, UNSTRUCTURED

if TYPE_CHECKING:
    from .base import PruningMethod

METHODS = {
    "wanda": "wanda:Wanda",
    "sparsegpt": "sparsegpt:SparseGPT",
    "admm": "admm:Admm",
    "ria": "ria:Ria",
    "magnitude": "magnitude:Magnitude",
}
EXPERT_METHODS = {  # for --sparsity_type experts
    "reap": "experts:Reap",
    "contribution": "experts:Contribution",
    "frequency": "experts:Frequency",
    "random": "experts:Random",
}
WITHOUT_NEURONS = ("ria",)  # its paper has no rule for them
HOOKS = {NEURONS: "remove_neurons_", EXPERTS: "scores"}  # other types use prune_
TRUTH = {"true": True, "false": False, "1": True, "0": False}
PACKAGE = __package__.partition(".")[0]


def is_file(name: str) -> bool:
    """Return whether a method's name is FILE.py:CLASS."""
    return ".py:" in name


def split_file(name: str) -> tuple[str, str]:
    """Return FILE.py and CLASS of FILE.py:CLASS."""
    path, _, class_name = name.rpartition(":")
    return path, class_name


def label(name: str) -> str:
    """Return a method's name in tables and file names: for FILE.py:CLASS only the class."""
    return name.rpartition(":")[2]


def method_of(
    name: str | type[PruningMethod],
    variant: bool = False,
    arguments: Sequence[str] | Mapping[str, Any] | None = None,
    kind: str = "",
) -> type[PruningMethod]:
    """Return a method's class, to be called with (width, device); importing it imports torch.

    `variant`: Wanda's --use_variant. `arguments`: NAME=VALUE each, or a mapping, which replace the
    class's values. `kind`: the --sparsity_type. Raises UserError for an invalid file, class or
    argument, or if the class lacks the hook of `kind`.
    """
    if isinstance(name, type):
        method, name = name, name.__name__
    elif is_file(name):
        path, class_name = split_file(name)
        method = _from_file(path, class_name, Path(path).exists() and Path(path).stat().st_mtime_ns)
    else:
        every = METHODS | EXPERT_METHODS
        if name not in every:
            fix = f"Name {', '.join(every)} or FILE.py:CLASS"
            raise UserError(f"method {name}", "it does not exist", fix)
        module, class_name = every[name].split(":")
        method = getattr(import_module(f".{module}", __package__), class_name + "Variant" * variant)
    if kind and not _has(method, HOOKS.get(kind, "prune_")):
        fix = "Define it" if is_file(name) else f"Use {{--sparsity_type}} {UNSTRUCTURED}"
        problem = f"{{--prune_method}} {name} does not define {HOOKS.get(kind, 'prune_')}"
        raise UserError(f"{{--sparsity_type}} {kind}", problem, fix)
    if isinstance(arguments, Mapping):
        arguments = [f"{name}={value}" for name, value in arguments.items()]
    return _with_arguments(method, arguments or ())


def _has(method: type, hook: str) -> bool:
    """Return whether a class has a hook that matches its `prune_`, not one of an overridden class.

    A subclass of Wanda with another score would otherwise remove neurons by Wanda's rule.
    """
    mro = method.__mro__
    owner = {name: next((c for c in mro if name in vars(c)), None) for name in (hook, "prune_")}
    base = next(each for each in mro if each.__name__ == "PruningMethod")
    if owner[hook] is None or getattr(method, hook) is vars(base).get(hook):
        return False
    return hook == "scores" or mro.index(owner[hook]) <= mro.index(owner["prune_"])


@cache
def _from_file(path: str, class_name: str, changed: int) -> type[PruningMethod]:
    """Return a class of the user's file; `changed` is the file's time stamp, a key of the cache."""
    flag = f"{{--prune_method}} {path}:{class_name}"
    if changed is False:
        raise UserError(flag, "no such file exists", "Give the path of a Python file")
    # the user's file imports langprune, which in a checkout is lib
    for file in Path(__file__).parent.glob("*.py"):
        import_module(f".{file.stem}", __package__)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE:
            sys.modules.setdefault("langprune" + name[len(PACKAGE) :], module)
    place = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:8]
    spec = util.spec_from_file_location(f"method_{Path(path).stem}_{place}", path)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # any error of the user's code
        line = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(flag, f"the file cannot be imported ({line})", "Repair it") from error
    base = import_module(".base", __package__).PruningMethod
    classes = [
        name
        for name, each in vars(module).items()
        if isinstance(each, type) and issubclass(each, base) and each.__module__ == module.__name__
    ]
    if class_name not in classes:
        has = ", ".join(classes) or "none"
        raise UserError(
            flag,
            "the file has no such class that extends PruningMethod of langprune.methods.base",
            f"Name one that it has: {has}",
        )
    return getattr(module, class_name)


def parameters(method: type[PruningMethod]) -> dict[str, Any]:
    """Return the parameters that a class and its bases declare, with their values."""
    base = next(each for each in method.__mro__ if each.__name__ == "PruningMethod")
    names = [name for each in reversed(method.__mro__) for name in vars(each)]
    return {
        name: getattr(method, name)
        for name in dict.fromkeys(names)
        if not name.startswith("_") and not hasattr(base, name)
        if isinstance(getattr(method, name), (bool, int, float, str))
    }


def _with_arguments(method: type[PruningMethod], given: Sequence[str]) -> type[PruningMethod]:
    """Return a class with other parameter values, given as NAME=VALUE each."""
    declared, values = parameters(method), {}
    for each in given:
        name, equals, text = each.partition("=")
        if not equals or name not in declared:
            has = ", ".join(f"{name}={value}" for name, value in declared.items()) or "none"
            problem = f"{method.__name__} has no such parameter"
            fix = f"Give NAME=VALUE of these: {has}"
            raise UserError(f"{{--method_args}} {each}", problem, fix)
        kind = type(declared[name])
        try:
            values[name] = TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            fix = f"Give a value such as {name}={declared[name]}"
            problem = f"its type is not {kind.__name__}"
            raise UserError(f"{{--method_args}} {each}", problem, fix) from error
    module = {"__module__": method.__module__}
    return type(method.__name__, (method,), module | values) if values else method
