"""Words next to a number: units and things, which do not change it, and words that do.

Nouns are an open class, so anything that can be counted is accepted unless it is listed here as a
word that changes the value. Very short words are the opposite: only the listed units are accepted,
because "k", "M", "pi" and "x" change the value.
"""

import re

# Symbols that may follow a number directly ("5kg").
_LONG_SYMBOLS = """
    kg mg cm mm km nm ml mL dl dL cl kl lb lbs oz ft yd in mi mph kph kmh hr hrs min mins sec secs ms
    ns us wk wks yr yrs kW MW kWh Wh kJ kcal cal Hz kHz MHz GHz kB KB MB GB TB kPa hPa Pa mol ppm
    ppb psi atm bar ha pt qt gal rpm mAh Ah dB eV
""".split()
# Symbols that need a space ("5 m"): "5m" is also five million or 5·m.
_SHORT_SYMBOLS = "m g s h l L J W N V A C F".split()
UNITS = frozenset(_LONG_SYMBOLS)
SPACED_UNITS = frozenset(_LONG_SYMBOLS + _SHORT_SYMBOLS)

# Words of one or two letters that may stand in a noun phrase: "3 of the red ones".
SMALL_WORDS = frozenset("a an of in on at by per sq cu mm as us he it we be so am le la de du".split())
SMALL_WORDS -= {"by", "am"}  # "2 by four", "5 am"

_CARDINALS = """
    zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fourty fifty sixty seventy eighty ninety
    hundred thousand million billion trillion
""".split()
_SCALES = """
    hundred thousand lakh lac lacs crore arab kharab dozen score gross pair couple trio myriad
    mil mill mille milliers millier mio mln mrd mld bio bln trn tsd tausend hundert milliarde
    milliarden millionen millones milliards milliard million billion billions trillion kilo mega
    giga tera milli micro nano cent cents? hunderttausend cientos ciento tusen tusind
    duizend miljoen miljard douzaine dutzend docena dozzina grand mms pm bce
""".replace("cents?", "").replace(" cent ", " ").split()
_PARTS = """
    half halves halfs third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh
    sevenths eighth eighths ninth ninths tenth tenths twelfth twelfths sixteenth sixteenths twentieth
    twentieths hundredth hundredths thousandth thousandths millionth millionths billionth billionths
    halb halbe demi demie medio media tiers quart zehntel hundertstel percentile promille permille
    double doubles doubled twice thrice triple tripled quadruple quintuple fold twofold tenfold
""".split()
_OPERATORS = """
    and or plus minus times multiplied multiply divided divide over under add added subtract
    subtracted less more fewer greater lesser squared cubed square-root square-rooted power powers
    root roots sqrt cbrt mod modulo modulus base bases factorial choose permute log ln exp sin cos
    tan sine cosine tangent negative negated inverse inverted reciprocal reversed remainder rem
    point comma decimal exponent raised halved squareroot radical prime bar complement conjugate
    binary octal hex hexadecimal ternary roman radians radian to through thru until till between
    und oder mal weniger mehr durch hoch komma ou moins fois plus et menos mas más por entre
    virgule coma punto hasta bis
""".split()
_NEGATIONS = """
    not no nor never none neither nothing without except excluding but isn't isnt aren't arent
    wasn't wasnt doesn't doesnt don't dont didn't didnt can't cant cannot won't wrong incorrect
    false mistaken mistake error invalid impossible undefined infinite infinity unknown unless
    instead rather nicht kein keine falsch pas faux non ni sin nunca incorrecto actually wait
    correction hmm oops sorry
""".split()
_COMPARISONS = """
    least most than up above below exceeding exceeds exceed almost nearly near maximum minimum max
    higher lower larger smaller bigger beyond within anything almost
""".split()
_SYMBOLS = "pi tau phi euler imaginary infinity alpha beta theta sigma lambda omega".split()

CARDINALS = frozenset(_CARDINALS)
# In the same sentence behind a number, these make it another one or no answer.
STRONG = frozenset(
    [*_CARDINALS, *_SCALES, *_PARTS, *_OPERATORS, *_NEGATIONS, *_SYMBOLS]
) - frozenset("and to over under more less bar point through base prime but add".split())
STRONG |= {"minus", "plus"}
# Directly behind a number, or anywhere in a marked answer, these are refused.
CHANGING = frozenset(
    [*_CARDINALS, *_SCALES, *_PARTS, *_OPERATORS, *_NEGATIONS, *_SYMBOLS, *_COMPARISONS, "one"]
) | frozenset("ones pairs couples scores grosses dozens".split())
CHANGING -= {"more", "us"}
# Behind the number anywhere, these say that it is not the answer.
NO_ANSWER = re.compile(
    r"\b(?:no\s+(?:\w+\s+)?(?:solutions?|answers?|values?|roots?)|undefined|infinite(?:ly)?"
    r"|infinity|(?:not|n't)\s+(?:exist|possible|defined|enough|the\s+(?:right\s+)?answer)"
    r"|impossible|cannot|can't|nonexistent|unsolvable|unknown|empty\s+set|diverges?)\b",
    re.IGNORECASE,
)
# In front of a number in running text, these make it another one ("twice 36") or a label.
BEFORE = (
    frozenset([*_PARTS, *_NEGATIONS, *_COMPARISONS])
    | frozenset(
        """
        square cube root log ln power factorial inverse reciprocal mod modulo base negative minus
        plus times over under less more fewer greater hundred thousand dozen product difference
        quotient remainder sin cos tan sqrt
        """.split()
    )
) - {"actually", "wait", "sorry", "oops", "hmm", "correction", "but", "instead", "max", "sin"}
LABELS = frozenset(
    """
    step page version question problem exercise equation eq figure fig table chapter section part
    case line example option choice note footnote item lemma theorem room no nr
    january february march april june july august september october november december jan feb
    mar apr jun jul aug sep sept oct nov dec
    """.split()
)
# A number between these and another number is part of an expression or a list: "3 or 4".
CONNECTORS = frozenset(
    "and or to of out minus plus times by over divided multiplied less through until till mod "
    "choose from und oder mal bis ou et".split()
)

_SUFFIXES = re.compile(r"(?:\w*[a-z])?(?:illions?|illiards?|illionen|fold)")
_NUMBER_STEMS = re.compile(
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty(?:-\w+|\w*)|(?:\w+-)?(?:hundred|thousand|dozen|"
    r"lakh|crore)s?|(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve)s"
)


def changes_value(word: str) -> bool:
    """Returns whether a word next to a number makes it another number, or no number."""
    word = word.lower().replace("’", "'")
    if word in CHANGING or _SUFFIXES.fullmatch(word) or _NUMBER_STEMS.fullmatch(word):
        return True
    return word.endswith("n't")


def is_strong(word: str) -> bool:
    """Returns whether a word later in the sentence makes a number another one, or no answer."""
    word = word.lower().replace("’", "'")
    if word in STRONG or _SUFFIXES.fullmatch(word) or _NUMBER_STEMS.fullmatch(word):
        return True
    return word.endswith("n't")


def is_number_word(word: str) -> bool:
    """Returns whether a word is a number, such as "twelve" or "seventy-two"."""
    word = word.lower()
    return word in CARDINALS or _NUMBER_STEMS.fullmatch(word) is not None


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


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
