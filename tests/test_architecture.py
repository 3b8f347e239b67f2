"""The rooms of bigint8/ and what may import what, read from the sources; limits on how long and wide things grow."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import get_args

import pytest
from bigint8_kernels import cpu_outliers, cpu_scores, cpu_step, generic, reference

from bigint8.model import graphs, rotary
from bigint8.options import Activations
from bigint8.plan import memory
from bigint8.plan.memory import GRAPH_ROWS, KERNEL_BYTES
from bigint8.run import buffers

ROOT = Path(__file__).parent.parent
LIBRARY, KERNELS = ROOT / "bigint8", ROOT / "kernels" / "bigint8_kernels"

ROOMS = (
    ("errors", "units"), ("options",), ("checkpoint",), ("sources",), ("families",), ("plan",), ("model",), ("load",),
    ("run",), ("simulation",), ("session",), ("model_pipeline",), ("service",), ("terminal",), ("compare_plans",),
    ("examine_steps",), ("examine", "measure_speed"),
    ("launch", "serve", "plan_command", "check", "quantize", "doctor"), ("__main__",),
)  # fmt: skip
"""Each imports only from those before it, and from itself. Those that stand together import nothing of each other."""

COMMAND_OF_A_ROOM = "bigint8.plan.__main__"
"""`python -m bigint8.plan` is a command, though its name is that of a room: it stands with the commands' `__main__`."""

PUBLIC_NAMES = "bigint8"
"""The package itself, which hands out names of many rooms: it alone is outside the order, and no room imports it."""

SLOW_TO_IMPORT = ("torch", "transformers", "accelerate")
PLANNED_WITHOUT = ("errors", "units", "options", "checkpoint.headers", "sources", "families", "plan")
"""What a plan needs: it is there at once, since none of these imports what is slow."""

MOST_MODULE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 7
WIDE_FUNCTIONS = {"bigint8.session.load_sharded_int8"}
"""The public function, whose parameters are those of transformers and its own."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file, ROOT): file for file in sorted(LIBRARY.rglob("*.py"))}
KERNEL_FILES = {module_name(file, KERNELS.parent): file for file in sorted(KERNELS.rglob("*.py"))}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(name: str, file: Path, nodes: Iterator[ast.AST]) -> set[str]:
    """The modules that these statements of a module import, by full name."""
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= (inner & FILES.keys()) or {base}
    return found


def imports_of(name: str) -> set[str]:
    """Everywhere in the module: at its top, inside functions and under TYPE_CHECKING."""
    return imported(name, FILES[name], ast.walk(tree(FILES[name])))


def room_of(module: str) -> str:
    return "__main__" if module == COMMAND_OF_A_ROOM else module.split(".")[1]


def rank(room: str) -> int:
    return next(i for i, together in enumerate(ROOMS) if room in together)


def test_every_module_stands_in_a_room():
    named = {room for together in ROOMS for room in together}
    assert {room_of(module) for module in FILES if module != PUBLIC_NAMES} == named


@pytest.mark.parametrize("module", [module for module in FILES if module != PUBLIC_NAMES])
def test_a_room_imports_only_from_those_before_it(module):
    for target in imports_of(module):
        if target.split(".")[0] == "bigint8":
            assert target != PUBLIC_NAMES, f"{module} imports the package of public names"
            same = room_of(target) == room_of(module)
            assert same or rank(room_of(target)) < rank(room_of(module)), f"{module} imports {target}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: (imports_of(name) & FILES.keys()) - {name} for name in FILES if name != PUBLIC_NAMES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_what_a_plan_needs_imports_nothing_slow_when_it_is_imported():
    needed = [name for name in FILES for part in PLANNED_WITHOUT if f"{name}.".startswith(f"bigint8.{part}.")]
    assert len(needed) > len(PLANNED_WITHOUT)
    for name in needed:
        at_the_top = imported(name, FILES[name], at_import(tree(FILES[name])))
        assert not {module.split(".")[0] for module in at_the_top} & set(SLOW_TO_IMPORT), name


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those in functions, nor under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from at_import(child)


def test_kernels_import_nothing_of_the_library():
    for name, file in KERNEL_FILES.items():
        targets = imported(name, file, ast.walk(tree(file)))
        assert not [target for target in targets if target.split(".")[0] == "bigint8"], name


# --- how long and how wide ---------------------------------------------------------------------------------------


def functions_of(name: str, node: ast.AST) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, Function | ast.ClassDef) else name
        if isinstance(child, Function):
            yield inner, child
        yield from functions_of(inner, child)


def all_functions(files: dict[str, Path]) -> Iterator[tuple[str, Function]]:
    for name, file in files.items():
        yield from functions_of(name, tree(file))


def test_a_module_is_read_in_one_sitting():
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in (FILES | KERNEL_FILES).items()}
    assert {name: count for name, count in lines.items() if count > MOST_MODULE_LINES} == {}


def test_a_function_fits_on_a_screen():
    lengths = {name: f.end_lineno - f.lineno + 1 for name, f in all_functions(FILES | KERNEL_FILES) if f.end_lineno}
    assert {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == {}


def test_a_function_of_the_library_takes_a_handful_of_parameters():
    """Kernels are excused: a launch takes the addresses, the sizes and the strides of what it works on."""
    wide = {name for name, function in all_functions(FILES) if parameters(function) > MOST_PARAMETERS}
    assert wide == WIDE_FUNCTIONS


def parameters(function: Function) -> int:
    """How many a caller may give."""
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


# --- what is said twice, because one side may not import the other -----------------------------------------------


def test_the_options_name_the_activations_that_the_kernels_know():
    assert get_args(Activations) == get_args(reference.Activations)


def test_a_plan_leaves_room_for_the_slice_that_a_product_in_plain_torch_takes():
    assert KERNEL_BYTES == generic.SLICE_BYTES


def test_a_plan_counts_memory_on_the_cpu_in_the_sizes_that_kernels_have():
    assert (memory.CACHE_LINE, memory.ACTIVATION_BLOCK) == (cpu_step.ALIGNMENT, reference.BLOCK)
    assert (memory.ATTENTION_CHUNK, memory.RESULT_BYTES) == (cpu_scores.CHUNK, 4 * cpu_scores.RESULTS)
    assert (memory.TILE, memory.SPLIT_TILES_A_THREAD) == (cpu_scores.TILE, cpu_step.SPLIT_TILES_A_THREAD)
    tiles = 16 * cpu_outliers.TILE * cpu_outliers.RUN
    assert (8 * cpu_outliers.MOST_LISTED + tiles, rotary.POSITIONS) == (memory.OUTLIER_BYTES, memory.POSITIONS)
    assert memory.SPARE_BUFFERS == buffers.MOST_SPARE


def test_a_plan_leaves_room_for_the_largest_step_that_a_gpu_captures():
    assert graphs.BUCKETS[-1] == GRAPH_ROWS
