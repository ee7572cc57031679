"""A hook of t2idist.run: posts each event of a run to the address in T2IDIST_HOOK_URL.

    T2IDIST_HOOK_URL=https://hooks.example.com/... python -m t2idist.run attngan --hook 'python tools/notify_webhook.py'

The event comes as a JSON object on standard input; what is posted is the same object with a sentence under "text",
which is what Slack, Mattermost and Discord's Slack addresses show.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

SECONDS = 20.0


def sentence(event: dict[str, Any]) -> str:
    """The event in a line."""
    text = f"{event['run']}: {event['event']}"
    if event.get("stage"):
        text += f", stage {event['stage']} at {event['images']:,} of {event['budget_images']:,} images"
    if event.get("restarts"):
        text += f", restarts {event['restarts']}"
    return text + (f": {event['error']}" if event.get("error") else "")


def main() -> int:
    url = os.environ.get("T2IDIST_HOOK_URL", "")
    if not url.startswith(("https://", "http://")):
        print("T2IDIST_HOOK_URL: give the address to post to, http(s)://...", file=sys.stderr)
        return 2
    event = json.load(sys.stdin)
    body = json.dumps({**event, "text": sentence(event)}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return 0
    except OSError as error:  # its text may hold the address, which is a secret
        print(f"the post failed: {type(error).__name__} {getattr(error, 'code', '')}".strip(), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
