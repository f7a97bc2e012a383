"""The arrows between the packages go one way, and importing mm_gpt is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mm_gpt

ROOT = Path(mm_gpt.__file__).parent
CONTRACTS = {
    "errors",
    "network",
    "config",
    "document",
    "image_headers",
    "images",
    "system",
    "templates",
    "tokenizer",
    "processor",
    "kernels",
}
# Package -> the packages of mm_gpt that it may import, at the top or inside a function.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "network": {"errors"},
    "image_headers": {"errors"},
    "images": {"errors", "network", "image_headers"},
    "system": {"errors"},
    "document": {"errors", "images"},
    "tokenizer": {"errors"},
    "kernels": {"errors", "system"},
    "vision": {"errors", "images", "kernels"},
    "templates": {"errors", "document", "tokenizer", "vision"},
    "processor": CONTRACTS | {"vision"},
    "datasets": CONTRACTS | {"vision"},
    "model": CONTRACTS | {"vision"},
    "hub": CONTRACTS | {"vision", "model"},
    "inference": CONTRACTS | {"vision", "model", "hub"},
    "training": CONTRACTS | {"vision", "model", "hub", "datasets", "inference", "eval"},
    "eval": CONTRACTS | {"vision", "model", "hub", "datasets", "inference"},
}
# Files that name what stands above them: for `mm-gpt train` to find, and a policy gradient older than that folder.
MAY_ALSO = {"training/recipes.py": {"alignment"}}
HEAVY = ("torch", "open_clip", "timm", "transformers", "torchvision", "matplotlib", "gradio", "tokenizers", "numpy")


def module_files(name: str) -> list[Path]:
    folder = ROOT / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{name}.py"]


def imports_of(path: Path) -> set[str]:
    """The packages right below mm_gpt that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" if node.module == "mm_gpt" else str(node.module) for a in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("mm_gpt.")} - {"__version__"}
    return found


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_arrows_go_one_way(name: str) -> None:
    files = module_files(name)
    assert files
    for path in files:
        wrong = imports_of(path) - MAY_IMPORT[name] - MAY_ALSO.get(str(path.relative_to(ROOT)), set()) - {name}
        assert not wrong, f"{path.relative_to(ROOT)} must not import mm_gpt.{wrong.pop()}"


def test_every_package_has_a_rule() -> None:
    """A new folder must say what it may import, or be at the top, where everything may be imported."""
    top = {"serving", "commands", "captioning", "alignment", "scaling", "__init__", "__main__"}
    names = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert names <= set(MAY_IMPORT) | top


def test_nothing_imports_the_top() -> None:
    for name in MAY_IMPORT:
        for path in module_files(name):
            assert not imports_of(path) & {"serving", "commands", "captioning"}, path


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("modules", ["mm_gpt", "mm_gpt.errors, mm_gpt.config, mm_gpt.document, mm_gpt.images"])
def test_light_imports(modules: str) -> None:
    """`mm-gpt --help` must not wait for torch."""
    heavy = run(f"import sys, {modules}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert heavy == "[]"


def test_public_names() -> None:
    for name in mm_gpt.__all__:
        assert getattr(mm_gpt, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        mm_gpt.laod  # noqa: B018


def test_importing_touches_no_global_state() -> None:
    """No seeds, no threads, no logging handlers, no signal handlers, no files."""
    code = """
import logging, os, signal, torch
before = torch.get_rng_state().clone(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), os.getcwd()
import mm_gpt.inference.assistant, mm_gpt.training.language, mm_gpt.training.contrastive
after = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), os.getcwd()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert not logging.getLogger().handlers and not logging.getLogger("mm_gpt").handlers
"""
    run(code)


def module_name(path: Path) -> str:
    parts = ("mm_gpt", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_files() -> dict[str, set[str]]:
    """Module -> the modules of mm_gpt that its file imports, wherever in the file; those of types as well.

    `mm_gpt.datasets`, `eval` and `vision` are links: `rglob` does not follow them.
    """
    files = [path for folder in (ROOT, *(p for p in ROOT.iterdir() if p.is_symlink())) for path in folder.rglob("*.py")]
    modules = {module_name(path): path for path in files}
    found = {}
    for name, path in modules.items():
        found[name] = set[str]()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                is_name = len(inside) < len(node.names)  # of something that the module itself defines
                found[name] |= inside | ({str(node.module)} & modules.keys() if is_name else set())
        found[name].discard(name)
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """What can be reached from itself, in groups."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in arrows[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {name: reached(name) for name in arrows}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in arrows}
    return [list(group) for group in sorted(groups) if group]


def test_no_circle_of_files() -> None:
    """Files in a circle are one file in pieces: none can be read, tested or moved without the others."""
    arrows = imported_files()
    assert {"mm_gpt.datasets.building.corpus", "mm_gpt.vision.vit", "mm_gpt.eval.tasks"} <= arrows.keys()
    assert "mm_gpt.errors" in arrows["mm_gpt.datasets.samples"]
    assert not circles(arrows)


def test_circles_are_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str](), "e": {"e"}}
    assert circles(arrows) == [["b", "c"], ["e"]]
