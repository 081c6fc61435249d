r"""Reads text that is plainly one number, and refuses everything else.

The text is first brought into a plain form (`plain`): no LaTeX dress, one kind of minus and space,
and each `\frac` between control characters. A grammar then has to match all of it. Nothing is ever
computed, except the value of the notation itself (3 1/2, 1.5e3, 1.5 × 10^3).
"""

import re
import unicodedata
from fractions import Fraction

from jaxrl_stable.rewards import words

# Most digits of a number. With exponents of at most two digits, arithmetic stays cheap.
MAX_DIGITS = 50
# Most characters of an answer, which bounds the work of the regular expressions.
MAX_ANSWER = 200
# Most words before and after the number of a marked answer.
_MAX_WORDS = 8

_DASHES = dict.fromkeys(map(ord, "−‐‑‒–﹣－"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u202f\u2009\u2007\u2008\u2002\u2003\u2005\u200a~"), " ")
_INVISIBLE = dict.fromkeys([*map(ord, "\u200b\u2060\ufeff")])
# Text that has control characters is no answer; two of them stand for the bounds of a fraction.
_CONTROL = dict.fromkeys([*range(9), *range(14, 32), 11, 12, 127], "\ufffd")
_VULGAR = {
    ord(character): " " + unicodedata.normalize("NFKC", character).replace("⁄", "/")
    for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
}
_SUPERSCRIPTS = {ord(character): f"^{digit}" for digit, character in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_CHARACTERS = {
    **_DASHES,
    **_SPACES,
    **_INVISIBLE,
    **_CONTROL,
    **_VULGAR,
    ord("⁄"): "/",
    ord("’"): "'",
    ord("⋅"): "·",
    ord("“"): '"',
    ord("”"): '"',
}

_INTEGER = (
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}"
    r"|[1-9][0-9]{0,2}(?: [0-9]{3})+|[1-9][0-9]{0,2}(?:'[0-9]{3})+|[1-9][0-9]{0,2}(?:_[0-9]{3})+"
    r"|[0-9]+)"
)
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_EXPONENT = r"(?:\{\s*-?\s?[0-9]{1,2}\s*\}|-?[0-9]{1,2})"
_FRACTION = r"\x01[^\x01\x02]*\x02"
_CURRENCY = (
    r"(?:(?:US|AU|CA|NZ|HK|A|C|S|R)?\$|[€£¥₹₩₽₺₪฿]"
    r"|(?:Rs|INR|USD|EUR|GBP|JPY|CAD|AUD|CHF|CNY|RMB)\b\.?)"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s?(?:{_CURRENCY}\s*)?(?P<sign2>[+-]?)\s?(?:"
    rf"(?P<whole>[0-9]+)?\s*(?P<latex>{_FRACTION})"
    rf"|(?P<mixed>[0-9]+)\s+(?P<num>[0-9]{{1,2}})\s?/\s?(?P<den>[0-9]{{1,4}})"
    rf"|(?P<above>{_INTEGER})\s?/\s?(?P<below>{_INTEGER})"
    rf"|(?P<mantissa>{_DECIMAL})\s*[×·*xX]\s*10\s*\^\s*(?P<exponent>{_EXPONENT})"
    rf"|10\s?\^\s*(?P<power>{_EXPONENT})"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]{{1,2}}))?"
    r")"
)
# Signs of a unit; a percent sign is one too: 50% is 50.
_SIGNS = re.compile(r"\s*(?:[$€£¥₹₩₽₺₪฿¢]|\\?%|°\s?[CF]?(?![A-Za-z]))+")
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![A-Za-z])")
_POWER = r"(?:\s?\^\s?(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
_WORD = re.compile(rf"(?P<gap>[\s/·-]*)(?P<word>[A-Za-zµÀ-ÖØ-öø-ÿ]+(?:'[a-z]+)?)\.?{_POWER}")
_FORMULA = re.compile(r"[\s]+(?:[A-Z][a-z]?[0-9]?){2,6}(?![A-Za-z0-9])")
_GLOSS = re.compile(r"\s*\((?P<words>[A-Za-z]+(?:[\s-]+[A-Za-z]+){0,11})\)")
_IS_THE_ANSWER = re.compile(
    r"\s+is\s+(?:the|my|our)\s+(?:(?:final|correct|right)\s+)?(?:answer|result|solution|total)"
)

