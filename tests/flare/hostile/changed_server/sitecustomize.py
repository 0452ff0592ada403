"""A server that was changed: it sends whatever its owner likes, and keeps all that it receives.

``WIRE_TAP=folder``: each message that a process of the server receives is kept there. ``ORDERS=folder``:
what ``order-*.pickle`` there lists is sent, and the answers are written beside it; ``tasks.json`` says how
the processes of jobs call each site's tasks (one that it does not name gets none yet);
what ``in-task.pickle`` lists goes, one after the other, into the cookies of their tasks.

Python imports a module of this name at its start, if it is on the path.
"""

import json
import os
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wire_tap import tap


def _obey() -> None:
    import nvflare.private.fed.server.admin as admin

    built = admin.FedAdminServer.__init__

    def init(self, *arguments, **named):  # type: ignore[no-untyped-def]
        built(self, *arguments, **named)
        threading.Thread(target=_follow_orders, args=(self,), daemon=True).start()

    admin.FedAdminServer.__init__ = init


def _follow_orders(server) -> None:  # type: ignore[no-untyped-def]
    folder = Path(os.environ["ORDERS"])
    while True:
        for order in sorted(folder.glob("order-*.pickle")):
            messages, timeout_s = pickle.loads(order.read_bytes())
            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda each: _send(server, each, timeout_s), messages))  # noqa: B023
            order.unlink()
            answer = order.with_name(order.name.replace("order", "answer"))
            answer.with_suffix(".part").write_bytes(pickle.dumps(answers))
            answer.with_suffix(".part").rename(answer)
        time.sleep(0.05)


def _send(server, each, timeout_s):  # type: ignore[no-untyped-def]
    """Send one message to every site, or to one cell; return site → what it answered."""
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import new_cell_message

    kind, *what = each
    try:
        if kind == "admin":
            topic, headers, body = what
            requests = {}
            for token in list(server.clients):
                message = Message(topic, body)
                for name, value in headers.items():
                    message.set_header(name, value)
                requests[token] = message
            with server.sai.new_context() as fl_ctx:
                replies = server.send_requests(requests, fl_ctx, timeout_secs=timeout_s)
            return {
                one.client_name: one.reply and (one.reply.headers, str(one.reply.body)) for one in replies
            }
        target, channel, topic, payload, *headers = what
        cell = server.cell
        message = new_cell_message(dict(*headers), payload)
        if kind == "stream":
            cell.send_blob(channel, topic, target, message)
            return {target: None}
        reply = cell.core_cell.send_request(channel, topic, target, message, timeout=0.5)
        return {target: (dict(reply.headers), repr(reply.payload))}
    except Exception as error:
        return {"the server's own": repr(error)}


def _ask_something_else() -> None:
    """Have the process of a job hand out another task than its workflow's, as ``tasks.json`` there says."""
    import nvflare.private.fed.server.server_runner as server_runner

    asked = server_runner.ServerRunner.process_task_request
    tasks = Path(os.environ["ORDERS"]) / "tasks.json"
    cookies = Path(os.environ["ORDERS"]) / "in-task.pickle"
    given: dict[str, int] = {}

    def process(self, client, fl_ctx):  # type: ignore[no-untyped-def]
        name, task_id, data = asked(self, client, fl_ctx)
        if not task_id or not tasks.is_file():
            return name, task_id, data
        left, next_one = pickle.loads(cookies.read_bytes()), given.setdefault(client.name, 0)
        if next_one < len(left):
            given[client.name] += 1
            data.set_cookie_jar({**(data.get_cookie_jar() or {}), "planted": left[next_one]})
            return name, task_id, data
        names = json.loads(tasks.read_bytes())
        return (names[client.name], task_id, data) if client.name in names else self._task_try_again()

    server_runner.ServerRunner.process_task_request = process


if os.environ.get("ORDERS") and any("nvflare.private.fed.app.server" in part for part in sys.orig_argv):
    _obey()
    _ask_something_else()
tap()
