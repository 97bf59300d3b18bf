"""What the masks find in real text, to be judged by eye, and what they find of planted values.

    python benchmarks/masks.py                                               # texts from packages
    python benchmarks/masks.py --text kernel='/usr/share/doc/linux-doc-6.1/Documentation/**/*.rst*'
    python benchmarks/masks.py --kinds ip,card --samples 100                 # more to judge

For each corpus and kind: how many masks, in how many documents, and a seeded sample of them with the text around. The
precision of docs/clean.md is counted over such samples: a mask is right if what it replaced is a value of its kind,
even if only an example. Local files are read as UTF-8 (HTML as its text), `.gz` unpacked.

Planted: random values of each form that is written (addresses of the whole range, cards by issuer with and without
separators, Chinese mobile, landline and service numbers, numbers with country codes), each in running text of both
languages, in brackets, quotes and tables; the share that is masked completely is printed.
"""

import argparse
import glob
import gzip
import ipaddress
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import corpus  # noqa: E402
from rules_corpus import read  # noqa: E402

from pipeline.data.cleaning.pii import KINDS, Mask, mask_text  # noqa: E402
from pipeline.data.sources.web_pages import extract_text  # noqa: E402

MARK = "\ue000\ue001"  # occurs in no text, so that replaced values can be located
CONTEXTS = (
    ("Write to ", " today."),
    ("请联系", "，谢谢。"),
    ("(", ")"),
    ("a\t", "\tb"),
    ('"', '",'),
    ("见", "。"),
    ("", "\n"),
)


def packages() -> dict[str, list[str]]:
    return {
        "wikipedia, English": corpus.english(),
        "novel, reviews, dictionary, Chinese": corpus.chinese(),
        "c4, English": [json.loads(line)["text"] for line in read("c4").splitlines()],
        "answers, Chinese": [row["output"] for row in json.loads(read("answers_zh"))],
    }


def local(pattern: str) -> list[str]:
    texts = []
    for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True)):
        path = Path(name)
        if not path.is_file():
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", "replace")
        texts.append(extract_text(text, "all").text if ".htm" in path.name else text)
    return texts


def masked_places(text: str, kind: str) -> list[str]:
    """Each value of a text that is masked, in brackets, with 40 characters before it and 25 after it."""
    marked, counts = mask_text(text, Mask(use=[kind], form=MARK))
    if not counts:
        return []
    pieces = marked.split(MARK)
    places, at = [], len(pieces[0])
    for piece in pieces[1:]:
        # the replaced value is what is between two pieces
        end = text.index(piece, at) if piece else len(text)
        places.append((at, end))
        at = end + len(piece)
    return [f"{text[max(0, start - 40) : start]}⟦{text[start:end]}⟧{text[end : end + 25]}" for start, end in places]


# ---- planted values --------------------------------------------------------------------------------------------------


