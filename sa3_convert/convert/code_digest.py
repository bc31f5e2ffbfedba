"""What a function depends on in this package, as one hash: its code, all that it names, what that names, and so on.

Followed are names in code and annotations (an argument's class brings its methods), imports wherever they stand, and
strings that name one of our modules. What a module does when it is loaded counts for everything in it. Hashed is the
meaning: comments, docstrings and layout do not count, and neither does code that is never reached.

Names are followed, not values: what would be found only by a name that is computed must be named somewhere to count.
"""

import ast
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import platformdirs

from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed
from sa3_convert.system.untrusted import parse_json

PACKAGE: Final = Path(__file__).parents[1]


def code_digest(*starts: Callable[..., Any]) -> str:
    """Return the hex SHA-256 of everything in this package that functions or classes depend on, by its meaning."""
    return _digests().of(*((start.__module__, start.__qualname__.partition(".")[0]) for start in starts))


@cache
def _digests() -> "KeptDigests":
    return KeptDigests(PACKAGE, Path(platformdirs.user_cache_dir("sa3-convert")) / "code.json")


class KeptDigests:
    """Digests, worked out once for each state of the source, in half a second, and kept in a sealed file."""

    def __init__(self, package: Path, kept: Path) -> None:
        self._source = Source(package)
        self._kept = kept
        self._state = _state(package)
        self._known = self._read()

    def of(self, *starts: tuple[str, str]) -> str:
        """Return the digest of what some names, each with its module, depend on."""
        key = " ".join(sorted(f"{module}:{name}" for module, name in starts))
        if key not in self._known:
            self._known[key] = self._source.reached(starts).digest()
            with contextlib.suppress(OSError):
                write_sealed(self._kept, json.dumps({"state": self._state, "digests": self._known}).encode())
        return self._known[key]

    def _read(self) -> dict[str, str]:
        try:
            data = parse_json(read_sealed(self._kept).decode())
            digests: dict[str, str] = data["digests"]
            return digests if data["state"] == self._state else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}


def _state(package: Path) -> str:
    """Return a hash of all source files, byte by byte."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Import:
    """A name that an import binds: module, and the name there (None for the module itself, * for all in it)."""

    bound: str
    origin: str
    name: str | None


class _Statement:
    """A statement at the top level of a module: what it means and what it mentions."""

    def __init__(self, module: "_Module", tree: ast.stmt) -> None:
        self.module, self._tree = module, tree
        self.names: set[str] = set()
        self.imports: list[_Import] = []
        self.texts: set[str] = set()

    @cached_property
    def meaning(self) -> str:
        """The syntax tree as text that is the same for the same code in every version of Python; finds the rest too."""
        return self._visit(self._tree)

    def _visit(self, node: object) -> str:
        if isinstance(node, list):
            return f"[{' '.join([self._visit(item) for item in node if not _is_text(item)])}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        match node:
            case ast.Name(id=name):
                self.names.add(name)
            case ast.Import() | ast.ImportFrom():
                self.imports += _imports(node, self.module)
            case ast.Constant(value=str(text)):
                self.texts.add(text)
            case ast.arg(annotation=ast.expr() as hint) | ast.AnnAssign(annotation=hint):
                self._mention_quoted(hint)
            case ast.FunctionDef(returns=ast.expr() as hint) | ast.AsyncFunctionDef(returns=ast.expr() as hint):
                self._mention_quoted(hint)
            case _:
                pass
        parts = [type(node).__name__]
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in ("ctx", "kind", "type_comment"):
                parts.append(f"{name}={self._visit(value)}")
        return f"({' '.join(parts)})"

    def _mention_quoted(self, hint: ast.expr) -> None:
        """Count names in an annotation's quotes."""
        for node in ast.walk(hint):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                with contextlib.suppress(SyntaxError, ValueError):
                    quoted = ast.parse(node.value, mode="eval")
                    self.names |= {inner.id for inner in ast.walk(quoted) if isinstance(inner, ast.Name)}


