"""Mutants of a C text: every small change that a test should notice, found token by token.

Operators, constants, names, conditions, the arms of a conditional, and whole statements, in functions and in the bodies
of macros; comments, strings and other lines of the preprocessor are left alone. Left out because every test would see
them, or none could: `++`, members of structures, `{0}`, more room in an array, and the boundary of a comparison that
picks one of its two sides.

The code is read as this project writes it (clang-format's blanks tell a product from a pointer); it is no parser of C.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<comment>/\*.*?\*/|//[^\n]*)|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
    |(?P<number>0[xX][0-9a-fA-F]+[uUlL]*|\d+[uUlL]*)|(?P<name>[A-Za-z_]\w*)
    |(?P<sign>->|\+\+|--|<<=|>>=|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|/=|%=|&=|\|=|\^=|<<|>>|\#\#|\.\.\.|[^\s\w\\])""",
    re.DOTALL | re.VERBOSE,
)
_SIGNS_TABLE = """
< <= >=; <= < >; > >= <=; >= > <; == !=; != ==; && ||; || &&; + -; - +; * +; / *; % /; << >>; >> <<; <<= >>=; >>= <<=;
& |; | &; ^ &; += -= =; -= += =; *= =; |= &= =; &= |= =; ~; !
"""
_NAMES_TABLE = """
x y; y x; kx ky; ky kx; from_x from_y; from_y from_x; row pixel; pixel step; step pixel; height width; width height;
kernel_height kernel_width; kernel_width kernel_height; ins outs; outs ins; low high; high low; from to; start end;
first second; second first; source other; other source; steps rows; rows steps
"""


def _entries(table: str) -> dict[str, list[str]]:
    """A table's entries: what is changed, and what it may become; nothing means left out."""
    words = [entry.split() for entry in table.split(";")]
    return {first: others or [""] for first, *others in words}


_SIGNS = _entries(_SIGNS_TABLE)
_NAMES = _entries(_NAMES_TABLE)  # the other name must exist there, or the mutant does not compile
_KEYWORD_LIST = """
if for while switch return case default typedef struct enum union static const goto do else void int unsigned signed
char short long extern inline sizeof
"""
_KEYWORDS = frozenset(_KEYWORD_LIST.split())


@dataclass(frozen=True)
class Mutation:
    """One change: characters start..end of `file` become `new`. `kind` is what sort of change, `function` where."""

    file: str
    start: int
    end: int
    new: str
    kind: str
    function: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def shown(self, text: str) -> tuple[int, str, str]:
        """Line number, and the lines it touches before and after, blanks collapsed."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.end)
        last = len(text) if last < 0 else last
        before = text[first:last]
        after = text[first : self.start] + self.new + text[self.end : last]
        before, after = (re.sub(r"[\s\\]+", " ", part).strip() for part in (before, after))
        return text.count("\n", 0, self.start) + 1, before, after


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def blank_comments(text: str) -> str:
    """`text` with comments and strings made of blanks, every other character where it was."""

    def blank(match: re.Match[str]) -> str:
        if match["comment"] is None and match["string"] is None:
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return _TOKEN.sub(blank, text)


def directives(text: str) -> list[tuple[int, int]]:
    """Characters start..end of each preprocessor line, continuations included. `text` has no comments."""
    return [match.span() for match in re.finditer(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", text, re.MULTILINE)]


def tokens_of(text: str) -> list[list[_Token]]:
    """Tokens of `text`: those of the code, then those of the body of each macro."""
    text = blank_comments(text)
    plain, bodies = text, []
    for start, end in directives(text):
        head = re.match(r"[ \t]*#[ \t]*define[ \t]+\w+(\([^)]*\))?", text[start:end])
        if head is not None:
            bodies.append((start + head.end(), end))
        plain = plain[:start] + re.sub(r"[^\n]", " ", text[start:end]) + plain[end:]
    spans = [(plain, 0, len(plain)), *((text, start, end) for start, end in bodies)]
    return [
        [_Token(str(match.lastgroup), match[0], match.start(), match.end()) for match in _TOKEN.finditer(t, start, end)]
        for t, start, end in spans
    ]


def _closing(tokens: list[_Token], at: int) -> int:
    """Index of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(tokens)):
        depth += (tokens[i].text in "([{") - (tokens[i].text in ")]}")
        if depth == 0:
            return i
    return len(tokens) - 1


