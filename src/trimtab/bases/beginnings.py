"""What a chat template writes for the beginnings of a conversation, found in one run over all of it.

Masks need render(m[:j]) for every answer. A run of the template is a function of what it has seen of the messages. Here it runs on a list
that notes what is looked at. When the template asks for item j, and has seen neither it, nor any later one, nor the end, then up to here it
would have run the same on m[:j]. So the text so far begins render(m[:j]). The rest of that text is what follows if the list ends here, and
that is computed: the template from this loop on is a program of its own (the tail), which runs on a copy of the variables.

    text so far + tail(variables, no more items)         where item j was not looked at before it is asked for
    text so far + tail(variables, item j - 1 alone)      where it was (`loop.last`, `loop.nextitem`): the last item is written once more

Both are executions of the template's own code, so they hold for every template. Where the template has looked ahead, has variables that
cannot be copied, or does with the list what such a list does not know, nothing is found, and the caller renders m[:j] itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import meta, nodes

from trimtab.bases.sandbox import Bounds, Environment, asked
from trimtab.bases.sandbox_names import TooMuch
from trimtab.bases.template_loops import REST, Unproved, continuation, count, loops, refuse
from trimtab.bases.watched import Beginning, Loop, Rest, Talk, View, Wanted, copied

FLAG = "add_generation_prompt"
KNOWN = 1024
"""Ends of conversations that are remembered, by the variables that they depend on."""


class Beginnings:
    """A template, ready to be run so. Threads may use it at the same time. Unproved where its statements cannot be followed at all."""

    def __init__(self, text: str):
        self._environment = _Watching()
        self._text = text
        tree = self._environment.parse(text)
        refuse(tree)
        self._paths = list(loops(tree.body))
        if not self._paths:
            raise Unproved("no loop that can be followed")
        self.flagged = any(count(continuation(path), FLAG) < count([tree], FLAG) for path in self._paths)
        """Whether the template asks for `add_generation_prompt` before the conversation is written."""
        varies = {n.name for n in tree.find_all(nodes.Name) if n.ctx != "load"} | {m.name for m in tree.find_all(nodes.Macro)}
        varies |= {"messages", "strftime_now"}
        read = [self._read(continuation(path)) for path in self._paths]
        self._constant = [varies.isdisjoint(names) for names in read]
        self._read_by_end = [sorted(names - {FLAG}) for names in read]
        self._ends: dict[tuple[int, bool, str], str] = {}
        self._mains: dict[bool, Any] = {}
        self._tails: dict[int, Any] = {}
        self._looks_ahead = False
        self._hope, self._hope_ahead = _Hope(), _Hope()

    def run(self, variables: Mapping[str, Any], wanted: Wanted, budget: int) -> tuple[str, dict[tuple[int, bool], Beginning]]:
        """(render(m), {(j, generate): the beginning of it}, as far as these were found). variables: what the template gets; the messages
        among them. Raises what the template raises, TooMuch, or Unproved.

        If the template is `flagged`, the flag among the variables must be that of the beginnings which are wanted.
        """
        if not self._hope.is_left():
            raise Unproved("nothing was found lately")
        number = sum(map(len, wanted.values()))
        with self._environment.budget(budget):
            found = self._run(variables, wanted, self._looks_ahead)
            if not self._looks_ahead and len(found[1]) < number and self._hope_ahead.is_left():
                again = self._run(variables, wanted, True)
                self._looks_ahead = self._hope_ahead.learn(len(again[1]) > len(found[1]))
                found = again if self._looks_ahead else found
        self._hope.learn(bool(found[1]) or not number)
        return found

    def _run(self, variables: Mapping[str, Any], wanted: Wanted, ahead: bool) -> tuple[str, dict[tuple[int, bool], Beginning]]:
        talk = Talk(self._tail_of, list(variables["messages"]), wanted)
        talk.given = {**variables, "messages": View(talk, 0)}
        main = self._main(ahead)
        talk.context = main.new_context(talk.given)
        self._environment.of_thread.talk = talk
        pieces = []
        try:
            for piece in main.root_render_func(talk.context):
                pieces.append(piece)
                talk.written += len(piece)
        finally:
            del self._environment.of_thread.talk
        return "".join(pieces), talk.found

    def _tail_of(self, talk: Talk, loop: int, end: int, generate: bool, rest: Rest) -> str | None:
        """What the template writes from this loop on if the messages end at `end`; None where it refuses to."""
        constant = self._constant[loop] and not rest
        key = loop, generate, repr([talk.given.get(name) for name in self._read_by_end[loop]]) if constant else ""
        if constant and (known := self._ends.get(key)) is not None:
            return known
        variables = {**talk.given, **copied(talk.context.vars), FLAG: generate, REST: rest}
        visible, seen, talk.visible = talk.visible, talk.seen, end
        try:
            program = self._tail(loop)
            text = "".join(program.root_render_func(program.new_context(variables)))
        except (TooMuch, Unproved):
            raise
        except Exception:  # whatever a template does; the caller renders it and tells
            return None
        finally:
            talk.visible, talk.seen = visible, seen
        if constant:
            if len(self._ends) >= KNOWN:
                self._ends.clear()
            self._ends[key] = text
        return text

    def _read(self, body: list[Any]) -> set[str]:
        """The names that statements take from outside."""
        tree = nodes.Template(body, lineno=1)
        tree.set_environment(self._environment)
        return meta.find_undeclared_variables(tree)

    def _main(self, ahead: bool) -> Any:
        if ahead not in self._mains:
            tree = self._environment.parse(self._text)
            for number, path in enumerate(loops(tree.body)):
                loop = path[-1][0]
                loop.iter = asked("followed", [loop.iter, nodes.Const(number)], loop.lineno)
                if ahead and loop.test is None:
                    loop.body.insert(0, nodes.ExprStmt(asked("begun", [nodes.Const(number)], loop.lineno), lineno=loop.lineno))
            self._mains[ahead] = self._compiled(tree)
        return self._mains[ahead]

    def _tail(self, number: int) -> Any:
        if number not in self._tails:
            tree = self._environment.parse(self._text)
            path = list(loops(tree.body))[number]
            loop = path[-1][0]
            loop.iter = nodes.Name(REST, "load", lineno=loop.lineno)
            macros = [node for node in tree.body if isinstance(node, nodes.Macro)]
            rest = [node for node in continuation(path) if not isinstance(node, nodes.Macro)]
            tree.body = [*macros, loop, *rest]
            self._tails[number] = self._compiled(tree)
        return self._tails[number]

    def _compiled(self, tree: nodes.Template) -> Any:
        environment = self._environment
        code = environment.compile(Bounds().visit(tree))
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        template.root_render_func.__globals__["LoopContext"] = Loop
        return template


class _Hope:
    """Whether something is worth trying: while it did not fail `TRIES` times in a row, and then every `AGAIN`th time."""

    TRIES, AGAIN = 8, 64

    def __init__(self) -> None:
        self._failed = self._passed = 0

    def is_left(self) -> bool:
        if self._failed < self.TRIES:
            return True
        self._passed += 1
        return self._passed % self.AGAIN == 0

    def learn(self, success: bool) -> bool:
        self._failed = 0 if success else self._failed + 1
        return success


class _Watching(Environment):
    def followed(self, items: Any, loop: int) -> Any:
        """What a loop runs over."""
        if type(items) is not View:
            return items
        talk, first = items.talk, items.first
        talk.first[loop] = first
        return View(talk, first, loop)

    def begun(self, loop: int) -> str:
        talk = self.of_thread.talk
        if loop in talk.first:
            talk.begins(loop)
        return ""
