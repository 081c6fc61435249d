"""Words next to a number: units and things, which do not change it, and words that do.

Nouns are an open class, so anything that can be counted is accepted, unless it is listed here as a
word that changes the value. Very short words are the opposite: only the listed units are accepted,
because "k", "M", "pi" and "x" change the value.
"""

import re


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Symbols that may follow a number directly ("5kg").
UNITS = _set(
    """
    kg mg cm mm km nm ml mL dl dL cl kl lb lbs oz ft yd in mi mph kph kmh hr hrs min mins sec secs
    ms ns us wk wks yr yrs kW MW kWh Wh kJ kcal cal Hz kHz MHz GHz kB KB MB GB TB kPa hPa Pa mol ppm
    ppb psi atm bar ha pt qt gal rpm mAh Ah dB eV
    """
)
# One letter needs a space ("5 m"): "5m" is also five million, or 5·m.
SPACED_UNITS = UNITS | _set("m g s h l L J W N V A C F")
# Words of one or two letters in a noun phrase: "3 of the red ones", "12 sq ft".
SMALL_WORDS = _set("a an of in on at per sq cu as he it we be so la le de du")

CARDINALS = _set(
    """
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fourty fifty sixty seventy eighty ninety
    hundred thousand million billion trillion
    """
)
_SCALES = _set(
    """
    lakh lac lacs crore arab kharab dozen score gross pair pairs couple couples trio trios myriad
    mil mill mille millier milliers mio mln mrd mld bio bln trn tsd tausend hundert milliarde
    milliarden millionen millones milliard milliards kilo mega giga tera milli micro nano grand mms
    cientos ciento tusen tusind duizend miljoen miljard douzaine dutzend docena dozzina pm bc bce
    o'clock scores grosses twos ones
    """
)
_PARTS = _set(
    """
    half halves halfs third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh
    sevenths eighth eighths ninth ninths tenth tenths twelfth twelfths sixteenth sixteenths
    twentieth twentieths hundredth hundredths thousandth thousandths millionth millionths billionth
    billionths halb halbe demi demie medio media tiers zehntel hundertstel percentile promille
    permille double doubles doubled twice thrice triple tripled quadruple quadrupled quintuple
    repeating recurring upwards upward onwards downwards short
    """
)
_OPERATORS = _set(
    """
    or plus minus times multiplied multiply divided divide divides subtract subtracted subtracting
    squared cubed square-root power powers root roots sqrt cbrt mod modulo modulus factorial choose
    permute log ln exp sin cos tan sine cosine tangent negative negated inverse inverted reciprocal
    reversed remainder rem decimal exponent raised halved squareroot radical complement conjugate
    binary octal hex hexadecimal ternary roman radian radians und oder mal weniger mehr hoch
    komma ou moins fois menos más por virgule coma punto hasta bis increased
    decreased away opposite flipped
    """
)
# These change a number only if they are close to it.
_CLOSE_OPERATORS = _set(
    """
    and over under add added less fewer greater lesser base bases point comma prime bar to through
    thru until till between from durch et plus mas entre with take
    """
)
_NEGATIONS = _set(
    """
    not no nor never none neither nothing without except excluding but isnt arent wasnt doesnt dont
    didnt cant cannot wont wrong incorrect false mistaken mistake error invalid impossible undefined
    infinite infinity unknown unless instead rather fails failed
    nicht kein keine falsch pas faux non
    ni nunca incorrecto actually wait correction hmm oops sorry too guess seems
    """
)
_COMPARISONS = _set(
    """
    least most than up above below exceeding exceeds exceed almost nearly near maximum minimum max
    higher lower larger smaller bigger beyond within anything
    """
)
_SYMBOLS = _set("pi tau phi euler imaginary alpha beta theta sigma lambda omega MM")

