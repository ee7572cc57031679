"""A hook for t2idist.run: post each event of a run to the URL in T2IDIST_HOOK_URL.

    T2IDIST_HOOK_URL=https://hooks.example.com/... python -m t2idist.run attngan --hook 'python tools/notify_webhook.py'

Reads the event from standard input as a JSON object, and adds a one-line summary under "text", which Slack, Mattermost
and Discord (with its Slack-compatible URLs) show.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

TIMEOUT_SECONDS = 20.0


def summarize(event: dict[str, Any]) -> str:
    """Describe the event in one line."""
    text = f"{event['run']}: {event['event']}"
    if event.get("stage"):
        text += f", stage {event['stage']} at {event['images']:,} of {event['budget_images']:,} images"
    if event.get("restarts"):
        text += f", restarts {event['restarts']}"
    return text + (f": {event['error']}" if event.get("error") else "")


def main() -> int:
    url = os.environ.get("T2IDIST_HOOK_URL", "")
    if not url.startswith(("https://", "http://")):
        print("T2IDIST_HOOK_URL: must be the URL to post to, http(s)://...", file=sys.stderr)
        return 2
    try:
        event = json.load(sys.stdin)
    except ValueError as error:
        print(f"standard input: not the JSON of an event: {error}", file=sys.stderr)
        return 2
    body = json.dumps({**event, "text": summarize(event)}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return 0
    except OSError as error:  # its message may contain the URL, which is a secret
        print(f"the post failed: {type(error).__name__} {getattr(error, 'code', '')}".strip(), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
