"""A tokenizer's chat template with what it is given besides messages: arguments, and a date in place of the clock."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import jinja2
import jinja2.meta

from megatron_erpd.data.schema import RowProblem
from megatron_erpd.errors import RecipeError
from megatron_erpd.settings import TemplateSettings
from megatron_erpd.sources.tokenizer import Tokenizer

_CLOCK = "strftime_now"
_TIMES = "erpd_times"
# The library replaces functions among the arguments by their names, so that the clock has to be a macro. Its line ends
# with the block, as templates are trimmed, and the template begins a line as it did.
_PINNED_CLOCK = (
    f"{{% macro {_CLOCK}(format) %}}{{{{ {_TIMES}[format] if format in {_TIMES} else "
    f"raise_exception('{_CLOCK} with a format that is made as it goes can\\'t be pinned') }}}}{{% endmacro %}}\n"
)
_DATE_STRING = "date_string"
_DATE_FORMAT = "%d %b %Y"
"""Of the variable `date_string` in the templates of Llama."""
_MOMENTS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2018, 11, 30, 21, 47, 58))
"""They differ in everything that a format can show."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


class ChatTemplate:
    """Renders messages to text.

    Raises:
        RecipeError: there is no template, it is broken, or it doesn't read a setting that is given.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TemplateSettings) -> None:
        self._tokenizer = tokenizer
        self._place = str(getattr(tokenizer, "name_or_path", "") or "the tokenizer")
        if not tokenizer.chat_template:
            raise RecipeError(
                f"{self._place}: has no chat template, and messages need one; add a chat_template.jinja to the model's "
                "folder, or give prompts as text without chat_template"
            )
        try:
            self._text = str(tokenizer.get_chat_template())
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", self._text))
            self._reads = jinja2.meta.find_undeclared_variables(tree)
        except jinja2.TemplateSyntaxError as error:
            raise RecipeError(
                f"{self._place}: the chat template is broken (line {error.lineno}: {error.message}); correct "
                "chat_template.jinja, or chat_template in tokenizer_config.json"
            ) from error
        except ValueError as error:  # several templates without a default
            raise RecipeError(f"{self._place}: {error}") from error
        strings = (node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str))
        self._formats = [text for text in strings if "%" in text]
        self._arguments = self._checked_arguments(settings.template_arguments)
        self._moments = self._clock(settings.template_date)

    def render(self, messages: Sequence[Mapping[str, Any]], field: str, *, generation: bool) -> str:
        """The text of a conversation.

        Args:
            messages: with `role` and `content`, a text.
            field: what they are of, for the error.
            generation: ask for the beginning of the assistant's answer behind them.

        Raises:
            RowProblem: the template refuses the messages.
            RecipeError: it shows the time, and no date is given.
        """
        texts = [self._render(messages, field, generation, moment) for moment in self._moments]
        if len(set(texts)) > 1:
            raise RecipeError(
                f"{self._place}: the chat template puts the date or the time into the text, which would change from "
                f"day to day; set template_date to the date that it shall show, as template_date: {date.today()}"
            )
        return texts[0]

    def _render(self, messages: Any, field: str, generation: bool, moment: datetime | None) -> str:
        more: dict[str, Any] = dict(self._arguments)
        if moment is not None:
            times = {format_: moment.strftime(format_) for format_ in self._formats}
            more |= {"chat_template": _PINNED_CLOCK + self._text, _TIMES: times}
        try:
            # tokenize=False: what tokenize=True returns differs between versions of transformers.
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **more
            )
        except Exception as error:  # templates raise whatever they like on messages they don't know
            raise RowProblem("malformed", field, f"the chat template refuses it ({error})") from error
        return str(text)

    def _checked_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        of_renderer = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        for name in arguments:
            if name in of_renderer - {"tools", "documents"}:
                raise RecipeError(f"template_arguments.{name}: is what the renderer sets itself; remove it")
            if name not in self._reads:
                near = difflib.get_close_matches(name, self._reads - of_renderer, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(sorted(self._reads))}"
                raise RecipeError(f"template_arguments.{name}: {self._place}: the chat template never reads it; {hint}")
        return dict(arguments)

    def _clock(self, pinned: str | None) -> tuple[datetime | None, ...]:
        """The moments to render at: None where the template has no clock, two where none is pinned."""
        has_clock = _CLOCK in self._reads
        if pinned is None:
            return _MOMENTS if has_clock else (None,)
        moment = datetime.fromisoformat(pinned)
        if has_clock:
            return (moment,)
        if _DATE_STRING not in self._reads or _DATE_STRING in self._arguments:
            raise RecipeError(f"template_date: {self._place}: the chat template shows no date; remove it")
        self._arguments[_DATE_STRING] = moment.strftime(_DATE_FORMAT)
        return (None,)