# Later in the same sentence, these make a number another one, or no answer.
_STRONG = (CARDINALS | _SCALES | _PARTS | _OPERATORS | _NEGATIONS | _SYMBOLS) - {"but", "short"}
# Next to a number, these are refused.
_CHANGING = _STRONG | _CLOSE_OPERATORS | _COMPARISONS | {"one", "but", "short"}
NEGATIONS = _NEGATIONS - {
    "actually",
    "wait",
    "sorry",
    "oops",
    "hmm",
    "correction",
    "but",
    "instead",
}
# In front of a number, behind the verb, these make it another one ("twice 36"), or no answer.
BEFORE = (
    _PARTS
    | _COMPARISONS
    | _set(
        """
        square cube root log ln power factorial factor multiple multiples divisible inverse opposite
        reciprocal complement mod modulo base plus times over under less more fewer greater hundred
        thousand dozen product sum difference quotient remainder sin cos tan sqrt if were by from
        after before between until since through divided multiplied negative
        """
    )
) - {"max", "maximum", "minimum", "short"}
# In front of a box, fewer words change it: "a sum of", "at least" and "by" lead to the answer.
MULTIPLES = _PARTS | {"minus", "negative"}
LABELS = _set(
    """
    step page version question problem exercise equation eq figure fig table chapter section part
    case line example option choice note footnote item lemma theorem room no nr
    january february march april june july august september october november december jan feb
    mar apr jun jul aug sep sept oct nov dec
    """
)
# A number between these and another number is part of an expression or a list: "3 or 4".
CONNECTORS = _set(
    "and or to of out in minus plus times by over divided multiplied less through until till mod "
    "choose from und oder mal bis ou et with"
)
# Words between two numbers that do not make them one expression: "3 boys is 3 pupils".
LINKS = _set(
    "is are was were equals equal be being gives give makes make becomes leaves leave yields yield "
    "get gets so then thus hence but has have"
)
# Text behind a number that says that it is not the answer.
NO_ANSWER = re.compile(
    r"\b(?:no\s+(?:\w+\s+)?(?:solutions?|answers?|values?|roots?)|undefined|infinite(?:ly)?"
    r"|infinity|(?:not|n't)\s+(?:exist|possible|defined|enough|the\s+(?:right\s+)?answer)"
    r"|impossible|cannot|can't|nonexistent|unsolvable|unknown|empty\s+set|diverges?"
    r"|(?:answer|result|solution|conclusion)s?\**\s*(?:is|are|was|will|would|must|[:=]))",
    re.IGNORECASE,
)

_ENDINGS = ("illion", "illions", "illiard", "illiards", "illionen", "fold", "n't")
_NUMBER_STEMS = re.compile(
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\w+|\w*)|(?:\w+-)?(?:hundred|thousand|dozen|"
    r"lakh|crore)s?|(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve)s"
)


def changes_value(word: str) -> bool:
    """Returns whether a word next to a number makes it another number, or no number."""
    lower = _plain(word)
    return lower in _CHANGING or word in _SYMBOLS or _is_inflected(lower)


def is_strong(word: str) -> bool:
    """Returns whether a word later in the sentence makes a number another one, or no answer."""
    lower = _plain(word)
    return lower in _STRONG or word in _SYMBOLS or _is_inflected(lower)


def is_number_word(word: str, *, least: int = 0) -> bool:
    """Returns whether a word is a number of at least 0 or at least 20, such as "seventy-two"."""
    lower = _plain(word)
    return _NUMBER_STEMS.fullmatch(lower) is not None or (least == 0 and lower in CARDINALS)


def is_unit_word(word: str, *, glued: bool, first: bool) -> bool:
    """Returns whether a word may follow a number without changing it.

    Args:
      word: letters only.
      glued: whether no space is in front of it, as in "5kg".
      first: whether it is the first word behind the number.
    """
    if glued:
        return word in UNITS
    if word in SPACED_UNITS:
        return True
    if len(word) <= 2:
        return word.lower() in SMALL_WORDS and (not first or word.islower())
    return not changes_value(word)


def _plain(word: str) -> str:
    return word.lower().replace("’", "'")


def _is_inflected(lower: str) -> bool:
    return lower.endswith(_ENDINGS) or _NUMBER_STEMS.fullmatch(lower) is not None


_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen
""".split()  # noqa: SIM905
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()  # noqa: SIM905


def spell(number: int) -> str:
    """Returns 0 to 999,999 in English words without hyphens and "and": "seventy two"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        rest = f" {_ONES[number % 10]}" if number % 10 else ""
        return _TENS[number // 10 - 2] + rest
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {spell(number % size)}" if number % size else ""
    return f"{spell(number // size)} {name}{rest}"
