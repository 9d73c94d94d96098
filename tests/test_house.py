"""Who may import whom, what must be installed, and what pages name; the files are only read."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import accelerate  # noqa: F401 -- of these what stands at the top is public
import transformers  # noqa: F401

from lib.run.flags import build_parser

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "lib"
# every entry imports from lower floors only
FLOORS = [
    ["util"],
    ["distributed", "packed"],
    ["data", "methods"],
    ["model"],
    ["pruning"],
    ["eval", "prune", "sharded"],
    ["quantize", "remove"],
    ["sparse", "vocabulary"],
    ["recover"],
    ["run"],
    ["main"],
    ["commands"],
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# packages for some uses, or in an environment of their own
OPTIONAL = """
triton lm_eval llmcompressor conversion convert_hf_to_gguf gguf xllamacpp ua_gec mlx mlx_lm onnx
onnxruntime onnxruntime_genai
""".split()

# What lib/ touches of other packages beside their public names: {test file that fails first where
# it changes: {module that has it: its names}}. `test_private_names_are_listed` finds others.
PRIVATE = {
    "tests/test_matrix.py": {
        "transformers.modeling_utils": "_get_dtype_plan _keep_in_fp32_modules_strict",
    },
    "tests/model/test_access.py": {"transformers.configuration_utils": "_commit_hash"},
    "tests/model/test_blocks.py": {"transformers.modeling_utils": "_no_split_modules"},
    "tests/model/test_linears.py": {"torch.nn.modules.conv": "_ConvNd"},
    "tests/model/test_quantized.py": {
        "transformers.quantizers.base": "get_keys_to_not_convert",
        "bitsandbytes.nn.modules": "support_avx512bf16_for_cpu",
    },
    "tests/model/test_store.py": {
        "accelerate.big_modeling": "hf_device_map",
        "accelerate.hooks": "_hf_hook weights_map ModelHook add_hook_to_module "
        "remove_hook_from_module",
        "accelerate.utils.offload": "dataset index",
        "transformers.core_model_loading": "offload_weight revert_weight_conversion",
        "transformers.integrations.accelerate": "safetensors_file weight_name",
    },
    "tests/run/test_vision.py": {
        "torch._subclasses.fake_tensor": "FakeTensorMode",
        "transformers.models.auto.auto_factory": "_model_mapping",
        "transformers.utils.hub": "cached_file",
    },
    "tests/data/test_chats.py": {
        "transformers.utils.chat_template_utils": "render_jinja_template",
    },
    "tests/data/test_dates.py": {
        "transformers.utils.chat_template_utils": "_compile_jinja_template",
    },
    "tests/commands/test_demo.py": {
        "transformers.tokenization_utils_tokenizers": "_tokenizer",
    },
    "tests/packed/test_checkpoint.py": {
        "transformers.core_model_loading": "WeightConverter _weight_conversions",
        "transformers.quantizers.auto": "AUTO_QUANTIZATION_CONFIG_MAPPING AUTO_QUANTIZER_MAPPING "
        "register_quantization_config register_quantizer",
        "transformers.quantizers.base": "HfQuantizer _process_model_before_weight_loading "
        "_process_model_after_weight_loading _dequantize get_state_dict_and_metadata",
        "transformers.utils.quantization_config": "QuantizationConfigMixin",
    },
    "tests/packed/test_linear.py": {
        "torch.nn.modules.module": "_apply _buffers _load_from_state_dict _parameters",
        "torch.utils._pytree": "tree_leaves tree_map",
    },
    "tests/gguf/test_llama_cpp.py": {
        "conversion": "get_model_class",
        "conversion.base": "get_model_architecture get_vocab_base_pre load_hparams modify_tensors",
        "gguf.constants": "MODEL_ARCH_NAMES",
        "gguf.tensor_mapping": "get_tensor_name_map",
    },
    "tests/gguf/test_grids.py": {
        "conversion.base": "tensor_force_quant",
        "gguf.gguf_writer": "add_file_type",
    },
    "tests/export/test_export.py": {
        "onnxruntime.quantization.matmul_nbits_quantizer": "DefaultWeightOnlyQuantizer "
        "get_initializer quantize_matmul",
        "onnxruntime_genai.models.builder": "create_model parse_extra_options",
    },
}
GUARDED = "transformers accelerate gguf conversion onnxruntime onnxruntime_genai".split()
NAMED_TUPLES = {"_asdict", "_fields"}  # public by Python's own documentation


def sources(*folders: str) -> list[Path]:
    return [ROOT / "main.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those inside functions and for the type checker too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = file.relative_to(ROOT).parts[: -node.level] or ("lib",)  # main.py's
                module = ".".join([*package, *filter(None, [node.module])])
            whole = module == "lib"  # from lib import prune
            yield from ((node.lineno, f"lib.{n.name}" if whole else module) for n in node.names)


def test_modules_of_lib_import_each_other_relatively() -> None:
    """So that they work under any name: `lib` in a checkout, `langprune` once installed."""
    wrong = []
    for file in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            wrong += [f"{file}:{node.lineno}" for one in names if one.split(".")[0] == "lib"]
    assert not wrong, wrong


def test_imports_go_down() -> None:
    wrong = []
    for file in sources("lib"):
        here = file.relative_to(LIB).parts[0].removesuffix(".py") if LIB in file.parents else "main"
        for line, module in imports(file):
            there = module.split(".")[1] if module.startswith("lib.") else module
            if there != here and FLOOR_OF.get(here, -1) <= FLOOR_OF.get(there, -2):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_is_required() -> None:
    text = (ROOT / "requirements.txt").read_text("utf-8").lower().replace("_", "-")
    required = set(re.findall(r"(?m)^[\w.-]+", text))
    known = {"lib", "main", "tests", *OPTIONAL, *sys.stdlib_module_names}
    known |= {file.stem for name in ("tests", "benchmarks") for file in (ROOT / name).rglob("*.py")}
    owners, missing = metadata.packages_distributions(), set()
    for file in sources("lib", "tests", "benchmarks"):
        for line, module in imports(file):
            top = module.partition(".")[0]
            names = {name.lower().replace("_", "-") for name in owners.get(top, [top])}
            if top not in known and not names & required:
                missing.add(f"{file.relative_to(ROOT)}:{line} imports {top}")
    assert not missing, "not in requirements.txt: " + "; ".join(sorted(missing))


def listed() -> Iterator[tuple[str, str, str]]:
    """Yield test file, module and name of all in PRIVATE."""
    for test, modules in PRIVATE.items():
        yield from ((test, module, n) for module, names in modules.items() for n in names.split())


def test_private_names_are_listed() -> None:
    used, defined, deep = {}, set(NAMED_TUPLES), {}
    for file in sources("lib"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                stored = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
                (defined.add if stored else names.append)(node.attr)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [each.name for each in node.names]
                package, *inside = (node.module or "").split(".")
                if package in GUARDED and inside:
                    top = sys.modules.get(package)
                    deep |= {n: f"{file}:{node.lineno}" for n in names if not hasattr(top, n)}
            elif isinstance(node, ast.Call):  # getattr(model, "_name"), mock.patch.object(...)
                names = [each.value for each in node.args[1:2] if isinstance(each, ast.Constant)]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            places = dict.fromkeys(map(str, names), f"{file}:{getattr(node, 'lineno', 0)}")
            used |= {name: at for name, at in places.items() if re.fullmatch(r"_[a-z]\w*", name)}
    known = {name for _, _, name in listed()} | {m.rpartition(".")[2] for _, m, _ in listed()}
    wrong = {name: at for name, at in (used | deep).items() if name not in known | defined}
    assert not wrong, f"private names that PRIVATE does not list: {wrong}"


def test_private_names_are_there() -> None:
    """In the installed versions; otherwise the test named beside them tells what breaks."""
    text = "\n".join(file.read_text("utf-8") for file in sources("lib"))
    for test, module, name in listed():
        assert (ROOT / test).is_file() and re.search(rf"\b{name}\b", text), (test, name)
        package, *inside = module.split(".")
        found = find_spec(package)
        if not found or not found.origin:  # for some uses, or only a folder of tests (gguf)
            continue
        place = Path(found.origin).parent.joinpath(*inside)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        there = file.is_file() and re.search(rf"\b{name}\b", file.read_text("utf-8"))
        assert there, f"{module} has no {name} any more: see {test}"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    heads = [re.sub(r"\]\([^)]*\)", "", head) for head in re.findall(r"(?m)^#+ (.+)", text)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_name_flags_and_files_that_exist() -> None:
    known = vars(build_parser().parse_args(["--model", "m"]))
    programs = [*sources("lib"), *(ROOT / "benchmarks").rglob("*.py")]
    options = {  # strings that may name a flag
        flag for file in programs for flag in re.findall(r'"-*(\w[\w-]*)"', file.read_text("utf-8"))
    }
    others = {"help", "no-deps", "target"}  # of pip, and of torchrun, accelerate and wanda
    others |= {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    others |= {"multi_gpu", "num_processes", "eval_zero_shot"}
    started = r"(?:main\.py|(?:launch\.sh|langprune) prune) ([^`|#\n]*)"
    wrong = []
    folders = "lib", "docs", "benchmarks"
    for page in (*ROOT.glob("*.md"), *(file for f in folders for file in ROOT.glob(f"{f}/**/*.*"))):
        if page.suffix not in (".md", ".py") or page.name == "CHANGELOG.md":
            continue
        text = page.read_text("utf-8").replace("\\\n", " ")
        flags = re.findall(r"(?<!\S)--(\w+)", " ".join(re.findall(started, text)))
        wrong += [f"{page}: --{flag}" for flag in flags if flag not in known]
        if page.suffix != ".md":
            continue
        if ROOT / "docs" in page.parents:  # the flags of any command
            named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
            wrong += [f"{page}: --{flag}" for flag in sorted(named - options - others)]
        for link, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
            file = page.parent / link if link else page
            if not file.exists() or anchor and anchor not in slugs(file):
                wrong.append(f"{page}: {link}#{anchor}")
    assert not wrong, "\n".join(wrong)
