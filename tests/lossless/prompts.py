"""Prompts of many kinds for the identity tests: code, chat, lists, prose, arithmetic, repetition."""

_CODE = [
    "def fibonacci(n):\n    ",
    "import os\nimport sys\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "SELECT name, age FROM users WHERE",
    "for (int i = 0; i < n; i++) {",
    "# Read a CSV file and print the mean of every column\nimport csv\n",
    "function debounce(callback, delay) {\n",
    "def test_addition():\n    assert add(1, 2) == 3\n\ndef test_subtraction():\n",
    "#!/bin/bash\nset -e\nfor file in *.txt; do\n",
    '{"name": "Ada", "age": 36, "languages": ["',
    "try:\n    value = int(text)\nexcept ValueError:\n",
    "fn largest(values: &[i32]) -> i32 {\n",
]
_PROSE = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "The theory of evolution explains",
    "It was a cold morning in November when the letter arrived. She",
    "Water boils at 100 degrees Celsius because",
    "The most important thing to know about the Roman Empire is",
    "In economics, supply and demand",
    "The old man sat on the bench and watched the children. He thought of",
    "Photosynthesis is the process by which",
    "My favourite season is autumn, because",
    "Der schnellste Weg nach Berlin ist",
    "The ship sailed into the harbour at dawn; its sails were",
]
_CHAT = [
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    for question in (
        "What is the tallest mountain in the world?",
        "Write a haiku about the rain.",
        "Explain recursion to a child.",
        "Give me three reasons to learn to cook.",
        "How do I reverse a list in Python?",
        "Translate 'good morning' into French, Spanish and Italian.",
        "Who wrote Pride and Prejudice, and when?",
        "Summarise the water cycle in two sentences.",
        "What is the difference between a virus and a bacterium?",
        "Suggest a name for a small bakery.",
    )
]
_LISTS = [
    "The days of the week are Monday, Tuesday,",
    "Shopping list:\n- milk\n- bread\n- eggs\n-",
    "The planets of the solar system:\n1. Mercury\n2. Venus\n3.",
    "January, February, March,",
    "Ingredients for pancakes:\n* 200 g flour\n* 2 eggs\n*",
    "Red, orange, yellow,",
    "The letters of the alphabet: A, B, C, D, E, F, G,",
    "| Country | Capital |\n|---|---|\n| France | Paris |\n| Spain | Madrid |\n|",
    "Steps to change a tyre:\n1. Park the car.\n2.",
    "Prime numbers: 2, 3, 5, 7, 11, 13,",
]
_ARITHMETIC = [
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    "Q: What is 12 times 7?\nA:",
    "If Tom has 5 apples and gives away 2, he has",
    "10, 20, 30, 40,",
    "The square root of 144 is",
    "2, 4, 8, 16, 32,",
    "A train travels 60 miles in one hour. In three hours it travels",
]
_REPETITION = [
    "the cat sat on the mat. the cat sat on the mat. the cat",
    "a b c a b c a b c a",
    "To be, or not to be, that is the question. To be, or not",
    "yes no yes no yes no yes",
    "<li>One</li>\n<li>Two</li>\n<li>Three</li>\n<li>",
]

PROMPTS: tuple[str, ...] = (*_CODE, *_PROSE, *_CHAT, *_LISTS, *_ARITHMETIC, *_REPETITION)

# A few that differ in kind, for the short run.
FEW: tuple[str, ...] = (_CODE[0], _PROSE[0], _LISTS[0], _CHAT[1])