_WRAPPING = " \t\r\n$*`_"
_LEAD_IN = re.compile(
    r"(?P<words>(?:[A-Za-z][A-Za-z']*[,\s]+){0,12})"
    r"(?P<last>answer|result|solution|is|are|was|were|be|equals|equal\s+to|about|approximately"
    r"|approx\.?|roughly|around|exactly|only|just|total\s+of|get|gives?|have|has)"
    r"(?:\s+(?:about|approximately|roughly|around|exactly|only|just|equal\s+to))?[*_]*\s*[:=≈]?[\s*_$]+"
    r"|(?P<colon>(?:[A-Za-z][A-Za-z']*\s+){0,6}[A-Za-z]+)[*_]*\s*[:=][\s*_$]*|[=≈:][\s*_$]*"
)

_LETTERS = frozenset("bcdefghijklmnopqrstuvwxyzBCDEFGHJKLMNOPQRSTUVWXYZ")

_ARGUMENT = r"(?:\{\s*(-?\s?(?:[0-9][0-9,.]*|\.[0-9]+))\s*\}|\s*([0-9]))"
_LATEX_FRACTION = re.compile(rf"\\[dtc]?frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_FONT = re.compile(
    r"\\(?:text|mathrm|mbox|hbox|textrm|textbf|textit|textsf|mathbf|mathit|mathsf|boldsymbol|bm|emph"
    r"|operatorname|rm|bf|underline)\s*\{([^{}]*)\}"
)
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|bf|rm|it|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
)
_SPACE = re.compile(r"\\(?:[,;:> ]|(?:quad|qquad|thinspace|enspace|medspace)(?![A-Za-z]))|\{\\,\}")
_DEGREE = re.compile(r"(?:\{\})?\{?\^\s*\{?\s*\\circ\s*\}?(?![A-Za-z])|\\degree(?![A-Za-z])|\^?°")
_GROUP = re.compile(r"(?<![\w^}\\.\x02])((?:[+-]\s?)?)\{\s*(-?\s?[0-9][0-9,.]*)\s*\}")
# GSM8K's annotation of a computation, "48/2 = <<48/2=24>>24".
_CALCULATION = re.compile(r"<<[^<>]{0,200}>>")
_TAG = re.compile(r"</?[A-Za-z]{1,16}>|<\|[a-z_]{1,24}\|>")
_SYMBOLS = {
    "approx": "≈",
    "simeq": "≈",
    "sim": "≈",
    "times": "×",
    "cdot": "·",
    "mu": "µ",
    "euro": "€",
    "pounds": "£",
}
_SYMBOL = re.compile(rf"\\({'|'.join(_SYMBOLS)})(?![A-Za-z])")


def plain(text: str) -> str:
    """Returns text without the dress of a number: LaTeX fonts and spaces, HTML tags, typography."""
    text = text.translate(_CHARACTERS)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹]", lambda match: _SUPERSCRIPTS[ord(match.group())], text)
    if "<" in text:
        text = _TAG.sub(" ", _CALCULATION.sub("", text))
    if "\\" in text or "{" in text:
        text = text.replace("{,}", ",").replace("\\!", "").replace("\\{", "\ufffd")
        text = _SPACE.sub(" ", text)
        text = _DEGREE.sub("°", text)
        text = re.sub(r"\\([$%])", r"\1", text)
        text = _STYLE.sub(" ", text)
        text = _FONT.sub(_dressed, text)
        text = _SYMBOL.sub(lambda match: _SYMBOLS[match.group(1)], text)
        text = _LATEX_FRACTION.sub(_bounded, text)
        text = _GROUP.sub(r"\1\2", text)
        text = re.sub(r"\\[()\[\]]", "$", text)
    return text


def _dressed(match: re.Match[str]) -> str:
    return f" {match.group(1)} "


def _bounded(match: re.Match[str]) -> str:
    above, below = match.group(1) or match.group(2), match.group(3) or match.group(4)
    return f"\x01{above}/{below}\x02"


def read_number(text: str) -> Fraction | None:
    """Reads a text that is one number as a whole, with its lead-in and its unit.

    Returns:
      The exact value; None if the text is anything else, even if a number is in it.
    """
    if len(text) > MAX_ANSWER:
        return None
    return read_plain(plain(text))


def read_plain(text: str) -> Fraction | None:
    """Like `read_number`, for a text in plain form."""
    text = unquote(text.rstrip("\\").strip(_WRAPPING))
    lead_in = _LEAD_IN.match(text)
    if lead_in is not None and _is_harmless(lead_in):
        text = text[lead_in.end() :]
    text = unquote(text.strip(_WRAPPING))
    negative = re.match(r"(?:minus|negative)\s+(?=[0-9.\x01])", text)
    if negative is not None:
        text = text[negative.end() :]
    number = match_number(text)
    if number is None:
        return None
    value, end = number
    rest = text[end:]
    if not is_unit(rest) and not _spells(rest, value):
        return None
    return -value if negative is not None else value


