"""Sites that do not train: in a trainer's process a site's half of a round gives an update of zeros at once.

Python imports a module of this name at its start, if it is on the path.
"""

import sys


def _do_not_train() -> None:
    from types import SimpleNamespace

    import torch

    from histoflare.rounds.strategy import Update, compress
    from histoflare.site import work

    def idle(task, strategy, state, data, *, site, **rest):  # type: ignore[no-untyped-def]
        zeros = {name: torch.zeros_like(state[name]) for name in strategy.sent_names(state)}
        training = SimpleNamespace(mean_loss=0.0, n_steps=0)
        update = Update(site, compress(zeros, strategy.transfer), 1.0)
        return SimpleNamespace(update=update, site_state={}, training=training)

    work.site_round = idle


if "histoflare.site.child" in sys.orig_argv:
    _do_not_train()
