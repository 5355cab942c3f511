"""What one source uses of a package and what the package's own sources offer, both from syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

VERSION = "2.20.2"  # of Transformer Engine
Gate = Callable[[ast.expr], bool | None]  # what an if is known to say, or None


@dataclass
class Use:
    """A name of the package, and the arguments it is called with if it is called."""

    name: str
    line: int
    keywords: set[str] | None = None
    positional: int = 0


def te_gate(version: str) -> Gate:
    """megatron-core's questions for Transformer Engine's version, answered for this one."""
    installed = Version(version)

    def gate(test: ast.expr) -> bool | None:
        match test:
            case ast.Name(id="HAVE_TE"):
                return True
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                verdict = gate(operand)
                return None if verdict is None else not verdict
            case ast.BoolOp(op=op, values=values):
                decisive, verdicts = isinstance(op, ast.Or), [gate(value) for value in values]
                return decisive if decisive in verdicts else None if None in verdicts else not decisive
            case ast.Call(func=ast.Name(id="is_te_min_version"), args=[ast.Constant(value=str(least)), *_]):
                return installed >= Version(least)
            case ast.Compare(
                left=ast.Call(func=ast.Name(id="get_te_version")),
                ops=[ast.Lt()],
                comparators=[ast.Call(func=ast.Name(id="PkgVersion"), args=[ast.Constant(value=str(bound))])],
            ):
                return installed < Version(bound)
        return None

    return gate


def live(node: ast.AST, gate: Gate) -> Iterator[ast.AST]:
    """The children of a node without the branches that the gate closes."""
    if isinstance(node, ast.If):
        verdict = gate(node.test)
        yield node.test
        yield from node.body if verdict is not False else []
        yield from node.orelse if verdict is not True else []
    else:
        yield from ast.iter_child_nodes(node)


def walk(node: ast.AST, gate: Gate) -> Iterator[ast.AST]:
    yield node
    for child in live(node, gate):
        yield from walk(child, gate)


def dotted(node: ast.AST) -> list[str] | None:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


class Uses(ast.NodeVisitor):
    """Every use of ``package`` in a source: imports, attributes, calls with their arguments, and in a class derived
    from one of the package's, the calls of super(). Calls through variables are not followed."""

    def __init__(self, source: str, package: str, gate: Gate = lambda _: None) -> None:
        self.package, self.gate, self.found = package, gate, list[Use]()
        self.aliases: dict[str, str] = {}
        self.base: str | None = None
        self.function: ast.AST | None = None
        self.tree = ast.parse(source)
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}
        self.visit(self.tree)

    def generic_visit(self, node: ast.AST) -> None:
        for child in live(node, self.gate):
            self.visit(child)

    def resolve(self, node: ast.AST) -> str | None:
        parts = dotted(node)
        return ".".join([self.aliases[parts[0]], *parts[1:]]) if parts and parts[0] in self.aliases else None

    def add(self, node: Any, name: str, **kwargs: Any) -> None:
        self.found.append(Use(name, node.lineno, **kwargs))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == self.package:
                self.aliases[alias.asname or self.package] = alias.name if alias.asname else self.package
                self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and (node.module or "").split(".")[0] == self.package:
            for alias in node.names:
                self.aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self.add(node, f"{node.module}.{alias.name}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [name for name in map(self.resolve, node.bases) if name]
        for expression in node.bases:
            self.visit(expression)
        self._inside(node.body, base=bases[0] if bases else None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._inside([*ast.iter_child_nodes(node)], function=node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.resolve(node)
        if name:
            self.add(node, name)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.resolve(node.func)
        match node.func:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=method) if self.base:
                name = f"{self.base}.{method}"
        if name:
            keywords = {key for keyword in node.keywords for key in self._keys(keyword)}
            self.add(node, name, keywords=keywords, positional=len(node.args))
        self.generic_visit(node)

    def _inside(self, nodes: list[Any], **context: Any) -> None:
        before = {name: getattr(self, name) for name in context}
        self.__dict__.update(context)
        for node in nodes:
            self.visit(node)
        self.__dict__.update(before)

    def _keys(self, keyword: ast.keyword) -> set[str]:
        """The names a call's ``name=`` or ``**names`` stands for, as far as the function around it shows."""
        return {keyword.arg} if keyword.arg else self._dict_keys(keyword.value, self.function)

    def _dict_keys(self, value: ast.AST | None, function: ast.AST | None) -> set[str]:
        match value:
            case ast.Dict(keys=keys):
                return {key.value for key in keys if isinstance(key, ast.Constant)}
            case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
                return {key for k in keywords for key in ({k.arg} if k.arg else self._dict_keys(k.value, function))}
            case ast.Call(func=ast.Name(id=called)) if called in self.functions:
                body = self.functions[called]
                returned = [node.value for node in walk(body, self.gate) if isinstance(node, ast.Return)]
                return {key for node in returned for key in self._dict_keys(node, body)}
            case ast.Name(id=name) if function is not None:
                keys: set[str] = set()
                for node in walk(function, self.gate):
                    match node:
                        case ast.Assign(targets=[ast.Name(id=target)], value=assigned) if target == name:
                            keys |= self._dict_keys(assigned, function)
                        case ast.AnnAssign(target=ast.Name(id=target), value=assigned) if target == name:
                            keys |= self._dict_keys(assigned, function)
                        case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=target), slice=ast.Constant(key))]):
                            keys |= {key} if target == name else set()
                return keys
        return set()


