"""The order in which parts of the package may import each other, held on the syntax trees."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_tip"
LAYERS = [
    {PACKAGE, "errors"},
    {"files", "seeds", "machine", "statistics", "records", "cpu"},
    {"config"},
    {"parallel", "observability"},
    {"placement"},
    {"vocab_parallel"},
    {"selection"},
    {"conversion", "models", "batching", "prompts", "rollout"},
    {"teachers", "report"},
    {"planning"},
    {"training"},
    {"evaluation", "diagnostics", "simulation"},
    {"commands"},
    {"cli", "tools"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
IMPORTED_IN_ONE_FILE = ["sglang", "wandb", "tensorboardX", "pynvml", "transformer_engine", "triton", "plotly"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in [*ROOT.glob(f"{PACKAGE}/**/*.py"), *ROOT.glob("tools/**/*.py")]}


def part_of(module):
    """`megatron_tip.parallel.grid` -> `parallel`; `tools.x` -> `tools`; the package itself -> its name."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else names[0]


def imports_of(module, path):
    """Absolute names of all modules that `module` imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in submodules if name in MODULES} or {node.module}
    return names


IMPORTS = {module: imports_of(module, path) for module, path in MODULES.items()}
OWN_IMPORTS = {module: {name for name in names if name in MODULES} for module, names in IMPORTS.items()}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_layers(module):
    own = part_of(module)
    assert own in RANK, f"{own} has no layer; give it one in LAYERS"
    for name in OWN_IMPORTS[module]:
        assert RANK[part_of(name)] <= RANK[own], f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize("part", ["vocab_parallel", "selection"])
def test_the_cores_need_torch_alone(part):
    allowed = {"torch", "triton", *sys.stdlib_module_names}  # triton: where it is installed, in one file
    own = {f"{PACKAGE}.{name}" for name in ("errors", "records", "statistics", "cpu.onednn")}
    modules = [module for module in MODULES if part_of(module) == part]
    assert modules
    for module in modules:
        for name in IMPORTS[module]:
            permitted = name.split(".")[0] in allowed or name in own or part_of(name) == part
            assert permitted, f"{module} imports {name}"


@pytest.mark.parametrize("package", IMPORTED_IN_ONE_FILE)
def test_optional_package_is_imported_in_one_file(package):
    importers = [module for module, names in IMPORTS.items() if any(name.split(".")[0] == package for name in names)]
    assert len(importers) <= 1, importers


def test_no_module_imports_itself_in_a_circle():
    assert_acyclic(OWN_IMPORTS)


FOLDERS = sorted(
    {".".join(module.split(".")[:depth]) for module in MODULES for depth in range(1, module.count(".") + 1)}
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_holds_a_circle(folder):
    """Each file and each folder within `folder` counts as one: at no depth may two of them need each other."""

    def child(module):
        return ".".join(module.split(".")[: folder.count(".") + 2])

    inside = {module for module in MODULES if module.startswith(f"{folder}.")}
    children = {child(module): set() for module in inside}
    for module in inside:
        children[child(module)] |= {child(name) for name in OWN_IMPORTS[module] & inside} - {child(module)}
    assert_acyclic(children)


def assert_acyclic(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
