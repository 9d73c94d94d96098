"""Who may import whom, what must be installed, and what pages name; the files are only read."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import accelerate  # noqa: F401 -- of these what stands at the top is public
import transformers  # noqa: F401

from lib.run.flags import FLAGS

ROOT = Path(__file__).resolve().parent.parent
LIB = ROOT / "lib"
# every entry imports from lower floors only
FLOORS = [
    ["util", "packed"],
    ["formats"],
    ["data", "methods"],
    ["model"],
    ["calibration", "offload"],
    ["eval", "prune"],
    ["stages"],
    ["sparse", "vocabulary"],
    ["run"],
    ["main", "gguf"],
    ["commands"],
]
EDGES = 75  # at most so many pairs of these, of which one imports from the other
LINES = {  # of each room; they only fall, by at most SLACK before this is brought up to date
    "__init__.py": 3,
    "calibration": 1765,
    "commands": 1306,
    "commands/compare": 670,
    "commands/compress": 902,
    "commands/export": 460,
    "commands/gguf": 213,
    "commands/report": 918,
    "commands/sweep": 320,
    "commands/trim": 1251,
    "data": 2232,
    "eval.py": 237,
    "formats": 579,
    "gguf": 2051,
    "main.py": 92,
    "methods": 1439,
    "model": 2389,
    "offload": 714,
    "packed": 1252,
    "prune.py": 288,
    "run": 3974,
    "sparse.py": 223,
    "stages": 1275,
    "util": 1539,
    "vocabulary": 1851,
}
SLACK = 30
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# packages for some uses, or in an environment of their own
OPTIONAL = """
triton lm_eval llmcompressor conversion convert_hf_to_gguf gguf xllamacpp ua_gec mlx mlx_lm onnx
onnxruntime onnxruntime_genai fasttext babel
""".split()

# What lib/ touches of other packages beside their public names, by the module that has it; a line
# that begins with blanks goes on with the one before. `test_private_names_are_listed` finds others.
PRIVATE = """
accelerate.big_modeling: hf_device_map
accelerate.hooks: _hf_hook weights_map ModelHook add_hook_to_module remove_hook_from_module
accelerate.utils.offload: dataset index
bitsandbytes.nn.modules: support_avx512bf16_for_cpu
conversion: get_model_class
conversion.base: get_model_architecture get_vocab_base_pre load_hparams modify_tensors
  tensor_force_quant
gguf.constants: MODEL_ARCH_NAMES
gguf.gguf_writer: add_file_type
gguf.tensor_mapping: get_tensor_name_map
onnxruntime.quantization.matmul_nbits_quantizer: DefaultWeightOnlyQuantizer get_initializer
  quantize_matmul
onnxruntime_genai.models.builder: create_model parse_extra_options
torch._subclasses.fake_tensor: FakeTensorMode
torch.nn.modules.conv: _ConvNd
torch.nn.modules.module: _apply _buffers _load_from_state_dict _parameters
torch.utils._pytree: tree_leaves tree_map
transformers.configuration_utils: _commit_hash
transformers.conversion_mapping: get_model_conversion_mapping
transformers.core_model_loading: offload_weight rename_source_key revert_weight_conversion
  WeightConverter _weight_conversions
transformers.integrations.accelerate: safetensors_file weight_name
transformers.modeling_utils: _get_dtype_plan _keep_in_fp32_modules_strict _no_split_modules
transformers.models.auto.auto_factory: _model_mapping
transformers.quantizers.auto: AUTO_QUANTIZATION_CONFIG_MAPPING AUTO_QUANTIZER_MAPPING
  register_quantization_config register_quantizer
transformers.quantizers.base: get_keys_to_not_convert HfQuantizer _dequantize
  _process_model_before_weight_loading _process_model_after_weight_loading
  get_state_dict_and_metadata
transformers.tokenization_utils_tokenizers: _tokenizer
transformers.utils.chat_template_utils: render_jinja_template _compile_jinja_template
transformers.utils.hub: cached_file
transformers.utils.quantization_config: QuantizationConfigMixin
"""
LISTED = [
    (module, name)
    for line in PRIVATE.replace("\n  ", " ").strip().splitlines()
    for module, _, names in [line.partition(": ")]
    for name in names.split()
]
GUARDED = "transformers accelerate gguf conversion onnxruntime onnxruntime_genai".split()
NAMED_TUPLES = {"_asdict", "_fields", "_replace"}  # public by Python's own documentation


def sources(*folders: str) -> list[Path]:
    return [ROOT / "main.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


@cache
def nodes(file: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(file.read_text("utf-8"), str(file)))]


def imports(file: Path) -> Iterator[tuple[int, str, bool]]:
    """Line and module of every import, those inside functions and for the type checker too, and
    whether it is relative."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name, False) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level] or ("lib",) if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])  # main.py's is lib
            names = [f"lib.{n.name}" for n in node.names] if module == "lib" else [module]
            yield from ((node.lineno, name, bool(node.level)) for name in names)


