r"""Numbers with units, read exactly from normalised text: 12 cm^{2}, 3 1/2, 1.2\times 10^{-3}, 28%, 65^\circ.

Next: algebra.py, equality of expressions.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

MAX_NUMBER = 120  # characters
MAX_EXPONENT = 400  # of ten
NOISE_DIGITS = 15  # a decimal of so many digits was a binary floating-point number
NOISE = Fraction(1, 10**12)  # relative error of such a decimal

_DECIMAL = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_POWER = r"(?:[eE]([-+]?[0-9]+)|\s*(?:\\times|\\cdot|[*xX])\s*10\s*\^\{([-+]?[0-9]+)\})"
_SIGN, _CURRENCY = r"\s*([-+]?)\s*", r"(＄|\$|US\s?[＄$]|USD|¥|€|£|₹|RMB|HK[＄$]|Rs\.?)?\s*"
_NUMBER = re.compile(_SIGN + _CURRENCY + _SIGN + "(?:" + "|".join((
    r"(?P<mixed>[0-9]+)\s*(?:\\frac\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|(?:\s|and\s)\s*([0-9]+)\s*/\s*([0-9]+))",
    rf"\\frac\{{\s*(?P<top>[-+]?\s*(?:{_DECIMAL}))\s*\}}\s*\{{\s*(?P<bottom>[-+]?(?:{_DECIMAL}))\s*\}}",
    rf"(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})",
    r"10\s*\^\{(?P<ten>[-+]?[0-9]+)\}",
    rf"(?P<decimal>{_DECIMAL})(?:{_POWER})?",
)) + ")")  # fmt: skip
# Between the pieces of 2 hours 30 minutes.
_PIECE = re.compile(r"(?:(?<=[A-Za-z])(?<!\\times)(?<!\\cdot)(?:\s*,)?\s+(?:and\s+)?|(?<=[\u4e00-\u9fff])\s*)(?=[0-9])")
_FACTOR = re.compile(r"\s*([/·*]|\\cdot|\\times|per\b)?\s*((?:square|sq\.?|cubic)\s+|平方|立方)?"
                     r"([A-Za-zµ]+\.?|\\mu\s*[A-Za-z]|\^\\circ(?:\s*[CF](?![A-Za-z]))?|[%＄¥€£]|"
                     r"[\u4e00-\u9fff]+?(?=平方|立方|[^\u4e00-\u9fff]|\Z))"
                     r"\s*(?:\^\{\s*(-?[0-9])\s*\})?\s*(squared|cubed)?")  # fmt: skip
_MOST_FACTORS = 6
_WRITTEN_POWER = {"square": 2, "sq": 2, "平方": 2, "squared": 2, "cubic": 3, "立方": 3, "cubed": 3}
# base unit: {factor: names}. A unit that is not here is its own base.
_BASES: dict[str, dict[str, str]] = {
    "": {"1": "unit of the about approximately total 单位", "12": "dozen", "100": "hundred 百",
         "1000": "thousand 千", "10000": "万", "1000000": "million 百万", "100000000": "亿", "1000000000": "billion"},
    "m": {"1": "m meter metre 米", "1/1000": "mm millimeter millimetre 毫米", "1/100": "cm centimeter centimetre 厘米",
          "1/10": "dm decimeter decimetre 分米", "1000": "km kilometer kilometre 千米 公里"},
    "inch": {"1": "in inch inches", "12": "ft foot feet", "36": "yd yard", "63360": "mi mile"},
    "g": {"1": "g gram gramme 克", "1/1000": "mg milligram 毫克", "1000": "kg kilogram kilo 千克 公斤",
          "1000000": "t ton tonne 吨"},
    "s": {"1": "s sec second 秒", "60": "min minute mins 分钟", "3600": "h hr hour hrs 小时 时", "86400": "day 天",
          "604800": "week", "1/1000": "ms millisecond 毫秒"},
    "l": {"1": "l L liter litre 升", "1/1000": "ml mL milliliter millilitre 毫升"},
    "degree": {"1": r"^\circ deg degree 度"}, "celsius": {"1": "^\\circC"}, "fahrenheit": {"1": "^\\circF"},
    "dollar": {"1": "＄ $ dollar usd 美元", "1/100": "cent ¢"}, "yuan": {"1": "¥ yuan rmb cny 元 块"},
    "euro": {"1": "€ euro eur"}, "£": {"1": "£ gbp"}, "pound": {"1": "pound lb"},
    "n": {"1": "N newton"}, "j": {"1": "J joule"}, "w": {"1": "W watt"}, "v": {"1": "V volt"}, "pa": {"1": "Pa pascal"},
    "%": {"1": "% percent pct percentage 百分"},
}  # fmt: skip
UNITS = {name: (base, Fraction(factor)) for base, names in _BASES.items() for factor, each in names.items()
         for name in each.split()}  # fmt: skip
# Words behind a number that change it, or are no unit.
_NO_UNITS = set("or and but not is x y z i e n k a b p q r th st nd rd to than from plus minus times least most at "
                "maybe perhaps possibly wrong incorrect if unless except squared cubed factorial halves divided below "
                "above over under".split())  # fmt: skip


_SILENT = re.compile(r"\\(?!sin|cos|tan|ln|log)[A-Za-z]+")  # commands that are no function of a variable


Near = Callable[[Fraction, Fraction], bool]  # (answer, gold), in gold's unit


class Value(NamedTuple):
    """A number and its unit."""

    number: Fraction  # as written
    scale: Fraction  # of the unit, in base units
    unit: tuple[tuple[str, int], ...]  # (base, power), sorted; () without a unit
    digits: int  # significant ones as written

    @property
    def is_percent(self) -> bool:
        return self.unit == (("%", 1),)


@functools.lru_cache(8192)
def read_value(text: str) -> Value | None:
    """A normalised text that is one number, perhaps with a unit or words behind it; None if it is anything else."""
    match = _NUMBER.match(text)
    if not match or match.end() > MAX_NUMBER:
        return None
    if len(pieces := _PIECE.split(text, maxsplit=3)) > 1:
        return _sum([read_value(piece) for piece in pieces])
    number = _number(match)
    unit = _unit(text[match.end() :])
    if number is None or unit is None:
        return None
    number *= unit.times
    if currency := match[2]:
        sign = "＄" if "$" in currency or "＄" in currency else currency.lower()
        base, scale = UNITS.get(sign, ("rupee", Fraction(1)))
        unit.powers[base], unit.scale = 1, unit.scale * (1 if unit.powers[base] else scale)
    digits = sum(c in "0123456789" for c in match[0].lstrip("-+0. "))
    return Value(number, unit.scale, tuple(sorted(unit.powers.items())), digits)


def _sum(values: list[Value | None]) -> Value | None:
    """2 hours 30 minutes as 150 minutes."""
    known = [value for value in values if value and value.unit and value.unit[0][0] in _BASES]
    last = known[-1] if known else None
    if last is None or len(known) < len(values) or any(value.unit != last.unit for value in known):
        return None
    return last._replace(number=sum((value.number * value.scale for value in known), Fraction(0)) / last.scale)


def nearness(decimals: int | None, tolerance: Fraction) -> Near | None:
    """Whether a number is near enough to gold: by `tolerance`, the largest difference, or equal to so many decimals.

    Half-way cases are rounded away from zero, as in school: 0.125 is 0.13. None: a number must be gold itself.
    """
    def rounded(number: Fraction) -> int:
        size = int(abs(number) * 10 ** (decimals or 0) + Fraction(1, 2))
        return -size if number < 0 else size

    def near(answer: Fraction, gold: Fraction) -> bool:
        return abs(answer - gold) <= tolerance or (decimals is not None and rounded(answer) == rounded(gold))

    return None if decimals is None and not tolerance else near


def equal_values(answer: Value, gold: Value, near: Near | None = None) -> bool:
    """Whether two values are equal: exactly, but for the noise of floating-point numbers; or near.

    A value without unit equals one with any unit. Percent equals its number and its hundredth: 28% is 28 and 0.28.
    """
    if answer.is_percent != gold.is_percent:
        percent, plain = (answer, gold) if answer.is_percent else (gold, answer)
        also = answer.number / 100 if answer.is_percent else answer.number * 100
        return not plain.unit and (plain.number in (percent.number, percent.number / 100) or (
            near is not None and (near(answer.number, gold.number) or near(also, gold.number))))
    if answer.unit and gold.unit and answer.unit != gold.unit:
        return False
    both = bool(answer.unit and gold.unit)
    a, b = (value.number * (value.scale if both else 1) for value in (answer, gold))
    noisy = max(answer.digits, gold.digits) >= NOISE_DIGITS and max(a.denominator, b.denominator) > 1
    if a == b or (noisy and abs(a - b) <= NOISE * abs(b)):
        return True
    return near is not None and near(a / (gold.scale if both else 1), gold.number)


def split_unit(text: str) -> tuple[str, tuple[object, ...]]:
    """An expression and the known unit behind it: 25\\pi cm^{2} -> 25\\pi, (m, 2) and its scale.

    A single letter is a unit only if it is m behind an expression without variables: of \\pi r^{2} h, h is none.
    """
    for match in re.finditer(r"\s(?=\s*([^\W\d_]+))", text):
        at, letter = match.start(), match[1] if len(match[1]) == 1 and match[1].isascii() else ""
        if letter and (letter != "m" or re.search("[A-Za-z]", _SILENT.sub("", text[:at]))):
            continue
        unit = _unit(text[at:])
        if unit and unit.powers and set(unit.powers) <= _BASES.keys():
            return text[:at], (*sorted(unit.powers.items()), unit.scale)
    return text, ()


def _number(match: re.Match[str]) -> Fraction | None:
    sign = -1 if (match[1] + match[3]).count("-") == 1 else 1
    if match["mixed"]:
        over, under = [int(each) for each in match.group(5, 6, 7, 8) if each]
        return sign * (int(match["mixed"]) + Fraction(over, under)) if 0 < over < under else None
    if match["top"] or match["over"]:
        top, bottom = (_decimal(match[a] or match[b]) for a, b in (("top", "over"), ("bottom", "under")))
        return sign * top / bottom if bottom else None
    exponent = match["ten"] or match[match.re.groups - 1] or match[match.re.groups] or "0"
    if len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return sign * _decimal(match["decimal"] or "1") * Fraction(10) ** int(exponent)


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ]", "", text).removesuffix("."))


def _known(name: str) -> tuple[str, Fraction] | None:
    """Base and scale of a unit that is in the table, also in the plural."""
    lower = name.lower()
    return next((UNITS[each] for each in (name, lower, lower.removesuffix("s"), lower.removesuffix("es"))
                 if each in UNITS), None)  # fmt: skip


class _Unit:
    """The text behind a number, read factor by factor."""

    def __init__(self) -> None:
        self.powers: Counter[str] = Counter()  # base -> power
        self.scale = self.times = Fraction(1)  # to base units; of words such as million

    def add(self, name: str, power: int) -> None:
        base, scale = _known(name) or (name.lower().removesuffix("s"), Fraction(1))
        if base:
            self.powers[base] += power
            self.scale *= scale**power
        else:
            self.times *= scale


def _unit(text: str) -> _Unit | None:
    """The unit in the text behind a number; None if the text is none."""
    unit, at, divides, glued = _Unit(), 0, False, text[:1] != " "
    for _ in range(_MOST_FACTORS):
        match = _FACTOR.match(text, at)
        if not match or not text[at:].strip(" .,"):
            break
        operator, before, name, power, after = match.groups()
        name = name.rstrip(".").replace(" ", "")
        # 5m may be a product, 5 m is a length; 14th is no unit, 14cm is one.
        unknown = glued and name.isascii() and name.isalpha() and (len(name) == 1 or not _known(name))
        if unknown or name in _NO_UNITS:
            return None
        divides = divides or operator in ("/", "per")
        exponent = int(power or _WRITTEN_POWER.get((before or after or "").strip(" ."), 1))
        unit.add(name, -exponent if divides else exponent)
        at, glued = match.end(), False
    return None if text[at:].strip(" .,") else unit
