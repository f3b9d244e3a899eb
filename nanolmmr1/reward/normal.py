r"""One table of spellings: a gold answer and a response's answer are rewritten alike before any rule compares them.

The result is LaTeX without layout: no fences, fonts, colours, spacing or sizes; one command for each sign, fraction,
root and function; the hyphen as the minus sign; ASCII digits, letters and brackets. Linear time.

Next: choice.py, option letters.
"""

import functools
import re
import unicodedata
from collections.abc import Collection
from fractions import Fraction

_INVISIBLE = dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065),
                            *range(0xFE00, 0xFE10)])  # fmt: skip
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ", "0123456789+-()nixy", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢₓ", "0123456789+-()nix", strict=True))
_CIRCLED = "①②③④⑤⑥⑦⑧⑨"
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
          "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho",
          "σ": "sigma", "τ": "tau", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma",
          "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi"}  # fmt: skip
_SIGNS = {
    "∞": "infty", "≤": "le", "≦": "le", "⩽": "le", "≥": "ge", "≧": "ge", "⩾": "ge", "≠": "ne", "±": "pm", "∓": "mp",
    "×": "times", "✕": "times", "⋅": "cdot", "·": "cdot", "∙": "cdot", "•": "cdot", "∪": "cup", "∩": "cap",
    "∅": "emptyset", "∈": "in", "∠": "angle", "△": "triangle", "≈": "approx", "≅": "cong", "≡": "equiv",
    "→": "to", "⇒": "implies", "∑": "sum", "∏": "prod", "∫": "int", "⊥": "perp", "∥": "parallel", "∼": "sim",
    "⊂": "subset", "⊆": "subseteq", "∨": "lor", "∧": "land", "ℝ": "mathbb{R}", "ℤ": "mathbb{Z}", "ℕ": "mathbb{N}",
}  # fmt: skip
_TABLE: dict[int, str | None] = {
    **_INVISIBLE,
    **{ord(sign): f"\\{name} " for sign, name in (_GREEK | _SIGNS).items()},
    **{ord(c): r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split("⁄")) for c in _FRACTIONS},
    **{ord(c): f"({i}) " for i, c in enumerate(_CIRCLED, 1)},
    **dict.fromkeys(map(ord, "−–—‒‐‑"), "-"),
    **dict.fromkeys(map(ord, "‘’‛"), "'"), **dict.fromkeys(map(ord, "“”„"), '"'),
    **{ord(c): text for c, text in {"°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "℃": r"^\circ C",
                                    "℉": r"^\circ F", "÷": "/", "∕": "/", "⁄": "/", "∶": ":", "。": ".", "、": ",",
                                    "【": "[", "】": "] ", "「": "", "」": "", "『": "", "』": "", "′": "'",
                                    "㎡": "m^{2}", "㎢": "km^{2}", "㎠": "cm^{2}", "㎥": "m^{3}", "㎤": "cm^{3}",
                                    "￥": "¥", "￡": "£", "﹩": "＄"}.items()},
}  # fmt: skip
_RUNS = [(re.compile(f"[{re.escape(''.join(signs))}]+"), mark, str.maketrans(signs))
         for mark, signs in (("^", _SUPERSCRIPTS), ("_", _SUBSCRIPTS))]  # fmt: skip
FONTS = {"text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "emph", "mathrm", "mathbf", "mathit",
          "mathsf", "mathtt", "mathnormal", "mathop", "mbox", "hbox", "operatorname", "bm", "boldsymbol", "boxed",
          "fbox", "framebox", "underline", "textup", "mathord"}  # fmt: skip
_SCANNED = re.compile(r"\\([A-Za-z]+)\*?\s*\{|\\.|([{}])", re.DOTALL)
_ALIASES = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"), **dict.fromkeys(("dbinom", "tbinom"), r"\binom"),
    **dict.fromkeys(("leq", "leqslant", "leqq"), r"\le"), **dict.fromkeys(("geq", "geqslant", "geqq"), r"\ge"),
    **dict.fromkeys(("neq",), r"\ne"), **dict.fromkeys(("varnothing", "O"), r"\emptyset"),
    **dict.fromkeys(("degree", "textdegree"), r"^\circ"), "lbrace": r"\{", "rbrace": r"\}", "vert": "|", "mid": "|",
    "lvert": "|", "rvert": "|", "lbrack": "[", "rbrack": "]", "div": "/", "dollar": "＄", "textdollar": "＄",
    "ast": "*", "star": "*", "pounds": "£", "euro": "€", "yen": "¥", "colon": ":", "ldots": "...", "dots": "...",
    "cdots": "...", "varphi": r"\phi", "varepsilon": r"\epsilon", "vartheta": r"\theta", "infinity": r"\infty",
    "iff": ",", "lor": " or ", "vee": " or ", "land": " and ", "wedge": " and ", "thickapprox": r"\approx",
    "simeq": r"\approx", "measuredangle": r"\angle", "bigcup": r"\cup", "newline": " ", "tiny": "", "Large": "",
    "checkmark": "", "large": "", "huge": "", "Huge": "", "small": "", "color": "",
    **dict.fromkeys(("left", "right", "middle", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl",
                     "biggr", "Biggl", "Biggr", "displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "rm",
                     "bf", "it", "cal", "sf", "tt", "bfseries", "itshape"), ""),
    **dict.fromkeys(("quad", "qquad", "thinspace", "enspace", "hfill", "hspace", "vspace", "phantom"), " "),
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*")
_NAMES = ("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg pi theta alpha beta gamma omega "
          "infty exp min max gcd lcm").split()  # fmt: skip
