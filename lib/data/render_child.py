"""Render dialogues with a chat template, in a separate process, since a template may never end.

Protocol, one JSON line each. First: template, extra arguments, time limit per rendering in seconds.
Then: [messages, add_generation_prompt, date, extra arguments]. The reply is the text and the
character spans written by the assistant (including its end of turn), or an error.
"""

import faulthandler
import json
import os
import signal
import sys
from datetime import datetime

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template


def main() -> None:
    template, given, seconds = json.loads(sys.stdin.readline())

    def text_of(messages: list[dict], follows: bool = False) -> str:
        limit(seconds)
        options = given | more | {"chat_template": template, "add_generation_prompt": follows}
        return render_jinja_template([messages], **options)[0][0]

    for line in sys.stdin:
        try:
            messages, follows, day, more = json.loads(line)
            clock = datetime.fromisoformat(day).strftime
            _compile_jinja_template(template).globals["strftime_now"] = clock  # cached
            text = text_of(messages, follows)
            answer = {"text": text, "spans": [] if follows else spans_of(text_of, messages, text)}
        except Exception as error:  # noqa: BLE001  a template may raise any error
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        limit(0)
        print(json.dumps(answer), flush=True)


def limit(seconds: float) -> None:
    """End this process after `seconds`, even inside a long string operation; 0 cancels the limit.

    Counts CPU time if the system can, so that a loaded machine does not end a template.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def spans_of(text_of, messages: list[dict], text: str) -> list[tuple[int, int]]:
    """Return the spans of the assistant's turns, except those that later turns have changed."""
    spans = []
    for end, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            until = text if end == len(messages) else text_of(messages[:end])
            before = text_of(messages[: end - 1], True) if end > 1 else ""
            if text.startswith(until):
                start = len(os.path.commonprefix([before, until]))
                spans.append((start, len(until.rstrip())))
    return spans


if __name__ == "__main__":
    main()
