"""A supervisor beside each rank: one clear report of what ended a job, and its end everywhere.

``megasparse train`` starts itself again as a child and stays behind as that rank's supervisor, a small process that
imports no torch. The supervisors of a job talk over TCP with a hub in rank 0's, on the port after MASTER_PORT.

A rank that raises, is killed, hangs, or whose host is not heard from any more ends the job within seconds: the hub
prints what came first, with its traceback where it has one, naming rank, host and signal, and every supervisor ends its
rank. No launcher has to notice.

worker.py      what the rank itself calls: ``supervise``, ``tell``, ``report``
guard.py       the supervisor of one rank
hub.py         what rank 0's supervisor does for all of them
messages.py    what they say to each other
events.py      faults.jsonl, the record of a run's faults
"""

from megasparse.supervisor.events import append_event
from megasparse.supervisor.worker import RESUME, Beats, report, supervise, tell

__all__ = ["RESUME", "Beats", "append_event", "report", "supervise", "tell"]
