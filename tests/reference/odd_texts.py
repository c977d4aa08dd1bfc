"""Texts for tokenizers, from a seed: everyday ones, and every kind that tokenizers stumble over."""

from random import Random

EVERYDAY = """
the a of and to in is you that it he was for on are as with his they I at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than first
water been call who oil its now find long down day did get come made may part don't we'll I'm she'd they've It's CAN'T
Transformer tokenization naïve café Zürich São façade coöperate antidisestablishmentarianism NASA iPhone GitHub
"""
PUNCTUATION = """
. , ; : ! ? ... … - – — ( ) [ ] { } ' " ` ´ “ ” ‘ ’ « » / \\ | @ # $ % ^ & * + = < > ~ _ -- ''' !!! ?! €5 £ ¥
"""
TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start>
<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script>
<empty_output> <|im_start|>user <|im_start|>assistant <|im_ <|im_end |im_end|> <|IM_END|> <| |> <pad> [PAD] <s> </s>
"""
WORDS, MARKS, SPECIAL = EVERYDAY.split(), PUNCTUATION.split(), TOKENS.split()
BLANKS = (
    " ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\r\n", "\n    ", " \n",
    "\t\t", "\u00a0", "\u3000", "\u200b", "\u2028", "",
)  # fmt: skip
EMOJI = (
    "😀", "😂", "🥲", "👍", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇳🇴", "🇯🇵", "❤️", "☕", "✈️", "1️⃣", "🔟",
    "🧑🏿\u200d🚀", "🫠", "🪿", "♀", "☺", "™", "©️",
)  # fmt: skip
SCRIPTS = (  # first and last code point
    (0xC0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x556), (0x5D0, 0x5EA), (0x621, 0x669), (0x904, 0x96F),
    (0x985, 0x9EF), (0xB85, 0xBF2), (0xE01, 0xE5B), (0xF40, 0xF6A), (0x10A0, 0x10FF), (0x1200, 0x137C),
    (0x1780, 0x17E9), (0x2070, 0x209C), (0x2150, 0x218B), (0x2200, 0x22FF), (0x2460, 0x24FF), (0x2500, 0x257F),
    (0x3041, 0x30FF), (0x3220, 0x3247), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF10, 0xFF5A), (0x10330, 0x1034A),
    (0x1D400, 0x1D7FF),
)  # fmt: skip
CODE = (
    "def f(x, y=0.5):\n    return x[0:10] ** 2 + y\n",
    "for (int i = 0; i < 1024; i++) {\n\tsum += a[i];\n}\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "x": null}',
    "<div class=\"row\">\n  <p>1 &lt; 2</p>\n</div>",
    "$ pip install --no-deps torch==2.13.0  # 0x1F 1e-5\n",
    "| a | b |\n|---|---|\n|  1 |  20 |\n",
    "\\frac{1}{2} \\sum_{i=1}^{n} x_i^2 \\le 3.14159",
    "1. one\n2. two\n\n3. three\n\n    4 four\n",
    "https://example.org/a/b?c=1&d=%20e#f, user.name+tag@mail.example.com",
)  # fmt: skip


def odd_texts(n: int = 5_000, seed: int = 0) -> list[str]:
    """So many texts, the empty one first; the same ones everywhere, since only `random` decides."""
    random = Random(seed)
    kinds = (_words, _numbers, _blanks, _code, _scripts, _emoji, _special, _any_code_points, _marks)
    texts = [""]
    while len(texts) < n:
        parts = [random.choice(kinds)(random) for _ in range(random.choice((1, 1, 2, 3)))]
        texts.append(random.choice(BLANKS).join(parts))
    return texts


def _words(random: Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, 20))) + random.choice(MARKS)


def _numbers(random: Random) -> str:
    number = "".join(random.choices("0123456789", k=random.randint(1, 9)))
    forms = (
        "{}",
        "{}%",
        "${}",
        "-{}",
        "{}.{}",
        "{},{}",
        "{}:{}",
        "{}/{}",
        "{} {}",
        "{}  {}",
        "\n{}\n\n{}",
        "v{}.{}a",
        "x{}",
        "{}th",
    )
    return random.choice(WORDS) + random.choice(BLANKS) + random.choice(forms).format(number, random.randint(0, 10**6))


def _blanks(random: Random) -> str:
    return "".join(
        random.choice(BLANKS) + random.choice((*WORDS, *MARKS, "7", "")) for _ in range(random.randint(1, 12))
    )


def _code(random: Random) -> str:
    lines = "".join(random.choices(CODE, k=random.randint(1, 3)))
    start = random.randrange(len(lines))
    return lines[start : start + random.randint(1, 120)]


def _scripts(random: Random) -> str:
    first, last = random.choice(SCRIPTS)
    words = (
        "".join(chr(random.randint(first, last)) for _ in range(random.randint(1, 8)))
        for _ in range(random.randint(1, 6))
    )
    return random.choice((" ", "", "  ")).join(words)


def _emoji(random: Random) -> str:
    return random.choice((" ", "")).join(random.choices((*EMOJI, *WORDS[:20]), k=random.randint(1, 8)))


def _special(random: Random) -> str:
    return random.choice((" ", "", "\n")).join(random.choices((*SPECIAL, *WORDS[:20]), k=random.randint(1, 6)))


def _any_code_points(random: Random) -> str:
    points = (
        random.choice((random.randint(0, 0x2FF), random.randint(0, 0xD7FF), random.randint(0xE000, 0x10FFFF)))
        for _ in range(9)
    )
    return "".join(map(chr, points))


def _marks(random: Random) -> str:
    return random.choice((" ", "")).join(random.choices((*MARKS, *WORDS[:10]), k=random.randint(1, 12)))
