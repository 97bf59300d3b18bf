"""Whether an answer follows the instructions of IFEval (Zhou et al., 2023): checks of form that need no judge.

The rules are those of the published checkers, but for three which need models or data of other packages: sentences and
words in capitals are counted by rules here, and the language is recognised as in `clean`.
"""

import json
import re
from collections import Counter

RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|(?<=[。！？])")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|No|[A-Z])\.$")
WORD = re.compile(r"\w+(?:[-'.&]\w+)*")


def follows(name: str, options: dict, answer: str) -> bool:
    """Whether an answer follows one instruction. name: GROUP:NAME, as in the data; options: its own. An empty answer
    follows none. Raises KeyError for an instruction that is not known."""
    check = CHECKS[name]
    options = {key: value for key, value in options.items() if value}
    return bool(answer.strip()) and check(answer, **options)


def follows_loosely(name: str, options: dict, answer: str) -> bool:
    """The same of the answer without its first line, its last line, and asterisks, in any combination."""
    lines = answer.split("\n")
    variants = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants += [variant.replace("*", "") for variant in variants]
    return any(follows(name, options, variant) for variant in variants)


def _compared(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


# ---- words, letters, sentences ---------------------------------------------------------------------------------------


def _keywords(answer: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, answer, flags=re.IGNORECASE) for keyword in keywords)


def _keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(len(re.findall(keyword.strip(), answer, flags=re.IGNORECASE)), relation, frequency)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, flags=re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(Counter(answer.lower())[letter.strip().lower()], let_relation, let_frequency)


def _number_words(answer: str, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", answer)), relation, num_words)


def _number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _compared(count_sentences(answer), relation, num_sentences)


def count_sentences(text: str) -> int:
    """A sentence ends at a full stop, question or exclamation mark before white space, but not after abbreviations."""
    count, pending = 0, ""
    for part in SENTENCE_END.split(text.strip()):
        pending += part
        if pending and not ABBREVIATION.search(pending):
            count, pending = count + 1, ""
    return count + bool(pending)


def _capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compared(sum(word.isupper() for word in WORD.findall(answer)), capital_relation, capital_frequency)


def _language(answer: str, language: str) -> bool:
    """A text without letters has no language that would be wrong."""
    from pipeline.data.cleaning.language import detect

    [code], _ = detect([answer])
    return code in (language, "und")


def _english_capital(answer: str) -> bool:
    return answer.isupper() and _language(answer.lower(), "en")


def _english_lowercase(answer: str) -> bool:
    return answer.islower() and _language(answer, "en")


# ---- form ------------------------------------------------------------------------------------------------------------


def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***; the first and the last one may be empty."""
    paragraphs = [bool(part.strip()) for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(paragraphs[1:-1]) and sum(paragraphs) == num_paragraphs


def _paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = answer.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    own = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = own.get(postscript_marker.strip(), postscript_marker.strip().lower())
    return re.search(pattern, answer.lower()) is not None


def _bullets(answer: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, flags=re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, flags=re.MULTILINE)) == num_bullets


def _highlights(answer: str, num_highlights: int) -> bool:
    """Text between asterisks; between two of them it counts twice where both patterns find it, as published."""
    single = [text for text in re.findall(r"\*[^\n\*]*\*", answer) if text.strip("*").strip()]
    double = [text for text in re.findall(r"\*\*[^\n\*]*\*\*", answer) if text[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", answer)) - 1 >= num_sections


def _json(answer: str) -> bool:
    text = answer.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(answer: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _constrained(answer: str) -> bool:
    return any(response in answer for response in RESPONSES)


def _two_responses(answer: str) -> bool:
    parts = answer.split("******")
    filled = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeated(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _no_comma(answer: str) -> bool:
    return "," not in answer


def _quotation(answer: str) -> bool:
    answer = answer.strip()
    return len(answer) > 1 and answer[0] == answer[-1] == '"'


CHECKS = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "combination:repeat_prompt": _repeated,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _keywords,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _keyword_frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:nth_paragraph_first_word": _paragraph_first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
}
