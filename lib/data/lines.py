"""Lines in many scripts and with rare signs, on which tokenizers are compared."""

from __future__ import annotations

LINES = [
    "Річка тече повз старе місто; пам'ять про під'їзд, ґанок і їжака не згасла.",
    "It's what they've said: the river doesn't wait, we'LL see. I'm sure, you'd agree?",
    "Die Straße führt über Köln nach Österreich – für 12,50 € im Jahr 2024.",
    "L'été dernier, où étiez-vous ? « À la mer », répondit-elle.",
    "Zażółć gęślą jaźń; příliš žluťoučký kůň; árvíztűrő tükörfúrógép.",
    "На востоке светает, ветер стихает, и слышен только шум воды.",
    "河水流过古老的城市。川は古い町を流れる。 강은 오래된 도시를 지나 흐른다.",
    "مرحبا بالعالم، שלום עולם, नमस्ते दुनिया, สวัสดีชาวโลก",
    "🦉🏳️‍🌈👩‍👩‍👧 emoji, signs → ≠ ± §, ꙮ𝔘𐍈 and ﷽",
    "def f(x):\n\treturn {'a': x**2, \"b\": [1, 22, 333, 4444, 55555]}\n\n\n    # end  \n",
    "  two blanks,   three;\ttabs\t\tand\r\nlines\n\n\n\nof nothing   ",
]
