"""How templates are compiled, so that everything that grows passes through the sandbox's checks.

Jinja lets a sandbox intercept operators and calls. Loops, literals, `~` and captured output it
compiles to plain Python; here they are compiled to calls of the environment (`sandbox.py`), which
has `tick`, `check`, `join_texts` and `open_buffer` for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser

__all__ = ["BoundedCodeGenerator", "GenerationTag"]


class BoundedCodeGenerator(CodeGenerator):
    """Jinja's compiler with the checks in its output."""

    def buffer(self, frame: Frame) -> None:
        """Captured output (macros, set blocks) goes into a list that counts."""
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = environment.open_buffer()")

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """Every turn of a loop looks at the clock."""
        if frame.loop_frame:
            self.writeline("environment.tick()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._checked(super().visit_Tuple, node, frame)
        else:  # the target of an assignment
            super().visit_Tuple(node, frame)

    def _checked(self, visit: Callable[[Any, Frame], None], node: Any, frame: Frame) -> None:
        self.write("environment.check(")
        visit(node, frame)
        self.write(")")


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way to declare them

    def parse(self, parser: Parser) -> nodes.Node:
        """The text inside, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
