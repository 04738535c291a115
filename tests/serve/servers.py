"""A server process as a user starts it, and images as its clients send them."""

import base64
import http.client
import os
import signal
import subprocess
import sys

import openai
from conftest import ROOT


class Server:
    """A server process of its own and what reaches it."""

    def __init__(self, folder, log, *options, command="serve", **environment):
        arguments = ["-m", "tokenflex.cli", command, str(folder), "--port", "0", *options]
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),  # noqa: SIM115  the process has it
            text=True,
        )
        said = self.process.stdout.readline()
        assert said.startswith(("serving ", "try ")), said + log.read_text()
        self.url = said.split()[-1]
        self.port = int(self.url.split(":")[2].split("/")[0])

    def client(self, **options):
        return openai.OpenAI(base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def raw(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(90) == 0


def data_url(image, kind="image/png"):
    data = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:{kind};base64," + base64.b64encode(data).decode()
