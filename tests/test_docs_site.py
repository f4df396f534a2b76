"""The documentation as a whole: the site, the variables, and what is said in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("bench", "csrc", "docs", "examples", "fusedopt", "tests", "triton_kernels", ".ci")
KINDS = {"", ".py", ".pyi", ".toml", ".yml", ".sh", ".h", ".cpp", ".cu", ".cuh"}
# Of the process, and read by no one here.
OF_THE_SHELL = {
    "PWD",
    "CURDIR",
    "SECONDS",
    "BASH_SOURCE",
    "PATH",
    "MAKE",
    "MAKEFLAGS",
    "PYTHONPATH",
    "HOME",
}


def sources() -> dict[str, str]:
    """Every file of the project that could read a variable, but for tests that make names up."""
    found = [path for path in ROOT.iterdir() if path.suffix in KINDS - {""}]
    found += [ROOT / "Makefile", *(ROOT / ".github").rglob("*.yml")]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    names = {str(path.relative_to(ROOT)): path for path in found if path.is_file()}
    return {n: p.read_text() for n, p in names.items() if not n.startswith("tests/test_docs")}


def of_python(text: str) -> Iterator[str]:
    """What a Python source reads of os.environ, by a literal or by a constant of the module.

    Raises:
        AssertionError: a name that cannot be told.
    """
    tree = ast.parse(text)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def name(node: ast.expr) -> str:
        value = constants.get(node.id) if isinstance(node, ast.Name) else None
        value = node.value if isinstance(node, ast.Constant) else value
        assert isinstance(value, str), f"line {node.lineno}: {ast.unparse(node)}"
        return value

    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[key, *_]):
                yield name(key)
            case ast.Call(
                func=ast.Attribute(value=owner, attr="get" | "pop" | "setdefault"), args=[key, *_]
            ) if ast.unparse(owner) in ("os.environ", "environ"):
                yield name(key)
            case ast.Subscript(value=owner, slice=key) if ast.unparse(owner) == "os.environ":
                yield name(key)
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[owner]) if (
                ast.unparse(owner) == "os.environ"
            ):
                yield name(key)


def of_shell(text: str) -> Iterator[str]:
    """What a script or a Makefile takes from outside, or gives a default to."""
    own = set(re.findall(r"^\s*(?:export |local )?([A-Z][A-Z0-9_]+)\s*:?=", text, re.M))
    yield from re.findall(r"\$\{([A-Z][A-Z0-9_]+)[:+-]", text)
    yield from re.findall(r"^([A-Z][A-Z0-9_]+) \?=", text, re.M)
    used = set(re.findall(r"\$[({]?([A-Z][A-Z0-9_]+)\b", text))
    yield from used - own


def macros(texts: dict[str, str]) -> set[str]:
    """Names that the preprocessor knows."""
    condition = re.compile(r"^#\s*(?:ifdef|ifndef|define|if|elif)\b.*", re.M)
    lines = " ".join(line for text in texts.values() for line in condition.findall(text))
    return set(re.findall(r"\bFUSEDOPT_\w+", lines))


def variables(name: str, text: str) -> set[str]:
    suffix = Path(name).suffix
    if suffix in (".py", ".pyi"):
        found = set(of_python(text))
    elif suffix == ".sh" or name in ("Makefile", ".ci/run"):
        found = set(of_shell(text))
    else:
        found = set(re.findall(r'getenv\("(\w+)"\)', text))
    if suffix not in (".h", ".cpp", ".cu", ".cuh"):
        found |= set(re.findall(r"\bFUSEDOPT_[A-Z_]*[A-Z]\b", text))
    return found - OF_THE_SHELL


def documented() -> set[str]:
    rows = re.findall(r"^\|([^|]+)\|", (ROOT / "docs/environment.md").read_text(), re.M)
    return set(re.findall(r"`(\w+)`", " ".join(rows)))


def test_every_variable_is_on_its_page() -> None:
    texts = sources()
    known = documented() | macros(texts)
    missing = {name: variables(name, text) - known for name, text in texts.items()}
    assert {n: m for n, m in missing.items() if m} == {}, "docs/environment.md lacks them"


def test_no_variable_of_the_page_has_gone() -> None:
    texts = " ".join(sources().values())
    of_compilers = {"CC", "CXX"}  # read by setuptools
    assert not {n for n in documented() - of_compilers if not re.search(rf"\b{n}\b", texts)}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.py", 'os.environ.get("NEW_ONE")'),
        ("x.py", 'os.getenv("NEW_ONE", "")'),
        ("x.py", 'KEY = "NEW_ONE"\nos.environ[KEY]'),
        ("x.py", '"NEW_ONE" in os.environ'),
        ("x.cpp", 'std::getenv("NEW_ONE")'),
        ("x.sh", "echo ${NEW_ONE:-1}"),
        ("Makefile", "NEW_ONE ?= 3"),
        ("Makefile", "all:\n\techo $(NEW_ONE)"),
    ],
)
def test_a_new_variable_is_found(name: str, text: str) -> None:
    assert variables(name, text) == {"NEW_ONE"}


NOT_ON_A_GPU = re.compile(
    r"(?:no|not|never|none|nothing)\b[^.|]{0,60}\b(?:run|measured|tried|tested)\b[^.|]{0,25}\bGPU"
    r"|GPU[^.|]{0,30}\bnot (?:been )?(?:yet )?(?:run|measured|tried|tested)",
    re.I | re.S,
)


def test_what_has_not_been_run_on_a_gpu_is_said_once() -> None:
    """In docs/support.md; the other pages link to it."""
    said = [
        str(page.relative_to(ROOT))
        for page in PAGES
        if NOT_ON_A_GPU.search(re.sub(r"\[[^]]*\]\([^)]*\)", "", page.read_text()))
    ]
    assert said == ["docs/support.md"]
    for page in ("README.md", "docs/cuda.md", "docs/triton.md", "docs/performance.md"):
        assert "support.md#gpu" in (ROOT / page).read_text(), page


def test_links_of_files_outside_of_the_site_lead_somewhere() -> None:
    """mkdocs checks those of its pages."""
    for page in PAGES[:2]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{page.name}: {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "mkdocstrings", "material", "latex2mathml"):
        pytest.importorskip(package, reason="make docs installs it")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        html = page.read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{page}: {tag}"
        for style in re.findall(r"<style.*?</style>", html, re.S):
            assert "//" not in style, page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text()), sheet


def test_no_line_became_a_quotation(site: Path) -> None:
    """One that begins with ">=", or ">>>" outside of a section of examples."""
    for page in site.rglob("*.html"):
        assert "<blockquote>" not in page.read_text(), page.name


def test_the_api_is_complete(site: Path) -> None:
    """What the package and its integrations offer, with the text of every option and formulas."""
    import fusedopt

    html = {page.stem: page.read_text() for page in (site / "reference").glob("*.html")}
    everything = " ".join(html.values())
    for name in set(fusedopt.__all__) - {"__version__"}:
        assert re.search(rf'id="fusedopt\.(?:\w+\.)*{name}"', everything), name
    for name in ("FusedClippingMixin", "optimizer_cls_and_kwargs", "keras.FusedAdamW"):
        assert re.search(rf'id="fusedopt\.integrations\.(?:\w+\.)?{name}"', everything), name
    for name in ("FusedAdamW", "FusedAdam", "FusedSGD"):
        head = f'id="fusedopt.{name}"'
        section = re.split(r'<h2 id="', html["optimizers"].partition(head)[2])[0]
        for word in ("max_grad_norm", "skip_nonfinite", "process_group", "FUSEDOPT_BACKEND"):
            assert word in section.partition("Parameters:")[2], f"{name}: {word}"
        assert "<mtable" in section, name  # its formula
    for left_over in (".. math", "&amp;="):
        assert left_over not in everything
