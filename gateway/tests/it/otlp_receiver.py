"""Receives OTLP over HTTP, decodes it with the official definitions, and writes what it got as
JSON, a message a line. First argument: the file. Prints its port. While the file's name with
`.refuse` exists, everything is refused with 503."""

import http.server
import os
import sys

from google.protobuf import json_format, unknown_fields
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

MESSAGES = {
    "/v1/traces": trace_service_pb2.ExportTraceServiceRequest,
    "/v1/metrics": metrics_service_pb2.ExportMetricsServiceRequest,
}


def unknown(message):
    """Whether the message, or one inside it, has a field that its definition does not know."""
    if len(unknown_fields.UnknownFieldSet(message)) > 0:
        return True
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        inner = [value] if isinstance(value, Message) else value
        if any(unknown(one) for one in inner):
            return True
    return False


class Receiver(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        status = 200
        if os.path.exists(sys.argv[1] + ".refuse"):
            status = 503
        elif self.headers["content-type"] != "application/x-protobuf":
            status = 415
        else:
            message = MESSAGES[self.path]()
            message.ParseFromString(body)
            # What the definitions do not know would be a field that is wrong.
            if unknown(message):
                status = 400
            line = json_format.MessageToJson(message, indent=None)
            with open(sys.argv[1], "a") as out:
                out.write(line + "\n")
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
print(server.server_address[1], flush=True)
server.serve_forever()
