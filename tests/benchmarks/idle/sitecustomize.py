"""Sites that do not train: in a trainer's process a site's half of a round gives an update of zeros at once.

Python imports a module of this name at its start, if it is on the path.
"""

import sys


def _do_not_train() -> None:
    from types import SimpleNamespace

    import torch

    from histoflare.rounds.strategy import Update, split
    from histoflare.site import work

    def idle(task, strategy, received, data, *, site, transport, **rest):  # type: ignore[no-untyped-def]
        like = strategy.sent(split(received)[0])
        zeros = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
        training = SimpleNamespace(mean_loss=0.0, n_steps=0, failures=())
        update = Update(site, transport.pack(zeros), 1.0)
        return SimpleNamespace(update=update, site_state={}, training=training)

    work.site_round = idle


if "histoflare.site.child" in sys.orig_argv:
    _do_not_train()