# (?<![\\A-Za-z]) keeps commands, and words that only contain the name.
_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(" + "|".join([*_NAMES, "infinity", "inf"]) +
                        r")(?![A-Za-z])(?:(?<!min)(?<!sec)|(?=\s*[({\\A-Za-z0-9]))")  # 30 min is a time
_ROOT = re.compile(r"(?:(?<![\\A-Za-z])|\\)(sqrt|cbrt)\s*(?=[(0-9A-Za-z{\[\\])|([√∛∜])\s*")
_ATOM = re.compile(r"[0-9]+(?:\.[0-9]+)?|\\[A-Za-z]+|[A-Za-z]")
_ESCAPED = re.compile(r"\\\\(?=(?:boxed|[dtc]?frac|sqrt|text|math[a-z]+|pi|left|right|cdot|times|circ|angle)\b)")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|dot|bar)\s*\{([0-9]+)\}")
_ELLIPSIS = re.compile(r"(?<![0-9.])([0-9]+)\.([0-9]{0,20}?)([0-9]{1,10}?)\3{1,20}\s*(?:\.{3})")

def _compiled(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), new) for pattern, new in pairs]


_MARKUP = _compiled(  # of Markdown, HTML and LaTeX's layout
    (r"\\n(?![A-Za-z])|\\n(?=[A-Z])(?!Rightarrow|Leftarrow)", " "),  # a line break that was escaped twice
    (r"(?i)<sup>([^<>]*)</sup>", r"^{\1}"), (r"(?i)<(b|i|u|em|strong|code|span|p|mark)>([^<>]*)</\1>", r"\2"),
    (r"(?i)<br\s*/?>|&nbsp;", " "), (r"(?<=[\w)}])\*\*(?=[\w({\-])", "^"), (r"\*\*|__|`+|\\[()\[\]]", " "),
    (r"\\(?:color|hspace\*?|vspace\*?|tag\*?|label|textcolor)\s*\{[^{}]*\}", " "),
    (r"\\\\\s*(?=\\end)", " "), (r"\{,\}", ","), (r"(?<!\\)\\[,;:!>/ ]|~|\\+$", " "),
    (r">\s?=", r"\\ge "), (r"<\s?=", r"\\le "), (r"!=", r"\\ne "),
    (r"\\%", "%"), (r"\\\$", "＄"), (r"\\([&#_])", r"\1"),
)  # fmt: skip
_LETTER = r"(?:(?<=\s)[A-Za-z]|\\(?:pi|alpha|beta|theta)(?![A-Za-z]))"
_SHAPES = _compiled(
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\circ(?![A-Za-z])", r"^\\circ "), (r"\^\s*\^\\circ", r"^\\circ"),
    (r"\{\s*\}", ""), (r"(?<=[0-9])\s+\.\s+(?=[0-9])", "."),
    (rf"\\(frac|binom)\s*([0-9]|{_LETTER})\s*([0-9]|{_LETTER})", r"\\\1{\2}{\3}"),
    (rf"\\(frac|binom)\s*({_LETTER})\s*\{{", r"\\\1{\2}{"), (r"\\(frac|binom)\s*([0-9A-Za-z])\s*\{", r"\\\1{\2}{"),
    (r"\\(frac|binom)\s*(\{[^{}]*\})\s*([0-9A-Za-z])", r"\\\1\2{\3}"), (r"\\frac\s*\{", r"\\frac{"),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"^([^{}]*)\\over(?![a-z])([^{}]*)$", r"\\frac{\1}{\2}"),
    (r"\^\s*\(\s*([-+]?[0-9]+(?:/[0-9]+)?)\s*\)", r"^{\1}"), (r"\^\s*([-+]?[0-9]+)(?![0-9.])", r"^{\1}"),
    (r"\^\s*\{\s*([^{}]*?)\s*\}", r"^{\1}"), (r"\\exp\s*\(([^()]*)\)", r"e^{\1}"), (r"\+\s*-(?=\s*[0-9])", "-"),
    (r"(?i)(?<![a-z])(?:negative|minus)\s+(?=[0-9\\])", "-"),
)  # fmt: skip
_LAYOUT = re.compile(r"(?:\\left\s*)?(?:\\\{\s*)?\\begin\{(cases|array|aligned|align\*?|equation\*?|split|gathered)\}"
                     r"(?:\{[lcr|]+\})?((?:(?!\\begin|\\end).)*)\\end\{\1\}(?:\s*\\right\s*\.)?", re.DOTALL)
