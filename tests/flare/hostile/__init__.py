"""Hostile jobs and a changed server in real processes: provisioned kits, TLS both ways, one federation.

The attacker holds the lead's kit (whatever bytes it submits) and the server (whatever messages it sends, see
``changed_server``). Server and clients are started in a folder in which modules and configurations lie. Each
site has secrets wherever it has something; afterwards none of them is anywhere at the server: on the wire, in
its kit with all jobs, logs and results, in its temporary files.

``conftest`` attacks the one federation, step by step; the tests look at what came of it:

- ``submissions``: hostile archives and jobs that build on each other, over the lead's own connection;
- ``raw_messages``: every archive of ``archives`` deployed to both sites, commands, and objects that FLARE's
  serializer would make something of (``objects``);
- ``running_jobs``: tasks that the server calls by other names, with objects in them, and a job of references;
- ``restarts``: clients that start again, with other kits and ledgers;
- ``test_nothing_came_of_it``: what holds after all of it.

``test_hostile_bytes`` and ``test_closed_messages`` look at the same tables in one process; what is planted in
kits and folders by hand is in ``test_strays``.
"""