@dataclass(frozen=True, eq=False)
class _Module:
    """A module's top level."""

    name: str
    is_package: bool
    bound: dict[str, list[_Statement]] = field(default_factory=dict)
    """What a name is bound by."""
    imported: dict[str, _Import] = field(default_factory=dict)
    effects: list[_Statement] = field(default_factory=list)
    """What is done when it is loaded, besides binding names."""
    main: list[_Statement] = field(default_factory=list)
    """What is done only when it is run as a program."""
    loads: list[_Import] = field(default_factory=list)
    """What is loaded with it."""

    def add(self, tree: ast.stmt) -> None:
        """Sort a statement of its top level by what it is for."""
        statement = _Statement(self, tree)
        match tree:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                self.bound.setdefault(name, []).append(statement)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                self.bound.setdefault(name, []).append(statement)
            case ast.Expr(value=ast.Constant()):
                pass
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                self.main.append(statement)
            case ast.Import() | ast.ImportFrom():
                self._import(tree)
                self.loads.extend(_imports(tree, self))
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=[]):
                self._import(tree)
            case _:
                self._import(tree)
                self.effects.append(statement)
                for node in ast.walk(tree):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        self.bound.setdefault(node.id, []).append(statement)

    def _import(self, tree: ast.stmt) -> None:
        self.imported.update((found.bound, found) for node in ast.walk(tree) for found in _imports(node, self))


class Source:
    """The source of a package, read as far as it is asked for."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._modules: dict[str, _Module | None] = {}

    def reached(self, starts: Iterable[tuple[str, str]]) -> "Reached":
        """Return everything that some names, each with its module, depend on; a name that is not there is refused."""
        reached = Reached(self)
        for module_name, name in starts:
            if (module := self.module(module_name)) is None or name not in module.bound:
                raise LookupError(f"{module_name} has no {name}")
            reached.follow(module_name, name)
        return reached

    def module(self, name: str) -> _Module | None:
        """Return a module of the package, or None if it has none of that name."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> _Module | None:
        package, *parts = name.split(".")
        if package != self._package.name or not all(part.isidentifier() for part in parts):
            return None
        path = self._package.joinpath(*parts)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.is_file():
            return None
        module = _Module(name, path.is_dir())
        for tree in ast.parse(file.read_bytes()).body:
            module.add(tree)
        return module


class Reached:
    """What is reached from where one starts."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._followed: set[tuple[str, str]] = set()
        self._statements: dict[_Statement, str] = {}
        self._origins: set[str] = set()
        """What imported names stand for."""

    def __contains__(self, name: tuple[str, str]) -> bool:
        return name in self._followed

    def digest(self) -> str:
        """Return the hex SHA-256 of its meaning."""
        found = (f"{statement.module.name} {meaning}" for statement, meaning in self._statements.items())
        return fingerprint(statements=sorted(found), origins=sorted(self._origins))

    def follow(self, module_name: str, name: str) -> None:
        """Reach what a name stands for in a module; `*` is all that it has."""
        module = self._source.module(module_name)
        if module is None or (module_name, name) in self._followed:
            return
        self._followed.add((module_name, name))
        self._load(module)
        if name == "*":
            for inner in (*module.bound, *module.imported):
                self.follow(module_name, inner)
            self._reach(module.main)
        self._reach(module.bound.get(name, ()))
        if name in module.imported:
            self._follow_import(module, module.imported[name])

    def _follow_import(self, module: _Module, found: _Import) -> None:
        self._origins.add(f"{module.name} {found.bound} = {found.origin} {found.name}")
        whole = found.origin if found.name is None else f"{found.origin}.{found.name}"
        if found.name is None or self._source.module(whole) is not None:
            self.follow(whole, "*")
        else:
            self.follow(found.origin, found.name)

    def _load(self, module: _Module) -> None:
        """Reach what happens when a module is loaded: its packages are loaded first, and then what it imports."""
        if (module.name, "") in self._followed:
            return
        self._followed.add((module.name, ""))
        self._reach(module.effects)
        others = [name for found in module.loads for name in (found.origin, f"{found.origin}.{found.name}")]
        for name in (module.name.rpartition(".")[0], *others):
            if (other := self._source.module(name)) is not None:
                self._load(other)
        for found in module.loads:
            if found.name == "*":
                self.follow(found.origin, "*")

    def _reach(self, statements: Iterable[_Statement]) -> None:
        for statement in statements:
            if statement in self._statements:
                continue
            self._statements[statement] = statement.meaning
            for found in statement.imports:
                self._follow_import(statement.module, found)
            for name in statement.names:
                self.follow(statement.module.name, name)
            for text in statement.texts:
                self.follow(text, "*")


def _imports(node: ast.AST, module: _Module) -> Iterator[_Import]:
    """Yield what a node binds if it is an import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield _Import(alias.asname or alias.name.partition(".")[0], alias.name, None)
    elif isinstance(node, ast.ImportFrom):
        up = module.name.split(".")[: None if module.is_package else -1]
        here = up[: len(up) + 1 - node.level] if node.level else []
        origin = ".".join([*here, *filter(None, [node.module])])
        for alias in node.names:
            yield _Import(alias.asname or alias.name, origin, alias.name)


def _is_text(node: object) -> bool:
    """Tell whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