def _function_name(header: list[_Token]) -> str:
    """Name of the function a header defines: what stands before its last bracketed group."""
    at, last = 0, -1
    while at < len(header):
        if header[at].text == "(":
            last, at = at, _closing(header, at)
        at += 1
    if last < 1:
        return ""
    return header[last - 2].text if header[last - 1].text == ")" and last > 1 else header[last - 1].text


def _mutations_in(file: str, text: str, tokens: list[_Token]) -> Iterator[Mutation]:
    depth, function, header, inside_type = 0, "", 0, 0
    opens: list[str] = []  # brackets around the place
    statement = True  # whether a statement may begin here
    control = -1  # index of the bracket that ends the header of an if, for, while

    def change(first: int, last: int, new: str, kind: str) -> Mutation:
        return Mutation(file, tokens[first].start, tokens[last].end, new, kind, function)

    for i, token in enumerate(tokens):
        before = tokens[i - 1] if i else _Token("sign", ";", 0, 0)
        after = tokens[i + 1] if i + 1 < len(tokens) else _Token("sign", ";", 0, 0)
        if token.text == "{":
            head = tokens[header:i]
            if depth == 0:
                if any(t.text in ("struct", "enum", "union") for t in head) and before.text != ")":
                    inside_type = 1
                else:
                    function = _function_name(head)
            depth += 1
        elif token.text == "}":
            depth -= 1
            if depth == 0:
                header, inside_type = i + 1, 0
        elif token.text == ";" and depth == 0:
            header = i + 1
        if token.text in ("(", "["):
            opens.append(token.text)
        elif token.text in (")", "]") and opens:
            opens.pop()
        if inside_type:
            continue

        # a statement left out
        begins = statement and not opens and token.text not in ("{", "}", ";")
        if begins and depth and (token.kind == "name" or token.text in ("*", "(")):
            jump = token.text in ("continue", "break")
            end = i
            while end < len(tokens) and tokens[end].text != ";":
                end = _closing(tokens, end) if tokens[end].text in ("(", "[", "{") else end
                end += 1
            if end < len(tokens) and (jump or (token.text not in _KEYWORDS and not _declares(tokens[i:end]))):
                yield change(i, end, ";", "statement removed")
        label = token.text == ":" and not opens and _is_label(tokens, i)
        statement = token.text in ("{", "}", ";", "else") or i == control or label

        # a condition negated
        if token.text in ("if", "while", "for") and after.text == "(":
            control = _closing(tokens, i + 1)
            if token.text != "for":
                inner = text[tokens[i + 1].end : tokens[control].start]
                yield change(i + 1, control, f"(!({inner}))", "condition negated")
        # the arms of a conditional exchanged
        if token.text == "?":
            arms = _arms(tokens, i)
            if arms is not None:
                middle, end = arms
                yes = text[tokens[i + 1].start : tokens[middle - 1].end]
                no = text[tokens[middle + 1].start : tokens[end - 1].end]
                yield change(i + 1, end - 1, f"{no} : {yes}", "arms exchanged")

        operand = before.kind in ("name", "number") or before.text in (")", "]")
        if token.kind == "sign":
            for new in _SIGNS.get(token.text, ()):
                if token.text in ("<", "<=", ">", ">=") and new[0] == token.text[0] and _clamps(text, tokens, i):
                    continue  # the same function
                if token.text == "-" and (not operand or before.text in ("return", "case")):
                    new = ""
                elif token.text in ("*", "&") and not (operand and text[token.end] == " "):
                    continue  # a pointer
                yield change(i, i, new, "operator")
        elif token.kind == "number":
            digits = token.text.rstrip("uUlL")
            suffix, value = token.text[len(digits) :], int(digits, 0)
            if before.text == "{" and after.text == "}":
                continue  # {0}: all of it is 0
            room = before.text == "[" and after.text == "]" and _declares(_statement(tokens, i))
            for near in (value - 1,) if room else (value + 1, value - 1):  # more room changes nothing
                if near >= 0:
                    new = hex(near) if digits[:2] in ("0x", "0X") else str(near)
                    yield change(i, i, new + suffix, "constant")
        elif token.kind == "name":
            declared = (before.kind == "name" and before.text not in ("return", "case", "else")) or (
                before.text == "*" and text[before.end] != " " and statement is False and _in_declaration(tokens, i)
            )
            if token.text in _NAMES and not declared:
                yield change(i, i, _NAMES[token.text][0], "name exchanged")
            if token.text.startswith("_mm"):
                for one, other in (("_min_", "_max_"), ("_max_", "_min_")):
                    if one in token.text:
                        yield change(i, i, token.text.replace(one, other), "min and max exchanged")


