"""Runs cases of `backend_cases.py` on the Keras backend that KERAS_BACKEND names.

The tests start it without arguments: it answers one JSON request a line on standard input with one JSON line
on standard output, arrays going through ``.npz`` files. By hand, one case and its arguments:

    KERAS_BACKEND=torch python tests/trainers/run_case.py train '{"lengths": [3]}'
"""

import json
import os
import sys
import traceback

import backend_cases
import numpy as np


def run(case, arguments):
    """The case's result as (JSON values, arrays)."""
    result = getattr(backend_cases, case)(**arguments)
    arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in result.items() if name not in arrays}, arrays


def serve():
    """Answers requests until standard input ends."""
    # Replies keep standard output to themselves; what the code under test prints goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            values, arrays = run(request["case"], request["arguments"])
            np.savez(request["path"], **arrays)
            reply = {"values": values, "path": request["path"]}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*run(sys.argv[1], json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")), sep="\n")
    else:
        serve()
