"""Short texts of the kinds that tokenizers treat differently, for checks without text of one's own.

Out: texts by kind. A few lines each: they show how text is split, not how often anything occurs.
"""

from types import MappingProxyType

PROSE = (
    "The harbour was quiet that morning, and the ferry left late. Nobody minded much: the sun was "
    "out, the coffee was hot, and there was nothing to be done on the island before noon anyway.",
    "\"Are you coming?\" she asked. He wasn't sure; he'd promised to call his sister first.",
)
DIGITS = (
    "In 2019 the town had 48,317 inhabitants, 1,204 more than in 2009; 37.5% were under 30.",
    "12 + 345 = 357, and 357 * 20 = 7140. Half of 7140 is 3570, so each gets 3570 / 6 = 595.",
    "Call +44 20 7946 0018 before 17:30 on 2024-02-29, or pay 1e-3 of 1000000.",
)
CODE = (
    'def mean(values: list[float]) -> float:\n    """The arithmetic mean."""\n'
    "    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
    "for (int i = 0; i < n_rows; ++i) {\n\tif (row_ptr[i] != nullptr && !seen.count(i)) {\n"
    "\t\ttotal += row_ptr[i]->getWeight() * 0.5;\n\t}\n}\n",
)
WHITE_SPACE = (
    "name        age    city\nAda          36    London\n\n\n\tindented by a tab\n        by eight "
    "spaces   and three between words  and two.\n",
)
CJK = (
    "今天早上港口很安静,渡船开得晚了。没有人在意:太阳出来了,咖啡还是热的。",
    "二〇一九年,这座小镇有四万八千三百一十七名居民。",
    "今朝の港は静かで、船は遅れて出た。誰も気にしなかった。",
    "오늘 아침 항구는 조용했고 배는 늦게 떠났다.",
)

SAMPLE_TEXTS = MappingProxyType(
    {"prose": PROSE, "digits": DIGITS, "code": CODE, "white space": WHITE_SPACE, "CJK": CJK}
)
"""Texts by kind."""