def unquote(text: str) -> str:
    """Returns text without the quotes around it; a single quote behind a number is a prime."""
    bare = text.rstrip(".,;: ")
    if len(bare) > 2 and bare[0] == bare[-1] and bare[0] in "'\"":
        return bare[1:-1].strip(_WRAPPING)
    return text


def match_number(text: str) -> tuple[Fraction, int] | None:
    """Returns the value of the number at the start of plain text, and where it ends."""
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["sign2"]):
        return None
    if sum(map(str.isdigit, match.group())) > MAX_DIGITS:
        return None
    value = _value(match)
    if value is None:
        return None
    return (-value if "-" in (match["sign"], match["sign2"]) else value), match.end()


def _value(match: re.Match[str]) -> Fraction | None:
    if match["latex"] is not None:
        above, _, below = match["latex"][1:-1].replace(" ", "").partition("/")
        above, below = _decimal(above), _decimal(below)
        return _mixed(match["whole"], above, below)
    if match["mixed"] is not None:
        return _mixed(match["mixed"], Fraction(match["num"]), Fraction(match["den"]))
    if match["above"] is not None:
        return _mixed(None, _decimal(match["above"]), _decimal(match["below"]))
    if match["power"] is not None:
        return Fraction(10) ** _integer(match["power"])
    if match["mantissa"] is not None:
        return _decimal(match["mantissa"]) * Fraction(10) ** _integer(match["exponent"])
    return _decimal(match["decimal"]) * Fraction(10) ** int(match["e"] or 0)


def _mixed(whole: str | None, above: Fraction | None, below: Fraction | None) -> Fraction | None:
    """Returns whole + above/below. A mixed number has a proper fraction: 3 7/2 is none."""
    if above is None or not below:
        return None
    if whole is None:
        return above / below
    proper = 0 < above < below and above.denominator == below.denominator == 1
    if not proper or (len(whole) > 1 and whole[0] == "0"):
        return None
    return int(whole) + above / below


_WHOLE_DECIMAL = re.compile(rf"-?{_DECIMAL}")


def _decimal(text: str) -> Fraction | None:
    if _WHOLE_DECIMAL.fullmatch(text) is None:
        return None
    return Fraction(re.sub(r"[,_' ]", "", text))


def _integer(exponent: str) -> int:
    return int(exponent.strip("{} ").replace(" ", ""))


def is_unit(text: str) -> bool:
    """Returns whether the text behind a number is a unit or a short noun phrase, or nothing."""
    if text.lstrip(" $").startswith(("..", "…")):  # 0.333...
        return False
    text = text.rstrip(" \t\r\n$*`_.,;:")
    phrase = _IS_THE_ANSWER.search(text)
    if phrase is not None and phrase.end() == len(text):
        text = text[: phrase.start()]
    signs = _SIGNS.match(text)
    position = signs.end() if signs is not None else 0
    ordinal = _ORDINAL.match(text)
    if ordinal is not None:
        position = ordinal.end()
    for count in range(_MAX_WORDS):
        if position == len(text):
            return True
        match = _WORD.match(text, position)
        if match is None:
            break
        glued = not match["gap"] and count == 0 and position == 0
        if not words.is_unit_word(match["word"], glued=glued, first=count == 0):
            break
        if not match["gap"] and position > 0 and text[position - 1] not in "$€£¥₹%° .":
            break
        if "-" in match["gap"] and not (count and match["gap"] == "-"):
            break  # "5-year" is no noun phrase, "5 light-years" is one
        position = match.end()
    formula = _FORMULA.match(text, position)
    return formula is not None and position > 0 and formula.end() == len(text)


def _is_harmless(lead_in: re.Match[str]) -> bool:
    found = re.findall(r"[A-Za-z']+", lead_in["words"] or lead_in["colon"] or "")
    if lead_in["colon"] is not None and len(found[-1]) == 1:  # an equation, "A = 5"
        return False
    return not any(words.changes_value(word) or word in _LETTERS for word in found)


def _spells(text: str, value: Fraction) -> bool:
    """Returns whether the text repeats the number in words: "72 (seventy-two)"."""
    gloss = _GLOSS.fullmatch(text.rstrip(" .,;:"))
    if gloss is None or value.denominator != 1 or not 0 <= value < 1_000_000:
        return False
    found = [word for word in re.split(r"[\s-]+", gloss["words"].lower()) if word != "and"]
    return " ".join(found) == words.spell(int(value))