_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|[A-Z]")
_LEAD = re.compile(r"(?:[#•✅✔☑\s]+|\*\s+|-\s+(?=[A-Za-z]{2}))+")
_QUOTES = (("*", "*"), ("_", "_"), ('"', '"'), ("'", "'"), ("$", "$"))


@functools.lru_cache(8192)
def normalise(text: str) -> str:
    r"""The text in one spelling.

    As in: "√3/2" and `\dfrac{\sqrt3}{2}` -> `\sqrt{3}/2` and `\frac{\sqrt{3}}{2}`; "３．５ ㎝" -> "3.5 cm"; "x²" ->
    "x^{2}"; "65°" -> `65^\circ`; `$\text{(B)}$` -> "(B)".
    """
    if _PLAIN.fullmatch(text):
        return text  # most answers
    for run, mark, table in _RUNS:
        text = run.sub(functools.partial(_raised, mark, table), text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    if r"\begin" not in text:  # in a matrix, \\ ends a row
        text = _ESCAPED.sub(r"\\", text)
    text = unwrap(_LAYOUT.sub(_rows, text) if r"\begin" in text else text, FONTS)
    for pattern, new in _MARKUP:
        text = pattern.sub(new, text)
    # Paired signs are fences. A single one is a currency.
    text = text.replace("$", " " if text.count("$") % 2 == 0 else "＄")
    text = _COMMAND.sub(_alias, text)
    text = _FUNCTIONS.sub(lambda match: rf"\{'infty' if match[1].startswith('inf') else match[1]} ", text)
    text = _roots(text)
    for pattern, new in _SHAPES:
        text = pattern.sub(new, text)
    text = _REPEATING.sub(_as_fraction, _ELLIPSIS.sub(r"\1.\2\\overline{\3}", text))
    return strip_outside(" ".join(text.split()))


def strip_outside(text: str) -> str:
    """The text without list marks and quotes around it, and without punctuation after it."""
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    text = text.strip().rstrip(".,;: \\✓✔✅").lstrip(",;: ")
    for left, right in _QUOTES:
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in text[1:-1]:
            return strip_outside(text[1:-1])
    return text


def _rows(match: re.Match[str]) -> str:
    """The rows of a system of equations as a list, those of a calculation as one line."""
    rows = [row.replace("&", " ").strip(" ,;.") for row in re.split(r"\\\\", match[2])]
    return (", " if match[1] in ("cases", "array") else " ").join(filter(None, rows))


def unwrap(text: str, commands: Collection[str]) -> str:
    r"""The text with a space in place of each `\command{` and of the brace that closes it. Linear time."""
    pieces, at = [], 0
    opened: list[bool] = []  # of open braces: whether it belongs to a command that is removed
    for match in _SCANNED.finditer(text):
        if match[1] or match[2] == "{":
            opened.append(match[1] in commands)
            gone = opened[-1]
        else:
            gone = match[2] == "}" and bool(opened) and opened.pop()
        if gone:
            pieces += [text[at : match.start()], " "]
            at = match.end()
    return "".join(pieces) + text[at:]


def _raised(mark: str, table: dict[int, str], match: re.Match[str]) -> str:
    return f"{mark}{{{match[0].translate(table)}}}"


def _alias(match: re.Match[str]) -> str:
    if (new := _ALIASES.get(match[1])) is None:
        return match[0]
    after = match.string[match.end() : match.end() + 1]
    return new + " " if new.startswith("\\") and after.isalpha() else new


def _roots(text: str) -> str:
    r"""sqrt(2), √2 and \sqrt2 as \sqrt{2}."""
    pieces, at = [], 0
    for match in _ROOT.finditer(text):
        if match.start() < at:
            continue  # inside the last argument
        start, index = match.end(), {"cbrt": "[3]", "∛": "[3]", "∜": "[4]"}.get(match[1] or match[2], "")
        if text[start : start + 1] == "(":
            end = closing(text, start)
            inside = text[start + 1 : end - 1]
        elif atom := _ATOM.match(text, start):
            end, inside = atom.end(), atom[0]
        else:
            end, inside = start, ""
        pieces.append(text[at : match.start()] + rf"\sqrt{index}" + (f"{{{_roots(inside)}}}" if inside else ""))
        at = end
    return "".join(pieces) + text[at:]


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`, or the end of the text."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at + 1
    return len(text)


def _as_fraction(match: re.Match[str]) -> str:
    r"""A repeating decimal as \frac{a}{b}: math_verify reads 0.\overline{3} as 0."""
    whole, fixed, period = match.groups()
    value = Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