def test_modules_of_lib_import_each_other_relatively_and_downwards() -> None:
    """So that they work under any name: `lib` in a checkout, `langprune` once installed."""
    wrong, edges = [], set()
    for file in sources("lib"):
        here = file.relative_to(LIB).parts[0].removesuffix(".py") if LIB in file.parents else "main"
        for line, module, relative in imports(file):
            own = module.startswith("lib.")
            there = module.split(".")[1] if own else module
            upwards = FLOOR_OF.get(here, -1) <= FLOOR_OF.get(there, -2)
            if there != here and upwards or own and not relative and here != "main":
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
            edges |= {(here, there)} if there in FLOOR_OF and there != here else set()
    assert not wrong, "\n".join(wrong)
    assert len(edges) <= EDGES, sorted(edges)


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {file.relative_to(ROOT).with_suffix("").parts: file for file in sources("lib")}
    above = {}  # what imports a file, directly or not
    for parts, file in files.items():
        above[parts] = set()
        for node in nodes(file):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = ("lib",) if file.name == "main.py" else parts[: -node.level]
                module = (*package, *filter(None, (node.module or "").split(".")))
                named = [(*module, each.name) for each in node.names]
                above[parts] |= {each for each in (module, *named) if each in files}
    while leaves := [parts for parts, found in above.items() if not found]:
        for leaf in leaves:
            del above[leaf]
        for found in above.values():
            found.difference_update(leaves)
    assert not above, "these import each other: " + ", ".join(map("/".join, above))


def test_rooms_do_not_grow() -> None:
    """A price is agreed before lines are added, and its reason stands in the commit's message."""
    lines: Counter[str] = Counter()
    for file in sources("lib"):
        room = file.relative_to(ROOT).parts[1:-1][:2] or (file.relative_to(ROOT).parts[-1],)
        lines["/".join(room)] += len(file.read_text("utf-8").splitlines())
    wrong = {room: n for room, n in lines.items() if not 0 <= LINES.get(room, 0) - n <= SLACK}
    assert not wrong, f"LINES says otherwise: {wrong}"


def test_the_core_is_read_in_an_afternoon() -> None:
    """docs/architecture.md names its files, in order, with about their lines."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"(?m)^\| `([\w/]+\.py)` \| (\d+) \|", page)
    sizes = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name, _ in rows}
    wrong = [name for name, said in rows if not 0.8 < int(said) / sizes[name] < 1.2]
    assert len(rows) > 10 and sum(sizes.values()) < 3300 and not wrong, sizes


def test_what_is_imported_is_required() -> None:
    text = (ROOT / "requirements.txt").read_text("utf-8").lower().replace("_", "-")
    required = set(re.findall(r"(?m)^[\w.-]+", text))
    known = {"lib", "langprune", "main", "tests", *OPTIONAL, *sys.stdlib_module_names}
    own = [path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*")]
    known |= {path.stem for path in own if path.is_dir() or path.suffix == ".py"}
    owners, missing = metadata.packages_distributions(), set()
    for file in sources("lib", "tests", "benchmarks"):
        for line, module, _ in imports(file):
            top = module.partition(".")[0]
            names = {name.lower().replace("_", "-") for name in owners.get(top, [top])}
            if top not in known and not names & required:
                missing.add(f"{file.relative_to(ROOT)}:{line} imports {top}")
    assert not missing, "not in requirements.txt: " + "; ".join(sorted(missing))


def test_private_names_are_listed() -> None:
    used, defined, deep = {}, set(NAMED_TUPLES), {}
    for file in sources("lib"):
        for node in nodes(file):
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
    known = {name for module, name in LISTED} | {m.rpartition(".")[2] for m, _ in LISTED}
    wrong = {name: at for name, at in (used | deep).items() if name not in known | defined}
    assert not wrong, f"private names that PRIVATE does not list: {wrong}"


def test_private_names_are_there() -> None:
    """In the installed versions."""
    text = "\n".join(file.read_text("utf-8") for file in sources("lib"))
    for module, name in LISTED:
        assert re.search(rf"\b{name}\b", text), f"lib/ does not name {name} of {module} any more"
        package, *inside = module.split(".")
        found = find_spec(package)
        if not found or not found.origin:  # for some uses, or only a folder of tests (gguf)
            continue
        place = Path(found.origin).parent.joinpath(*inside)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        there = file.is_file() and re.search(rf"\b{name}\b", file.read_text("utf-8"))
        assert there, f"{module} has no {name} any more"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    heads = [re.sub(r"\]\([^)]*\)", "", head) for head in re.findall(r"(?m)^#+ (.+)", text)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_pages_name_flags_and_files_that_exist() -> None:
    known = {flag.name for flag in FLAGS}
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
