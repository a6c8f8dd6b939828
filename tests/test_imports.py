"""The rooms of the house, and which way imports point between them."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# A room may import those before it. `zoo.diffusion`, `zoo.train`, `zoo.data` and `zoo.weights` stand beside networks.
NETWORKS = ["kernels", "zoo.layers", "zoo.mixers", "zoo.backbones", "zoo.papers", "experiments"]
BESIDE = ["zoo.errors", "zoo.files", "zoo.diffusion", "zoo.train", "zoo.data", "zoo.weights"]


def room(module: str) -> str | None:
    return next((r for r in NETWORKS + BESIDE if module == r or module.startswith(r + ".")), None)


def imported_modules(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_one_way():
    wrong = []
    for path in [*ROOT.glob("kernels/**/*.py"), *ROOT.glob("zoo/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        here = room(module)
        for name in imported_modules(path):
            there = room(name)
            if here is None or there is None or here == there:
                continue
            if here in NETWORKS:
                allowed = there in BESIDE or NETWORKS.index(there) < NETWORKS.index(here)
                allowed &= not (here == "kernels" and there in BESIDE)
            else:
                allowed = there in BESIDE
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_a_paper_imports_no_other_paper():
    wrong = []
    for path in ROOT.glob("zoo/papers/**/*.py"):
        own = "zoo.papers." + path.relative_to(ROOT / "zoo/papers").parts[0].removesuffix(".py")
        others = {n for n in imported_modules(path) if n.startswith("zoo.papers.") and not n.startswith(own)}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in others]
    assert not wrong, "\n".join(wrong)


def test_kernels_import_jax_only():
    allowed = {"kernels", "jax", "numpy", *sys.stdlib_module_names}
    for path in ROOT.glob("kernels/**/*.py"):
        foreign = {n.split(".")[0] for n in imported_modules(path)} - allowed
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_importing_zoo_is_cheap():
    code = (
        "import time, jax; start = time.perf_counter(); import zoo, sys; "
        "print(time.perf_counter() - start, 'flax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    seconds, loads_flax = out.split()
    assert float(seconds) < 1.0
    assert loads_flax == "False"
