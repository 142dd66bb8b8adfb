"""The verb that an instruction opens with, and its object: Self-Instruct's picture of a data set.

    opening("Write a short story about …")    ("write", "story")
    openings(instructions)                     each verb, its count, its most frequent objects

Both are found without a parser, for English: the verb is the first word, if it can open a command,
and the object is the last word of the phrase after it. Rare objects are sometimes nonsense.
`alpaca curate report` counts and draws them (arXiv:2212.10560).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from alpaca.common.charts import Bars

TOP_OBJECTS = 4  # of each verb

QUESTION_WORDS = """what what's what’s how how's why when where where's who who's whom whose which
is isn't are aren't was were does doesn't did can can't could should would will may might has am"""
NO_VERBS = f"""{QUESTION_WORDS} a about above according across after against all along also among an
and any as associated assuming at based because been before beginning being below between both but
by called concerning considering containing describing down during each every few first five
following for four from given had have he her here his i if in including into involving it its last
like many me more most my named next no not now of off on once one onto or other our out over own
per provided regarding related second several she since six so some someone starting such ten than
that the their them there these they third this those three through to two under until up upon us
used using various versus via we whether while with within without you your"""
QUESTION_WORDS, NO_VERBS = set(QUESTION_WORDS.split()), set(NO_VERBS.split())
LEAD_IN = re.compile(
    r"(?:please|kindly|(?:can|could|would|will) you|(?:i (?:want|need)|i would like|i'd like) you "
    r"to|your (?:task|job) is to|you (?:need|have|are asked) to|let us|let's"
    r"|(?!apply|comply|fly|multiply|rely|reply|supply)[a-z]+ly)\b[\s,:]*"
)
ADVERB = re.compile("(?<!fami)(?<!assemb)ly$")
TOKEN = re.compile(r"\d[\w.,%-]*|[^\W\d_]+(?:['’-][^\W\d_]+)*|\S")


def opening(instruction: str) -> tuple[str, str]:
    """(verb, object), or ("(question)", its first word), or ("(no verb)", "")."""
    text = instruction[:500].lower().lstrip("\"'“*#- \n")
    while lead_in := LEAD_IN.match(text):
        text = text[lead_in.end() :]
    verb, *rest = TOKEN.findall(text) or ["…"]
    if verb in QUESTION_WORDS or (verb in NO_VERBS and "?" in text):
        return "(question)", verb
    if verb in NO_VERBS or not verb[0].isalpha():
        return "(no verb)", ""
    return verb, object_in(rest[2:] if rest[:1] == ["and"] else rest)  # compare and contrast


def object_in(words: list[str]) -> str:
    """The last word of the first noun phrase, in the singular."""
    last = ""
    for word in words:
        if not word[0].isalnum():
            break
        if word[0].isalpha() and word not in NO_VERBS and not ADVERB.search(word):
            last = word
        elif last and not word[0].isdigit():
            break
    if last.endswith("ies") and last not in ("series", "species", "movies"):
        return last[:-3] + "y"
    return re.sub(r"(?<=ss|sh|ch|.x)es$|(?<=[^\W\d_]{2}[^suic])s$", "", last)


def openings(instructions: Iterable[str]) -> list[tuple[str, int, Bars]]:
    """(verb, count, its most frequent objects), the most frequent verb first."""
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    for verb, noun in map(opening, instructions):
        objects[verb][noun] += 1
    found = []
    for verb, nouns in objects.items():
        top = [(noun, n) for noun, n in nouns.most_common() if noun][:TOP_OBJECTS]
        found.append((verb, nouns.total(), top))
    return sorted(found, key=lambda entry: -entry[1])