def planted(rng: random.Random, number: int = 200) -> dict[str, dict[str, list[str]]]:
    """Kind -> form -> values."""
    digits = lambda count: "".join(rng.choices("0123456789", k=count))  # noqa: E731
    four = [_card(rng, prefix, 16) for prefix in ("4", "51", "55", "2221", "6011", "65", "3528", "62") * (number // 8)]
    amex = [_card(rng, prefix, 15) for prefix in ("34", "37") * (number // 2)]
    union = [_card(rng, "62", 19) for _ in range(number)]
    mobile = [rng.choice(("13", "150", "155", "166", "173", "18", "191", "198")) for _ in range(number)]
    mobile = [prefix + digits(11 - len(prefix)) for prefix in mobile]
    area = ["010", "021", "0755", "0571", "0311", "0991"]
    return {
        "ip": {
            "IPv4": [_address(rng) for _ in range(10 * number)],
            "IPv6": [str(ipaddress.IPv6Address((0x24 << 120) + rng.getrandbits(120))) for _ in range(number)],
            "IPv6 with ::": [f"2409:8c{digits(2)}:{digits(4)}::{digits(2)}" for _ in range(number)],
        },
        "card": {
            "bare": four + union + amex,
            "4-4-4-4": [by.join(card[i : i + 4] for i in (0, 4, 8, 12)) for card in four for by in " -"],
            "4-6-5": [f"{card[:4]}{by}{card[4:10]}{by}{card[10:]}" for card in amex for by in " -"],
            "4-4-4-4-3, 6-13": [" ".join(card[i : i + 4] for i in range(0, 19, 4)) for card in union]
            + [f"{card[:6]} {card[6:]}" for card in union],
        },
        "mobile_zh": {
            "bare": mobile,
            "3-4-4": [f"{value[:3]}{by}{value[3:7]}{by}{value[7:]}" for value in mobile for by in " -"],
            "+86": [f"{code}{value}" for value in mobile for code in ("+86", "+86 ", "0086-", "+86-")],
        },
        "phone": {
            "landline": [f"{rng.choice(area)}-{rng.choice('2345678')}{digits(7)}" for _ in range(number)],
            "(area)": [f"({rng.choice(area)}) {rng.choice('2345678')}{digits(7)}" for _ in range(number)],
            "400": [f"400-{rng.choice('1678')}{digits(2)}-{digits(4)}" for _ in range(number)],
            "+86": [
                f"+86 {rng.choice(area)[1:]} {rng.choice('2345678')}{digits(3)} {digits(4)}" for _ in range(number)
            ],
            "North America": [
                form.format(f"{rng.choice('23456789')}{digits(2)}", f"{rng.choice('23456789')}{digits(2)}", digits(4))
                for _ in range(number)
                for form in ("({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "1-{}-{}-{}", "+1 {} {} {}")
            ],
            "Europe": [
                form.format(digits(4), digits(4))
                for _ in range(number)
                for form in ("+44 20 {} {}", "+49 30 {}{}", "+33 1 {} {}", "+353 1 {}{}")
            ],
        },
    }


def _address(rng: random.Random) -> str:
    while True:
        address = ipaddress.IPv4Address(rng.getrandbits(32))
        if address.is_global and not address.is_multicast:
            return str(address)


def _card(rng: random.Random, prefix: str, length: int) -> str:
    body = prefix + "".join(rng.choices("0123456789", k=length - 1 - len(prefix)))
    doubled = [int(digit) * (2 - index % 2) for index, digit in enumerate(reversed(body))]
    return body + str(-sum(value - 9 * (value > 9) for value in doubled) % 10)


def recall(kind: str, values: list[str]) -> float:
    """Share of values, each in all CONTEXTS, that are masked completely, with all masks on."""
    mask = Mask(use=list(KINDS))
    right = 0
    for value in values:
        for before, after in CONTEXTS:
            right += mask_text(before + value + after, mask)[0] == f"{before}[{kind.upper()}]{after}"
    return right / len(values) / len(CONTEXTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=GLOB", help="local files, further corpora")
    parser.add_argument("--no-packages", action="store_true", help="only the local files")
    arguments = parser.parse_args()
    corpora = {} if arguments.no_packages else packages()
    for text in arguments.text:
        name, _, pattern = text.partition("=")
        corpora[name] = local(pattern)
    for name, texts in corpora.items():
        characters = sum(map(len, texts))
        print(f"{name}: {len(texts):,} documents, {characters / 1e6:.1f} M characters")
        for kind in arguments.kinds.split(","):
            places, documents = [], 0
            for text in texts:
                found_here = masked_places(text, kind)
                places += found_here
                documents += bool(found_here)
            print(f"  {kind}: {len(places)} in {documents} documents")
            for place in random.Random(0).sample(places, min(arguments.samples, len(places))):
                print(f"    {place!r}")
    print("planted values that are masked completely:")
    for kind, forms in planted(random.Random("masks")).items():
        for form, values in forms.items():
            print(f"  {kind}, {form}: {recall(kind, values):.1%} of {len(values) * len(CONTEXTS)}")


if __name__ == "__main__":
    main()