def _clamps(text: str, tokens: list[_Token], at: int) -> bool:
    """Whether the comparison at `at` chooses between its own two sides, so that it does not matter if equal."""
    mark = next((i for i in range(at, min(at + 9, len(tokens))) if tokens[i].text in ("?", ";")), -1)
    arms = _arms(tokens, mark) if mark > 0 and tokens[mark].text == "?" else None
    if arms is None:
        return False

    def bare(first: int, last: int) -> str:
        piece = text[tokens[first].start : tokens[last].end]
        return re.sub(r"\(u?int\d+_t\)|\s", "", piece)

    begin = at
    while begin and tokens[begin - 1].text not in ("=", "(", ",", ":", ";", "return", "[", "?"):
        begin -= 1
    sides = {bare(begin, at - 1), bare(at + 1, mark - 1)}
    return {bare(mark + 1, arms[0] - 1), bare(arms[0] + 1, arms[1] - 1)} == sides


def _declares(tokens: list[_Token]) -> bool:
    """Whether a statement declares a variable: a type, and then a name."""
    at = 1
    if len(tokens) > 1 and tokens[1].text == "(" and tokens[0].text.isupper():
        at = _closing(tokens, 1) + 1
    while at < len(tokens) and tokens[at].text == "*":
        at += 1
    return tokens[0].kind == "name" and at < len(tokens) and tokens[at].kind == "name"


def _statement(tokens: list[_Token], at: int) -> list[_Token]:
    """The statement that holds the token at `at`, up to there."""
    begin = at
    while begin and tokens[begin - 1].text not in (";", "{", "}"):
        begin -= 1
    return tokens[begin:at]


def _in_declaration(tokens: list[_Token], at: int) -> bool:
    """Whether the name at `at`, after a `*`, is the one declared: a type stands before its stars."""
    while tokens[at - 1].text == "*":
        at -= 1
    return tokens[at - 1].kind == "name" and tokens[at - 1].text != "return"


def _is_label(tokens: list[_Token], at: int) -> bool:
    """Whether the colon at `at` ends a case label."""
    while at > 0 and tokens[at].text not in (";", "{", "}", "?"):
        if tokens[at].text in ("case", "default"):
            return True
        at -= 1
    return False


def _arms(tokens: list[_Token], at: int) -> tuple[int, int] | None:
    """For the `?` at `at`: index of its colon, and of what follows its second arm."""
    nested, depth, middle = 0, 0, -1
    for i in range(at + 1, len(tokens)):
        text = tokens[i].text
        if depth == 0 and (text in (";", ",", ")", "]", "}")):
            return (middle, i) if middle > 0 else None
        depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
        if depth == 0 and text == "?":
            nested += 1
        elif depth == 0 and text == ":":
            if nested:
                nested -= 1
            elif middle < 0:
                middle = i
            else:
                return middle, i
    return None


def mutations_of(file: str, text: str) -> list[Mutation]:
    """Every mutation of a C text, in the order of the text."""
    found = [m for tokens in tokens_of(text) for m in _mutations_in(file, text, tokens)]
    return sorted(set(found), key=lambda m: (m.start, m.end, m.new))
