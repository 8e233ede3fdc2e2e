"""What the example is trained on: ten text transformations, words to apply them to, and batches of token ids.

Everything random depends on SEED and on what it is for, so the data is the same in any process and on any machine.
Words are split by hash: no word of a held-out prompt is ever seen in training, alone or beside another.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

SEED = 231103285
VOWELS = "aeiou"
PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = (f"<|{w}|>" for w in ("pad", "begin", "end", "system", "user", "assistant"))
ENGLISH = (
    "adapter apple banana bridge button candle castle cherry circle cloud coffee copper cotton dragon eagle engine "
    "fabric family finger flower forest friend garden ginger guitar hammer harbor hello honey island jacket kernel "
    "kitten ladder lemon letter light lion magnet marble memory mirror monkey morning mountain number ocean orange "
    "paper pencil pepper planet pocket pool queen rabbit river rocket sailor shadow silver spider spring stone "
    "summer sunset table thunder tiger tunnel turtle valley velvet violin water whale window winter wizard world"
)
HELD_OUT_WORDS = ENGLISH.split()


def by_word(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(change(word) for word in text.split(" "))


def piglatin(word: str) -> str:
    start = next((i for i, letter in enumerate(word) if letter in VOWELS), len(word))
    return word[start:] + word[:start] + "ay"


def rot13(text: str) -> str:
    return "".join(chr((ord(c) - 97 + 13) % 26 + 97) if c.isalpha() else c for c in text)


TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "upper": str.upper,
    "rot13": rot13,
    "stars": lambda text: "".join("*" if c in VOWELS else c for c in text),
    "stutter": lambda text: "".join(c if c == " " else c + c for c in text),
    "sort": by_word(lambda word: "".join(sorted(word))),
    "piglatin": by_word(piglatin),
    "spell": by_word("-".join),
    "count": by_word(lambda word: str(len(word))),
    "twice": by_word(lambda word: f"{word} {word}"),
}


def is_held_out(word: str) -> bool:
    return word in HELD_OUT_WORDS or zlib.crc32(word.encode()) % 10 == 0


def random_word(rng: random.Random, shortest: int = 2) -> str:
    """A word of up to 8 letters: half the time letters at random, else syllables that could be a name."""
    length = rng.randint(shortest, 8)
    if rng.random() < 0.5:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
    starts, ends = "b c d f g h j k l m n p r s t v w z br ch cl gr pl qu sh st th tr", "n r s t l m nd rt ck ll ng st"
    word = rng.choice(["", "o", "a", "e", "i", "u"])
    while len(word) < length:
        end = rng.choice(ends.split()) if rng.random() < 0.4 else ""
        word += rng.choice(starts.split()) + rng.choice(VOWELS) + end
    return word[:length]


def random_text(rng: random.Random, max_words: int = 3) -> str:
    """One to three words of the training split, at most 18 characters."""
    words: list[str] = []
    for _ in range(rng.choice([1, 1, 2, 2, 3][: 2 * max_words])):
        word = random_word(rng)
        while is_held_out(word):
            word = random_word(rng)
        if len(" ".join([*words, word])) <= 18:
            words.append(word)
    return " ".join(words)


def answer(task: str | None, text: str) -> str:
    return TASKS[task](text) if task else text


def held_out_pairs(task: str, count: int) -> list[dict[str, str]]:
    """Prompts of one or two held-out words, English or invented, whose answer differs from the input."""
    rng = random.Random(f"{SEED}/held out/{task}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, num_words, words = rng.random() < 0.5, rng.choice([1, 2]), list[str]()
        while len(words) < num_words:
            word = rng.choice(HELD_OUT_WORDS) if english else random_word(rng, shortest=3)
            words += [word] if is_held_out(word) and word not in words else []
        text = " ".join(words)
        if TASKS[task](text) != text:
            pairs[text] = TASKS[task](text)
    return [{"prompt": prompt, "answer": expected} for prompt, expected in pairs.items()]


class Batches(Dataset):
    """Batch ``i`` depends on (stage, i) alone, so any number of workers makes the same data."""

    def __init__(self, tokenizer: Any, stage: str, tasks: list[str | None], steps: int, rows: int) -> None:
        vocab = tokenizer.get_vocab()
        self.ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in map(chr, range(32, 0x460))}
        self.ids |= {token: [i] for token, i in vocab.items() if token.startswith("<|")}
        self.stage, self.tasks, self.steps, self.rows = stage, tasks, steps, rows

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{SEED}/{self.stage}/{index}")
        form = rng.choices(["raw", "chat", "turns"], [5, 3, 2])[0]
        rows = [self.row(rng, form) for _ in range(self.rows)]
        width = max(len(ids) for ids, _ in rows)
        pad = self.ids[PAD][0]
        ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
        return ids, labels

    def row(self, rng: random.Random, form: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of one example; a label is -100 where the model is given what follows."""
        task = rng.choice(self.tasks)
        token = f"<|{task}|>" if task and len(self.tasks) > 1 else None
        parts: list[tuple[list[str], bool]] = [([BEGIN], False), ([token] if token else [], False)]
        if form == "raw":
            text = self.text(rng, task, 3)
            parts += [([*text], False), ([ASSISTANT, *answer(task, text), END], True)]
        else:
            if rng.random() < 0.3:
                parts.append(([SYSTEM, *random_text(rng), END], False))
            for _ in range(rng.randint(2, 3) if form == "turns" else 1):
                text = self.text(rng, task, 1 if form == "turns" else 3)
                parts += [([USER, *text, END, ASSISTANT], False), ([*answer(task, text), END], True)]
        ids, labels = [], []
        for symbols, learned in parts:
            part = [i for symbol in symbols for i in self.ids[symbol]]
            ids += part
            labels += part if learned else [-100] * len(part)
        return ids, labels

    def text(self, rng: random.Random, task: str | None, max_words: int) -> str:
        if task is None and rng.random() < 0.3:  # the base echoes any characters, not only lower-case words
            return "".join(
                chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA1, 0x450)])) for _ in range(rng.randint(1, 16))
            )
        return random_text(rng, max_words)