@dataclass
class Offer:
    """What the sources of a package define: ``read(path)`` is the text of a file or None."""

    read: Callable[[str], str | None]
    trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def problem(self, use: Use) -> str | None:
        """What of this use the package does not have, or None."""
        found = self.find(use.name)
        if found is None:
            return f"{use.name}: there is no such name"
        if use.keywords is None:
            return None
        names, positional, takes_any = self.arguments(*found)
        unknown = set() if takes_any else use.keywords - names
        if unknown:
            return f"{use.name}: no argument {', '.join(sorted(unknown))}"
        return f"{use.name}: {use.positional} positional arguments" if use.positional > positional else None

    def module(self, name: str) -> ast.Module | None:
        if name not in self.trees:
            path = name.replace(".", "/")
            text = self.read(f"{path}.py") or self.read(f"{path}/__init__.py")
            self.trees[name] = None if text is None else ast.parse(text)
        return self.trees[name]

    def find(self, name: str) -> tuple[str, ast.AST] | None:
        """(module, definition) of a dotted name, through the package's own imports."""
        module, _, attribute = name.rpartition(".")
        if self.module(name) is not None:
            return name, self.trees[name]  # type: ignore[return-value]
        if not module:
            return None
        if self.module(module) is not None:
            return self._in_module(module, attribute)
        owner = self.find(module)  # a class
        if owner is None or not isinstance(owner[1], ast.ClassDef):
            return None
        for where, part in self.ancestors(*owner):
            for node in part.body:
                if attribute in _defined(node):
                    return where, node
        return owner if attribute == "__init__" and self._fields(*owner) else None  # a dataclass makes its own

    def _in_module(self, module: str, attribute: str) -> tuple[str, ast.AST] | None:
        package = self.read(module.replace(".", "/") + "/__init__.py") is not None
        for node in _top_level(self.module(module)):
            if attribute in _defined(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package] if node.level else []
                origin = ".".join([*parts, *([node.module] if node.module else [])])
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == attribute:
                        found = self.find(f"{origin}.{attribute if alias.name == '*' else alias.name}")
                        if found is not None:
                            return found
        return None

    def ancestors(self, module: str, cls: ast.AST | None) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and those of its bases that the package defines."""
        if isinstance(cls, ast.ClassDef):
            yield module, cls
            for base in cls.bases:
                found = self.find(f"{module}.{ast.unparse(base)}")
                if found is not None:
                    yield from self.ancestors(*found)

    def _fields(self, module: str, node: ast.ClassDef) -> list[str]:
        """Of a dataclass and its bases."""
        return [
            part.target.id
            for _, cls in self.ancestors(module, node)
            if any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)
            for part in cls.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]

    def arguments(self, module: str, node: ast.AST) -> tuple[set[str], float, bool]:
        """Names, number of positional ones, and whether it takes any others."""
        if isinstance(node, ast.ClassDef):
            init = self.find(f"{module}.{node.name}.__init__")
            if init is not None and init[1] is not node:
                return self.arguments(*init)
            names = self._fields(module, node)
            return set(names), len(names), not names  # without any: __init__ is torch's or object's
        if not isinstance(node, ast.FunctionDef):
            return set(), float("inf"), True
        positional = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        if positional[:1] in (["self"], ["cls"]):
            positional = positional[1:]
        count = float("inf") if node.args.vararg else len(positional)
        return {*positional, *(arg.arg for arg in node.args.kwonlyargs)}, count, node.args.kwarg is not None


def _defined(node: ast.AST) -> set[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


def _top_level(node: ast.AST | None) -> Iterator[ast.AST]:
    """Statements of a module, those under if and try too."""
    for child in ast.iter_child_nodes(node) if node else ():
        yield child
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _top_level(child)
