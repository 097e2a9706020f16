"""HTTP and websocket server of the embedded host: ComfyUI's interface and its clients talk to it as they talk to ComfyUI.

options.py       the command line                    app.py           routes and middlewares put together
main.py          start-up and the orderly end        routes_*.py      what each request does
prompt_queue.py  waiting, running, finished          worker.py        the one thread that executes
websocket.py     clients and their backlogs          messages.py      wire forms
jobs.py          /api/jobs from queue and history    security.py      what a request must pass first
users.py         settings and workflows of people    alias/           ComfyUI's module names for third-party packs
"""
